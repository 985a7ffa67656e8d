"""What can be subscribed to: each channel's topic on the bus, its table, and which of their rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from services.web.problems import bad
from shared.api_rows import Told, candles_of_frame, messages_of_frame
from shared.errors import ConfigError
from shared.frames import Frame
from shared.live import CHANNELS
from shared.reader_bars import Series, series_of
from shared.tables import TABLES

PIPELINE = "pipeline"
_TOPICS = {"candles": "candles", "pressure": "pressure", "rollups": "pressure", "signals": "signals", "gaps": "candles"}
_TABLES = {"pressure": "pressure_metrics", "rollups": "pressure_rollups", "signals": "signals", "gaps": "gaps"}
_MAX_NAME = 200
# Kinds of frames on a topic that have no row of any channel are passed over.
_NO_ROWS = frozenset({"late_trade", "unreadable", "trade", "tick"})


def topic_of(channel: str) -> str:
    """The topic that a channel's rows come on; empty for the pipeline's."""
    return _TOPICS.get(channel, "")


class Subject(NamedTuple):
    """Whose rows: of `series` on `candles`; of an underlying, or of all (empty), on the other channels."""

    channel: str
    series: Series | None = None
    underlying: str = ""

    @property
    def topic(self) -> str:
        return _TOPICS[self.channel]

    @property
    def table(self) -> str:
        return self.series.table.name if self.series else _TABLES[self.channel]

    @property
    def where(self) -> Mapping[str, str]:
        """The columns that say whose, in the store."""
        if self.series:
            return self.series.where
        return {"underlying": self.underlying} if self.underlying else {}


def subject_of(channel: str, symbol: str, timeframe: str) -> Subject:
    """Raises Problem (400) for what there is not, ConfigError for a symbol or timeframe that is none."""
    if channel not in CHANNELS:
        raise bad(f"'{channel[:_MAX_NAME]}' is no channel; there are: {', '.join(CHANNELS)}")
    if len(symbol) > _MAX_NAME or len(timeframe) > _MAX_NAME:
        raise bad(f"a symbol or timeframe has at most {_MAX_NAME} characters")
    if channel == "candles":
        try:
            return Subject(channel, series_of(symbol, timeframe))
        except ConfigError as error:
            raise bad(str(error)) from None
    if timeframe:
        raise bad(f"only candles have a timeframe; leave it out for {channel}")
    return Subject(channel, None, symbol if channel in ("pressure", "rollups", "signals") else "")


class Followed:
    """Who follows what of a topic, found by what a frame says of itself."""

    def __init__(self) -> None:
        self._count: dict[Subject, int] = {}
        # Kind of a frame of candles -> ticker or symbol -> its series.
        self._series: dict[str, dict[str, set[Series]]] = {}

    def add(self, subject: Subject) -> None:
        self._count[subject] = self._count.get(subject, 0) + 1
        if subject.series:
            by = self._series.setdefault(subject.series.kind, {})
            by.setdefault(_head(subject.series), set()).add(subject.series)

    def remove(self, subject: Subject) -> None:
        self._count[subject] -= 1
        if self._count[subject]:
            return
        del self._count[subject]
        if subject.series:
            by = self._series[subject.series.kind]
            by[_head(subject.series)].discard(subject.series)
            if not by[_head(subject.series)]:
                del by[_head(subject.series)]

    def rows_of(self, frame: Frame) -> dict[Subject, Told]:
        """The frame's rows of what is followed; nothing is decoded for a frame that nobody follows."""
        if frame.kind in TABLES:
            wanted = self._series.get(frame.kind)
            found = candles_of_frame(frame, wanted) if wanted else {}
            return {Subject("candles", series): told for series, told in found.items()}
        if frame.kind in _NO_ROWS or not any(subject.series is None for subject in self._count):
            return {}
        tables = messages_of_frame(frame)
        return {
            subject: told
            for subject in self._count
            if subject.series is None and (told := tables.get(subject.table, {}).get(subject.underlying))
        }


def rows_of(frame: Frame, subject: Subject) -> Told | None:
    """The frame's rows of one subject."""
    alone = Followed()
    alone.add(subject)
    return alone.rows_of(frame).get(subject)


def _head(series: Series) -> str:
    return series.name if series.of_ticker else series.symbol
