"""A believable market that is a pure function of its seed and the time: no state, no clock.

Time is cut into blocks counted from 1970; each block's trades come from a generator of their own,
and prices at the blocks' edges from noise over absolute time. So any block can be made alone, and
a market looks the same at 14:31 whenever it was started.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.ingest.normalize import RECORD
from services.ingest.synthetic_chain import YEAR_SECONDS, Option, black_76, family, option, series_on
from services.ingest.synthetic_products import DAY, PRODUCTS, Contract, Product, chain, spread
from shared.calendar import EQUITY_INDEX
from shared.calendar import sessions as market_hours
from shared.frames import NS

LATENCY_NS = 150_000  # the least time from event to receipt
ROLL_BEFORE_EXPIRY = 8 * DAY
QUIET_SLOT_SECONDS = 7200
SPREAD_SHARE, EQUAL_SHARE, SWEEP_SHARE, NO_SIDE_SHARE, BURST_SHARE = 0.01, 0.005, 0.15, 0.01, 0.04
OCTAVES = 15  # from a minute to eleven days
MONTH = 30 * DAY
# Of options: strikes to either side of the money of the day, weights of the expiries, how long a key leans one way.
STRIKES = 8
EXPIRY_WEIGHTS = (0.4, 0.25, 0.2, 0.15)
LEANING_SECONDS = 600


@dataclass(frozen=True, slots=True)
class MarketOptions:
    """`rate`: trades a second over all roots, on average. `sessions`: no trades outside the hours of CME Globex.
    `roll_ns`: when the front contract of `from_ns` gives way (None: eight days before expiry). `option_share`: how
    many of the trades are of options; 0: no option is listed."""

    seed: int = 1
    roots: tuple[str, ...] = ("ES", "NQ", "CL")
    rate: float = 50.0
    contracts: int = 2
    sessions: bool = False
    late_fraction: float = 0.0
    late_seconds: float = 0.0
    from_ns: int = 0
    roll_ns: int | None = None
    option_share: float = 0.0


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
            found += [spread(a, b) for a, b in pairwise(chain)]
        return found

    def options_on(self, at_ns: int) -> list[Option]:
        """Options that are listed on the UTC day of `at_ns`."""
        if not self.options.option_share:
            return []
        return [o for product in self.products for ladder in self._listed(product, at_ns // DAY) for o in ladder]

    def _listed(self, product: Product, day: int) -> list[list[Option]]:
        """Of each series, by strike, the call before the put."""
        money = self._money(product, day)
        strikes = range(max(1, money - STRIKES), money + STRIKES + 1)
        return [[option(product, s, k, kind) for k in strikes for kind in "CP"] for s in series_on(product, day)]

    def _money(self, product: Product, day: int) -> int:
        """The strike (in steps) at the money when a day begins."""
        return round(self._middle(product, day * 86_400.0) * product.tick / family(product).step)

    def _chain(self, product: Product, at_ns: int) -> list[Contract]:
        return chain(product, at_ns // DAY, self.options.contracts)

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
        if self.options.option_share:
            pieces += [self._options(k, product, index) for k, product in enumerate(self.products)]
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
        times = self._arrivals(product, rng, start, 1 - self.options.option_share)
        n = len(times)
        rows = _blank(times)
        if not n:
            return rows
        chain = self._chain(product, start)
        which = np.searchsorted(np.cumsum(self._shares(chain, start)), rng.random(n)).clip(0, len(chain) - 1)
        months = np.array([(c.expiry_ns - start) / MONTH for c in chain])
        mid = self._path(product, rng, times, start) + (product.basis * months)[which]
        is_spread = (rng.random(n) < SPREAD_SHARE) & (which < len(chain) - 1)
        if is_spread.any():
            mid[is_spread] = 1000 + product.basis * np.diff(months)[which[is_spread]]
        natives = np.array([c.native for c in chain] + [spread(a, b).native for a, b in pairwise(chain)])
        rows["instrument_id"] = natives[np.where(is_spread, len(chain) + which, which)]
        self._quotes(product, rng, rows, mid)
        return rows

    def _options(self, k: int, product: Product, index: int) -> NDArray[Any]:
        """The option trades of a root in a block, in order of ts_event: near the money, nearer expiries more, each
        key bought or sold rather for a while."""
        rng, start = self._rng(index, 128 + k), index * self.block_ns
        ladders = [o for o in self._listed(product, start // DAY) if o[0].expiry_ns >= start + self.block_ns]
        times = self._arrivals(product, rng, start, self.options.option_share)
        n, rows = len(times), _blank(times)
        if not n:
            return rows
        of = family(product)
        levels = [self._middle(product, (start + e) / NS) * product.tick for e in (0, self.block_ns)]
        spot = levels[0] + (levels[1] - levels[0]) * (times - start) / self.block_ns
        spot += product.basis * product.tick * (ladders[0][0].future.expiry_ns - start) / MONTH
        weights = np.array(EXPIRY_WEIGHTS[: len(ladders)])
        series = rng.choice(len(ladders), n, p=weights / weights.sum())
        first = round(ladders[0][0].strike / of.step)
        place = np.round(spot / of.step + rng.normal(0, 2, n)).astype(np.int64) - first
        place = place.clip(0, len(ladders[0]) // 2 - 1)
        call = rng.random(n) < np.where((first + place) * of.step >= spot, 0.7, 0.3)
        which = 2 * place + ~call
        chosen = [ladders[s][w] for s, w in zip(series.tolist(), which.tolist(), strict=True)]
        rows["instrument_id"] = [o.native for o in chosen]
        years = np.maximum((np.array([o.expiry_ns for o in chosen]) - times) / NS, 60) / YEAR_SECONDS
        value = black_76(spot, np.array([o.strike for o in chosen]), years, of.vol, call)
        bid = np.maximum(1, np.floor(value / of.tick - 0.5)).astype(np.int64)
        ask = bid + 1 + rng.integers(0, 3, n)
        cell = start // (LEANING_SECONDS * NS)
        lean = {o.native: 2 * _uniform(self.options.seed, o.symbol, 95, cell) - 1 for o in chosen}
        buys = rng.random(n) < 0.5 + 0.45 * np.array([lean[o.native] for o in chosen]) ** 3
        unit = round(of.tick * NS)
        rows["price"], rows["bid_px"], rows["ask_px"] = np.where(buys, ask, bid) * unit, bid * unit, ask * unit
        rows["side"] = np.where(buys, ord("B"), ord("A"))
        rows["size"] = np.minimum(1 + rng.pareto(1.4, n) * 2, 400).astype(np.uint32)
        for side in ("bid", "ask"):
            rows[f"{side}_sz"] = 1 + rng.integers(0, 60, n)
            rows[f"{side}_ct"] = 1 + rng.integers(0, 6, n)
        return rows

    def _arrivals(self, product: Product, rng: np.random.Generator, start: int, share: float) -> NDArray[np.int64]:
        """Clustered times within the block: moods over minutes, bursts, echoes of trades, sweeps at one instant."""
        seconds = self.block_ns / NS
        mood = 0.6 * self._noise(product.root, 90, start / NS, 240) + 0.35 * self._noise(
            product.root, 91, start / NS, 1800
        )
        hour = (start // (3600 * NS)) % 24
        day = 1.25 if 13 <= hour < 21 else 0.9
        rate = share * self.options.rate * product.weight / self._weight * day * float(np.exp(mood - 0.42))
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


def _blank(times: NDArray[np.int64]) -> NDArray[Any]:
    rows = np.zeros(len(times), RECORD)
    rows["length"], rows["rtype"], rows["publisher_id"], rows["action"] = 20, 1, 1, ord("T")
    rows["ts_event"] = times
    return rows


def _uniform(seed: int, root: str, stream: int, cell: int) -> float:
    digest = blake2b(f"{seed}/{root}/{stream}/{cell}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


@lru_cache(maxsize=1 << 14)
def _normal(seed: int, root: str, stream: int, cell: int) -> float:
    """Near enough to normal: the sum of four uniforms."""
    digest = blake2b(f"{seed}/{root}/{stream}/{cell}".encode(), digest_size=8).digest()
    return sum(int.from_bytes(digest[i : i + 2], "big") / 65536 - 0.5 for i in range(0, 8, 2)) * 3**0.5
