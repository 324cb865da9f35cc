"""Servers and folders for practice: an own PostgreSQL and nats-server that live as long as a block, and leave nothing."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from commands.places import CLIENT

if TYPE_CHECKING:
    from deploy.embedded import NatsServer, PostgresServer

FOLDER: Final = "scratch"  # under MT5_HOME: on the disk that has room for the database
LOCK: Final = "lock"

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
    """An empty PostgreSQL and an empty nats-server, both ours; ``bins`` as [backup] postgres_bins has them."""

    database: str
    nats: str
    bins: dict[str, str]


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
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        os.close(descriptor)
        shutil.rmtree(folder)
        try:
            root.rmdir()
        except OSError:  # another one is at work in it
            pass


def _remove_unused(folder: Path) -> None:
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # of one that has just begun, or has just ended
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # at work
    else:
        remove_state(folder)
    finally:
        os.close(descriptor)


def remove_state(folder: Path) -> None:
    """Removes servers' state that nobody uses, and what a dead server had elsewhere."""
    from deploy.pginstall import remove_copy
    from deploy.process import end_leftover

    for name in ("nats", "postgres"):
        end_leftover(folder / name / "process.json")
    copy = folder / "postgres" / "copy"
    if copy.exists():
        remove_copy(Path(copy.read_text()))
    shutil.rmtree(folder)


@contextmanager
def servers(folder: Path, *, lasting: bool) -> Iterator[Servers]:
    """Both servers with their state under ``folder``; ``lasting``: what they hold is on the disk at the end of the block.

    Raises DeployError where this machine has no such server.
    """
    with ExitStack() as stack:
        nats, postgres = _nats(folder), _postgres(folder, lasting)
        for server in (nats, postgres):
            stack.callback(server.stop)
            server.start()
        yield Servers(postgres.url, nats.url(CLIENT), {str(_major(postgres)): str(postgres.bin)})


def _nats(folder: Path) -> NatsServer:
    from deploy.embedded import NatsServer, NatsUser

    return NatsServer(folder / "nats", (NatsUser(CLIENT, secrets.token_urlsafe(24)),))


def _postgres(folder: Path, lasting: bool) -> PostgresServer:
    from deploy.embedded import PostgresServer

    return PostgresServer(folder / "postgres", settings=FILLING if lasting else PASSING)


def _major(postgres: PostgresServer) -> int:
    return int((postgres.data / "PG_VERSION").read_text())
