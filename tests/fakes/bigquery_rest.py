"""The REST side of the BigQuery for tests: datasets, tables, jobs, uploads, query results and insertAll."""

from __future__ import annotations

import copy
import email
import email.policy
import json
import math
import re
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from tests.fakes.bigquery import Call, Drop, Refuse
from tests.fakes.bigquery_tables import FIRST_US, LAST_US, JobFailed, Resource, from_json

if TYPE_CHECKING:
    from tests.fakes.bigquery import BigQueryServer

MAX_INSERT_BYTES = 10_000_000
MAX_INSERT_ROWS = 50_000
_BASE = r"/bigquery/v2/projects/(?P<project>[^/]+)"
Answer = tuple[int, Any]


class Rest:
    """The HTTP server and its routes."""

    def __init__(self, server: BigQueryServer) -> None:
        self.server, self.warehouse = server, server.warehouse
        self.uploads: dict[str, tuple[Resource, bytearray]] = {}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        table = rf"{_BASE}/datasets/(?P<dataset>\w+)/tables"
        self.routes: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = [
            (method, re.compile(pattern), handle)
            for method, pattern, handle in (
                ("GET", rf"{_BASE}/datasets/(?P<dataset>\w+)", self.get_dataset),
                ("POST", rf"{_BASE}/datasets", self.insert_dataset),
                ("PATCH", rf"{_BASE}/datasets/(?P<dataset>\w+)", self.patch_dataset),
                ("GET", table, self.list_tables),
                ("POST", table, self.insert_table),
                ("GET", rf"{table}/(?P<table>\w+)", self.get_table),
                ("PATCH", rf"{table}/(?P<table>\w+)", self.patch_table),
                ("DELETE", rf"{table}/(?P<table>\w+)", self.delete_table),
                ("POST", rf"{table}/(?P<table>\w+)/insertAll", self.insert_all),
                ("GET", rf"{table}/(?P<table>\w+)/data", self.list_rows),
                ("POST", rf"{_BASE}/jobs", self.insert_query),
                ("GET", rf"{_BASE}/jobs/(?P<job>[\w-]+)", self.get_job),
                ("GET", rf"{_BASE}/queries/(?P<job>[\w-]+)", self.query_results),
                ("POST", rf"/upload{_BASE}/jobs", self.upload),
                ("PUT", r"/upload/resumable/(?P<upload>\w+)", self.resume),
            )
        ]

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def serve(self, method: str, url: str, headers: Any, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """(status, JSON, headers). Raises Drop."""
        split = urlsplit(url)
        options = {name: values[-1] for name, values in parse_qs(split.query).items()}
        for wanted, pattern, handle in self.routes:
            match = pattern.fullmatch(split.path)
            if wanted != method or match is None:
                continue
            found = match.groupdict()
            try:
                if found.pop("project", self.server.project) != self.server.project:
                    raise Refuse(404, "notFound", f"Not found: Project in {split.path}")
                request = Request(headers, body, options)
                status, answer = handle(request, **found)
            except Refuse as error:
                return error.status, _error(error), {}
            except Drop:
                raise
            except Exception as error:
                self.server.broken.append(error)
                return 400, _error(Refuse(400, "invalid", f"this server has failed: {error!r}")), {}
            return status, answer, request.answered
        return 400, _error(Refuse(400, "invalid", f"this server has no {method} {split.path}")), {}

    def get_dataset(self, request: Request, dataset: str) -> Answer:
        return self.server.carry_out(
            Call("datasets.get"), lambda: (200, copy.deepcopy(self.warehouse.dataset(dataset)))
        )

    def insert_dataset(self, request: Request) -> Answer:
        resource = request.json()
        name = resource["datasetReference"]["datasetId"]

        def effect() -> Answer:
            if name in self.warehouse.datasets:
                raise Refuse(409, "duplicate", f"Already Exists: Dataset {self.server.project}:{name}")
            resource.setdefault("location", "US")
            self.warehouse.datasets[name] = self.warehouse.stamp(resource)
            return 200, resource

        return self.server.carry_out(Call("datasets.insert"), effect)

    def patch_dataset(self, request: Request, dataset: str) -> Answer:
        def effect() -> Answer:
            held = self.warehouse.dataset(dataset)
            request.match(held)
            for name, value in request.json().items():
                held[name] = {**held.get(name, {}), **value} if name == "labels" else value
            return 200, self.warehouse.stamp(held)

        return self.server.carry_out(Call("datasets.patch"), effect)

    def list_tables(self, request: Request, dataset: str) -> Answer:
        def effect() -> Answer:
            self.warehouse.dataset(dataset)
            tables = [t.resource for (d, _), t in sorted(self.warehouse.tables.items()) if d == dataset]
            some = [{"tableReference": t["tableReference"], "type": t["type"]} for t in tables]
            # In pages, as the service does.
            at, size = int(request.options.get("pageToken", 0)), 10
            more = {"nextPageToken": str(at + size)} if at + size < len(some) else {}
            return 200, {"tables": some[at : at + size], "totalItems": len(some), **more}

        return self.server.carry_out(Call("tables.list"), effect)

    def insert_table(self, request: Request, dataset: str) -> Answer:
        resource = request.json()
        name = resource["tableReference"]["tableId"]
        return self.server.carry_out(
            Call("tables.insert", name), lambda: (200, self.warehouse.create_table(dataset, resource).resource)
        )

    def get_table(self, request: Request, dataset: str, table: str) -> Answer:
        def effect() -> Answer:
            held = self.warehouse.table(dataset, table)
            streamed = {"streamingBuffer": {"estimatedRows": str(sum(held.streamed))}} if any(held.streamed) else {}
            return 200, {**held.resource, "numRows": str(len(held.rows)), **streamed}

        return self.server.carry_out(Call("tables.get", table), effect)

    def patch_table(self, request: Request, dataset: str, table: str) -> Answer:
        def effect() -> Answer:
            held = self.warehouse.table(dataset, table)
            request.match(held.resource)
            self.warehouse.patch_table(held, request.json())
            return 200, held.resource

        return self.server.carry_out(Call("tables.patch", table), effect)

    def delete_table(self, request: Request, dataset: str, table: str) -> Answer:
        def effect() -> Answer:
            self.warehouse.table(dataset, table)
            del self.warehouse.tables[dataset, table]
            return 204, None

        return self.server.carry_out(Call("tables.delete", table), effect)

    def insert_all(self, request: Request, dataset: str, table: str) -> Answer:
        given = request.json()
        rows = given.get("rows", [])

        def effect() -> Answer:
            if len(request.body) > MAX_INSERT_BYTES:
                raise Refuse(413, "uploadTooLarge", "Request payload size exceeds the limit: 10485760 bytes.")
            if not 0 < len(rows) <= MAX_INSERT_ROWS:
                raise Refuse(400, "invalid", f"{len(rows)} rows: must be 1 to {MAX_INSERT_ROWS}")
            held = self.warehouse.table(dataset, table)
            if held.query:
                raise Refuse(400, "invalid", "Cannot add rows to a table of type VIEW.")
            errors, taken = {}, []
            for i, row in enumerate(rows):
                try:
                    taken.append((i, row.get("insertId", ""), _row(held, row["json"], given)))
                except JobFailed as error:
                    field, _, message = error.message.partition("|")
                    errors[i] = {"reason": error.reason, "location": field, "debugInfo": "", "message": message}
            if errors and not given.get("skipInvalidRows"):
                stopped = {"reason": "stopped", "location": "", "debugInfo": "", "message": ""}
                errors |= {i: stopped for i in range(len(rows)) if i not in errors}
                taken = []
            for _, insert_id, row in taken:
                if insert_id and insert_id in held.insert_ids:
                    continue
                held.insert_ids.add(insert_id)
                held.add([row], streamed=True)
            told = [{"index": i, "errors": [errors[i]]} for i in sorted(errors)]
            return 200, {"kind": "bigquery#tableDataInsertAllResponse", **({"insertErrors": told} if told else {})}

        return self.server.carry_out(
            Call("tabledata.insertAll", table, rows=len(rows), bytes=len(request.body)), effect
        )

    def list_rows(self, request: Request, dataset: str, table: str) -> Answer:
        def effect() -> Answer:
            held = self.warehouse.table(dataset, table)
            fields = list(held.fields.values())
            rows = [tuple(row[f["name"]] for f in fields) for row in held.rows]
            return 200, _page(fields, rows, request.options)

        return self.server.carry_out(Call("tabledata.list", table), effect)

    def insert_query(self, request: Request) -> Answer:
        resource = request.json()
        config = resource["configuration"]["query"]
        if config.get("useLegacySql", True):
            raise Refuse(400, "invalid", "this server knows no legacy SQL")
        named = re.search(r"`[\w-]+\.\w+\.(\w+)`", config["query"])
        call = Call("jobs.insert.query", named[1] if named else "", _job_id(resource), text=config["query"])
        return self._insert(call, resource, lambda: self._query(call, config))

    def _query(self, call: Call, config: Resource) -> Resource:
        parameters = config.get("queryParameters", [])
        fields, rows, affected, kind = self.warehouse.run(config["query"], parameters)
        changed = {} if affected is None else {"numDmlAffectedRows": str(affected)}
        call.rows = affected or 0
        return {
            "query": {"statementType": kind, "totalBytesProcessed": str(64 * len(rows)), "cacheHit": False, **changed},
            "_result": (fields, rows),
        }

    def upload(self, request: Request) -> Answer:
        kind = request.options.get("uploadType")
        if kind == "resumable":
            upload = uuid.uuid4().hex
            self.uploads[upload] = (request.json(), bytearray())
            request.answered["Location"] = f"{self.server.url}/upload/resumable/{upload}"
            return self.server.carry_out(Call("jobs.insert.begin", name=_job_id(request.json())), lambda: (200, {}))
        if kind != "multipart":
            raise Refuse(400, "invalid", f"no such uploadType: {kind}")
        head = f"Content-Type: {request.headers['Content-Type']}\r\n\r\n".encode()
        message = email.message_from_bytes(head + request.body, policy=email.policy.HTTP)
        about, data = message.iter_parts()
        return self._load(json.loads(about.get_payload(decode=True)), data.get_payload(decode=True))

    def resume(self, request: Request, upload: str) -> Answer:
        if upload not in self.uploads:
            raise Refuse(404, "notFound", "no such upload")
        resource, held = self.uploads[upload]
        span = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", request.headers["Content-Range"])
        if span is None or (span[1] and int(span[1]) != len(held)):
            raise Refuse(400, "invalid", f"Content-Range {request.headers['Content-Range']}, but {len(held)} are here")
        held += request.body
        if span[3] == "*" or int(span[3]) != len(held):
            request.answered["Range"] = f"bytes=0-{len(held) - 1}"
            return 308, {}
        del self.uploads[upload]
        return self._load(resource, bytes(held))

    def _load(self, resource: Resource, data: bytes) -> Answer:
        config = resource["configuration"]["load"]
        call = Call("jobs.insert.load", config["destinationTable"]["tableId"], _job_id(resource), bytes=len(data))

        def effect() -> Resource:
            call.rows = self.warehouse.load(config, data)
            return {
                "load": {"outputRows": str(call.rows), "outputBytes": str(8 * call.rows), "inputFiles": "1",
                         "inputFileBytes": str(len(data))}
            }  # fmt: skip

        return self._insert(call, resource, effect)

    def _insert(self, call: Call, resource: Resource, effect: Callable[[], Resource]) -> Answer:
        """A job: it is taken at once, whatever becomes of it; its effect comes when it is done."""

        def take() -> Answer:
            if call.name in self.warehouse.jobs:
                raise Refuse(409, "duplicate", f"Already Exists: Job {self.server.project}:US.{call.name}")
            now = str(time.time_ns() // 1_000_000)
            job = {
                "kind": "bigquery#job", "id": f"{self.server.project}:US.{call.name}",
                "jobReference": {"projectId": self.server.project, "jobId": call.name, "location": "US"},
                "configuration": resource["configuration"], "status": {"state": "RUNNING"},
                "statistics": {"creationTime": now, "startTime": now}, "_polls": call.polls, "_effect": effect,
                "_error": call.error,
            }  # fmt: skip
            if call.polls == 0:
                self._finish(job)
            self.warehouse.jobs[call.name] = job
            return 200, _shown(job)

        return self.server.carry_out(call, take)

    def _finish(self, job: Resource) -> None:
        if job["status"]["state"] == "DONE":
            return
        try:
            if job["_error"]:
                raise JobFailed(*job["_error"])
            job["statistics"] |= job["_effect"]()
        except JobFailed as error:
            told = {"reason": error.reason, "message": error.message}
            job["status"] |= {"errorResult": told, "errors": [told]}
        job["_result"] = job["statistics"].pop("_result", ([], []))
        job["status"]["state"] = "DONE"
        job["statistics"]["endTime"] = str(time.time_ns() // 1_000_000)

    def _job(self, name: str) -> Resource:
        if name not in self.warehouse.jobs:
            raise Refuse(404, "notFound", f"Not found: Job {self.server.project}:US.{name}")
        job = self.warehouse.jobs[name]
        if job["status"]["state"] != "DONE":
            job["_polls"] -= 1
            if job["_polls"] < 0:
                self._finish(job)
        return job

    def get_job(self, request: Request, job: str) -> Answer:
        return self.server.carry_out(Call("jobs.get", name=job), lambda: (200, _shown(self._job(job))))

    def query_results(self, request: Request, job: str) -> Answer:
        def effect() -> Answer:
            held = self._job(job)
            failed = held["status"].get("errorResult")
            if failed:
                raise Refuse(404 if failed["reason"] == "notFound" else 400, failed["reason"], failed["message"])
            done = held["status"]["state"] == "DONE"
            answer = {"jobComplete": done, "jobReference": held["jobReference"]}
            if done:
                answer |= _page(*held["_result"], request.options)
                answer |= {k: v for k, v in held["statistics"]["query"].items() if k == "numDmlAffectedRows"}
            return 200, answer

        return self.server.carry_out(Call("jobs.getQueryResults", name=job), effect)


class Request:
    """What came; `answered` are headers of the answer."""

    def __init__(self, headers: Any, body: bytes, options: dict[str, str]) -> None:
        self.headers, self.body, self.options = headers, body, options
        self.answered: dict[str, str] = {}

    def json(self) -> Resource:
        def refuse(text: str) -> None:
            raise Refuse(400, "parseError", f"Invalid JSON payload received. Unexpected token {text}")

        try:
            found: Resource = json.loads(self.body or b"{}", parse_constant=refuse)
        except ValueError as error:
            raise Refuse(400, "parseError", f"Invalid JSON payload received. {error}") from None
        return found

    def match(self, resource: Resource) -> None:
        """An update that names another etag comes too late."""
        if self.headers.get("If-Match") not in (None, resource["etag"]):
            raise Refuse(412, "conditionNotMet", "Precondition Failed")


def _row(table: Any, given: Resource, options: Resource) -> dict[str, Any]:
    """A row of insertAll. Raises JobFailed(reason, field|message)."""
    out = {}
    for name, value in given.items():
        field = table.fields.get(name)
        if field is None:
            if options.get("ignoreUnknownValues"):
                continue
            raise JobFailed("invalid", f"{name}|no such field: {name}.")
        if value is None:
            continue
        try:
            out[name] = from_json(value, field["type"])
        except (ValueError, OverflowError):
            raise JobFailed("invalid", f"{name}|Cannot convert value to {field['type'].lower()}: {value}") from None
        if field["type"] == "TIMESTAMP" and not FIRST_US <= out[name] <= LAST_US:
            raise JobFailed("invalid", f"{name}|Timestamp field value is out of range: {value}")
    for name, field in table.fields.items():
        if field["mode"] == "REQUIRED" and out.get(name) is None:
            raise JobFailed("invalid", f"{name}|Missing required field: {name}.")
    if table.out_of_bounds(out):
        raise JobFailed("invalid", "|The destination table's partition is outside the allowed bounds.")
    whole: dict[str, Any] = table.whole(out)
    return whole


def _page(fields: list[Resource], rows: list[tuple[Any, ...]], options: dict[str, str]) -> Resource:
    at = int(options.get("pageToken", options.get("startIndex", 0)))
    size = int(options.get("maxResults", 10_000))
    integers = options.get("formatOptions.useInt64Timestamp", "").lower() == "true"
    some = [
        {"f": [{"v": _cell(value, f["type"], integers)} for value, f in zip(row, fields, strict=True)]}
        for row in rows[at : at + size]
    ]
    more = {"pageToken": str(at + size)} if at + size < len(rows) and size else {}
    return {"schema": {"fields": fields}, "totalRows": str(len(rows)), **({"rows": some} if some else {}), **more}


def _cell(value: Any, kind: str, integers: bool) -> str | None:
    if value is None:
        return None
    if kind == "BOOLEAN":
        return "true" if value else "false"
    if kind == "TIMESTAMP":
        return str(value) if integers else repr(value / 1e6)
    if kind == "FLOAT":
        if not math.isfinite(value):
            return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
        return repr(float(value))
    return str(value)


def _job_id(resource: Resource) -> str:
    name: str = resource.get("jobReference", {}).get("jobId") or f"job_{uuid.uuid4().hex}"
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,1024}", name):
        raise Refuse(400, "invalid", f'Invalid job ID "{name}".')
    # The same for every look at it.
    resource.setdefault("jobReference", {})["jobId"] = name
    return name


def _shown(job: Resource) -> Resource:
    return {name: value for name, value in job.items() if not name.startswith("_")}


def _error(error: Refuse) -> Resource:
    told = {"message": error.message, "domain": "global", "reason": error.reason}
    return {"error": {"code": error.status, "message": error.message, "errors": [told]}}


def _handler(rest: Rest) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Head and body leave in two writes; without this the second waits for the client's delayed ACK.
        disable_nagle_algorithm = True

        def _serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            if len(body) < length:  # the client was killed while it sent: no server does anything with half a request
                self.close_connection = True
                return
            try:
                status, answer, headers = rest.serve(self.command, self.path, self.headers, body)
            except Drop:
                self.close_connection = True
                return
            text = b"" if answer is None else json.dumps(answer).encode()
            # The client may be dead by now: killed on order.
            with suppress(OSError):
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815

        def handle(self) -> None:
            with suppress(OSError):
                super().handle()

        def log_message(self, *_: object) -> None:
            pass

    return Handler
