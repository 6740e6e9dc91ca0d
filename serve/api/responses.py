"""OpenAPI descriptions of responses: the success of each endpoint, and the errors that endpoints share.

They only describe: no response is validated or serialized with these models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from loramill.serve.api.schemas.common import ErrorResponse

#: The `responses` of a FastAPI router or route.
Responses: TypeAlias = dict[int | str, dict[str, Any]]

_RATE_LIMITS = {
    "limit": "{kind} allowed per minute.",
    "remaining": "{kind} left in the current minute.",
    "reset": 'Time until all {kind} of the limit are available again, such as "7.5s".',
}

#: Response headers, which `openapi.py` lists among the components.
HEADERS: Mapping[str, dict[str, Any]] = {
    "x-request-id": {
        "required": True,
        "schema": {"type": "string"},
        "description": "ID of the request, which also identifies it in the access log and in the gateway's log.",
    },
    "x-loramill-version": {
        "schema": {"type": "string"},
        "description": "Version that generates the response, if the model is an adapter.",
    },
    "www-authenticate": {"schema": {"const": "Bearer"}, "description": "Authentication scheme."},
    "retry-after": {
        "schema": {"type": "string", "pattern": r"^\d+$"},
        "description": "Seconds to wait before the next attempt.",
    },
    **{
        f"x-ratelimit-{name}-{kind}": {
            "schema": {"type": "string"},
            "description": f"{description.format(kind=kind).capitalize()} Only sent if the tenant has such a limit.",
        }
        for name, description in _RATE_LIMITS.items()
        for kind in ("requests", "tokens")
    },
}
_RATE_LIMIT_HEADERS = [name for name in HEADERS if name.startswith("x-ratelimit-")]


def _headers(*names: str) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in ("x-request-id", *names)}


def _error(description: str, *headers: str) -> dict[str, Any]:
    # Not as `model`, since FastAPI would build a validator for every error of every route, half a second in all.
    content = {"application/json": {"schema": _reference(ErrorResponse)}}
    return {"description": description, "headers": _headers(*headers), "content": content}


def _reference(model: Any) -> dict[str, str]:
    """Refers to a response object that `openapi.py` lists among the components."""
    return {"$ref": f"#/components/schemas/{model.__name__}"}


#: Errors of every endpoint, with or without an API key.
OPEN_ERRORS: Responses = {
    500: _error("Internal error, logged under the request ID."),
    503: _error("A required component is not available yet.", "retry-after"),
}

#: Errors of the endpoints that require an API key.
ERRORS: Responses = {
    400: _error("The request is invalid. `param` names the parameter at fault."),
    401: _error("The API key is missing, unknown, expired or revoked.", "www-authenticate"),
    403: _error("The API key does not allow this. The error is the same whether or not the resource exists."),
    404: _error("No resource that the API key can access has this name or id."),
    409: _error("The resource already exists, or its state does not allow the change."),
    413: _error("The request body is too large."),
    429: _error("A rate limit or a quota is reached, or a queue is full.", "retry-after", *_RATE_LIMIT_HEADERS),
    **OPEN_ERRORS,
}


#: `openapi_extra` of an endpoint that needs no API key.
NO_KEY: dict[str, Any] = {"security": []}


def returns(model: Any) -> Responses:
    """Describes a JSON response."""
    return {200: {"model": model, "headers": _headers()}}


def returns_file(*media_types: str) -> Responses:
    """Describes a response of bytes."""
    schema = {"type": "string", "format": "binary"}
    return {200: {"headers": _headers(), "content": {media_type: {"schema": schema} for media_type in media_types}}}


def returns_generation(model: Any, chunk: Any) -> Responses:
    """Describes the response of a generation: JSON, or server-sent events of chunks.

    Args:
        model: the JSON response.
        chunk: the data of an event. `openapi.py` adds its schema to the components.
    """
    # An event holds a chunk, an error that ends the stream, or the mark of the end.
    alternatives = {"anyOf": [_reference(chunk), _reference(ErrorResponse)]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": alternatives}
    event = {
        "type": "object",
        "properties": {"data": {"description": "A chunk, an error or `[DONE]`.", "anyOf": [{"const": "[DONE]"}, data]}},
        "required": ["data"],
    }
    return {
        200: {
            "model": model,
            "headers": _headers("x-loramill-version", *_RATE_LIMIT_HEADERS),
            "content": {"text/event-stream": {"schema": event}},
        },
        504: _error("The response was not finished within the time limit."),
    }
