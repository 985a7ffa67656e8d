"""What is usual for an option: the samples of earlier windows by key and time of day, and by moneyness.

A window belongs to the first session that ends after the window's start; its time of day counts from that session's
open, so that a clock change moves nothing. The history of a window are the windows before it, of its own session
and of the configured number of sessions before that one. A window without trades is no sample.

A moneyness bucket is 0.02 wide and holds the samples of all keys of one underlying and option type in it, those of
expired options too: it is what an option without a past of its own is compared with.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.signals.score import Floats, Spread, quantile, spread
from shared.calendar import Sessions
from shared.frames import NS
from shared.messages import Pressure

Key = tuple[int, float, str]  # expiration_ns, strike, option_type
Bucket = tuple[str, int]  # option_type, which
Samples = NDArray[Any]  # of SAMPLE, in the order of their keys

SAMPLE = np.dtype(
    [
        ("expiration_ns", "<i8"),
        ("strike", "<f8"),
        ("log_ratio", "<f8"),
        ("volume", "<f8"),
        ("bucket", "<i2"),
        ("option_type", "u1"),  # ord("C"), ord("P")
    ]
)
NO_BUCKET = -(1 << 15)
BUCKET_WIDTH = 0.02
# An expiration may be stamped midnight of a day through which the option still trades.
EXPIRED_NS = 2 * 86_400 * NS
KEY_TIME, KEY, MONEYNESS, INSUFFICIENT = "key_time", "key", "moneyness", "insufficient"


def bucket_of(moneyness: float | None) -> int:
    """The bucket of a moneyness, NO_BUCKET without one."""
    return NO_BUCKET if moneyness is None else round(max(-600.0, min(moneyness, 600.0)) / BUCKET_WIDTH)


def key_of(row: Pressure) -> Key:
    return row.expiration_ns, row.strike, row.option_type


def volume_of(row: Pressure) -> float:
    """All that traded, known side or not."""
    return row.ask_volume + row.bid_volume + row.unknown_volume


def samples_of(rows: Iterable[Pressure]) -> Samples:
    """The samples of a window's rows, in the order of their keys."""
    made = [
        (r.expiration_ns, r.strike, r.log_ratio, volume_of(r), bucket_of(r.moneyness), ord(r.option_type))
        for r in sorted(rows, key=key_of)
    ]
    return np.array(made, SAMPLE)


class Past(NamedTuple):
    """Where a window stands: its start, its time of day in seconds, and the start of its history, all but that ns."""

    window_ns: int
    time_of_day: int
    since_ns: int


