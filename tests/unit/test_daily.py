"""The daily report without servers: what needs a person, its words, its page, and the journal's sums."""

from __future__ import annotations

import json
import math
import re
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.core import daily as words
from actors.core.alerts import Incident
from actors.core.daily_facts import (
    Backups,
    Commit,
    Copy,
    Daily,
    Disk,
    Hour,
    Job,
    Line,
    Market,
    Models,
    Room,
    Series,
    Service,
    Skill,
    Step,
    Version,
    Watch,
)
from actors.monitor.report import market_of, skill_of
from actors.monitor.report_journal import JournalMissing, history, queued, watched
from actors.monitor.report_page import page
from actors.monitor.report_pictures import MARKET, ROOM, SERVICES, SKILL, drawing_of, paint_all

NOW = datetime(2026, 11, 27, 22, 0, tzinfo=UTC)
DAY = timedelta(hours=24)
SOURCES = {name: f"cid:{name}" for name in (SERVICES, MARKET, SKILL, ROOM)}


def service(name: str = "NATS", **changes: Any) -> Service:
    made = Service(
        name=name, status="ok", message="Works.", checks=1, failing=(), fine=1.0, slow=0.01, strip=(0,) * words.SLOTS
    )
    return msgspec.structs.replace(made, **changes)


def quiet(**changes: Any) -> Daily:
    """A day on which nothing happened that anybody must know."""
    made = Daily(
        since=NOW - DAY,
        until=NOW,
        made_at=NOW,
        day=False,
        host="trader",
        release="0.1.0",
        watch=Watch(services=(service(),), absent=(), covered=1.0, incidents=()),
        market=Market(
            hours=(Hour(at=NOW - DAY, live=60, up=3, down=2, none=55),),
            series=(Series(symbol="EURUSD", timeframe="M1", bars=60, revised=0, newest=NOW, up=3, down=2, none=55),),
            more=0,
            revised=0,
            superseded=0,
            reasons={"no_edge": 55},
            p50=0.004,
            p95=0.011,
        ),
        models=Models(versions=(), steps=(), cards=(), skills=(), audited=20, different=0),
        backups=Backups(newest={"made": copy()}, kept=3, wanted=True),
        room=Room(
            disks=(Disk(name="/var/lib/mt5", free=60, total=100),),
            warn=0.1,
            critical=0.03,
            database=10**9,
            growth=None,
            lines=(),
        ),
    )
    return msgspec.structs.replace(made, **changes)


def copy(**changes: Any) -> Copy:
    made = Copy(
        event="made",
        backup="2026-11-27",
        at=NOW - timedelta(hours=18),
        bytes=10**8,
        seconds=40.0,
        rpo=61.0,
        target="",
        error="",
    )
    return msgspec.structs.replace(made, **changes)


def version() -> Version:
    return Version(
        model_name="rf_m1",
        version="v1",
        timeframe="M1",
        state="champion",
        created_at=NOW,
        auc=0.53,
        outcomes=60,
        gain=0.001,
    )


def incident(**changes: Any) -> Incident:
    made = Incident(
        id="1",
        title="PostgreSQL does not answer",
        severity="critical",
        opened_at=NOW - timedelta(hours=2),
        closed_at=NOW - timedelta(hours=1),
        checks=("database",),
    )
    return msgspec.structs.replace(made, **changes)


# --- what needs a person -----------------------------------------------------------------------------------------


def test_a_quiet_day_needs_nobody() -> None:
    assert words.concerns(quiet()) == []
    assert words.headline(quiet()) == ("good", "All is well")
    assert words.title(quiet()) == "Daily report, 27 November 2026: all is well"


