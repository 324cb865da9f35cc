"""Restatement plans: whatever the archive made of bars under wrong clocks, it ends as if the clock had been right."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import cache

from hypothesis import given
from hypothesis import strategies as st

from actors.core.clock import Timeline, timeline
from actors.core.clock_restate import Books, Change, Restatement, Version
from bus.ledger import zone_steps
from schema.clock import ClockBook, ClockLedger, ClockRun

HOUR = 3_600
DAY = 86_400
WALL = datetime(2025, 8, 1, tzinfo=UTC)  # our clock while payloads come


def utc(*parts: int) -> int:
    return int(datetime(*parts, tzinfo=UTC).timestamp())  # type: ignore[arg-type]


@cache
def _line(book: ClockBook) -> Timeline:
    return timeline(book, zone_steps)


class Archive:
    """market_data and candle_revisions of one series, as the recorder would leave them."""

    def __init__(self, *rules: str | None, step: int = HOUR) -> None:
        """One book a rule, put in force a day after the other; None is UTC."""
        books = tuple(ClockBook(at=WALL + timedelta(days=i), rule=rule) for i, rule in enumerate(rules))
        self.ledger = ClockLedger(source="Broker-Demo", books=books)
        self.books = Books(self.ledger, zone_steps)
        self.step = step
        self.rows: dict[int, Version] = {}
        self.replaced: list[Version] = []

    def put(self, ts: int, values: tuple[float, ...], received_at: datetime, ts_source: str) -> None:
        old = self.rows.get(ts)
        if old is not None and old.values == values:
            return
        if old is not None:
            self.replaced.append(Version(old.ts, old.received_at, old.ts_source, False, old.values))
        self.rows[ts] = Version(ts, received_at, ts_source, True, values)

    def receive(self, server: int, value: float, book: int) -> None:
        """A bar as a terminal sent it while a book was in force."""
        line = _line(self.ledger.books[book])
        ts = line.to_utc(server)
        self.put(ts, (value,), self.ledger.books[book].at + timedelta(hours=1), line.kind_at(ts))

    def apply(self, changes: Iterable[Change]) -> None:
        for change in changes:
            if change.what == "withdrawn":
                old = self.rows.pop(change.ts)
                self.replaced.append(Version(old.ts, old.received_at, old.ts_source, False, old.values))
            elif change.what == "added":
                self.put(change.ts, change.version.values, WALL + timedelta(days=20), change.ts_source)
            else:
                old = self.rows[change.ts]
                self.rows[change.ts] = Version(old.ts, old.received_at, change.ts_source, True, old.values)

    def plan(self, *, first: int | None = None, last: int | None = None) -> list[Change]:
        work = Restatement(self.books, first=first, last=last)
        out: list[Change] = []
        for version in sorted([*self.rows.values(), *self.replaced], key=lambda v: v.ts):
            out += work.feed([version])
        out += work.finish()
        assert [change.ts for change in out] == sorted({change.ts for change in out})
        return out

    def values(self) -> dict[int, float]:
        return {ts: version.values[0] for ts, version in sorted(self.rows.items())}


def right(archive: Archive, sent: dict[int, float]) -> dict[int, float]:
    return {archive.books.now.to_utc(server): value for server, value in sorted(sent.items())}


def test_bars_taken_as_utc_move_to_where_the_rule_says() -> None:
    archive = Archive(None, "new_york+7")
    clock = archive.books.now
    sent = {clock.to_server(utc(2025, 1, 6) + HOUR * i): float(i) for i in range(24 * 200)}
    for server, value in sent.items():
        archive.receive(server, value, 0)
    changes = archive.plan()
    assert {change.what for change in changes} == {"added", "withdrawn"}
    archive.apply(changes)
    expected = right(archive, sent)
    assert archive.values() == expected
    assert {version.ts_source for version in archive.rows.values()} == {"rule"}
    assert archive.plan() == []


def test_only_the_weeks_in_which_two_families_differ_move() -> None:
    archive = Archive("new_york+7", "Europe/Athens")
    for i in range(365 * 24):
        if (i // 24 + 3) % 7 not in (5, 6):  # no weekends, in which the clocks change
            archive.receive(utc(2025, 1, 2) + HOUR * i, float(i), 0)
    changes = archive.plan()
    spring = (utc(2025, 3, 9), utc(2025, 3, 31))
    autumn = (utc(2025, 10, 26), utc(2025, 11, 3))
    assert all(any(a <= c.ts <= b for a, b in (spring, autumn)) for c in changes)
    assert len(changes) > 15 * 24


def test_bars_that_others_were_stored_over_come_back() -> None:
    """Wrong by an hour until noon, right from then on: an hour of bars was stored over by their successors."""
    archive = Archive("+02:00", "+03:00")
    noon = utc(2025, 6, 2, 12)
    sent = {noon + 60 * i: float(i) for i in range(-300, 300)}
    for server, value in sent.items():
        archive.receive(server, value, 0 if server < noon else 1)
    assert len(archive.rows) < len(sent)
    archive.apply(archive.plan())
    assert archive.values() == right(archive, sent)


def test_going_back_to_the_first_clock_restores_the_archive() -> None:
    archive = Archive("+02:00", "+03:00")
    sent = {utc(2025, 6, 2) + 60 * i: float(i) for i in range(500)}
    for server, value in sent.items():
        archive.receive(server, value, 0)
    before = archive.values()
    archive.apply(archive.plan())
    assert archive.values() != before
    books = (*archive.ledger.books, ClockBook(at=WALL + timedelta(days=30), rule="+02:00"))
    archive.ledger = ClockLedger(source="Broker-Demo", books=books)
    archive.books = Books(archive.ledger, zone_steps)
    archive.apply(archive.plan())
    assert archive.values() == before


def test_a_guess_that_proves_right_is_confirmed() -> None:
    seen = ClockRun(since=utc(2025, 6, 1), until=utc(2025, 7, 1), offset=3 * HOUR, origin="fields")
    books = (
        ClockBook(at=WALL, runs=(seen,)),
        ClockBook(at=WALL + timedelta(days=1), runs=(seen,), family="Europe/Athens"),
    )
    archive = Archive()
    archive.ledger = ClockLedger(source="Broker-Demo", books=books)
    archive.books = Books(archive.ledger, zone_steps)
    for i in range(30 * 24):
        archive.receive(utc(2025, 3, 1) + HOUR * i, float(i), 0)
    changes = archive.plan()
    kinds = {change.what for change in changes}
    assert kinds == {"confirmed", "added", "withdrawn"}  # three weeks of March were an hour off
    assert {change.ts_source for change in changes if change.what == "confirmed"} == {"inferred"}
    archive.apply(changes)
    assert {version.ts_source for version in archive.rows.values()} == {"inferred"} | (
        {"server"} if max(archive.rows) >= utc(2025, 3, 30, 1) else set()
    )
    assert archive.plan() == []


def test_what_the_ledger_cannot_explain_stays() -> None:
    archive = Archive(None, "+02:00")
    archive.put(utc(2025, 6, 2), (1.0,), WALL + timedelta(hours=1), "server")
    work = Restatement(archive.books)
    assert work.feed(archive.rows.values()) + work.finish() == []
    assert work.unknown == 1


def test_a_span_moves_alone() -> None:
    archive = Archive(None, "+02:00")
    start = utc(2025, 6, 2)
    for i in range(100):
        archive.receive(start + HOUR * i, float(i), 0)
    first, last = start + 40 * HOUR, start + 59 * HOUR
    archive.apply(archive.plan(first=first, last=last))
    values = archive.values()
    assert values[start + 37 * HOUR] == 37.0  # before the span: where it was
    assert values[start + 39 * HOUR] == 39.0  # and nothing is put over it
    assert values[start + 40 * HOUR] == 42.0  # the span's bars go two hours back
    assert values[start + 57 * HOUR] == 59.0
    assert start + 58 * HOUR not in values
    assert values[start + 60 * HOUR] == 60.0


RULES = st.sampled_from([None, "new_york+7", "Europe/Athens", "+02:00", "+03:00", "-05:00"])
CHANGE = utc(2025, 3, 28)


@given(
    st.lists(RULES, min_size=2, max_size=3),
    # Hour 51 is the one that Athens leaves out in spring: no terminal can send it, and no way leads back from it.
    st.lists(
        st.tuples(st.integers(0, 80).filter(lambda hour: hour != 51), st.integers(0, 2)),
        min_size=1,
        max_size=60,
        unique_by=lambda x: x[0],
    ),
    st.integers(0, 200),
)
def test_interrupted_and_repeated_it_ends_alike(
    rules: list[str | None], bars: list[tuple[int, int]], applied: int
) -> None:
    """Bars around Europe's change, received under any book: a second run finishes what a first one began."""
    archive, broken = Archive(*rules), Archive(*rules)
    sent: dict[int, float] = {}
    for at, (hour, book) in enumerate(sorted(bars, key=lambda bar: min(bar[1], len(rules) - 1))):
        server = CHANGE + HOUR * hour
        sent[server] = float(at)
        for each in (archive, broken):
            each.receive(server, float(at), min(book, len(rules) - 1))
    archive.apply(archive.plan())
    broken.apply(broken.plan()[:applied])
    broken.apply(broken.plan())
    assert archive.values() == broken.values()
    assert archive.plan() == []
    assert set(archive.values()) == {archive.books.now.to_utc(server) for server in sent}
