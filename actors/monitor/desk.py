"""Where results become incidents and notices: one loop, and one transaction for all that a step changes."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import msgspec
from msgspec.structs import replace

from actors.core.alerts import AlertState, Step, advance, standing
from actors.monitor.journal import Journal, matches
from actors.monitor.outbox import Outbox
from bus.telemetry import check_gauge, check_results_total, check_value_gauge, incidents_gauge
from schema.health import CheckResult, Notice, Severity
from schema.settings import Alerts

TICK: Final = 1.0  # seconds between two steps at least: waits end and reminders fall due without any result
LINGER: Final = 0.1  # what comes so soon after a result is taken with it: one write to the disk
MOST_WAITING: Final = 20_000  # results that wait for a disk with room; the oldest go first
STATE_SECONDS: Final = 30.0  # a state that only the time has changed is saved so often
FEEDS_KEPT: Final = 600.0  # seconds between two results of a feed that are kept while it stays as it is
MOST_LABELS: Final = 300  # checks that have metrics of their own
LEVELS: Final = {"ok": 0.0, "warning": 1.0, "critical": 2.0, "skipped": -1.0}
HEARD: Final = "alerts"
"""Where the journal keeps how far other actors' alerts have been taken in."""


class Heard(NamedTuple):
    """Another actor's alert as a result (None: nothing to take in), and its place in EVENTS."""

    result: CheckResult | None
    place: str


class Desk:
    """Holds the state of the alert rules. ``take`` and ``hear`` may be called at any time of the loop's thread."""

    def __init__(self, journal: Journal, outbox: Outbox, rules: Alerts, log: Any) -> None:
        self._journal = journal
        self._outbox = outbox
        self._rules = rules
        self._log = log
        self._results: deque[CheckResult] = deque(maxlen=MOST_WAITING)
        self._heard: deque[Heard] = deque(maxlen=MOST_WAITING)
        self._come = asyncio.Event()
        self._kept: dict[str, tuple[str, float]] = {}  # of feeds: status and time of the last result that was kept
        self._labels: set[str] = set()
        self.troubled = False  # the last step could not be written
        self.state = self._load()
        self._saved = self.state
        incidents_gauge.set(len(standing(self.state)))

    def _load(self) -> AlertState:
        kept = self._journal.state()
        if kept is None:
            return AlertState()
        try:
            return msgspec.json.decode(kept, type=AlertState)
        except msgspec.DecodeError as error:
            # Of another version. What still fails is told again; incidents that it had open are not closed by anybody else.
            self._log.error("the state of the alerts is begun anew", action="health.state", error=str(error))
            now = datetime.now(UTC)
            with self._journal.transaction():
                left = [one for one in self._journal.incidents(now) if one.closed_at is None]
                self._journal.save_incidents(replace(one, closed_at=now) for one in left)
            return AlertState()

    def take(self, results: Sequence[CheckResult]) -> None:
        self._results.extend(results)
        self._come.set()
        for one in results:
            check_results_total.inc(status=one.status)
            if one.check in self._labels or len(self._labels) < MOST_LABELS:
                self._labels.add(one.check)
                check_gauge.set(LEVELS[one.status], check=one.check)
                if one.value is not None:
                    check_value_gauge.set(one.value, check=one.check)

    def hear(self, heard: Heard) -> None:
        self._heard.append(heard)
        self._come.set()

    def queue(self, notice: Notice) -> None:
        """A notice that is about no incident: a test, a report."""
        with self._journal.transaction():
            self._outbox.enqueue((notice,), datetime.now(UTC))

    async def run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(TICK):
                    await self._come.wait()
                await asyncio.sleep(LINGER)
            except TimeoutError:
                pass
            self._come.clear()
            self.step(datetime.now(UTC))

    def step(self, now: datetime) -> None:
        """Takes in what has come. Nothing of it is gone where it cannot be written: the next step has it again."""
        results, heard = list(self._results), list(self._heard)
        told = [one.result for one in heard if one.result is not None]
        step = advance(self.state, [*told, *results], now, self._rules)
        try:
            self._write(step, [*told, *results], heard, now)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR) and self._journal.make_room():
                self._come.set()
                return
            if not self.troubled:
                self._log.error("results and alerts cannot be written", action="health.unwritten", error=str(error))
            self.troubled = True
            return
        if self.troubled:
            self._log.info("results and alerts are written again", action="health.written")
        self.troubled = False
        for _ in results:
            self._results.popleft()
        for _ in heard:
            self._heard.popleft()
        self.state = step.state
        incidents_gauge.set(len(standing(step.state)))
        for notice in step.notices:
            self._tell_log(notice)

    def _write(self, step: Step, results: Sequence[CheckResult], heard: Sequence[Heard], now: datetime) -> None:
        changed = replace(step.state, at=self._saved.at) != self._saved
        aged = self._saved.at is None or (now - self._saved.at).total_seconds() >= STATE_SECONDS
        if not (changed or aged or results or heard or step.notices or step.incidents):
            return
        kept = [one for one in results if self._is_kept(one)]
        with self._journal.transaction():
            self._journal.record(kept)
            if changed or aged:
                self._journal.save_state(msgspec.json.encode(step.state))
            self._journal.save_incidents(step.incidents)
            if heard:
                self._journal.set_place(HEARD, heard[-1].place)
            self._outbox.enqueue(step.notices, now)
        if changed or aged:
            self._saved = step.state
        self._kept |= {one.check: (one.status, one.at.timestamp()) for one in kept if matches(one.check, ("feed",))}

    def _is_kept(self, one: CheckResult) -> bool:
        """Of a feed that stays as it is one result in ten minutes is enough: there may be a thousand of them."""
        if not matches(one.check, ("feed",)):
            return True
        status, at = self._kept.get(one.check, ("", 0.0))
        return one.status != status or one.at.timestamp() - at >= FEEDS_KEPT

    def _tell_log(self, notice: Notice) -> None:
        levels: dict[Severity, Any] = {
            "info": self._log.info,
            "warning": self._log.warning,
            "critical": self._log.error,
        }
        tell = self._log.info if notice.kind == "closed" else levels[notice.severity]
        tell(
            notice.title,
            action=f"health.{notice.kind}",
            incident=notice.incident,
            severity=notice.severity,
            checks=", ".join(notice.checks[:10]),
        )
