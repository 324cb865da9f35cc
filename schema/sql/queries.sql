-- Every statement that the actors run, by name; parameters are listed in the order of $1, $2, …
-- Upserts take columns as arrays (one statement a batch, and it survives PgBouncer's transaction mode), never go back in
-- CANDLES sequence and leave an unchanged row alone. No array may hold one key twice: the batch is reduced before.

-- name: ping
SELECT 1;

-- --- migrations -------------------------------------------------------------------------------------------------

-- name: migrations_table_exists
SELECT to_regclass('schema_migrations') IS NOT NULL;

-- name: applied_migrations
SELECT version FROM schema_migrations ORDER BY version;

-- Held until the transaction's end, so that two migrating processes take turns; works through PgBouncer as well.
-- name: lock_migrations
SELECT pg_advisory_xact_lock(7305813294611017);

-- name: record_migration
-- version
INSERT INTO schema_migrations (version) VALUES ($1);

-- --- recorder ---------------------------------------------------------------------------------------------------

-- name: load_cursor
-- reader, partition
SELECT candles_seq, stream_seq, stream_created, stored_at FROM cursors WHERE reader = $1 AND partition = $2;

-- First in the recorder's transaction: the row's lock makes two recorders take turns, and the one whose cursor is not
-- where it left it gets no row back and takes its whole transaction back. A stream made anew restarts the CANDLES
-- sequence too, which is the safe direction: what lies above it is not taken as archived.
-- name: move_cursor
-- reader, partition, candles_seq, stream_seq, stream_created, stored_at; the cursor as it was: stream_seq, stream_created
-- (null where there was none)
INSERT INTO cursors AS c (reader, partition, candles_seq, stream_seq, stream_created, stored_at)
SELECT $1, $2, $3, $4, $5, $6
WHERE $7::int8 IS NULL OR EXISTS (SELECT FROM cursors WHERE reader = $1 AND partition = $2)
ON CONFLICT (reader, partition) DO UPDATE SET
    candles_seq = CASE WHEN c.stream_created = excluded.stream_created
        THEN greatest(c.candles_seq, excluded.candles_seq) ELSE excluded.candles_seq END,
    stream_seq = excluded.stream_seq,
    stream_created = excluded.stream_created,
    stored_at = excluded.stored_at,
    updated_at = now()
WHERE c.stream_seq = $7 AND c.stream_created = $8
RETURNING c.stream_seq;

-- For a restore: the streams hold the same messages again, and nats-server counts them as made anew.
-- name: all_cursors
SELECT reader, partition, stream_seq, stored_at FROM cursors;

-- name: rebind_cursor
-- reader, partition, stream_created
UPDATE cursors SET stream_created = $3 WHERE reader = $1 AND partition = $2;

-- The newest CANDLES sequence that the archive knows to be whole.
-- name: highest_candles_seq
SELECT coalesce(max(candles_seq), 0) FROM cursors;

-- A version whose values and revision are stored already keeps the sequence, source and time it came with, and the
-- sequence from which on it was used; but for a bar that a rename has copied, of which only the log's own say is known.
-- name: upsert_market_data
-- ts[], symbol[], timeframe[], open[], high[], low[], close[], volume[], spread[], real_volume[], revision[], source[],
-- ts_source[], received_at[], candles_seq[], live[], server_time[], heard_at[], applied_seq[]
INSERT INTO market_data AS m
    (ts, symbol, timeframe, open, high, low, close, volume, spread, real_volume, revision, source, ts_source,
     received_at, candles_seq, live, server_time, heard_at, applied_seq)
SELECT * FROM unnest(
    $1::timestamptz[], $2::text[], $3::text[], $4::float8[], $5::float8[], $6::float8[], $7::float8[], $8::float8[],
    $9::float8[], $10::float8[], $11::int4[], $12::text[], $13::text[], $14::timestamptz[], $15::int8[],
    $16::bool[], $17::int8[], $18::timestamptz[], $19::int8[]
)
ON CONFLICT (symbol, timeframe, ts) DO UPDATE SET
    open = excluded.open, high = excluded.high, low = excluded.low, close = excluded.close,
    volume = excluded.volume, spread = excluded.spread, real_volume = excluded.real_volume,
    revision = excluded.revision, source = excluded.source, ts_source = excluded.ts_source,
    received_at = excluded.received_at, candles_seq = excluded.candles_seq, live = excluded.live,
    server_time = excluded.server_time, heard_at = excluded.heard_at,
    applied_seq = CASE
        WHEN m.applied_seq IS NOT NULL
            AND (m.open, m.high, m.low, m.close, m.volume, m.spread, m.real_volume, m.revision) IS NOT DISTINCT FROM
                (excluded.open, excluded.high, excluded.low, excluded.close, excluded.volume, excluded.spread,
                 excluded.real_volume, excluded.revision)
        THEN m.applied_seq ELSE excluded.applied_seq END
WHERE m.candles_seq <= excluded.candles_seq
    AND ((m.open, m.high, m.low, m.close, m.volume, m.spread, m.real_volume, m.revision, m.ts_source) IS DISTINCT FROM
         (excluded.open, excluded.high, excluded.low, excluded.close, excluded.volume, excluded.spread,
          excluded.real_volume, excluded.revision, excluded.ts_source)
        OR (m.applied_seq IS NULL AND m.candles_seq < excluded.candles_seq));

-- A newer sequence is written even over equal values: otherwise a repeat of what came between could bring old values
-- back. The label goes by its own sequence (fwd_seq); at the same sequence null means "not yet known" and gives way.
-- name: upsert_features
-- ts[], symbol[], timeframe[], close[], volume[], spread[], rsi[], macd[], macd_signal[], macd_hist[], atr[], ma60[],
-- ret_1[], fwd_ret_5[], ready[], bar[], candle_revision[], candles_seq[], fwd_seq[], ts_source[]
INSERT INTO features AS f
    (ts, symbol, timeframe, close, volume, spread, rsi, macd, macd_signal, macd_hist, atr, ma60, ret_1, fwd_ret_5,
     ready, bar, candle_revision, candles_seq, fwd_seq, ts_source)
SELECT * FROM unnest(
    $1::timestamptz[], $2::text[], $3::text[], $4::float8[], $5::float8[], $6::float8[], $7::float8[], $8::float8[],
    $9::float8[], $10::float8[], $11::float8[], $12::float8[], $13::float8[], $14::float8[], $15::bool[], $16::int4[],
    $17::int4[], $18::int8[], $19::int8[], $20::text[]
)
ON CONFLICT (symbol, timeframe, ts) DO UPDATE SET
    close = excluded.close, volume = excluded.volume, spread = excluded.spread, rsi = excluded.rsi,
    macd = excluded.macd, macd_signal = excluded.macd_signal, macd_hist = excluded.macd_hist, atr = excluded.atr,
    ma60 = excluded.ma60, ret_1 = excluded.ret_1,
    fwd_ret_5 = CASE
        WHEN excluded.fwd_seq > f.fwd_seq THEN excluded.fwd_ret_5
        WHEN excluded.fwd_seq = f.fwd_seq THEN coalesce(excluded.fwd_ret_5, f.fwd_ret_5)
        ELSE f.fwd_ret_5 END,
    ready = excluded.ready, bar = excluded.bar, candle_revision = excluded.candle_revision,
    candles_seq = excluded.candles_seq, fwd_seq = greatest(excluded.fwd_seq, f.fwd_seq),
    ts_source = excluded.ts_source
WHERE f.candles_seq < excluded.candles_seq
    OR (f.candles_seq = excluded.candles_seq
        AND (f.close, f.volume, f.spread, f.rsi, f.macd, f.macd_signal, f.macd_hist, f.atr, f.ma60, f.ret_1, f.ready,
             f.bar, f.candle_revision,
             CASE WHEN f.fwd_seq > excluded.fwd_seq THEN NULL ELSE f.fwd_ret_5 END) IS DISTINCT FROM
            (excluded.close, excluded.volume, excluded.spread, excluded.rsi, excluded.macd, excluded.macd_signal,
             excluded.macd_hist, excluded.atr, excluded.ma60, excluded.ret_1, excluded.ready, excluded.bar,
             excluded.candle_revision,
             CASE WHEN f.fwd_seq > excluded.fwd_seq THEN NULL
                  WHEN f.fwd_seq = excluded.fwd_seq THEN coalesce(excluded.fwd_ret_5, f.fwd_ret_5)
                  ELSE excluded.fwd_ret_5 END));

-- name: upsert_symbols
-- symbol[], point[]
INSERT INTO symbols AS s (symbol, point) SELECT * FROM unnest($1::text[], $2::float8[])
ON CONFLICT (symbol) DO UPDATE SET point = excluded.point, updated_at = now()
WHERE s.point IS DISTINCT FROM excluded.point;

-- name: apply_fills
-- ts[], symbol[], timeframe[], fwd_ret_5[], fwd_seq[]
UPDATE features AS f SET fwd_ret_5 = x.fwd_ret_5, fwd_seq = x.fwd_seq
FROM unnest($1::timestamptz[], $2::text[], $3::text[], $4::float8[], $5::int8[])
    AS x (ts, symbol, timeframe, fwd_ret_5, fwd_seq)
WHERE f.symbol = x.symbol AND f.timeframe = x.timeframe AND f.ts = x.ts
    AND (f.fwd_seq < x.fwd_seq
        OR (f.fwd_seq = x.fwd_seq AND x.fwd_ret_5 IS NOT NULL AND f.fwd_ret_5 IS DISTINCT FROM x.fwd_ret_5));

-- One id is one decision: the same id from a later CANDLES sequence is the decision made again, and stands anew.
-- name: upsert_signals
-- ts[], symbol[], timeframe[], model_name[], threshold[], prob_up[], label[], created_at[], id[], model_version[],
-- abstain[], candle_revision[], candles_seq[], features_hash[], expires_at[], supersedes[], trace_id[], received_at[],
-- features_at[], candle_digest[]
INSERT INTO model_signals AS s
    (ts, symbol, timeframe, model_name, threshold, prob_up, label, created_at, id, model_version, abstain,
     candle_revision, candles_seq, features_hash, expires_at, supersedes, trace_id, received_at, features_at,
     candle_digest)
SELECT * FROM unnest(
    $1::timestamptz[], $2::text[], $3::text[], $4::text[], $5::float8[], $6::float8[], $7::int2[], $8::timestamptz[],
    $9::text[], $10::text[], $11::text[], $12::int4[], $13::int8[], $14::text[], $15::timestamptz[], $16::text[],
    $17::text[], $18::timestamptz[], $19::timestamptz[], $20::text[]
)
ON CONFLICT (id, ts) DO UPDATE SET
    threshold = excluded.threshold, prob_up = excluded.prob_up, label = excluded.label,
    created_at = excluded.created_at, abstain = excluded.abstain, candle_revision = excluded.candle_revision,
    candles_seq = excluded.candles_seq, expires_at = excluded.expires_at, supersedes = excluded.supersedes,
    superseded_at = NULL, trace_id = excluded.trace_id, received_at = excluded.received_at,
    features_at = excluded.features_at, candle_digest = excluded.candle_digest
WHERE s.candles_seq < excluded.candles_seq;

-- Of a bar's signals by one model only the newest stands; the others keep their rows.
-- name: supersede_signals
-- id[], ts[], symbol[], timeframe[], model_name[], superseded_at[], candles_seq[] of the newest signals
UPDATE model_signals AS s SET superseded_at = x.superseded_at
FROM unnest($1::text[], $2::timestamptz[], $3::text[], $4::text[], $5::text[], $6::timestamptz[], $7::int8[])
    AS x (id, ts, symbol, timeframe, model_name, superseded_at, candles_seq)
WHERE s.symbol = x.symbol AND s.timeframe = x.timeframe AND s.ts = x.ts AND s.model_name = x.model_name
    AND s.id <> x.id AND s.candles_seq <= x.candles_seq AND s.superseded_at IS NULL;

-- A signal of a bar that was withdrawn meanwhile: features and signals are archived independently of each other.
-- name: supersede_withdrawn
-- id[], ts[] of the signals just stored
UPDATE model_signals AS s SET superseded_at = w.withdrawn_at
FROM candle_withdrawals AS w
WHERE s.id = ANY($1::text[]) AND s.ts = ANY($2::timestamptz[]) AND s.superseded_at IS NULL
    AND w.symbol = s.symbol AND w.timeframe = s.timeframe AND w.ts = s.ts AND w.candles_seq > s.candles_seq;

-- Bars that were never there: out of both tables, their last values kept, their signals superseded.
-- name: withdraw_bars
-- ts[], symbol[], timeframe[], revision[], candles_seq[], withdrawn_at[]
WITH x AS (
    SELECT * FROM unnest($1::timestamptz[], $2::text[], $3::text[], $4::int4[], $5::int8[], $6::timestamptz[])
        AS x (ts, symbol, timeframe, revision, candles_seq, withdrawn_at)
), gone AS (
    DELETE FROM market_data AS m USING x
    WHERE m.symbol = x.symbol AND m.timeframe = x.timeframe AND m.ts = x.ts AND m.candles_seq < x.candles_seq
    RETURNING m.*, x.candles_seq AS replaced_by_seq
), kept AS (
    INSERT INTO candle_revisions
        (ts, symbol, timeframe, open, high, low, close, volume, spread, real_volume, revision, source, ts_source,
         received_at, candles_seq, live, replaced_by_seq, server_time, heard_at, applied_seq)
    SELECT ts, symbol, timeframe, open, high, low, close, volume, spread, real_volume, revision, source, ts_source,
        received_at, candles_seq, live, replaced_by_seq, server_time, heard_at, applied_seq
    FROM gone
    ON CONFLICT DO NOTHING
), cleared AS (
    DELETE FROM features AS f USING x
    WHERE f.symbol = x.symbol AND f.timeframe = x.timeframe AND f.ts = x.ts AND f.candles_seq < x.candles_seq
), superseded AS (
    UPDATE model_signals AS s SET superseded_at = x.withdrawn_at FROM x
    WHERE s.symbol = x.symbol AND s.timeframe = x.timeframe AND s.ts = x.ts AND s.candles_seq < x.candles_seq
        AND s.superseded_at IS NULL
)
INSERT INTO candle_withdrawals (ts, symbol, timeframe, revision, candles_seq, withdrawn_at)
SELECT ts, symbol, timeframe, revision, candles_seq, withdrawn_at FROM x
ON CONFLICT DO NOTHING;

-- --- HTTP reads -------------------------------------------------------------------------------------------------

-- name: candles_from
-- symbol, timeframe, from, to or null, limit; ascending, both ends included
SELECT ts, open, high, low, close, volume, spread, real_volume
FROM market_data
WHERE symbol = $1 AND timeframe = $2 AND ts >= $3 AND ts <= coalesce($4::timestamptz, 'infinity')
ORDER BY ts LIMIT $5;

-- name: candles_newest
-- symbol, timeframe, to or null, limit; the newest, ascending
SELECT * FROM (
    SELECT ts, open, high, low, close, volume, spread, real_volume
    FROM market_data
    WHERE symbol = $1 AND timeframe = $2 AND ts <= coalesce($3::timestamptz, 'infinity')
    ORDER BY ts DESC LIMIT $4
) AS newest
ORDER BY ts;

-- name: features_from
-- symbol, timeframe, from, to or null, limit; ascending, both ends included
SELECT f.ts, m.open, m.high, m.low, f.close, f.volume, f.spread, m.real_volume, f.rsi, f.macd, f.macd_signal,
    f.macd_hist, f.atr, f.ma60, f.ret_1, f.fwd_ret_5, f.bar, f.ready, f.candle_revision AS revision
FROM features AS f JOIN market_data AS m USING (symbol, timeframe, ts)
WHERE f.symbol = $1 AND f.timeframe = $2 AND f.ts >= $3 AND f.ts <= coalesce($4::timestamptz, 'infinity')
ORDER BY f.ts LIMIT $5;

-- name: features_newest
-- symbol, timeframe, to or null, limit; the newest, ascending
SELECT * FROM (
    SELECT f.ts, m.open, m.high, m.low, f.close, f.volume, f.spread, m.real_volume, f.rsi, f.macd, f.macd_signal,
        f.macd_hist, f.atr, f.ma60, f.ret_1, f.fwd_ret_5, f.bar, f.ready, f.candle_revision AS revision
    FROM features AS f JOIN market_data AS m USING (symbol, timeframe, ts)
    WHERE f.symbol = $1 AND f.timeframe = $2 AND f.ts <= coalesce($3::timestamptz, 'infinity')
    ORDER BY f.ts DESC LIMIT $4
) AS newest
ORDER BY ts;

-- name: signals_newest
-- timeframe, symbol or null, since (a bar's time) or null, limit; newest first
SELECT id, ts, symbol, timeframe, model_name, model_version, threshold, prob_up, label, abstain, candle_revision,
    candles_seq, features_hash, created_at, expires_at, supersedes
FROM model_signals
WHERE timeframe = $1 AND ($2::text IS NULL OR symbol = $2) AND ts >= coalesce($3::timestamptz, '-infinity')
ORDER BY ts DESC, candles_seq DESC, id LIMIT $4;

-- --- features -----------------------------------------------------------------------------------------------------

-- The series as the log's first message met it: each bar in the version that was current then.
-- name: bars_before
-- symbol, timeframe, after (exclusive) or null, candles_seq (exclusive); ascending
SELECT ts, open, high, low, close, volume, spread, real_volume, revision, live, source, ts_source, candles_seq,
    server_time, heard_at, applied_seq
FROM market_data
WHERE symbol = $1 AND timeframe = $2 AND ts > coalesce($3::timestamptz, '-infinity') AND candles_seq < $4
UNION ALL
SELECT ts, open, high, low, close, volume, spread, real_volume, revision, live, source, ts_source, candles_seq,
    server_time, heard_at, applied_seq
FROM candle_revisions
WHERE symbol = $1 AND timeframe = $2 AND ts > coalesce($3::timestamptz, '-infinity')
    AND candles_seq < $4 AND replaced_by_seq >= $4
ORDER BY ts;

-- What the bars of bars_before, and those withdrawn by then, had been before.
-- name: former_versions
-- symbol, timeframe, after (exclusive) or null, candles_seq (exclusive)
SELECT ts, open, high, low, close, volume, spread, real_volume
FROM candle_revisions
WHERE symbol = $1 AND timeframe = $2 AND ts > coalesce($3::timestamptz, '-infinity') AND replaced_by_seq < $4;

-- name: withdrawn_before
-- symbol, timeframe, after (exclusive) or null, candles_seq (exclusive); ascending
SELECT ts, max(revision) AS revision, max(candles_seq) AS seq
FROM candle_withdrawals
WHERE symbol = $1 AND timeframe = $2 AND ts > coalesce($3::timestamptz, '-infinity') AND candles_seq < $4
GROUP BY ts ORDER BY ts;

-- --- series ------------------------------------------------------------------------------------------------------

-- A step of the primary key's index a series, however many bars each has.
-- name: series_list
-- symbol or null, timeframe or null
WITH RECURSIVE s AS (
    (SELECT symbol, timeframe FROM market_data ORDER BY symbol, timeframe LIMIT 1)
    UNION ALL
    SELECT n.symbol, n.timeframe
    FROM s CROSS JOIN LATERAL (
        SELECT m.symbol, m.timeframe FROM market_data AS m
        WHERE (m.symbol, m.timeframe) > (s.symbol, s.timeframe) ORDER BY m.symbol, m.timeframe LIMIT 1
    ) AS n
)
SELECT symbol, timeframe FROM s
WHERE ($1::text IS NULL OR symbol = $1) AND ($2::text IS NULL OR timeframe = $2);

-- The first row's "before" is the first bar, the last row's "after" the last one; between them the holes. No row where
-- there is no bar. The source is the newest bar's.
-- name: series_holes
-- symbol, timeframe, from or null, to or null, limit (the newest bars of that span), seconds from a bar to the next
WITH bars AS (
    SELECT ts, source FROM market_data
    WHERE symbol = $1 AND timeframe = $2
        AND ts >= coalesce($3::timestamptz, '-infinity') AND ts <= coalesce($4::timestamptz, 'infinity')
    ORDER BY ts DESC LIMIT $5
), pairs AS (
    SELECT lag(ts) OVER (ORDER BY ts) AS after, ts AS before FROM bars
)
SELECT extract(epoch FROM after)::int8 AS after, extract(epoch FROM before)::int8 AS before, NULL::int8 AS bars,
    NULL AS source
FROM pairs WHERE after IS NULL OR before - after <> make_interval(secs => $6::float8)
UNION ALL
SELECT extract(epoch FROM max(ts))::int8, NULL, count(*), (SELECT source FROM bars ORDER BY ts DESC LIMIT 1)
FROM bars HAVING count(*) > 0
ORDER BY before NULLS LAST;

-- name: series_rows
-- symbol, timeframe, after (exclusive) or null, limit; ascending
SELECT ts, open, high, low, close, volume, spread, real_volume, source, ts_source
FROM market_data
WHERE symbol = $1 AND timeframe = $2 AND ts > coalesce($3::timestamptz, '-infinity')
ORDER BY ts LIMIT $4;

-- Under the new name a bar counts its revisions anew and has made no signal; the recorder's later rows win over these.
-- From when on features use it is for the log to say (applied_seq is null until then).
-- name: copy_market_data
-- old symbol, new symbol, timeframe, up to ts (included)
INSERT INTO market_data
    (ts, symbol, timeframe, open, high, low, close, volume, spread, real_volume, revision, source, ts_source,
     received_at, candles_seq, live, server_time, heard_at)
SELECT ts, $2, timeframe, open, high, low, close, volume, spread, real_volume, 0, source, ts_source, received_at,
    candles_seq, false, server_time, heard_at
FROM market_data WHERE symbol = $1 AND timeframe = $3 AND ts <= $4
ON CONFLICT DO NOTHING;

-- name: copy_features
-- old symbol, new symbol, timeframe, up to ts (included)
INSERT INTO features
    (ts, symbol, timeframe, close, volume, spread, rsi, macd, macd_signal, macd_hist, atr, ma60, ret_1, fwd_ret_5,
     ready, bar, candle_revision, candles_seq, fwd_seq, ts_source)
SELECT ts, $2, timeframe, close, volume, spread, rsi, macd, macd_signal, macd_hist, atr, ma60, ret_1, fwd_ret_5,
    ready, bar, 0, candles_seq, fwd_seq, ts_source
FROM features WHERE symbol = $1 AND timeframe = $3 AND ts <= $4
ON CONFLICT DO NOTHING;

-- The old name's bars go; as the versions that its signals were made of they are kept among the revisions.
-- name: retire_market_data
-- symbol, timeframe, up to ts (included), the CANDLES sequence of the rename
WITH gone AS (
    DELETE FROM market_data WHERE symbol = $1 AND timeframe = $2 AND ts <= $3 RETURNING *
)
INSERT INTO candle_revisions
    (ts, symbol, timeframe, open, high, low, close, volume, spread, real_volume, revision, source, ts_source,
     received_at, candles_seq, live, replaced_by_seq, server_time, heard_at, applied_seq)
SELECT ts, symbol, timeframe, open, high, low, close, volume, spread, real_volume, revision, source, ts_source,
    received_at, candles_seq, live, $4, server_time, heard_at, applied_seq
FROM gone
ON CONFLICT DO NOTHING;

-- name: retire_features
-- symbol, timeframe, up to ts (included)
DELETE FROM features WHERE symbol = $1 AND timeframe = $2 AND ts <= $3;

-- name: record_rename
-- old symbol, new symbol, timeframe, bars, the CANDLES sequence of the rename, by
INSERT INTO series_renames AS r (old_symbol, new_symbol, timeframe, bars, candles_seq, by)
VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (old_symbol, new_symbol, timeframe, candles_seq) DO UPDATE SET bars = r.bars + excluded.bars;

-- name: list_renames
SELECT old_symbol, new_symbol, timeframe, renamed_at, bars, candles_seq, by FROM series_renames ORDER BY renamed_at;

-- --- models -----------------------------------------------------------------------------------------------------

-- name: list_models
-- model_name or null; newest version first
SELECT model_name, version, timeframe, state, created_at, from_seq, activated_at, reason, by, manifest::text AS manifest
FROM models WHERE $1::text IS NULL OR model_name = $1
ORDER BY model_name, version DESC;

-- A known version keeps its state: set_model_state alone changes it.
-- name: upsert_model
-- model_name, version, timeframe, state, created_at, manifest (JSON text)
INSERT INTO models (model_name, version, timeframe, state, created_at, manifest)
VALUES ($1, $2, $3, $4, $5, $6::text::jsonb)
ON CONFLICT (model_name, version) DO UPDATE SET
    timeframe = excluded.timeframe, created_at = excluded.created_at, manifest = excluded.manifest;

-- name: set_model_state
-- model_name, version, state, from_seq or null (kept), activated_at or null (kept), reason, by
UPDATE models SET
    state = $3, from_seq = coalesce($4::int8, from_seq), activated_at = coalesce($5::timestamptz, activated_at),
    reason = $6, by = $7
WHERE model_name = $1 AND version = $2;

-- An event is read at each start; its row is written once.
-- name: insert_model_decision
-- at, model_name, version, action, by, reason, evidence (JSON text)
INSERT INTO model_decisions (at, model_name, version, action, by, reason, evidence)
VALUES ($1, $2, $3, $4, $5, $6, $7::text::jsonb)
ON CONFLICT DO NOTHING;

-- name: model_decisions
-- model_name, version, limit; the newest that made it serve or were made against it, oldest first
SELECT * FROM (
    SELECT id, at, version, action, by, reason, evidence::text AS evidence FROM model_decisions
    WHERE model_name = $1 AND (version = $2 OR evidence->>'against' = $2)
    ORDER BY at DESC, id DESC LIMIT $3
) AS newest
ORDER BY at, id;

-- name: model_evidence
-- model_name or null; each version's newest decision
SELECT DISTINCT ON (model_name, version) model_name, version, action, evidence::text AS evidence
FROM model_decisions WHERE $1::text IS NULL OR model_name = $1
ORDER BY model_name, version, at DESC, id DESC;

-- name: symbol_points
SELECT symbol, point FROM symbols;

-- name: insert_model_metrics
-- created_at, model_name, metrics (JSON text)
INSERT INTO model_metrics (created_at, model_name, metrics) VALUES ($1, $2, $3::text::jsonb) RETURNING id;

-- --- trainer ----------------------------------------------------------------------------------------------------

-- name: trainset_symbols
-- timeframe
SELECT symbol, count(*) AS rows, min(ts) AS first_ts, max(ts) AS last_ts
FROM trainset WHERE timeframe = $1 GROUP BY symbol ORDER BY symbol;

-- Beside each row stand the bars of its trade: the next one, which it enters at its open, and the fifth following one,
-- which it leaves at its close. A chunk reads five bars beyond its newest row, so that chunks may be cut anywhere.
-- The open is looked up row by row: of a join a planner without statistics makes a loop in a loop.
-- name: trainset_rows
-- timeframe, symbol, before (exclusive), limit; newest first, read on with the last row's ts
WITH chunk AS MATERIALIZED (
    SELECT min(ts) AS first, max(ts) AS last FROM (
        SELECT ts FROM trainset WHERE timeframe = $1 AND symbol = $2 AND ts < $3 ORDER BY ts DESC LIMIT $4
    ) AS newest
), after AS MATERIALIZED (
    SELECT max(ts) AS last FROM (
        SELECT ts FROM features
        WHERE symbol = $2 AND timeframe = $1 AND ts >= (SELECT last FROM chunk) ORDER BY ts LIMIT 6
    ) AS trade
)
SELECT ts, close, volume, spread, rsi, macd, macd_signal, macd_hist, atr, ma60, ret_1, fwd_ret_5,
    (SELECT open FROM market_data AS m WHERE m.symbol = $2 AND m.timeframe = $1 AND m.ts = bars.entry_ts) AS entry_open,
    entry_spread, entry_close, exit_spread, exit_close
FROM (
    SELECT *, lead(ts, 1) OVER w AS entry_ts, lead(spread, 1) OVER w AS entry_spread, lead(close, 1) OVER w AS entry_close,
        lead(spread, 5) OVER w AS exit_spread, lead(close, 5) OVER w AS exit_close
    FROM features
    WHERE symbol = $2 AND timeframe = $1 AND ts >= (SELECT first FROM chunk) AND ts <= (SELECT last FROM after)
    WINDOW w AS (ORDER BY ts)
) AS bars
WHERE ready AND fwd_ret_5 IS NOT NULL AND ts_source <> 'assumed' AND ts <= (SELECT last FROM chunk)
ORDER BY ts DESC;

-- Whether the archive has a series from its first bar on, and how many bars it has.
-- name: series_ends
-- timeframe, symbol
SELECT
    (SELECT bar FROM features WHERE symbol = $2 AND timeframe = $1 ORDER BY ts LIMIT 1) AS first_bar,
    (SELECT bar FROM features WHERE symbol = $2 AND timeframe = $1 ORDER BY ts DESC LIMIT 1) AS last_bar;

-- --- clock restatements ---------------------------------------------------------------------------------------------

-- name: clock_series
-- source or null; every series that the source has bars in, replaced and withdrawn ones included
SELECT symbol, timeframe, min(ts) AS first_ts, max(ts) AS last_ts
FROM (
    SELECT symbol, timeframe, ts FROM market_data WHERE source IS NOT DISTINCT FROM $1::text
    UNION ALL
    SELECT symbol, timeframe, ts FROM candle_revisions WHERE source IS NOT DISTINCT FROM $1::text
) AS versions
GROUP BY symbol, timeframe ORDER BY symbol, timeframe;

-- name: clock_versions
-- symbol, timeframe, source or null, from, to (exclusive); every version of the source's bars, ascending
SELECT ts, received_at, ts_source, true AS current, open, high, low, close, volume, spread, real_volume
FROM market_data
WHERE symbol = $1 AND timeframe = $2 AND source IS NOT DISTINCT FROM $3::text AND ts >= $4 AND ts < $5
UNION ALL
SELECT ts, received_at, ts_source, false, open, high, low, close, volume, spread, real_volume
FROM candle_revisions
WHERE symbol = $1 AND timeframe = $2 AND source IS NOT DISTINCT FROM $3::text AND ts >= $4 AND ts < $5
ORDER BY ts;

-- --- scorer -----------------------------------------------------------------------------------------------------

-- Up to where the archive holds the two streams.
-- name: recorder_cursors
SELECT reader, candles_seq, stream_seq, stream_created FROM cursors
WHERE reader IN ('recorder.features', 'recorder.signals') AND partition = 0;

-- A bar's trade ends five bars later: what changes a bar may change the outcomes of the five before it.
-- name: spans_widened
-- symbol[], timeframe[], first[], last[]; each from five bars earlier on
SELECT x.symbol, x.timeframe, coalesce((
    SELECT min(b.ts) FROM (
        SELECT m.ts FROM market_data AS m
        WHERE m.symbol = x.symbol AND m.timeframe = x.timeframe AND m.ts < x.first ORDER BY m.ts DESC LIMIT 5
    ) AS b
), x.first) AS first, x.last
FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[]) AS x (symbol, timeframe, first, last);

-- The signals that stand and say a probability, of any bar of the spans.
-- name: said_in_spans
-- symbol[], timeframe[], first[], last[]
SELECT s.id, s.ts, s.symbol, s.timeframe, s.model_name, s.model_version, s.prob_up, s.label, s.abstain, s.candles_seq
FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[]) AS x (symbol, timeframe, first, last)
JOIN model_signals AS s
    ON s.timeframe = x.timeframe AND s.symbol = x.symbol AND s.ts >= x.first AND s.ts <= x.last
