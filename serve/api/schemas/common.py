"""Request bodies, lists and errors: what all endpoints have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Generic, Literal, NotRequired, TypeAlias, TypeVar

from fastapi import Path, Query
from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, StringConstraints, model_validator, with_config
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from typing_extensions import TypedDict

from loramill.names import NAME_PATTERN

_T = TypeVar("_T")

#: Response objects are TypedDicts: they describe dictionaries, which are not validated while serving.
response_object = with_config(ConfigDict(extra="forbid"))

#: Config of response objects that are models: their description lists all fields, also those with a default.
ALL_FIELDS = ConfigDict(json_schema_serialization_defaults_required=True)

ObjectType: TypeAlias = Annotated[_T, Field(description="Type of the object.")]
Deleted: TypeAlias = Annotated[Literal[True], Field(description="Always true.")]
CreatedAt: TypeAlias = Annotated[int, Field(description="When it was created, in seconds since the epoch.")]

# The patterns are not validated: names that cannot exist are a 403 or 404 like others.
TenantPath = Annotated[str, Path(description="Name of the tenant.", json_schema_extra={"pattern": NAME_PATTERN})]
AdapterPath = Annotated[
    str, Path(description="Name of the adapter, without its tenant.", json_schema_extra={"pattern": NAME_PATTERN})
]
ModelPath = Annotated[
    str,
    Path(
        description="Name of a model: the base, `tenant/adapter`, or `tenant/adapter@version`.",
        json_schema_extra={"minLength": 1},
    ),
]
_SEGMENT = {"pattern": "^[^/]+$"}
VersionPath = Annotated[
    str, Path(description="ID of the version, or at least its first 8 digits.", json_schema_extra=_SEGMENT)
]
FileIdPath = Annotated[str, Path(description="ID of the file.", json_schema_extra=_SEGMENT)]
FileNamePath = Annotated[str, Path(description="Name of a file of the version.", json_schema_extra=_SEGMENT)]
JobIdPath = Annotated[
    str, Path(description="ID of the job, or its first digits if no other job has them.", json_schema_extra=_SEGMENT)
]
KeyIdPath = Annotated[str, Path(description="ID of the API key.", json_schema_extra=_SEGMENT)]

#: Rejects NUL: a single one would keep PostgreSQL from looking anything up by metadata, for all tenants.
_NO_NUL = r"^[^\x00]*$"
#: OpenAI's metadata: up to 16 pairs.
Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(max_length=64, pattern=_NO_NUL)],
        Annotated[str, StringConstraints(max_length=512, pattern=_NO_NUL)],
    ],
    Field(max_length=16, description="Up to 16 pairs of strings of your own."),
]


_NOT_SUPPORTED = {"description": "Not supported. Accepted only with a value that changes nothing.", "anyOf": []}


class RequestBody(BaseModel):
    """A JSON body: types are strict, unknown keys are errors, and null means that a key is not given.

    `no_op_values` lists parameters of OpenAI's API that are not supported, with the values that change nothing. They
    are accepted with these values only.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    no_op_values: ClassVar[Mapping[str, Sequence[Any]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_no_ops(cls, body: object) -> object:
        if not isinstance(body, Mapping):
            return body
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("the body contains a lone surrogate (invalid Unicode)") from error
        return {
            key: value
            for key, value in body.items()
            if value is not None and not any(_same_json(value, no_op) for no_op in cls.no_op_values.get(key, ()))
        }

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Adds what `_drop_no_ops` accepts: null for optional keys, and the no-op values."""
        schema = handler.resolve_ref_schema(handler(core))
        properties = schema.setdefault("properties", {})
        for key in properties.keys() - schema.get("required", ()):
            properties[key] = _schema_or(properties[key], {"type": "null"})
        for key, values in cls.no_op_values.items():
            properties[key] = _schema_or(properties.get(key, _NOT_SUPPORTED), {"enum": [*values, None]})
        schema["additionalProperties"] = {"type": "null"}
        return schema


def _same_json(value: object, other: object) -> bool:
    """Whether two values are the same JSON. In Python, 0 equals False."""
    return type(value) is type(other) and value == other


def _schema_or(schema: JsonSchemaValue, alternative: JsonSchemaValue) -> JsonSchemaValue:
    """Adds an alternative to a schema. Title, description and default stay next to the alternatives."""
    if "anyOf" not in schema:
        about = {name: schema[name] for name in ("title", "description", "default") if name in schema}
        schema = about | {"anyOf": [{name: value for name, value in schema.items() if name not in about}]}
    return schema if alternative in schema["anyOf"] else schema | {"anyOf": [*schema["anyOf"], alternative]}


def without_nul(text: str) -> str:
    """Returns a text that a database can store.

    Raises:
        ValueError: it contains NUL.
    """
    if "\x00" in text:
        raise ValueError("must not contain NUL")
    return text


class ListQuery(BaseModel):
    """The query of a list. Unknown filters are errors, since ignoring one would return too much."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    after: str | None = Field(default=None, description="ID of the last object of the previous page.")
    limit: int = Field(default=20, ge=1, le=100, description="Maximum number of objects.")


ListQueryParam = Annotated[ListQuery, Query()]


@response_object
class ListObject(TypedDict, Generic[_T]):
    """A list, or a page of one. The next page starts `after` the `last_id`."""

    object: ObjectType[Literal["list"]]
    data: Annotated[list[_T], Field(description="The objects.")]
    has_more: Annotated[bool, Field(description="Whether there are more pages.")]
    first_id: NotRequired[Annotated[str | int | None, Field(description="ID of the first object.")]]
    last_id: NotRequired[Annotated[str | int | None, Field(description="ID of the last object.")]]


@response_object
class ErrorDetail(TypedDict):
    """An error: what is wrong, where, and what to do."""

    message: Annotated[str, Field(description="What is wrong and what to do.")]
    type: Annotated[str, Field(description='Kind of error, such as "invalid_request_error".')]
    param: Annotated[str | None, Field(description="Parameter at fault.")]
    code: Annotated[str, Field(description='Code of the error, such as "model_not_found".')]


@response_object
class ErrorResponse(TypedDict):
    """An error in OpenAI's format."""

    error: Annotated[ErrorDetail, Field(description="The error.")]


def page_object(rows: Sequence[_T], limit: int, render: Callable[[_T], Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a list object of the first `limit` rows. If there is one more row, there are more pages."""
    data = [render(row) for row in rows[:limit]]
    ids = {"first_id": data[0].get("id"), "last_id": data[-1].get("id")} if data else {}
    return {"object": "list", "data": data, "has_more": len(rows) > limit, **ids}


def list_object(rows: Sequence[_T], render: Callable[[_T], Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a list object of all rows."""
    return page_object(rows, len(rows), render)
