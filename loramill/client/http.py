"""HTTP requests to the gateway; its errors are raised as the classes of `loramill.errors`."""

from __future__ import annotations

import ipaddress
import json
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


#: Error class per code of the API.
ERROR_BY_CODE = {cls.code: cls for cls in _error_classes(LoramillError)}

_ERROR_BY_STATUS = {
    cls.status: cls for cls in (InvalidRequest, Unauthenticated, Forbidden, NotFound, Conflict, Overloaded, Unavailable)
}


@contextmanager
def translate_openai_errors(url: str) -> Iterator[None]:
    """Raises errors of the `openai` client within the block as errors of `loramill.errors`. `url` is the gateway's."""
    import openai

    try:
        yield
    except openai.APITimeoutError as error:
        raise Unavailable(f"The gateway at {url} took too long to answer; try again.") from error
    except (openai.APIConnectionError, httpx.RequestError) as error:
        # By name: openai 2 is built on httpx, openai 3 on httpx2.
        if type(error.__cause__).__name__ == "ConnectError":
            raise unreachable(url) from error
        raise connection_lost(url) from error
    except openai.APIError as error:  # an error in mid-stream has no status
        raise error_from_response(getattr(error, "status_code", 500), error.body, url) from error


def error_from_response(status: int, body: object, url: str) -> LoramillError:
    """Returns the error for a response with this status (>= 400) and JSON body."""
    fields = body.get("error", body) if isinstance(body, Mapping) else None
    if isinstance(fields, Mapping) and isinstance(fields.get("message"), str):
        cls = ERROR_BY_CODE.get(
            str(fields.get("code")), _ERROR_BY_STATUS.get(status, InvalidRequest if status < 500 else LoramillError)
        )
        param = fields.get("param")
        error = cls(fields["message"], param=param if isinstance(param, str) else None)
        if hasattr(error, "problems"):
            error.problems = tuple(error.message.splitlines()[1:])
        return error
    if status in (502, 503, 504):
        return Unavailable(f"The gateway at {url} can't be reached through its proxy (HTTP {status}); try again.")
    return unexpected_response(url, f"HTTP {status}")


def unexpected_response(url: str, what: str) -> NotRunning:
    """Returns the error for a response that is not loramill's."""
    return NotRunning(f"What answers at {url} isn't loramill ({what}): is LORAMILL_URL right?")


def unreachable(url: str) -> NotRunning:
    """Returns the error for an address on which no process listens."""
    return NotRunning(f"Nothing answers at {url}: start it with `loramill up`, or set LORAMILL_URL.")


def connection_lost(url: str) -> Unavailable:
    """Returns the error for a response that was cut off or did not arrive."""
    return Unavailable(f"The connection to {url} broke; try again.")


def is_local_url(url: str) -> bool:
    """Whether the address belongs to this machine: its loopback or one of its interfaces."""
    try:
        host = urlsplit(url).hostname or ""
        if host == "localhost":
            return True
        address = ipaddress.ip_address(host)
    except ValueError:  # a host name, or not an address
        return False
    with socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))  # fails for the address of another machine
        except OSError:
            return address.is_loopback
    return True


class Transport:
    """Sends requests to one gateway with one API key. `url` excludes `/v1`; `timeout` is in seconds."""

    def __init__(self, url: str, api_key: str | None, organization: str | None, timeout: float) -> None:
        self.url = url
        self._api_key = api_key
        self._organization = organization
        # A proxy from the environment can't reach this machine's own addresses.
        self._http = httpx.Client(timeout=httpx.Timeout(timeout, connect=5.0), trust_env=not is_local_url(url))

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def request_json(self, method: str, path: str, *, tenant: str | None = None, **request: Any) -> dict[str, Any]:
        """Sends a request and returns the JSON object of the response.

        Args:
            method: HTTP method.
            path: Path on the gateway.
            tenant: Tenant that an admin's key acts for.
            request: Further arguments of `httpx.Client.request`.


        Raises:
            LoramillError: The error that the gateway reports. NotRunning, Unavailable: there is no valid response.
        """
        response = self._send(method, path, tenant, request)
        if response.is_error:
            raise self._error_of(response)
        body = _json(response)
        if not isinstance(body, dict):
            raise unexpected_response(self.url, "its response is not a JSON object")
        return body

    def stream_events(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Sends a POST request and yields the JSON objects of its server-sent events as they arrive.

        Raises:
            LoramillError: As for `request_json`, also in mid-stream. Unavailable: the response was cut off.
        """
        with (
            self._translate_errors("POST", path),
            self._http.stream("POST", self.url + path, headers=self._headers(None), json=body) as response,
        ):
            if response.is_error:
                response.read()
                raise self._error_of(response)
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or data == "[DONE]":
                    continue
                try:
                    event = json.loads(data)
                except ValueError as error:
                    raise unexpected_response(self.url, f"{path} sent an invalid event") from error
                if "error" in event:
                    raise error_from_response(500, event, self.url)
                yield event

    @contextmanager
    def stream(self, path: str, **request: Any) -> Iterator[Iterator[bytes]]:
        """Yields the body of the response to a GET request in chunks. `request` are arguments of `httpx.Client.stream`.

        Raises:
            LoramillError: As for `request_json`. Unavailable: the response was cut off.
        """
        with (
            self._translate_errors("GET", path),
            self._http.stream("GET", self.url + path, headers=self._headers(None), **request) as response,
        ):
            if response.is_error:
                response.read()
                raise self._error_of(response)
            yield response.iter_bytes(1 << 20)

    def paginate(
        self, path: str, *, tenant: str | None = None, limit: int | None = None, query: Mapping[str, Any] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yields the objects of a list in the gateway's order, fetching it page by page.

        Args:
            path: Path of the list.
            tenant: Tenant that an admin's key acts for.
            limit: Objects per page, if the list has pages.
            query: Further query parameters.

        Raises:
            LoramillError: As for `request_json`.
        """
        params = {**(query or {}), **({} if limit is None else {"limit": limit})}
        while True:
            page = self.request_json("GET", path, tenant=tenant, params=params)
            rows = page.get("data")
            if not isinstance(rows, list):
                raise unexpected_response(self.url, f"{path} is not a list")
            yield from rows
            if not rows or not page.get("has_more"):
                return
            params["after"] = rows[-1]["id"]

    def succeeds(self, path: str) -> bool:
        """Whether a GET request of `path` succeeds."""
        try:
            return self._send("GET", path, None, {}).is_success
        except (NotRunning, Unavailable):
            return False

    def _send(self, method: str, path: str, tenant: str | None, request: Mapping[str, Any]) -> httpx.Response:
        with self._translate_errors(method, path):
            return self._http.request(method, self.url + path, headers=self._headers(tenant), **request)

    def _error_of(self, response: httpx.Response) -> LoramillError:
        if response.status_code == 401 and self._api_key is None:
            return Unauthenticated(
                f"The gateway at {self.url} requires an API key: set LORAMILL_API_KEY "
                "(an admin creates one with `loramill key create TENANT`)."
            )
        return error_from_response(response.status_code, _json(response), self.url)

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
                f"'{self.url}' is not the address of a gateway ({error}); write it as http://HOST:PORT in LORAMILL_URL."
            ) from error
        except httpx.RequestError as error:
            raise connection_lost(self.url) from error


def _json(response: httpx.Response) -> object:
    try:
        return response.json()
    except ValueError:
        return None
