-- What is asked of health_checks.db, the monitor's journal (SQLite; its tables: health.sql). Times are epoch seconds, UTC.

-- --- results -----------------------------------------------------------------------------------------------------

-- name: record_result
INSERT INTO checks (at, "check", status, value, unit, latency, message) VALUES (?, ?, ?, ?, ?, ?, ?);

-- Every check that there is a result of: one step of the index each, however many results.
-- name: check_names
WITH RECURSIVE names (name) AS (
    SELECT min("check") FROM checks
    UNION ALL
    SELECT (SELECT min("check") FROM checks WHERE "check" > name) FROM names WHERE name IS NOT NULL
)
SELECT name FROM names WHERE name IS NOT NULL;

-- name: newest_result
SELECT at, "check", status, value, unit, latency, message FROM checks WHERE "check" = ? ORDER BY at DESC LIMIT 1;

-- check, from, to
-- name: results
SELECT at, "check", status, value, unit, latency, message FROM checks WHERE "check" = ? AND at >= ? AND at < ? ORDER BY at;

-- check, from, to
-- name: looks
SELECT at, status, value, latency FROM checks WHERE "check" = ? AND at >= ? AND at < ? ORDER BY at;

-- name: unit
SELECT unit FROM checks WHERE "check" = ? ORDER BY at DESC LIMIT 1;

-- check, from: each value as often as it was seen anew.
-- name: values
SELECT value FROM (
    SELECT at, value, lag(value) OVER (ORDER BY at) AS before FROM checks
    WHERE "check" = ? AND at >= ? AND value IS NOT NULL
)
WHERE before IS NULL OR before <> value ORDER BY at;

-- name: first_look
SELECT min(at) FROM checks;

-- name: last_look
SELECT max(at) FROM checks;

-- from, to, the longest pause that is none: how many seconds of the period lie in longer ones.
-- name: silence
SELECT coalesce(sum(gap), 0) FROM (
    SELECT at - lag(at, 1, ?1) OVER (ORDER BY at) AS gap FROM (
        SELECT at FROM checks WHERE at >= ?1 AND at < ?2 UNION ALL SELECT ?2
    )
) WHERE gap > ?3;

-- from, to, seconds of a slot, the last slot's number: the worst look of each slot; -1 nothing, 0 ok, 1 warning, 2 critical.
-- name: strips
SELECT "check", min(CAST((at - ?1) / ?3 AS INTEGER), ?4) AS slot,
    max(CASE status WHEN 'critical' THEN 2 WHEN 'warning' THEN 1 WHEN 'ok' THEN 0 ELSE -1 END)
FROM checks WHERE at >= ?1 AND at < ?2 GROUP BY "check", slot;

-- from, to. Of a group with max(), SQLite takes the other columns from the row that has it.
-- name: last_of_each
SELECT "check", status, message, max(at) FROM checks WHERE at >= ? AND at < ? GROUP BY "check" ORDER BY "check";

-- seconds of a point, from, to
-- name: room
SELECT "check", unit, CAST(at / ?1 AS INTEGER) * ?1 AS bin, avg(value) FROM checks
WHERE at >= ?2 AND at < ?3 AND value IS NOT NULL AND ("check" LIKE 'disk.%' OR "check" = 'database.size')
GROUP BY "check", unit, bin ORDER BY "check", bin;

-- name: count_results
SELECT count(*) FROM checks;

-- name: forget_results
DELETE FROM checks WHERE at < ?;

-- name: forget_oldest_results
DELETE FROM checks WHERE rowid IN (SELECT rowid FROM checks ORDER BY at LIMIT ?);

-- seconds of which one result stays, from, to: what was wrong stays whole.
-- name: thin_results
DELETE FROM checks WHERE rowid IN (
    SELECT rowid FROM (
        SELECT rowid, status, row_number() OVER (
            PARTITION BY "check", status, CAST(at / ? AS integer) ORDER BY at) AS n
        FROM checks WHERE at >= ? AND at < ?
    )
    WHERE n > 1 AND status IN ('ok', 'skipped')
);

-- --- incidents, state, places ------------------------------------------------------------------------------------

-- name: save_incident
INSERT OR REPLACE INTO incidents (incident, opened_at, closed_at, severity, title, checks) VALUES (?, ?, ?, ?, ?, ?);

-- from, to: those that lasted into the period.
-- name: incidents
SELECT incident, opened_at, closed_at, severity, title, checks FROM incidents
WHERE (closed_at IS NULL OR closed_at >= ?) AND opened_at < ? ORDER BY opened_at DESC, incident;

-- name: forget_incidents
DELETE FROM incidents WHERE closed_at < ?;

-- name: save_state
INSERT OR REPLACE INTO alert_state (id, state) VALUES (1, ?);

-- name: state
SELECT state FROM alert_state WHERE id = 1;

-- name: set_place
INSERT OR REPLACE INTO places (name, value) VALUES (?, ?);

-- name: place
SELECT value FROM places WHERE name = ?;

-- --- outbox ------------------------------------------------------------------------------------------------------

-- notice, sender, body, queued at
-- name: enqueue
INSERT OR IGNORE INTO outbox (notice, sender, body, queued_at, next_at) VALUES (?, ?, ?, ?, 0);

-- name: try_all_now
UPDATE outbox SET next_at = 0 WHERE sent_at IS NULL;

-- The oldest of a sender's that was not refused itself.
-- name: head
SELECT notice, body, attempts, next_at FROM outbox
WHERE sender = ? AND sent_at IS NULL AND refused = 0 ORDER BY rowid LIMIT 1;

-- sender, now, the furthest that any pause reaches: the oldest refused one that is due.
-- name: refused_head
SELECT notice, body, attempts, next_at FROM outbox
WHERE sender = ? AND sent_at IS NULL AND refused AND (next_at <= ? OR next_at > ?) ORDER BY rowid LIMIT 1;

-- name: mark_sent
UPDATE outbox SET sent_at = ?, attempts = ?, error = ?, body = ? WHERE notice = ? AND sender = ?;

-- name: mark_failed
UPDATE outbox SET attempts = ?, next_at = ?, refused = ?, error = ? WHERE notice = ? AND sender = ?;

-- name: waiting
SELECT sender, count(*) FROM outbox WHERE sent_at IS NULL GROUP BY sender;

-- senders as a JSON array: what was refused itself is no sign of a closed way.
-- name: oldest_waiting
SELECT min(queued_at) FROM outbox
WHERE sent_at IS NULL AND refused = 0 AND sender IN (SELECT value FROM json_each(?));

-- name: undelivered
SELECT count(*), min(queued_at) FROM outbox WHERE sent_at IS NULL;

-- name: late
SELECT count(*) FROM outbox WHERE sent_at IS NULL AND queued_at < ?;

-- name: deliveries
SELECT sender, sent_at, attempts, error, refused FROM outbox WHERE notice = ? ORDER BY sender;

-- name: forget_sent
DELETE FROM outbox WHERE sent_at < ?;

-- queued before, senders as a JSON array
-- name: give_up
DELETE FROM outbox WHERE sent_at IS NULL AND queued_at < ?
    AND (refused OR sender NOT IN (SELECT value FROM json_each(?))) RETURNING notice, sender, error;
