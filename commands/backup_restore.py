"""``backup restore``: everything that a backup holds, onto an empty installation; whole or not at all."""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from actors.core.backups import Step
from actors.vault.check import Damaged
from actors.vault.files import CONFIGURATION, HOME, KEPT, SETTINGS_FILE, SIDES
from actors.vault.restore import NotRestored, differences, restore_database
from actors.vault.unpack import return_data
from commands.backup import showing
from commands.output import DONE, CommandError, say, write_json
from commands.scratch import servers
from commands.settings import Loaded, read
from commands.vault import postgres_bins
from deploy.home import Home, end_leftovers
from schema.backup import DUMP, BackupManifest
from schema.sql import migrations

if TYPE_CHECKING:
    pass

from commands.backup_open import (
    FILES,
    SERVERS,
    bring_back_onto,
    bus_on,
    checked,
    located,
    opened,
    scratch_in,
    settle,
    stoppable,
    told,
)

STATE: Final = ("nats", "postgres")  # of the embedded servers, under MT5_HOME
LOGS: Final = "logs"  # the one folder of a backup in which an empty home may have something already
ASIDE: Final = "restored"  # under MT5_HOME: what has no place of its own, as the settings of then


async def restore(args: argparse.Namespace) -> int:
    """``backup restore ID [--into URL] [--json]``: whole and onto an empty installation, or a database alone."""
    return await stoppable(_restore(args) if args.into is None else _restore_into(args))


async def _restore(args: argparse.Namespace) -> int:
    started = time.monotonic()
    loaded = read()
    settings = loaded.settings
    home = Home(loaded.home)
    database = settings.database.direct_url or settings.database.url
    with told(), home, showing() as tell:
        end_leftovers(home)
        refuse_used(home.path, nats=settings.nats.url is None, postgres=database is None)
        with scratch_in(home.path) as scratch:
            found = await located(loaded, args.backup, scratch, tell)
            try:
                whole = await checked(found.folder, tell)
                _refuse_newer(whole)
                folder, manifest = await opened(loaded, found.folder, whole, scratch, tell)
                with servers(
                    scratch / SERVERS, postgres_bins(loaded), lasting=True, database=database, nats=settings.nats.url
                ) as ours:
                    async with bus_on(ours, loaded) as bus:
                        restored = await bring_back_onto(folder, manifest, ours, bus, scratch / FILES, tell)
                    await settle(ours)
            except (Damaged, NotRestored) as error:
                raise CommandError(
                    f"{found.name} is not restored, and nothing is left of the attempt: {error}"
                ) from error
            notes = [
                *restored.notes,
                *_left_out(manifest),
                *await asyncio.to_thread(move_in, scratch, home.path, loaded, outside=True),
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
    with showing() as tell, scratch_in(loaded.home) as scratch:
        found = await located(loaded, args.backup, scratch, tell)
        try:
            folder, manifest = await opened(loaded, found.folder, await checked(found.folder, tell), scratch, tell)
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


def refuse_used(home: Path, *, nats: bool, postgres: bool) -> None:
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


def move_in(scratch: Path, home: Path, loaded: Loaded, *, outside: bool) -> list[str]:
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
