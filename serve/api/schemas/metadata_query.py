"""Queries of lists that can be filtered by metadata: `metadata[key]=value` pairs are read into one mapping."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, StringConstraints, ValidationError

from loramill.errors import InvalidRequest
from loramill.serve.api.schemas.common import ListQuery

_METADATA = re.compile(r"metadata\[(.*)\]", re.DOTALL)
#: Metadata keys that objects can be listed by: SQLite's JSON paths cannot express others.
_METADATA_KEY = r"^[ !#-\[\]-~]*$"


class MetadataQuery(ListQuery):
    """The query of a list with a filter by metadata."""

    metadata: dict[Annotated[str, StringConstraints(pattern=_METADATA_KEY)], str] = Field(
        default={}, description="Pairs that the objects must have.", json_schema_extra={"additionalProperties": False}
    )


_Query = TypeVar("_Query", bound=MetadataQuery)


def read_query(request: Request, model: type[_Query], noun: str) -> _Query:
    """Reads a query.

    Args:
        noun: what is listed, for messages.

    Raises:
        InvalidRequest: a metadata key can't be searched.
        RequestValidationError: a parameter is unknown or invalid.
    """
    fields: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for name, value in request.query_params.items():
        found = _METADATA.fullmatch(name)
        if found is None:
            fields[name] = value
        elif not re.fullmatch(_METADATA_KEY, found[1]):
            raise InvalidRequest(
                f"{noun} can only be listed by metadata keys of printable ASCII without quotes.", param=name
            )
        else:
            metadata[found[1]] = value
    try:
        return model.model_validate(fields | ({"metadata": metadata} if metadata else {}))
    except ValidationError as error:
        problems = [{**problem, "loc": ("query", *problem["loc"])} for problem in error.errors()]
        raise RequestValidationError(problems) from error


def query_parameters(model: type[MetadataQuery]) -> dict[str, Any]:
    """Returns `openapi_extra` of the endpoint: FastAPI does not see what a function reads from the query itself."""
    return {
        "parameters": [
            {"name": name, "in": "query", "description": schema["description"], "schema": schema}
            | ({"style": "deepObject"} if name == "metadata" else {})
            for name, schema in model.model_json_schema()["properties"].items()
        ]
    }
