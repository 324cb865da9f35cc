"""The texts of the schema, its migrations and every named query, read once from the installed package."""

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


@cache
def queries() -> dict[str, str]:
    """Each ``-- name: x`` section of queries.sql, comments and closing semicolon taken off."""
    _, *parts = _NAME.split(_read("queries.sql"))
    names, bodies = parts[0::2], parts[1::2]
    if len(set(names)) != len(names):
        raise ValueError("queries.sql names a query twice")
    return {name: _statement(name, body) for name, body in zip(names, bodies, strict=True)}


@cache
def migrations() -> tuple[Migration, ...]:
    """Every migration, oldest first."""
    folder = files(__package__) / "migrations"
    found = [entry for entry in folder.iterdir() if entry.name.endswith(".sql")]
    return tuple(sorted(Migration(entry.name.removesuffix(".sql"), entry.read_text("utf-8")) for entry in found))


def _statement(name: str, body: str) -> str:
    lines = [line for line in body.splitlines() if line.strip() and not line.lstrip().startswith("--")]
    statement = "\n".join(lines).strip()
    if not statement.endswith(";") or ";" in statement[:-1]:
        raise ValueError(f"query {name} is not one statement that ends in a semicolon")
    return statement[:-1]


def _read(name: str) -> str:
    return (files(__package__) / name).read_text("utf-8")
