"""The instruments of a partition, as the rows of its ticks name them."""

from __future__ import annotations

from contextlib import suppress

import msgspec

from shared.bus import Bus
from shared.frames import CLOCK, TICK, TICK_FRAMES, Frame
from shared.messages import Instrument, decode


class KnownInstruments:
    """Instruments by id: learned from the stream as it is read, looked up on the bus where it was not."""

    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.by_id: dict[int, Instrument] = {}

    def learn(self, bus: Bus, frame: Frame) -> dict[int, Instrument]:
        """All that are known, among them those of this frame's rows that the bus knows.

        Raises BusUnavailable.
        """
        if frame.kind == "instrument":
            with suppress(msgspec.DecodeError):  # the frame becomes a dead letter
                self.by_id.update((i.id, i) for i in decode(frame.body) if isinstance(i, Instrument))
        elif frame.kind in TICK_FRAMES and len(frame.body) % TICK.itemsize == 0:
            rows = frame.rows()
            missing = set(rows["instrument"][rows["kind"] != CLOCK].tolist()) - self.by_id.keys()
            if missing:
                self._ask(bus, sorted(missing))
        return self.by_id

    def _ask(self, bus: Bus, ids: list[int]) -> None:
        for number, body in zip(ids, bus.call("hmget", bus.keys.instruments(self.partition), ids), strict=True):
            if body is None:
                continue
            try:
                self.by_id[number] = msgspec.json.decode(body, type=Instrument)
            except msgspec.DecodeError:
                continue  # unknown, then
