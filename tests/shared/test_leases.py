"""Leases: fair shares, and workers of a store that share its partitions or stand by."""

from __future__ import annotations

from shared.bus import Bus
from shared.heartbeat import Beat, beat, leave
from shared.leases import Leases, fair_share


def workers(*names: str) -> list[Beat]:
    return [Beat(name, "sink-x", "host", 1, 0) for name in names]


def test_a_share_is_rounded_up_and_begins_at_the_worker_s_rank() -> None:
    assert fair_share(workers("a"), "a", 3, []) == ([], [0, 1, 2], 3)
    assert fair_share(workers("a", "b"), "b", 5, []) == ([], [3, 4, 0, 1, 2], 3)
    assert fair_share(workers("a", "b"), "a", 4, [0, 1, 2, 3]) == ([2, 3], [], 0)
    assert fair_share([], "a", 2, []) == ([], [0, 1], 2)  # not yet seen itself


def of(bus: Bus, name: str, *, leader: bool = False, ttl_ms: int = 60_000) -> Leases:
    beat(bus, name, "sink-x")
    return Leases("store:1", name, "sink-x", 4, ttl_ms, leader=leader)


def test_a_newcomer_gets_its_share_once_it_is_handed_over(bus: Bus) -> None:
    first = of(bus, "a")
    assert first.tend(bus) == []
    assert first.mine == [0, 1, 2, 3]
    second = of(bus, "b")
    second.tend(bus)
    assert second.mine == []
    spare = first.tend(bus)
    assert (spare, first.mine) == ([2, 3], [0, 1, 2, 3])  # until it says that these are handed over
    first.release(bus, spare)
    second.tend(bus)
    assert (first.mine, second.mine) == ([0, 1], [2, 3])
    leave(bus, "b")
    second.release(bus)
    assert first.tend(bus) == []
    assert first.mine == [0, 1, 2, 3]


def test_a_lease_that_another_took_is_no_longer_ours(bus: Bus) -> None:
    paused = of(bus, "a")
    paused.tend(bus)
    for partition in (1, 2):  # as if its time had passed
        bus.client.hset(bus.keys.lease(partition, "store:1"), "expires_ms", 0)
        assert bus.acquire(partition, "store:1", "b", 60_000)
    beat(bus, "b", "sink-x")
    paused.tend(bus)
    assert paused.mine == [0, 3]


def test_of_leaders_one_has_all_and_the_others_stand_by(bus: Bus) -> None:
    first, second = of(bus, "a", leader=True), of(bus, "b", leader=True)
    first.tend(bus)
    second.tend(bus)
    assert (first.mine, second.mine) == ([0, 1, 2, 3], [])
    first.release(bus)
    second.tend(bus)
    first.tend(bus)
    assert (first.mine, second.mine) == ([], [0, 1, 2, 3])
