"""A Databento live gateway for tests: the real protocol over TCP, a tape behind it, faults on order.

The tape runs on a clock of its own, whether or not a client is connected: what is sent while the
client is away is really missed unless it asks for it with `start`. Without `speed` the clock stands
until `advance_to` moves it, so tests need no sleeping.

    with Gateway(tape) as gateway:
        gateway.fault("eof", at=500)        # after 500 records of the tape
        gateway.advance_to(tape.end_ns)

By hand: python -m tests.fakes.gateway --tape FILE.dbn --port 13000 --speed 10 [--key KEY]
"""

from __future__ import annotations

import argparse
import hashlib
import secrets
import select
import signal
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import databento_dbn as dbn
import numpy as np
from databento_dbn import v1, v3

from tests.fakes.tape import NS, Listing, Tape, from_dbn

KEY = "db-0123456789abcdefghijklmnopqrs"
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

    def start_of(self, schema: str) -> int | None:
        return next((s.start for s in self.subscriptions if s.schema == schema), None)


class _Over(Exception):
    """This session ends here."""


class Gateway:
    """The server. `speed` None: the clock is moved by hand; inf: the whole tape at once."""

    def __init__(
        self,
        tape: Tape,
        *,
        keys: tuple[str, ...] = (KEY,),
        speed: float | None = None,
        port: int = 0,
        heartbeat_seconds: float | None = None,
        replay_ns: int = 24 * 3600 * NS,
        auth_delay: float = 0.0,
        version: int = 3,
        ack: bool = True,
        definitions: bool = True,
    ) -> None:
        self.tape = tape
        self.speed = speed
        self.replay_ns = replay_ns
        self.auth_delay = auth_delay
        self.heartbeat_seconds = heartbeat_seconds
        self.sessions: list[Session] = []
        self.refused_keys = 0
        self._keys, self._version, self._ack, self._definitions = keys, version, ack, definitions
        self._raw = memoryview(tape.records.tobytes())
        self._now = tape.start_ns
        self._began: float | None = None
        self._faults: list[Fault] = []
        self._cond = threading.Condition()
        self._stop = threading.Event()
        self._listener: socket.socket | None = None
        self._threads: list[threading.Thread] = []
        self.port = port

    # -- life --------------------------------------------------------------------------------

    def __enter__(self) -> Gateway:
        self.listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def listen(self) -> None:
        """Accept connections (again) on the same port."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(16)
        self.port = listener.getsockname()[1]
        self._listener = listener
        self._spawn(self._accept, listener)

    def refuse(self) -> None:
        """Close the listening socket: connects are refused until `listen()`."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the accepting thread
            listener.close()

    def close(self) -> None:
        """End everything."""
        self._stop.set()
        self.refuse()
        with self._cond:
            self._cond.notify_all()
        for thread in self._threads:
            thread.join(timeout=5)

    def _spawn(self, target: Any, *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    # -- orders ------------------------------------------------------------------------------

    def begin(self) -> None:
        """Let the clock run at `speed` from the tape's start."""
        with self._cond:
            self._began = time.monotonic()
            self._cond.notify_all()

    def advance_to(self, ts_ns: int) -> None:
        """Move the clock by hand."""
        with self._cond:
            self._now = max(self._now, ts_ns)
            self._cond.notify_all()

    def finish(self) -> None:
        """Move the clock to the end of the tape."""
        self.advance_to(self.tape.end_ns)

    def fault(self, kind: str, at: int | None = None, **how: Any) -> None:
        """Order a Fault; each happens once, to the first session that gets there."""
        with self._cond:
            self._faults.append(Fault(kind, at, **how))
            self._cond.notify_all()

    @property
    def now_ns(self) -> int:
        """The tape's clock."""
        if self._began is None or self.speed is None:
            return self._now
        if self.speed == float("inf"):
            return self.tape.end_ns
        return max(self._now, self.tape.start_ns + int((time.monotonic() - self._began) * self.speed * NS))

    @property
    def live(self) -> list[Session]:
        """Sessions that stream now."""
        return [s for s in self.sessions if s.live and not s.over]

    # -- connections -------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        while not self._stop.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self._spawn(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        session = Session(len(self.sessions))
        self.sessions.append(session)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, suppress(_Over, OSError):
            lines = connection.makefile("rb")
            self._authenticate(connection, lines, session)
            self._subscribe(lines, session)
            _Stream(self, connection, session).run()
        session.over = True

    def _authenticate(self, connection: socket.socket, lines: Any, session: Session) -> None:
        challenge = secrets.token_hex(16)
        connection.sendall(f"lsg_version=0.9.4\ncram={challenge}\n".encode())
        session.auth = _fields(lines)
        self._stop.wait(self.auth_delay)
        right = {f"{hashlib.sha256(f'{challenge}|{key}'.encode()).hexdigest()}-{key[-5:]}" for key in self._keys}
        if session.auth.get("auth") not in right:
            self.refused_keys += 1
            connection.sendall(b"success=0|error=User authentication failed: Authentication failed.\n")
            raise _Over
        connection.sendall(f"success=1|session_id={1700000000 + session.number}\n".encode())

    def _subscribe(self, lines: Any, session: Session) -> None:
        while True:
            said = _fields(lines)
            if "start_session" in said:
                return
            start = int(said["start"]) if "start" in said else None
            symbols = said["symbols"].split(",")
            before = session.subscriptions[-1] if session.subscriptions else None
            if before is not None and not before.last:
                before.symbols += symbols
                before.last = said["is_last"] == "1"
            else:
                session.subscriptions.append(
                    Subscription(said["schema"], said["stype_in"], symbols, start, said["is_last"] == "1")
                )


class _Stream:
    """One session after `start_session`."""

    def __init__(self, gateway: Gateway, connection: socket.socket, session: Session) -> None:
        self.gateway, self.connection, self.session = gateway, connection, session
        self.tape = gateway.tape
        asked = gateway.heartbeat_seconds
        self.heartbeat = float(session.auth.get("heartbeat_interval_s", "30")) if asked is None else asked
        self.quiet_since = time.monotonic()

    def run(self) -> None:
        gateway, session = self.gateway, self.session
        with gateway._cond:
            now = gateway.now_ns
        self.send(self._metadata(now))
        trades = [s for s in session.subscriptions if s.schema == "tbbo"]
        wanted = self._names(now)
        start = next((s.start for s in trades), None)
        if start is not None and 0 < start < now - gateway.replay_ns:
            self.send(self._error(now, 8, f"Replay start {start} is no longer available"))
            raise _Over
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
            dbn.Metadata(self.tape.dataset, start, None, dbn.SType.INSTRUMENT_ID, None, version=self.gateway._version)
        )

    def _names(self, now: int) -> list[Listing]:
        """Acknowledge, resolve and map; the instruments that the session wants."""
        wanted: dict[int, Listing] = {}
        for sub in self.session.subscriptions:
            if sub.schema not in ("tbbo", "definition"):
                self.send(self._error(now, 5, f"Schema {sub.schema} is not supported"))
                raise _Over
            if self.gateway._ack:
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
        if not subs or not self.gateway._definitions or self.gateway._version != 3:
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
        raw = gateway._raw if whole else memoryview(self.tape.records[positions].tobytes())
        base = 80 * int(positions[0]) if whole else 0
        at = 0
        replaying = self.session.start_of("tbbo") is not None
        while not gateway._stop.is_set():
            if replaying and at >= replayed:
                replaying = False
                self.send(self._system(gateway.now_ns, "Finished tbbo replay", dbn.SystemCode.REPLAY_COMPLETED))
            with gateway._cond:
                end, fault = self._next(positions, release, at)
                if end == at and fault is None:
                    gateway._cond.wait(self._patience(release, at))
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
        faults = self.gateway._faults
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
        if gateway.speed is not None and gateway._began is not None and at < len(release):
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
            raise _Over
        if fault.kind == "error":
            self.send(self._error(now, fault.code, fault.text))
            if fault.code not in (4, 7):
                raise _Over
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
        while not self.gateway._stop.is_set():
            if select.select([self.connection], [], [], 0.05)[0] and not self.connection.recv(4096):
                return

    def _beat(self, now: int) -> None:
        if self.heartbeat and time.monotonic() - self.quiet_since >= self.heartbeat:
            self.send(self._heartbeat(now))
        if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(4096):
            raise _Over

    # -- records -----------------------------------------------------------------------------

    def send(self, data: bytes | memoryview) -> None:
        if data:
            self.connection.sendall(data)
            self.quiet_since = time.monotonic()

    def _system(self, now: int, text: str, code: Any) -> bytes:
        if self.gateway._version == 1:
            return bytes(v1.SystemMsg(now, text))
        return bytes(v3.SystemMsg(now, text, code=code))

    def _heartbeat(self, now: int) -> bytes:
        return self._system(now, "Heartbeat", dbn.SystemCode.HEARTBEAT)

    def _error(self, now: int, code: int, text: str) -> bytes:
        if self.gateway._version == 1:
            return bytes(v1.ErrorMsg(now, text))
        return bytes(v3.ErrorMsg(now, text, code=dbn.ErrorCode(code)))

    def _mapping(self, now: int, symbol: str, listing: Listing) -> bytes:
        common = {"publisher_id": 1, "instrument_id": listing.native, "ts_event": now}
        spoken = {"stype_in_symbol": symbol[:21], "stype_out_symbol": listing.symbol, "start_ts": now, "end_ts": now}
        if self.gateway._version == 1:
            return bytes(v1.SymbolMappingMsg(**common, **spoken))
        types = {"stype_in": dbn.SType.PARENT, "stype_out": dbn.SType.RAW_SYMBOL}
        return bytes(v3.SymbolMappingMsg(**common, **types, **spoken))


