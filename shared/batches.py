"""What a sink writes at once: frames of the bus decoded into the rows of the tables.

Nothing vanishes here: a frame or a row that cannot be understood becomes a dead letter.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.frames import CANDLE, CLOCK, FIXED, LATE, PACKED, TICK_FRAMES, UNREADABLE, Frame, Rows, reason_of
from shared.message_check import check
from shared.messages import AnyMessage, Gap, Instrument
from shared.tables import MESSAGE_TABLES, TABLES, Table
from shared.timeframes import LONGEST_SEC

DEAD_BYTES = 48 << 10
DEAD_NAMES = 1000
BACKFILL = "backfill-"  # what a backfill writes under instead of a bus's identity begins so
_NEVER, _LATEST = np.iinfo(np.int64).min, np.iinfo(np.int64).max


class Source(NamedTuple):
    """Where on the bus something came from; `bus` is the bus's identity.

    On `ticks` and `usage`, where several producers count each for itself, `seq` orders nothing: `id` does.
    """

    bus: str
    topic: str
    partition: int
    seq: int
    id: str


class Cursor(NamedTuple):
    """How far a store has got in one stream: the stage's output sequence and the entry's id."""

    seq: int
    stream_id: str


class Rewind(NamedTuple):
    """What a store forgets of a stream whose tail Redis has lost.

    Of a stage's topic all from `source.seq` on, of one with several producers all behind the entry `after`.
    """

    source: Source
    after: str


CursorKey = tuple[str, str, int]  # bus identity, topic, partition


@dataclass(slots=True)
class Item:
    """One stream entry on its way into a store.

    `frame` is None for an entry that is no frame (`problem` says why, `raw` is its body). `rewound`:
    the first entry read again after the bus lost its tail; the store forgets what it has of this
    stream from here on, for that may be of the lost tail (on `ticks` and `usage`: what it has behind the
    entry `after`). `epoch` is the reader's. `instruments`: those of the partition, for tick rows.
    """

    source: Source
    frame: Frame | None
    raw: bytes = b""
    problem: str = ""
    rewound: bool = False
    epoch: int = 0
    after: str = "0-0"
    instruments: Mapping[int, Instrument] = field(default_factory=dict)

    @property
    def weight(self) -> int:
        """About its rows, by its bytes (the count that it claims may be garbage)."""
        if self.frame is None:
            return 1 + len(self.raw) // CANDLE.itemsize
        return 1 + len(self.frame.body) // PACKED.get(self.frame.kind, CANDLE).itemsize


@dataclass(slots=True)
class DeadLetter:
    """What a store could not take. `row` is its number in the frame, -1 for a whole frame; `body` is JSON."""

    source: Source
    table: str
    row: int
    reason: str
    body: str


@dataclass(slots=True)
class Chunk:
    """Rows of one frame with its names; tick rows with the instruments that they may be of."""

    source: Source
    rows: Rows
    names: list[tuple[str, str]]
    instruments: Mapping[int, Instrument] = field(default_factory=dict)


class MessageRow(NamedTuple):
    """A message that is a row, and its number in its frame."""

    source: Source
    row: int
    message: AnyMessage


@dataclass(slots=True)
class Batch:
    """What one transaction writes, in bus order per stream, and the cursors behind it.

    `candles` by frame kind, `messages` by table. `mend`: the rows were computed again over complete
    history. Such a row replaces a stored one that is no more complete, under a higher revision, if it
    differs in more than the times of processing; what it lacks of HISTORY_COLUMNS stays as stored.
    """

    candles: dict[str, list[Chunk]] = field(default_factory=dict)
    late: list[Chunk] = field(default_factory=list)
    ticks: list[Chunk] = field(default_factory=list)
    messages: dict[str, list[MessageRow]] = field(default_factory=dict)
    gaps: list[Gap] = field(default_factory=list)
    dead: list[DeadLetter] = field(default_factory=list)
    rewinds: list[Rewind] = field(default_factory=list)
    cursors: dict[CursorKey, Cursor] = field(default_factory=dict)
    rows: int = 0
    ignored: int = 0
    mend: bool = False


def batch_of(items: Sequence[Item], *, mend: bool = False) -> Batch:
    """Decode items into a batch."""
    batch = Batch(mend=mend)
    for item in items:
        source = item.source
        if item.rewound:
            batch.rewinds.append(Rewind(source, item.after))
        if item.frame is None:
            batch.dead.append(_dead_frame(item, item.problem))
        else:
            problem = _decode(item, item.frame, batch)
            if problem:
                batch.dead.append(_dead_frame(item, problem))
        batch.cursors[source.bus, source.topic, source.partition] = Cursor(source.seq, source.id)
    return batch


def _decode(item: Item, frame: Frame, batch: Batch) -> str:
    """Add the frame to the batch, or say what is wrong with it."""
    source, raw = item.source, item.source.topic == "ticks"
    if frame.kind == UNREADABLE:
        return reason_of(frame)
    if frame.kind not in PACKED:
        return _messages(source, frame, batch)
    dtype = PACKED[frame.kind]
    if raw and frame.kind in TICK_FRAMES:
        if len(frame.body) % dtype.itemsize:
            return f"{len(frame.body)} bytes are no rows of kind '{frame.kind}'"
        rows = frame.rows()
        batch.ticks.append(Chunk(source, rows, [], item.instruments))
        batch.rows += int(np.count_nonzero((rows["kind"] != CLOCK) & (rows["part"] == 0)))
        return ""
    if len(frame.body) != frame.count * dtype.itemsize:
        return f"{len(frame.body)} bytes are not {frame.count} rows of kind '{frame.kind}'"
    if raw:
        return f"no table takes rows of kind '{frame.kind}' from 'ticks'"
    if frame.kind in TABLES:
        chunks = batch.candles.setdefault(frame.kind, [])
    elif frame.kind == "late_trade":
        chunks = batch.late
    else:
        return f"no table takes rows of kind '{frame.kind}'"
    if frame.count:
        chunks.append(Chunk(source, frame.rows(), frame.names))
        batch.rows += frame.count
    return ""


def _messages(source: Source, frame: Frame, batch: Batch) -> str:
    """Add a JSON frame to the batch, or say what is wrong with all of it."""
    try:
        sound, unsound = check(frame.kind, frame.body)
    except (ValueError, RecursionError) as error:
        return f"a frame of kind '{frame.kind}' that is not JSON of messages ({error})"
    gaps = [m for _, m in sound if isinstance(m, Gap)]
    if not all(_NEVER < g.start_ns <= g.end_ns <= _LATEST for g in gaps):
        return "a gap whose times cannot be"
    batch.gaps += gaps
    batch.rows += len(gaps)
    for row, message in sound:
        tables = MESSAGE_TABLES.get(str(message.__struct_config__.tag), ())
        for table in tables:
            batch.messages.setdefault(table.name, []).append(MessageRow(source, row, message))
        batch.rows += len(tables)
        # What ingest says beside its records (instruments, clocks) is no row of any table.
        batch.ignored += not (tables or isinstance(message, Gap) or source.topic == "ticks")
    batch.dead += [dead_row(source, bad.table, bad.row, bad.reason, bad.values.items()) for bad in unsound]
    return ""


def _dead_frame(item: Item, reason: str) -> DeadLetter:
    frame, raw = item.frame, item.frame.body if item.frame else item.raw
    body: dict[str, Any] = {
        "kind": frame.kind if frame else None,
        "bytes": len(raw),
        "body_base64": base64.b64encode(raw[:DEAD_BYTES]).decode(),
    }
    if frame is not None and 0 < len(frame.names) <= DEAD_NAMES:  # packed rows mean nothing without them
        body |= {"count": frame.count, "names": frame.names}
    return DeadLetter(item.source, item.source.topic, -1, reason, json.dumps(body))


def dead_row(source: Source, table: str, row: int, reason: str, named: Iterable[tuple[str, Any]]) -> DeadLetter:
    """A row that a store refused, with its values by column (NaN as null)."""
    try:
        body = json.dumps({name: _plain(value) for name, value in named})
    except RecursionError:
        body = json.dumps({"values": "nested too deeply to be told"})
    return DeadLetter(source, table, row, reason, body)


def _plain(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    if isinstance(value, dict):
        return {str(name): _plain(v) for name, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, datetime):  # of a store that has a type for them; all are in UTC
        return f"{value:%Y-%m-%dT%H:%M:%S.%f}Z"
    return value if isinstance(value, (int, float, str, type(None))) else repr(value)


@dataclass(slots=True)
class Joined:
    """Chunks as one array, in arrival order.

    `name` indexes `names` (the rows' own numbers are their frame's). Row i is row `row[i]` of chunk
    `chunk[i]`.
    """

    rows: Rows
    name: NDArray[np.int64]
    names: list[tuple[str, str]]
    chunk: NDArray[np.int64]
    row: NDArray[np.int64]
    dead: list[DeadLetter]


def join(chunks: Sequence[Chunk], table: str) -> Joined:
    """One array with one list of names; rows with an impossible name, time or side become dead letters."""
    known: dict[tuple[str, str], int] = {}
    dead: list[DeadLetter] = []
    named: list[NDArray[np.int64]] = []
    for chunk in chunks:
        numbers = np.asarray([known.setdefault(name, len(known)) for name in chunk.names] or [-1], np.int64)
        own = chunk.rows["name"]
        inside = (own >= 0) & (own < len(chunk.names))
        named.append(np.where(inside, numbers[np.where(inside, own, 0)], -1))
    lengths = [len(chunk.rows) for chunk in chunks]
    joined = Joined(
        rows=np.concatenate([chunk.rows for chunk in chunks]),
        name=np.concatenate(named),
        names=list(known),
        chunk=np.repeat(np.arange(len(chunks)), lengths),
        row=np.concatenate([np.arange(length) for length in lengths]),
        dead=dead,
    )
    fine = (joined.name >= 0) & _possible(joined.rows)
    if not fine.all():
        for i in np.flatnonzero(~fine).tolist():
            values = zip(joined.rows.dtype.names or (), joined.rows[i].tolist(), strict=True)
            source = chunks[int(joined.chunk[i])].source
            dead.append(dead_row(source, table, int(joined.row[i]), "a name, time or side that cannot be", values))
        for part in ("rows", "name", "chunk", "row"):
            setattr(joined, part, getattr(joined, part)[fine])
    return joined


def _possible(rows: Rows) -> NDArray[np.bool_]:
    fine: NDArray[np.bool_]
    if rows.dtype == LATE:
        tick = rows["tick"]
        fine = (tick["ts_event_ns"] != _NEVER) & (np.abs(tick["side"].astype(np.int64)) <= 1)
    else:
        fine = (rows["time_ns"] != _NEVER) & (rows["timestamp_out_ns"] != _NEVER)
        if rows.dtype == FIXED:
            fine &= (rows["timeframe_sec"] > 0) & (rows["timeframe_sec"] <= LONGEST_SEC)
    return fine


def newest(joined: Joined, table: Table) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
    """(order, last, group): rows sorted by key, then revision, then arrival.

    `last` marks, in that order, the row of each key that wins: the highest revision, of these the
    last that came. `group` numbers the keys in that order.
    """
    which = [table.names.index(column) for column in table.key if column in table.names]
    ids: dict[tuple[str, ...], int] = {}
    numbers = [ids.setdefault(tuple(name[i] for i in which), len(ids)) for name in joined.names] or [0]
    parts = [np.asarray(numbers, np.int64)[joined.name], joined.rows["time_ns"]]
    if "timeframe" in table.key:
        parts.append(joined.rows["timeframe_sec"])
    order: NDArray[np.int64] = np.lexsort((joined.rows["revision"], *reversed(parts)))
    ordered = [part[order] for part in parts]
    differs: NDArray[np.bool_] = np.any([part[1:] != part[:-1] for part in ordered], axis=0)
    last = np.append(differs, True) if len(order) else np.zeros(0, np.bool_)
    group: NDArray[np.int64] = np.concatenate((np.zeros(min(1, len(order)), np.int64), np.cumsum(differs)))
    return order, last, group


def iso_texts(times_ns: NDArray[np.int64], unit: str) -> list[str]:
    """ISO texts of fixed width: unit `s` 2023-12-25T23:01:00Z, `us` six decimals, `ns` nine.

    Each different time is written once: a batch has few.
    """
    different, index = np.unique(times_ns, return_inverse=True)
    texts = np.datetime_as_string(different.astype("M8[ns]").astype(f"M8[{unit}]"), timezone="UTC").astype(object)
    out: list[str] = texts[index].tolist()
    return out
