"""Which messages of a JSON frame can be rows: one that cannot must not take its neighbours along."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from datetime import date
from typing import Any, NamedTuple

import msgspec

from shared.frames import NS
from shared.messages import AnyMessage, Usage, decode, encode
from shared.tables import MESSAGE_TABLES

_INT64 = 1 << 63


class Unsound(NamedTuple):
    """A message that can be no row: its number in the frame, the table that it was for, and its values."""

    row: int
    table: str
    reason: str
    values: dict[str, Any]


def check(kind: str, body: bytes) -> tuple[list[tuple[int, AnyMessage]], list[Unsound]]:
    """(number, message) of the sound messages of a frame of this kind, and the others.

    Raises ValueError (which DecodeError is) or RecursionError for a body that is no array of messages; one of a
    message table's kind needs only be an array, for its messages are then told apart one by one.
    """
    try:
        found, unsound = list(enumerate(decode(body))), list[Unsound]()
    except msgspec.DecodeError:
        if kind not in MESSAGE_TABLES:
            raise
        found, unsound = _one_by_one(kind, body)
    sound = []
    for row, message in found:
        reason = wrong(message)
        if reason:
            tag = _tag(message)
            values = {"type": tag} | msgspec.structs.asdict(message)
            unsound.append(Unsound(row, MESSAGE_TABLES[tag][0].name, reason, values))
        else:
            sound.append((row, message))
    return sound, unsound


def wrong(message: AnyMessage) -> str:
    """Why a message is no row of its table; empty for a sound one, and for one that no table takes."""
    if _tag(message) not in MESSAGE_TABLES:
        return ""
    reason = next(_wrongs(message), "")
    if not reason and isinstance(message, Usage) and not _is_day(message.day):
        reason = "day is no date"
    if not reason and getattr(message, "time_window_ns", 0) % NS:
        reason = "time_window_ns is no whole second"
    return reason


def _tag(message: AnyMessage) -> str:
    return str(message.__struct_config__.tag)


def _one_by_one(kind: str, body: bytes) -> tuple[list[tuple[int, AnyMessage]], list[Unsound]]:
    """The standard reader takes what JSON does not have (NaN, Infinity), so that the row is told by its number."""
    values = json.loads(body)
    if not isinstance(values, list):
        raise ValueError("no array")
    found: list[tuple[int, AnyMessage]] = []
    unsound = []
    for row, value in enumerate(values):
        try:
            message = msgspec.convert(value, AnyMessage)
            if _tag(message) not in MESSAGE_TABLES:
                encode([message])  # the reader here takes text that is none, and nobody looks at these again
            found.append((row, message))
        except (ValueError, OverflowError, RecursionError) as error:
            named = value if isinstance(value, dict) else {"value": value}
            tables = MESSAGE_TABLES.get(str(named.get("type"))) or MESSAGE_TABLES[kind]
            told = str(error).encode(errors="replace").decode()  # it may quote what is no text
            unsound.append(Unsound(row, tables[0].name, f"no such message ({told})", named))
    return found, unsound


def _wrongs(part: msgspec.Struct) -> Iterator[str]:
    """What no store takes: of the message, of its parts, and of the parts in its lists."""
    for name in part.__struct_fields__:
        value = getattr(part, name)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, msgspec.Struct):
                yield from _wrongs(each)
            elif isinstance(each, float):
                if not math.isfinite(each):
                    yield f"{name} is not finite"
            elif isinstance(each, int):
                if not (0 if name.endswith("_ns") else -_INT64) <= each < _INT64:
                    yield f"{name} cannot be"
            elif isinstance(each, str) and not _is_text(each):
                yield f"{name} is no text"


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
