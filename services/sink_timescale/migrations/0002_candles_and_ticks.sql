-- Fixed candles of all timeframes; `timestamp_in` is the candle's start.
CREATE TABLE candles (
    exchange text COLLATE "C" NOT NULL,
    symbol text COLLATE "C" NOT NULL,
    timeframe text COLLATE "C" NOT NULL,
    timestamp_in timestamptz NOT NULL,
    open double precision,
    high double precision,
    low double precision,
    close double precision,
    volume double precision NOT NULL,
    trades bigint NOT NULL,
    vwap double precision,
    ask_volume double precision,
    bid_volume double precision,
    unknown_volume double precision,
    vd double precision,
    cvd_open double precision,
    cvd_high double precision,
    cvd_low double precision,
    cvd_close double precision,
    quoted_spread double precision,
    bid_price double precision,
    bid_size double precision,
    ask_price double precision,
    ask_size double precision,
    book_imbalance_5 double precision,
    mark_price double precision,
    index_price double precision,
    open_interest double precision,
    funding_rate double precision,
    liquidated_long_volume double precision,
    liquidated_short_volume double precision,
    sma_5 double precision,
    sma_10 double precision,
    sma_20 double precision,
    ema_5 double precision,
    ema_10 double precision,
    ema_20 double precision,
    wma_5 double precision,
    momentum_3 double precision,
    momentum_5 double precision,
    velocity double precision,
    acceleration double precision,
    volume_sma_5 double precision,
    volume_ema_5 double precision,
    volume_ratio double precision,
    vwap_deviation double precision,
    volatility_5 double precision,
    volatility_10 double precision,
    high_low_ratio double precision,
    log_return double precision,
    trade_intensity double precision,
    avg_trade_size double precision,
    price_impact double precision,
    spread_proxy double precision,
    order_flow_imbalance double precision,
    kyle_lambda double precision,
    vpin double precision,
    rsi_5 double precision,
    bollinger_position double precision,
    macd double precision,
    macd_signal double precision,
    macd_hist double precision,
    complete boolean NOT NULL,
    revision bigint NOT NULL,
    timestamp_out timestamptz NOT NULL,
    latency_ms double precision NOT NULL,
    PRIMARY KEY (exchange, symbol, timeframe, timestamp_in),
    CHECK (volume >= 0 AND trades >= 0 AND revision >= 0 AND high >= low)
);
CREATE INDEX candles_time ON candles (timestamp_in);

CREATE VIEW features AS
SELECT
    exchange, symbol, timeframe, timestamp_in,
    sma_5, sma_10, sma_20, ema_5, ema_10, ema_20, wma_5, momentum_3, momentum_5, velocity,
    acceleration, volume_sma_5, volume_ema_5, volume_ratio, vwap_deviation, volatility_5,
    volatility_10, high_low_ratio, log_return, trade_intensity, avg_trade_size, price_impact,
    spread_proxy, order_flow_imbalance, kyle_lambda, vpin, rsi_5, bollinger_position, macd,
    macd_signal, macd_hist
FROM candles WHERE timeframe IN ('15s', '1m');

-- The candles as ORM users know them. Units: 1 second, 2 minute, 3 hour, 4 day, 5 week, 6 month. `id` is unique among
-- the bars of one contract and timeframe: their number since 1970 in steps of the timeframe, moved by a hash of both.
CREATE INDEX candles_bars ON candles (
    (exchange || ':' || symbol), (strpos('smhdw', right(timeframe, 1))), (left(timeframe, -1)::integer), timestamp_in
);
CREATE VIEW ohlc_bars AS
SELECT
    (
        (
            hashtext(exchange || ':' || symbol || ':' || timeframe)::bigint + extract(epoch FROM timestamp_in)::bigint / (
                left(timeframe, -1)::integer
                * CASE right(timeframe, 1) WHEN 's' THEN 1 WHEN 'm' THEN 60 WHEN 'h' THEN 3600 WHEN 'd' THEN 86400
                  ELSE 604800 END
            )
        ) & 2147483647
    )::integer AS id,
    exchange || ':' || symbol AS contract_id,
    timestamp_in AS timestamp, open, high, low, close, volume,
    strpos('smhdw', right(timeframe, 1)) AS timeframe_unit,
    left(timeframe, -1)::integer AS timeframe_value
FROM candles;

