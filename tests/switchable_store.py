"""An fsspec file system that tests can switch off, and stand-ins for botocore's errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

_OPERATIONS = frozenset(
    "cat_file exists find get_file info ls makedirs modified open pipe_file put_file rm rm_file".split()
)


class SwitchableStore(MemoryFileSystem):
    """Files in memory at `switched://bucket/…`.

    Attributes:
        error: makes the exception that an operation raises; None: the store works.
        met: how many operations raised it.
    """

    protocol = "switched"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    error: ClassVar[Callable[[str], Exception | None] | None] = None
    met: ClassVar[int] = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("switched://")))

    def unstrip_protocol(self, name: str) -> str:
        return f"switched:/{self._strip_protocol(name)}"

    def __getattribute__(self, name: str) -> Any:
        if name in _OPERATIONS and SwitchableStore.error is not None:
            error = SwitchableStore.error(name)
            if error is not None:
                return _raiser(error)
        return super().__getattribute__(name)


def _raiser(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        SwitchableStore.met += 1
        raise error

    return fail


fsspec.register_implementation("switched", SwitchableStore, clobber=True)


@contextmanager
def off(error: Callable[[], Exception], *operations: str) -> Iterator[None]:
    """Makes these operations, or all, fail while the block runs."""
    SwitchableStore.error = lambda name: error() if not operations or name in operations else None
    try:
        yield
    finally:
        SwitchableStore.error = None


def clear() -> None:
    SwitchableStore.store.clear()
    SwitchableStore.pseudo_dirs[:] = [""]
    SwitchableStore.error, SwitchableStore.met = None, 0


def _botocore(name: str, *bases: type[Exception]) -> Any:
    return type(name, bases, {"__module__": "botocore.exceptions"})


# As in botocore 1.43.
BotoCoreError = _botocore("BotoCoreError", Exception)
HTTPClientError = _botocore("HTTPClientError", BotoCoreError)
ConnectionFailed = _botocore("ConnectionError", BotoCoreError)
EndpointConnectionError = _botocore("EndpointConnectionError", ConnectionFailed)
ReadTimeoutError = _botocore("ReadTimeoutError", HTTPClientError)
NoCredentialsError = _botocore("NoCredentialsError", BotoCoreError)
ParamValidationError = _botocore("ParamValidationError", BotoCoreError)
_ClientError = _botocore("ClientError", Exception)


def client_error(code: str, status: int) -> Exception:
    """botocore's error for an error response of the server."""
    error: Exception = _ClientError(f"An error occurred ({code})")
    error.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}  # type: ignore[attr-defined]
    return error


def translated(kind: Exception, code: str, status: int) -> Exception:
    """s3fs' error for it: an OSError with it as its cause."""
    kind.__cause__ = client_error(code, status)
    return kind


def away() -> Exception:
    error: Exception = EndpointConnectionError('Could not connect to the endpoint URL: "http://10.1.2.3:9000/bucket"')
    return error
