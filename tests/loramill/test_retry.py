"""An operation is retried while it is unavailable."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from loramill.errors import Conflict, DiskFull, LoramillError, Unavailable
from loramill.retry import retry_while_unavailable


def failing(errors: list[LoramillError]) -> Callable[[], int]:
    def operation() -> int:
        if errors:
            raise errors.pop()
        return 7

    return operation


def test_the_result_of_the_first_success_is_returned(caplog: pytest.LogCaptureFixture) -> None:
    operation = failing([Unavailable("away"), Unavailable("away")])
    assert retry_while_unavailable(operation, timeout_seconds=60, pause_seconds=0) == 7
    assert caplog.text.count("retrying for up to 60 s: away") == 1


def test_retrying_ends_after_the_timeout() -> None:
    with pytest.raises(Unavailable):
        retry_while_unavailable(failing([Unavailable("away")] * 1000), timeout_seconds=0.05, pause_seconds=0.01)


def test_only_the_given_errors_are_retried() -> None:
    with pytest.raises(Conflict):
        retry_while_unavailable(failing([Conflict("taken")]), timeout_seconds=60)
    assert (
        retry_while_unavailable(failing([DiskFull("full")]), timeout_seconds=60, pause_seconds=0, errors=(DiskFull,))
        == 7
    )
