"""A BigQuery of the tests' own, strict where the real service is, for Google's own clients over HTTP and gRPC.

    with BigQueryServer() as server:
        server.order("jobs.insert.load", refuse(503, "backendError"), table="candles")  # before it is done
        server.order("AppendRows", after=drop, nth=2)                               # done, the answer is lost
        server.rows("candles")

Rows live here and survive whatever becomes of the client. A call's kind is its name in the API (jobs.insert.load and
jobs.insert.query are told apart; jobs.insert.begin is that of an upload, which takes effect at its end). Orders
belong to calls of a kind (and of a table); an action runs in the server's thread, may look at and change the call
(`runs_for`, `fails`), kill the client, wait (`hang`), or raise what the client gets instead of an answer.

What it does not have: SQL beyond SQLite's (see bigquery_tables.py), quotas, billing, permissions, partition expiry,
eventual consistency, PENDING and BUFFERED streams.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import grpc


T = TypeVar("T")


class Refuse(Exception):
    """The client gets this instead of an answer: an HTTP status, or on gRPC the status that it stands for."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason, self.message = status, reason, message


class Fail(Exception):
    """A gRPC status: of the whole call, or (`in_band`) of one AppendRows request on a connection that stays open."""

    def __init__(self, code: grpc.StatusCode, message: str, *, in_band: bool = False, storage: int = 0) -> None:
        super().__init__(message)
        self.code, self.message, self.in_band, self.storage = code, message, in_band, storage


class Drop(Exception):
    """The connection ends without an answer."""


@dataclass
class Call:
    """One call as it came. `table`: the one it is about; `name`: of a job or a stream; `rows`: as far as known.

    `polls`: how often a job says RUNNING before it is done; `error`: with which reason it then fails instead.
    """

    kind: str
    table: str = ""
    name: str = ""
    rows: int = 0
    bytes: int = 0
    polls: int = 0
    error: tuple[str, str] | None = None
    text: str = ""
    offset: int = -1


Action = Callable[[Call], None]


@dataclass
class Order:
    """What is to happen at the `nth` matching call from now on, and at `times` in all."""

    kind: str
    table: str
    nth: int
    times: int
    before: Action | None
    after: Action | None
    met: int = field(default=0)
    done: int = field(default=0)

    def due(self, call: Call) -> bool:
        if call.kind != self.kind or (self.table and call.table != self.table):
            return False
        self.met += 1
        return self.nth <= self.met < self.nth + self.times


class Orders:
    """Calls so far, and what is to happen at those to come. Safe from several threads."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._orders: list[Order] = []
        self._lock = threading.Lock()
        # Held for the effect of a call, never while an order is carried out.
        self.effects = threading.RLock()

    def order(
        self,
        kind: str,
        before: Action | None = None,
        *,
        after: Action | None = None,
        table: str = "",
        nth: int = 1,
        times: int = 1,
    ) -> Order:
        made = Order(kind, table, nth, times, before, after)
        with self._lock:
            self._orders.append(made)
        return made

    def carry_out(self, call: Call, effect: Callable[[], T]) -> T:
        """The effect of a call with what is ordered around it; `after` is of calls that were carried out."""
        with self._lock:
            self.calls.append(call)
            due = [order for order in self._orders if order.due(call)]
        for order in due:
            if order.before:
                order.done += 1
                order.before(call)
        try:
            with self.effects:
                answer = effect()
        except BaseException:
            for order in due:
                order.met -= order.after is not None
            raise
        for order in due:
            if order.after:
                order.done += 1
                order.after(call)
        return answer

    def unmet(self) -> list[Order]:
        """Orders that nothing has met."""
        return [order for order in self._orders if not order.done]

    def seen(self, kind: str, table: str = "") -> list[Call]:
        """The calls of a kind so far, of one table or of all."""
        with self._lock:
            return [c for c in self.calls if c.kind == kind and table in ("", c.table)]


def refuse(status: int, reason: str = "", message: str = "as ordered") -> Action:
    """An HTTP error; `reason` as BigQuery words it (503 backendError, 403 quotaExceeded, ...)."""

    def act(call: Call) -> None:
        raise Refuse(status, reason or _REASONS.get(status, "invalid"), message)

    return act


def fail(code: grpc.StatusCode, message: str = "as ordered", *, in_band: bool = False) -> Action:
    """A gRPC error."""

    def act(call: Call) -> None:
        raise Fail(code, message, in_band=in_band)

    return act


def drop(call: Call) -> None:
    """Cut the connection."""
    raise Drop


def hang(release: threading.Event) -> Action:
    """Answer only after `release` is set."""

    def act(call: Call) -> None:
        release.wait(60)

    return act


def runs_for(polls: int) -> Action:
    """The job says RUNNING so many times before it is done."""

    def act(call: Call) -> None:
        call.polls = polls

    return act


def fails(reason: str = "backendError", message: str = "as ordered", polls: int = 0) -> Action:
    """The job is taken, and then fails without having written anything."""

    def act(call: Call) -> None:
        call.error, call.polls = (reason, message), polls

    return act


_REASONS = {
    401: "authError", 403: "accessDenied", 404: "notFound", 409: "duplicate", 429: "rateLimitExceeded",
    500: "internalError", 503: "backendError",
}  # fmt: skip


class BigQueryServer(Orders):
    """The server on two free ports of this machine; `url` is its REST side, `grpc` host:port of the other."""

    def __init__(self, project: str = "tests") -> None:
        from tests.fakes.bigquery_rest import Rest
        from tests.fakes.bigquery_tables import Warehouse
        from tests.fakes.bigquery_write import WriteService

        super().__init__()
        self.project = project
        # Errors of this server's own: a test that meets one has to fail.
        self.broken: list[Exception] = []
        self.warehouse = Warehouse(project, self.effects)
        self._rest = Rest(self)
        self.write = WriteService(self)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._rest.port}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.write.port}"

    def rows(self, table: str, dataset: str = "") -> list[dict[str, Any]]:
        """The rows of a table in the order they came; instants as microseconds. [] for a table that is not there."""
        return self.warehouse.rows(table, dataset)

    def __enter__(self) -> BigQueryServer:
        self._rest.start()
        self.write.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._rest.stop()
        self.write.stop()
