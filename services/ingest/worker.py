"""The ingest processes: one feed each, from its source to the bus."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import msgspec

from services.ingest.gate import gate_of
from services.ingest.keeper import Keeper
from services.ingest.normalize import warm
from services.ingest.publisher import PublisherOutput
from services.ingest.source import Source
from services.ingest.usage import Account
from shared import metrics
from shared.bus import worker_id
from shared.errors import AuthError, BusBehind, BusUnavailable, ConfigError, Fenced, TapelineError
from shared.messages import Instrument
from shared.outage import Seldom
from shared.progress import Asked
from shared.settings import Settings
from shared.worker import wait_for_bus

if TYPE_CHECKING:
    from services.ingest.dbn_file import DbnFiles
    from services.ingest.tardis_csv import TardisCsv
    from services.ingest.tardis_file import TardisFiles
    from services.ingest.tardis_replay import TardisReplay

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Feed:
    """What the loop must know of a feed; `make` gets the output, for sources that read back what is published.

    `metered`: its usage is counted (what plays a tape uses nothing of a vendor). `hours`: the setting that names its
    market hours.
    """

    name: str
    make: Callable[[PublisherOutput], Source]
    live: bool
    by_ordinal: bool = True
    tape: str = ""
    metered: bool = True
    hours: str = ""


class Tape(Source, Protocol):
    """A source that ends; `tape` names what it plays, the same in every run."""

    tape: str


def run_files(settings: Settings, stop: threading.Event, args: tuple[str, ...]) -> None:
    """Play DBN files: `[--speed N|max] FILE...`; returns at the end of the tape."""
    _play(settings, stop, open_files(settings, args), args)


def open_files(settings: Settings, args: tuple[str, ...]) -> DbnFiles:
    """DBN files as a source: `[--speed N|max] FILE...`."""
    from services.ingest.dbn_file import DbnFiles  # noqa: PLC0415

    paths, speed = _tape_arguments("ingest-files wants DBN files: [--speed N|max] FILE...", args)
    return DbnFiles(paths, settings.tapeline.partitions, speed=speed, option_roots=settings.databento.option_roots)


def run_tardis_csv(settings: Settings, stop: threading.Event, args: tuple[str, ...]) -> None:
    """Play Tardis CSV files, downloading them first: `[--speed N|max] FILE|tardis://…...`; returns at the end."""
    source = open_tardis_csv(settings, args, stop)
    if not stop.is_set():
        _play(settings, stop, source, args)


def open_tardis_csv(settings: Settings, args: tuple[str, ...], stop: threading.Event | None = None) -> TardisCsv:
    """Tardis CSV files as a source, downloaded if they are not there: `[--speed N|max] FILE|tardis://…...`."""
    from services.ingest.tardis_csv import TardisCsv  # noqa: PLC0415
    from services.ingest.tardis_download import local_files  # noqa: PLC0415

    texts, speed = _tape_arguments("ingest-tardis-csv wants CSV files: [--speed N|max] FILE|tardis://…...", args)
    return TardisCsv(local_files(texts, settings, stop), settings, speed=speed)


def run_tardis_files(settings: Settings, stop: threading.Event, args: tuple[str, ...]) -> None:
    """Play recorded normalized Tardis messages: `[--speed N|max] FILE...`; returns at the end of the tape."""
    _play(settings, stop, open_tardis_files(settings, args), args)


def open_tardis_files(settings: Settings, args: tuple[str, ...]) -> TardisFiles:
    """Files of normalized Tardis messages as a source: `[--speed N|max] FILE...`."""
    from services.ingest.tardis_file import TardisFiles  # noqa: PLC0415

    paths, speed = _tape_arguments("ingest-tardis-files wants NDJSON files: [--speed N|max] FILE...", args)
    grace_ns = settings.tardis.grace_ms * 1_000_000
    return TardisFiles(paths, settings.tapeline.partitions, grace_ns=grace_ns, speed=speed)


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
        history.budget, history.goes_on = out.account, out.status.went_on
        return DatabentoLive(settings.databento, partitions, feed=name, history=history, published=out.published)

    serve(settings, stop, Feed(name, make, True, by_ordinal=False, hours="databento.hours"))


def run_tardis(settings: Settings, stop: threading.Event, args: tuple[str, ...]) -> None:
    """Follow one exchange live through the tardis-machine server: `EXCHANGE`."""
    from services.ingest.tardis_live import TardisLive  # noqa: PLC0415
    from services.ingest.tardis_request import symbols_of  # noqa: PLC0415
    from services.ingest.tardis_route import warm as warm_router  # noqa: PLC0415

    if len(args) != 1:
        there = ", ".join(symbols_of(settings.tardis.symbols))
        raise ConfigError(f"ingest-tardis wants one EXCHANGE of tardis.symbols; there are: {there}")
    exchange, partitions = args[0], settings.tapeline.partitions

    def make(out: PublisherOutput) -> TardisLive:
        return TardisLive(
            settings.tardis, exchange, partitions,
            published=out.published, instruments=lambda: _instruments(out),
        )  # fmt: skip

    TardisLive(settings.tardis, exchange, partitions)  # wrong settings are told before Redis is there
    warm_router()
    serve(settings, stop, Feed(f"tardis:{exchange}", make, True, by_ordinal=False, hours="tardis.hours"))


def run_tardis_replay(settings: Settings, stop: threading.Event, args: tuple[str, ...]) -> None:
    """Play history through the tardis-machine server: `[--speed N|max] tardis://…&via=server...`."""
    _play(settings, stop, open_tardis_replay(settings, args), args)


def open_tardis_replay(settings: Settings, args: tuple[str, ...]) -> TardisReplay:
    """History through the tardis-machine server as a source: `[--speed N|max] tardis://…&via=server...`."""
    from services.ingest.tardis_replay import TardisReplay  # noqa: PLC0415
    from shared.sources import parse  # noqa: PLC0415

    usage = "ingest-tardis-replay wants [--speed N|max] tardis://EXCHANGE?symbols=A,B&from=DAY&to=DAY&via=server..."
    texts, speed = _tape_arguments(usage, args)
    specs = [parse(text) for text in texts]
    if any(spec.kind != "tardis-server" for spec in specs):
        raise ConfigError(usage)
    return TardisReplay(specs, settings, speed=speed)


def _instruments(out: PublisherOutput) -> list[Instrument]:
    """What the bus knows of the instruments of a feed."""
    held = [body for p in range(out.partitions) for body in out.bus.call("hvals", out.bus.keys.instruments(p))]
    found = [msgspec.json.decode(body, type=Instrument) for body in held]
    return [instrument for instrument in found if instrument.feed == out.feed]


def _play(settings: Settings, stop: threading.Event, source: Tape, args: tuple[str, ...]) -> None:
    paced = _tape_arguments("", args)[1] is not None
    serve(settings, stop, Feed(source.feed, lambda _: source, paced, tape=source.tape, metered=False))


def serve(settings: Settings, stop: threading.Event, feed: Feed) -> None:
    """Run a source until it ends or `stop` is set, starting it again from the bus when the bus is behind.

    Raises ConfigError when another living process publishes this feed, and what the source raises.
    """
    section, _, name = feed.hours.partition(".")
    calendar = getattr(getattr(settings, section), name) if feed.hours else ""
    gate = gate_of(settings, feed.name, calendar, feed.hours)
    bus = wait_for_bus(settings, stop)
    if bus is None:
        return
    warm()
    owner = worker_id(f"ingest-{feed.name}")
    account = Account(bus.clone(), feed.name, owner, settings, gate) if feed.metered else None
    out = PublisherOutput(
        bus, feed.name, owner, settings.tapeline.partitions, settings.ingest, stop,
        feed.live, by_ordinal=feed.by_ordinal, tape=feed.tape, account=account,
    )  # fmt: skip
    out.status.beat_seconds = min(out.status.beat_seconds, settings.redis.lease_seconds / 3)
    metrics.follow(out.status.progress)
    try:
        _follow(out, feed, Asked(stop, out.status.went_on), settings.tapeline.partitions)
        if stop.is_set() and out.status.state != "ended":
            out.connection("down", "stopped")
    except TapelineError as error:
        out.connection("failed", str(error))
        raise
    finally:
        out.status.progress.rest("the source")
        if account is not None:
            account.close()
        out.close()
        bus.close()


def _follow(out: PublisherOutput, feed: Feed, stop: threading.Event, partitions: int) -> None:
    source = feed.make(out)
    keeper = Keeper(source, out, out.account, stop) if out.account is not None else None
    wait, told = 0.1, Seldom()
    while not stop.is_set():
        try:
            out.bus.deploy(partitions)
            if keeper is not None:
                if keeper.run():
                    return
                continue
            source.run(out, out.attach(), stop)
            out.flush()
            return
        except BusBehind as error:
            log.warning("%s; publishing again from there", error)
        except BusUnavailable as error:
            if told.add():
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


def _tape_arguments(usage: str, args: tuple[str, ...]) -> tuple[list[str], float | None]:
    """Tapes and speed; None is as fast as possible."""
    paths: list[str] = []
    speed: float | None = None
    rest = iter(args)
    for arg in rest:
        if arg == "--speed" or arg.startswith("--speed="):
            text = arg.partition("=")[2] if "=" in arg else next(rest, "")
            speed = _speed(text)
        elif arg.startswith("--"):
            raise ConfigError(f"{usage} ({arg} is unknown)")
        else:
            paths.append(arg)
    if not paths:
        raise ConfigError(usage)
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
