"""The arrays that the kernel works on: one structured dtype each, all fields 8 bytes.

`_ns` are nanoseconds, `win` is the number of a window since the epoch. -1 stands for none. Windows are kept in a
few slots: window w is in slot w mod the number of slots.
"""

from __future__ import annotations

import numpy as np

NONE = -1
NEVER = 1 << 62
# Prices and sizes from here on are no such thing; what is summed up of smaller ones stays finite.
ABSURD = 1e15
WAITING = 10_000  # trades of a partition that wait for a definition
GRACE_SEC = 60  # the most that a feed's watermark stays behind its rows, by the settings

# What a contract is to this stage.
PLAIN, DEFINED, UNDEFINED, PERPETUAL, IGNORED = range(5)

PARAMS = np.dtype([("window_ns", "<i8"), ("max_lateness_ns", "<i8"), ("wait_ns", "<i8")])

# `due_ns`: the first end of an open window that has rows; `wait_ns`: when the first waiting trade has waited enough.
FEED = np.dtype(
    [("id", "<i8"), ("watermark_ns", "<i8"), ("grace_ns", "<i8"), ("watched_ns", "<i8"), ("due_ns", "<i8"),
     ("wait_ns", "<i8")]
)  # fmt: skip

# A (venue, ticker): its rows of `sessions`, the session that the tape is in, and the second since which late trades
# are accepted (the tape's when it was first defined).
MARKET = np.dtype(
    [("feed", "<i8"), ("calendar_from", "<i8"), ("calendar_to", "<i8"), ("open_ns", "<i8"), ("close_ns", "<i8"),
     ("since_sec", "<i8")]
)  # fmt: skip

CONTRACT = np.dtype(
    [
        ("id", "<i8"), ("feed", "<i8"), ("market", "<i8"), ("sort", "<i8"),
        ("under", "<i8"), ("key", "<i8"), ("multiplier", "<f8"),  # of options
        ("last_px", "<f8"), ("previous_px", "<f8"),  # newest price, and the newest different one before it
        ("quote_ns", "<i8"), ("bid_px", "<f8"), ("ask_px", "<f8"),
        # The trades one behind the other at one event time by one aggressor: the first's price, and their volume.
        ("run_ns", "<i8"), ("run_side", "<i8"), ("run_px", "<f8"), ("run_volume", "<f8"), ("run_swept", "<i8"),
    ]
)  # fmt: skip

# The newest of a window (in its slot) or of all before those held (in the last column): a future's price, or what
# an option's summary says: price of the underlying, implied volatility (0.5 is 50 %), delta.
SEEN = np.dtype([("ns", "<i8"), ("px", "<f8"), ("iv", "<f8"), ("delta", "<f8")])

UNDERLYING = np.dtype([("feed", "<i8"), ("block_size", "<f8")])

# A window of an underlying in its slot; `revision` of its rollup, NONE while the window is open.
CLOSE = np.dtype([("win", "<i8"), ("revision", "<i8")])

KEY = np.dtype([("under", "<i8"), ("expiration_ns", "<i8"), ("strike", "<f8"), ("kind", "<i8")])

# A key in a window. `complete` is as last emitted, `offset` Σ size · (event time − window start).
CELL = np.dtype(
    [
        ("win", "<i8"), ("revision", "<i8"), ("complete", "<i8"), ("trades", "<i8"),
        ("volume", "<f8"), ("ask_volume", "<f8"), ("bid_volume", "<f8"), ("unknown_volume", "<f8"),
        ("max_size", "<f8"), ("price_volume", "<f8"),
        ("premium", "<f8"), ("ask_premium", "<f8"), ("bid_premium", "<f8"),
        ("open", "<f8"), ("close", "<f8"), ("first_ns", "<i8"), ("last_ns", "<i8"), ("offset", "<f8"),
        ("sweeps", "<i8"), ("sweep_ask_volume", "<f8"), ("sweep_bid_volume", "<f8"),
        ("blocks", "<i8"), ("block_ask_volume", "<f8"), ("block_bid_volume", "<f8"),
    ]
)  # fmt: skip

# What `run` paused for, and whom it concerns (see there).
REASON, WHO, MARK = range(3)
GOING, DUE, LATE_TRADE, NEW_KEY, CROWDED, FULL = range(6)

# How many trades wait, and when the first of an unknown instrument has waited enough.
HELD, UNTIL = range(2)

COUNTERS = (
    "trades", "not_options", "outside_hours", "late", "too_late", "undefined", "spreads", "waited", "undefinable",
)  # fmt: skip
(TRADES, NOT_OPTIONS, OUTSIDE, LATE, TOO_LATE, NO_NUMBER, SPREADS, WAITED, UNDEFINABLE) = range(9)


def slots(window_sec: int, max_lateness_sec: int) -> int:
    """Windows that are held: late trades', the open one, and those within a feed's grace ahead of its watermark."""
    need = 3 + -(-(max_lateness_sec + GRACE_SEC) // window_sec)
    return 1 << (need - 1).bit_length()
