"""Jobs with names of their own: of all who begin one of a name only one can, and everybody sees how it ended.

This is what makes writing a batch again harmless. A job that failed has written nothing, and the next attempt has a
name of its own; what every attempt of a name writes is the same, see ledger.py.
"""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from services.sink_bigquery.clients import (
    CALL_SECONDS,
    Missing,
    Refused,
    Target,
    bigquery,
    call,
    errors,
    google,
    passes,
)  # fmt: skip
from shared.errors import Fenced, StoreUnavailable

log = logging.getLogger(__name__)

ATTEMPTS = 1000
POLL_SECONDS, POLL_MAX_SECONDS = 0.05, 2.0
LEAVE_SECONDS = 1.0
WRITER = "tapeline_writer"
_T = TypeVar("_T")


class Jobs:
    """Named jobs of one writer; `stop` ends a wait. Safe from several threads."""

    def __init__(self, client: Any, target: Target, writer: str, stop: threading.Event) -> None:
        self.client, self.target, self.writer, self._stop = client, target, writer, stop
        self._failed: dict[str, int] = {}

    def load(self, name: str, table: str, data: bytes, *, schema: Sequence[Any] = ()) -> Any:
        """Append a Parquet file to a table; with `schema`, replace the table by it. Returns the job, done.

        Raises Refused when BigQuery does not take the rows, Missing, StoreUnavailable.
        """
        config = bigquery.LoadJobConfig(
            source_format=bigquery.SourceFormat.PARQUET,
            write_disposition="WRITE_TRUNCATE" if schema else "WRITE_APPEND",
            create_disposition="CREATE_NEVER",
            labels={WRITER: self.writer},
        )
        if schema:
            config.schema = schema

        def begin(job_id: str) -> Any:
            with errors(self.target, f"load into {table}", "bigquery.jobs.create and bigquery.tables.updateData"):
                return self.client.load_table_from_file(
                    io.BytesIO(data), self.target.full(table), num_retries=0, job_id=job_id,
                    location=self.target.settings.location, job_config=config, timeout=CALL_SECONDS,
                )  # fmt: skip

        return self._run(name, begin)

    def query(self, name: str, sql: str, parameters: Sequence[Any] = ()) -> Any:
        """A statement that changes a table. Returns the job, done. Raises as `load` does."""
        config = bigquery.QueryJobConfig(query_parameters=list(parameters), labels={WRITER: self.writer})

        def begin(job_id: str) -> Any:
            with errors(self.target, "run a statement", "bigquery.jobs.create"):
                return self.client.query(
                    sql, job_config=config, job_id=job_id, location=self.target.settings.location, retry=None,
                    job_retry=None, timeout=CALL_SECONDS,
                )  # fmt: skip

        return self._run(name, begin)

    def close_off(self, name: str) -> None:
        """Nobody writes under this name from now on; what is being written is waited for."""
        config = bigquery.QueryJobConfig(labels={WRITER: self.writer, "tapeline_given_up": "yes"})

        def begin(job_id: str) -> Any:
            with errors(self.target, "run a statement", "bigquery.jobs.create"):
                return self.client.query(
                    "SELECT 1", job_config=config, job_id=job_id, location=self.target.settings.location, retry=None,
                    job_retry=None, timeout=CALL_SECONDS,
                )  # fmt: skip

        self._run(name, begin, closing=True)

    def ours(self, job: Any) -> bool:
        """Whether this writer began a job."""
        return bool((job.labels or {}).get(WRITER) == self.writer)

    def _run(self, name: str, begin: Callable[[str], Any], *, closing: bool = False) -> Any:
        for attempt in range(self._failed.get(name, 0), ATTEMPTS):
            job_id = f"{name}-{attempt}"
            try:
                job = begin(job_id)
            except google.Conflict:
                job = call(self.target, "look at a job", self.client.get_job, job_id)
            job = self._wait(job)
            given_up = "tapeline_given_up" in (job.labels or {})
            if given_up and not closing:
                raise Fenced(f"{self.target.where}: another sink has given up this batch and went on")
            failure = job.error_result
            if not failure:
                return job
            self._failed[name] = attempt + 1
            reason, message = str(failure.get("reason", "")), str(failure.get("message", ""))
            text = f"{self.target.where}: job {job_id} failed ({reason}: {message.partition(chr(10))[0][:200]})"
            if not passes(reason, message):
                del self._failed[name]  # the same again would be refused again
                raise Missing(text) if reason == "notFound" else Refused(text)
            if self.ours(job):
                raise StoreUnavailable(text)
        raise StoreUnavailable(f"{self.target.where}: job {name} failed {ATTEMPTS} times")

    def _wait(self, job: Any) -> Any:
        wait = POLL_SECONDS
        while job.state != "DONE":
            if self._stop.wait(wait):
                raise StoreUnavailable(f"{self.target.where}: job {job.job_id} runs on; the next start looks at it")
            wait = min(POLL_MAX_SECONDS, 1.5 * wait)
            job = call(self.target, "look at a job", self.client.get_job, job.job_id)
        return job


class Attended:
    """Calls that may hang for a minute, each on a thread, so that `stop` ends the wait for it.

    The threads are daemons: a request that hangs keeps no process alive.
    """

    def __init__(self, where: str, stop: threading.Event) -> None:
        self._where, self._stop = where, stop
        self._left: threading.Thread | None = None

    def call(self, task: Callable[[], _T]) -> _T:
        """The task's answer. Raises StoreUnavailable soon after `stop`, and while a task that was left goes on."""
        if self._left is not None and self._left.is_alive():
            raise StoreUnavailable(f"{self._where} has not answered yet")
        answers: list[_T] = []
        failures: list[BaseException] = []

        def run() -> None:
            try:
                answers.append(task())
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run, name="bigquery", daemon=True)
        thread.start()
        stopped_at = 0.0
        while thread.is_alive():
            thread.join(0.1)
            if self._stop.is_set():
                stopped_at = stopped_at or time.monotonic()
                if time.monotonic() - stopped_at > LEAVE_SECONDS:
                    self._left = thread
                    raise StoreUnavailable(f"{self._where} was not waited for any more; the next start looks at it")
        if failures:
            raise failures[0]
        return answers[0]


def together(tasks: Sequence[Callable[[], None]]) -> None:
    """All at once, each on a thread; raises the first failure after all have ended."""
    failures: list[BaseException] = []

    def run(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    worst = [e for e in failures if not isinstance(e, StoreUnavailable)] or failures
    if worst:
        raise worst[0]
