"""A database brought back from its dump: into an empty one only, whole or not at all, and compared with the manifest."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import asyncpg

from actors.core.backups import NoPrograms, choose_bin
from actors.vault.dump import DumpFailed, direct_connection, libpq_environment, run_program, table_entries
from schema.backup import MANIFEST, BackupManifest, TableEntry
from schema.load import mask_url
from schema.sql import queries, timescaledb_queries

JOBS: Final = min(4, os.cpu_count() or 1)


class NotRestored(Exception):
    """What a backup holds could not be brought back; the message is one sentence with the way out.

    ``path`` is the backup's file that is to blame, "" where it is none.
    """

    def __init__(self, sentence: str, path: str = "") -> None:
        super().__init__(sentence)
        self.path = path


class NotEmpty(NotRestored):
    """There is something already where the backup is to go: nothing was changed."""


async def refuse_full(url: str) -> None:
    """Raises NotEmpty where the database holds anything, NotRestored where it does not answer."""
    try:
        async with direct_connection(url) as connection:
            found = await connection.fetchval(queries()["backup_stranger"])
    except DumpFailed as error:
        raise NotRestored(str(error)) from error
    if found is not None:
        raise NotEmpty(
            f"The database at {mask_url(url)} is not empty (it has {found}): restore into a new one, or drop what it has first."
        )


async def restore_database(
    url: str,
    dump: Path,
    manifest: BackupManifest,
    bins: Mapping[str, str],
    *,
    parallel: bool,
    look: Callable[[], None] | None = None,
) -> str:
    """Fills an empty database from a dump; returns what pg_restore complained of where that may be lived with, else "".

    It is one transaction, unless ``parallel``: several connections side by side, for a database that is thrown away where
    this fails. With TimescaleDB neither is possible, and what pg_restore says is no more than a hint: :func:`differences`
    decides there. ``look`` is called now and then meanwhile.

    Raises:
        NotEmpty: nothing was changed.
        NotRestored: there is no fitting pg_restore, or it failed.
    """
    await refuse_full(url)
    made_of = _major(manifest.postgres)
    timescaledb = manifest.timescaledb
    try:
        async with direct_connection(url) as connection:
            server = int(connection.get_server_version().major)
            if made_of > server:
                raise NotRestored(
                    f"The backup was made of PostgreSQL {made_of} and the server at {mask_url(url)} is {server}: restore onto "
                    f"PostgreSQL {made_of} or a newer one."
                )
            _, folder = choose_bin(bins, max(server, _major(manifest.pg_dump)))
            if timescaledb is not None:
                await _begin_timescaledb(connection, timescaledb)
        how = [f"--jobs={JOBS}", "--exit-on-error"] if parallel else ["--single-transaction", "--exit-on-error"]
        words = ["--no-owner", "--no-privileges", "--no-password", *(how if timescaledb is None else [])]
        environment = libpq_environment(url)
        # Without a database's name pg_restore would write a script instead.
        words += [f"--dbname={environment.pop('PGDATABASE', 'postgres')}", str(dump)]
        try:
            code, said = await run_program(Path(folder) / "pg_restore", *words, env=environment, look=look)
        finally:
            if timescaledb is not None:
                async with direct_connection(url) as connection:
                    await connection.execute(timescaledb_queries()["after_restore"])
        if code != 0 and timescaledb is None:
            raise NotRestored(f"pg_restore failed on {dump.name} ({said or f'exit code {code}'}).", dump.name)
        async with direct_connection(url) as connection:
            await connection.execute("ANALYZE")
    except (DumpFailed, NoPrograms) as error:
        raise NotRestored(str(error)) from error
    return said if code != 0 else ""


async def _begin_timescaledb(connection: Any, version: str) -> None:
    """The extension in the dump's own version, and its word that a restore begins: without it rows of hypertables are lost."""
    if not version.replace(".", "").replace("-", "").isalnum():
        raise NotRestored(f"{version!r} is no version of TimescaleDB: the manifest is damaged.", MANIFEST)
    try:
        await connection.execute(f"CREATE EXTENSION IF NOT EXISTS timescaledb VERSION '{version}'")
        await connection.execute(timescaledb_queries()["before_restore"])
    except asyncpg.PostgresError as error:
        raise NotRestored(
            f"The backup needs TimescaleDB {version}, which this server does not give ({error}): install and preload that "
            "version, restore again, and update it afterwards."
        ) from error


async def differences(url: str, manifest: BackupManifest) -> list[str]:
    """How the tables of a restored database differ from what the manifest says of them, in words; [] where they do not.

    Every row's text counts, whatever the order. Raises NotRestored where the database does not answer.
    """
    try:
        async with (
            direct_connection(url) as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            found = {entry.name: entry for entry in await table_entries(connection)}
    except DumpFailed as error:
        raise NotRestored(str(error)) from error
    wanted = {entry.name: entry for entry in manifest.tables}
    out = [_difference(found.get(name), entry) for name, entry in wanted.items()]
    out += [f"table {name} is in the dump and not in the manifest" for name in sorted(found.keys() - wanted.keys())]
    return [problem for problem in out if problem is not None]


def _difference(found: TableEntry | None, wanted: TableEntry) -> str | None:
    if found is None:
        return f"table {wanted.name} is missing"
    if found.rows != wanted.rows:
        return f"table {wanted.name} has {found.rows:,} rows instead of {wanted.rows:,}"
    if found.content != wanted.content:
        return f"table {wanted.name} has the {wanted.rows:,} rows that it should have, with other content"
    return None


def _major(version: str) -> int:
    """``18.6 (Debian …)`` → 18; 0 for what is no version."""
    digits = version.strip().partition(" ")[0].partition(".")[0]
    return int(digits) if digits.isdigit() else 0
