"""Every failure as OpenAI's error object: no trace, no path, and nothing said twice."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from jaxdeploy.errors import ContextLengthError, JaxdeployError, UnknownAdapterError
from jaxdeploy.server.errors import OverloadedError, UnknownModelError
from jaxdeploy.server.protocol.error import ErrorBody, ErrorReply

logger = logging.getLogger("jaxdeploy")

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
}
"""HTTP status → OpenAI's type of the error."""

CODES = {
    ContextLengthError: "context_length_exceeded",
    UnknownModelError: "model_not_found",
    UnknownAdapterError: "model_not_found",
    OverloadedError: "rate_limit_exceeded",
}

MAX_FAULTS = 5
MAX_MESSAGE_LENGTH = 4096
"""Characters of a message. A value that the client sent may be a part of it."""
MAX_NAME = 80
"""Characters of a field's name that are shown."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60

RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": description}
    for status, description in {
        400: "the request is wrong",
        401: "the API key is missing or wrong",
        403: "the server was not started for this",
        404: "there is no such model or response",
        409: "the session has a reply that runs",
        413: "the body is too large",
        422: "not used: a wrong request is a 400",
        429: "too many requests at a time; Retry-After has seconds",
        503: "the engine has stopped",
    }.items()
}
"""What routes may answer beside what was asked for."""


def install(app: FastAPI) -> None:
    """Have ``app`` answer failures so."""
    app.add_exception_handler(JaxdeployError, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unknown)


def error_reply(error: Exception) -> ErrorReply:
    """What a client is told of ``error``; the log has what it is not told."""
    if not isinstance(error, JaxdeployError):
        logger.error("a request failed", exc_info=error)
        return reply("the server failed; its log says more", "server_error")
    code = next((code for kind, code in CODES.items() if isinstance(error, kind)), None)
    return reply(str(error), _type(error.http_status), code=code)


def reply(message: str, type_: str, param: str | None = None, code: str | None = None) -> ErrorReply:
    """Return an error object. The middle of a message that is too long is left out."""
    if len(message) > MAX_MESSAGE_LENGTH:
        half = MAX_MESSAGE_LENGTH // 2 - 3
        message = f"{message[:half]} ... {message[-half:]}"
    return ErrorReply(error=ErrorBody(message=message, type=type_, param=param, code=code))


def answer(body: ErrorReply, status: int, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as a response."""
    return JSONResponse(body.model_dump(), status, headers)


async def _known(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, JaxdeployError), "the handler is for these"
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, OverloadedError) else None
    return answer(error_reply(error), error.http_status, headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError), "the handler is for these"
    faults = list(dict.fromkeys(_fault(fault) for fault in error.errors()))
    param = next((_path(fault["loc"]) for fault in error.errors()), None)
    return answer(reply("; ".join(faults[:MAX_FAULTS]), TYPES[400], param or None), 400)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException), "the handler is for these"
    status = error.status_code
    if isinstance(error.__cause__, ValueError):  # FastAPI read the body, and Python refused a value in it
        reason = str(error.__cause__).partition(";")[0]
        return answer(reply(f"body cannot be read ({reason}); correct it", _type(status)), status)
    if error.__cause__ is not None:  # the client is not told of it
        logger.warning("%s %s failed: %r", request.method, request.url.path, error.__cause__)
    body = reply(f"{request.method} {request.url.path}: {error.detail}", _type(status))
    return answer(body, status, dict(error.headers or {}))


async def _unknown(request: Request, error: Exception) -> JSONResponse:
    return answer(error_reply(error), 500)


def _type(status: int) -> str:
    return TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


def _fault(fault: dict[str, Any]) -> str:
    """One of pydantic's complaints in our form."""
    where = _path(fault["loc"]) or "body"
    if isinstance(fault["input"], bytes):
        return "body is not JSON by its type; send Content-Type: application/json"
    if fault["type"] == "extra_forbidden":
        return f"{_named(fault['loc'])} is no field of this request; leave it out"
    if fault["type"] == "missing":
        return f"{where} is missing; add it"
    if fault["type"] == "json_invalid":
        return f"body is not JSON ({fault['ctx']['error']}); mend it"
    return f"{where}={_short(fault['input'])} is wrong: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _short(value: object) -> str:
    """The beginning of a value, in time that does not depend on its size."""
    return f"{_SHORT.repr(value):.60}"


def _named(places: Sequence[str | int]) -> str:
    """The path to a field that nobody knows, which may have any name."""
    *before, name = places
    return f"{_path(before)}.{str(name)[:MAX_NAME]}".removeprefix(".")


def _path(places: Sequence[str | int]) -> str:
    """``messages[0].role``; the names that pydantic gives to the members of a union are left out."""
    text = ""
    for place in places:
        if isinstance(place, int):
            text += f"[{place}]"
        elif (
            len(place) <= MAX_NAME
            and place.isidentifier()
            and place not in ("body", "query", "str", "int", "float", "bool")
        ):
            text += f".{place}" if text else place
    return text
