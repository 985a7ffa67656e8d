"""What a partition of the pressure stage remembers: the kernel's arrays and the names behind them.

Committed in pieces, those that changed: a field per contract that traded, per key and window slot, per 64
instruments, 64 keys or 64 waiting trades.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import msgspec
import numpy as np

from services.pressure import kernel
from services.pressure.layout import (
    CELL,
    CLOSE,
    CONTRACT,
    COUNTERS,
    DEFINED,
    FEED,
    HELD,
    IGNORED,
    KEY,
    MARKET,
    NEVER,
    NONE,
    PARAMS,
    PERPETUAL,
    PLAIN,
    SEEN,
    UNDEFINED,
    UNDERLYING,
    WAITING,
    slots,
)  # fmt: skip
from services.pressure.measures import Key
from shared.arrays import Growing, filled
from shared.calendar import joined
from shared.errors import ConfigError
from shared.frames import NS, TICK, Rows
from shared.instruments import feed_id, is_spread
from shared.messages import Instrument

STATE_VERSION = 1
CHUNK = 64


@dataclass(frozen=True, slots=True)
class Config:
    """What the messages depend on beside the tape. `sessions(venue, root)` gives rows of [open, close) ns."""

    sessions: Callable[[str, str], Rows]
    window_sec: int = 300
    max_lateness_sec: int = 120
    wait_sec: int = 60
    block_size: dict[str, float] = field(default_factory=dict)
    block_size_default: float = 100.0
    greeks: bool = True
    rate: float = 0.0


class Registry(msgspec.Struct):
    """The names behind the arrays' indices, and what the state was made with."""

    version: int = STATE_VERSION
    window_sec: int = 300
    lateness_sec: int = 120
    feeds: list[str] = []
    markets: list[tuple[str, str]] = []  # (venue, ticker)
    unders: list[str] = []


class Hole(NamedTuple):
    """Trades in [start_ns, end_ns) may be missing: of one symbol, or (empty) of the whole feed."""

    feed: str
    symbol: str
    start_ns: int
    end_ns: int


_CONTRACT = filled(
    CONTRACT, feed=NONE, market=NONE, under=NONE, key=NONE, multiplier=1.0, last_px=np.nan, previous_px=np.nan,
    quote_ns=NONE, bid_px=np.nan, ask_px=np.nan, run_ns=NONE,
)  # fmt: skip
_CHANGING = (CONTRACT.names or ())[7:]  # what trades and quotes change; the rest its definition says


