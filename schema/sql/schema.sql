-- The whole schema as it stands: what migrations/ add up to, which a test proves. Columns that the owner drew come first.

-- Applied migrations; bus/migrate.py writes here, in the migration's own transaction.
CREATE TABLE schema_migrations (
    version text PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT now()
);

-- One row a bar: its current version. Prices are double precision, as the feed gives them: a round trip keeps every bit.
-- candles_seq and server_time are the version's: the log's sequence that brought it, and the sender's clock, by which
-- versions are ordered. heard_at is when the bar's age was judged, by its first live version (null: at its own end).
-- applied_seq is the sequence from which on features used the version: later than candles_seq where the bar had to wait
-- (null: the same).
CREATE TABLE market_data (
    ts timestamptz NOT NULL,
    symbol text NOT NULL,
    timeframe text NOT NULL,
    open double precision NOT NULL,
    high double precision NOT NULL,
    low double precision NOT NULL,
    close double precision NOT NULL,
    volume double precision NOT NULL,
    spread double precision NOT NULL,
    real_volume double precision NOT NULL DEFAULT 0,
    revision integer NOT NULL DEFAULT 0,
    source text,
    ts_source text NOT NULL DEFAULT 'utc',
    received_at timestamptz NOT NULL,
    candles_seq bigint NOT NULL,
    live boolean NOT NULL DEFAULT true,
    server_time bigint,
    heard_at timestamptz,
    applied_seq bigint,
    PRIMARY KEY (symbol, timeframe, ts)
);
-- Rows lie in the order in which they came: an index of each block range's first and last time is some kilobytes.
CREATE INDEX market_data_received ON market_data USING brin (received_at) WITH (pages_per_range = 32, autosummarize = on);

-- The versions that market_data held before; the trigger below fills it, so that no writer can forget to.
CREATE TABLE candle_revisions (
    ts timestamptz NOT NULL,
    symbol text NOT NULL,
    timeframe text NOT NULL,
    open double precision NOT NULL,
    high double precision NOT NULL,
    low double precision NOT NULL,
    close double precision NOT NULL,
    volume double precision NOT NULL,
    spread double precision NOT NULL,
    real_volume double precision NOT NULL,
    revision integer NOT NULL,
    source text,
    ts_source text NOT NULL,
    received_at timestamptz NOT NULL,
    candles_seq bigint NOT NULL,
    live boolean NOT NULL,
    replaced_by_seq bigint NOT NULL,
    server_time bigint,
    heard_at timestamptz,
    applied_seq bigint,
    PRIMARY KEY (symbol, timeframe, ts, revision, candles_seq)
);

-- Bars that were withdrawn, as when a broker's clock is restated; a bar may come back, at a higher revision.
CREATE TABLE candle_withdrawals (
    ts timestamptz NOT NULL,
    symbol text NOT NULL,
    timeframe text NOT NULL,
    revision integer NOT NULL,
    candles_seq bigint NOT NULL,
    withdrawn_at timestamptz NOT NULL,
    PRIMARY KEY (symbol, timeframe, ts, candles_seq)
);

CREATE FUNCTION keep_candle_revision() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO candle_revisions
        (ts, symbol, timeframe, open, high, low, close, volume, spread, real_volume, revision, source, ts_source,
         received_at, candles_seq, live, replaced_by_seq, server_time, heard_at, applied_seq)
    VALUES
        (OLD.ts, OLD.symbol, OLD.timeframe, OLD.open, OLD.high, OLD.low, OLD.close, OLD.volume, OLD.spread,
         OLD.real_volume, OLD.revision, OLD.source, OLD.ts_source, OLD.received_at, OLD.candles_seq, OLD.live,
         NEW.candles_seq, OLD.server_time, OLD.heard_at, OLD.applied_seq)
    ON CONFLICT DO NOTHING;
    RETURN NULL;
END
$$;

CREATE TRIGGER keep_candle_revision AFTER UPDATE ON market_data FOR EACH ROW
WHEN (
    (OLD.open, OLD.high, OLD.low, OLD.close, OLD.volume, OLD.spread, OLD.real_volume, OLD.revision)
    IS DISTINCT FROM
    (NEW.open, NEW.high, NEW.low, NEW.close, NEW.volume, NEW.spread, NEW.real_volume, NEW.revision)
)
EXECUTE FUNCTION keep_candle_revision();

