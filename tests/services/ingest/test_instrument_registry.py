"""Instruments on the bus as ingest keeps them: newest and by day, over restarts, bounded."""

from __future__ import annotations

import threading
from typing import Any

import msgspec

from services.ingest.publisher import INSTRUMENTS_A_FRAME, PublisherOutput
from shared.bus import Bus
from shared.frames import NS
from shared.instrument_days import DAY_NS, KEPT_NS
from shared.instruments import instrument_id, partition_of
from shared.messages import Instrument, decode
from shared.settings import Ingest

PARTITIONS = 3
D0 = 1_715_212_800 * NS  # 2024-05-09
NQ = partition_of("NQ", PARTITIONS)


def option(strike: float, day: int, tick: float = 0.25, **more: Any) -> Instrument:
    symbol = f"Q1AK4 C{strike:g}"
    fields: dict[str, Any] = {"feed": "files", "kind": "C", "expiration_ns": D0 + 10 * DAY_NS, "underlying": "NQM4"}
    fields |= {"strike": strike, "tick_size": tick, "defined_ns": D0 + day * DAY_NS}
    return Instrument(instrument_id("V", symbol), "V", symbol, "NQ", **(fields | more))


def output(bus: Bus, feed: str = "files") -> PublisherOutput:
    out = PublisherOutput(bus, feed, "me", PARTITIONS, Ingest(), threading.Event(), live=False)
    out.attach()
    return out


def days(bus: Bus) -> dict[str, float | None]:
    held = bus.call("hgetall", bus.keys.instrument_days(NQ))
    found = {n.decode(): msgspec.json.decode(body, type=Instrument) for n, body in held.items()}
    assert all(name.startswith(f"{i.id}@") for name, i in found.items())
    return {f"{i.strike:g}@{name.partition('@')[2]}": i.tick_size for name, i in found.items()}


def test_a_day_has_a_version_of_what_it_defined_anew(bus: Bus) -> None:
    for day, tick in enumerate((0.25, 0.25, 0.5, 0.5, 0.25)):  # a process for each day
        out = output(bus)
        out.instruments([option(18_000, day, tick), option(18_050, day)])
        out.close()
    assert days(bus) == {
        "18000@2024-05-09": 0.25, "18050@2024-05-09": 0.25, "18000@2024-05-11": 0.5, "18000@2024-05-13": 0.25,
    }  # fmt: skip
    held = bus.call("hgetall", bus.keys.instruments(NQ))
    assert {msgspec.json.decode(b, type=Instrument) for b in held.values()} == {option(18_000, 4), option(18_050, 4)}
    frames = [f for f in bus.read(NQ, "ticks", "0-0", 100) if f.kind == "instrument"]
    assert [len(decode(f.body)) for f in frames] == [2] * 5, "each process announces what it uses"


def test_several_versions_in_one_call_and_many_instruments(bus: Bus) -> None:
    out = output(bus)
    strikes = range(INSTRUMENTS_A_FRAME + 7)
    out.instruments([option(k, day, 0.25 * (1 + (day == 2 and k == 3))) for k in strikes for day in range(3)])
    assert len(days(bus)) == len(strikes) + 1
    assert days(bus)["3@2024-05-11"] == 0.5
    out.instruments([option(3, 1, 0.5), option(900, 2, feed="tardis:x")])
    assert len(days(bus)) == len(strikes) + 2
    out.close()


def test_guesses_and_spreads_have_no_versions(bus: Bus) -> None:
    out = output(bus)
    out.instruments([option(18_000, 0, kind="?", defined_ns=None), option(1, 0, kind="T")])
    assert days(bus) == {}
    out.instruments([option(18_000, 1)])
    out.close()
    assert days(bus) == {"18000@2024-05-10": 0.25}


def test_versions_go_long_after_the_expiry_of_the_feeds_own(bus: Bus) -> None:
    mine, others = output(bus), output(bus, "other")
    mine.instruments([option(1, 0)])
    others.instruments([option(2, 0, feed="other")])
    late = (10 * DAY_NS + KEPT_NS) // DAY_NS
    for day, left in ((late, 3), (late + 1, 2 + 1)):
        mine.instruments([option(day, day, expiration_ns=None)])
        assert len(days(bus)) == left
    assert "1@2024-05-09" not in days(bus)
    assert "2@2024-05-09" in days(bus), "another feed's tape may be of another time"
    assert bus.call("hlen", bus.keys.instruments(NQ)) == 4, "the newest of each stays"
    mine.close()
    others.close()