WHERE s.superseded_at IS NULL AND s.prob_up IS NOT NULL AND s.model_version IS NOT NULL;

-- name: outcomes_in_spans
-- symbol[], timeframe[], first[], last[]
SELECT o.id, o.ts, o.symbol, o.timeframe, o.model_name, o.model_version, o.state, o.prob_up, o.base_rate, o.label,
    o.abstain, o.ret, o.up, o.won, o.gross, o.net, o.candles_seq, o.fwd_seq, o.void
FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[]) AS x (symbol, timeframe, first, last)
JOIN signal_outcomes AS o
    ON o.timeframe = x.timeframe AND o.symbol = x.symbol AND o.ts >= x.first AND o.ts <= x.last;

-- Bars whose label is known and that five bars follow, with their features and with what a trade meets: the open of the
-- next bar, the close of the fifth, and either's spread.
-- name: bars_in_spans
-- symbol[], timeframe[], first[], last[]
SELECT f.symbol, f.timeframe, f.ts, m.open, m.high, m.low, f.close, f.volume, f.spread, m.real_volume, f.rsi, f.macd,
    f.macd_signal, f.macd_hist, f.atr, f.ma60, f.ret_1, f.fwd_ret_5, f.bar, f.ready, f.candle_revision AS revision,
    m.live, f.ts_source, f.candles_seq, f.fwd_seq, n.entry_open, n.entry_close, n.entry_spread, n.exit_close,
    n.exit_spread, n.trade_seq
FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[]) AS x (symbol, timeframe, first, last)
JOIN features AS f ON f.symbol = x.symbol AND f.timeframe = x.timeframe AND f.ts >= x.first AND f.ts <= x.last
JOIN market_data AS m ON m.symbol = f.symbol AND m.timeframe = f.timeframe AND m.ts = f.ts
CROSS JOIN LATERAL (
    SELECT count(*) AS bars, (array_agg(b.open ORDER BY b.ts))[1] AS entry_open,
        (array_agg(b.close ORDER BY b.ts))[1] AS entry_close, (array_agg(b.spread ORDER BY b.ts))[1] AS entry_spread,
        (array_agg(b.close ORDER BY b.ts))[5] AS exit_close, (array_agg(b.spread ORDER BY b.ts))[5] AS exit_spread,
        max(b.candles_seq) AS trade_seq
    FROM (
        SELECT ts, open, close, spread, candles_seq FROM market_data
        WHERE symbol = f.symbol AND timeframe = f.timeframe AND ts > f.ts ORDER BY ts LIMIT 5
    ) AS b
) AS n
WHERE f.fwd_ret_5 IS NOT NULL AND n.bars = 5;

-- name: model_facts
-- model_name, version
SELECT (manifest->>'base_rate')::float8 AS base_rate, (manifest->>'first_ts')::timestamptz AS first_ts,
    (manifest->>'last_ts')::timestamptz AS last_ts, manifest->>'feature_set' AS feature_set,
    (manifest->'report'->'outliers'->>'validation_rate')::float8 AS outlier_rate