-- fwd_seq is the CANDLES sequence that fwd_ret_5 comes from: a label is known five bars after its row, and has a life
-- of its own. The fill factor leaves room for that one later update to stay on its page.
CREATE TABLE features (
    ts timestamptz NOT NULL,
    symbol text NOT NULL,
    timeframe text NOT NULL,
    close double precision NOT NULL,
    volume double precision NOT NULL,
    spread double precision NOT NULL,
    rsi double precision,
    macd double precision,
    macd_signal double precision,
    macd_hist double precision,
    atr double precision,
    ma60 double precision,
    ret_1 double precision,
    fwd_ret_5 double precision,
    ready boolean NOT NULL,
    bar integer NOT NULL,
    candle_revision integer NOT NULL,
    candles_seq bigint NOT NULL,
    fwd_seq bigint NOT NULL,
    ts_source text NOT NULL DEFAULT 'utc',
    PRIMARY KEY (symbol, timeframe, ts)
) WITH (fillfactor = 90);

-- What a training may use: ready rows whose label is known and whose time is not a guess; label is the sign of fwd_ret_5 (0 is a tie).
CREATE VIEW trainset AS
SELECT
    ts, symbol, timeframe, close, volume, spread, rsi, macd, macd_signal, macd_hist, atr, ma60, ret_1, fwd_ret_5,
    ready, bar, candle_revision, candles_seq, sign(fwd_ret_5)::smallint AS label
FROM features
WHERE ready AND fwd_ret_5 IS NOT NULL AND ts_source <> 'assumed';

DO $$
DECLARE
    tf text;
BEGIN
    FOREACH tf IN ARRAY ARRAY[
        'M1', 'M2', 'M3', 'M4', 'M5', 'M6', 'M10', 'M12', 'M15', 'M20', 'M30',
        'H1', 'H2', 'H3', 'H4', 'H6', 'H8', 'H12', 'D1', 'W1', 'MN1'
    ] LOOP
        EXECUTE format(
            'CREATE VIEW %I AS SELECT ts, symbol, timeframe, close, volume, spread, rsi, macd, macd_signal, macd_hist, '
            'atr, ma60, ret_1, fwd_ret_5, ready, bar, candle_revision, candles_seq, '
            'ts_source = ''assumed'' AS clock_assumed FROM features WHERE timeframe = %L',
            'features_' || lower(tf), tf
        );
        EXECUTE format(
            'CREATE VIEW %I AS SELECT * FROM trainset WHERE timeframe = %L', 'trainset_' || lower(tf), tf
        );
    END LOOP;
END
$$;

-- ts stands in the key because a hypertable's key must hold its time; id alone is unique already.
CREATE TABLE model_signals (
    ts timestamptz NOT NULL,
    symbol text NOT NULL,
    timeframe text NOT NULL,
    model_name text NOT NULL,
    threshold double precision,
    prob_up double precision,
    label smallint NOT NULL,
    created_at timestamptz NOT NULL,
    id text NOT NULL,
    model_version text,
    abstain text,
    candle_revision integer NOT NULL,
    candles_seq bigint NOT NULL,
    features_hash text NOT NULL,
    expires_at timestamptz NOT NULL,
    supersedes text,
    superseded_at timestamptz,
    trace_id text,
    received_at timestamptz,
    features_at timestamptz,
    candle_digest text,
    PRIMARY KEY (id, ts)
);
CREATE INDEX model_signals_series ON model_signals (timeframe, symbol, ts DESC);
CREATE INDEX model_signals_newest ON model_signals (timeframe, ts DESC);
CREATE INDEX model_signals_created ON model_signals USING brin (created_at) WITH (pages_per_range = 32, autosummarize = on);

CREATE TABLE model_metrics (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    created_at timestamptz NOT NULL DEFAULT now(),
    model_name text NOT NULL,
    metrics jsonb NOT NULL
);
CREATE INDEX model_metrics_newest ON model_metrics (model_name, created_at DESC);

-- from_seq is the first CANDLES sequence that a version serves; reason and "by" say why it is in its state.
CREATE TABLE models (
    model_name text NOT NULL,
    version text NOT NULL,
    timeframe text NOT NULL,
    state text NOT NULL,
    created_at timestamptz NOT NULL,
    manifest jsonb NOT NULL,
    from_seq bigint,
    activated_at timestamptz,
    reason text NOT NULL DEFAULT '',
    by text NOT NULL DEFAULT 'trainer',
    PRIMARY KEY (model_name, version)
);

-- What came of each signal five bars later, and of the shadows' silent ones; state is the model's when it spoke. seq is
-- the order in which outcomes became known, by which evidence is folded. void: the signal was superseded afterwards.
CREATE TABLE signal_outcomes (
    id text NOT NULL,
    ts timestamptz NOT NULL,
    symbol text NOT NULL,
    timeframe text NOT NULL,
    model_name text NOT NULL,
    model_version text NOT NULL,
    state text NOT NULL,
    prob_up double precision NOT NULL,
    base_rate double precision NOT NULL,
    label smallint NOT NULL,
    abstain text,
    ret double precision NOT NULL,
    up boolean,
    won boolean,
    gross double precision,
    net double precision,
    candles_seq bigint NOT NULL,
    fwd_seq bigint NOT NULL,
    scored_at timestamptz NOT NULL DEFAULT now(),
    void boolean NOT NULL DEFAULT false,
    seq bigint GENERATED ALWAYS AS IDENTITY,
    PRIMARY KEY (id, ts)
);
CREATE INDEX signal_outcomes_model ON signal_outcomes (model_name, model_version, seq DESC);
CREATE INDEX signal_outcomes_series ON signal_outcomes (timeframe, symbol, ts DESC);

