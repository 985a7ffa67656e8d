"""Settings: file and environment, each value with its origin; nothing unknown passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import ConfigError
from shared.log import Masker
from shared.settings import ALIASES, NOT_SETTINGS, SECRETS, SECTIONS, Settings, env_name, load


def test_defaults_need_nothing() -> None:
    s = load(environ={})
    assert s == Settings(origin={})
    assert s.tapeline.store == "sqlite:///tapeline.db"


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text('[aggregate]\nworkers = 3\n[tapeline]\nfeeds = ["databento"]\n')
    s = load(str(file), {"TAPELINE_AGGREGATE_WORKERS": "4"})
    assert s.aggregate.workers == 4
    assert s.tapeline.feeds == ("databento",)
    assert s.origin["aggregate.workers"] == "env TAPELINE_AGGREGATE_WORKERS"
    assert s.origin["tapeline.feeds"] == f"file {file}"


def test_every_setting_has_its_own_variable() -> None:
    names = [env_name(f"{section}.{name}") for section, kind in SECTIONS.items() for name in kind.__struct_fields__]
    assert len(names) == len(set(names))
    assert not set(names) & NOT_SETTINGS


@pytest.mark.parametrize(("alias", "setting"), sorted(ALIASES.items()))
def test_older_names_work_and_yield_to_the_new_ones(alias: str, setting: str) -> None:
    section, name = setting.split(".")
    fits = {"databento.stype": ("parent", "raw_symbol"), "aggregate.timeframes": ("15s", "1m"),
            "bigquery.batch_rows": ("10", "20"), "bigquery.batch_ms": ("10", "20")}  # fmt: skip
    fit = fits.get(setting, ("one", "two"))
    s = load(environ={alias: fit[0]})
    assert fit[0] in str(getattr(getattr(s, section), name))
    s = load(environ={alias: fit[0], env_name(setting): fit[1]})
    assert fit[1] in str(getattr(getattr(s, section), name))


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"TAPELINE_NO_SUCH": "1"}, "unknown setting TAPELINE_NO_SUCH"),
        ({"TAPELINE_PARTITIONS": "many"}, "env TAPELINE_PARTITIONS"),
        ({"TAPELINE_PARTITIONS": "0"}, "tapeline.partitions must be between 1 and 1024"),
        ({"TAPELINE_LOG_LEVEL": "LOUD"}, "tapeline.log_level must be DEBUG, INFO, WARNING or ERROR"),
        ({"TAPELINE_REDIS_CLUSTER": "perhaps"}, "wants true or false"),
        ({"TAPELINE_AGGREGATE_BIG_TRADE": "NG"}, "wants NAME=VALUE"),
        ({"TAPELINE_CONFIG": "/does/not/exist.toml"}, "cannot read the settings file"),
    ],
)
def test_what_is_wrong_is_named(environ: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(environ=environ)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


LOCKED = {"TAPELINE_WEB_TOKEN": "long-enough"}


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"TAPELINE_WEB_PORT": "65536"}, "env TAPELINE_WEB_PORT: web.port must be between 0 (no page) and 65535"),
        ({"TAPELINE_WEB_PORT": "-1"}, "web.port must be"),
        ({"TAPELINE_WEB_HOST": " "}, "web.host must be an address"),
        ({"TAPELINE_WEB_TOKEN": "short"}, "env TAPELINE_WEB_TOKEN: web.token must be at least 8 letters"),
        ({"TAPELINE_WEB_TOKEN": "with a space in it"}, "web.token must be at least 8 letters"),
        ({"TAPELINE_WEB_TOKEN": "semicolon;semicolon"}, "web.token must be at least 8 letters"),
        ({"TAPELINE_WEB_HOST": "0.0.0.0"}, "web.token must be set (TAPELINE_WEB_TOKEN), since web.host 0.0.0.0"),
        ({"TAPELINE_WEB_HOST": "desk.example.com"}, "web.token must be set"),
        ({"TAPELINE_WEB_CORS_ORIGINS": "desk.example.com"}, "web.cors_origins must be a list of scheme://host"),
        ({"TAPELINE_WEB_CORS_ORIGINS": "https://a.example,https://b.example/"}, "web.cors_origins must be"),
        ({"TAPELINE_WEB_CORS_ORIGINS": "*"}, "web.cors_origins must be"),
        ({"TAPELINE_WEB_HOSTS": "https://desk.example.com"}, "web.hosts must be a list of host names"),
        ({"TAPELINE_WEB_HOSTS": "desk.example.com:80"}, "web.hosts must be"),
        ({"TAPELINE_WEB_REQUESTS_PER_SECOND": "0"}, "web.requests_per_second must be above 0"),
        ({"TAPELINE_WEB_CONNECTIONS": "0"}, "web.connections must be at least 1"),
        ({"TAPELINE_WEB_MAX_ROWS": "0"}, "web.max_rows must be at least 1"),
        ({"TAPELINE_WEB_MAX_EXPORT_ROWS": "0"}, "web.max_export_rows must be at least 1"),
    ],
)
def test_what_is_wrong_with_the_page_is_named(environ: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(environ=environ)
    assert says in str(caught.value)
    assert environ.get("TAPELINE_WEB_TOKEN", "\n") not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "environ",
    [
        *({"TAPELINE_WEB_HOST": host} for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost")),
        {**LOCKED, "TAPELINE_WEB_HOST": "0.0.0.0"},
        {**LOCKED, "TAPELINE_WEB_HOST": "::", "TAPELINE_WEB_HOSTS": "desk.example.com,fd00::7,192.168.1.7"},
        {"TAPELINE_WEB_CORS_ORIGINS": "https://desk.example.com,http://localhost:3000,http://[::1]:3000"},
        {"TAPELINE_WEB_PORT": "0"},
    ],
)
def test_a_page_may_be_served_so(environ: dict[str, str]) -> None:
    assert load(environ=environ).web.connections == 500


@pytest.mark.parametrize(
    "text", ["[nowhere]\nx = 1\n", "[tapeline]\nnothing = 1\n", "not toml", "[tapeline]\npartitions = 'x'\n"]
)
def test_a_faulty_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "faulty.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"faulty\.toml"):
        load(str(file), {})


def test_secrets_are_settings() -> None:
    for secret in SECRETS:
        section, name = secret.split(".")
        assert name in SECTIONS[section].__struct_fields__


def test_no_secret_in_an_error_about_settings() -> None:
    with pytest.raises(ConfigError) as caught:
        load(environ={"DATABENTO_API_KEY": "db-very-secret", "TAPELINE_PARTITIONS": "0"})
    assert "db-very-secret" not in str(caught.value)


def test_masker_hides_keys_and_passwords() -> None:
    s = load(environ={"DATABENTO_API_KEY": "db-very-secret", "REDIS_URL": "redis://:p%40ss-word@host:6379/0"})
    mask = Masker(s)
    said = mask("key db-very-secret at redis://:p%40ss-word@host:6379/0 with p@ss-word, postgresql://u:other@h/db")
    assert "secret" not in said
    assert "ss-word" not in said
    assert "other" not in said
    assert "host:6379" in said
