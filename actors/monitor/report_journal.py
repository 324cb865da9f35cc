"""What the journal of checks says of a period, summed up by SQLite itself: a day is some hundred thousand rows.

A connection of its own, which reads only, so that a report neither waits for the monitor nor holds it up; it belongs to one
thread.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple, cast

from actors.core.daily import SLOTS, worst
from actors.core.daily_facts import Line, Look, Service, Watch
from actors.core.health_stats import HOLD, CheckStats
from actors.monitor.journal import Journal
from schema.health import Status
from schema.sql import health_queries

SQL: Final = health_queries()

BUSY_SECONDS: Final = 5.0
MOST_INCIDENTS: Final = 50  # of a period, the newest
LATE: Final = 600.0  # seconds after which a notice that nobody has taken is late
MONTH: Final = 30 * 86_400
BIN: Final = 3 * 3_600  # seconds of a line's point
MOST_FAILING: Final = 20  # checks of a service that are named

# Kinds of checks as people call them, in the order in which they are told. Actors are told one by one, before these.
KINDS: Final = {
    "endpoint": "Web and API",
    "nats": "NATS",
    "database": "PostgreSQL",
    "pgbouncer": "PgBouncer",
    "feed": "Feeds",
    "model": "Models",
    "disk": "Disks",
    "backup": "Backups",
    "certificate": "Certificates",
    "container": "Containers",
    "runner": "CI runner",
    "outbox": "Notifications",
    "event": "Told by actors",
}
ACTORS: Final = ("collector", "features", "emitter", "recorder", "scorer", "trainer", "health", "backup")


class JournalMissing(Exception):
    """There is no journal, or it cannot be read; the message is a sentence."""


class _Check(NamedTuple):
    name: str
    status: Status
    message: str
    fine: float | None
    slow: float | None
    strip: tuple[Look, ...]


def watched(file: Path, since: datetime, until: datetime, interval: float) -> Watch:
    """The period as the monitor saw it; ``interval`` is the seconds from one round of checks to the next.

    Raises:
        JournalMissing: see there.
    """
    with _reading(file) as connection:
        journal = Journal(connection, file.parent)
        start, end = since.timestamp(), until.timestamp()
        stats = {one.check: one for one in journal.stats(since, until)}
        checks = list(_checks(connection, stats, start, end))
        looked = [check for check in checks if check.status != "skipped"]
        return Watch(
            services=tuple(_services(looked)),
            absent=tuple(sorted({_label(check.name) for check in checks} - {_label(check.name) for check in looked})),
            covered=_covered(connection, start, end, interval),
            incidents=tuple(journal.incidents(since, until)[:MOST_INCIDENTS]),
            waiting=connection.execute(SQL["late"], (end - LATE,)).fetchone()[0],
        )


def history(file: Path, until: datetime) -> tuple[list[Line], list[Line]]:
    """The month's lines of the disks' free shares and of the database's size, in points of three hours.

    Raises:
        JournalMissing: see there.
    """
    end = until.timestamp()
    with _reading(file) as connection:
        rows = connection.execute(
            SQL["room"],
            (BIN, end - MONTH, end),
        ).fetchall()
    lines: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for check, unit, at, value in rows:
        ts, values = lines.setdefault((check, unit), ([], []))
        ts.append(float(at))
        values.append(float(value))
    disks = [
        Line(name=check.partition(".")[2], ts=tuple(ts), values=tuple(value / 100 for value in values))
        for (check, unit), (ts, values) in lines.items()
        if check.startswith("disk.") and unit.startswith("%")
    ]
    sizes = [
        Line(name="database", ts=tuple(ts), values=tuple(values))
        for (check, _), (ts, values) in lines.items()
        if check == "database.size"
    ]
    return disks, sizes


def queued(file: Path, notice: str) -> list[str]:
    """The senders that a notice has been queued for, whatever became of it since.

    Raises:
        JournalMissing: it cannot be read; a journal that is not there has queued nothing.
    """
    if not file.is_file():
        return []
    with _reading(file) as connection:
        return [one.sender for one in Journal(connection, file.parent).deliveries(notice)]


@contextmanager
def _reading(file: Path) -> Iterator[sqlite3.Connection]:
    if not file.is_file():
        raise JournalMissing("The health monitor has written nothing here: start it with `mt5 up health`.")
    try:
        with closing(
            sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS)
        ) as connection:
            yield connection
    except sqlite3.Error as error:
        raise JournalMissing(f"{file} cannot be read ({error}): `mt5 health check` says more.") from error


def _checks(
    connection: sqlite3.Connection, stats: Mapping[str, CheckStats], start: float, end: float
) -> Iterator[_Check]:
    """Every check of the period, by name."""
    width = (end - start) / SLOTS
    strips: dict[str, list[Look]] = {}
    for name, slot, look in connection.execute(
        SQL["strips"],
        (start, end, width, SLOTS - 1),
    ):
        strips.setdefault(name, [-1] * SLOTS)[slot] = look
    for name, status, message, _ in connection.execute(
        SQL["last_of_each"],
        (start, end),
    ):
        one = stats[name]
        yield _Check(
            name=name,
            status=cast(Status, status),
            message=message,
            fine=one.uptime,
            slow=one.latency.p95 if one.latency is not None else None,
            strip=_held(strips[name], width),
        )


def _held(strip: Sequence[Look], width: float) -> tuple[Look, ...]:
    """A look stands for a while: what is looked at rarely has slots of ``width`` seconds without a look in between."""
    out = list(strip)
    reach = max(1, int(HOLD / width))
    last = -reach - 1
    for slot, look in enumerate(strip):
        if look >= 0:
            last = slot
        elif slot - last <= reach:
            out[slot] = strip[last]
    return tuple(out)


def _services(checks: Sequence[_Check]) -> Iterator[Service]:
    """Actors one by one, then the other kinds, each as one."""
    groups: dict[str, list[_Check]] = {}
    for check in checks:
        groups.setdefault(_group(check.name), []).append(check)
    known = [*(f"actor.{name}" for name in ACTORS), *KINDS]
    for group in sorted(groups, key=lambda group: (known.index(group) if group in known else len(known), group)):
        yield _service(_label(group), groups[group])


def _service(name: str, checks: Sequence[_Check]) -> Service:
    status = worst(check.status for check in checks)
    failing = tuple(check.name for check in checks if check.status in ("warning", "critical"))
    message = next(check.message for check in checks if check.status == status)
    fine = [check.fine for check in checks if check.fine is not None]
    slow = [check.slow for check in checks if check.slow is not None]
    return Service(
        name=name,
        status=status,
        message=message,
        checks=len(checks),
        failing=failing[:MOST_FAILING],
        fine=min(fine, default=None),
        slow=max(slow, default=None),
        strip=tuple(max(looks) for looks in zip(*(check.strip for check in checks), strict=True)),
    )


def _group(check: str) -> str:
    kind = check.partition(".")[0]
    return check if kind == "actor" else kind


def _label(group: str) -> str:
    kind, _, rest = group.partition(".")
    return rest if kind == "actor" else KINDS.get(kind, kind)


def _covered(connection: sqlite3.Connection, start: float, end: float, interval: float) -> float:
    """The share of the period in which looks followed each other as they should, from the first look ever on."""
    (first,) = connection.execute(SQL["first_look"]).fetchone()
    if first is None or first >= end:
        return 0.0
    start = max(start, first)
    most = max(3 * interval, HOLD)
    (silent,) = connection.execute(
        SQL["silence"],
        (start, end, most),
    ).fetchone()
    return float(1 - min(silent, end - start) / (end - start))
