"""The parts of the OpenAPI description that FastAPI does not derive from the endpoints."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter

from loramill.serve.api.responses import HEADERS
from loramill.serve.api.schemas.chat import ChatCompletionChunk
from loramill.serve.api.schemas.common import ErrorResponse

#: Introduction of the whole API.
DESCRIPTION = """OpenAI-compatible API for a base model and its tenants' adapters. The `openai` client works unchanged.

A model's name is the base's name, `tenant/adapter` (the adapter's champion), or `tenant/adapter@` followed by
`champion`, `challenger`, `previous` or a version. A parameter that is not supported is an error (400) that names it.
A parameter that is null counts as not given."""

#: Groups of endpoints.
TAGS = [
    {"name": "inference", "description": "Text generation, and the models that can be used."},
    {"name": "feedback", "description": "Stored completions, and ratings and corrections of their answers."},
    {"name": "data", "description": "Dataset files, which are validated on upload, and result files of jobs."},
    {"name": "jobs", "description": "Fine-tune jobs."},
    {"name": "adapters", "description": "Adapters, their versions, and the aliases that point to versions."},
    {
        "name": "tenants",
        "description": "Tenants, API keys, limits, usage and the audit log. Changes need an admin key.",
    },
    {"name": "health", "description": "Health checks and Prometheus metrics."},
]

#: Response objects that `responses.py` describes by reference, so that FastAPI does not know them.
_REFERENCED = (ChatCompletionChunk, ErrorResponse)

_COMPONENTS: dict[str, Any] = {
    "headers": HEADERS,
    "parameters": {
        "organization": {
            "name": "OpenAI-Organization",
            "in": "header",
            "description": "Tenant that an admin key acts for. Tenant keys do not need it.",
            "schema": {"type": "string"},
        }
    },
    "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "An API key: `lm-…`."}},
}


def extend_openapi(app: FastAPI) -> None:
    """Completes the app's OpenAPI description when it is generated."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(generate())
        return generate()

    # FastAPI's documented way to extend a description.
    app.openapi = openapi  # type: ignore[method-assign]


def _complete(description: dict[str, Any]) -> None:
    description["security"] = [{"key": []}]
    components = description["components"]
    components |= _COMPONENTS
    # Validation errors have status 400 here, so FastAPI's own are removed.
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    components["schemas"] |= TypeAdapter.json_schemas(
        [(number, "serialization", TypeAdapter(each)) for number, each in enumerate(_REFERENCED)],
        ref_template="#/components/schemas/{model}",
    )[1]["$defs"]
    for operations in description["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if operation.get("security") != []:
                operation.setdefault("parameters", []).append({"$ref": "#/components/parameters/organization"})