-- Every change of which version speaks, with what decided it; by is a person, the trainer or the scorer.
CREATE TABLE model_decisions (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL,
    model_name text NOT NULL,
    version text NOT NULL,
    action text NOT NULL,
    by text NOT NULL,
    reason text NOT NULL,
    evidence jsonb NOT NULL DEFAULT '{}',
    UNIQUE (model_name, version, action, at)
);

-- How far each model's trials are: all that the evidence has seen, written with the outcomes that it was of.
CREATE TABLE model_trials (
    model_name text PRIMARY KEY,
    docket jsonb NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now()
);

-- Signals that were rebuilt and compared; difference is null where they were identical.
CREATE TABLE signal_audits (
    at timestamptz NOT NULL,
    signal_id text NOT NULL,
    identical boolean NOT NULL,
    difference text,
    PRIMARY KEY (signal_id, at)
);

-- How far a reader of a derived stream has stored: its place in that stream, and in CANDLES. stream_created and
-- stored_at tell whether the message at stream_seq is still the one that was read.
CREATE TABLE cursors (
    reader text NOT NULL,
    partition integer NOT NULL DEFAULT 0,
    candles_seq bigint NOT NULL,
    stream_seq bigint NOT NULL,
    stream_created timestamptz NOT NULL,
    stored_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (reader, partition)
);

-- What terminals say of a symbol: point is the size of one point, in which spreads are given.
CREATE TABLE symbols (
    symbol text PRIMARY KEY,
    point double precision NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now()
);

-- A broker's new name for a series: bars and features have moved, signals keep the name that they were made under.
CREATE TABLE series_renames (
    old_symbol text NOT NULL,
    new_symbol text NOT NULL,
    timeframe text NOT NULL,
    renamed_at timestamptz NOT NULL DEFAULT now(),
    bars bigint NOT NULL,
    candles_seq bigint NOT NULL,
    by text NOT NULL,
    PRIMARY KEY (old_symbol, new_symbol, timeframe, candles_seq)
);

-- Does nothing where TimescaleDB is not installed or not preloaded (creating the extension would end the connection).
-- Policies go by the time a chunk was made, not by market time: a replay of 2012 must not be dropped the same night.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb') THEN
        IF NOT EXISTS (SELECT FROM pg_available_extensions WHERE name = 'timescaledb')
            OR NOT EXISTS (
                SELECT FROM pg_settings WHERE name = 'shared_preload_libraries' AND setting LIKE '%timescaledb%'
            )
        THEN
            RETURN;
        END IF;
        CREATE EXTENSION timescaledb;
    END IF;

    PERFORM create_hypertable(
        'market_data', 'ts', chunk_time_interval => INTERVAL '90 days', migrate_data => true, if_not_exists => true);
    PERFORM create_hypertable(
        'features', 'ts', chunk_time_interval => INTERVAL '90 days', migrate_data => true, if_not_exists => true);
    PERFORM create_hypertable(
        'model_signals', 'ts', chunk_time_interval => INTERVAL '90 days', migrate_data => true, if_not_exists => true);

    -- Compression and policies are of the community licence; under the Apache licence they raise errors.
    IF current_setting('timescaledb.license', true) IS DISTINCT FROM 'timescale' THEN
        RETURN;
    END IF;
    ALTER TABLE market_data SET (
        timescaledb.compress, timescaledb.compress_segmentby = 'symbol, timeframe', timescaledb.compress_orderby = 'ts');
    ALTER TABLE features SET (
        timescaledb.compress, timescaledb.compress_segmentby = 'symbol, timeframe', timescaledb.compress_orderby = 'ts');
    ALTER TABLE model_signals SET (
        timescaledb.compress, timescaledb.compress_segmentby = 'symbol, timeframe',
        timescaledb.compress_orderby = 'ts, id');
    PERFORM add_compression_policy('market_data', compress_created_before => INTERVAL '120 days', if_not_exists => true);
    PERFORM add_compression_policy('features', compress_created_before => INTERVAL '120 days', if_not_exists => true);
    PERFORM add_compression_policy(
        'model_signals', compress_created_before => INTERVAL '120 days', if_not_exists => true);
    -- market_data is never dropped: features can be made from it again.
    PERFORM add_retention_policy('features', drop_created_before => INTERVAL '10 years', if_not_exists => true);
    PERFORM add_retention_policy('model_signals', drop_created_before => INTERVAL '10 years', if_not_exists => true);
END
$$;
