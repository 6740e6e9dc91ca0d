"""The app's description: FastAPI's of the requests, completed by what the endpoints answer and how they refuse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from loramill.names import NAME_PATTERN
from loramill.serve.api.middleware.authentication import OPEN_PATHS
from loramill.serve.api.schemas.generation_objects import ChatCompletion, ChatCompletionChunk, Completion
from loramill.serve.api.schemas.job_objects import BatchResult, Checkpoint, Job, JobEventObject
from loramill.serve.api.schemas.objects import (
    Adapter,
    AdapterDataObject,
    AdapterDeleted,
    AdapterFiles,
    AdapterHistory,
    AdapterWarm,
    AdapterWithData,
    AuditChange,
    CreatedKey,
    CreatedTenant,
    DailyUsage,
    Error,
    File,
    FileCheck,
    FileDeleted,
    Health,
    ImportedAdapter,
    Key,
    ListObject,
    ModelDeleted,
    ModelObject,
    RevokedKey,
    Tenant,
    TenantDeleted,
    VersionDeleted,
)

Json = dict[str, Any]

_SUMMARY = """OpenAI's API over one base and an adapter of each tenant's: the `openai` client runs as it is.
A model's name is the base's, `tenant/adapter`, or `tenant/adapter@` and `champion`, `challenger`, `previous` or a
version. Every parameter that isn't supported is a 400 that names it; null means that a parameter wasn't given."""

_TAGS = {
    "inference": "Generation, and what can be asked.",
    "data": "Datasets, validated while they are uploaded, and the results of jobs.",
    "jobs": "Fine-tune jobs.",
    "adapters": "Adapters, their versions, and which of them answers.",
    "tenants": "Tenants, their keys and limits (an admin's business), their usage, and who changed what.",
    "health": "For whoever starts, stops and watches gateways.",
}

#: What an endpoint answers with status 200.
ANSWERS: Mapping[str, Any] = {
    "POST /v1/chat/completions": ChatCompletion,
    "POST /v1/completions": Completion,
    "GET /v1/models": ListObject[ModelObject],
    "GET /v1/models/{model}": ModelObject,
    "DELETE /v1/models/{model}": ModelDeleted,
    "POST /v1/files": File,
    "GET /v1/files": ListObject[File],
    "GET /v1/files/{file_id}": File,
    "POST /v1/files/check": FileCheck,
    "DELETE /v1/files/{file_id}": FileDeleted,
    "POST /v1/fine_tuning/jobs": Job,
    "GET /v1/fine_tuning/jobs": ListObject[Job],
    "GET /v1/fine_tuning/jobs/{job_id}": Job,
    "POST /v1/fine_tuning/jobs/{job_id}/cancel": Job,
    "POST /v1/fine_tuning/jobs/{job_id}/pause": Job,
    "POST /v1/fine_tuning/jobs/{job_id}/resume": Job,
    "POST /v1/fine_tuning/jobs/{job_id}/retry": Job,
    "GET /v1/fine_tuning/jobs/{job_id}/events": ListObject[JobEventObject],
    "GET /v1/fine_tuning/jobs/{job_id}/checkpoints": ListObject[Checkpoint],
    "POST /v1/fine_tuning/jobs/batch": BatchResult,
    "GET /v1/adapters": ListObject[Adapter],
    "GET /v1/adapters/{tenant}/{adapter}": AdapterHistory,
    "GET /v1/adapters/{tenant}/{adapter}/files": AdapterFiles,
    "POST /v1/adapters/{tenant}/{adapter}/import": ImportedAdapter,
    "POST /v1/adapters/{tenant}/{adapter}/promote": Adapter,
    "POST /v1/adapters/{tenant}/{adapter}/rollback": Adapter,
    "GET /v1/adapters/{tenant}/{adapter}/data": ListObject[AdapterDataObject],
    "POST /v1/adapters/{tenant}/{adapter}/data": AdapterWithData,
    "POST /v1/adapters/{tenant}/{adapter}/pin": Adapter,
    "POST /v1/adapters/{tenant}/{adapter}/unpin": Adapter,
    "POST /v1/adapters/{tenant}/{adapter}/warm": AdapterWarm,
    "DELETE /v1/adapters/{tenant}/{adapter}": AdapterDeleted,
    "DELETE /v1/adapters/{tenant}/{adapter}/versions/{version}": VersionDeleted,
    "POST /v1/adapters/{tenant}/{adapter}/rename": Adapter,
    "GET /v1/tenants": ListObject[Tenant],
    "POST /v1/tenants": Tenant,
    "POST /v1/tenants/batch": ListObject[CreatedTenant],
    "GET /v1/tenants/{tenant}": Tenant,
    "DELETE /v1/tenants/{tenant}": TenantDeleted,
    "POST /v1/tenants/{tenant}/share": Tenant,
    "POST /v1/tenants/{tenant}/limits": Tenant,
    "GET /v1/tenants/{tenant}/keys": ListObject[Key],
    "POST /v1/tenants/{tenant}/keys": CreatedKey,
    "DELETE /v1/keys/{key_id}": RevokedKey,
    "GET /v1/usage": ListObject[DailyUsage],
    "GET /v1/audit": ListObject[AuditChange],
    "GET /healthz": Health,
    "GET /readyz": Health,
    "GET /health": Health,
}

#: Objects of a stream's events.
STREAMS: Mapping[str, Any] = {
    "POST /v1/chat/completions": ChatCompletionChunk,
    "POST /v1/completions": Completion,
}

#: Answers that are no JSON.
MEDIA: Mapping[str, tuple[str, ...]] = {
    "GET /v1/files/{file_id}/content": ("application/octet-stream", "text/csv"),
    "GET /v1/adapters/{tenant}/{adapter}/files/{file}": ("application/octet-stream",),
    "GET /metrics": ("text/plain",),
}

_PLACE = "#/components/schemas/"
_ERROR: Json = {"$ref": _PLACE + "Error"}

_ERRORS = {
    400: "The request can't be carried out as it is written; `param` names what is wrong.",
    401: "No API key, or one that isn't known, has expired or was revoked.",
    403: "The key may not do this, whether the thing exists or not.",
    404: "Nothing of this name or id that the key may see.",
    409: "The thing exists already, or its state forbids the change.",
    413: "The body is larger than is taken.",
    429: "A limit or a quota is reached, or a queue is full.",
    500: "A defect here, logged under the request's id.",
    503: "A part that is needed isn't up (yet).",
    504: "The answer wasn't finished in the time that it had.",
}

_REQUEST_ID = {
    "required": True,
    "schema": {"type": "string"},
    "description": "The request's id, by which the access log in the gateway's home and its other logs name it.",
}
_RETRY_AFTER = {
    "schema": {"type": "string", "pattern": r"^\d+$"},
    "description": "Seconds to wait before asking again.",
}
_VERSION = {"schema": {"type": "string"}, "description": "The version that answers, if an adapter was asked."}
_CHALLENGE = {"schema": {"const": "Bearer"}}
_LIMITS: Json = {
    f"x-ratelimit-{what}-{kind}": {"schema": {"type": "string"}, "description": f"Of {kind}; only if there is a limit."}
    for what in ("limit", "remaining", "reset")
    for kind in ("requests", "tokens")
}

_ORGANIZATION = {
    "name": "OpenAI-Organization",
    "in": "header",
    "description": "The tenant that an admin's key acts for; a tenant's key needs none.",
    "schema": {"type": "string"},
}

#: What parts of a path may be; a model's name has a slash of its own.
_PARTS: Mapping[str, Json] = {
    "tenant": {"pattern": NAME_PATTERN},
    "adapter": {"pattern": NAME_PATTERN},
    "model": {"minLength": 1},
}
_PART: Json = {"pattern": "^[^/]+$"}


def describe(app: FastAPI) -> None:
    """Makes the app serve its whole description."""

    def description() -> Json:
        if app.openapi_schema is None:
            drawn = get_openapi(
                title=app.title,
                version=app.version,
                description=_SUMMARY,
                routes=app.routes,
                tags=[{"name": name, "description": about} for name, about in _TAGS.items()],
            )
            app.openapi_schema = completed(drawn)
        return app.openapi_schema

    # FastAPI's own way of extending a description.
    app.openapi = description  # type: ignore[method-assign]


def operations(description: Json) -> Iterator[tuple[str, Json]]:
    """Each operation with its name, such as `GET /v1/models`."""
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def completed(drawn: Json) -> Json:
    """FastAPI's description with answers, errors and security; changes what it is given.

    Raises:
        ValueError: a body and an answer are called the same.
    """
    named, shapes = _shapes()
    components = drawn.setdefault("components", {})
    bodies = {name: body for name, body in components.get("schemas", {}).items() if "ValidationError" not in name}
    if both := bodies.keys() & shapes.keys():
        raise ValueError(f"A body and an answer have the same name: {', '.join(sorted(both))}; rename one of them.")
    components["schemas"] = bodies | shapes
    components["responses"] = {str(status): _refusal(status) for status in _ERRORS}
    components["parameters"] = {"organization": _ORGANIZATION}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": "An API key: `lm-…`."}}
    drawn["security"] = [{"key": []}]
    for name, operation in operations(drawn):
        _complete(operation, name, named)
    return drawn


def _complete(operation: Json, name: str, named: Mapping[str, Json]) -> None:
    secured = name.partition(" ")[2] not in OPEN_PATHS
    answer = operation["responses"]["200"]
    answer["content"] = _content(name, named) or answer["content"]
    more = {"x-loramill-version": _VERSION} | _LIMITS if name in STREAMS else {}
    answer["headers"] = {"x-request-id": _REQUEST_ID} | more
    refusals = [
        status for status in _ERRORS if (secured or status in (500, 503)) and (name in STREAMS or status != 504)
    ]
    operation["responses"] = {"200": answer} | {
        str(status): {"$ref": f"#/components/responses/{status}"} for status in refusals
    }
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "path":
            parameter["schema"] |= _PARTS.get(parameter["name"], _PART)
    if secured:
        operation.setdefault("parameters", []).append({"$ref": "#/components/parameters/organization"})
    else:
        operation["security"] = []


def _content(name: str, named: Mapping[str, Json]) -> Json:
    """What an operation answers, by media type; empty: it isn't told here."""
    content: Json = {media: {"schema": {"type": "string", "format": "binary"}} for media in MEDIA.get(name, ())}
    if name in ANSWERS:
        content["application/json"] = {"schema": named[name]}
    if name in STREAMS:
        content["text/event-stream"] = {"schema": _event(named[f"{name} stream"])}
    return content


def _event(chunk: Json) -> Json:
    """One event of a stream: a chunk, an error after which nothing follows, or the mark of the end."""
    chunk_or_error = {"anyOf": [chunk, _ERROR]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": chunk_or_error}
    return {
        "type": "object",
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}},
        "required": ["data"],
    }


def _refusal(status: int) -> Json:
    headers: Json = {"x-request-id": _REQUEST_ID}
    if status == 401:
        headers["www-authenticate"] = _CHALLENGE
    if status in (429, 503):
        headers["retry-after"] = _RETRY_AFTER
    if status == 429:
        headers |= _LIMITS
    return {"description": _ERRORS[status], "headers": headers, "content": {"application/json": {"schema": _ERROR}}}


def _shapes() -> tuple[Mapping[str, Json], Json]:
    """Where each answer's schema is, by the operation's name (with " stream" for its chunks); and the schemas."""
    types = {**ANSWERS, **{f"{name} stream": chunk for name, chunk in STREAMS.items()}, "error": Error}
    places, definitions = TypeAdapter.json_schemas(
        [(name, "serialization", TypeAdapter(shape)) for name, shape in types.items()], ref_template=_PLACE + "{model}"
    )
    return {str(name): place for (name, _), place in places.items()}, definitions["$defs"]
