"""The health monitor: looks at everything on a beat, tells a person once of what is wrong, and says when it is over.

::

    probes (each on its beat) ─┐                        ┌─ results, incidents, state ─▶ health_checks.db
    other actors' alerts.> ────┴─▶ desk: alert rules ───┴─ notices ─▶ outbox ─▶ mail, webhook, Telegram, alerts.>

It only reads, but for its own probe message and the nightly VACUUM, and needs neither the database nor the hot path to work.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import secrets
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar, Final

import msgspec
from msgspec import Struct
from nats.errors import Error as NatsError
from nats.js.errors import APIError

from actors.core.alerts import EVENT, EVENT_QUIET, Incident, standing, tell
from actors.core.daily import report_id
from actors.core.schedule import parse_schedule
from actors.monitor import maintenance
from actors.monitor.desk import HEARD, Desk, Heard
from actors.monitor.journal import Delivery, Journal, JournalBroken, matches
from actors.monitor.outbox import Outbox
from actors.monitor.ping import ping
from actors.monitor.probe_endpoints import gateway_of
from actors.monitor.probes import all_probes
from actors.monitor.sender_nats import NatsSender
from actors.monitor.senders import senders
from actors.monitor.watch import Watch
from bus.client import BusUnavailable
from bus.consume import Reader, StreamReplaced
from bus.store import Store
from bus.subjects import ALERTS, HEALTH_CHECK, SEND_REPORT, TEST_ALERT
from bus.supervise import ConfigurationError, Context, run_tasks, serve, withdraw
from schema.health import CheckResult, Notice

POOL: Final = 4  # connections to PostgreSQL: the checks of it run side by side
TEST_WAIT: Final = 15.0  # seconds that a test may take through every sender; then it is said to be under way
STUCK_SECONDS: Final = 900.0  # that a notice may wait before the dead man's switch is let go
AGAIN: Final = 2.0  # seconds until EVENTS is read again after its reader broke
HOUR: Final = timedelta(hours=1)
LOOK_SECONDS: Final = 30.0  # how soon a clock that was set is noticed by what waits for a time of day
MOST_RESULTS: Final = 2_000  # in an answer: a message holds 1 MB


class CheckRequest(Struct, frozen=True):
    """``names``: these checks only, whole names or their beginnings."""

    names: tuple[str, ...] = ()


class CheckAnswer(Struct, frozen=True):
    results: tuple[CheckResult, ...]
    incidents: tuple[Incident, ...] = ()  # that last


class TrialAnswer(Struct, frozen=True):
    """What each sender made of a test, nobody's where none is set up."""

    notice: str
    deliveries: tuple[Delivery, ...]


class ReportRequest(Struct, frozen=True):
    """The report of the newest 24 hours, or of a UTC day."""

    day: date | None = None


class ReportAnswer(Struct, frozen=True):
    """``notice`` was queued now (``new``), or had been, for these ``senders``; ``error`` says why there is none."""

    notice: str = ""
    error: str = ""
    new: bool = False
    senders: tuple[str, ...] = ()


