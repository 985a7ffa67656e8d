"""Commands about the installation: `config`, `doctor`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import click

from shared.cli_common import echo_json, json_option, looking
from shared.errors import ConfigError, TapelineError
from shared.settings import SECRETS, SECTIONS, Settings, env_name

if TYPE_CHECKING:
    from shared.cli import App

LOW_DISK_BYTES = 2 << 30


@click.group()
def config() -> None:
    """The settings: show, check."""


@config.command()
@json_option
@click.pass_obj
def show(app: App, as_json: bool) -> None:
    """Every setting, its value, where it came from and its environment variable. Secrets are masked."""
    rows = _rows(app.settings)
    if as_json:
        echo_json(rows)
        return
    wide = max(len(r["setting"]) for r in rows)
    for r in rows:
        click.echo(f"{r['setting']:<{wide}}  {_text(r['value'])}  ({r['origin']}; {r['variable']})")


def _rows(settings: Settings) -> list[dict[str, Any]]:
    from shared.log import MASK, Masker

    mask = Masker(settings)
    rows = []
    for section, kind in SECTIONS.items():
        for name in kind.__struct_fields__:
            setting = f"{section}.{name}"
            value = getattr(getattr(settings, section), name)
            if setting in SECRETS:
                value = dict.fromkeys(value, MASK) if isinstance(value, dict) else MASK if value else ""
            elif isinstance(value, str):
                value = mask(value)
            origin = settings.origin.get(setting, "default")
            rows.append({"setting": setting, "value": value, "origin": origin, "variable": env_name(setting)})
    return rows


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items()) or "-"
    if isinstance(value, tuple):
        return ",".join(item if isinstance(item, str) else _json(item) for item in value) or "-"
    return str(value) if value != "" else "-"


def _json(value: Any) -> str:
    import msgspec

    return msgspec.json.encode(value).decode()


@config.command()
@json_option
@click.pass_obj
def check(app: App, as_json: bool) -> None:
    """Whether the settings can work together; says the first thing that is wrong (exit 78)."""
    from shared.stores import parse
    from shared.supervise import programs

    _calendars(app.settings)
    chosen = [worker for program in programs(app.settings) for worker in program.workers()]
    parse(app.settings.tapeline.store)
    if as_json:
        echo_json({"fine": True, "workers": chosen})
        return
    click.echo(f"the settings are fine; `tapeline up` would run {', '.join(chosen)}")


@dataclass(frozen=True)
class Finding:
    """One line of `doctor`."""

    check: str
    fine: bool
    says: str


@click.command()
@click.option("--bigquery", is_flag=True, help="Prove on the BigQuery project itself that no row is lost or doubled.")
@json_option
@click.pass_context
def doctor(context: click.Context, bigquery: bool, as_json: bool) -> None:
    """Check what Tapeline needs, one line each with the remedy; exit 1 when anything fails."""
    app: App = context.obj
    findings = [_find("settings", lambda: _settings(app))]
    if findings[0].fine and bigquery:
        findings = list(_prove(app.settings))
    elif findings[0].fine:
        s = app.settings
        checks: list[tuple[str, Callable[[], str]]] = [
            ("redis server", lambda: _redis_found(s)),
            ("redis", lambda: _redis(s)),
            ("store", lambda: _store(s)),
            *([("bigquery", lambda: _bigquery(s))] if _beside(s) else []),
            ("disk", lambda: _disk(s)),
            ("kernel", _kernel),
            ("key", lambda: _key(s)),
        ]
        findings += [_find(name, look) for name, look in checks]
    if as_json:
        echo_json([asdict(f) for f in findings])
    else:
        for f in findings:
            click.echo(f"{'ok  ' if f.fine else 'FAIL'}  {f.check}: {f.says}")
    if not all(f.fine for f in findings):
        context.exit(1)


def _store(settings: Settings) -> str:
    from shared.stores import parse
    from shared.stores_check import check_store

    store = settings.tapeline.store
    return _bigquery(settings) if parse(store).scheme == "bigquery" else check_store(store)


def _beside(settings: Settings) -> bool:
    """Whether BigQuery is written beside another store."""
    from shared.supervise import sink_programs

    return len(sink_programs(settings)) > 1


def _bigquery(settings: Settings) -> str:
    from shared.registry import TOOLS, resolve

    return str(resolve(TOOLS["check-bigquery"])(settings))


def _prove(settings: Settings) -> Iterator[Finding]:
    """What trying it on the real project shows, up to the first error that ends it."""
    from shared.log import Masker
    from shared.registry import TOOLS, resolve

    try:
        proofs = cast("Iterable[tuple[str, bool, str]]", resolve(TOOLS["prove-bigquery"])(settings))
        for check, fine, says in proofs:
            yield Finding(check, fine, says)
    except TapelineError as error:
        yield Finding("bigquery", False, Masker()(str(error)))


def _find(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, look())
    except TapelineError as error:
        from shared.log import Masker

        return Finding(name, False, Masker()(str(error)))


def _settings(app: App) -> str:
    from shared.supervise import programs

    programs(app.settings)
    _calendars(app.settings)
    files = sorted({o.removeprefix("file ") for o in app.settings.origin.values() if o.startswith("file ")})
    variables = sum(o.startswith("env ") for o in app.settings.origin.values())
    return f"read from {files[0] if files else 'defaults'} and {variables} variables"


def _calendars(settings: Settings) -> None:
    """Raises ConfigError for a market calendar that does not exist."""
    named = {
        "databento.hours": settings.databento.hours,
        "tardis.hours": settings.tardis.hours,
        **{f"aggregate.calendars ({root})": name for root, name in settings.aggregate.calendars.items()},
    }
    for setting, name in named.items():
        if name:
            from shared.calendar import sessions

            try:
                sessions(name)
            except ConfigError:
                raise ConfigError(
                    f"unknown market calendar '{name}' in {setting}; pandas_market_calendars lists the names"
                ) from None


def _redis_found(settings: Settings) -> str:
    from shared.redis_server import find_redis

    return "not needed, REDIS_URL is set" if settings.redis.url else find_redis()[1]


def _redis(settings: Settings) -> str:
    from shared.redis_server import port_is_free
    from shared.supervise import layout

    if not settings.redis.url and not layout(settings).url.exists():
        port = settings.redis.port
        if port and not port_is_free(port):
            raise ConfigError(f"port {port} is taken, and `tapeline up` would want it: set TAPELINE_REDIS_PORT")
        return "embedded, not running; `tapeline up` starts it"
    with looking(settings) as (bus, _):
        server = bus.call("info", "server") if not bus.cluster else {}
        version = str(server.get("redis_version", "cluster"))
        if version[0].isdigit() and tuple(map(int, version.split(".")[:2])) < (6, 2):
            raise ConfigError(f"Redis at {bus.where} is {version}: 6.2 or newer is needed")
        if bus.cluster:
            return f"cluster at {bus.where} answers"
        persistence = bus.call("info", "persistence")
        policy = str(bus.call("info", "memory").get("maxmemory_policy", "noeviction"))
        if not persistence.get("aof_enabled"):
            raise ConfigError(
                f"Redis at {bus.where} has no append-only file, so a crash loses the bus: CONFIG SET appendonly yes"
            )
        if policy != "noeviction":
            raise ConfigError(f"Redis at {bus.where} may evict keys ({policy}): CONFIG SET maxmemory-policy noeviction")
        return f"{version} at {bus.where} answers, append-only, noeviction"


def _disk(settings: Settings) -> str:
    from shared.supervise import layout

    folder = layout(settings).state
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder} is not writable: set TAPELINE_STATE_DIR to a folder that is")
    if free < LOW_DISK_BYTES:
        raise ConfigError(
            f"only {free >> 20} MiB free at {folder}: make room, or set TAPELINE_STATE_DIR to another disk"
        )
    return f"{free >> 30} GiB free at {folder}"


def _kernel() -> str:
    """The compiled kernels are in their cache."""
    from shared.compiled import SOURCES, cache_folder

    folder = cache_folder()
    hot = [name for name in SOURCES if name.endswith((".kernel", ".normalize"))]
    cold = [name for name in hot if not any(folder.rglob(f"{name.rpartition('.')[2]}.*.nbi"))]
    if cold:
        raise ConfigError(f"not compiled yet ({', '.join(cold)}): run `tapeline warm`, or the first start takes longer")
    return "compiled"


def _key(settings: Settings) -> str:
    if "databento" not in settings.tapeline.feeds:
        return "not needed, the databento feed is not chosen"
    if not settings.databento.api_key:
        raise ConfigError("the databento feed is chosen but DATABENTO_API_KEY is not set")
    return "DATABENTO_API_KEY is set"


COMMANDS = [config, doctor]
