"""A worker process that calls functions one after another."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


class WorkerProcess:
    """A process that calls functions one after another and keeps their module state; a context manager.

    Args:
        environment: Environment variables in addition to this process's.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        before = dict(os.environ)
        os.environ.update(environment or {})
        try:
            self._process.submit(os.getpid).result()  # starts the process
        finally:
            os.environ.clear()
            os.environ.update(before)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.shutdown(cancel_futures=True)

    def submit(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Calls a module-level function in the process after all earlier calls; returns a future."""
        return self._process.submit(function, *args, **kwargs)

    def call(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Calls a module-level function in the process, and returns its result."""
        return self.submit(function, *args, **kwargs).result()
