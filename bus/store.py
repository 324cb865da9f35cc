"""PostgreSQL for the actors: one pool that works through PgBouncer's transaction mode, and the archive's typed reads.

Nothing here keeps session state: no prepared statement, temporary table, advisory lock or setting outlives a
transaction. The pool opens connections when they are needed, so that an actor starts while PostgreSQL is away.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeAlias, TypeVar
from urllib.parse import urlsplit

import asyncpg
import msgspec
from asyncpg.pool import PoolConnectionProxy

from schema.load import mask_url
from schema.messages import Candle, FeatureRow, Message, ModelState, Signal, UtcTime
from schema.sql import queries
from schema.timeframes import SECONDS

CONNECT_TIMEOUT: Final = 5.0  # seconds to a new connection, and to a free one of the pool
COMMAND_TIMEOUT: Final = 30.0  # a statement that takes longer counts as an outage: a frozen server is noticed
RETRY_EVERY: Final = 0.2  # seconds between the tries of wait_until_up
CLOSE_BUDGET: Final = 2.0  # seconds that connections in use have at the stop

# asyncpg's internal error is what comes of using a connection whose server has said goodbye but not yet hung up.
_BROKEN: Final = (OSError, TimeoutError, asyncpg.InternalClientError)
_REFUSALS: Final = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, asyncpg.ProgramLimitExceededError)
_DEFECTS: Final[type[Exception]] = asyncpg.SyntaxOrAccessError

S = TypeVar("S", bound=Message)
# asyncpg ships no stubs for its records: a row maps column names to values.
Row: TypeAlias = Any
Connection: TypeAlias = PoolConnectionProxy


class StoreUnavailable(Exception):
    """PostgreSQL cannot be used now: what was asked did not happen, or nobody knows; ask again later."""


class StoreRejected(Exception):
    """PostgreSQL refuses these values: asking again would not help."""


class ModelRecord(Message, frozen=True, kw_only=True, omit_defaults=False):
    """A version in the registry; ``from_seq`` is the first CANDLES sequence that it serves."""

    model_name: str
    version: str
    timeframe: str
    state: ModelState
    created_at: UtcTime
    from_seq: int | None
    activated_at: UtcTime | None
    reason: str
    by: str
    manifest: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ArchivedBar:
    """A bar as the archive holds it; ``candles_seq`` is the CANDLES sequence of its version."""

    candle: Candle
    revision: int
    live: bool
    source: str | None
    ts_source: str
    candles_seq: int


@dataclass(frozen=True, slots=True)
class Holes:
    """How a series lies in time: its first and last bar, their number, and the open times on either side of every hole.

    Epoch seconds. Neighbours that do not follow each other by the timeframe's length are told as holes, though a
    broker's day may just have lasted 23 or 25 hours.
    """

    first: int
    last: int
    bars: int
    holes: tuple[tuple[int, int], ...]
    source: str | None = None  # of the newest bar


class Store:
    """A pool and the named queries of ``schema/sql/queries.sql``. Every method raises the two errors above."""

    def __init__(self, pool: Any, url: str) -> None:
        self.pool = pool
        self._url = url

    @classmethod
    async def connect(cls, url: str, *, size: int = 4, name: str = "mt5") -> Store:
        """A pool of at most ``size`` connections, named ``name`` in ``pg_stat_activity``. Does not wait for the server.

        Raises:
            ValueError: the URL is not one that PostgreSQL's clients understand.
        """
        _check(url)
        pool = await asyncpg.create_pool(
            url,
            min_size=0,
            max_size=size,
            statement_cache_size=0,
            timeout=CONNECT_TIMEOUT,
            command_timeout=COMMAND_TIMEOUT,
            server_settings={"application_name": name},
            reset=_keep,
        )
        return cls(pool, url)

    async def close(self) -> None:
        """Closes what is idle, and what is in use after :data:`CLOSE_BUDGET` seconds."""
        try:
            async with asyncio.timeout(CLOSE_BUDGET):
                await self.pool.close()
        except TimeoutError:
            self.pool.terminate()

    def sql(self, name: str) -> str:
        """The text of a named query; KeyError for an unknown name."""
        return queries()[name]

    async def wait_until_up(self, seconds: float) -> None:
        """Returns once PostgreSQL answers; raises StoreUnavailable after ``seconds``."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                await self.fetchval("ping", within=max(seconds, RETRY_EVERY))
                return
            except StoreUnavailable:
                if time.monotonic() + RETRY_EVERY > deadline:
                    raise
            await asyncio.sleep(RETRY_EVERY)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection of the pool; errors inside are translated, and a connection that failed is not used again."""
        connection: Connection | None = None
        try:
            connection = await self.pool.acquire(timeout=CONNECT_TIMEOUT)
            yield connection
        except asyncio.CancelledError:
            _cut(connection)
            raise
        except (asyncpg.PostgresError, asyncpg.InterfaceError, *_BROKEN) as error:
            if isinstance(error, _BROKEN):
                _cut(connection)
            raise self._translated(error) from error
        finally:
            if connection is not None:
                await self.pool.release(connection, timeout=CONNECT_TIMEOUT)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """A connection in a transaction that commits at the end of the block, or rolls back."""
        async with self.connection() as connection:
            transaction = connection.transaction()
            await transaction.start()
            try:
                yield connection
            except (asyncio.CancelledError, *_BROKEN):
                _cut(connection)
                raise
            except BaseException:
                if _alive(connection):
                    await transaction.rollback()
                raise
            await transaction.commit()

    async def fetch(self, name: str, *args: Any, within: float | None = None) -> list[Row]:
        async with self.connection() as connection:
            rows: list[Row] = await connection.fetch(self.sql(name), *args, timeout=within)
            return rows

    async def fetchrow(self, name: str, *args: Any, within: float | None = None) -> Row | None:
        async with self.connection() as connection:
            return await connection.fetchrow(self.sql(name), *args, timeout=within)

    async def fetchval(self, name: str, *args: Any, within: float | None = None) -> Any:
        async with self.connection() as connection:
            return await connection.fetchval(self.sql(name), *args, timeout=within)

    async def execute(self, name: str, *args: Any, within: float | None = None) -> None:
        async with self.connection() as connection:
            await connection.execute(self.sql(name), *args, timeout=within)

    # --- the archive's reads -------------------------------------------------------------------------------------

    async def candles(
        self, symbol: str, timeframe: str, *, start: datetime | None = None, end: datetime | None = None, limit: int
    ) -> tuple[Candle, ...]:
        """Ascending, both ends included: the first ``limit`` from ``start`` on, or the newest ``limit`` without it."""
        return _structs(Candle, await self._span("candles", symbol, timeframe, start, end, limit))

    async def bars_before(
        self, symbol: str, timeframe: str, after: datetime | None, candles_seq: int
    ) -> tuple[ArchivedBar, ...]:
        """A series' bars later than ``after``, ascending, each in the version current before that CANDLES sequence."""
        rows = await self.fetch("bars_before", symbol, timeframe, after, candles_seq)
        fields = Candle.__struct_fields__
        return tuple(
            ArchivedBar(
                Candle(**{name: row[name] for name in fields}),
                row["revision"],
                row["live"],
                row["source"],
                row["ts_source"],
                row["candles_seq"],
            )
            for row in rows
        )

    async def features(
        self, symbol: str, timeframe: str, *, start: datetime | None = None, end: datetime | None = None, limit: int
    ) -> tuple[FeatureRow, ...]:
        """As :meth:`candles`."""
        return _structs(FeatureRow, await self._span("features", symbol, timeframe, start, end, limit))

    async def _span(
        self, what: str, symbol: str, timeframe: str, start: datetime | None, end: datetime | None, limit: int
    ) -> list[Row]:
        if start is None:
            return await self.fetch(f"{what}_newest", symbol, timeframe, end, limit)
        return await self.fetch(f"{what}_from", symbol, timeframe, start, end, limit)

    async def holes(
        self, symbol: str, timeframe: str, *, start: datetime | None = None, end: datetime | None = None, limit: int
    ) -> Holes | None:
        """The holes among a series' newest ``limit`` bars of a span; None where it has no bar there."""
        step = SECONDS[timeframe]
        rows = await self.fetch("series_holes", symbol, timeframe, start, end, limit, step)
        if not rows:
            return None
        holes = tuple((row["after"], row["before"]) for row in rows[1:-1])
        return Holes(rows[0]["before"], rows[-1]["after"], rows[-1]["bars"], holes, rows[-1]["source"])

    async def series(self, symbol: str | None = None, timeframe: str | None = None) -> list[tuple[str, str]]:
        """Every series of the archive, or those of a symbol or timeframe."""
        return [(row["symbol"], row["timeframe"]) for row in await self.fetch("series_list", symbol, timeframe)]

    async def series_rows(
        self, symbol: str, timeframe: str, *, after: datetime | None, limit: int
    ) -> list[tuple[Candle, str | None, str]]:
        """A series' bars later than ``after``, ascending, each with its source and how its time became UTC."""
        rows = await self.fetch("series_rows", symbol, timeframe, after, limit)
        fields = Candle.__struct_fields__
        return [(Candle(**{name: row[name] for name in fields}), row["source"], row["ts_source"]) for row in rows]

    async def rename_series(
        self, old: str, new: str, timeframe: str, *, upto: datetime, bars: int, candles_seq: int, by: str
    ) -> None:
        """Moves a series' bars and features up to ``upto`` to another symbol, in one transaction.

        ``candles_seq`` is the CANDLES sequence with which the log has them under the new name: from there on the old
        versions count as replaced.
        """
        async with self.transaction() as connection:
            await connection.execute(self.sql("copy_market_data"), old, new, timeframe, upto)
            await connection.execute(self.sql("copy_features"), old, new, timeframe, upto)
            await connection.execute(self.sql("retire_features"), old, timeframe, upto)
            await connection.execute(self.sql("retire_market_data"), old, timeframe, upto, candles_seq)
            await connection.execute(self.sql("record_rename"), old, new, timeframe, bars, candles_seq, by)

    async def signals(
        self, timeframe: str, *, symbol: str | None = None, since: datetime | None = None, limit: int
    ) -> tuple[Signal, ...]:
        """Newest bar first; ``since`` is a bar's time, included. Superseded signals are among them."""
        return _structs(Signal, await self.fetch("signals_newest", timeframe, symbol, since, limit))

    async def models(self, model_name: str | None = None) -> tuple[ModelRecord, ...]:
        """The registry, newest version of each model first."""
        rows = await self.fetch("list_models", model_name)
        return tuple(ModelRecord(**{**row, "manifest": msgspec.json.decode(row["manifest"])}) for row in rows)

    # --- errors --------------------------------------------------------------------------------------------------

    def _translated(self, error: Exception) -> Exception:
        text = str(error).replace(self._url, mask_url(self._url)) or type(error).__name__
        if isinstance(error, _REFUSALS) or _refused_before_sending(error):
            return StoreRejected(text)
        if isinstance(error, asyncpg.UndefinedTableError):
            return StoreUnavailable(f"PostgreSQL has not our tables ({text}): run `mt5 migrate`.")
        if isinstance(error, _DEFECTS) and not isinstance(error, asyncpg.InsufficientPrivilegeError):
            return error  # of ours: waiting would only hide it
        return StoreUnavailable(f"PostgreSQL at {mask_url(self._url)} cannot be used now: {text}")


