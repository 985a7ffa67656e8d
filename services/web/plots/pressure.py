"""Option pressure of an underlying as a heat map: strikes by columns of time, calls and puts apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.web.plots.axis import Axis, Ints, Reals
from shared.frames import NS, iso, ns_of
from shared.stores import read_rows
from shared.timeframes import name_of

MOST_COLUMNS = 400
DAY = 86_400 * NS
MOST_READS = 32  # of the table of pressure, each of a day or more
SHOWN = 0.99  # of the volume lies at the strikes that are in view


@dataclass(slots=True)
class Heat:
    """Columns are stretches of `bin_ns` (a window or several), from `left` to `right` on the axis.

    `ratio[type][i, k]`: ln((bought + ½) / (sold + ½)) of calls (C) or puts (P) at `strikes[i]` in column k, all
    expirations together; NaN where nothing traded. `net_premium` and `price` (the underlying's) are NaN where unknown.
    `low` and `high`: the strikes that hold nearly all volume.
    """

    bin_ns: int
    window_ns: int
    start_ns: Ints
    left: Reals
    right: Reals
    strikes: Reals
    ratio: dict[str, Reals]
    net_premium: Reals
    price: Reals
    complete: NDArray[np.bool_]
    low: float
    high: float

    @property
    def limit(self) -> float:
        """Where the colours end, alike to both sides: most of what there is, at least a ratio of 3 to 1."""
        sizes = np.concatenate([np.abs(r[np.isfinite(r)]) for r in self.ratio.values()] or [np.empty(0)])
        return max(math.log(3), float(np.quantile(sizes, 0.98)) if len(sizes) else 0.0)

    def view(self, kind: str) -> tuple[float, float]:
        """The strikes that a picture of one option type shows: of most of the volume, and the underlying's price."""
        traded = self.strikes[np.isfinite(self.ratio[kind]).any(axis=1)]
        seen = traded[(traded >= self.low) & (traded <= self.high)]
        edges = np.concatenate((seen if len(seen) else traded, self.price[np.isfinite(self.price)]))
        room = float(self.heights().max()) * 0.75
        return float(edges.min()) - room, float(edges.max()) + room

    def heights(self) -> Reals:
        """How high the cell of each strike is: the distance to the next one, but no more than is usual."""
        if len(self.strikes) < 2:
            return np.maximum(np.abs(self.strikes) * 0.002, 1e-9)
        gaps = np.diff(self.strikes)
        nearest = np.minimum(np.append(gaps, np.inf), np.append(np.inf, gaps))
        heights: Reals = np.minimum(nearest, np.median(gaps))
        return heights


def heat_of(url: str, underlying: str, axis: Axis) -> tuple[Heat | None, list[str]]:
    """The heat map over an axis and notes on it; None where the store has no pressure of this underlying there."""
    first, end = int(axis.knots_ns[0]), int(axis.knots_ns[-1])
    columns = ("time_window", "window_seconds", "net_premium", "underlying_price", "complete")
    where = {"underlying": underlying}
    newest = read_rows(url, "pressure_rollups", where, until=iso(end), last=1, columns=columns)
    window_ns = newest[0]["window_seconds"] * NS if newest else 0
    if not newest or ns_of(newest[0]["time_window"]) + window_ns <= first:
        return None, []
    rollups = read_rows(
        url, "pressure_rollups", where, since=iso(first - window_ns + 1), until=iso(end), columns=columns
    )
    bin_ns = _bin(window_ns, axis)
    bins = sorted({ns_of(row["time_window"]) // bin_ns for row in rollups})
    start_ns = np.array(bins, np.int64) * bin_ns
    left, right = _places(axis, start_ns, start_ns + bin_ns)
    seen = _covered(axis, start_ns, start_ns + bin_ns)
    notes = []
    if not seen.all():
        notes.append(f"{np.count_nonzero(~seen):,} of {len(seen):,} columns of pressure lie where there are no bars")
    if not seen.any():
        return None, notes
    place = {b: k for k, b in enumerate(np.array(bins)[seen].tolist())}
    net, price, complete = _rollups(rollups, bin_ns, place)
    cells = _cells(url, underlying, first - window_ns + 1, end, bin_ns, place)
    strikes = np.array(sorted({strike for _, strike, _ in cells}), np.float64)
    row_of = {strike: i for i, strike in enumerate(strikes.tolist())}
    ratio: dict[str, Reals] = {}
    volumes = np.zeros(len(strikes))
    for (kind, strike, column), (ask, bid, other) in cells.items():
        grid = ratio.setdefault(kind, np.full((len(strikes), len(place)), np.nan))
        grid[row_of[strike], column] = math.log(ask + 0.5) - math.log(bid + 0.5)
        volumes[row_of[strike]] += ask + bid + other
    low, high = _view(strikes, volumes)
    if bin_ns > window_ns:
        notes.append(
            f"pressure by {name_of(bin_ns // NS)}, {bin_ns // window_ns} windows of {name_of(window_ns // NS)} together"
        )
    return Heat(
        bin_ns, window_ns, start_ns[seen], left[seen], right[seen], strikes, dict(sorted(ratio.items())), net, price,
        complete, low, high,
    ), notes  # fmt: skip


def _bin(window_ns: int, axis: Axis) -> int:
    """A column's length: whole windows, no shorter than a bar, and no more than MOST_COLUMNS of them."""
    lasting = int((axis.knots_ns[1::2] - axis.knots_ns[::2]).sum())
    return window_ns * max(1, -(-axis.step_ns // window_ns), -(-lasting // (window_ns * MOST_COLUMNS)))


def _places(axis: Axis, starts_ns: Ints, ends_ns: Ints) -> tuple[Reals, Reals]:
    """Where each begins and ends on the axis, without the parts that lie in a break."""
    begin_ns, end_ns = axis.knots_ns[::2], axis.knots_ns[1::2]
    last = len(begin_ns) - 1
    first = np.minimum(
        np.searchsorted(end_ns, starts_ns, side="right"), last
    )  # the stretch that it begins in, or before
    final = np.maximum(np.searchsorted(begin_ns, ends_ns, side="left") - 1, 0)
    return axis.at(np.maximum(starts_ns, begin_ns[first])), axis.at(np.minimum(ends_ns, end_ns[final]))


def _covered(axis: Axis, starts_ns: Ints, ends_ns: Ints) -> NDArray[np.bool_]:
    """Which of these touch a stretch that has bars."""
    begin, end = axis.knots_ns[::2], axis.knots_ns[1::2]
    held: NDArray[np.bool_] = np.searchsorted(begin, ends_ns, side="left") > np.searchsorted(end, starts_ns, "right")
    return held


def _rollups(
    rollups: list[dict[str, Any]], bin_ns: int, place: dict[int, int]
) -> tuple[Reals, Reals, NDArray[np.bool_]]:
    """Net premium (summed), the newest price, and whether all windows are complete, of each column."""
    net, price, complete = np.full(len(place), np.nan), np.full(len(place), np.nan), np.ones(len(place), np.bool_)
    for row in rollups:
        column = place.get(ns_of(row["time_window"]) // bin_ns)
        if column is not None:
            net[column] = np.nan_to_num(net[column]) + row["net_premium"]
            complete[column] &= bool(row["complete"])
            if row["underlying_price"] is not None:
                price[column] = row["underlying_price"]
    return net, price, complete


def _cells(
    url: str, underlying: str, first: int, end: int, bin_ns: int, place: dict[int, int]
) -> dict[tuple[str, float, int], list[float]]:
    """(option type, strike, column) -> bought, sold and other volume; read in parts, since a day has many rows."""
    cells: dict[tuple[str, float, int], list[float]] = {}
    part = max(DAY, -(-(end - first) // MOST_READS))
    columns = ("time_window", "strike", "option_type", "ask_volume", "bid_volume", "unknown_volume")
    for since in range(first, end, part):
        rows = read_rows(
            url, "pressure_metrics", {"underlying": underlying}, since=iso(since), until=iso(min(end, since + part)),
            columns=columns,
        )  # fmt: skip
        column_of = {text: place.get(ns_of(text) // bin_ns) for text in {row["time_window"] for row in rows}}
        for row in rows:
            column = column_of[row["time_window"]]
            if column is not None:
                held = cells.setdefault((row["option_type"], row["strike"], column), [0.0, 0.0, 0.0])
                for i, name in enumerate(("ask_volume", "bid_volume", "unknown_volume")):
                    held[i] += row[name] or 0.0
    return cells


def _view(strikes: Reals, volumes: Reals) -> tuple[float, float]:
    """The inner strikes that hold SHOWN of all volume."""
    if not len(strikes) or volumes.sum() <= 0:
        return (float(strikes[0]), float(strikes[-1])) if len(strikes) else (0.0, 1.0)
    share = np.cumsum(volumes) / volumes.sum()
    low = int(np.searchsorted(share, (1 - SHOWN) / 2, side="right"))
    high = int(np.searchsorted(share, 1 - (1 - SHOWN) / 2, side="left"))
    return float(strikes[min(low, len(strikes) - 1)]), float(strikes[min(high, len(strikes) - 1)])
