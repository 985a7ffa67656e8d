"""Option tapes of NQ and ES with planted events, as real DBN: for tests and demonstrations of pressure and signals.

A few windows around one time of day in each of many sessions. All keys (series, strike, call or put) trade both
ways in every window, evenly, so that each has a quiet history at that time of day; in the last session the events
happen. Weeklies have roots of their own, each session has options that expire on its day, and there are calendar
spreads and user-defined spreads among the trades. The same options give the same bytes.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.ingest.synthetic_chain import Option, Series, family, option, standard, weekly
from services.ingest.synthetic_dbn import Combination, Listing, definition, metadata, write_file
from services.ingest.synthetic_option_book import MONEY, ROOTS, Book, Trades
from services.ingest.synthetic_products import DAY, PRODUCTS, Product, chain, spread
from shared.calendar import EQUITY_INDEX, GLOBEX
from shared.calendar import sessions as market_hours
from shared.errors import ConfigError
from shared.frames import NS

EVENTS = ("heavy", "cluster", "straddle", "sweep", "block")
LEAD_NS, TAIL_NS = 60 * NS, 600 * NS  # of the watch, before the first and behind the last window
DEFINED = {"standard": 12, "weekly": 8, "today": 5}  # strikes to either side that are listed
FUTURES_A_WINDOW, SPREADS_A_SESSION = 20, 3
# Strikes (in steps from the money) that trade: calls and puts, by root and expiry.
_TRADED: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {
    ("NQ", "standard"): {"C": (-1, 0, 1, 2, 3, 4, 5), "P": (-6, -5, -4, -3)},
    ("NQ", "weekly"): {"C": (-1, 0, 1, 2, 3, 4), "P": (-5, -4, -3)},
    ("ES", "standard"): {"C": (0, 3, 4, 5, 6), "P": (-9, -8, -7, -6, -5, 0)},
    ("ES", "weekly"): {"P": (-6, -5, -4, -3, -2, -1), "C": (2, 3, 4)},
    ("NQ", "today"): {"C": (0, 1, 2), "P": (-3, -2, -1)},
    ("ES", "today"): {"C": (0, 1, 2), "P": (-3, -2, -1)},
}
ROUND = 20  # sessions
TODAY_SHARE = 0.5  # of the windows in which an option that expires that day trades


@dataclass(frozen=True, slots=True)
class TapeOptions:
    """`first_day`: of the first session; `opens_seconds`: when the first window begins, in seconds of the UTC day.

    `events`: which of EVENTS are planted in the last session. `mirror`: every buy is a sell and the other way round.
    """

    seed: int = 1
    first_day: str = "2024-04-08"
    sessions: int = 23
    windows: int = 6
    window_seconds: int = 300
    opens_seconds: int = 52_200
    events: tuple[str, ...] = EVENTS
    mirror: bool = False


@dataclass(frozen=True, slots=True)
class Planted:
    """What an event does to one key: in each of `windows` (starts, ns) its trades lean to `direction`, BUY or SELL.

    A cluster has an entry for each of its strikes, a straddle for the call and the put.
    """

    event: str
    symbol: str
    underlying: str
    expiration_ns: int
    strike: float
    option_type: str
    windows: tuple[int, ...]
    direction: str

    @property
    def key(self) -> tuple[str, int, float, str]:
        """(underlying, expiration_ns, strike, option_type)."""
        return self.underlying, self.expiration_ns, self.strike, self.option_type


@dataclass(slots=True)
class OptionTape:
    """A tape. `records` are tbbo records in order of receipt, `definitions` those of each session's day.

    `sessions`: [start, end) of each session's windows, ns; `lives`: id -> first and last day (since 1970) of a listing.
    """

    options: TapeOptions
    records: NDArray[Any]
    definitions: list[bytes]
    listings: list[Listing]
    lives: dict[int, tuple[int, int]]
    planted: tuple[Planted, ...]
    sessions: tuple[tuple[int, int], ...]

    @property
    def start_ns(self) -> int:
        """Since when the tape is watched."""
        return self.sessions[0][0] - LEAD_NS

    @property
    def end_ns(self) -> int:
        """Until when the tape is watched."""
        return self.sessions[-1][1] + TAIL_NS

    def write(self, folder: Path, *, compressed: bool = True) -> tuple[Path, Path]:
        """Write `definitions.dbn` and `tbbo.dbn` (with `.zst`: compressed); returns both paths. Raises OSError."""
        suffix = ".dbn.zst" if compressed else ".dbn"
        day = self.start_ns // DAY * DAY
        paths = folder / f"definitions{suffix}", folder / f"tbbo{suffix}"
        bodies = b"".join(self.definitions), self.records.tobytes()
        for path, schema, start, body in zip(paths, ("definition", "tbbo"), (day, self.start_ns), bodies, strict=True):
            head = metadata(GLOBEX, schema, start, self.end_ns, self.listings, self.lives)
            write_file(path, head, io.BytesIO(body))
        return paths


def build(options: TapeOptions | None = None) -> OptionTape:
    """The tape of these options. Raises ConfigError for options that make none."""
    return _Builder(options or TapeOptions()).tape()


class _Builder:
    def __init__(self, options: TapeOptions) -> None:
        unknown = set(options.events) - set(EVENTS)
        if unknown or options.sessions < 1 or options.windows < 4:
            raise ConfigError(
                f"an option tape wants events of {', '.join(EVENTS)}, a session and four windows or more, got {options}"
            )
        self.options = options
        self.rng = np.random.default_rng([options.seed & 0xFFFF_FFFF, 7])
        self.window_ns = options.window_seconds * NS
        self.days = _trading_days(options)
        self.opens = [day * DAY + options.opens_seconds * NS for day in self.days]
        self.listings: list[Listing] = []
        self.lives: dict[int, tuple[int, int]] = {}
        self.place: dict[int, int] = {}  # id -> place in `listings`
        self.trades = Trades()
        self.planted: list[Planted] = []
        self.busy: set[tuple[int, int]] = set()  # (place, window) in which an event leaves no room for quiet flow

    def tape(self) -> OptionTape:
        series = {root: self._series(PRODUCTS[root]) for root in ROOTS}
        for root in ROOTS:
            self._list(PRODUCTS[root], series[root])
        self._plant(series)
        for root in ROOTS:
            product = PRODUCTS[root]
            for name, one in series[root].items():
                self._quiet(product, name, one, range(len(self.days)), 1.0)
            for k, day in enumerate(self.days):
                if (today := _today(product, day)) is not None:
                    self._quiet(product, "today", today, range(k, k + 1), TODAY_SHARE)
            self._futures(product)
        sessions = tuple((o, o + self.options.windows * self.window_ns) for o in self.opens)
        book = Book(self.options.seed, self.opens, self.listings)
        return OptionTape(
            self.options, book.records(self.trades, self.options.mirror), self._definitions(), self.listings,
            self.lives, tuple(self.planted), sessions,
        )  # fmt: skip

    # -- what is listed ----------------------------------------------------------------------

    def _series(self, product: Product) -> dict[str, Series]:
        """The options of the front future, and the first weekly behind the last session (NQ: not of a Friday)."""
        front, last = chain(product, self.days[-1], 1)[0], self.days[-1]
        for ahead in range(3, 14):
            at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=last + ahead)
            made = weekly(product, at) if (at.weekday() == 4) == (product.root == "ES") else None
            if made is not None and made.future == front:
                return {"standard": standard(product, front), "weekly": made}
        raise ConfigError(f"no weekly on {front.symbol} expires soon after the last session; choose another first_day")

    def _list(self, product: Product, series: dict[str, Series]) -> None:
        first, last = self.days[0], self.days[-1]
        near, far = chain(product, last, 2)
        for contract in (near, far, spread(near, far)):
            self._add(contract, first, last)
        tick = family(product).tick
        for n in range(2):
            native = near.native + 2048 + n
            name = f"UD:1V: VT 24{native % 100_000:05d}"
            self._add(Combination(name, product.root, native, near.expiry_ns, tick), first, last)
        for name, one in series.items():
            self._ladder(product, name, one, first, last)
        for k, day in enumerate(self.days):
            if (today := _today(product, day)) is not None:
                self._ladder(product, "today", today, self.days[max(0, k - 1)], day)

    def _ladder(self, product: Product, name: str, series: Series, first: int, last: int) -> None:
        for offset in range(-DEFINED[name], DEFINED[name] + 1):
            for kind in "CP":
                self._add(option(product, series, MONEY[product.root] + offset, kind), first, last)

    def _add(self, listing: Listing, first: int, last: int) -> None:
        self.place[listing.native] = len(self.listings)
        self.listings.append(listing)
        self.lives[listing.native] = (first, last)

    def _definitions(self) -> list[bytes]:
        """As the vendor's files have them: every day, all that is listed then, as of midnight."""
        return [
            definition(listing, day * DAY, "XCME")
            for day in self.days for listing in self.listings
            if self.lives[listing.native][0] <= day <= self.lives[listing.native][1]
        ]  # fmt: skip

    # -- events ------------------------------------------------------------------------------

    def _plant(self, series: dict[str, dict[str, Series]]) -> None:
        """Heavy and cluster: ever more of one side alone in the last three windows, with three strikes beside each
        other in a cluster. The others happen once, amid quiet flow."""
        last, events = self.options.windows - 1, self.options.events
        nq, es = series["NQ"], series["ES"]
        if "heavy" in events:
            self._pile("heavy", self._option("NQ", nq["standard"], 3, "C"), 1)
        if "cluster" in events:
            for offset in (1, 2, 3):
                self._pile("cluster", self._option("NQ", nq["weekly"], offset, "C"), 1)
        if "straddle" in events:
            start = self._window(last - 1) + self.window_ns // 3
            for kind, delay in (("C", 0), ("P", NS)):
                leg = self._option("ES", es["standard"], 0, kind)
                times = start + delay + np.arange(12) * 2 * NS
                self._event("straddle", leg, (last - 1,), 1, times, 25)
        if "sweep" in events:
            put = self._option("ES", es["weekly"], -4, "P")
            at = np.full(4, self._window(last - 1) + self.window_ns // 2)
            self._event("sweep", put, (last - 1,), -1, at, np.array([60, 50, 40, 30]), np.array([0, 0, 1, 2]))
        if "block" in events:
            put = self._option("ES", es["standard"], -7, "P")
            self._event("block", put, (last,), 1, np.array([self._window(last) + self.window_ns // 4]), 300)

    def _pile(self, event: str, key: Option, side: int) -> None:
        windows = tuple(range(self.options.windows - 3, self.options.windows))
        for window, (count, size) in zip(windows, ((20, 2), (26, 5), (40, 10)), strict=True):
            start = self._window(window)
            self.busy.add((self.place[key.native], start))
            self.trades.add(self.place[key.native], self._times(count, start), side, size)
        self._note(event, key, windows, side)

    def _event(
        self, event: str, key: Option, windows: tuple[int, ...], side: int, times: Any, size: Any, through: Any = 0
    ) -> None:
        self.trades.add(self.place[key.native], times, side, size, through)
        self._note(event, key, windows, side)

    def _note(self, event: str, key: Option, windows: tuple[int, ...], side: int) -> None:
        direction = "BUY" if (side > 0) != self.options.mirror else "SELL"
        starts = tuple(self._window(w) for w in windows)
        self.planted.append(
            Planted(event, key.symbol, key.root, key.expiry_ns, key.strike, key.kind, starts, direction)
        )

    def _option(self, root: str, series: Series, offset: int, kind: str) -> Option:
        return option(PRODUCTS[root], series, MONEY[root] + offset, kind)

    def _window(self, index: int, session: int = -1) -> int:
        return self.opens[session] + index * self.window_ns

    def _times(self, count: int, start: int) -> NDArray[np.int64]:
        return start + np.sort(self.rng.integers(0, self.window_ns - NS, count))

    # -- quiet flow --------------------------------------------------------------------------

    def _quiet(self, product: Product, name: str, series: Series, sessions: range, share: float) -> None:
        """Three trades to either side in a window, of about the same volume.

        A key's volumes at a time of day come again every ROUND sessions, in an order of its own: any so many
        sessions in a row have the same spread, and none of them stands out.
        """
        keys = [
            self.place[option(product, series, MONEY[product.root] + offset, kind).native]
            for kind, offsets in _TRADED[product.root, name].items()
            for offset in offsets
        ]
        shape = len(keys), self.options.windows, ROUND
        total = 40 + 4 * (self._shuffled(shape) % 3 - 1)
        lean = np.array([-3, -2, 0, 2, 3])[self._shuffled(shape) % 5]
        which, window, k = np.nonzero(self.rng.random((*shape[:2], len(sessions))) < share)
        k += sessions.start
        listing, start = np.array(keys)[which], np.array(self.opens)[k] + window * self.window_ns
        free = np.array([at not in self.busy for at in zip(listing.tolist(), start.tolist(), strict=True)], np.bool_)
        which, window, k, listing, start = (column[free] for column in (which, window, k, listing, start))
        half, extra = total[which, window, k % ROUND] // 2, lean[which, window, k % ROUND]
        for side in (1, -1):
            volume = half + side * extra
            third = volume // 3
            for size in (third, third, volume - 2 * third):
                times = start + self.rng.integers(0, self.window_ns - NS, len(start))
                self.trades.add(listing, times, side, size)

    def _shuffled(self, shape: tuple[int, int, int]) -> NDArray[np.int64]:
        """0, 1, 2, … along the last axis, in any order."""
        return np.argsort(self.rng.random(shape), axis=-1)

    def _futures(self, product: Product) -> None:
        """Trades of the front future, and a few of the calendar and the user-defined spreads."""
        mine = [i for i, c in enumerate(self.listings) if not isinstance(c, Option) and c.root == product.root]
        front, combined = mine[0], mine[2:]
        for k in range(len(self.days)):
            for w in range(self.options.windows):
                times = self._times(FUTURES_A_WINDOW, self._window(w, k))
                side = self.rng.permutation(np.repeat([1, -1], FUTURES_A_WINDOW // 2))
                self.trades.add(front, times, side, self.rng.integers(1, 9, FUTURES_A_WINDOW))
            for listing in combined:
                times = self._times(SPREADS_A_SESSION, self._window(0, k))
                self.trades.add(listing, times, self.rng.choice([1, -1], SPREADS_A_SESSION), 5)


def _today(product: Product, day: int) -> Series | None:
    """The options that expire on a session's day behind its windows; None when its future expires (in the morning)."""
    return weekly(product, datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=day))


def _trading_days(options: TapeOptions) -> list[int]:
    """Days since 1970 whose windows all lie within market hours."""
    try:
        day = int(datetime.fromisoformat(options.first_day).replace(tzinfo=UTC).timestamp()) // 86_400
    except ValueError:
        raise ConfigError(f"first_day '{options.first_day}' is no day such as 2024-04-08") from None
    hours, found = market_hours(EQUITY_INDEX), list[int]()
    length = options.windows * options.window_seconds * NS
    while len(found) < options.sessions:
        start = day * DAY + options.opens_seconds * NS
        row = int(np.searchsorted(hours[:, 0], start, side="right")) - 1
        if row >= 0 and start + length <= hours[row, 1]:
            found.append(day)
        day += 1
    return found
