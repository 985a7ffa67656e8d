"""Logging: JSON lines off a terminal, readable lines on one; no secret gets through.

Fields: `time` (UTC), `level`, `service`, `worker`, `partition` and `symbol` (null when the line is about none, or about
all), `module` (which `tapeline.log_levels` may name), `message`, and `trace` when there is one. Partition and symbol
come as `extra={"partition": 3, "symbol": "ESZ6"}`, see `names`; threads named `<service>-<partition>`, and those of a
sink's readers, say their partition by themselves.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TextIO
from urllib.parse import unquote, urlsplit

import click
import msgspec

from shared.settings import SECRETS, Settings

MASK = "***"
# The user:password part of any URL, whoever wrote it into a message.
_CREDENTIALS = re.compile(r"(?P<scheme>[a-zA-Z][\w+.-]*://)[^\s/@'\"]*:[^\s@'\"]+@")
_PASSWORD_ITEM = re.compile(r"(?i)([?&]password=)[^&\s'\"]+")
# Shorter pieces of a secret URL are words like `api`, and hiding them would only spoil the log.
_TOKEN = 8
_SECRET_KEY = re.compile(r"(?i)key|token|pass|secret|sig|auth")
# Of several symbols a line names so many.
_NAMED = 10
_COLOURS = {"DEBUG": "bright_black", "WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}
# Libraries that tell too much of themselves; tapeline.log_levels may ask for it.
_QUIET = ("databento", "numba", "asyncio", "urllib3")


class Masker:
    """Replaces every secret of the settings, and credentials in any URL, by `***`."""

    def __init__(self, settings: Settings | None = None) -> None:
        values: set[str] = set()
        if settings is not None:
            for secret in SECRETS:
                section, name = secret.split(".")
                value = getattr(getattr(settings, section), name)
                if isinstance(value, dict):
                    for url in value.values():
                        values |= url_secrets(url)
                else:
                    values.add(str(value))
            for url in (settings.redis.url, settings.tapeline.store):
                password = _password(url)
                values |= {password, unquote(password)}
        # The longest first, so that no secret survives as the rest of a longer one.
        self._values = sorted((v for v in values if len(v) >= 4), key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, MASK)
        text = _CREDENTIALS.sub(rf"\g<scheme>{MASK}@", text)
        return _PASSWORD_ITEM.sub(rf"\1{MASK}", text)


def url_secrets(url: str) -> set[str]:
    """All of a secret URL that must not be told: itself, its path, and whatever in it looks like a token."""
    tail = url.partition("://")[2]
    authority, _, path = re.sub(r"[?#].*", "", tail).partition("/")
    user, _, host = authority.rpartition("@")
    name, _, password = user.partition(":")
    items = [item.partition("=") for item in re.split(r"[?&#]", tail)[1:]]
    found = {url, tail, password, *(() if password else (name,))}
    found |= {word for word in (f"/{path}", tail.partition("/")[2]) if len(word) >= _TOKEN}
    # Beside webhooks, the place of a host often holds a token (discord://ID/TOKEN).
    hosts = () if url.startswith(("http", "json", "xml", "form")) else (host, *host.split(":"))
    found |= {word for word in (name, *hosts, *path.split("/")) if _is_token(word)}
    found |= {value for key, _, value in items if _is_token(value) or (_SECRET_KEY.search(key) and len(value) >= 4)}
    return found | {unquote(word) for word in found} - {""}


def _is_token(word: str) -> bool:
    return len(word) >= _TOKEN and (len(word) >= 20 or not (word.isalpha() and word.islower()))


def _password(url: str) -> str:
    try:
        return urlsplit(url).password or ""
    except ValueError:
        return ""


def names(symbols: Sequence[str]) -> str | None:
    """The field `symbol` of a line about these; None for none, which means all."""
    more = f" and {len(symbols) - _NAMED} more" if len(symbols) > _NAMED else ""
    return ",".join(symbols[:_NAMED]) + more if symbols else None


class _Formatter(logging.Formatter):
    def __init__(self, service: str, worker: str, mask: Masker) -> None:
        super().__init__()
        self.service, self.worker, self.mask = service, worker, mask
        self._thread = re.compile(rf"^(?:{re.escape(service)}|sink)-(\d+)$")

    def partition(self, record: logging.LogRecord) -> int | None:
        if hasattr(record, "partition"):
            return record.partition if isinstance(record.partition, int) else None
        found = self._thread.match(record.threadName or "")
        return int(found[1]) if found else None

    def symbol(self, record: logging.LogRecord) -> str | None:
        given = getattr(record, "symbol", None)
        return self.mask(given) if isinstance(given, str) and given else None

    def trace(self, record: logging.LogRecord) -> str:
        return self.formatException(record.exc_info) if record.exc_info else ""


class JsonFormatter(_Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
            "level": record.levelname,
            "service": self.service,
            "worker": self.worker,
            "partition": self.partition(record),
            "symbol": self.symbol(record),
            "module": record.name,
            "message": self.mask(record.getMessage()),
        }
        trace = self.trace(record)
        if trace:
            line["trace"] = self.mask(trace)
        return msgspec.json.encode(line).decode()


class PlainFormatter(_Formatter):
    """For people: `14:03:22.512 WARNING aggregate-1 p3 ESZ6: message`, the level in colour on a terminal."""

    coloured = False

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S.%f")[:-3]
        partition = self.partition(record)
        where = self.worker + (f" p{partition}" if partition is not None else "")
        where += f" {symbol}" if (symbol := self.symbol(record)) else ""
        trace = self.trace(record)
        level = record.levelname
        if self.coloured and level in _COLOURS:
            level = click.style(level, fg=_COLOURS[level])
        return self.mask(f"{at} {level} {where}: {record.getMessage()}" + (f"\n{trace}" if trace else ""))


def setup(settings: Settings, service: str, worker: str = "", stream: TextIO | None = None) -> None:
    """Send this process's log to stderr (or `stream`) as the settings say.

    A module of `tapeline.log_levels` takes those below it along, other programs' modules, too.
    """
    out = stream or sys.stderr
    style = settings.tapeline.log_format
    plain = style == "plain" or (style == "auto" and out.isatty())
    kind = PlainFormatter if plain else JsonFormatter
    handler = logging.StreamHandler(out)
    formatter = kind(service, worker or f"{service}:{os.getpid()}", Masker(settings))
    if isinstance(formatter, PlainFormatter):
        formatter.coloured = out.isatty() and not os.environ.get("NO_COLOR")
    handler.setFormatter(formatter)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(settings.tapeline.log_level)
    logging.captureWarnings(True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name, level in settings.tapeline.log_levels.items():
        logging.getLogger(name).setLevel(level)
