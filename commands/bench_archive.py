"""History through the gateway into both tables of the archive, beside asyncpg's bare upserts of the very same rows.

The bare side gets the rows as the archive holds them, ready in memory, and writes them to two tables of the same columns
and keys in the same database: no HTTP, no log, no features.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Final

import aiohttp
import asyncpg

from commands.bench_chain import history_bodies, post
from commands.bench_figures import Figure, Promise, compare
from commands.bench_model import TIMEFRAME, candles
from commands.bench_system import Running
from commands.output import CommandError
from schema.messages import Candle

CHUNK: Final = 1_000  # rows of a bare upsert, both tables in one transaction
PATIENCE: Final = 300.0  # seconds without the last row
LOOK_EVERY: Final = 0.01
SCHEMA: Final = "bench"
TABLES: Final = ("market_data", "features")

HISTORY: Final = Promise("≥ 50 %", 0.5, "at least")


async def history(system: Running, rounds: int, bars: int) -> list[Figure]:
    """Bars a second until both tables hold them, ``bars`` of a new series in each round."""
    ours, theirs = [], []
    rows = candles(bars)
    connection = await asyncpg.connect(system.database)
    try:
        await _make_tables(connection)
        async with aiohttp.ClientSession() as session:
            for turn in range(rounds):
                symbol = f"HISTORY{turn}"
                ours.append(bars / await _load(session, system.gateway, connection, symbol, rows))
                theirs.append(bars / await _bare(connection, symbol))
        await connection.execute(f"DROP SCHEMA {SCHEMA} CASCADE")
    finally:
        await connection.close()
    what = f"{bars:,} bars from POST to both tables"
    return [compare("history", what, "bars/s", ours, "asyncpg's bare upserts", theirs, HISTORY)]


async def _load(
    session: aiohttp.ClientSession, gateway: str, connection: Any, symbol: str, rows: Sequence[Candle]
) -> float:
    bodies = history_bodies(symbol, rows)
    started = time.perf_counter()
    for body in bodies:
        await post(session, gateway, body)
    await _await_row(connection, symbol, rows[-1])
    seconds = time.perf_counter() - started
    for table in TABLES:
        found = await connection.fetchval(f"SELECT count(*) FROM {table} WHERE symbol = $1", symbol)  # noqa: S608
        if found != len(rows):
            raise CommandError(f"{table} holds {found} of {len(rows)} posted bars: this is a defect, report it.")
    return seconds


async def _await_row(connection: Any, symbol: str, last: Candle) -> None:
    """The archive is written in order, so the newest row comes last."""
    both = " AND ".join(
        f"EXISTS (SELECT FROM {table} WHERE symbol = $1 AND timeframe = $2 AND ts = $3)" for table in TABLES
    )
    try:
        async with asyncio.timeout(PATIENCE):
            while not await connection.fetchval(f"SELECT {both}", symbol, TIMEFRAME, last.ts):  # noqa: ASYNC110
                await asyncio.sleep(LOOK_EVERY)
    except TimeoutError:
        raise CommandError(f"The archive does not hold {symbol}'s newest bar after {PATIENCE:g} s.") from None


async def _make_tables(connection: Any) -> None:
    await connection.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE")
    await connection.execute(f"CREATE SCHEMA {SCHEMA}")
    for table in TABLES:
        await connection.execute(
            f"CREATE TABLE {SCHEMA}.{table} (LIKE public.{table} INCLUDING DEFAULTS INCLUDING INDEXES)"
        )


async def _bare(connection: Any, symbol: str) -> float:
    """Seconds of the upserts of the same rows."""
    work: list[tuple[str, list[tuple[Any, ...]]]] = []
    for table in TABLES:
        rows = await connection.fetch(f"SELECT * FROM {table} WHERE symbol = $1 ORDER BY ts", symbol)  # noqa: S608
        chunks = [tuple(zip(*rows[at : at + CHUNK], strict=True)) for at in range(0, len(rows), CHUNK)]
        work.append((await _upsert(connection, table), chunks))
    started = time.perf_counter()
    for at in range(len(work[0][1])):
        async with connection.transaction():
            for statement, chunks in work:
                await connection.execute(statement, *chunks[at])
    return time.perf_counter() - started


async def _upsert(connection: Any, table: str) -> str:
    columns = await connection.fetch(
        "SELECT attname AS name, format_type(atttypid, atttypmod) AS type FROM pg_attribute "
        "WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
        f"public.{table}",
    )
    names = [column["name"] for column in columns]
    arrays = ", ".join(f"${place}::{column['type']}[]" for place, column in enumerate(columns, 1))
    changes = ", ".join(f"{name} = excluded.{name}" for name in names if name not in ("symbol", "timeframe", "ts"))
    return (
        f"INSERT INTO {SCHEMA}.{table} ({', '.join(names)}) SELECT * FROM unnest({arrays}) "  # noqa: S608
        f"ON CONFLICT (symbol, timeframe, ts) DO UPDATE SET {changes}"
    )
