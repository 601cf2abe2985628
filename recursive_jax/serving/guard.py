"""What every HTTP request passes first: host, key, kind and length of the body."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import JSONResponse

from recursive_jax.serving.errors import ApiError
from recursive_jax.serving.metrics import Metrics

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPEN = ("/health", "/", "/page.css", "/page.js")  # without a key


class Guard:
    """ASGI middleware.

    Args:
      app: what it protects.
      key: that clients send as `Authorization: Bearer KEY`; None: no key.
      local: the server listens on loopback. Other names in `Host` are then refused without a key:
        a page of another site may have pointed its name here.
      metrics: counts answers.
    """

    def __init__(self, app: Callable[..., Awaitable], key: str | None, local: bool, metrics):
        self._app, self._key, self._local = app, key, local
        self._metrics: Metrics = metrics

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request = Request(scope)

        async def counted(message):
            if message["type"] == "http.response.start":
                route = scope.get("route")
                path = getattr(route, "path", "other")
                self._metrics.http.labels(path, message["status"]).inc()
            await send(message)

        try:
            self._check(request)
        except ApiError as error:
            response = JSONResponse(error.to_json(), error.status)
            return await response(scope, receive, counted)
        await self._app(scope, receive, counted)

    def _check(self, request: Request) -> None:
        if self._key is not None:
            if request.url.path not in OPEN:
                self._check_key(request.headers.get("authorization", ""))
        elif self._local and host_name(request.headers.get("host", "")) not in LOOPBACK:
            raise ApiError(400, "Host: this server answers to localhost only; see --host")
        if request.method == "POST":
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, "Content-Type: expected application/json")

    def _check_key(self, given: str) -> None:
        kind, _, key = given.partition(" ")
        # Headers are read as latin-1, whatever the client wrote.
        same = hmac.compare_digest(key.strip().encode("latin-1"), self._key.encode())
        if kind.lower() != "bearer" or not same:
            raise ApiError(401, "wrong or missing key; send Authorization: Bearer KEY")


def host_name(host: str) -> str:
    """The name of a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] or host


async def read_body(request: Request, most: int) -> bytes:
    """The body. Raises ApiError 413 if it has more than `most` bytes."""
    too_long = ApiError(413, f"the body has more than {most:,} bytes; send less at once")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > most:
        raise too_long
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise too_long
        parts.append(part)
    return b"".join(parts)
