"""``backup drill``: the newest backup restored whole beside the system, for practice, and the time that it takes."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from actors.core.backups import Step, total_bytes
from actors.vault.check import Damaged
from actors.vault.drill import Drill, rpo
from actors.vault.files import HOME
from actors.vault.restore import NotRestored
from actors.vault.whole import Restored, Tell
from commands.backup import showing
from commands.backup_open import (
    FILES,
    LATEST,
    SERVERS,
    announce,
    bring_back_onto,
    bus_on,
    checked,
    located,
    opened,
    practising,
    scratch_in,
    settle,
    stoppable,
    told,
)
from commands.backup_restore import move_in, refuse_used
from commands.output import DONE, NO, CommandError, say, write_json
from commands.places import CLIENT
from commands.scratch import Servers, servers
from commands.settings import Loaded, read
from commands.vault import postgres_bins
from deploy.home import Home
from schema.backup import BackupManifest
from schema.messages import BackupEvent

if TYPE_CHECKING:
    from bus.client import Bus

SAMPLE: Final = 100  # signals that a drill makes again


async def drill(args: argparse.Namespace) -> int:
    """``backup drill [--home DIR] [--json]``: exit code 1 where the newest backup does not give everything back."""
    return await stoppable(_drill(args))


async def _drill(args: argparse.Namespace) -> int:
    loaded = read()
    at = Path(args.home).expanduser().absolute() if args.home else None  # noqa: ASYNC240 - no file is touched
    with showing() as tell:
        done = await practise(loaded, at, tell)
    await announce(
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
            stack.enter_context(told())
            home = stack.enter_context(Home(at))
            refuse_used(home.path, nats=True, postgres=True)
        scratch = stack.enter_context(scratch_in(at or loaded.home))
        found = await located(loaded, LATEST, scratch, tell, remote=True)
        fetched = time.monotonic() - started
        try:
            manifest = await checked(found.folder, tell)
            size = total_bytes(manifest.files)
            folder, manifest = await opened(loaded, found.folder, manifest, scratch, tell)
            hashed = time.monotonic() - started - fetched
            async with _drill_servers(loaded, scratch, lasting=at is not None) as ours:
                async with bus_on(ours, loaded) as bus:
                    restored = await bring_back_onto(folder, manifest, ours, bus, scratch / FILES, tell)
                    if bus is not None and manifest.migration:  # else nothing of ours was ever in it
                        tell(Step(stage="signals"))
                        signals, problem = await _sample(ours, bus, loaded, scratch / FILES / HOME)
                if at is not None:
                    await settle(ours)
                missing = ours.missing
            restored.seconds = {"fetch": round(fetched, 3), "hashes": round(hashed, 3), **restored.seconds}
            if at is not None:
                await asyncio.to_thread(move_in, scratch, at, loaded, outside=False)
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
        async with practising(loaded, scratch) as ours:
            yield ours
        return
    with told(), servers(scratch / SERVERS, postgres_bins(loaded), lasting=True) as ours:
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


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
