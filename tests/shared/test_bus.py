"""The scripts: every call happens whole or not at all, and doing it again is harmless."""

from __future__ import annotations

import pytest

from shared.bus import KEEP_ENTRIES, Bus, Limits, Step
from shared.errors import AuthError, BusBehind, BusUnavailable, ConfigError, Fenced, VersionError
from shared.frames import VERSION, Frame, iso, ns_of, parse
from tests.wait import until


def frame(n: int, size: int = 10) -> Frame:
    return Frame("clock", 1, n, n + 1, "test", b"x" * size)


def step(token: str, begin: str, end: str, **more: object) -> Step:
    values = {
        "token": token, "stage": "aggregate", "from_pos": begin, "to_pos": end, "records": 1, "last_ns": 5,
        "out_seq": 1, "changes": {}, "deletes": (), "outputs": {},
    }  # fmt: skip
    return Step(**(values | more))  # type: ignore[arg-type]


def publish(bus: Bus, seq: int, frames: int = 1, owner: str = "me") -> bool:
    return bus.publish(0, "feed", owner, seq, [frame(seq + i) for i in range(frames)], b"cursor %d" % seq)


def bodies(bus: Bus, topic: str = "ticks") -> list[int]:
    return [f.seq for f in bus.read(0, topic, "0-0", 1000)]


# -- publishing ------------------------------------------------------------------------------


def test_a_repeated_publish_changes_nothing(bus: Bus) -> None:
    assert bus.attach(0, "feed", "me") == (0, b"")
    assert publish(bus, 1, 3)
    assert publish(bus, 1, 3)
    assert publish(bus, 4)
    assert bodies(bus) == [1, 2, 3, 4]
    assert bus.attach(0, "feed", "me") == (4, b"cursor 4")


def test_a_hole_in_the_sequence_is_refused(bus: Bus) -> None:
    bus.attach(0, "feed", "me")
    publish(bus, 1)
    with pytest.raises(BusBehind, match="stands at sequence 1"):
        publish(bus, 3)
    with pytest.raises(BusBehind):
        publish(bus, 1, 2)  # half known: the producer must look
    assert bodies(bus) == [1]


def test_who_attaches_last_owns_the_producer(bus: Bus) -> None:
    bus.attach(0, "feed", "old")
    bus.attach(0, "feed", "new")
    with pytest.raises(Fenced, match="another process publishes as 'feed'"):
        publish(bus, 1, owner="old")
    assert publish(bus, 1, owner="new")


def test_a_full_stream_takes_nothing(bus: Bus) -> None:
    small = Bus(bus.url, bus.keys.namespace, limits=Limits(stream_max_bytes=1000, window_ms=0))
    small.attach(0, "feed", "me")
    small.register(0, "ticks", "reader")
    seq = 1
    while small.publish(0, "feed", "me", seq, [frame(seq, 100)], b""):
        seq += 1
    assert bodies(bus) == list(range(1, seq))
    assert small.trim(0, "ticks") == 0, "the reader has read nothing"
    small.done_with(0, "ticks", "reader", small.read(0, "ticks", "0-0", 2)[-1].id)
    assert small.trim(0, "ticks") == 2
    assert small.publish(0, "feed", "me", seq, [frame(seq, 100)], b"")
    small.close()


# -- stages ----------------------------------------------------------------------------------


def test_a_step_commits_state_outputs_and_position_together(bus: Bus) -> None:
    bus.attach(0, "feed", "me")
    publish(bus, 1)
    token = bus.acquire(0, "aggregate", "w1", 1000) or ""
    assert bus.load(0, "aggregate", "ticks") == ("0-0", 0, {})
    out = frame(9)
    out.seq = 1
    at = bus.read(0, "ticks", "0-0", 10)[0].id
    assert bus.commit(0, "ticks", step(token, "0-0", at, changes={"a": b"1", "b": b"2"}, outputs={"candles": [out]}))
    assert bus.load(0, "aggregate", "ticks") == (at, 1, {"a": b"1", "b": b"2"})
    assert bodies(bus, "candles") == [1]
    # The same step again stands on another position: refused, nothing written.
    with pytest.raises(Fenced, match="CONFLICT"):
        bus.commit(0, "ticks", step(token, "0-0", at, changes={"a": b"9"}, outputs={"candles": [out]}))
    assert bodies(bus, "candles") == [1]
    assert bus.commit(0, "ticks", step(token, at, "9-9", out_seq=2, deletes=("b",)))
    assert bus.load(0, "aggregate", "ticks") == ("9-9", 2, {"a": b"1"})


