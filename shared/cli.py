"""The command line: `tapeline COMMAND`. One file per group of commands, heavy imports inside commands.

Exit codes: 0 done, 1 failed, 2 wrong usage, 75 a server did not answer (only workers under `up`), 78 wrong
settings, 130 interrupted. Errors are one line on stderr: `tapeline: what, where, what to do`.
"""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import replace
from functools import cached_property
from typing import NoReturn

import click

from shared.cli_common import completes
from shared.errors import TapelineError
from shared.settings import Settings, load


class App:
    """What every command gets: the settings, read when the command asks for them."""

    def __init__(self, config: str | None) -> None:
        self.config = config

    @cached_property
    def settings(self) -> Settings:
        """Raises ConfigError."""
        return load(self.config)

    def use_store(self, url: str) -> None:
        """Another store than that of the settings."""
        import msgspec

        found = self.settings
        origin = {**found.origin, "tapeline.store": "--store"}
        self.settings = replace(found, tapeline=msgspec.structs.replace(found.tapeline, store=url), origin=origin)


def version() -> str:
    """The installed version."""
    from importlib.metadata import version as installed

    return installed("tapeline")


def _print_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"tapeline {version()}")
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--config", metavar="FILE", help="Settings file (default: $TAPELINE_CONFIG, ./tapeline.toml).",
    shell_complete=completes(files=True),
)  # fmt: skip
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Show the version."
)
@click.pass_context
def cli(context: click.Context, config: str | None) -> None:
    """Live market tapes into candles and order flow: exactly once, over Redis Streams.

    Begin with `tapeline demo`; `tapeline doctor` says what is missing, `tapeline config show` what is set.
    """
    context.obj = App(config)


def _register() -> None:
    from importlib import import_module

    groups = ("run", "demo", "replay", "backfill", "data", "ops", "bus", "health", "watch", "explain", "instruments",
              "alerts", "usage", "migrate", "dead_letters", "import", "plot", "completion", "top")  # fmt: skip
    for name in groups:
        for command in import_module(f"shared.cli_{name}").COMMANDS:
            cli.add_command(command)


_register()


def fail(error: BaseException) -> int:
    """Print an error as its one line; returns the exit code."""
    from shared.log import Masker

    if isinstance(error, click.ClickException):
        context = error.ctx if isinstance(error, click.UsageError) else None
        where = f" (see `{context.command_path} --help`)" if context else ""
        click.echo(f"tapeline: {' '.join(error.format_message().split())}{where}", err=True)
        return error.exit_code
    if isinstance(error, click.Abort | KeyboardInterrupt):
        click.echo("tapeline: interrupted", err=True)
        return 130
    mask = Masker()
    if os.environ.get("TAPELINE_LOG_LEVEL") == "DEBUG":
        click.echo(mask("".join(traceback.format_exception(error))), err=True, nl=False)
    if isinstance(error, TapelineError):
        click.echo(f"tapeline: {mask(_one_line(error))}", err=True)
        return error.exit_code
    what = f"{type(error).__name__}: {_one_line(error)}"
    click.echo(f"tapeline: unexpected {mask(what)}; run with TAPELINE_LOG_LEVEL=DEBUG for the trace", err=True)
    return 1


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def main(argv: list[str] | None = None) -> NoReturn:
    """Entry point of `tapeline`."""
    try:
        result = cli.main(args=argv, prog_name="tapeline", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output (`| head`) has had enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        # The one place where everything ends as a line for the user.
        sys.exit(fail(error))
    except KeyboardInterrupt as error:
        sys.exit(fail(error))
    sys.exit(result if isinstance(result, int) else 0)


if __name__ == "__main__":
    main()
