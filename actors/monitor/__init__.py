"""The health monitor in parts: what it looks at, what it remembers, and how it tells."""
