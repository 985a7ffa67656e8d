"""History of crypto without a server: the vendor's daily CSV files, each fetched once.

A file is in `tardis.download_dir` only when it is whole: it is fetched beside it, unpacked as a check and moved into
place. What is there is not fetched again. The first day of each month needs no API key.
"""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import logging
import os
import shutil
import tempfile
import threading
import urllib.error
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import aiohttp

from services.ingest.tardis_symbols import native_symbol
from shared.errors import AuthError, ConfigError, SourceError, TapelineError, Unavailable
from shared.settings import Settings
from shared.sources import SourceSpec, parse

log = logging.getLogger(__name__)

WHERE = "Tardis datasets"
# The vendor's files of all symbols of a kind; they are no symbols of the exchange.
GROUPS = frozenset({"SPOT", "PERPETUALS", "FUTURES", "OPTIONS", "COMBOS"})
CONCURRENCY = 4
ATTEMPTS = 4  # of one file; the client waits 2, 4, 8, … s between them
SILENCE_SECONDS = 300  # a file that nobody asked for lately takes the vendor a while to prepare
POLL_SECONDS = 0.1
BLOCK_BYTES = 1 << 20
NEEDS_CLIENT = "crypto history from CSV files needs more packages: pip install 'tapeline[history]'"


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file of the archive, and its place here."""

    exchange: str
    data_type: str
    symbol: str
    day: datetime
    path: Path

    def __str__(self) -> str:
        return f"{self.exchange} {self.data_type} of {self.symbol} on {self.day:%Y-%m-%d}"


def local_files(texts: Iterable[str], settings: Settings, stop: threading.Event | None = None) -> list[Path]:
    """The CSV files behind SOURCE arguments (files, `tardis://…`), in order; fetches those that are not there.

    Raises ConfigError, AuthError, SourceError (no such data), Unavailable (network, or stopped).
    """
    paths: list[Path] = []
    for text in texts:
        spec = parse(text)
        if spec.kind == "csv" and spec.path is not None:
            paths.append(spec.path)
        elif spec.kind == "tardis-csv":
            paths += download(spec, settings, stop)
        else:
            raise ConfigError(f"{text} is no CSV source: give .csv[.gz|.zst] files or tardis://…")
    return paths


def download_dir(settings: Settings) -> Path:
    """Where downloads are kept."""
    return Path(settings.tardis.download_dir or Path(settings.tapeline.state_dir) / "tardis").absolute()


def download(
    spec: SourceSpec, settings: Settings, stop: threading.Event | None = None, *, attempts: int = ATTEMPTS
) -> list[Path]:
    """The files of a `tardis://…` source, by symbol, type and day; fetches those that are not there.

    Raises as `local_files` does. What was fetched before an error stays.
    """
    endpoint = _endpoint(settings)
    files = _files(spec, download_dir(settings))
    missing = [file for file in files if not file.path.exists()]
    if missing:
        log.info("%s: fetching %d of %d files into %s", WHERE, len(missing), len(files), download_dir(settings))
        _make_folder(download_dir(settings))
        asyncio.run(_Download(settings.tardis.api_key.strip(), endpoint, attempts).fetch(missing, stop))
    return [file.path for file in files]


def _files(spec: SourceSpec, folder: Path) -> list[DataFile]:
    file_name = _client().default_file_name
    if spec.start is None or spec.end is None:
        raise ConfigError(f"{spec.text} names no days")
    days = [spec.start + timedelta(days=n) for n in range((spec.end - spec.start).days)]
    files = []
    for text in spec.symbols:
        symbol = text if text in GROUPS else native_symbol(spec.venue, text).upper()
        for data_type in spec.types:
            for day in days:
                path = folder / file_name(spec.venue, data_type, day, symbol, "csv")
                files.append(DataFile(spec.venue, data_type, symbol, day, path))
    return files


class _Download:
    def __init__(self, api_key: str, endpoint: str, attempts: int) -> None:
        self._key, self._endpoint, self._attempts = api_key, endpoint, attempts
        self._failed: dict[str, int] = {}
        self._why: dict[str, BaseException] = {}

    async def fetch(self, files: list[DataFile], stop: threading.Event | None) -> None:
        """All of them, some at a time; the first error ends it."""
        gate = asyncio.Semaphore(CONCURRENCY)
        with _watch_attempts(self._attempt_failed):
            tasks = {asyncio.create_task(self._one(file, gate)) for file in files}
            try:
                while tasks:
                    done, tasks = await asyncio.wait(tasks, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
                    if stop is not None and stop.is_set():
                        raise Unavailable(f"stopped before {WHERE} had sent everything")
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, file: DataFile, gate: asyncio.Semaphore) -> None:
        async with gate:
            try:
                with tempfile.TemporaryDirectory(prefix=".fetching-", dir=file.path.parent) as folder:
                    await self._fetch(file, Path(folder))
                    fetched = Path(folder) / file.path.name
                    await asyncio.to_thread(_check_whole, fetched, file)
                    os.replace(fetched, file.path)
            except OSError as error:
                _raise_disk(error, file.path.parent)
        log.info("%s: %s (%.1f MB)", WHERE, file, file.path.stat().st_size / 1e6)

    async def _fetch(self, file: DataFile, folder: Path) -> None:
        """Into the folder, under the file's name."""
        dest = str(folder / file.path.name)
        client = asyncio.create_task(
            _client().download_datasets_async(
                exchange=file.exchange,
                data_types=[file.data_type],
                symbols=[file.symbol],
                from_date=f"{file.day:%Y-%m-%d}",
                to_date=f"{file.day + timedelta(days=1):%Y-%m-%d}",
                api_key=self._key,
                download_dir=str(folder),
                endpoint=self._endpoint,
                timeout=SILENCE_SECONDS,
                get_filename=lambda *_: file.path.name,
            )
        )
        try:
            while not (await asyncio.wait([client], timeout=POLL_SECONDS))[0]:
                why = self._why.get(dest)
                if why is not None and (self._failed[dest] >= self._attempts or _is_disk(why)):
                    raise why
            client.result()
        except urllib.error.HTTPError as error:
            self._raise_http(error, file)
        except (aiohttp.ClientError, TimeoutError) as error:
            self._raise_network(error, file)
        finally:
            client.cancel()
            await asyncio.gather(client, return_exceptions=True)

    def _attempt_failed(self, dest: str, why: BaseException) -> None:
        """The client tries a file up to thirty times, over an hour: we give up earlier."""
        self._failed[dest] = self._failed.get(dest, 0) + 1
        self._why[dest] = why

    def _raise_http(self, error: urllib.error.HTTPError, file: DataFile) -> NoReturn:
        said = self._mask(error.msg)
        if error.code in (401, 403):
            if not self._key:
                raise AuthError(
                    f"{file} needs a Tardis API key (only the first day of a month is free): set TARDIS_API_KEY"
                ) from None
            raise AuthError(f"{WHERE} refused the API key for {file}: {said}; check TARDIS_API_KEY") from None
        if error.code in (400, 404):
            hint = "symbols=OPTIONS has them all" if file.data_type == "options_chain" else "check symbol, type and day"
            raise SourceError(
                f"{WHERE} has no {file} ({error.code}: {said}); {hint}, "
                f"https://api.tardis.dev/v1/exchanges/{file.exchange} lists what there is"
            ) from None
        raise Unavailable(f"{WHERE} does not send {file}: {error.code} {said}; try again later") from None

    def _raise_network(self, error: BaseException, file: DataFile) -> NoReturn:
        said = self._mask(str(error)) or type(error).__name__
        if isinstance(error, aiohttp.ClientPayloadError):
            raise Unavailable(f"{file} arrived truncated ({said}); try again") from None
        where = urlsplit(self._endpoint).netloc
        raise Unavailable(f"{WHERE} at {where} cannot be reached for {file}: {said}; check the network") from None

    def _mask(self, text: str) -> str:
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]
        return text.replace(self._key, "***") if self._key else text


