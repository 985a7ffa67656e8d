"""A webhook receiver on 127.0.0.1 that answers as told and remembers what it was sent."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Got:
    """One request: its path, headers, body, and what it was answered."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    code: int

    @property
    def key(self) -> str:
        return self.headers.get("idempotency-key", "")


@dataclass
class Receiver:
    """`answer(path, how many requests that path had before)` gives the status and further headers."""

    answer: Callable[[str, int], tuple[int, dict[str, str]]] = lambda path, before: (204, {})
    got: list[Got] = field(default_factory=list)
    _port: int = 0

    def __post_init__(self) -> None:
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.release = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                headers = {name.lower(): value for name, value in self.headers.items()}
                if self.path.startswith("/hang"):
                    receiver.release.wait(20)
                with receiver._lock:
                    code, more = receiver.answer(self.path, receiver._seen[self.path])
                    receiver._seen[self.path] += 1
                    receiver.got.append(Got(self.path, headers, body, code))
                self.send_response(code)
                for name, value in more.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def url(self, path: str, scheme: str = "http") -> str:
        return f"{scheme}://127.0.0.1:{self.port}/{path}"

    def taken(self, path: str = "") -> list[Got]:
        """What was answered with 2xx, of one path or all."""
        with self._lock:
            return [g for g in self.got if 200 <= g.code < 300 and g.path.startswith(f"/{path}")]

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
