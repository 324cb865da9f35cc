"""Contracts: what travels (messages), how the system is set (settings), how it is stored (sql)."""
