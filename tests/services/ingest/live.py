"""What the tests of the live source share: it, pointed at a test gateway, and what must come out."""

from __future__ import annotations

from typing import Any

from services.ingest.databento_live import DatabentoLive
from services.ingest.definitions import from_definition
from services.ingest.normalize import Normalizer
from shared.frames import TRADE, Rows
from shared.settings import Databento
from tests.fakes.gateway import KEY, Gateway
from tests.fakes.tape import START, Tape
from tests.services.ingest.collect import Store
from tests.wait import until

PARTITIONS = 4
SYMBOLS = ("ES.FUT", "NQ.FUT", "CL.FUT")


def settings(gateway: Gateway, **changes: Any) -> Databento:
    basis = {
        "api_key": KEY, "gateway": "127.0.0.1", "port": gateway.port, "symbols": SYMBOLS,
        "silence_seconds": 10.0, "backoff_max_seconds": 0.02,
    }  # fmt: skip
    return Databento(**(basis | changes))


def live(gateway: Gateway, store: Store | None = None, **changes: Any) -> DatabentoLive:
    return DatabentoLive(settings(gateway, **changes), PARTITIONS, published=store.published if store else None)


def expected(tape: Tape, since: int = 0) -> dict[int, Rows]:
    """All rows of the tape by partition, normalized in one go."""
    normalizer = Normalizer("databento", PARTITIONS)
    for listing in tape.listings:
        normalizer.map(listing.native, from_definition(listing.definition(START), tape.dataset, "databento"))
    grouped = normalizer(tape.records[since:], 0)
    return {p: grouped.rows[grouped.starts[g] : grouped.starts[g + 1]] for g, p in enumerate(grouped.partitions)}


def trades_of(rows: Rows) -> Rows:
    return rows[rows["kind"] == TRADE]


def total(tape: Tape) -> int:
    return sum(len(trades_of(rows)) for rows in expected(tape).values())


def assert_whole(store: Store, tape: Tape) -> None:
    """Nothing lost, nothing doubled, each partition in the order of the tape."""
    want = expected(tape)
    assert set(store.rows) <= set(want)
    for p, rows in want.items():
        assert store.trades(p).tobytes() == trades_of(rows).tobytes(), f"partition {p}"


def connected(gateway: Gateway, sessions: int = 1) -> None:
    until(lambda: len(gateway.sessions) >= sessions and gateway.live, what="a session")
