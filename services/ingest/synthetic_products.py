"""What the synthetic market trades: products, their futures, and calendar spreads of these."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import blake2b

from shared.frames import NS
from shared.instruments import MONTH_CODES, instrument_id
from shared.messages import Instrument

DAY = 86_400 * NS


@dataclass(frozen=True, slots=True)
class Product:
    """What is typical of a root. `tick` in price units, `walk` in ticks per root of a second, `clip` the
    typical size, `basis` ticks a month of carry; a `thin` product has long quiet stretches. `multiplier`: how many
    units a contract is of."""

    root: str
    tick: float
    level: float
    weight: float
    months: str
    walk: float
    clip: float = 1.0
    basis: float = 8.0
    thin: bool = False
    multiplier: float = 1.0


_TABLE = (
    Product("ES", 0.25, 5200, 10, "HMUZ", 0.7, 1.2, 60, multiplier=50),
    Product("NQ", 0.25, 18_200, 7, "HMUZ", 2.2, 0.8, 200, multiplier=20),
    Product("CL", 0.01, 79, 4, "FGHJKMNQUVXZ", 0.5, 1.0, -30, multiplier=1_000),
    Product("GC", 0.1, 2330, 3, "GJMQVZ", 0.6, 1.0, 90, multiplier=100),
    Product("ZN", 1 / 64, 109.5, 3, "HMUZ", 0.08, 8.0, 2, multiplier=1_000),
    Product("6E", 0.00005, 1.078, 2, "HMUZ", 0.12, 1.5, 20, multiplier=125_000),
    Product("NG", 0.001, 2.25, 1.5, "FGHJKMNQUVXZ", 0.2, 3.0, 40, thin=True, multiplier=10_000),
    Product("RTY", 0.1, 2050, 1.5, "HMUZ", 0.5, 0.9, 60, thin=True, multiplier=50),
    Product("YM", 1.0, 39_000, 1.2, "HMUZ", 0.6, 0.8, 120, thin=True, multiplier=5),
    Product("SI", 0.005, 28, 0.8, "HKNUZ", 0.3, 1.0, 15, thin=True, multiplier=5_000),
    Product("HG", 0.0005, 4.6, 0.7, "HKNUZ", 0.3, 1.0, 15, thin=True, multiplier=25_000),
    Product("ZB", 1 / 32, 116, 0.7, "HMUZ", 0.1, 4.0, 2, thin=True, multiplier=1_000),
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


@lru_cache(maxsize=1 << 10)
def chain(product: Product, day: int, count: int) -> list[Contract]:
    """The first `count` contracts that have not expired on a day."""
    date = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=day)
    found: list[Contract] = []
    year, month = date.year, date.month
    while len(found) < count:
        code = MONTH_CODES[month - 1]
        expiry = third_friday(year, month)
        if code in product.months and expiry >= (day + 1) * DAY:
            found.append(
                Contract(f"{product.root}{code}{year % 10}", product.root, _native(product.root, year, month), expiry,
                         product.tick)
            )  # fmt: skip
        year, month = (year + 1, 1) if month == 12 else (year, month + 1)
    return found


def third_friday(year: int, month: int) -> int:
    first = datetime(year, month, 1, 13, 30, tzinfo=UTC)
    return int((first + timedelta(days=(4 - first.weekday()) % 7 + 14)).timestamp()) * NS


def _native(root: str, year: int, month: int) -> int:
    """A 32-bit id as a venue gives, the same in every run."""
    of_root = int.from_bytes(blake2b(root.encode(), digest_size=3).digest(), "big") >> 6
    return of_root * 8192 + (year % 100) * 12 + month


def spread(near: Contract, far: Contract) -> Contract:
    return Contract(
        f"{near.symbol}-{far.symbol}", near.root, near.native + 4096, near.expiry_ns, near.tick, far
    )  # fmt: skip
