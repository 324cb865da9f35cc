"""``backup run`` and ``backup list``; ``verify``, ``restore`` and ``drill`` are in files of their own."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from commands.output import DONE, NO, CommandError, complain, say, stderr_console, write_json, write_table
from commands.places import bus_of
from commands.servers import serving
from commands.settings import Loaded, read
from commands.vault import backup_settings
from schema.backup import BackupManifest

if TYPE_CHECKING:
    from actors.core.backups import Step
    from actors.vault.places import Kept
    from actors.vault.work import BackupRequest, BackupVerdict
    from bus.client import Bus

RUN_SECONDS: Final = 6 * 3_600.0
PING_EVERY: Final = 5.0
LOST_AFTER: Final = 45.0  # seconds without a sign of the agent: a restart of it or of NATS is over by then
AGENT_SECONDS: Final = 2.0


# --- run ---------------------------------------------------------------------------------------------------------


async def run(args: argparse.Namespace) -> int:
    """``backup run [--unless-newer AGE] [--local] [--json]``: 0 once it is made and, with a target, shipped.

    The running agent does it; without one it is done here, with embedded servers started for it where none run.
    """
    from actors.vault.work import BackupRequest
    from commands.rejects import since

    now = datetime.now(UTC)
    begun = since(args.unless_newer, now)
    unless = None if begun is None else max(0.0, (now - begun).total_seconds())
    loaded = read()
    with serving(loaded) as places, showing() as tell:
        async with bus_of(places, loaded) as bus:
            request = BackupRequest(unless_newer=unless, local=args.local)
            agent = await _instance(bus)
            if agent is not None:
                verdict = await _ask(bus, agent, request, tell)
            else:
                verdict = await _here(loaded, bus, places.need_database(), request, tell)
    if args.json:
        write_json(verdict)
        return DONE if verdict.ok else NO
    if not verdict.ok:
        raise CommandError(verdict.message, NO)
    for line in _lines(verdict):
        say(line)
    for file in verdict.left_out:
        complain(f"left out: {file}.")
    return DONE


async def _here(
    loaded: Loaded, bus: Bus, database_url: str, request: BackupRequest, tell: Callable[[Step], None]
) -> BackupVerdict:
    """Without an agent: this process is the one."""
    import structlog

    from actors.vault.work import Run

    settings = backup_settings(loaded)
    return await Run(loaded.home, settings, bus, database_url, tell, structlog.get_logger("backup"), request).run()


async def _ask(bus: Bus, agent: str, request: BackupRequest, tell: Callable[[Step], None]) -> BackupVerdict:
    """The agent's verdict; raises CommandError where none comes."""
    import msgspec

    from actors.core.backups import Step
    from actors.vault.work import BackupVerdict
    from bus.client import BusUnavailable
    from bus.subjects import BACKUP_RUN

    async def on_progress(message: Any) -> None:
        tell(msgspec.json.decode(message.data, type=Step))

    inbox = bus.nc.new_inbox()
    subscription = await bus.nc.subscribe(inbox, cb=on_progress)
    wanted = msgspec.json.encode(msgspec.structs.replace(request, progress=inbox))
    asking = asyncio.create_task(bus.request(BACKUP_RUN, wanted, timeout=RUN_SECONDS), name="backup-request")
    watching = asyncio.create_task(_watch(bus, agent), name="backup-watch")
    try:
        await asyncio.wait({asking, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            raise CommandError(watching.result())
        return msgspec.json.decode(asking.result(), type=BackupVerdict)
    except BusUnavailable as error:
        raise CommandError(f"{error} `mt5 backup list` shows whether a backup came of it.") from error
    finally:
        for waiting in (asking, watching):
            waiting.cancel()
        await asyncio.gather(asking, watching, return_exceptions=True)
        await subscription.unsubscribe()


async def _watch(bus: Bus, agent: str) -> str:
    """Returns, with what to tell, once the agent that was asked is no more: it would never answer."""
    loop = asyncio.get_running_loop()
    seen = loop.time()
    while loop.time() - seen < LOST_AFTER:
        await asyncio.sleep(PING_EVERY)
        now = await _instance(bus)
        if now == agent:
            seen = loop.time()
        elif now is not None:
            return "The backup agent was restarted meanwhile and has forgotten the request: run it again."
    return f"The backup agent has not been heard of for {LOST_AFTER:.0f} s: see `mt5 doctor`, then run it again."


async def _instance(bus: Bus) -> str | None:
    """The running agent's instance, which a restart changes; None where none answers."""
    import msgspec
    from nats.micro.service import ServiceVerb, control_subject

    from bus.client import BusUnavailable

    with contextlib.suppress(BusUnavailable):  # nobody answers: that is the answer
        subject = control_subject(ServiceVerb.PING, "backup")
        return str(msgspec.json.decode(await bus.request(subject, timeout=AGENT_SECONDS))["id"])
    return None


def _lines(verdict: BackupVerdict) -> Iterator[str]:
    """The verdict in words, then its figures."""
    yield verdict.message
    if verdict.made:
        yield (
            f"{size(verdict.bytes)} in {verdict.seconds:.1f} s: {verdict.rows:,} rows, {verdict.messages:,} messages of the "
            f"streams, files; in {verdict.path}"
        )
    if verdict.shipped and not verdict.encrypted:
        yield "What was shipped is not encrypted: [backup] recipient takes an age public key."
    if verdict.pruned:
        yield f"Pruned: {', '.join(verdict.pruned)}."


@contextmanager
def showing() -> Iterator[Callable[[Step], None]]:
    """A bar on a terminal for each stage; silence elsewhere."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    console = stderr_console()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("backup", total=None)

        def tell(step: Step) -> None:
            progress.update(task, description=step.stage, completed=step.done, total=step.total or None)

        yield tell


# --- list --------------------------------------------------------------------------------------------------------


async def listing(args: argparse.Namespace) -> int:
    """``backup list [--local] [--json]``: newest first; 1 where the target does not answer."""
    from actors.vault.make import folder_of
    from actors.vault.places import LocalPlace, PlaceFailed, open_place

    loaded = read()
    try:
        here = LocalPlace(folder_of(loaded.home))
        found = [(here.title, one) for one in await here.list()]
    except PlaceFailed as error:
        raise CommandError(str(error), NO) from error
    problem = ""
    if not args.local:
        try:
            async with open_place(loaded.settings.backup) as there:
                if there is not None:
                    found += [(there.title, one) for one in await there.list()]
        except PlaceFailed as error:
            problem = str(error)
    found.sort(key=lambda pair: pair[1].name, reverse=True)
    if args.json:
        write_json({"backups": [_facts(place, one) for place, one in found], "problem": problem})
    elif found:
        columns = ("backup", "begun", "size", "rows", "newest candle", "verified", "place")
        write_table(columns, [_row(place, one) for place, one in found])
    elif not problem:
        say(f"There are no backups in {here.title} yet: `mt5 backup run` makes one.")
    if problem:
        if args.json:
            return NO
        raise CommandError(problem, NO)
    return DONE


def _facts(place: str, one: Kept) -> dict[str, Any]:
    known: BackupManifest | None = one.manifest
    return {
        "backup": one.name,
        "place": place,
        "created_at": known and known.created_at,
        "bytes": one.bytes,
        "rows": _rows(known),
        "newest": known and known.newest,
        "encrypted": known is not None and known.encrypted is not None,
        "verified_at": one.verified_at,
        "problem": one.problem,
    }


def _row(place: str, one: Kept) -> tuple[Any, ...]:
    known = one.manifest
    if known is None:
        return (one.name, None, None, None, None, one.problem, place)
    sealed = ", encrypted" if known.encrypted else ""
    return (
        one.name,
        _time(known.created_at),
        f"{size(one.bytes)}{sealed}",
        f"{_rows(known):,}",
        _time(known.newest),
        _time(one.verified_at) or "not yet",
        place,
    )


def _rows(manifest: BackupManifest | None) -> int:
    return 0 if manifest is None else sum(table.rows for table in manifest.tables)


def _time(at: datetime | None) -> str | None:
    return None if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M}"


def size(count: int) -> str:
    """Bytes as a person reads them."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1_000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1_000
    return f"{amount:.1f} TB"


# --- bringing back -----------------------------------------------------------------------------------------------


async def verify(args: argparse.Namespace) -> int:
    """``backup verify ID``."""
    from commands import backup_verify

    return await backup_verify.verify(args)


async def restore(args: argparse.Namespace) -> int:
    """``backup restore ID``."""
    from commands import backup_restore

    return await backup_restore.restore(args)


async def drill(args: argparse.Namespace) -> int:
    """``backup drill``."""
    from commands import backup_drill

    return await backup_drill.drill(args)
