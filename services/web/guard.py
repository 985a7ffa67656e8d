"""Who may ask, and how often: the outermost layer, before any handler, of HTTP and WebSockets alike.

A name in `Host` that is not ours is refused, since a page of another site may have it resolve to this machine; so is a
WebSocket or a POST of a page of another site. What a proxy says in `X-Forwarded-*` is not believed.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection, cookie_parser
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from services.web.problems import Problem
from shared import metrics
from shared.live import CLOSE_UNAUTHORIZED
from shared.settings import Web

log = logging.getLogger(__name__)

COOKIE = "tapeline_token"
COOKIE_SECONDS = 30 * 86_400
# A page beside the shell is loaded in one go; nothing in it is worth counting or hiding.
OPEN = ("/static/", "/vendor/", "/health", "/favicon.ico")
# How much more than a second's requests may come at once.
BURST_SECONDS = 2.0
ADDRESSES = 10_000
MOST_BODY = 64 << 10
HEADERS = {
    # The chart library writes its own style elements; nothing else may come from elsewhere or from within the page.
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Buckets:
    """A token bucket per client address: `rate` a second, `burst` at once; the last so many addresses are known."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, max(1.0, burst), clock
        self._held: OrderedDict[str, tuple[float, float]] = OrderedDict()  # address -> (requests left, at)

    def take(self, address: str) -> float:
        """0.0 when a request may pass, else the seconds after which one may."""
        now = self._clock()
        left, at = self._held.pop(address, (self._burst, now))
        left = min(self._burst, left + (now - at) * self._rate)
        wait = 0.0 if left >= 1.0 else (1.0 - left) / self._rate
        self._held[address] = (left if wait else left - 1.0, now)
        if len(self._held) > ADDRESSES:
            self._held.popitem(last=False)
        return wait


def client_of(connection: HTTPConnection) -> str:
    """The client's address; of IPv6 the network that one customer has."""
    host = connection.client.host if connection.client else ""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 4:
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


def host_name(authority: str) -> str:
    """`name` of `name:port`, `::1` of `[::1]:8000`; in small letters, empty for what is none."""
    try:
        return "" if re.search(r"[@/?#\\]", authority) else (urlsplit(f"//{authority}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def our_name(name: str, web: Web) -> bool:
    """Whether this server may be asked for under a host name."""
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost" or name in {web.host.lower(), *(host.lower() for host in web.hosts)}
    # No name resolves to us where none is given: an address bound to by `0.0.0.0` is safe.
    return address.is_loopback or name in (web.host, *web.hosts) or web.host in ("0.0.0.0", "::")  # noqa: S104


def same_origin(connection: HTTPConnection, web: Web) -> bool:
    """Whether a page that asks is our own, or of web.cors_origins; what is no page (a program) sends no Origin."""
    origin = connection.headers.get("origin")
    if origin is None or origin in web.cors_origins:
        return True
    scheme, _, authority = origin.partition("://")
    return scheme in ("http", "https") and authority.lower() == connection.headers.get("host", "").lower()


def authorized(connection: HTTPConnection, token: str) -> bool:
    """Whether a request or WebSocket carries the token, as Bearer or cookie; without one in the settings all do."""
    if not token:
        return True
    kind, _, given = connection.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and equal(given.strip(), token):
        return True
    return any(equal(cookie_parser(header).get(COOKIE, ""), token) for header in connection.headers.getlist("cookie"))


def equal(given: str, token: str) -> bool:
    """Compares in a time that tells nothing of the token."""
    return hmac.compare_digest(given.encode(errors="surrogateescape"), token.encode())


class Guard:
    """ASGI middleware. What it refuses reaches nothing behind it; an error of what is behind it becomes a 500."""

    def __init__(self, app: ASGIApp, web: Web) -> None:
        self._app, self._web = app, web
        self._buckets = Buckets(web.requests_per_second, BURST_SECONDS * web.requests_per_second)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        problem = self._refusal(connection, scope)
        if scope["type"] == "websocket":
            if problem is None:
                await self._app(scope, receive, send)
            else:
                await _refuse(WebSocket(scope, receive, send), problem)
            return
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        response: Response | None = problem.answer() if problem else self._signing_in(scope)
        if response is not None:
            await response(scope, receive, sending)
            return
        try:
            await self._app(scope, receive, sending)
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            metrics.fault("web.request")
            if started:
                raise
            failed = Problem(500, "failed", "the server failed at this request; its log has the reason")
            await failed.answer()(scope, receive, sending)

    def _refusal(self, connection: HTTPConnection, scope: Scope) -> Problem | None:
        web, path = self._web, scope["path"]
        name = host_name(connection.headers.get("host", ""))
        if not our_name(name, web):
            return Problem(421, "misdirected", f"'{name[:100]}' is no name of this server; add it to web.hosts")
        if path.startswith(OPEN):
            return None
        wait = self._buckets.take(client_of(connection))
        if wait:
            headers = {"Retry-After": str(math.ceil(wait))}
            return Problem(429, "too_many", f"more than {web.requests_per_second:g} requests a second", headers)
        writes = scope["type"] == "websocket" or scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if writes and not same_origin(connection, web):
            return Problem(403, "forbidden", "not from a page of another site; web.cors_origins names those that may")
        if path != "/" and not authorized(connection, web.token):
            headers = {"WWW-Authenticate": "Bearer"}
            return Problem(401, "unauthorized", "the token is missing or wrong: Authorization: Bearer TOKEN", headers)
        length = connection.headers.get("content-length", "0")
        if writes and (not length.isdecimal() or int(length) > MOST_BODY or "transfer-encoding" in connection.headers):
            return Problem(413, "too_large", f"a body of at most {MOST_BODY} bytes, with its Content-Length")
        return None

    def _signing_in(self, scope: Scope) -> Response | None:
        """`GET /?token=T`: the token as a cookie, and away from the address; None for any other request."""
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token") if scope["path"] == "/" else None
        if given is None or (self._web.token and not equal(given[0], self._web.token)):
            return None  # the page asks for it
        response = RedirectResponse("/", 303)
        if self._web.token:
            response.set_cookie(COOKIE, given[0], COOKIE_SECONDS, httponly=True, samesite="strict")
        return response


async def _refuse(socket: WebSocket, problem: Problem) -> None:
    if problem.status == 401:
        # A browser does not show its page why a handshake failed; a close code it does.
        await socket.accept()
        await socket.close(CLOSE_UNAUTHORIZED, str(problem))
    else:
        await socket.send_denial_response(problem.answer())
