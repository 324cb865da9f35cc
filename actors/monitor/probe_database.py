"""PostgreSQL's checks: whether it answers, directly and through PgBouncer, its size and growth, and its upkeep."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from actors.core.partitions import newest
from actors.core.sizes import human
from actors.monitor.journal import Journal
from actors.monitor.maintenance import LAST, Maintained
from actors.monitor.watch import Probe, result, words
from bus.store import Row, Store, StoreUnavailable
from schema.health import CheckResult, Status
from schema.settings import Health
from schema.sql import timescaledb_queries

SLOW_SECONDS: Final = 2.0  # for an answer to SELECT 1
CONNECTIONS: Final = 0.9  # share of max_connections in use
SIZE_WARNING: Final = 0.9  # share of the size that the settings allow
RUNWAY_DAYS: Final = 14.0  # until the room is used up at the pace of the last day
GROWN_EVERY: Final = timedelta(minutes=55)  # between two notes of the size; a day of them is kept
GROWN_KEPT: Final = 26
BLOATED: Final = 0.3  # share of dead rows that autovacuum should have taken away ...
BLOAT_ROWS: Final = 50_000  # ... in tables of at least so many rows
WRAP_WARNING: Final = 500_000_000  # transactions since the oldest frozen row; autovacuum begins at 200,000,000
WRAP_CRITICAL: Final = 1_500_000_000
MAINTAINED_WITHIN: Final = timedelta(hours=50)  # two nights
AHEAD: Final = timedelta(days=7)  # that partitions must reach into the future
GROWTH: Final = "database.grown"
FIRST_SEEN: Final = "database.first_seen"
"""Where the journal keeps the sizes of the last day, and since when there has been a monitor."""


class Grown(Struct, frozen=True):
    """The database at a time: epoch seconds, rows that were inserted and not deleted since the statistics began, bytes."""

    at: float
    rows: int
    bytes: int


@dataclass(slots=True)
class DatabaseProbes:
    """``store`` is the direct connection, ``pooled`` the one through PgBouncer where both are set."""

    store: Store | None
    pooled: Store | None
    settings: Health
    home: Path
    journal: Journal | None

    def probes(self) -> list[Probe]:
        return [
            Probe("database", self.answers),
            Probe("pgbouncer", self.pooler),
            Probe("database.size", self.size, every=4, detail=True, also=("database.growth",)),
            Probe("database.bloat", self.bloat, every=20, detail=True),
            Probe("database.partitions", self.partitions, every=20, detail=True),
            Probe("database.maintenance", self.maintenance, every=20, detail=True),
        ]

    def _store(self) -> Store:
        if self.store is None:
            raise StoreUnavailable("No database is named or runs here")
        return self.store

    async def _row(self, name: str) -> Row:
        """The one row of a query that always has one."""
        (row,) = await self._store().fetch(name, within=self.settings.timeout_seconds)
        return row

    async def answers(self) -> list[CheckResult]:
        began = time.monotonic()
        try:
            row = await self._row("health_server")
        except StoreUnavailable as error:
            way = "Nothing is lost, the log keeps what is not archived: start it again; `mt5 doctor` says more."
            return [result("database", "critical", f"{words(error)}. {way}")]
        took = time.monotonic() - began
        status: Status = "ok"
        said = f"PostgreSQL {row['version']} answers, {row['connections']} of {row['most']} connections are in use"
        if row["connections"] >= CONNECTIONS * row["most"]:
            status, said = "warning", f"{said}: end what holds them, or raise max_connections"
        elif took > SLOW_SECONDS:
            status, said = "warning", f"{said}, but it took {took:.1f} s"
        if row["oldest"] >= WRAP_WARNING:
            status = "critical" if row["oldest"] >= WRAP_CRITICAL else "warning"
            said = (
                f"The oldest row has {row['oldest']:,} transactions behind it, and at 2,000,000,000 PostgreSQL takes no "
                "writes: run VACUUM FREEZE, and end transactions that have been open for long"
            )
        return [result("database", status, f"{said}.", value=round(took, 6), unit="s", latency=took)]

    async def pooler(self) -> list[CheckResult]:
        if self.pooled is None:
            return [result("pgbouncer", "skipped", "The actors connect to PostgreSQL directly.")]
        try:
            await self.pooled.fetchval("ping", within=self.settings.timeout_seconds)
        except StoreUnavailable as error:
            return [result("pgbouncer", "critical", f"{words(error)}: start PgBouncer (MT5_DATABASE_URL) again.")]
        return [result("pgbouncer", "ok", "PgBouncer passes a query on.")]

    async def size(self) -> list[CheckResult]:
        row = await self._row("health_size")
        now = Grown(datetime.now(UTC).timestamp(), row["rows"], row["bytes"])
        most = self.settings.database_max_bytes
        status: Status = "ok"
        said = f"The database holds {human(now.bytes)}"
        if most is not None:
            said = f"{said} of {human(most)} that it may ({now.bytes / most:.0%})"
            status = "critical" if now.bytes >= most else "warning" if now.bytes >= SIZE_WARNING * most else "ok"
            if status != "ok":
                said += ": drop old data, or raise [health] database_max_bytes"
        return [
            result("database.size", status, f"{said}.", value=float(now.bytes), unit="bytes"),
            self._growth(now, most),
        ]

    def _growth(self, now: Grown, most: int | None) -> CheckResult:
        """Rows a day, from the sizes of the last day; a runway of days where it is known what there is room for."""
        past = self._grown(now)
        before = past[0] if past else now
        days = (now.at - before.at) / 86_400
        if days < 1 / 48 or now.rows < before.rows:  # half an hour says little; statistics may have been reset
            return result("database.growth", "skipped", "Too little time has been seen to tell how fast it grows.")
        rows, size = (now.rows - before.rows) / days, (now.bytes - before.bytes) / days
        said = f"It grows by {rows:,.0f} rows and {human(size)} a day"
        room = most - now.bytes if most is not None else self._room()
        status: Status = "ok"
        if room is not None and size > 0:
            left = max(0.0, room / size)
            said += f"; at this pace there is room for {left:,.0f} days"
            if left < RUNWAY_DAYS:
                status, said = "warning", f"{said}: make room before then"
        return result("database.growth", status, f"{said}.", value=round(rows, 1), unit="rows/day")

    def _grown(self, now: Grown) -> list[Grown]:
        """The sizes of the last day, with this one once an hour."""
        if self.journal is None:
            return []
        kept = self.journal.place(GROWTH)
        past = msgspec.json.decode(kept, type=list[Grown]) if kept else []
        past = [one for one in past if 0 <= now.at - one.at < 90_000 and one.rows <= now.rows]
        if not past or now.at - past[-1].at >= GROWN_EVERY.total_seconds():
            past = [*past, now][-GROWN_KEPT:]
            with self.journal.transaction():
                self.journal.set_place(GROWTH, msgspec.json.encode(past).decode())
        return past

    def _room(self) -> float | None:
        """Free bytes of the disk that the embedded server's files are on; None where they are elsewhere."""
        if not (self.home / "postgres").is_dir():
            return None
        return float(shutil.disk_usage(self.home).free)

    async def bloat(self) -> list[CheckResult]:
        rows = await self._store().fetch("health_bloat", BLOAT_ROWS, within=self.settings.timeout_seconds)
        if not rows:
            return [
                result("database.bloat", "ok", "No table is large enough to mind its dead rows.", value=0.0, unit="%")
            ]
        worst = rows[0]
        share = worst["dead"] / (worst["live"] + worst["dead"])
        said = f"{worst['name']} has {share:.1%} dead rows, the most of all tables"
        if share < BLOATED:
            return [result("database.bloat", "ok", f"{said}.", value=round(100 * share, 2), unit="%")]
        way = "autovacuum does not keep up: look for long transactions, or run VACUUM ANALYZE"
        return [result("database.bloat", "warning", f"{said}: {way}.", value=round(100 * share, 2), unit="%")]

    async def partitions(self) -> list[CheckResult]:
        """Partitions by hand must reach into the future; TimescaleDB makes its chunks itself, and its jobs must not fail."""
        store = self._store()
        within = self.settings.timeout_seconds
        if await store.fetchval("health_timescale", within=within):
            async with store.connection() as connection:
                failed = await connection.fetch(timescaledb_queries()["failed_jobs"], timeout=within)
            if failed:
                names = ", ".join(f"{row['name']} ({row['job_id']})" for row in failed)
                way = "see timescaledb_information.job_errors"
                return [result("database.partitions", "warning", f"TimescaleDB's jobs have failed: {names}; {way}.")]
            return [
                result("database.partitions", "ok", "TimescaleDB makes its chunks, and none of its jobs has failed.")
            ]
        rows = await store.fetch("health_partitions", within=within)
        ends = {parent: last.upper for parent, last in newest((row["parent"], row["bound"]) for row in rows).items()}
        if not ends:
            return [result("database.partitions", "skipped", "No table is partitioned by time.")]
        parent, end = min(ends.items(), key=lambda item: item[1])
        ahead = (end - datetime.now(UTC)) / timedelta(days=1)
        said = f"{parent} has partitions up to {end:%Y-%m-%d}"
        if ahead >= AHEAD.days:
            return [result("database.partitions", "ok", f"{said}.", value=round(ahead, 2), unit="days")]
        status: Status = "critical" if ahead <= 0 else "warning"
        way = "the nightly maintenance should have made more ([health] maintenance); see its log"
        return [result("database.partitions", status, f"{said} only: {way}.", value=round(ahead, 2), unit="days")]

    async def maintenance(self) -> list[CheckResult]:
        """What came of the nightly maintenance, from the journal."""
        name = "database.maintenance"
        if self.settings.maintenance is None:
            return [result(name, "skipped", "No nightly maintenance is set ([health] maintenance).")]
        if self.journal is None:
            return [result(name, "skipped", "Only the running monitor maintains the database.")]
        now = datetime.now(UTC)
        kept = self.journal.place(LAST)
        if kept is None:
            first = _first_seen(self.journal, now)
            if now - first < MAINTAINED_WITHIN:
                return [result(name, "skipped", f"The first maintenance comes at {self.settings.maintenance} UTC.")]
            way = "see the monitor's log"
            return [result(name, "warning", f"The database has never been maintained since {first:%Y-%m-%d}: {way}.")]
        last = msgspec.json.decode(kept, type=Maintained)
        hours = (now - last.at) / timedelta(hours=1)
        if last.error:
            said = f"The maintenance of {last.at:%Y-%m-%d %H:%M} UTC failed: {last.error}."
            return [result(name, "warning", said, value=round(hours, 1), unit="h")]
        said = (
            f"{last.tables} tables were vacuumed and analysed at {last.at:%Y-%m-%d %H:%M} UTC in {last.seconds:.1f} s, "
            f"{last.dead:,} dead rows before"
        )
        if now - last.at > MAINTAINED_WITHIN:
            way = "it did not run since; does the monitor run at that time?"
            return [result(name, "warning", f"{said}: {way}", value=round(hours, 1), unit="h")]
        return [result(name, "ok", f"{said}.", value=round(hours, 1), unit="h")]


def _first_seen(journal: Journal, now: datetime) -> datetime:
    """Since when there has been a monitor here."""
    kept = journal.place(FIRST_SEEN)
    if kept is not None:
        return datetime.fromisoformat(kept)
    with journal.transaction():
        journal.set_place(FIRST_SEEN, now.isoformat())
    return now
