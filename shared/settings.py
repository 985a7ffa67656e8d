"""Settings: one TOML file and environment variables; an unknown key is an error.

Order, later wins: defaults here, the TOML file (`--config`, `TAPELINE_CONFIG`, `./tapeline.toml`),
the environment. Every setting `section.name` has the environment variable `TAPELINE_SECTION_NAME`
(section `tapeline` has none: `TAPELINE_NAME`); some have the older names of `ALIASES` too. With `_FILE` behind it, a
variable names a file that holds the value, as container secrets do.
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from shared.alerts import fault, split_channels
from shared.errors import ConfigError
from shared.timeframes import seconds_of


class Tapeline(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What holds for the whole deployment. `log_levels`: of modules that log otherwise (services.ingest=DEBUG)."""

    partitions: int = 8
    namespace: str = "md"
    state_dir: str = "./.tapeline"
    store: str = "sqlite:///tapeline.db"
    log_level: str = "INFO"
    log_levels: dict[str, str] = msgspec.field(default_factory=dict)
    log_format: str = "auto"
    feeds: tuple[str, ...] = ("synthetic",)


class RedisSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The bus. Empty `url`: an embedded server is started; `fsync` is that server's appendfsync."""

    url: str = ""
    cluster: bool = False
    port: int = 6390
    fsync: str = "everysec"
    stream_max_bytes: int = 64 << 20
    window_seconds: int = 900
    lease_seconds: float = 5.0


