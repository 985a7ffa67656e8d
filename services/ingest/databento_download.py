"""What `databento://` sources name, as DBN files: priced first, then fetched once.

A file is in the folder only when it is whole: it is fetched beside it, read through and moved into place. What is
there is not bought again. Beside options come their definitions, without which nobody knows their strikes.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from services.ingest.databento_history import WHERE, Archive
from services.ingest.dbn_tape import BARS, TAPES, definitions, open_tape
from shared.errors import AuthError, ConfigError, SourceError, Unavailable
from shared.instruments import option_series
from shared.purchases import Quote
from shared.settings import Settings
from shared.sources import SourceSpec
from shared.usage import MIB, Totals
from shared.usage_book import bought

WHOLE_SECONDS = 24 * 3600.0
SYMBOLS_IN_NAME = 48
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class File:
    """One request, and its place here."""

    what: str
    query: dict[str, Any]
    path: Path


class Order(Archive):
    """Everything that some sources need. Raises AuthError without a key, ConfigError for a folder that cannot be."""

    def __init__(self, specs: Iterable[SourceSpec], settings: Settings, stop: threading.Event) -> None:
        if not settings.databento.api_key.strip():
            raise AuthError(
                "there is no Databento API key: set DATABENTO_API_KEY, or databento.api_key in the settings file"
            )
        super().__init__(settings.databento, stop, whole_seconds=WHOLE_SECONDS)
        self._all_settings = settings
        self.folder = Path(settings.tapeline.state_dir).expanduser().absolute() / "databento"
        files = [file for spec in specs for file in self._files(spec)]
        self.files = list({file.path: file for file in files}.values())
        self.missing = [file for file in self.files if not file.path.exists()]
        self._prices: dict[Path, float] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot use {self.folder}: {error.strerror}; set TAPELINE_STATE_DIR") from None

    @property
    def paths(self) -> list[Path]:
        """All files, once they are here."""
        return [file.path for file in self.files]

    def quotes(self) -> list[Quote]:
        """The price of each file that is not here. Raises AuthError, Unavailable."""
        found = []
        for file in self.missing:
            cost = self._prices[file.path] = self._aside(partial(self.cost, file.query))
            found.append(Quote(file.what, cost, self._aside(partial(self._size, file.query))))
        return found

    def fetch(self, tell: Callable[[str], None]) -> None:
        """Fetch what is not here, telling how far it is. Raises AuthError, Unavailable; whole files stay."""
        for file in self.missing:
            with TemporaryDirectory(prefix=".fetch-", dir=self.folder, ignore_cleanup_errors=True) as folder:
                part = Path(folder) / file.path.name
                tell(f"fetching {file.what}")
                used = Totals(cost_usd=self._prices.get(file.path, 0.0))
                try:
                    self._aside(partial(self.download, file.query, part), partial(_progress, file.what, part, tell))
                    used += _read_through(part)
                    os.replace(part, file.path)
                except SourceError as error:
                    said = str(error).replace(str(part), "what it sent")
                    raise Unavailable(f"{WHERE}: {said}") from None
                finally:  # a download that fails may be billed all the same
                    bought(self._all_settings, used)

    def _size(self, query: dict[str, Any]) -> int | None:
        """Bytes of the records; None when the archive does not tell."""
        try:
            size = self._ask("tell the size", lambda: self._client.metadata.get_billable_size(**query))
        except Unavailable:
            return None
        return size if isinstance(size, int) else None

    # -- names -------------------------------------------------------------------------------

    def _files(self, spec: SourceSpec) -> list[File]:
        # Bars are told by their symbols alone.
        symbols = () if spec.types[0] in BARS else spec.symbols
        options = [s for s in symbols if s.endswith(".OPT") or option_series(s)]
        start = spec.start or _EPOCH
        # All definitions of a day stand at its begin.
        day = start.replace(hour=0, minute=0, second=0, microsecond=0)
        defined = [self._file(spec, "definition", options, day)] if options else []
        return [*defined, self._file(spec, spec.types[0], spec.symbols, start)]

    def _file(self, spec: SourceSpec, schema: str, symbols: Iterable[str], start: datetime) -> File:
        end, wanted = spec.end or start, sorted(set(symbols))
        query = {
            "dataset": spec.venue, "symbols": wanted, "schema": schema, "stype_in": spec.stype,
            "start": _ns(start), "end": _ns(end),
        }  # fmt: skip
        name = f"{spec.venue}_{schema}_{spec.stype}_{_slug(wanted)}_{_stamp(start)}_{_stamp(end)}.dbn.zst"
        shown = ",".join(wanted) if len(wanted) <= 8 else f"{','.join(wanted[:8])} and {len(wanted) - 8} more"
        what = f"{spec.venue} {schema} of {shown}, {start:%Y-%m-%dT%H:%M:%SZ} to {end:%Y-%m-%dT%H:%M:%SZ}"
        return File(what, query, self.folder / name)


def _read_through(path: Path) -> Totals:
    """Records and bytes of a DBN file. Raises SourceError unless it is whole."""
    tape = open_tape(path, (*TAPES, *BARS))
    if tape.schema == "definition":
        return Totals(sum(1 for _ in definitions(tape)), sum(map(len, tape.pieces())))
    records = sum(map(len, tape.records()))
    return Totals(records, records * tape.width)


def _progress(what: str, part: Path, tell: Callable[[str], None]) -> None:
    with suppress(OSError):  # nothing was sent yet
        tell(f"fetching {what}: {part.stat().st_size / MIB:.1f} MiB")


def _ns(at: datetime) -> int:
    since = at - _EPOCH
    return ((since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds) * 1000


def _stamp(at: datetime) -> str:
    return at.strftime("%Y%m%dT%H%M%S" + (".%f" if at.microsecond else ""))


def _slug(symbols: list[str]) -> str:
    """Symbols as a part of a file's name, different for different symbols."""
    text = "+".join(symbols)
    plain = re.sub(r"[^A-Za-z0-9.+-]", "-", text)
    if plain == text and len(text) <= SYMBOLS_IN_NAME:
        return text
    return f"{plain[:SYMBOLS_IN_NAME]}-{blake2b(text.encode(), digest_size=6).hexdigest()}"
