"""What has still to be told: notices wait in health_checks.db until every sender has taken them.

A notice is queued in the transaction that changes its incident, and marked as sent after the sender has taken it. A crash
between the two sends it again as the same one: a mail's Message-ID is a function of the notice's id. None is lost.

Each sender has a queue of its own, in order: one that is away keeps back nobody else's, and once it is back its notices come
in the order in which things happened. Only a notice that is refused itself (too large, say) lets the others pass.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, Final, NamedTuple, Protocol

import msgspec
import structlog

from bus.telemetry import notices_total, outbox_gauge
from schema.health import Notice
from schema.sql import health_queries

SQL: Final = health_queries()

PAUSE_FIRST: Final = 5.0  # seconds; doubles …
PAUSE_MAX: Final = 15 * 60.0  # … to this, for ever
PAUSE_REFUSED: Final = 6 * 3_600.0  # a server that is asked often for what it refuses soon refuses everything
SEND_SECONDS: Final = 60.0  # of one try
LOOK_SECONDS: Final = 2.0  # how soon a notice is seen that another process has queued
DRAIN_SECONDS: Final = 2.0  # that a send under way at a stop may take: cut off, it would be sent again
ERROR_LENGTH: Final = 500


class SendFailed(Exception):
    """A sender did not take a notice, or nobody knows whether it did. The sentence holds no secret.

    ``permanent``: this very notice is not taken, whenever it is tried, while others would be; else the way is closed.
    ``retry_after``: seconds that the server asked us to wait.
    """

    def __init__(self, sentence: str, *, permanent: bool = False, retry_after: float | None = None) -> None:
        super().__init__(sentence)
        self.permanent = permanent
        self.retry_after = retry_after


class Sender(Protocol):
    """A way to a person."""

    @property
    def name(self) -> str: ...

    async def send(self, notice: Notice) -> str | None:
        """Returns once the notice was taken; with a sentence where something about it needs a person's look.

        Raises:
            SendFailed: it was not taken, or nobody knows: it will be sent again.
        """


class Waiting(NamedTuple):
    """A row that is still to be sent."""

    notice: str
    body: bytes
    attempts: int
    next_at: float


def pause_after(attempts: int) -> float:
    """Seconds from the ``attempts``-th failed try in a row to the next."""
    return min(PAUSE_FIRST * 2.0 ** min(attempts - 1, 16), PAUSE_MAX)


class Outbox:
    """The queues of one process, for one thread.

    ``connection`` is health_checks.db's, with its tables. Who else writes through it does so in transactions within which
    nothing is awaited. Other processes may queue beside it, through connections of their own; only one delivers.
    """

    def __init__(self, connection: sqlite3.Connection, senders: Mapping[str, Sender], log: Any = None) -> None:
        self._connection = connection
        self._senders = dict(senders)
        self._log = log or structlog.get_logger(__name__)
        self._wakes = {name: asyncio.Event() for name in self._senders}
        self._locks = {name: asyncio.Lock() for name in self._senders}
        self._stopping = False

    def enqueue(self, notices: Iterable[Notice], now: datetime) -> None:
        """Queues each notice once for each sender, inside the caller's transaction; what is or was queued stays as it is."""
        at = now.timestamp()
        rows = []
        for notice in notices:
            body = msgspec.json.encode(notice)
            rows += [(notice.id, name, body, at) for name in self._senders]
        self._connection.executemany(SQL["enqueue"], rows)
        if rows:
            for (
                wake
            ) in self._wakes.values():  # its task runs once this turn of the loop, and so the transaction, is over
                wake.set()

    async def run(self) -> None:
        """Delivers for ever. At the start everything that waits is tried at once: settings may have been mended.

        Cancelled, it lets the sends under way end within :data:`DRAIN_SECONDS` and starts no other.
        """
        self._stopping = False
        with self._connection:
            self._connection.execute(SQL["try_all_now"])
        tasks = {asyncio.create_task(self._queue(name), name=f"outbox-{name}") for name in self._senders}
        forever = asyncio.create_task(asyncio.Event().wait(), name="outbox")  # what is left to do without any sender
        try:
            done, _ = await asyncio.wait({*tasks, forever}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # only a defect, or a broken database, ends one
        finally:
            self._stopping = True
            forever.cancel()
            for wake in self._wakes.values():
                wake.set()
            if tasks:
                await asyncio.wait(tasks, timeout=DRAIN_SECONDS)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, forever, return_exceptions=True)

    async def deliver_due(self, now: datetime) -> None:
        """Tries everything that is due at ``now`` once, all senders at the same time.

        Raises:
            sqlite3.OperationalError: what was sent could not be noted.
        """
        self._stopping = False
        ahead = now.timestamp() - time.monotonic()
        await asyncio.gather(*(self._deliver(name, lambda: ahead + time.monotonic()) for name in self._senders))

    def waiting(self) -> int:
        """How many are still to be sent, once for each of the senders that there are."""
        return sum(self._waiting().values())

    def oldest(self) -> float | None:
        """When the oldest that a closed way holds back was queued, in epoch seconds; what was refused itself is no sign of one."""
        (found,) = self._connection.execute(SQL["oldest_waiting"], (self._names(),)).fetchone()
        return None if found is None else float(found)

    def prune(self, now: datetime, keep_days: int) -> int:
        """Forgets what was sent so long ago, and gives up what was refused, or waits for a sender that is gone, as long.

        What waits for a sender that is merely away is never given up. Runs inside the caller's transaction or its own;
        returns how many rows went.
        """
        before = now.timestamp() - keep_days * 86_400.0
        own = not self._connection.in_transaction
        gone = self._connection.execute(SQL["forget_sent"], (before,)).rowcount
        given_up = self._connection.execute(SQL["give_up"], (before, self._names())).fetchall()
        if own:
            self._connection.commit()
        for notice, sender, error in given_up:
            self._log.error("given up", action="notify.given_up", notice=notice, sender=sender, error=error)
        return gone + len(given_up)

    # --- delivery --------------------------------------------------------------------------------------------------

    async def _queue(self, name: str) -> None:
        wake = self._wakes[name]
        while not self._stopping:
            wake.clear()
            await self._deliver(name, time.time, patient=True)
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await wake.wait()
            except TimeoutError:
                pass

    async def _deliver(self, name: str, clock: Callable[[], float], *, patient: bool = False) -> None:
        """Sends what is due in order. One that fails since the way is closed is due later, and stands before the others."""
        async with self._locks[name]:  # a second caller would send the same row again
            while not self._stopping and (row := self._next(name, clock())) is not None:
                await self._note(*await self._try(name, row, clock), patient=patient)
            for sender, count in self._waiting().items():
                outbox_gauge.set(count, sender=sender)

    def _next(self, name: str, now: float) -> Waiting | None:
        """The oldest that was not refused, where it is due; else a refused one that is."""
        head = self._row(SQL["head"], name)
        if head is not None:
            return head if _due(head.next_at, now, PAUSE_MAX) else None
        return self._row(SQL["refused_head"], name, now, now + PAUSE_REFUSED)

    def _row(self, sql: str, *values: str | float) -> Waiting | None:
        found = self._connection.execute(sql, values).fetchone()
        return None if found is None else Waiting(*found)

    async def _try(self, name: str, row: Waiting, clock: Callable[[], float]) -> tuple[str, tuple[Any, ...]]:
        """Sends one; returns the statement, with its values, that notes what came of it."""
        attempts = row.attempts + 1
        try:
            notice = msgspec.json.decode(row.body, type=Notice)
            async with asyncio.timeout(SEND_SECONDS):
                remark = await self._senders[name].send(notice)
        except SendFailed as error:
            failure = error
        except TimeoutError:
            failure = SendFailed(f"There was no answer within {SEND_SECONDS:g} seconds.")
        except Exception as error:
            # A defect of ours, which one notice has shown, must not keep the others from a person who sleeps.
            self._log.exception("a notice cannot be sent", action="notify.defect", notice=row.notice, sender=name)
            failure = SendFailed(f"It cannot be sent: {type(error).__name__}; the log has more.", permanent=True)
        else:
            if remark:
                self._log.error("sent, but", action="notify.remark", notice=row.notice, sender=name, remark=remark)
            self._log.info("told", action="notify.sent", notice=row.notice, sender=name, attempts=attempts)
            notices_total.inc(sender=name, result="sent")
            # What a report showed is in the mailbox; here only what it was is kept.
            kept = msgspec.json.encode(msgspec.structs.replace(notice, html="", pictures={}))
            return (
                SQL["mark_sent"],
                (clock(), attempts, (remark or "")[:ERROR_LENGTH], kept, row.notice, name),
            )
        pause = pause_after(attempts)
        if failure.permanent:
            pause = PAUSE_REFUSED
        elif failure.retry_after is not None:
            pause = min(max(failure.retry_after, 1.0), PAUSE_MAX)
        result = "refused" if failure.permanent else "failed"
        notices_total.inc(sender=name, result=result)
        self._log.warning(
            "not told yet",
            action=f"notify.{result}",
            notice=row.notice,
            sender=name,
            attempts=attempts,
            again_in=round(pause),
            error=str(failure),
        )
        return (
            SQL["mark_failed"],
            (attempts, clock() + pause, failure.permanent, str(failure)[:ERROR_LENGTH], row.notice, name),
        )

    async def _note(self, sql: str, values: tuple[Any, ...], *, patient: bool) -> None:
        """Writes down what came of a try; ``patient``: until it is written, or a full disk would send the same for ever."""
        told = False
        while True:
            try:
                with self._connection:
                    self._connection.execute(sql, values)
                return
            except sqlite3.OperationalError as error:
                if not patient:
                    raise
                if not told:
                    self._log.error("what was sent cannot be noted", action="notify.unnoted", error=str(error))
                    told = True
            await asyncio.sleep(LOOK_SECONDS)

    def _names(self) -> str:
        """The senders, as the queries take them."""
        return msgspec.json.encode(list(self._senders)).decode()

    def _waiting(self) -> dict[str, int]:
        found = dict(self._connection.execute(SQL["waiting"]).fetchall())
        return {name: int(found.get(name, 0)) for name in self._senders}


def _due(next_at: float, now: float, longest: float) -> bool:
    """A time further away than any pause was written by a clock that has been set back since."""
    return next_at <= now or next_at > now + longest
