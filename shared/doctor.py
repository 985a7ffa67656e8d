"""What `tapeline doctor` asks: independent checks that run at once, each one line with its remedy. Nothing is changed.

A check returns its line, or a Caution where something is worth a look but works; it raises TapelineError with the
remedy. One that does not come back within its patience has failed: a dead network may not hold the others up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

from shared.errors import ConfigError, TapelineError, Unavailable
from shared.registry import TOOLS
from shared.settings import Settings, is_loopback

PATIENCE_SECONDS = 8.0
# The first answer of BigQuery's client takes a look for credentials, too.
BIGQUERY_SECONDS = 30.0
# Reading code takes its time on a busy machine, and cannot hang.
LOCAL_SECONDS = 60.0
REACH = "look whether it is up, and whether a firewall stands between"
OK, WARN, FAIL, SKIP = "ok", "warn", "FAIL", "skip"


class Caution(str):
    """What a check says when it holds, but somebody should look."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `doctor`. `state`: ok, warn, FAIL or skip."""

    check: str
    state: str
    says: str

    @property
    def fine(self) -> bool:
        """Whether nothing has to be mended."""
        return self.state != FAIL

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"check": self.check, "fine": self.fine, "state": self.state, "says": self.says}


@dataclass(frozen=True, slots=True)
class Check:
    """`leaves`: it asks another machine. `silence`: what to do when nothing comes back."""

    name: str
    look: Callable[[], str]
    leaves: bool = False
    patience: float | None = None
    silence: str = REACH


def examine(checks: Iterable[Check], mask: Callable[[str], str], *, offline: bool = False) -> Iterator[Finding]:
    """The findings in the order of the checks, each as soon as it is there; the same trouble is told once."""
    began, told = time.monotonic(), dict[str, str]()
    asked = [(check, None if offline and check.leaves else _aside(check.look)) for check in checks]
    for check, answer in asked:
        if answer is None:
            yield Finding(check.name, SKIP, "not asked (--offline)")
            continue
        finding = _finding(check, answer, began, mask)
        if not finding.fine and told.setdefault(finding.says, check.name) != check.name:
            finding = Finding(check.name, SKIP, f"not known: see {told[finding.says]}")
        yield finding


def _aside(look: Callable[[], str]) -> Future[str]:
    """`look` in a thread that no exit waits for."""
    future: Future[str] = Future()

    def run() -> None:
        try:
            future.set_result(look())
        except BaseException as error:  # raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name="doctor", daemon=True).start()
    return future


def _finding(check: Check, answer: Future[str], began: float, mask: Callable[[str], str]) -> Finding:
    patience = PATIENCE_SECONDS if check.patience is None else check.patience
    try:
        says = answer.result(max(0.0, began + patience - time.monotonic()))
    except TapelineError as error:
        return Finding(check.name, FAIL, mask(_line(error)))
    except Exception as error:
        if not answer.done():
            return Finding(check.name, FAIL, mask(f"no answer within {patience:g} s: {check.silence}"))
        # A fault of the check itself; the others are not to go down with it.
        what = f"{type(error).__name__}: {_line(error)}"
        return Finding(check.name, FAIL, mask(f"unexpected {what}; TAPELINE_LOG_LEVEL=DEBUG tapeline status may tell"))
    return Finding(check.name, WARN if isinstance(says, Caution) else OK, mask(says))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


@contextmanager
def reaching(setting: str) -> Iterator[None]:
    """A server that does not answer, with what to do about it."""
    try:
        yield
    except Unavailable as error:
        remedy = f": {REACH} ({setting})" if "does not answer" in str(error) else ""
        raise type(error)(f"{error}{remedy}") from None


# -- which ----------------------------------------------------------------------------------


