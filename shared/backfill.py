"""Backfill: tapes straight through the kernel into a store, in this process, without a bus.

Sources, core and store are those of the running pipeline, so are the rows. What the tapes know whole replaces
what was stored of them as incomplete. A backfill of the same tapes has the same identity in the store, whenever
it runs, and forgets there what an earlier one left of late trades: repeating it changes nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Protocol, cast

import msgspec
import numpy as np

from shared.batches import BACKFILL, Batch, Item, Rewind, batch_of
from shared.batches import Source as Place
from shared.errors import StoreUnavailable
from shared.frames import CANDLE, NS, ROW_KINDS, TICK_FRAMES, Frame, Rows, tick_frame
from shared.instruments import is_spread, partition_of
from shared.messages import Clock, Disconnect, Gap, Instrument, decode, encode
from shared.registry import TOOLS, resolve
from shared.replay import Progress, Summary
from shared.settings import Settings
from shared.sink import Store, store_of
from shared.sources import Playable
from shared.stages import STAGES, enabled
from shared.stores import parse
from shared.tables import MESSAGE_TABLES, TABLES, key_of
from shared.worker import Core, Stage

log = logging.getLogger(__name__)

STEP_ROWS = 16_384  # tick rows that wait for their cores, over all partitions
ROW_BYTES = CANDLE.itemsize
SETTLED_SECONDS = 180  # beyond the lateness that is accepted: no row is revised any more
WAIT_MAX_SECONDS = 2.0
NOT_TAKEN = ("outside_hours", "unknown_instrument", "not_candled")
# Where the rows of a kind come from, if not from `candles`.
TOPIC_OF = {"pressure": "pressure", "pressure_rollup": "pressure", "signal": "signals"}
Tell = Callable[[Progress], None]


@dataclass(slots=True)
class Start:
    """Where a source begins: no partition holds anything yet."""

    cursors: dict[int, bytes] = field(default_factory=dict)


class Grouped(Protocol):
    """Tick rows by partition, as a source pushes them: group g is rows[starts[g]:starts[g + 1]]."""

    rows: Rows
    partitions: list[int]
    starts: list[int]


def identity(tapes: Sequence[Playable]) -> str:
    """The identity of a backfill in the store: the same for the same tapes, in any order."""
    names = sorted(f"{tape.feed}:{tape.tape}" for tape in tapes)
    return BACKFILL + blake2b("\n".join(names).encode(), digest_size=8).hexdigest()


def run(tapes: Sequence[Playable], settings: Settings, tell: Tell, stop: threading.Event) -> Summary:
    """Bring all tapes into the settings' store; returns when the last row is stored, or soon after `stop` is set.

    Raises what a source, the store or a calendar finds wrong; what came before it is stored.
    """
    began = time.monotonic()
    store = store_of(settings, stop)
    try:
        store.open()
    except StoreUnavailable as error:
        raise StoreUnavailable(f"{error}: see whether another program holds it, and try again") from None
    try:
        pipe = Pipe(settings, Writer(store, settings, identity(tapes), stop), tell)
        for tape in tapes:
            if stop.is_set():
                break
            try:
                tape.run(FeedOutput(pipe, tape.feed), Start(), stop)
            finally:
                pipe.flush()
        summary = pipe.summary()
    finally:
        store.close()
    summary.seconds = round(time.monotonic() - began, 3)
    summary.trades_per_second = round(summary.trades / summary.seconds, 1) if summary.seconds else 0.0
    return summary


class Writer:
    """Collects what the cores made into batches and writes them; one transaction a batch.

    A row waits until no late trade can change it any more, so that only its last revision is written:
    a store that holds that one already stays as it is.
    """

    def __init__(self, store: Store, settings: Settings, bus: str, stop: threading.Event) -> None:
        self.bus = bus
        self.stored = self.dead = 0
        self._store, self._stop = store, stop
        # Loads are few and large.
        loads = parse(settings.tapeline.store).scheme == "bigquery"
        self._rows = settings.bigquery.batch_rows if loads else settings.sink.batch_rows
        self._wait_ns = (settings.aggregate.max_lateness_seconds + SETTLED_SECONDS) * NS
        self._items: list[Item] = []
        self._held: dict[tuple[int, str], _Held | _HeldMessages] = {}
        self._weight = 0
        self._leftovers = [key for key in store.cursors() if key[0] == bus]

    def add(
        self, topic: str, partition: int, frame: Frame, instruments: Mapping[int, Instrument] | None = None
    ) -> None:
        """A numbered frame, with the partition's instruments for ticks; writes when a batch is full."""
        self._weight += 1 + len(frame.body) // ROW_BYTES
        if frame.kind in TABLES or frame.kind in MESSAGE_TABLES:
            held = self._held.get((partition, frame.kind))
            if held is None:
                held = _Held(frame.kind) if frame.kind in TABLES else _HeldMessages(frame.kind)
                self._held[partition, frame.kind] = held
            held.add(frame)
        else:
            self._items.append(self._item(topic, partition, frame, instruments or {}))
        if self._weight >= self._rows:
            self.write()

    def write(self, everything: bool = False) -> None:
        """Write what was collected, waiting for a store that does not answer (not beyond `stop`)."""
        items, self._items = self._items, []
        for (partition, kind), held in self._held.items():
            frame = held.take(0 if everything else self._wait_ns)
            if frame is not None:
                items.append(self._item(TOPIC_OF.get(kind, "candles"), partition, frame, {}))
        # As many rows as still wait may come before these are looked through again.
        self._weight = -sum(held.count for held in self._held.values())
        if not items:
            return
        batch = batch_of(items, mend=True)
        # The first batch forgets what an earlier run of these tapes left without a key of its own.
        batch.rewinds = [
            Rewind(Place(bus, topic, partition, 0, "0-0"), "0-0") for bus, topic, partition in self._leftovers
        ]
        self._write(batch)
        self._leftovers = []
        self.stored += batch.rows

    def _write(self, batch: Batch) -> None:
        wait, told = 0.05, False
        while True:
            try:
                self.dead += self._store.write(batch)
            except StoreUnavailable as error:
                if self._stop.is_set():
                    raise
                if not told:
                    log.warning("%s; trying again", error)
                    told = True
                self._stop.wait(wait)
                wait = min(WAIT_MAX_SECONDS, 2 * wait)
            else:
                return

    def _item(self, topic: str, partition: int, frame: Frame, instruments: Mapping[int, Instrument]) -> Item:
        return Item(Place(self.bus, topic, partition, frame.seq, f"{frame.seq}-0"), frame, instruments=instruments)


