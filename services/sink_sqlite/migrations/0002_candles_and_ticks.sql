-- Fixed candles of all timeframes; `timestamp_in` is the candle's start.
CREATE TABLE candles (
    exchange TEXT NOT NULL,
    symbol TEXT NOT NULL,
    timeframe TEXT NOT NULL,
    timestamp_in TEXT NOT NULL,
    open REAL,
    high REAL,
    low REAL,
    close REAL,
    volume REAL NOT NULL,
    trades INTEGER NOT NULL,
    vwap REAL,
    ask_volume REAL,
    bid_volume REAL,
    unknown_volume REAL,
    vd REAL,
    cvd_open REAL,
    cvd_high REAL,
    cvd_low REAL,
    cvd_close REAL,
    quoted_spread REAL,
    bid_price REAL,
    bid_size REAL,
    ask_price REAL,
    ask_size REAL,
    book_imbalance_5 REAL,
    mark_price REAL,
    index_price REAL,
    open_interest REAL,
    funding_rate REAL,
    liquidated_long_volume REAL,
    liquidated_short_volume REAL,
    sma_5 REAL,
    sma_10 REAL,
    sma_20 REAL,
    ema_5 REAL,
    ema_10 REAL,
    ema_20 REAL,
    wma_5 REAL,
    momentum_3 REAL,
    momentum_5 REAL,
    velocity REAL,
    acceleration REAL,
    volume_sma_5 REAL,
    volume_ema_5 REAL,
    volume_ratio REAL,
    vwap_deviation REAL,
    volatility_5 REAL,
    volatility_10 REAL,
    high_low_ratio REAL,
    log_return REAL,
    trade_intensity REAL,
    avg_trade_size REAL,
    price_impact REAL,
    spread_proxy REAL,
    order_flow_imbalance REAL,
    kyle_lambda REAL,
    vpin REAL,
    rsi_5 REAL,
    bollinger_position REAL,
    macd REAL,
    macd_signal REAL,
    macd_hist REAL,
    complete INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    timestamp_out TEXT NOT NULL,
    latency_ms REAL NOT NULL,
    PRIMARY KEY (exchange, symbol, timeframe, timestamp_in),
    CHECK (volume >= 0 AND trades >= 0 AND revision >= 0 AND complete IN (0, 1) AND high >= low)
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

-- The candles as ORM users know them; written with them. Units: 1 second, 2 minute, 3 hour, 4 day, 5 week, 6 month.
CREATE TABLE ohlc_bars (
    id INTEGER PRIMARY KEY,
    contract_id TEXT NOT NULL,
    timestamp DATETIME NOT NULL,
    open REAL,
    high REAL,
    low REAL,
    close REAL,
    volume REAL,
    timeframe_unit INTEGER NOT NULL,
    timeframe_value INTEGER NOT NULL
);
CREATE UNIQUE INDEX ohlc_bars_contract_id_timeframe_unit_timeframe_value_idx
    ON ohlc_bars (contract_id, timeframe_unit, timeframe_value, timestamp);
CREATE INDEX ohlc_bars_timestamp_idx ON ohlc_bars (timestamp);

-- Raw records. Equal ticks are no duplicates, so the key is the place on the bus: the stream entry and the row in it.
CREATE TABLE ticks_trades (
    timestamp TEXT NOT NULL,
    timestamp_ns INTEGER NOT NULL,
    local_timestamp_ns INTEGER NOT NULL,
    exchange TEXT NOT NULL,
    symbol TEXT NOT NULL,
    price REAL,
    amount REAL,
    side TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    bid_price REAL,
    bid_amount REAL,
    ask_price REAL,
    ask_amount REAL,
    bus TEXT NOT NULL,
    partition INTEGER NOT NULL,
    entry_ms INTEGER NOT NULL,
    entry_seq INTEGER NOT NULL,
    row INTEGER NOT NULL,
    PRIMARY KEY (bus, partition, entry_ms, entry_seq, row),
    CHECK (side IN ('BUY', 'SELL', 'UNKNOWN'))
);
CREATE INDEX ticks_trades_time ON ticks_trades (timestamp);
CREATE INDEX ticks_trades_symbol ON ticks_trades (exchange, symbol, timestamp);

CREATE TABLE ticks_book_snapshots (
    timestamp TEXT NOT NULL,
    timestamp_ns INTEGER NOT NULL,
    local_timestamp_ns INTEGER NOT NULL,
    exchange TEXT NOT NULL,
    symbol TEXT NOT NULL,
    depth INTEGER NOT NULL,
    bid_price REAL,
    bid_amount REAL,
    ask_price REAL,
    ask_amount REAL,
    book_imbalance_5 REAL,
    bids TEXT NOT NULL,
    asks TEXT NOT NULL,
    bus TEXT NOT NULL,
    partition INTEGER NOT NULL,
    entry_ms INTEGER NOT NULL,
    entry_seq INTEGER NOT NULL,
    row INTEGER NOT NULL,
    PRIMARY KEY (bus, partition, entry_ms, entry_seq, row)
);
CREATE INDEX ticks_book_snapshots_time ON ticks_book_snapshots (timestamp);
CREATE INDEX ticks_book_snapshots_symbol ON ticks_book_snapshots (exchange, symbol, timestamp);

CREATE TABLE ticks_derivative_ticker (
    timestamp TEXT NOT NULL,
    timestamp_ns INTEGER NOT NULL,
    local_timestamp_ns INTEGER NOT NULL,
    exchange TEXT NOT NULL,
    symbol TEXT NOT NULL,
    last_price REAL,
    open_interest REAL,
    funding_rate REAL,
    predicted_funding_rate REAL,
    funding_timestamp TEXT,
    mark_price REAL,
    index_price REAL,
    bus TEXT NOT NULL,
    partition INTEGER NOT NULL,
    entry_ms INTEGER NOT NULL,
    entry_seq INTEGER NOT NULL,
    row INTEGER NOT NULL,
    PRIMARY KEY (bus, partition, entry_ms, entry_seq, row)
);
CREATE INDEX ticks_derivative_ticker_time ON ticks_derivative_ticker (timestamp);
CREATE INDEX ticks_derivative_ticker_symbol ON ticks_derivative_ticker (exchange, symbol, timestamp);

CREATE TABLE ticks_liquidations (
    timestamp TEXT NOT NULL,
    timestamp_ns INTEGER NOT NULL,
    local_timestamp_ns INTEGER NOT NULL,
    exchange TEXT NOT NULL,
    symbol TEXT NOT NULL,
    price REAL,
    amount REAL,
    side TEXT NOT NULL,
    bus TEXT NOT NULL,
    partition INTEGER NOT NULL,
    entry_ms INTEGER NOT NULL,
    entry_seq INTEGER NOT NULL,
    row INTEGER NOT NULL,
    PRIMARY KEY (bus, partition, entry_ms, entry_seq, row),
    CHECK (side IN ('BUY', 'SELL', 'UNKNOWN'))
);
CREATE INDEX ticks_liquidations_time ON ticks_liquidations (timestamp);
CREATE INDEX ticks_liquidations_symbol ON ticks_liquidations (exchange, symbol, timestamp);

CREATE TABLE ticks_options_chain (
    timestamp TEXT NOT NULL,
    timestamp_ns INTEGER NOT NULL,
    local_timestamp_ns INTEGER NOT NULL,
    exchange TEXT NOT NULL,
    symbol TEXT NOT NULL,
    option_type TEXT,
    strike REAL,
    expiration TEXT,
    underlying TEXT,
    last_price REAL,
    open_interest REAL,
    bid_price REAL,
    bid_amount REAL,
    ask_price REAL,
    ask_amount REAL,
    mark_price REAL,
    underlying_price REAL,
    bid_iv REAL,
    ask_iv REAL,
    mark_iv REAL,
    delta REAL,
    gamma REAL,
    vega REAL,
    theta REAL,
    rho REAL,
    bus TEXT NOT NULL,
    partition INTEGER NOT NULL,
    entry_ms INTEGER NOT NULL,
    entry_seq INTEGER NOT NULL,
    row INTEGER NOT NULL,
    PRIMARY KEY (bus, partition, entry_ms, entry_seq, row)
);
CREATE INDEX ticks_options_chain_time ON ticks_options_chain (timestamp);
CREATE INDEX ticks_options_chain_symbol ON ticks_options_chain (exchange, symbol, timestamp);

