"""What an instrument was on a day: its versions on the bus, one for each day on which it was defined anew.

Only definitions have versions: what is guessed from a name has no `defined_ns`, and no day.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from shared.frames import NS, iso
from shared.messages import Instrument

if TYPE_CHECKING:
    from shared.bus import Bus

DAY_NS = 86_400 * NS
# Versions of an instrument are dropped so long after its expiry.
KEPT_NS = 40 * DAY_NS


def same(a: Instrument, b: Instrument) -> bool:
    """Whether two say the same, whenever they said it."""
    return a == b or msgspec.structs.replace(a, defined_ns=b.defined_ns) == b


def day_of(ns: int) -> str:
    """The UTC day of an instant: `2026-12-18`."""
    return iso(ns)[:10]


def field_of(instrument: Instrument) -> str | None:
    """Field of a version in `Keys.instrument_days`; None for what nobody defined."""
    return f"{instrument.id}@{day_of(instrument.defined_ns)}" if instrument.defined_ns is not None else None


def new_versions(instruments: Iterable[Instrument], known: Mapping[int, Instrument]) -> dict[str, bytes]:
    """Fields to write: of instruments, in order, each that differs from the newest known one of its id."""
    newest = dict(known)
    fields: dict[str, bytes] = {}
    for instrument in instruments:
        name, before = field_of(instrument), newest.get(instrument.id)
        if name is not None and (before is None or before.defined_ns is None or not same(before, instrument)):
            fields[name] = msgspec.json.encode(instrument)
        newest[instrument.id] = instrument
    return fields


def outdated(versions: Mapping[str, bytes], now_ns: int) -> list[str]:
    """Fields of versions whose instrument expired more than KEPT_NS before `now_ns`."""
    return [
        name for name, found in decoded(versions)
        if found.expiration_ns is not None and found.expiration_ns < now_ns - KEPT_NS
    ]  # fmt: skip


def on_day(bus: Bus, partition: int, day: str | None) -> list[Instrument]:
    """Instruments of a partition as last defined on a UTC day or before it, or (None) as they are now.

    On a day: those that were known by then and had not expired before it; what nobody defined has no days, so
    it is as it is now. Raises BusUnavailable.
    """
    newest = {i.id: i for _, i in decoded(_all(bus, bus.keys.instruments(partition)))}
    if day is None:
        return list(newest.values())
    found = {i.id: i for i in newest.values() if i.defined_ns is None}
    held = _all(bus, bus.keys.instrument_days(partition))
    for name, instrument in sorted(decoded(held), key=lambda item: item[0].partition("@")[2]):
        if name.partition("@")[2] <= day:
            found[instrument.id] = instrument
    return [i for i in found.values() if i.expiration_ns is None or day_of(i.expiration_ns) >= day]


def decoded(fields: Mapping[str, bytes]) -> Iterator[tuple[str, Instrument]]:
    """Fields that are Instruments; others are left out."""
    for name, body in fields.items():
        with suppress(msgspec.DecodeError):
            yield name, msgspec.json.decode(body, type=Instrument)


def _all(bus: Bus, key: str) -> dict[str, bytes]:
    return {name.decode(): body for name, body in bus.call("hgetall", key).items()}
