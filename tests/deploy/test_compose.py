"""deploy/compose.yml and what belongs to it: sound by their schemas, and true of the program."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from shared import registry
from shared.cli import cli
from shared.cli_run import STOP_SECONDS
from shared.keys import TOPICS
from shared.settings import ALIASES, SECTIONS, Settings, env_name, load
from shared.supervise import programs

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
YAMLLINT = "{extends: default, rules: {line-length: {max: 120}, document-start: disable}}"
PROFILES = {"live", "crypto", "bigquery", "observability", "alerts"}
FEED_PROFILE = {"synthetic": None, "databento": "live", "tardis": "crypto"}
# Read by Docker, or by images that are not ours.
MADE_BY_USER = {"databento_api_key": "db-secret", "alert_channels": "desk=https://example.com/hook",
                "gcp_credentials": "{}"}  # fmt: skip
COMPOSE_VARIABLES = {"COMPOSE_PROFILES"}


def interpolated(text: str, env: dict[str, str]) -> str:
    """Compose's `${NAME:-default}` and `$$`."""
    text = re.sub(r"(?<!\$)\$\{(\w+):-([^}]*)\}", lambda m: env.get(m[1]) or m[2], text)
    assert not re.search(r"(?<!\$)\$\{", text), "a variable without a default"
    return text.replace("$$", "$")


def variables(name: str = "compose.yml") -> dict[str, str]:
    """Variables that a compose file reads, with their defaults."""
    found: dict[str, str] = {}
    for variable, default in re.findall(r"(?<!\$)\$\{(\w+):-([^}]*)\}", (DEPLOY / name).read_text()):
        assert found.setdefault(variable, default) == default, f"two defaults of {variable}"
    return found


