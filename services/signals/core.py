"""The pure core of the signals stage: (state, frames of `pressure`) -> (state, signals). No I/O, no clock.

A window is judged when its rollup comes, and again whole when a revision does; what is published is the difference
to what was. The signals are a function of the sequence of messages alone, however it is cut into frames, steps or
restarts.

Rows are kept for the newest three windows of an underlying, which is longer than a late trade can change one. Only
a gap revises older ones: it changes nothing but `complete` of the signals that are remembered (of this session and
the one before). A revision does not judge the windows behind it again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import msgspec
import numpy as np
from msgspec.structs import replace

from services.signals.baseline import SAMPLE, Book, Days, Key, Samples, key_of, samples_of
from services.signals.verdict import Limits, judge
from shared.calendar import Sessions
from shared.errors import ConfigError
from shared.frames import NS, Frame
from shared.messages import AnyMessage, Pressure, PressureRollup, Signal, decode, encode

STATE_VERSION = 1
KINDS = frozenset({"pressure", "pressure_rollup"})
OWN = "tapeline"  # the source of this stage's own signals
KEEP_WINDOWS = 3
WITHDRAWN = "withdrawn"

Id = tuple[str, Key]  # source and key: one signal each in a window
# Samples by window start of an underlying's stored windows of this length (seconds) in [since_ns, until_ns).
Seed = Callable[[str, int, int, int], Mapping[int, Samples]]


class Said(NamedTuple):
    """What plug-ins said of a window; of a `failed` one nothing is known."""

    signals: Sequence[Signal] = ()
    failed: frozenset[str] = frozenset()
    errors: int = 0


def id_of(signal: Signal) -> Id:
    return signal.source, (signal.expiration_ns, signal.strike, signal.option_type)


# (a window's rows, its rollup, the signals that now stand of it) -> what plug-ins say.
Hooks = Callable[[Sequence[Pressure], PressureRollup, Sequence[Signal]], Said]


@dataclass(frozen=True, slots=True)
class Config:
    """`sessions` of an underlying's market; `count`: how many before its own make a window's history."""

    sessions: Callable[[str], Sessions]
    count: int = 20
    limits: Limits = Limits()


class Head(msgspec.Struct):
    """What is known of an underlying beside its rows: the newest judged window, and how long its windows are."""

    window_sec: int
    newest_ns: int


@dataclass(slots=True)
class _Chain:
    """One underlying."""

    head: Head
    days: Days
    book: Book = field(default_factory=Book)
    rows: dict[int, dict[Key, Pressure]] = field(default_factory=dict)
    signals: dict[int, dict[Id, Signal]] = field(default_factory=dict)

    @property
    def oldest_ns(self) -> int:
        """The oldest window whose rows are kept."""
        return self.head.newest_ns - (KEEP_WINDOWS - 1) * self.head.window_sec * NS

    def forget(self) -> list[int]:
        """Drop the history that no window from the oldest on looks at; returns its windows."""
        return self.book.forget(self.days.past(self.oldest_ns).since_ns, self.oldest_ns)

    def take(self, window_ns: int, messages: Iterable[AnyMessage]) -> None:
        """Rows or signals of a window as they were committed."""
        for message in messages:
            if isinstance(message, Pressure):
                self.rows.setdefault(window_ns, {})[key_of(message)] = message
            elif isinstance(message, Signal):
                self.signals.setdefault(window_ns, {})[id_of(message)] = message


class PartitionState:
    """One partition: `step` takes frames, `changes` gives what to commit.

    Fields of the committed state: `version`, `counters`; of each underlying `u:<underlying>` (Head), and of its
    windows `h:<underlying>:<start>` (SAMPLE rows), `w:` (Pressure messages), `s:` (Signal messages).
    """

    def __init__(self, config: Config, seed: Seed, hooks: Hooks | None = None) -> None:
        self._config, self._seed, self._hooks = config, seed, hooks
        self._chains: dict[str, _Chain] = {}
        self._counters: Counter[str] = Counter()
        self._dirty: set[tuple[str, str, int]] = set()  # field kind, underlying, window
        self._samples: dict[tuple[str, int], bytes] = {}  # of dirty `h:` fields

    # -- the step ----------------------------------------------------------------------------

    def step(self, frames: Iterable[Frame]) -> list[Signal]:
        """Take frames in stream order; the signals to publish, in order, without `timestamp_out_ns`.

        Frames of other kinds are not read, nor (counted) one that holds no messages.
        """
        out: list[Signal] = []
        for frame in frames:
            if frame.kind not in KINDS:
                continue
            try:
                messages = decode(frame.body)
            except msgspec.DecodeError:
                self._counters["unreadable"] += 1
                continue
            for message in messages:
                if isinstance(message, Pressure):
                    chain = self._chain(message)
                    chain.rows.setdefault(message.time_window_ns, {})[key_of(message)] = message
                    self._dirty.add(("w", message.underlying, message.time_window_ns))
                elif isinstance(message, PressureRollup):
                    out += self._close(self._chain(message), message)
        return out

    def _chain(self, message: Pressure | PressureRollup) -> _Chain:
        chain = self._chains.get(message.underlying)
        if chain is not None and chain.head.window_sec != message.window_sec:
            self._drop(message.underlying, chain)  # windows of another length are no history
            chain = None
        if chain is None:
            days = Days(self._config.sessions(message.underlying), self._config.count)
            chain = self._chains[message.underlying] = _Chain(Head(message.window_sec, 0), days)
            self._dirty.add(("u", message.underlying, 0))
        return chain

    def _close(self, chain: _Chain, rollup: PressureRollup) -> list[Signal]:
        """A window is complete, or was revised."""
        name, window_ns = rollup.underlying, rollup.time_window_ns
        if chain.head.newest_ns == 0:
            self._bootstrap(name, chain, window_ns)
        if window_ns < chain.oldest_ns:
            return self._old(chain, rollup)
        self._counters["windows" if rollup.revision == 0 else "revisions"] += 1
        if window_ns > chain.head.newest_ns:
            self._advance(name, chain, window_ns)
        rows = chain.rows.setdefault(window_ns, {})
        past = chain.days.past(window_ns)
        judged = judge(rows, chain.book, past, self._config.limits)
        self._counters["rows"] += len(rows)
        self._counters["insufficient"] += judged.insufficient
        samples = samples_of(rows.values())
        chain.book.put(window_ns, past.time_of_day, samples)
        self._samples[name, window_ns] = samples.tobytes()
        self._dirty.add(("h", name, window_ns))
        out = self._publish(chain, rollup, judged.signals, {OWN})
        if self._hooks is not None:
            held = chain.signals.get(window_ns, {})
            standing = [s for i, s in sorted(held.items()) if i[0] == OWN and s.status != WITHDRAWN]
            said = self._hooks([rows[key] for key in sorted(rows)], rollup, standing)
            self._counters["plugin_errors"] += said.errors
            out += self._publish(chain, rollup, said.signals, {source for source, _ in held} - {OWN} - said.failed)
        return out

    def _bootstrap(self, name: str, chain: _Chain, window_ns: int) -> None:
        """The history of an underlying that is new here, from the store: a session at a time, for memory's sake."""
        days = chain.days
        last = days.index(window_ns)
        windows: dict[int, Samples] = {}
        for index in range(max(0, last - days.count), last + 1):
            until = window_ns if index == last else days.begin(index + 1)
            if days.begin(index) < until:
                windows.update(self._seed(name, chain.head.window_sec, days.begin(index), until))
        chain.book.load(windows, days)
        for at, samples in windows.items():
            self._samples[name, at] = samples.tobytes()
            self._dirty.add(("h", name, at))
        self._counters["bootstrapped"] += len(chain.book)

    def _advance(self, name: str, chain: _Chain, window_ns: int) -> None:
        """A new newest window: forget what no window that may still be judged looks at."""
        before = chain.days.index(chain.oldest_ns)
        chain.head.newest_ns = window_ns
        self._dirty.add(("u", name, 0))
        for old in [w for w in chain.rows if w < chain.oldest_ns]:
            del chain.rows[old]
            self._dirty.add(("w", name, old))
        yesterday = chain.days.begin(max(0, chain.days.index(window_ns) - 1))
        for old in [w for w in chain.signals if w < yesterday]:
            del chain.signals[old]
            self._dirty.add(("s", name, old))
        if chain.days.index(chain.oldest_ns) != before:
            self._dirty.update(("h", name, old) for old in chain.forget())

    def _old(self, chain: _Chain, rollup: PressureRollup) -> list[Signal]:
        """A revision of a window whose rows are gone: whether it is complete is all that may change."""
        self._counters["old_revisions"] += 1
        window_ns = rollup.time_window_ns
        self._dirty.add(("w", rollup.underlying, window_ns))
        held = chain.signals.get(window_ns, {})
        out = []
        for key, row in sorted(chain.rows.pop(window_ns, {}).items()):
            signal = held.get((OWN, key))
            if signal is not None and signal.status != WITHDRAWN and signal.complete != row.complete:
                changed = replace(signal, complete=row.complete, revision=signal.revision + 1)
                out.append(self._put(chain, changed))
        return out

    def _publish(
        self, chain: _Chain, rollup: PressureRollup, verdicts: Iterable[Signal], sources: set[str]
    ) -> list[Signal]:
        """What differs from the signals of the window that were published; those of `sources` may be withdrawn."""
        held = chain.signals.get(rollup.time_window_ns, {})
        wanted = {id_of(s): s for s in verdicts}
        out = []
        for which in sorted({*wanted, *(i for i in held if i[0] in sources)}):
            new, old = wanted.get(which), held.get(which)
            if new is not None and old is not None:
                new = replace(new, revision=old.revision)
                if new != old:
                    out.append(self._put(chain, replace(new, revision=old.revision + 1)))
            elif new is not None:
                out.append(self._put(chain, replace(new, revision=0)))
            elif old is not None and old.status != WITHDRAWN:
                reason = f"revision {rollup.revision} of the window does not bear it out"
                gone = replace(old, status=WITHDRAWN, reason=reason, revision=old.revision + 1)
                out.append(self._put(chain, gone))
        return out

    def _put(self, chain: _Chain, signal: Signal) -> Signal:
        self._counters[signal.status] += 1
        chain.signals.setdefault(signal.time_window_ns, {})[id_of(signal)] = signal
        self._dirty.add(("s", signal.underlying, signal.time_window_ns))
        return signal

    def _drop(self, name: str, chain: _Chain) -> None:
        """Forget an underlying."""
        del self._chains[name]
        for kind, windows in (("w", chain.rows), ("s", chain.signals), ("h", chain.book.windows)):
            self._dirty.update((kind, name, window) for window in windows)
        self._dirty.add(("u", name, 0))

    # -- the committed state -----------------------------------------------------------------

    def changes(self) -> tuple[dict[str, bytes], tuple[str, ...]]:
        """Fields of the committed state that changed since the last call, and those to delete."""
        fields = {"version": b"%d" % STATE_VERSION, "counters": msgspec.json.encode(self._counters)}
        gone = []
        for kind, name, window in sorted(self._dirty):
            body = self._body(kind, name, window)
            label = f"u:{name}" if kind == "u" else f"{kind}:{name}:{window}"
            if body is None:
                gone.append(label)
            else:
                fields[label] = body
        self._dirty.clear()
        self._samples.clear()
        return fields, tuple(gone)

    def _body(self, kind: str, name: str, window: int) -> bytes | None:
        """What a field holds now, None for nothing."""
        chain = self._chains.get(name)
        if chain is None:
            return None
        if kind == "u":
            return msgspec.json.encode(chain.head)
        if kind == "h":
            return self._samples.get((name, window)) if window in chain.book else None
        held = chain.rows.get(window) if kind == "w" else chain.signals.get(window)
        return encode(list(held.values())) if held else None

    @classmethod
    def restore(cls, config: Config, fields: Mapping[str, bytes], seed: Seed, hooks: Hooks | None = None) -> Self:
        """State from its committed fields; an empty mapping is a cold start.

        Raises ConfigError when another version made it.
        """
        state = cls(config, seed, hooks)
        version = int(fields.get("version", STATE_VERSION))
        if version != STATE_VERSION:
            raise ConfigError(
                f"the bus holds signals state of version {version} (this program: {STATE_VERSION}): "
                "run the version that made it, or use another namespace"
            )
        state._counters.update(msgspec.json.decode(fields.get("counters", b"{}"), type=dict[str, int]))
        for label in fields:
            if label.startswith("u:"):
                head = msgspec.json.decode(fields[label], type=Head)
                days = Days(config.sessions(label[2:]), config.count)
                state._chains[label[2:]] = _Chain(head, days)
        history: dict[str, dict[int, Samples]] = {}
        for label, body in fields.items():
            kind, _, rest = label.partition(":")
            name, _, window = rest.rpartition(":")
            if kind == "h":
                history.setdefault(name, {})[int(window)] = np.frombuffer(body, SAMPLE)
            elif kind in ("w", "s"):
                state._chains[name].take(int(window), decode(body))
        for name, windows in history.items():
            chain = state._chains[name]
            chain.book.load(windows, chain.days)
            chain.forget()
        return state
