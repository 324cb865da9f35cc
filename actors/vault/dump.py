"""PostgreSQL's part of a backup: pg_dump, with the row counts and hashes of every table as of the dump's own snapshot."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

import asyncpg

from actors.core.backups import HASH_SETTINGS, choose_bin, content_hash, quoted, table_name
from bus.direct import NotConnected, connect_direct
from schema.backup import TableEntry
from schema.load import mask_url
from schema.sql import queries, table_content

CONNECT_SECONDS: Final = 10.0
LOOK_SECONDS: Final = 0.25  # how often it is seen how far pg_dump is
COMPRESSION: Final = 4  # gzip's: a third of the time of its default, for some hundredths more bytes
NICENESS: Final = 10  # the hot path goes first
END_SECONDS: Final = 3.0  # that a program has to end when it is asked to
SAID: Final = 600  # characters of a program's complaint that are told

# libpq's variables for what a URL may say; a password stands on no command line.
_VARIABLES: Final[dict[str, str]] = {
    "host": "PGHOST",
    "port": "PGPORT",
    "user": "PGUSER",
    "password": "PGPASSWORD",
    "dbname": "PGDATABASE",
    "database": "PGDATABASE",
    "passfile": "PGPASSFILE",
    "service": "PGSERVICE",
    "sslmode": "PGSSLMODE",
    "sslrootcert": "PGSSLROOTCERT",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
    "sslcrl": "PGSSLCRL",
    "gssencmode": "PGGSSENCMODE",
    "krbsrvname": "PGKRBSRVNAME",
    "target_session_attrs": "PGTARGETSESSIONATTRS",
    "options": "PGOPTIONS",
}


class DumpFailed(Exception):
    """The database could not be dumped; the message is a sentence."""


@dataclass(frozen=True, slots=True)
class Database:
    """A database as one snapshot of it holds it. ``newest`` is when the newest candle was received."""

    server: str
    timescaledb: str | None
    migration: str
    size: int
    newest: datetime | None
    tables: tuple[TableEntry, ...] = ()


def libpq_environment(url: str) -> dict[str, str]:
    """The environment with which PostgreSQL's programs reach the database of ``url``; nothing else is in it.

    Of a URL's query only what libpq knows is taken over.
    """
    parts = urlsplit(url)
    hosts, ports = [], []
    for place in parts.netloc.rpartition("@")[2].split(","):
        host, _, port = place.rpartition(":") if re.search(r":\d*$", place) else (place, "", "")
        hosts.append(unquote(host.strip("[]")))
        ports.append(port or "5432")
    known = {
        "host": ",".join(hosts),
        "port": ",".join(ports) if any(hosts) else "",
        "user": unquote(parts.username or ""),
        "password": unquote(parts.password or ""),
        "dbname": unquote(parts.path.lstrip("/")),
    } | dict(parse_qsl(parts.query))
    found = {variable: value for name, variable in _VARIABLES.items() if (value := known.get(name))}
    # HOME is where libpq looks for .pgpass and certificates.
    return {"PATH": os.defpath, "LC_ALL": "C", "HOME": str(Path.home()), "PGCONNECT_TIMEOUT": "10"} | found


async def run_program(
    program: Path | str, *words: str, env: Mapping[str, str], look: Callable[[], None] | None = None
) -> tuple[int, str]:
    """Runs one of PostgreSQL's programs at a low priority; its exit code and what it complained of.

    ``look`` is called now and then meanwhile. A cancellation ends the program first.

    Raises:
        DumpFailed: it cannot be started.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            str(program),
            *words,
            env=dict(env),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise DumpFailed(f"{program} cannot be started ({error.strerror}).") from error
    with contextlib.suppress(OSError):  # it has ended already
        os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
    said = asyncio.create_task(_tail(process.stderr), name="program-stderr")
    try:
        while True:
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    code = await process.wait()
                break
            except TimeoutError:
                if look is not None:
                    look()
        return code, " ".join((await said).split())
    finally:
        said.cancel()
        if process.returncode is None:
            await _end(process)


