-- A signal's trace and the times of its stages; they come with its message's headers.
ALTER TABLE model_signals ADD COLUMN trace_id text;
ALTER TABLE model_signals ADD COLUMN received_at timestamptz;
ALTER TABLE model_signals ADD COLUMN features_at timestamptz;

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

-- Signals that were rebuilt and compared; difference is null where they were identical.
CREATE TABLE signal_audits (
    at timestamptz NOT NULL,
    signal_id text NOT NULL,
    identical boolean NOT NULL,
    difference text,
    PRIMARY KEY (signal_id, at)
);
