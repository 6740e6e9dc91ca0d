"""Opening file systems at fsspec URLs, and translating the errors of fsspec's backends.

Most backends raise errors of their own libraries (botocore, aiohttp, Google's, Azure's), few of which are an OSError.
They are recognized by their class names, so that none of these libraries is imported here. An error about one file,
such as FileNotFoundError, passes unchanged: an outage of a store must never be taken for a missing file.
"""

from __future__ import annotations

import errno
import logging
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import fsspec

from loramill.errors import LoramillError, SetupError, StoreUnusable, Unavailable

log = logging.getLogger(__name__)

#: What is wrong with a store: it is unreachable, its bucket does not exist, or it refuses access.
Fault = Literal["unreachable", "bucket", "credentials", "permission"]

#: Packages whose errors are recognized by name.
_BACKENDS = ("botocore", "aiobotocore", "s3fs", "aiohttp", "gcsfs", "google", "azure", "adlfs", "requests", "urllib3")
#: Their classes for a server, including one for credentials, that cannot be reached or drops the connection.
_UNREACHABLE_ERRORS = frozenset(
    {
        "ConnectionError",
        "HTTPClientError",
        "IncompleteReadError",
        "CredentialRetrievalError",
        "MetadataRetrievalError",
        "ClientConnectionError",
        "ClientPayloadError",
        "Timeout",
        "ChunkedEncodingError",
        "TransportError",
        "RetryError",
        "ServiceRequestError",
        "ServiceResponseError",
    }
)
#: Their classes for credentials that are missing or cannot be used.
_CREDENTIAL_ERRORS = frozenset(
    {
        "NoCredentialsError",
        "PartialCredentialsError",
        "NoAuthTokenError",
        "TokenRetrievalError",
        "SSOError",
        "LoginError",
        "ProfileNotFound",
        "DefaultCredentialsError",
        "ClientAuthenticationError",
    }
)
#: Error codes of S3; the status alone does not distinguish a wrong key from a missing permission.
_S3_CODES: Mapping[str, Fault] = {
    "NoSuchBucket": "bucket",
    "InvalidBucketName": "bucket",
    "PermanentRedirect": "bucket",
    "301": "bucket",
    "InvalidAccessKeyId": "credentials",
    "SignatureDoesNotMatch": "credentials",
    "AuthorizationHeaderMalformed": "credentials",
    "ExpiredToken": "credentials",
    "InvalidToken": "credentials",
    "TokenRefreshRequired": "credentials",
    "RequestTimeTooSkewed": "credentials",
    "SlowDown": "unreachable",
    "RequestTimeout": "unreachable",
    "Throttling": "unreachable",
    "OperationAborted": "unreachable",
}
#: Errors of a network mount whose server is unreachable. EIO is not among them: a broken disk raises it as well.
_UNREACHABLE_ERRNOS = frozenset(
    getattr(errno, name)
    for name in (
        *("ESTALE", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET"),
        *("ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "ENOTCONN", "ESHUTDOWN", "EREMOTEIO"),
    )
    if hasattr(errno, name)
)
#: With botocore's own limits an upload to a dead endpoint takes a minute to fail; callers retry.
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    scheme: {"config_kwargs": {"connect_timeout": 4, "read_timeout": 30, "retries": {"max_attempts": 2}}}
    for scheme in ("s3", "s3a")
}


def open_filesystem(url: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a URL, and the path in it.

    Raises:
        SetupError: no installed backend can open the URL.
    """
    try:
        files, root = fsspec.core.url_to_fs(url, **_OPTIONS.get(urlsplit(url).scheme, {}))
    except (ImportError, ValueError) as error:
        raise SetupError(f"The store '{redacted_url(url)}' cannot be used: {error}.") from error
    return files, str(root)


def redacted_url(url: str) -> str:
    """Returns a URL without the credentials that it may contain, for messages."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


@contextmanager
def translate_store_errors(url: str) -> Iterator[None]:
    """Translates errors about a whole store into loramill's; an error about one file passes unchanged.

    Raises:
        Unavailable: the store does not respond.
        StoreUnusable: its bucket does not exist, or it refuses these credentials.
    """
    try:
        yield
    except LoramillError:
        raise
    except Exception as error:
        known = store_fault(error)
        if known is None:
            raise
        # The backend's message can contain hosts and accounts, so it is only logged.
        log.warning("the store %s: %s: %s", redacted_url(url), type(error).__name__, error)
        raise _translate(known, redacted_url(url)) from error


def store_fault(error: BaseException) -> Fault | None:
    """Returns what a backend's error means for the whole store; None if it is not about the whole store."""
    cause: BaseException | None = error
    while cause is not None:
        found = _fault_of_cause(cause)
        if found is not None:
            return found
        cause = cause.__cause__
    # A backend's error without a cause; the kernel's errors have an errno and are about one file.
    return "permission" if isinstance(error, PermissionError) and error.errno is None else None


def check_store(url: str) -> None:
    """Checks a store by writing, listing, reading and deleting a small object.

    A folder on this machine is only checked to be writable, or to be in a writable folder if it does not exist.

    Raises:
        SetupError: no installed backend can open the URL.
        StoreUnusable: one of the operations failed; the message says whether the endpoint, the bucket, the credentials
            or a permission is wrong.
    """
    parts = urlsplit(url)
    if parts.scheme == "file" or "://" not in url:
        _check_folder(Path(unquote(parts.path) if parts.scheme == "file" else url).absolute())
        return
    files, root = open_filesystem(url)
    root = root.rstrip("/")
    path, content = f"{root}/check-{secrets.token_hex(8)}", b"a test by loramill; it can be deleted"
    try:
        _attempt(url, "write to", lambda: files.pipe_file(path, content))
        _attempt(url, "list", lambda: files.ls(root, detail=False, refresh=True))
        if _attempt(url, "read from", lambda: files.cat_file(path)) != content:
            raise StoreUnusable(f"The store {redacted_url(url)} returns different data from what was written to it.")
        _attempt(url, "delete in", lambda: files.rm_file(path))
    except StoreUnusable:
        with suppress(Exception):  # the first error is the one to report
            files.rm_file(path)
        raise


def _fault_of_cause(error: BaseException) -> Fault | None:
    if isinstance(error, TimeoutError | ConnectionError | socket.gaierror):
        return "unreachable"
    names = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.partition(".")[0] in _BACKENDS}
    if names:
        return _fault_of_backend(error, names)
    return "unreachable" if isinstance(error, OSError) and error.errno in _UNREACHABLE_ERRNOS else None


def _fault_of_backend(error: BaseException, names: Set[str]) -> Fault | None:
    code, status = _response_code_and_status(error)
    if code in _S3_CODES:
        return _S3_CODES[code]
    if names & _CREDENTIAL_ERRORS or status == 401:
        return "credentials"
    if status == 403:
        return "permission"
    unreachable = status in (408, 429) or status >= 500 or (not status and bool(names & _UNREACHABLE_ERRORS))
    return "unreachable" if unreachable else None


def _response_code_and_status(error: BaseException) -> tuple[str, int]:
    """Returns the code and the HTTP status of a server's response; "" and 0 without a response."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore's
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0
        return str(response.get("Error", {}).get("Code", "")), int(status)
    for holder, name in ((error, "status"), (error, "status_code"), (error, "code"), (response, "status_code")):
        with suppress(TypeError, ValueError):
            return "", int(getattr(holder, name, ""))
    return "", 0


def _translate(known: Fault, where: str) -> LoramillError:
    if known == "unreachable":
        return Unavailable(f"The store {where} cannot be reached; try again in a moment.")
    return StoreUnusable(_REASONS[known].format(where=where, act="read or write"))


_REASONS: Mapping[Fault, str] = {
    "unreachable": "The endpoint of the store {where} cannot be reached: start it, or correct the endpoint (for S3 the "
    "variable AWS_ENDPOINT_URL) and the region.",
    "bucket": "The store {where} cannot be used: its bucket does not exist, or is in another "
    "region. Create it, or correct the URL.",
    "credentials": "The store {where} does not accept the credentials: set the right ones (for S3 the variables "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the machine's role).",
    "permission": "These credentials have no permission to {act} {where}: grant it for this prefix, and the others "
    "that loramill writes.",
}


def _attempt(url: str, act: str, do: Callable[[], Any]) -> Any:
    try:
        return do()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        known = store_fault(error)
        if known is None and isinstance(error, FileNotFoundError):
            known = "bucket"
        problem = (
            f"loramill cannot {act} the store {redacted_url(url)}."
            if known is None
            else _REASONS[known].format(where=redacted_url(url), act=act)
        )
        raise StoreUnusable(f"{problem} ({reason})") from error


def _check_folder(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise StoreUnusable(
            f"The store {folder} cannot be used, since {existing} cannot be written to ({error.strerror}): make it a "
            "folder that you may write to, or correct artifacts_url."
        ) from error
