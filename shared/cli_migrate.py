"""The command `migrate`: bring a store's schema up to this version, or say what that would do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from shared.cli_common import busy, echo_json, json_option, store_option

if TYPE_CHECKING:
    from shared.cli import App
    from shared.migrate import Plan


@click.command()
@store_option
@click.option("--plan", "only_plan", is_flag=True, help="Say what would be done, and change nothing.")
@click.option("--sql", is_flag=True, help="Show the SQL of each step, too.")
@json_option
@click.pass_obj
def migrate(app: App, *, only_plan: bool, sql: bool, as_json: bool) -> None:
    """Make the tables of a store, or bring them up to this version. Sinks do the same when they start.

    Of PostgreSQL it also says what the server offers: hypertables, compression, retention, roll-ups.
    """

    import msgspec

    from shared.migrate import migrate as run

    settings = app.settings
    with busy(as_json, "looking at the store" if only_plan else "migrating the store"):
        plan = run(settings, plan=only_plan)
    if as_json:
        if not sql:
            steps = [{"version": step.version, "name": step.name} for step in plan.steps]
            echo_json({**msgspec.structs.asdict(plan), "steps": steps})
        else:
            echo_json(plan)
        return
    _print(plan, sql)


def _print(plan: Plan, sql: bool) -> None:
    click.echo(plan.store)
    if not plan.steps:
        click.echo(f"the schema is at version {plan.held}: nothing to do")
    elif plan.applied:
        click.echo(f"the schema is now at version {plan.wanted}, it was at {plan.held}")
    else:
        click.echo(f"the schema is at version {plan.held}, this program wants {plan.wanted}")
    for step in plan.steps:
        click.echo(f"  {'done' if plan.applied else 'to do'}: {step.version:04d} {step.name}")
        if sql:
            click.echo("\n".join(f"    {line}".rstrip() for line in step.sql.splitlines()))
    for note in plan.notes:
        click.echo(f"  {note}")


COMMANDS = [migrate]
