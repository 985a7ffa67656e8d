"""The bus as a follower of bars reads it: only looks, registers nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

import msgspec
import redis
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from shared.batches import Cursor
from shared.bus import errors, sound
from shared.errors import ConfigError
from shared.frames import Frame
from shared.instruments import instrument_id, parse_outright, partition_of
from shared.keys import Keys
from shared.messages import Instrument
from shared.reader_bars import Series
from shared.reader_store import TOPIC
from shared.sink_tail import START, entry

BLOCK_MS = 1000
READ_ENTRIES = 16


class Feed:
    """A connection pool to Redis (or a Redis Cluster). Every call raises BusUnavailable, AuthError, ConfigError."""

    def __init__(self, url: str, namespace: str, *, cluster: bool = False) -> None:
        self._keys = Keys(namespace)
        self._where = url.rsplit("@", 1)[-1].removeprefix("redis://").removeprefix("rediss://")
        # Whoever waits for Redis does so where it can be stopped, so the client itself does not retry.
        options: dict[str, Any] = {"socket_timeout": BLOCK_MS / 1000 + 5, "socket_connect_timeout": 5}
        # Each follower that waits for bars has a connection.
        options |= {"retry": Retry(NoBackoff(), 0), "max_connections": 1 << 16}
        try:
            self._client: Any = (RedisCluster if cluster else Redis).from_url(url, **options)
        except ValueError as error:
            raise ConfigError(f"'{self._where}' is not a Redis URL ({error}); use redis://host:port/db") from None
        self._cluster = cluster
        self._look = (files("shared") / "scripts" / "look.lua").read_text()
        self._sha = hashlib.sha1(self._look.encode(), usedforsecurity=False).hexdigest()

    async def deployment(self) -> tuple[str, int] | None:
        """(identity of the bus, its partitions); None while there is none."""
        with errors(self._where):
            identity, partitions = await self._client.hmget(self._keys.deployment, "id", "partitions")
        return (identity.decode(), int(partitions)) if identity and partitions else None

    async def partition(self, series: Series, partitions: int) -> tuple[int, bool] | None:
        """(partition of a series' bars, whether it is sure); None for an `exchange:symbol` that no feed has published.

        What no feed has published yet may be a ticker, whose name alone decides.
        """
        with errors(self._where):
            if series.exchange:
                number = instrument_id(series.exchange, series.symbol)
                for partition in range(partitions):
                    if await self._client.hexists(self._keys.instruments(partition), number):
                        return partition, True
            first = partition_of(series.symbol, partitions)
            for partition in sorted(range(partitions), key=lambda p: p != first):
                for body in await self._client.hvals(self._keys.instruments(partition)):
                    if _is_of(series, body):
                        return partition, True
        if series.exchange:
            return None
        root = parse_outright(series.symbol, 0)
        return partition_of(root[0] if root else series.symbol, partitions), False

    async def holds(self, partition: int, cursor: Cursor, topic: str = TOPIC) -> bool:
        """Whether the stream holds all that came behind a place in it."""
        keys = (self._keys.stream(partition, topic), self._keys.info(partition, topic))
        with errors(self._where):
            try:
                told = await self._client.evalsha(self._sha, 2, *keys, cursor.stream_id)
            except redis.exceptions.NoScriptError:
                told = await self._client.eval(self._look, 2, *keys, cursor.stream_id)
        first, before = entry(told[0]), entry(told[1])
        if cursor.stream_id == START:
            return bool(told[3] <= told[2])  # nothing was ever trimmed
        if before is not None:
            return before.id == cursor.stream_id
        return first is not None and first.seq == cursor.seq + 1  # trimmed up to there, not beyond

    async def read(self, partition: int, position: str) -> list[Frame]:
        """Frames behind an entry, oldest first; waits up to BLOCK_MS for the first. Raises VersionError."""
        return (await self.read_all(TOPIC, {partition: position}, READ_ENTRIES)).get(partition, [])

    async def read_all(self, topic: str, positions: Mapping[int, str], count: int) -> dict[int, list[Frame]]:
        """The same of several partitions; of a cluster only one at a time, since each may be on another node."""
        streams = {self._keys.stream(p, topic): p for p in positions}
        command = ("XREAD", "BLOCK", BLOCK_MS, "COUNT", count, "STREAMS", *streams, *positions.values())
        with errors(self._where):
            if self._cluster:
                await self._client.initialize()
                node = self._client.get_node_from_key(next(iter(streams)))
                reply = await self._client.execute_command(*command, target_nodes=node)
            else:
                reply = await self._client.xread(
                    dict(zip(streams, positions.values(), strict=True)), count=count, block=BLOCK_MS
                )
        return {streams[stream.decode()]: [sound(*entry) for entry in entries] for stream, entries in _streams(reply)}

    async def behind(self, topic: str, partition: int, position: str, count: int) -> list[Frame]:
        """Frames behind an entry as they are there now, oldest first. Raises VersionError."""
        with errors(self._where):
            entries = await self._client.xrange(self._keys.stream(partition, topic), f"({position}", "+", count)
        return [sound(entry_id, fields) for entry_id, fields in entries]

    async def newest(self, topic: str, partition: int) -> Cursor:
        """The newest entry's place; of an empty stream its start."""
        with errors(self._where):
            entries = await self._client.xrevrange(self._keys.stream(partition, topic), count=1)
        return Cursor(sound(*entries[0]).seq, entries[0][0].decode()) if entries else Cursor(0, START)

    async def close(self) -> None:
        """Whoever reads meanwhile gets BusUnavailable."""
        await self._client.aclose()


def _is_of(series: Series, body: bytes) -> bool:
    """Whether an instrument is the series' symbol, or has it as its continuous ticker."""
    try:
        i = msgspec.json.decode(body, type=Instrument)
    except msgspec.DecodeError:
        return False
    return series.symbol in (i.symbol, i.root, i.ticker) and series.exchange in ("", i.venue)


def _streams(reply: Any) -> Iterator[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]:
    """(stream, entries) of an XREAD reply of either protocol version."""
    if isinstance(reply, dict):
        for stream, groups in reply.items():
            yield stream, [entry for group in groups for entry in group]
    else:
        yield from reply or ()
