"""Commands about alerts: `alerts list`, `alerts ack`, `alerts test`."""

from __future__ import annotations

import getpass
from typing import TYPE_CHECKING

import click

from shared.cli_common import echo_json, json_option, looking

if TYPE_CHECKING:
    from shared.alerts import Alert
    from shared.cli import App


@click.group()
def alerts() -> None:
    """The alerts: list, ack, test."""


@alerts.command("list")
@click.option("--all", "everything", is_flag=True, help="Also those that are acknowledged.")
@json_option
@click.pass_obj
def list_alerts(app: App, everything: bool, as_json: bool) -> None:
    """Alerts that nobody has acknowledged, the newest last, each with what became of its deliveries.

    The newest 1,000 alerts are kept.
    """
    from shared.acks import alerts_of

    with looking(app.settings) as (bus, _):
        found = [a for a in alerts_of(bus) if everything or not a.acked_by]
    if as_json:
        echo_json(found)
        return
    if not found:
        click.echo("no alerts" if everything else "no open alerts; --all shows those that are acknowledged, too")
    for alert in found:
        for line in _lines(alert):
            click.echo(line)


def _lines(alert: Alert) -> list[str]:
    from shared.frames import iso

    times = f" x{alert.count}" if alert.count > 1 else ""
    out = [f"{alert.id}  {iso(alert.first_ms * 1_000_000)[:19]}Z  {alert.severity:<9}  {alert.title}{times}"]
    out += [f"    {text}" for text in (alert.text, *alert.notes) if text]
    if alert.suppressed:
        out.append("    suppressed: over the hour's limit")
    for d in alert.deliveries:
        why = f": {d.reason}" if d.reason else ""
        out.append(f"    to {d.channel}: {d.state} after {d.attempts} attempt{'s' * (d.attempts != 1)}{why}")
    if alert.acked_by:
        out.append(f"    acknowledged by {alert.acked_by}")
    return out


@alerts.command()
@click.argument("alert_id", metavar="ID")
@click.option("--by", metavar="NAME", help="Who acknowledges (default: the user of this machine).")
@click.pass_obj
def ack(app: App, alert_id: str, by: str | None) -> None:
    """Acknowledge an alert: it is not escalated, nor delivered to any channel that has not got it yet.

    ID may be shortened to its first characters.
    """
    from shared.acks import ack_alert, find_alert

    who = (by or _user()).strip()
    if not who:
        raise click.UsageError("--by wants a name")
    with looking(app.settings) as (bus, _):
        alert = find_alert(bus, alert_id)
        if alert.acked_by:
            click.echo(f"{alert.id} was acknowledged by {alert.acked_by} before")
            return
        ack_alert(bus, alert, who)
    click.echo(f"{alert.id} acknowledged by {who}")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


@alerts.command()
@click.argument("channel")
@click.pass_obj
def test(app: App, channel: str) -> None:
    """Send a test message to a channel of the settings, and say whether it took it. Needs no Redis."""
    from shared import registry
    from shared.errors import ConfigError

    channels = app.settings.alerts.channels
    if not channels:
        raise ConfigError("no alert channel is configured: set alerts.channels, or TAPELINE_ALERTS_CHANNELS=NAME=URL")
    if channel not in channels:
        raise click.UsageError(f"no channel '{channel}'; there are: {', '.join(channels)}")
    registry.resolve(registry.TOOLS["alerts-test"])(app.settings, channel)
    click.echo(f"{channel} took the test message")


COMMANDS = [alerts]
