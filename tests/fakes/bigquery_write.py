"""The gRPC side of the BigQuery for tests: the Storage Write API with committed streams and the default one."""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from google.cloud.bigquery_storage_v1 import types
from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from tests.fakes.bigquery import Call, Drop, Fail, Refuse
from tests.fakes.bigquery_tables import FIRST_US, LAST_US, Table

if TYPE_CHECKING:
    from tests.fakes.bigquery import BigQueryServer

MAX_BYTES = 10_000_000
_SERVICE = "google.cloud.bigquery.storage.v1.BigQueryWrite"
_Code = types.StorageError.StorageErrorCode
_NUMBERS = {code: code.value[0] for code in grpc.StatusCode}
_F = descriptor_pb2.FieldDescriptorProto
_INTEGERS = frozenset({_F.TYPE_INT32, _F.TYPE_INT64, _F.TYPE_UINT32, _F.TYPE_SINT64, _F.TYPE_SINT32})
# What each column type takes of protobuf.
_TAKES = {
    "STRING": {_F.TYPE_STRING}, "JSON": {_F.TYPE_STRING}, "BYTES": {_F.TYPE_BYTES, _F.TYPE_STRING},
    "INTEGER": _INTEGERS, "FLOAT": {_F.TYPE_DOUBLE, _F.TYPE_FLOAT}, "BOOLEAN": {_F.TYPE_BOOL} | _INTEGERS,
    "TIMESTAMP": {_F.TYPE_INT64, _F.TYPE_INT32, _F.TYPE_UINT32}, "DATE": {_F.TYPE_INT32, _F.TYPE_INT64},
}  # fmt: skip
_SHOWN = {"INTEGER": "INT64", "FLOAT": "DOUBLE", "BOOLEAN": "BOOL"}


@dataclass
class Stream:
    """A write stream; `next` is the offset of its next row."""

    name: str
    table: str
    dataset: str
    next: int = 0
    finalized: bool = False


