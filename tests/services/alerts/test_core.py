"""The alerts' core: rules, folding, the hour's limits, escalation, acknowledgements; same input, same alerts."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from services.alerts.core import HOUR_MS, MAX_ALERTS, AlertCore, Count, Job, Outcome, Result, Seen
from services.alerts.rules import Event, of_event, of_signal
from shared.alerts import DROPPED, PENDING, REFUSED, SENT, SEVERITIES, Alert
from shared.messages import Signal
from shared.settings import AlertRule, AlertSettings

NS = 1_000_000_000
T0 = 1_703_545_200_000  # 2023-12-25T23:00:00Z, ms
CHANNELS = {"ops": "https://a.example/1", "desk": "https://b.example/2", "boss": "https://c.example/3"}


def configured(*rules: AlertRule, **more: Any) -> AlertSettings:
    return AlertSettings(channels=CHANNELS, rules=rules, **more)


def signal(strike: float = 17000.0, grade: str = "HIGH", at_ms: int = T0, **more: Any) -> Signal:
    values: dict[str, Any] = {
        "underlying": "NQ", "time_window_ns": at_ms * 1_000_000, "window_sec": 300, "signal_type": "pressure_spike",
        "direction": "BUY", "score": 0.75, "grade": grade, "expiration_ns": (T0 + 4 * 86_400_000) * 1_000_000,
        "strike": strike, "option_type": "C",
    }  # fmt: skip
    return Signal(**(values | more))


def one(out: Outcome) -> Alert:
    assert len(out.alerts) == 1
    return out.alerts[0]


EMERGENCY = AlertRule("EMERGENCY")

# -- rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grade", "severity"),
    [("MODERATE", None), ("HIGH", "INFO"), ("VERY_HIGH", "WARNING"), ("EXTREME", "CRITICAL")],
)
def test_without_rules_the_grade_says_the_severity(grade: str, severity: str | None) -> None:
    found = of_signal(signal(grade=grade), configured())
    assert (found and found.severity) == severity
    assert found is None or found.channels == ("ops", "desk", "boss")


@pytest.mark.parametrize("status", ["monitor", "rejected", "withdrawn"])
def test_only_emitted_signals_alert(status: str) -> None:
    assert of_signal(signal(grade="EXTREME", status=status), configured(AlertRule("CRITICAL"))) is None


@pytest.mark.parametrize(
    ("event", "severity"),
    [("feed_silent", "CRITICAL"), ("gap", "WARNING"), ("budget", "CRITICAL"), ("backlog", "WARNING"),
     ("dead_letters", "WARNING")],
)  # fmt: skip
def test_without_rules_every_event_alerts(event: str, severity: str) -> None:
    found = of_event(Event(event, "x", T0, "title"), configured())
    assert found is not None
    assert found.severity == severity


def test_the_first_rule_that_matches_counts() -> None:
    s = configured(
        AlertRule("WARNING", ("desk",), grades=("EXTREME",), underlyings=("ES",)),
        AlertRule("CRITICAL", ("boss", "ops"), grades=("EXTREME",)),
        AlertRule("INFO", types=("sweep",)),
        AlertRule("EMERGENCY", events=("gap",)),
    )

    def says(found: Any) -> Any:
        return found and (found.severity, found.channels)

    assert says(of_signal(signal(grade="EXTREME", underlying="ES"), s)) == ("WARNING", ("desk",))
    assert says(of_signal(signal(grade="EXTREME"), s)) == ("CRITICAL", ("boss", "ops"))
    every = ("ops", "desk", "boss")
    assert says(of_signal(signal(grade="MODERATE", types=("pressure_spike", "sweep")), s)) == ("INFO", every)
    assert of_signal(signal(grade="HIGH"), s) is None, "a rule about events only is about no signal"
    assert says(of_event(Event("gap", "x", T0, "t"), s)) == ("EMERGENCY", every)
    assert of_event(Event("backlog", "x", T0, "t"), s) is None


def test_a_rule_without_conditions_matches_everything() -> None:
    s = configured(AlertRule("WARNING"))
    assert of_signal(signal(grade="MODERATE"), s) is not None
    assert of_event(Event("gap", "x", T0, "t"), s) is not None


# -- folding -------------------------------------------------------------------------------------


def test_a_repeat_within_ten_minutes_is_counted_in_the_first() -> None:
    core = AlertCore(configured())
    first = one(core.step(T0, signals=[signal()]))
    for minute in (5, 9):
        out = core.step(T0 + minute * 60_000, signals=[signal(at_ms=T0 + minute * 60_000)])
        assert (out.alerts, out.jobs) == ([], [])
    held = core.alerts[first.id]
    assert (held.count, held.first_ms, held.last_ms) == (3, T0, T0 + 9 * 60_000)
    again = one(core.step(T0 + 600_000, signals=[signal(at_ms=T0 + 600_000)]))
    assert again.id != first.id


def test_other_keys_and_types_are_alerts_of_their_own() -> None:
    core = AlertCore(configured())
    others = [
        signal(), signal(strike=17100.0), signal(direction="SELL"), signal(signal_type="sweep"),
        signal(option_type="P"), signal(underlying="ES"), signal(source="mine"),
    ]  # fmt: skip
    assert len(core.step(T0, signals=others).alerts) == len(others)


def test_a_revision_of_a_window_counts_once() -> None:
    core = AlertCore(configured(fold_seconds=0))
    first = one(core.step(T0, signals=[signal()]))
    assert core.step(T0 + 60_000, signals=[signal(revision=1)]).alerts == []
    assert core.alerts[first.id].count == 1
    assert core.alerts.keys() == {first.id}


def test_the_id_is_of_key_type_and_first_time_only() -> None:
    """Read again after a crash, at another instant, a signal is the same alert."""
    ids = {one(AlertCore(configured()).step(T0 + late, signals=[signal()])).id for late in (0, 61_000, 3_000_000)}
    assert len(ids) == 1
    assert one(AlertCore(configured()).step(T0, signals=[signal(at_ms=T0 + 300_000)])).id not in ids


def test_a_graver_repeat_is_said_again_in_the_same_alert() -> None:
    core = AlertCore(configured())
    first = one(core.step(T0, signals=[signal()]))
    core.step(T0 + 1, results=[Result(Job(first.id, "ops", 0), SENT)])
    out = core.step(T0 + 300_000, signals=[signal(grade="EXTREME", at_ms=T0 + 300_000)])
    assert out.alerts == []
    assert out.jobs == [Job(first.id, name, 1) for name in CHANNELS]
    held = core.alerts[first.id]
    assert (held.severity, held.count) == ("CRITICAL", 2)
    assert [d.state for d in held.deliveries] == [SENT, DROPPED, DROPPED, PENDING, PENDING, PENDING]
    assert core.step(T0 + 400_000, signals=[signal(grade="HIGH", at_ms=T0 + 400_000)]).jobs == []


def test_a_signal_that_is_withdrawn_leaves_a_note() -> None:
    core = AlertCore(configured())
    alert = one(core.step(T0, signals=[signal()]))
    taken_back = signal(status="withdrawn", reason="a late trade", revision=1, direction="SELL", grade="")
    core.step(T0 + 1, signals=[taken_back, taken_back, signal(at_ms=T0 + 300_000, status="withdrawn")])
    assert core.alerts[alert.id].notes == ("the signal of 2023-12-25T23:00:00Z is withdrawn now: a late trade",)


# -- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("severity", "limit"), SEVERITIES.items())
def test_what_is_over_the_limit_is_recorded_and_told_once(severity: str, limit: int) -> None:
    core = AlertCore(configured(AlertRule(severity, ("ops",))))
    out = core.step(T0, signals=[signal(strike=k) for k in range(1, limit + 8)])
    assert len(out.jobs) == limit
    assert [a.suppressed for a in out.alerts] == [False] * limit + [True] * 7
    assert core.step(T0 + HOUR_MS - 1).alerts == []
    summary = one(core.step(T0 + HOUR_MS))
    assert (summary.severity, summary.type, summary.title) == (
        severity, "suppressed", f"7 {severity} alerts were suppressed",
    )  # fmt: skip
    assert "pressure_spike 7" in summary.text
    assert core.step(T0 + HOUR_MS + 1).alerts == []


def test_summaries_are_an_hour_apart() -> None:
    core = AlertCore(configured(AlertRule("EMERGENCY", ("ops",))))
    summaries = []
    for minute in range(600):
        now = T0 + minute * 60_000
        out = core.step(now, signals=[signal(strike=minute, at_ms=now)])
        summaries += [now for a in out.alerts if a.type == "suppressed"]
    assert len(summaries) >= 5
    assert all(b - a >= HOUR_MS for a, b in pairwise(summaries))


Arrival = tuple[int, float, str, str]
arrivals = st.lists(
    st.tuples(
        st.one_of(st.integers(1, 20_000), st.integers(1, 900_000)),
        st.sampled_from([float(k) for k in range(40)]),
        st.sampled_from(["MODERATE", "HIGH", "VERY_HIGH", "EXTREME"]),
        st.sampled_from(["emitted", "emitted", "emitted", "withdrawn"]),
    ),
    min_size=50,
    max_size=150,
)
# Long lists on purpose, a short one reaches no limit; to shrink them would take minutes.
LONG = settings(
    deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.reuse, Phase.generate)
)
BY_GRADE = (
    AlertRule("EMERGENCY", ("boss", "ops"), grades=("EXTREME",)),
    AlertRule("CRITICAL", ("ops",), grades=("VERY_HIGH",)),
    AlertRule("WARNING"),
)


Step = tuple[int, Outcome, dict[str, str]]  # when, what, and the severity then of each alert that is told


def played(
    arrived: list[Arrival], restarts: bool = False, rules: tuple[AlertRule, ...] = BY_GRADE
) -> tuple[list[Step], AlertCore]:
    conf = configured(*rules)
    core, now = AlertCore(conf), T0
    outcomes: list[Step] = []
    kept: dict[str, bytes] = {}
    memory: bytes | None = None
    for pause, strike, grade, status in arrived:
        now += pause
        made = signal(strike=strike, grade=grade, at_ms=now, status=status)
        out = core.step(now, signals=[made])
        outcomes.append((now, out, {job.alert: core.alerts[job.alert].severity for job in out.jobs}))
        changed_memory, changed, gone = core.changes()
        memory = changed_memory or memory
        kept |= changed
        for alert_id in gone:
            del kept[alert_id]
        if restarts:
            core = AlertCore.restore(conf, memory, kept.values())
    return outcomes, AlertCore.restore(conf, memory, kept.values())


@given(arrivals)
@settings(LONG, max_examples=60)
def test_the_limits_hold_in_any_hour_of_any_arrival(arrived: list[Arrival]) -> None:
    # One channel for an EMERGENCY, so that every round of an alert is a new thing said, and no escalation.
    outcomes, core = played(arrived, rules=(msgspec.structs.replace(BY_GRADE[0], channels=("boss",)), *BY_GRADE[1:]))
    said: dict[str, list[int]] = {name: [] for name in SEVERITIES}
    for now, out, severity_of in outcomes:
        for alert_id, _ in sorted({(job.alert, job.round) for job in out.jobs}):
            said[severity_of[alert_id]].append(now)
    for severity, times in said.items():
        for at in times:
            assert sum(at <= t < at + HOUR_MS for t in times) <= SEVERITIES[severity]
    for alert in core.alerts.values():
        places = [(d.channel, d.round) for d in alert.deliveries]
        assert len(places) == len(set(places))
        assert not (alert.suppressed and alert.deliveries)
    emitted = sum(status == "emitted" for *_, status in arrived)
    counted = sum(a.count for a in core.alerts.values() if a.type != "suppressed")
    assert counted == emitted, "folded or not, told or not: each is counted"


@given(arrivals)
@settings(LONG, max_examples=30)
def test_it_is_the_same_with_a_restart_after_every_step(arrived: list[Arrival]) -> None:
    calm, core = played(arrived)
    restarted, again = played(arrived, restarts=True)
    assert restarted == calm
    assert again.alerts == core.alerts


def test_the_oldest_leave_and_those_that_wait_leave_last() -> None:
    core = AlertCore(configured(AlertRule("INFO", ("ops",))))
    waiting = core.step(T0, signals=[signal(strike=k) for k in range(60)]).alerts
    now = T0 + 1
    lost = 0
    for at in range(0, 2000, 100):
        lost += core.step(now, signals=[signal(strike=1000 + at + k) for k in range(100)]).lost
    assert len(core.alerts) == MAX_ALERTS
    assert lost == 0
    assert all(a.id in core.alerts for a in waiting)
    for hour in range(1, 20):
        made = [signal(strike=10_000 + 100 * hour + k) for k in range(60)]
        lost += core.step(now + hour * HOUR_MS, signals=made).lost
    assert len(core.alerts) == MAX_ALERTS
    assert lost == core.memory.unsent > 0
    assert waiting[0].id not in core.alerts
    assert waiting[0].id in core.changes()[2]


# -- escalation and acknowledgement --------------------------------------------------------------


def test_an_unacknowledged_emergency_goes_to_the_next_channel() -> None:
    core = AlertCore(configured(EMERGENCY))
    out = core.step(T0, signals=[signal()])
    alert = one(out)
    assert out.jobs == [Job(alert.id, "ops", 0)]
    assert core.step(T0 + 1_799_999).jobs == []
    assert core.step(T0 + 1_800_000).jobs == [Job(alert.id, "desk", 1)]
    assert core.step(T0 + 3_599_999).jobs == []
    assert core.step(T0 + 3_600_000).jobs == [Job(alert.id, "boss", 2)]
    assert core.step(T0 + 100 * 3_600_000).jobs == [], "there is no further channel"
    assert core.alerts[alert.id].notes == ("escalated to desk", "escalated to boss")


def test_what_escalates_together_does_so_in_one_order_after_a_restart_too() -> None:
    conf = configured(EMERGENCY)
    core = AlertCore(conf)
    core.step(T0, signals=[signal(strike=k) for k in range(1, 7)])
    memory, kept, _ = core.changes()
    again = AlertCore.restore(conf, memory, kept.values())
    assert core.jobs() == again.jobs()
    assert core.step(T0 + 1_800_000).jobs == again.step(T0 + 1_800_000).jobs


def test_it_goes_in_the_order_of_the_rule() -> None:
    core = AlertCore(configured(AlertRule("EMERGENCY", ("boss", "ops"))))
    assert [job.channel for job in core.step(T0, signals=[signal()]).jobs] == ["boss"]
    assert [job.channel for job in core.step(T0 + 1_800_000).jobs] == ["ops"]


def test_an_acknowledgement_ends_escalation_and_delivery() -> None:
    core = AlertCore(configured(EMERGENCY))
    alert = one(core.step(T0, signals=[signal()]))
    core.step(T0 + 1000, acks={alert.id: "ann", "nonsense": "bob"})
    held = core.alerts[alert.id]
    assert (held.acked_by, held.acked_ms) == ("ann", T0 + 1000)
    assert [(d.state, d.reason) for d in held.deliveries] == [(DROPPED, "acknowledged")]
    assert core.jobs() == []
    assert core.step(T0 + 3_600_000, acks={alert.id: "late"}).jobs == []
    assert core.alerts[alert.id].acked_by == "ann"
    core.step(T0 + 3_600_001, results=[Result(Job(alert.id, "ops", 0), SENT)])
    assert core.alerts[alert.id].deliveries[0].state == SENT, "it was under way"


def test_a_refused_emergency_escalates_at_once() -> None:
    core = AlertCore(configured(EMERGENCY))
    alert = one(core.step(T0, signals=[signal()]))
    out = core.step(T0 + 1000, results=[Result(Job(alert.id, "ops", 0), REFUSED, "answered 404")])
    assert out.jobs == [Job(alert.id, "desk", 1)]
    assert core.alerts[alert.id].deliveries[0].reason == "answered 404"


def test_failed_attempts_are_counted_and_go_on() -> None:
    core = AlertCore(configured(AlertRule("INFO", ("ops",))))
    alert = one(core.step(T0, signals=[signal()]))
    job = Job(alert.id, "ops", 0)
    for _ in range(3):
        core.step(T0 + 1, results=[Result(job, PENDING, "answered 503")])
    assert core.jobs() == [job]
    assert (core.alerts[alert.id].deliveries[0].attempts, core.alerts[alert.id].deliveries[0].at_ms) == (3, 0)
    core.step(T0 + 2, results=[Result(job, SENT)])
    assert core.jobs() == []
    core.step(T0 + 3, results=[Result(job, PENDING, "told twice")])
    assert core.alerts[alert.id].deliveries[0].state == SENT


def test_a_channel_that_is_gone_from_the_settings_gets_nothing_more() -> None:
    core = AlertCore(configured(AlertRule("EMERGENCY", ("ops", "desk", "boss"))))
    alert = one(core.step(T0, signals=[signal()]))
    memory, kept, _ = core.changes()
    fewer = AlertSettings(channels={"boss": "https://c.example/3"})
    core = AlertCore.restore(fewer, memory, kept.values())
    assert core.jobs() == []
    assert core.step(T0 + 1_800_000).jobs == [Job(alert.id, "boss", 1)]


# -- operation -----------------------------------------------------------------------------------

SILENT = Event("feed_silent", "databento", T0 - 130_000, "feed databento is silent", "nothing new")


def test_a_condition_alerts_when_it_begins_and_is_noted_when_it_is_over() -> None:
    core = AlertCore(configured())
    alert = one(core.step(T0, seen=Seen((SILENT,))))
    for second in range(1, 2000):
        out = core.step(T0 + second * 1000, seen=Seen((SILENT,)))
        assert out.alerts == []
    assert core.alerts[alert.id].count == 1
    core.step(T0 + 2_000_000, seen=Seen())
    assert core.alerts[alert.id].notes == ("over at 2023-12-25T23:33:20Z",)
    again = Event("feed_silent", "databento", T0 + 3_000_000, "feed databento is silent")
    assert one(core.step(T0 + 3_130_000, seen=Seen((again,)))).id != alert.id


def test_one_that_flaps_is_folded() -> None:
    core = AlertCore(configured())
    alert = one(core.step(T0, seen=Seen((SILENT,))))
    for second in range(1, 100, 2):
        core.step(T0 + second * 1000, seen=Seen())
        assert core.step(T0 + second * 1000 + 1000, seen=Seen((SILENT,))).alerts == []
    assert core.alerts[alert.id].count == 51


def test_counters_alert_when_they_grow_after_the_first_look() -> None:
    core = AlertCore(configured())

    def look(**values: int) -> Seen:
        return Seen(
            counts=tuple(Count(name, "dead_letters", "sink-sqlite", v, "letters") for name, v in values.items())
        )

    assert core.step(T0, seen=look(a=5)).alerts == [], "what was there before is old news"
    assert core.step(T0 + 1, seen=look(a=5)).alerts == []
    alert = one(core.step(T0 + 2, seen=look(a=7, b=1)))
    assert alert.title == "3 more letters"
    assert core.step(T0 + 3, seen=look(b=1)).alerts == []
    assert core.step(T0 + 4, seen=look(a=1, b=1)).alerts == [], "a new process counts from 0, and is folded"
    assert core.alerts[alert.id].count == 2


def test_it_survives_a_restart() -> None:
    core = AlertCore(configured())
    gaps = Count("gap 0", "gap", "candles", 3, "gaps")
    core.step(T0, seen=Seen((SILENT,), (gaps,)))
    memory, kept, _ = core.changes()
    core = AlertCore.restore(configured(), memory, kept.values())
    assert core.step(T0 + 700_000, seen=Seen((SILENT,), (gaps,))).alerts == []
    assert len(core.step(T0 + 700_001, seen=Seen((SILENT,), (gaps._replace(value=4),))).alerts) == 1


def test_a_clock_that_goes_back_stands_still() -> None:
    core = AlertCore(configured())
    one(core.step(T0, signals=[signal()]))
    assert one(core.step(T0 - 5_000_000, signals=[signal(strike=1.0)])).first_ms == T0


def test_nothing_new_is_no_change() -> None:
    core = AlertCore(configured())
    core.step(T0, signals=[signal()], seen=Seen())
    memory, kept, gone = core.changes()
    assert memory
    assert len(kept) == 1
    core.step(T0 + 1, seen=Seen(), signals=[signal(status="rejected", strike=5.0)])
    assert core.changes() == (None, {}, [])
    assert json.loads(next(iter(kept.values())))["title"] == "HIGH pressure_spike: BUY NQ 2023-12-29 C 17000"
    assert gone == []
