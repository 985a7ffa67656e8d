"""`tapeline health`: whether the workers go on, for people and for a container's health check."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING, NoReturn

import click

from shared.cli_common import echo_json, json_option
from shared.errors import Unavailable

if TYPE_CHECKING:
    from shared.cli import App
    from shared.health import Verdict
    from shared.settings import Settings

# A Redis that takes the connection and then says nothing: a health check must end before its own time limit.
ANSWER_SECONDS = 4.0


@click.command()
@click.option("--here", is_flag=True, help="Only what runs on this host (in this container).")
@click.option("--service", metavar="SERVICE", help="Only this service, such as aggregate or ingest-tardis.")
@json_option
@click.pass_context
def health(context: click.Context, *, here: bool, service: str | None, as_json: bool) -> None:
    """Whether workers live and go on, feeds speak in their market's hours, and every partition is worked on.

    Exit code 0 when all is well, else 1 with a line for each thing that is not: a worker that has not been seen for
    redis.lease_seconds or has not gone on for health.stalled_seconds, a silent feed, partitions without a worker.
    """
    app: App = context.obj
    try:
        found = _asked(app.settings, here=here)
    except Unavailable as error:
        _answer(context, [str(error)], [], as_json)
    if here:
        found = [v for v in found if v.host == socket.gethostname()]
    if service is not None:
        from shared.health import of_service

        found = [v for v in found if of_service(v, service)]
    wrong = [v.line for v in found if not v.healthy]
    if not any(v.kind == "worker" for v in found):
        wrong.append(f"no worker{f' of {service}' if service else ''}{' of this host' if here else ''} has reported")
    _answer(context, wrong, found, as_json)


def _answer(context: click.Context, wrong: list[str], found: list[Verdict], as_json: bool) -> NoReturn:
    if as_json:
        echo_json({"healthy": not wrong, "wrong": wrong, "checks": found})
    else:
        click.echo("\n".join(wrong) or _summary(found))
    context.exit(1 if wrong else 0)


def _summary(found: list[Verdict]) -> str:
    counts = ((sum(v.kind == kind for v in found), kind) for kind in ("worker", "feed"))
    return "healthy: " + ", ".join(f"{n} {kind}{'' if n == 1 else 's'}" for n, kind in counts if n)


def _asked(settings: Settings, *, here: bool) -> list[Verdict]:
    """The verdicts, or the error of asking; within ANSWER_SECONDS, however long the server takes."""
    found: list[Verdict] = []
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            found.extend(look(settings, leases=not here))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if thread.is_alive():
        raise Unavailable(f"Redis has not answered for {ANSWER_SECONDS:g} s; see `tapeline doctor`")
    if failures:
        raise failures[0]
    return found


def look(settings: Settings, *, leases: bool = True) -> list[Verdict]:
    """Verdicts on the deployment of the settings. Raises ConfigError, BusUnavailable."""
    from shared.cli_common import looking
    from shared.feeds import states
    from shared.health import verdicts
    from shared.status import Reader

    with looking(settings) as (bus, partitions):
        status = Reader(bus, partitions, settings.redis.lease_seconds).brief(leases=leases)
        return verdicts(status, states(bus), settings)


COMMANDS = [health]
