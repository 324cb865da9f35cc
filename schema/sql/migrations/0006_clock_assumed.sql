-- A bar whose time is a guess is told by name: clock_assumed, the last column of every features_<timeframe>.
DO $$
DECLARE
    tf text;
BEGIN
    FOREACH tf IN ARRAY ARRAY[
        'M1', 'M2', 'M3', 'M4', 'M5', 'M6', 'M10', 'M12', 'M15', 'M20', 'M30',
        'H1', 'H2', 'H3', 'H4', 'H6', 'H8', 'H12', 'D1', 'W1', 'MN1'
    ] LOOP
        EXECUTE format(
            'CREATE OR REPLACE VIEW %I AS SELECT ts, symbol, timeframe, close, volume, spread, rsi, macd, macd_signal, '
            'macd_hist, atr, ma60, ret_1, fwd_ret_5, ready, bar, candle_revision, candles_seq, '
            'ts_source = ''assumed'' AS clock_assumed FROM features WHERE timeframe = %L',
            'features_' || lower(tf), tf
        );
    END LOOP;
END
$$;
