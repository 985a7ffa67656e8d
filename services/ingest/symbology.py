"""Which instrument a native id stands for on a day.

Ids are reused across days, so the table is looked up by UTC date. A definition says more than a
name: where one is known it describes the instrument, from the day that it is of until the day of the
next one that says something else; days before the first one have that.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from datetime import date
from itertools import pairwise
from typing import Any

from services.ingest.definitions import from_definition, from_symbol
from shared.frames import NS
from shared.instrument_days import same
from shared.messages import Instrument

DAY = 86_400 * NS
FOREVER = 1 << 30
_EPOCH = date(1970, 1, 1)

# (first day, day after the last, native id, symbol); days since 1970
Interval = tuple[int, int, int, str]


class Symbology:
    """The mappings of all files of a dataset. `option_roots`: see `services.ingest.definitions`."""

    def __init__(self, venue: str, feed: str, option_roots: Mapping[str, str] | None = None) -> None:
        self.venue, self.feed = venue, feed
        self._option_roots = option_roots
        self._mapped: set[Interval] = set()
        self._defined: dict[str, dict[int, Instrument]] = {}
        self._versions: dict[str, list[tuple[int, Instrument]]] = {}
        self._by_id: dict[int, dict[int, str]] = {}
        self._intervals: list[Interval] = []
        self._known: dict[Interval, Instrument] = {}

    def add_metadata(self, metadata: Any) -> None:
        """The mappings of a file's header, whichever way round they are."""
        ids_first = str(metadata.stype_in) == "instrument_id"
        for name, intervals in metadata.mappings.items():
            for interval in intervals:
                native, symbol = (name, interval["symbol"]) if ids_first else (interval["symbol"], name)
                if symbol and native.isdigit():
                    days = (interval["start_date"] - _EPOCH).days, (interval["end_date"] - _EPOCH).days
                    self._mapped.add((*days, int(native), symbol))

    def add_definitions(self, records: Iterable[Any]) -> None:
        """Definition records; the newest of a day wins, whichever file it is in."""
        for record in records:
            day = int(record.ts_recv) // DAY
            instrument = from_definition(record, self.venue, self.feed, self._option_roots)
            days = self._defined.setdefault(instrument.symbol, {})
            held = days.get(day)
            if held is None or (held.defined_ns or 0) <= (instrument.defined_ns or 0):
                days[day] = instrument
            self._by_id.setdefault(record.instrument_id, {})[day] = instrument.symbol

    def close(self) -> None:
        """Everything was added."""
        self._versions = {symbol: _differing(days) for symbol, days in self._defined.items()}
        intervals = set(self._mapped)
        mapped = {interval[2] for interval in self._mapped}
        for native, days in self._by_id.items():
            if native not in mapped:
                starts = sorted(days)
                intervals.update(
                    (start, end, native, days[start]) for start, end in zip(starts, [*starts[1:], FOREVER], strict=True)
                )
        self._intervals = sorted(piece for interval in intervals for piece in self._pieces(interval))

    def _pieces(self, interval: Interval) -> list[Interval]:
        """An interval, cut at the days on which its instrument is defined anew."""
        start, end, native, symbol = interval
        inside = [day for day, _ in self._versions.get(symbol, ())[1:] if start < day < end]
        return [(a, b, native, symbol) for a, b in pairwise((start, *inside, end))]

    def begun(self, after: int, until: int) -> list[tuple[int, Instrument]]:
        """(native id, instrument) of mappings and new definitions that began on a day in (after, until]."""
        low = bisect_right(self._intervals, after, key=lambda i: i[0])
        high = bisect_right(self._intervals, until, key=lambda i: i[0])
        return [(i[2], self._instrument(i)) for i in self._intervals[low:high]]

    def on(self, day: int) -> list[tuple[int, Instrument]]:
        """(native id, instrument) in force on a day."""
        high = bisect_right(self._intervals, day, key=lambda i: i[0])
        return [(i[2], self._instrument(i)) for i in self._intervals[:high] if i[1] > day]

    def _instrument(self, interval: Interval) -> Instrument:
        found = self._known.get(interval)
        if found is None:
            day, _, _, symbol = interval
            versions = self._versions.get(symbol)
            if versions:
                found = versions[max(0, bisect_right(versions, day, key=lambda v: v[0]) - 1)][1]
            else:
                found = from_symbol(self.venue, symbol, self.feed, day * DAY, self._option_roots)
            self._known[interval] = found
        return found


def _differing(days: Mapping[int, Instrument]) -> list[tuple[int, Instrument]]:
    """The versions of a symbol by day, without those that say nothing new."""
    versions: list[tuple[int, Instrument]] = []
    for day in sorted(days):
        if not versions or not same(versions[-1][1], days[day]):
            versions.append((day, days[day]))
    return versions
