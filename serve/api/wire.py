"""What all request bodies and lists have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

_T = TypeVar("_T")

#: OpenAI's metadata: up to 16 pairs.
Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    Field(max_length=16),
]


class Body(BaseModel):
    """A JSON body: strict types, unknown keys are errors, and null means that a key wasn't given.

    `asks_nothing` names parameters of OpenAI's API that loramill doesn't have, with the values that ask
    for what happens anyway; only with one of these are they accepted.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    asks_nothing: ClassVar[Mapping[str, Sequence[Any]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _asked(cls, given: object) -> object:
        if not isinstance(given, Mapping):
            return given
        try:
            json.dumps(given, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("the body holds half a surrogate pair, which is no character") from error
        return {
            key: value
            for key, value in given.items()
            if value is not None and not (key in cls.asks_nothing and value in cls.asks_nothing[key])
        }


class Paging(BaseModel):
    """The query of a list; filters that we don't have are errors, since ignoring one would answer too much."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    after: str | None = None
    limit: int = Field(default=20, ge=1, le=100)


Page = Annotated[Paging, Query()]


def page_of(rows: Sequence[_T], limit: int, show: Callable[[_T], Mapping[str, Any]]) -> dict[str, Any]:
    """A list object of the first `limit` rows; one row more than that tells that there are more."""
    data = [show(row) for row in rows[:limit]]
    ids = {"first_id": data[0].get("id"), "last_id": data[-1].get("id")} if data else {}
    return {"object": "list", "data": data, "has_more": len(rows) > limit, **ids}


def list_of(rows: Sequence[_T], show: Callable[[_T], Mapping[str, Any]]) -> dict[str, Any]:
    """A list object that holds everything."""
    return page_of(rows, len(rows), show)
