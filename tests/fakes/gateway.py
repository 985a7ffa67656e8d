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
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from tests.fakes.gateway_stream import Fault, Over, Session, Stream, Subscription
from tests.fakes.tape import NS, Tape, from_dbn

KEY = "db-0123456789abcdefghijklmnopqrs"


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
        self._keys, self.version, self.ack, self.definitions = keys, version, ack, definitions
        self.raw = memoryview(tape.records.tobytes())
        self._now = tape.start_ns
        self.began: float | None = None
        self.faults: list[Fault] = []
        self.cond = threading.Condition()
        self.stop = threading.Event()
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
        self.stop.set()
        self.refuse()
        with self.cond:
            self.cond.notify_all()
        for thread in self._threads:
            thread.join(timeout=5)

    def _spawn(self, target: Any, *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    # -- orders ------------------------------------------------------------------------------

    def begin(self) -> None:
        """Let the clock run at `speed` from the tape's start."""
        with self.cond:
            self.began = time.monotonic()
            self.cond.notify_all()

    def advance_to(self, ts_ns: int) -> None:
        """Move the clock by hand."""
        with self.cond:
            self._now = max(self._now, ts_ns)
            self.cond.notify_all()

    def finish(self) -> None:
        """Move the clock to the end of the tape."""
        self.advance_to(self.tape.end_ns)

    def fault(self, kind: str, at: int | None = None, **how: Any) -> None:
        """Order a Fault; each happens once, to the first session that gets there."""
        with self.cond:
            self.faults.append(Fault(kind, at, **how))
            self.cond.notify_all()

    @property
    def now_ns(self) -> int:
        """The tape's clock."""
        if self.began is None or self.speed is None:
            return self._now
        if self.speed == float("inf"):
            return self.tape.end_ns
        return max(self._now, self.tape.start_ns + int((time.monotonic() - self.began) * self.speed * NS))

    @property
    def live(self) -> list[Session]:
        """Sessions that stream now."""
        return [s for s in self.sessions if s.live and not s.over]

    # -- connections -------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        while not self.stop.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self._spawn(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        session = Session(len(self.sessions))
        self.sessions.append(session)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, suppress(Over, OSError):
            lines = connection.makefile("rb")
            self._authenticate(connection, lines, session)
            self._subscribe(lines, session)
            Stream(self, connection, session).run()
        session.over = True

    def _authenticate(self, connection: socket.socket, lines: Any, session: Session) -> None:
        challenge = secrets.token_hex(16)
        connection.sendall(f"lsg_version=0.9.4\ncram={challenge}\n".encode())
        session.auth = _fields(lines)
        self.stop.wait(self.auth_delay)
        right = {f"{hashlib.sha256(f'{challenge}|{key}'.encode()).hexdigest()}-{key[-5:]}" for key in self._keys}
        if session.auth.get("auth") not in right:
            self.refused_keys += 1
            connection.sendall(b"success=0|error=User authentication failed: Authentication failed.\n")
            raise Over
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


def _fields(lines: Any) -> dict[str, str]:
    """`a=1|b=2` of the next line; the session is over at its end."""
    line = lines.readline()
    if not line.endswith(b"\n"):
        raise Over
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
