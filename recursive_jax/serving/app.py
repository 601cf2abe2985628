"""The routes of the server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from recursive_jax import text
from recursive_jax.serving import asked as asked_lib
from recursive_jax.serving import metrics as metrics_lib
from recursive_jax.serving.errors import ApiError
from recursive_jax.serving.guard import LOOPBACK, Guard, read_body
from recursive_jax.serving.limits import ServerLimits
from recursive_jax.serving.metrics import Metrics
from recursive_jax.serving.openapi import document
from recursive_jax.serving.replies import Reply
from recursive_jax.serving.running import Runner, next_token, until
from recursive_jax.serving.schema import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    ReloadBody,
    TokenizeBody,
    parse,
)
from recursive_jax.serving.served import Served

SLOW_READER = 5.0  # seconds beyond the deadline in which a client can read what is sent


class App:
    """Handlers of all routes.

    Args:
      served: the model.
      runner: runs requests.
      ready: whether the first token came out.
      reload: loads the checkpoint's newest step, or the given one, and returns the step; None:
        weights cannot be replaced.
      page: routes of the page.
    """

    def __init__(
        self,
        served: Served,
        runner: Runner,
        limits: ServerLimits,
        metrics: Metrics,
        num_slots: int,
        ready: Callable[[], bool],
        reload: Callable[[int | None], Any] | None = None,
        key: str | None = None,
        local: bool = True,
        page: Sequence[Route] = (),
    ):
        self._served, self._runner, self._limits, self._metrics = served, runner, limits, metrics
        self._num_slots, self._ready, self._reload = num_slots, ready, reload
        self._key, self._local, self._page = key, local, page
        self._reloading = asyncio.Lock()

    def asgi(self) -> Callable:
        """The ASGI application."""
        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/openapi.json", self.openapi),
            Route("/docs", self.openapi),
            Route("/admin/reload", self.reload, methods=["POST"]),
            *self._page,
        ]
        handlers = {
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _nobody,
            Exception: _failure,
        }
        app = Starlette(routes=routes, exception_handlers=handlers)
        return Guard(app, self._key, self._local, self._metrics)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, CompletionBody, asked_lib.completion)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, ChatBody, asked_lib.chat)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        asked_lib.check_model(request.path_params["name"], self._served)
        return JSONResponse(self._model())

    async def tokenize(self, request: Request) -> Response:
        body = await self._body(request, TokenizeBody)
        served = self._served
        asked_lib.check_model(body.model, served)
        with asked_lib.as_client_errors("prompt" if body.messages == [] else "messages"):
            if body.messages:
                ids = asked_lib.chat_ids(body.messages, served)
            else:
                ids = text.encode(served.tokenizer, body.prompt, served.limits.vocab_size)
                if not body.add_special_tokens:
                    ids = ids[len(text.bos_prefix(served.tokenizer)) :]
        return JSONResponse(
            {"tokens": ids, "count": len(ids), "max_model_len": served.context_length}
        )

    async def detokenize(self, request: Request) -> Response:
        body = await self._body(request, DetokenizeBody)
        asked_lib.check_model(body.model, self._served)
        tokenizer, size = self._served.tokenizer, self._served.limits.vocab_size
        if max(body.tokens, default=0) >= size:
            raise ApiError(400, f"tokens: expected ids in 0 … {size - 1}", "tokens")
        found = tokenizer.decode(body.tokens, clean_up_tokenization_spaces=False)
        return JSONResponse({"prompt": found})

    async def tokenizer_info(self, request: Request) -> Response:
        tokenizer = self._served.tokenizer
        names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
        found = {name: getattr(tokenizer, name, None) for name in names}
        return JSONResponse(found | {"tokenizer_class": type(tokenizer).__name__})

    async def health(self, request: Request) -> Response:
        ready = self._ready()
        return JSONResponse({"status": "ok" if ready else "starting"}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=metrics_lib.CONTENT_TYPE)

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(document())

    async def reload(self, request: Request) -> Response:
        client = request.client.host if request.client else ""
        if self._key is None and client not in LOOPBACK:
            raise ApiError(403, "from this machine only, or with a key: --api_key")
        body = await self._body(request, ReloadBody)
        if self._reload is None:
            raise ApiError(400, "this model is no checkpoint of this package, so it has one step")
        async with self._reloading:
            try:
                self._served.step = await self._reload(body.step)
            except (ValueError, OSError) as error:
                raise ApiError(400, f"the old weights stay: {error}") from error
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        served = self._served
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "recursive_jax",
            "max_model_len": served.context_length,
            "num_loops": served.limits.num_loops,
            "step": served.step,
        }

    async def _body(self, request: Request, kind: type) -> Any:
        return parse(kind, await read_body(request, self._limits.max_body_bytes))

    async def _answer(self, request: Request, kind: type, translate: Callable) -> Response:
        deadline = asyncio.get_running_loop().time() + self._limits.max_seconds
        body = await self._body(request, kind)
        # Tokenising a long text would hold up other requests.
        asked = await asyncio.to_thread(translate, body, self._served, self._limits)
        give_back = self._runner.take_room(len(asked.requests), self._num_slots)
        reply = Reply(asked, self._served)
        if body.stream:
            return EventStream(self._stream(reply, deadline), deadline + SLOW_READER, give_back)
        try:
            await until(self._run(reply, deadline), gone(request))
        finally:
            give_back()
        return JSONResponse(reply.whole())

    async def _run(self, reply: Reply, deadline: float) -> None:
        async for _ in self._grow(reply, deadline):
            pass
        if reply.asked.rescored:
            for choice in reply.choices:
                choice.rescore(await self._runner.score(choice.ids))

    async def _grow(self, reply: Reply, deadline: float) -> AsyncIterator[tuple[int, Any]]:
        """Let the choices grow; yields `(choice, event)`, first None for an echoed prompt."""
        asked = reply.asked
        if asked.echo:
            scores = None
            if asked.top is not None:
                scores = [await self._runner.score(ids) for ids in asked.prompts]
            done = 0
            for number, choice in enumerate(reply.choices):
                mine = scores and scores[number // asked.body.n]
                choice.echo(mine)
                event = asked.generates and mine and next_token(asked, number, mine, self._served)
                if event:
                    choice.add(event)
                elif not asked.generates:
                    choice.finish_reason = "length"
                done += choice.finish_reason is not None
                yield number, None
            if done == len(reply.choices):
                return
        async with contextlib.aclosing(self._runner.events(asked, deadline)) as events:
            async for number, event in events:
                reply.choices[number].add(event)
                yield number, event

    async def _stream(self, reply: Reply, deadline: float) -> AsyncIterator[str]:
        sent: dict[int, tuple[int, int, int]] = {}
        try:
            for chunk in reply.begin():
                yield _sse(chunk)
            async with contextlib.aclosing(self._grow(reply, deadline)) as growing:
                async for number, _ in growing:
                    choice = reply.choices[number]
                    yield _sse(reply.chunk(choice, *sent.get(number, (0, 0, 0))))
                    sent[number] = choice.sizes
            if reply.asked.body.stream_options.include_usage:
                yield _sse(reply.last())
            yield "data: [DONE]\n\n"
        except ApiError as error:  # the status is sent: a client sees no [DONE]
            yield _sse(error.to_json())


class EventStream(StreamingResponse):
    """Server-sent events until a deadline of the event loop; then the connection breaks.

    `ended` is called at the end, whatever ends it.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], deadline: float, ended: Callable[[], None]):
        super().__init__(events, headers={"Cache-Control": "no-cache"})
        self._events, self._deadline, self._ended = events, deadline, ended

    async def __call__(self, scope, receive, send) -> None:
        try:
            async with asyncio.timeout_at(self._deadline):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            logging.warning("a client read too slowly; its connection is closed")
        except asyncio.CancelledError:
            logging.warning("the server ends before this answer; its connection is closed")
        finally:
            self._ended()
            await self._events.aclose()


async def gone(request: Request) -> None:
    """Return when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _sse(record: dict[str, Any]) -> str:
    return f"data: {json.dumps(record, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _api_error(request: Request, error: ApiError) -> Response:
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.to_json(), error.status, headers)


def _http_error(request: Request, error: HTTPException) -> Response:
    return JSONResponse(
        ApiError(error.status_code, error.detail).to_json(), error.status_code, error.headers
    )


def _nobody(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=400)  # the client left before it had sent its body


def _failure(request: Request, error: Exception) -> Response:
    logging.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return JSONResponse(ApiError(500, "the server failed; its log says why").to_json(), 500)
