"""What the Dockerfile does, done without an engine: its steps in a clean folder, by a user without rights.

COPY and RUN are taken from the file itself; every path of the image is moved below that folder. Only what needs root
(packages of the base, the user) is left out: the machine has tini, or the entry point is tried without it.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shared.redis_server import EmbeddedRedis
from tests.wait import until

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
# Folders of the image that are ours; what else its steps name belongs to the base.
PLACES = ("/opt/tapeline", "/opt/uv", "/opt/cache", "/src", "/data")
NOBODY = "nobody"
PACKAGES = "archive-v0"  # in uv's cache


@dataclass
class Stage:
    """A stage of a Dockerfile, as far as the instructions that ours uses."""

    steps: list[tuple[str, str]] = field(default_factory=list)  # instruction, rest

    def all(self, instruction: str) -> list[str]:
        return [rest for name, rest in self.steps if name == instruction]

    def last(self, instruction: str) -> str:
        return self.all(instruction)[-1]


def stages(text: str) -> dict[str, Stage]:
    """The stages of a Dockerfile by name; ARG before the first one is left out."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found: dict[str, Stage] = {}
    for line in filter(None, joined.splitlines()):
        instruction, rest = line.split(" ", 1)
        if instruction == "FROM":
            found[rest.rpartition(" AS ")[2]] = Stage()
        elif found:
            list(found.values())[-1].steps.append((instruction, rest))
    return found


@dataclass
class Image:
    """The image below `root`. Commands run as `user` (None: who we are) with the environment of the stage."""

    root: Path
    user: str | None
    env: dict[str, str]

    def place(self, text: str) -> str:
        """A text with the image's folders moved below `root`."""
        return re.sub(rf"(?<![\w/.])({'|'.join(PLACES)})(?![\w-])", rf"{self.root}\1", text)

    def own(self, *paths: Path) -> None:
        for path in paths if self.user else ():
            subprocess.run(["chown", "-R", f"{self.user}:", path], check=True)

    def environment(self, stage: Stage) -> dict[str, str]:
        """What ENV and the defaults of ARG say."""
        args: dict[str, str] = {}
        for rest in stage.all("ARG"):
            name, _, value = rest.partition("=")
            args[name] = shlex.split(value)[0] if value else ""
        env = dict(self.env)
        for rest in stage.all("ENV"):
            for word in shlex.split(rest):
                name, _, value = word.partition("=")
                value = re.sub(r"\$\{?(\w+)\}?", lambda m: env.get(m[1]) or args[m[1]], value)
                env[name] = self.place(value)
        return {**args, **env}

    def command(self, line: list[str], cwd: Path, env: dict[str, str]) -> subprocess.Popen[str]:
        if self.user:
            group = pwd.getpwnam(self.user).pw_gid
            line = ["setpriv", f"--reuid={self.user}", f"--regid={group}", "--clear-groups", "--no-new-privs", *line]
        return subprocess.Popen(line, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                start_new_session=True)  # fmt: skip

    def run(self, line: list[str], cwd: Path, env: dict[str, str]) -> str:
        process = self.command(line, cwd, env)
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, f"{shlex.join(line)}\n{out[-4000:]}"
        return out

    def build(self, stage: Stage) -> None:
        """Every COPY and RUN of a stage, in order."""
        cwd, env = self.root, self.environment(stage)
        for instruction, rest in stage.steps:
            if instruction == "WORKDIR":
                cwd = Path(self.place(rest))
                cwd.mkdir(parents=True, exist_ok=True)
                self.own(cwd)
            elif instruction == "COPY" and not rest.startswith("--"):
                *names, target = rest.split()
                for name in names:
                    to = cwd / (name if target == "./" else target)
                    skip = shutil.ignore_patterns("__pycache__", "*.py[co]")
                    if (ROOT / name).is_dir():
                        shutil.copytree(ROOT / name, to, ignore=skip)
                    else:
                        shutil.copy(ROOT / name, to)
                    self.own(to)
            elif instruction == "USER":
                # Who works from here on does not own what is installed.
                subprocess.run(["chmod", "-R", "a-w", self.place("/opt/tapeline")], check=True)
            elif instruction == "RUN":
                script = re.sub(r"^(--mount=\S+\s+)+", "", rest)
                self.run(["sh", "-ec", self.place(script)], cwd, env)


