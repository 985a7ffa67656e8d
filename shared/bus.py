"""The bus: Redis Streams and the scripts that make every step on it exactly once.

Loss semantics: a call either happened whole or not at all; repeating it is safe, because each
script checks a sequence, an owner or a position before its first write.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.connection import parse_url
from redis.retry import Retry

from shared.errors import AuthError, BusBehind, BusUnavailable, ConfigError, Fenced, TapelineError
from shared.frames import Frame, parse, unreadable
from shared.keys import Keys

KEEP_ENTRIES = 16
# ClusterError: a cluster that is down, or that moves a slot about for too long.
_DOWN = (redis.ConnectionError, redis.TimeoutError, redis.exceptions.ClusterError)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the bus: bytes a stream may hold, debugging window, longest blocking read."""

    stream_max_bytes: int = 64 << 20
    window_ms: int = 15 * 60_000
    block_ms: int = 500


@dataclass(frozen=True, slots=True)
class Step:
    """What a stage commits: from one input position to the next."""

    token: str
    stage: str
    from_pos: str
    to_pos: str
    records: int
    last_ns: int
    out_seq: int
    changes: dict[str, bytes]
    deletes: Sequence[str]
    outputs: dict[str, list[Frame]]


class _Script:
    """One of our scripts. A node that has forgotten it gets it with the call; no other node is asked."""

    def __init__(self, client: Any, text: str) -> None:
        self._client, self._text = client, text
        self._sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    def __call__(self, keys: list[str], args: list[Any]) -> Any:
        try:
            return self._client.evalsha(self._sha, len(keys), *keys, *args)
        except redis.exceptions.NoScriptError:
            return self._client.eval(self._text, len(keys), *keys, *args)


