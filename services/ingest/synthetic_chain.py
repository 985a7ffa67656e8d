"""Options on the synthetic futures: which series there are on a day, their names, and what an option is worth.

Series are named as at CME: options on the quarterly contract have the asset of the future or one of their own
(LO on CL), weeklies and dailies have assets with the week of the month (EW1, Q1A), and all of them end a
contract month and year. Expiry is at 20:00 UTC, that of quarterlies with their future.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.ingest.synthetic_products import DAY, PRODUCTS, Contract, Product, chain, third_friday
from shared.frames import NS
from shared.instruments import MONTH_CODES, instrument_id
from shared.messages import Instrument

YEAR_SECONDS = 365 * 86_400
EXPIRY_HOUR = 20


@dataclass(frozen=True, slots=True)
class Family:
    """The options of a product: `asset` of those that expire with the future, `friday` and `daily` (Monday to
    Thursday) those of the n-th week of a month, None: there are none. `step` between strikes, `vol` a year."""

    asset: str
    step: float
    tick: float
    vol: float
    friday: str | None = None
    daily: str | None = None


_FAMILIES = {
    "ES": Family("ES", 25, 0.05, 0.15, "EW{n}", "E{n}{d}"),
    "NQ": Family("NQ", 50, 0.05, 0.2, "QN{n}", "Q{n}{d}"),
    "CL": Family("LO", 0.5, 0.01, 0.35, "LO{n}"),
    "GC": Family("OG", 10, 0.1, 0.15, "OG{n}"),
    "ZN": Family("OZN", 0.25, 1 / 64, 0.07, "ZN{n}"),
    "6E": Family("EUU", 0.005, 0.00005, 0.08, "{n}EU"),
    "NG": Family("ON", 0.05, 0.001, 0.6, "LN{n}"),
    "RTY": Family("RTO", 10, 0.1, 0.22, "R{n}E"),
    "YM": Family("OYM", 100, 1.0, 0.14),
    "SI": Family("SO", 0.25, 0.005, 0.3),
    "HG": Family("HXE", 0.05, 0.0005, 0.25),
    "ZB": Family("OZB", 1, 1 / 64, 0.1),
}


@dataclass(frozen=True, slots=True)
class Series:
    """The options of one expiry, as `Q1AK4` on `NQM4`."""

    name: str
    asset: str
    expiry_ns: int
    future: Contract


@dataclass(frozen=True, slots=True)
class Option:
    """A call or put. `native` is its id on the wire; `root` that of its future."""

    symbol: str
    root: str
    native: int
    expiry_ns: int
    tick: float
    asset: str
    kind: str
    strike: float
    future: Contract
    multiplier: float

    def instrument(self, venue: str, feed: str, at_ns: int) -> Instrument:
        """As it is published; defined at `at_ns`."""
        return Instrument(
            instrument_id(venue, self.symbol), venue, self.symbol, self.root, feed, kind=self.kind,
            expiration_ns=self.expiry_ns, strike=self.strike, underlying=self.future.symbol,
            multiplier=self.multiplier, tick_size=self.tick, defined_ns=at_ns,
        )  # fmt: skip


def family(product: Product) -> Family:
    """That of a known product, or one that fits."""
    step = 10 ** math.floor(math.log10(product.level)) / 10
    return _FAMILIES.get(product.root) or Family(product.root, step, product.tick, 0.25)


@lru_cache(maxsize=1 << 10)
def series_on(product: Product, day: int) -> list[Series]:
    """What is listed on a UTC day: today's and the next trading day's options, the Friday's, the front future's."""
    date = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=day)
    found: list[Series] = []
    dailies = [d for d in (date + timedelta(days=n) for n in range(4)) if d.weekday() < 5][:2]
    friday = date + timedelta(days=(4 - date.weekday()) % 7)
    front = chain(product, day, 1)[0]
    for at in (*dailies, friday):
        if (made := weekly(product, at)) is not None and made not in found:
            found.append(made)
    return [*found, standard(product, front)]


def weekly(product: Product, date: datetime) -> Series | None:
    """The options that expire on a day (a UTC midnight) which is not that of a future; None: there are none."""
    of, code = family(product), MONTH_CODES[date.month - 1]
    pattern = of.friday if date.weekday() == 4 else of.daily
    with_future = code in product.months and third_friday(date.year, date.month) // DAY == date.timestamp() // 86_400
    if pattern is None or date.weekday() > 4 or with_future:
        return None
    asset = pattern.format(n=(date.day - 1) // 7 + 1, d="ABCD"[min(date.weekday(), 3)])
    expiry = int(date.timestamp() + EXPIRY_HOUR * 3600) * NS
    future = next(c for c in chain(product, expiry // DAY, 2) if c.expiry_ns > expiry)
    return Series(f"{asset}{code}{date.year % 10}", asset, expiry, future)


def standard(product: Product, future: Contract) -> Series:
    """The options that expire with a future."""
    asset = family(product).asset
    return Series(f"{asset}{future.symbol.removeprefix(future.root)}", asset, future.expiry_ns, future)


def option(product: Product, series: Series, index: int, kind: str) -> Option:
    """The call (`C`) or put (`P`) whose strike is `index` steps."""
    of = family(product)
    strike = round(float(index * of.step), 6)
    return Option(
        f"{series.name} {kind}{strike:g}" if strike < 1e6 else f"{series.name} {kind}{strike:.0f}", product.root,
        _native(product, series.expiry_ns // DAY, index, kind), series.expiry_ns, of.tick, series.asset, kind, strike,
        series.future, product.multiplier,
    )  # fmt: skip


def _native(product: Product, day: int, index: int, kind: str) -> int:
    """A 32-bit id above those of futures: the same in every run, and again only after years."""
    roots = list(PRODUCTS)
    root = roots.index(product.root) if product.root in PRODUCTS else _hashed(product.root)
    return 1 << 31 | root << 23 | (day % 2048) << 12 | (kind == "P") << 11 | index % 2048


def _hashed(root: str) -> int:
    return 16 + blake2b(root.encode(), digest_size=1).digest()[0] % 240


def black_76(
    forward: NDArray[np.float64], strike: NDArray[np.float64], years: NDArray[np.float64], vol: float, call: Any
) -> NDArray[np.float64]:
    """Undiscounted value of European options on a future (Black 1976)."""
    width = vol * np.sqrt(years)
    d = np.log(forward / strike) / width + width / 2
    value = forward * _normal_cdf(d) - strike * _normal_cdf(d - width)
    return np.where(call, value, value - forward + strike)


def _normal_cdf(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x.tolist()])
