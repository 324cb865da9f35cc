"""Makes a backup: a folder that appears under its name whole, or not at all.

The dump first, then the streams, then the files: whatever the database knows is in the log, and a restored log reaches at
least as far as what was made of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from actors.core.backups import NoPrograms, Step, free_name, is_name, total_bytes
from actors.vault import dump, files, snapshots
from actors.vault.threads import in_thread
from bus.client import Bus
from bus.subjects import CANDLES
from bus.supervise import VERSION as PROGRAM
from schema.backup import DUMP, FILES, MANIFEST, STREAMS, VERSION, BackupManifest
from schema.load import describe
from schema.settings import Settings

MAKING: Final = ".making-"  # begins the name of a backup that is not whole yet
LOCK: Final = ".lock"
SPARE_BYTES: Final = 512 * 1024**2  # that stay free: a full disk stops the streams
DUMP_SHARE: Final = 0.4  # of the database's size on the disk: its indexes are not dumped, and the rest is compressed
HASH_STAGE: Final = "checksums"

Tell = Callable[[Step], None]


class BackupFailed(Exception):
    """No backup came of it; the message is a sentence with the way out."""


class BackupBusy(BackupFailed):
    """Another process makes one in the same home."""


def silent(step: Step) -> None:
    """Tells nobody."""


def folder_of(home: Path) -> Path:
    """Where the backups of a home are."""
    return home / "backups"


async def make(
    *,
    home: Path,
    settings: Settings,
    bus: Bus,
    database_url: str,
    taken: Collection[str] = (),
    tell: Tell = silent,
) -> BackupManifest:
    """Makes a backup under ``home/backups`` and returns its manifest; ``taken`` are names that it must not have.

    ``database_url`` is a direct connection's. Whoever calls holds :func:`the_only_one`.

    Raises:
        BackupFailed: with the reason; nothing of it is left.
    """
    backups = folder_of(home)
    began = datetime.now(UTC)
    started = time.monotonic()
    try:
        name = free_name(began, {*taken, *names(backups)})
        await _check_room(home, settings, bus, database_url)
        async with _draft(backups, name) as draft:
            manifest = await _fill(draft, name, began, started, home, settings, bus, database_url, tell)
            await in_thread(lambda _: _finish(draft, backups / name, manifest))
    except ValueError as error:
        raise BackupFailed(f"No backup was made: {error}.") from error
    except (dump.DumpFailed, NoPrograms, snapshots.SnapshotFailed) as error:
        raise BackupFailed(f"No backup was made. {error}") from error
    except OSError as error:
        raise BackupFailed(
            f"No backup was made: {error.filename or backups} cannot be written ({error.strerror or error}): mend that and try "
            "again."
        ) from error
    return manifest


async def _fill(
    draft: Path,
    name: str,
    began: datetime,
    started: float,
    home: Path,
    settings: Settings,
    bus: Bus,
    database_url: str,
    tell: Tell,
) -> BackupManifest:
    tell(Step(stage="database"))
    database, pg_dump = await dump.dump(
        database_url,
        settings.backup.postgres_bins,
        draft / DUMP,
        _telling(tell, "database"),
    )
    newest = [database.newest] if database.newest is not None else []
    streams = []
    (draft / STREAMS).mkdir(mode=0o700)
    sizes = await snapshots.list_streams(bus)
    for stream in snapshots.in_order(sizes):
        stage, total = f"stream {stream}", sizes[stream]
        tell(Step(stage=stage, total=total))
        taken = await snapshots.snapshot(bus, stream, draft / STREAMS, _telling(tell, stage, total))
        streams.append(taken.entry)
        if stream == CANDLES.stream and taken.last_at is not None:
            newest.append(taken.last_at)
    packed = await _pack(draft, home, settings, tell)
    size = await asyncio.to_thread(files.size_below, draft)
    tell(Step(stage=HASH_STAGE, total=size))
    entries = await in_thread(lambda count: files.entries(draft, count), _telling(tell, HASH_STAGE, size))
    version = bus.nc.connected_server_version
    return BackupManifest(
        version=VERSION,
        name=name,
        created_at=began,
        seconds=round(time.monotonic() - started, 3),
        home=str(home),
        program=PROGRAM,
        postgres=database.server,
        pg_dump=pg_dump,
        nats_server=f"{version.major}.{version.minor}.{version.patch}",
        migration=database.migration,
        timescaledb=database.timescaledb,
        newest=max(newest, default=None),
        files=entries,
        tables=database.tables,
        streams=tuple(streams),
        left_out=tuple(packed.left_out),
    )


def _telling(tell: Tell, stage: str, total: int = 0) -> Callable[[int], None]:
    return lambda done: tell(Step(stage=stage, done=done, total=total))


async def _pack(draft: Path, home: Path, settings: Settings, tell: Tell) -> files.Packed:
    backup = settings.backup
    total = await asyncio.to_thread(files.size_of, home, backup.data)
    return await in_thread(
        lambda count: files.pack(
            draft / FILES,
            home,
            configuration=Path(backup.config).expanduser() if backup.config else None,
            in_force=msgspec.json.format(msgspec.json.encode(describe(settings))),
            data=backup.data,
            read=count,
        ),
        _telling(tell, "files", total),
    )


def _finish(draft: Path, final: Path, manifest: BackupManifest) -> None:
    """The manifest last, everything on the disk, and then the name."""
    for path in draft.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)  # keys and passwords are in it
    write_manifest(draft, manifest)
    files.sync_tree(draft)
    if final.exists():  # a rename would take the place of an empty folder
        raise FileExistsError(17, "a backup of that name has appeared meanwhile", str(final))
    draft.rename(final)
    _sync_folder(final.parent)


def write_manifest(folder: Path, manifest: BackupManifest) -> None:
    """``manifest.json``, for people too; readable by this user only."""
    handle = os.open(folder / MANIFEST, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")


@asynccontextmanager
async def _draft(backups: Path, name: str) -> AsyncIterator[Path]:
    """A private folder beside the backups, so that a rename can finish the work; gone afterwards."""
    draft = backups / f"{MAKING}{name}-{secrets.token_hex(4)}"
    draft.mkdir(mode=0o700)
    try:
        yield draft
    finally:
        if draft.exists():
            await asyncio.to_thread(shutil.rmtree, draft, ignore_errors=True)


async def _check_room(home: Path, settings: Settings, bus: Bus, database_url: str) -> None:
    """Refuses, before anything is written, what would fill the disk that JetStream and PostgreSQL may live on."""
    database = await dump.look(database_url)
    streams = await snapshots.list_streams(bus)
    others = await asyncio.to_thread(files.size_of, home, settings.backup.data)
    need = int(database.size * DUMP_SHARE) + sum(streams.values()) + others
    if settings.backup.target is not None and settings.backup.recipient is not None:
        need *= 2  # what is shipped is encrypted beside it first
    free = shutil.disk_usage(folder_of(home)).free
    if free < need + SPARE_BYTES:
        raise BackupFailed(
            f"No backup was made: it may need {need / 1e9:.1f} GB, and of {free / 1e9:.1f} GB free under {folder_of(home)} "
            f"{SPARE_BYTES / 1e9:.1f} must stay so: free some, or keep fewer ([backup] daily, weekly, monthly)."
        )


# --- the folder of backups ---------------------------------------------------------------------------------------


def names(backups: Path) -> set[str]:
    """The whole backups of a folder."""
    if not backups.is_dir():
        return set()
    return {path.name for path in backups.iterdir() if is_name(path.name) and path.is_dir()}


@contextlib.contextmanager
def the_only_one(home: Path) -> Iterator[Path]:
    """The right to make, ship and prune in a home, and its folder of backups; what dead makers have left goes away.

    Raises:
        BackupBusy: another process has it.
        BackupFailed: the folder cannot be made.
    """
    backups = folder_of(home)
    try:
        backups.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(backups / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BackupFailed(f"{backups} cannot be used ({error.strerror}): mend its permissions.") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BackupBusy(f"Another process makes a backup in {backups}: try again when it is done.") from None
        for left in backups.glob(f"{MAKING}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield backups
    finally:
        os.close(handle)  # and with it the lock


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(folder: Path) -> BackupManifest:
    """A backup's manifest.

    Raises:
        OSError: there is none, or it cannot be read.
        msgspec.DecodeError: it is no manifest of a version that we know.
    """
    return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=BackupManifest)


def size_of(manifest: BackupManifest) -> int:
    """Bytes of a backup as it lies there."""
    return total_bytes(manifest.files)
