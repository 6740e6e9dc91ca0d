"""Errors in OpenAI's format: `{"error": {"message", "type", "param", "code"}}`, never a traceback."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import compile_path

from loramill.errors import (
    InvalidRequest,
    LoramillError,
    Overloaded,
    QuotaExceeded,
    RateLimited,
    Unauthenticated,
    Unavailable,
    UnsupportedParameter,
)

log = logging.getLogger("loramill.gateway")

_HEADERS: Mapping[type[LoramillError], Mapping[str, str]] = {
    Unauthenticated: {"www-authenticate": "Bearer"},
    Overloaded: {"retry-after": "1"},
    # A quota is not freed by waiting a little, so OpenAI's client must not retry by itself.
    QuotaExceeded: {"retry-after": "60", "x-should-retry": "false"},
    Unavailable: {"retry-after": "1"},
}


def error_body(error: LoramillError) -> dict[str, Any]:
    """Returns the JSON of an error."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_response(error: LoramillError) -> JSONResponse:
    """Returns the response of an error."""
    headers = _HEADERS.get(type(error), {})
    if isinstance(error, RateLimited):
        seconds, milliseconds = math.ceil(error.seconds), math.ceil(1000 * error.seconds)
        headers = {"retry-after": str(seconds), "retry-after-ms": str(milliseconds), **error.headers}
    return JSONResponse(error_body(error), error.status, headers=dict(headers))


def internal_error(request_id: str) -> LoramillError:
    """Returns the error that a client sees of an unexpected one."""
    return LoramillError(f"Internal error (request ID {request_id}). Retry, or report the ID.")


def add_error_handlers(app: FastAPI) -> None:
    """Makes the app respond to all expected errors in OpenAI's format."""
    app.add_exception_handler(LoramillError, _loramill_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _client_disconnected)
    app.add_exception_handler(DataError, _data_error)


def _loramill_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, LoramillError)
    return error_response(error)


def _http_error(request: Request, error: Exception) -> Response:
    """Errors of the framework: an unknown path or method, a body that it cannot read."""
    assert isinstance(error, HTTPException)
    message, code = str(error.detail), "invalid_request"
    if error.status_code == 404:
        message, code = f"Unknown request URL: {request.method} {request.url.path}.", "unknown_url"
    elif error.status_code == 405:
        message, code = f"{request.url.path} does not support {request.method}.", "method_not_allowed"
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    headers = {"allow": _allowed_methods(request)} if error.status_code == 405 else error.headers
    return JSONResponse({"error": body}, error.status_code, headers=headers)


def _allowed_methods(request: Request) -> str:
    """The methods of a URL, from the OpenAPI description: the framework only lists those of one route."""
    paths = request.app.openapi()["paths"]
    found = [path for path in paths if compile_path(path.replace("{model}", "{model:path}"))[0].match(request.url.path)]
    literal = min(found, key=lambda path: path.count("{"), default=None)
    return ", ".join(sorted(method.upper() for method in paths[literal])) if literal else "GET"


def _data_error(request: Request, error: Exception) -> Response:
    """Values that a database cannot store: in PostgreSQL a NUL in a text, or a number that exceeds its column."""
    assert isinstance(error, DataError)
    log.warning("request %s: %s", request.state.request_id, error.orig, extra={"request": request.state.request_id})
    return error_response(
        InvalidRequest("A text contains a NUL, or a number is too large: the database cannot store or look them up.")
    )


def _client_disconnected(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # only for the access log


def _validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(invalid_request(error.errors(), error.body))


def invalid_request(problems: Sequence[Mapping[str, Any]], body: object) -> InvalidRequest:
    """Converts pydantic's problems to an error about the first; each `loc` begins with its source, such as "body"."""
    kind, param = problems[0]["type"], _param(problems[0], body)
    if kind == "json_invalid":
        return InvalidRequest(f"The body is not valid JSON: {problems[0]['ctx']['error']}.")
    if not param and kind == "value_error":
        return InvalidRequest(f"{_message(problems[0])}.")
    if not param:
        return InvalidRequest("The body must be an object, sent with its Content-Type.")
    if kind == "missing":
        return InvalidRequest(f"The required parameter '{param}' is missing.", param=param)
    if kind == "extra_forbidden":
        message = f"The parameter '{param}' is not supported here, or not with this value; omit it."
        return UnsupportedParameter(message, param=param)
    # A union reports a problem for each alternative; together they describe what is valid.
    messages = dict.fromkeys(_message(problem) for problem in problems if _param(problem, body) == param)
    return InvalidRequest(f"'{param}': {' or: '.join(messages)}.", param=param)


def _message(problem: Mapping[str, Any]) -> str:
    """A problem's message, without pydantic's prefix for custom validators."""
    return str(problem["msg"]).removeprefix("Value error, ")


def _param(problem: Mapping[str, Any], body: object) -> str:
    """The path of the value at fault, such as `messages[0].content`, without pydantic's names of alternatives."""
    source, *path = problem["loc"]
    if source != "body":
        return ".".join(map(str, path))
    name, value = "", body
    for part in path:
        if isinstance(value, Mapping) and part in value:
            name, value = f"{name}.{part}" if name else str(part), value[part]
        elif isinstance(value, Sequence) and isinstance(part, int) and part < len(value):
            name, value = f"{name}[{part}]", value[part]
        elif problem["type"] == "missing":
            return f"{name}.{part}" if name else str(part)
        else:
            break
    return name