class State:
    """Arrays, names and their committed form; `core` steps it."""

    contracts: Rows
    seen: Rows
    contract_dirty: Rows
    markets: Rows
    feeds: Rows
    unders: Rows
    closes: Rows
    keys: Rows
    cells: Rows
    cell_dirty: Rows

    def __init__(self, config: Config) -> None:
        self.config = config
        self.window_ns = config.window_sec * NS
        self.registry = Registry(window_sec=config.window_sec, lateness_sec=config.max_lateness_sec)
        held = slots(config.window_sec, config.max_lateness_sec)
        self._growing = {
            "contracts": Growing(CONTRACT, fill=_CONTRACT),
            "seen": Growing(SEEN, held + 1, fill=filled(SEEN, ns=NONE)),
            "contract_dirty": Growing(np.int8),
            "markets": Growing(MARKET), "feeds": Growing(FEED), "unders": Growing(UNDERLYING),
            "closes": Growing(CLOSE, held, fill=filled(CLOSE, win=NONE, revision=NONE)),
            "keys": Growing(KEY), "cells": Growing(CELL, held, fill=filled(CELL, win=NONE, revision=NONE)),
            "cell_dirty": Growing(np.int8, held),
        }  # fmt: skip
        for name in self._growing:
            self._extend(name, count=0)
        self.params = np.zeros(1, PARAMS)
        self.params[0] = (self.window_ns, config.max_lateness_sec * NS, config.wait_sec * NS)
        self.sessions = np.zeros((0, 2), np.int64)
        self.waiting = np.zeros(WAITING, TICK)
        self.waits = np.zeros((WAITING, 2), np.int64)
        self.queue = np.array([0, NEVER], np.int64)
        self.counters = np.zeros(len(COUNTERS), np.int64)
        self.pause = np.zeros(3, np.int64)
        self.holes: list[Hole] = []
        self.instruments: list[Instrument] = []
        self.key_names: list[Key] = []
        self._by_id: dict[int, int] = {}
        self._key_index: dict[Key, int] = {}
        self._holders: dict[Key, list[int]] = {}  # contracts of each key, as defined
        self._strikes: dict[tuple[str, int], list[float]] = {}  # (underlying, expiration) -> sorted
        self._perpetuals: dict[str, list[int]] = {}  # root -> contracts
        self._table_key = np.zeros(CHUNK, np.int64)
        self._table_value = np.full(CHUNK, NONE, np.int64)
        self._arrays: kernel.Arrays | None = None
        self._unwatched = False
        self._registry_dirty = True
        self._instruments_dirty: set[int] = set()
        self._keys_dirty: set[int] = set()
        self._waits_clean = 0  # so many waiting trades, the first ones, are committed as they are
        self._committed: dict[str, bytes] = {}

    def _extend(self, *names: str, count: int = 1) -> None:
        for name in names:
            self._growing[name].extend(count)
            setattr(self, name, self._growing[name].rows)
        self._arrays = None

    def _bind(self) -> kernel.Arrays:
        """The kernel's view of the arrays, made anew when one of them was replaced."""
        if self._arrays is None:
            self._arrays = kernel.Arrays(
                self.params, self.feeds, self.markets, self.sessions, self.contracts, self.seen, self.unders,
                self.closes, self.cells, self._table_key, self._table_value, self.waiting, self.waits, self.queue,
                self.counters, self.pause, self.contract_dirty, self.cell_dirty,
            )  # fmt: skip
        return self._arrays

    # -- definitions -------------------------------------------------------------------------

    def _define(self, instrument: Instrument) -> bool:
        """Enter or change an instrument; whether anything is new."""
        c = self._by_id.get(instrument.id)
        if c is None:
            c = len(self.instruments)
            self.instruments.append(instrument)
            self._extend("contracts", "seen", "contract_dirty")
            self._index(c)
        elif instrument == self.instruments[c]:
            return False
        else:
            self._forget_names(c)
            self.instruments[c] = instrument
            self.contract_dirty[c] = 1
        self._instruments_dirty.add(c // CHUNK)
        self._place(c)
        return True

    def _index(self, first: int) -> None:
        """Contracts from `first` on are found by their ids."""
        size = len(self._table_key)
        if 2 * len(self.instruments) > size:
            while 4 * len(self.instruments) > size:
                size *= 2
            self._table_key, self._table_value = np.zeros(size, np.int64), np.full(size, NONE, np.int64)
            first = 0
            self._arrays = None
        some = self.instruments[first:]
        self._by_id.update((i.id, first + n) for n, i in enumerate(some))
        kernel.put(self._table_key, self._table_value, np.array([i.id for i in some], np.int64), first)

    def _place(self, c: int) -> None:
        """What its definition says, into its row and the look-ups."""
        i, contract = self.instruments[c], self.contracts[c]
        contract["id"], contract["sort"] = i.id, sort_of(i)
        if contract["sort"] == IGNORED:
            contract["feed"] = contract["under"] = contract["key"] = NONE
            return
        contract["feed"] = self._feed(i.feed)
        contract["market"] = self._market((i.venue, i.ticker or i.root), int(contract["feed"]))
        if contract["sort"] == PERPETUAL:
            insort(self._perpetuals.setdefault(i.root, []), c)
        key = key_of(i)
        if key is None:
            contract["under"] = contract["key"] = NONE
            return
        contract["under"] = self._under(i.root, int(contract["feed"]))
        contract["multiplier"] = i.multiplier if i.multiplier is not None and 0 < i.multiplier < 1e15 else 1.0
        contract["key"] = self._key_index.get(key, NONE)
        insort(self._holders.setdefault(key, []), c)
        strikes = self._strikes.setdefault((key.underlying, key.expiration_ns), [])
        if key.strike not in strikes:
            insort(strikes, key.strike)

    def _forget_names(self, c: int) -> None:
        """An instrument is about to be defined anew."""
        old = self.instruments[c]
        self.contracts[c]["run_ns"] = NONE
        if c in self._perpetuals.get(old.root, ()):
            self._perpetuals[old.root].remove(c)
        key = key_of(old)
        if key is None:
            return
        self._holders[key].remove(c)
        other = key._replace(kind="P" if key.kind == "C" else "C")
        if not self._holders[key] and not self._holders.get(other):
            self._strikes[key.underlying, key.expiration_ns].remove(key.strike)

    def _add_key(self, c: int) -> None:
        """Contract `c` trades for the first time: the key that it is summed up in."""
        key = key_of(self.instruments[c])
        assert key is not None
        k = self._key_index.get(key)
        if k is None:
            k = len(self.key_names)
            self._name_key(key)
            self._extend("keys", "cells", "cell_dirty")
            self.keys[k] = (self.contracts[c]["under"], key.expiration_ns, key.strike, ord(key.kind))
            self._keys_dirty.add(k // CHUNK)
        self.contracts[c]["key"] = k
        self.contract_dirty[c] = 1

    def _name_key(self, key: Key) -> None:
        self._key_index[key] = len(self.key_names)
        self.key_names.append(key)

    def _feed(self, name: str) -> int:
        if name not in self.registry.feeds:
            self.registry.feeds.append(name)
            self._extend("feeds")
            self.feeds[-1] = (feed_id(name), NONE, 0, NONE, NEVER, NEVER)
            self._registry_dirty = self._unwatched = True
        return self.registry.feeds.index(name)

    def _market(self, name: tuple[str, str], f: int) -> int:
        if name not in self.registry.markets:
            self.registry.markets.append(name)
            self._extend("markets")
            watermark = int(self.feeds[f]["watermark_ns"])
            self.markets[-1] = (f, 0, 0, 0, 0, NONE if watermark == NONE else watermark // NS)
            self._registry_dirty = True
            self._place_calendars()
        return self.registry.markets.index(name)

    def _under(self, name: str, f: int) -> int:
        if name not in self.registry.unders:
            self.registry.unders.append(name)
            self._extend("unders", "closes")
            self.unders[-1] = (f, self._block_size(name))
            self._registry_dirty = True
        return self.registry.unders.index(name)

    def _block_size(self, root: str) -> float:
        return self.config.block_size.get(root, self.config.block_size_default)

    def _place_calendars(self) -> None:
        """One copy of each calendar in `sessions`; every market points at its rows."""
        self.sessions, spans = joined(self.config.sessions(venue, root) for venue, root in self.registry.markets)
        for m, span in enumerate(spans):
            self.markets[m]["calendar_from"], self.markets[m]["calendar_to"] = span
        self._arrays = None

    # -- the committed form ------------------------------------------------------------------

    def changes(self) -> dict[str, bytes]:
        """Fields of the committed state that changed since the last call."""
        small = {
            "feeds": self.feeds.tobytes(), "markets": self.markets.tobytes(), "unders": self.unders.tobytes(),
            "closes": self.closes.tobytes(), "queue": self.queue.tobytes(),
            "gaps": msgspec.json.encode(self.holes),
            "counters": msgspec.json.encode(dict(zip(COUNTERS, self.counters.tolist(), strict=True))),
        }  # fmt: skip
        fields = {name: body for name, body in small.items() if self._committed.get(name) != body}
        self._committed.update(fields)
        if self._registry_dirty:
            fields["registry"] = msgspec.json.encode(self.registry)
        for j in sorted(self._instruments_dirty):
            fields[f"i:{j}"] = msgspec.json.encode(self.instruments[j * CHUNK : (j + 1) * CHUNK])
        for j in sorted(self._keys_dirty):
            fields[f"n:{j}"] = self.keys[j * CHUNK : (j + 1) * CHUNK].tobytes()
        for c in np.flatnonzero(self.contract_dirty):
            fields[f"c:{c}"] = self.contracts[c].tobytes() + self.seen[c].tobytes()
        for k, s in np.argwhere(self.cell_dirty):
            fields[f"k:{k}:{s}"] = self.cells[k, s].tobytes()
        held = int(self.queue[HELD])
        for j in range(self._waits_clean // CHUNK, -(-held // CHUNK)):
            part = slice(j * CHUNK, min((j + 1) * CHUNK, held))
            fields[f"w:{j}"] = self.waiting[part].tobytes() + self.waits[part].tobytes()
        self._waits_clean = held
        self.contract_dirty[:] = 0
        self.cell_dirty[:] = 0
        self._instruments_dirty.clear()
        self._keys_dirty.clear()
        self._registry_dirty = False
        return fields

    @classmethod
    def restore(cls, config: Config, fields: dict[str, bytes]) -> Self:
        """State from its committed fields; an empty dict is a cold start.

        Raises ConfigError when it was made by another version or with other settings.
        """
        state = cls(config)
        if "registry" not in fields:
            return state
        made = msgspec.json.decode(fields["registry"], type=Registry)
        if (made.version, made.window_sec, made.lateness_sec) != (
            STATE_VERSION, config.window_sec, config.max_lateness_sec
        ):  # fmt: skip
            raise ConfigError(
                f"the bus holds pressure state of version {made.version} (this program: {STATE_VERSION}) with "
                f"pressure.window_seconds {made.window_sec} and aggregate.max_lateness_seconds {made.lateness_sec}: "
                "put the settings back, or use another namespace"
            )
        state._read(made, fields)
        return state

    def _read(self, registry: Registry, fields: dict[str, bytes]) -> None:
        self.registry = registry
        for names, dtype in (("feeds", FEED), ("markets", MARKET), ("unders", UNDERLYING)):
            rows = np.frombuffer(fields[names], dtype)
            self._extend(names, count=len(rows))
            getattr(self, names)[:] = rows
        self._extend("closes", count=len(registry.unders))
        self.closes[:] = np.frombuffer(fields["closes"], CLOSE).reshape(self.closes.shape)
        self.unders["block_size"] = [self._block_size(name) for name in registry.unders]
        self._place_calendars()
        self.queue[:] = np.frombuffer(fields["queue"], np.int64)
        counted = msgspec.json.decode(fields["counters"], type=dict[str, int])
        self.counters[:] = [counted.get(name, 0) for name in COUNTERS]
        self.holes = [Hole(*hole) for hole in msgspec.json.decode(fields["gaps"], type=list[tuple[str, str, int, int]])]
        keys = [np.frombuffer(body, KEY) for body in _chunks(fields, "n")]
        self._extend("keys", "cells", "cell_dirty", count=sum(map(len, keys)))
        if keys:
            self.keys[:] = np.concatenate(keys)
        for under, expiration, strike, kind in self.keys.tolist():
            self._name_key(Key(registry.unders[under], expiration, strike, chr(kind)))
        for body in _chunks(fields, "i"):
            self.instruments += msgspec.json.decode(body, type=list[Instrument])
        self._extend("contracts", "seen", "contract_dirty", count=len(self.instruments))
        self._index(0)
        for c in range(len(self.instruments)):
            self._place(c)
        held = int(self.queue[HELD])
        for name, body in fields.items():
            kind, _, rest = name.partition(":")
            if kind == "c":
                stored = np.frombuffer(body, CONTRACT, 1)
                for column in _CHANGING:
                    self.contracts[column][int(rest)] = stored[column][0]
                self.seen[int(rest)] = np.frombuffer(body, SEEN, offset=CONTRACT.itemsize)
            elif kind == "k":
                k, s = (int(part) for part in rest.split(":"))
                self.cells[k, s] = np.frombuffer(body, CELL)[0]
            elif kind == "w" and int(rest) * CHUNK < held:
                at, n = int(rest) * CHUNK, len(body) // (TICK.itemsize + 16)
                self.waiting[at : at + n] = np.frombuffer(body, TICK, n)
                self.waits[at : at + n] = np.frombuffer(body, np.int64, offset=n * TICK.itemsize).reshape(n, 2)
        self._waits_clean = held
        self._unwatched = bool((self.feeds["watched_ns"] == NONE).any())
        self._registry_dirty = False


def _chunks(fields: dict[str, bytes], kind: str) -> list[bytes]:
    numbers = sorted(int(name[2:]) for name in fields if name.startswith(f"{kind}:"))
    return [fields[f"{kind}:{n}"] for n in numbers]


def sort_of(i: Instrument) -> int:
    """What it is to this stage. A definition that is still to come shows in a symbol with a space (`ESZ6 C5000`)."""
    if is_spread(i.symbol, i.kind, i.root):
        return IGNORED
    if i.kind in ("C", "P"):
        return DEFINED if _is_option(i) else UNDEFINED
    if i.kind == "?":
        return UNDEFINED if " " in i.symbol else PLAIN
    return PERPETUAL if i.kind == "F" and i.expiration_ns is None and ":" in i.root else PLAIN


def _is_option(i: Instrument) -> bool:
    return i.expiration_ns is not None and i.strike is not None and math.isfinite(i.strike)


def key_of(i: Instrument) -> Key | None:
    """What its trades are summed up under; None for what is no defined option."""
    if sort_of(i) != DEFINED:
        return None
    assert i.expiration_ns is not None
    assert i.strike is not None
    return Key(i.root, i.expiration_ns, i.strike, i.kind)