def _check(url: str) -> None:
    """A pool without connections looks at its URL only when it opens one; a wrong one is told before."""
    try:
        parts = urlsplit(url)
        understood = parts.scheme in ("postgresql", "postgres") and (parts.port is None or parts.port > 0)
    except ValueError:
        understood = False
    if not understood:
        raise ValueError(
            f"{mask_url(url)} is not a PostgreSQL URL: write postgresql://user:password@host:port/database."
        )


async def _keep(_: Connection) -> None:
    """In place of asyncpg's reset query, a round trip a statement: there is no session state to take back."""


def _cut(connection: Connection | None) -> None:
    """Ends a connection without a word: a cancel request to a frozen server would never come back."""
    if connection is not None and _alive(connection):
        connection.terminate()


def _alive(connection: Connection) -> bool:
    # A connection that broke has left the pool already, and then its proxy answers nothing.
    try:
        return not connection.is_closed()
    except asyncpg.InterfaceError:
        return False


def _structs(kind: type[S], rows: Sequence[Row]) -> tuple[S, ...]:
    return tuple(kind(**row) for row in rows)


def _refused_before_sending(error: Exception) -> bool:
    # asyncpg's own check of a value is an InterfaceError that is a ValueError too; so is a wrong URL.
    return (
        isinstance(error, asyncpg.InterfaceError)
        and isinstance(error, ValueError)
        and not isinstance(error, asyncpg.ClientConfigurationError)
    )
