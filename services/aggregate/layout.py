"""The arrays that the kernel works on: one structured dtype each, all fields 8 bytes.

Seconds are whole seconds since the epoch, `_ns` are nanoseconds. -1 stands for none.
"""

from __future__ import annotations

import numpy as np

from shared.frames import FEATURE_COLUMNS, STATE_COLUMNS

NONE = -1
NEVER = 1 << 60

# One second of one contract. `delta` is Σ(buy − sell) volume; `delta_high`/`delta_low` its running
# extremes from 0 at the second's start. `revision` is of the candles_1s row, NONE before its first.
SUMMARY = np.dtype(
    [
        ("sec", "<i8"), ("open", "<f8"), ("high", "<f8"), ("low", "<f8"), ("close", "<f8"),
        ("first_ns", "<i8"), ("last_ns", "<i8"), ("trades", "<i8"), ("volume", "<f8"),
        ("ask_volume", "<f8"), ("bid_volume", "<f8"), ("unknown_volume", "<f8"),
        ("delta", "<f8"), ("delta_high", "<f8"), ("delta_low", "<f8"),
        ("max_size", "<f8"), ("big_trades", "<i8"), ("big_volume", "<f8"),
        ("bid_depth", "<f8"), ("ask_depth", "<f8"), ("price_volume", "<f8"),
        ("spread_sum", "<f8"), ("spread_count", "<i8"), ("revision", "<i8"), ("dirty", "<i8"),
    ]
)  # fmt: skip

CONTRACT = np.dtype(
    [
        ("id", "<i8"), ("feed", "<i8"), ("root", "<i8"), ("next", "<i8"), ("expiry_ns", "<i8"),
        ("last_px", "<f8"), ("previous_px", "<f8"),  # newest price, and the newest different one before it
        ("last_sec", "<i8"), ("warm_sec", "<i8"),  # second of the newest trade; first row not before
        ("ring", "<i8"),  # its row of the rings; NONE for options, which have fixed candles only
        ("entity", "<i8"),
        ("seeded", "<i8"), ("cvd_seed", "<f8"),  # where the CVD of its own candles begins
        ("quote_ns", "<i8"), ("bid_px", "<f8"), ("ask_px", "<f8"), ("bid_sz", "<f8"), ("ask_sz", "<f8"),
    ]
)  # fmt: skip

# Volume of one contract in one minute: front-month selection looks at the last five.
MINUTE = np.dtype([("minute", "<i8"), ("volume", "<f8")])
MINUTES = 8

ROOT = np.dtype(
    [
        ("feed", "<i8"), ("calendar_from", "<i8"), ("calendar_to", "<i8"),  # its rows of `sessions`
        ("open_ns", "<i8"), ("close_ns", "<i8"),  # the session that the tape is in
        ("counted_open_ns", "<i8"), ("counted_close_ns", "<i8"),  # the session of session_cvd
        ("cvd", "<f8"), ("session_cvd", "<f8"), ("seeded", "<i8"),
        ("front", "<i8"), ("judged", "<i8"), ("big_size", "<f8"),
        ("head", "<i8"),  # its first contract with a ring; `next` of each leads to the others
        ("entity", "<i8"),  # of its continuous ticker; NONE where the ticker is a symbol of its own
    ]
)  # fmt: skip

# What a root looked like when the window ending at `end_sec` closed. `revision` is of the candles_1m row.
CLOSED = np.dtype(
    [
        ("end_sec", "<i8"), ("cvd", "<f8"), ("session_cvd", "<f8"), ("session_ns", "<i8"),
        ("front", "<i8"), ("revision", "<i8"), ("dirty", "<i8"),
    ]
)  # fmt: skip

FEED = np.dtype(
    [
        ("id", "<i8"), ("watermark_ns", "<i8"), ("grace_ns", "<i8"), ("closed_sec", "<i8"),
        ("watched_ns", "<i8"), ("last_sec", "<i8"), ("dirty_from_sec", "<i8"),
    ]
)  # fmt: skip

