"""SOURCE arguments: what a replay or a backfill reads, and which ingest service plays it.

    day.dbn  day.dbn.zst                  DBN files
    day.ndjson  .ndjson.zst  .ndjson.gz   recorded normalized messages of tardis-machine
    day.csv  .csv.gz  .csv.zst            downloaded Tardis CSV files
    tardis://EXCHANGE?symbols=A,B&from=DAY&to=DAY[&types=…][&via=csv|server]
    databento://DATASET?schema=tbbo&symbols=ES.FUT&start=…&end=…[&stype=parent]    bought first: shared.purchases
    synthetic://…                                                  understood, but to be generated first

`from` (or `start`) is inclusive, `to` (or `end`) exclusive, UTC. Sources of one service are one tape: one producer,
merged by time of receipt.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import parse_qsl, urlsplit

from shared import registry
from shared.errors import ConfigError
from shared.settings import Settings

ACCEPTED = (
    "a .dbn[.zst], .ndjson[.zst|.gz] or .csv[.gz|.zst] file, tardis://EXCHANGE?symbols=A,B&from=DAY&to=DAY or "
    "databento://DATASET?symbols=A,B&start=DAY&end=DAY"
)
# How the CSV files are called, and the same for the server.
CSV_TYPES = {
    "trades": "trade",
    "book_snapshot_5": "book_snapshot_5_0ms",
    "book_snapshot_25": "book_snapshot_25_0ms",
    "quotes": "quote",
    "book_ticker": "book_ticker",
    "derivative_ticker": "derivative_ticker",
    "liquidations": "liquidation",
    "options_chain": "option_summary",
}
SERVER_TYPES = {server: csv for csv, server in CSV_TYPES.items()}
DEFAULT_TYPES = ("trades",)
# Kind of source -> the ingest service that plays it.
PLAYED_BY = {
    "dbn": "ingest-files",
    "ndjson": "ingest-tardis-files",
    "csv": "ingest-tardis-csv",
    "tardis-csv": "ingest-tardis-csv",
    "tardis-server": "ingest-tardis-replay",
}
_FILES = re.compile(r"(?P<kind>\.dbn|\.ndjson|\.csv|)(?P<packed>\.zst|\.gz|)$", re.IGNORECASE)
_EXCHANGE = re.compile(r"[a-z0-9][a-z0-9-]*$")
_DATASET = re.compile(r"[A-Z0-9][A-Z0-9.]*$")
_SERVER_BOOK = re.compile(r"book_snapshot_\d+_\d+(ms|s|m|h)$")


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """One SOURCE. `text` says the same again to the ingest service (files by their absolute path).

    `kind`: dbn, ndjson, csv, tardis-csv, tardis-server, databento or synthetic. Of a URL: `venue` is the
    exchange or dataset, [start, end) the interval in UTC, `types` what is asked for, in the names of the CSV
    files (tardis-csv), of the server (tardis-server), or the schema (databento). `stype`: what Databento's symbols are.
    """

    kind: str
    text: str
    path: Path | None = None
    venue: str = ""
    symbols: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    start: datetime | None = None
    end: datetime | None = None
    stype: str = ""


class Playable(Protocol):
    """A source of services.ingest that ends. `tape` names what it plays: the same in every run."""

    feed: str
    tape: str

    def run(self, out: Any, resume: Any, stop: threading.Event) -> None:
        """Push everything into an Output; see services.ingest.source."""


def parse(text: str) -> SourceSpec:
    """What a SOURCE argument means.

    Raises ConfigError for what is no source, for unknown or bad query keys and for files that are not there.
    """
    scheme, found, _ = text.partition("://")
    if not found:
        return _file(text)
    if scheme == "tardis":
        return _tardis(text)
    if scheme == "databento":
        return _databento(text)
    if scheme == "synthetic":
        return SourceSpec("synthetic", text)
    raise ConfigError(f"'{text}' is no source; give {ACCEPTED}")


def programs(specs: Sequence[SourceSpec], speed: str = "max") -> list[tuple[str, tuple[str, ...]]]:
    """The ingest services that play these sources together, each with its arguments.

    Raises ConfigError for kinds that no service plays, and for a source given twice.
    """
    played: dict[str, list[str]] = {}
    for spec in specs:
        texts = played.setdefault(_service(spec), [])
        if spec.text in texts:
            raise ConfigError(f"{spec.text} is given twice: its trades would count twice")
        texts.append(spec.text)
    return [(service, ("--speed", speed, *texts)) for service, texts in played.items()]


def make(specs: Sequence[SourceSpec], settings: Settings, speed: str = "max") -> list[Playable]:
    """The sources themselves, to be run in this process; downloads what has to be downloaded.

    Raises ConfigError as `programs` does, and what the sources raise for tapes that they cannot play.
    """
    return [
        cast("Playable", registry.resolve(registry.TAPES[service])(settings, args))
        for service, args in programs(specs, speed)
    ]


def _service(spec: SourceSpec) -> str:
    if spec.kind == "databento":
        raise ConfigError(
            f"{spec.text} cannot be played from afar: give it to `tapeline replay` or `tapeline backfill`, which buy "
            "it as .dbn files first"
        )
    if spec.kind == "synthetic":
        raise ConfigError(f"{spec.text} cannot be played: write it with `tapeline generate FILE` and give that file")
    return PLAYED_BY[spec.kind]


def _file(text: str) -> SourceSpec:
    path = Path(text)
    if path.is_dir():
        raise ConfigError(f"'{text}' is a directory; give the files in it")
    if not path.exists():
        raise ConfigError(f"'{text}' does not exist; give {ACCEPTED}")
    if not os.access(path, os.R_OK):
        raise ConfigError(f"'{text}' cannot be read: look at its permissions")
    match = _FILES.search(path.name)
    kind = match["kind"].lower().lstrip(".") if match else ""
    rest = path.name[: match.start()] if match else path.name
    packed = match["packed"].lower() if match else ""
    if (not kind and "." in rest.lstrip(".")) or (packed == ".gz" and kind in ("", "dbn")):
        raise ConfigError(f"'{text}' is no tape by its name; give {ACCEPTED}")
    return SourceSpec(kind or "dbn", str(path.absolute()), path=path)


def _query(text: str, known: Iterable[str], required: Iterable[str]) -> dict[str, str]:
    try:
        pairs = parse_qsl(urlsplit(text).query, keep_blank_values=True, strict_parsing=True)
    except ValueError:
        pairs = []
    values: dict[str, str] = {}
    for key, value in pairs:
        if key not in known:
            raise ConfigError(f"{text}: unknown key '{key}'; known: {', '.join(known)}")
        if key in values:
            raise ConfigError(f"{text}: '{key}' is given twice")
        values[key] = value.strip()
    for key in required:
        if not values.get(key):
            raise ConfigError(f"{text} says no {key}=; it wants {', '.join(required)}")
    return values


def _list(value: str) -> tuple[str, ...]:
    """Parts between commas, each once."""
    return tuple(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))


def _instant(text: str, key: str, value: str) -> datetime:
    try:
        found = datetime.fromisoformat(value)
    except ValueError:
        raise ConfigError(f"{text}: {key}='{value}' is no day such as 2024-08-01") from None
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def _interval(text: str, query: dict[str, str], first: str = "from", last: str = "to") -> tuple[datetime, datetime]:
    start, end = _instant(text, first, query[first]), _instant(text, last, query[last])
    if start >= end:
        raise ConfigError(f"{text}: `{last}` (exclusive) must be later than `{first}`")
    return start, end


def _tardis(text: str) -> SourceSpec:
    exchange = urlsplit(text).netloc
    if not _EXCHANGE.match(exchange) or urlsplit(text).path not in ("", "/"):
        raise ConfigError(f"'{text}' names no exchange; write tardis://binance-futures?symbols=BTCUSDT&from=DAY&to=DAY")
    query = _query(text, ("symbols", "from", "to", "types", "via"), ("symbols", "from", "to"))
    via = query.get("via", "csv")
    if via not in ("csv", "server"):
        raise ConfigError(f"{text}: via is csv (downloads) or server (tardis-machine), not '{via}'")
    symbols = _list(query["symbols"])
    types = _types(text, via, _list(query["types"]) if "types" in query else DEFAULT_TYPES)
    if not symbols or not types:
        raise ConfigError(f"{text}: name at least one of {'types' if symbols else 'symbols'}")
    start, end = _interval(text, query)
    if via == "csv" and any(at.time() != datetime.min.time() for at in (start, end)):
        raise ConfigError(f"{text}: CSV files hold whole days: give days such as from=2024-08-01&to=2024-08-02")
    return SourceSpec(f"tardis-{via}", text, None, exchange, symbols, types, start, end)


def _types(text: str, via: str, asked: tuple[str, ...]) -> tuple[str, ...]:
    """In the names of the CSV files or of the server, whichever were given."""
    found: list[str] = []
    for name in asked:
        csv = SERVER_TYPES.get(name, name)
        if csv in CSV_TYPES:
            found.append(csv if via == "csv" else CSV_TYPES[csv])
        elif via == "server" and _SERVER_BOOK.match(name):
            found.append(name)
        else:
            raise ConfigError(f"{text}: no type '{name}'; there are: {', '.join(CSV_TYPES)}")
    return tuple(dict.fromkeys(found))


def _databento(text: str) -> SourceSpec:
    dataset = urlsplit(text).netloc
    if not _DATASET.match(dataset) or urlsplit(text).path not in ("", "/"):
        raise ConfigError(
            f"'{text}' names no dataset; write databento://GLBX.MDP3?schema=tbbo&symbols=ES.FUT&start=DAY&end=DAY"
        )
    # Both ways to name an interval are understood, but not mixed.
    first, last = ("from", "to") if re.search(r"[?&](from|to)=", text) else ("start", "end")
    query = _query(text, ("schema", "symbols", first, last, "stype"), ("symbols", first, last))
    schema = query.get("schema") or "tbbo"
    if schema not in ("tbbo", "trades"):
        raise ConfigError(f"{text}: schema is tbbo or trades, not '{schema}'")
    symbols = _list(query["symbols"])
    if not symbols:
        raise ConfigError(f"{text}: name at least one of symbols")
    parents = [s.endswith((".FUT", ".OPT", ".SPOT")) for s in symbols]
    stype = query.get("stype") or ("parent" if all(parents) else "raw_symbol")
    if stype not in ("parent", "raw_symbol"):
        raise ConfigError(f"{text}: stype is parent or raw_symbol, not '{stype}'")
    if any(parents) != all(parents):
        raise ConfigError(f"{text}: ask for parents (ES.FUT) and for single contracts in sources of their own")
    start, end = _interval(text, query, first, last)
    return SourceSpec("databento", text, None, dataset, symbols, (schema,), start, end, stype)