class _Held:
    """Candle rows of one partition and kind that may still be revised."""

    def __init__(self, kind: str) -> None:
        self.kind, self.count = kind, 0
        self._rows: list[Rows] = []
        self._numbers: dict[tuple[str, str], int] = {}
        self._newest_ns = np.zeros(0, np.int64)  # newest window's end by name
        self._seq = 0

    def add(self, frame: Frame) -> None:
        numbers = np.array([self._numbers.setdefault(name, len(self._numbers)) for name in frame.names], np.int64)
        self._newest_ns = np.concatenate(
            (self._newest_ns, np.zeros(len(self._numbers) - len(self._newest_ns), np.int64))
        )
        rows = frame.rows().copy()
        rows["name"] = numbers[rows["name"]]
        np.maximum.at(self._newest_ns, rows["name"], TABLES[self.kind].end_ns(rows))
        self._rows.append(rows)
        self.count += len(rows)
        self._seq = frame.seq

    def take(self, wait_ns: int) -> Frame | None:
        """Rows whose window ended `wait_ns` before the newest of their name, or earlier."""
        if not self.count:
            return None
        rows = np.concatenate(self._rows)
        ends = TABLES[self.kind].end_ns(rows)
        settled = ends <= self._newest_ns[rows["name"]] - wait_ns
        self._rows = [rows[~settled]]
        self.count = len(self._rows[0])
        rows, ends = rows[settled], ends[settled]
        if not len(rows):
            return None
        span = int(ends.min()), int(ends.max())
        return Frame(self.kind, len(rows), *span, "backfill", rows.tobytes(), self._seq, list(self._numbers))