def package_cache(folder: Path, user: str | None) -> Path | None:
    """uv's cache, as a user may take it who does not own it: packages are linked, what uv writes into is copied.

    None where there is none, or nothing can be linked.
    """
    uv = Path(sys.executable).parent / "uv"
    done = subprocess.run([uv, "cache", "dir"], capture_output=True, text=True, check=False)
    held, cache = Path(done.stdout.strip()), folder / "uv"
    if done.returncode != 0 or not (held / PACKAGES).is_dir():
        return None
    cache.mkdir()
    if subprocess.run(["cp", "-al", held / PACKAGES, cache], capture_output=True, check=False).returncode != 0:
        return None
    for path in held.iterdir():
        if path.name.startswith(("wheels-", "simple-")):
            shutil.copytree(path, cache / path.name, symlinks=True)
    if user:
        # Of what is linked only the folders, which are new: the files in them are not ours to give.
        subprocess.run(["find", cache / PACKAGES, "-type", "d", "-exec", "chown", user, "{}", "+"], check=True)
        for path in {cache, *cache.iterdir()} - {cache / PACKAGES}:
            subprocess.run(["chown", "-h", *(["-R"] if path != cache else []), user, path], check=True)
    return cache


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """The image, built; its folders are gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="tapeline-image-", dir="/tmp"))
    user = NOBODY if os.getuid() == 0 else None
    keep = ("SSL_CERT_FILE", "SSL_CERT_DIR", "PIP_CERT", "PIP_INDEX_URL", "PIP_NO_INDEX", "PIP_FIND_LINKS",
            "UV_INDEX_URL", "UV_DEFAULT_INDEX", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY")  # fmt: skip
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(folder / "home")}
    env |= {name: os.environ[name] for name in keep if name in os.environ}
    # The base's python3 is some Python of this machine that everybody may run, of a version that we support.
    env["PATH"] = f"{folder / 'bin'}:{env['PATH']}"
    try:
        root = folder / "root"
        for path in (folder / "home", folder / "bin", root / "opt", root / "data"):
            path.mkdir(parents=True)
        (folder / "bin/python3").symlink_to(_python())
        cache = package_cache(folder, user)
        if cache is not None:
            env["UV_CACHE_DIR"] = str(cache)
        folder.chmod(0o755)
        made = Image(root, user, env)
        made.own(folder / "home", root)
        made.build(stages((ROOT / "deploy/Dockerfile").read_text())["build"])
        yield made
    finally:
        subprocess.run(["chmod", "-R", "u+w", folder / "root"], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def _python() -> str:
    """A Python 3.11 or newer outside of anybody's home."""
    for name in ("/usr/local/bin/python3", "/usr/bin/python3", shutil.which("python3") or "", sys.executable):
        if name and Path(name).exists():
            real = os.path.realpath(name)
            new = "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))"
            user = ["setpriv", f"--reuid={NOBODY}", "--clear-groups"] if os.getuid() == 0 else []
            if subprocess.run([*user, real, "-c", new], capture_output=True, check=False, cwd="/").returncode == 0:
                return real
    pytest.skip("no Python 3.11 here that another user may run")


def stop(process: subprocess.Popen[str]) -> int:
    """SIGTERM to the entry point alone, as an engine does it; the exit code."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(10)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_the_image_runs_a_worker_and_knows_its_health(image: Image, tmp_path: Path) -> None:
    run = stages((ROOT / "deploy/Dockerfile").read_text())["run"]
    copied = [rest.split()[-2:] for rest in run.all("COPY")]
    assert all(source == target for source, target in copied), "what is compiled is found by its path"
    env, data = image.environment(run), Path(image.place(run.last("WORKDIR")))
    assert "tini" in " ".join(run.all("RUN"))
    entry = json.loads(run.last("ENTRYPOINT"))
    assert entry == ["tini", "--", "tapeline"]
    if shutil.which("tini", path=env["PATH"]) is None:
        entry = ["tapeline"]
    check = json.loads(run.last("HEALTHCHECK").partition(" CMD ")[2])

    server = EmbeddedRedis(tmp_path / "redis", port=_free_port())
    server.start()
    try:
        env |= {"REDIS_URL": f"redis://127.0.0.1:{server.port}/0", "TAPELINE_METRICS_PORT": "0"}
        worker = image.command([*entry, "run", "aggregate"], data, env)
        try:

            def healthy() -> bool:
                assert worker.poll() is None, worker.communicate()[0]
                asked = image.command(check, data, env)
                said = asked.communicate(timeout=30)[0]
                return asked.returncode == 0 and "healthy: 1 worker" in said

            until(healthy, 60, "the worker to be healthy")
            # Nothing was compiled again: the cache of the build is the one that is used.
            assert "aggregate: " in (warm := image.run(["tapeline", "warm"], data, env))
            assert sum(float(s) for s in re.findall(r": ([\d.]+) s", warm)) < 20
        finally:
            code = stop(worker)
            out = worker.communicate()[0]
        assert code == 0, out
        # Gone, and said goodbye: no worker of this host is left.
        asked = image.command(check, data, env)
        assert "no worker of this host has reported" in asked.communicate(timeout=30)[0]
        assert asked.returncode == 1
    finally:
        server.stop()


def test_kernels_are_compiled_for_any_cpu_and_kept_outside_of_what_is_installed(image: Image) -> None:
    held = stages((ROOT / "deploy/Dockerfile").read_text())
    env = image.environment(held["run"])
    assert env["NUMBA_CPU_NAME"] == image.environment(held["build"])["NUMBA_CPU_NAME"] == "generic"
    # numba keys machine code by triple, CPU and features; of this host nothing may be in it.
    code = (
        "import json, shared.compiled; from numba.core.registry import cpu_target as t;"
        "print(json.dumps([*t.target_context.codegen().magic_tuple()]))"
    )
    _, cpu, features = json.loads(image.run([image.place("/opt/tapeline/bin/python"), "-c", code], image.root, env))
    assert (cpu, features) == ("generic", "")
    assert len(list(Path(image.place("/opt/cache")).rglob("*.nbc"))) > 10
    assert not list(Path(image.place("/opt/tapeline")).rglob("*.nbc"))


def _free_port() -> int:
    from tests.postgres import free_port

    return free_port()
