"""What a store forgets of a stream whose end Redis has lost: rows whose only key is their place on the bus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from services.sink_bigquery.clients import Target, bigquery
from shared.batches import Batch
from shared.stages import PRODUCER
from shared.tables import TICK_TABLES

_MS = "CAST(SPLIT(stream_id, '-')[OFFSET(0)] AS INT64)"
_SEQ = "CAST(SPLIT(stream_id, '-')[OFFSET(1)] AS INT64)"


def statements(batch: Batch, target: Target) -> Iterator[tuple[str, str, list[Any]]]:
    """(what, statement, parameters) for each table that loses rows."""
    for i, (source, after) in enumerate(batch.rewinds):
        place = "bus = @bus AND `partition` = @partition"
        values: dict[str, str | int] = {"bus": source.bus, "partition": source.partition}
        if source.topic in PRODUCER:
            values["seq"] = source.seq
            if source.topic == "late":
                yield _delete(f"{i}_late_trades", target, "late_trades", f"{place} AND bus_seq >= @seq", values)
            test = f"{place} AND `seq` >= @seq AND topic = @topic"
        else:
            values |= dict(zip(("ms", "entry"), map(int, after.split("-")), strict=True))
            if source.topic == "ticks":
                behind = f"{place} AND (entry_ms > @ms OR (entry_ms = @ms AND entry_seq > @entry))"
                for table in TICK_TABLES.values():
                    yield _delete(f"{i}_{table.name}", target, table.name, behind, values)
            test = f"{place} AND topic = @topic AND ({_MS} > @ms OR ({_MS} = @ms AND {_SEQ} > @entry))"
        yield _delete(f"{i}_dead_letters", target, "dead_letters", test, values | {"topic": source.topic})


def _delete(
    what: str, target: Target, table: str, test: str, values: dict[str, str | int]
) -> tuple[str, str, list[Any]]:
    parameters = [
        bigquery.ScalarQueryParameter(name, "STRING" if isinstance(value, str) else "INT64", value)
        for name, value in values.items()
    ]
    return f"forget_{what}", f"DELETE FROM {target.named(table)} WHERE {test}", parameters  # noqa: S608
