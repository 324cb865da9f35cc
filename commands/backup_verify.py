"""``backup verify``: every hash, then a real restore beside the system; every file that is not as it should be is named."""

from __future__ import annotations

import argparse
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from actors.core.backups import Defect
from actors.vault.check import Damaged
from actors.vault.drill import Proof
from actors.vault.restore import NotRestored
from actors.vault.whole import Restored, Tell
from commands.backup import showing
from commands.output import DONE, NO, CommandError, say, write_json
from commands.settings import Loaded, read
from schema.messages import BackupEvent

if TYPE_CHECKING:
    pass

from commands.backup_open import (
    FILES,
    Found,
    announce,
    bring_back_onto,
    bus_on,
    checked,
    located,
    mark,
    opened,
    practising,
    scratch_in,
    stoppable,
)


async def verify(args: argparse.Namespace) -> int:
    """``backup verify ID [--quick] [--json]``: exit code 1 where any file is not as it should be, which is then named."""
    return await stoppable(_verify(args))


async def _verify(args: argparse.Namespace) -> int:
    loaded = read()
    with showing() as tell, scratch_in(loaded.home) as scratch:
        found = await located(loaded, args.backup, scratch, tell)
        proof = await prove(loaded, found, scratch, tell, quick=args.quick)
        if proof.ok and not args.quick:
            await mark(loaded, found)
    if not args.quick or not proof.ok:
        await announce(
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
        whole = await checked(found.folder, tell)
        files = len(whole.files)
        if not quick:
            folder, manifest = await opened(loaded, found.folder, whole, scratch, tell)
            async with practising(loaded, scratch) as ours, bus_on(ours, loaded) as bus:
                restored = await bring_back_onto(folder, manifest, ours, bus, scratch / FILES, tell)
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