@pytest.mark.parametrize(
    ("changes", "tone", "text"),
    [
        (
            {"watch": Watch(services=(), absent=(), covered=1.0, incidents=(incident(closed_at=None),))},
            "bad",
            "PostgreSQL does not answer. Since 20:00.",
        ),
        (
            {
                "watch": Watch(
                    services=(service("Feeds", status="warning", message="M1 XAUUSD is stale", failing=("feed.x",)),),
                    absent=(),
                    covered=1.0,
                    incidents=(),
                )
            },
            "open",
            "Feeds: M1 XAUUSD is stale.",
        ),
        (
            {"watch": Watch(services=(service(),), absent=(), covered=0.5, incidents=())},
            "open",
            "The health monitor did not look for 12 h: what went wrong then is not in here.",
        ),
        (
            {"watch": Watch(services=(service(),), absent=(), covered=1.0, incidents=(), waiting=2)},
            "open",
            "2 notices could not be sent yet: see `mt5 health check outbox`.",
        ),
        (
            {
                "backups": Backups(
                    newest={"made": copy(), "failed": copy(event="failed", at=NOW, error="no room")},
                    kept=3,
                    wanted=True,
                )
            },
            "bad",
            "The newest backup failed: No room.",
        ),
        (
            {"backups": Backups(newest={}, kept=0, wanted=True)},
            "bad",
            "There is no backup: make one with `mt5 backup run`.",
        ),
        (
            {"backups": Backups(newest={}, kept=0, wanted=False)},
            "open",
            "There is no backup: make one with `mt5 backup run`.",
        ),
        (
            {
                "room": Room(
                    disks=(Disk(name="/", free=2 * 2**30, total=100 * 2**30),),
                    warn=0.1,
                    critical=0.03,
                    database=None,
                    growth=None,
                    lines=(),
                )
            },
            "bad",
            "/ has 2.0 GiB of 100 GiB left (2.0 %).",
        ),
        (
            {"models": Models(versions=(), steps=(), cards=(), skills=(), audited=20, different=1)},
            "bad",
            "1 signal could not be made again bit by bit: `mt5 verify` shows where they differ.",
        ),
        (
            {"jobs": (Job(name="tests", at=NOW, ok=False, seconds=1.0, summary="2 failed"),)},
            "bad",
            "tests failed: 2 failed.",
        ),
        (
            {"jobs": (Job(name="tests", at=NOW - timedelta(days=3), ok=True, seconds=1.0, summary="passed"),)},
            "open",
            "tests has not run since 24 Nov, 22:00.",
        ),
        (
            {"backups": Backups(newest={"failed": copy(event="failed")}, kept=0, wanted=True)},
            "bad",
            "The newest backup failed: Its log says why.",
        ),
        (
            {"market": None, "problems": {"archive": "PostgreSQL is away."}},
            "bad",
            "Candles, signals and models: PostgreSQL is away.",
        ),
        ({"problems": {"commits": "git is broken."}}, "open", "Newest commits: git is broken."),
    ],
)
def test_what_needs_a_person_is_told_once(changes: dict[str, Any], tone: str, text: str) -> None:
    report = quiet(**changes)
    assert words.concerns(report) == [(tone, text)]
    assert words.headline(report) == (tone, "One thing needs you")


def test_what_is_over_needs_nobody_and_is_listed() -> None:
    report = quiet(watch=Watch(services=(service(),), absent=(), covered=1.0, incidents=(incident(),)))
    assert words.concerns(report) == []
    assert any("20:00  1 h  critical  PostgreSQL does not answer." in line for line in words.lines(report))


def test_a_failing_check_of_an_open_incident_is_not_told_twice() -> None:
    ill = service("PostgreSQL", status="critical", message="Does not answer", failing=("database",))
    watch = Watch(services=(ill,), absent=(), covered=1.0, incidents=(incident(closed_at=None),))
    assert [concern.text for concern in words.concerns(quiet(watch=watch))] == [
        "PostgreSQL does not answer. Since 20:00."
    ]


def test_a_backup_that_failed_before_the_newest_was_made_is_history() -> None:
    failed = copy(event="failed", at=NOW - timedelta(days=2), error="no room")
    assert words.concerns(quiet(backups=Backups(newest={"made": copy(), "failed": failed}, kept=3, wanted=True))) == []


def test_the_worst_comes_first() -> None:
    report = quiet(
        watch=Watch(services=(service(),), absent=(), covered=0.5, incidents=()),
        jobs=(Job(name="tests", at=NOW, ok=False, seconds=1.0, summary="2 failed"),),
    )
    assert [concern.tone for concern in words.concerns(report)] == ["bad", "open"]
    assert words.headline(report) == ("bad", "2 things need you")
    assert words.severity(words.headline(report).tone) == "critical"


