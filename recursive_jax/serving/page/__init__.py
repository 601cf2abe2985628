"""The page at `/`: a prompt, its answer coloured by depth, and the engine live beside it.

`page.html`, `page.css` and `page.js` are sent as they are. The page loads nothing from other hosts.
"""

from __future__ import annotations

import asyncio
import json
import pathlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from recursive_jax.serving.errors import ApiError
from recursive_jax.serving.page.feed import Feed

FILES = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a browser asks whether the file changed
}
MAX_WATCHERS = 16  # pages that read the feed at the same time
LONGEST = 3600.0  # seconds of a feed; a page then opens another one
FASTEST, SLOWEST = 0.1, 10.0  # seconds between two messages


def routes(
    feed: Feed, facts: Callable[[], dict[str, Any]], closing: Callable[[], bool]
) -> list[Route]:
    """The routes of the page.

    Args:
      feed: of the engine.
      facts: what the page must know of the server; the first message of `GET /engine`.
      closing: whether the server ends; feeds then end too.
    """

    async def engine(request: Request) -> Response:
        """Server-sent events about the engine, every `?every=` seconds."""
        every = _seconds(request.query_params.get("every", "0.25"))
        if feed.num_watchers >= MAX_WATCHERS:
            raise ApiError(429, f"{MAX_WATCHERS} pages watch the engine already; close one")
        clock = asyncio.get_running_loop().time
        deadline = clock() + LONGEST

        def over() -> bool:
            return closing() or clock() > deadline

        return _Stream(facts(), feed.watch(every, over))

    return [*(Route(path, _file(name)) for path, name in FILES.items()), Route("/engine", engine)]


class _Stream(StreamingResponse):
    """Server-sent events: the facts, then the news, which end with the connection."""

    media_type = "text/event-stream"

    def __init__(self, facts: dict[str, Any], news: AsyncGenerator[dict[str, Any]]):
        async def events() -> AsyncIterator[str]:
            yield f"data: {json.dumps(facts)}\n\n"
            async for record in news:
                yield f"data: {json.dumps(record, separators=(',', ':'))}\n\n"

        super().__init__(events(), headers={"Cache-Control": "no-cache"})
        self._news = news

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._news.aclose()


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not FASTEST <= seconds <= SLOWEST:
        raise ApiError(400, f"every: expected seconds, {FASTEST} to {SLOWEST}", "every")
    return seconds


def _file(name: str) -> Callable:
    path = pathlib.Path(__file__).with_name(name)

    async def answer(request: Request) -> Response:
        return FileResponse(path, headers=HEADERS)

    return answer
