-- Views for people and dashboards: `time` comes first.

-- Fixed candles of all timeframes, `time` being the candle's start, without the columns of `features`.
CREATE VIEW v_candles AS
SELECT
    timestamp_in AS time, exchange, symbol, timeframe, open, high, low, close, volume, trades, vwap,
    ask_volume, bid_volume, unknown_volume, vd, cvd_open, cvd_high, cvd_low, cvd_close,
    quoted_spread, bid_price, bid_size, ask_price, ask_size, book_imbalance_5,
    mark_price, index_price, open_interest, funding_rate, liquidated_long_volume, liquidated_short_volume,
    complete, revision, timestamp_out, latency_ms
FROM candles;

-- Option pressure by strike, `time` being the window's start; `net_premium` is what was bought less what was sold.
CREATE VIEW v_pressure AS
SELECT
    time_window AS time, underlying, expiration, strike, option_type, window_seconds,
    bid_volume, ask_volume, unknown_volume, bid_volume + ask_volume + unknown_volume AS volume,
    pressure_ratio, log_ratio, dominant_side, confidence, total_trades, avg_trade_size, max_trade_size, vwap,
    premium, ask_premium, bid_premium, ask_premium - bid_premium AS net_premium, open, close,
    first_trade, last_trade, mean_trade, strike_rank,
    sweeps, sweep_ask_volume, sweep_bid_volume, blocks, block_ask_volume, block_bid_volume,
    underlying_price, moneyness, days_to_expiry, iv, delta, complete, revision, created_at, timestamp_out, latency_ms
FROM pressure_metrics;

-- Signals, `time` being the start of the window that they judge.
CREATE VIEW v_signals AS
SELECT
    time_window AS time, underlying, expiration, strike, option_type, source, type, types, direction, status, reason,
    score, grade, window_seconds, baseline, baseline_size, raw, base, significance, trend, concentration, persistence,
    z, z_volume, percentile, volume_percentile, volume_95, market_maker, cluster_factor, cluster_size,
    log_ratio, volume, premium, underlying_price, moneyness, complete, revision, timestamp_out, latency_ms
FROM signals;

-- The newest row of each name, `time` being its window's end: of a ticker the rolling minute (`source` candles_1m, no
-- exchange), of an exchange's symbol the fixed candle of its shortest timeframe (`source` candles). Names are looked up
-- from one to the next in the keys' indexes, so this reads a few rows of each (of the columnstore, too, which takes no
-- comparison of whole rows).
CREATE VIEW v_latest AS
WITH RECURSIVE tickers AS (
    (SELECT ticker FROM candles_1m ORDER BY ticker LIMIT 1)
    UNION ALL
    SELECT (SELECT c.ticker FROM candles_1m AS c WHERE c.ticker > t.ticker ORDER BY c.ticker LIMIT 1)
    FROM tickers AS t WHERE t.ticker IS NOT NULL
),
series AS (
    (SELECT exchange, symbol, timeframe FROM candles ORDER BY exchange, symbol, timeframe LIMIT 1)
    UNION ALL
    SELECT following.exchange, following.symbol, following.timeframe
    FROM series AS s, LATERAL (
        (
            SELECT 1 AS step, c.exchange, c.symbol, c.timeframe FROM candles AS c
            WHERE c.exchange = s.exchange AND c.symbol = s.symbol AND c.timeframe > s.timeframe
            ORDER BY c.timeframe LIMIT 1
        )
        UNION ALL
        (
            SELECT 2, c.exchange, c.symbol, c.timeframe FROM candles AS c
            WHERE c.exchange = s.exchange AND c.symbol > s.symbol ORDER BY c.symbol, c.timeframe LIMIT 1
        )
        UNION ALL
        (
            SELECT 3, c.exchange, c.symbol, c.timeframe FROM candles AS c
            WHERE c.exchange > s.exchange ORDER BY c.exchange, c.symbol, c.timeframe LIMIT 1
        )
        ORDER BY step LIMIT 1
    ) AS following
),
lengths AS (
    SELECT
        exchange, symbol, timeframe,
        left(timeframe, -1)::integer * CASE right(timeframe, 1) WHEN 's' THEN interval '1 second'
            WHEN 'm' THEN interval '1 minute' WHEN 'h' THEN interval '1 hour' WHEN 'd' THEN interval '24 hours'
            ELSE interval '168 hours' END AS length
    FROM series
),
shortest AS (
    SELECT DISTINCT ON (exchange, symbol) exchange, symbol, timeframe, length
    FROM lengths ORDER BY exchange, symbol, length
)
SELECT
    newest.time, 'candles_1m' AS source, '' COLLATE "C" AS exchange, newest.ticker AS name, newest.symbol,
    '1m' AS timeframe, newest.open, newest.high, newest.low, newest.close, newest.volume, newest.trades, newest.vwap,
    newest.ask_volume, newest.bid_volume, newest.vd, newest.cvd_close, newest.complete, newest.revision,
    newest.timestamp_out, newest.latency_ms
FROM tickers, LATERAL (
    SELECT * FROM candles_1m AS c WHERE c.ticker = tickers.ticker ORDER BY c.time DESC LIMIT 1
) AS newest
UNION ALL
SELECT
    newest.timestamp_in + shortest.length, 'candles', newest.exchange, newest.exchange || ':' || newest.symbol,
    newest.symbol, newest.timeframe, newest.open, newest.high, newest.low, newest.close, newest.volume, newest.trades,
    newest.vwap, newest.ask_volume, newest.bid_volume, newest.vd, newest.cvd_close, newest.complete, newest.revision,
    newest.timestamp_out, newest.latency_ms
FROM shortest, LATERAL (
    SELECT * FROM candles AS c
    WHERE c.exchange = shortest.exchange AND c.symbol = shortest.symbol AND c.timeframe = shortest.timeframe
    ORDER BY c.timestamp_in DESC LIMIT 1
) AS newest;