FROM models WHERE model_name = $1 AND version = $2;

-- name: load_trials
SELECT model_name, docket::text AS docket FROM model_trials;

-- name: save_trials
-- model_name, docket (JSON text)
INSERT INTO model_trials AS t (model_name, docket) VALUES ($1, $2::text::jsonb)
ON CONFLICT (model_name) DO UPDATE SET docket = excluded.docket, updated_at = now();

-- An outcome keeps its place (seq) when a correction changes it; it stands again where it was void.
-- name: upsert_outcomes
-- id[], ts[], symbol[], timeframe[], model_name[], model_version[], state[], prob_up[], base_rate[], label[], abstain[],
-- ret[], up[], won[], gross[], net[], candles_seq[], fwd_seq[]
INSERT INTO signal_outcomes AS o
    (id, ts, symbol, timeframe, model_name, model_version, state, prob_up, base_rate, label, abstain, ret, up, won,
     gross, net, candles_seq, fwd_seq)
SELECT * FROM unnest(
    $1::text[], $2::timestamptz[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::float8[],
    $9::float8[], $10::int2[], $11::text[], $12::float8[], $13::bool[], $14::bool[], $15::float8[], $16::float8[],
    $17::int8[], $18::int8[]
)
ON CONFLICT (id, ts) DO UPDATE SET
    state = excluded.state, prob_up = excluded.prob_up, base_rate = excluded.base_rate, label = excluded.label,
    abstain = excluded.abstain, ret = excluded.ret, up = excluded.up, won = excluded.won, gross = excluded.gross,
    net = excluded.net, candles_seq = excluded.candles_seq, fwd_seq = excluded.fwd_seq, scored_at = now(), void = false
WHERE o.candles_seq <= excluded.candles_seq;

-- name: void_outcomes
-- id[], ts[]
UPDATE signal_outcomes AS o SET void = true, scored_at = now()
FROM unnest($1::text[], $2::timestamptz[]) AS x (id, ts)
WHERE o.id = x.id AND o.ts = x.ts AND NOT o.void;

-- name: outcomes_of_version
-- model_name, model_version, limit; the newest, newest first
SELECT id, ts, symbol, timeframe, model_name, model_version, state, prob_up, base_rate, label, abstain, ret, up, won, gross,
    net, candles_seq
FROM signal_outcomes
WHERE model_name = $1 AND model_version = $2 AND NOT void
ORDER BY seq DESC LIMIT $3;

-- The newest outcomes of one card.
-- name: outcomes_of_card
-- model_name, model_version, symbol, timeframe, limit
SELECT extract(epoch FROM ts)::float8, prob_up, base_rate, up::int::float8, label::float8, won::int::float8, gross, net
FROM signal_outcomes
WHERE timeframe = $4 AND symbol = $3 AND model_name = $1 AND model_version = $2 AND NOT void
ORDER BY ts DESC LIMIT $5;

-- name: card_series
-- model_name, model_version; the series of its newest outcomes
SELECT DISTINCT symbol, timeframe FROM (
    SELECT symbol, timeframe FROM signal_outcomes
    WHERE model_name = $1 AND model_version = $2 AND NOT void ORDER BY seq DESC LIMIT 20000
) AS newest;

-- name: drift_rows
-- timeframe, symbol, from, to, limit; the newest ready rows of a span that a training could use, newest first
SELECT extract(epoch FROM ts)::float8, close, rsi, macd, macd_signal, macd_hist, atr, ma60, ret_1
FROM features
WHERE symbol = $2 AND timeframe = $1 AND ts >= $3 AND ts <= $4 AND ready AND ts_source <> 'assumed'
ORDER BY ts DESC LIMIT $5;

-- --- health -----------------------------------------------------------------------------------------------------

-- name: health_server
-- the oldest transaction id decides when PostgreSQL stops taking writes (at two thousand million)
SELECT current_setting('server_version') AS version,
    (SELECT count(*) FROM pg_stat_activity WHERE datname IS NOT NULL) AS connections,
    current_setting('max_connections')::int AS most,
    (SELECT max(age(datfrozenxid)) FROM pg_database) AS oldest;

-- name: health_size
SELECT pg_database_size(current_database()) AS bytes,
    (SELECT coalesce(sum(n_tup_ins - n_tup_del), 0)::int8 FROM pg_stat_user_tables) AS rows;

-- name: health_bloat
-- least rows of a table that is worth a word
SELECT relname AS name, n_live_tup AS live, n_dead_tup AS dead
FROM pg_stat_user_tables WHERE n_live_tup + n_dead_tup >= $1
ORDER BY n_dead_tup::float8 / (n_live_tup + n_dead_tup) DESC LIMIT 10;

-- name: health_partitions
-- every partition of the tables that are partitioned by range, with its bounds as PostgreSQL writes them
SELECT p.partrelid::regclass::text AS parent, c.oid::regclass::text AS child, pg_get_expr(c.relpartbound, c.oid) AS bound
FROM pg_partitioned_table AS p
JOIN pg_inherits AS i ON i.inhparent = p.partrelid
JOIN pg_class AS c ON c.oid = i.inhrelid
WHERE p.partstrat = 'r' AND p.partnatts = 1
ORDER BY parent, child LIMIT 10000;

-- name: health_timescale
SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb');

-- name: health_tables
SELECT format('%I.%I', schemaname, relname) AS name, n_dead_tup AS dead
FROM pg_stat_user_tables WHERE schemaname = current_schema() ORDER BY relname;

-- name: health_models
SELECT model_name, version, state, created_at FROM models WHERE state IN ('champion', 'provisional')
ORDER BY model_name, activated_at DESC NULLS LAST;

-- The newest bar of every series: one step of the primary key's index each.
-- name: health_newest
-- limit
WITH RECURSIVE s AS (
    (SELECT symbol, timeframe FROM market_data ORDER BY symbol, timeframe LIMIT 1)
    UNION ALL
    SELECT n.symbol, n.timeframe
    FROM s CROSS JOIN LATERAL (
        SELECT m.symbol, m.timeframe FROM market_data AS m
        WHERE (m.symbol, m.timeframe) > (s.symbol, s.timeframe) ORDER BY m.symbol, m.timeframe LIMIT 1
    ) AS n
)
SELECT s.symbol, s.timeframe, b.ts, b.received_at, b.live
FROM s CROSS JOIN LATERAL (
    SELECT ts, received_at, live FROM market_data AS m
    WHERE m.symbol = s.symbol AND m.timeframe = s.timeframe ORDER BY ts DESC LIMIT 1
) AS b
ORDER BY b.ts DESC LIMIT $1;

-- Whether any of a series' newest bars came within so many seconds of its open time, as a live feed's do.
-- name: health_was_live
-- symbol, timeframe, seconds, limit
SELECT coalesce(bool_or(live AND received_at - ts <= make_interval(secs => $3::float8)), false) FROM (
    SELECT ts, received_at, live FROM market_data
    WHERE symbol = $1 AND timeframe = $2 ORDER BY ts DESC LIMIT $4
) AS newest;

-- --- receipts ---------------------------------------------------------------------------------------------------

-- Several statements that see one state of the archive.
-- name: audit_snapshot
SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY;

-- name: audit_cursors
SELECT reader, candles_seq, stream_seq FROM cursors WHERE partition = 0;

-- name: audit_signal
-- id
SELECT id, ts, symbol, timeframe, model_name, model_version, threshold, prob_up, label, abstain, candle_revision,
    candles_seq, features_hash, created_at, expires_at, supersedes, trace_id, received_at, features_at,
    candle_digest
FROM model_signals WHERE id = $1;

-- Ids are hashes: whatever follows a random one in their order is a random signal.
-- name: audit_random
-- ids[] (random, in hex), symbol or null, candles_seq up to which features are archived
SELECT DISTINCT s.id, s.symbol, s.timeframe
FROM unnest($1::text[]) AS r (id)
CROSS JOIN LATERAL (
    SELECT id, symbol, timeframe FROM model_signals
    WHERE model_signals.id >= r.id AND ($2::text IS NULL OR symbol = $2) AND candles_seq <= $3
    ORDER BY model_signals.id LIMIT 1
) AS s;

-- name: audit_newest
-- timeframes[], symbol or null, candles_seq up to which features are archived, limit
SELECT s.id, s.symbol, s.timeframe
FROM unnest($1::text[]) AS t (timeframe)
CROSS JOIN LATERAL (
    SELECT id, ts, symbol, timeframe FROM model_signals
    WHERE model_signals.timeframe = t.timeframe AND ($2::text IS NULL OR symbol = $2) AND candles_seq <= $3
    ORDER BY ts DESC LIMIT $4
) AS s
ORDER BY s.ts DESC, s.id LIMIT $4;

-- A step of an index a series, however many signals each has.
-- name: audit_series
-- symbol or null
WITH RECURSIVE s AS (
    (SELECT timeframe, symbol FROM model_signals ORDER BY timeframe, symbol LIMIT 1)
    UNION ALL
    SELECT n.timeframe, n.symbol
    FROM s CROSS JOIN LATERAL (
        SELECT m.timeframe, m.symbol FROM model_signals AS m
        WHERE (m.timeframe, m.symbol) > (s.timeframe, s.symbol) ORDER BY m.timeframe, m.symbol LIMIT 1
    ) AS n
)
SELECT symbol, timeframe FROM s WHERE $1::text IS NULL OR symbol = $1;

-- name: audit_signals
-- symbol, timeframe, ids[] or null, candles_seq up to which features are archived, after ts (exclusive) or null, limit
SELECT id, ts, symbol, timeframe, model_name, model_version, threshold, prob_up, label, abstain, candle_revision,
    candles_seq, features_hash, created_at, expires_at, supersedes, trace_id, received_at, features_at,
    candle_digest
FROM model_signals
WHERE symbol = $1 AND timeframe = $2 AND ($3::text[] IS NULL OR id = ANY($3)) AND candles_seq <= $4
    AND ts > coalesce($5::timestamptz, '-infinity')
ORDER BY ts, candles_seq, id LIMIT $6;

-- name: audit_features
-- symbol, timeframe, ts[]
SELECT ts, close, volume, spread, rsi, macd, macd_signal, macd_hist, atr, ma60, ret_1, fwd_ret_5, ready, bar,
    candle_revision, candles_seq, fwd_seq
FROM features WHERE symbol = $1 AND timeframe = $2 AND ts = ANY($3::timestamptz[]);

-- Every version of a series' bars in the order in which features used them: of one sequence what had waited last, else
-- withdrawals (null values) first. What a rename
-- has retired is among them: it was used under the old name.
-- name: audit_versions
-- symbol, timeframe, to ts (included)
SELECT * FROM (
    SELECT coalesce(applied_seq, candles_seq) AS seq, extract(epoch FROM ts)::int8 AS ts, open, high, low, close, volume,
        spread, real_volume, revision, live, heard_at, candles_seq AS brought_seq
    FROM market_data WHERE symbol = $1 AND timeframe = $2 AND ts <= $3
    UNION ALL
    SELECT coalesce(applied_seq, candles_seq), extract(epoch FROM ts)::int8, open, high, low, close, volume, spread,
        real_volume, revision, live, heard_at, candles_seq
    FROM candle_revisions WHERE symbol = $1 AND timeframe = $2 AND ts <= $3
    UNION ALL
    SELECT candles_seq, extract(epoch FROM ts)::int8, NULL, NULL, NULL, NULL, NULL, NULL, NULL, revision, NULL, NULL,
        candles_seq
    FROM candle_withdrawals WHERE symbol = $1 AND timeframe = $2 AND ts <= $3
) AS versions
ORDER BY seq, brought_seq < seq, open IS NOT NULL, ts, revision;

-- name: audit_activations
SELECT timeframe, from_seq, version FROM models WHERE from_seq IS NOT NULL;

-- name: insert_audits
-- at, signal_id[], identical[], difference[]
INSERT INTO signal_audits (at, signal_id, identical, difference)
SELECT $1, * FROM unnest($2::text[], $3::bool[], $4::text[])
ON CONFLICT DO NOTHING;

-- --- daily report -----------------------------------------------------------------------------------------------

-- One pass over what came (the index of received_at finds it): by hours of the period, and by series.
-- name: daily_candles
-- from, to (exclusive); "hour" is null in the rows of series, which come with most bars first
SELECT
    date_bin('1 hour', received_at, $1) AS hour, live, symbol, timeframe, count(*) AS bars,
    count(*) FILTER (WHERE revision > 0) AS revised, max(ts) AS newest
FROM market_data WHERE received_at >= $1 AND received_at < $2
GROUP BY GROUPING SETS ((date_bin('1 hour', received_at, $1), live), (symbol, timeframe))
ORDER BY bars DESC, symbol, timeframe;

-- name: daily_signals
-- from, to (exclusive); "hour" is null in the rows of series, and both are in those of reasons
SELECT
    date_bin('1 hour', created_at, $1) AS hour, label, symbol, timeframe, abstain,
    count(*) FILTER (WHERE superseded_at IS NULL) AS signals, count(*) FILTER (WHERE superseded_at IS NOT NULL) AS superseded
FROM model_signals WHERE created_at >= $1 AND created_at < $2
GROUP BY GROUPING SETS ((date_bin('1 hour', created_at, $1), label), (symbol, timeframe, label), (abstain));

-- What a candle's first signal took, in seconds from its coming; a signal that was made again waited for a correction.
-- name: daily_latency
-- from, to (exclusive)
SELECT percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY extract(epoch FROM created_at - received_at)) AS seconds
FROM model_signals
WHERE created_at >= $1 AND created_at < $2 AND created_at >= received_at AND supersedes IS NULL;

