"""Databento Historical: the stretch of a feed that its live gateway no longer has.

Loss semantics: every record with `start_ns <= ts_event < end_ns` that the archive holds, or
Unavailable, whatever the reason (then the caller publishes what is missing as a Gap). Nothing is
bought without asking for its price first.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import databento
import numpy as np
from databento.common.error import BentoError, BentoHttpError
from databento.historical.api.metadata import MetadataHttpAPI
from databento.historical.api.symbology import SymbologyHttpAPI
from databento.historical.api.timeseries import TimeseriesHttpAPI
from databento_dbn import DBNError
from numpy.typing import NDArray
from zstandard import ZstdError

from services.ingest.databento_feed import History
from services.ingest.databento_session import one_line
from services.ingest.dbn_tape import Tape, open_tape
from services.ingest.symbology import DAY, Symbology
from shared.errors import AuthError, ConfigError, SourceError, Unavailable
from shared.frames import NS
from shared.settings import Databento
from shared.usage import Totals

log = logging.getLogger(__name__)

T = TypeVar("T")

WHERE = "Databento Historical"
# The archive is cut by time of receipt, a replay by event time: ask for more, and keep what is meant.
RECEIPT_MARGIN_NS = 5 * NS
SCHEMA = "tbbo"
SYMBOLS_A_REQUEST = 2000
SILENCE_SECONDS = 60.0
WHOLE_SECONDS = 900.0
POLL_SECONDS = 0.05


class Budget(Protocol):
    """The account that fetching draws on."""

    def left_usd(self) -> float:
        """What may still be spent today; infinite without a budget."""

    def spend(self, bought: Totals) -> None:
        """That was bought."""


class Archive:
    """Requests to the archive. They return early, with Unavailable, when `stop` is set.

    A request fails when the server is silent for `silence_seconds` or needs `whole_seconds`.
    Raises ConfigError for a gateway that cannot be used.
    """

    def __init__(
        self,
        settings: Databento,
        stop: threading.Event,
        *,
        silence_seconds: float = SILENCE_SECONDS,
        whole_seconds: float = WHOLE_SECONDS,
    ) -> None:
        self._settings = settings
        self._stop = stop
        self.goes_on: Callable[[], None] = lambda: None  # called many times a second while a request is waited for
        self._whole_seconds = whole_seconds
        self._client = _client(settings.api_key, settings.history_gateway.rstrip("/"))
        for api in (self._client.metadata, self._client.symbology, self._client.timeseries):
            api.TIMEOUT = silence_seconds

    def datasets(self) -> list[str]:
        """The datasets that the key may ask for. Raises AuthError, Unavailable."""
        found = self._aside(lambda: self._ask("list its datasets", self._client.metadata.list_datasets))
        if not isinstance(found, list):
            raise Unavailable(f"{WHERE} does not list its datasets: it says {one_line(repr(found))}")
        return [str(name) for name in found]

    def cost(self, query: Mapping[str, Any]) -> float:
        """The price of a request, USD. Raises AuthError, Unavailable."""
        cost = self._ask("tell the price", lambda: self._client.metadata.get_cost(**query))
        if not isinstance(cost, int | float) or not math.isfinite(cost):
            raise Unavailable(f"{WHERE} does not tell the price: it says {one_line(repr(cost))}")
        return float(cost)

    def download(self, query: Mapping[str, Any], path: Path) -> None:
        """What a request brings, into a file. Raises AuthError, Unavailable."""
        store = self._ask("send the stretch", lambda: self._client.timeseries.get_range(**query, path=path))
        store.reader.close()

    def _aside(self, call: Callable[[], T], meanwhile: Callable[[], None] | None = None) -> T:
        """`call` in a thread of its own: neither `stop` nor the time limit waits for a socket."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except BaseException as error:  # raised again where the result is asked for
                future.set_exception(error)

        threading.Thread(target=run, name="databento-history", daemon=True).start()
        deadline = time.monotonic() + self._whole_seconds
        while not wait([future], timeout=POLL_SECONDS).done:
            self.goes_on()
            if meanwhile is not None:
                meanwhile()
            if self._stop.is_set():
                raise Unavailable(f"stopped before {WHERE} was done")
            if time.monotonic() > deadline:
                raise Unavailable(f"{WHERE} is not done within {self._whole_seconds:g} s")
        return future.result()

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        """Call the client; its errors as ours."""
        failed: AuthError | Unavailable
        try:
            return call()
        except BentoHttpError as error:
            text = one_line(str(error), self._settings.api_key)
            failed = Unavailable(f"{WHERE} does not {what}: {text}")
            if error.http_status == 401:
                failed = AuthError(f"{WHERE} refused the API key: {text}; check DATABENTO_API_KEY")
        except (BentoError, DBNError, ZstdError, OSError, ValueError) as error:  # those of `requests` are OSErrors
            failed = Unavailable(f"{WHERE} does not {what}: {one_line(str(error), self._settings.api_key)}")
        # Raised here, or the client's error would live on as its context, and with it the file it left open.
        raise failed


