"""What `tapeline doctor` looks at, and what only a real project can show (`tapeline doctor --bigquery`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from uuid import uuid4

from services.sink_bigquery import ledger, schema
from services.sink_bigquery.append import Appender, Encoder, connect_write, create_stream, finalize
from services.sink_bigquery.clients import Missing, Refused, Target, bigquery, call, connect, errors, target_of
from services.sink_bigquery.forget import statements
from services.sink_bigquery.jobs import Jobs
from services.sink_bigquery.ledger import LOAD, Announced
from services.sink_bigquery.mend import mend
from services.sink_bigquery.method_insert import Inserts
from services.sink_bigquery.method_load import Loads
from services.sink_bigquery.rows import Ready, one
from services.sink_bigquery.tables import EVERY, INSTANT, INTEGER, LAYOUTS, REAL, TEXT
from services.sink_bigquery.views import VIEWS
from shared.batches import Batch, Rewind, Source
from shared.errors import ConfigError, Fenced, TapelineError
from shared.settings import Settings

Proof = tuple[str, bool, str]
_VALUES: dict[str, Any] = {TEXT: "proof", INTEGER: 1, REAL: 1.0}


def check(settings: Settings) -> str:
    """One line about the dataset; changes nothing. Raises AuthError, ConfigError, VersionError, StoreUnavailable."""
    target = target_of(settings)
    client = connect(target)
    try:
        found = schema.look(client, target)
    except (Missing, Refused) as error:
        raise ConfigError(f"{error}: check the project's name and what these credentials may do") from None
    finally:
        client.close()
    if not found.dataset:
        state = "no dataset yet: the sink or `tapeline migrate` makes it"
    elif found.changes:
        state = f"schema version {found.version}, {len(found.changes)} changes due by the sink or `tapeline migrate`"
    else:
        state = f"schema version {found.version}"
    return f"{target.where}, method {target.settings.method}, {state}"


def prove(settings: Settings) -> Iterator[Proof]:
    """(what, whether it holds, what was seen), tried in a dataset of its own, which is deleted at the end.

    Costs a few cents at most. Raises what ends it: AuthError, ConfigError, StoreUnavailable.
    """
    at = target_of(settings)
    target = Target(at.project, f"tapeline_proof_{uuid4().hex[:12]}", at.settings)
    client = connect(target)
    try:
        proof = _Proof(client, target)
        for name, function in proof.all():
            began = time.monotonic()
            try:
                fine, says = function()
            except Refused as error:
                fine, says = False, str(error)
            yield name, fine, f"{says} ({time.monotonic() - began:.1f} s)"
    finally:
        with errors(target, "delete the dataset of the proof"):
            client.delete_dataset(target.dataset, delete_contents=True, not_found_ok=True)
        client.close()


class _Proof:
    def __init__(self, client: Any, target: Target) -> None:
        self.client, self.target, self.stop = client, target, threading.Event()
        self.jobs = Jobs(client, target, uuid4().hex, self.stop)
        self.born = 0
        self._write: Any = None

    def all(self) -> list[tuple[str, Callable[[], tuple[bool, str]]]]:
        return [
            ("dataset, tables and views", self.schema),
            ("partitions, clusters, expiry", self.layout),
            ("one job of a name", self.jobs_once),
            ("one announcement of a number", self.announcements),
            ("a batch that was given up", self.closed_off),
            ("offsets of a committed stream", self.offsets),
            ("a stream that is final", self.final),
            ("insertId", self.inserts),
            ("rows computed again", self.mending),
            ("what a lost tail takes along", self.forgetting),
            ("views", self.views),
            ("bytes billed", self.billed),
        ]

    def schema(self) -> tuple[bool, str]:
        made = schema.ensure(self.client, self.target)
        again = schema.ensure(self.client, self.target)
        self.born = schema.ledger_born(self.client, self.target)
        return not again and self.born > 0, f"{len(made)} made, {len(again)} of them again"

    def layout(self) -> tuple[bool, str]:
        wrong = []
        for name, layout in EVERY.items():
            wanted = schema.table_of(self.target, layout)
            held = call(self.target, f"look at {name}", self.client.get_table, self.target.full(name))
            fine = held.clustering_fields == wanted.clustering_fields
            if wanted.time_partitioning is not None:
                there = held.time_partitioning
                fine = fine and there is not None and there.field == wanted.time_partitioning.field
                fine = fine and (there.expiration_ms or None) == (wanted.time_partitioning.expiration_ms or None)
            wrong += [] if fine else [name]
        return not wrong, f"differs: {', '.join(wrong)}" if wrong else f"{len(EVERY)} tables as asked for"

    def jobs_once(self) -> tuple[bool, str]:
        rows = self._row("gaps")
        for _ in range(2):
            self.jobs.load(f"{self.target.dataset}-twice", "gaps", rows.parquet())
        there = self._count("gaps")
        return there == 1, f"{there} row after the second try"

    def announcements(self) -> tuple[bool, str]:
        entry = Announced("proof", 1, ledger.next_at(None), LOAD, self.jobs.writer)
        loads = Loads(self.jobs, self.target, self.born, _nothing)
        loads.announce(entry)
        rival = Loads(self._rival(), self.target, self.born, _nothing)
        try:
            rival.announce(entry)
        except Fenced:
            found = ledger.newest(self.client, self.target, "proof")
            return found["proof"].writer == self.jobs.writer, "the second sink is turned away"
        return False, "both sinks announced it"

    def closed_off(self) -> tuple[bool, str]:
        self.jobs.close_off(f"{self.target.dataset}-late")
        try:
            self._rival().load(f"{self.target.dataset}-late", "gaps", self._row("gaps").parquet())
        except Fenced:
            return True, "nothing comes after it"
        return False, "a late job was taken"

    def offsets(self) -> tuple[bool, str]:
        appender, encoder = self._stream("late_trades")
        data = encoder.rows(self._row("late_trades").values())
        appender.append(0, data)
        visible = self._count("late_trades")
        began = time.monotonic()
        again = appender.append(0, data)
        milliseconds = (time.monotonic() - began) * 1000
        try:
            appender.append(5, data)
            gap = "taken"
        except Fenced:
            gap = "refused"
        appender.close()
        says = f"{visible} row to be seen at once; the same offset again: {'taken' if again else 'there already'}"
        return visible == 1 and not again and gap == "refused", f"{says}, in {milliseconds:.0f} ms; a later one: {gap}"

    def final(self) -> tuple[bool, str]:
        appender, encoder = self._stream("late_trades")
        data = encoder.rows(self._row("late_trades").values())
        appender.append(0, data)
        count = finalize(self._write, self.target, appender.stream)
        again = finalize(self._write, self.target, appender.stream)
        try:
            appender.append(1, data)
            late = "taken"
        except Fenced:
            late = "refused"
        appender.close()
        return count == 1 and late == "refused", f"{count} row; finalized again: {again}; a later append: {late}"

    def inserts(self) -> tuple[bool, str]:
        entry = Announced("proof", 2, ledger.next_at(None), LOAD, self.jobs.writer)
        inserts = Inserts(self.client, self.target, self.stop, _nothing)
        for _ in range(2):
            inserts.write(entry, [self._row("dead_letters")], [])
        there = self._count("dead_letters")
        return there == 1, f"{there} row of two with one insertId (a best effort of BigQuery's)"

    def mending(self) -> tuple[bool, str]:
        rows = self._row("candles_1m")
        for name in (f"{self.target.dataset}-{i}-candles_1m" for i in (1, 2)):
            mend(self.jobs, self.target, name, rows)
        there = self._count("candles_1m")
        return there == 1, f"{there} row, the same again adds none"

    def forgetting(self) -> tuple[bool, str]:
        batch = Batch(rewinds=[Rewind(Source("proof", topic, 1, 1, "1-0"), "0-0") for topic in ("late", "ticks")])
        done = 0
        for what, sql, parameters in statements(batch, self.target):
            if "dead_letters" not in what:  # which insertAll has just written: those wait for half an hour
                done += self.jobs.query(f"{self.target.dataset}-{what}", sql, parameters).num_dml_affected_rows or 0
        return self._count("late_trades") == 0, f"{done} rows deleted that were streamed a moment ago"

    def views(self) -> tuple[bool, str]:
        wrong = []
        for name in VIEWS:
            try:
                ledger.select(self.client, self.target, f"SELECT * FROM {self.target.named(name)} LIMIT 1", [])  # noqa: S608
            except TapelineError as error:
                wrong.append(f"{name}: {error}")
        return not wrong, "; ".join(wrong) or f"{len(VIEWS)} answer"

    def billed(self) -> tuple[bool, str]:
        with errors(self.target, "query", "bigquery.jobs.create"):
            config = bigquery.QueryJobConfig(use_query_cache=False)
            job = self.client.query(f"SELECT COUNT(*) FROM {self.target.named('v_candles_dedup')}", job_config=config)  # noqa: S608
            job.result()
        mib = (job.total_bytes_billed or 0) / (1 << 20)
        return True, f"load jobs are free; a query of an empty view is billed {mib:.0f} MiB"

    def _rival(self) -> Jobs:
        return Jobs(self.client, self.target, uuid4().hex, self.stop)

    def _stream(self, table: str) -> tuple[Appender, Encoder]:
        if self._write is None:
            self._write = connect_write(self.target)
        encoder = Encoder(LAYOUTS[table])
        stream = create_stream(self._write, self.target, table)
        return Appender(self._write, self.target, stream, encoder, self.stop), encoder

    def _row(self, table: str) -> Ready:
        now = ledger.next_at(None)
        layout = EVERY[table]
        values = {f.name: now if f.type == INSTANT else _VALUES.get(f.type, True) for f in layout.fields}
        return replace(one(table, values), letter=None)

    def _count(self, table: str) -> int:
        sql = f"SELECT COUNT(*) AS held FROM {self.target.named(table)}"  # noqa: S608
        return int(ledger.select(self.client, self.target, sql, [])[0]["held"])


def _nothing(table: str, rows: int, nbytes: int) -> None:
    """Costs of a proof are on no account."""
