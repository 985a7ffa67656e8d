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
from services.aggregate.ladder import ladder
from services.aggregate.layout import (
    BAR,
    CACHE,
    CHUNK,
    CLOSED,
    CONTRACT,
    COUNTERS,
    ENTITY,
    FEATURE_STATE,
    FEED,
    GAP,
    MINUTE,
    MINUTES,
    NEVER,
    NONE,
    PARAMS,
    ROOT,
    ROWS_FIXED,
    SUMMARY,
    ring_seconds,
)  # fmt: skip
from services.aggregate.sessions import warm_at
from shared.arrays import Growing, filled
from shared.calendar import joined
from shared.errors import ConfigError
from shared.frames import CANDLE, FIXED, NS, STATE_COLUMNS, Rows
from shared.instruments import feed_id, is_spread, option_series
from shared.messages import Instrument
from shared.timeframes import name_of

STATE_VERSION = 2
ROLLING = frozenset("FK?")  # kinds that have rolling candles; the others (options) have fixed ones only
OUT_ROWS = 16_384
TIMEFRAMES = (15, 60, 300, 900, 3600, 14_400, 86_400)


@dataclass(frozen=True, slots=True)
class Config:
    """What the rows depend on beside the tape. `sessions(venue, root)` gives rows of [open, close) ns."""

    sessions: Callable[[str, str], Rows]
    max_lateness_sec: int = 120
    quiet_sec: int = 300
    emit_1s: bool = True
    timeframes: tuple[int, ...] = TIMEFRAMES  # seconds
    carry: bool = False
    big_trade: dict[str, float] = field(default_factory=lambda: {"NG": 50.0})
    big_trade_default: float = 25.0


class Registry(msgspec.Struct):
    """The names behind the arrays' indices."""

    version: int = STATE_VERSION
    lateness_sec: int = 120
    timeframes: tuple[int, ...] = TIMEFRAMES
    carry: bool = False
    contracts: list[Instrument] = []
    roots: list[tuple[str, str]] = []  # (venue, ticker)
    feeds: list[str] = []
    ignored: list[int] = []

    def made_with(self, config: Config) -> bool:
        """Whether this program and these settings would have made the same state."""
        mine = (self.version, self.lateness_sec, self.timeframes, self.carry)
        return mine == (STATE_VERSION, config.max_lateness_sec, tuple(sorted(config.timeframes)), config.carry)


EMPTY_SECOND = filled(SUMMARY, sec=NONE, revision=NONE)
EMPTY_CLOSE = filled(CLOSED, end_sec=NONE, front=NONE, revision=NONE)
EMPTY_BAR = filled(BAR, sec=NONE, front=NONE, revision=NONE, book_ns=NONE, ticker_ns=NONE)
NO_STATE = dict.fromkeys(STATE_COLUMNS[:9], np.nan)


