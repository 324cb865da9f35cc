"""A monitor without its probes, as processes that a test kills: the rules, the journal and the outbox are the real ones.

Run as a program it forks a worker for each line of its input, ``folder port count crash``, says the worker's pid and, when
that has ended, its status: importing everything anew for hundreds of kills would take most of the test's time.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
import traceback
from collections.abc import Iterable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog

from actors.core.alerts import AlertState, advance
from actors.monitor.desk import Desk
from actors.monitor.journal import Journal
from actors.monitor.outbox import Outbox
from actors.monitor.senders import senders
from bus import logs
from schema.health import CheckResult, Notice
from schema.settings import Alerts, Log, Notify, Smtp

SQL = (Path(__file__).parents[1] / "schema" / "sql" / "health.sql").read_text()
BEGAN = datetime(2026, 11, 27, tzinfo=UTC)
RULES = Alerts(after=1, clear=1, group_seconds=0)


def database(folder: Path) -> sqlite3.Connection:
    """A connection to the journal's file as another process would open it; made where it is missing."""
    connection = sqlite3.connect(folder / "health_checks.db", isolation_level=None, timeout=10)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(SQL)
    return connection


def notice(number: int) -> Notice:
    return Notice(
        id=f"incident-{number}:opened",
        kind="opened",
        severity="critical",
        title=f"Incident {number}: the database does not answer – ä",
        lines=(f"database: no answer ({number}).", "Start it again."),
        at=BEGAN + timedelta(minutes=number),
        incident=f"incident-{number}",
        checks=("database",),
    )


def result(number: int) -> CheckResult:
    """A disk fills, is mended, the next one fills …: each result is news, and so one notice."""
    full = number % 2 == 0
    return CheckResult(
        check=f"disk.d{number // 2}",
        status="critical" if full else "ok",
        at=BEGAN + timedelta(minutes=number),
        message="1 % is free – räumen." if full else "Half is free.",
        value=0.01 if full else 0.5,
    )


def news(count: int) -> list[Notice]:
    """What a monitor that nobody kills tells of the first ``count`` results."""
    state, told = AlertState(), []
    for number in range(count):
        step = advance(state, [result(number)], result(number).at, RULES)
        state = step.state
        told += step.notices
    return told


class Doomed(Outbox):
    """Kills its process within the transaction that queues a notice; ``crash`` says of which result."""

    doomed = False

    def enqueue(self, notices: Iterable[Notice], now: datetime) -> None:
        super().enqueue(notices, now)
        if self.doomed:
            os.kill(os.getpid(), signal.SIGKILL)


async def work(folder: Path, port: int, count: int, crash: str) -> None:
    """Takes in the results that no life before has taken in, tells of them, and ends when all is told."""
    smtp = Smtp(
        host="127.0.0.1", port=port, security="none", sender="MT5 <mt5@example.org>", recipients=("owner@example.org",)
    )
    log = structlog.get_logger(__name__)
    with closing(Journal.open(folder)) as journal:
        outbox = Doomed(journal.connection, senders(Notify(smtp=smtp), log), log)
        desk = Desk(journal, outbox, RULES, log)
        delivering = asyncio.create_task(outbox.run(), name="outbox")
        for number in range(count):
            at = result(number).at
            if desk.state.at is None or desk.state.at < at:
                outbox.doomed = crash == f"queued-{number}"
                desk.take([result(number)])
                desk.step(at)
                assert not desk.troubled
                if crash == f"committed-{number}":
                    os.kill(os.getpid(), signal.SIGKILL)
            await asyncio.sleep(0)
        while outbox.waiting():
            assert not delivering.done(), delivering.exception()
            await asyncio.sleep(0.001)
        delivering.cancel()
        await asyncio.gather(delivering, return_exceptions=True)


def main() -> None:
    logs.configure(Log(level="critical"))
    for line in sys.stdin:
        folder, port, count, crash = line.split()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                asyncio.run(work(Path(folder), int(port), int(count), crash))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
