"""Who was the aggressor: the feed's word, else Lee–Ready.

Source: C. Lee and M. Ready, "Inferring Trade Direction from Intraday Data", Journal of Finance
46 (1991), with a quote delay of 0.
"""

from __future__ import annotations

import numpy as np

from shared.compiled import jit_inline


@jit_inline
def lee_ready(price: float, bid: float, ask: float, reference: float) -> int:
    """1 buy, -1 sell, 0 unknown.

    `bid` and `ask` are the quotes just before the trade (NaN if none); `reference` is the
    instrument's last different price (NaN if none). At or beyond a quote that quote decides,
    inside the nearer one, at the midpoint or under a crossed, locked or one-sided book the tick rule.
    """
    if bid < ask:  # False too when one is NaN
        if price >= ask:
            return 1
        if price <= bid:
            return -1
        to_ask = ask - price
        to_bid = price - bid
        if to_ask < to_bid:
            return 1
        if to_bid < to_ask:
            return -1
    if np.isnan(reference) or price == reference:
        return 0
    return 1 if price > reference else -1
