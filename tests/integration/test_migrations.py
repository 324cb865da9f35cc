"""Migrations on real PostgreSQL: what they add up to, who may apply them, and what a half-known database is told."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from typing import Any

import asyncpg
import pytest

from bus.migrate import MigrationError, migrate, status
from schema.sql import Migration, health, health_queries, migrations, queries, schema
from schema.timeframes import TIMEFRAMES

CATALOGUE = {
    "relations": """
        SELECT c.relname, c.relkind, c.relpersistence, c.reloptions, pg_get_viewdef(c.oid) AS view
        FROM pg_class AS c WHERE c.relnamespace = 'public'::regnamespace ORDER BY c.relname""",
    "columns": """
        SELECT c.relname, a.attname, a.attnum, format_type(a.atttypid, a.atttypmod) AS type, a.attnotnull, a.attidentity,
            a.attgenerated, pg_get_expr(d.adbin, d.adrelid) AS default, a.attcollation::regcollation::text AS collation
        FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = a.attrelid
            LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
        WHERE c.relnamespace = 'public'::regnamespace AND a.attnum > 0 AND NOT a.attisdropped
        ORDER BY c.relname, a.attnum""",
    "constraints": """
        SELECT conrelid::regclass::text AS relation, conname, pg_get_constraintdef(oid) AS definition
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace ORDER BY 1, 2""",
    "indexes": "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1",
    "triggers": """
        SELECT tgrelid::regclass::text AS relation, tgname, pg_get_triggerdef(oid) AS definition
        FROM pg_trigger WHERE NOT tgisinternal ORDER BY 1, 2""",
    "functions": """
        SELECT proname, pg_get_functiondef(oid) AS definition
        FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND prokind = 'f' ORDER BY 1""",
    "extensions": "SELECT extname FROM pg_extension ORDER BY 1",
}

# The columns that the owner drew, in order (design, storage).
OWNERS = {
    "market_data": "ts symbol timeframe open high low close volume spread",
    "features_m1": "ts symbol timeframe close volume spread rsi macd macd_signal macd_hist atr ma60 ret_1 fwd_ret_5",
    "trainset_m1": "ts symbol timeframe close volume spread rsi macd macd_signal macd_hist atr ma60 ret_1 fwd_ret_5",
    "model_signals": "ts symbol timeframe model_name threshold prob_up label created_at",
    "model_metrics": "id created_at model_name metrics",
}


async def catalogue(url: str) -> dict[str, list[dict[str, Any]]]:
    connection = await asyncpg.connect(url)
    try:
        return {name: [dict(row) for row in await connection.fetch(sql)] for name, sql in CATALOGUE.items()}
    finally:
        await connection.close()


async def test_replayed_migrations_are_the_schema(pg_url: str, pg_empty_url: str) -> None:
    connection = await asyncpg.connect(pg_empty_url)
    await connection.execute(schema())
    await connection.close()
    replayed, written = await catalogue(pg_url), await catalogue(pg_empty_url)
    for name in CATALOGUE:
        assert replayed[name] == written[name], name
    assert len(written["relations"]) > 50


async def test_every_timeframe_has_its_views_and_the_owners_columns_come_first(pg_url: str) -> None:
    columns: dict[str, list[str]] = {}
    for row in (await catalogue(pg_url))["columns"]:
        columns.setdefault(row["relname"], []).append(row["attname"])
    for timeframe in TIMEFRAMES:
        for kind in ("features", "trainset"):
            assert columns[f"{kind}_{timeframe.lower()}"] == columns[f"{kind}_m1"]
    assert sum(name.startswith(("features_", "trainset_")) for name in columns) >= 2 * len(TIMEFRAMES)
    for relation, names in OWNERS.items():
        assert columns[relation][: len(names.split())] == names.split(), relation


async def test_every_query_is_understood_by_the_schema(pg_url: str) -> None:
    connection = await asyncpg.connect(pg_url)
    try:
        for name, sql in queries().items():
            assert await connection.prepare(sql), name
    finally:
        await connection.close()


def test_every_query_of_the_journal_is_understood_by_its_tables() -> None:
    connection = sqlite3.connect(":memory:")
    connection.executescript(health())
    for name, sql in health_queries().items():
        assert connection.execute(f"EXPLAIN {sql}", [None] * _parameters(sql)).fetchall(), name


def _parameters(sql: str) -> int:
    numbered = [int(n) for n in re.findall(r"\?(\d)", sql)]
    return max(numbered, default=sql.count("?"))


async def test_migrating_again_does_nothing(pg_empty_url: str) -> None:
    versions = [migration.version for migration in migrations()]
    before = await status(pg_empty_url)
    assert (before.applied, list(before.pending), before.unknown) == ((), versions, ())
    assert await migrate(pg_empty_url) == versions
    assert await migrate(pg_empty_url) == []
    after = await status(pg_empty_url)
    assert (list(after.applied), after.pending) == (versions, ())


async def test_processes_that_migrate_at_once_take_turns(pg_empty_url: str) -> None:
    done = await asyncio.gather(*(migrate(pg_empty_url) for _ in range(4)))
    assert sorted(version for one in done for version in one) == [migration.version for migration in migrations()]


async def test_pgbouncer_is_good_enough_for_migrating(pg_url: str, pgbouncer_url: str) -> None:
    later = Migration("9000_later", "CREATE TABLE later (id int); INSERT INTO later VALUES (1);")
    assert await migrate(pgbouncer_url, known=(*migrations(), later)) == ["9000_later"]


async def test_a_database_newer_than_the_code_is_refused(pg_url: str) -> None:
    later = Migration("9000_later", "CREATE TABLE later (id int)")
    await migrate(pg_url, known=(*migrations(), later))
    with pytest.raises(MigrationError, match="migration 9000_later, which this version of mt5 does not know"):
        await migrate(pg_url)
    assert (await status(pg_url)).unknown == ("9000_later",)


async def test_a_failing_migration_leaves_nothing_behind(pg_url: str) -> None:
    bad = Migration("9000_bad", "CREATE TABLE half (id int); SELECT 1 / 0;")
    with pytest.raises(MigrationError, match="9000_bad failed and was rolled back.*division by zero"):
        await migrate(pg_url, known=(*migrations(), bad))
    assert "half" not in {row["relname"] for row in (await catalogue(pg_url))["relations"]}
    assert (await status(pg_url)).unknown == ()


async def test_a_wrong_password_is_one_sentence_without_it(pg_url: str) -> None:
    scheme, rest = pg_url.split("://")
    url = f"{scheme}://mt5:hunter2hunter2@{rest.rpartition('@')[2]}"
    with pytest.raises(MigrationError, match="MT5_DATABASE_DIRECT_URL") as caught:
        await migrate(url)
    assert "hunter2" not in str(caught.value)
