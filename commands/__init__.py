"""The command line's groups of commands, one file each; only the runner imports them."""