def test_a_date_has_one_notice_and_a_day_by_name_another() -> None:
    assert words.report_id(NOW, None) == words.report_id(NOW + timedelta(minutes=5), None) == "report:2026-11-27"
    assert words.report_id(NOW, (NOW - DAY).date()) == "report:day:2026-11-26"


# --- words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (0.4, "0.4 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (3_599.6, "1 h"),
        (11_700, "3 h 15 min"),
        (86_400, "24 h"),
        (90_000, "1 day 1 h"),
        (172_800, "2 days"),
        (172_860, "2 days"),
        (-5, "0 s"),
    ],
)
def test_durations_have_two_units_at_most(seconds: float, said: str) -> None:
    assert words.duration(seconds) == said


@given(st.floats(min_value=0, max_value=1, exclude_max=True))
def test_what_is_not_the_whole_is_never_called_the_whole(value: float) -> None:
    for digits in (0, 1, 2):
        assert not words.share(value, digits).startswith("100")
    assert words.share(1.0, 2) == "100 %"


@pytest.mark.parametrize(
    ("amount", "said"),
    [
        (0, "0 B"),
        (1_023, "1023 B"),
        (1_024, "1.0 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (123 * 2**20, "123 MiB"),
        (2.5 * 2**40, "2.5 TiB"),
    ],
)
def test_sizes(amount: float, said: str) -> None:
    assert words.size(amount) == said


def test_a_line_grows_by_its_slope() -> None:
    ts = tuple(float(3_600 * i) for i in range(48))
    line = Line(name="database", ts=ts, values=tuple(5.0 + 24 * at / 86_400 for at in ts))
    assert words.growth(line) == pytest.approx(24.0)
    assert words.growth(Line(name="database", ts=ts[:5], values=line.values[:5])) is None


def test_times_are_told_as_far_as_they_are_not_clear() -> None:
    midnight = datetime(2026, 11, 28, tzinfo=UTC)
    assert words.moment(NOW, NOW) == "22:00"
    assert words.moment(NOW, midnight) == "22:00"  # the report of that day ends at midnight
    assert words.moment(NOW, midnight + timedelta(minutes=1)) == "27 Nov, 22:00"
    assert words.moment(NOW, NOW + timedelta(days=400)) == "27 Nov 2026"


def test_a_day_by_name_says_whether_it_is_over() -> None:
    morning = datetime(2026, 11, 27, tzinfo=UTC)
    assert words.period(quiet(day=True, since=morning, until=morning + DAY)) == "27 November 2026, the whole day (UTC)"
    assert words.period(quiet(day=True, since=morning)) == "27 November 2026, up to 22:00 UTC"
    assert words.period(quiet()) == "The 24 h to 27 November 2026, 22:00 UTC"


# --- gathering ---------------------------------------------------------------------------------------------------


def test_the_market_adds_up() -> None:
    since = NOW - DAY
    candles = [
        {"hour": None, "live": None, "symbol": f"S{i}", "timeframe": "M1", "bars": 90 - i, "revised": 1, "newest": NOW}
        for i in range(20)
    ]
    candles += [
        {"hour": since, "live": True, "symbol": None, "timeframe": None, "bars": 7, "revised": 2, "newest": NOW},
        {"hour": since, "live": False, "symbol": None, "timeframe": None, "bars": 5, "revised": 1, "newest": NOW},
    ]
    row = {
        "hour": None,
        "label": None,
        "symbol": None,
        "timeframe": None,
        "abstain": None,
        "signals": 0,
        "superseded": 0,
    }
    signals = [
        row | {"hour": since, "label": 1, "signals": 3, "superseded": 1},
        row | {"hour": since, "label": 0, "signals": 4},
        row | {"symbol": "S0", "timeframe": "M1", "label": 1, "signals": 3},
        row | {"symbol": "only a signal", "timeframe": "M5", "label": 0, "signals": 4},
        row | {"abstain": "no_edge", "signals": 4},
        row | {"signals": 3},  # those that do not abstain
    ]
    market = market_of(since, NOW, candles, signals, [0.004, 0.01])
    assert (market.bars, market.live, market.signals, market.traded) == (12, 7, 7, 3)
    assert (market.revised, market.superseded, market.reasons) == (3, 1, {"no_edge": 4})
    assert len(market.hours) == 24
    assert market.hours[0] == Hour(at=since, live=7, history=5, up=3, none=4)
    assert (len(market.series), market.more) == (15, 6)
    assert market.series[0] == Series(symbol="S0", timeframe="M1", bars=90, revised=1, newest=NOW, up=3)
    assert market_of(since, NOW, [], [], None).p50 is None


def outcome(at: int, *, up: bool | None, prob: float) -> dict[str, Any]:
    return {"ts": NOW + timedelta(minutes=at), "prob_up": prob, "base_rate": 0.5, "up": up}


def test_the_curve_is_of_whole_windows() -> None:
    rows = [outcome(i, up=bool(i % 2), prob=1.0 if i % 2 else 0.0) for i in range(80)]
    rows.append(outcome(80, up=None, prob=0.9))  # a tie
    skill = skill_of("v", rows)
    assert skill is not None
    assert skill.window == 20
    assert skill.values == pytest.approx([0.25] * len(skill.values))  # each is right where the base rate errs by a half
    assert skill.ts[-1] == (NOW + timedelta(minutes=79)).timestamp()
    assert skill_of("v", rows[:59]) is None


# --- the journal -------------------------------------------------------------------------------------------------


class Diary:
    """A journal as the monitor writes it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with closing(sqlite3.connect(file)) as connection:
            connection.executescript((files("schema.sql") / "health.sql").read_text("utf-8"))

    def look(
        self, check: str, hours_ago: float, status: str = "ok", value: float | None = None, unit: str = ""
    ) -> None:
        at = NOW.timestamp() - 3_600 * hours_ago
        self._write(
            "INSERT INTO checks VALUES (?, ?, ?, ?, ?, ?, ?)",
            (at, check, status, value, unit, 0.01, f"{check} {status}"),
        )

    def day(self, check: str, *, but: tuple[float, float] = (math.inf, math.inf)) -> None:
        """A look a minute, with none between two ages in hours."""
        at = [i / 60 for i in range(1, 24 * 60) if not but[1] <= i / 60 < but[0]]
        rows = [(NOW.timestamp() - 3_600 * age, check, "ok", None, "", 0.01, "fine") for age in at]
        with closing(sqlite3.connect(self.file)) as connection, connection:
            connection.executemany("INSERT INTO checks VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def incident(self, name: str, opened: float, closed: float | None, checks: str = '["database"]') -> None:
        at = NOW.timestamp()
        ended = None if closed is None else at - 3_600 * closed
        self._write(
            "INSERT INTO incidents VALUES (?, ?, ?, 'critical', ?, ?)", (name, at - 3_600 * opened, ended, name, checks)
        )

    def _write(self, sql: str, values: tuple[Any, ...]) -> None:
        with closing(sqlite3.connect(self.file)) as connection, connection:
            connection.execute(sql, values)

    def watched(self) -> Watch:
        return watched(self.file, NOW - DAY, NOW, 30.0)


@pytest.fixture
def diary(tmp_path: Path) -> Diary:
    return Diary(tmp_path / "health_checks.db")


def test_checks_of_a_kind_are_one_service_and_the_worst_counts(diary: Diary) -> None:
    diary.day("feed.M1.EURUSD")
    for hours, status in ((6.0, "critical"), (5.0, "ok"), (4.0, "ok"), (3.0, "warning")):
        diary.look("feed.M1.XAUUSD", hours, status)
    diary.look("actor.emitter", 1.0)
    diary.look("container.x", 1.0, "skipped")
    watch = diary.watched()
    assert [s.name for s in watch.services] == ["emitter", "Feeds"]
    feeds = watch.services[1]
    assert (feeds.status, feeds.message, feeds.checks) == ("warning", "feed.M1.XAUUSD warning", 2)
    assert feeds.failing == ("feed.M1.XAUUSD",)
    assert feeds.fine == pytest.approx(0.75, abs=0.01)  # each look stood for a quarter of an hour
    at = [slot for slot, look in enumerate(feeds.strip) if look > 0]
    assert {feeds.strip[slot] for slot in at[:2]} == {2}
    assert at[0] == (24 - 6) * 4
    assert watch.absent == ("Containers",)


def test_a_silent_monitor_is_seen(diary: Diary) -> None:
    diary.day("database", but=(15.0, 12.0))
    assert diary.watched().covered == pytest.approx(1 - 3 / 24, abs=0.002)


def test_time_before_the_first_look_ever_counts_for_nothing(diary: Diary) -> None:
    for i in range(1, 25):
        diary.look("database", i / 12)
    assert diary.watched().covered == 1.0


def test_a_monitor_that_ended_is_seen(diary: Diary) -> None:
    for i in range(12, 25):
        diary.look("database", i / 12)
    assert diary.watched().covered == pytest.approx(0.5, abs=0.02)
    assert watched(diary.file, NOW - 30 * DAY, NOW - 29 * DAY, 30.0).covered == 0.0


def test_only_incidents_that_lasted_into_the_period_are_told(diary: Diary) -> None:
    diary.incident("long ago", 50, 30)
    diary.incident("from before", 50, 20)
    diary.incident("open", 2, None, checks="[]")
    assert [(one.title, one.checks) for one in diary.watched().incidents] == [
        ("open", ()),
        ("from before", ("database",)),
    ]


def test_lines_go_back_a_month(diary: Diary) -> None:
    for hours in range(0, 24 * 40, 24):
        diary.look("disk.home", hours + 0.5, value=40.0, unit="% free")
        diary.look("disk.other", hours + 0.5, value=1e9, unit="B")
        diary.look("database.size", hours + 0.5, value=1e9 - hours, unit="bytes")
    disks, sizes = history(diary.file, NOW)
    assert [line.name for line in disks] == ["home"]
    assert set(disks[0].values) == {0.4}
    assert sizes[0].ts[0] >= NOW.timestamp() - 31 * 86_400
    assert sizes[0].values == tuple(sorted(sizes[0].values))


def test_no_journal_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(JournalMissing, match="mt5 up health"):
        watched(tmp_path / "none.db", NOW - DAY, NOW, 30.0)
    assert queued(tmp_path / "none.db", "report:2026-11-27") == []
    (tmp_path / "broken.db").write_bytes(b"no database " * 100)
    with pytest.raises(JournalMissing, match="cannot be read"):
        watched(tmp_path / "broken.db", NOW - DAY, NOW, 30.0)


# --- the page ----------------------------------------------------------------------------------------------------

VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """What a browser sees: text, pictures, and whether elements are closed as they were opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.images: list[dict[str, str | None]] = []
        self.names: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += attrs
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


OURS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "table",
        "tr",
        "td",
        "th",
        "div",
        "span",
        "p",
        "h1",
        "h2",
        "br",
        "img",
    ),
}