class Health:
    name: ClassVar[str] = "health"
    owned: ClassVar[bool] = True
    own_service: ClassVar[bool] = True
    description: ClassVar[str] = "Watches everything, and tells a person once of what is wrong."

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self._settings = ctx.settings
        self._bus = ctx.bus
        self._log = ctx.log
        self._home = Path(ctx.settings.home).expanduser().absolute()
        self._reporting = asyncio.Lock()  # one after the other: the second finds the first one queued

    async def run(self) -> None:
        ways = senders(self._settings.notify, self._log)
        try:
            self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._journal = Journal.open(self._home)
        except (JournalBroken, OSError) as error:
            raise ConfigurationError(f"The health monitor has no place for its journal. {error}") from error
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._journal.close)
            self._store, pooled = await self._stores(stack)
            self._outbox = Outbox(self._journal.connection, {**ways, NatsSender.name: NatsSender(self._bus)}, self._log)
            self._desk = Desk(self._journal, self._outbox, self._settings.alerts, self._log)
            health = self._settings.health
            probes = all_probes(
                self._settings,
                self._home,
                bus=self._bus,
                store=self._store,
                pooled=pooled,
                gateway=gateway_of(self._settings),
                journal=self._journal,
                own=self.ctx.process,
            )
            rules = self._settings.alerts
            self._watch = Watch(
                probes,
                health.interval_seconds,
                health.timeout_seconds,
                self._desk.take,
                self._failing(),
                clear=max([rules.clear, *(rule.clear or 1 for rule in rules.rules.values())]),
            )
            endpoints = {HEALTH_CHECK: self._on_check, TEST_ALERT: self._on_test, SEND_REPORT: self._on_report}
            service = await serve(self._bus, self.name, self.description, endpoints)
            self.ctx.ready()
            try:
                await run_tasks(
                    {
                        "health-watch": self._watch.run(),
                        "health-desk": self._desk.run(),
                        "health-heard": self._hear(),
                        "health-outbox": self._outbox.run(),
                        "health-ping": ping(self._settings.notify, self.healthy, self._log),
                        "health-maintenance": _daily(health.maintenance, self._maintain),
                        "health-report": _daily(health.report, self._report),
                        "health-chores": self._chores(),
                    }
                )
            finally:
                if self._bus.connected:
                    await withdraw(service)

    async def _stores(self, stack: contextlib.AsyncExitStack) -> tuple[Store | None, Store | None]:
        """The direct connection, and PgBouncer's where that is another."""
        url, direct = self.ctx.database_url, self._settings.database.direct_url
        stores: list[Store | None] = []
        for one, size in ((direct or url, POOL), (url if direct and direct != url else None, 1)):
            store = None if one is None else await Store.connect(one, size=size, name=f"mt5-{self.name}")
            if store is not None:
                stack.push_async_callback(store.close)
            stores.append(store)
        return stores[0], stores[1]

    def _failing(self) -> set[str]:
        """Checks that incidents are open for: they may have gone while the monitor was away."""
        found = {check for one in standing(self._desk.state) for check in one.checks}
        return {check for check in found if not matches(check, (EVENT,))}

    def healthy(self) -> bool:
        """Whether the monitor works and is heard: what the dead man's switch is told."""
        oldest = self._outbox.oldest()
        stuck = oldest is not None and time.time() - oldest > STUCK_SECONDS
        return not stuck and not self._desk.troubled and not self._watch.late()

    # --- what others say -----------------------------------------------------------------------------------------------

    async def _hear(self) -> None:
        """Takes in the other actors' alerts, from where it stopped; EVENTS keeps them while we are away."""
        while True:
            try:
                await self._read_alerts()
            except (BusUnavailable, StreamReplaced, NatsError, APIError, TimeoutError) as error:
                self._log.warning(
                    "alerts are not heard", action="health.deaf", error=f"{type(error).__name__}: {error}"
                )
            await asyncio.sleep(AGAIN)

    async def _read_alerts(self) -> None:
        info = await self._bus.js.stream_info(str(ALERTS.stream))
        created = str(info.created)
        kept = self._journal.place(HEARD)
        place: dict[str, Any] = json.loads(kept) if kept else {}
        known = place.get("created") == created and place.get("seq", 0) <= info.state.last_seq
        start = int(place["seq"]) + 1 if known else 1
        since = datetime.now(UTC) - timedelta(seconds=EVENT_QUIET)  # what was over before us is no news
        async with Reader(self._bus, ALERTS, name=self.name, start=start, subject=ALERTS.wildcard) as reader:
            async for delivery in reader:
                now = datetime.now(UTC)
                alert = delivery.message
                result = tell(alert, now) if known or alert.at >= since else None
                self._desk.hear(Heard(result, json.dumps({"created": created, "seq": delivery.stream_seq})))

    # --- what is asked -------------------------------------------------------------------------------------------------

    async def _on_check(self, data: bytes) -> bytes:
        try:
            request = msgspec.json.decode(data or b"{}", type=CheckRequest)
        except msgspec.DecodeError:
            request = CheckRequest()
        results = await self._watch.once(request.names)
        worst = sorted(results, key=lambda one: one.status in ("ok", "skipped"))[:MOST_RESULTS]
        return msgspec.json.encode(CheckAnswer(tuple(worst), standing(self._desk.state)))

    async def _on_test(self, _: bytes) -> bytes:
        now = datetime.now(UTC)
        notice = test_notice(now)
        self._desk.queue(notice)
        deadline = time.monotonic() + TEST_WAIT
        while True:
            found = self._journal.deliveries(notice.id)
            if all(one.sent_at is not None or one.error for one in found) or time.monotonic() > deadline:
                return msgspec.json.encode(TrialAnswer(notice.id, tuple(found)))
            await asyncio.sleep(0.1)

    async def _on_report(self, data: bytes) -> bytes:
        try:
            request = msgspec.json.decode(data or b"{}", type=ReportRequest)
        except msgspec.DecodeError as error:
            return msgspec.json.encode(ReportAnswer(error=f"This asks for no report: {error}."))
        return msgspec.json.encode(await self._send_report(request.day))

    # --- what falls due --------------------------------------------------------------------------------------------------

    async def _maintain(self) -> None:
        if self._store is None:
            return
        done = await maintenance.maintain(self._store, self._log)
        maintenance.keep(self._journal, done)
        say = self._log.warning if done.error else self._log.info
        say("database maintained", action="health.maintained", **msgspec.to_builtins(done))

    async def _report(self) -> None:
        answer = await self._send_report()
        if answer.error:
            self._log.error("no daily report", action="health.report", error=answer.error)

    async def _send_report(self, day: date | None = None) -> ReportAnswer:
        """Queues the daily report; its id is the day's, so that it is sent once however often it is asked for."""
        async with self._reporting:
            now = datetime.now(UTC)
            notice_id = report_id(now, day)
            queued = self._journal.deliveries(notice_id)
            if new := not queued:
                try:
                    # Late, and beside the loop: it brings numpy along.
                    report = await asyncio.to_thread(importlib.import_module, "actors.monitor.report")
                    self._desk.queue(await report.build_notice(self.ctx, self._journal, now, day))
                except Exception as error:
                    # A report that cannot be made must not keep the monitor from its work.
                    self._log.exception("the daily report failed", action="health.report")
                    return ReportAnswer(
                        error=f"The daily report cannot be made ({type(error).__name__}): the log has more."
                    )
                queued = self._journal.deliveries(notice_id)
            told = tuple(one.sender for one in queued if one.sender != NatsSender.name)
            return ReportAnswer(notice=notice_id, new=new, senders=told)

    async def _chores(self) -> None:
        """Every hour: what is old is forgotten, and the figures of the hour (of the day, at midnight) go into the log."""
        while True:
            now = datetime.now(UTC)
            with self._journal.transaction():
                gone = self._journal.prune(now, self._settings.health.keep_days)
                gone += self._outbox.prune(now, self._settings.notify.keep_days)
            self._journal.refill()
            self._log.info("journal pruned", action="health.pruned", rows=gone)
            due = now.replace(minute=0, second=0, microsecond=0) + HOUR
            while (left := (due - datetime.now(UTC)).total_seconds()) > 0:
                await asyncio.sleep(min(left, LOOK_SECONDS))
                if self._journal.squeezed:
                    self._journal.refill()
            self._log_stats("hour", due - HOUR, due)
            if due.hour == 0:
                self._log_stats("day", due - timedelta(days=1), due)

    def _log_stats(self, period: str, since: datetime, until: datetime) -> None:
        for one in self._journal.stats(since, until):
            if matches(one.check, ("feed",)) and one.check != "feed" and not one.critical:
                continue  # a line for each of a thousand series that were well says nothing
            figures: dict[str, Any] = {}
            for name, of in (("latency", one.latency), ("value", one.value)):
                if of is not None:
                    figures |= {f"{name}_{key}": round(figure, 6) for key, figure in msgspec.to_builtins(of).items()}
            self._log.info(
                "check statistics",
                action="health.stats",
                period=period,
                check=one.check,
                count=one.count,
                critical=one.critical,
                warning=one.warning,
                uptime=None if one.uptime is None else round(one.uptime, 5),
                unit=one.unit,
                **figures,
            )


def test_notice(now: datetime) -> Notice:
    """A notice that says nothing but that it came."""
    return Notice(
        id=f"test:{now:%Y%m%dT%H%M%S}:{secrets.token_hex(4)}",
        kind="test",
        severity="info",
        title="A test of the alerts",
        lines=("This is a test, asked for with `mt5 health test-alert`.", "If you read it, alerts reach you this way."),
        at=now,
    )


async def _daily(schedule: str | None, work: Callable[[], Awaitable[None]]) -> None:
    """Does the work at its times, for ever; what was missed while nobody ran waits for the next time."""
    if schedule is None:
        await asyncio.Event().wait()
        return
    plan = parse_schedule(schedule)
    due = plan.next_run(datetime.now(UTC))
    while True:
        left = (due - datetime.now(UTC)).total_seconds()
        if left > 0:
            await asyncio.sleep(min(left, LOOK_SECONDS))
            continue
        await work()
        due = plan.next_run(datetime.now(UTC))
