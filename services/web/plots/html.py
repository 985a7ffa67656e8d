"""A plot as one HTML file: the chart library, the data and the page, so that it opens from disk without a network."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from services.web.plots.axis import BREAK
from services.web.plots.data import PlotData
from services.web.plots.pressure import Heat
from services.web.plots.theme import THEMES
from shared.errors import ConfigError
from shared.frames import NS

_LIBRARY = Path("js") / "lightweight-charts.standalone.development.js"
_HERE = Path(__file__).parent


def page(data: PlotData, theme: str | None = None) -> bytes:
    """The file. `theme` None: as the reader's system prefers. Raises ConfigError where the library is not installed."""
    scripts = [_script(_library()), _script((_HERE / "page.js").read_text("utf-8"))]
    told = embedded(document(data))
    hashes = " ".join(f"'sha256-{_digest(text)}'" for text in scripts)
    # Nothing but these two scripts runs, and nothing is fetched, whatever a symbol or a store is called.
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:"
    title = html.escape(f"{data.title} {data.timeframe}")
    subtitle = html.escape("  ·  ".join(data.subtitle))
    chosen = f' data-theme="{theme}"' if theme else ""
    parts = [
        f'<!doctype html>\n<html lang="en"{chosen}>\n<head>\n<meta charset="utf-8">\n',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
        f"<title>{title} {html.escape(data.range)}</title>\n",
        f"<style>\n{(_HERE / 'page.css').read_text('utf-8')}</style>\n</head>\n<body>\n",
        f'<header><div><h1>{title}</h1><p>{subtitle}</p></div>{_key(data)}<button id="theme" type="button" '
        'aria-label="Change between light and dark">Dark</button></header>\n',
        '<div id="legend"></div>\n<div id="spoken" class="hidden" role="status"></div>\n',
        '<div id="chart" tabindex="0" role="application" aria-roledescription="chart" '
        f'aria-label="{_label(data)}"></div>\n',
        f"<footer>{html.escape(_notes(data))}</footer>\n",
        f'<script type="application/json" id="data">{told}</script>\n',
        *(f"<script>{text}</script>\n" for text in scripts),
        "</body>\n</html>\n",
    ]
    return "".join(parts).encode()


def document(data: PlotData) -> dict[str, Any]:
    """What the page draws, as plain values: columns of `bars` row by row as the store has them, undefined is None."""
    b, axis = data.bars, data.axis
    lead_ns = int(b.time_ns[0] - b.start_ns[0])  # a rolling bar is named by its window's end
    begin, end = axis.knots_ns[::2], axis.knots_ns[1::2]
    stretches = np.column_stack(((begin + lead_ns) // NS, axis.knots[::2], (end - begin) // axis.step_ns))
    reals = {
        name: _reals(column)
        for name, column in (
            ("open", b.open), ("high", b.high), ("low", b.low), ("close", b.close), ("buy", b.buy), ("sell", b.sell),
            ("unknown", b.unknown), ("cvd", b.cvd), ("longLiquidated", b.long_liquidated),
            ("shortLiquidated", b.short_liquidated),
        )
    }  # fmt: skip
    return {
        "themes": {name: asdict(theme) for name, theme in THEMES.items()},
        "step": axis.step_ns // NS,
        "slots": axis.slots,
        "stretches": stretches.astype(np.int64).tolist(),
        "breaks": [int(cut.slot) for cut in axis.breaks],
        "breakSlots": BREAK,
        "underlying": data.underlying,
        "bars": {"time": (b.time_ns // NS).tolist(), "slot": axis.slot.tolist(), **reals,
                 "complete": b.complete.tolist()},
        "bigTrades": [mark._asdict() for mark in data.big_trades],
        "signals": [
            {"bar": s.bar, "strike": s.strike, "optionType": s.option_type, "direction": s.direction, "grade": s.grade,
             "score": s.score, "status": s.status, "label": s.label, "column": _column(data.heat, s.time_ns)}
            for s in data.signals
        ],
        "heat": None if data.heat is None else _heat(data.heat),
    }  # fmt: skip


def embedded(value: Any) -> str:
    """JSON that may stand within a `<script>`: no text in it can end the element, or begin a comment."""
    text = msgspec.json.encode(value).decode()
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _heat(heat: Heat) -> dict[str, Any]:
    return {
        "left": _reals(heat.left), "right": _reals(heat.right), "strikes": _reals(heat.strikes),
        "heights": _reals(heat.heights()), "netPremium": _reals(heat.net_premium), "price": _reals(heat.price),
        "complete": heat.complete.tolist(), "limit": heat.limit, "view": {kind: heat.view(kind) for kind in heat.ratio},
        "cells": {
            kind: [
                [int(row), int(column), round(float(ratio[row, column]), 4)]
                for row, column in zip(*np.nonzero(np.isfinite(ratio)), strict=True)
            ]
            for kind, ratio in heat.ratio.items()
        },
    }  # fmt: skip


def _column(heat: Heat | None, window_ns: int) -> int | None:
    if heat is None:
        return None
    found = np.flatnonzero((heat.start_ns <= window_ns) & (window_ns < heat.start_ns + heat.bin_ns))
    return int(found[0]) if len(found) else None


def _reals(column: Any) -> list[float | None]:
    return [None if value != value else value for value in column.tolist()]  # noqa: PLR0124 - NaN


def _library() -> str:
    spec = find_spec("lightweight_charts")  # found, not imported: importing it would open a desktop window's toolkit
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder) / _LIBRARY
        if path.is_file():
            return path.read_text("utf-8")
    raise ConfigError("the chart library is not installed: pip install lightweight-charts-v5")


def _script(text: str) -> str:
    """JavaScript that may stand within a `<script>`."""
    return re.sub(r"<(?=/script|script|!--)", r"\\x3c", text, flags=re.IGNORECASE).replace("\r\n", "\n")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _label(data: PlotData) -> str:
    b = data.bars
    parts = [
        f"{data.title} {data.timeframe}, {data.range}: {len(b):,} bars",
        f"first open {b.open[0]:g}, last close {b.close[-1]:g}, high {b.high.max():g}, low {b.low.min():g}",
    ]
    if data.signals:
        parts.append(f"{len(data.signals)} signals")
    if data.heat is not None:
        parts.append(f"option pressure of {data.underlying}")
    return html.escape(
        ", ".join(parts) + ". Arrow keys move from bar to bar, plus and minus zoom, T changes the theme."
    )


def _notes(data: PlotData) -> str:
    missing = int(np.count_nonzero(~data.bars.complete))
    hatched = [f"hatched: {missing:,} incomplete bars"] if missing else []
    return "  ·  ".join(["times in UTC", *data.notes, *hatched, "keys: arrows, + - 0, Home, End, T"])


def _key(data: PlotData) -> str:
    """What the colours and marks mean, as inline drawings."""

    def item(drawing: str, text: str) -> str:
        return f'<li><svg viewBox="0 0 15 12" aria-hidden="true">{drawing}</svg>{text}</li>'

    swatch = '<rect width="15" height="12" fill="var(--{})"/>'
    stroke = 'fill="none" stroke="var(--faint)" stroke-width="1.5"'
    items = [item(swatch.format("up"), "up, bought"), item(swatch.format("down"), "down, sold")]
    if not data.bars.complete.all():
        items.append(item(f'<path d="M0 12L12 0M5 12L15 2M0 6L6 0" {stroke}/>', "incomplete"))
    if data.big_trades:
        items.append(item(f'<circle cx="7" cy="6" r="5" {stroke}/>', "big trades"))
    if (data.bars.long_liquidated + data.bars.short_liquidated).any():
        items.append(item(f'<path d="M3 2L11 10M3 10L11 2" {stroke}/>', "liquidations"))
    if data.signals:
        items.append(item(f'<path d="M7 1L13 11H1Z" {stroke}/>', "signals"))
    return f"<ul>{''.join(items)}</ul>"
