"""Versions of instruments by day: which are new, which hold on a day, which are dropped."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from shared.bus import Bus
from shared.instrument_days import DAY_NS, KEPT_NS, day_of, decoded, field_of, new_versions, on_day, outdated, same
from shared.messages import Instrument

D0 = 1_715_212_800 * 10**9  # 2024-05-09
EXPIRY = D0 + 30 * DAY_NS


def option(tick: float, day: int | None, number: int = 7, expiry: int | None = EXPIRY) -> Instrument:
    """As defined so many days (and some hours) after 2024-05-09."""
    return Instrument(
        number, "V", f"Q1AK4 C{number}", "NQ", "files", kind="C", expiration_ns=expiry, strike=float(number),
        tick_size=tick, defined_ns=None if day is None else D0 + day * DAY_NS + 3600 * 10**9,
    )  # fmt: skip


def test_a_version_is_what_says_something_new() -> None:
    assert same(option(0.25, 0), option(0.25, 9))
    assert not same(option(0.25, 0), option(0.5, 0))
    assert field_of(option(0.25, 1)) == "7@2024-05-10"
    assert field_of(option(0.25, None)) is None
    known = {7: option(0.25, 0)}
    assert new_versions([option(0.25, 3)], known) == {}
    assert list(new_versions([option(0.5, 3), option(0.5, 4), option(0.25, 5)], known)) == [
        "7@2024-05-12", "7@2024-05-14",
    ]  # fmt: skip
    assert list(new_versions([option(0.25, 3)], {7: option(0.25, None)})) == ["7@2024-05-12"], "a guess is no version"
    assert new_versions([option(0.5, None)], known) == {}
    assert known == {7: option(0.25, 0)}


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from([0.25, 0.5]), st.integers(0, 5)), max_size=30))
def test_the_versions_of_a_day_tell_what_held_then(said: list[tuple[int, float, int]]) -> None:
    """Definitions in order of their days, in any pieces: on each day the newest version is the newest definition."""
    told = [option(tick, day, number) for number, tick, day in sorted(said, key=lambda s: s[2])]
    fields: dict[str, bytes] = {}
    known: dict[int, Instrument] = {}
    for at in range(0, len(told), 4):
        fields |= new_versions(told[at : at + 4], known)
        known |= {i.id: i for i in told[at : at + 4]}
    for day in range(6):
        wanted = {i.id: i for i in told if (i.defined_ns or 0) < D0 + (day + 1) * DAY_NS}
        found: dict[int, Instrument] = {}
        for name in sorted(fields, key=lambda n: n.partition("@")[2]):
            if name.partition("@")[2] <= day_of(D0 + day * DAY_NS):
                instrument = msgspec.json.decode(fields[name], type=Instrument)
                found[instrument.id] = instrument
        assert found.keys() == wanted.keys()
        assert all(same(found[n], wanted[n]) for n in wanted)


def test_versions_of_what_expired_long_ago_are_dropped() -> None:
    fields = new_versions([option(1, 0), option(1, 0, 8, None), option(1, 0, 9, EXPIRY + 1)], {})
    assert outdated(fields, EXPIRY + KEPT_NS) == []
    assert outdated(fields, EXPIRY + KEPT_NS + 1) == ["7@2024-05-09"]
    assert list(decoded(fields | {"x@y": b"{"})) == list(decoded(fields)), "what is no instrument is left out"


def test_on_a_day(bus: Bus) -> None:
    newest = [option(0.5, 3), option(1, None, 8), option(1, 5, 9), option(1, 0, 10, D0 + DAY_NS)]
    fields = new_versions([option(0.25, 0), *newest], {})
    bus.call("hset", bus.keys.instrument_days(2), mapping=fields)
    bus.call("hset", bus.keys.instruments(2), mapping={i.id: msgspec.json.encode(i) for i in newest})
    assert on_day(bus, 1, None) == []
    assert sorted(on_day(bus, 2, None), key=lambda i: i.id) == newest

    def on(day: str) -> dict[int, float | None]:
        return {i.id: i.tick_size for i in on_day(bus, 2, day)}

    assert on("2024-05-08") == {8: 1}, "what nobody defined has no days"
    assert on("2024-05-09") == {7: 0.25, 8: 1, 10: 1}
    assert on("2024-05-10") == {7: 0.25, 8: 1, 10: 1}, "alive through its last day"
    assert on("2024-05-12") == {7: 0.5, 8: 1}
    assert on("2024-05-20") == {7: 0.5, 8: 1, 9: 1}
