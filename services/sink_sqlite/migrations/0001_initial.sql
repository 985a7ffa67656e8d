-- Times are ISO text of fixed width, so that text order is time order. NULL is undefined.

-- Rolling minute: `time` is the window's end. A plain rowid table measured faster than WITHOUT ROWID.
CREATE TABLE candles_1m (
    time TEXT NOT NULL,
    ticker TEXT NOT NULL,
    symbol TEXT NOT NULL,
    open REAL,
    high REAL,
    low REAL,
    close REAL,
    volume REAL NOT NULL,
    trades INTEGER NOT NULL,
    ask_volume REAL,
    bid_volume REAL,
    unknown_volume REAL,
    cvd_open REAL,
    cvd_high REAL,
    cvd_low REAL,
    cvd_close REAL,
    session_cvd_close REAL,
    vd REAL,
    vd_ratio REAL,
    book_imbalance REAL,
    price_pct REAL,
    divergence INTEGER,
    max_trade_size REAL,
    big_trades INTEGER,
    big_volume REAL,
    sum_bid_depth REAL,
    sum_ask_depth REAL,
    sum_price_volume REAL,
    vwap REAL,
    avg_spread REAL,
    complete INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    timestamp_out TEXT NOT NULL,
    latency_ms REAL NOT NULL,
    PRIMARY KEY (ticker, time),
    CHECK (volume >= 0 AND trades >= 0 AND revision >= 0 AND complete IN (0, 1) AND high >= low)
);
CREATE INDEX candles_1m_time ON candles_1m (time);

-- One-second summaries: `time` is the second's start.
CREATE TABLE candles_1s (
    time TEXT NOT NULL,
    ticker TEXT NOT NULL,
    symbol TEXT NOT NULL,
    open REAL,
    high REAL,
    low REAL,
    close REAL,
    volume REAL NOT NULL,
    trades INTEGER NOT NULL,
    ask_volume REAL,
    bid_volume REAL,
    unknown_volume REAL,
    cvd_open REAL,
    cvd_high REAL,
    cvd_low REAL,
    cvd_close REAL,
    session_cvd_close REAL,
    vd REAL,
    vd_ratio REAL,
    book_imbalance REAL,
    price_pct REAL,
    divergence INTEGER,
    max_trade_size REAL,
    big_trades INTEGER,
    big_volume REAL,
    sum_bid_depth REAL,
    sum_ask_depth REAL,
    sum_price_volume REAL,
    vwap REAL,
    avg_spread REAL,
    complete INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    timestamp_out TEXT NOT NULL,
    latency_ms REAL NOT NULL,
    PRIMARY KEY (symbol, time),
    CHECK (volume >= 0 AND trades >= 0 AND revision >= 0 AND complete IN (0, 1) AND high >= low)
);
CREATE INDEX candles_1s_time ON candles_1s (time);
-- A cold start looks for a ticker's newest CVD.
CREATE INDEX candles_1s_ticker ON candles_1s (ticker, time);

-- What a feed could not recover. `symbols` is comma-separated, empty for every instrument of the feed.
CREATE TABLE gaps (
    feed TEXT NOT NULL,
    symbols TEXT NOT NULL,
    start_ns INTEGER NOT NULL,
    end_ns INTEGER NOT NULL,
    start TEXT NOT NULL,
    "end" TEXT NOT NULL,
    reason TEXT NOT NULL,
    PRIMARY KEY (feed, start_ns, end_ns, symbols)
);
CREATE INDEX gaps_time ON gaps (start);

-- Trades that came too late to change a row. Equal trades are no duplicates, so the key is the place on the bus.
CREATE TABLE late_trades (
    bus TEXT NOT NULL,
    partition INTEGER NOT NULL,
    bus_seq INTEGER NOT NULL,
    row INTEGER NOT NULL,
    ticker TEXT NOT NULL,
    symbol TEXT NOT NULL,
    ts_event TEXT NOT NULL,
    ts_event_ns INTEGER NOT NULL,
    ts_recv_ns INTEGER NOT NULL,
    price REAL,
    size REAL,
    side TEXT NOT NULL,
    watermark_ns INTEGER NOT NULL,
    PRIMARY KEY (bus, partition, bus_seq, row),
    CHECK (side IN ('BUY', 'SELL', 'UNKNOWN'))
);
CREATE INDEX late_trades_time ON late_trades (ts_event);
CREATE INDEX late_trades_symbol ON late_trades (symbol, ts_event);

CREATE VIEW late_counts AS
SELECT symbol, ticker, count(*) AS trades, sum(size) AS volume, min(ts_event) AS first, max(ts_event) AS last
FROM late_trades GROUP BY symbol, ticker;

-- What could not be stored, and why. `row_number` is -1 for a whole frame.
CREATE TABLE dead_letters (
    id INTEGER PRIMARY KEY,
    at TEXT NOT NULL,
    bus TEXT NOT NULL,
    topic TEXT NOT NULL,
    partition INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    stream_id TEXT NOT NULL,
    table_name TEXT NOT NULL,
    row_number INTEGER NOT NULL,
    reason TEXT NOT NULL,
    row TEXT NOT NULL,
    UNIQUE (bus, topic, partition, stream_id, table_name, row_number)
);
CREATE INDEX dead_letters_time ON dead_letters (at);

-- How far each stream of each bus is stored; written with the rows.
CREATE TABLE sink_cursors (
    bus TEXT NOT NULL,
    topic TEXT NOT NULL,
    partition INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    stream_id TEXT NOT NULL,
    PRIMARY KEY (bus, topic, partition)
);
