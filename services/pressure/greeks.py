"""Implied volatility and delta of options on a forward (Black-76), through the package vollib if it is there.

Source: F. Black, "The pricing of commodity contracts", Journal of Financial Economics 3 (1976). The volatility is
found by P. Jäckel's "Let's be rational" (2013), which vollib wraps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import numpy as np

YEAR_DAYS = 365.0
# Who is told of an error that vollib does not name: rows without greeks are worth more than none.
on_fault: Callable[[Exception], None] | None = None
Greeks = tuple[float | None, float | None]


@cache
def available() -> bool:
    """Whether vollib is installed."""
    return find_spec("vollib") is not None


@cache
def _vollib() -> tuple[Callable[..., float], Callable[..., float]]:
    # It takes seconds to import, and most underlyings never need it.
    from vollib.black.greeks.analytical import delta  # noqa: PLC0415
    from vollib.black.implied_volatility import implied_volatility  # noqa: PLC0415

    return implied_volatility, delta


def black_76(kind: str, price: float, forward: float, strike: float, days: float, rate: float) -> Greeks:
    """(iv, delta) of a call `C` or put `P` at this price; iv 0.5 is 50 % a year, `rate` is a year's.

    Both None where there are none: without time left, at or below the intrinsic value, at or above what the
    option can be worth at all. Never raises.
    """
    none: Greeks = (None, None)
    if not (min(price, forward, strike, days) > 0 and math.isfinite(rate)) or not available():
        return none
    years = days / YEAR_DAYS
    try:
        discount = math.exp(-rate * years)
        worth = forward - strike if kind == "C" else strike - forward
        if not discount * max(worth, 0.0) < price < discount * (forward if kind == "C" else strike):
            return none
        implied_volatility, delta = _vollib()
        with np.errstate(all="ignore"):
            flag = kind.lower()
            iv = float(implied_volatility(price, forward, strike, rate, years, flag))
            if not (math.isfinite(iv) and iv > 0):
                return none
            slope = float(delta(flag, forward, strike, years, rate, iv))
    except Exception as error:
        # At the bounds, vollib raises errors of its own.
        expected = isinstance(error, ArithmeticError | ValueError) or type(error).__module__.startswith("vollib.")
        if on_fault is not None and not expected:
            on_fault(error)
        return none
    return iv, slope if math.isfinite(slope) else None