def compose(name: str = "compose.yml", **env: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(interpolated((DEPLOY / name).read_text(), env))
    return loaded


COMPOSE = compose()
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {n: s for n, s in SERVICES.items() if s["image"].startswith("tapeline:")}
WORKERS = {n: s for n, s in OURS.items() if s["command"][0] == "run"}
THEIRS = {n: s for n, s in SERVICES.items() if n not in OURS}


@pytest.fixture
def secrets(tmp_path: Path) -> dict[str, Path]:
    """Where each secret's file is, those that the user makes among them."""
    found = {name: (DEPLOY / entry["file"]).resolve() for name, entry in COMPOSE["secrets"].items()}
    for name, text in MADE_BY_USER.items():
        found[name] = tmp_path / name
        found[name].write_text(text)
    return found


def settings_of(name: str, secrets: dict[str, Path], **more: str) -> Settings:
    """What a service's worker loads: its environment, its secrets where compose puts them."""
    service, env = OURS[name], {v: str(text) for v, text in OURS[name]["environment"].items()}
    for variable, value in env.items():
        if value.startswith("/run/secrets/"):
            secret = value.removeprefix("/run/secrets/")
            assert secret in service["secrets"], f"{name} reads {secret}, which it does not have"
            env[variable] = str(secrets[secret])
    return load(environ={**env, **more})


def lint(*command: str | Path) -> str:
    done = subprocess.run([BIN / command[0], *command[1:]], check=False, capture_output=True, text=True, cwd=ROOT)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.parametrize("name", ["compose.yml", "compose.cluster.yml"])
def test_schema_and_style(name: str) -> None:
    assert not lint("check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / name)
    assert not lint("yamllint", "-s", "-d", YAMLLINT, DEPLOY / name)


def test_dockerfile_style() -> None:
    assert not lint("hadolint", DEPLOY / "Dockerfile")


def test_commands_exist() -> None:
    for name, service in OURS.items():
        command, *args = service["command"]
        assert command in cli.commands, name
        if command == "run":
            assert args[0] in registry.SERVICES, name
            assert args[0] == name, "a service is called as its worker is"
        else:
            context = cli.commands[command].make_context(command, list(args))
            assert not context.args


def test_environment_is_of_the_program(secrets: dict[str, Path]) -> None:
    known = {env_name(f"{s}.{f}") for s, kind in SECTIONS.items() for f in kind.__struct_fields__} | set(ALIASES)
    for name, service in OURS.items():
        for variable in service["environment"]:
            assert variable.removesuffix("_FILE") in known or variable == "GOOGLE_APPLICATION_CREDENTIALS", name
        settings = settings_of(name, secrets)
        assert settings.redis.url == "redis://redis:6379/0"
        assert settings.metrics.host == "0.0.0.0"
        assert service["expose"] == ([str(settings.metrics.port)] if name in WORKERS else [])
        wanted = "sqlite:////data/tapeline.db" if name == "sink-sqlite" else None
        assert settings.tapeline.store == (wanted or secrets["database_url"].read_text())
    assert settings_of("ingest-databento", secrets).databento.api_key == "db-secret"
    assert settings_of("alerts", secrets).alerts.channels == {"desk": "https://example.com/hook"}
    crypto = settings_of("ingest-tardis", secrets).tardis
    assert (crypto.host, str(crypto.port)) == ("tardis-machine", SERVICES["tardis-machine"]["expose"][1])
    exchange = OURS["ingest-tardis"]["command"][2]
    assert any(symbol.startswith(f"{exchange}:") for symbol in crypto.symbols)


def test_the_users_own_redis_and_store_win(secrets: dict[str, Path]) -> None:
    own = {"TAPELINE_REDIS_URL": "rediss://bus.example.com:6380", "TAPELINE_STORE": "postgresql://u@db.example.com/t"}
    for name in OURS.keys() - {"sink-sqlite"}:
        settings = settings_of(name, secrets, **own)
        assert (settings.redis.url, settings.tapeline.store) == tuple(own.values())


def test_database_and_its_password_agree(secrets: dict[str, Path]) -> None:
    env = SERVICES["timescaledb"]["environment"]
    password = secrets["postgres_password"].read_text().strip()
    url = f"postgresql://{env['POSTGRES_USER']}:{password}@timescaledb:5432/{env['POSTGRES_DB']}"
    assert secrets["database_url"].read_text().strip() == url


def test_ports_are_published_on_the_loopback_only() -> None:
    published = {}
    for name, service in SERVICES.items():
        for port in service.get("ports", []):
            host, outside, inside = port.split(":")
            assert host == "127.0.0.1", name
            published[name] = (outside, inside)
    assert published == {"web": ("8000", "8000"), "prometheus": ("9090", "9090"), "grafana": ("3000", "3000")}
    web = OURS["web"]["environment"]
    assert published["web"][1] == web["TAPELINE_WEB_PORT"]
    assert (web["TAPELINE_WEB_HOST"], web["TAPELINE_WEB_TRUSTED_NETWORK"]) == ("0.0.0.0", "true")


def test_every_stage_can_be_scaled() -> None:
    for name, service in SERVICES.items():
        assert "container_name" not in service, name
        assert "hostname" not in service, name
    assert not any("ports" in s for n, s in WORKERS.items() if n != "web")


def test_what_everything_has() -> None:
    for name, service in SERVICES.items():
        assert ":" in service["image"].rpartition("/")[2], f"{name}: no tag"
        assert not service["image"].endswith(":latest"), name
        assert set(service["logging"]["options"]) == {"max-size", "max-file"}, name
        assert {"cpus", "memory"} <= set(service["deploy"]["resources"]["limits"]), name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service.get("privileged", False) is False, name
        assert service["restart"] == ("on-failure" if name == "migrate" else "unless-stopped"), name
        if name != "timescaledb":  # it starts as root, to own its volume
            assert service["cap_drop"] == ["ALL"], name


def test_stop_time_is_above_what_a_worker_takes() -> None:
    for name, service in OURS.items():
        assert float(service["stop_grace_period"].removesuffix("s")) > STOP_SECONDS, name
    for name, service in THEIRS.items():
        assert float(service["stop_grace_period"].removesuffix("s")) >= 10, name


def test_dependencies() -> None:
    profiles = {name: set(service.get("profiles", [])) for name, service in SERVICES.items()}
    for name, service in SERVICES.items():
        for other, entry in service.get("depends_on", {}).items():
            assert profiles[other] <= profiles[name], f"{name} would need {other}, which may be off"
            if entry["condition"] == "service_healthy":
                assert SERVICES[other].get("healthcheck", {}).get("test") or other in OURS
            if entry["condition"] == "service_completed_successfully":
                assert SERVICES[other]["restart"] == "on-failure"
    # Whatever is started brings the image and the schema with it.
    assert all({"redis", "migrate"} <= set(s["depends_on"]) for s in WORKERS.values())
    assert OURS["migrate"]["depends_on"]["timescaledb"]["condition"] == "service_healthy"


def test_volumes_and_mounts_are_there() -> None:
    used = set()
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
                assert volume.endswith(":ro")
            else:
                used.add(source)
    assert used == set(COMPOSE["volumes"])


def test_secrets_are_used_and_explained(secrets: dict[str, Path]) -> None:
    used = {secret for service in SERVICES.values() for secret in service.get("secrets", [])}
    assert used == set(COMPOSE["secrets"])
    assert used == {name for name, path in secrets.items() if path.is_file()}
    rows = re.findall(r"^\| `(\w+)` \| (in the repository|you)", (DEPLOY / "secrets/README.md").read_text(), re.M)
    explained = dict(rows)
    committed = {path.name for path in (DEPLOY / "secrets").iterdir() if path.name in explained}
    assert {name for name, who in rows if who != "you"} <= committed
    assert {Path(entry["file"]).name for entry in COMPOSE["secrets"].values()} <= set(explained)
    ignored = (DEPLOY / "secrets/.gitignore").read_text().split()
    assert ignored[0] == "*"
    kept = {line.removeprefix("!") for line in ignored[1:]}
    assert kept == {"README.md", ".gitignore", *(name for name, who in rows if who != "you")}


def test_profiles_are_the_documented_ones() -> None:
    found = {profile for service in SERVICES.values() for profile in service.get("profiles", [])}
    assert found == PROFILES
    head = (DEPLOY / "compose.yml").read_text().partition("\nname:")[0]
    assert all(profile in head for profile in PROFILES)


def workers_of(profile: str | None) -> set[str]:
    """Workers that run with this profile, or without any."""
    return {n for n, s in WORKERS.items() if set(s.get("profiles", [])) <= {profile}}


def names(settings: Settings) -> set[str]:
    """Programs of `tapeline up`, as services are called."""
    return {p.args[0] for p in programs(settings)}


def test_the_default_profile_is_what_up_runs(secrets: dict[str, Path]) -> None:
    up = names(settings_of("sink-timescale", secrets)) | names(settings_of("sink-sqlite", secrets))
    assert workers_of(None) == up

    ours = configparser.RawConfigParser(strict=False)
    ours.read(DEPLOY / "supervisord.conf")
    commands = [ours[s]["command"].split() for s in ours.sections() if s.startswith("program:")]
    supervised = {line[line.index("run") + 1] for line in commands if "run" in line} - {"redis"}
    # It has the default store alone, and a Redis of its own.
    assert supervised == workers_of(None) - {"sink-timescale"}


def test_the_profiles_are_what_up_runs_with_their_settings(secrets: dict[str, Path]) -> None:
    default = names(settings_of("sink-timescale", secrets))
    changes = {
        "live": ("ingest-databento", {"TAPELINE_FEEDS": "synthetic,databento"}),
        "crypto": ("ingest-tardis", {"TAPELINE_FEEDS": "synthetic,tardis"}),
        "alerts": ("alerts", {}),
        "bigquery": ("sink-bigquery", {"GCP_PROJECT_ID": "p", "BIGQUERY_DATASET": "d"}),
    }
    assert set(changes) == PROFILES - {"observability"}
    for profile, (service, env) in changes.items():
        added = names(settings_of(service, secrets, **env)) - default
        assert added == {service} == workers_of(profile) - workers_of(None)
    # What plays a tape ends with it, and one listens to supervisord.
    assert set(WORKERS) == registry.SERVICES.keys() - registry.TAPES.keys() - {"supervisor-alerts"}


def test_the_synthetic_market_can_be_left_out() -> None:
    assert compose()["services"]["ingest-synthetic"]["scale"] == 1
    assert compose(SYNTHETIC_WORKERS="0")["services"]["ingest-synthetic"]["scale"] == 0


def megabytes(text: str) -> float:
    found = re.fullmatch(r"(\d+)([mg])b?", text)
    assert found, text
    return int(found[1]) * (1024 if found[2] == "g" else 1)


@pytest.mark.parametrize("name", ["compose.yml", "compose.cluster.yml"])
def test_redis_keeps_all_that_streams_may_hold(name: str) -> None:
    for redis in (s for n, s in compose(name)["services"].items() if n.startswith("redis") and n != "redis-cluster"):
        command = redis["command"]
        options = dict(zip(command[1::2], command[2::2], strict=True))
        assert options["--appendonly"] == "yes"
        assert options["--maxmemory-policy"] == "noeviction"
        settings = load(environ={"TAPELINE_REDIS_STREAM_MAX_BYTES": variables()["TAPELINE_REDIS_STREAM_MAX_BYTES"]})
        bound = settings.tapeline.partitions * len(TOPICS) * settings.redis.stream_max_bytes / 2**20
        assert megabytes(options["--maxmemory"]) >= 1.25 * bound
        if "deploy" in redis:
            assert megabytes(redis["deploy"]["resources"]["limits"]["memory"]) >= 1.25 * megabytes(
                options["--maxmemory"]
            )


def dockerfile() -> str:
    return (DEPLOY / "Dockerfile").read_text()


def test_image_is_built_as_the_dockerfile_says() -> None:
    args = dict(re.findall(r'^ARG (\w+)=(?:"([^"]*)"|\S*)$', dockerfile(), re.M))
    plain = dict(re.findall(r"^ARG (\w+)=([^\s\"]+)$", dockerfile(), re.M))
    defaults = {name: value or plain.get(name, "") for name, value in args.items()}
    built = {n: s for n, s in SERVICES.items() if "build" in s}
    for name, service in built.items():
        assert service["build"]["dockerfile"] == "deploy/Dockerfile"
        given = service["build"]["args"]
        assert given.keys() <= defaults.keys(), name
        for arg, value in given.items():
            assert value == defaults[arg] or (name, arg) == ("sink-bigquery", "EXTRAS")
        assert (DEPLOY / service["build"]["context"]).resolve() == ROOT
    project = (ROOT / "pyproject.toml").read_text()
    for extra in {e for s in built.values() for e in s["build"]["args"]["EXTRAS"].split()}:
        assert re.search(rf"^{extra} = \[", project, re.M), extra
    # Each image has one service that builds it: two at once would name it twice, which Docker refuses.
    images = [service["image"] for service in built.values()]
    assert sorted(images) == sorted({service["image"] for service in OURS.values()})
    for name, service in OURS.items():
        assert service["pull_policy"] == ("missing" if name in built else "never")
    uv = re.search(r"^UV_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), re.M)
    assert uv
    assert defaults["UV_VERSION"] == uv[1]


def test_image_checks_health_by_a_real_command() -> None:
    found = re.search(r"^HEALTHCHECK .*CMD (\[.*\])$", dockerfile(), re.M)
    assert found
    program, command, *options = yaml.safe_load(found[1])
    assert program == "tapeline"
    known = {o for p in cli.commands[command].params if isinstance(p, click.Option) for o in p.opts}
    assert set(options) <= known
    assert all("healthcheck" not in s for s in WORKERS.values())
    assert OURS["migrate"]["healthcheck"] == {"disable": True}
    assert re.search(r"^USER 10001:10001$", dockerfile(), re.M)
    assert re.search(r'^ENTRYPOINT \["tini", "--", "tapeline"\]$', dockerfile(), re.M)


def test_the_build_is_sent_what_it_copies_and_no_more() -> None:
    copied = {word for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile(), re.M) for word in line.split()[:-1]}
    lines = [s for s in (ROOT / ".dockerignore").read_text().splitlines() if s and not s.startswith("#")]
    assert lines[0] == "*"
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)


def example() -> dict[str, str]:
    """Variables of .env.example, each commented out behind at least one line that explains it."""
    found: dict[str, str] = {}
    explained = False
    for line in (DEPLOY / ".env.example").read_text().splitlines():
        entry = re.fullmatch(r"#([A-Z_0-9]+)=(.*)", line)
        if entry:
            assert explained, f"{entry[1]} is not explained"
            assert entry[1] not in found, entry[1]
            found[entry[1]] = entry[2]
        else:
            assert not line or line.startswith("# "), f"{line}: every variable is commented out"
            explained = line.startswith("# ") and not line.startswith("# --")
    return found


def test_example_env_has_every_setting_and_nothing_unknown() -> None:
    settings = {env_name(f"{s}.{f}") for s, kind in SECTIONS.items() for f in kind.__struct_fields__}
    read = variables().keys() | variables("compose.cluster.yml").keys() | COMPOSE_VARIABLES
    found = example()
    assert found.keys() == settings | read
    assert all(variable in settings for variable in found if variable.startswith("TAPELINE_"))


def test_example_env_shows_what_holds(secrets: dict[str, Path]) -> None:
    found, read = example(), {**variables(), **variables("compose.cluster.yml")}
    for variable, default in read.items():
        assert found[variable] == default, variable
    mine = {v: text for v, text in found.items() if v.startswith("TAPELINE_")}
    shown, default = load(environ=mine), Settings()
    image = dict(re.findall(r"(TAPELINE_\w+)=(\S+)", dockerfile()))
    fixed = {v: str(s) for service in WORKERS.values() for v, s in service["environment"].items()}
    for section, kind in SECTIONS.items():
        for name in kind.__struct_fields__:
            variable = env_name(f"{section}.{name}")
            value = getattr(getattr(shown, section), name)
            if variable in image:
                assert mine[variable] == image[variable]
            elif variable == "TAPELINE_REDIS_URL":
                assert value == fixed["REDIS_URL"]
            elif variable == "TAPELINE_STORE":
                assert value.partition("@")[2] == secrets["database_url"].read_text().strip().partition("@")[2]
            elif variable in fixed:
                assert mine[variable] == fixed[variable], variable
            else:
                assert value == getattr(getattr(default, section), name), variable


def test_cluster_overlay() -> None:
    overlay = compose("compose.cluster.yml")
    services = overlay["services"]
    nodes = {n: s for n, s in services.items() if n.startswith("redis") and n != "redis-cluster"}
    assert len(nodes) == 3
    assert {n for n, s in services.items() if s.get("environment", {}).get("TAPELINE_REDIS_CLUSTER") == "true"} == set(
        WORKERS
    )
    assert services.keys() == nodes.keys() | WORKERS.keys() | {"redis-cluster"}
    addresses = [s["networks"]["default"]["ipv4_address"] for s in nodes.values()]
    subnet = overlay["networks"]["default"]["ipam"]["config"][0]["subnet"]
    assert all(a.rpartition(".")[0] == subnet.rpartition(".")[0] for a in addresses)
    join = services["redis-cluster"]["command"][-1]
    assert all(f"$NETWORK.{a.rpartition('.')[2]}:6379" in join for a in addresses)
    assert {s["volumes"][0].split(":")[0] for n, s in nodes.items() if n != "redis"} | {"redis"} == set(
        overlay["volumes"]
    )
    assert overlay["volumes"]["redis"] == {"name": f"{COMPOSE['name']}_redis-1"}
    for node in nodes.values():
        assert dict(zip(node["command"][1::2], node["command"][2::2], strict=True))["--cluster-enabled"] == "yes"
    # The same checks that the base gives its Redis.
    assert services["redis-2"]["healthcheck"] == SERVICES["redis"]["healthcheck"]
    assert services["redis-2"]["image"] == SERVICES["redis"]["image"]


def test_prometheus_asks_every_worker() -> None:
    scrape = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    asked = {name for job in scrape for dns in job.get("dns_sd_configs", []) for name in dns["names"]}
    assert asked == set(WORKERS)
