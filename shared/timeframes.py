"""Lengths of fixed candles: `15s`, `1m`, `4h`, `1d`, `1w`.

All are aligned to UTC midnight of 1970-01-01, weeks to Monday.
"""

from __future__ import annotations

import re

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
LONGEST_SEC = 30 * 86_400
MONDAY_SEC = 4 * 86_400  # the epoch was a Thursday
FEATURED = (15, 60)  # candles of these lengths, in seconds, carry features
_TEXT = re.compile(r"^([1-9]\d*)([smhdw])$")


def seconds_of(text: str) -> int:
    """Seconds of a timeframe; 0 for a text that is none (`2w`, `90x`, more than 30 days)."""
    match = _TEXT.match(text)
    if match is None or (match[2] == "w" and match[1] != "1"):
        return 0
    seconds = int(match[1]) * UNITS[match[2]]
    return seconds if seconds <= LONGEST_SEC else 0


def name_of(seconds: int) -> str:
    """The shortest writing: 60 -> `1m`, 90 -> `90s`, 604800 -> `1w`, 1209600 -> `14d`."""
    unit, length = next((u, n) for u, n in reversed(UNITS.items()) if seconds % n == 0 and (u != "w" or seconds == n))
    return f"{seconds // length}{unit}"


def offset_of(seconds: int) -> int:
    """Second at which a first candle of this length starts, within [0, seconds)."""
    return MONDAY_SEC if seconds == UNITS["w"] else 0