def test_an_owner_of_yesterday_writes_nothing(bus: Bus) -> None:
    old = bus.acquire(0, "aggregate", "w1", 30) or ""
    assert bus.acquire(0, "aggregate", "w2", 1000) is None
    new = until(lambda: bus.acquire(0, "aggregate", "w2", 10_000), what="the lease to expire")
    assert not bus.renew(0, "aggregate", old, 1000)
    with pytest.raises(Fenced, match="w2's now"):
        bus.commit(0, "ticks", step(old, "0-0", "1-1", changes={"a": b"1"}))
    assert bus.load(0, "aggregate", "ticks") == ("0-0", 0, {})
    bus.release(0, "aggregate", old)  # somebody else's lease stays
    assert bus.renew(0, "aggregate", new, 1000)
    bus.release(0, "aggregate", new)
    assert bus.acquire(0, "aggregate", "w3", 1000)


def test_a_full_output_stops_the_whole_step(bus: Bus) -> None:
    small = Bus(bus.url, bus.keys.namespace, limits=Limits(stream_max_bytes=100, window_ms=0))
    small.register(0, "candles", "sink")
    token = small.acquire(0, "aggregate", "w", 10_000) or ""
    assert small.commit(0, "ticks", step(token, "0-0", "1-0", outputs={"candles": [frame(1, 200)]}))
    late = step(token, "1-0", "2-0", changes={"x": b"1"}, outputs={"candles": [frame(2, 200)]})
    assert not small.commit(0, "ticks", late)
    assert small.load(0, "aggregate", "ticks") == ("1-0", 1, {})
    # A step without output goes on.
    assert small.commit(0, "ticks", step(token, "1-0", "2-0"))
    small.close()


# -- trimming --------------------------------------------------------------------------------


def test_nothing_is_trimmed_below_the_slowest_consumer_or_the_window(bus: Bus) -> None:
    bus.attach(0, "feed", "me")
    for seq in range(1, 101):
        publish(bus, seq)
    ids = [f.id for f in bus.read(0, "ticks", "0-0", 1000)]
    assert bus.trim(0, "ticks") == 0, "nobody registered: nobody is done"
    bus.register(0, "ticks", "slow")
    bus.done_with(0, "ticks", "fast", ids[-1])
    bus.done_with(0, "ticks", "slow", ids[49])
    assert bus.trim(0, "ticks") == 0, "all within the debugging window"
    no_window = Bus(bus.url, bus.keys.namespace, limits=Limits(window_ms=0))
    assert no_window.trim(0, "ticks") == 50
    bus.done_with(0, "ticks", "slow", ids[-1])
    no_window.trim(0, "ticks")
    assert len(bodies(bus)) == KEEP_ENTRIES, "the newest stay: a producer looks at them when it resumes"
    no_window.close()


# -- frames and errors -----------------------------------------------------------------------


def test_times_in_frames_keep_every_nanosecond() -> None:
    assert iso(1_703_545_200_085_275_419) == "2023-12-25T23:00:00.085275419Z"
    assert ns_of(iso(1_703_545_200_085_275_419)) == 1_703_545_200_085_275_419


def test_a_frame_of_a_newer_program_is_refused() -> None:
    names = {
        b"kind": b"clock",
        b"count": b"1",
        b"first": b"2026-01-01Z",
        b"last": b"2026-01-01Z",
        b"src": b"",
        b"seq": b"1",
    }
    with pytest.raises(VersionError, match="upgrade this worker"):
        parse(b"1-1", {**names, b"body": b"", b"v": str(VERSION + 1).encode()})


def test_the_number_of_partitions_is_fixed(bus: Bus) -> None:
    bus.deploy(8)
    bus.deploy(8)
    with pytest.raises(ConfigError, match="TAPELINE_PARTITIONS=8"):
        bus.deploy(4)


def test_a_redis_that_is_not_there() -> None:
    with pytest.raises(BusUnavailable, match=r"127\.0\.0\.1:1"):
        Bus("redis://user:secret@127.0.0.1:1").ping()
    with pytest.raises(ConfigError, match="REDIS_URL"):
        Bus("http://nowhere")


def test_a_refused_password_is_said_without_it(bus: Bus, redis_server: object) -> None:
    bus.call("config_set", "requirepass", "right")
    try:
        with pytest.raises(AuthError) as caught:
            Bus(bus.url.replace("unix://", "unix://:wrong@")).ping()
        assert "wrong" not in str(caught.value)
        with pytest.raises(AuthError):
            Bus(bus.url).ping()
    finally:
        bus.client.execute_command("CONFIG", "SET", "requirepass", "")
