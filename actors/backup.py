"""The backup agent: makes, ships and prunes backups on request and on schedule, and has them proved.

One run at a time. A scheduled run that fails is tried again until the next one is due; a slot that was missed while the
agent was away is made up for. What proves a backup is a process of its own (actors/vault/drill.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar, Final

import msgspec
from nats.errors import Error as NatsError

from actors.core.backups import Step
from actors.core.schedule import Schedule, parse_schedule
from actors.vault.drill import CommandFailed, drill, verify
from actors.vault.make import folder_of
from actors.vault.places import Kept, LocalPlace, PlaceFailed
from actors.vault.work import BackupRequest, BackupVerdict, Run
from bus.subjects import BACKUP_RUN
from bus.supervise import ConfigurationError, Context, run_tasks, serve, withdraw
from bus.telemetry import (
    backup_bytes_gauge,
    backup_made_gauge,
    backup_newest_gauge,
    backup_runs_total,
    backup_seconds_gauge,
    drill_at_gauge,
    drill_rpo_gauge,
    drill_rto_gauge,
)
from schema.backup import BackupManifest

MISSED_AFTER: Final = 60.0  # seconds after the start until a missed run is made up for: the others start first
RETRY_FIRST: Final = 300.0
RETRY_MAX: Final = 3_600.0
NAP: Final = 60.0  # short naps: the clock may be set meanwhile
TELL_EVERY: Final = 0.2  # seconds between two words on how far a run is
# What keeps the agent from its work well, by what it is about; `mt5 doctor` and the health monitor tell it.
RUNNING: Final = "run"
VERIFYING: Final = "verify"
DRILLING: Final = "drill"


@dataclass(slots=True)
class _Asked:
    request: BackupRequest
    answer: asyncio.Future[BackupVerdict] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Backup:
    """The actor; see the module."""

    name: ClassVar[str] = "backup"
    owned: ClassVar[bool] = True
    own_service: ClassVar[bool] = True
    description: ClassVar[str] = "Makes, ships, proves and prunes backups"

    def __init__(self, ctx: Context) -> None:
        url = ctx.settings.database.direct_url or ctx.database_url
        if url is None:
            raise ConfigurationError("The backup agent needs PostgreSQL: set MT5_DATABASE_URL.")
        self._url = url
        self._ctx = ctx
        self._bus = ctx.bus
        self._log = ctx.log
        self._home = Path(ctx.settings.home).expanduser()
        self._schedule = _schedule("schedule", ctx.settings.backup.schedule)
        self._drills = _schedule("drill", ctx.settings.backup.drill)
        self._proving = asyncio.Lock()  # each starts servers of its own
        self._queue: asyncio.Queue[_Asked] = asyncio.Queue(1)
        self._working = False

    async def run(self) -> None:
        newest = await self._newest()
        if newest is not None:
            _measure(newest)
        service = await serve(self._bus, self.name, self.description, {BACKUP_RUN: self._on_run})
        self._ctx.ready()
        try:
            await run_tasks(
                {
                    "backup-work": self._work(),
                    "backup-schedule": self._follow_schedule(newest),
                    "backup-drill": self._follow_drills(),
                }
            )
        finally:
            if self._bus.connected:
                await withdraw(service)

    # --- requests ------------------------------------------------------------------------------------------------

    async def _on_run(self, data: bytes) -> bytes:
        try:
            request = msgspec.json.decode(data or b"{}", type=BackupRequest)
            if request.progress is not None and not request.progress.startswith("_INBOX"):
                raise ValueError("progress must be an inbox of the asker.")
        except ValueError as error:  # msgspec.DecodeError is one
            return _encode(BackupVerdict(ok=False, message=f"This is not a request for a backup: {error}"))
        if self._working or self._queue.full():
            return _encode(
                BackupVerdict(ok=False, busy=True, message="A backup is being made already: ask again when it is done.")
            )
        return _encode(await self._enqueue(request))

    async def _enqueue(self, request: BackupRequest) -> BackupVerdict:
        asked = _Asked(request)
        await self._queue.put(asked)
        return await asked.answer

    # --- runs ----------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            asked = await self._queue.get()
            self._working = True
            try:
                verdict = await self._run(asked.request)
            except BaseException as error:
                stopped = isinstance(error, asyncio.CancelledError)
                reason = "the agent is stopping; ask again." if stopped else "an internal error; see the agent's log."
                if not asked.answer.done():
                    asked.answer.set_result(BackupVerdict(ok=False, message=f"No backup was made: {reason}"))
                raise
            finally:
                self._working = False
            if not asked.answer.done():
                asked.answer.set_result(verdict)

    async def _run(self, request: BackupRequest) -> BackupVerdict:
        async with self._telling(request.progress) as tell:
            run = Run(self._home, self._ctx.settings, self._bus, self._url, tell, self._log, request)
            verdict = await run.run()
        outcome = "ok" if verdict.ok else "busy" if verdict.busy else "failed"
        backup_runs_total.inc(outcome=outcome)
        if verdict.ok:
            self._ctx.standing.concerns.pop(RUNNING, None)
        elif not verdict.busy:
            self._ctx.standing.concerns[RUNNING] = verdict.message
        newest = await self._newest()
        if verdict.ok and newest is not None:
            _measure(newest)
        log = self._log.info if verdict.ok else self._log.warning
        log(
            "run ended",
            action="backup.run",
            outcome=outcome,
            message=verdict.message,
            backup=verdict.backup,
            bytes=verdict.bytes,
            seconds=verdict.seconds,
            left_out=list(verdict.left_out),
        )
        return verdict

    @asynccontextmanager
    async def _telling(self, inbox: str | None) -> AsyncIterator[Callable[[Step], None]]:
        """Tells an inbox how far a run is: the newest step, now and then; whoever asked may be gone."""
        newest: list[Step] = []

        async def publish() -> None:
            said: Step | None = None
            while True:
                await asyncio.sleep(TELL_EVERY)
                if newest and newest[-1] != said:
                    said = newest[-1]
                    with contextlib.suppress(NatsError):
                        await self._bus.nc.publish(str(inbox), msgspec.json.encode(said))

        def tell(step: Step) -> None:
            newest[:] = [step]

        if inbox is None:
            yield tell
            return
        telling = asyncio.create_task(publish(), name="backup-progress")
        try:
            yield tell
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)

    # --- the schedule --------------------------------------------------------------------------------------------

    async def _follow_schedule(self, newest: BackupManifest | None) -> None:
        schedule = self._schedule
        if schedule is None:
            await asyncio.Event().wait()
            return
        now = datetime.now(UTC)
        slot = previous_run(schedule, now)
        if newest is None or newest.created_at < slot:
            await asyncio.sleep(MISSED_AFTER)
            await self._slot(schedule, slot)
        while True:
            slot = schedule.next_run(datetime.now(UTC))
            await _sleep_until(slot)
            await self._slot(schedule, slot)

    async def _slot(self, schedule: Schedule, slot: datetime) -> None:
        made = await self._until_made(schedule, slot)
        if made is not None:
            await self._prove(made)

    async def _until_made(self, schedule: Schedule, slot: datetime) -> str | None:
        """Runs until a backup that was begun since the slot is where it belongs, and names it.

        None where the next slot comes first.
        """
        pause, following = RETRY_FIRST, schedule.next_run(slot)
        while True:
            since = max(0.0, (datetime.now(UTC) - slot).total_seconds())
            # What was made since and could not be shipped is shipped, not made again.
            verdict = await self._enqueue(BackupRequest(unless_newer=since))
            if verdict.ok:
                return verdict.backup
            if datetime.now(UTC) + timedelta(seconds=pause) >= following:
                return None
            self._log.info("tries again", action="backup.again", seconds=pause, message=verdict.message)
            await asyncio.sleep(pause)
            pause = min(2 * pause, RETRY_MAX)

    # --- what it is worth ----------------------------------------------------------------------------------------

    async def _prove(self, backup: str) -> None:
        """Has a new backup restored beside the system and compared; the command tells of it on ``backups.verified``."""
        try:
            async with self._proving:
                proof = await verify(backup)
        except CommandFailed as error:
            self._doubt(VERIFYING, f"{backup} could not be verified: {error}")
            return
        if proof.ok:
            self._ctx.standing.concerns.pop(VERIFYING, None)
            self._log.info("backup verified", action="backup.verified", backup=backup, seconds=proof.seconds)
        else:
            named = ", ".join(f"{defect.path} {defect.problem}" for defect in proof.problems)
            self._doubt(VERIFYING, f"{backup} is not whole: {named}")

    async def _follow_drills(self) -> None:
        schedule = self._drills
        if schedule is None:
            await asyncio.Event().wait()
            return
        while True:
            await _sleep_until(schedule.next_run(datetime.now(UTC)))
            await self._drill()

    async def _drill(self) -> None:
        """Has the newest backup restored whole for practice, and takes its time as what a restore would take."""
        try:
            async with self._proving:
                done = await drill()
        except CommandFailed as error:
            self._doubt(DRILLING, f"The restore drill came to no end: {error}")
            return
        if not done.ok:
            self._doubt(DRILLING, f"The restore drill of {done.backup} failed: {done.problem}")
            return
        self._ctx.standing.concerns.pop(DRILLING, None)
        drill_at_gauge.set(datetime.now(UTC).timestamp())
        drill_rto_gauge.set(done.rto_seconds)
        if done.rpo_seconds is not None:
            drill_rpo_gauge.set(done.rpo_seconds)
        self._log.info("restore drilled", action="backup.drilled", backup=done.backup, seconds=done.rto_seconds)

    def _doubt(self, about: str, sentence: str) -> None:
        self._ctx.standing.concerns[about] = sentence
        self._log.warning("backup not proved", action="backup.doubt", message=sentence)

    async def _newest(self) -> BackupManifest | None:
        """The newest whole backup of this home."""
        try:
            kept: list[Kept] = await LocalPlace(folder_of(self._home)).list()
        except PlaceFailed as error:
            self._log.warning("backups cannot be listed", action="backup.list", error=str(error))
            return None
        return next((one.manifest for one in kept if one.manifest is not None), None)


def previous_run(schedule: Schedule, at: datetime) -> datetime:
    """The last run of a schedule before ``at``, or at it."""
    following = schedule.next_run(at)
    return following - timedelta(days=1 if schedule.weekday is None else 7)


async def _sleep_until(at: datetime) -> None:
    while (left := (at - datetime.now(UTC)).total_seconds()) > 0:  # noqa: ASYNC110  # waits for a clock
        await asyncio.sleep(min(left, NAP))


def _measure(manifest: BackupManifest) -> None:
    backup_made_gauge.set(manifest.created_at.timestamp())
    backup_bytes_gauge.set(sum(entry.size for entry in manifest.files))
    backup_seconds_gauge.set(manifest.seconds)
    if manifest.newest is not None:
        backup_newest_gauge.set(manifest.newest.timestamp())


def _schedule(name: str, text: str | None) -> Schedule | None:
    try:
        return None if text is None else parse_schedule(text)
    except ValueError as error:
        raise ConfigurationError(f"[backup] {name}: {error}") from error


def _encode(verdict: BackupVerdict) -> bytes:
    return msgspec.json.encode(verdict)
