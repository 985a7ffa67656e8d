"""The pieces of the live source: cutting the bytes, leaving out what is held."""

from __future__ import annotations

import asyncio
from typing import Any

import databento_dbn as dbn
import numpy as np
import pytest

from services.ingest.databento_session import Dropped, Wire
from services.ingest.dedupe import Ledger
from services.ingest.normalize import RECORD
from services.ingest.source import Grouped
from shared.frames import CLOCK, TICK, TRADE
from shared.instruments import instrument_id
from tests.fakes.gateway import KEY
from tests.fakes.tape import NS, Tape, generate


@pytest.fixture(scope="module")
def tape() -> Tape:
    return generate()


class Taken:
    """A handler that keeps what it gets."""

    def __init__(self) -> None:
        self.trades_: list[Any] = []
        self.order: list[str] = []
        self.meta: Any = None
        self.records = self.bytes = 0

    def metadata(self, metadata: Any) -> None:
        self.meta = metadata

    def received(self, records: int, nbytes: int) -> None:
        self.records += records
        self.bytes += nbytes

    def trades(self, records: Any) -> None:
        self.trades_.append(records.copy())
        self.order += ["t"] * len(records)

    def record(self, record: Any) -> None:
        self.order.append(type(record).__name__[0])


@pytest.mark.parametrize("chunk", [1, 7, 80, 81, 1000, 10**6])
def test_however_the_bytes_are_cut(tape: Tape, chunk: int) -> None:
    beat = bytes(dbn.SystemMsg(5, "Heartbeat", code=dbn.SystemCode.HEARTBEAT))
    definition = bytes(tape.listings[0].definition(1))
    raw = bytes(dbn.Metadata(tape.dataset, 5, None, dbn.SType.INSTRUMENT_ID, None))
    raw += definition + tape.records[:30].tobytes() + beat + beat + tape.records[30:60].tobytes() + definition

    async def feed() -> Taken:
        taken = Taken()
        wire = Wire(taken, KEY, tape.dataset, 5)
        wire.authenticated.set_result("1")
        for at in range(0, len(raw), chunk):
            piece = raw[at : at + chunk]
            wire.get_buffer(-1)[: len(piece)] = piece
            wire.buffer_updated(len(piece))
        assert not wire.failed.done()
        return taken

    taken = asyncio.run(feed())
    assert np.concatenate(taken.trades_).tobytes() == tape.records[:60].tobytes()
    assert "".join(taken.order) == "I" + 30 * "t" + "SS" + 30 * "t" + "I"
    assert (taken.records, taken.bytes) == (64, 60 * 80 + 2 * len(definition) + 2 * len(beat))
    assert taken.meta.dataset == tape.dataset


def test_what_is_not_dbn_is_refused() -> None:
    class Transport:
        def abort(self) -> None: ...

        def write(self, data: bytes) -> None: ...

    async def feed() -> None:
        wire = Wire(Taken(), KEY, "GLBX.MDP3", 5)
        wire.connection_made(Transport())  # type: ignore[arg-type]
        wire.authenticated.set_result("1")
        wire.get_buffer(-1)[:8] = b"HTTP/1.1"
        wire.buffer_updated(8)
        await wire.failed

    with pytest.raises(Dropped, match="not DBN"):
        asyncio.run(feed())


def rows(*spec: tuple[int, int]) -> Grouped:
    """Grouped rows of partition 0 from (instrument, time); instrument 0 is a clock."""
    made = np.zeros(len(spec), TICK)
    for i, (instrument, ts) in enumerate(spec):
        made[i]["instrument"], made[i]["ts_event_ns"] = instrument, ts
        made[i]["kind"] = CLOCK if instrument == 0 else TRADE
    return Grouped(made, np.zeros(len(spec), np.int64), [0], [0, len(spec)])


def test_the_ledger_leaves_out_as_many_as_are_held() -> None:
    ledger = Ledger(100)
    ledger.add(rows((1, 10), (1, 10), (2, 10), (0, 11), (1, 12)))
    ledger.expect(10)
    fresh, doubled = ledger.admit(rows((1, 10), (1, 10), (1, 10), (2, 10), (0, 11), (1, 12), (1, 12), (0, 20)))
    assert doubled == 4
    assert [(int(r["instrument"]), int(r["ts_event_ns"])) for r in fresh.rows] == [(1, 10), (1, 12), (0, 20)]
    assert fresh.starts == [0, 3]


def test_the_ledger_leaves_out_what_was_trimmed_away() -> None:
    ledger = Ledger(NS)
    ledger.restore(0, rows((1, 500_000_000), (1, 600_000_000)).rows)
    ledger.expect(0)
    fresh, doubled = ledger.admit(rows((1, 400_000_000), (1, 500_000_000), (1, 600_000_000), (1, 700_000_000)))
    assert (len(fresh.rows), doubled) == (1, 3)


def test_record_is_the_wire_layout() -> None:
    assert RECORD.itemsize == 80
    assert instrument_id("GLBX.MDP3", "ESH4") > 0
