"""History and live as one: whenever a consumer begins, and whatever happens meanwhile, it has what the store has.

A real Redis, a real sink and store, a real server and real clients; Hypothesis draws what happens to them, and when.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from services.sink_sqlite.store import SqliteStore
from shared.api_rows import key_of, rows_of_store
from shared.bus import Bus, Limits
from shared.client import Stream
from shared.client_rows import typed
from shared.redis_server import EmbeddedRedis
from shared.settings import load
from shared.stores import read_rows
from shared.tables import time_column
from tests.postgres import free_port
from tests.services.sink_sqlite.tape import Stage, candles, pressure, rollup, rows, said, signal, sinking
from tests.serving import Served, start
from tests.shared.streaming import OPTIONS, NotedClient, Taker
from tests.shared.test_reader_follow import deploy, publish
from tests.wait import on_disk, until

# What is subscribed to: its table, and the columns that say whose rows.
CHANNELS = {
    "candles": ("candles_1m", {"ticker": "ES"}),
    "pressure": ("pressure_metrics", {"underlying": "NQ"}),
    "rollups": ("pressure_rollups", {}),
    "signals": ("signals", {}),
}
STEPS = st.one_of(
    st.tuples(st.just("make"), st.sampled_from([1, 2, 5, 40])),
    st.tuples(st.just("correct"), st.integers(0, 12)),
    st.tuples(st.just("begin"), st.sampled_from(sorted(CHANNELS)), st.sampled_from([0, 1, 3, 100, None])),
    st.tuples(st.just("cut"), st.integers(0, 3)),
    st.tuples(st.sampled_from(["sink off", "sink on", "web off", "web on", "seen"])),
    st.tuples(st.sampled_from(["stored", "trim", "redis"])),
)
Step = tuple[Any, ...]


class Consumer(NamedTuple):
    """`history`: so many newest rows of a channel first; None: all that there are."""

    channel: str
    history: int | None
    client: NotedClient
    taker: Taker


class World:
    """A market of one partition on a namespace of its own; each part can be ended and begun again."""

    def __init__(self, redis: EmbeddedRedis, folder: Path, number: int, port: int) -> None:
        self._redis, self.path = redis, folder / f"{number}.db"
        self.url = f"sqlite:///{self.path}"
        self.bus = Bus(redis.url, f"seam{number}", limits=Limits(window_ms=0, block_ms=50))
        deploy(self.bus)
        publish(self.bus, 0, *OPTIONS)
        self.stages = {name: Stage(self.bus, name=name) for name in ("aggregate", "pressure", "signals")}
        self.made = 0
        self._revisions: dict[int, int] = {}
        environ = {"REDIS_URL": redis.url, "TAPELINE_NAMESPACE": f"seam{number}", "TAPELINE_STORE": self.url,
                   "TAPELINE_WEB_PORT": str(port), "TAPELINE_WEB_MAX_ROWS": "60",
                   "TAPELINE_WEB_REQUESTS_PER_SECOND": "10000"}  # fmt: skip
        self._settings = load(environ=environ)
        self._sink: ExitStack | None = None
        self._web: Served | None = None
        self.consumers: list[Consumer] = []

    # -- what may happen; each blocks ----------------------------------------------------------------

    def make(self, many: int) -> None:
        for n in range(self.made, self.made + many):
            self._put(n, 0)
        self.made += many

    def correct(self, back: int) -> None:
        n = self.made - 1 - back
        if n >= 0:
            self._revisions[n] = self._revisions.get(n, 0) + 1
            self._put(n, self._revisions[n])

    def _put(self, n: int, revision: int) -> None:
        value = {"revision": revision, "timestamp_out_ns": 1_703_546_000_000_000_000 + revision}
        self.stages["aggregate"].put(candles(rows(2, n, revision=revision, close=5000.0 + revision)))
        options = [said(pressure(n, **value)), said(pressure(n, **value, underlying="CL")), said(rollup(n, **value))]
        self.stages["pressure"].put(*options)
        self.stages["signals"].put(said(signal(n, **value, premium=1e6 + revision)))

    def sink_on(self) -> None:
        if self._sink is None:
            self._sink = ExitStack()
            self._sink.enter_context(sinking(self.bus, self.path, SqliteStore(self.path, 0.5)))

    def sink_off(self) -> None:
        if self._sink is not None:
            self._sink.close()
            self._sink = None

    def stored(self) -> None:
        """Wait until the store has all that was made."""
        self.sink_on()
        wanted = {name: stage.seq for name, stage in self.stages.items() if stage.seq}
        topics = {"aggregate": "candles", "pressure": "pressure", "signals": "signals"}

        def behind() -> bool:
            held = {row["topic"]: row["seq"] for row in read_rows(self.url, "sink_cursors")}
            return all(held.get(topics[name], 0) == seq for name, seq in wanted.items())

        until(behind, 20, "all to be stored")

    def trim(self) -> None:
        for topic in ("candles", "pressure", "signals"):
            self.bus.trim(0, topic)

    def web_on(self) -> None:
        if self._web is None:
            self._web = start(self._settings)

    def web_off(self) -> None:
        if self._web is not None:
            self._web.end()
            self._web = None

    def redis(self) -> None:
        on_disk(self.bus.client)
        self._redis.kill()
        self._redis.start()
        self.bus.client.connection_pool.disconnect()

    def close(self) -> None:
        self.web_off()
        self.sink_off()
        self.bus.close()

    # -- consumers -------------------------------------------------------------------------------------

    async def begin(self, channel: str, history: int | None) -> None:
        client = NotedClient(f"http://127.0.0.1:{self._settings.web.port}")
        options: dict[str, Any] = {"since": 0} if history is None else {"history": history}
        of = {"candles": ("ES", "rolling"), "pressure": ("NQ",)}.get(channel, ())
        stream: Stream[Any] = getattr(client, channel)(*of, **options)
        taker = Taker(stream)
        await taker.__aenter__()
        self.consumers.append(Consumer(channel, history, client, taker))

    async def step(self, step: Step) -> None:
        name, *values = step
        if name == "begin":
            if len(self.consumers) < 4:
                await self.begin(*values)
        elif name == "cut":
            for consumer in self.consumers[values[0] : values[0] + 1]:
                consumer.client.cut()
        elif name == "seen":
            await self.seen()
        else:
            await asyncio.to_thread(getattr(self, name.replace(" ", "_")), *values)

    async def seen(self) -> None:
        """Wait until every consumer has what is made now: then it has all that came before, too."""
        await asyncio.to_thread(self.web_on)
        await asyncio.to_thread(self.sink_on)
        for consumer in self.consumers:
            # One without history has begun once it is live.
            await consumer.taker.live()
        n = self.made
        await asyncio.to_thread(self.make, 1)
        await asyncio.to_thread(self.stored)
        for consumer in self.consumers:
            newest = max(self.rows(consumer.channel))

            def there(taken: list[Any], newest: Any = newest, channel: str = consumer.channel) -> bool:
                return any(place_of(channel, row) == newest for row in reversed(taken))

            await consumer.taker.until(there, f"row {n} of {consumer.channel}")

    def rows(self, channel: str) -> dict[tuple[Any, ...], Any]:
        """What the store has, by place."""
        table, where = CHANNELS[channel]
        made = [typed(table, row) for row in rows_of_store(table, read_rows(self.url, table, where))]
        return {place_of(channel, row): row for row in made}


def place_of(channel: str, row: Any) -> tuple[Any, ...]:
    """Its time and key: the order in which rows are told."""
    table, _ = CHANNELS[channel]
    return (getattr(row, time_column(table)), *(getattr(row, name) for name in key_of(table)))


def agrees(world: World, consumer: Consumer) -> None:
    """What it was given is what the store has, from its first row on."""
    stored, taken = world.rows(consumer.channel), dict[tuple[Any, ...], Any]()
    for row in consumer.taker.rows:
        place = place_of(consumer.channel, row)
        assert place not in taken or taken[place].revision < row.revision, "a row came twice"
        taken[place] = row
    assert taken.keys() <= stored.keys(), "a row that the store has not"
    for place, row in taken.items():
        assert row == stored[place]
    # Without history it begins with what is made next, but corrections of older rows may come before that.
    begun = [row for row in consumer.taker.rows if consumer.history or not row.revision]
    first = min(stored) if consumer.history is None else place_of(consumer.channel, begun[0])
    missing = [place for place in stored if place >= first and place not in taken]
    assert not missing, f"{consumer.channel} with history {consumer.history} lacks {missing[:3]}"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    made = EmbeddedRedis(tmp_path_factory.mktemp("seam"))
    made.start()
    yield made
    made.stop()


NUMBERS = count()
EXAMPLES: list[list[Step]] = [
    # The sink lags while a consumer begins; the stream is trimmed while another one is cut.
    [("make", 5), ("sink on",), ("stored",), ("sink off",), ("make", 40), ("web on",), ("begin", "candles", 3),
     ("begin", "pressure", 3), ("correct", 1), ("sink on",), ("correct", 30)],
    [("web on",), ("make", 40), ("stored",), ("begin", "candles", 3), ("begin", "signals", 100),
     ("begin", "pressure", 0), ("seen",), ("web off",), ("make", 40), ("make", 40), ("stored",), ("trim",),
     ("correct", 3), ("web on",)],
    [("make", 2), ("stored",), ("begin", "candles", 100), ("begin", "rollups", None), ("web on",), ("seen",),
     ("redis",), ("correct", 0), ("cut", 0), ("make", 5), ("cut", 1), ("correct", 2)],
]  # fmt: skip


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@example(EXAMPLES[0])
@example(EXAMPLES[1])
@example(EXAMPLES[2])
@given(st.lists(STEPS, min_size=6, max_size=16))
def test_a_consumer_has_what_the_store_has(redis: EmbeddedRedis, tmp_path: Path, steps: list[Step]) -> None:
    world = World(redis, tmp_path, next(NUMBERS), free_port())

    async def live() -> None:
        try:
            for step in steps:
                await world.step(step)
            for channel, history in (("candles", 3), ("signals", None)):
                if channel not in {consumer.channel for consumer in world.consumers}:
                    await world.begin(channel, history)
            await world.seen()
            await asyncio.to_thread(world.stored)
        finally:
            ending = (consumer.taker.__aexit__(None, None, None) for consumer in world.consumers)
            await asyncio.gather(*ending, return_exceptions=True)

    try:
        asyncio.run(live())
        for consumer in world.consumers:
            agrees(world, consumer)
    finally:
        world.close()
