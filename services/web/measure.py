"""The server's own metrics: what is asked, how long answering takes, and what goes out to live clients."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared.metrics import REQUEST_SECONDS, REQUESTS

# What reached no route: a refusal of the guard, a path that does not exist.
NO_ROUTE = "none"
# Of an answer that goes on for as long as its client stays, the time says nothing.
ENDLESS = "/api/v1/stream"


class Measure:
    """ASGI middleware: counts HTTP requests by the template of their route, never by the path that was asked for."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        # Looking a metric up by its labels costs more than counting; there are few of them.
        self._counts: dict[tuple[str, int], Counter] = {}
        self._times: dict[str, Histogram] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(template_of(scope), message["status"])
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            route = template_of(scope)
            if route != ENDLESS:
                self._time(route, time.perf_counter() - began)

    def _count(self, route: str, status: int) -> None:
        counter = self._counts.get((route, status))
        if counter is None:
            counter = self._counts[route, status] = REQUESTS.labels(route, str(status))
        counter.inc()

    def _time(self, route: str, seconds: float) -> None:
        histogram = self._times.get(route)
        if histogram is None:
            histogram = self._times[route] = REQUEST_SECONDS.labels(route)
        histogram.observe(seconds)


def template_of(scope: Scope) -> str:
    """The template of the route that a request came to (`/static/{name}`)."""
    route: Any = scope.get("route")
    return getattr(route, "path_format", None) or NO_ROUTE
