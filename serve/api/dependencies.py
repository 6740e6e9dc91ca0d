"""What every endpoint works with, and how it gets it: parameters annotated `Here` and `Who`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from loramill.data.tokenizer import ChatTokenizer
from loramill.models.catalog import Base
from loramill.names import AdapterName
from loramill.registry import Registry
from loramill.serve.api.cache import Remembered
from loramill.serve.api.limits.tracker import Books
from loramill.serve.api.middleware.authentication import Caller
from loramill.serve.api.readings import Readings
from loramill.serve.protocol import Backend
from loramill.settings import Settings
from loramill.types import VersionRecord


@dataclass(frozen=True, slots=True)
class Served:
    """A base that can be asked, and what answers for it and for its adapters."""

    base: Base
    backend: Backend


@dataclass(frozen=True, slots=True)
class Gateway:
    """The record, the bases that are served, and what is known of files.

    Attributes:
        base: the one that new jobs train on.
        tokenizer: its.
        served: it and any others, by name.
        versions: what an adapter's alias or prefix of a version names.
        books: what tenants use here.
    """

    registry: Registry
    base: Base
    tokenizer: ChatTokenizer
    served: Mapping[str, Served]
    settings: Settings
    readings: Readings
    versions: Remembered[tuple[AdapterName, str], VersionRecord]
    books: Books


# Both are async, so that FastAPI needs no thread to call them.
async def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


async def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


Here = Annotated[Gateway, Depends(_gateway)]
Who = Annotated[Caller, Depends(_caller)]
