"""One whole run of a backup: make it, encrypt and ship it, prune; told as events, and as one answer.

The actor and the command run the same; a lock in the home keeps them from doing it at once.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

from msgspec import Struct

from actors.core.backups import Step, total_bytes
from actors.core.retention import Known, to_delete
from actors.vault import crypt
from actors.vault.drill import rpo
from actors.vault.make import BackupBusy, BackupFailed, folder_of, make, the_only_one, write_manifest
from actors.vault.places import Kept, LocalPlace, Place, PlaceFailed, open_place
from actors.vault.threads import in_thread
from bus.client import Bus, BusUnavailable, outgoing
from bus.subjects import BACKUPS
from schema.backup import BackupManifest
from schema.messages import BackupEvent
from schema.settings import Settings

SEALING: Final = ".sealing-"
EVENT_SECONDS: Final = 20.0  # that an event has to reach its stream; what it tells of is done all the same

Tell = Callable[[Step], None]


class BackupRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``backup.run`` is asked with. ``progress`` is an inbox that hears :class:`Step`; seconds for ``unless_newer``."""

    progress: str | None = None
    unless_newer: float | None = None
    local: bool = False


class BackupVerdict(Struct, frozen=True, kw_only=True):
    """What became of a run; ``message`` is a sentence. ``backup`` is the newest one's name, also where none had to be made.

    ``busy`` means that another run was under way. ``left_out`` names files that could not be read, ``shipped`` and
    ``pruned`` backups. ``rpo_seconds`` is the age of the newest candle in it when it was done.
    """

    ok: bool
    message: str
    backup: str = ""
    made: bool = False
    busy: bool = False
    path: str = ""
    bytes: int = 0
    seconds: float = 0.0
    rpo_seconds: float | None = None
    target: str = ""
    encrypted: bool = False
    rows: int = 0
    messages: int = 0
    shipped: tuple[str, ...] = ()
    pruned: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(slots=True)
