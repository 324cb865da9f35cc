"""How a job's outcome reaches a person: through the monitor's outbox, whoever empties it.

The notice is in health_checks.db before anything else happens, so that it is told also when the mail server, or this process,
is away just then. A monitor that lives sends it within seconds. Where none lives the job sends it itself: that an update
has ended the monitor is just what must not stay unsaid. Should both send it, it is one mail twice, with one Message-ID.
"""

from __future__ import annotations

import asyncio
import math
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from typing import Final

import structlog

from actors.monitor.journal import FILE, Delivery, Journal, JournalBroken
from actors.monitor.outbox import Outbox, Sender
from actors.monitor.senders import senders
from commands.settings import Loaded
from schema.health import Notice

DATABASE: Final = FILE  # under MT5_HOME
LOOK_SECONDS: Final = 0.2
ALIVE_ROUNDS: Final = 3  # rounds of checks without a result after which no monitor lives
SEND_SECONDS: Final = 10.0  # that a living monitor is watched sending it
DELIVER_SECONDS: Final = 120.0  # for the job's own delivery; what is not sent then stays for the monitor


def tell(loaded: Loaded, notice: Notice) -> str:
    """Queues the notice and sees to it that it leaves; returns one sentence about that.

    Raises:
        ConfigurationError: a sender is configured by half.
    """
    return asyncio.run(_tell(loaded, notice))


async def _tell(loaded: Loaded, notice: Notice) -> str:
    log = structlog.get_logger("job")
    ways = senders(loaded.settings.notify, log)
    if not ways:
        return "Nobody is told: [notify] names no mail server, webhook or Telegram chat."
    began = time.time()
    otherwise = "it waits in the outbox for the monitor"
    with ExitStack() as stack:
        try:
            journal = stack.enter_context(closing(Journal.open(loaded.home)))
            outbox = _queue(journal, ways, notice)
        except (JournalBroken, sqlite3.Error) as error:
            # The disk is full, say, which is a reason more to tell. It is sent now, or lost with this process.
            log.warning("the outbox cannot be written", action="job.unqueued", error=str(error))
            otherwise = "the outbox cannot be written either"
            journal = stack.enter_context(closing(Journal.in_memory(loaded.home)))
            outbox = _queue(journal, ways, notice)
        rows = _Rows(journal, notice.id)
        health = loaded.settings.health
        one_round = health.interval_seconds + health.timeout_seconds
        if journal.newest_look() > began - ALIVE_ROUNDS * one_round:  # a monitor was alive lately
            await _until(lambda: rows.sent() or journal.newest_look() > began, one_round)
            if journal.newest_look() > began:  # and still is
                await _until(rows.sent, SEND_SECONDS)
                return rows.words("the monitor sends it as soon as it can")
            if rows.sent():
                return rows.words("")
        await _deliver(outbox, rows)
        return rows.words(otherwise)


async def _deliver(outbox: Outbox, rows: _Rows) -> None:
    delivering = asyncio.create_task(outbox.run(), name="outbox")
    watching = asyncio.create_task(_until(rows.settled, DELIVER_SECONDS), name="outbox-watch")
    try:
        await asyncio.wait({delivering, watching}, return_when=asyncio.FIRST_COMPLETED)
        if delivering.done():
            delivering.result()  # never returns: it raises what broke
    finally:
        for task in (delivering, watching):
            task.cancel()
        await asyncio.gather(delivering, watching, return_exceptions=True)


async def _until(condition: Callable[[], bool], seconds: float) -> None:
    """Returns once it holds, or after so long; what it is about lies in a database that others write."""
    for _ in range(math.ceil(seconds / LOOK_SECONDS)):
        if condition():
            return
        await asyncio.sleep(LOOK_SECONDS)


class _Rows:
    """What became of one notice, by each sender."""

    def __init__(self, journal: Journal, notice: str) -> None:
        self._journal = journal
        self._notice = notice

    def sent(self) -> bool:
        return all(one.sent_at is not None for one in self._deliveries())

    def settled(self) -> bool:
        """Sent by each sender, or refused by it for good."""
        return all(one.sent_at is not None or one.refused for one in self._deliveries())

    def words(self, otherwise: str) -> str:
        found = self._deliveries()
        waiting = [f"{one.sender} ({one.error or 'not tried yet'})" for one in found if one.sent_at is None]
        told = [one.sender for one in found if one.sent_at is not None]
        if not waiting:
            return f"Told by {', '.join(told)}."
        return f"Not told yet by {', '.join(waiting)}: {otherwise}."

    def _deliveries(self) -> list[Delivery]:
        return self._journal.deliveries(self._notice)


def _queue(journal: Journal, ways: Mapping[str, Sender], notice: Notice) -> Outbox:
    outbox = Outbox(journal.connection, ways, structlog.get_logger("job"))
    with journal.transaction():
        outbox.enqueue([notice], datetime.now(UTC))
    return outbox
