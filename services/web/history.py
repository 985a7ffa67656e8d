"""History: the rows of the store by range, page by page, as JSON, CSV or Parquet."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from services.web import formats
from services.web.context import web_of
from services.web.formats import JSON, MEDIA
from services.web.places import place_of
from services.web.problems import Json, bad, once
from shared.api_rows import rows_of_store
from shared.frames import FEATURE_COLUMNS
from shared.reader_bars import SECONDS, series_of
from shared.store_pages import NEWEST, OLDEST, Page, PageAsk, Pages
from shared.tables import TABLES

router = APIRouter(prefix="/api/v1", tags=["history"])

# Rows of a file that are in memory at once; as Python sees them each is of some thousand bytes.
PAGE_ROWS = 5000
DEFAULT_ROWS = 1000
_INSTANT = re.compile(
    r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d(?::\d\d)?)(?:[.,](\d{1,9}))?\d*\s?(Z|[+ -]\d\d:?\d\d)?)?", re.IGNORECASE
)
# What a store can hold; whoever asks beyond it means all.
_FIRST, _LAST = datetime(1700, 1, 1, tzinfo=UTC), datetime(2260, 1, 1, tzinfo=UTC)

Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
Instant = Annotated[str, StringConstraints(min_length=10, max_length=40, pattern=r"^[0-9][0-9TtZz:., +-]+$")]
SYMBOL = "A continuous ticker or a contract (`ES`, `ESZ6`), or `exchange:symbol` (`binance-futures:BTCUSDT`)."


class Range(BaseModel):
    """What every table is asked with."""

    model_config = ConfigDict(extra="forbid")

    since: Instant | None = Field(
        None, description="Only rows from this instant on: ISO, UTC where it says no zone.",
        examples=["2026-11-21T14:00:00Z"],
    )  # fmt: skip
    until: Instant | None = Field(None, description="Only rows before this instant.", examples=["2026-11-22"])
    limit: int | None = Field(
        None, ge=1, le=1 << 31,
        description="At most so many rows: 1000 by default, of JSON up to the setting web.max_rows, of files up to "
        "web.max_export_rows.",
    )  # fmt: skip
    order: Literal["newest", "oldest"] = Field(
        "newest", description="`newest`: the last rows of the range, `next` leads back; `oldest`: the first ones, on."
    )
    cursor: str | None = Field(
        None, min_length=1, max_length=1000, pattern=r"^[A-Za-z0-9_-]+$",
        description="The `next` of the page before this one (of a file its header X-Next-Cursor).",
    )  # fmt: skip
    columns: str | None = Field(
        None, min_length=1, max_length=4000, description="Only these columns, comma-separated.",
        examples=["timestamp_in,close,volume"],
    )  # fmt: skip
    format: Literal["json", "csv", "parquet"] | None = Field(
        None, description="Without it the Accept header decides; JSON if that takes anything."
    )


class CandleRange(Range):
    symbol: Name = Field(description=SYMBOL, examples=["ES"])
    timeframe: Name = Field(
        "1m", examples=["1m"],
        description="A length (`15s`, `1m`, `4h`), `rolling` (the last minute, each second) or `seconds`.",
    )  # fmt: skip


class FeatureRange(Range):
    symbol: Name = Field(description=SYMBOL, examples=["ES"])
    timeframe: Literal["15s", "1m"] = Field("1m", description="Only candles of these lengths carry features.")


class TickerRange(Range):
    symbol: Name = Field(description="A continuous ticker, or of crypto `exchange:symbol`.", examples=["ES"])


class UnderlyingRange(Range):
    underlying: Name | None = Field(
        None, description="Whose options: a root, or `exchange:coin`; of all without it.", examples=["ES"]
    )


def _underlying(asked: UnderlyingRange) -> dict[str, Any]:
    return {} if asked.underlying is None else {"underlying": asked.underlying}


class PressureRange(UnderlyingRange):
    expiration: Instant | None = Field(None, description="As in the rows.", examples=["2026-12-18T21:00:00Z"])
    strike: float | None = Field(None, allow_inf_nan=False, examples=[6000])
    option_type: Literal["C", "P"] | None = Field(None, description="Calls or puts.")


class SignalRange(Range):
    underlying: Name | None = Field(None, examples=["ES"])
    status: Name | None = Field(
        None, description="`emitted`, `monitor`, `rejected` or `withdrawn`.", examples=["emitted"]
    )
    grade: Name | None = Field(None, examples=["HIGH"])
    source: Name | None = Field(None, description="Who judged: `tapeline`, or the name of a plug-in.")


class GapRange(Range):
    feed: Name | None = Field(None, examples=["databento"])


class Table(NamedTuple):
    """Rows that a request asks for: of which table, and on which channel and topic they are live."""

    table: str
    where: Mapping[str, Any]
    channel: str
    topic: str
    columns: Sequence[str] | None = None
    above: Mapping[str, float] = {}
    names: Sequence[str] = ()
    told: str = ""  # what the answer calls the table, if not by its name


def _answers(
    tables: Sequence[str], columns: Sequence[str] | None = None, told: str = ""
) -> dict[int | str, dict[str, Any]]:
    """How the answers look, for the API's description."""
    rows = [formats.row_schema(table, columns) for table in tables]
    page = {
        "type": "object",
        "required": ["table", "rows", "next", "id"],
        "additionalProperties": False,
        "properties": {
            "table": {"enum": [told] if told else list(tables)},
            "rows": {
                "type": "array", "description": "Ascending by time, then by the rest of the key.",
                "items": rows[0] if len(rows) == 1 else {"anyOf": rows},
            },
            "next": {"type": ["string", "null"], "description": "`cursor` of the next page; null: there is none."},
            "id": {
                "type": ["string", "null"],
                "description": "`after` for a live subscription to the same: it goes on where these rows end. Null "
                "while that cannot be said.",
            },
        },
    }  # fmt: skip
    text = {"type": "string"}
    return {
        200: {
            "description": "The rows.",
            "headers": {"X-Next-Cursor": {"description": "`next` of a CSV or Parquet file.", "schema": text}},
            "content": {
                MEDIA[formats.JSON]: {"schema": page},
                MEDIA[formats.CSV]: {"schema": text},
                MEDIA[formats.PARQUET]: {"schema": text | {"contentEncoding": "binary"}},
            },
        }
    }