class Databento(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The Databento live feed. `gateway` and `port` are for tests and proxies.

    `option_roots`: which root's options those of another root are (weeklies), by pattern. `hours`: the calendar in
    whose sessions to be connected; empty is always.
    """

    api_key: str = ""
    dataset: str = "GLBX.MDP3"
    symbols: tuple[str, ...] = ("ES.FUT",)
    stype: str = "parent"
    gateway: str = ""
    port: int = 13000
    heartbeat_seconds: int = 5
    silence_seconds: float = 15.0
    resume_margin_seconds: float = 2.0
    replay_hours: float = 24.0
    backoff_max_seconds: float = 30.0
    start: str = ""
    history_max_usd: float = 0.0
    history_gateway: str = ""
    option_roots: dict[str, str] = msgspec.field(
        default_factory=lambda: {"E[1-5][A-E]": "ES", "EW*": "ES", "Q[1-5][A-E]": "NQ", "QN*": "NQ"}
    )
    hours: str = ""


class Synthetic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The seeded market that needs no key."""

    seed: int = 1
    roots: tuple[str, ...] = ("ES", "NQ", "CL")
    trades_per_second: float = 50.0
    speed: float = 1.0


class Tardis(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Crypto through the vendor's tardis-machine server at `host`:`port`, `symbols` as exchange:symbol."""

    api_key: str = ""
    host: str = "127.0.0.1"
    port: int = 8001
    symbols: tuple[str, ...] = ("binance-futures:BTCUSDT",)
    data_types: tuple[str, ...] = (
        "trade", "quote", "book_snapshot_5_1s", "derivative_ticker", "liquidation", "option_summary",
    )  # fmt: skip
    grace_ms: int = 500
    silence_seconds: float = 30.0
    backoff_max_seconds: float = 30.0
    datasets_url: str = "https://datasets.tardis.dev"
    download_dir: str = ""
    hours: str = ""


class Ingest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How ticks are packed into frames."""

    linger_ms: float = 5.0
    frame_records: int = 1000


class Aggregate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rolling and fixed candles. `empty_bars`: `skip` them, or `carry` the close on inside market hours."""

    workers: int = 1
    timeframes: tuple[str, ...] = ("15s", "1m", "5m", "15m", "1h", "4h", "1d")
    empty_bars: str = "skip"
    candles_1s: bool = True
    max_lateness_seconds: int = 120
    quiet_reset_seconds: int = 300
    big_trade: dict[str, float] = msgspec.field(default_factory=lambda: {"NG": 50.0})
    big_trade_default: float = 25.0
    calendars: dict[str, str] = msgspec.field(default_factory=dict)


class PressureSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Option pressure. `workers` 0: none. `block_size`: root -> contracts that make a block (deribit:BTC=25).

    `definition_wait_seconds`: how long (event time) a trade of an option waits for its definition. `rate`: the
    interest rate a year that implied volatility discounts with.
    """

    workers: int = 1
    window_seconds: int = 300
    definition_wait_seconds: int = 60
    block_size: dict[str, float] = msgspec.field(default_factory=lambda: {"deribit:BTC": 25.0, "deribit:ETH": 250.0})
    block_size_default: float = 100.0
    greeks: bool = True
    rate: float = 0.0


class SignalSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Signals of option pressure. `workers` 0: none. `plugins`: entry points of `tapeline.signals` to load.

    `sessions`: how far back a baseline goes; `min_samples`: fewer are none. `cluster_width`: strikes to either side.
    """

    workers: int = 1
    sessions: int = 20
    min_samples: int = 20
    cluster_width: int = 3
    emit_from: float = 0.6
    plugins: tuple[str, ...] = ()


class AlertRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which signals and events become an alert, of which severity, on which channels; empty matches all.

    `events` are operational: feed_silent, gap, budget, backlog, dead_letters, worker. The first match counts.
    """

    severity: str
    channels: tuple[str, ...] = ()
    grades: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    underlyings: tuple[str, ...] = ()
    events: tuple[str, ...] = ()


class AlertSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Alerts: channels by name (an http(s):// webhook, or any URL that apprise takes), rules in order.

    No channel: no alerts worker. Without rules every signal from HIGH on and every event alerts all channels.
    """

    channels: dict[str, str] = msgspec.field(default_factory=dict)
    rules: tuple[AlertRule, ...] = ()
    fold_seconds: int = 600
    escalate_seconds: int = 1800
    silent_seconds: float = 120.0
    backlog_seconds: float = 60.0
    retry_max_seconds: float = 60.0


class UsageSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the paid feeds cost a UTC day, and where they are stopped: at `stop_at` of `daily_usd` (0: no budget)."""

    usd_per_mib: float = 0.01
    usd_per_hour: float = 1.0
    daily_usd: float = 25.0
    stop_at: float = 0.8
    priced_feeds: tuple[str, ...] = ("databento",)


class Sink(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Batches close by rows or age, whichever is first. `modes`: `candles`, `ticks` (the raw records), or both.

    `ohlc_bars`: keep the table of that name in step with `candles` (SQLite; elsewhere it is a view).
    """

    modes: tuple[str, ...] = ("candles",)
    ohlc_bars: bool = True
    batch_rows: int = 5000
    batch_ms: int = 250


class Timescale(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The PostgreSQL store: `workers` sinks share its partitions. Days and `rollups` are for TimescaleDB, 0: never.

    `compress_after_days` lies beyond any correction; `retention_days` are kept of candles, pressure and signals,
    `ticks_retention_days` of the raw records. `reader_role` may read every table and view; empty: none is made.
    """

    workers: int = 1
    chunk_days: int = 1
    compress_after_days: int = 7
    retention_days: int = 0
    ticks_retention_days: int = 30
    rollups: bool = True
    reader_role: str = "tapeline_reader"


class BigQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The BigQuery store. `method`: load (Parquet load jobs, free), storage_write (Storage Write API) or insert_all.

    `project` and `dataset`: written beside another store; a bigquery:// store names its own. Batches close by
    `batch_rows` or `batch_ms`.
    `endpoint`: a local server instead of Google's (HTTP; `grpc_endpoint` its gRPC side).
    """

    project: str = ""
    dataset: str = ""
    location: str = "US"
    method: str = "load"
    batch_rows: int = 50_000
    batch_ms: int = 60_000
    ticks_expire_days: int = 30
    endpoint: str = ""
    grpc_endpoint: str = ""


class Web(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The page and its API. `port` 0: `up` serves none. Beyond the loopback it wants a `token`, or a `trusted_network`:
    whoever reaches it may read it (a container whose port is published on the loopback).

    `hosts`: names beside `host` under which it may be asked for (of a proxy before it). `cors_origins`: pages of others
    that may read the API. A client may ask `requests_per_second`, all together hold `connections` live ones. `max_rows`
    of one JSON answer, `max_export_rows` of one CSV or Parquet file.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str = ""
    trusted_network: bool = False
    hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    requests_per_second: float = 50.0
    connections: int = 500
    max_rows: int = 10_000
    max_export_rows: int = 1_000_000


class Metrics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Each worker serves its metrics from the first free port from `port` on; 0: none does."""

    host: str = "127.0.0.1"
    port: int = 9464


class Health(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A worker that has not gone on for `stalled_seconds` is unhealthy; a heartbeat ages as a lease does."""

    stalled_seconds: float = 30.0


@dataclass(frozen=True)
class Settings:
    """All sections, and where each value came from (`origin["redis.url"] = "env REDIS_URL"`)."""

    tapeline: Tapeline = Tapeline()
    redis: RedisSettings = RedisSettings()
    databento: Databento = Databento()
    tardis: Tardis = Tardis()
    synthetic: Synthetic = Synthetic()
    ingest: Ingest = Ingest()
    aggregate: Aggregate = Aggregate()
    pressure: PressureSettings = PressureSettings()
    signals: SignalSettings = SignalSettings()
    alerts: AlertSettings = AlertSettings()
    usage: UsageSettings = UsageSettings()
    sink: Sink = Sink()
    timescale: Timescale = Timescale()
    bigquery: BigQuery = BigQuery()
    web: Web = Web()
    metrics: Metrics = Metrics()
    health: Health = Health()
    origin: dict[str, str] = field(default_factory=dict)


SECTIONS: dict[str, type[msgspec.Struct]] = {
    name: kind for name, kind in get_type_hints(Settings).items() if name != "origin"
}
ALIASES = {
    "REDIS_URL": "redis.url",
    "DATABASE_URL": "tapeline.store",
    "DATABENTO_API_KEY": "databento.api_key",
    "DATABENTO_DATASET": "databento.dataset",
    "DATABENTO_SYMBOLS": "databento.symbols",
    "DATABENTO_STYPE": "databento.stype",
    "TARDIS_API_KEY": "tardis.api_key",
    "GCP_PROJECT_ID": "bigquery.project",
    "BIGQUERY_DATASET": "bigquery.dataset",
    "BIGQUERY_BATCH_SIZE": "bigquery.batch_rows",
    "BIGQUERY_BATCH_TIMEOUT": "bigquery.batch_ms",
    "TAPELINE_TIMEFRAMES": "aggregate.timeframes",
}
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
BIGQUERY_METHODS = ("load", "storage_write", "insert_all")
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}")
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{8,}")  # what may stand in a header and in a cookie as it is
_HOST_NAME = re.compile(r"[^\s/:@]+|[0-9a-fA-F:.]+")
_ORIGIN = re.compile(r"https?://(?:[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?")
STYPES = ("parent", "raw_symbol", "continuous")
SECRETS = frozenset({"databento.api_key", "tardis.api_key", "alerts.channels", "web.token"})
# Read by other parts of the program, not settings.
NOT_SETTINGS = frozenset({"TAPELINE_CONFIG", "TAPELINE_SUPERVISOR_PID"})


def env_name(setting: str) -> str:
    """`redis.url` -> `TAPELINE_REDIS_URL`, `tapeline.store` -> `TAPELINE_STORE`."""
    section, name = setting.split(".")
    return f"TAPELINE_{name}".upper() if section == "tapeline" else f"TAPELINE_{section}_{name}".upper()


def load(config: str | None = None, environ: dict[str, str] | None = None) -> Settings:
    """Settings from file and environment.

    Raises ConfigError naming the file or variable, the key and what is wrong with it.
    """
    env = dict(os.environ) if environ is None else environ
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    origin: dict[str, str] = {}
    path = config or env.get("TAPELINE_CONFIG") or ("tapeline.toml" if Path("tapeline.toml").is_file() else None)
    if path:
        for section, table in _read(path).items():
            if section not in SECTIONS or not isinstance(table, dict):
                raise ConfigError(f"{path}: unknown section [{section}]; known: {', '.join(SECTIONS)}")
            for name, value in table.items():
                _known(f"{section}.{name}", f"{path}: [{section}] {name}")
                values[section][name] = value
                origin[f"{section}.{name}"] = f"file {path}"
    by_env = {env_name(f"{s}.{f}"): f"{s}.{f}" for s, kind in SECTIONS.items() for f in kind.__struct_fields__}
    env, from_file = _with_files(env, {*ALIASES, *by_env})
    for variable, text in sorted(env.items(), key=lambda item: item[0].startswith("TAPELINE_")):
        setting = ALIASES.get(variable) or by_env.get(variable)
        if setting is None:
            if (
                variable.startswith("TAPELINE_")
                and not variable.startswith("TAPELINE_TEST_")
                and variable not in NOT_SETTINGS
            ):
                raise ConfigError(f"environment: unknown setting {variable}; `tapeline config show` lists all")
            continue
        section, name = setting.split(".")
        values[section][name] = _from_text(SECTIONS[section], name, text, variable)
        origin[setting] = from_file.get(variable, f"env {variable}")
    built: dict[str, Any] = {}
    for section, kind in SECTIONS.items():
        try:
            built[section] = msgspec.convert(values[section], kind, strict=False)
        except msgspec.ValidationError as error:
            where = next(
                (origin[f"{section}.{n}"] for n in values[section] if f"`$.{n}" in str(error)), path or "environment"
            )
            raise ConfigError(f"{where}: [{section}] {error}") from None
    settings = Settings(**built, origin=origin)
    _check(settings)
    return settings


def _with_files(env: dict[str, str], variables: set[str]) -> tuple[dict[str, str], dict[str, str]]:
    """(environment with what `NAME_FILE` variables point to as NAME, where each of those came from).

    So that a secret can come as a file. Raises ConfigError.
    """
    found, origin = dict(env), dict[str, str]()
    for name in variables:
        path = env.get(f"{name}_FILE", "")
        if not path:
            found.pop(f"{name}_FILE", None)
            continue
        if name in env:
            raise ConfigError(f"environment: {name} and {name}_FILE are both set; keep one of them")
        try:
            found[name] = Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no text"
            raise ConfigError(f"env {name}_FILE: cannot read {path}: {why}") from None
        del found[f"{name}_FILE"]
        origin[name] = f"file {path} (env {name}_FILE)"
    return found, origin


def _read(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the settings file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def _known(setting: str, where: str) -> None:
    section, name = setting.split(".", 1)
    if name not in SECTIONS[section].__struct_fields__:
        raise ConfigError(
            f"{where}: unknown setting; known in [{section}]: {', '.join(SECTIONS[section].__struct_fields__)}"
        )


def _from_text(kind: type[msgspec.Struct], name: str, text: str, variable: str) -> Any:
    hint = str(get_type_hints(kind)[name])
    if "AlertRule" in hint:
        try:
            return msgspec.json.decode(text or "[]", type=list[dict[str, Any]])
        except msgspec.DecodeError as error:
            raise ConfigError(f"environment: {variable} wants a JSON array of rules ({error})") from None
    if kind is AlertSettings and hint.startswith("dict"):
        channels = split_channels(text)
        if channels is None:
            raise ConfigError(f"environment: {variable} wants NAME=URL,NAME=URL")
        return channels
    if hint.startswith("tuple"):
        return [part.strip() for part in text.split(",") if part.strip()]
    if hint.startswith("dict"):
        pairs = [part.split("=", 1) for part in text.split(",") if part.strip()]
        if any(len(pair) != 2 for pair in pairs):
            raise ConfigError(f"environment: {variable} wants NAME=VALUE,NAME=VALUE")
        return {key.strip(): value.strip() for key, value in pairs}
    if hint == str(bool):
        if text.strip().lower() not in ("0", "1", "true", "false", "yes", "no", "on", "off"):
            raise ConfigError(f"environment: {variable} wants true or false, not '{text}'")
        return text.strip().lower() in ("1", "true", "yes", "on")
    return text


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _web_rules(web: Web) -> list[tuple[bool, str, str]]:
    return [
        (bool(web.host.strip()), "web.host", "an address of this machine (127.0.0.1; 0.0.0.0 is all of them)"),
        (0 <= web.port <= 65535, "web.port", "between 0 (no page) and 65535"),
        (not web.token or _TOKEN.fullmatch(web.token) is not None, "web.token",
         "at least 8 letters, digits or -._~+/="),
        (bool(web.token) or web.trusted_network or is_loopback(web.host), "web.token",
         f"set (TAPELINE_WEB_TOKEN), since web.host {web.host} can be reached from other machines"),
        (all(map(_ORIGIN.fullmatch, web.cors_origins)), "web.cors_origins",
         "a list of scheme://host[:port], such as https://desk.example.com"),
        (all(map(_HOST_NAME.fullmatch, web.hosts)), "web.hosts", "a list of host names without scheme and port"),
        (web.requests_per_second > 0, "web.requests_per_second", "above 0"),
        (web.connections >= 1, "web.connections", "at least 1"),
        (web.max_rows >= 1, "web.max_rows", "at least 1"),
        (web.max_export_rows >= 1, "web.max_export_rows", "at least 1"),
    ]  # fmt: skip


def _check(s: Settings) -> None:
    rules = [
        (1 <= s.tapeline.partitions <= 1024, "tapeline.partitions", "between 1 and 1024"),
        (s.tapeline.log_level in LOG_LEVELS, "tapeline.log_level", "DEBUG, INFO, WARNING or ERROR"),
        (s.tapeline.log_format in ("auto", "json", "plain"), "tapeline.log_format", "auto, json or plain"),
        (s.redis.stream_max_bytes >= 1 << 20, "redis.stream_max_bytes", "at least 1048576"),
        (s.redis.fsync in ("always", "everysec", "no"), "redis.fsync", "always, everysec or no"),
        (s.redis.lease_seconds >= 1, "redis.lease_seconds", "at least 1"),
        (s.databento.stype in STYPES, "databento.stype", "parent, raw_symbol or continuous"),
        (s.databento.history_max_usd >= 0, "databento.history_max_usd", "0 (never fetch) or more"),
        (1 <= s.ingest.frame_records <= 100_000, "ingest.frame_records", "between 1 and 100000"),
        (s.ingest.frame_records * 400 <= s.redis.stream_max_bytes, "ingest.frame_records",
         "so small that a stream holds four frames (redis.stream_max_bytes / 400)"),
        (0 <= s.ingest.linger_ms <= 1000, "ingest.linger_ms", "between 0 and 1000"),
        (1 <= s.aggregate.workers <= 64, "aggregate.workers", "between 1 and 64"),
        (0 <= s.aggregate.max_lateness_seconds <= 3600, "aggregate.max_lateness_seconds", "between 0 and 3600"),
        (bool(s.aggregate.timeframes) and all(map(seconds_of, s.aggregate.timeframes)), "aggregate.timeframes",
         "a list of Ns, Nm, Nh, Nd (each up to 30d) or 1w, such as 15s,1m,1h"),
        (s.aggregate.empty_bars in ("skip", "carry"), "aggregate.empty_bars", "skip or carry"),
        (1 <= s.tardis.port <= 65535, "tardis.port", "between 1 and 65535"),
        (0 <= s.tardis.grace_ms <= 60_000, "tardis.grace_ms", "between 0 and 60000"),
        (s.tardis.silence_seconds >= 1, "tardis.silence_seconds", "at least 1"),
        (bool(s.sink.modes) and set(s.sink.modes) <= {"candles", "ticks"}, "sink.modes", "candles, ticks or both"),
        (0 <= s.pressure.workers <= 64, "pressure.workers", "between 0 and 64"),
        (s.pressure.window_seconds > 0 and 86400 % s.pressure.window_seconds == 0, "pressure.window_seconds",
         "a divisor of a day (60, 300, 900)"),
        (s.pressure.window_seconds >= s.aggregate.max_lateness_seconds, "pressure.window_seconds",
         "at least aggregate.max_lateness_seconds, so that a window is final before the next one ends"),
        (1 <= s.pressure.definition_wait_seconds <= 3600, "pressure.definition_wait_seconds", "between 1 and 3600"),
        (0 <= s.signals.workers <= 64, "signals.workers", "between 0 and 64"),
        (1 <= s.signals.sessions <= 250, "signals.sessions", "between 1 and 250"),
        (s.signals.min_samples >= 3, "signals.min_samples", "at least 3"),
        (s.signals.cluster_width >= 1, "signals.cluster_width", "at least 1"),
        (0 < s.signals.emit_from <= 1, "signals.emit_from", "above 0, at most 1"),
        (min(s.usage.usd_per_mib, s.usage.usd_per_hour) >= 0, "usage.usd_per_mib", "0 or more, as usd_per_hour"),
        (s.usage.daily_usd >= 0, "usage.daily_usd", "0 (no budget) or more"),
        (0 < s.usage.stop_at <= 1, "usage.stop_at", "above 0, at most 1"),
        (s.aggregate.quiet_reset_seconds >= 60, "aggregate.quiet_reset_seconds", "at least 60"),
        (s.sink.batch_rows >= 1, "sink.batch_rows", "at least 1"),
        (s.sink.batch_ms >= 1, "sink.batch_ms", "at least 1"),
        (1 <= s.timescale.workers <= 64, "timescale.workers", "between 1 and 64"),
        (s.timescale.chunk_days >= 1, "timescale.chunk_days", "at least 1"),
        (min(s.timescale.compress_after_days, s.timescale.retention_days, s.timescale.ticks_retention_days) >= 0,
         "timescale.compress_after_days", "0 (off) or more, as the retention days"),
        (not s.timescale.reader_role or _ROLE.fullmatch(s.timescale.reader_role) is not None, "timescale.reader_role",
         "letters, digits and _, beginning with a letter"),
        (s.bigquery.method in BIGQUERY_METHODS, "bigquery.method", "load, storage_write or insert_all"),
        (s.bigquery.batch_rows >= 1, "bigquery.batch_rows", "at least 1"),
        (s.bigquery.batch_ms >= 1, "bigquery.batch_ms", "at least 1"),
        (s.bigquery.ticks_expire_days >= 0, "bigquery.ticks_expire_days", "0 (never) or more"),
        (bool(s.metrics.host.strip()), "metrics.host", "an address of this machine (0.0.0.0: all of them)"),
        (0 <= s.metrics.port <= 65535, "metrics.port", "between 0 (no metrics) and 65535"),
        (s.health.stalled_seconds >= 5, "health.stalled_seconds", "at least 5"),
        (set(s.tapeline.log_levels.values()) <= set(LOG_LEVELS), "tapeline.log_levels",
         "MODULE=LEVEL, the levels DEBUG, INFO, WARNING or ERROR"),
        *_web_rules(s.web),
    ]  # fmt: skip
    for fine, setting, want in rules:
        if not fine:
            raise ConfigError(f"{s.origin.get(setting, 'default')}: {setting} must be {want}")
    wrong = fault(s.alerts, bool(s.signals.plugins))
    if wrong:
        where = next((o for name, o in s.origin.items() if wrong[0].startswith(name)), "default")
        raise ConfigError(f"{where}: {wrong[0]} must be {wrong[1]}")
