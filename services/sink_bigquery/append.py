"""One connection of the Storage Write API: rows at an offset of a stream, each there exactly once.

Google's synchronous client is used without the helper around it, whose futures poll: an answer is here as soon as it
came. A connection that ends (it does so after ten idle minutes) is made again, and the rows sent again at the same
offset: what was there already is answered with ALREADY_EXISTS.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from services.sink_bigquery.clients import CALL_SECONDS, Missing, Refused, Target, errors, google, line
from services.sink_bigquery.tables import FLAG, INSTANT, INTEGER, REAL, TEXT, Layout
from shared.errors import ConfigError, Fenced, StoreUnavailable

try:
    import grpc  # type: ignore[import-untyped]
    from google.cloud.bigquery_storage_v1 import BigQueryWriteClient, types
    from google.cloud.bigquery_storage_v1.services.big_query_write.transports import BigQueryWriteGrpcTransport
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
except ImportError:
    raise ConfigError("method storage_write needs its client: pip install 'tapeline[bigquery]'") from None

log = logging.getLogger(__name__)

ANSWER_SECONDS = 30.0
TRIES = 3
_CODES = grpc.StatusCode
_BY_NUMBER = {code.value[0]: code for code in _CODES}
_KINDS = {TEXT: 9, INTEGER: 3, REAL: 1, FLAG: 8, INSTANT: 3}  # of FieldDescriptorProto; an instant: microseconds
_AGAIN = frozenset(
    (_CODES.UNAVAILABLE, _CODES.ABORTED, _CODES.CANCELLED, _CODES.DEADLINE_EXCEEDED, _CODES.INTERNAL, _CODES.UNKNOWN)
)  # fmt: skip


def connect_write(target: Target) -> Any:
    """A client of the Storage Write API. Raises AuthError, ConfigError, StoreUnavailable."""
    local = target.settings.grpc_endpoint
    if target.endpoint and not local:
        raise ConfigError(
            "bigquery.method is storage_write, and a local server is named without its gRPC side: set "
            "bigquery.grpc_endpoint (TAPELINE_BIGQUERY_GRPC_ENDPOINT=host:port)"
        )
    with errors(target, "connect"):
        if not local:
            return BigQueryWriteClient()
        channel = grpc.insecure_channel(local.removeprefix("http://"), options=[("grpc.max_send_message_length", -1)])
        return BigQueryWriteClient(transport=BigQueryWriteGrpcTransport(channel=channel))


class Encoder:
    """Rows of one table as protocol buffers."""

    def __init__(self, layout: Layout) -> None:
        self.descriptor = descriptor_pb2.DescriptorProto(name=f"Row_{layout.name}")
        for number, field in enumerate(layout.fields, 1):
            self.descriptor.field.add(name=field.name, number=number, type=_KINDS[field.type], label=1)
        file = descriptor_pb2.FileDescriptorProto(
            name=f"tapeline/{layout.name}.proto", package="tapeline", syntax="proto2", message_type=[self.descriptor]
        )
        pool = descriptor_pool.DescriptorPool()
        pool.Add(file)
        self._message = message_factory.GetMessageClass(pool.FindMessageTypeByName(f"tapeline.Row_{layout.name}"))

    def rows(self, values: Iterator[dict[str, Any]]) -> list[bytes]:
        """Serialized rows."""
        message = self._message
        return [message(**row).SerializeToString() for row in values]


class RowErrors(Refused):
    """Rows that BigQuery refuses; none of their request is stored. `rows`: index in the request -> reason."""

    def __init__(self, rows: dict[int, str], text: str) -> None:
        super().__init__(text)
        self.rows = rows


class Appender:
    """The connection to one stream. Used by one thread."""

    def __init__(self, client: Any, target: Target, stream: str, encoder: Encoder, stop: threading.Event) -> None:
        self.stream = stream
        self._client, self._target, self._encoder, self._stop = client, target, encoder, stop
        self._call: _Call | None = None

    def append(self, offset: int, rows: Sequence[bytes]) -> bool:
        """Rows at an offset; False when they were there already.

        Raises StoreUnavailable (send them again), RowErrors, Fenced: the stream is finalized or gone, or lacks rows
        before these.
        """
        trouble = ""
        for attempt in range(TRIES):
            if attempt and self._stop.wait(0.05 * 4**attempt):
                break
            try:
                return self._once(offset, rows)
            except _Broken as error:
                self.close()
                trouble = str(error)
                log.debug("stream %s: %s; connecting again", self.stream, trouble)
        raise StoreUnavailable(f"{self._target.where}: rows cannot be appended now ({trouble or 'stopping'})")

    def _once(self, offset: int, rows: Sequence[bytes]) -> bool:
        data = types.AppendRowsRequest.ProtoData(rows=types.ProtoRows(serialized_rows=rows))
        if self._call is None:
            data.writer_schema = types.ProtoSchema(proto_descriptor=self._encoder.descriptor)
            self._call = _Call(self._client, self.stream)
        request = types.AppendRowsRequest(write_stream=self.stream, offset=offset, proto_rows=data)
        answer = self._call.ask(request, self._stop)
        if isinstance(answer, BaseException):
            return self._failed(_code_of(answer), line(answer), {}, answer)
        refused = {int(e.index): str(e.message) or "refused" for e in answer.row_errors}
        if refused or answer.error.code:
            code = _BY_NUMBER.get(int(answer.error.code), _CODES.UNKNOWN)
            return self._failed(code, _told(answer.error), refused, None)
        return True

    def _failed(self, code: Any, text: str, refused: dict[int, str], error: BaseException | None) -> bool:
        where = self._target.where
        if code == _CODES.ALREADY_EXISTS:
            if error is not None:
                self.close()
            return False
        if refused:
            raise RowErrors(refused, f"{where}: {text}")
        self.close()
        if code in _AGAIN:
            raise _Broken(f"{code.name}: {text[:200]}")
        if "SCHEMA_MISMATCH" in text or "more fields" in text:
            raise StoreUnavailable(f"{where}: a column that was added is not known everywhere yet ({text[:200]})")
        if code == _CODES.RESOURCE_EXHAUSTED:
            raise StoreUnavailable(f"{where}: a quota is used up ({text[:200]})")
        if "finalized" in text.lower():  # which only a sink that takes over does
            raise Fenced(f"{where}: another sink has ended this one's stream ({code.name}: {text[:200]})")
        if code in (_CODES.OUT_OF_RANGE, _CODES.NOT_FOUND, _CODES.FAILED_PRECONDITION):
            raise Fenced(f"{where}: the stream does not go on here ({code.name}: {text[:200]})")
        if error is not None:
            with errors(self._target, "append rows"):
                raise error
        raise Refused(f"{where} refuses rows ({code.name}: {text[:300]})")

    def close(self) -> None:
        """End the connection; the next append makes another one."""
        call, self._call = self._call, None
        if call is not None:
            call.close()


class _Broken(Exception):
    """The connection ended; nobody knows whether the rows are there."""


class _Call:
    """A running AppendRows call: requests go in one by one, a thread takes the answers."""

    def __init__(self, client: Any, stream: str) -> None:
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._client, self._stream = client, stream
        self._responses: Any = None
        threading.Thread(target=self._read, name="bigquery-append", daemon=True).start()

    def ask(self, request: Any, stop: threading.Event) -> Any:
        """The answer, or the error that ended the call."""
        self._requests.put(request)
        until = time.monotonic() + ANSWER_SECONDS
        while True:
            try:
                return self._answers.get(timeout=0.2)
            except queue.Empty:
                if stop.is_set():
                    raise StoreUnavailable("stopped while rows were being appended") from None
                if time.monotonic() > until:
                    raise _Broken(f"no answer for {ANSWER_SECONDS:.0f} s") from None

    def _read(self) -> None:
        try:
            self._responses = self._client.append_rows(
                iter(self._requests.get, None),
                retry=None,
                timeout=None,
                metadata=(("x-goog-request-params", f"write_stream={self._stream}"),),
            )
            for answer in self._responses:
                self._answers.put(answer)
            self._answers.put(google.Aborted("the server ended the connection"))
        except BaseException as error:  # whoever waits for the answer raises it
            self._answers.put(error)

    def close(self) -> None:
        self._requests.put(None)
        cancel = getattr(self._responses, "cancel", None)
        if cancel is not None:
            cancel()


def _code_of(error: BaseException) -> Any:
    if isinstance(error, google.GoogleAPICallError):
        code = error.grpc_status_code
    else:
        code = error.code() if isinstance(error, grpc.RpcError) and callable(getattr(error, "code", None)) else None
    return code or _CODES.UNKNOWN


def _told(status: Any) -> str:
    """An error of an answer, with BigQuery's own codes (STREAM_FINALIZED)."""
    found = [types.StorageError.deserialize(d.value) for d in status.details if "StorageError" in d.type_url]
    return " ".join((*(detail.code.name for detail in found), str(status.message)))


def create_stream(client: Any, target: Target, table: str) -> str:
    """A new committed stream of a table: its name."""
    parent = f"projects/{target.project}/datasets/{target.dataset}/tables/{table}"
    with errors(target, f"create a stream of {table}"):
        stream = types.WriteStream(type_=types.WriteStream.Type.COMMITTED)
        made = client.create_write_stream(parent=parent, write_stream=stream, retry=None, timeout=CALL_SECONDS)
        return str(made.name)


def finalize(client: Any, target: Target, stream: str) -> int:
    """Nobody appends to a stream any more; returns its rows, 0 where that is not known (it is gone, or was final)."""
    try:
        with errors(target, "finalize a stream"):
            return int(client.finalize_write_stream(name=stream, retry=None, timeout=CALL_SECONDS).row_count)
    except (Missing, Refused, google.Conflict) as error:
        log.info("stream %s is not to be finalized: %s", stream, error)
        return 0
