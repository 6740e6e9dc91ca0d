"""What all request bodies and lists have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, StringConstraints, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

_T = TypeVar("_T")

#: A single NUL would keep PostgreSQL from looking anything up by metadata, whoever's.
_NO_NUL = r"^[^\x00]*$"
#: OpenAI's metadata: up to 16 pairs.
Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(max_length=64, pattern=_NO_NUL)],
        Annotated[str, StringConstraints(max_length=512, pattern=_NO_NUL)],
    ],
    Field(max_length=16),
]


class RequestBody(BaseModel):
    """A JSON body: strict types, unknown keys are errors, and null means that a key wasn't given.

    `asks_nothing` names parameters of OpenAI's API that loramill doesn't have, with the values that ask
    for what happens anyway; only with one of these are they accepted.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    no_op_values: ClassVar[Mapping[str, Sequence[Any]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_no_ops(cls, given: object) -> object:
        if not isinstance(given, Mapping):
            return given
        try:
            json.dumps(given, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("the body holds half a surrogate pair, which is no character") from error
        return {
            key: value
            for key, value in given.items()
            if value is not None and not any(_same_json(value, nothing) for nothing in cls.no_op_values.get(key, ()))
        }

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The schema of what `_asked` lets through: what isn't required may be null, and some may ask for nothing."""
        schema = handler.resolve_ref_schema(handler(core))
        properties = schema.setdefault("properties", {})
        for key in properties.keys() - schema.get("required", ()):
            properties[key] = _schema_or(properties[key], {"type": "null"})
        for key, nothing in cls.no_op_values.items():
            properties[key] = _schema_or(properties.get(key), {"enum": [*nothing, None]})
        schema["additionalProperties"] = {"type": "null"}
        return schema


def _same_json(given: object, nothing: object) -> bool:
    """Whether two values are the same JSON: Python's 0 is False, and JSON's isn't."""
    return type(given) is type(nothing) and given == nothing


def _schema_or(schema: JsonSchemaValue | None, more: JsonSchemaValue) -> JsonSchemaValue:
    """A schema that also takes `more`; what describes the whole stays beside the alternatives."""
    if schema is None:
        return more
    if "anyOf" not in schema:
        said = {name: schema[name] for name in ("title", "description", "default") if name in schema}
        schema = said | {"anyOf": [{name: value for name, value in schema.items() if name not in said}]}
    return schema if more in schema["anyOf"] else schema | {"anyOf": [*schema["anyOf"], more]}


class ListQuery(BaseModel):
    """The query of a list; filters that we don't have are errors, since ignoring one would answer too much."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    after: str | None = None
    limit: int = Field(default=20, ge=1, le=100)


ListQueryParam = Annotated[ListQuery, Query()]


def page_object(rows: Sequence[_T], limit: int, render: Callable[[_T], Mapping[str, Any]]) -> dict[str, Any]:
    """A list object of the first `limit` rows; one row more than that tells that there are more."""
    data = [render(row) for row in rows[:limit]]
    ids = {"first_id": data[0].get("id"), "last_id": data[-1].get("id")} if data else {}
    return {"object": "list", "data": data, "has_more": len(rows) > limit, **ids}


def list_object(rows: Sequence[_T], render: Callable[[_T], Mapping[str, Any]]) -> dict[str, Any]:
    """A list object that holds everything."""
    return page_object(rows, len(rows), render)
