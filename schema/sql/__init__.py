"""The texts of the schema, its migrations and every named query, read once from the installed package.

The archive's are PostgreSQL's; ``health.sql`` and ``health_queries.sql`` are the SQLite of the monitor's journal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

_NAME: Final = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, order=True)
class Migration:
    """One step of the schema; versions sort in the order in which they are applied (``0001_initial``)."""

    version: str
    sql: str


@cache
def schema() -> str:
    """The whole schema as one script for an empty database."""
    return _read("schema.sql")


def queries() -> dict[str, str]:
    """Each ``-- name: x`` section of queries.sql, comments and closing semicolon taken off."""
    return _named("queries.sql")


def timescaledb_queries() -> dict[str, str]:
    """The same of timescaledb.sql: only a server with the extension understands them."""
    return _named("timescaledb.sql")


def table_content(table: str) -> str:
    """SQL for one row of a table's quoted name: ``rows``, and the sums ``a`` and ``b`` of its rows' hashes."""
    return _named("table_content.sql")["table_content"].replace("{table}", table)


@cache
def health() -> str:
    """The journal's tables as one script, which changes nothing where they are."""
    return _read("health.sql")


def health_queries() -> dict[str, str]:
    """The journal's named queries."""
    return _named("health_queries.sql")


@cache
def migrations() -> tuple[Migration, ...]:
    """Every migration, oldest first."""
    folder = files(__package__) / "migrations"
    found = [entry for entry in folder.iterdir() if entry.name.endswith(".sql")]
    return tuple(sorted(Migration(entry.name.removesuffix(".sql"), entry.read_text("utf-8")) for entry in found))


@cache
def _named(file: str) -> dict[str, str]:
    _, *parts = _NAME.split(_read(file))
    names, bodies = parts[0::2], parts[1::2]
    if len(set(names)) != len(names):
        raise ValueError(f"{file} names a query twice")
    return {name: _statement(name, body) for name, body in zip(names, bodies, strict=True)}


def _statement(name: str, body: str) -> str:
    lines = [line for line in body.splitlines() if line.strip() and not line.lstrip().startswith("--")]
    statement = "\n".join(lines).strip()
    if not statement.endswith(";") or ";" in statement[:-1]:
        raise ValueError(f"query {name} is not one statement that ends in a semicolon")
    return statement[:-1]


def _read(name: str) -> str:
    return (files(__package__) / name).read_text("utf-8")
