"""Commands that run things: `up`, `run`, `warm`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import click

from shared import registry
from shared.cli_common import busy, completes
from shared.errors import EX_CONFIG, TapelineError, Unavailable
from shared.settings import Settings

if TYPE_CHECKING:
    from shared.cli import App

EX_TEMPFAIL = 75
STOP_SECONDS = 5.0
# supervisord takes an end within its `startsecs` for a failed start, whatever the exit code says.
SETTLED_SECONDS = 1.2


@click.command()
@click.pass_obj
def up(app: App) -> None:
    """Run everything on this machine until Ctrl-C: Redis, the feeds, aggregation, the store's sink, the page.

    Uses REDIS_URL when it is set, else starts an embedded Redis. Logs and data are in the state
    directory (TAPELINE_STATE_DIR). The page is at http://127.0.0.1:8000, unless TAPELINE_WEB_PORT says otherwise.
    """
    from shared import supervise
    from shared.stores import parse

    parse(app.settings.tapeline.store)
    chosen = supervise.programs(app.settings)
    at = supervise.layout(app.settings)
    lock = supervise.claim(at)
    try:
        settings, about = supervise.prepare(app.settings, chosen)
    except BaseException:
        at.pid.unlink(missing_ok=True)
        raise
    os.set_inheritable(lock, True)
    click.echo(about)
    for program in chosen:
        for worker in program.workers():
            click.echo(f"{worker}: log {at.log_of(worker)}")
    if app.settings.web.port:
        click.echo(f"the page: {supervise.page_url(app.settings.web)}")
    click.echo("Ctrl-C stops everything; `tapeline status` and `tapeline tail candles` look in from another terminal")
    sys.stdout.flush()
    line = supervise.daemon(at)
    os.execve(line[0], line, supervise.environment(settings, app.config))  # noqa: S606


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("service", metavar="SERVICE", shell_complete=completes("redis", *registry.SERVICES))
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def run(app: App, service: str, args: tuple[str, ...]) -> None:
    """Run one worker in the foreground: SERVICE is one of the services below, ARGS are its own.

    \b
    redis                 the embedded Redis
    ingest-databento      the Databento live feed
    ingest-tardis         one crypto EXCHANGE, live through tardis-machine
    ingest-synthetic      the seeded market that needs no key
    ingest-files          DBN files given as ARGS
    ingest-tardis-files   recorded normalized NDJSON files
    ingest-tardis-csv     the vendor's CSV files, or tardis:// to download them
    ingest-tardis-replay  tardis:// history through tardis-machine
    aggregate             rolling and fixed candles
    pressure              option pressure
    signals               what is worth a look in it, and plug-ins
    alerts                sends what matters to the channels of [alerts]
    supervisor-alerts     the same of workers that supervisord gives up: its event listener
    sink-sqlite           the SQLite store
    sink-timescale        the PostgreSQL or TimescaleDB store; several share it
    sink-bigquery         the BigQuery store; one writes, others stand by
    web                   the page and its API

    SIGTERM and SIGINT stop it within 5 seconds; a second one at once.
    """
    from shared import log

    if service != "redis" and service not in registry.SERVICES:
        raise click.UsageError(f"no service '{service}'; there are: redis, {', '.join(registry.SERVICES)}")
    started = time.monotonic()
    supervised = _join_supervisor()
    try:
        log.setup(app.settings, service, os.environ.get("SUPERVISOR_PROCESS_NAME", "") if supervised else "")
        if service == "redis":
            run_redis(app.settings)
        _run_service(app.settings, service, args)
    except Unavailable as error:
        click.echo(f"tapeline: {log.Masker(app.settings)(str(error))}", err=True)
        _pause(supervised)
        sys.exit(EX_TEMPFAIL if supervised else 1)  # our own supervisor starts 75 again
    except TapelineError as error:
        if supervised and error.exit_code in (1, EX_CONFIG):
            _settle(started)
        raise
    except Exception:
        _pause(supervised)  # a fault of the program; `main` tells it
        raise
    if supervised:
        _settle(started)


def _join_supervisor() -> bool:
    """Under supervisord: end with it, however it ends. Returns whether one is there."""
    if "SUPERVISOR_ENABLED" not in os.environ:
        return False
    from shared.redis_server import die_with_parent

    die_with_parent(signal.SIGTERM)
    parent = os.environ.get("TAPELINE_SUPERVISOR_PID")
    if parent and os.getppid() != int(parent):
        sys.exit(1)
    return True


def _settle(started: float) -> None:
    time.sleep(max(0.0, SETTLED_SECONDS - (time.monotonic() - started)))


def _pause(supervised: bool) -> None:
    """Before being started again: what fails at once must not become a busy loop."""
    if supervised:
        time.sleep(1.0)


def run_redis(settings: Settings) -> NoReturn:
    """Become the embedded Redis of the settings' state directory."""
    from shared import supervise
    from shared.redis_server import EmbeddedRedis, exec_redis

    at = supervise.layout(settings)
    server = EmbeddedRedis(at.redis, settings.redis.port, fsync=settings.redis.fsync)
    config = server.write()
    at.url.write_text(server.url + "\n")
    exec_redis(config)


def _run_service(settings: Settings, name: str, args: tuple[str, ...]) -> None:
    from shared import metrics
    from shared.cli import version
    from shared.supervise import find_bus

    function = registry.service(name)
    settings = find_bus(settings)
    stop = threading.Event()

    def asked(signum: int, _: FrameType | None) -> None:
        if stop.is_set():
            os._exit(128 + signum)
        stop.set()
        threading.Thread(target=_give_up, args=(name,), daemon=True).start()

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, asked)
    try:
        metrics.serve(settings, name, version())
        function(settings, stop, args)
    except TapelineError:
        raise
    except Exception:
        # A fault of the program: its trace belongs into the log; the one line for the user is written above us.
        logging.getLogger(__name__).exception("%s failed", name)
        raise


def _give_up(name: str) -> None:
    time.sleep(STOP_SECONDS)
    # What it was doing is not committed, and will be done again by whoever comes next.
    click.echo(f"tapeline: {name} did not stop within {STOP_SECONDS:g} s and was ended", err=True)
    os._exit(1)


@click.command()
def warm() -> None:
    """Compile the kernels into their cache, so that the first start is a fast one."""
    for name, path in registry.TOOLS.items():
        if name.startswith("warm-"):
            began = time.monotonic()
            with busy(False, f"compiling {name.removeprefix('warm-')}"):
                registry.resolve(path)()
            click.echo(f"{name.removeprefix('warm-')}: {time.monotonic() - began:.1f} s")


COMMANDS = [up, run, warm]
