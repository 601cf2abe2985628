"""Answers that are server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse


class EventStream(StreamingResponse):
    """Server-sent events until a deadline of the event loop; then the connection breaks."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], deadline: float):
        super().__init__(events, headers={"Cache-Control": "no-cache"})
        self._events, self._deadline = events, deadline

    async def __call__(self, scope, receive, send) -> None:
        try:
            async with asyncio.timeout_at(self._deadline):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            logging.warning("a client read too slowly; its connection is closed")
        finally:
            await self._events.aclose()


def sse(record: dict[str, Any]) -> str:
    """One event."""
    return f"data: {json.dumps(record, ensure_ascii=False, separators=(',', ':'))}\n\n"
