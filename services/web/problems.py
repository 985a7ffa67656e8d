"""What is wrong with a request, as its status and one line; and the JSON of every answer."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from shared.errors import AuthError, ConfigError, StoreUnusable, TapelineError, Unavailable


class Json(Response):
    """An answer of JSON: anything that msgspec can write; NaN is null."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


class Problem(TapelineError):
    """Answered as `{"error": {"code": …, "message": …}}` with `status`; `headers` go along."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}

    @property
    def body(self) -> dict[str, dict[str, str]]:
        return {"error": {"code": self.code, "message": str(self)}}

    def answer(self) -> Json:
        return Json(self.body, self.status, self.headers)


def bad(message: str) -> Problem:
    """400: the request cannot be meant so."""
    return Problem(400, "bad_request", message)


def once(request: Request) -> None:
    """Raises Problem (400) for a parameter that is given twice, for only one of them can be meant."""
    names = [name for name, _ in request.query_params.multi_items()]
    for name in names:
        if names.count(name) > 1:
            raise bad(f"'{name[:60]}' is given more than once")


def missing(message: str) -> Problem:
    """404: there is no such thing."""
    return Problem(404, "not_found", message)


def problem_of(error: TapelineError, *, asked: bool) -> Problem:
    """Any error as a problem; `asked`: what the caller asked for is to blame for a ConfigError."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, Unavailable):
        return Problem(503, "unavailable", str(error), {"Retry-After": "1"})
    if isinstance(error, ConfigError) and not isinstance(error, AuthError | StoreUnusable) and asked:
        return bad(str(error))
    return Problem(503, "unavailable", str(error), {"Retry-After": "10"})
