"""BigQuery stores and batches for the tests."""

from __future__ import annotations

import threading
import uuid

import pytest

from services.sink_bigquery.clients import Target
from services.sink_bigquery.store import BigQueryStore
from shared.batches import Batch, Item, Source, batch_of
from shared.frames import Frame
from shared.settings import BigQuery
from tests.bigquery import Endpoints
from tests.services.sink_sqlite.tape import INSTRUMENTS, TOPIC_OF


def target(at: Endpoints, monkeypatch: pytest.MonkeyPatch, method: str = "load", **more: object) -> Target:
    """A dataset that does not exist yet; readers find its server by the environment."""
    monkeypatch.setenv("TAPELINE_BIGQUERY_ENDPOINT", at.url)
    settings = BigQuery(endpoint=at.url, grpc_endpoint=at.grpc, method=method, **more)  # type: ignore[arg-type]
    return Target("tests", f"d{uuid.uuid4().hex[:10]}", settings)


def url_of(at: Target) -> str:
    return f"bigquery://{at.project}/{at.dataset}"


def store_at(at: Target) -> BigQueryStore:
    made = BigQueryStore(at, threading.Event())
    made.open()
    return made


def batch(
    *frames: Frame, bus: str = "a", topic: str = "", seq: int = 1, rewound: bool = False, after: str = "0-0",
    mend: bool = False,
) -> Batch:  # fmt: skip
    """Frames with sequences seq, seq+1, …; entries of the same numbers."""
    items = []
    for i, frame in enumerate(frames):
        of = topic or TOPIC_OF.get(frame.kind, "usage" if frame.kind == "usage" else "candles")
        source = Source(bus, of, 0, seq + i, f"{seq + i}-0")
        items.append(Item(source, frame, rewound=rewound and i == 0, after=after, instruments=INSTRUMENTS))
    return batch_of(items, mend=mend)