def _fields(lines: Any) -> dict[str, str]:
    """`a=1|b=2` of the next line; the session is over at its end."""
    line = lines.readline()
    if not line.endswith(b"\n"):
        raise _Over
    return dict(part.split("=", 1) for part in line.decode().strip().split("|") if "=" in part)


def main(argv: list[str] | None = None) -> int:
    """Serve a tape until interrupted."""
    parser = argparse.ArgumentParser(description="A local Databento live gateway that plays a TBBO file.")
    parser.add_argument("--tape", required=True, help="TBBO file (.dbn or .dbn.zst)")
    parser.add_argument("--port", type=int, default=13000)
    parser.add_argument("--speed", type=float, default=1.0, help="tape seconds a second; inf for all at once")
    parser.add_argument("--key", default=KEY, help="the API key that is accepted")
    parser.add_argument("--heartbeat", type=float, default=None, help="seconds; default: what the client asks for")
    args = parser.parse_args(argv)
    gateway = Gateway(
        from_dbn(args.tape), keys=(args.key,), speed=args.speed, port=args.port, heartbeat_seconds=args.heartbeat
    )
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    with gateway:
        gateway.begin()
        print(f"{len(gateway.tape.records)} records on 127.0.0.1:{gateway.port}", flush=True)
        over.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
