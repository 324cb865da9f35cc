"""A backup found, checked, decrypted and brought back: what ``backup verify``, ``restore`` and ``drill`` have in common."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from actors.core.backups import Step, is_name, total_bytes
from actors.vault.check import check_files
from actors.vault.crypt import CannotDecrypt, KeyUnusable, identities, unseal
from actors.vault.dump import DumpFailed, direct_connection
from actors.vault.make import SPARE_BYTES, folder_of
from actors.vault.places import LocalPlace, PlaceFailed, open_place
from actors.vault.restore import NotRestored
from actors.vault.threads import in_thread
from actors.vault.whole import Restored, Tell, bring_back
from bus.subjects import BACKUPS
from commands.output import NO, WRONG, CommandError, complain
from commands.places import Places, bus_of, find
from commands.scratch import Servers, practice, scratch_folder
from commands.settings import Loaded
from commands.vault import postgres_bins
from deploy.home import HomeBusy
from deploy.process import DeployError
from schema.backup import DUMP, BackupManifest
from schema.messages import BackupEvent

if TYPE_CHECKING:
    from bus.client import Bus

LATEST: Final = "latest"
SERVERS: Final = "servers"  # below a scratch folder, as
FILES: Final = "files"
PATIENCE: Final = 10.0  # seconds for a connection to a server that has just started
CHECKPOINT_SECONDS: Final = 600.0
# A compressed dump becomes tables and indexes (3.2 times its size were measured) and their write-ahead log.
DUMP_GROWS: Final = 8
REST_GROWS: Final = 3


@dataclass(frozen=True, slots=True)
class Found:
    """A backup where it can be read; ``kept`` says where it is kept: in the home, at the target (fetched), or elsewhere."""

    name: str
    folder: Path
    kept: Literal["home", "target", "elsewhere"]


async def located(loaded: Loaded, named: str, scratch: Path, tell: Tell, *, remote: bool = False) -> Found:
    """A backup by its name, ``latest`` or its folder: the home's own, else the target's, which is fetched.

    ``remote``: the target's where there is a target. Raises CommandError where there is no such backup.
    """
    if named != LATEST and not is_name(named):
        folder = Path(named).expanduser().absolute()  # noqa: ASYNC240 - one look
        if not folder.is_dir():
            raise CommandError(f"There is no backup {named}: `mt5 backup list` shows those that are.")
        return Found(folder.name, folder, "home" if folder.parent == folder_of(loaded.home) else "elsewhere")
    local = LocalPlace(folder_of(loaded.home))
    try:
        here = set() if remote and loaded.settings.backup.target is not None else await local.names()
        if named in here:
            return Found(named, local.root / named, "home")
        try:
            async with open_place(loaded.settings.backup) as target:
                there = set() if target is None else await target.names()
                name = max(here | there, default="") if named == LATEST else named
                if target is not None and name in there - here:
                    return Found(name, await target.fetch(name, scratch / "fetched", tell), "target")
                places = local.title if target is None else f"{local.title} or {target.title}"
        except PlaceFailed as error:
            if named != LATEST or not here:
                raise
            name, places = max(here), local.title
            complain(f"{error} The newest one of {places} is taken.")
    except PlaceFailed as error:
        raise CommandError(str(error)) from error
    if name in here:
        return Found(name, local.root / name, "home")
    raise CommandError(
        f"There is no backup {name or 'yet'} in {places}: `mt5 backup list` shows those that are, `mt5 backup run` makes one."
    )


async def mark(loaded: Loaded, found: Found) -> None:
    """Notes beside a backup that it was proved: retention keeps those."""
    at = datetime.now(UTC)
    try:
        if found.kept == "home":
            await LocalPlace(found.folder.parent).mark_verified(found.name, at)
        elif found.kept == "target":
            async with open_place(loaded.settings.backup) as target:
                if target is not None:
                    await target.mark_verified(found.name, at)
    except PlaceFailed as error:
        complain(f"{found.name} is whole, but that could not be noted beside it: {error}")


async def checked(folder: Path, tell: Tell) -> BackupManifest:
    """The manifest of a backup whose every hash is right. Raises Damaged."""
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())  # noqa: ASYNC240 - some thirty files
    return await in_thread(
        lambda count: check_files(folder, count), lambda done: tell(Step(stage="hashes", done=done, total=total))
    )


def check_room(place: Path, manifest: BackupManifest) -> None:
    """Refuses, before anything is written, what would fill the disk that JetStream and PostgreSQL may live on."""
    dump = sum(entry.size for entry in manifest.files if entry.path == DUMP)
    rest = total_bytes(manifest.files) - dump
    plain = dump + rest if manifest.encrypted is not None else 0
    need = DUMP_GROWS * dump + REST_GROWS * rest + plain
    free = shutil.disk_usage(place).free
    if free < need + SPARE_BYTES:
        raise CommandError(
            f"{manifest.name} may need {need / 1e9:.1f} GB when it is opened, and of {free / 1e9:.1f} GB free in {place} "
            f"{SPARE_BYTES / 1e9:.1f} must stay so: make room, or set MT5_HOME to another disk."
        )


async def opened(
    loaded: Loaded, folder: Path, manifest: BackupManifest, scratch: Path, tell: Tell
) -> tuple[Path, BackupManifest]:
    """The backup decrypted, where it is encrypted. Raises CommandError without its key, or without room."""
    check_room(scratch, manifest)
    if manifest.encrypted is None:
        return folder, manifest
    identity = loaded.settings.backup.identity
    if identity is None:
        raise CommandError(
            f"{manifest.name} is encrypted to {manifest.encrypted}: name the file of its secret key in [backup] identity "
            "(`backup verify --quick` needs none).",
            WRONG,
        )
    plain = scratch / "plain"
    plain.mkdir(mode=0o700)
    total = total_bytes(manifest.files)
    try:
        keys = await asyncio.to_thread(identities, Path(identity).expanduser())  # noqa: ASYNC240 - no file is touched
        plain_manifest = await in_thread(
            lambda count: unseal(folder, manifest, plain, keys, count),
            lambda done: tell(Step(stage="decryption", done=done, total=total)),
        )
    except (KeyUnusable, CannotDecrypt) as error:
        raise CommandError(str(error), WRONG) from error
    return plain, plain_manifest


@asynccontextmanager
async def practising(loaded: Loaded, scratch: Path) -> AsyncIterator[Servers]:
    with told():
        async with practice(scratch / SERVERS, postgres_bins(loaded), find(loaded).database) as ours:
            yield ours


async def bring_back_onto(
    folder: Path, manifest: BackupManifest, ours: Servers, bus: Bus | None, files: Path, tell: Tell
) -> Restored:
    return await bring_back(
        folder,
        manifest,
        database_url=ours.database,
        bus=bus,
        bins=ours.bins,
        files=files,
        passing=ours.own_database,
        tell=tell,
    )


async def settle(ours: Servers) -> None:
    """What a server of ours was filled with is on the disk. Raises NotRestored."""
    if not ours.own_database:
        return
    try:
        async with direct_connection(ours.database) as connection:
            await connection.execute("CHECKPOINT", timeout=CHECKPOINT_SECONDS)
    except DumpFailed as error:
        raise NotRestored(str(error)) from error


@asynccontextmanager
async def bus_on(ours: Servers, loaded: Loaded) -> AsyncIterator[Bus | None]:
    if ours.nats is None:
        yield None
        return
    places = Places(home=loaded.home, nats=ours.nats, database=ours.database, gateway=None)
    async with bus_of(places, loaded, patience=PATIENCE) as bus:
        yield bus


async def announce(loaded: Loaded, event: BackupEvent) -> None:
    """Tells those who listen, where the system runs; nobody waits for it where it does not."""
    places = find(loaded)
    if places.nats is None:
        return
    from bus.client import BusUnavailable

    try:
        async with bus_of(places, loaded) as bus:
            await bus.publish(
                BACKUPS, event, event.event, msg_id=f"{event.event}:{event.backup}:{event.at.isoformat()}"
            )
    except (CommandError, BusUnavailable) as error:
        complain(f"what came of it is not on backups.{event.event}: {error}")


@contextmanager
def scratch_in(home: Path) -> Iterator[Path]:
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(scratch_folder(home))
        except OSError as error:
            raise CommandError(
                f"{error.filename or home} cannot be used ({error.strerror or error}): a backup is opened there, so mend its "
                "permissions or make room."
            ) from error
        yield folder


@contextmanager
def told() -> Iterator[None]:
    """What servers and homes refuse, as commands tell it."""
    try:
        yield
    except HomeBusy as error:
        raise CommandError(f"{str(error)[:1].upper()}{str(error)[1:]}", NO) from error
    except DeployError as error:
        raise CommandError(f"{str(error)[:1].upper()}{str(error)[1:]}", WRONG) from error


async def stoppable(work: Coroutine[Any, Any, int]) -> int:
    """A command that a SIGTERM ends as Ctrl-C does: its servers stop, and what it has made goes away."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    stopped = False

    def stop() -> None:
        nonlocal stopped
        stopped = True
        task.cancel()

    loop.add_signal_handler(signal.SIGTERM, stop)
    try:
        return await task
    except asyncio.CancelledError:
        if not stopped:
            raise
        raise CommandError("Stopped: nothing is left of it.") from None
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
