-- From which CANDLES sequence on features used a version of a bar: bars before a series' first wait, and what was signalled
-- meanwhile was made without them. The past stays null: there it counts as the sequence that brought the version.
ALTER TABLE market_data ADD COLUMN applied_seq bigint;
ALTER TABLE candle_revisions ADD COLUMN applied_seq bigint;

-- Of a candle's values features use some only: a digest of all of them, so that no change of any goes unseen.
ALTER TABLE model_signals ADD COLUMN candle_digest text;

CREATE OR REPLACE FUNCTION keep_candle_revision() RETURNS trigger LANGUAGE plpgsql AS $$
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
