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
