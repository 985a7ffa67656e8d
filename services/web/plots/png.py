"""A plot as a PNG, drawn by matplotlib without a display."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from services.web.plots.axis import BREAK, MOST_STRETCHES, Reals
from services.web.plots.data import PlotData, SignalMark
from services.web.plots.pressure import Heat
from services.web.plots.theme import THEMES, Theme
from services.web.plots.thin import thinned, ticks
from shared.frames import NS

WIDTH, DPI = 16.0, 120  # inches; 1920 pixels
MOST_DRAWN = 1200  # slots; with more, several bars are drawn as one
LABELLED_SIGNALS, LABELLED_BREAKS = 5, 12
# Height of a pane, inches.
_PRICE, _VOLUME, _CVD, _HEAT, _NET = 4.6, 1.25, 1.5, 1.9, 1.0


def png(data: PlotData, theme: str = "light") -> bytes:
    """The picture, in the theme `light` or `dark`."""
    data = thinned(data, -(-data.axis.slots // MOST_DRAWN))
    figure = _Picture(data, THEMES[theme]).figure()
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a symbol may have letters that the font has not
        FigureCanvasAgg(figure).print_png(out, metadata={"Title": f"{data.title} {data.timeframe} {data.range}"})
    return out.getvalue()


class _Picture:
    def __init__(self, data: PlotData, theme: Theme) -> None:
        self.data, self.theme = data, theme
        self.middle: Reals = data.axis.slot.astype(np.float64) + 0.5
        # Thin candles still have a gap between them.
        self.half = 0.36 if data.axis.slots < 600 else 0.48
        # How wide a break is.
        self.cut = 1.0 if data.thinned > 1 and len(data.axis.breaks) < MOST_STRETCHES else BREAK / data.thinned

    def figure(self) -> Any:

        heat, has_cvd = self.data.heat, bool(np.isfinite(self.data.bars.cvd).any())
        kinds = list(heat.ratio) if heat else []
        heights = [_PRICE, _VOLUME, *([_CVD] if has_cvd else []), *([_HEAT] * len(kinds)), *([_NET] if heat else [])]
        top, bottom, between = 1.0, 0.95, 0.3
        height = sum(heights) + top + bottom + between * (len(heights) - 1)
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor=self.theme.back)
        panes: list[Any] = []
        y = height - top
        for i, h in enumerate(heights):
            y -= h
            panes.append(figure.add_axes((0.022, y / height, 0.916, h / height), sharex=panes[0] if i else None))
            y -= between
        for pane in panes:
            self._pane(pane)
        self._price(panes[0])
        self._volume(panes[1])
        rest = panes[2:]
        if has_cvd:
            self._cvd(rest.pop(0))
        if heat is not None:
            for kind in kinds:
                self._heat(rest.pop(0), heat, kind, figure)
            self._net(rest.pop(0), heat)
        self._time(panes)
        self._words(figure, height)
        return figure

    # -- panes -----------------------------------------------------------------------------

    def _pane(self, pane: Any) -> None:
        t = self.theme
        pane.set_facecolor(t.back)
        pane.yaxis.tick_right()
        pane.yaxis.set_label_position("right")
        pane.grid(True, color=t.grid, linewidth=0.8)
        pane.set_axisbelow(True)
        for side in pane.spines.values():
            side.set_color(t.grid)
        pane.tick_params(colors=t.faint, labelsize=10, length=0, pad=5)
        pane.margins(x=0)

    def _name(self, pane: Any, text: str) -> None:
        """Above the pane, where it hides nothing."""
        pane.annotate(
            text, (0, 1), xycoords="axes fraction", textcoords="offset points", xytext=(0, 4), va="bottom", fontsize=10,
            color=self.theme.faint, parse_math=False, annotation_clip=False,
        )  # fmt: skip

    def _text(self, on: Any, x: float, y: float, text: str, **how: Any) -> Any:
        # A dollar sign is one, and no formula.
        return on.text(x, y, text, parse_math=False, **how)

    def _boxes(self, pane: Any, low: Reals, high: Reals, colour: str, which: NDArray[np.bool_], zorder: float) -> None:
        """Rectangles around the middle of bars; those of incomplete candles are hatched instead of filled."""

        whole = self.data.bars.complete
        for mine, hatched in ((which & whole, False), (which & ~whole, True)):
            if not mine.any():
                continue
            x0, x1 = self.middle[mine] - self.half, self.middle[mine] + self.half
            corners = _rectangles(x0, x1, low[mine], high[mine])
            pane.add_collection(PolyCollection(
                corners, facecolors=self.theme.back if hatched else colour, edgecolors=colour,
                linewidths=0.8 if hatched or self.data.axis.slots < 400 else 0.3, hatch="//////" if hatched else None,
                zorder=zorder,
            ))  # fmt: skip

    def _price(self, pane: Any) -> None:

        b, t = self.data.bars, self.theme
        up = b.close >= b.open
        for mine, colour in ((up, t.up), (~up, t.down)):
            x = self.middle[mine]
            wicks = np.stack([np.column_stack((x, b.low[mine])), np.column_stack((x, b.high[mine]))], axis=1)
            pane.add_collection(LineCollection(list(wicks), colors=colour, linewidths=0.9, zorder=3))
            self._boxes(pane, np.minimum(b.open, b.close), np.maximum(b.open, b.close), colour, mine, 4)
        low, high = float(b.low.min()), float(b.high.max())
        room = (high - low) * 0.07 or abs(high) * 0.001 or 1.0
        pane.set_ylim(low - room, high + room)
        pane.yaxis.set_major_formatter(_prices)
        self._marks(pane, room)
        last, colour = b.close[-1], t.up if up[-1] else t.down
        pane.axhline(last, color=colour, linewidth=0.8, linestyle=(0, (1, 2)), zorder=2)
        self._text(pane, 1.0035, last, _prices(last, 0), transform=pane.get_yaxis_transform(), va="center", fontsize=10,
                   color=t.back, bbox={"facecolor": colour, "edgecolor": "none", "pad": 2.5}, zorder=9)  # fmt: skip

    def _marks(self, pane: Any, room: float) -> None:
        d, t, b = self.data, self.theme, self.data.bars
        biggest = sorted(d.big_trades, key=lambda m: -m.volume)[:100]
        if biggest:
            most = biggest[0].volume or 1.0
            colours = [t.up if m.side > 0 else t.down if m.side < 0 else t.unknown for m in biggest]
            pane.scatter(
                [self.middle[m.bar] for m in biggest], [m.price for m in biggest],
                s=[40 + 260 * m.volume / most for m in biggest], facecolors="none", edgecolors=colours, linewidths=1.6,
                zorder=6,
            )  # fmt: skip
        for volume, y, marker, colour in (
            (b.long_liquidated, b.low - room * 0.25, "x", t.down),
            (b.short_liquidated, b.high + room * 0.25, "x", t.up),
        ):
            some = np.argsort(-volume)[:100]
            some = some[volume[some] > 0]
            pane.scatter(self.middle[some], y[some], marker=marker, s=26, c=colour, linewidths=1.3, zorder=6)
        if not d.signals:
            return
        marks = _by_bar(d.signals)
        best = sorted(marks, key=lambda group: -group[0].score)[:LABELLED_SIGNALS]
        for group in marks:
            mark, sold = group[0], group[0].direction == "SELL"
            x, colour = self.middle[mark.bar], t.down if sold else t.up
            y = b.high[mark.bar] + room * 0.45 if sold else b.low[mark.bar] - room * 0.45
            pane.scatter(
                x, y, marker="v" if sold else "^", s=64, zorder=7, linewidths=1.2, edgecolors=colour,
                facecolors=colour if any(m.status == "emitted" for m in group) else t.back,
            )  # fmt: skip
            if group in best:
                left = x > d.axis.slots * 0.85
                more = f" and {len(group) - 1} more" if len(group) > 1 else ""
                pane.annotate(
                    f"{mark.label} {mark.score:.2f}{more}", (x, y), textcoords="offset points",
                    xytext=(-9 if left else 9, 0), ha="right" if left else "left", va="center", fontsize=9,
                    color=t.text, zorder=7, parse_math=False, path_effects=self._halo(2.5),
                )  # fmt: skip

    def _volume(self, pane: Any) -> None:
        t = self.theme
        low, b = np.zeros(len(self.data.bars)), self.data.bars
        for part, colour in ((b.sell, t.down), (b.buy, t.up), (b.unknown, t.unknown)):
            self._boxes(pane, low, low + part, colour, part > 0, 3)
            low = low + part
        pane.set_ylim(0, float(low.max()) * 1.12 or 1.0)
        pane.yaxis.set_major_formatter(_amounts)
        pane.yaxis.set_major_locator(_locator(3))
        self._name(pane, "volume: sold, bought, unknown")

    def _cvd(self, pane: Any) -> None:
        t, cvd = self.theme, self.data.bars.cvd
        # No line where there were no bars: what happened meanwhile is not known.
        x, y = _holed(self.middle, cvd, np.diff(self.data.axis.slot) > (self.cut if self.cut == 1.0 else BREAK))
        base = float(np.nanmin(cvd))
        pane.plot(x, y, color=t.line, linewidth=1.4, zorder=4, solid_joinstyle="round")
        pane.fill_between(x, y, base, color=t.line, alpha=0.07, linewidth=0, zorder=2)
        pane.yaxis.set_major_formatter(_amounts)
        pane.yaxis.set_major_locator(_locator(4))
        pane.margins(y=0.12)
        self._name(pane, "CVD: bought less sold volume, cumulative")

    def _heat(self, pane: Any, heat: Heat, kind: str, figure: Any) -> None:

        t = self.theme
        colours = LinearSegmentedColormap.from_list("pressure", [t.down, t.middle, t.up])
        row, column = np.nonzero(np.isfinite(heat.ratio[kind]))
        half = heat.heights()[row] / 2
        x0, x1, y0, y1 = heat.left[column], heat.right[column], heat.strikes[row] - half, heat.strikes[row] + half
        corners = _rectangles(x0, x1, y0, y1)
        cells = PolyCollection(
            corners, array=heat.ratio[kind][row, column], cmap=colours, norm=Normalize(-heat.limit, heat.limit),
            edgecolors=t.back, linewidths=0.4 if len(heat.left) < 150 else 0.0, zorder=2,
        )  # fmt: skip
        pane.add_collection(cells)
        self._unwhole(pane, heat)
        self._underlying(pane, heat)
        pane.set_ylim(*heat.view(kind))
        pane.grid(False)
        pane.yaxis.set_major_formatter(_prices)
        pane.yaxis.set_major_locator(_locator(5))
        for mark in self.data.signals:
            columns = np.flatnonzero((heat.start_ns <= mark.time_ns) & (mark.time_ns < heat.start_ns + heat.bin_ns))
            if mark.option_type == kind and len(columns):
                k = int(columns[0])
                sold = mark.direction == "SELL"
                pane.scatter(
                    (heat.left[k] + heat.right[k]) / 2, mark.strike, marker="v" if sold else "^", s=34, linewidths=0.9,
                    facecolors=t.text, edgecolors=t.back, zorder=6,
                )  # fmt: skip
        self._name(pane, f"{self.data.underlying} {'calls' if kind == 'C' else 'puts'} by strike, with its price")
        self._scale(pane, cells, figure)

    def _scale(self, pane: Any, cells: Any, figure: Any) -> None:
        """The key of the colours, above the first heat map."""
        if getattr(self, "_keyed", False):
            return
        self._keyed = True
        box = pane.get_position()
        high = 1 / figure.get_figheight()
        within = figure.add_axes((box.x1 - 0.145, box.y1 + 0.075 * high, 0.1, 0.11 * high), zorder=10)
        bar = figure.colorbar(cells, cax=within, orientation="horizontal", ticks=[])
        bar.outline.set_visible(False)
        for x, text, side in ((-0.04, "sold", "right"), (1.04, "bought", "left")):
            self._text(within, x, 0.5, text, transform=within.transAxes, ha=side, va="center", fontsize=10,
                       color=self.theme.faint)  # fmt: skip

    def _unwhole(self, pane: Any, heat: Heat) -> None:
        """Columns of incomplete windows are hatched over."""
        for k in np.flatnonzero(~heat.complete).tolist():
            pane.axvspan(
                heat.left[k], heat.right[k], facecolor="none", edgecolor=self.theme.faint, hatch="////", linewidth=0,
                alpha=0.8, zorder=3,
            )  # fmt: skip

    def _halo(self, width: float) -> list[Any]:

        return [Stroke(linewidth=width, foreground=self.theme.back), Normal()]

    def _underlying(self, pane: Any, heat: Heat) -> None:
        # As of each window's end.
        cut = [b.slot for b in self.data.axis.breaks]
        across = np.searchsorted(cut, heat.left[1:], side="right") > np.searchsorted(cut, heat.left[:-1], side="right")
        x, y = _holed(heat.right, heat.price, across)
        pane.plot(
            x, y, color=self.theme.line, linewidth=1.5, zorder=5,
            path_effects=self._halo(3.2),
        )  # fmt: skip

    def _net(self, pane: Any, heat: Heat) -> None:
        t, net = self.theme, np.nan_to_num(heat.net_premium)
        width = (heat.right - heat.left) * 0.86
        middle = (heat.left + heat.right) / 2

        for mine, colour in ((net > 0, t.up), (net < 0, t.down)):
            if mine.any():
                x0, x1, y = middle[mine] - width[mine] / 2, middle[mine] + width[mine] / 2, net[mine]
                pane.add_collection(
                    PolyCollection(_rectangles(x0, x1, 0 * y, y), facecolors=colour, linewidths=0, zorder=3)
                )
        self._unwhole(pane, heat)
        most = float(np.abs(net).max()) or 1.0
        pane.set_ylim(-most * 1.15, most * 1.15)
        pane.axhline(0, color=t.faint, linewidth=0.8, zorder=4)
        pane.yaxis.set_major_formatter(_amounts)
        pane.yaxis.set_major_locator(_locator(3))
        self._name(pane, "net premium: calls less puts, bought less sold")

    # -- what is around the panes ------------------------------------------------------------

    def _time(self, panes: list[Any]) -> None:
        d, t = self.data, self.theme
        places = ticks(d)
        panes[0].set_xlim(-0.5, d.axis.slots + max(1.0, d.axis.slots * 0.008))
        few = len(d.axis.breaks) <= LABELLED_BREAKS
        for pane in panes:
            pane.set_xticks([x for x, _ in places])
            pane.tick_params(labelbottom=pane is panes[-1])
            for cut in d.axis.breaks:
                pane.axvspan(cut.slot, cut.slot + self.cut, facecolor=t.back, linewidth=0, zorder=2.5)
                pane.axvline(
                    cut.slot + self.cut / 2,
                    color=t.faint,
                    linewidth=0.9,
                    linestyle=(0, (3, 3)),
                    zorder=2.6,
                    alpha=1.0 if few else 0.35,
                )
            for bar in np.flatnonzero(~d.bars.complete)[:MOST_DRAWN].tolist() if pane in panes[:2] else ():
                pane.axvspan(
                    d.axis.slot[bar], d.axis.slot[bar] + 1, facecolor=t.faint, alpha=0.13, linewidth=0, zorder=1
                )
        panes[-1].set_xticklabels([label for _, label in places], ha="left")
        for label in panes[-1].get_xticklabels():
            label.set_parse_math(False)
        if few:
            for cut in d.axis.breaks:
                self._text(panes[0], cut.slot + self.cut / 2, 0.985, _lasting(cut.end_ns - cut.start_ns),
                           transform=panes[0].get_xaxis_transform(), rotation=90, ha="center", va="top", fontsize=8.5,
                           color=t.faint, zorder=8,
                           bbox={"facecolor": t.back, "edgecolor": "none", "pad": 1.0})  # fmt: skip

    def _words(self, figure: Any, height: float) -> None:
        d, t = self.data, self.theme
        self._text(figure, 0.022, 1 - 0.36 / height, f"{d.title}  {d.timeframe}", va="center", fontsize=21,
                   fontweight="bold", color=t.text)  # fmt: skip
        self._text(figure, 0.022, 1 - 0.71 / height, "  ·  ".join(d.subtitle), va="center", fontsize=11, color=t.faint)
        self._legend(figure, height)
        said = ["times in UTC", *d.notes]
        if not d.bars.complete.all():
            said.append(f"hatched: {np.count_nonzero(~d.bars.complete):,} incomplete candles")
        self._text(figure, 0.022, 0.2 / height, "  ·  ".join(said), va="center", fontsize=9.5, color=t.faint)

    def _legend(self, figure: Any, height: float) -> None:

        d, t = self.data, self.theme
        handles: list[Any] = [Patch(facecolor=t.up, label="up, bought"), Patch(facecolor=t.down, label="down, sold")]
        if not d.bars.complete.all():
            handles.append(Patch(facecolor=t.back, edgecolor=t.faint, hatch="//////", label="incomplete"))
        line: dict[str, Any] = {
            "linestyle": "none",
            "markeredgecolor": t.faint,
            "markerfacecolor": "none",
            "color": t.faint,
        }
        if d.big_trades:
            handles.append(Line2D([], [], marker="o", markersize=9, label="big trades", **line))
        if (d.bars.long_liquidated + d.bars.short_liquidated).any():
            handles.append(Line2D([], [], marker="x", markersize=6, label="liquidations", **line))
        if d.signals:
            handles.append(Line2D([], [], marker="^", markersize=8, label="signals", **line))
        legend = figure.legend(
            handles=handles, loc="center right", bbox_to_anchor=(0.938, 1 - 0.55 / height), ncols=len(handles),
            frameon=False, fontsize=10.5, labelcolor=t.text, handlelength=1.3, columnspacing=1.6, handletextpad=0.5,
        )  # fmt: skip
        legend.set_zorder(10)


def _rectangles(x0: Reals, x1: Reals, y0: Reals, y1: Reals) -> Any:
    """Corners of many, for a PolyCollection."""
    return np.stack([np.column_stack(p) for p in ((x0, y0), (x0, y1), (x1, y1), (x1, y0))], axis=1)


def _by_bar(signals: list[SignalMark]) -> list[list[SignalMark]]:
    """Signals of one bar and direction together, the best of them first."""
    groups: dict[tuple[int, str], list[SignalMark]] = {}
    for mark in sorted(signals, key=lambda s: -s.score):
        groups.setdefault((mark.bar, mark.direction), []).append(mark)
    return list(groups.values())


def _holed(x: Reals, y: Reals, after: NDArray[np.bool_]) -> tuple[Reals, Reals]:
    """A line's points with a hole after some of them; `after` is one shorter than the points."""
    at = np.flatnonzero(after) + 1
    return np.insert(x, at, np.nan), np.insert(y, at, np.nan)


def _lasting(ns: int) -> str:
    seconds = ns // NS
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit} without bars"
    return f"{seconds} s without bars"


def _prices(value: float, _: int) -> str:
    return f"{value:,.8f}".rstrip("0").rstrip(".") if abs(value) < 1 else f"{round(value, 4):,.10g}"


def _amounts(value: float, _: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g} {letter}"
    return f"{value:.4g}"


def _locator(most: int) -> Any:

    return MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10])
