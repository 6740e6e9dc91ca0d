"""One HTTP conversation with the gateway: its answers as dicts, its errors as the classes of the tree."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx

from loramill.errors import (
    Conflict,
    Forbidden,
    InvalidRequest,
    LoramillError,
    NotFound,
    NotRunning,
    Overloaded,
    SettingsInvalid,
    Unauthenticated,
    Unavailable,
)


def _error_classes(cls: type[LoramillError]) -> Iterator[type[LoramillError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _error_classes(child)


#: The class of every code that the API answers with.
ERROR_BY_CODE = {cls.code: cls for cls in _error_classes(LoramillError)}

_ERROR_BY_STATUS = {
    cls.status: cls for cls in (InvalidRequest, Unauthenticated, Forbidden, NotFound, Conflict, Overloaded, Unavailable)
}


@contextmanager
def translate_openai_errors(url: str) -> Iterator[None]:
    """Turns the `openai` client's errors in the block back into ours; `url` is the gateway it calls."""
    import openai

    try:
        yield
    except openai.APITimeoutError as error:
        raise Unavailable(f"The gateway at {url} took too long to answer; try again.") from error
    except (openai.APIConnectionError, httpx.RequestError) as error:
        # By its name: openai 2 is built on httpx, openai 3 on httpx2.
        if type(error.__cause__).__name__ == "ConnectError":
            raise unreachable(url) from error
        raise connection_lost(url) from error
    except openai.APIError as error:  # without a status it came in mid-stream
        raise error_from_response(getattr(error, "status_code", 500), error.body, url) from error


def error_from_response(status: int, body: object, url: str) -> LoramillError:
    """The error that an answer of `status` (>= 400) with this JSON body stands for."""
    said = body.get("error", body) if isinstance(body, Mapping) else None
    if isinstance(said, Mapping) and isinstance(said.get("message"), str):
        cls = ERROR_BY_CODE.get(
            str(said.get("code")), _ERROR_BY_STATUS.get(status, InvalidRequest if status < 500 else LoramillError)
        )
        param = said.get("param")
        error = cls(said["message"], param=param if isinstance(param, str) else None)
        if hasattr(error, "problems"):
            error.problems = tuple(error.message.splitlines()[1:])
        return error
    if status in (502, 503, 504):
        return Unavailable(f"The gateway at {url} can't be reached through its proxy (HTTP {status}); try again.")
    return unexpected_response(url, f"HTTP {status}")


def unexpected_response(url: str, what: str) -> NotRunning:
    """The error for an answer that no loramill gives."""
    return NotRunning(f"What answers at {url} isn't loramill ({what}): is LORAMILL_URL right?")


def unreachable(url: str) -> NotRunning:
    """The error for an address where nobody listens."""
    return NotRunning(f"Nothing answers at {url}: start it with `loramill up`, or set LORAMILL_URL.")


def connection_lost(url: str) -> Unavailable:
    """The error for an answer that came in part or not at all."""
    return Unavailable(f"The connection to {url} broke; try again.")


def is_local_url(url: str) -> bool:
    """Whether the address is this machine's: its loopback, or one of its interfaces."""
    try:
        host = urlsplit(url).hostname or ""
        if host == "localhost":
            return True
        address = ipaddress.ip_address(host)
    except ValueError:  # a host's name, or no address at all
        return False
    with socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))  # which no other machine's address allows
        except OSError:
            return address.is_loopback
    return True


class Transport:
    """Requests to one gateway with one key. `url` is without `/v1`; `timeout` is in seconds."""

    def __init__(self, url: str, api_key: str | None, organization: str | None, timeout: float) -> None:
        self.url = url
        self._api_key = api_key
        self._organization = organization
        # A proxy of the environment can't reach this machine's own addresses.
        self._http = httpx.Client(timeout=httpx.Timeout(timeout, connect=5.0), trust_env=not is_local_url(url))

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def request_json(self, method: str, path: str, *, tenant: str | None = None, **request: Any) -> dict[str, Any]:
        """One request; returns the JSON object of the answer. `tenant` acts for a tenant, `request` is httpx's.

        Raises:
            LoramillError: the class of the answer's code; NotRunning, Unavailable: there is no such answer.
        """
        response = self._send(method, path, tenant, request)
        body = _json(response)
        if response.is_error:
            if response.status_code == 401 and self._api_key is None:
                raise Unauthenticated(
                    f"The gateway at {self.url} asks for an API key: set LORAMILL_API_KEY "
                    "(an admin makes one with `loramill key create TENANT`)."
                )
            raise error_from_response(response.status_code, body, self.url)
        if not isinstance(body, dict):
            raise unexpected_response(self.url, "its answer is no JSON object")
        return body

    @contextmanager
    def stream(self, path: str, **request: Any) -> Iterator[Iterator[bytes]]:
        """The bytes of the answer to a GET, piece by piece as they come; `request` is httpx's.

        Raises:
            LoramillError: as `call`; Unavailable: the answer was cut off.
        """
        with (
            self._translate_errors("GET", path),
            self._http.stream("GET", self.url + path, headers=self._headers(None), **request) as response,
        ):
            if response.is_error:
                response.read()
                raise error_from_response(response.status_code, _json(response), self.url)
            yield response.iter_bytes(1 << 20)

    def paginate(
        self, path: str, *, tenant: str | None = None, limit: int | None = None, query: Mapping[str, Any] | None = None
    ) -> Iterator[dict[str, Any]]:
        """The objects of a list in the gateway's order, `limit` to a page where it has pages; `query` narrows it.

        Raises:
            LoramillError: as `call`.
        """
        asked = {**(query or {}), **({} if limit is None else {"limit": limit})}
        while True:
            page = self.request_json("GET", path, tenant=tenant, params=asked)
            rows = page.get("data")
            if not isinstance(rows, list):
                raise unexpected_response(self.url, f"{path} is no list")
            yield from rows
            if not rows or not page.get("has_more"):
                return
            asked["after"] = rows[-1]["id"]

    def succeeds(self, path: str) -> bool:
        """Whether the gateway answers `path` with success."""
        try:
            return self._send("GET", path, None, {}).is_success
        except (NotRunning, Unavailable):
            return False

    def _send(self, method: str, path: str, tenant: str | None, request: Mapping[str, Any]) -> httpx.Response:
        with self._translate_errors(method, path):
            return self._http.request(method, self.url + path, headers=self._headers(tenant), **request)

    def _headers(self, tenant: str | None) -> dict[str, str]:
        headers = {}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        if acting := tenant or self._organization:
            headers["OpenAI-Organization"] = acting
        return headers

    @contextmanager
    def _translate_errors(self, method: str, path: str) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            raise unreachable(self.url) from error
        except httpx.TimeoutException as error:
            raise Unavailable(
                f"The gateway at {self.url} took too long to answer {method} {path}; try again."
            ) from error
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise SettingsInvalid(
                f"'{self.url}' is no address of a gateway ({error}); write it as http://HOST:PORT in LORAMILL_URL."
            ) from error
        except httpx.RequestError as error:
            raise connection_lost(self.url) from error


def _json(response: httpx.Response) -> object:
    try:
        return response.json()
    except ValueError:
        return None