def checks_of(settings: Settings) -> list[Check]:
    """All checks that these settings give reason for. Raises ConfigError for a store that is none."""
    from shared import doctor_bus as bus  # noqa: PLC0415 - what only this command needs
    from shared import doctor_machine as machine  # noqa: PLC0415
    from shared.stores import parse  # noqa: PLC0415

    s, store = settings, parse(settings.tapeline.store)
    away = _is_away(s.redis.url)
    store_away = store.scheme == "bigquery" or (store.scheme == "postgresql" and _is_away(s.tapeline.store))
    bigquery = store.scheme == "bigquery" or bool(s.bigquery.project and s.bigquery.dataset)
    google = bigquery and not (s.bigquery.endpoint and not _is_away(s.bigquery.endpoint))
    idle = bus.is_idle(s)
    found = [Check("redis", lambda: bus.redis(s), away)]
    if not s.redis.url:
        found.insert(0, Check("redis server", bus.server, patience=LOCAL_SECONDS))
    if not idle:
        found += [Check("redis memory", lambda: bus.memory(s), away), Check("workers", lambda: bus.workers(s), away)]
    if store.scheme == "bigquery":
        found.append(Check("store", lambda: _bigquery(s), google, BIGQUERY_SECONDS))
    else:
        found.append(Check("store", lambda: _store(s), store_away))
        if store.scheme == "postgresql":
            found.append(Check("store features", lambda: _features(s), store_away))
        if bigquery:
            found.append(Check("bigquery", lambda: _bigquery(s), google, BIGQUERY_SECONDS))
    found += [*machine.clocks(s, store, idle=idle, away=away, store_away=store_away), *_feeds(s)]
    return [*found, *machine.checks(s, store)]


def _is_away(url: str) -> bool:
    """Whether whoever a URL names is reached over the network."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return True
    return bool(host) and not is_loopback(host)


def _store(settings: Settings) -> str:
    from shared.stores_check import check_store  # noqa: PLC0415

    with reaching("TAPELINE_STORE"):
        return check_store(settings.tapeline.store)


def _features(settings: Settings) -> str:
    """What of the server's features is on, or will be."""
    from shared.migrate import migrate  # noqa: PLC0415

    with reaching("TAPELINE_STORE"):
        return "; ".join(migrate(settings, plan=True).notes)


def _bigquery(settings: Settings) -> str:
    from shared import registry  # noqa: PLC0415

    return cast("str", registry.resolve(TOOLS["check-bigquery"])(settings))


def _feeds(s: Settings) -> list[Check]:
    """The vendors' keys and servers; what asking them costs is nothing."""
    chosen, found = set(s.tapeline.feeds), list[Check]()
    if "databento" in chosen:
        away = not (s.databento.gateway and is_loopback(s.databento.gateway))
        found.append(_vendor("databento live", "check-databento-live", s, away))
    # Behind a gateway of one's own, the vendor's archive is nothing that the feed needs.
    if s.databento.api_key and (s.databento.history_gateway or not s.databento.gateway):
        away = not s.databento.history_gateway or _is_away(s.databento.history_gateway)
        found.append(_vendor("databento archive", "check-databento-archive", s, away))
    if "tardis" in chosen:
        found.append(_vendor("tardis-machine", "check-tardis-machine", s, not is_loopback(s.tardis.host)))
    if s.tardis.api_key:
        found.append(_vendor("tardis key", "check-tardis-key", s, away=True))
    feeds = ", ".join(s.tapeline.feeds) or "none"
    return found or [Check("keys", lambda: f"none needed, the feeds are: {feeds}")]


def _vendor(name: str, tool: str, settings: Settings, away: bool) -> Check:
    """Its code is read here, not while its patience runs."""
    from shared import registry  # noqa: PLC0415

    look = registry.resolve(TOOLS[tool])
    return Check(name, lambda: cast("str", look(settings)), away)


# -- settings -------------------------------------------------------------------------------


def settings_line(settings: Settings) -> str:
    """Whether the settings can work together, and where they come from. Raises ConfigError."""
    from shared.supervise import programs  # noqa: PLC0415

    programs(settings)
    check_calendars(settings)
    origins = settings.origin.values()
    secrets = sum(" (env " in o for o in origins)
    files = sorted({o.removeprefix("file ") for o in origins if o.startswith("file ") and " (env " not in o})
    variables = sum(o.startswith("env ") for o in origins)
    told = f"read from {files[0] if files else 'defaults'} and {variables} variable{'s' * (variables != 1)}"
    return f"{told}, and {secrets} file{'s' * (secrets != 1)} that variables name" if secrets else told


def check_calendars(settings: Settings) -> None:
    """Raises ConfigError for a market calendar that does not exist."""
    named = {
        "databento.hours": settings.databento.hours,
        "tardis.hours": settings.tardis.hours,
        **{f"aggregate.calendars ({root})": name for root, name in settings.aggregate.calendars.items()},
    }
    for setting, name in named.items():
        if name:
            from shared.calendar import sessions  # noqa: PLC0415

            try:
                sessions(name)
            except ConfigError:
                raise ConfigError(
                    f"unknown market calendar '{name}' in {setting}; pandas_market_calendars lists the names"
                ) from None
