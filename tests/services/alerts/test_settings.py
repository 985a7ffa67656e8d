"""Settings of alerts: file and environment, each mistake named, no URL told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from shared.errors import ConfigError
from shared.log import Masker
from shared.settings import AlertRule, AlertSettings, load
from shared.supervise import environment

FILE = """
[alerts]
channels = { ops = "https://hooks.example/T0KEN123", desk = "json://h/x" }
fold_seconds = 60

[[alerts.rules]]
severity = "EMERGENCY"
channels = ["desk", "ops"]
grades = ["EXTREME"]
underlyings = ["NQ"]

[[alerts.rules]]
severity = "INFO"
events = ["gap", "budget"]
"""
RULES = (
    AlertRule("EMERGENCY", ("desk", "ops"), grades=("EXTREME",), underlyings=("NQ",)),
    AlertRule("INFO", events=("gap", "budget")),
)
OPS = {"TAPELINE_ALERTS_CHANNELS": "ops=https://h.example/S3CRET99"}


def test_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text(FILE)
    s = load(str(file), {}).alerts
    assert s.channels == {"ops": "https://hooks.example/T0KEN123", "desk": "json://h/x"}
    assert s.rules == RULES
    assert s.fold_seconds == 60


def test_from_the_environment() -> None:
    s = load(environ=OPS | {
        "TAPELINE_ALERTS_CHANNELS": " ops=https://h/x?a=b&c=d,e, desk = mailto://u:p@h?to=a@x,b@y ,x=json://h",
        "TAPELINE_ALERTS_RULES": msgspec.json.encode(RULES).decode().replace("desk", "x"),
        "TAPELINE_ALERTS_ESCALATE_SECONDS": "60",
    }).alerts  # fmt: skip
    assert s.channels == {"ops": "https://h/x?a=b&c=d,e", "desk": "mailto://u:p@h?to=a@x,b@y", "x": "json://h"}
    assert s.rules == (msgspec.structs.replace(RULES[0], channels=("x", "ops")), RULES[1])
    assert s.escalate_seconds == 60


def test_empty_is_none() -> None:
    assert load(environ={"TAPELINE_ALERTS_CHANNELS": "", "TAPELINE_ALERTS_RULES": ""}).alerts == AlertSettings()


def test_what_up_hands_on_is_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TAPELINE_ALERTS_CHANNELS", "TAPELINE_ALERTS_RULES", "TAPELINE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    channels = {"ops": "https://h/x?a=b,c", "desk": "json://h/x"}
    s = replace(load(environ={}), alerts=AlertSettings(channels=channels, rules=RULES))
    handed = {k: v for k, v in environment(s, None).items() if k.startswith("TAPELINE_ALERTS")}
    assert load(environ=handed).alerts == s.alerts


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"TAPELINE_ALERTS_CHANNELS": "S3CRET99"}, "environment: TAPELINE_ALERTS_CHANNELS wants NAME=URL"),
        ({"TAPELINE_ALERTS_CHANNELS": "ops=S3CRET99"}, "alerts.channels.ops must be a URL"),
        ({"TAPELINE_ALERTS_CHANNELS": "o p=https://h/S3CRET99"}, "alerts.channels must be names"),
        ({"TAPELINE_ALERTS_CHANNELS": "ops=https:///S3CRET99"}, "alerts.channels.ops must be a URL with a host"),
        ({"TAPELINE_ALERTS_CHANNELS": "ops=https://h:port/S3CRET99"}, "alerts.channels.ops must be a URL with a sound"),
        ({"TAPELINE_ALERTS_RULES": "[S3CRET99"}, "TAPELINE_ALERTS_RULES wants a JSON array of rules"),
        ({"TAPELINE_ALERTS_RULES": '[{"severity": "LOUD"}]'}, "alerts.rules[0].severity must be of those there are"),
        ({"TAPELINE_ALERTS_RULES": '[{"channels": []}]'}, "missing required field `severity` - at `$.rules[0]`"),
        ({"TAPELINE_ALERTS_RULES": '[{"severity": "INFO", "grade": []}]'}, "unknown field `grade`"),
        (
            {"TAPELINE_ALERTS_RULES": '[{"severity": "INFO"}, {"severity": "INFO", "channels": ["nope"]}]'},
            "env TAPELINE_ALERTS_RULES: alerts.rules[1].channels must be of those there are (ops), not 'nope'",
        ),
        (
            {"TAPELINE_ALERTS_RULES": '[{"severity": "INFO", "channels": ["https://h/S3CRET99"]}]'},
            "alerts.rules[0].channels must be of those there are (ops), not a URL",
        ),
        ({"TAPELINE_ALERTS_RULES": '[{"severity": "INFO", "grades": ["HUGE"]}]'}, "alerts.rules[0].grades"),
        ({"TAPELINE_ALERTS_RULES": '[{"severity": "INFO", "types": ["mine"]}]'}, "alerts.rules[0].types"),
        ({"TAPELINE_ALERTS_RULES": '[{"severity": "INFO", "events": ["rain"]}]'}, "alerts.rules[0].events"),
        ({"TAPELINE_ALERTS_FOLD_SECONDS": "-1"}, "alerts.fold_seconds must be 0 (never fold) or more"),
        ({"TAPELINE_ALERTS_RETRY_MAX_SECONDS": "0"}, "alerts.retry_max_seconds must be above 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_and_no_url_told(environ: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(environ=OPS | environ)
    assert says in str(caught.value)
    assert "S3CRET99" not in str(caught.value)


def test_a_plugin_may_have_types_of_its_own() -> None:
    rules = {"TAPELINE_ALERTS_RULES": '[{"severity": "INFO", "types": ["mine"]}]', "TAPELINE_SIGNALS_PLUGINS": "mine"}
    assert load(environ=OPS | rules).alerts.rules[0].types == ("mine",)


@pytest.mark.parametrize(
    ("url", "secrets", "fine"),
    [
        ("https://hooks.example/services/T0AAA111/B0BBB222/xyzTOKEN", ("T0AAA111", "B0BBB222", "xyzTOKEN"),
         ("hooks.example", "services")),
        ("https://u:hunter22@h.example/api?token=abcd&x=1", ("hunter22", "abcd"), ("h.example", "api")),
        ("https://only-token-1@h.example/", ("only-token-1",), ("h.example",)),
        ("discord://4174216298/JHMHI8qBe7bk2ZwO5U711o3dV_js", ("4174216298", "JHMHI8qBe7bk2ZwO5U711o3dV_js"), ()),
        ("tgram://123456789:abcdefg_hijklmnop/12315544", ("123456789", "abcdefg_hijklmnop", "12315544"), ()),
        ("https://h.example/p%C3%A4ss-word?key=a%2Fbcd", ("p%C3%A4ss-word", "päss-word", "a/bcd"), ("h.example",)),
        ("json://localhost:8080/quiet", (), ("localhost:8080", "quiet")),
    ],
)  # fmt: skip
def test_the_masker_hides_a_url_and_what_in_it_is_secret(
    url: str, secrets: tuple[str, ...], fine: tuple[str, ...]
) -> None:
    base = load(environ={})
    mask = Masker(replace(base, alerts=AlertSettings(channels={"ops": url})))
    path = "/" + url.split("://")[1].partition("/")[2]
    said = mask(f"to {url}: POST {path} failed at {url.split('://')[1]}")
    for secret in (url, *secrets):
        assert secret not in said
        assert secret not in mask(f"refused {secret} there")
    for word in fine:
        assert word in mask(f"plain {word} here")
