"""Errors in OpenAI's form: one sentence, the field, and a code."""

from __future__ import annotations

import math
import re
from typing import Any

from fastapi import FastAPI
from fastapi import Request as Http
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ..errors import HanDiffuserError, RequestError
from ..schema import shown
from ..settings import SETTINGS, http_name
from .dispatch import BusyError
from .service import Service, UnfinishedError

LATE = "The time of this request is over, and the picture is not done. Ask for fewer steps or a longer timeout."
CODES = {429: "queue_full", 504: "timeout"}
SAID = {
    400: "A field of the request is wrong; the message says which.",
    401: "The key is missing or wrong.",
    404: "The model or path is unknown.",
    408: "The body took too long.",
    413: "The body is too large.",
    415: "The body must be JSON that is not compressed.",
    429: "The queue is full; see Retry-After.",
    501: "The server lacks what finds or repairs hands; the message says how to install it.",
    500: "The server could not make the picture.",
    503: "The server is loading or stopping; see Retry-After.",
    504: "The time of the request is over.",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {
        "description": words,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    for status, words in SAID.items()
}


class ModelError(HanDiffuserError):
    """A request names an unknown model."""


def check_model(service: Service, model: str | None) -> None:
    """Raises ModelError for a model of another name."""
    if model is not None and model not in service.names:
        known = " or ".join(service.names)
        raise ModelError(f"model must be {known}, got {model[:60]!r}. hd-serve takes other names with --alias.")


def problem(
    status: int, sentence: str, *, code: str | None = None, param: str | None = None, **headers: str
) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = "invalid_request_error"
    if status == 429:
        kind = "rate_limit_error"
    elif status >= 500:
        kind = "server_error"
    body = {"error": {"message": sentence, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status, headers={name.replace("_", "-"): value for name, value in headers.items()})


def misfit(errors: list[Any]) -> JSONResponse:
    """A 400 about the first field that does not fit the description of the body. errors: pydantic's."""
    error = errors[0]
    if error["type"].startswith("model") and isinstance(error["input"], (str, list)):
        # Of a field that takes an object, people or text, what was given counts.
        kinds = ("model", "list_type") if isinstance(error["input"], str) else ("model",)
        error = next((one for one in errors if not one["type"].startswith(kinds)), errors[-1])
    given, kind = error.get("input"), error["type"]
    if kind == "json_invalid":
        why = error.get("ctx", {}).get("error", error["msg"])
        return problem(400, f"The body must be JSON: {why}, at character {error['loc'][-1]}.", code="invalid_json")
    # The names of the branches of "an object or text" are not part of the field's path.
    parts = [
        str(part)
        for part in error["loc"]
        if part != "body" and not re.match(r"HandsField|list\[|constrained-", str(part))
    ]
    where = ".".join(parts)[:60]
    if kind == "missing" and not where:
        return problem(400, "The body must be JSON, got an empty body.", code="invalid_json")
    if kind == "extra_forbidden":
        return problem(
            400, f"The field {where} is unknown. GET /openapi.json lists the fields.", code="unknown_field", param=where
        )
    said = re.sub(r"^\w+ should (be|have) ", r"must \1 ", error["msg"].rstrip(".")).replace(" after validation", "")
    said = re.sub(r", unable to (parse|interpret) .*", "", said)  # of a form, whose numbers are text
    setting = next((one for name, one in SETTINGS.items() if http_name(name) == where), None)
    if kind == "missing":
        sentence = f"{where} must be given."
    elif where == "prompt" and kind in ("string_too_short", "string_pattern_mismatch"):
        sentence = "The prompt is empty. Say what the picture shows."
    elif kind.startswith("model") and not where:
        sentence = f'The body must be an object such as {{"prompt": "a fist"}}, got {shown(given)}.'
    elif kind.startswith("model"):
        sentence = f"{where} must be an object, got {shown(given)}."
    elif kind == "string_unicode":
        sentence = f"{where or 'The body'} must be text of valid Unicode, got half a surrogate pair."
    elif kind == "string_too_long":
        sentence = f"{where} {said}, got {len(given)}."
    elif setting is not None and setting.kind is not str:
        sentence = f"{where} must be {setting.constraint}, got {shown(given)}."
    elif said.startswith("must"):
        sentence = f"{where or 'The body'} {said}" + ("." if ", not " in said else f", got {shown(given)}.")
    else:
        sentence = f"{where or 'The body'}: {said}."
    return problem(400, sentence, code="invalid_value", param=where or None)


def unread(error: HTTPException, http: Http) -> JSONResponse:
    """The refusals of Starlette and FastAPI, with what to do."""
    path, cause = http.url.path[:60], error.__cause__
    status, code, sentence = error.status_code, None, str(error.detail)
    if isinstance(cause, UnicodeDecodeError):
        code, sentence = "invalid_json", f"The body must be JSON in UTF-8, got an invalid byte at {cause.start}."
    elif isinstance(cause, RecursionError):
        code, sentence = "invalid_json", "The body must be JSON with less nesting."
    elif status == 400 and cause is not None:
        code, sentence = "invalid_json", "The body must be JSON, with numbers of at most 4300 digits."
    elif sentence == "Not Found":
        sentence = f"The path {path} is unknown. GET /openapi.json lists the paths."
    elif sentence == "Method Not Allowed":
        sentence = f"{path} does not take {http.method}. GET /openapi.json lists its methods."
    response = problem(status, sentence, code=code)
    response.headers.update(error.headers or {})
    return response


def failed(error: HanDiffuserError, service: Service) -> JSONResponse:
    """The answer to an error of this package."""
    if isinstance(error, BusyError):
        wait = str(min(3600, math.ceil(error.seconds)))
        status, code = (503, "unavailable") if error.loading else (429, "queue_full")
        return problem(status, str(error), code=code, retry_after=wait)
    if isinstance(error, UnfinishedError):
        response = problem(error.status, str(error), code=CODES.get(error.status))
        if error.status == 429:
            response.headers["retry-after"] = str(min(3600, math.ceil(service.dispatcher.wait_for_room())))
        return response
    if isinstance(error, ModelError):
        return problem(404, str(error), code="model_not_found", param="model")
    if isinstance(error, RequestError):
        return problem(400, str(error), code=error.code, param=http_name(error.param) if error.param else None)
    return problem(400, str(error), code="invalid_value")


def add_handlers(app: FastAPI, service: Service) -> None:
    """Makes the application answer errors in OpenAI's form."""

    @app.exception_handler(RequestValidationError)
    async def on_misfit(http: Http, error: RequestValidationError) -> JSONResponse:
        return misfit(list(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_unread(http: Http, error: HTTPException) -> JSONResponse:
        return unread(error, http)

    @app.exception_handler(HanDiffuserError)
    async def on_failed(http: Http, error: HanDiffuserError) -> JSONResponse:
        return failed(error, service)
