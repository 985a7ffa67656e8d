"""The low-rate messages on the bus: JSON that reads plainly in redis-cli.

Times are int64 nanoseconds UTC. Messages are immutable.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Message(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type"):
    """Base of all JSON messages."""


class Instrument(Message, frozen=True, tag="instrument"):
    """A definition or symbol mapping; published before the first record that uses it.

    `id` is `shared.instruments.instrument_id(venue, symbol)`. `kind` is Databento's
    `instrument_class` letter: F future (a perpetual has no expiration), C call, P put, K stock or
    spot, S/T/M spreads. `expiration_ns` orders contracts of a root; without a definition it is
    estimated from the symbol's month code (`estimated = True`). `ticker` is the continuous ticker
    that it competes for, its root if None; crypto symbols are each their own (`binance:BTCUSDT`).
    """

    id: int
    venue: str
    symbol: str
    root: str
    feed: str
    kind: str = "F"
    expiration_ns: int | None = None
    estimated: bool = False
    strike: float | None = None
    underlying: str | None = None
    multiplier: float | None = None
    tick_size: float | None = None
    defined_ns: int | None = None
    ticker: str | None = None


class Clock(Message, frozen=True, tag="clock"):
    """The feed's time stands at `watermark_ns`: no trade older than it is expected.

    `watched_from_ns` is set when a feed begins to be watched (connect, start of a file): warm-up
    counts from there. `final` says that the tape ends here. `grace_ns`, given with `watched_from_ns`:
    how far behind the newest event time of the feed's rows its watermark stays.
    """

    feed: str
    watermark_ns: int
    wall_ns: int | None = None
    watched_from_ns: int | None = None
    final: bool = False
    grace_ns: int = 0


class Gap(Message, frozen=True, tag="gap"):
    """Trades in [start_ns, end_ns) may be missing and cannot be recovered.

    `symbols` empty: every instrument of the feed.
    """

    feed: str
    start_ns: int
    end_ns: int
    reason: str
    symbols: tuple[str, ...] = ()


class Disconnect(Message, frozen=True, tag="disconnect"):
    """The feed dropped at `at_ns`; it may resume without loss.

    With `since_ns` it cannot: what lies behind that event time is suspect (of `symbols`, or of all)
    until a Gap with the same `start_ns` and symbols tells where the tape goes on.
    """

    feed: str
    at_ns: int
    reason: str
    since_ns: int | None = None
    symbols: tuple[str, ...] = ()


class Pressure(Message, frozen=True, tag="pressure"):
    """Option trades of one key in one window [time_window_ns, time_window_ns + window_sec).

    The key is (underlying, expiration_ns, strike, option_type `C` or `P`, time_window_ns). Volumes in
    contracts, `ask_volume` bought and `bid_volume` sold by the aggressor; `premium` = Σ price·size·multiplier,
    of it `ask_premium` bought and `bid_premium` sold. `mean_ns`: mean event time, weighted by size.
    `strike_rank`: place of the strike among those known of this underlying and expiration, from 0. A sweep is one
    aggressor through two prices or more within one event time, a block a trade of the product's block size or more.
    None is undefined; no number is ever infinite or NaN. `timestamp_out_ns` is the processing time.
    """

    underlying: str
    expiration_ns: int
    strike: float
    option_type: str
    time_window_ns: int
    window_sec: int
    bid_volume: float
    ask_volume: float
    unknown_volume: float
    pressure_ratio: float | None
    log_ratio: float
    dominant_side: str
    confidence: float
    total_trades: int
    avg_trade_size: float
    max_trade_size: float
    vwap: float | None
    premium: float
    ask_premium: float
    bid_premium: float
    open: float
    close: float
    first_ns: int
    last_ns: int
    mean_ns: int
    strike_rank: int
    sweeps: int = 0
    sweep_ask_volume: float = 0.0
    sweep_bid_volume: float = 0.0
    blocks: int = 0
    block_ask_volume: float = 0.0
    block_bid_volume: float = 0.0
    underlying_price: float | None = None
    moneyness: float | None = None
    days_to_expiry: float | None = None
    iv: float | None = None
    delta: float | None = None
    complete: bool = True
    revision: int = 0
    timestamp_out_ns: int = 0


class TopStrike(msgspec.Struct, frozen=True):
    """One of the strikes with the strongest pressure in a window."""

    expiration_ns: int
    strike: float
    option_type: str
    log_ratio: float
    volume: float


class PressureRollup(Message, frozen=True, tag="pressure_rollup"):
    """All option pressure of one underlying in one window; comes behind the window's Pressure messages.

    `call_pressure` and `put_pressure` are log ratios of the summed volumes, `put_call_ratio` is put volume over
    call volume (None without calls). Net premiums are bought less sold; `net_premium` is the calls' less the puts',
    so that above 0 is bullish. `strikes`: keys that traded.
    """

    underlying: str
    time_window_ns: int
    window_sec: int
    call_volume: float
    put_volume: float
    call_ask_volume: float
    call_bid_volume: float
    put_ask_volume: float
    put_bid_volume: float
    call_pressure: float
    put_pressure: float
    put_call_ratio: float | None
    premium: float
    net_call_premium: float
    net_put_premium: float
    net_premium: float
    strikes: int
    total_trades: int
    top_strikes: tuple[TopStrike, ...] = ()
    underlying_price: float | None = None
    complete: bool = True
    revision: int = 0
    timestamp_out_ns: int = 0


class Components(msgspec.Struct, frozen=True):
    """What a score is made of, see docs/concepts.md; None is undefined."""

    raw: float
    base: float
    significance: float
    trend: float
    concentration: float
    persistence: float
    z: float | None = None
    z_volume: float | None = None
    percentile: float | None = None
    volume_percentile: float | None = None
    volume_95: float | None = None
    market_maker: float = 0.0
    cluster_size: int = 1
    cluster_factor: float = 1.0


class Signal(Message, frozen=True, tag="signal"):
    """A verdict on one key and window, with all that led to it; or what a plug-in has to say.

    Unique by (underlying, expiration_ns, strike, option_type, time_window_ns, source): a later one has a higher
    `revision`. `status`: `emitted`, `monitor` (emitted, but perhaps a market maker's), `rejected` (`reason` says
    why), `withdrawn` (a revised window does not bear it out any more). `signal_type` is the first of `types`.
    `baseline`: `key_time`, `key`, `moneyness` or `insufficient`, of `baseline_size` samples.
    """

    underlying: str
    time_window_ns: int
    window_sec: int
    signal_type: str
    direction: str
    score: float
    grade: str
    expiration_ns: int = 0
    strike: float = 0.0
    option_type: str = ""
    source: str = "tapeline"
    types: tuple[str, ...] = ()
    status: str = "emitted"
    reason: str = ""
    baseline: str = ""
    baseline_size: int = 0
    components: Components | None = None
    log_ratio: float | None = None
    volume: float | None = None
    premium: float | None = None
    underlying_price: float | None = None
    moneyness: float | None = None
    complete: bool = True
    revision: int = 0
    timestamp_out_ns: int = 0


class Usage(Message, frozen=True, tag="usage"):
    """What a feed has used: in the interval that ends at `at_ns`, and (`day_…`) of the UTC day so far.

    `bytes` are those of the records as the vendor counts them. `state`: `running`, or `stopped` at the budget.
    """

    feed: str
    day: str
    at_ns: int
    events: int
    bytes: int
    connected_seconds: float
    cost_usd: float
    day_events: int
    day_bytes: int
    day_connected_seconds: float
    day_cost_usd: float
    budget_usd: float
    state: str = "running"


AnyMessage = Instrument | Clock | Gap | Disconnect | Pressure | PressureRollup | Signal | Usage

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(list[AnyMessage])


def encode(messages: list[Any]) -> bytes:
    """JSON array of messages."""
    return _encoder.encode(messages)


def decode(body: bytes) -> list[AnyMessage]:
    """Messages of a JSON frame body.

    Raises msgspec.DecodeError for anything that is not such an array.
    """
    try:
        return _decoder.decode(body)
    except (UnicodeDecodeError, RecursionError) as error:  # text that is none, nesting without an end
        raise msgspec.DecodeError(str(error)) from None
