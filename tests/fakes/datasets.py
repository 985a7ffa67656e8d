"""The vendor's datasets API on a local port: daily CSV archives, the first day of each month without a key."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

KEY = "TD.secret-key-of-somebody"
_PATH = re.compile(r"/v1/([^/]+)/([^/]+)/(\d{4})/(\d\d)/(\d\d)/([^/]+)\.csv\.gz$")


class Datasets:
    """`with Datasets(archives) as server`: archives by (exchange, data type, day, symbol), at `server.url`.

    `faults`: symbol -> cut (ends before its length), cut once (only the first time), damaged, busy (503),
    silent (never answers) or none (0 bytes).
    `asked` lists the archives that were asked for.
    """

    def __init__(self, archives: dict[tuple[str, str, str, str], bytes]) -> None:
        self.archives, self.faults = archives, dict[str, str]()
        self.asked: list[tuple[str, str, str, str]] = []
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"api": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    api: Datasets
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        match = _PATH.match(self.path.partition("?")[0])
        if match is None:
            return self._refuse(404, "no such path")
        exchange, data_type, year, month, day, symbol = match.groups()
        key = (exchange, data_type, f"{year}-{month}-{day}", symbol)
        self.api.asked.append(key)
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {KEY}"):
            return self._refuse(401, f"The API key '{given}' is invalid.")
        if given is None and day != "01":
            return self._refuse(401, "Unauthorized: only the first day of each month is free.")
        if key not in self.api.archives:
            return self._refuse(404, f"There is no data for '{symbol}'.")
        return self._send(symbol, self.api.archives[key], self.api.faults.get(symbol, ""))

    def _send(self, symbol: str, body: bytes, fault: str) -> None:
        if fault == "busy":
            return self._refuse(503, "Service Unavailable")
        if fault == "silent":
            self.api.closing.wait()
            return None
        if fault == "cut once":
            del self.api.faults[symbol]
            fault = "cut"
        body = {"damaged": body[: len(body) // 2], "none": b""}.get(fault, body)
        self.send_response(200)
        self.send_header("Content-Type", "text/csv")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        self.close_connection = fault == "cut"
        return None

    def _refuse(self, status: int, message: str) -> None:
        body = json.dumps({"code": status, "message": message}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass
