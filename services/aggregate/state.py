"""What a partition of the aggregate stage remembers: the kernel's arrays and the names behind them.

Kept small and written in pieces: a field of the committed state per contract, root and 16 seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import msgspec
import numpy as np

from services.aggregate import kernel
from services.aggregate.arena import WINDOW, Arrays, table_of
from services.aggregate.layout import (
    CACHE,
    CHUNK,
    CLOSED,
    CONTRACT,
    COUNTERS,
    FEED,
    GAP,
    MINUTE,
    MINUTES,
    NEVER,
    NONE,
    PARAMS,
    ROOT,
    SUMMARY,
    ring_seconds,
)  # fmt: skip
from shared.errors import ConfigError
from shared.frames import CANDLE, NS, Rows
from shared.instruments import feed_id, is_spread
from shared.messages import Instrument

STATE_VERSION = 1
CANDLED = frozenset("FK?")
OUT_ROWS = 16_384


@dataclass(frozen=True, slots=True)
class Config:
    """What the rows depend on beside the tape. `sessions(venue, root)` gives rows of [open, close) ns."""

    sessions: Callable[[str, str], Rows]
    max_lateness_sec: int = 120
    quiet_sec: int = 300
    emit_1s: bool = True
    big_trade: dict[str, float] = field(default_factory=lambda: {"NG": 50.0})
    big_trade_default: float = 25.0


class Registry(msgspec.Struct):
    """The names behind the arrays' indices."""

    version: int = STATE_VERSION
    lateness_sec: int = 120
    contracts: list[Instrument] = []
    roots: list[tuple[str, str]] = []  # (venue, root)
    feeds: list[str] = []
    ignored: list[int] = []


