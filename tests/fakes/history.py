"""Databento Historical for tests: the endpoints that backfills and downloads need, as the real client calls them.

A request that is not as the client sends it (method, path, form, authorization) is answered with the
vendor's kind of error and remembered in `complaints`. Data is cut by time of receipt, as there.

    with History(tape, cost=0.5) as history:
        history.fault("timeseries.get_range", "torn")
        Databento(history_gateway=history.url, history_max_usd=1.0, …)
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs

import databento_dbn as dbn
import numpy as np
import zstandard
from numpy.typing import NDArray

from tests.fakes.gateway import KEY
from tests.fakes.tape import Listing, Tape
from tests.services.ingest.dbn import DAY, day_of, header

FORM = "application/x-www-form-urlencoded"
FIELDS = {
    "metadata.get_cost": {"dataset", "start", "end", "symbols", "schema", "stype_in", "stype_out"},
    "metadata.get_billable_size": {"dataset", "start", "end", "symbols", "schema", "stype_in", "stype_out"},
    "timeseries.get_range": {
        "dataset", "start", "end", "symbols", "schema", "stype_in", "stype_out", "encoding", "compression",
    },
    "symbology.resolve": {"dataset", "symbols", "stype_in", "stype_out", "start_date", "end_date"},
}  # fmt: skip
DATASETS = "metadata.list_datasets"  # the one GET
BARS = {"ohlcv-1s": 1, "ohlcv-1m": 60, "ohlcv-1h": 3600, "ohlcv-1d": 86400}  # seconds
SCHEMAS = ("tbbo", "definition", *BARS)
Request = tuple[str, dict[str, str]]


class Refused(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, case: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"detail": {"case": case, "message": message, "status_code": status, "docs": "", "payload": None}}


class History:
    """The server. `shift`: native ids are greater by it on every later day of the tape.

    `before(endpoint)` is called before each answer.
    """

    def __init__(
        self,
        tape: Tape,
        *,
        cost: Any = 0.01,
        keys: tuple[str, ...] = (KEY,),
        shift: int = 0,
        before: Callable[[str], None] | None = None,
    ) -> None:
        self.tape, self.cost, self.keys, self.before = tape, cost, keys, before
        self.requests: list[Request] = []
        self.complaints: list[str] = []
        self.faults: dict[str, str] = {}
        self.datasets = [tape.dataset, "XNAS.ITCH"]  # what the account may ask for
        self.stop = threading.Event()
        self._shift = shift
        self._first_day = tape.start_ns // DAY
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.history = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> History:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    def fault(self, endpoint: str, kind: str) -> None:
        """From now on: a status (`500`), `hang` (no answer), `garbage`, `torn` (ends early), `empty`, `damaged`."""
        self.faults[endpoint] = kind

    def of(self, endpoint: str) -> list[dict[str, str]]:
        """The forms of the requests to an endpoint."""
        return [form for name, form in list(self.requests) if name == endpoint]

    # -- answers -----------------------------------------------------------------------------

    def answer(self, endpoint: str, form: dict[str, str]) -> bytes:
        """The body of an answer; raises Refused."""
        if self.before is not None:
            self.before(endpoint)
        kind = self.faults.get(endpoint, "")
        if kind.isdigit():
            raise Refused(int(kind), "test_order", f"status {kind} was ordered\nfor {KEY}")
        if kind == "hang":
            self.stop.wait()
        if kind == "garbage":
            return b"[1, 2"
        if kind == "empty":
            return b""
        if endpoint == DATASETS:
            return json.dumps(self.datasets).encode()
        if endpoint == "metadata.get_cost":
            self._listings(form)
            return json.dumps(self.cost).encode()
        if endpoint == "metadata.get_billable_size":
            return json.dumps(len(self._body(form, self._listings(form)))).encode()
        return self._resolve(form) if endpoint == "symbology.resolve" else self._range(form, kind == "damaged")

    def _listings(self, form: dict[str, str]) -> list[Listing]:
        known = form["dataset"] == self.tape.dataset and form["schema"] in SCHEMAS
        if not known or form["stype_out"] != "instrument_id":
            raise Refused(422, "data_schema_not_supported", f"no {form['schema']} of {form['dataset']}")
        if int(form["start"]) >= int(form["end"]):
            raise Refused(422, "data_time_range_start_on_or_after_end", "start is not before end")
        found = [i for s in form["symbols"].split(",") for i in self.tape.resolve(form["stype_in"], s)]
        if not found:
            raise Refused(422, "symbology_invalid_request", "None of the symbols could be resolved")
        return found

    def _id(self, listing: Listing, day: int) -> int:
        return listing.native + self._shift * (day - self._first_day)

    def _records(self, listings: list[Listing], start: int, end: int) -> NDArray[Any]:
        records = self.tape.records
        received = records["ts_recv"]
        mine = np.isin(records["instrument_id"], [i.native for i in listings])
        chosen = records[mine & (received >= start) & (received < end)]
        chosen = chosen[np.argsort(chosen["ts_recv"], kind="stable")]
        chosen["instrument_id"] += (self._shift * (chosen["ts_recv"] // DAY - self._first_day)).astype(np.uint32)
        return chosen

    def _bars(self, listings: list[Listing], start: int, end: int, schema: str) -> list[Any]:
        """The tape's trades as bars, in the order of time; none where nothing was traded."""
        length = BARS[schema] * 10**9
        by_bar: dict[tuple[int, int], list[Any]] = {}
        for record in self._records(listings, 0, 1 << 62):
            begin = int(record["ts_event"]) // length * length
            if start <= begin < end:
                by_bar.setdefault((begin, int(record["instrument_id"])), []).append(record)
        return [
            dbn.OHLCVMsg(
                dbn.RType.from_schema(dbn.Schema.from_str(schema)), 1, native, begin, int(held[0]["price"]),
                max(int(r["price"]) for r in held), min(int(r["price"]) for r in held), int(held[-1]["price"]),
                sum(int(r["size"]) for r in held),
            )
            for (begin, native), held in sorted(by_bar.items())
        ]  # fmt: skip

    def _body(self, form: dict[str, str], listings: list[Listing]) -> bytes:
        start, end = int(form["start"]), int(form["end"])
        if form["schema"] == "tbbo":
            return self._records(listings, start, end).tobytes()
        if form["schema"] in BARS:
            return b"".join(map(bytes, self._bars(listings, start, end, form["schema"])))
        days = range(-(-start // DAY), (end - 1) // DAY + 1)  # all of a day stand at its begin
        return b"".join(bytes(i.definition(day * DAY)) for day in days for i in listings if i.defined)

    def _range(self, form: dict[str, str], damaged: bool) -> bytes:
        listings, start, end = self._listings(form), int(form["start"]), int(form["end"])
        if (form["encoding"], form["compression"]) != ("dbn", "zstd"):
            raise Refused(422, "not_like_the_client", "dbn and zstd are what it asks for")
        rows = [
            # A continuous request maps what was asked for, not the raw symbol behind it.
            (form["symbols"].split(",")[n] if form["stype_in"] == "continuous" else listing.symbol,
             self._id(listing, day), day * DAY, (day + 1) * DAY)
            for n, listing in enumerate(listings)
            for day in range(start // DAY, (end - 1) // DAY + 1)
        ]  # fmt: skip
        stype = dbn.SType.from_str(form["stype_in"])
        head = header(start, end, rows, form["schema"], stype_in=stype, dataset=self.tape.dataset)
        body = self._body(form, listings)
        return zstandard.compress(head + (body[:-41] if damaged else body))

    def _resolve(self, form: dict[str, str]) -> bytes:
        if (form["stype_in"], form["stype_out"]) != ("instrument_id", "raw_symbol"):
            raise Refused(422, "symbology_invalid_request", "this server knows one direction only")
        days = [d for d in range(self._first_day - 1, self._first_day + 3)
                if form["start_date"] <= str(day_of(d * DAY)) < form["end_date"]]  # fmt: skip
        result: dict[str, list[dict[str, str]]] = {}
        for native in form["symbols"].split(","):
            result[native] = [
                {"d0": str(day_of(day * DAY)), "d1": str(day_of((day + 1) * DAY)), "s": listing.symbol}
                for day in days
                for listing in self.tape.listings
                if self._id(listing, day) == int(native)
            ]
        return json.dumps({"result": result, "symbols": list(result), "partial": [], "not_found": []}).encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    history: History


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._answer(self._asked)

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self._answer(lambda: self._checked(raw))

    def _answer(self, asked: Callable[[], Request]) -> None:
        history = self.server.history
        try:
            endpoint, form = asked()
            history.requests.append((endpoint, form))
            body = history.answer(endpoint, form)
        except Refused as refusal:
            self._refuse(refusal)
            return
        if history.stop.is_set():
            self.close_connection = True
            return
        self.send_response(200)
        if endpoint != "timeseries.get_range":
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._chunks(body, torn=history.faults.get(endpoint) == "torn")

    def _chunks(self, body: bytes, torn: bool) -> None:
        end = len(body) // 2 if torn else len(body)
        for at in range(0, end, 4096):
            piece = body[at : min(at + 4096, end)]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        if torn:
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def _asked(self) -> Request:
        self._authorized()
        endpoint = self.path.removeprefix("/v0/")
        if endpoint != DATASETS:
            raise Refused(405, "not_like_the_client", f"GET {self.path}")
        return endpoint, {}

    def _authorized(self) -> None:
        keys = [base64.b64encode(f"{key}:".encode()).decode() for key in self.server.history.keys]
        if self.headers.get("Authorization") not in [f"Basic {key}" for key in keys]:
            raise Refused(401, "auth_authentication_failed", "Authentication failed.")

    def _checked(self, raw: str) -> Request:
        self._authorized()
        endpoint = self.path.removeprefix("/v0/")
        if endpoint not in FIELDS or self.headers.get("Content-Type") != FORM:
            raise Refused(404, "not_like_the_client", f"{self.path} with {self.headers.get('Content-Type')}")
        form = {name: values[0] for name, values in parse_qs(raw, strict_parsing=True).items()}
        if set(form) != FIELDS[endpoint]:
            raise Refused(422, "not_like_the_client", f"fields {sorted(set(form) ^ FIELDS[endpoint])}")
        return endpoint, form

    def _refuse(self, refusal: Refused) -> None:
        if refusal.body["detail"]["case"] == "not_like_the_client":
            self.server.history.complaints.append(str(refusal))
        body = json.dumps(refusal.body).encode()
        self.send_response(refusal.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""
