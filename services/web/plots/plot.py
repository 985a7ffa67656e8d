"""`tapeline plot`: candles, order flow and option pressure of a symbol and range as a PNG or an HTML file."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal, NamedTuple

import numpy as np

from services.web.plots.data import Ask, PlotData, load
from services.web.plots.html import page
from shared.errors import ConfigError
from shared.instants import iso_second
from shared.settings import Settings

Kind = Literal["png", "html"]


class Plot(NamedTuple):
    """The file's bytes, and what is in it (plain values, for `--json`)."""

    body: bytes
    summary: dict[str, Any]


def plot(settings: Settings, kind: Kind, theme: str | None, **asked: Any) -> Plot:
    """Draw what `data.Ask` asks for, from the store of the settings.

    `theme` is light or dark; None is light in a PNG, and in HTML whatever the reader's system prefers. Raises
    TapelineError where there are no bars, ConfigError, StoreUnavailable.
    """
    draw = _png() if kind == "png" else page
    data = load(settings, Ask(**asked))
    body: bytes = draw(data, theme or "light") if kind == "png" else draw(data, theme)
    return Plot(body, _summary(data) | {"bytes": len(body)})


def _png() -> Any:
    try:
        return import_module("services.web.plots.png").png
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ConfigError(
            "a PNG is drawn by matplotlib, which is not installed: pip install 'tapeline[plot]', or write .html"
        ) from None


def _summary(data: PlotData) -> dict[str, Any]:
    return {
        "symbol": data.name,
        "timeframe": data.timeframe,
        "store": data.store,
        "rows": len(data.bars),
        "incomplete": int(np.count_nonzero(~data.bars.complete)),
        "start": iso_second(data.start_ns),
        "end": iso_second(data.end_ns),
        "big_trades": sum(mark.trades for mark in data.big_trades),
        "signals": len(data.signals),
        "underlying": data.underlying or None,
        "pressure_columns": 0 if data.heat is None else len(data.heat.left),
        "notes": data.notes,
    }
