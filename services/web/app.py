"""The ASGI application: its parts, their life, the routes, and what becomes of errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import DEFAULT_EXCLUDED_CONTENT_TYPES, GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response

from services.web import acks, assets, exporter, history, instruments, live, pipeline
from services.web.context import Web
from services.web.guard import COOKIE, Guard
from services.web.hub import Hub
from services.web.measure import Measure
from services.web.pipeline import Pipeline
from services.web.problems import Problem, problem_of
from shared.errors import TapelineError
from shared.log import Masker
from shared.settings import Settings
from shared.store_pages import Pages

STORE_CONNECTIONS = 4
NOT_ZIPPED = (*DEFAULT_EXCLUDED_CONTENT_TYPES, "application/vnd.apache.parquet")
ABOUT = (
    "Candles, order flow, option pressure and signals, and the state of the pipeline. Instants are ISO texts in UTC; "
    "the columns of a row are those of the store's tables. What is live comes over the WebSocket `/api/v1/ws` or, as "
    "server-sent events, `/api/v1/stream`; both go on where a page of history ended, by its `id`."
)
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {"code": {"type": "string"}, "message": {"type": "string"}},
        }
    },
}


def _refused(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _ERROR}}}


# Of every route of the API.
REFUSALS: dict[int | str, dict[str, Any]] = {
    401: _refused("The token is missing or wrong."),
    429: _refused("Too many requests a second; `Retry-After` says when to come back."),
    "4XX": _refused("The request cannot be answered so; `message` says why in one line."),
    503: _refused("The store or Redis does not answer; `Retry-After` says when to come back."),
}


def create(settings: Settings) -> FastAPI:
    """The application, not started yet. Raises ConfigError for what of it can never work."""
    web = settings.web
    app = FastAPI(
        title="Tapeline", version=version("tapeline"), description=ABOUT, docs_url=None, redoc_url=None,
        lifespan=_life, responses=REFUSALS,
    )  # fmt: skip
    app.state.settings = settings
    if web.token:
        app.openapi = partial(_locked, app.openapi)  # type: ignore[method-assign]
    for module in (history, instruments, live, pipeline, exporter, acks):
        app.include_router(module.router)
    app.include_router(assets.routes(), include_in_schema=False)
    app.add_exception_handler(TapelineError, _told)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    # The last one added is the outermost.
    app.add_middleware(GZipMiddleware, minimum_size=1000, compresslevel=1, exclude_content_types=NOT_ZIPPED)
    app.add_middleware(Guard, web=web)
    if web.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=web.cors_origins, allow_methods=("GET", "POST"),
            allow_headers=("Authorization", "X-Tapeline", "Last-Event-ID"),
            expose_headers=("X-Next-Cursor", "Retry-After", "ETag"),
        )  # fmt: skip
    app.add_middleware(Measure)
    return app


def _locked(plain: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The API's description with the token that it wants."""
    schema = plain()
    schema.setdefault("components", {})["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "The setting web.token."},
        "cookie": {"type": "apiKey", "in": "cookie", "name": COOKIE, "description": "Set by GET /?token=TOKEN."},
    }
    schema["security"] = [{"bearer": []}, {"cookie": []}]
    return schema


@asynccontextmanager
async def _life(app: FastAPI) -> AsyncIterator[None]:
    """Opens the parts, none of which needs the store or Redis to be there; closes them in turn."""
    settings: Settings = app.state.settings
    async with AsyncExitStack() as parts:
        pages = Pages(settings.tapeline.store, STORE_CONNECTIONS)
        parts.push_async_callback(pages.close)
        pipe = Pipeline(settings)
        parts.push_async_callback(pipe.close)
        await pipe.start()
        hub = Hub(settings)
        parts.push_async_callback(hub.close)
        await hub.start()
        app.state.web = Web(settings, pages, hub, pipe)
        yield


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, TapelineError)
    problem = problem_of(error, asked=True)
    text = Masker(request.app.state.settings)(str(problem))
    return Problem(problem.status, problem.code, " ".join(text.split()), problem.headers).answer()


async def _http(_: Request, error: Exception) -> Response:
    """What the framework refuses by itself: no such path, no such method."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
    return Problem(error.status_code, code, str(error.detail), dict(error.headers or {})).answer()


async def _invalid(_: Request, error: Exception) -> Response:
    """Parameters or a body that are not as documented."""
    assert isinstance(error, RequestValidationError)
    said = []
    for found in error.errors()[:3]:
        place, *names = found["loc"]
        # Of a body that is no JSON the place is a number of characters.
        where = ".".join(name for name in names if isinstance(name, str)) or str(place)
        said.append(f"{where}: {found['msg']}")
    return Problem(400, "bad_request", " ".join("; ".join(said).split())).answer()