class DatabentoHistory(Archive):
    """Callable as DatabentoLive's `history`. `budget`: what is fetched must fit in it, and is put on its account."""

    budget: Budget | None = None

    def __call__(self, start_ns: int, end_ns: int) -> History:
        """Blocks of (raw symbol by native id, RECORD records), each of one UTC day, in order of receipt.

        Raises AuthError when the key is refused, else Unavailable; blocks before a fault have been given.
        """
        if end_ns <= start_ns:
            return
        query = {
            "dataset": self._settings.dataset,
            "symbols": list(self._settings.symbols),
            "schema": SCHEMA,
            "stype_in": self._settings.stype,
            "start": start_ns - RECEIPT_MARGIN_NS,
            "end": end_ns + RECEIPT_MARGIN_NS,
        }
        cost = self._aside(lambda: self.cost(query))
        self._afford(cost, start_ns, end_ns)
        with TemporaryDirectory(prefix="tapeline-", ignore_cleanup_errors=True) as folder:
            path = Path(folder) / "stretch.dbn.zst"
            if self.budget is not None:  # a download that fails may be billed all the same
                self.budget.spend(Totals(cost_usd=cost))
            self._aside(lambda: self.download(query, path))
            try:
                yield from self._blocks(open_tape(path), start_ns, end_ns)
            except SourceError as error:
                said = str(error).replace(str(path), "what it sent")
                raise Unavailable(f"{WHERE}: {one_line(said)}") from None

    # -- requests ----------------------------------------------------------------------------

    def _afford(self, cost: float, start_ns: int, end_ns: int) -> None:
        limit = self._settings.history_max_usd
        price = f"{_iso(start_ns)} to {_iso(end_ns)} costs ${cost:.4f} at {WHERE}"
        if limit <= 0:
            raise Unavailable(f"{price}, and databento.history_max_usd is 0 (never fetch): it becomes a gap")
        if cost > limit:
            raise Unavailable(f"{price}, more than databento.history_max_usd ({limit:g}): it becomes a gap")
        left = self.budget.left_usd() if self.budget is not None else math.inf
        if cost > left:
            raise Unavailable(
                f"{price}, more than the ${left:.2f} that is left of today's budget: it becomes a gap; "
                "raise usage.daily_usd to have it"
            )
        log.info("%s; fetching it", price)

    def _raw_symbols(self, tape: Tape) -> Any:
        """The raw symbols behind the ids of a continuous request, whose header names only what was asked for."""
        intervals = [i for found in tape.metadata.mappings.values() for i in found if i["symbol"]]
        mappings: dict[str, list[dict[str, Any]]] = {}
        ids = sorted({i["symbol"] for i in intervals})
        first = min((i["start_date"] for i in intervals), default=date.min)
        last = max((i["end_date"] for i in intervals), default=date.max)
        for at in range(0, len(ids), SYMBOLS_A_REQUEST):
            asked = (
                self._settings.dataset,
                ids[at : at + SYMBOLS_A_REQUEST],
                "instrument_id",
                "raw_symbol",
                first,
                last,
            )
            answer = self._ask("resolve instrument ids", partial(self._client.symbology.resolve, *asked))
            try:
                for native, found in answer["result"].items():
                    mappings[native] = [
                        {"start_date": date.fromisoformat(i["d0"]), "end_date": date.fromisoformat(i["d1"]),
                         "symbol": i["s"]}
                        for i in found
                    ]  # fmt: skip
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise Unavailable(f"{WHERE} does not resolve instrument ids: strange answer ({error!r})") from None
        return SimpleNamespace(stype_in="instrument_id", mappings=mappings)

    # -- records -----------------------------------------------------------------------------

    def _blocks(self, tape: Tape, start_ns: int, end_ns: int) -> Iterator[tuple[Mapping[int, str], NDArray[Any]]]:
        if tape.schema != SCHEMA:
            raise Unavailable(f"{WHERE} sent schema {tape.schema} instead of {SCHEMA}")
        symbology = Symbology(self._settings.dataset, "databento")
        continuous = self._settings.stype == "continuous"
        symbology.add_metadata(self._aside(lambda: self._raw_symbols(tape)) if continuous else tape.metadata)
        symbology.close()
        day, names, count = -1, dict[int, str](), 0
        for records in tape.records():
            chosen = records[(records["ts_event"] >= start_ns) & (records["ts_event"] < end_ns)]
            days = chosen["ts_recv"] // DAY
            for part in np.split(chosen, np.flatnonzero(np.diff(days)) + 1):
                if not len(part):
                    continue
                if int(part["ts_recv"][0]) // DAY != day:
                    day = int(part["ts_recv"][0]) // DAY
                    names = {native: i.symbol for native, i in symbology.on(day)}
                count += len(part)
                yield {i: names[i] for i in np.unique(part["instrument_id"]).tolist() if i in names}, part
        log.info("%s: %d records of %s to %s", WHERE, count, _iso(start_ns), _iso(end_ns))


def _client(key: str, gateway: str) -> Any:
    try:
        client = databento.Historical(key, gateway) if gateway else databento.Historical(key)
        url = urlsplit(gateway)
        if url.scheme not in ("", "http", "https") or (url.scheme and not url.hostname):
            raise ValueError("no host")
    except ValueError:
        raise ConfigError(f"databento.history_gateway '{gateway}' is no address: use https://HOST") from None
    if url.scheme == "http":
        # The client makes https of every gateway; its parts take one as it is.
        if not _loopback(url.hostname or ""):
            raise ConfigError(f"databento.history_gateway '{gateway}' would show the API key to the network: use https")
        client.metadata = MetadataHttpAPI(key, gateway)
        client.symbology = SymbologyHttpAPI(key, gateway)
        client.timeseries = TimeseriesHttpAPI(key, gateway)
    return client


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _iso(ns: int) -> str:
    return datetime.fromtimestamp(ns // NS, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
