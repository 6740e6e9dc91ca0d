"""What a check of `loramill doctor` finds."""

from __future__ import annotations

from enum import StrEnum

from loramill.types import FrozenModel


class Status(StrEnum):
    """Result of a check; only `error` makes loramill unusable."""

    OK = "ok"
    WARN = "warn"
    ERROR = "error"


class Finding(FrozenModel):
    """Result of one check, with the fix if there is a problem."""

    what: str
    status: Status
    found: str
    fix: str = ""
