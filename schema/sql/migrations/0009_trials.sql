-- How far each model's trials are: all that the evidence has seen, written with the outcomes that it was of.
CREATE TABLE model_trials (
    model_name text PRIMARY KEY,
    docket jsonb NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now()
);
