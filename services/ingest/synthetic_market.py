"""A believable market that is a pure function of its seed and the time: no state, no clock.

Time is cut into blocks counted from 1970; each block's trades come from a generator of their own,
and prices at the blocks' edges from noise over absolute time. So any block can be made alone, and
a market looks the same at 14:31 whenever it was started.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.ingest.normalize import RECORD
from shared.calendar import EQUITY_INDEX
from shared.calendar import sessions as market_hours
from shared.frames import NS
from shared.instruments import MONTH_CODES, instrument_id
from shared.messages import Instrument

DAY = 86_400 * NS
LATENCY_NS = 150_000  # the least time from event to receipt
ROLL_BEFORE_EXPIRY = 8 * DAY
QUIET_SLOT_SECONDS = 7200
SPREAD_SHARE, EQUAL_SHARE, SWEEP_SHARE, NO_SIDE_SHARE, BURST_SHARE = 0.01, 0.005, 0.15, 0.01, 0.04
OCTAVES = 15  # from a minute to eleven days
MONTH = 30 * DAY


@dataclass(frozen=True, slots=True)
class Product:
    """What is typical of a root. `tick` in price units, `walk` in ticks per root of a second, `clip` the
    typical size, `basis` ticks a month of carry; a `thin` product has long quiet stretches."""

    root: str
    tick: float
    level: float
    weight: float
    months: str
    walk: float
    clip: float = 1.0
    basis: float = 8.0
    thin: bool = False


_TABLE = (
    Product("ES", 0.25, 5200, 10, "HMUZ", 0.7, 1.2, 60),
    Product("NQ", 0.25, 18_200, 7, "HMUZ", 2.2, 0.8, 200),
    Product("CL", 0.01, 79, 4, "FGHJKMNQUVXZ", 0.5, 1.0, -30),
    Product("GC", 0.1, 2330, 3, "GJMQVZ", 0.6, 1.0, 90),
    Product("ZN", 1 / 64, 109.5, 3, "HMUZ", 0.08, 8.0, 2),
    Product("6E", 0.00005, 1.078, 2, "HMUZ", 0.12, 1.5, 20),
    Product("NG", 0.001, 2.25, 1.5, "FGHJKMNQUVXZ", 0.2, 3.0, 40, thin=True),
    Product("RTY", 0.1, 2050, 1.5, "HMUZ", 0.5, 0.9, 60, thin=True),
    Product("YM", 1.0, 39_000, 1.2, "HMUZ", 0.6, 0.8, 120, thin=True),
    Product("SI", 0.005, 28, 0.8, "HKNUZ", 0.3, 1.0, 15, thin=True),
    Product("HG", 0.0005, 4.6, 0.7, "HKNUZ", 0.3, 1.0, 15, thin=True),
    Product("ZB", 1 / 32, 116, 0.7, "HMUZ", 0.1, 4.0, 2, thin=True),
)
PRODUCTS = {product.root: product for product in _TABLE}


@dataclass(frozen=True, slots=True)
class Contract:
    """An outright (`far` None) or the calendar spread to `far`. `native` is its id on the wire."""

    symbol: str
    root: str
    native: int
    expiry_ns: int
    tick: float
    far: Contract | None = None

    def instrument(self, venue: str, feed: str) -> Instrument:
        """As it is published."""
        return Instrument(
            instrument_id(venue, self.symbol), venue, self.symbol, self.root, feed,
            kind="S" if self.far else "F", expiration_ns=self.expiry_ns, tick_size=self.tick,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class MarketOptions:
    """`rate`: trades a second over all roots, on average. `sessions`: no trades outside the hours of CME Globex.
    `roll_ns`: when the front contract of `from_ns` gives way (None: eight days before expiry)."""

    seed: int = 1
    roots: tuple[str, ...] = ("ES", "NQ", "CL")
    rate: float = 50.0
    contracts: int = 2
    sessions: bool = False
    late_fraction: float = 0.0
    late_seconds: float = 0.0
    from_ns: int = 0
    roll_ns: int | None = None


class SyntheticMarket:
    """Trades with the BBO before each, as RECORD arrays in order of receipt, block by block."""

    def __init__(self, options: MarketOptions) -> None:
        self.options = options
        # A block is work enough for an array, and never too much for the memory.
        self.block_ns = (60 if options.rate <= 2000 else 10 if options.rate <= 20_000 else 1) * NS
        self.products = [PRODUCTS.get(r, Product(r, 0.01, 100, 1, "HMUZ", 0.3)) for r in options.roots]
        self._weight = sum(p.weight for p in self.products)
        self._hours = market_hours(EQUITY_INDEX) if options.sessions else None
        self._rolling = {p.root: self._chain(p, options.from_ns)[0] for p in self.products}

    # -- instruments -------------------------------------------------------------------------

    def contracts(self, at_ns: int) -> list[Contract]:
        """Outrights and spreads that are listed on the UTC day of `at_ns`, by root and expiry."""
        found: list[Contract] = []
        for product in self.products:
            chain = self._chain(product, at_ns)
            found += chain
            found += [_spread(a, b) for a, b in pairwise(chain)]
        return found

    def _chain(self, product: Product, at_ns: int) -> list[Contract]:
        return _chain(product, at_ns // DAY, self.options.contracts)

    def _shares(self, chain: list[Contract], at_ns: int) -> NDArray[np.float64]:
        """How the volume of a root is spread over its contracts at an instant."""
        left, shares = 1.0, []
        for contract in chain[:-1]:
            roll, width = contract.expiry_ns - ROLL_BEFORE_EXPIRY, 0.4 * DAY
            if self.options.roll_ns is not None and contract == self._rolling[contract.root]:
                roll, width = self.options.roll_ns, max(NS, 0.08 * (self.options.roll_ns - self.options.from_ns))
            gone = 1 / (1 + np.exp(-np.clip((at_ns - roll) / width, -40, 40)))
            shares.append(left * (1 - gone))
            left *= gone
        # Nobody trades nothing: every listed contract has its trickle.
        weights = 0.97 * np.array([*shares, left]) + 0.03 / len(chain)
        return np.asarray(weights / weights.sum())

    # -- blocks ------------------------------------------------------------------------------

    def index(self, at_ns: int) -> int:
        """The block that an instant lies in."""
        return at_ns // self.block_ns

    def blocks(self, first: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """(index, records) without end, empty blocks too."""
        while True:
            yield first, self.block(first)
            first += 1

    def open_seconds(self, start_ns: int, end_ns: int) -> float:
        """Market time in an interval, for what it takes to have so many trades."""
        if self._hours is None:
            return (end_ns - start_ns) / NS
        inside = np.minimum(self._hours[:, 1], end_ns) - np.maximum(self._hours[:, 0], start_ns)
        return float(inside[inside > 0].sum() / NS)

    def block(self, index: int) -> NDArray[Any]:
        """All records received in [index, index + 1) * block_ns + LATENCY_NS."""
        start = index * self.block_ns
        if self._hours is not None and not self.open_seconds(start, start + self.block_ns):
            return np.empty(0, RECORD)
        pieces = [self._root(k, product, index) for k, product in enumerate(self.products)]
        rows = np.concatenate(pieces)
        rows = rows[np.argsort(rows["ts_event"], kind="stable")]
        n = len(rows)
        if not n:
            return rows
        rng = self._rng(index, 255)
        received = rows["ts_event"] + LATENCY_NS + (rng.exponential(60_000, n)).astype(np.int64)
        rows["ts_recv"] = np.minimum(np.maximum.accumulate(received), start + self.block_ns - 1 + LATENCY_NS)
        rows["ts_in_delta"] = 14_000 + rng.integers(0, 3000, n)
        rows["sequence"] = (index * 1_000_003 + np.arange(n) * 3) & 0xFFFF_FFFF
        if self.options.late_fraction > 0:
            late = rng.random(n) < self.options.late_fraction
            rows["ts_event"][late] -= (rng.random(int(late.sum())) * self.options.late_seconds * NS).astype(np.int64)
        return np.repeat(rows, 1 + (rng.random(n) < EQUAL_SHARE))

    def _rng(self, index: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.options.seed & 0xFFFF_FFFF, stream, index])

    def _root(self, k: int, product: Product, index: int) -> NDArray[Any]:
        """A root's records of a block, in order of ts_event; without times of receipt and sequences."""
        rng, start = self._rng(index, k), index * self.block_ns
        times = self._arrivals(product, rng, start)
        n = len(times)
        rows = np.zeros(n, RECORD)
        if not n:
            return rows
        chain = self._chain(product, start)
        which = np.searchsorted(np.cumsum(self._shares(chain, start)), rng.random(n)).clip(0, len(chain) - 1)
        months = np.array([(c.expiry_ns - start) / MONTH for c in chain])
        mid = self._path(product, rng, times, start) + (product.basis * months)[which]
        is_spread = (rng.random(n) < SPREAD_SHARE) & (which < len(chain) - 1)
        if is_spread.any():
            mid[is_spread] = 1000 + product.basis * np.diff(months)[which[is_spread]]
        natives = np.array([c.native for c in chain] + [_spread(a, b).native for a, b in pairwise(chain)])
        rows["instrument_id"] = natives[np.where(is_spread, len(chain) + which, which)]
        rows["length"], rows["rtype"], rows["publisher_id"], rows["action"] = 20, 1, 1, ord("T")
        rows["ts_event"] = times
        rows["flags"] = 0
        self._quotes(product, rng, rows, mid)
        return rows

    def _arrivals(self, product: Product, rng: np.random.Generator, start: int) -> NDArray[np.int64]:
        """Clustered times within the block: moods over minutes, bursts, echoes of trades, sweeps at one instant."""
        seconds = self.block_ns / NS
        mood = 0.6 * self._noise(product.root, 90, start / NS, 240) + 0.35 * self._noise(
            product.root, 91, start / NS, 1800
        )
        hour = (start // (3600 * NS)) % 24
        day = 1.25 if 13 <= hour < 21 else 0.9
        rate = self.options.rate * product.weight / self._weight * day * float(np.exp(mood - 0.42))
        if rng.random() < BURST_SHARE:
            rate *= 4
        echoes = 2.0
        parents = rng.integers(0, self.block_ns, rng.poisson(rate * seconds / (1 + echoes)))
        children = rng.geometric(1 / (1 + echoes), len(parents)) - 1
        delay = rng.exponential(1.0, int(children.sum())) * np.repeat(
            10 ** rng.uniform(-3, 0.3, len(parents)), children
        )
        offsets = np.concatenate((parents, np.repeat(parents, children) + (delay * NS).astype(np.int64)))
        offsets = np.sort(offsets % self.block_ns)
        sweep = rng.random(len(offsets)) < SWEEP_SHARE
        offsets = np.maximum.accumulate(np.where(sweep, 0, offsets))
        times: NDArray[np.int64] = start + offsets
        return times[self._open(product, times)]

    def _open(self, product: Product, times: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Within market hours, and outside a thin product's quiet stretch (one of over 300 s every two hours)."""
        keep = np.ones(len(times), np.bool_)
        if product.thin and len(times):
            slot = int(times[0]) // (QUIET_SLOT_SECONDS * NS)
            length = 330 + 210 * _uniform(self.options.seed, product.root, 92, slot)
            begin = (QUIET_SLOT_SECONDS - length) * _uniform(self.options.seed, product.root, 93, slot)
            at = (times - slot * QUIET_SLOT_SECONDS * NS) / NS
            keep &= (at < begin) | (at >= begin + length)
        if self._hours is not None:
            row = np.searchsorted(self._hours[:, 0], times, side="right") - 1
            keep &= (row >= 0) & (times < self._hours[row, 1])
        return keep

    def _path(
        self, product: Product, rng: np.random.Generator, times: NDArray[np.int64], start: int
    ) -> NDArray[np.float64]:
        """The root's middle in ticks: a bridge between the noise at the block's edges."""
        edges = [self._middle(product, (start + e) / NS) for e in (0, self.block_ns)]
        at = (times - start) / self.block_ns
        steps = rng.standard_normal(len(times) + 1) * np.sqrt(np.diff(at, prepend=0, append=1))
        walk = np.cumsum(steps)
        bridge = walk[:-1] - walk[-1] * at
        scale = product.walk * float(np.sqrt(self.block_ns / NS))
        path: NDArray[np.float64] = edges[0] + (edges[1] - edges[0]) * at + scale * bridge
        return path

    def _middle(self, product: Product, at: float) -> float:
        total = product.level / product.tick
        for k in range(OCTAVES):
            period = 60.0 * 2**k
            total += 0.5 * product.walk * period**0.5 * self._noise(product.root, k, at, period)
        return total

    def _noise(self, root: str, stream: int, at: float, period: float) -> float:
        """Smooth noise of about unit variance over time."""
        cell = int(at // period)
        f = at / period - cell
        s = f * f * (3 - 2 * f)
        seed = self.options.seed
        return _normal(seed, root, stream, cell) * (1 - s) + _normal(seed, root, stream, cell + 1) * s

    def _quotes(self, product: Product, rng: np.random.Generator, rows: NDArray[Any], mid: NDArray[np.float64]) -> None:
        """Book before each trade, aggressor, price and sizes. Prices are whole ticks."""
        n = len(rows)
        width = 1 + np.searchsorted([0.88, 0.98] if not product.thin else [0.5, 0.85], rng.random(n), side="right")
        bid = np.floor(mid - (width - 1) / 2).astype(np.int64)
        ask = bid + width
        # Aggressors come in runs, and push with the price.
        leaning = np.repeat(rng.normal(0, 0.8, n // 12 + 1), 12)[:n] + 0.5 * np.sign(np.diff(mid, prepend=mid[0]))
        buys = rng.random(n) < 1 / (1 + np.exp(-leaning))
        dice = rng.random(n)
        none = dice < NO_SIDE_SHARE
        inside = (width > 1) & (dice < 0.2)
        price = np.where(inside, bid + (width + 1) // 2, np.where(buys, ask, bid))
        unit = round(product.tick * NS)
        rows["price"], rows["bid_px"], rows["ask_px"] = price * unit, bid * unit, ask * unit
        rows["side"] = np.where(none, ord("N"), np.where(buys, ord("B"), ord("A")))
        rows["size"] = np.minimum(1 + product.clip * rng.pareto(1.3, n) * 0.9, 1500).astype(np.uint32)
        depth = 12 * product.clip
        for side in ("bid", "ask"):
            size = 1 + depth * rng.standard_exponential(n, np.float32)
            rows[f"{side}_sz"] = size.astype(np.uint32)
            rows[f"{side}_ct"] = 1 + (size / (1.5 * product.clip)).astype(np.uint32)


def _uniform(seed: int, root: str, stream: int, cell: int) -> float:
    digest = blake2b(f"{seed}/{root}/{stream}/{cell}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


@lru_cache(maxsize=1 << 14)
def _normal(seed: int, root: str, stream: int, cell: int) -> float:
    """Near enough to normal: the sum of four uniforms."""
    digest = blake2b(f"{seed}/{root}/{stream}/{cell}".encode(), digest_size=8).digest()
    return sum(int.from_bytes(digest[i : i + 2], "big") / 65536 - 0.5 for i in range(0, 8, 2)) * 3**0.5


@lru_cache(maxsize=1 << 10)
def _chain(product: Product, day: int, count: int) -> list[Contract]:
    """The first `count` contracts that have not expired on a day."""
    date = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=day)
    found: list[Contract] = []
    year, month = date.year, date.month
    while len(found) < count:
        code = MONTH_CODES[month - 1]
        expiry = _third_friday(year, month)
        if code in product.months and expiry >= (day + 1) * DAY:
            found.append(
                Contract(f"{product.root}{code}{year % 10}", product.root, _native(product.root, year, month), expiry,
                         product.tick)
            )  # fmt: skip
        year, month = (year + 1, 1) if month == 12 else (year, month + 1)
    return found


def _third_friday(year: int, month: int) -> int:
    first = datetime(year, month, 1, 13, 30, tzinfo=UTC)
    return int((first + timedelta(days=(4 - first.weekday()) % 7 + 14)).timestamp()) * NS


def _native(root: str, year: int, month: int) -> int:
    """A 32-bit id as a venue gives, the same in every run."""
    of_root = int.from_bytes(blake2b(root.encode(), digest_size=3).digest(), "big") >> 6
    return of_root * 8192 + (year % 100) * 12 + month


def _spread(near: Contract, far: Contract) -> Contract:
    return Contract(
        f"{near.symbol}-{far.symbol}", near.root, near.native + 4096, near.expiry_ns, near.tick, far
    )  # fmt: skip
