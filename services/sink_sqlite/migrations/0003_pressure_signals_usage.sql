-- Option trades of one strike in one window, which begins at `time_window`. `created_at` and the names of the first
-- two indexes are what readers of such tables know.
CREATE TABLE pressure_metrics (
    underlying TEXT NOT NULL,
    expiration TEXT NOT NULL,
    strike REAL NOT NULL,
    option_type TEXT NOT NULL,
    time_window TEXT NOT NULL,
    window_seconds INTEGER NOT NULL,
    bid_volume REAL NOT NULL,
    ask_volume REAL NOT NULL,
    unknown_volume REAL NOT NULL,
    pressure_ratio REAL,
    log_ratio REAL NOT NULL,
    dominant_side TEXT NOT NULL,
    confidence REAL NOT NULL,
    total_trades INTEGER NOT NULL,
    avg_trade_size REAL NOT NULL,
    max_trade_size REAL NOT NULL,
    vwap REAL,
    premium REAL NOT NULL,
    ask_premium REAL NOT NULL,
    bid_premium REAL NOT NULL,
    open REAL NOT NULL,
    close REAL NOT NULL,
    first_trade TEXT NOT NULL,
    last_trade TEXT NOT NULL,
    mean_trade TEXT NOT NULL,
    strike_rank INTEGER NOT NULL,
    sweeps INTEGER NOT NULL,
    sweep_ask_volume REAL NOT NULL,
    sweep_bid_volume REAL NOT NULL,
    blocks INTEGER NOT NULL,
    block_ask_volume REAL NOT NULL,
    block_bid_volume REAL NOT NULL,
    underlying_price REAL,
    moneyness REAL,
    days_to_expiry REAL,
    iv REAL,
    delta REAL,
    complete INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    timestamp_out TEXT NOT NULL,
    latency_ms REAL NOT NULL,
    created_at TEXT GENERATED ALWAYS AS (timestamp_out) VIRTUAL,
    PRIMARY KEY (underlying, expiration, strike, option_type, time_window),
    CHECK (option_type IN ('C', 'P') AND dominant_side IN ('BUY', 'SELL', 'NEUTRAL') AND complete IN (0, 1)),
    CHECK (window_seconds > 0 AND total_trades >= 0 AND strike_rank >= 0 AND revision >= 0),
    CHECK (bid_volume >= 0 AND ask_volume >= 0 AND unknown_volume >= 0 AND confidence BETWEEN 0 AND 1),
    CHECK (sweeps >= 0 AND sweep_ask_volume >= 0 AND sweep_bid_volume >= 0),
    CHECK (blocks >= 0 AND block_ask_volume >= 0 AND block_bid_volume >= 0),
    CHECK (first_trade <= last_trade)
);
CREATE INDEX idx_pressure_time ON pressure_metrics (time_window);
CREATE INDEX idx_pressure_strike ON pressure_metrics (strike, option_type);
-- Baselines are read of one underlying over many days.
CREATE INDEX idx_pressure_underlying ON pressure_metrics (underlying, time_window);

-- All option pressure of one underlying in one window. `top_strikes` is JSON.
CREATE TABLE pressure_rollups (
    underlying TEXT NOT NULL,
    time_window TEXT NOT NULL,
    window_seconds INTEGER NOT NULL,
    call_volume REAL NOT NULL,
    put_volume REAL NOT NULL,
    call_ask_volume REAL NOT NULL,
    call_bid_volume REAL NOT NULL,
    put_ask_volume REAL NOT NULL,
    put_bid_volume REAL NOT NULL,
    call_pressure REAL NOT NULL,
    put_pressure REAL NOT NULL,
    put_call_ratio REAL,
    premium REAL NOT NULL,
    net_call_premium REAL NOT NULL,
    net_put_premium REAL NOT NULL,
    net_premium REAL NOT NULL,
    strikes INTEGER NOT NULL,
    total_trades INTEGER NOT NULL,
    top_strikes TEXT NOT NULL,
    underlying_price REAL,
    complete INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    timestamp_out TEXT NOT NULL,
    latency_ms REAL NOT NULL,
    PRIMARY KEY (underlying, time_window),
    CHECK (window_seconds > 0 AND strikes >= 0 AND total_trades >= 0 AND revision >= 0 AND complete IN (0, 1)),
    CHECK (call_volume >= 0 AND put_volume >= 0 AND call_ask_volume >= 0 AND call_bid_volume >= 0),
    CHECK (put_ask_volume >= 0 AND put_bid_volume >= 0 AND put_call_ratio >= 0)
);
CREATE INDEX pressure_rollups_time ON pressure_rollups (time_window);

