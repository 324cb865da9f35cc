"""health_checks.db: what the monitor saw and decided, and (in one transaction with it) what has still to be told.

A reader beside the running monitor opens it read-only: SQLite's write-ahead log lets both go on. A disk that is full takes
no result and no alert, so a reserve lies beside the database, which is given up for exactly that.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import structlog

from actors.core.alerts import Incident
from actors.core.health_stats import HOLD, CheckStats, Look, summarise
from schema.health import CheckResult
from schema.sql import health, health_queries

log = structlog.get_logger(__name__)

SQL: Final = health_queries()

FILE: Final = "health_checks.db"
RESERVE: Final = "health_checks.reserve"
RESERVE_BYTES: Final = 4 * 1024**2
BUSY_SECONDS: Final = 5.0  # that a command's write may keep the monitor waiting, and the other way round
DAY: Final = 86_400.0
WHOLE_DAYS: Final = 2  # every result is kept for so long; of older ones that were ok …
THIN_SECONDS: Final = 300  # … the first of each five minutes, which is below what a result stands for (HOLD)
MOST_ROWS: Final = 3_000_000  # whatever the settings: some 500 MB
THINNED: Final = "thinned"


class JournalBroken(Exception):
    """The file is there and cannot be used; the sentence says what to do."""


class Delivery(NamedTuple):
    """What became of a notice with one sender; ``sent_at`` in epoch seconds, None while it waits."""

    sender: str
    sent_at: float | None
    attempts: int
    error: str
    refused: int = 0  # 1: it will not take this one


class Journal:
    """One connection. Everything here is short and blocks; nothing is awaited within a transaction."""

    def __init__(self, connection: sqlite3.Connection, folder: Path) -> None:
        self.connection = connection
        self.folder = folder
        self.squeezed = False  # the reserve was given up: the disk is full, or was a moment ago

    @classmethod
    def open(cls, home: Path) -> Journal:
        """For the monitor: makes the file, private, where it is missing. A damaged one is put aside and begun anew.

        Raises:
            JournalBroken: the folder cannot be written to.
        """
        path = home / FILE
        try:
            return cls._open(path, home)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise JournalBroken(
                    f"{path} cannot be opened ({error}): mend its folder's permissions, or free its disk."
                ) from error
            aside = path.with_name(f"{FILE}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S}")
            log.error(
                "the journal is damaged and begun anew", action="journal.damaged", kept=str(aside), why=str(error)
            )
            path.rename(aside)
            for rest in ("-wal", "-shm"):
                path.with_name(FILE + rest).unlink(missing_ok=True)
            return cls._open(path, home)

    @classmethod
    def _open(cls, path: Path, home: Path) -> Journal:
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # SQLite's side files take its mode
        except OSError as error:
            raise JournalBroken(f"{path} cannot be written to ({error.strerror}): mend it, or set MT5_HOME.") from error
        path.chmod(0o600)
        connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = wal")
            connection.execute("PRAGMA synchronous = full")  # a notice that was promised outlives a power cut
            connection.executescript(health())
            made = cls(connection, home)
            made._reserve()
        except BaseException:
            connection.close()
            raise
        return made

    @classmethod
    def reading(cls, home: Path) -> Journal | None:
        """For commands, read-only; None where no monitor has ever run here.

        Raises:
            JournalBroken: it cannot be read.
        """
        path = home / FILE
        if not path.exists():
            return None
        try:
            connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS, isolation_level=None
            )
            connection.execute('SELECT 1 FROM checks, "outbox" LIMIT 1')
        except sqlite3.Error as error:
            raise JournalBroken(
                f"{path} cannot be read ({error}): run this as the user who runs `mt5 up`, or see that user's log."
            ) from error
        return cls(connection, home)

    @classmethod
    def in_memory(cls, home: Path) -> Journal:
        """One that nobody finds again, for who cannot write the file."""
        connection = sqlite3.connect(":memory:", isolation_level=None)
        connection.executescript(health())
        return cls(connection, home)

    def close(self) -> None:
        self.connection.close()

    # --- writing -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, on the disk when the block is over."""
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # a full disk has rolled it back already
                self.connection.execute("ROLLBACK")
            raise

    def make_room(self) -> bool:
        """Gives up the reserve for a transaction that found the disk full; False where there is none left."""
        reserve = self.folder / RESERVE
        self.squeezed = True
        if not reserve.exists():
            return False
        reserve.unlink()
        log.error(
            "the disk is full: the journal lives on its reserve", action="journal.squeezed", folder=str(self.folder)
        )
        return True

    def refill(self) -> None:
        """Makes the reserve again once there is room for ten of it."""
        room = os.statvfs(self.folder)
        if not (self.folder / RESERVE).exists() and room.f_bavail * room.f_frsize > 10 * RESERVE_BYTES:
            self._reserve()

    def _reserve(self) -> None:
        path = self.folder / RESERVE
        if path.exists():
            return
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
            self.squeezed = False
        except OSError as error:
            log.warning("the journal has no reserve", action="journal.reserve", why=error.strerror)
            path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)

    def record(self, results: Iterable[CheckResult]) -> None:
        """Within the caller's transaction, as all that follows here."""
        self.connection.executemany(
            SQL["record_result"],
            [(r.at.timestamp(), r.check, r.status, r.value, r.unit, r.latency, r.message) for r in results],
        )

    def save_state(self, state: bytes) -> None:
        self.connection.execute(SQL["save_state"], (state,))

    def save_incidents(self, incidents: Iterable[Incident]) -> None:
        self.connection.executemany(
            SQL["save_incident"],
            [
                (
                    one.id,
                    one.opened_at.timestamp(),
                    None if one.closed_at is None else one.closed_at.timestamp(),
                    one.severity,
                    one.title,
                    msgspec.json.encode(one.checks).decode(),
                )
                for one in incidents
            ],
        )

    def set_place(self, name: str, value: str) -> None:
        self.connection.execute(SQL["set_place"], (name, value))

    def prune(self, now: datetime, keep_days: int) -> int:
        """Forgets what is older than ``keep_days`` and thins what is older than two; returns how many results went."""
        at = now.timestamp()
        gone = self.connection.execute(SQL["forget_results"], (at - keep_days * DAY,)).rowcount
        begin, end = float(self.place(THINNED) or 0.0), at - WHOLE_DAYS * DAY
        if end > begin:
            gone += self.connection.execute(
                SQL["thin_results"],
                (THIN_SECONDS, begin, end),
            ).rowcount
            self.set_place(THINNED, repr(end))
        rows: int = self.connection.execute(SQL["count_results"]).fetchone()[0]
        if rows > MOST_ROWS:
            gone += self.connection.execute(SQL["forget_oldest_results"], (rows - MOST_ROWS,)).rowcount
        self.connection.execute(SQL["forget_incidents"], (at - max(keep_days, 400) * DAY,))
        return gone

    # --- reading -----------------------------------------------------------------------------------------------------

    def state(self) -> bytes | None:
        row = self.connection.execute(SQL["state"]).fetchone()
        return None if row is None else bytes(row[0])

    def place(self, name: str) -> str | None:
        row = self.connection.execute(SQL["place"], (name,)).fetchone()
        return None if row is None else str(row[0])

    def checks(self) -> list[str]:
        """Every check that there is a result of, by name: one step of the index each, however many results."""
        rows = self.connection.execute(SQL["check_names"])
        return [str(name) for (name,) in rows]

    def newest_look(self) -> float:
        """When a monitor last looked at anything, in epoch seconds; 0.0 where none ever has."""
        (at,) = self.connection.execute(SQL["last_look"]).fetchone()
        return float(at or 0.0)

    def latest(self, names: Sequence[str] = ()) -> list[CheckResult]:
        """Each check's newest result; ``names`` are whole names or their beginnings, none: all."""
        found = []
        for check in self.checks():
            if matches(check, names):
                found += self._results(SQL["newest_result"], (check,))
        return found

    def results(self, check: str, since: datetime, until: datetime) -> list[CheckResult]:
        """One check's results, oldest first."""
        return self._results(SQL["results"], (check, since.timestamp(), until.timestamp()))

    def _results(self, sql: str, values: tuple[Any, ...]) -> list[CheckResult]:
        rows = self.connection.execute(sql, values)
        return [
            CheckResult(
                check=check,
                status=status,
                at=datetime.fromtimestamp(at, UTC),
                message=message,
                value=value,
                unit=unit,
                latency=latency,
            )
            for at, check, status, value, unit, latency, message in rows
        ]

    def stats(self, since: datetime, until: datetime, names: Sequence[str] = ()) -> list[CheckStats]:
        """Each check's figures over a period, by name; checks without a result in it are left out."""
        begin, end = since.timestamp(), until.timestamp()
        found = []
        for check in self.checks():
            if not matches(check, names):
                continue
            rows = self.connection.execute(
                SQL["looks"],
                (check, begin - HOLD, end),
            )
            unit = self.connection.execute(SQL["unit"], (check,)).fetchone()
            made = summarise(check, (Look(*row) for row in rows), since=begin, until=end, unit=unit[0])
            if made.count:
                found.append(made)
        return found

    def incidents(self, since: datetime, until: datetime | None = None) -> list[Incident]:
        """Incidents that lasted into the period, newest first: those that still last are among them."""
        rows = self.connection.execute(
            SQL["incidents"],
            (since.timestamp(), (until or datetime.max.replace(tzinfo=UTC)).timestamp()),
        )
        return [
            Incident(
                id=incident,
                opened_at=datetime.fromtimestamp(opened, UTC),
                closed_at=None if closed is None else datetime.fromtimestamp(closed, UTC),
                severity=severity,
                title=title,
                checks=msgspec.json.decode(checks, type=tuple[str, ...]),
            )
            for incident, opened, closed, severity, title, checks in rows
        ]

    def values(self, check: str, since: datetime) -> list[float]:
        """The values that a check has had, each as often as it was seen anew (the same one beat after beat counts once)."""
        rows = self.connection.execute(
            SQL["values"],
            (check, since.timestamp()),
        )
        return [float(value) for (value,) in rows]

    def deliveries(self, notice: str) -> list[Delivery]:
        """What each sender has made of a notice."""
        rows = self.connection.execute(SQL["deliveries"], (notice,))
        return [Delivery(*row) for row in rows]

    def undelivered(self) -> tuple[int, float | None]:
        """How many notices wait for a sender, and when the oldest of them was queued, in epoch seconds."""
        row = self.connection.execute(SQL["undelivered"]).fetchone()
        return int(row[0]), row[1]


def matches(check: str, names: Sequence[str]) -> bool:
    """Whether a check is one of ``names``, each a whole name or its beginning (``feed`` is every ``feed.…``)."""
    return not names or any(check == name or check.startswith(f"{name}.") for name in names)
