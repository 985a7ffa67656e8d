"""The command line: help everywhere, one line an error, exit codes, JSON that parses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from shared.cli import cli
from shared.registry import SERVICES, TOOLS, resolve

ROOT = Path(__file__).resolve().parents[2]


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in sorted(group.commands.items()):
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = list(commands(cli))


# Of the time in which a pipeline starts, the stages of options take a third. Tapes without options do without.
NO_OPTIONS = {"TAPELINE_PRESSURE_WORKERS": "0"}
OPTIONS = {"TAPELINE_PRESSURE_WORKERS": "1"}


def tapeline(*args: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """A command, ended; `replay` and `backfill` without the stages of options unless OPTIONS is given."""
    fewer = NO_OPTIONS if args[0] in ("replay", "backfill") else {}
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("TAPELINE_", "REDIS_", "DATABASE_", "DATABENTO_", "GCP_", "BIGQUERY_", "GOOGLE_"))
    }
    return subprocess.run(
        [sys.executable, "-P", "-m", "shared.cli", *args],
        cwd=cwd, env=clean | fewer | environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_every_command_is_there() -> None:
    top = {path[0] for path, _ in ALL}
    assert top == {
        "up", "run", "replay", "backfill", "generate", "tail", "watch", "status", "streams", "config",
        "doctor", "warm", "demo", "instruments", "explain", "usage", "alerts", "dead-letters",
        "import", "migrate", "plot", "completion", "health", "top",
    }  # fmt: skip
    assert {"streams list", "streams info", "streams trim", "streams drop-consumer", "config show", "config check"} <= {
        " ".join(path) for path, _ in ALL
    }


@pytest.mark.parametrize(("path", "command"), ALL, ids=[" ".join(path) for path, _ in ALL])
def test_every_command_and_option_has_help(path: tuple[str, ...], command: click.Command) -> None:
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{path}: {parameter.name}"


def test_data_commands_print_json() -> None:
    with_json = {" ".join(path) for path, c in ALL if any(p.name == "as_json" for p in c.params)}
    assert with_json >= {
        "explain", "usage", "instruments", "alerts list", "migrate",
        "status", "tail", "replay", "generate", "doctor", "config show", "config check",
        "streams list", "streams info", "streams trim", "streams drop-consumer",
    }  # fmt: skip


def test_run_names_every_service() -> None:
    text = cli.commands["run"].help or ""
    for service in SERVICES:
        assert f"{service} " in text


@pytest.mark.parametrize("path", sorted({*SERVICES.values(), *TOOLS.values()}))
def test_every_registered_function_is_there(path: str) -> None:
    assert callable(resolve(path))


def test_warm_compiles_what_doctor_wants(tmp_path: Path) -> None:
    done = tapeline("warm", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {line.split(":")[0] for line in done.stdout.splitlines()} == {
        name.removeprefix("warm-") for name in TOOLS if name.startswith("warm-")
    }
    found = {f["check"]: f for f in json.loads(tapeline("doctor", "--json", cwd=tmp_path).stdout)}
    assert found["kernel"]["fine"]


def test_help_is_quick(tmp_path: Path) -> None:
    def once() -> float:
        began = time.monotonic()
        assert tapeline("--help", cwd=tmp_path).returncode == 0
        return time.monotonic() - began

    assert min(once() for _ in range(3)) < 0.5


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy = ("numpy", "numba", "redis", "rich", "databento")
    code = f"import sys, shared.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("nonsense",), 2, "No such command 'nonsense'"),
        (("replay",), 2, "Missing argument 'SOURCE...'"),
        (("replay", "absent.dbn"), 2, "'absent.dbn' does not exist"),
        (("replay", "."), 2, "is a directory"),
        (("replay", "empty", "--speed", "fast"), 2, "neither a positive number nor max"),
        (("replay", "empty", "--store", "oracle://h/db"), 78, "is not a store URL"),
        (("replay", "empty", "--store", "postgresql://u:pw@127.0.0.1:9/db"), 1, "127.0.0.1:9/db does not answer"),
        (("replay", "empty", "--store", "sqlite:///no/such/folder/x.db"), 78, "has no folder"),
        (("replay", "empty", "--store", "sqlite:///text"), 78, "is no SQLite database"),
        (("run", "nope"), 2, "no service 'nope'; there are: redis, ingest-databento"),
        (("status",), 78, "no `tapeline up` runs in"),
        (("tail", "candles"), 78, "no `tapeline up` runs in"),
        (("--config", "absent.toml", "config", "show"), 78, "cannot read the settings file absent.toml"),
        (("generate", "no/folder/x.dbn"), 1, "there is no folder"),
        (("generate", "x.dbn", "--start", "yesterday"), 2, "no ISO time"),
    ],
)
def test_an_error_is_one_line_with_its_exit_code(args: tuple[str, ...], code: int, says: str, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("this is no database, but long enough to be looked at" * 10)
    done = tapeline(*args, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("tapeline: ")
    assert says in lines[0]


def test_a_missing_key_is_said_before_redis_is_waited_for(tmp_path: Path) -> None:
    done = tapeline("run", "ingest-databento", cwd=tmp_path, REDIS_URL="redis://127.0.0.1:1/0")
    assert done.returncode == 78
    assert done.stderr.startswith("tapeline: there is no Databento API key: set DATABENTO_API_KEY")
    assert len(done.stderr.splitlines()) == 1


def test_a_redis_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    done = tapeline("status", cwd=tmp_path, REDIS_URL="redis://u:hush-hush@127.0.0.1:1/0")
    assert done.returncode == 1
    assert done.stderr.startswith("tapeline: Redis at 127.0.0.1:1/0 does not answer")
    assert "hush" not in done.stderr


def test_debug_shows_the_trace_without_secrets(tmp_path: Path) -> None:
    done = tapeline("status", cwd=tmp_path, REDIS_URL="redis://u:hush-hush@127.0.0.1:1/0", TAPELINE_LOG_LEVEL="DEBUG")
    assert "Traceback" in done.stderr
    assert "hush" not in done.stderr


def test_config_show_masks_and_names_the_origin(tmp_path: Path) -> None:
    done = tapeline("config", "show", "--json", cwd=tmp_path, DATABENTO_API_KEY="db-secret", TAPELINE_PARTITIONS="4")
    rows = {r["setting"]: r for r in json.loads(done.stdout)}
    assert rows["databento.api_key"] == {
        "setting": "databento.api_key", "value": "***", "origin": "env DATABENTO_API_KEY",
        "variable": "TAPELINE_DATABENTO_API_KEY",
    }  # fmt: skip
    assert rows["tapeline.partitions"]["value"] == 4
    assert rows["redis.port"]["origin"] == "default"
    plain = tapeline("config", "show", cwd=tmp_path, DATABENTO_API_KEY="db-secret").stdout
    assert "db-secret" not in plain
    assert len(plain.splitlines()) == len(rows)


def test_config_show_of_what_is_changed_tells_no_secret(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("db-of-a-file\n")
    (tmp_path / "tapeline.toml").write_text('[web]\ntoken = "token-of-the-file"\n')
    environ = {
        "DATABENTO_API_KEY_FILE": "key", "TAPELINE_ALERTS_CHANNELS": "desk=https://hooks.example/T0/hook-token-0123",
        "TAPELINE_STORE": "postgresql://bob:geheim@h/db?sslpassword=geheim2", "REDIS_URL": "redis://:leise@h:6379/0",
    }  # fmt: skip
    done = tapeline("config", "show", "--changed", "--json", cwd=tmp_path, **environ)
    rows = {r["setting"]: (r["value"], r["origin"]) for r in json.loads(done.stdout)}
    assert rows == {
        "databento.api_key": ("***", "file key (env DATABENTO_API_KEY_FILE)"),
        "alerts.channels": ({"desk": "***"}, "env TAPELINE_ALERTS_CHANNELS"),
        "tapeline.store": (rows["tapeline.store"][0], "env TAPELINE_STORE"),
        "redis.url": (rows["redis.url"][0], "env REDIS_URL"),
        "web.token": ("***", "file tapeline.toml"),
    }
    plain = tapeline("config", "show", "--changed", cwd=tmp_path, **environ).stdout
    assert len(plain.splitlines()) == len(rows)
    for secret in ("db-of-a-file", "hook-token", "geheim", "leise", "token-of-the-file"):
        assert secret not in done.stdout + plain
    (tmp_path / "tapeline.toml").unlink()
    assert tapeline("config", "show", "--changed", cwd=tmp_path).stdout == "every setting is at its default\n"


def test_config_check(tmp_path: Path) -> None:
    assert json.loads(tapeline("config", "check", "--json", cwd=tmp_path).stdout)["fine"] is True
    done = tapeline("config", "check", cwd=tmp_path, TAPELINE_FEEDS="nyse")
    assert (done.returncode, done.stderr.count("\n")) == (78, 1)
    for variable, said in (
        ("TAPELINE_DATABENTO_HOURS", "'Nope' in databento.hours"),
        ("TAPELINE_AGGREGATE_CALENDARS", "'Nope' in aggregate.calendars (ES)"),
    ):
        value = "ES=Nope" if variable.endswith("CALENDARS") else "Nope"
        done = tapeline("config", "check", cwd=tmp_path, **{variable: value})
        assert done.returncode == 78
        assert said in done.stderr


def test_doctor_says_what_is_wrong_with_the_remedy(tmp_path: Path) -> None:
    done = tapeline("doctor", "--json", cwd=tmp_path, TAPELINE_FEEDS="databento", TAPELINE_REDIS_PORT="0")
    found = {f["check"]: f for f in json.loads(done.stdout)}
    assert set(found) == {
        "settings", "redis server", "redis", "store", "databento live", "disk", "web port", "metrics port", "page",
        "open files", "cpu", "kernel",
    }  # fmt: skip
    assert done.returncode == 1
    assert not found["databento live"]["fine"]
    assert "set DATABENTO_API_KEY" in found["databento live"]["says"]
    assert all(found[name]["fine"] for name in ("settings", "redis server", "redis", "store", "disk"))


def test_version(tmp_path: Path) -> None:
    assert tapeline("--version", cwd=tmp_path).stdout.startswith("tapeline ")