class Bus:
    """A connection to Redis (or a Redis Cluster) that speaks in frames.

    One Bus per thread that blocks; `clone()` makes another on the same server.
    """

    def __init__(self, url: str, namespace: str = "md", *, cluster: bool = False, limits: Limits | None = None) -> None:
        self.url, self.cluster = url, cluster
        self.keys = Keys(namespace)
        self.limits = limits or Limits()
        # Whoever waits for Redis does so where it can be stopped, so the client itself does not retry.
        options: dict[str, Any] = {
            "socket_timeout": self.limits.block_ms / 1000 + 5,
            "socket_connect_timeout": 5,
            "socket_read_size": 1 << 20,
        }
        try:
            if cluster:
                _check_cluster_url(url)
            with self._errors():
                client = RedisCluster if cluster else redis.Redis
                self.client: Any = client.from_url(url, retry=Retry(NoBackoff(), 0), **options)
        except ValueError as error:
            raise ConfigError(f"REDIS_URL is not a Redis URL ({error}); use redis://host:port/db") from None
        folder = files("shared") / "scripts"
        self._script = {
            name: _Script(self.client, (folder / f"{name}.lua").read_text())
            for name in ("publish", "attach", "commit", "lease", "trim", "look", "alerts", "note")
        }

    def clone(self) -> Bus:
        return Bus(self.url, self.keys.namespace, cluster=self.cluster, limits=self.limits)

    def close(self) -> None:
        self.client.close()

    @property
    def where(self) -> str:
        """host:port without credentials."""
        return self.url.rsplit("@", 1)[-1].removeprefix("redis://").removeprefix("rediss://")

    def _errors(self) -> AbstractContextManager[None]:
        return errors(self.where)

    def ping(self) -> None:
        """Raises BusUnavailable or AuthError."""
        with self._errors():
            self.client.ping()

    def call(self, command: str, *args: Any, **options: Any) -> Any:
        """Any plain command, with our errors."""
        with self._errors():
            return getattr(self.client, command)(*args, **options)

    def note(self, key: str, field: str, value: str | bytes, *, new: bool = False) -> None:
        """Set a field of a hash, even while Redis is at its maxmemory: for small things that keep the bus going.

        `new`: only where there is no such field yet.
        """
        with self._errors():
            self._script["note"](keys=[key], args=["HSETNX" if new else "HSET", field, value])

    def deploy(self, partitions: int) -> None:
        """Fix the number of partitions of this deployment, or check it.

        Raises ConfigError when the bus was made with another number.
        """
        with self._errors():
            self.client.hsetnx(self.keys.deployment, "partitions", partitions)
            held = int(self.client.hget(self.keys.deployment, "partitions"))
        if held != partitions:
            raise ConfigError(
                f"Redis at {self.where} holds a deployment of {held} partitions, the settings say "
                f"{partitions}: set TAPELINE_PARTITIONS={held}, or use another namespace"
            )

    def identity(self) -> str:
        """Random id of this deployment's bus, made once; cursors in a store belong to one such bus."""
        with self._errors():
            self.client.hsetnx(self.keys.deployment, "id", uuid.uuid4().hex[:16])
            return str(self.client.hget(self.keys.deployment, "id").decode())

    # -- producing ---------------------------------------------------------------------------

    def attach(self, partition: int, producer: str, owner: str) -> tuple[int, bytes]:
        """Own a producer id from now on; returns (last sequence, its source cursor)."""
        with self._errors():
            seq, cursor = self._script["attach"](keys=[self.keys.producers(partition)], args=[producer, owner])
        return int(seq), cursor

    def publish(
        self,
        partition: int,
        producer: str,
        owner: str,
        seq: int,
        frames: list[Frame],
        cursor: bytes,
        topic: str = "ticks",
    ) -> bool:
        """Add frames with sequences seq, seq+1, … and the cursor behind them; False = stream full.

        Doing it again is harmless. Raises Fenced, BusBehind, BusUnavailable (at maxmemory, too: of all that workers
        write this alone is then refused).
        """
        k = self.keys
        size = sum(len(f.body) + 200 for f in frames)
        args: list[Any] = [
            producer, owner, seq, len(frames), sum(f.count for f in frames), frames[-1].last_ns,
            size, self.limits.stream_max_bytes, cursor,
        ]  # fmt: skip
        for i, frame in enumerate(frames):
            items = frame.fields(seq + i)
            args.append(len(items))
            args += items
        with self._errors():
            status, last, _ = self._script["publish"](
                keys=[k.stream(partition, topic), k.producers(partition), k.info(partition, topic)],
                args=args,
            )
        if status in (b"OK", b"DUPLICATE"):
            return True
        if status == b"FENCED":
            raise Fenced(f"another process publishes as '{producer}' now; this one stops")
        if status == b"BEHIND":
            raise BusBehind(f"partition {partition} stands at sequence {last} of '{producer}', not {seq - 1}")
        return False

    # -- reading -----------------------------------------------------------------------------

    def read(self, partition: int, topic: str, position: str, count: int, block_ms: int | None = None) -> list[Frame]:
        """Frames after `position`, oldest first; waits up to `block_ms` for the first one (None: no wait)."""
        reply = self.xread({self.keys.stream(partition, topic): position}, count, block_ms)
        if not reply:
            return []
        entries = next(iter(reply.values()))[0] if isinstance(reply, dict) else reply[0][1]
        return [sound(entry_id, fields) for entry_id, fields in entries]

    def xread(self, positions: dict[str, str], count: int, block_ms: int | None = None) -> Any:
        """The client's reply to XREAD of streams of one partition."""
        if not self.cluster:
            return self.call("xread", positions, count=count, block=block_ms)
        # The cluster's client asks some node each time where the keys of an XREAD are; we know: all on one.
        block = () if block_ms is None else ("BLOCK", block_ms)
        command = ("XREAD", *block, "COUNT", count, "STREAMS", *positions, *positions.values())
        with self._errors():
            node = self.client.get_node_from_key(next(iter(positions)))
            return self.client.execute_command(*command, target_nodes=node)

    def look(self, partition: int, topic: str, at: str) -> tuple[list[bytes], list[bytes], bool]:
        """(first entry, newest entry not after `at`, whether entries were ever trimmed), all of one instant.

        An entry is [id, sequence], [id] when it has no sequence, [] when there is none.
        """
        with self._errors():
            first, before, held, ever = self._script["look"](
                keys=[self.keys.stream(partition, topic), self.keys.info(partition, topic)], args=[at]
            )
        return first, before, ever > held

    def last_id(self, partition: int, topic: str) -> str:
        """Id of the newest entry ever added, `0-0` for none."""
        with self._errors():
            entry = self.client.xrevrange(self.keys.stream(partition, topic), count=1)
        return entry[0][0].decode() if entry else "0-0"

    # -- stages ------------------------------------------------------------------------------

    def acquire(self, partition: int, stage: str, owner: str, ttl_ms: int) -> str | None:
        """Lease token, or None when another worker holds the partition."""
        with self._errors():
            ok, token = self._script["lease"](
                keys=[self.keys.lease(partition, stage)], args=["acquire", owner, ttl_ms, uuid.uuid4().hex[:12]]
            )
        return token.decode() if ok else None

    def renew(self, partition: int, stage: str, token: str, ttl_ms: int) -> bool:
        with self._errors():
            ok, _ = self._script["lease"](keys=[self.keys.lease(partition, stage)], args=["renew", token, ttl_ms])
        return bool(ok)

    def release(self, partition: int, stage: str, token: str) -> None:
        with self._errors():
            self._script["lease"](keys=[self.keys.lease(partition, stage)], args=["release", token, 0])

    def load(self, partition: int, stage: str, topic: str) -> tuple[str, int, dict[str, bytes]]:
        """(position, output sequence, state) as last committed; registers the stage as a consumer."""
        k = self.keys
        self.register(partition, topic, stage)
        with self._errors():
            pos, seq = self.client.hmget(k.meta(partition, stage), "pos", "out_seq")
            state = self.client.hgetall(k.state(partition, stage))
        return (
            pos.decode() if pos else "0-0",
            int(seq or 0),
            {name.decode(): value for name, value in state.items()},
        )

    def commit(self, partition: int, topic: str, step: Step) -> bool:
        """Commit a step; False when an output stream is full (wait and repeat).

        Raises Fenced when the lease or the position is another worker's.
        """
        k = self.keys
        keys = [k.lease(partition, step.stage), k.meta(partition, step.stage), k.state(partition, step.stage),
                k.consumers(partition, topic)]  # fmt: skip
        args: list[Any] = [step.token, step.stage, step.from_pos, step.to_pos, step.records, step.last_ns,
                           step.out_seq, len(step.outputs)]  # fmt: skip
        tail: list[Any] = []
        for out, frames in step.outputs.items():
            keys += [k.stream(partition, out), k.info(partition, out)]
            args += [self.limits.stream_max_bytes, sum(len(f.body) + 200 for f in frames),
                     sum(f.count for f in frames), len(frames), frames[-1].last_ns if frames else 0]  # fmt: skip
            for frame in frames:
                items = frame.fields(frame.seq)
                tail.append(len(items))
                tail += items
        args.append(2 * len(step.changes))
        for name, value in step.changes.items():
            args += [name, value]
        args += [len(step.deletes), *step.deletes, *tail]
        with self._errors():
            status, detail = self._script["commit"](keys=keys, args=args)
        if status == b"OK":
            return True
        if status == b"FULL":
            return False
        raise Fenced(
            f"{step.stage} of partition {partition} is {detail.decode() or 'nobody'}'s now ({status.decode()})"
        )

    def commit_alerts(
        self, token: str, state: dict[str, bytes], alerts: dict[str, bytes], deletes: Sequence[str], acks: Sequence[str]
    ) -> None:
        """Commit a step of the one alerts worker: state, changed and removed alerts, acknowledgements taken.

        Doing it again is harmless. Raises Fenced when the lease is another process's.
        """
        k = self.keys
        args: list[Any] = [token]
        for items in (state, alerts):
            args.append(2 * len(items))
            for name, value in items.items():
                args += [name, value]
        args += [len(deletes), *deletes, len(acks), *acks]
        keys = [k.lease(0, "alerts"), k.alerts("state"), k.alerts("open"), k.alerts("acks")]
        with self._errors():
            status, owner = self._script["alerts"](keys=keys, args=args)
        if status != b"OK":
            raise Fenced(f"alerts are {owner.decode() or 'nobody'}'s now")

    def done_with(self, partition: int, topic: str, consumer: str, position: str) -> None:
        """A sink says how far its store has got; trimming may go so far."""
        self.note(self.keys.consumers(partition, topic), consumer, position)

    def register(self, partition: int, topic: str, consumer: str) -> None:
        """Hold back trimming for a consumer from now on (kept if it is known already)."""
        self.note(self.keys.consumers(partition, topic), consumer, "0-0", new=True)

    def trim(self, partition: int, topic: str) -> int:
        """Trim what every consumer is done with; returns the entries removed."""
        k = self.keys
        with self._errors():
            return int(self._script["trim"](
                keys=[k.stream(partition, topic), k.info(partition, topic), k.consumers(partition, topic)],
                args=[self.limits.window_ms, self.limits.stream_max_bytes, KEEP_ENTRIES],
            ))  # fmt: skip