def _client() -> Any:
    try:
        return import_module("tardis_dev")
    except ImportError:
        raise ConfigError(NEEDS_CLIENT) from None


class _Attempts(logging.Filter):
    """Sees the client's failed attempts, which it only logs, and keeps them out of our log."""

    def __init__(self, tell: Callable[[str, BaseException], None]) -> None:
        super().__init__()
        self._tell = tell

    def filter(self, record: logging.LogRecord) -> bool:
        args = record.args if isinstance(record.args, tuple) else ()
        error = next((a for a in args if isinstance(a, BaseException)), None)
        if error is not None and args and isinstance(args[0], str):
            self._tell(args[0], error)
        return record.levelno > logging.DEBUG


@contextmanager
def _watch_attempts(tell: Callable[[str, BaseException], None]) -> Iterator[None]:
    logger = logging.getLogger("tardis_dev._http")
    level, watcher = logger.level, _Attempts(tell)
    logger.addFilter(watcher)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeFilter(watcher)


def _check_whole(path: Path, file: DataFile) -> None:
    """Raises Unavailable unless it unpacks to its end."""
    try:
        if not path.stat().st_size:
            raise EOFError("it is empty")
        with gzip.open(path) as unpacked:
            while unpacked.read(BLOCK_BYTES):
                pass
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise Unavailable(f"{file} arrived damaged ({error}); try again") from None


def _is_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and not isinstance(
        error, aiohttp.ClientError | urllib.error.URLError | TimeoutError | ConnectionError
    )


def _raise_disk(error: OSError, folder: Path) -> NoReturn:
    raise TapelineError(
        f"cannot write {folder}: {error.strerror or error}; make room or set tardis.download_dir"
    ) from None


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".fetching-*"):  # by a process that was killed
            if left.stat().st_mtime < datetime.now().timestamp() - 86400:
                shutil.rmtree(left, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write {folder}: {error.strerror or error}; set tardis.download_dir to a folder that can be written"
        ) from None


def _endpoint(settings: Settings) -> str:
    """Raises ConfigError for an address that cannot be used, or that would show the key to the network."""
    text = settings.tardis.datasets_url.rstrip("/")
    try:
        url = urlsplit(text)
        host = url.hostname or ""
        if url.scheme not in ("http", "https") or not host:
            raise ValueError("no host")
    except ValueError:
        raise ConfigError(f"tardis.datasets_url '{text}' is no address: use https://HOST") from None
    if url.scheme == "http" and settings.tardis.api_key and not _loopback(host):
        raise ConfigError(f"tardis.datasets_url '{text}' would show the API key to the network: use https")
    return text if text.endswith("/v1") else f"{text}/v1"


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