class _HeldMessages:
    """Rows of option pressure or signals of one partition that may still be revised."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._newest: dict[tuple[Any, ...], Any] = {}
        self._end_ns = self._seq = 0

    @property
    def count(self) -> int:
        return len(self._newest)

    def add(self, frame: Frame) -> None:
        for message in decode(frame.body):
            self._newest[key_of(message)] = message
        self._end_ns, self._seq = max(self._end_ns, frame.last_ns), frame.seq

    def take(self, wait_ns: int) -> Frame | None:
        """Messages whose window ended `wait_ns` before the newest, or earlier."""
        edge = self._end_ns - wait_ns
        settled = {key: m for key, m in self._newest.items() if m.time_window_ns + m.window_sec * NS <= edge}
        if not settled:
            return None
        self._newest = {key: m for key, m in self._newest.items() if key not in settled}
        messages = list(settled.values())
        starts = [m.time_window_ns for m in messages]
        last = max(starts) + messages[0].window_sec * NS
        return Frame(self.kind, len(messages), min(starts), last, "backfill", encode(messages), self._seq)


@dataclass(slots=True)
class _Partition:
    number: int
    cores: dict[str, Core] = field(default_factory=dict)
    rows: list[Rows] = field(default_factory=list)  # tick rows that no frame holds yet
    feed: str = ""  # whose they are
    frames: list[Frame] = field(default_factory=list)  # that the core has not seen
    feeds: set[str] = field(default_factory=set)  # that have an instrument here
    instruments: dict[int, Instrument] = field(default_factory=dict)
    last_ns: int = 0
    ticks_seq: int = 0
    seqs: Counter[str] = field(default_factory=Counter)  # by stage


class Pipe:
    """Every partition's cores in this process: frames in, in stream order, rows to the writer out."""

    def __init__(self, settings: Settings, writer: Writer, tell: Tell) -> None:
        self.partitions = settings.tapeline.partitions
        self.skipped: Counter[str] = Counter()
        chosen = enabled(settings) or ("aggregate",)  # what it counts is wanted even where only ticks are kept
        self._stages = {name: cast("Stage", resolve(TOOLS[f"{name}-stage"])(settings)) for name in chosen}
        self._writer, self._tell = writer, tell
        self._parts = [_Partition(number) for number in range(self.partitions)]
        self._keeps = settings.sink.modes
        self._waiting = 0
        self._made: Counter[str] = Counter()
        self._not_taken: dict[int, dict[str, int]] = {}
        self.progress = Progress()

    def rows(self, partition: int, feed: str, rows: Rows) -> None:
        """Tick rows of a feed, behind all that came before."""
        part = self._parts[partition]
        if part.feed != feed:
            self._cut(part)
            part.feed = feed
        part.rows.append(rows.copy())  # the source may use its array again
        records = np.bincount(rows["kind"][rows["part"] == 0], minlength=len(ROW_KINDS))
        self._made.update(dict(zip(ROW_KINDS, records.tolist(), strict=True)))
        self._wait(len(rows))

    def message(self, partition: int, feed: str, kind: str, messages: list[Any], at_ns: int) -> None:
        """A frame of messages of a feed, behind all that came before."""
        part = self._parts[partition]
        self._cut(part)
        at_ns = max(at_ns, part.last_ns)
        self._append(part, Frame(kind, len(messages), at_ns, at_ns, feed, encode(messages)))
        self._wait(len(messages))

    def home(self, partition: int, feed: str, instruments: list[Instrument]) -> None:
        """This feed has these instruments in the partition."""
        part = self._parts[partition]
        part.feeds.add(feed)
        part.instruments.update((i.id, i) for i in instruments)

    def homes(self, feed: str) -> list[int]:
        """Partitions with an instrument of the feed."""
        return [part.number for part in self._parts if feed in part.feeds]

    def flush(self) -> None:
        """Everything through the cores and into the store."""
        self._step_all()
        self._writer.write(everything=True)
        self._tell_progress()

    def summary(self) -> Summary:
        """Counts of all that was done."""
        made, skipped = self._made, Counter(self.skipped)
        for counted in self._not_taken.values():
            skipped.update({reason: counted.get(reason, 0) for reason in NOT_TAKEN})
        return Summary(
            trades=made["trade"],
            books=made["book"],
            tickers=made["ticker"],
            liquidations=made["liquidation"],
            option_summaries=made["option_summary"],
            skipped={reason: n for reason, n in skipped.items() if n},
            candles=made["candle"],
            candles_1m=made["candle_1m"],
            candles_1s=made["candle_1s"],
            late=made["late_trade"],
            pressure=made["pressure"],
            signals=made["signal"],
            gaps=made["gap"],
            dead_letters=self._writer.dead,
        )

    def _wait(self, weight: int) -> None:
        self._waiting += weight
        if self._waiting >= STEP_ROWS:
            self._step_all()
            self._tell_progress()

    def _step_all(self) -> None:
        for part in self._parts:
            self._cut(part)
            self._step(part)
        self._waiting = 0

    def _cut(self, part: _Partition) -> None:
        if part.rows:
            rows = part.rows[0] if len(part.rows) == 1 else np.concatenate(part.rows)
            part.rows = []
            self._append(part, tick_frame(rows, part.feed))

    def _append(self, part: _Partition, frame: Frame) -> None:
        part.last_ns = max(part.last_ns, frame.last_ns)
        part.ticks_seq += 1
        frame.seq = part.ticks_seq
        frame.id = f"{frame.seq}-0"
        part.frames.append(frame)

    def _step(self, part: _Partition) -> None:
        if not part.frames:
            return
        frames, part.frames = part.frames, []
        records = sum(frame.count for frame in frames if frame.kind in TICK_FRAMES)
        self.progress.published += records
        if "ticks" in self._keeps:
            for frame in frames:
                self._writer.add("ticks", part.number, frame, part.instruments)
                if frame.kind in TICK_FRAMES:
                    self.progress.made += frame.count
        flowing = {"ticks": frames}
        for name, stage in self._stages.items():
            taken = flowing.get(STAGES[name].reads, [])
            if taken:
                flowing.update(self._run(part, name, stage, taken))
        self.progress.aggregated += records

    def _run(self, part: _Partition, name: str, stage: Stage, frames: list[Frame]) -> dict[str, list[Frame]]:
        """One stage's step; what it made goes to the writer, and by topic to the stages behind it."""
        if name not in part.cores:
            part.cores[name] = stage.open({})
        result = part.cores[name].step(frames)
        counters = result.changes.get("counters")
        if counters is not None and name == "aggregate":
            self._not_taken[part.number] = msgspec.json.decode(counters, type=dict[str, int])
        for topic, outputs in result.outputs.items():
            for frame in outputs:
                part.seqs[name] += 1
                frame.seq = part.seqs[name]
                frame.id = f"{frame.seq}-0"
                self._made[frame.kind] += frame.count
                if "candles" in self._keeps:
                    self.progress.made += frame.count
                    self._writer.add(topic, part.number, frame)
        return result.outputs

    def _tell_progress(self) -> None:
        self.progress.stored = self._writer.stored
        self._tell(self.progress)