def full(text: str = "x", many: int = 3) -> Daily:
    """A day with something everywhere, and ``text`` wherever others may write."""
    return quiet(
        host=text,
        release=text,
        watch=Watch(
            services=tuple(
                service(text, status="critical", message=text, failing=(text,)) for _ in range(min(many, 30))
            ),
            absent=(text,),
            covered=0.9,
            incidents=tuple(incident(title=text, checks=(text,) * 6, closed_at=None) for _ in range(min(many, 50))),
        ),
        market=Market(
            hours=tuple(Hour(at=NOW - DAY + timedelta(hours=i), live=i, none=i) for i in range(24)),
            series=tuple(
                Series(symbol=text, timeframe=text, bars=9, revised=1, newest=NOW) for _ in range(min(many, 15))
            ),
            more=many,
            revised=1,
            superseded=0,
            reasons={text: 3},
            p50=0.01,
            p95=1.0,
        ),
        models=Models(
            versions=tuple(
                Version(model_name=text, version=text, timeframe="M1", state=text, created_at=NOW, auc=0.52)
                for _ in range(min(many, 8))
            ),
            steps=(Step(at=NOW, model_name=text, version=text, action=text, by=text, reason=text),) * min(many, 8),
            cards=(),
            skills=(Skill(version=text, window=100, ts=(1e9, 1e9 + 60), values=(0.1, 0.2)),),
            audited=1,
            different=1,
        ),
        backups=Backups(
            newest={event: copy(event=event, backup=text, target=text, error=text) for event in words.EVENTS},
            kept=1,
            wanted=True,
        ),
        room=Room(
            disks=(Disk(name=text, free=1, total=100),),
            warn=0.1,
            critical=0.03,
            database=1,
            growth=5e6,
            lines=(
                Line(name=text, ts=(1e9, 1e9 + 86_400), values=(0.5, 0.4), full=1.0),
                Line(name="database", ts=(1e9, 1e9 + 86_400), values=(1e9, 2e9)),
            ),
        ),
        jobs=(Job(name=text, at=NOW, ok=False, seconds=3.0, summary=text),) * min(many, 10),
        commits=(Commit(id="abc", at=NOW, author=text, subject=text),) * min(many, 8),
        problems={"commits": text, "jobs": text},
    )


