"""Which instruments there are: those that the bus knows, else the series of the store."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from services.web.context import web_of
from services.web.problems import Json, once
from services.web.threads import Look
from shared.bus import Bus
from shared.errors import TapelineError
from shared.frames import iso
from shared.instrument_days import on_day
from shared.instruments import OPTION_CLASSES, is_spread, option_series, parse_outright
from shared.messages import Instrument
from shared.settings import Settings
from shared.store_pages import Names, Pages

router = APIRouter(prefix="/api/v1", tags=["instruments"])

SECONDS, PATIENCE_SECONDS, STORE_SECONDS = 1.0, 1.5, 10.0
# Of a bus whose count of instruments stands, they are read again so many looks later.
LOOKS = 30
_OPTION = re.compile(r"-\d+(?:\.\d+)?-[CP](?:-|$)")  # BTC-29MAR24-50000-C
KINDS = ("continuous", "future", "option", "perpetual", "spot", "spread")
Kind = Literal["continuous", "future", "option", "perpetual", "spot", "spread"]
# What has no candles comes only if it is asked for.
_ASKED_FOR = ("option", "spread")


class Listed(msgspec.Struct, frozen=True):
    """One that can be looked at; `name` is what `symbol` takes, `underlying` that of pressure and signals."""

    name: str
    exchange: str
    symbol: str
    kind: Kind
    root: str
    underlying: str | None
    rolling: bool
    expiration: str | None = None
    strike: float | None = None
    option_type: str | None = None


class Sought(BaseModel):
    model_config = ConfigDict(extra="forbid")

    q: str | None = Field(
        None, max_length=100, examples=["btc-usdt"],
        description="Part of a name or exchange; small or capital letters and separators make no difference.",
    )  # fmt: skip
    kind: Kind | None = Field(None, description="Only these; options and spreads come only so.")
    limit: int = Field(1000, ge=1, le=10_000, description="At most so many.")


def _schema() -> dict[str, Any]:
    null = {"type": ["string", "null"]}
    fields: dict[str, Any] = {name: {"type": "string"} for name in ("name", "exchange", "symbol", "root")} | {
        "kind": {"enum": list(KINDS)}, "underlying": null, "rolling": {"type": "boolean"},
        "expiration": null | {"format": "date-time"}, "strike": {"type": ["number", "null"]},
        "option_type": {"enum": ["C", "P", None]},
    }  # fmt: skip
    one = {"type": "object", "required": list(fields), "properties": fields, "additionalProperties": False}
    return {
        "type": "object", "required": ["instruments"], "properties": {"instruments": {"type": "array", "items": one}}
    }  # fmt: skip


@router.get(
    "/instruments", summary="What can be looked at", response_class=Response,
    responses={200: {"description": "The instruments.", "content": {"application/json": {"schema": _schema()}}}},
)  # fmt: skip
async def instruments(request: Request, asked: Annotated[Sought, Query()]) -> Response:
    """By root, continuous tickers first; what `q` names exactly, or what begins with it, before what only has it.

    `name` is what `symbol` takes, `underlying` what pressure and signals are asked by, `rolling` says whether there
    are `rolling` and `seconds` rows. Known by the bus; while that does not answer, by the store.
    """
    once(request)
    web, state = web_of(request), request.app.state
    if not hasattr(state, "known_instruments"):
        state.known_instruments = Known(web.settings, web.pages)
    known: Known = state.known_instruments
    return Json({"instruments": matching(await known.get(), asked.q or "", asked.kind)[: asked.limit]})


def matching(listed: Iterable[Listed], q: str, kind: str | None) -> list[Listed]:
    """Those that are sought, best first."""
    part = _plain(q)
    found = []
    for one in listed:
        if one.kind != kind and (kind is not None or one.kind in _ASKED_FOR):
            continue
        name, symbol = _plain(one.name), _plain(one.symbol)
        if part in (name, symbol):
            found.append((0, one))
        elif name.startswith(part) or symbol.startswith(part):
            found.append((1, one))
        elif part in name or part in _plain(one.exchange) + symbol:
            found.append((2, one))
    return [one for _, one in sorted(found, key=lambda match: match[0])]


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


class Known:
    """What the bus knows, or else the store, looked at when somebody asks."""

    def __init__(self, settings: Settings, pages: Pages) -> None:
        self._settings, self._pages = settings, pages
        self._counts: list[int] = []
        self._looks = 0
        self._held: list[Listed] | None = None
        self._bus_look = Look(self._look, SECONDS, "web-instruments")
        self._stored: tuple[float, list[Listed]] | None = None
        self._turn = asyncio.Lock()

    async def get(self) -> Sequence[Listed]:
        """Raises StoreUnavailable, ConfigError where the store is asked."""
        found = await self._bus_look.get(PATIENCE_SECONDS)
        if found:
            return found
        async with self._turn:
            if self._stored is None or time.monotonic() > self._stored[0]:
                self._stored = time.monotonic() + STORE_SECONDS, listed_of_store(await self._pages.names())
            return self._stored[1]

    def _look(self) -> list[Listed] | None:
        with suppress(TapelineError):  # what was known before is still the best
            self._read()
        return self._held

    def _read(self) -> None:
        s = self._settings
        bus = Bus(s.redis.url, s.tapeline.namespace, cluster=s.redis.cluster)
        try:
            held = bus.call("hget", bus.keys.deployment, "partitions")
            partitions = range(int(held or s.tapeline.partitions))
            counts = [int(bus.call("hlen", bus.keys.instruments(p))) for p in partitions]
            self._looks += 1
            if self._held is None or counts != self._counts or self._looks % LOOKS == 0:
                self._held = listed_of([i for p in partitions for i in on_day(bus, p, None)])
                self._counts = counts
        finally:
            bus.close()


def listed_of(found: Iterable[Instrument]) -> list[Listed]:
    """Instruments of the bus, with the continuous tickers that they have; by root, tickers first, then by expiry."""
    whole = list({(i.venue, i.symbol): i for i in found}.values())
    priced = {i.root for i in whole if i.kind in OPTION_CLASSES}
    exchanges: dict[str, set[str]] = {}
    for i in whole:
        for name in {i.symbol, i.ticker or i.root}:
            exchanges.setdefault(name, set()).add(i.venue)
    made: dict[tuple[str, str], Listed] = {}
    for i in whole:
        ticker, kind = i.ticker or i.root, _kind(i)
        underlying = i.root if i.root in priced else None
        alone = ticker in (i.symbol, f"{i.venue}:{i.symbol}")
        name = i.symbol if len(exchanges[i.symbol]) == 1 and not (alone and ":" in ticker) else f"{i.venue}:{i.symbol}"
        option = kind == "option"
        made[i.venue, i.symbol] = Listed(
            name, i.venue, i.symbol, kind, i.root, underlying, alone and kind not in _ASKED_FOR,
            None if i.expiration_ns is None else iso(i.expiration_ns)[:19] + "Z",
            i.strike if option else None, i.kind if option and i.kind in OPTION_CLASSES else None,
        )  # fmt: skip
        if not alone and kind not in _ASKED_FOR:
            sole = len(exchanges[ticker]) == 1
            name = ticker if sole else f"{i.venue}:{ticker}"
            made.setdefault(
                (i.venue, ticker), Listed(name, i.venue, ticker, "continuous", i.root, underlying, sole)
            )  # fmt: skip
    return sorted(made.values(), key=_order)


def _order(one: Listed) -> tuple[Any, ...]:
    never, first = one.expiration is None, one.kind != "continuous"
    return one.root, first, one.kind == "option", never, one.expiration or "", one.strike or 0.0, one.name


def _kind(i: Instrument) -> Kind:
    if i.kind in OPTION_CLASSES or (i.kind == "?" and option_series(i.symbol) is not None):
        return "option"
    if is_spread(i.symbol, i.kind, i.root):
        return "spread"
    if i.kind == "K":
        return "spot"
    return "perpetual" if i.expiration_ns is None and ":" in i.root else "future"


def listed_of_store(names: Names) -> list[Listed]:
    """Series of the store, whose names are all that is known of them; without options."""
    tickers, made = set(names.tickers), []
    count: dict[str, int] = {}
    for _, symbol in names.series:
        count[symbol] = count.get(symbol, 0) + 1
    for exchange, symbol in names.series:
        whole = f"{exchange}:{symbol}"
        if option_series(symbol) is not None or _OPTION.search(symbol):
            continue
        outright = parse_outright(symbol, 0)
        root = outright[0] if outright else symbol
        kind: Kind = "continuous" if symbol in tickers else "perpetual" if whole in tickers else "future"
        name = whole if whole in tickers or count[symbol] > 1 else symbol
        found = [u for u in names.underlyings if u == root or (u.startswith(f"{exchange}:") and whole.startswith(u))]
        underlying = max(found, key=len, default=None)
        made.append(
            Listed(name, exchange, symbol, kind, underlying or root, underlying, bool({symbol, whole} & tickers))
        )
    return sorted(made, key=_order)