-- Verdicts on pressure, with all that led to each. `types` is JSON; `option_type` is empty for one on no single strike.
CREATE TABLE signals (
    underlying TEXT NOT NULL,
    expiration TEXT NOT NULL,
    strike REAL NOT NULL,
    option_type TEXT NOT NULL,
    time_window TEXT NOT NULL,
    window_seconds INTEGER NOT NULL,
    source TEXT NOT NULL,
    type TEXT NOT NULL,
    types TEXT NOT NULL,
    direction TEXT NOT NULL,
    status TEXT NOT NULL,
    reason TEXT NOT NULL,
    score REAL NOT NULL,
    grade TEXT NOT NULL,
    baseline TEXT NOT NULL,
    baseline_size INTEGER NOT NULL,
    raw REAL,
    base REAL,
    significance REAL,
    trend REAL,
    concentration REAL,
    persistence REAL,
    z REAL,
    z_volume REAL,
    percentile REAL,
    volume_percentile REAL,
    volume_95 REAL,
    market_maker REAL,
    cluster_factor REAL,
    cluster_size INTEGER,
    log_ratio REAL,
    volume REAL,
    premium REAL,
    underlying_price REAL,
    moneyness REAL,
    complete INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    timestamp_out TEXT NOT NULL,
    latency_ms REAL NOT NULL,
    PRIMARY KEY (underlying, expiration, strike, option_type, time_window, source),
    CHECK (option_type IN ('C', 'P', '') AND complete IN (0, 1) AND score BETWEEN 0 AND 1),
    CHECK (window_seconds > 0 AND baseline_size >= 0 AND revision >= 0)
);
CREATE INDEX signals_time ON signals (time_window);
CREATE INDEX signals_underlying ON signals (underlying, time_window);

-- What a feed has used, by interval (which ends at `at`) and by UTC day. Costs in USD.
CREATE TABLE usage_log (
    feed TEXT NOT NULL,
    day TEXT NOT NULL,
    at TEXT NOT NULL,
    events INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    connected_seconds REAL NOT NULL,
    cost_usd REAL NOT NULL,
    state TEXT NOT NULL,
    budget_usd REAL NOT NULL,
    PRIMARY KEY (feed, at),
    CHECK (events >= 0 AND bytes >= 0 AND connected_seconds >= 0 AND cost_usd >= 0 AND budget_usd >= 0)
);
CREATE INDEX idx_usage_date ON usage_log (day);
CREATE INDEX usage_log_time ON usage_log (at);

CREATE TABLE usage_daily (
    feed TEXT NOT NULL,
    day TEXT NOT NULL,
    at TEXT NOT NULL,
    events INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    connected_seconds REAL NOT NULL,
    cost_usd REAL NOT NULL,
    state TEXT NOT NULL,
    budget_usd REAL NOT NULL,
    PRIMARY KEY (feed, day),
    CHECK (events >= 0 AND bytes >= 0 AND connected_seconds >= 0 AND cost_usd >= 0 AND budget_usd >= 0)
);

CREATE VIEW usage AS
SELECT at AS timestamp, day, feed, events, bytes, cost_usd AS cost FROM usage_log;