GAP = np.dtype([("feed", "<i8"), ("contract", "<i8"), ("start_ns", "<i8"), ("end_ns", "<i8")])

# What `fold` keeps of a root's trailing window between two seconds; never committed, always recomputable.
CACHE = np.dtype([("contract", "<i8"), ("block_sec", "<i8"), ("upto_sec", "<i8")])

# What has fixed candles: a contract (`root` NONE) or a continuous ticker (`contract` NONE). `cvd` and `close`
# are of its newest closed candle, the state columns as of that candle's end.
ENTITY = np.dtype(
    [
        ("contract", "<i8"), ("root", "<i8"), ("feed", "<i8"), ("cvd", "<f8"), ("close", "<f8"), ("dirty", "<i8"),
        *((name, "<f8") for name in STATE_COLUMNS[:9]),
    ]
)  # fmt: skip

# A fixed candle that may still change, in its entity's slots. `sec` is its start; `revision` NONE until it has a
# row; the state columns are what came within it until it closes, then what stood at its end. `dirty`: it waits to be
# emitted again, and with CHANGED to be folded again (not for a gap: its seconds may be gone).
BAR = np.dtype(
    [
        ("cvd", "<f8"), ("front", "<i8"),  # the contract that it is of
        ("book_ns", "<i8"), ("ticker_ns", "<i8"),
        *((name, SUMMARY[name].str) for name in SUMMARY.names or ()),
        *((name, "<f8") for name in STATE_COLUMNS),
    ]
)  # fmt: skip

CHANGED, REVISED = 1, 2

# A length of fixed candles, finest first. Its slots begin at `at`; candles are folded from those of `child`,
# the finest from seconds. `feature` is its row of feature states. Not all are emitted: some only shorten the fold.
TIMEFRAME = np.dtype(
    [
        ("seconds", "<i8"), ("offset", "<i8"), ("at", "<i8"), ("slots", "<i8"), ("child", "<i8"),
        ("emit", "<i8"), ("feature", "<i8"),
    ]
)  # fmt: skip

# Where a feature state keeps what: rings of the newest closes, signed volumes …, then single numbers.
UPTO, COUNT, CLOSES, SIGNED, RETURNS, VOLUMES, SIDED, BUCKETS, SIZES = 0, 1, 2, 34, 66, 82, 90, 154, 218
SCALARS = 282
(EMA_5, EMA_10, EMA_20, VOLUME_EMA, FAST, SLOW, SIGNAL, GAIN, LOSS, FULL, FILLED, BOUGHT, SOLD, SIZE) = range(
    SCALARS, SCALARS + 14
)
FEATURE_STATE = SCALARS + 14
assert len(FEATURE_COLUMNS) == 31  # services.aggregate.features writes each

PARAMS = np.dtype(
    [("max_lateness_ns", "<i8"), ("quiet_sec", "<i8"), ("emit_1s", "<i8"), ("lateness_sec", "<i8"), ("carry", "<i8")]
)

COUNTERS = (
    "rows_1m", "rows_1s", "late", "trades", "unknown_instrument", "outside_hours", "not_candled", "corrected",
    "rows_fixed", "wanted", "late_state",
)  # fmt: skip
(
    ROWS_1M, ROWS_1S, LATE_ROWS, TRADES, UNKNOWN, OUTSIDE, NOT_CANDLED, CORRECTED, ROWS_FIXED, WANTED, LATE_STATE,
) = range(11)  # fmt: skip

CHUNK = 16  # ring seconds per field of the committed state


def ring_seconds(max_lateness_sec: int) -> int:
    """Seconds that a ring holds: late trades, their windows, and room for corrections to wait."""
    need = max_lateness_sec + 60 + 64
    return 1 << (need - 1).bit_length()
