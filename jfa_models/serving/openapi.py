"""/openapi.json: what the server takes, from the types that read it."""

import functools
import importlib.metadata
from typing import Any

import msgspec

from jfa_models.serving import schema

_POSTS = {
    "/v1/completions": (schema.CompletionRequest, "Continue a prompt."),
    "/v1/chat/completions": (schema.ChatRequest, "Answer a conversation."),
    "/v1/responses": (schema.ResponsesRequest, "Answer a conversation, as a list of items."),
    "/tokenize": (schema.TokenizeRequest, "Token ids of a text or a conversation."),
    "/detokenize": (schema.DetokenizeRequest, "The text of token ids."),
    "/v1/load_lora_adapter": (schema.LoadAdapterRequest, "Load an adapter."),
    "/v1/unload_lora_adapter": (schema.UnloadAdapterRequest, "Unload an adapter."),
}
_GETS = {
    "/v1/models": "The model and its adapters.",
    "/health": "Whether the engine runs.",
    "/ready": "Whether a request would run now.",
    "/version": "The version of jfa.",
    "/metrics": "Metrics for Prometheus.",
    "/tokenizer_info": "Special tokens and the chat template.",
    "/openapi.json": "This description.",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
# Messages are read as they come, and checked by hand: their fields depend on their roles.
_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "additionalProperties": False,
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["type", "text"],
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                    },
                },
            ]
        },
        "name": {"type": "string"},
        "tool_call_id": {"type": "string"},
        "tool_calls": {"type": "array", "items": {"type": "object"}},
        "reasoning_content": {"type": "string"},
    },
}


@functools.cache
def description() -> dict[str, Any]:
    """The OpenAPI description of the server."""
    kinds = [kind for kind, _ in _POSTS.values()]
    references, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    for name in ("ChatRequest", "TokenizeRequest"):
        components[name]["properties"]["messages"]["items"] = _MESSAGE
    failed = {"description": "An error.", "content": {"application/json": {"schema": _ERROR}}}
    paths: dict[str, Any] = {
        path: {"get": {"summary": text, "responses": {"200": {"description": text}, "default": failed}}}
        for path, text in _GETS.items()
    }
    for (path, (_, text)), reference in zip(_POSTS.items(), references, strict=True):
        body = {"required": True, "content": {"application/json": {"schema": reference}}}
        answers = {"200": {"description": "The answer, or server-sent events with stream: true."}, "default": failed}
        paths[path] = {"post": {"summary": text, "requestBody": body, "responses": answers}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "jfa", "version": importlib.metadata.version("jfa")},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
