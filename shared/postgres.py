"""PostgreSQL connections as every part of the program makes them, and what their errors mean.

Nothing here needs a session to outlive a transaction, so that a pooler in transaction mode may stand between.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn
from urllib.parse import parse_qsl, unquote, urlsplit

import asyncpg

from shared.errors import AuthError, StoreUnavailable, StoreUnusable, TapelineError
from shared.stores import redact

CONNECT_SECONDS = 10.0
# Of a query string these are for other clients of the same DATABASE_URL.
_NOT_OURS = frozenset(
    ("schema", "connection_limit", "pool_timeout", "pgbouncer", "socket_timeout", "statement_cache_size")
)
_REFUSED = ("28000", "28P01")  # the user or the password
_MISSING = {
    "3D000": "create it, or name another in TAPELINE_STORE",
    "42501": "grant it, or use another user in TAPELINE_STORE",
    "3F000": "create it, or set another search_path for this user",
}
# Classes of SQLSTATE that pass: connection, transaction rollback, resources, operator, system; and single states:
# object in use or lock not available, a standby that is read-only.
_PASSING = ("08", "40", "53", "57", "58")
_PASSING_STATES = ("55006", "55P03", "25006", "25P03")


class DatabaseMissing(StoreUnusable):
    """The server has no such database (SQLSTATE 3D000), so it holds nothing."""


def where(url: str) -> str:
    """The server and database for people, without credentials."""
    parts = urlsplit(url)
    host = parts.hostname or dict(parse_qsl(parts.query)).get("host", "localhost")
    try:
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        port = ""
    return f"PostgreSQL {host}{port}/{unquote(parts.path.lstrip('/'))}"


async def connect(url: str, *, timeout: float = CONNECT_SECONDS, command_timeout: float | None = None) -> Any:
    """An asyncpg connection; the caller closes it. `command_timeout`: seconds that a statement may take.

    Statements are not kept, for behind a pooler the next transaction may be on another server connection. Raises
    AuthError, StoreUnusable, StoreUnavailable.
    """
    with errors(url):
        return await asyncpg.connect(
            _dsn(url), timeout=timeout, command_timeout=command_timeout, statement_cache_size=0
        )


async def pool(url: str, size: int) -> Any:
    """A pool of at most `size` such connections, none open yet; acquire with a timeout, inside `errors`.

    A statement may take CONNECT_SECONDS, unless it says another time itself. A connection goes back as it is: nothing
    may outlive a transaction. Raises StoreUnusable.
    """
    with errors(url):
        return await asyncpg.create_pool(
            _dsn(url), min_size=0, max_size=size, timeout=CONNECT_SECONDS, command_timeout=CONNECT_SECONDS,
            statement_cache_size=0, reset=_as_it_is,
        )  # fmt: skip


async def _as_it_is(connection: Any) -> None:
    """Behind a pooler a reset would meet another server connection."""


def _dsn(url: str) -> str:
    scheme, colon, rest = url.partition("://")
    base, mark, query = rest.partition("?")
    kept = "&".join(part for part in query.split("&") if part and part.split("=", 1)[0] not in _NOT_OURS)
    return f"{scheme.split('+')[0]}{colon}{base}{mark if kept else ''}{kept}"


@contextmanager
def errors(url: str) -> Iterator[None]:
    """Errors of asyncpg as the program's own, each one line without credentials.

    What passes by itself becomes StoreUnavailable, what the settings must mend StoreUnusable or AuthError, all else
    TapelineError. Errors about a row (SQLSTATE classes 22 and 23) pass unchanged.
    """
    try:
        yield
    except asyncpg.PostgresError as error:
        if (error.sqlstate or "")[:2] in ("22", "23"):
            raise
        _translate(url, error)
    except (asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError, EOFError) as error:
        if isinstance(error, asyncpg.ClientConfigurationError):
            raise StoreUnusable(f"{redact(url)} is no URL that PostgreSQL's client takes ({_line(error)})") from None
        raise StoreUnavailable(f"{where(url)} does not answer ({_line(error)})") from None
    except (ValueError, OverflowError) as error:  # what asyncpg finds wrong with a URL
        raise StoreUnusable(f"{redact(url)} is no URL that PostgreSQL's client takes ({_line(error)})") from None


def _translate(url: str, error: asyncpg.PostgresError) -> NoReturn:
    state, at = error.sqlstate or "", where(url)
    if state in _REFUSED:
        raise AuthError(f"{at} refuses the user: check the name and password in TAPELINE_STORE ({_line(error)})")
    if state in _MISSING:
        kind = DatabaseMissing if state == "3D000" else StoreUnusable
        raise kind(f"{at}: {_line(error)}; {_MISSING[state]}")
    if state[:2] in _PASSING or state in _PASSING_STATES:
        raise StoreUnavailable(f"{at} does not take part now ({_line(error)})")
    raise TapelineError(f"{at} refuses a statement ({state} {_line(error)})")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _Loop:
    """An event loop in a thread of its own, for callers without one, or inside one that must not be held up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def get(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="postgres", daemon=True).start()
            return self._loop


_loop = _Loop()


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine, for synchronous code: connections made so may be used by later calls, too."""
    return asyncio.run_coroutine_threadsafe(work, _loop.get()).result()