class WriteService:
    """The service on a free port. `streams` by name; `idle()` ends the connections that are open now."""

    def __init__(self, server: BigQueryServer) -> None:
        self.server, self.warehouse = server, server.warehouse
        self.streams: dict[str, Stream] = {}
        # Offset errors come as a response's `error`; ended=True: as the end of the call, as some servers do.
        self.ended = False
        self._open: set[queue.Queue[Any]] = set()
        self._grpc = grpc.server(ThreadPoolExecutor(32), options=[("grpc.max_receive_message_length", 64 << 20)])
        self._grpc.add_generic_rpc_handlers((self._handlers(),))
        self.port = self._grpc.add_insecure_port("127.0.0.1:0")

    def start(self) -> None:
        self._grpc.start()

    def stop(self) -> None:
        self._grpc.stop(None).wait(5)

    def idle(self) -> int:
        """End every open AppendRows connection as after ten idle minutes; returns how many there were."""
        with self.warehouse.lock:
            found = list(self._open)
        for each in found:
            each.put(
                Fail(grpc.StatusCode.ABORTED, "Closing the stream because server is closing it after 600 idle seconds")
            )
        return len(found)

    def _handlers(self) -> Any:
        def unary(handle: Callable[[Any], Any], request: Any) -> Any:
            def run(message: Any, context: grpc.ServicerContext) -> Any:
                try:
                    return handle(message)
                except (Fail, Refuse, Drop) as error:
                    _abort(context, error)

            return grpc.unary_unary_rpc_method_handler(run, request.deserialize, lambda m: type(m).serialize(m))

        return grpc.method_handlers_generic_handler(
            _SERVICE,
            {
                "CreateWriteStream": unary(self._create, types.CreateWriteStreamRequest),
                "GetWriteStream": unary(self._get, types.GetWriteStreamRequest),
                "FinalizeWriteStream": unary(self._finalize, types.FinalizeWriteStreamRequest),
                "AppendRows": grpc.stream_stream_rpc_method_handler(
                    self._append_rows, lambda b: (len(b), types.AppendRowsRequest.deserialize(b)),
                    types.AppendRowsResponse.serialize,
                ),
            },
        )  # fmt: skip

    def _table(self, parent: str) -> tuple[str, str, Table]:
        parts = parent.split("/")
        if len(parts) != 6 or parts[0::2] != ["projects", "datasets", "tables"] or parts[1] != self.server.project:
            raise Fail(grpc.StatusCode.INVALID_ARGUMENT, f"Invalid parent: {parent}")
        try:
            return parts[3], parts[5], self.warehouse.table(parts[3], parts[5])
        except Refuse as error:
            raise Fail(
                grpc.StatusCode.NOT_FOUND, f"Requested entity was not found. {error.message}",
                storage=_Code.TABLE_NOT_FOUND,
            ) from None  # fmt: skip

    def _create(self, request: Any) -> Any:
        def effect() -> Any:
            dataset, name, table = self._table(request.parent)
            if request.write_stream.type_ != types.WriteStream.Type.COMMITTED:
                raise Fail(grpc.StatusCode.UNIMPLEMENTED, "this server has committed streams only")
            made = Stream(f"{request.parent}/streams/{uuid.uuid4().hex}", name, dataset)
            self.streams[made.name] = made
            call.name = made.name
            return self._shown(made, table)

        call = Call("CreateWriteStream", request.parent.rpartition("/")[2])
        return self.server.carry_out(call, effect)

    def _shown(self, stream: Stream, table: Table) -> Any:
        fields = [
            types.TableFieldSchema(name=f["name"], type_=_SHOWN.get(f["type"], f["type"]), mode=f["mode"])
            for f in table.fields.values()
        ]
        return types.WriteStream(
            name=stream.name, type_=types.WriteStream.Type.COMMITTED, table_schema=types.TableSchema(fields=fields),
            create_time={"seconds": int(time.time())}, location="us",
        )  # fmt: skip

    def _stream(self, name: str) -> Stream:
        if name not in self.streams:
            raise Fail(
                grpc.StatusCode.NOT_FOUND, f"Requested entity was not found. Entity: {name}",
                storage=_Code.STREAM_NOT_FOUND,
            )  # fmt: skip
        return self.streams[name]

    def _get(self, request: Any) -> Any:
        def effect() -> Any:
            stream = self._stream(request.name)
            return self._shown(stream, self.warehouse.table(stream.dataset, stream.table))

        return self.server.carry_out(Call("GetWriteStream", name=request.name), effect)

    def _finalize(self, request: Any) -> Any:
        found = self.streams.get(request.name)

        def effect() -> Any:
            stream = self._stream(request.name)
            stream.finalized = True
            return types.FinalizeWriteStreamResponse(row_count=stream.next)

        return self.server.carry_out(Call("FinalizeWriteStream", found.table if found else "", request.name), effect)

    def _append_rows(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        """One connection: requests are answered in order."""
        waiting: queue.Queue[Any] = queue.Queue()

        def read() -> None:
            with suppress(Exception):
                for each in requests:
                    waiting.put(each)
            waiting.put(None)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        with self.warehouse.lock:
            self._open.add(waiting)
        connection = Connection(self)
        try:
            while (came := waiting.get()) is not None:
                try:
                    if isinstance(came, Fail):
                        raise came
                    yield connection.append(*came)
                except Fail as error:
                    if not error.in_band:
                        raise
                    yield _in_band(connection.name, error)
        except (Fail, Refuse, Drop) as error:
            _abort(context, error)
        except Exception as error:
            self.server.broken.append(error)
            raise
        finally:
            with self.warehouse.lock:
                self._open.discard(waiting)


class Connection:
    """The state of one AppendRows call: its stream and the writer's schema."""

    def __init__(self, service: WriteService) -> None:
        self.service = service
        self.name = ""
        self._message: Any = None
        self._kinds: dict[str, int] = {}

    def append(self, size: int, request: Any) -> Any:
        first = not self.name
        self.name = self.name or request.write_stream
        table = self.name.split("/")[5] if self.name.count("/") == 7 else ""
        rows = len(request.proto_rows.rows.serialized_rows)
        call = Call("AppendRows", table, self.name, rows, size)
        call.offset = request.offset if "offset" in request else -1
        return self.service.server.carry_out(call, lambda: self._effect(size, request, first))

    def _effect(self, size: int, request: Any, first: bool) -> Any:
        if size > MAX_BYTES:
            raise _invalid(f"MessageSize is too large. Max allow: {MAX_BYTES} Actual: {size}")
        if not self.name:
            raise _invalid("The first request of a connection names its stream")
        if request.write_stream and request.write_stream != self.name:
            raise _invalid("A connection of an explicit stream writes that stream only")
        default = self.name.endswith("/streams/_default")
        parent = self.name.rpartition("/streams/")[0]
        stream = Stream(self.name, "", "") if default else self.service._stream(self.name)
        _, _, table = self.service._table(parent)
        if request.proto_rows.writer_schema.proto_descriptor.name:
            self._learn(table, types.ProtoSchema.pb(request.proto_rows.writer_schema).proto_descriptor)
        elif first:
            raise _invalid("The first request of a connection brings the writer's schema")
        if stream.finalized:
            raise self._refused(
                grpc.StatusCode.INVALID_ARGUMENT, "Stream has been finalized and cannot be appended.",
                _Code.STREAM_FINALIZED,
            )  # fmt: skip
        offset = request.offset if "offset" in request else None
        if default and offset is not None:
            raise _invalid("Offsets are not allowed on the default stream")
        if offset is not None and offset != stream.next:
            early = offset < stream.next
            raise self._refused(
                grpc.StatusCode.ALREADY_EXISTS if early else grpc.StatusCode.OUT_OF_RANGE,
                f"The offset is {'within' if early else 'beyond'} stream, expected offset {stream.next}, "
                f"received {offset}",
                _Code.OFFSET_ALREADY_EXISTS if early else _Code.OFFSET_OUT_OF_RANGE,
            )  # fmt: skip
        rows, errors = [], []
        for i, raw in enumerate(request.proto_rows.rows.serialized_rows):
            try:
                rows.append(self._row(table, raw))
            except ValueError as error:
                errors.append(
                    types.RowError(index=i, code=types.RowError.RowErrorCode.FIELDS_ERROR, message=str(error))
                )
        if errors:
            text = "Errors found while processing rows. Please refer to the row_errors field for details."
            return types.AppendRowsResponse(
                error={"code": _NUMBERS[grpc.StatusCode.INVALID_ARGUMENT], "message": text}, row_errors=errors,
                write_stream=self.name,
            )  # fmt: skip
        at = stream.next
        table.add(rows)
        stream.next += len(rows)
        where = {} if default else {"offset": at}
        return types.AppendRowsResponse(append_result=where, write_stream=self.name)

    def _refused(self, code: grpc.StatusCode, message: str, storage: int) -> Fail:
        return Fail(code, f"{message}. Entity: {self.name}", in_band=not self.service.ended, storage=storage)

    def _learn(self, table: Table, descriptor: Any) -> None:
        file = descriptor_pb2.FileDescriptorProto(name="row.proto", package="row", syntax="proto2")
        file.message_type.add().CopyFrom(descriptor)
        pool = descriptor_pool.DescriptorPool()
        pool.Add(file)
        self._message = message_factory.GetMessageClass(pool.FindMessageTypeByName(f"row.{descriptor.name}"))
        given = {f.name: f for f in descriptor.field}
        extra = [name for name in given if name not in table.fields]
        if extra:
            raise Fail(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"The source object has fields unknown to BigQuery: root.{extra[0]}. Entity: {self.name}",
                in_band=True, storage=_Code.SCHEMA_MISMATCH_EXTRA_FIELDS,
            )  # fmt: skip
        for name, field in table.fields.items():
            if name not in given and field["mode"] == "REQUIRED":
                raise _invalid(f"The required field {name} is missing in the proto message")
            if name in given and given[name].type not in _TAKES[field["type"]]:
                raise _invalid(f"Proto field {name} does not convert to column type {field['type']}")

    def _row(self, table: Table, raw: bytes) -> dict[str, Any]:
        try:
            message = self._message.FromString(raw)
        except DecodeError as error:
            raise ValueError(f"Cannot parse the row: {error}") from None
        found = {d.name: value for d, value in message.ListFields() if d.name in table.fields}
        # ListFields leaves out nothing that was set: proto2 knows presence.
        for name, value in found.items():
            field = table.fields[name]
            if field["type"] == "TIMESTAMP" and not FIRST_US <= value <= LAST_US:
                raise ValueError(f"Timestamp field value is out of range: {value}. Field: {name}")
            if field["type"] == "BOOLEAN":
                found[name] = bool(value)
        for name, field in table.fields.items():
            if field["mode"] == "REQUIRED" and name not in found:
                raise ValueError(f"Field {name} is required, but it is not set")
        if table.out_of_bounds(found):
            raise ValueError("The row's partition is outside the allowed bounds.")
        return table.whole(found)


def _invalid(message: str) -> Fail:
    return Fail(grpc.StatusCode.INVALID_ARGUMENT, message)


def _status(error: Fail) -> Any:
    """google.rpc.Status with the StorageError that the service adds."""
    made = status_pb2.Status(code=_NUMBERS[error.code], message=error.message)
    if error.storage:
        detail = any_pb2.Any()
        detail.Pack(types.StorageError.pb(types.StorageError(code=error.storage, error_message=error.message)))
        made.details.append(detail)
    return made


def _in_band(stream: str, error: Fail) -> Any:
    made = types.AppendRowsResponse(write_stream=stream)
    types.AppendRowsResponse.pb(made).error.CopyFrom(_status(error))
    return made


def _abort(context: grpc.ServicerContext, error: Exception) -> None:
    if isinstance(error, Fail):
        context.set_trailing_metadata((("grpc-status-details-bin", _status(error).SerializeToString()),))
        context.abort(error.code, error.message)
    if isinstance(error, Refuse):
        found = {401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND", 429: "RESOURCE_EXHAUSTED"}
        context.abort(grpc.StatusCode[found.get(error.status, "INTERNAL")], error.message)
    context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
