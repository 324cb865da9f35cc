"""Parts of the scorer: what the archive says of some bars, the trials of versions, the scorecard, and drift."""
