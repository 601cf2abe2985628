"""The server's OpenAPI document, made of the schema of bodies."""

from __future__ import annotations

import functools
from typing import Any

from recursive_jax.serving.schema import (
    Body,
    ByLoopBody,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    ReloadBody,
    TokenizeBody,
)

POSTS: dict[str, tuple[type[Body], str]] = {
    "/v1/completions": (CompletionBody, "Continue texts."),
    "/v1/chat/completions": (ChatBody, "Answer a conversation."),
    "/tokenize": (TokenizeBody, "Token ids of a prompt, or of a conversation."),
    "/detokenize": (DetokenizeBody, "The text of token ids."),
    "/by_loop": (ByLoopBody, "Probabilities of an answer's tokens after every loop."),
    "/admin/reload": (ReloadBody, "Replace the weights by another step of the checkpoint."),
}
GETS = {
    "/v1/models": "The model that is served.",
    "/tokenizer_info": "Special tokens and chat template.",
    "/health": "200 once the first token came out, 503 before.",
    "/metrics": "Counters in Prometheus's text format.",
    "/openapi.json": "This document.",
}
REFERENCES = "#/components/schemas/{model}"


@functools.cache
def document() -> dict[str, Any]:
    """The OpenAPI document, as JSON."""
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    error = {"description": "`error.message` says what is wrong and what to do."}
    codes = {"200": {"description": "The answer."}, "4XX": error}
    for path, (kind, summary) in POSTS.items():
        schema = kind.model_json_schema(ref_template=REFERENCES)
        schemas |= schema.pop("$defs", {})
        schemas[kind.__name__] = schema
        reference = {"$ref": REFERENCES.format(model=kind.__name__)}
        content = {"application/json": {"schema": reference}}
        paths[path] = {
            "post": {
                "summary": summary,
                "requestBody": {"required": True, "content": content},
                "responses": codes | {"5XX": error},
            }
        }
    for path, summary in GETS.items():
        responses = {"200": codes["200"]} | ({"503": error} if path == "/health" else {})
        paths[path] = {"get": {"summary": summary, "responses": responses}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "recursive_jax", "version": "1"},
        "paths": paths,
        "components": {"schemas": schemas},
    }
