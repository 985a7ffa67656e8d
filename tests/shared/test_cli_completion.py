"""Shell completion: the scripts, and what a real bash completes with them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from shared.cli import cli
from shared.cli_completion import SHELLS, VARIABLE
from shared.registry import SERVICES

BASH = shutil.which("bash")
# Prints what bash would offer for each line of words, as it does when TAB is pressed behind the last one.
ASK = """
eval "$(tapeline completion bash)"
compopt() { echo compopt "$@" >&2; }
while IFS= read -r line; do
    IFS='|' read -r -a COMP_WORDS <<< "$line"
    [[ "$line" == *'|' ]] && COMP_WORDS+=("")
    COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 )); COMPREPLY=()
    _tapeline_completion tapeline
    echo "${COMPREPLY[*]}"
done
"""


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_gets_a_script(shell: str) -> None:
    done = CliRunner().invoke(cli, ["completion", shell])
    assert done.exit_code == 0
    assert f"{VARIABLE}={shell}_complete" in done.output
    assert "_tapeline_completion" in done.output


def test_help_says_how_to_install_it_and_other_shells_are_refused() -> None:
    text = CliRunner().invoke(cli, ["completion", "--help"]).output
    for shell in SHELLS:
        assert f"tapeline completion {shell}" in text
    assert CliRunner().invoke(cli, ["completion", "tcsh"]).exit_code == 2


@pytest.mark.skipif(BASH is None, reason="no bash on PATH")
def test_what_bash_completes(tmp_path: Path) -> None:
    (tmp_path / "day.dbn").touch()
    program = tmp_path / "tapeline"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m shared.cli "$@"\n')
    program.chmod(0o755)
    asked = {
        "tapeline|comp": {"completion"},
        "tapeline|config|": {"check", "show"},
        "tapeline|run|": {"redis", *SERVICES},
        "tapeline|tail|ca": {"candles"},
        "tapeline|watch|ES|--timeframe|15": {"15s", "15m"},
        "tapeline|backfill|--store|": {"sqlite:///", "postgresql://", "bigquery://"},
        "tapeline|replay|d": set[str](),  # a file's name
        "tapeline|replay|tard": {"tardis://"},
    }
    # Settings that are wrong are nothing that completing could stumble over: it does not read them.
    environ = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "TAPELINE_PARTITIONS": "many",
        "TAPELINE_CONFIG": "absent.toml",
    }  # fmt: skip
    done = subprocess.run(
        [str(BASH), "--norc", "-c", ASK], input="\n".join(asked) + "\n", cwd=tmp_path, env=environ, text=True,
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    offered = [set(line.split()) for line in done.stdout.splitlines()]
    assert offered == list(asked.values())
    # No space behind a scheme, and files by bash's own means.
    assert done.stderr.splitlines() == ["compopt -o nospace"] * 3 + ["compopt -o default", "compopt -o nospace"]


def test_completing_reads_no_heavy_module(tmp_path: Path) -> None:
    code = (
        "import sys, os; os.environ.update(_TAPELINE_COMPLETE='bash_complete', COMP_WORDS='tapeline\\nrun\\n', "
        "COMP_CWORD='2')\nimport shared.cli\ntry:\n    shared.cli.main()\n"
        "finally:\n    print([m for m in ('numpy', 'redis', 'rich', 'databento') if m in sys.modules], file=sys.stderr)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert "plain,sink-sqlite" in done.stdout
    assert done.stderr.strip() == "[]"
