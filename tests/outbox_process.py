"""A monitor reduced to its outbox, as processes that a test kills: each has an incident of every notice, or neither.

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
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

from actors.monitor.outbox import Outbox
from actors.monitor.senders import senders
from bus import logs
from schema.health import Notice
from schema.settings import Log, Notify, Smtp

SQL = (Path(__file__).parents[1] / "schema" / "sql" / "health.sql").read_text()
BEGAN = datetime(2026, 11, 27, tzinfo=UTC)


def database(folder: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(folder / "health_checks.db", isolation_level=None, timeout=10)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
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


def settings(port: int) -> Notify:
    smtp = Smtp(
        host="127.0.0.1", port=port, security="none", sender="MT5 <mt5@example.org>", recipients=("owner@example.org",)
    )
    return Notify(smtp=smtp)


async def work(folder: Path, port: int, count: int, crash: str) -> None:
    """Opens incidents until there are ``count``, tells of each, and ends when all is told; ``crash``: when to die by itself."""
    with closing(database(folder)) as connection:
        outbox = Outbox(connection, senders(settings(port), None))
        delivering = asyncio.create_task(outbox.run(), name="outbox")
        for number in range(count):
            connection.execute("BEGIN IMMEDIATE")
            new = connection.execute(
                "INSERT OR IGNORE INTO incidents VALUES (?, ?, NULL, 'critical', 'title', '[]')",
                (f"incident-{number}", BEGAN.timestamp()),
            ).rowcount
            if new:
                outbox.enqueue([notice(number)], BEGAN)
            if new and crash == f"queued-{number}":
                os.kill(os.getpid(), signal.SIGKILL)
            connection.execute("COMMIT")
            if new and crash == f"committed-{number}":
                os.kill(os.getpid(), signal.SIGKILL)
            await asyncio.sleep(0)
        while outbox.waiting():
            assert not delivering.done(), delivering.exception()
            await asyncio.sleep(0.001)
        delivering.cancel()
        await asyncio.gather(delivering, return_exceptions=True)


def main() -> None:
    logs.configure(Log(level="error"))
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
