"""Servers and folders for a restore: an own PostgreSQL and nats-server that live as long as a block."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit, urlunsplit

from commands.places import CLIENT
from deploy.process import DeployError

FOLDER: Final = "scratch"  # under MT5_HOME: on the disk that has room for the database, and that a rename can move from
LOCK: Final = "lock"
DATABASE: Final = "mt5_scratch_"  # begins the name of a scratch database on a given server

# A database that is filled once: little is gained by syncing each step of it. What is to last is synced at the end, by a
# checkpoint; what is not to last is never synced.
FILLING: Final = {
    "synchronous_commit": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "30min",
    "maintenance_work_mem": "256MB",
    "autovacuum": "off",
}
PASSING: Final = FILLING | {"fsync": "off", "full_page_writes": "off"}


@dataclass(frozen=True, slots=True)
class Servers:
    """Where a backup is brought back to; ``nats`` None: there is no nats-server for it, and ``missing`` says why.

    ``own_database`` is thrown away where the restore fails. ``bins`` are PostgreSQL's programs by major version.
    """

    database: str
    own_database: bool
    nats: str | None
    bins: dict[str, str]
    missing: str = ""


@contextmanager
def scratch_folder(home: Path) -> Iterator[Path]:
    """A private folder under the home, removed at the end; those that dead runs left are removed first."""
    root = home / FOLDER
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in root.iterdir():
        _remove_unused(old)
    folder = root / secrets.token_hex(6)
    folder.mkdir(mode=0o700)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder)
        os.close(descriptor)
        try:
            root.rmdir()
        except OSError:  # another one is at work in it
            pass


def _remove_unused(folder: Path) -> None:
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return  # of one that has just begun, or has just ended
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # at work
    else:
        from deploy.pginstall import remove_copy
        from deploy.process import end_leftover

        for record in folder.glob("*/*/process.json"):
            end_leftover(record)
        for copy in folder.glob("*/postgres/copy"):
            remove_copy(Path(copy.read_text()))
        shutil.rmtree(folder)
    finally:
        os.close(descriptor)


@contextmanager
def servers(
    folder: Path, bins: dict[str, str], *, lasting: bool, database: str | None = None, nats: str | None = None
) -> Iterator[Servers]:
    """The given servers, and our own with their state under ``folder`` where none is given.

    ``lasting``: what our own hold is kept. It is on the disk once PostgreSQL has made its checkpoint.

    Raises DeployError where this machine has no such server.
    """
    with ExitStack() as stack:
        nats = nats or _start_nats(stack, folder)
        own_database = database is None
        if database is None:
            database, own = _start_postgres(stack, folder, FILLING if lasting else PASSING)
            bins = bins | own
        yield Servers(database, own_database, nats, bins)


@asynccontextmanager
async def practice(folder: Path, bins: dict[str, str], given_database: str | None) -> AsyncIterator[Servers]:
    """Servers that a backup is brought back to for practice: our own; nothing of it is left.

    Where this machine has no PostgreSQL of its own, as in a container, a scratch database on the given server is taken;
    without a nats-server there is none. Raises DeployError where there is no PostgreSQL at all.
    """
    with ExitStack() as stack:
        missing, nats = "", None
        try:
            nats = _start_nats(stack, folder)
        except DeployError as error:
            missing = str(error)
        try:
            database, own = _start_postgres(stack, folder, PASSING)
        except DeployError:
            if given_database is None:
                raise
        else:
            yield Servers(database, True, nats, bins | own, missing)
            return
        async with _database(given_database) as url:
            yield Servers(url, True, nats, bins, missing)


@asynccontextmanager
async def _database(url: str) -> AsyncIterator[str]:
    """A database of its own on a server that others use; dropped at the end. Raises NotRestored."""
    from actors.vault.dump import DumpFailed, direct_connection
    from actors.vault.restore import NotRestored

    name = DATABASE + secrets.token_hex(6)
    try:
        async with direct_connection(url) as connection:
            await connection.execute(f'CREATE DATABASE "{name}" TEMPLATE template0')
        try:
            yield urlunsplit(urlsplit(url)._replace(path=f"/{name}"))
        finally:
            async with direct_connection(url) as connection:
                await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    except DumpFailed as error:
        raise NotRestored(
            f"No scratch database can be made: {error} It needs a role with CREATEDB, or PostgreSQL's programs on this machine."
        ) from error


def _start_nats(stack: ExitStack, folder: Path) -> str:
    """The operator's URL of a nats-server that runs until the stack ends."""
    from deploy.embedded import NatsServer, NatsUser

    server = NatsServer(folder / "nats", (NatsUser(CLIENT, secrets.token_urlsafe(24)),))
    stack.callback(server.stop)
    server.start()
    return server.url(CLIENT)


def _start_postgres(stack: ExitStack, folder: Path, settings: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The URL of a new PostgreSQL that runs until the stack ends, and its programs by major version."""
    from deploy.embedded import PostgresServer

    server = PostgresServer(folder / "postgres", settings=settings)
    stack.callback(server.stop)
    server.start()
    return server.url, {(server.data / "PG_VERSION").read_text().strip(): str(server.bin)}
