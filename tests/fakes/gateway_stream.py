"""What the test gateway sends to one client after `start_session`, and the faults on the way."""

from __future__ import annotations

import select
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Any

import databento_dbn as dbn
import numpy as np
from databento_dbn import v1, v3

from tests.fakes.tape import NS, Listing

SLICE = 256 << 10
ENDS = ("eof", "rst", "silence")


@dataclass
class Fault:
    """One order. `at`: position on the tape (records before it are sent), None for at once.

    `eof`, `rst`: the connection ends; `torn` bytes of the next record go out before.
    `silence`: it stays open, and nothing more is sent. `refuse`: with the end of the connection the
    listening socket closes too, until `listen()`. `error`: an ErrorMsg with `code` (fatal ones end
    the session). `slow_reader`, `heartbeat`, `records`: a record; the session goes on.
    """

    kind: str
    at: int | None = None
    code: int = 0
    text: str = ""
    torn: int = 0
    refuse: bool = False
    extra: bytes = b""


@dataclass
class Subscription:
    """One subscription request, as received."""

    schema: str
    stype: str
    symbols: list[str]
    start: int | None
    last: bool = True


@dataclass
class Session:
    """What a client did, for tests to look at."""

    number: int
    auth: dict[str, str] = field(default_factory=dict)
    subscriptions: list[Subscription] = field(default_factory=list)
    live: bool = False
    over: bool = False
    sent: int = 0  # trade records
    records_bytes: int = 0  # of all records

    def start_of(self, schema: str) -> int | None:
        return next((s.start for s in self.subscriptions if s.schema == schema), None)


class Over(Exception):
    """This session ends here."""


