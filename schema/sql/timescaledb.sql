-- Queries of TimescaleDB's own views: no other PostgreSQL understands them.

-- Jobs (compression, retention) whose last run failed.
-- name: failed_jobs
SELECT j.job_id, j.proc_name AS name
FROM timescaledb_information.jobs AS j JOIN timescaledb_information.job_stats AS s USING (job_id)
WHERE s.last_run_status = 'Failed' ORDER BY j.job_id LIMIT 20;

-- A restore between these two keeps what a plain one loses of a hypertable.
-- name: before_restore
SELECT timescaledb_pre_restore();

-- name: after_restore
SELECT timescaledb_post_restore();
