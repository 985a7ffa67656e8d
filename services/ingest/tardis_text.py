"""Text columns to numbers: ISO instants to nanoseconds, trade ids to 32 bits; compiled, one pass over joined text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shared.compiled import jit
from shared.frames import Rows


def times(texts: Sequence[str]) -> NDArray[np.int64]:
    """ISO instants (UTC, ending in Z or +00:00, 0 to 9 fractional digits, 1970 to 2261) to ns; -1 for what is none."""
    out = np.empty(len(texts), np.int64)
    _times(_joined(texts), out)
    return out


def sequences(ids: Sequence[str | int | None]) -> NDArray[np.uint32]:
    """Low 32 bits of ids that are whole numbers (where not 0), crc32 of any others, 0 where there is none."""
    out = np.empty(len(ids), np.uint32)
    try:
        buffer = _joined(ids)  # type: ignore[arg-type]
    except TypeError:
        buffer = _joined(["" if i is None else str(i) for i in ids])
    _sequences(buffer, _CRC, out)
    return out


def _joined(texts: Sequence[str]) -> NDArray[np.uint8]:
    """The texts with a line feed behind each."""
    whole = "\n".join(texts)
    if whole.count("\n") != max(0, len(texts) - 1):  # no id or time has a line feed in it: mark it as none
        whole = "\n".join(["?" if "\n" in text else text for text in texts])
    return np.frombuffer((whole + "\n").encode("utf-8", "replace"), np.uint8)


def _crc_table() -> NDArray[np.uint32]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0xEDB88320), table >> 1).astype(np.uint32)
    return table


_CRC = _crc_table()


@jit
def _sequences(text: Rows, table: Rows, out: Rows) -> None:
    at = 0
    for i in range(len(out)):
        number = np.int64(0)
        whole = True
        crc = np.uint32(0xFFFFFFFF)
        begin = at
        while text[at] != 10:
            digit = np.int64(text[at]) - 48
            if digit < 0 or digit > 9:
                whole = False
            number = (number * 10 + digit) & 0xFFFFFFFF
            crc = table[(crc ^ text[at]) & 0xFF] ^ (crc >> np.uint32(8))
            at += 1
        if at == begin:
            out[i] = 0
        elif whole and number != 0:
            out[i] = np.uint32(number)
        else:
            out[i] = crc ^ np.uint32(0xFFFFFFFF)
        at += 1


@jit
def _times(text: Rows, out: Rows) -> None:
    at = 0
    day_text, day_ns = -1, 0
    for i in range(len(out)):
        end = at
        while text[end] != 10:
            end += 1
        out[i] = -1
        length = end - at
        good = length >= 20 and text[at + 4] == 45 and text[at + 7] == 45 and text[at + 10] == 84
        good = good and text[at + 13] == 58 and text[at + 16] == 58
        if good:
            date = _digits(text, at, 4) * 10000 + _digits(text, at + 5, 2) * 100 + _digits(text, at + 8, 2)
            if date != day_text:
                day_text, day_ns = date, _day(date)
            hour, minute, second = _digits(text, at + 11, 2), _digits(text, at + 14, 2), _digits(text, at + 17, 2)
            here = at + 19
            fraction = np.int64(0)
            digits = 0
            if text[here] == 46:
                here += 1
                while digits < 9 and 48 <= text[here] <= 57:
                    fraction = fraction * 10 + (text[here] - 48)
                    here += 1
                    digits += 1
                good = digits > 0
            for _ in range(9 - digits):
                fraction *= 10
            left = end - here
            zulu = left == 1 and text[here] == 90
            if left == 6:  # +00:00
                zulu = text[here] == 43 and text[here + 3] == 58
                zulu = zulu and _digits(text, here + 1, 2) == 0 and _digits(text, here + 4, 2) == 0
            good = good and zulu and day_ns >= 0 and 0 <= hour < 24 and 0 <= minute < 60 and 0 <= second < 60
            if good:
                out[i] = day_ns + (hour * 3600 + minute * 60 + second) * 1_000_000_000 + fraction
        at = end + 1


@jit
def _digits(text: Rows, at: int, count: int) -> int:
    """A number of so many digits; far below 0 if one is none."""
    number = 0
    for i in range(count):
        digit = int(text[at + i]) - 48
        if digit < 0 or digit > 9:
            return -1_000_000_000
        number = number * 10 + digit
    return number


@jit
def _day(date: int) -> int:
    """Midnight of yyyymmdd in ns; -1 for no date.

    Days from the civil calendar, counted in 400-year eras that begin on 1 March.
    """
    if date < 19700101 or date > 22611231:
        return -1
    year, month, day = date // 10000, date // 100 % 100, date % 100
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    if month < 1 or month > 12 or day < 1:
        return -1
    longest = 30 + (month + month // 8) % 2
    if month == 2:
        longest = 29 if leap else 28
    if day > longest:
        return -1
    if month <= 2:
        year -= 1
    era = year // 400
    of_era = year - era * 400
    of_year = (153 * ((month + 9) % 12) + 2) // 5 + day - 1
    days = era * 146097 + of_era * 365 + of_era // 4 - of_era // 100 + of_year - 719468
    return days * 86_400_000_000_000
