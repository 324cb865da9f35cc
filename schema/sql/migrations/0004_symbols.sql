-- What terminals say of a symbol: point is the size of one point, in which spreads are given.
CREATE TABLE symbols (
    symbol text PRIMARY KEY,
    point double precision NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now()
);
