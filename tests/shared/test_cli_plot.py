"""`tapeline plot`: where the file goes, what is said, and what happens when it cannot be."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from shared import cli_plot
from shared.cli import cli, fail
from shared.errors import TapelineError
from tests.services.web.plots import Market, until


@pytest.fixture
def folder(tmp_path: Path, store_url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; the store, elsewhere, has 20 minutes of ES."""
    Market(store_url).candles(list(range(20)))
    monkeypatch.setenv("TAPELINE_STORE", store_url)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, ["plot", *args])


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_name_says_what_is_in_it(folder: Path) -> None:
    done = run("ES", "--last", "5")
    name = "GLBX.MDP3-ES_1m_20250303T144500Z_20250303T145000Z.png"
    assert done.exit_code == 0, done.output
    assert files(folder) == {name}
    assert done.stdout.startswith(f"{name}: 5 1m bars of GLBX.MDP3:ES, 2025-03-03T14:45:00Z to 2025-03-03T14:50:00Z, ")
    assert done.stdout.count("\n") == 1
    assert (folder / name).read_bytes()[:4] == b"\x89PNG"


def test_a_range_as_html_and_json(folder: Path) -> None:
    done = run("ES", "--since", "2025-03-03 14:35", "--until", until(9), "--out", "a.html", "--json", "--theme", "dark")
    told = json.loads(done.stdout)
    assert (told["file"], told["format"], told["rows"], told["incomplete"]) == ("a.html", "html", 4, 0)
    assert (told["start"], told["end"]) == ("2025-03-03T14:35:00Z", "2025-03-03T14:39:00Z")
    body = (folder / "a.html").read_bytes()
    assert len(body) == told["bytes"]
    assert body.startswith(b'<!doctype html>\n<html lang="en" data-theme="dark">')


def test_an_existing_file_is_replaced_whole(folder: Path) -> None:
    old = folder / "kept.png"
    old.write_bytes(b"old")
    old.chmod(0o640)
    (folder / "link.png").symlink_to(old)
    assert run("ES", "--out", "link.png").exit_code == 0
    assert (folder / "link.png").is_symlink()
    assert old.read_bytes()[:4] == b"\x89PNG"
    assert old.stat().st_mode & 0o777 == 0o640
    assert files(folder) == {"kept.png", "link.png"}


def test_without_bars_there_is_no_file(folder: Path) -> None:
    for args in (("XX",), ("ES", "--since", "2026-01-01"), ("ES", "--timeframe", "1h")):
        done = run(*args, "--out", "a.png")
        assert isinstance(done.exception, TapelineError)
        assert fail(done.exception) == 1
        assert "no 1" in str(done.exception)
        assert "\n" not in str(done.exception)
    assert files(folder) == set()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("ES", "--out", "a.pdf"), "ends in neither .png nor .html"),
        (("ES", "--since", "soon"), "'soon' is no time"),
        (("ES", "--since", "2025-03-04", "--until", "2025-03-03"), "must be later"),
        (("ES", "--timeframe", "7x"), "is no timeframe"),
        (("ES", "--last", "0"), "not in the range"),
        (("ES", "--out", "-", "--json"), "stdout"),
        (("a:",), "is no symbol"),
    ],
)
def test_wrong_usage(folder: Path, args: tuple[str, ...], says: str) -> None:
    done = run(*args)
    assert done.exit_code == 2
    assert says in done.output
    assert files(folder) == set()


def test_stdout_unless_it_is_a_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    piped = run("ES", "--out", "-", "--format", "html")
    assert piped.stdout_bytes.startswith(b"<!doctype html>")
    assert piped.stdout_bytes.endswith(b"</html>\n")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Terminal())
        with pytest.raises(Exception, match="not for a terminal"):
            cli.main(["plot", "ES", "--out", "-"], standalone_mode=False)


def test_a_full_disk_and_folders_that_are_not_there(folder: Path) -> None:
    def said(*args: str) -> str:
        done = run("ES", *args)
        assert isinstance(done.exception, TapelineError)
        return str(done.exception)

    (folder / "sub.png").mkdir()
    assert said("--out", "sub.png") == "cannot write sub.png: it is a folder"
    assert said("--out", "no/a.png") == f"cannot write no/a.png: there is no folder {folder / 'no'}"
    if Path("/dev/full").exists():
        assert said("--out", "/dev/full", "--format", "png") == "cannot write /dev/full: No space left on device"
    assert files(folder) == {"sub.png"}


def test_what_is_half_written_is_taken_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, body: bytes) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    (folder / "a.png").write_bytes(b"old")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(TapelineError, match=r"cannot write a\.png: No space left"):
        cli_plot.write(Path("a.png"), b"new")
    assert files(folder) == {"a.png"}
    assert (folder / "a.png").read_bytes() == b"old"


def test_without_matplotlib_the_line_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "services.web.plots.png", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("ES")
    assert "pip install 'tapeline[plot]'" in str(done.exception)
    assert fail(done.exception or AssertionError()) == 78
    assert run("ES", "--out", "a.html").exit_code == 0