-- Raw records. Equal ticks are no duplicates, so the key is the place on the bus: the stream entry and the row in it
-- (and the time, for a hypertable's key has to hold it).
CREATE TABLE ticks_trades (
    timestamp timestamptz NOT NULL,
    timestamp_ns bigint NOT NULL,
    local_timestamp_ns bigint NOT NULL,
    exchange text COLLATE "C" NOT NULL,
    symbol text COLLATE "C" NOT NULL,
    price double precision,
    amount double precision,
    side text COLLATE "C" NOT NULL,
    sequence bigint NOT NULL,
    bid_price double precision,
    bid_amount double precision,
    ask_price double precision,
    ask_amount double precision,
    bus text COLLATE "C" NOT NULL,
    partition integer NOT NULL,
    entry_ms bigint NOT NULL,
    entry_seq bigint NOT NULL,
    row integer NOT NULL,
    PRIMARY KEY (bus, partition, entry_ms, entry_seq, row, timestamp),
    CHECK (side IN ('BUY', 'SELL', 'UNKNOWN'))
);
CREATE INDEX ticks_trades_time ON ticks_trades (timestamp);
CREATE INDEX ticks_trades_symbol ON ticks_trades (exchange, symbol, timestamp);

CREATE TABLE ticks_book_snapshots (
    timestamp timestamptz NOT NULL,
    timestamp_ns bigint NOT NULL,
    local_timestamp_ns bigint NOT NULL,
    exchange text COLLATE "C" NOT NULL,
    symbol text COLLATE "C" NOT NULL,
    depth integer NOT NULL,
    bid_price double precision,
    bid_amount double precision,
    ask_price double precision,
    ask_amount double precision,
    book_imbalance_5 double precision,
    bids jsonb NOT NULL,
    asks jsonb NOT NULL,
    bus text COLLATE "C" NOT NULL,
    partition integer NOT NULL,
    entry_ms bigint NOT NULL,
    entry_seq bigint NOT NULL,
    row integer NOT NULL,
    PRIMARY KEY (bus, partition, entry_ms, entry_seq, row, timestamp)
);
CREATE INDEX ticks_book_snapshots_time ON ticks_book_snapshots (timestamp);
CREATE INDEX ticks_book_snapshots_symbol ON ticks_book_snapshots (exchange, symbol, timestamp);

CREATE TABLE ticks_derivative_ticker (
    timestamp timestamptz NOT NULL,
    timestamp_ns bigint NOT NULL,
    local_timestamp_ns bigint NOT NULL,
    exchange text COLLATE "C" NOT NULL,
    symbol text COLLATE "C" NOT NULL,
    last_price double precision,
    open_interest double precision,
    funding_rate double precision,
    predicted_funding_rate double precision,
    funding_timestamp timestamptz,
    mark_price double precision,
    index_price double precision,
    bus text COLLATE "C" NOT NULL,
    partition integer NOT NULL,
    entry_ms bigint NOT NULL,
    entry_seq bigint NOT NULL,
    row integer NOT NULL,
    PRIMARY KEY (bus, partition, entry_ms, entry_seq, row, timestamp)
);
CREATE INDEX ticks_derivative_ticker_time ON ticks_derivative_ticker (timestamp);
CREATE INDEX ticks_derivative_ticker_symbol ON ticks_derivative_ticker (exchange, symbol, timestamp);

CREATE TABLE ticks_liquidations (
    timestamp timestamptz NOT NULL,
    timestamp_ns bigint NOT NULL,
    local_timestamp_ns bigint NOT NULL,
    exchange text COLLATE "C" NOT NULL,
    symbol text COLLATE "C" NOT NULL,
    price double precision,
    amount double precision,
    side text COLLATE "C" NOT NULL,
    bus text COLLATE "C" NOT NULL,
    partition integer NOT NULL,
    entry_ms bigint NOT NULL,
    entry_seq bigint NOT NULL,
    row integer NOT NULL,
    PRIMARY KEY (bus, partition, entry_ms, entry_seq, row, timestamp),
    CHECK (side IN ('BUY', 'SELL', 'UNKNOWN'))
);
CREATE INDEX ticks_liquidations_time ON ticks_liquidations (timestamp);
CREATE INDEX ticks_liquidations_symbol ON ticks_liquidations (exchange, symbol, timestamp);

CREATE TABLE ticks_options_chain (
    timestamp timestamptz NOT NULL,
    timestamp_ns bigint NOT NULL,
    local_timestamp_ns bigint NOT NULL,
    exchange text COLLATE "C" NOT NULL,
    symbol text COLLATE "C" NOT NULL,
    option_type text COLLATE "C",
    strike double precision,
    expiration timestamptz,
    underlying text COLLATE "C",
    last_price double precision,
    open_interest double precision,
    bid_price double precision,
    bid_amount double precision,
    ask_price double precision,
    ask_amount double precision,
    mark_price double precision,
    underlying_price double precision,
    bid_iv double precision,
    ask_iv double precision,
    mark_iv double precision,
    delta double precision,
    gamma double precision,
    vega double precision,
    theta double precision,
    rho double precision,
    bus text COLLATE "C" NOT NULL,
    partition integer NOT NULL,
    entry_ms bigint NOT NULL,
    entry_seq bigint NOT NULL,
    row integer NOT NULL,
    PRIMARY KEY (bus, partition, entry_ms, entry_seq, row, timestamp)
);
CREATE INDEX ticks_options_chain_time ON ticks_options_chain (timestamp);
CREATE INDEX ticks_options_chain_symbol ON ticks_options_chain (exchange, symbol, timestamp);

