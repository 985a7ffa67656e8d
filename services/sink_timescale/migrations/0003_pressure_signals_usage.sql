-- Option trades of one strike in one window, which begins at `time_window`. `created_at` and the names of the first
-- two indexes are what readers of such tables know.
CREATE TABLE pressure_metrics (
    underlying text COLLATE "C" NOT NULL,
    expiration timestamptz NOT NULL,
    strike double precision NOT NULL,
    option_type text COLLATE "C" NOT NULL,
    time_window timestamptz NOT NULL,
    window_seconds bigint NOT NULL,
    bid_volume double precision NOT NULL,
    ask_volume double precision NOT NULL,
    unknown_volume double precision NOT NULL,
    pressure_ratio double precision,
    log_ratio double precision NOT NULL,
    dominant_side text COLLATE "C" NOT NULL,
    confidence double precision NOT NULL,
    total_trades bigint NOT NULL,
    avg_trade_size double precision NOT NULL,
    max_trade_size double precision NOT NULL,
    vwap double precision,
    premium double precision NOT NULL,
    ask_premium double precision NOT NULL,
    bid_premium double precision NOT NULL,
    open double precision NOT NULL,
    close double precision NOT NULL,
    first_trade timestamptz NOT NULL,
    last_trade timestamptz NOT NULL,
    mean_trade timestamptz NOT NULL,
    strike_rank bigint NOT NULL,
    sweeps bigint NOT NULL,
    sweep_ask_volume double precision NOT NULL,
    sweep_bid_volume double precision NOT NULL,
    blocks bigint NOT NULL,
    block_ask_volume double precision NOT NULL,
    block_bid_volume double precision NOT NULL,
    underlying_price double precision,
    moneyness double precision,
    days_to_expiry double precision,
    iv double precision,
    delta double precision,
    complete boolean NOT NULL,
    revision bigint NOT NULL,
    timestamp_out timestamptz NOT NULL,
    latency_ms double precision NOT NULL,
    created_at timestamptz GENERATED ALWAYS AS (timestamp_out) STORED,
    PRIMARY KEY (underlying, expiration, strike, option_type, time_window),
    CHECK (option_type IN ('C', 'P') AND dominant_side IN ('BUY', 'SELL', 'NEUTRAL')),
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

-- All option pressure of one underlying in one window.
CREATE TABLE pressure_rollups (
    underlying text COLLATE "C" NOT NULL,
    time_window timestamptz NOT NULL,
    window_seconds bigint NOT NULL,
    call_volume double precision NOT NULL,
    put_volume double precision NOT NULL,
    call_ask_volume double precision NOT NULL,
    call_bid_volume double precision NOT NULL,
    put_ask_volume double precision NOT NULL,
    put_bid_volume double precision NOT NULL,
    call_pressure double precision NOT NULL,
    put_pressure double precision NOT NULL,
    put_call_ratio double precision,
    premium double precision NOT NULL,
    net_call_premium double precision NOT NULL,
    net_put_premium double precision NOT NULL,
    net_premium double precision NOT NULL,
    strikes bigint NOT NULL,
    total_trades bigint NOT NULL,
    top_strikes jsonb NOT NULL,
    underlying_price double precision,
    complete boolean NOT NULL,
    revision bigint NOT NULL,
    timestamp_out timestamptz NOT NULL,
    latency_ms double precision NOT NULL,
    PRIMARY KEY (underlying, time_window),
    CHECK (window_seconds > 0 AND strikes >= 0 AND total_trades >= 0 AND revision >= 0),
    CHECK (call_volume >= 0 AND put_volume >= 0 AND call_ask_volume >= 0 AND call_bid_volume >= 0),
    CHECK (put_ask_volume >= 0 AND put_bid_volume >= 0 AND put_call_ratio >= 0)
);
CREATE INDEX pressure_rollups_time ON pressure_rollups (time_window);

-- Verdicts on pressure, with all that led to each. `option_type` is empty for one on no single strike.
CREATE TABLE signals (
    underlying text COLLATE "C" NOT NULL,
    expiration timestamptz NOT NULL,
    strike double precision NOT NULL,
    option_type text COLLATE "C" NOT NULL,
    time_window timestamptz NOT NULL,
    window_seconds bigint NOT NULL,
    source text COLLATE "C" NOT NULL,
    type text COLLATE "C" NOT NULL,
    types jsonb NOT NULL,
    direction text COLLATE "C" NOT NULL,
    status text COLLATE "C" NOT NULL,
    reason text COLLATE "C" NOT NULL,
    score double precision NOT NULL,
    grade text COLLATE "C" NOT NULL,
    baseline text COLLATE "C" NOT NULL,
    baseline_size bigint NOT NULL,
    raw double precision,
    base double precision,
    significance double precision,
    trend double precision,
    concentration double precision,
    persistence double precision,
    z double precision,
    z_volume double precision,
    percentile double precision,
    volume_percentile double precision,
    volume_95 double precision,
    market_maker double precision,
    cluster_factor double precision,
    cluster_size bigint,
    log_ratio double precision,
    volume double precision,
    premium double precision,
    underlying_price double precision,
    moneyness double precision,
    complete boolean NOT NULL,
    revision bigint NOT NULL,
    timestamp_out timestamptz NOT NULL,
    latency_ms double precision NOT NULL,
    PRIMARY KEY (underlying, expiration, strike, option_type, time_window, source),
    CHECK (option_type IN ('C', 'P', '') AND score BETWEEN 0 AND 1),
    CHECK (window_seconds > 0 AND baseline_size >= 0 AND revision >= 0)
);
CREATE INDEX signals_time ON signals (time_window);
CREATE INDEX signals_underlying ON signals (underlying, time_window);

-- What a feed has used, by interval (which ends at `at`) and by UTC day. Costs in USD.
CREATE TABLE usage_log (
    feed text COLLATE "C" NOT NULL,
    day text COLLATE "C" NOT NULL,
    at timestamptz NOT NULL,
    events bigint NOT NULL,
    bytes bigint NOT NULL,
    connected_seconds double precision NOT NULL,
    cost_usd double precision NOT NULL,
    state text COLLATE "C" NOT NULL,
    budget_usd double precision NOT NULL,
    PRIMARY KEY (feed, at),
    CHECK (events >= 0 AND bytes >= 0 AND connected_seconds >= 0 AND cost_usd >= 0 AND budget_usd >= 0)
);
CREATE INDEX idx_usage_date ON usage_log (day);
CREATE INDEX usage_log_time ON usage_log (at);

CREATE TABLE usage_daily (
    feed text COLLATE "C" NOT NULL,
    day text COLLATE "C" NOT NULL,
    at timestamptz NOT NULL,
    events bigint NOT NULL,
    bytes bigint NOT NULL,
    connected_seconds double precision NOT NULL,
    cost_usd double precision NOT NULL,
    state text COLLATE "C" NOT NULL,
    budget_usd double precision NOT NULL,
    PRIMARY KEY (feed, day),
    CHECK (events >= 0 AND bytes >= 0 AND connected_seconds >= 0 AND cost_usd >= 0 AND budget_usd >= 0)
);

CREATE VIEW usage AS
SELECT at AS timestamp, day, feed, events, bytes, cost_usd AS cost FROM usage_log;