@given(
    st.text(max_size=60) | st.sampled_from(["<script>alert(1)</script>", '"><img src=x onerror=y>', "&amp;", "`<b>`"])
)
def test_nothing_that_others_wrote_is_markup(text: str) -> None:
    reader = read(page(full(text), SOURCES))
    assert reader.names <= OURS
    assert {name for name, _ in reader.attributes}.isdisjoint({"href", "onerror", "onclick", "onload"})
    assert {image["src"] for image in reader.images} == set(SOURCES.values())


@settings(max_examples=50)
@given(st.text(max_size=200))
def test_the_text_is_lines(text: str) -> None:
    assert all(len(line.splitlines()) <= 1 for line in words.lines(full(" ".join(text.split()) or "x")))


def test_a_mail_stays_below_what_readers_cut() -> None:
    html = page(
        full("a sentence that somebody wrote at some length about a thing that went wrong " * 9, many=1_000), SOURCES
    )
    assert len(html.encode()) < 100_000


def test_every_picture_says_what_it_shows() -> None:
    reader = read(page(full(), SOURCES))
    assert all(len(image["alt"] or "") > 30 for image in reader.images)
    assert len(reader.images) == 4


def test_pictures_that_are_missing_leave_no_hole() -> None:
    assert read(page(full(), {})).images == []


