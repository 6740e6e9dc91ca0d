"""What the errors of fsspec's backends mean, and the messages about a store that cannot be used."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
from fsspec.exceptions import FSTimeoutError

from loramill.errors import ArtifactMissing, SetupError, StoreUnusable, Unavailable
from loramill.storage.object_store import (
    check_store,
    open_filesystem,
    redacted_url,
    store_fault,
    translate_store_errors,
)

from ... import switchable_store
from ...switchable_store import client_error, translated

URL = "switched://bucket/loramill"


@pytest.fixture(autouse=True)
def store() -> Iterator[None]:
    switchable_store.clear()
    yield
    switchable_store.clear()


def aiohttp_status(status: int) -> Exception:
    request_info = SimpleNamespace(real_url="http://10.1.2.3:9000/bucket")
    return aiohttp.ClientResponseError(request_info, (), status=status)  # type: ignore[arg-type]


class GoogleError(Exception):
    """The error that gcsfs raises."""

    __module__ = "gcsfs.retry"

    def __init__(self, code: int) -> None:
        super().__init__("?")
        self.code = code


FAULTS = {
    "no endpoint": (switchable_store.away(), "unreachable"),
    "a read that takes too long": (switchable_store.ReadTimeoutError("?"), "unreachable"),
    "an inner error": (client_error("InternalError", 500), "unreachable"),
    "too many requests": (client_error("SlowDown", 503), "unreachable"),
    "an inner error, by s3fs": (translated(OSError(errno.EREMOTEIO, "?"), "InternalError", 500), "unreachable"),
    "an unknown code, by s3fs": (translated(OSError(errno.EIO, "?"), "Strange", 502), "unreachable"),
    "a connection that aiohttp loses": (aiohttp.ServerDisconnectedError(), "unreachable"),
    "a body that is cut off": (aiohttp.ClientPayloadError("?"), "unreachable"),
    "aiohttp's 503": (aiohttp_status(503), "unreachable"),
    "gcsfs's 500": (GoogleError(500), "unreachable"),
    "a time-out": (TimeoutError(), "unreachable"),
    "asyncio's": (TimeoutError(), "unreachable"),
    "fsspec's": (FSTimeoutError(), "unreachable"),
    "refused": (ConnectionRefusedError(errno.ECONNREFUSED, "?"), "unreachable"),
    "no such host": (socket.gaierror(socket.EAI_AGAIN, "?"), "unreachable"),
    "a stale handle": (OSError(errno.ESTALE, "Stale file handle"), "unreachable"),
    "a mount that is gone": (OSError(errno.ENOTCONN, "Transport endpoint is not connected"), "unreachable"),
    "no bucket": (translated(FileNotFoundError("?"), "NoSuchBucket", 404), "bucket"),
    "another region": (client_error("PermanentRedirect", 301), "bucket"),
    "no credentials": (switchable_store.NoCredentialsError("?"), "credentials"),
    "an unknown key": (translated(PermissionError("?"), "InvalidAccessKeyId", 403), "credentials"),
    "a wrong secret": (client_error("SignatureDoesNotMatch", 403), "credentials"),
    "an old token": (translated(PermissionError("?"), "ExpiredToken", 400), "credentials"),
    "no permission": (translated(PermissionError("?"), "AccessDenied", 403), "permission"),
    "no permission, bare": (PermissionError("?"), "permission"),
    "gcsfs's 403": (GoogleError(403), "permission"),
    "no such key": (translated(FileNotFoundError("?"), "NoSuchKey", 404), None),
    "no such file": (FileNotFoundError(errno.ENOENT, "?"), None),
    "aiohttp's 404": (aiohttp_status(404), None),
    "a file that may not be read": (PermissionError(errno.EACCES, "?"), None),
    "a full disk": (OSError(errno.ENOSPC, "?"), None),
    "a broken disk": (OSError(errno.EIO, "?"), None),
    "a wrong parameter": (switchable_store.ParamValidationError("?"), None),
    "a defect": (ValueError("?"), None),
    "a class of this name elsewhere": (type("EndpointConnectionError", (Exception,), {})(), None),
}


@pytest.mark.parametrize("case", FAULTS)
def test_each_error_of_a_backend_is_about_the_store_or_about_a_file(case: str) -> None:
    error, expected = FAULTS[case]
    assert store_fault(error) == expected
    kinds = {None: type(error), "unreachable": Unavailable}
    with (
        pytest.raises(kinds.get(expected, StoreUnusable)) as caught,
        translate_store_errors("s3://key:secret@bucket/loramill"),
    ):
        raise error
    if expected is not None:
        assert "s3://bucket/loramill" in caught.value.message
        assert "secret" not in caught.value.message and "10.1.2.3" not in caught.value.message


def test_our_own_errors_pass() -> None:
    with pytest.raises(ArtifactMissing), translate_store_errors(URL):
        raise ArtifactMissing("gone") from TimeoutError()


def test_a_store_is_shown_without_its_credentials() -> None:
    assert redacted_url("s3://key:secret@bucket/a?token=secret") == "s3://bucket/a"
    assert redacted_url("/a folder?") == "/a folder?"


def test_a_url_with_an_unknown_protocol_is_reported() -> None:
    with pytest.raises(SetupError, match="nosuch://host/x"):
        open_filesystem("nosuch://me:secret@host/x")


def test_a_store_that_works_is_left_as_it_was() -> None:
    check_store(URL)
    assert switchable_store.SwitchableStore.store == {}


REFUSALS = {
    "endpoint": (switchable_store.away, (), r"endpoint of the store switched://bucket/loramill.*AWS_ENDPOINT_URL"),
    "bucket": (lambda: translated(FileNotFoundError("?"), "NoSuchBucket", 404), (), "bucket does not exist"),
    "credentials": (
        lambda: switchable_store.NoCredentialsError("none"),
        (),
        "does not accept the credentials.*AWS_ACCESS_KEY",
    ),
    "write": (lambda: PermissionError("Access Denied"), ("pipe_file",), "permission to write to"),
    "list": (lambda: PermissionError("Access Denied"), ("ls",), "permission to list"),
    "read": (lambda: PermissionError("Access Denied"), ("cat_file",), "permission to read from"),
    "delete": (lambda: PermissionError("Access Denied"), ("rm_file",), "permission to delete in"),
    "other": (lambda: ValueError("odd"), (), r"cannot write to the store .*odd"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_check_reports_the_part_that_is_wrong(case: str) -> None:
    error, operations, message = REFUSALS[case]
    with pytest.raises(StoreUnusable, match=message), switchable_store.off(error, *operations):
        check_store(URL)
    assert bool(switchable_store.SwitchableStore.store) == (case == "delete")


def test_a_folder_is_checked_but_not_created(tmp_path: Path) -> None:
    check_store((tmp_path / "a" / "b").as_uri())
    check_store(str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnusable, match="artifacts_url"):
        check_store((tmp_path / "file" / "store").as_uri())


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreUnusable, match="cannot be written to"):
        check_store(str(tmp_path / "store"))
