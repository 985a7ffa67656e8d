"""The ingest processes: one feed each, from its source to the bus."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from services.ingest.normalize import warm
from services.ingest.publisher import PublisherOutput
from services.ingest.source import Source
from shared.bus import worker_id
from shared.errors import AuthError, BusBehind, BusUnavailable, ConfigError, Fenced, TapelineError
from shared.settings import Settings
from shared.worker import wait_for_bus

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Feed:
    """What the loop must know of a feed; `make` gets the output, for sources that read back what is published."""

    name: str
    make: Callable[[PublisherOutput], Source]
    live: bool
    by_ordinal: bool = True
    tape: str = ""


def run_files(settings: Settings, stop: threading.Event, args: tuple[str, ...]) -> None:
    """Play DBN files: `[--speed N|max] FILE...`; returns at the end of the tape."""
    from services.ingest.dbn_file import DbnFiles  # noqa: PLC0415

    paths, speed = _file_arguments(args)
    source = DbnFiles(paths, settings.tapeline.partitions, speed=speed)
    serve(settings, stop, Feed(source.feed, lambda _: source, speed is not None, tape=source.tape))


def run_synthetic(settings: Settings, stop: threading.Event, args: tuple[str, ...]) -> None:
    """Play the seeded market as a live feed."""
    from services.ingest.synthetic import SyntheticFeed  # noqa: PLC0415

    _no_arguments("ingest-synthetic", args)
    source = SyntheticFeed(settings.synthetic, settings.tapeline.partitions)
    serve(settings, stop, Feed(source.feed, lambda _: source, True, tape=source.tape))


def run_databento(settings: Settings, stop: threading.Event, args: tuple[str, ...]) -> None:
    """Follow the Databento live feed. Raises AuthError at once when there is no key."""
    from services.ingest.databento_history import DatabentoHistory  # noqa: PLC0415
    from services.ingest.databento_live import DatabentoLive  # noqa: PLC0415

    _no_arguments("ingest-databento", args)
    if not settings.databento.api_key.strip():
        raise AuthError(
            "there is no Databento API key: set DATABENTO_API_KEY, or databento.api_key in the settings file"
        )
    name, partitions = "databento", settings.tapeline.partitions
    history = DatabentoHistory(settings.databento, stop)

    def make(out: PublisherOutput) -> Source:
        return DatabentoLive(settings.databento, partitions, feed=name, history=history, published=out.published)

    serve(settings, stop, Feed(name, make, True, by_ordinal=False))


def serve(settings: Settings, stop: threading.Event, feed: Feed) -> None:
    """Run a source until it ends or `stop` is set, starting it again from the bus when the bus is behind.

    Raises ConfigError when another living process publishes this feed, and what the source raises.
    """
    bus = wait_for_bus(settings, stop)
    if bus is None:
        return
    warm()
    out = PublisherOutput(
        bus, feed.name, worker_id(f"ingest-{feed.name}"), settings.tapeline.partitions, settings.ingest, stop,
        feed.live, by_ordinal=feed.by_ordinal, tape=feed.tape,
    )  # fmt: skip
    try:
        _follow(out, feed, stop, settings.tapeline.partitions)
        if stop.is_set() and out.status.state != "ended":
            out.connection("down", "stopped")
    except TapelineError as error:
        out.connection("failed", str(error))
        raise
    finally:
        out.close()
        bus.close()


def _follow(out: PublisherOutput, feed: Feed, stop: threading.Event, partitions: int) -> None:
    source = feed.make(out)
    wait = 0.1
    while not stop.is_set():
        try:
            out.bus.deploy(partitions)
            source.run(out, out.attach(), stop)
            out.flush()
            return
        except BusBehind as error:
            log.warning("%s; publishing again from there", error)
        except BusUnavailable as error:
            log.warning("%s; trying again", error)
            stop.wait(wait)
            wait = min(2.0, 2 * wait)
        except Fenced as error:
            if _rival(out, partitions):
                raise ConfigError(f"{error}; run one ingest-{feed.name} on a bus") from None
            log.warning("who took %s over is gone; taking it back", feed.name)


def _rival(out: PublisherOutput, partitions: int) -> bool:
    """Whether the new owner lives. When Redis lost its tail, an owner of long ago may stand there again."""
    try:
        return any(out.status.rival(p) for p in range(partitions))
    except BusUnavailable:
        return False  # asked again when Redis is back and refuses once more


def _file_arguments(args: tuple[str, ...]) -> tuple[list[str], float | None]:
    paths: list[str] = []
    speed: float | None = None
    rest = iter(args)
    for arg in rest:
        if arg == "--speed" or arg.startswith("--speed="):
            text = arg.partition("=")[2] if "=" in arg else next(rest, "")
            speed = _speed(text)
        elif arg.startswith("--"):
            raise ConfigError(f"ingest-files does not know {arg}; it takes [--speed N|max] FILE...")
        else:
            paths.append(arg)
    if not paths:
        raise ConfigError("ingest-files wants DBN files: [--speed N|max] FILE...")
    return paths, speed


def _speed(text: str) -> float | None:
    if text == "max":
        return None
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not 0 < speed < float("inf"):
        raise ConfigError(f"--speed wants max or a number above 0 (1 = real time), not '{text}'")
    return speed


def _no_arguments(name: str, args: tuple[str, ...]) -> None:
    if args:
        raise ConfigError(f"{name} takes no arguments, got {' '.join(args)}")