@contextmanager
def errors(where: str) -> Iterator[None]:
    """Errors of the Redis client as the program's own; `where` is the server, without credentials."""
    try:
        yield
    except redis.AuthenticationError:
        raise AuthError(f"Redis at {where} refused the credentials; check REDIS_URL") from None
    except redis.exceptions.BusyLoadingError:
        raise BusUnavailable(f"Redis at {where} is loading its data") from None
    except _DOWN as error:
        raise BusUnavailable(f"Redis at {where} does not answer ({_short(error)})") from None
    except redis.exceptions.OutOfMemoryError:
        raise _full(where) from None
    except redis.exceptions.RedisClusterException as error:
        raise _cluster_error(where, error) from None
    except redis.exceptions.AskError:  # MOVED, too; a cluster's client follows them
        raise ConfigError(f"Redis at {where} is a cluster; set TAPELINE_REDIS_CLUSTER=true") from None
    except redis.ResponseError as error:
        if "OOM command not allowed" in str(error):  # of a script, before Redis 7
            raise _full(where) from None
        if str(error).startswith("NOAUTH"):
            raise AuthError(f"Redis at {where} wants a password; put it into REDIS_URL") from None
        if str(error).startswith("DENIED"):
            raise AuthError(
                f"Redis at {where} is in protected mode: give it a password, or `protected-mode no` in a closed network"
            ) from None
        if str(error).startswith(("MISCONF", "LOADING", "READONLY")):
            raise BusUnavailable(f"Redis at {where} refuses writes ({_short(error)})") from None
        raise