async def _tail(stream: asyncio.StreamReader | None) -> str:
    """The end of what a program writes, however much that is."""
    kept = b""
    while stream is not None and (part := await stream.read(4_096)):
        kept = (kept + part)[-SAID:]
    return kept.decode(errors="replace")


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        try:
            async with asyncio.timeout(END_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()


@asynccontextmanager
async def direct_connection(url: str) -> AsyncIterator[Any]:
    """One connection to PostgreSQL itself; what fails on it is told as DumpFailed."""
    try:
        connection = await connect_direct(url)
    except NotConnected as error:
        raise DumpFailed(str(error)) from error
    try:
        yield connection
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        raise DumpFailed(
            f"PostgreSQL at {mask_url(url)} could not be read ({str(error) or type(error).__name__})."
        ) from error
    finally:
        connection.terminate()


async def look(url: str) -> Database:
    """What is known of the database before it is dumped; no tables. Raises DumpFailed."""
    async with direct_connection(url) as connection:
        return await _describe(connection)


async def dump(
    url: str, bins: Mapping[str, str], file: Path, grown: Callable[[int], None] = lambda size: None
) -> tuple[Database, str]:
    """Dumps the database into ``file`` (custom format), and says what is in it and which pg_dump has made it.

    Both see one exported snapshot, so that the counts and hashes are those of the rows in the file, whatever is written
    meanwhile. ``grown`` is called with the file's size.

    Raises:
        DumpFailed: no connection, a table that this user may not read, a full disk.
        NoPrograms: pg_dump is missing here.
    """
    async with (
        direct_connection(url) as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        described = await _describe(connection)
        major = int(described.server.partition(".")[0])
        _, folder = choose_bin(bins, major)
        program = Path(folder) / "pg_dump"
        snapshot = await connection.fetchval(queries()["backup_snapshot"])
        version = await program_version(program)
        words = (
            "--format=custom",
            f"--compress={COMPRESSION}",
            f"--snapshot={snapshot}",
            "--no-password",
            f"--file={file}",
        )
        dumping = asyncio.create_task(
            run_program(program, *words, env=libpq_environment(url), look=lambda: grown(_size(file))), name="pg_dump"
        )
        try:
            # The snapshot lives as long as this transaction: the tables are read in it while pg_dump works.
            tables = await table_entries(connection)
            code, said = await dumping
        finally:
            if not dumping.done():
                dumping.cancel()
            await asyncio.gather(dumping, return_exceptions=True)
    if code != 0:
        raise DumpFailed(f"pg_dump failed ({said or f'exit code {code}'}).")
    grown(_size(file))
    return (
        Database(
            server=described.server,
            timescaledb=described.timescaledb,
            migration=described.migration,
            size=described.size,
            newest=described.newest,
            tables=tables,
        ),
        version,
    )


async def table_entries(connection: Any) -> tuple[TableEntry, ...]:
    """Rows and content hash of every table, as the transaction that is open on ``connection`` sees them."""
    for name, value in HASH_SETTINGS.items():
        await connection.execute(queries()["backup_setting"], name, value)
    found: Sequence[Any] = await connection.fetch(queries()["backup_tables"])
    entries = []
    for table in found:
        row = await connection.fetchrow(table_content(quoted(table["schema"], table["name"])))
        content = content_hash(int(row["a"]), int(row["b"]))
        entries.append(TableEntry(name=table_name(table["schema"], table["name"]), rows=row["rows"], content=content))
    return tuple(entries)


async def _describe(connection: Any) -> Database:
    found = await connection.fetchrow(queries()["backup_server"])
    migration, newest = "", None
    if found["migrated"]:
        migration = await connection.fetchval(queries()["backup_migration"])
    if found["has_candles"]:
        newest = await connection.fetchval(queries()["backup_newest"])
    return Database(found["server"], found["timescaledb"], migration, int(found["size"]), newest)


async def program_version(program: Path) -> str:
    """``18.6`` of ``pg_dump (PostgreSQL) 18.6``. Raises DumpFailed."""
    try:
        process = await asyncio.create_subprocess_exec(
            str(program), "--version", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
    except OSError as error:
        raise DumpFailed(f"{program} cannot be started ({error.strerror}): mend [backup] postgres_bins.") from error
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            said, _ = await process.communicate()
    except TimeoutError as error:
        raise DumpFailed(f"{program} does not say its version.") from error
    finally:
        if process.returncode is None:
            await _end(process)
    found = re.search(r"\(PostgreSQL\) (\S+)", said.decode(errors="replace"))
    if process.returncode != 0 or found is None:
        raise DumpFailed(f"{program} does not run here ({' '.join(said.decode(errors='replace').split())[:SAID]}).")
    return found.group(1)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0
