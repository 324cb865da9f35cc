"""Applies ``schema/sql/migrations`` to a database, each in its own transaction and by one process at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg

from bus.direct import NotConnected, connect_direct
from schema.load import mask_url
from schema.sql import Migration, migrations, queries


class MigrationError(Exception):
    """The database cannot be brought to this version's schema; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class MigrationStatus:
    """Versions that the database has, that it lacks, and that it has but this code does not know."""

    applied: tuple[str, ...]
    pending: tuple[str, ...]
    unknown: tuple[str, ...]


async def migrate(direct_url: str, *, known: tuple[Migration, ...] | None = None) -> list[str]:
    """Applies what is missing, oldest first, and returns the versions that it applied; [] when nothing was.

    Raises:
        MigrationError: no connection, a database newer than this code, or a migration that fails (it is rolled back).
    """
    known = migrations() if known is None else known
    done: list[str] = []
    async with _connected(direct_url) as connection:
        for migration in known:
            try:
                # The lock belongs to the transaction, so it holds behind PgBouncer too; what another process applied
                # while this one waited is seen afterwards.
                async with connection.transaction():
                    await connection.execute(queries()["lock_migrations"])
                    state = await _status(connection, known)
                    _refuse_newer(state)
                    if migration.version in state.applied:
                        continue
                    await connection.execute(migration.sql)
                    await connection.execute(queries()["record_migration"], migration.version)
            except asyncpg.PostgresError as error:
                raise MigrationError(
                    f"Migration {migration.version} failed and was rolled back ({error}): mend the cause and migrate again."
                ) from error
            done.append(migration.version)
    return done


async def status(direct_url: str, *, known: tuple[Migration, ...] | None = None) -> MigrationStatus:
    """What :func:`migrate` would find. Raises MigrationError without a connection."""
    async with _connected(direct_url) as connection:
        return await _status(connection, migrations() if known is None else known)


async def _status(connection: Any, known: tuple[Migration, ...]) -> MigrationStatus:
    applied: tuple[str, ...] = ()
    if await connection.fetchval(queries()["migrations_table_exists"]):
        applied = tuple(row["version"] for row in await connection.fetch(queries()["applied_migrations"]))
    versions = [migration.version for migration in known]
    return MigrationStatus(
        applied=applied,
        pending=tuple(version for version in versions if version not in applied),
        unknown=tuple(version for version in applied if version not in versions),
    )


def _refuse_newer(state: MigrationStatus) -> None:
    if state.unknown:
        raise MigrationError(
            f"The database has migration {state.unknown[-1]}, which this version of mt5 does not know: install the newer "
            "version that made it, or restore a backup from before."
        )


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator[Any]:
    try:
        connection = await connect_direct(url)
    except NotConnected as error:
        raise MigrationError(str(error)) from error
    try:
        yield connection
    except (OSError, asyncpg.InterfaceError) as error:
        raise MigrationError(f"PostgreSQL at {mask_url(url)} went away while migrating: migrate again.") from error
    finally:
        connection.terminate()