class State:
    """Arrays, registry and their committed form; `core` steps it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.registry = Registry(lateness_sec=config.max_lateness_sec)
        self.size = ring_seconds(config.max_lateness_sec)
        self.params = np.zeros(1, PARAMS)
        self.params[0] = (config.max_lateness_sec * NS, config.quiet_sec, int(config.emit_1s))
        self.feeds = np.zeros(0, FEED)
        self.contracts = np.zeros(0, CONTRACT)
        self.roots = np.zeros(0, ROOT)
        self.gaps = np.zeros(0, GAP)
        self.ring = np.zeros((0, self.size), SUMMARY)
        self.minutes = np.zeros((0, MINUTES), MINUTE)
        self.closes = np.zeros((0, self.size), CLOSED)
        self.sessions = np.zeros((0, 2), np.int64)
        self.counters = np.zeros(len(COUNTERS), np.int64)
        self._table: Rows | None = None
        self._ring_dirty = np.zeros((0, self.size // CHUNK), np.int8)
        self._close_dirty = np.zeros((0, self.size // CHUNK), np.int8)
        self._registry_dirty = True
        self._all_contracts_dirty = True
        self._out_1m = np.zeros(OUT_ROWS, CANDLE)
        self._out_1s = np.zeros(OUT_ROWS, CANDLE)
        self._late = np.zeros((1024, 2), np.int64)
        self._index()

    def _bind(self) -> Rows:
        """The kernel's view of the arrays, made anew when one of them was replaced."""
        if self._table is None:
            k = len(self.roots)
            cache = np.zeros(k, CACHE)
            cache["contract"] = NONE
            self._arrays = Arrays(
                self.feeds, self.contracts, self.ring, self.minutes, self.roots, self.closes, self.sessions, self.gaps,
                self._table_key, self._table_value, self.params, self._out_1m, self._out_1s, self.counters,
                self._ring_dirty, self._close_dirty, cache, np.zeros((k, WINDOW), SUMMARY), np.zeros(k, SUMMARY),
                np.zeros(2, SUMMARY),
            )  # fmt: skip
            self._table = table_of(self._arrays)
        return self._table

    def _define(self, instrument: Instrument, seeds: dict[str, float]) -> None:
        held = self._by_id.get(instrument.id)
        if held is not None:
            if instrument != self.registry.contracts[held]:
                self.registry.contracts[held] = instrument
                self.contracts[held]["expiry_ns"] = instrument.expiration_ns or 0
                self._registry_dirty = self._all_contracts_dirty = True
            return
        if not candled(instrument):
            if instrument.id not in self._ignored:
                self._ignored.add(instrument.id)
                self.registry.ignored.append(instrument.id)
                self._registry_dirty = self._index_stale = True
            return
        f = self._feed(instrument.feed)
        key = (instrument.venue, instrument.root)
        if key not in self.registry.roots:
            self._add_root(key, f)
            self._seed(len(self.roots) - 1, instrument.root, seeds)
        k = self.registry.roots.index(key)
        contract = np.zeros(1, CONTRACT)
        contract[0] = (
            instrument.id,
            f,
            k,
            self.roots[k]["head"],
            instrument.expiration_ns or 0,
            np.nan,
            np.nan,
            NONE,
            NEVER,
        )
        self.roots[k]["head"] = len(self.contracts)
        summaries = np.zeros((1, self.size), SUMMARY)
        summaries["sec"] = summaries["revision"] = NONE
        minutes = np.zeros((1, MINUTES), MINUTE)
        minutes["minute"] = NONE
        self.contracts = np.append(self.contracts, contract)
        self.ring = np.concatenate((self.ring, summaries))
        self.minutes = np.concatenate((self.minutes, minutes))
        self._ring_dirty = np.concatenate((self._ring_dirty, np.zeros((1, self.size // CHUNK), np.int8)))
        self.registry.contracts.append(instrument)
        if self.feeds[f]["watched_ns"] != NONE:
            self._warm(len(self.contracts) - 1)
        self._by_id[instrument.id] = len(self.contracts) - 1
        self._registry_dirty = self._all_contracts_dirty = self._index_stale = True
        self._table = None

    def _add_root(self, key: tuple[str, str], f: int) -> None:
        self.registry.roots.append(key)
        root = np.zeros(1, ROOT)
        root["feed"], root["front"], root["head"] = f, NONE, NONE
        root["big_size"] = self.config.big_trade.get(key[1], self.config.big_trade_default)
        closes = np.zeros((1, self.size), CLOSED)
        closes["end_sec"] = closes["front"] = closes["revision"] = NONE
        self.roots = np.append(self.roots, root)
        self.closes = np.concatenate((self.closes, closes))
        self._close_dirty = np.concatenate((self._close_dirty, np.zeros((1, self.size // CHUNK), np.int8)))
        self._place_calendars()

    def _seed(self, k: int, root: str, seeds: dict[str, float]) -> None:
        """Go on from the newest stored CVD, once, when the root's feed begins to be watched."""
        watched = self.feeds[self.roots[k]["feed"]]["watched_ns"] != NONE
        if not self.roots[k]["seeded"] and (watched or root in seeds):
            self.roots[k]["cvd"] += seeds.get(root, 0.0)
            self.roots[k]["seeded"] = 1

    def _warm(self, c: int) -> None:
        root = self.roots[self.contracts[c]["root"]]
        since = -(-int(self.feeds[self.contracts[c]["feed"]]["watched_ns"]) // NS)
        low, high = int(root["calendar_from"]), int(root["calendar_to"])
        self.contracts[c]["warm_sec"] = kernel.warm_at(self.sessions, low, high, since, WINDOW)

    def _feed(self, name: str) -> int:
        if name not in self.registry.feeds:
            self.registry.feeds.append(name)
            feed = np.zeros(1, FEED)
            feed[0] = (feed_id(name), NONE, 0, NONE, NONE, NONE, NONE)
            self.feeds = np.append(self.feeds, feed)
            self._table = None
            self._registry_dirty = self._unwatched = True
        return self.registry.feeds.index(name)

    def _place_calendars(self) -> None:
        """One copy of each calendar in `sessions`; every root points at its rows."""
        tables: list[Rows] = []
        placed: dict[int, tuple[int, int]] = {}
        at = 0
        for k, (venue, root) in enumerate(self.registry.roots):
            table = self.config.sessions(venue, root)
            if id(table) not in placed:
                placed[id(table)] = (at, at + len(table))
                tables.append(table)
                at += len(table)
            self.roots[k]["calendar_from"], self.roots[k]["calendar_to"] = placed[id(table)]
        self.sessions = np.concatenate(tables) if tables else np.zeros((0, 2), np.int64)
        self._table = None

    def _index(self) -> None:
        known = {i.id: c for c, i in enumerate(self.registry.contracts)}
        self._by_id = known
        self._ignored = set(self.registry.ignored)
        self._index_stale = False
        entries = [*known.items(), *((i, -2) for i in self.registry.ignored)]
        size = 1 << max(6, (4 * len(entries)).bit_length())
        self._table_key = np.zeros(size, np.int64)
        self._table_value = np.full(size, NONE, np.int64)
        for key, value in entries:
            at = kernel.find(self._table_key, key)
            self._table_key[at] = key
            self._table_value[at] = value
        self._unwatched = bool((self.feeds["watched_ns"] == NONE).any())
        self._table = None

    def changes(self) -> dict[str, bytes]:
        """Fields of the committed state that changed since the last call."""
        keep = [g["end_ns"] >= (self.feeds[g["feed"]]["closed_sec"] - self.size) * NS for g in self.gaps]
        if not all(keep):
            self.gaps = self.gaps[np.array(keep, bool)]
            self._table = None
        fields = {
            "feeds": self.feeds.tobytes(), "roots": self.roots.tobytes(), "gaps": self.gaps.tobytes(),
            "counters": msgspec.json.encode(dict(zip(COUNTERS, self.counters.tolist(), strict=True))),
        }  # fmt: skip
        if self._registry_dirty:
            fields["registry"] = msgspec.json.encode(self.registry)
        for c, j in np.argwhere(self._ring_dirty):
            fields[f"s:{c}:{j}"] = self.ring[c, j * CHUNK : (j + 1) * CHUNK].tobytes()
        for k, j in np.argwhere(self._close_dirty):
            fields[f"q:{k}:{j}"] = self.closes[k, j * CHUNK : (j + 1) * CHUNK].tobytes()
        touched = range(len(self.contracts)) if self._all_contracts_dirty else np.flatnonzero(self._ring_dirty.any(1))
        for c in touched:
            fields[f"c:{c}"] = self.contracts[c].tobytes() + self.minutes[c].tobytes()
        self._ring_dirty[:] = 0
        self._close_dirty[:] = 0
        self._registry_dirty = self._all_contracts_dirty = False
        return fields

    @classmethod
    def restore(cls, config: Config, fields: dict[str, bytes]) -> Self:
        """State from its committed fields; an empty dict is a cold start.

        Raises ConfigError when `max_lateness_sec` differs from what the state was made with.
        """
        state = cls(config)
        if "registry" not in fields:
            return state
        registry = msgspec.json.decode(fields["registry"], type=Registry)
        if registry.version > STATE_VERSION or registry.lateness_sec != config.max_lateness_sec:
            raise ConfigError(
                f"the bus holds aggregate state of version {registry.version} with max_lateness_seconds "
                f"{registry.lateness_sec}; this program has {STATE_VERSION} and {config.max_lateness_sec}: "
                "put the setting back or use another namespace"
            )
        state.registry = registry
        state.feeds = np.frombuffer(fields["feeds"], FEED).copy()
        state.roots = np.frombuffer(fields["roots"], ROOT).copy()
        state.gaps = np.frombuffer(fields["gaps"], GAP).copy()
        counted = msgspec.json.decode(fields["counters"], type=dict[str, int])
        state.counters[:] = [counted.get(name, 0) for name in COUNTERS]
        n, k = len(registry.contracts), len(registry.roots)
        state.contracts = np.zeros(n, CONTRACT)
        state.minutes = np.zeros((n, MINUTES), MINUTE)
        state.ring = np.zeros((n, state.size), SUMMARY)
        state.ring["sec"] = state.ring["revision"] = NONE
        state.closes = np.zeros((k, state.size), CLOSED)
        state.closes["end_sec"] = state.closes["front"] = state.closes["revision"] = NONE
        state._ring_dirty = np.zeros((n, state.size // CHUNK), np.int8)
        state._close_dirty = np.zeros((k, state.size // CHUNK), np.int8)
        for name, body in fields.items():
            kind, _, rest = name.partition(":")
            if kind == "c":
                state.contracts[int(rest)] = np.frombuffer(body, CONTRACT, 1)[0]
                state.minutes[int(rest)] = np.frombuffer(body, MINUTE, offset=CONTRACT.itemsize)
            elif kind in ("s", "q"):
                row, chunk = (int(part) for part in rest.split(":"))
                target = state.ring if kind == "s" else state.closes
                target[row, chunk * CHUNK : (chunk + 1) * CHUNK] = np.frombuffer(body, target.dtype)
        state.roots["big_size"] = [config.big_trade.get(root, config.big_trade_default) for _, root in registry.roots]
        state._place_calendars()
        state._registry_dirty = state._all_contracts_dirty = False
        state._index()
        return state


def candled(instrument: Instrument) -> bool:
    """Futures and single-name instruments; options and spreads have no rolling candles."""
    return instrument.kind in CANDLED and not is_spread(instrument.symbol, instrument.kind, instrument.root)
