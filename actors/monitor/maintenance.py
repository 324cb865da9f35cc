"""The nightly task: VACUUM and ANALYZE table by table, partitions ahead, and figures of both for the checks.

Autovacuum does most of it by itself; what it has put off by day is done at night, and its figures are written down.
"""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import asyncpg
import msgspec
from msgspec import Struct

from actors.core.partitions import following, newest
from actors.monitor.journal import Journal
from bus.store import Store, StoreRejected, StoreUnavailable
from schema.health import UtcTime

LAST: Final = "maintenance"
"""Where the journal keeps what came of the last one."""

AHEAD: Final = timedelta(days=35)  # that partitions are made for
TABLE_SECONDS: Final = 1_800.0  # of one table
_NAME: Final = re.compile(r'[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)?|"[^"]+"(\."[^"]+")?')


class Maintained(Struct, frozen=True, kw_only=True):
    """``dead`` rows were there before; ``partitions`` were made. ``error`` says what did not work."""

    at: UtcTime
    seconds: float
    tables: int = 0
    dead: int = 0
    partitions: int = 0
    error: str = ""


async def maintain(store: Store, log: Any) -> Maintained:
    """Does the whole; a table that cannot be vacuumed does not keep back the others."""
    at, began = datetime.now(UTC), time.monotonic()
    tables = dead = made = 0
    errors: list[str] = []
    try:
        async with store.connection() as connection:
            rows = await connection.fetch(store.sql("health_tables"))
            for row in rows:
                started = time.monotonic()
                try:
                    # Outside a transaction, which PgBouncer's transaction mode lets pass. One that is locked is left
                    # to the next night; the name is PostgreSQL's own, quoted where it has to be.
                    await connection.execute(f"VACUUM (ANALYZE, SKIP_LOCKED) {row['name']}", timeout=TABLE_SECONDS)
                except asyncpg.PostgresError as error:
                    errors.append(f"{row['name']}: {error}")
                    continue
                tables += 1
                dead += row["dead"]
                log.info(
                    "table vacuumed and analysed",
                    action="health.vacuum",
                    table=row["name"],
                    dead=row["dead"],
                    seconds=round(time.monotonic() - started, 3),
                )
        made = await make_partitions(store, at, log)
    except (StoreUnavailable, StoreRejected) as error:
        errors.append(str(error))
    return Maintained(
        at=at,
        seconds=round(time.monotonic() - began, 3),
        tables=tables,
        dead=dead,
        partitions=made,
        error=" ".join("; ".join(errors).split())[:500].rstrip("."),
    )


async def make_partitions(store: Store, now: datetime, log: Any) -> int:
    """Makes the partitions of the next weeks where tables are partitioned by time; returns how many."""
    rows = await store.fetch("health_partitions")
    count = 0
    for parent, last in newest((row["parent"], row["bound"]) for row in rows).items():
        if not _NAME.fullmatch(parent):
            log.warning("a table's name is too odd to make partitions of", action="health.partition", table=parent)
            continue
        for one in following(last, now + AHEAD):
            bare = parent.rpartition(".")[2].strip('"')
            name = f"{bare}_{one.lower:%Y%m%d%H%M}".replace('"', "")[:63]
            async with store.transaction() as connection:
                await connection.execute(
                    f'CREATE TABLE IF NOT EXISTS "{name}" PARTITION OF {parent} '
                    f"FOR VALUES FROM ('{one.lower.isoformat()}') TO ('{one.upper.isoformat()}')"
                )
            log.info("partition made", action="health.partition", table=parent, upto=one.upper.isoformat())
            count += 1
    return count


def keep(journal: Journal, done: Maintained) -> None:
    with journal.transaction():
        journal.set_place(LAST, msgspec.json.encode(done).decode())
