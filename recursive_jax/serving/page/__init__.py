"""The page at `/`: a prompt, its answer coloured by depth, and the engine live beside it.

`page.html`, `page.css` and `page.js` are sent as they are. The page loads nothing from other hosts.
"""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from recursive_jax.serving.errors import ApiError
from recursive_jax.serving.event_stream import EventStream, sse
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

        return EventStream(_messages(feed.watch(every, over), facts()), deadline + 2 * SLOWEST)

    return [*(Route(path, _file(name)) for path, name in FILES.items()), Route("/engine", engine)]


async def _messages(news: AsyncGenerator[dict], facts: dict) -> AsyncIterator[str]:
    yield sse(facts)
    async with contextlib.aclosing(news):
        async for record in news:
            yield sse(record)


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
