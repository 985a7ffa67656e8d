"""Usage: what the sums are, and that what is told of them adds up, whatever is lost, killed or forgotten."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import usage
from shared.bus import Bus, Limits
from shared.errors import BusUnavailable, Fenced
from shared.frames import NS, iso
from shared.instruments import partition_of
from shared.messages import Usage, decode
from shared.redis_server import EmbeddedRedis
from shared.settings import UsageSettings
from shared.usage import DAY_NS, HISTORY, MIB, NOTHING, STOPPED, Meter, Totals, day_of, priced, vendor
from shared.usage_book import Book, row_of, spent_by_others
from tests.shared.usage_store import keep_daily
from tests.wait import on_disk

PARTITIONS = 3
MINUTE = 60 * NS
NOON = 20_000 * DAY_NS + DAY_NS // 2
TODAY = day_of(NOON)
PRICES = UsageSettings(usd_per_mib=0.5, usd_per_hour=2.0, daily_usd=10.0)


def test_what_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert priced("databento", PRICES)
    assert priced(HISTORY, PRICES)
    assert not priced("tardis:deribit", PRICES)
    assert priced("tardis:deribit", UsageSettings(priced_feeds=("tardis",)))
    assert not priced("tardis:bybit", UsageSettings(priced_feeds=("tardis:deribit",)))
    assert (vendor("tardis:deribit"), vendor("databento")) == ("tardis", "databento")
    assert usage.stop_usd(PRICES) == 8.0
    assert usage.stop_usd(UsageSettings(daily_usd=0.0)) == float("inf")
    before = usage.now_ns()
    monkeypatch.setenv(usage.OFFSET, "86400")
    assert usage.now_ns() - before >= DAY_NS


def test_bytes_and_hours_cost_and_events_do_not() -> None:
    meter = Meter("databento", PRICES, NOON)
    meter.receive(7, 3 * MIB)
    meter.advance(NOON + 600 * NS, 600 * NS)  # not connected
    meter.connect(True)
    meter.advance(NOON + 2400 * NS, 1800 * NS)
    meter.connect(False)
    meter.advance(NOON + 9000 * NS, 6600 * NS)
    assert meter.today == Totals(7, 3 * MIB, 1800.0, 1.5 + 1.0)
    free = Meter("tardis:deribit", PRICES, NOON)
    free.connect(True)
    free.receive(7, MIB)
    free.advance(NOON + NS, NS)
    assert free.today == Totals(7, MIB, 1.0, 0.0)
    assert (free.budget_usd, meter.budget_usd) == (0.0, 10.0)


def test_midnight_parts_the_connected_time_and_the_state_stays() -> None:
    meter = Meter("databento", PRICES, NOON)
    meter.connect(True)
    meter.state = STOPPED
    midnight = NOON + DAY_NS // 2
    meter.advance(midnight - NS, DAY_NS // 2 - NS)
    meter.advance(midnight + 3 * NS, 4 * NS)
    old, new = meter.rows()
    assert (old.day, new.day) == (TODAY, day_of(midnight))
    assert old.day_connected_seconds == DAY_NS / 2 / NS
    assert new.day_connected_seconds == 3.0
    assert (old.at_ns, old.state, new.state) == (midnight - 1, STOPPED, STOPPED)
    meter.tell([old, new])
    assert [row.day for row in meter.rows()] == [new.day], "a day that was told is over"
    meter.advance(NOON, 0)
    assert meter.day == new.day, "a clock that is set back does not bring it back"


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("records"), st.integers(0, 1000), st.integers(0, 10 * MIB)),
        st.tuples(st.just("time"), st.integers(0, 12 * 60), st.booleans()),
        st.tuples(st.just("tell"), st.booleans(), st.just(0)),
    ),
    max_size=40,
)


@given(steps=STEPS)
def test_what_is_told_adds_up_to_the_days(steps: list[tuple[str, Any, Any]]) -> None:
    """Whatever comes when, and whether or not a telling reaches anybody."""
    meter, told, now = Meter("databento", PRICES, NOON), list[Usage](), NOON
    whole: dict[str, list[float]] = {}
    for kind, a, b in [*steps, ("tell", True, 0)]:
        if kind == "records":
            meter.receive(a, b)
            day = whole.setdefault(meter.day, [0, 0, 0.0])
            day[0], day[1] = day[0] + a, day[1] + b
        elif kind == "time":
            meter.connect(b)
            meter.advance(now + a * MINUTE, a * MINUTE)
            for minute in range(a * b):  # an independent account, a minute at a time
                whole.setdefault(day_of(now + minute * MINUTE), [0, 0, 0.0])[2] += 60
            now += a * MINUTE
        elif a:
            rows = meter.rows()
            told += rows
            meter.tell(rows)
    for day in {row.day for row in told}:
        rows = [row for row in told if row.day == day]
        events, nbytes, seconds = (sum(getattr(r, n) for r in rows) for n in ("events", "bytes", "connected_seconds"))
        assert [events, nbytes, pytest.approx(seconds)] == whole.get(day, [0, 0, 0.0])
        last = rows[-1]
        assert (last.day_events, last.day_bytes) == (events, nbytes)
        assert sum(r.cost_usd for r in rows) == pytest.approx(last.day_cost_usd)
        assert last.day_cost_usd == pytest.approx(nbytes / MIB * 0.5 + seconds / 3600 * 2.0)
        assert min(min(r.events, r.bytes, r.connected_seconds, r.cost_usd) for r in rows) >= 0
    assert len({row.at_ns for row in told}) <= len(told)
    assert [row.at_ns for row in told] == sorted(row.at_ns for row in told)


# -- on the bus ------------------------------------------------------------------------------


def meter_at(at_ns: int = NOON, feed: str = "databento") -> Meter:
    return Meter(feed, PRICES, at_ns)


def book(bus: Bus, meter: Meter, store: str = "", owner: str = "me") -> Book:
    made = Book(bus, meter, owner, PARTITIONS, store or "sqlite:////nowhere/at/all.db")
    made.attach()
    return made


def told(bus: Bus, feed: str = "databento") -> list[Usage]:
    frames = bus.read(partition_of(feed, PARTITIONS), "usage", "0-0", 1000)
    assert all((f.kind, f.count, f.source) == ("usage", 1, feed) for f in frames)
    out: list[Usage] = []
    for frame in frames:
        (message,) = decode(frame.body)
        assert type(message) is Usage
        assert (frame.first_ns, frame.last_ns) == (message.at_ns, message.at_ns)
        out.append(message)
    return out


def total(messages: list[Usage], day: str = TODAY) -> Totals:
    mine = [m for m in messages if m.day == day]
    return sum((Totals(m.events, m.bytes, m.connected_seconds, m.cost_usd) for m in mine), NOTHING)


def test_a_restart_goes_on_and_tells_the_rest(bus: Bus) -> None:
    one = book(bus, meter_at())
    one.meter.receive(10, MIB)
    assert one.publish()
    one.meter.receive(5, MIB)
    one.keep()  # and then it is killed
    again = book(bus, meter_at(NOON + 5 * NS), owner="next")
    assert again.meter.today == Totals(15, 2 * MIB, 0.0, 1.0)
    again.meter.receive(1, 0)
    assert again.publish()
    assert total(told(bus)) == again.meter.today
    bus.attach(partition_of("databento", PARTITIONS), "databento", "next")
    with pytest.raises(Fenced):
        one.publish()
    body = bus.call("hget", bus.keys.usage("databento"), TODAY)
    assert msgspec.json.decode(body, type=Usage).day_events == 16, "it reads as a plain message"
    assert row_of(body).events == 0


def test_a_day_that_ended_while_nobody_ran_is_told_to_its_end(bus: Bus) -> None:
    one = book(bus, meter_at())
    one.meter.receive(10, MIB)
    one.meter.state = STOPPED
    one.keep()
    later = book(bus, meter_at(NOON + 3 * DAY_NS))
    assert later.meter.today == NOTHING
    later.publish()
    first, second = told(bus)
    assert (first.day, first.events, first.state) == (TODAY, 10, STOPPED)
    assert (second.day, second.events, second.state) == (day_of(NOON + 3 * DAY_NS), 0, "running")


class Broken(Bus):
    """Redis does what it was asked for, and the answer is lost."""

    lost = 0

    def publish(self, *args: Any, **kwargs: Any) -> bool:
        done = super().publish(*args, **kwargs)
        if self.lost:
            self.lost -= 1
            raise BusUnavailable("the answer was lost")
        return done


def test_a_lost_answer_tells_nothing_twice(bus: Bus) -> None:
    broken = Broken(bus.url, bus.keys.namespace)
    one = book(broken, meter_at())
    one.meter.receive(10, MIB)
    broken.lost = 1
    with pytest.raises(BusUnavailable):
        one.publish()
    one.meter.receive(3, MIB)
    assert one.publish()
    assert [m.events for m in told(bus)] == [10, 3]
    broken.close()


def test_without_redis_it_waits_and_goes_out_in_one_piece(bus: Bus, redis_server: EmbeddedRedis) -> None:
    one = book(bus, meter_at())
    on_disk(bus.client)
    redis_server.kill()
    for _ in range(3):
        one.meter.receive(10, MIB)
        with pytest.raises(BusUnavailable):
            one.publish()
    redis_server.start()
    assert one.publish()
    assert [m.events for m in told(bus)] == [30]


def test_a_full_stream_is_waited_for(bus: Bus) -> None:
    small = Bus(bus.url, bus.keys.namespace, limits=Limits(stream_max_bytes=1))
    one = book(small, meter_at())
    assert one.publish()
    bus.register(partition_of("databento", PARTITIONS), "usage", "sink")
    one.meter.receive(1, 1)
    assert not one.publish()
    one.meter.receive(1, 1)
    bus.client.hset(bus.keys.info(partition_of("databento", PARTITIONS), "usage"), "bytes", 0)
    assert one.publish()
    assert total(told(bus)).events == 2
    small.close()


def test_a_wiped_redis_is_made_good_by_the_store(bus: Bus, store_url: str) -> None:
    """What the store holds was told; the rest of the day is told anew."""
    one = book(bus, meter_at(), store_url)
    one.meter.receive(10, MIB)
    one.publish()
    (message,) = told(bus)
    keep_daily(store_url, message)
    one.meter.receive(5, MIB)
    one.keep()
    bus.client.delete(*list(bus.client.scan_iter(f"{bus.keys.namespace}:*")))
    after = book(bus, meter_at(NOON + NS), store_url)
    assert after.meter.today == Totals(10, MIB, 0.0, 0.5), "what nobody but the lost Redis knew is gone"
    after.meter.receive(1, 0)
    after.publish()
    assert [m.events for m in told(bus)] == [1]


def test_a_process_that_outlives_a_wiped_redis_knows_more_than_the_store(bus: Bus, store_url: str) -> None:
    one = book(bus, meter_at(), store_url)
    for stored in (True, False):
        one.meter.receive(10, MIB)
        one.publish()
        if stored:
            keep_daily(store_url, told(bus)[-1])
    one.meter.receive(5, MIB)
    bus.client.delete(*list(bus.client.scan_iter(f"{bus.keys.namespace}:*")))
    assert not one.publish(), "its sequence is another"
    assert one.publish()
    assert [m.events for m in told(bus)] == [15], "what the store has not, and nothing else"
    assert row_of(bus.call("hget", bus.keys.usage("databento"), TODAY)).day_events == 25


def test_a_store_without_the_table_is_none(bus: Bus, tmp_path: Any) -> None:
    (tmp_path / "garbage.db").write_text("no database at all, certainly")
    for url in (f"sqlite:///{tmp_path / 'garbage.db'}", "postgresql://user:pw@nowhere/x"):
        assert book(bus, meter_at(), url).meter.today == NOTHING


def test_old_days_go(bus: Bus) -> None:
    for n in (0, 20, 39, 41, 60):
        one = book(bus, meter_at(NOON - n * DAY_NS))
        one.keep()
    days = {day.decode() for day in bus.call("hkeys", bus.keys.usage("databento"))}
    assert {day_of(NOON - 41 * DAY_NS), day_of(NOON - 60 * DAY_NS)} <= days
    book(bus, meter_at())
    days = {day.decode() for day in bus.call("hkeys", bus.keys.usage("databento"))}
    assert sorted(days) == [day_of(NOON - n * DAY_NS) for n in (39, 20, 0)]


def test_a_vendor_has_one_budget(bus: Bus, tmp_path: Any) -> None:
    for feed in ("databento", HISTORY, "tardis:deribit", "tardis:bybit"):
        one = book(bus, meter_at(feed=feed))
        one.meter.add(Totals(cost_usd=3.0))
        one.keep()
        if feed != HISTORY:
            bus.call("hset", bus.keys.feeds, feed, "{}")
    state = str(tmp_path)
    assert spent_by_others(bus, "databento", TODAY, state) == 3.0
    assert spent_by_others(bus, HISTORY, TODAY, state) == 3.0
    assert spent_by_others(bus, "tardis:deribit", TODAY, state) == 3.0
    assert spent_by_others(bus, "databento", day_of(NOON + DAY_NS), state) == 0.0
    (tmp_path / "databento").mkdir()
    (tmp_path / "databento" / "spent.json").write_bytes(msgspec.json.encode({TODAY: Totals(cost_usd=4.5)}))
    assert spent_by_others(bus, "databento", TODAY, state) == 4.5, "bought while no deployment ran"


def test_the_day_is_utc() -> None:
    assert day_of(0) == "1970-01-01"
    assert iso(usage.day_end(NOON)) == f"{day_of(NOON + DAY_NS)}T00:00:00.000000000Z"
