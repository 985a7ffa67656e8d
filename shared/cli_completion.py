"""The command `completion`: what makes a shell complete commands, options and arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import ShellComplete

PROGRAM, VARIABLE = "tapeline", "_TAPELINE_COMPLETE"
SHELLS = ("bash", "zsh", "fish")
# Behind a scheme there is more to come, so bash may not put a space there.
_ADD = "COMPREPLY+=($value)"
_ADD_OPEN = f'{_ADD}\n            [[ "$value" == */ ]] && compopt -o nospace'


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that makes SHELL complete `tapeline`: commands, options, services, topics, timeframes, files.

    \b
    To have it in every shell, once:
      bash   echo 'eval "$(tapeline completion bash)"' >> ~/.bashrc
      zsh    echo 'eval "$(tapeline completion zsh)"' >> ~/.zshrc      (behind compinit)
      fish   tapeline completion fish > ~/.config/fish/completions/tapeline.fish

    It wants bash 4.4 or later, and `tapeline` on PATH. Completing reads no settings and asks no server.
    """
    click.echo(_shell(shell, context.find_root().command).source().replace(_ADD, _ADD_OPEN))


def _shell(name: str, cli: click.Command) -> ShellComplete:
    from click.shell_completion import get_completion_class

    found = get_completion_class(name)
    if found is None:
        raise click.UsageError(f"click completes nothing in {name}")
    return found(cli, {}, PROGRAM, VARIABLE)


COMMANDS = [completion]