class FeedOutput:
    """What a source pushes into (the Output of ingest), routed to the partitions as its publisher does."""

    def __init__(self, pipe: Pipe, feed: str) -> None:
        self._pipe, self._feed = pipe, feed
        self._announced: dict[int, Instrument] = {}

    def instruments(self, messages: Iterable[Instrument]) -> None:
        """To the partition of its root; spreads are left out, what is known unchanged is not repeated."""
        groups: dict[int, list[Instrument]] = {}
        for message in messages:
            if is_spread(message.symbol, message.kind, message.root) or self._announced.get(message.id) == message:
                continue
            self._announced[message.id] = message
            groups.setdefault(partition_of(message.root, self._pipe.partitions), []).append(message)
        for partition, group in groups.items():
            self._pipe.home(partition, self._feed, group)
            defined = max(i.defined_ns or 0 for i in group)
            self._pipe.message(partition, self._feed, "instrument", group, defined)

    def broadcast(self, message: Clock | Gap | Disconnect) -> None:
        """To every partition that has an instrument of this feed."""
        at = message.watermark_ns if isinstance(message, Clock) else 0
        for partition in self._pipe.homes(self._feed):
            self._pipe.message(partition, self._feed, type(message).__name__.lower(), [message], at)

    def ticks(self, grouped: Grouped, cursor: bytes) -> None:  # noqa: ARG002
        """Rows by partition."""
        for g, partition in enumerate(grouped.partitions):
            start, end = grouped.starts[g], grouped.starts[g + 1]
            if end > start:
                self._pipe.rows(partition, self._feed, grouped.rows[start:end])

    def flush(self) -> None:
        """Nothing lingers here."""

    def count(self, reason: str, records: int, usage_bytes: int = 0) -> None:  # noqa: ARG002
        """Records that were not taken, by reason."""
        if records:
            self._pipe.skipped[reason] += records

    def connection(self, state: str, detail: str = "") -> None:
        """The source's word on itself."""
        log.debug("%s is %s%s", self._feed, state, f": {detail}" if detail else "")
