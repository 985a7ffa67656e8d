"""The page: its files of this package, and the chart library of the package that carries it."""

from __future__ import annotations

import gzip
import hashlib
import mimetypes
from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from services.web.problems import missing
from shared.errors import ConfigError

FOLDER = Path(__file__).parent / "static"
CHART = "js/lightweight-charts.standalone.development.js"
CHART_PACKAGE, CHART_MODULE = "lightweight-charts-v5", "lightweight_charts"
# Files of the page are asked for again each time (and answered 304); the chart library only changes with its package.
FRESH, LONG = "no-cache", "public, max-age=86400"
TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css", ".html": "text/html"}
ZIPPED = ("text/", "image/svg", "application/json")


class Asset:
    """A file as it is served: its bytes, plain and zipped, and the tag that changes with them."""

    def __init__(self, path: Path, cache: str) -> None:
        self._path, self._cache, self._stamp = path, cache, (0, 0)
        kind = TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        self._type = f"{kind}; charset=utf-8" if kind.startswith("text/") else kind
        self._plain, self._zipped, self._tag = b"", b"", ""

    def answer(self, request: Request, status: int = 200) -> Response:
        """Raises OSError when the file has gone."""
        self._read()
        headers = {"ETag": f'"{self._tag}"', "Cache-Control": self._cache}
        tags = request.headers.get("if-none-match", "")
        if status == 200 and (tags == "*" or self._tag in tags):
            return Response(status_code=304, headers=headers)
        if self._zipped and "gzip" in request.headers.get("accept-encoding", ""):
            zipped = {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
            return Response(self._zipped, status, {**headers, **zipped}, self._type)
        return Response(self._plain, status, headers, self._type)

    def _read(self) -> None:
        """Once, and again when the file has changed: an installation may be upgraded, or edited, while we run."""
        found = self._path.stat()
        stamp = (found.st_mtime_ns, found.st_size)
        if stamp == self._stamp:
            return
        self._plain = self._path.read_bytes()
        self._zipped = gzip.compress(self._plain, 6, mtime=0) if self._type.startswith(ZIPPED) else b""
        self._tag = hashlib.blake2b(self._plain, digest_size=9).hexdigest()
        self._stamp = stamp


def chart_path() -> Path:
    """The chart library's file, found without importing its package. Raises ConfigError where it is not installed."""
    found = find_spec(CHART_MODULE)
    path = Path(found.origin).parent / CHART if found is not None and found.origin else None
    if path is None or not path.is_file():
        raise ConfigError(f"the page wants the package {CHART_PACKAGE}, which is not installed: pip install tapeline")
    return path


def routes() -> APIRouter:
    """The routes of the page. Raises ConfigError when the chart library is not there."""
    router = APIRouter()
    known: dict[str, Asset] = {}
    chart = Asset(chart_path(), LONG)
    root = FOLDER.resolve()

    def file(name: str, request: Request, status: int = 200) -> Response:
        asset = known.get(name)
        if asset is None:
            path = (root / name).resolve() if "\0" not in name else root
            if not path.is_relative_to(root) or not path.is_file():
                raise missing(f"the page has no file '{name[:100]}'")
            asset = known[name] = Asset(path, FRESH)
        try:
            return asset.answer(request, status)
        except OSError:
            raise missing(f"the page has no file '{name[:100]}' any more") from None

    @router.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        # With the right token in the address nobody comes this far; the page asks for it.
        return file("index.html", request, 401 if "token" in request.query_params else 200)

    @router.api_route("/static/{name:path}", methods=["GET", "HEAD"])
    async def static(name: str, request: Request) -> Response:
        return file(name, request)

    @router.api_route("/vendor/lightweight-charts.js", methods=["GET", "HEAD"])
    async def vendor(request: Request) -> Response:
        return chart.answer(request)

    @router.api_route("/favicon.ico", methods=["GET", "HEAD"])
    async def icon(request: Request) -> Response:
        return file("icon.svg", request)

    return router
