"""Instants as people and other programs write them, in ns since 1970 UTC."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime
from typing import Any

from shared.frames import NS, iso

LOWEST, HIGHEST = -(1 << 63) + 1, (1 << 63) - 1  # the lowest int64 stands for none
_ISO = re.compile(
    r"(?P<day>\d{4}-\d\d-\d\d)"
    r"(?:[T ](?P<time>\d\d:\d\d(?::\d\d)?)(?:[.,](?P<fraction>\d+))?\s*"
    r"(?P<zone>Z|UTC|[+-]\d\d(?::?\d\d)?)?)?",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_DAY = re.compile(r"(19[7-9]\d|2[01]\d\d)([01]\d)([0-3]\d)")  # 20231225
# Below so much an epoch is in s, ms, µs, ns: each reaches from 1973 to beyond the year 5000 of the one before.
_EPOCHS = ((10**11, NS), (10**14, 1_000_000), (10**17, 1000))


def instant_ns(value: Any) -> int:
    """The instant of an ISO text (any precision; without a zone UTC), a day (20231225, too), or an epoch of any unit.

    Whether a number is in s, ms, µs or ns is told by its size, so not for instants before 1973. Raises ValueError.
    """
    if isinstance(value, str):
        text = value.strip()
        day = _DAY.fullmatch(text)
        text = "-".join(day.groups()) if day else text
        ns = _of_number(text) if _NUMBER.fullmatch(text) else _of_text(text)
    elif isinstance(value, datetime):
        ns = _of_datetime(value if value.tzinfo else value.replace(tzinfo=UTC))
    elif isinstance(value, date):
        ns = _of_datetime(datetime(value.year, value.month, value.day, tzinfo=UTC))
    elif isinstance(value, int) and not isinstance(value, bool):
        return instant_ns(str(value))
    elif isinstance(value, float) and abs(value) < HIGHEST:
        ns = int(value) * _unit(int(value)) if value.is_integer() else _of_number(f"{value:.9f}")
    else:
        raise ValueError(f"'{value}' is no instant")
    if not LOWEST <= ns <= HIGHEST:
        raise ValueError(f"'{value}' is beyond what an instant can be")
    return ns


def iso_second(ns: int) -> str:
    """As stores tell the time of a row, in whole seconds: 2023-12-25T23:01:00Z."""
    return iso(ns // NS * NS)[:19] + "Z"


def _unit(number: int) -> int:
    return next((unit for bound, unit in _EPOCHS if abs(number) < bound), 1)


def _of_number(text: str) -> int:
    whole, _, fraction = text.partition(".")
    unit = _unit(int(whole))
    digits = len(str(unit)) - 1
    part = int(fraction[:digits].ljust(digits, "0") or 0) if digits else 0
    return int(whole) * unit + (-part if whole.startswith("-") else part)


def _of_text(text: str) -> int:
    match = _ISO.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is no instant")
    zone = (match["zone"] or "Z").upper()
    zone = "+00:00" if zone in ("Z", "UTC") else zone
    try:
        at = datetime.fromisoformat(f"{match['day']}T{match['time'] or '00:00'}{zone}")
    except ValueError:
        raise ValueError(f"'{text}' is no instant") from None
    return _of_datetime(at) + int((match["fraction"] or "")[:9].ljust(9, "0"))


def _of_datetime(at: datetime) -> int:
    since = at - datetime(1970, 1, 1, tzinfo=UTC)
    return ((since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds) * 1000
