-- What came and what was made on a day, for the daily report. Rows lie in the order in which they came, so that an index
-- of each block range's first and last time is some kilobytes, and costs the recorder nothing that could be measured.
CREATE INDEX market_data_received ON market_data USING brin (received_at) WITH (pages_per_range = 32, autosummarize = on);
CREATE INDEX model_signals_created ON model_signals USING brin (created_at) WITH (pages_per_range = 32, autosummarize = on);
