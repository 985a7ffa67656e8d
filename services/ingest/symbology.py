"""Which instrument a native id stands for on a day.

Ids are reused across days, so the table is looked up by UTC date. A definition says more than a
name: where one is known it describes the instrument.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from datetime import date
from typing import Any

from services.ingest.definitions import from_definition, from_symbol
from shared.frames import NS
from shared.messages import Instrument

DAY = 86_400 * NS
FOREVER = 1 << 30
_EPOCH = date(1970, 1, 1)

# (first day, day after the last, native id, symbol); days since 1970
Interval = tuple[int, int, int, str]


class Symbology:
    """The mappings of all files of a dataset."""

    def __init__(self, venue: str, feed: str) -> None:
        self.venue, self.feed = venue, feed
        self._mapped: set[Interval] = set()
        self._defined: dict[str, list[tuple[int, Instrument]]] = {}
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
        """Definition records; the newest of a day wins."""
        for record in records:
            day = int(record.ts_recv) // DAY
            instrument = from_definition(record, self.venue, self.feed)
            versions = self._defined.setdefault(instrument.symbol, [])
            if not versions or versions[-1][1] != instrument:
                versions.append((day, instrument))
            self._by_id.setdefault(record.instrument_id, {})[day] = instrument.symbol

    def close(self) -> None:
        """Everything was added."""
        for versions in self._defined.values():
            versions.sort(key=lambda v: v[0])
        intervals = set(self._mapped)
        mapped = {interval[2] for interval in self._mapped}
        for native, days in self._by_id.items():
            if native not in mapped:
                starts = sorted(days)
                intervals.update(
                    (start, end, native, days[start]) for start, end in zip(starts, [*starts[1:], FOREVER], strict=True)
                )
        self._intervals = sorted(intervals)

    def begun(self, after: int, until: int) -> list[tuple[int, Instrument]]:
        """(native id, instrument) of intervals that began on a day in (after, until]."""
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
            versions = self._defined.get(symbol)
            if versions:
                found = versions[max(0, bisect_right(versions, day, key=lambda v: v[0]) - 1)][1]
            else:
                found = from_symbol(self.venue, symbol, self.feed, day * DAY)
            self._known[interval] = found
        return found
