"""The page at `/`: a prompt, its answer coloured by depth, and the engine live beside it.

`page.html`, `page.css` and `page.js` are sent as they are. The page loads nothing from other hosts.
"""

from __future__ import annotations

import asyncio
import json
import pathlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from recursive_jax.serving.errors import ApiError
from recursive_jax.serving.guard import read_body
from recursive_jax.serving.page.feed import Feed
from recursive_jax.serving.schema import ByLoopBody, parse

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
    feed: Feed,
    facts: Callable[[], dict[str, Any]],
    closing: Callable[[], bool],
    max_body_bytes: int,
    by_loop: Callable[[list[int]], Awaitable[np.ndarray]] | None,
) -> list[Route]:
    """The routes of the page.

    Args:
      feed: of the engine.
      facts: what the page must know of the server; the first message of `GET /engine`.
      closing: whether the server ends; feeds then end too.
      by_loop: ids -> log-probabilities of ids 1, 2, … after every loop; None: not served.
    """
    busy = asyncio.Lock()

    async def probabilities(request: Request) -> Response:
        """Probabilities of an answer's tokens after each loop, at full depth."""
        body = parse(ByLoopBody, await read_body(request, max_body_bytes))
        known = facts()
        if by_loop is None:
            raise ApiError(400, "probabilities by loop are not served on several devices")
        if len(body.tokens) > known["context"] or max(body.tokens) >= known["vocabulary"]:
            raise ApiError(
                400,
                f"tokens: expected {known['context']} ids at most, 0 … {known['vocabulary'] - 1}",
                "tokens",
            )
        if busy.locked():
            raise ApiError(429, "the engine scores another answer; send the request again later")
        async with busy:
            found = np.exp(await by_loop(body.tokens))[body.start - 1 :]
        return JSONResponse({"probabilities": np.nan_to_num(found).round(4).tolist()})

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

    files = [Route(path, _file(name)) for path, name in FILES.items()]
    by_loop_route = Route("/by_loop", probabilities, methods=["POST"])
    return [*files, Route("/engine", engine), by_loop_route]


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