_ROLLING = (*(table.name for table in TABLES.values()),)
_FEATURES = (*TABLES["candle"].key, *FEATURE_COLUMNS)


@router.get("/candles", summary="Candles of a series", response_class=Response, responses=_answers(_ROLLING))
async def candles(request: Request, asked: Annotated[CandleRange, Query()]) -> Response:
    """Rows of `candles`, or of `candles_1m` (`rolling`) and `candles_1s` (`seconds`), which are of tickers.

    A symbol without its exchange is looked for on all of them; if several have it, it must be written with its own.
    """
    series = series_of(asked.symbol, asked.timeframe)
    of = Table(series.table.name, series.where, "candles", "candles", names=(asked.symbol, asked.timeframe))
    return await _answer(request, asked, of)


@router.get(
    "/features", summary="Features of a series", response_class=Response,
    responses=_answers(["candles"], _FEATURES, "features"),
)  # fmt: skip
async def features(request: Request, asked: Annotated[FeatureRange, Query()]) -> Response:
    """The feature columns of candles, and their key."""
    series = series_of(asked.symbol, asked.timeframe)
    names = (asked.symbol, asked.timeframe)
    of = Table("candles", series.where, "candles", "candles", _FEATURES, names=names, told="features")
    return await _answer(request, asked, of)


@router.get(
    "/big-trades", summary="Seconds with big trades", response_class=Response, responses=_answers(["candles_1s"])
)
async def big_trades(request: Request, asked: Annotated[TickerRange, Query()]) -> Response:
    """Rows of `candles_1s` in which there were big trades."""
    series = series_of(asked.symbol, SECONDS)
    above = {"big_trades": 0}
    of = Table(series.table.name, series.where, "candles", "candles", above=above, names=("big-trades", asked.symbol))
    return await _answer(request, asked, of)


@router.get(
    "/pressure", summary="Option pressure by strike", response_class=Response, responses=_answers(["pressure_metrics"])
)
async def pressure(request: Request, asked: Annotated[PressureRange, Query()]) -> Response:
    """Rows of `pressure_metrics`: the option trades of a strike in a window."""
    where: dict[str, Any] = _underlying(asked)
    if asked.expiration is not None:
        where["expiration"] = instant("expiration", asked.expiration)[:19] + "Z"
    where |= {n: v for n, v in (("strike", asked.strike), ("option_type", asked.option_type)) if v is not None}
    return await _answer(
        request, asked, Table("pressure_metrics", where, "pressure", "pressure", names=[*_underlying(asked).values()])
    )


@router.get(
    "/rollups", summary="Option pressure of an underlying", response_class=Response,
    responses=_answers(["pressure_rollups"]),
)  # fmt: skip
async def rollups(request: Request, asked: Annotated[UnderlyingRange, Query()]) -> Response:
    """Rows of `pressure_rollups`: all options of an underlying in a window."""
    where = _underlying(asked)
    return await _answer(
        request, asked, Table("pressure_rollups", where, "rollups", "pressure", names=[*where.values()])
    )


@router.get("/signals", summary="Signals", response_class=Response, responses=_answers(["signals"]))
async def signals(request: Request, asked: Annotated[SignalRange, Query()]) -> Response:
    """Rows of `signals`: verdicts on option pressure, with all that led to each."""
    found = {name: getattr(asked, name) for name in ("underlying", "status", "grade", "source")}
    where = {name: value for name, value in found.items() if value is not None}
    return await _answer(request, asked, Table("signals", where, "signals", "signals", names=[*where.values()]))


