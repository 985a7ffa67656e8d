"""Which samples a window is compared with: sessions, times of day, fallbacks; a loaded book is a grown one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from services.signals.baseline import (
    NO_BUCKET,
    Book,
    Days,
    Key,
    Samples,
    bucket_of,
    key_of,
    samples_of,
)
from services.signals.score import Spread
from shared.calendar import ALWAYS, EQUITY_INDEX, sessions
from shared.frames import NS, ns_of
from shared.messages import Pressure
from tests.services.signals.tape import DAY, EXPIRY, START, WINDOW, row

DAYS = Days(sessions(ALWAYS), 20)
KEY: Key = (EXPIRY, 6000.0, "C")


def book_of(*rows: Pressure, days: Days = DAYS) -> Book:
    """A book that grew window by window."""
    windows: dict[int, list[Pressure]] = {}
    for r in rows:
        windows.setdefault(r.time_window_ns, []).append(r)
    book = Book()
    for at in sorted(windows):
        book.put(at, days.past(at).time_of_day, samples_of(windows[at]))
    return book


def level(book: Book, key: Key = KEY, moneyness: float | None = None, at: int = START) -> tuple[str, int]:
    found = book.baseline(key, bucket_of(moneyness), DAYS.past(at), 20, {})
    return found.level, found.size


def back(days: int, *, ask: float = 10, place: int = 0, strike: float = 6000.0, kind: str = "C",
         moneyness: float | None = None) -> list[Pressure]:  # fmt: skip
    """A row on each of the days before START, `place` windows after its time of day."""
    return [
        row(ask, 10, START - n * DAY + place * WINDOW, strike, kind, moneyness=moneyness) for n in range(days, 0, -1)
    ]


def test_key_and_time_of_day_come_first() -> None:
    book = book_of(*back(20), *back(20, ask=99, place=1))
    assert level(book) == ("key_time", 20)
    assert book.baseline(KEY, NO_BUCKET, DAYS.past(START), 20, {}).ratios.tolist() == [0.0] * 20


def test_then_the_key_at_any_time_of_day() -> None:
    assert level(book_of(*back(19), *back(5, place=1))) == ("key", 24)


def test_then_the_moneyness_of_all_strikes_of_the_type() -> None:
    others = [*back(10, strike=6005, moneyness=1.0), *back(10, strike=6010, moneyness=1.009)]
    assert level(book_of(*others), moneyness=1.005) == ("moneyness", 20)
    assert level(book_of(*others), moneyness=1.02) == ("insufficient", 0)
    assert level(book_of(*others), moneyness=None) == ("insufficient", 0), "no price, no bucket"
    puts = [*back(10, strike=6005, kind="P", moneyness=1.0), *back(10, strike=6010, kind="P", moneyness=1.0)]
    assert level(book_of(*puts), moneyness=1.0) == ("insufficient", 0)
    assert level(book_of(*others[:-1], *back(5)), moneyness=1.0) == ("insufficient", 19), "the most that there were"


def test_only_windows_before_and_only_of_the_last_sessions() -> None:
    now = row(10, 10, moneyness=1.0)
    beside = row(10, 10, strike=6005.0, moneyness=1.0)
    assert level(book_of(*back(19), now, beside), moneyness=1.0) == ("insufficient", 19), "not the window itself"
    assert level(book_of(*back(19), row(10, 10, START - WINDOW))) == ("key", 20), "but those before it today"
    assert level(book_of(*back(21)[:20])) == ("insufficient", 19), "not the 21st session back"


def test_sessions_without_trades_count_too() -> None:
    assert level(book_of(*back(40)[::2], *back(40, place=1)[::2])) == ("key", 20)


def test_what_the_samples_say() -> None:
    rows = [row(ask, 10, START - n * DAY) for n, ask in enumerate(range(29, 9, -1), 1)]
    found = book_of(*reversed(rows)).baseline(KEY, NO_BUCKET, DAYS.past(START), 20, {})
    assert found.volume_spread == Spread(29.5, pytest.approx(1.4826 * 5))
    assert found.volume_95 == pytest.approx(20 + 18.05)


@pytest.mark.parametrize(
    ("moneyness", "bucket"), [(1.0, 50), (1.009, 50), (0.991, 50), (1.011, 51), (None, NO_BUCKET), (1e9, 30_000)]
)
def test_buckets_are_two_hundredths_wide(moneyness: float | None, bucket: int) -> None:
    assert bucket_of(moneyness) == bucket


def test_a_revised_window_may_change_its_bucket() -> None:
    book = book_of(*back(20, strike=6005, moneyness=1.0), row(10, 10, moneyness=1.0))
    later = START + WINDOW
    assert level(book, (EXPIRY, 7.0, "C"), 1.0, later) == ("moneyness", 21)
    book.put(START, DAYS.past(START).time_of_day, samples_of([row(10, 10, moneyness=1.1)]))
    assert level(book, (EXPIRY, 7.0, "C"), 1.0, later) == ("moneyness", 20)


def test_sessions_and_times_of_day_of_a_market_that_closes() -> None:
    days = Days(sessions(EQUITY_INDEX), 1)
    friday, monday = ns_of("2025-03-07T14:30:00Z"), ns_of("2025-03-10T13:30:00Z")
    hours = int(15.5 * 3600)
    assert days.past(friday).time_of_day == days.past(monday).time_of_day == hours, "from the open, 17:00 in Chicago"
    assert days.index(monday) == days.index(friday) + 1
    assert days.past(monday).since_ns == ns_of("2025-03-06T22:00:00Z"), "where Thursday's session ended"
    between = ns_of("2025-03-08T12:00:00Z")
    assert days.index(between) == days.index(monday), "what lies between belongs to the next"
    both = days.times_of_day(np.array([friday, monday, between]))
    assert both.tolist() == [hours, hours, (between - ns_of("2025-03-09T22:00:00Z")) // NS]


def test_a_loaded_book_is_a_grown_one() -> None:
    draw = np.random.default_rng(1)
    rows = [
        row(int(draw.integers(0, 50)), int(draw.integers(1, 50)), START - n * 7 * WINDOW, 6000.0 + 5 * k, kind,
            moneyness=None if k == 2 else 1 + k / 50)
        for n in range(300) for k in range(4) for kind in "CP" if draw.random() < 0.7
    ]  # fmt: skip
    grown = book_of(*rows)
    windows: dict[int, list[Pressure]] = {}
    for r in rows:
        windows.setdefault(r.time_window_ns, []).append(r)
    packed: dict[int, Samples] = {at: samples_of(some) for at, some in windows.items()}
    loaded = Book()
    loaded.load(packed, DAYS)
    same(grown, loaded, {key_of(r) for r in rows})
    for book in (grown, loaded):
        book.forget(START - 2 * DAY, START)
    same(grown, loaded, {key_of(r) for r in rows})
    assert grown.windows
    assert grown.windows[0] >= START - 2 * DAY


def same(a: Book, b: Book, keys: set[Key]) -> None:
    assert a.windows == b.windows
    assert len(a) == len(b)
    past = DAYS.past(START + WINDOW)
    for key in sorted(keys):
        for bucket in (NO_BUCKET, 50, 51):
            one, other = (book.baseline(key, bucket, past, 3, {}) for book in (a, b))
            assert (one.level, one.size) == (other.level, other.size)
            assert one.ratios.tolist() == other.ratios.tolist()
            assert one.volumes.tolist() == other.volumes.tolist()
    history: Callable[[Book], list[list[float | None]]] = lambda book: [  # noqa: E731
        book.last(key, past, (START, START - 7 * WINDOW)) for key in sorted(keys)
    ]
    assert history(a) == history(b)
