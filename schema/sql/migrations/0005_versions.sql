-- What tells versions of a bar apart once the log has aged: the sender's clock that each came with. And when the bar's
-- age was judged, which later versions do not change. The past stays null: its rows were told apart by the log alone.
ALTER TABLE market_data ADD COLUMN server_time bigint, ADD COLUMN heard_at timestamptz;
ALTER TABLE candle_revisions ADD COLUMN server_time bigint, ADD COLUMN heard_at timestamptz;

CREATE OR REPLACE FUNCTION keep_candle_revision() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO candle_revisions
        (ts, symbol, timeframe, open, high, low, close, volume, spread, real_volume, revision, source, ts_source,
         received_at, candles_seq, live, replaced_by_seq, server_time, heard_at)
    VALUES
        (OLD.ts, OLD.symbol, OLD.timeframe, OLD.open, OLD.high, OLD.low, OLD.close, OLD.volume, OLD.spread,
         OLD.real_volume, OLD.revision, OLD.source, OLD.ts_source, OLD.received_at, OLD.candles_seq, OLD.live,
         NEW.candles_seq, OLD.server_time, OLD.heard_at)
    ON CONFLICT DO NOTHING;
    RETURN NULL;
END
$$;
