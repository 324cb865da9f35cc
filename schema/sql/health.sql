-- $MT5_HOME/health_checks.db (SQLite). What the monitor saw, what it has told, and what it has still to tell: an
-- incident's change and the notices of it are one transaction, so that a crash neither loses nor doubles one.

CREATE TABLE IF NOT EXISTS checks (
    at real NOT NULL,            -- epoch seconds, UTC
    "check" text NOT NULL,
    status text NOT NULL,        -- ok, warning, critical, skipped
    value real,
    unit text NOT NULL DEFAULT '',
    latency real NOT NULL,       -- seconds
    message text NOT NULL
);
CREATE INDEX IF NOT EXISTS checks_by_name ON checks ("check", at);
CREATE INDEX IF NOT EXISTS checks_by_time ON checks (at);

CREATE TABLE IF NOT EXISTS incidents (
    incident text PRIMARY KEY,
    opened_at real NOT NULL,
    closed_at real,              -- NULL: it lasts
    severity text NOT NULL,      -- the worst that it has been
    title text NOT NULL,
    checks text NOT NULL         -- JSON, an array of names
);
CREATE INDEX IF NOT EXISTS incidents_by_time ON incidents (opened_at);

-- The state of the alert rules (actors/core/alerts.py), as JSON: one row.
CREATE TABLE IF NOT EXISTS alert_state (
    id integer PRIMARY KEY CHECK (id = 1),
    state blob NOT NULL
);

-- How far other actors' alerts on EVENTS have been taken in, and what else must outlive the monitor.
CREATE TABLE IF NOT EXISTS places (
    name text PRIMARY KEY,
    value text NOT NULL
);

CREATE TABLE IF NOT EXISTS outbox (
    notice text NOT NULL,        -- its id; with the sender the key, so that one is never queued twice
    sender text NOT NULL,        -- smtp, webhook, telegram, nats
    body blob NOT NULL,          -- the notice as JSON
    queued_at real NOT NULL,
    attempts integer NOT NULL DEFAULT 0,
    next_at real NOT NULL,       -- 0: at once
    sent_at real,                -- NULL: still to be sent
    refused integer NOT NULL DEFAULT 0, -- 1: this notice itself is not taken; it is tried seldom and holds back no other
    error text NOT NULL DEFAULT '',
    PRIMARY KEY (notice, sender)
);
CREATE INDEX IF NOT EXISTS outbox_waiting ON outbox (sender, refused) WHERE sent_at IS NULL;