def test_a_file_for_a_browser_forbids_what_is_not_in_it() -> None:
    html = page(full(), {SERVICES: "data:image/png;base64,AAAA"}, mail=False)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in html
    assert "Content-Security-Policy" not in page(full(), SOURCES)


def test_the_page_says_what_the_text_says() -> None:
    report = quiet(models=Models(versions=(version(),), steps=(), cards=(), skills=(), audited=20, different=0))
    shown = read(page(report, SOURCES)).text.replace("\u00a0", " ")
    for text in (
        "All is well",
        "EURUSD M1",
        "half within 4.0 ms",
        "20 identical",
        "speaks",
        "+1.00",
        "3 backups kept",
        "60.0 % free",
    ):
        assert text in shown
    said = "\n".join(words.lines(report))
    for text in (
        "All is well",
        "EURUSD M1",
        "half within 4.0 ms",
        "20 identical",
        "speaks",
        "+1.00",
        "3 backups kept",
        "60.0 %",
    ):
        assert text in said


def test_a_day_of_which_nothing_is_known_is_told_as_that() -> None:
    nothing = quiet(
        watch=None,
        market=None,
        models=None,
        backups=None,
        room=None,
        problems={"watch": "W.", "archive": "A.", "backups": "B.", "room": "R."},
    )
    assert words.headline(nothing) == ("bad", "4 things need you")
    shown = read(page(nothing, {})).text
    assert all(text in shown for text in ("W.", "A.", "B.", "R."))
    assert paint_all(drawing_of(nothing)) == {}
    json.loads(msgspec.json.encode(nothing))


def test_each_picture_is_a_png_of_a_mails_width() -> None:
    pictures = paint_all(drawing_of(full("a $name$ with two dollars")))
    assert list(pictures) == [SERVICES, MARKET, SKILL, ROOM]
    for data in pictures.values():
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(data[16:20], "big") == 1_200
        assert len(data) < 150_000
        assert not re.search(rb"tEXtSoftware", data)


def test_hours_without_anything_draw_an_empty_axis_and_no_warning() -> None:
    report = quiet(
        market=Market(
            hours=(Hour(at=NOW, live=1),),
            series=(),
            more=0,
            revised=0,
            superseded=0,
            reasons={},
            p50=None,
            p95=None,
        )
    )
    assert MARKET in paint_all(drawing_of(report))
