"""Pure functions and state: values in, values out. No clock, no randomness, no I/O."""
