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
