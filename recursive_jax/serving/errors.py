"""Errors that a client is told. Standard library only."""

from __future__ import annotations

from typing import Any

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error.

    Args:
      status: of HTTP.
      message: one sentence for the client. It holds no text of prompts.
      param: field of the body that is wrong.
    """

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param

    def to_json(self) -> dict[str, Any]:
        """The body of the answer, as OpenAI's clients read it."""
        default = "invalid_request_error" if self.status < 500 else "server_error"
        kind = KINDS.get(self.status, default)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.status}
        return {"error": error}