def _full(where: str) -> BusUnavailable:
    return BusUnavailable(f"Redis at {where} is at its maxmemory and takes nothing more: raise maxmemory, or free some")


def _cluster_error(where: str, error: redis.exceptions.RedisClusterException) -> TapelineError:
    """The client wraps what its last node said; every other case is nodes or slots that are missing."""
    if isinstance(error.__cause__, redis.AuthenticationError):
        return AuthError(f"Redis at {where} refused the credentials; check REDIS_URL")
    if "Cluster mode is not enabled" in str(error):
        return ConfigError(f"Redis at {where} is no cluster; unset TAPELINE_REDIS_CLUSTER")
    return BusUnavailable(f"Redis Cluster at {where} is not whole ({_short(error)})")


def sound(entry_id: bytes, fields: dict[bytes, bytes]) -> Frame:
    """The frame of an entry; one of kind UNREADABLE for what somebody else wrote into a stream."""
    try:
        return parse(entry_id, fields)
    except (KeyError, ValueError, msgspec.DecodeError) as error:
        return unreadable(
            f"entry {entry_id.decode()} is no frame ({error!r})", repr(fields).encode(), entry_id.decode()
        )


def worker_id(service: str) -> str:
    """`aggregate@host:pid`, unique per process start."""
    return f"{service}@{socket.gethostname()}:{os.getpid()}:{time.time_ns() & 0xFFFF:04x}"


def _short(error: BaseException) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__


def _check_cluster_url(url: str) -> None:
    """Raises ValueError."""
    given = parse_url(url)
    if "path" in given or given.get("db"):
        raise ValueError("a cluster has neither a unix socket nor databases")