@dataclass(frozen=True, slots=True)
class Days:
    """The sessions of a market, and how many of them before a window's own make its history."""

    sessions: Sessions
    count: int

    def index(self, window_ns: int) -> int:
        """The session that a window belongs to."""
        return min(int(np.searchsorted(self.sessions[:, 1], window_ns, side="right")), len(self.sessions) - 1)

    def begin(self, index: int) -> int:
        """Where the windows of a session begin: at the end of the one before it, ns."""
        return int(self.sessions[index - 1, 1]) if index > 0 else 0

    def past(self, window_ns: int) -> Past:
        index = self.index(window_ns)
        day = (window_ns - int(self.sessions[index, 0])) // NS
        return Past(window_ns, int(day), self.begin(max(0, index - self.count)))

    def times_of_day(self, windows: NDArray[np.int64]) -> NDArray[np.int32]:
        """The time of day of many windows."""
        index = np.searchsorted(self.sessions[:, 1], windows, side="right").clip(max=len(self.sessions) - 1)
        times: NDArray[np.int32] = ((windows - self.sessions[index, 0]) // NS).astype(np.int32)
        return times


@dataclass
class Baseline:
    """Samples to compare with; `level` says whose. Of too few (`insufficient`) nothing is asked."""

    level: str
    size: int
    ratios: Floats
    volumes: Floats

    @cached_property
    def ratio_spread(self) -> Spread:
        return spread(self.ratios)

    @cached_property
    def volume_spread(self) -> Spread:
        return spread(self.volumes)

    @cached_property
    def volume_95(self) -> float:
        """The 95th percentile of the volumes (linear between samples)."""
        return quantile(self.volumes, 0.95)


@dataclass(slots=True)
class History:
    """Samples in the order of their windows; of a key one each window, of a bucket several."""

    windows: array[int] = field(default_factory=lambda: array("q"))
    times: array[int] = field(default_factory=lambda: array("i"))
    ratios: array[float] = field(default_factory=lambda: array("d"))
    volumes: array[float] = field(default_factory=lambda: array("d"))

    def _columns(self) -> tuple[array[Any], ...]:
        return self.windows, self.times, self.ratios, self.volumes

    def put(self, window_ns: int, time_of_day: int, ratios: list[float], volumes: list[float]) -> None:
        """The samples of a window, instead of those that it had."""
        low, high = bisect_left(self.windows, window_ns), bisect_right(self.windows, window_ns)
        n = len(ratios)
        values: tuple[list[Any], ...] = ([window_ns] * n, [time_of_day] * n, ratios, volumes)
        for column, new in zip(self._columns(), values, strict=True):
            column[low:high] = array(column.typecode, new)

    def extend(self, windows: NDArray[np.int64], times: NDArray[np.int32], samples: Samples) -> None:
        """Samples that are all later than those held."""
        values = (windows, times, samples["log_ratio"], samples["volume"])
        for column, new in zip(self._columns(), values, strict=True):
            column.frombytes(np.ascontiguousarray(new).tobytes())

    def at(self, window_ns: int) -> float | None:
        """The log ratio of a window, None where it has none."""
        i = bisect_left(self.windows, window_ns)
        return self.ratios[i] if i < len(self.windows) and self.windows[i] == window_ns else None

    def between(self, past: Past, same_time: bool) -> tuple[Floats, Floats]:
        """(log ratios, volumes) of a window's history, at its time of day or at any."""
        low, high = bisect_left(self.windows, past.since_ns), bisect_left(self.windows, past.window_ns)
        if low == high:
            return np.empty(0), np.empty(0)
        # The views end here: an array that is looked into cannot grow.
        ratios = np.frombuffer(self.ratios, np.float64)[low:high]
        volumes = np.frombuffer(self.volumes, np.float64)[low:high]
        if not same_time:
            return ratios.copy(), volumes.copy()
        chosen = np.frombuffer(self.times, np.int32)[low:high] == past.time_of_day
        return ratios[chosen], volumes[chosen]

    def count(self, past: Past) -> int:
        return bisect_left(self.windows, past.window_ns) - bisect_left(self.windows, past.since_ns)

    def forget(self, before_ns: int) -> None:
        low = bisect_left(self.windows, before_ns)
        for column in self._columns() if low else ():
            del column[:low]


class Book:
    """The history of one underlying's options."""

    def __init__(self) -> None:
        self.windows: list[int] = []  # that have samples
        self._keys: dict[Key, History] = {}
        self._buckets: dict[Bucket, History] = {}

    def put(self, window_ns: int, time_of_day: int, samples: Samples) -> None:
        """The samples of a window, instead of those that it had (a key once seen stays)."""
        if window_ns in self:
            for history in self._buckets.values():  # a key may have changed its bucket
                history.put(window_ns, time_of_day, [], [])
        else:
            insort(self.windows, window_ns)
        buckets: dict[Bucket, tuple[list[float], list[float]]] = {}
        for expiration_ns, strike, ratio, volume, bucket, kind in samples.tolist():
            key = (expiration_ns, strike, chr(kind))
            self._keys.setdefault(key, History()).put(window_ns, time_of_day, [ratio], [volume])
            if bucket != NO_BUCKET:
                ratios, volumes = buckets.setdefault((chr(kind), bucket), ([], []))
                ratios.append(ratio)
                volumes.append(volume)
        for where, (ratios, volumes) in buckets.items():
            self._buckets.setdefault(where, History()).put(window_ns, time_of_day, ratios, volumes)

    def load(self, windows: Mapping[int, Samples], days: Days) -> None:
        """The same for many windows of an empty book."""
        self.windows = sorted(windows)
        if not self.windows:
            return
        table = np.concatenate([windows[w] for w in self.windows])
        starts = np.repeat(np.array(self.windows, np.int64), [len(windows[w]) for w in self.windows])
        times = days.times_of_day(starts)
        for index in _groups(table, ("expiration_ns", "strike", "option_type")):
            first = table[index[0]]
            key = (int(first["expiration_ns"]), float(first["strike"]), chr(first["option_type"]))
            self._keys.setdefault(key, History()).extend(starts[index], times[index], table[index])
        for index in _groups(table, ("option_type", "bucket")):
            first = table[index[0]]
            if first["bucket"] != NO_BUCKET:
                where = (chr(first["option_type"]), int(first["bucket"]))
                self._buckets.setdefault(where, History()).extend(starts[index], times[index], table[index])

    def last(self, key: Key, past: Past, windows: Iterable[int]) -> list[float | None]:
        """Log ratios of a key in the given windows."""
        history = self._history(key, past)
        return [history.at(w) if history is not None else None for w in windows]

    def baseline(self, key: Key, bucket: int, past: Past, min_samples: int, pools: dict[Bucket, Baseline]) -> Baseline:
        """The nearest history with samples enough; `pools` keeps what the keys of a bucket share within one window."""
        history = self._history(key, past)
        size = history.count(past) if history is not None else 0
        if history is not None and size >= min_samples:
            ratios, volumes = history.between(past, same_time=True)
            if len(ratios) >= min_samples:
                return Baseline(KEY_TIME, len(ratios), ratios, volumes)
            return Baseline(KEY, size, *history.between(past, same_time=False))
        where = (key[2], bucket)
        if bucket != NO_BUCKET and where in self._buckets:
            if where not in pools:
                ratios, volumes = self._buckets[where].between(past, same_time=False)
                pools[where] = Baseline(MONEYNESS, len(ratios), ratios, volumes)
            if pools[where].size >= min_samples:
                return pools[where]
            size = max(size, pools[where].size)
        return Baseline(INSUFFICIENT, size, np.empty(0), np.empty(0))

    def forget(self, before_ns: int, now_ns: int) -> list[int]:
        """Drop the samples before an instant, and the keys expired by `now_ns`; returns the windows dropped.

        Nothing that a window from `now_ns` on asks for: when this is called makes no difference.
        """
        old = self.windows[: bisect_left(self.windows, before_ns)]
        del self.windows[: len(old)]
        for history in (*self._keys.values(), *self._buckets.values()):
            history.forget(before_ns)
        self._keys = {k: h for k, h in self._keys.items() if h.windows and not expired(k, now_ns)}
        self._buckets = {k: h for k, h in self._buckets.items() if h.windows}
        return old

    def __contains__(self, window_ns: int) -> bool:
        at = bisect_left(self.windows, window_ns)
        return at < len(self.windows) and self.windows[at] == window_ns

    def __len__(self) -> int:
        """Samples held of keys."""
        return sum(len(history.windows) for history in self._keys.values())

    def _history(self, key: Key, past: Past) -> History | None:
        # Whether it was dropped already must not show: what has expired has no history.
        return None if expired(key, past.window_ns) else self._keys.get(key)


def expired(key: Key, at_ns: int) -> bool:
    """Whether an option can trade no more."""
    return key[0] + EXPIRED_NS <= at_ns


def _groups(table: Samples, names: tuple[str, ...]) -> list[NDArray[np.int64]]:
    """Indices of the rows that are equal in these columns, each group in the table's order."""
    order = np.lexsort([table[name] for name in reversed(names)])
    changed = np.zeros(len(table), bool)
    for name in names:
        column = table[name][order]
        changed[1:] |= column[1:] != column[:-1]
    return np.split(order, np.flatnonzero(changed))