-- name: daily_versions
-- how many at most; those that serve or are followed
SELECT model_name, version, timeframe, state, created_at, (manifest #>> '{report,auc}')::float8 AS auc
FROM models WHERE state IN ('champion', 'provisional', 'shadow')
ORDER BY model_name, state, version DESC LIMIT $1::int8;

-- name: daily_outcomes
-- model_name, version, from, to (exclusive), how many of the newest outcomes are looked at
SELECT
    count(up) AS outcomes, avg(((prob_up >= 0.5) = up)::int)::float8 AS hit_rate,
    avg((base_rate - up::int) ^ 2 - (prob_up - up::int) ^ 2) AS gain,
    count(*) FILTER (WHERE label <> 0) AS trades, avg(net) FILTER (WHERE label <> 0) AS net
FROM (
    SELECT up, prob_up, base_rate, label, net, scored_at FROM signal_outcomes
    WHERE model_name = $1 AND model_version = $2 AND NOT void ORDER BY seq DESC LIMIT $5::int8
) AS newest
WHERE scored_at >= $3 AND scored_at < $4;

-- name: daily_decisions
-- from, to (exclusive), how many at most; newest first
SELECT at, model_name, version, action, by, reason FROM model_decisions
WHERE at >= $1 AND at < $2 ORDER BY at DESC, id DESC LIMIT $3::int8;

-- name: daily_audits
-- from, to (exclusive)
SELECT count(*) AS audited, count(*) FILTER (WHERE NOT identical) AS different
FROM signal_audits WHERE at >= $1 AND at < $2;

-- name: database_size
SELECT pg_database_size(current_database());

-- --- reports ----------------------------------------------------------------------------------------------------

-- name: report_outcomes
-- model_name, version, how many at most: the newest outcomes that stand, in the order in which they became known
SELECT * FROM (
    SELECT ts, prob_up, base_rate, up, label, net, seq
    FROM signal_outcomes
    WHERE model_name = $1 AND model_version = $2 AND NOT void
    ORDER BY seq DESC
    LIMIT $3::int8
) AS newest
ORDER BY seq;

-- name: report_decisions
-- model_name, version, oldest first
SELECT at, action, by, reason
FROM model_decisions
WHERE model_name = $1 AND version = $2
ORDER BY at, id;

-- --- backups -----------------------------------------------------------------------------------------------------

-- name: backup_snapshot
SELECT pg_export_snapshot();

-- What the text of a row depends on, for the transaction that hashes.
-- name: backup_setting
SELECT set_config($1, $2, true);

-- Whatever the database holds: ours may not be there yet.
-- name: backup_server
SELECT current_setting('server_version') AS server,
    (SELECT extversion FROM pg_extension WHERE extname = 'timescaledb') AS timescaledb,
    pg_database_size(current_database()) AS size,
    to_regclass('schema_migrations') IS NOT NULL AS migrated,
    to_regclass('market_data') IS NOT NULL AS has_candles;

-- name: backup_migration
SELECT coalesce(max(version), '') FROM schema_migrations;

-- name: backup_newest
SELECT max(received_at) FROM market_data;

-- Which tables a backup counts and hashes: those that people made. Partitions are counted with their parent, what an
-- extension owns is its own affair, and TimescaleDB's chunks are rows of their hypertable.
-- name: backup_tables
SELECT n.nspname AS schema, c.relname AS name
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence = 'p'
    AND n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\_%' AND n.nspname NOT LIKE '\_timescaledb\_%'
    AND n.nspname NOT LIKE 'timescaledb\_%'
    AND NOT EXISTS (
        SELECT FROM pg_depend AS d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'
    )
ORDER BY 1, 2;

-- Anything that somebody has put into the database; nothing where it is empty.
-- name: backup_stranger
SELECT n.nspname || '.' || o.name FROM (
    SELECT oid, 'pg_class'::regclass AS class, relname AS name, relnamespace AS namespace FROM pg_class
    UNION ALL
    SELECT oid, 'pg_proc'::regclass, proname, pronamespace FROM pg_proc
) AS o JOIN pg_namespace AS n ON n.oid = o.namespace
WHERE n.nspname NOT LIKE 'pg\_%' AND n.nspname <> 'information_schema'
    AND NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.objid = o.oid AND d.classid = o.class AND d.deptype = 'e')
ORDER BY o.class DESC, 1 LIMIT 1;
