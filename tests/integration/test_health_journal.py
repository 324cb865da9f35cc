"""The monitor's journal on a real file: all or nothing, private, bounded, and alive on a full disk."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from actors.core.alerts import Incident
from actors.monitor import journal as module
from actors.monitor.desk import Desk
from actors.monitor.journal import FILE, RESERVE, RESERVE_BYTES, Journal, JournalBroken
from actors.monitor.outbox import Outbox
from schema.health import CheckResult, Notice, Status
from schema.settings import Alerts
from tests.conftest import missing

NOW = datetime(2026, 3, 10, 12, 0, tzinfo=UTC)


class Nobody:
    """A sender that is never asked: what is queued stays."""

    name = "smtp"

    async def send(self, notice: Notice) -> str | None:
        raise AssertionError(notice)


class Quiet:
    def __getattr__(self, _: str) -> object:
        return lambda *words, **more: None


def of(check: str, at: datetime, status: Status = "ok", value: float | None = 1.0) -> CheckResult:
    return CheckResult(check=check, status=status, at=at, message=f"{check} is {status}", value=value, latency=0.5)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    made = Journal.open(tmp_path)
    yield made
    made.close()


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    if done.returncode != 0:
        missing("this user may not mount a tmpfs: run the tests as root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(file: Path) -> None:
    """Writes until the disk refuses."""
    with file.open("wb", buffering=0) as open_file:
        while open_file.write(b"\0" * 4_096):
            pass


def test_what_is_recorded_is_read_by_others_while_it_is_open(journal: Journal, tmp_path: Path) -> None:
    incident = Incident(
        id="i-1", opened_at=NOW, closed_at=None, severity="critical", title="It broke", checks=("database", "disk.home")
    )
    with journal.transaction():
        journal.record(
            [of("disk.home", NOW), of("database", NOW), of("database", NOW + timedelta(seconds=30), "critical")]
        )
        journal.save_incidents([incident])
        journal.set_place("somewhere", "42")
    reader = Journal.reading(tmp_path)
    assert reader is not None
    try:
        assert reader.checks() == ["database", "disk.home"]
        assert [one.status for one in reader.latest()] == ["critical", "ok"]
        assert reader.latest(["disk"]) == [of("disk.home", NOW)]
        assert reader.results("database", NOW, NOW + timedelta(seconds=30)) == [of("database", NOW)]
        assert reader.incidents(NOW + timedelta(days=1)) == [incident], "one that lasts reaches into every later time"
        assert reader.place("somewhere") == "42"
        (found,) = reader.stats(NOW, NOW + timedelta(seconds=60), ["database"])
        assert (found.count, found.critical, found.uptime) == (2, 1, 0.5)
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader.set_place("somewhere", "43")
    finally:
        reader.close()
    with journal.transaction():
        journal.save_incidents([msgspec.structs.replace(incident, closed_at=NOW + timedelta(hours=1))])
    assert journal.incidents(NOW + timedelta(minutes=30)) != []
    assert journal.incidents(NOW + timedelta(hours=2)) == []


def test_everything_beside_it_is_private(journal: Journal, tmp_path: Path) -> None:
    with journal.transaction():
        journal.record([of("database", NOW)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, f"{FILE}-shm", f"{FILE}-wal", RESERVE]
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_a_transaction_that_fails_leaves_nothing(journal: Journal) -> None:
    def fails() -> None:
        with journal.transaction():
            journal.record([of("database", NOW)])
            journal.save_state(b"{}")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert journal.checks() == []
    assert journal.state() is None


def test_old_results_go_and_middling_ones_are_thinned(journal: Journal) -> None:
    def fill(start: datetime, count: int) -> None:
        with journal.transaction():
            for n in range(count):
                at = start + timedelta(seconds=30 * n)
                journal.record([of("nats", at), of("database", at, "critical" if n % 100 < 4 else "ok")])

    begin = NOW - timedelta(days=4)
    fill(begin, 1_000)
    fill(NOW - timedelta(hours=1), 100)
    before = journal.stats(begin, begin + timedelta(seconds=30_000))
    with journal.transaction():
        journal.prune(NOW, keep_days=30)
    after = journal.stats(begin, begin + timedelta(seconds=30_000))
    for was, is_ in zip(before, after, strict=True):
        assert is_.count < was.count / 5
        assert is_.critical == was.critical, "what was wrong is kept whole"
        assert was.uptime is not None
        assert is_.uptime == pytest.approx(was.uptime, abs=0.08)
    assert all(one.count == 100 for one in journal.stats(NOW - timedelta(hours=2), NOW))
    with journal.transaction():
        assert journal.prune(NOW, keep_days=30) == 0, "the same is not thinned twice"
        journal.prune(NOW, keep_days=3)
    assert journal.stats(begin, begin + timedelta(seconds=30_000)) == []


def test_it_is_bounded_whatever_the_settings(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ROWS", 100)
    with journal.transaction():
        journal.record([of("nats", NOW - timedelta(seconds=n)) for n in range(500)])
        journal.prune(NOW, keep_days=30)
    assert journal.stats(NOW - timedelta(hours=1), NOW + timedelta(seconds=1))[0].count == 100
    assert journal.latest()[0].at == NOW


def test_a_damaged_file_is_put_aside(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"this is no database at all, and long enough to be taken for one" * 100)
    made = Journal.open(tmp_path)
    try:
        assert made.checks() == []
    finally:
        made.close()
    (aside,) = tmp_path.glob(f"{FILE}.damaged-*")
    assert aside.read_bytes().startswith(b"this is no database")


def test_a_place_that_is_none_is_a_clear_sentence(tmp_path: Path) -> None:
    assert Journal.reading(tmp_path) is None
    with pytest.raises(JournalBroken, match=r"cannot be written to .* or set MT5_HOME"):
        Journal.open(tmp_path / "missing")
    (tmp_path / FILE).write_bytes(b"x" * 5_000)
    with pytest.raises(JournalBroken, match="cannot be read"):
        Journal.reading(tmp_path)


async def test_a_full_disk_is_still_told_of(tiny: Path) -> None:
    """Not one byte is free: the reserve makes room for the alert that says so."""
    journal = Journal.open(tiny)
    outbox = Outbox(journal.connection, {"smtp": Nobody()}, Quiet())
    rules = Alerts(after=1, group_seconds=0.0)
    desk = Desk(journal, outbox, rules, Quiet())
    assert (tiny / RESERVE).stat().st_blocks * 512 == RESERVE_BYTES
    with pytest.raises(OSError, match="No space"):
        fill(tiny / "filler")
    now = datetime.now(UTC)
    for n in range(200):  # more than what the write-ahead log has room for by chance
        desk.take([of("disk.home", now + timedelta(seconds=n), "critical")])
        desk.step(now + timedelta(seconds=n))
        desk.step(now + timedelta(seconds=n))
    assert not desk.troubled
    assert journal.squeezed
    assert not (tiny / RESERVE).exists()
    assert outbox.waiting() == 1
    assert len(journal.results("disk.home", now - timedelta(hours=1), now + timedelta(hours=1))) == 200
    # Once there is room again the reserve is made anew.
    os.truncate(tiny / "filler", 0)
    journal.refill()
    assert not (tiny / RESERVE).exists(), "only where there is room for ten of it"
    journal.close()


async def test_what_cannot_be_written_is_taken_in_later(journal: Journal, tmp_path: Path) -> None:
    """Another process holds the file: results wait, in order, and the alert comes once they can be written."""
    journal.connection.execute("PRAGMA busy_timeout = 50")
    outbox = Outbox(journal.connection, {"smtp": Nobody()}, Quiet())
    desk = Desk(journal, outbox, Alerts(after=2, group_seconds=0.0), Quiet())
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for n in range(2):
        desk.take([of("database", NOW + timedelta(seconds=n), "critical")])
        desk.step(NOW + timedelta(seconds=n))
        assert desk.troubled
    assert outbox.waiting() == 0
    other.execute("ROLLBACK")
    other.close()
    desk.step(NOW + timedelta(seconds=3))
    assert not desk.troubled
    assert outbox.waiting() == 1
    assert len(journal.results("database", NOW, NOW + timedelta(hours=1))) == 2


async def test_a_state_that_is_not_understood_closes_what_was_open(journal: Journal) -> None:
    incident = Incident(
        id="i-1",
        opened_at=NOW - timedelta(hours=1),
        closed_at=None,
        severity="critical",
        title="It broke",
        checks=("x",),
    )
    with journal.transaction():
        journal.save_state(b'{"of": "another version", "watches": 3}')
        journal.save_incidents([incident])
    desk = Desk(journal, Outbox(journal.connection, {}, Quiet()), Alerts(), Quiet())
    assert desk.state.watches == {}
    assert [one.closed_at is None for one in journal.incidents(NOW - timedelta(days=1))] == [False]


async def test_feeds_that_stay_as_they_are_are_kept_seldom(journal: Journal) -> None:
    desk = Desk(journal, Outbox(journal.connection, {}, Quiet()), Alerts(), Quiet())
    now = datetime.now(UTC)
    for n in range(60):
        at = now + timedelta(seconds=30 * n)
        desk.take([of("feed.M1.EURUSD", at, "critical" if 20 <= n < 30 else "ok"), of("nats", at)])
        desk.step(at)
    feeds = journal.results("feed.M1.EURUSD", now, now + timedelta(hours=1))
    assert [one.status for one in feeds] == ["ok", "critical", "ok", "ok"]
    assert len(journal.results("nats", now, now + timedelta(hours=1))) == 60