class Run:
    """A run with all that it needs; ``database_url`` is a direct connection's."""

    home: Path
    settings: Settings
    bus: Bus
    database_url: str
    tell: Tell
    log: Any
    request: BackupRequest = field(default_factory=BackupRequest)

    async def run(self) -> BackupVerdict:
        """Never raises for what can go wrong with a backup: the verdict says it."""
        started = time.monotonic()
        try:
            with the_only_one(self.home) as backups:
                return await self._run(LocalPlace(backups), started)
        except BackupBusy as error:
            return BackupVerdict(ok=False, busy=True, message=str(error))
        except BackupFailed as error:
            await self._say("failed", "", error=str(error), seconds=time.monotonic() - started)
            return BackupVerdict(ok=False, message=str(error))

    async def _run(self, here: LocalPlace, started: float) -> BackupVerdict:
        kept = await _failing(here.list())
        newest = next((one.manifest for one in kept if one.manifest is not None), None)
        made = False
        problem = ""
        shipped: list[str] = []
        pruned: list[str] = []
        if newest is None or not self._is_new(newest):
            made = True
            taken = set() if self.request.local else await self._names_there()
            newest = await make(
                home=self.home,
                settings=self.settings,
                bus=self.bus,
                database_url=self.database_url,
                taken=taken,
                tell=self.tell,
            )
            await self._say_of(newest, "made", seconds=newest.seconds)
        title = self.settings.backup.target or ""
        if title and not self.request.local:
            try:
                async with open_place(self.settings.backup) as there:
                    if there is not None:
                        title = there.title
                        shipped = await self._ship(here, there, newest.name)
                        pruned += await self._prune(there, newest.name, await _failing(here.list()))
            except (PlaceFailed, crypt.KeyUnusable) as error:
                problem = str(error)
                await self._say_of(newest, "failed", target=title, error=f"{newest.name} is not shipped. {problem}")
        pruned += await _failing(self._prune(here, newest.name))
        return self._verdict(newest, made, title, problem, tuple(shipped), tuple(pruned), time.monotonic() - started)

    def _is_new(self, manifest: BackupManifest) -> bool:
        age = (datetime.now(UTC) - manifest.created_at).total_seconds()
        return self.request.unless_newer is not None and age < self.request.unless_newer

    async def _names_there(self) -> set[str]:
        """The target's; none where it does not answer, which shipping will tell."""
        try:
            async with open_place(self.settings.backup) as there:
                return await there.names() if there is not None else set()
        except PlaceFailed as error:
            self.log.warning("the target does not answer yet", action="backup.target", error=str(error))
            return set()

    # --- shipping ------------------------------------------------------------------------------------------------

    async def _ship(self, here: LocalPlace, there: Place, newest: str) -> list[str]:
        """Ships the newest one, and those before it that the target missed since its own newest one; oldest first."""
        remote = {one.name: one for one in await there.list()}
        local = {one.name: one for one in await here.list()}
        since = max((name for name in remote if name not in local or _same(local[name], remote[name])), default=newest)
        shipped = []
        for name in sorted(name for name in local if name >= since or name == newest):
            manifest = local[name].manifest
            if manifest is None:
                continue
            if name in remote:
                if not _same(local[name], remote[name]):
                    raise PlaceFailed(f"{there.title} has another backup {name}: move one of the two away.")
                continue
            await self._ship_one(here.root / name, manifest, there)
            shipped.append(name)
        return shipped

    async def _ship_one(self, folder: Path, manifest: BackupManifest, there: Place) -> None:
        started = time.monotonic()
        async with self._sealed(folder, manifest) as (ready, sealed):
            await there.upload(ready, sealed, self.tell)
        size = total_bytes(sealed.files)
        await self._say_of(
            manifest, "shipped", target=there.title, size=size, seconds=round(time.monotonic() - started, 3)
        )
        self.log.info("backup shipped", action="backup.shipped", backup=manifest.name, target=there.title, bytes=size)

    @asynccontextmanager
    async def _sealed(self, folder: Path, manifest: BackupManifest) -> AsyncIterator[tuple[Path, BackupManifest]]:
        """The folder that may leave the machine: itself, or its encrypted copy, which is gone afterwards."""
        key = self.settings.backup.recipient
        if key is None:
            yield folder, manifest
            return
        total = total_bytes(manifest.files)
        draft = folder.with_name(f"{SEALING}{folder.name}")
        await asyncio.to_thread(_fresh, draft)
        try:
            sealed = await in_thread(
                lambda count: crypt.seal(folder, manifest, draft, key, count),
                lambda size: self.tell(Step(stage="encrypt", done=size, total=total)),
            )
            write_manifest(draft, sealed)
            yield draft, sealed
        except OSError as error:
            raise PlaceFailed(f"{manifest.name} could not be encrypted ({error.strerror or error}).") from error
        finally:
            await asyncio.to_thread(shutil.rmtree, draft, ignore_errors=True)

    # --- pruning -------------------------------------------------------------------------------------------------

    async def _prune(self, place: Place, newest: str, copies: Sequence[Kept] = ()) -> list[str]:
        """Deletes what the rules leave out, and names it.

        ``newest`` stays, whatever its name says: the clock may have been set back. What is proved of the ``copies`` of
        another place is taken for proved here, too.
        """
        rules = self.settings.backup
        kept = await place.list()
        proved = {one.name for one in kept if one.verified_at is not None}
        proved |= {one.name for one in kept for copy in copies if _same(one, copy) and copy.verified_at is not None}
        known = [Known(one.name, one.name in proved) for one in kept]
        doomed = to_delete(
            known, daily=rules.daily, weekly=rules.weekly, monthly=rules.monthly, verified=rules.verified
        )
        doomed = tuple(name for name in doomed if name != newest)
        for name in doomed:
            await place.delete(name)
            self.log.info("backup pruned", action="backup.pruned", backup=name, target=place.title)
            await self._say("pruned", name, target=place.title)
        return list(doomed)

    # --- telling -------------------------------------------------------------------------------------------------

    async def _say_of(
        self,
        manifest: BackupManifest,
        event: str,
        *,
        size: int | None = None,
        seconds: float = 0.0,
        target: str = "",
        error: str = "",
    ) -> None:
        await self._say(
            event,
            manifest.name,
            size=total_bytes(manifest.files) if size is None else size,
            seconds=seconds,
            rpo=rpo(manifest, datetime.now(UTC)),
            target=target,
            error=error,
            details={"left_out": list(manifest.left_out)} if manifest.left_out else {},
        )

    async def _say(
        self,
        event: Any,
        backup: str,
        *,
        size: int = 0,
        seconds: float = 0.0,
        rpo: float | None = None,
        target: str = "",
        error: str = "",
        details: dict[str, Any] | None = None,
    ) -> None:
        await tell_event(
            self.bus,
            BackupEvent(
                event=event,
                backup=backup,
                at=datetime.now(UTC),
                bytes=size,
                seconds=seconds,
                rpo_seconds=rpo,
                target=target,
                error=error,
                details=details or {},
            ),
            self.log,
        )

    def _verdict(
        self,
        manifest: BackupManifest,
        made: bool,
        target: str,
        problem: str,
        shipped: tuple[str, ...],
        pruned: tuple[str, ...],
        seconds: float,
    ) -> BackupVerdict:
        name = manifest.name
        path = folder_of(self.home) / name
        what = f"{name} is made" if made else f"{name} is new enough, none was made"
        if problem:
            message = f"{what}, and not shipped: {problem}"
        elif shipped:
            message = (
                f"{what} and shipped to {target}." if made else f"{what}; {', '.join(shipped)} shipped to {target}."
            )
        else:
            message = f"{what}."
        return BackupVerdict(
            ok=not problem,
            message=message,
            backup=name,
            made=made,
            path=str(path),
            bytes=total_bytes(manifest.files),
            seconds=round(seconds, 3),
            rpo_seconds=rpo(manifest, datetime.now(UTC)),
            target="" if self.request.local else target,
            encrypted=bool(shipped) and self.settings.backup.recipient is not None,
            rows=sum(table.rows for table in manifest.tables),
            messages=sum(stream.messages for stream in manifest.streams),
            shipped=shipped,
            pruned=tuple(dict.fromkeys(pruned)),
            left_out=manifest.left_out,
        )


async def tell_event(bus: Bus, event: BackupEvent, log: Any) -> None:
    """Publishes what became of a backup; where NATS does not take it, the log has it: the backup is none the worse."""
    subject = outgoing(BACKUPS, event, event.event, msg_id=f"{event.event}:{event.backup}:{event.at.isoformat()}")
    try:
        await bus.publish_many([subject], budget=EVENT_SECONDS)
    except BusUnavailable as error:
        log.warning(
            "event not told", action="backup.event", event_kind=event.event, backup=event.backup, error=str(error)
        )


def _same(one: Kept, other: Kept) -> bool:
    """Whether two places hold the same backup under one name; an encrypted one has other hashes."""
    known, there = one.manifest, other.manifest
    return known is not None and there is not None and (known.name, known.created_at) == (there.name, there.created_at)


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)


R = TypeVar("R")


async def _failing(work: Awaitable[R]) -> R:
    """The home's own place failing is the backup failing."""
    try:
        return await work
    except PlaceFailed as error:
        raise BackupFailed(str(error)) from error
