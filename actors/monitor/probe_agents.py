"""What the other agents leave behind: models that serve, backups, and the monitor's own outbox."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec
from nats.js.errors import NotFoundError

from actors.core.sizes import human
from actors.monitor.journal import Journal
from actors.monitor.watch import Probe, result
from bus.client import NO_MESSAGE, Bus
from bus.store import Row, Store, StoreUnavailable
from bus.subjects import BACKUPS
from schema.health import CheckResult
from schema.health import Status as Verdict
from schema.messages import BackupEvent
from schema.settings import Settings

STUCK_SECONDS: Final = 900.0  # that a notice may wait for its sender
SHRUNK: Final = 0.5  # of the usual size: a backup so small lacks something
USUAL_DAYS: Final = 30
WATCHED_SINCE: Final = "backup.watched_since"


@dataclass(slots=True)
class AgentProbes:
    bus: Bus | None
    store: Store | None
    settings: Settings
    journal: Journal | None

    def probes(self) -> list[Probe]:
        found = [
            Probe("model", self.models, every=10, detail=True, many=True),
            Probe("backup", self.backups, every=2, detail=True, many=True),
        ]
        return found if self.journal is None else [*found, Probe("outbox", self.outbox)]

    async def models(self) -> list[CheckResult]:
        """The age of each model's version that serves: markets change."""
        if self.store is None:
            raise StoreUnavailable("No database is named or runs here")
        rows = await self.store.fetch("health_models", within=self.settings.health.timeout_seconds)
        serving: dict[str, Row] = {}
        for row in rows:
            serving.setdefault(row["model_name"], row)
        if not serving:
            return [result("model", "skipped", "No model serves yet: `mt5 train --timeframe M1` makes one.")]
        return [self._model(name, row["version"], row["state"], row["created_at"]) for name, row in serving.items()]

    def _model(self, name: str, version: str, state: str, made: datetime) -> CheckResult:
        days = (datetime.now(UTC) - made) / timedelta(days=1)
        said = f"{name} {version} serves as {state} and was made {days:,.0f} days ago"
        if days <= self.settings.health.model_days:
            return result(f"model.{name}", "ok", f"{said}.", value=round(days, 2), unit="days")
        way = "train anew with `mt5 train`, or set [trainer] schedule"
        return result(f"model.{name}", "warning", f"{said}: {way}.", value=round(days, 2), unit="days")

    # --- backups -----------------------------------------------------------------------------------------------------

    async def backups(self) -> list[CheckResult]:
        backup = self.settings.backup
        if backup.target is None and backup.schedule is None:
            return [result("backup.age", "skipped", "No backups are set up: [backup] schedule and target.")]
        if self.bus is None or not self.bus.connected:
            raise ConnectionError("NATS is not connected")
        # What only lies on this machine is lost with it: where there is a target, it counts once it is there.
        event = "shipped" if backup.target is not None else "made"
        done, made, failed = [await self._newest(self.bus, name) for name in (event, "made", "failed")]
        return [self._age(done, failed), *self._size(made or done)]

    def _age(self, done: BackupEvent | None, failed: BackupEvent | None) -> CheckResult:
        limit = self.settings.health.backup_hours
        now = datetime.now(UTC)
        trouble = ""
        if failed is not None and (done is None or failed.at > done.at):
            trouble = f"; the last try, at {failed.at:%Y-%m-%d %H:%M} UTC, failed: {failed.error.rstrip('.')}"
        if done is None:
            first = self._watched_since(now)
            if not trouble and (now - first) / timedelta(hours=1) <= limit:
                return result("backup.age", "skipped", "No backup has been made yet.")
            return result("backup.age", "critical", f"There is no backup{trouble}: `mt5 backup run` makes one.")
        hours = (now - done.at) / timedelta(hours=1)
        where = f" at {done.target}" if done.target else ""
        said = f"The newest backup, {done.backup}{where}, is {hours:.1f} hours old{trouble}"
        verdict: Verdict = "critical" if hours > limit else "warning" if trouble else "ok"
        way = "" if verdict == "ok" else ": `mt5 backup run` makes another, and its log says what is wrong"
        return result("backup.age", verdict, f"{said}{way}.", value=round(hours, 2), unit="h")

    def _size(self, made: BackupEvent | None) -> Sequence[CheckResult]:
        if made is None or not made.bytes:
            return ()
        usual = self._usual_size()
        said = f"The backup {made.backup} holds {human(made.bytes)}"
        if usual is None or made.bytes >= SHRUNK * usual:
            return (result("backup.size", "ok", f"{said}.", value=float(made.bytes), unit="bytes"),)
        said = f"{said}, and lately they held {human(usual)}: verify it with `mt5 backup verify {made.backup}`."
        return (result("backup.size", "warning", said, value=float(made.bytes), unit="bytes"),)

    def _usual_size(self) -> float | None:
        """The middle of the sizes of the last weeks, one result each."""
        if self.journal is None:
            return None
        now = datetime.now(UTC)
        found = self.journal.values("backup.size", now - timedelta(days=USUAL_DAYS))
        return sorted(found)[len(found) // 2] if found else None

    def _watched_since(self, now: datetime) -> datetime:
        if self.journal is None:
            return now
        kept = self.journal.place(WATCHED_SINCE)
        if kept is not None:
            return datetime.fromisoformat(kept)
        with self.journal.transaction():
            self.journal.set_place(WATCHED_SINCE, now.isoformat())
        return now

    @staticmethod
    async def _newest(bus: Bus, event: str) -> BackupEvent | None:
        try:
            raw = await bus.js.get_last_msg(str(BACKUPS.stream), BACKUPS.subject(event))
        except NotFoundError as error:
            if error.err_code != NO_MESSAGE:
                raise
            return None
        try:
            return BACKUPS.decode(raw.data or b"")
        except msgspec.DecodeError:  # of a newer version, before this one was rolled back
            return None

    # --- the outbox --------------------------------------------------------------------------------------------------

    async def outbox(self) -> list[CheckResult]:
        """Told on NATS, on the page and by the dead man's switch: where mail does not leave, mail cannot say so."""
        waiting, oldest = self.journal.undelivered() if self.journal is not None else (0, None)
        if not waiting or oldest is None:
            return [result("outbox", "ok", "Every notice has been sent.", value=0.0, unit="notices")]
        age = time.time() - oldest
        said = f"{waiting} notice{'s wait' if waiting != 1 else ' waits'} to be sent, the oldest for {age / 60:.0f} minutes"
        verdict: Verdict = "warning" if age > STUCK_SECONDS else "ok"
        way = "" if verdict == "ok" else "; `mt5 health test-alert` says what is wrong with the sender"
        return [result("outbox", verdict, f"{said}{way}.", value=float(waiting), unit="notices")]