@router.get("/gaps", summary="Gaps in the data", response_class=Response, responses=_answers(["gaps"]))
async def gaps(request: Request, asked: Annotated[GapRange, Query()]) -> Response:
    """Rows of `gaps`: what a feed could not recover."""
    where = {} if asked.feed is None else {"feed": asked.feed}
    return await _answer(request, asked, Table("gaps", where, "gaps", "candles", names=[*where.values()]))


def instant(name: str, text: str) -> str:
    """An instant as the stores write it, in ns. Raises Problem (400)."""
    match = _INSTANT.fullmatch(text.strip())
    try:
        if match is None:
            raise ValueError
        day, time, fraction, zone = match.groups()
        # A plus sign in a query is a space, unless it was written %2B.
        zone = (zone or "Z").upper().replace(" ", "+")
        at = datetime.fromisoformat(f"{day}T{time or '00:00'}{zone}")
        at = min(max(at, _FIRST), _LAST).astimezone(UTC)
    except (ValueError, OverflowError):
        raise bad(f"{name}: '{text}' is no instant; write 2026-11-21T14:31:00Z") from None
    digits = "" if at in (_FIRST, _LAST) else fraction or ""
    return f"{at:%Y-%m-%dT%H:%M:%S}.{digits:0<9}Z"


async def _answer(request: Request, asked: Range, of: Table) -> Response:
    """The rows that are asked for, in the format that is asked for. Raises Problem, ConfigError, StoreUnavailable."""
    once(request)
    web = web_of(request)
    since, until = (None if t is None else instant(n, t) for n, t in (("since", asked.since), ("until", asked.until)))
    if since is not None and until is not None and since > until:
        raise bad("since is later than until")
    format_ = formats.format_of(request, asked.format)
    most = web.settings.web.max_rows if format_ == JSON else web.settings.web.max_export_rows
    limit = min(DEFAULT_ROWS, most) if asked.limit is None else asked.limit
    if limit > most:
        how = "page by page with `cursor`, or as CSV or Parquet" if format_ == JSON else "file by file with `cursor`"
        raise bad(f"limit: at most {most} rows of {format_}; ask for more {how}")
    columns = formats.columns_asked(of.table, asked.columns, of.columns)
    ask = PageAsk(
        of.table, of.where, since, until, limit, asked.order, asked.cursor, columns, of.topic, of.above
    )  # fmt: skip
    if format_ == JSON:
        page = await web.pages.page(ask)
        return await asyncio.to_thread(_page, of, page, await place_of(web.hub, page.cursors, of.channel))
    first, segments = await _plan(web.pages, ask)
    headers = {
        "Content-Disposition": f'attachment; filename="{formats.file_name([of.told or of.table, *of.names], format_)}"',
        "Vary": "Accept",
    }
    if segments[-1].upto is not None:
        headers["X-Next-Cursor"] = segments[-1].upto
    writer = await asyncio.to_thread(formats.writer_of, format_, of.table, columns)
    media = MEDIA[format_] + ("; charset=utf-8; header=present" if format_ == formats.CSV else "")
    pages = _pages(web.pages, first, segments)
    return StreamingResponse(formats.written(pages, writer), headers=headers, media_type=media)


def _page(of: Table, page: Page, place: str | None) -> Response:
    rows = rows_of_store(of.table, page.rows)
    answer = {"table": of.told or of.table, "rows": rows, "next": page.next, "id": place}
    return Json(answer, headers={"Vary": "Accept"})


async def _plan(pages: Pages, ask: PageAsk) -> tuple[Page | None, list[PageAsk]]:
    """How a file of `limit` rows is read: in segments of PAGE_ROWS, as seen from the end that it begins at.

    The last segment's `upto` is the cursor of the next file, None where there is none. The page of a file that has only
    one comes along.
    """
    one = ask._replace(limit=min(PAGE_ROWS, ask.limit), topic="")
    page = await pages.page(one)
    if page.next is None or one.limit == ask.limit:
        return page, [one._replace(upto=page.next)]
    # Where each segment ends must be known first: the newest rows are to be written from the oldest on, and the next
    # file's cursor comes before this one.
    left, segments = ask.limit - one.limit, [one._replace(upto=page.next)]
    while page.next is not None and left:
        walk = one._replace(cursor=page.next, limit=min(PAGE_ROWS, left), columns=())
        page = await pages.page(walk)
        left -= walk.limit
        segments.append(walk._replace(upto=page.next, columns=ask.columns))
    return None, segments


async def _pages(pages: Pages, first: Page | None, segments: Sequence[PageAsk]) -> AsyncIterator[formats.Rows]:
    """The rows of a file, the oldest first. Rows that came between those of a segment meanwhile are among them."""
    if first is not None:
        yield first.rows
        return
    for segment in segments if segments[0].order == OLDEST else reversed(segments):
        page = await pages.page(segment)
        rows = page.rows
        while page.next is not None:
            page = await pages.page(segment._replace(cursor=page.next))
            rows = page.rows + rows if segment.order == NEWEST else rows + page.rows
        yield rows