class State:
    """Arrays, registry and their committed form; `core` steps it."""

    contracts: Rows
    minutes: Rows
    ring: Rows
    roots: Rows
    closes: Rows
    entities: Rows
    bars: Rows
    features: Rows

    def __init__(self, config: Config) -> None:
        self.config = config
        wanted = tuple(sorted(config.timeframes))
        self.registry = Registry(lateness_sec=config.max_lateness_sec, timeframes=wanted, carry=config.carry)
        self.size = ring_seconds(config.max_lateness_sec)
        self.params = np.zeros(1, PARAMS)
        lateness = config.max_lateness_sec
        self.params[0] = (lateness * NS, config.quiet_sec, int(config.emit_1s), lateness, int(config.carry))
        self.timeframes, slots = ladder(wanted, lateness)
        featured = int((self.timeframes["feature"] != NONE).sum())
        self.feeds = np.zeros(0, FEED)
        self.gaps = np.zeros(0, GAP)
        self.sessions = np.zeros((0, 2), np.int64)
        self.counters = np.zeros(len(COUNTERS), np.int64)
        chunks = self.size // CHUNK
        self._growing = {
            "contracts": Growing(CONTRACT), "minutes": Growing(MINUTE, MINUTES, fill=filled(MINUTE, minute=NONE)),
            "contract_dirty": Growing(np.int8),
            "ring": Growing(SUMMARY, self.size, fill=EMPTY_SECOND), "ring_dirty": Growing(np.int8, chunks),
            "roots": Growing(ROOT), "closes": Growing(CLOSED, self.size, fill=EMPTY_CLOSE),
            "close_dirty": Growing(np.int8, chunks),
            "entities": Growing(ENTITY), "bars": Growing(BAR, slots, fill=EMPTY_BAR),
            "features": Growing(np.float64, featured, 2, FEATURE_STATE), "entity_dirty": Growing(np.int8),
            "bar_dirty": Growing(np.int8, slots), "feature_dirty": Growing(np.int8, featured),
        }  # fmt: skip
        for name in self._growing:
            self._extend(name, count=0)
        self._table: Rows | None = None
        self._registry_dirty = True
        self._all_contracts_dirty = True
        self._out_1m = np.zeros(OUT_ROWS, CANDLE)
        self._out_1s = np.zeros(OUT_ROWS, CANDLE)
        self._out_fixed = np.zeros(OUT_ROWS // 8, FIXED)
        self._late = np.zeros((1024, 2), np.int64)
        self._index()

    def _extend(self, *names: str, count: int = 1) -> None:
        for name in names:
            self._growing[name].extend(count)
            setattr(self, name, self._growing[name].rows)
        self._table = None

    def _bind(self) -> Rows:
        """The kernel's view of the arrays, made anew when one of them was replaced."""
        if self._table is None:
            k = len(self.roots)
            cache = np.zeros(k, CACHE)
            cache["contract"] = NONE
            rows = len(self.entities) * len(self.timeframes) + self.bars.shape[1]
            if rows > len(self._out_fixed):
                kept = int(self.counters[ROWS_FIXED])
                grown = np.zeros(2 * rows, FIXED)
                grown[:kept] = self._out_fixed[:kept]
                self._out_fixed = grown
            g = {name: growing.rows for name, growing in self._growing.items()}
            self._arrays = Arrays(
                self.feeds, self.contracts, self.ring, self.minutes, self.roots, self.closes, self.sessions, self.gaps,
                self._table_key, self._table_value, self.params, self._out_1m, self._out_1s, self.counters,
                g["ring_dirty"], g["close_dirty"], cache, np.zeros((k, WINDOW), SUMMARY), np.zeros(k, SUMMARY),
                np.zeros(2, SUMMARY), self.timeframes, self.entities, self.bars, self.features, self._out_fixed,
                np.zeros(1, FIXED), np.zeros((1, FEATURE_STATE)), g["contract_dirty"], g["entity_dirty"],
                g["bar_dirty"], g["feature_dirty"],
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
        key = (instrument.venue, ticker_of(instrument))
        if key not in self.registry.roots:
            self._add_root(key, f)
            self._seed(len(self.roots) - 1, key[1], seeds)
        k, c = self.registry.roots.index(key), len(self.contracts)
        self._extend("contracts", "minutes", "contract_dirty")
        contract = self.contracts[c : c + 1]
        contract["id"], contract["feed"], contract["root"] = instrument.id, f, k
        contract["expiry_ns"] = instrument.expiration_ns or 0
        contract["last_px"] = contract["previous_px"] = contract["bid_px"] = contract["ask_px"] = np.nan
        contract["next"] = contract["last_sec"] = contract["ring"] = contract["entity"] = contract["quote_ns"] = NONE
        contract["warm_sec"] = NEVER
        self.registry.contracts.append(instrument)
        if instrument.kind in ROLLING and not undefined_option(instrument):
            contract["next"], contract["ring"] = self.roots[k]["head"], len(self.ring)
            self.roots[k]["head"] = c
            self._extend("ring", "ring_dirty")
            self._add_entity(c, NONE)
            if not solo(instrument) and self.roots[k]["entity"] == NONE:
                self._add_entity(NONE, k)
        if self.feeds[f]["watched_ns"] != NONE:
            self._warm(c)
            self._seed_contract(c, seeds)
        self._by_id[instrument.id] = c
        self._registry_dirty = self._all_contracts_dirty = self._index_stale = True

    def _add_entity(self, contract: int, root: int) -> None:
        """Fixed candles for a contract (options get theirs at their first trade) or a continuous ticker."""
        e = len(self.entities)
        self._extend("entities", "bars", "features", "entity_dirty", "bar_dirty", "feature_dirty")
        owner = self.contracts[contract] if root == NONE else self.roots[root]
        owner["entity"] = e
        self.entities[e : e + 1] = filled(
            ENTITY, contract=contract, root=root, feed=owner["feed"], close=np.nan, **NO_STATE
        )
        self._growing["entity_dirty"].rows[e] = 1
        if root == NONE:
            self.entities[e]["cvd"] = owner["cvd_seed"]
            self._growing["contract_dirty"].rows[contract] = 1

    def _add_root(self, key: tuple[str, str], f: int) -> None:
        self.registry.roots.append(key)
        self._extend("roots", "closes", "close_dirty")
        root = self.roots[-1:]
        root["feed"], root["front"], root["head"], root["entity"] = f, NONE, NONE, NONE
        root["big_size"] = self.config.big_trade.get(key[1], self.config.big_trade_default)
        self._place_calendars()

    def _seed(self, k: int, root: str, seeds: dict[str, float]) -> None:
        """Go on from the newest stored CVD, once, when the root's feed begins to be watched."""
        watched = self.feeds[self.roots[k]["feed"]]["watched_ns"] != NONE
        if not self.roots[k]["seeded"] and (watched or root in seeds):
            self.roots[k]["cvd"] += seeds.get(root, 0.0)
            self.roots[k]["seeded"] = 1

    def _seed_contract(self, c: int, seeds: dict[str, float]) -> None:
        """The same for the CVD of a contract's own candles."""
        contract = self.contracts[c]
        if not contract["seeded"]:
            contract["cvd_seed"] = seeds.get(seed_name(self.registry.contracts[c]), 0.0)
            contract["seeded"] = 1
            self._growing["contract_dirty"].rows[c] = 1
            if contract["entity"] != NONE:
                self.entities[contract["entity"]]["cvd"] += contract["cvd_seed"]
                self._growing["entity_dirty"].rows[contract["entity"]] = 1

    def _warm(self, c: int) -> None:
        root = self.roots[self.contracts[c]["root"]]
        since = -(-int(self.feeds[self.contracts[c]["feed"]]["watched_ns"]) // NS)
        low, high = int(root["calendar_from"]), int(root["calendar_to"])
        self.contracts[c]["warm_sec"] = warm_at(self.sessions, low, high, since, WINDOW)

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
        self.sessions, spans = joined(self.config.sessions(venue, root) for venue, root in self.registry.roots)
        for k, span in enumerate(spans):
            self.roots[k]["calendar_from"], self.roots[k]["calendar_to"] = span
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
        longest = max(self.size, 2 * int(self.timeframes["seconds"].max()))
        keep = [g["end_ns"] >= (self.feeds[g["feed"]]["closed_sec"] - longest) * NS for g in self.gaps]
        if not all(keep):
            self.gaps = self.gaps[np.array(keep, bool)]
            self._table = None
        fields = {
            "feeds": self.feeds.tobytes(), "roots": self.roots.tobytes(), "gaps": self.gaps.tobytes(),
            "counters": msgspec.json.encode(dict(zip(COUNTERS, self.counters.tolist(), strict=True))),
        }  # fmt: skip
        if self._registry_dirty:
            fields["registry"] = msgspec.json.encode(self.registry)
        dirty = {name: growing.rows for name, growing in self._growing.items() if name.endswith("_dirty")}
        for name, prefix, array in (("ring_dirty", "s", self.ring), ("close_dirty", "q", self.closes)):
            for row, j in np.argwhere(dirty[name]):
                fields[f"{prefix}:{row}:{j}"] = array[row, j * CHUNK : (j + 1) * CHUNK].tobytes()
        every = range(len(self.contracts)) if self._all_contracts_dirty else np.flatnonzero(dirty["contract_dirty"])
        for c in every:
            fields[f"c:{c}"] = self.contracts[c].tobytes() + self.minutes[c].tobytes()
        for e in np.flatnonzero(dirty["entity_dirty"]):
            fields[f"e:{e}"] = self.entities[e].tobytes()
        for e, j in np.argwhere(dirty["bar_dirty"]):
            fields[f"b:{e}:{j}"] = self.bars[e, j].tobytes()
        for e, j in np.argwhere(dirty["feature_dirty"]):
            fields[f"f:{e}:{j}"] = self.features[e, j].tobytes()
        for flags in dirty.values():
            flags[:] = 0
        self._registry_dirty = self._all_contracts_dirty = False
        return fields

    @classmethod
    def restore(cls, config: Config, fields: dict[str, bytes]) -> Self:
        """State from its committed fields; an empty dict is a cold start.

        Raises ConfigError when it was made by another version or with other settings.
        """
        state = cls(config)
        if "registry" not in fields:
            return state
        registry = msgspec.json.decode(fields["registry"], type=Registry)
        if not registry.made_with(config):
            names = ",".join(map(name_of, registry.timeframes))
            raise ConfigError(
                f"the bus holds aggregate state of version {registry.version} (this program: {STATE_VERSION}) with "
                f"max_lateness_seconds {registry.lateness_sec}, timeframes {names} and empty_bars "
                f"{'carry' if registry.carry else 'skip'}: put the settings back, or use another namespace"
            )
        state.registry = registry
        state.feeds = np.frombuffer(fields["feeds"], FEED).copy()
        state.gaps = np.frombuffer(fields["gaps"], GAP).copy()
        counted = msgspec.json.decode(fields["counters"], type=dict[str, int])
        state.counters[:] = [counted.get(name, 0) for name in COUNTERS]
        state._extend("contracts", "minutes", "contract_dirty", count=len(registry.contracts))
        state._extend("roots", "closes", "close_dirty", count=len(registry.roots))
        state.roots[:] = np.frombuffer(fields["roots"], ROOT)
        for name in (n for n in fields if n.startswith("c:")):
            c, body = int(name[2:]), fields[name]
            state.contracts[c] = np.frombuffer(body, CONTRACT, 1)[0]
            state.minutes[c] = np.frombuffer(body, MINUTE, offset=CONTRACT.itemsize)
        held = max([*state.contracts["entity"], *state.roots["entity"]], default=NONE) + 1
        state._extend("entities", "bars", "features", "entity_dirty", "bar_dirty", "feature_dirty", count=int(held))
        state._extend("ring", "ring_dirty", count=int(max(state.contracts["ring"], default=NONE)) + 1)
        state._fill(fields)
        state.roots["big_size"] = [config.big_trade.get(root, config.big_trade_default) for _, root in registry.roots]
        state._place_calendars()
        state._registry_dirty = state._all_contracts_dirty = False
        state._index()
        return state

    def _fill(self, fields: dict[str, bytes]) -> None:
        for name, body in fields.items():
            kind, _, rest = name.partition(":")
            if kind == "e":
                self.entities[int(rest)] = np.frombuffer(body, ENTITY)[0]
            elif kind in ("s", "q", "b", "f"):
                row, j = (int(part) for part in rest.split(":"))
                if kind == "b":
                    self.bars[row, j] = np.frombuffer(body, BAR)[0]
                elif kind == "f":
                    self.features[row, j] = np.frombuffer(body, np.float64).reshape(2, -1)
                else:
                    target = self.ring if kind == "s" else self.closes
                    target[row, j * CHUNK : (j + 1) * CHUNK] = np.frombuffer(body, target.dtype)


def ticker_of(instrument: Instrument) -> str:
    """The continuous ticker that it competes for."""
    return instrument.ticker or instrument.root


def solo(instrument: Instrument) -> bool:
    """Whether it is its ticker's only contract by name: then its own candles are the ticker's."""
    return ticker_of(instrument) in (instrument.symbol, f"{instrument.venue}:{instrument.symbol}")


def seed_name(instrument: Instrument) -> str:
    """Under which name its newest stored CVD is asked for."""
    return ticker_of(instrument) if solo(instrument) else f"{instrument.venue}:{instrument.symbol}"


def undefined_option(instrument: Instrument) -> bool:
    """An option by its name, whose definition has not come: many strikes have one series."""
    return instrument.kind == "?" and option_series(instrument.symbol) is not None


def candled(instrument: Instrument) -> bool:
    """Everything but spreads and user-defined instruments."""
    return not is_spread(instrument.symbol, instrument.kind, instrument.root)