class Stream:
    """One session after `start_session`."""

    def __init__(self, gateway: Any, connection: socket.socket, session: Session) -> None:
        self.gateway, self.connection, self.session = gateway, connection, session
        self.tape = gateway.tape
        asked = gateway.heartbeat_seconds
        self.heartbeat = float(session.auth.get("heartbeat_interval_s", "30")) if asked is None else asked
        self.quiet_since = time.monotonic()

    def run(self) -> None:
        gateway, session = self.gateway, self.session
        with gateway.cond:
            now = gateway.now_ns
        self.send(self._metadata(now))
        session.records_bytes = 0
        trades = [s for s in session.subscriptions if s.schema == "tbbo"]
        wanted = self._names(now)
        start = next((s.start for s in trades), None)
        if start is not None and 0 < start < now - gateway.replay_ns:
            self.send(self._error(now, 8, f"Replay start {start} is no longer available"))
            raise Over
        self._definitions(wanted, now)
        # What stands at the very start of the tape goes out once the clock has begun to move.
        first = int(np.searchsorted(self.tape.release_ns, now, "left" if now == self.tape.start_ns else "right"))
        session.live = True
        positions = self._positions([i.native for i in wanted] if trades else [], start, first)
        self._play(positions, replayed=int(np.searchsorted(positions, first)) if start is not None else 0)

    # -- the beginning -----------------------------------------------------------------------

    def _metadata(self, now: int) -> bytes:
        start = min((s.start for s in self.session.subscriptions if s.start), default=now)
        return bytes(
            dbn.Metadata(self.tape.dataset, start, None, dbn.SType.INSTRUMENT_ID, None, version=self.gateway.version)
        )

    def _names(self, now: int) -> list[Listing]:
        """Acknowledge, resolve and map; the instruments that the session wants."""
        wanted: dict[int, Listing] = {}
        for sub in self.session.subscriptions:
            if sub.schema not in ("tbbo", "definition"):
                self.send(self._error(now, 5, f"Schema {sub.schema} is not supported"))
                raise Over
            if self.gateway.ack:
                text = f"Subscription request for {sub.schema} data succeeded"
                self.send(self._system(now, text, dbn.SystemCode.SUBSCRIPTION_ACK))
            for symbol in sub.symbols:
                found = self.tape.resolve(sub.stype, symbol)
                if not found:
                    self.send(self._error(now, 4, f"Failed to resolve symbol '{symbol}' for {sub.schema}"))
                for listing in found:
                    if listing.native not in wanted:
                        self.send(self._mapping(now, symbol, listing))
                    wanted[listing.native] = listing
        return list(wanted.values())

    def _definitions(self, wanted: list[Listing], now: int) -> None:
        subs = [s for s in self.session.subscriptions if s.schema == "definition"]
        if not subs or not self.gateway.definitions or self.gateway.version != 3:
            return
        # Captured at the start of the week; a session that does not look back gets none.
        defined_ns = self.tape.start_ns - 3600 * NS
        if subs[0].start is not None and subs[0].start <= defined_ns:
            self.send(b"".join(bytes(i.definition(defined_ns)) for i in wanted if i.defined))
            self.send(self._system(now, "Finished definition replay", dbn.SystemCode.REPLAY_COMPLETED))

    def _positions(self, natives: list[int], start: int | None, first: int) -> Any:
        """Positions on the tape of what this session gets, replayed and live."""
        records = self.tape.records
        mine = np.isin(records["instrument_id"], np.array(natives, np.uint32))
        mine[:first] &= False if start is None else records["ts_event"][:first] >= start
        return np.flatnonzero(mine)

    # -- the tape ----------------------------------------------------------------------------

    def _play(self, positions: Any, replayed: int) -> None:
        gateway = self.gateway
        release = self.tape.release_ns[positions]
        whole = len(positions) > 0 and int(positions[-1] - positions[0]) == len(positions) - 1
        raw = gateway.raw if whole else memoryview(self.tape.records[positions].tobytes())
        base = 80 * int(positions[0]) if whole else 0
        at = 0
        replaying = self.session.start_of("tbbo") is not None
        while not gateway.stop.is_set():
            if replaying and at >= replayed:
                replaying = False
                self.send(self._system(gateway.now_ns, "Finished tbbo replay", dbn.SystemCode.REPLAY_COMPLETED))
            with gateway.cond:
                end, fault = self._next(positions, release, at)
                if end == at and fault is None:
                    gateway.cond.wait(self._patience(release, at))
                    end, fault = self._next(positions, release, at)
                now = gateway.now_ns
            end = min(end, at + SLICE // 80)
            end = min(end, replayed) if replaying else end
            self.send(raw[base + 80 * at : base + 80 * end])
            at = self.session.sent = end
            if fault is not None:
                self._obey(fault, now, bytes(raw[base + 80 * at : base + 80 * at + fault.torn]))
            self._beat(now)

    def _next(self, positions: Any, release: Any, at: int) -> tuple[int, Fault | None]:
        """How far to send, or the fault that comes before the next record (each only once)."""
        faults = self.gateway.faults
        end = max(at, int(np.searchsorted(release, self.gateway.now_ns, "right")))
        due: tuple[int, Fault] | None = None
        for fault in faults:
            place = at if fault.at is None else max(at, int(np.searchsorted(positions, fault.at)))
            if place <= end and (due is None or place < due[0]):
                due = (place, fault)
        if due is None:
            return end, None
        if due[0] > at:
            return due[0], None
        faults.remove(due[1])
        return at, due[1]

    def _patience(self, release: Any, at: int) -> float:
        gateway = self.gateway
        wait = 0.05
        if gateway.speed is not None and gateway.began is not None and at < len(release):
            wait = min(wait, max(0.0005, (int(release[at]) - gateway.now_ns) / NS / gateway.speed))
        return wait

    def _obey(self, fault: Fault, now: int, torn: bytes) -> None:
        if fault.refuse:
            self.gateway.refuse()
        if fault.kind in ENDS:
            if torn:
                self.send(torn)
            if fault.kind == "rst":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif fault.kind == "silence":
                self._hold()
            raise Over
        if fault.kind == "error":
            self.send(self._error(now, fault.code, fault.text))
            if fault.code not in (4, 7):
                raise Over
        elif fault.kind == "slow_reader":
            self.send(self._system(now, "Warning: slow reader", dbn.SystemCode.SLOW_READER_WARNING))
        elif fault.kind == "heartbeat":
            self.send(self._heartbeat(now))
        elif fault.kind == "records":
            self.send(fault.extra)
        else:
            raise ValueError(f"no fault '{fault.kind}'")

    def _hold(self) -> None:
        """Until the client gives up."""
        while not self.gateway.stop.is_set():
            if select.select([self.connection], [], [], 0.05)[0] and not self.connection.recv(4096):
                return

    def _beat(self, now: int) -> None:
        if self.heartbeat and time.monotonic() - self.quiet_since >= self.heartbeat:
            self.send(self._heartbeat(now))
        if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(4096):
            raise Over

    # -- records -----------------------------------------------------------------------------

    def send(self, data: bytes | memoryview) -> None:
        if data:
            self.connection.sendall(data)
            self.session.records_bytes += len(data)
            self.quiet_since = time.monotonic()

    def _system(self, now: int, text: str, code: Any) -> bytes:
        if self.gateway.version == 1:
            return bytes(v1.SystemMsg(now, text))
        return bytes(v3.SystemMsg(now, text, code=code))

    def _heartbeat(self, now: int) -> bytes:
        return self._system(now, "Heartbeat", dbn.SystemCode.HEARTBEAT)

    def _error(self, now: int, code: int, text: str) -> bytes:
        if self.gateway.version == 1:
            return bytes(v1.ErrorMsg(now, text))
        return bytes(v3.ErrorMsg(now, text, code=dbn.ErrorCode(code)))

    def _mapping(self, now: int, symbol: str, listing: Listing) -> bytes:
        common = {"publisher_id": 1, "instrument_id": listing.native, "ts_event": now}
        spoken = {"stype_in_symbol": symbol[:21], "stype_out_symbol": listing.symbol, "start_ts": now, "end_ts": now}
        if self.gateway.version == 1:
            return bytes(v1.SymbolMappingMsg(**common, **spoken))
        types = {"stype_in": dbn.SType.PARENT, "stype_out": dbn.SType.RAW_SYMBOL}
        return bytes(v3.SymbolMappingMsg(**common, **types, **spoken))
