"""``backup verify``, ``backup restore`` and ``backup drill``: a backup is worth what bringing it back has shown."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final, Literal

from msgspec.structs import replace

from actors.core.backups import Defect, Step, is_name, total_bytes
from actors.vault.check import Damaged, check_files
from actors.vault.crypt import CannotDecrypt, KeyUnusable, identities, unseal
from actors.vault.drill import Drill, Proof, rpo
from actors.vault.dump import DumpFailed, direct_connection
from actors.vault.files import CONFIGURATION, HOME, KEPT, SETTINGS_FILE, SIDES
from actors.vault.make import SPARE_BYTES, folder_of
from actors.vault.places import LocalPlace, PlaceFailed, open_place
from actors.vault.restore import NotRestored, differences, restore_database
from actors.vault.threads import in_thread
from actors.vault.unpack import return_data
from actors.vault.whole import Restored, Tell, bring_back
from bus.subjects import BACKUPS
from commands.backup import showing
from commands.output import DONE, NO, WRONG, CommandError, complain, say, write_json
from commands.places import CLIENT, Places, bus_of, find
from commands.scratch import Servers, practice, scratch_folder, servers
from commands.settings import Loaded, read
from commands.vault import postgres_bins
from deploy.home import Home, HomeBusy, end_leftovers
from deploy.process import DeployError
from schema.backup import DUMP, BackupManifest
from schema.messages import BackupEvent
from schema.sql import migrations

if TYPE_CHECKING:
    from bus.client import Bus

LATEST: Final = "latest"
SERVERS: Final = "servers"  # below a scratch folder, as
FILES: Final = "files"
STATE: Final = ("nats", "postgres")  # of the embedded servers, under MT5_HOME
LOGS: Final = "logs"  # the one folder of a backup in which an empty home may have something already
ASIDE: Final = "restored"  # under MT5_HOME: what has no place of its own, as the settings of then
SAMPLE: Final = 100  # signals that a drill makes again
PATIENCE: Final = 10.0  # seconds for a connection to a server that has just started
CHECKPOINT_SECONDS: Final = 600.0
DUMP_GROWS: Final = (
    8  # a compressed dump becomes tables, their indexes and the write-ahead log: five times were measured
)
REST_GROWS: Final = 3


# --- verify --------------------------------------------------------------------------------------------------------


async def verify(args: argparse.Namespace) -> int:
    """``backup verify ID [--quick] [--json]``: exit code 1 where any file is not as it should be, which is then named."""
    return await _stoppable(_verify(args))


async def _verify(args: argparse.Namespace) -> int:
    loaded = read()
    with showing() as tell, _scratch(loaded.home) as scratch:
        found = await _located(loaded, args.backup, scratch, tell)
        proof = await prove(loaded, found, scratch, tell, quick=args.quick)
        if proof.ok and not args.quick:
            await _mark(loaded, found)
    if not args.quick or not proof.ok:
        await _announce(
            loaded,
            BackupEvent(
                event="verified" if proof.ok else "failed",
                backup=proof.backup,
                at=datetime.now(UTC),
                seconds=proof.seconds,
                error="; ".join(f"{defect.path} {defect.problem}" for defect in proof.problems),
                details={"what": "verify", "rows": proof.rows, "streams": proof.streams, "unproved": proof.unproved},
            ),
        )
    if args.json:
        write_json(proof)
    elif proof.ok:
        what = f"{proof.files} files" + (
            "" if args.quick else f", {proof.rows:,} rows of {proof.tables} tables and {proof.streams} streams"
        )
        say(f"{proof.backup} is whole: {what} are as its manifest says ({proof.seconds:.1f} s).")
        if proof.unproved:
            say(f"Its streams were not restored: {proof.unproved}")
    else:
        say(f"{proof.backup} is not whole:")
        for defect in proof.problems:
            say(f"  {defect.path} {defect.problem}")
    return DONE if proof.ok else NO


async def prove(loaded: Loaded, found: Found, scratch: Path, tell: Tell, *, quick: bool) -> Proof:
    """Every hash, and unless ``quick`` everything brought back to scratch servers and compared.

    Raises CommandError where this machine cannot do that, which says nothing of the backup.
    """
    started = time.monotonic()
    problems: tuple[Defect, ...] = ()
    files, restored, missing = 0, Restored(), ""
    try:
        checked = await _checked(found.folder, tell)
        files = len(checked.files)
        if not quick:
            folder, manifest = await _opened(loaded, found.folder, checked, scratch, tell)
            async with _practice(loaded, scratch) as ours, _bus(ours, loaded) as bus:
                restored = await _bring_back(folder, manifest, ours, bus, scratch / FILES, tell)
                missing = ours.missing
    except Damaged as error:
        problems = tuple(error.defects)
    except NotRestored as error:
        if not error.path:
            raise CommandError(f"{found.name} could not be restored for practice. {error}") from error
        problems = (Defect(error.path, f"cannot be restored: {error}"),)
    return Proof(
        backup=found.name,
        ok=not problems,
        problems=problems,
        files=files,
        tables=restored.tables,
        rows=restored.rows,
        streams=len(restored.streams),
        messages=restored.messages,
        seconds=round(time.monotonic() - started, 3),
        unproved=missing,
    )


# --- restore -------------------------------------------------------------------------------------------------------


async def restore(args: argparse.Namespace) -> int:
    """``backup restore ID [--into URL] [--json]``: whole and onto an empty installation, or a database alone."""
    return await _stoppable(_restore(args) if args.into is None else _restore_into(args))


async def _restore(args: argparse.Namespace) -> int:
    started = time.monotonic()
    loaded = read()
    settings = loaded.settings
    home = Home(loaded.home)
    database = settings.database.direct_url or settings.database.url
    with _told(), home, showing() as tell:
        end_leftovers(home)
        _refuse_used(home.path, nats=settings.nats.url is None, postgres=database is None)
        with _scratch(home.path) as scratch:
            found = await _located(loaded, args.backup, scratch, tell)
            try:
                checked = await _checked(found.folder, tell)
                _refuse_newer(checked)
                folder, manifest = await _opened(loaded, found.folder, checked, scratch, tell)
                with servers(
                    scratch / SERVERS, postgres_bins(loaded), lasting=True, database=database, nats=settings.nats.url
                ) as ours:
                    async with _bus(ours, loaded) as bus:
                        restored = await _bring_back(folder, manifest, ours, bus, scratch / FILES, tell)
                    await _settle(ours)
            except (Damaged, NotRestored) as error:
                raise CommandError(
                    f"{found.name} is not restored, and nothing is left of the attempt: {error}"
                ) from error
            notes = [
                *restored.notes,
                *_left_out(manifest),
                *await asyncio.to_thread(_move_in, scratch, home.path, loaded, outside=True),
            ]
    seconds = time.monotonic() - started
    if args.json:
        write_json(
            {
                "backup": manifest.name,
                "home": str(home.path),
                "rows": restored.rows,
                "tables": restored.tables,
                "streams": restored.streams,
                "messages": restored.messages,
                "newest": manifest.newest,
                "seconds": round(seconds, 3),
                "parts": restored.seconds,
                "notes": notes,
            }
        )
        return DONE
    say(
        f"{manifest.name} is restored under {home.path}: {restored.rows:,} rows of {restored.tables} tables and "
        f"{restored.messages:,} messages of {len(restored.streams)} streams ({seconds:.1f} s). `mt5 up` goes on from there."
    )
    if manifest.newest is not None:
        say(
            f"Its newest candle was received at {manifest.newest:%Y-%m-%d %H:%M} UTC; `mt5 gaps` shows what is missing since."
        )
    for note in notes:
        say(note)
    return DONE


async def _restore_into(args: argparse.Namespace) -> int:
    started = time.monotonic()
    loaded = read()
    with showing() as tell, _scratch(loaded.home) as scratch:
        found = await _located(loaded, args.backup, scratch, tell)
        try:
            folder, manifest = await _opened(loaded, found.folder, await _checked(found.folder, tell), scratch, tell)
            tell(Step(stage="database"))
            bins = postgres_bins(loaded)
            complaint = await restore_database(args.into, folder / DUMP, manifest, bins, parallel=False)
            tell(Step(stage="comparison"))
            problems = await differences(args.into, manifest)
        except (Damaged, NotRestored) as error:
            raise CommandError(f"{found.name} is not restored: {error}") from error
    if problems:
        raise CommandError(
            f"{DUMP} does not give back what the manifest says: {', '.join(problems)}. {complaint}".strip()
        )
    rows = sum(table.rows for table in manifest.tables)
    seconds = time.monotonic() - started
    if args.json:
        write_json(
            {"backup": manifest.name, "rows": rows, "tables": len(manifest.tables), "seconds": round(seconds, 3)}
        )
    else:
        say(f"{rows:,} rows of {len(manifest.tables)} tables of {manifest.name} are restored ({seconds:.1f} s).")
    return DONE


def _refuse_used(home: Path, *, nats: bool, postgres: bool) -> None:
    """A restore adds to nothing and replaces nothing."""
    # An SQLite log without its database would be taken for the log of the one that is restored.
    sides = [f"{name}{side}" for name in KEPT if name.endswith(".db") for side in SIDES]
    for name in (*(("nats",) if nats else ()), *(("postgres",) if postgres else ()), *KEPT, *sides):
        place = home / name
        if name != LOGS and os.path.lexists(place) and not (place.is_dir() and not any(place.iterdir())):
            raise CommandError(
                f"{home} is not empty (it has {name}): a backup is restored onto an empty installation only, so move that "
                "away or set MT5_HOME to a new folder."
            )


def _refuse_newer(manifest: BackupManifest) -> None:
    known = [migration.version for migration in migrations()]
    if manifest.migration and manifest.migration not in known:
        raise CommandError(
            f"{manifest.name} was made by a newer version of mt5 (its database has migration {manifest.migration}): install "
            f"that version ({manifest.program}) or a newer one, then restore again."
        )


def _move_in(scratch: Path, home: Path, loaded: Loaded, *, outside: bool) -> list[str]:
    """Renames what was restored into the home, servers last; blocking. Returns sentences for the person.

    ``outside``: the data of other programs goes back to where it was, beyond the home.
    """
    os.sync()  # nats-server and the unpacking have not waited for the disk
    files = scratch / FILES
    notes = _return_data(files, home) if outside else []
    for place in sorted((files / HOME).iterdir()) if (files / HOME).is_dir() else []:
        if place.name == LOGS:
            (home / LOGS).mkdir(mode=0o700, exist_ok=True)
            for log in sorted(place.iterdir()):
                if not (home / LOGS / log.name).exists():
                    log.rename(home / LOGS / log.name)
        else:
            _rename(place, home / place.name)
    if (files / CONFIGURATION).is_dir():
        (home / ASIDE).mkdir(mode=0o700, exist_ok=True)
        for place in sorted((files / CONFIGURATION).iterdir()):
            place.replace(home / ASIDE / place.name)
        notes += _settings_note(home / ASIDE / Path(SETTINGS_FILE).name, loaded)
    for name in STATE:
        if (scratch / SERVERS / name).is_dir():
            _rename(scratch / SERVERS / name, home / name)
    os.sync()
    return notes


def _rename(source: Path, target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        target.rmdir()  # empty, as was seen before
    source.rename(target)


def _return_data(files: Path, home: Path) -> list[str]:
    notes = []
    for place, now, reason in return_data(files):
        if now is not None and reason:
            (home / ASIDE / "data").mkdir(mode=0o700, parents=True, exist_ok=True)
            kept = home / ASIDE / "data" / now.name
            now.rename(kept)
            notes.append(f"What was in {place} is in {kept} now: {reason} where it was.")
        elif reason:
            notes.append(f"There is nothing of {place}: {reason}.")
    return notes


def _settings_note(then: Path, loaded: Loaded) -> list[str]:
    if not then.is_file() or loaded.text == then.read_text(encoding="utf-8", errors="replace"):
        return []
    if loaded.file is None:
        return [f"No settings file is in force here, and there was one then: copy {then} to mt5.toml before `mt5 up`."]
    return [f"The settings of then differ from those in force: compare {loaded.file} with {then} before `mt5 up`."]


def _left_out(manifest: BackupManifest) -> list[str]:
    return [f"The backup lacks something: {reason}." for reason in manifest.left_out]


# --- drill ---------------------------------------------------------------------------------------------------------


async def drill(args: argparse.Namespace) -> int:
    """``backup drill [--home DIR] [--json]``: exit code 1 where the newest backup does not give everything back."""
    return await _stoppable(_drill(args))


async def _drill(args: argparse.Namespace) -> int:
    loaded = read()
    at = Path(args.home).expanduser().absolute() if args.home else None  # noqa: ASYNC240 - no file is touched
    with showing() as tell:
        done = await practise(loaded, at, tell)
    await _announce(
        loaded,
        BackupEvent(
            event="drilled" if done.ok else "failed",
            backup=done.backup,
            at=datetime.now(UTC),
            bytes=done.bytes,
            seconds=done.rto_seconds,
            rpo_seconds=done.rpo_seconds,
            error=done.problem,
            details={"what": "drill", "signals": done.signals, "rows": done.rows, "parts": done.parts},
        ),
    )
    if args.json:
        write_json(done)
    elif done.ok:
        say(
            f"{done.backup} is back in {done.rto_seconds:.1f} s (RTO): {done.rows:,} rows and {done.messages:,} messages, and "
            f"{done.signals} old signals were made again, all identical."
        )
        if done.rpo_seconds is not None:
            say(f"Its newest candle was {duration(done.rpo_seconds)} old by then (RPO).")
        if done.unproved:
            say(f"Its streams were not restored: {done.unproved}")
        if done.home is not None:
            say(f"What was restored is in {done.home}: `MT5_HOME={done.home} mt5 up` starts it.")
    else:
        say(f"{done.backup} does not bring everything back: {done.problem}")
    return DONE if done.ok else NO


async def practise(loaded: Loaded, at: Path | None, tell: Tell) -> Drill:
    """Fetches the newest backup, restores it whole beside the installation, makes old signals again, and takes the time.

    ``at``: a new folder that keeps what was restored. Raises CommandError where this machine cannot do that, which says
    nothing of the backup.
    """
    started = time.monotonic()
    restored, signals, problem, missing, size = Restored(), 0, "", "", 0
    manifest: BackupManifest | None = None
    with ExitStack() as stack:
        if at is not None:
            stack.enter_context(_told())
            home = stack.enter_context(Home(at))
            _refuse_used(home.path, nats=True, postgres=True)
        scratch = stack.enter_context(_scratch(at or loaded.home))
        found = await _located(loaded, LATEST, scratch, tell, remote=True)
        fetched = time.monotonic() - started
        try:
            manifest = await _checked(found.folder, tell)
            size = total_bytes(manifest.files)
            folder, manifest = await _opened(loaded, found.folder, manifest, scratch, tell)
            checked = time.monotonic() - started - fetched
            async with _drill_servers(loaded, scratch, lasting=at is not None) as ours:
                async with _bus(ours, loaded) as bus:
                    restored = await _bring_back(folder, manifest, ours, bus, scratch / FILES, tell)
                    if bus is not None and manifest.migration:  # else nothing of ours was ever in it
                        tell(Step(stage="signals"))
                        signals, problem = await _sample(ours, bus, loaded, scratch / FILES / HOME)
                if at is not None:
                    await _settle(ours)
                missing = ours.missing
            restored.seconds = {"fetch": round(fetched, 3), "hashes": round(checked, 3), **restored.seconds}
            if at is not None:
                await asyncio.to_thread(_move_in, scratch, at, loaded, outside=False)
        except Damaged as error:
            problem = f"{error}."
        except NotRestored as error:
            if not error.path:
                raise CommandError(f"{found.name} could not be restored for practice. {error}") from error
            problem = str(error)
    return Drill(
        backup=found.name,
        ok=not problem,
        rto_seconds=round(time.monotonic() - started, 3),
        rpo_seconds=None if manifest is None else rpo(manifest, datetime.now(UTC)),
        parts=restored.seconds,
        bytes=size,
        rows=restored.rows,
        messages=restored.messages,
        signals=signals,
        problem=problem,
        unproved=missing,
        home=None if at is None else str(at),
    )


@asynccontextmanager
async def _drill_servers(loaded: Loaded, scratch: Path, *, lasting: bool) -> AsyncIterator[Servers]:
    """Our own: for good, or for practice only."""
    if not lasting:
        async with _practice(loaded, scratch) as ours:
            yield ours
        return
    with _told(), servers(scratch / SERVERS, postgres_bins(loaded), lasting=True) as ours:
        yield ours


async def _sample(ours: Servers, bus: Bus, loaded: Loaded, home: Path) -> tuple[int, str]:
    """Makes old signals again from what was restored alone: how many, and what is wrong in words."""
    from actors.artifacts import Artifacts
    from actors.audit import Audit
    from bus.audit import Streams
    from bus.client import BusUnavailable
    from bus.store import Store, StoreRejected, StoreUnavailable

    store = await Store.connect(ours.database, size=1, name=CLIENT)
    try:
        artifacts = Artifacts(bus, replace(loaded.settings, home=str(home)))
        audit = Audit(store, Streams(bus, "drill"), artifacts.load)
        count, wrong = 0, []
        async for part in audit.run(await audit.pick(SAMPLE, Random())):
            count += len(part)
            wrong += [one.signal.id for one in part if one.differences]
    except (StoreUnavailable, StoreRejected, BusUnavailable) as error:
        raise NotRestored(f"Signals could not be made again: {error}") from error
    finally:
        await store.close()
    return count, f"{len(wrong)} of {count} signals are not made again as they were, {wrong[0]} first." if wrong else ""


# --- what they share -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """A backup where it can be read; ``kept`` says where it is kept: in the home, at the target (fetched), or elsewhere."""

    name: str
    folder: Path
    kept: Literal["home", "target", "elsewhere"]


async def _located(loaded: Loaded, named: str, scratch: Path, tell: Tell, *, remote: bool = False) -> Found:
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


async def _mark(loaded: Loaded, found: Found) -> None:
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


async def _checked(folder: Path, tell: Tell) -> BackupManifest:
    """The manifest of a backup whose every hash is right. Raises Damaged."""
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())  # noqa: ASYNC240 - some thirty files
    return await in_thread(
        lambda count: check_files(folder, count), lambda done: tell(Step(stage="hashes", done=done, total=total))
    )


def _check_room(place: Path, manifest: BackupManifest) -> None:
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


async def _opened(
    loaded: Loaded, folder: Path, manifest: BackupManifest, scratch: Path, tell: Tell
) -> tuple[Path, BackupManifest]:
    """The backup decrypted, where it is encrypted. Raises CommandError without its key, or without room."""
    _check_room(scratch, manifest)
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
        opened = await in_thread(
            lambda count: unseal(folder, manifest, plain, keys, count),
            lambda done: tell(Step(stage="decryption", done=done, total=total)),
        )
    except (KeyUnusable, CannotDecrypt) as error:
        raise CommandError(str(error), WRONG) from error
    return plain, opened


@asynccontextmanager
async def _practice(loaded: Loaded, scratch: Path) -> AsyncIterator[Servers]:
    with _told():
        async with practice(scratch / SERVERS, postgres_bins(loaded), find(loaded).database) as ours:
            yield ours


async def _bring_back(
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


async def _settle(ours: Servers) -> None:
    """What a server of ours was filled with is on the disk. Raises NotRestored."""
    if not ours.own_database:
        return
    try:
        async with direct_connection(ours.database) as connection:
            await connection.execute("CHECKPOINT", timeout=CHECKPOINT_SECONDS)
    except DumpFailed as error:
        raise NotRestored(str(error)) from error


@asynccontextmanager
async def _bus(ours: Servers, loaded: Loaded) -> AsyncIterator[Bus | None]:
    if ours.nats is None:
        yield None
        return
    places = Places(home=loaded.home, nats=ours.nats, database=ours.database, gateway=None)
    async with bus_of(places, loaded, patience=PATIENCE) as bus:
        yield bus


async def _announce(loaded: Loaded, event: BackupEvent) -> None:
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


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


@contextmanager
def _scratch(home: Path) -> Iterator[Path]:
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
def _told() -> Iterator[None]:
    """What servers and homes refuse, as commands tell it."""
    try:
        yield
    except HomeBusy as error:
        raise CommandError(f"{str(error)[:1].upper()}{str(error)[1:]}", NO) from error
    except DeployError as error:
        raise CommandError(f"{str(error)[:1].upper()}{str(error)[1:]}", WRONG) from error


async def _stoppable(work: Coroutine[Any, Any, int]) -> int:
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
