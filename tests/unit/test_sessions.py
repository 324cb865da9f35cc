"""Sessions learned from bars, and what each hole is called: real files, made-up markets, clocks that change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime
from functools import cache
from itertools import pairwise
from pathlib import Path
from zoneinfo import ZoneInfo

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.core.files import decode_lines, read_bars
from actors.core.gaps import Gap, classify, report
from actors.core.holidays import easter, is_closed_day, is_short_day
from actors.core.sessions import FIRST_SUNDAY, UTC_CLOCK, WEEK, Calendar, ServerClock, Snapshot, learn, spans
from schema.timeframes import SECONDS, TIMEFRAMES

MINUTE, HOUR, DAY = 60, 3_600, 86_400
NEW_YORK = ZoneInfo("America/New_York")


def at(text: str) -> int:
    return int(datetime.fromisoformat(f"{text}Z").timestamp())


@cache
def times_of(file: Path) -> tuple[int, ...]:
    with file.open("rb") as stream:
        return tuple(int(row.ts.timestamp()) for rows in read_bars(decode_lines(iter(stream))) for row in rows)


def holes(times: Sequence[int], step: int) -> list[tuple[int, int]]:
    return [(a, b) for a, b in pairwise(times) if b - a != step]


def told(times: Sequence[int], timeframe: str, clock: ServerClock = UTC_CLOCK) -> list[Gap]:
    return report(timeframe, times[0], holes(times, SECONDS[timeframe]), times[-1], clock)


def lived(times: Sequence[int], timeframe: str, clock: ServerClock = UTC_CLOCK) -> list[Gap]:
    """Each hole judged when its next bar comes, by nothing but what came before."""
    calendar = Calendar(timeframe, clock)
    out: list[Gap] = []
    for first, last in spans(times, SECONDS[timeframe]):
        if calendar.head is not None:
            out += classify(calendar, calendar.head, first)
        calendar.observe(first, last)
    return out


def losses(gaps: Iterable[Gap]) -> list[tuple[str, str, int]]:
    return [
        (f"{g.from_:%Y-%m-%dT%H:%M}", f"{g.to:%Y-%m-%dT%H:%M}", g.count) for g in gaps if g.kind == "transport loss"
    ]


def names(gaps: Iterable[Gap]) -> Counter[str]:
    return Counter(g.name or "" for g in gaps if g.kind == "closed session")


def without(times: Sequence[int], first: str, last: str) -> list[int]:
    return [ts for ts in times if not at(first) <= ts <= at(last)]


def market(start: str, end: str, step: int, *, close: int = 0, zone: ZoneInfo = NEW_YORK) -> list[int]:
    """Open times from Sunday 17:00 to Friday 17:00 in New York; ``close`` seconds from 17:00 on are a daily break."""
    hours = np.arange(at(start), at(end), HOUR)
    local = [datetime.fromtimestamp(int(ts), zone) for ts in hours]
    clock = np.array([int(t.replace(tzinfo=UTC).timestamp()) for t in local])
    ts = (hours[:, None] + np.arange(0, HOUR, min(step, HOUR))[None, :]).ravel()
    there = (clock[:, None] + np.arange(0, HOUR, min(step, HOUR))[None, :]).ravel()
    week = (there - FIRST_SUNDAY) % WEEK
    open_ = (week >= 17 * HOUR) & (week < 5 * DAY + 17 * HOUR) & ((there - 17 * HOUR) % DAY >= close)
    return [int(t) for t in ts[open_]]


def zone_clock(name: str) -> ServerClock:
    zone = ZoneInfo(name)

    def to_server(ts: int) -> int:
        return ts + int(datetime.fromtimestamp(ts, zone).utcoffset().total_seconds())  # type: ignore[union-attr]

    def to_utc(server: int) -> int:
        return int(datetime.fromtimestamp(server, UTC).replace(tzinfo=zone).timestamp())

    return ServerClock(to_server, to_utc)


# --- real files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "weekends"), [("EURUSD_M1_202502", 2), ("EURUSD_M1_202201", 7), ("GBPUSD_M1_201202", 4)]
)
def test_real_minutes_have_weekends_and_quiet_minutes_and_no_loss(data: Path, file: str, weekends: int) -> None:
    times = times_of(data / f"{file}.csv")
    gaps = told(times, "M1")
    assert names(gaps) == {"weekend": weekends}
    assert losses(gaps) == losses(lived(times, "M1")) == []
    quiet = [gap for gap in gaps if gap.kind == "no tick"]
    assert len(quiet) + weekends == len(holes(times, 60))
    assert max(gap.count for gap in quiet) <= 4
    assert sum(gap.count for gap in gaps) == (times[-1] - times[0]) // 60 + 1 - len(times)


def test_a_real_index_has_named_breaks_weekends_and_holidays(data: Path) -> None:
    times = times_of(data / "US30m_H1_202401.csv")
    gaps = told(times, "H1")
    assert losses(gaps) == losses(lived(times, "H1")) == []
    found = names(gaps)
    # New York's 17:00 in winter and in summer: the file is in UTC.
    assert {name for name in found if not name.startswith("holiday")} == {
        "weekend",
        "daily break 21:00–22:00",
        "daily break 22:00–23:00",
    }
    assert found["weekend"] == 88
    assert {"holiday 2024-03-29", "holiday 2024-12-25", "holiday 2025-01-01", "holiday 2025-04-18"} <= set(found)
    assert not [gap for gap in gaps if gap.kind == "no tick"]
    assert sum(count for name, count in found.items() if name.startswith("daily")) > 340


@pytest.mark.parametrize("judge", [told, lived])
def test_three_hours_lost_on_a_tuesday_are_a_loss_of_exactly_that_span(data: Path, judge: object) -> None:
    times = without(times_of(data / "EURUSD_M1_202502.csv"), "2025-02-18T10:00", "2025-02-18T12:59")
    assert losses(judge(times, "M1")) == [("2025-02-18T10:00", "2025-02-18T12:59", 180)]  # type: ignore[operator]
    times = without(times_of(data / "US30m_H1_202401.csv"), "2024-10-15T10:00", "2024-10-15T12:00")
    assert losses(judge(times, "H1")) == [("2024-10-15T10:00", "2024-10-15T12:00", 3)]  # type: ignore[operator]


@pytest.mark.parametrize("judge", [told, lived])
def test_a_loss_around_a_break_leaves_the_break_out(data: Path, judge: object) -> None:
    times = without(times_of(data / "US30m_H1_202401.csv"), "2024-10-15T18:00", "2024-10-16T02:00")
    assert losses(judge(times, "H1")) == [  # type: ignore[operator]
        ("2024-10-15T18:00", "2024-10-15T20:00", 3),
        ("2024-10-15T22:00", "2024-10-16T02:00", 5),
    ]


def test_a_terminal_that_was_off_over_the_weekend_lost_what_the_market_was_open_for(data: Path) -> None:
    times = without(times_of(data / "EURUSD_M1_202201.csv"), "2022-02-04T12:00", "2022-02-07T05:59")
    gaps = told(times, "M1")
    assert losses(gaps) == [
        ("2022-02-04T12:00", "2022-02-04T18:29", 390),
        ("2022-02-06T18:30", "2022-02-07T05:59", 690),
    ]
    (weekend,) = [gap for gap in gaps if gap.name == "weekend" and gap.from_.month == 2 and gap.from_.day == 4]
    assert weekend.count == 2_880


# --- made-up markets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timeframe", "close"), [("M1", 300), ("M5", 0), ("M15", 3_600), ("H1", 3_600), ("M30", 1_800)]
)
def test_the_weeks_when_clocks_change_lose_nothing_in_utc(timeframe: str, close: int) -> None:
    start, end = (
        ("2024-09-15T22:00", "2025-04-25T00:00") if timeframe == "M1" else ("2024-01-08T00:00", "2025-12-19T00:00")
    )
    times = market(start, end, SECONDS[timeframe], close=close)
    times = [ts for ts in times if not is_closed_day(datetime.fromtimestamp(ts, UTC))]
    assert losses(told(times, timeframe)) == losses(lived(times, timeframe)) == []


def test_a_loss_in_the_week_of_a_change_is_seen() -> None:
    times = market("2024-12-01T00:00", "2025-04-01T00:00", 60, close=3_600)
    times = without(times, "2025-03-11T12:00", "2025-03-11T14:59")
    assert losses(lived(times, "M1")) == [("2025-03-11T12:00", "2025-03-11T14:59", 180)]


@pytest.mark.parametrize("timeframe", ["M1", "H1", "H4", "D1"])
def test_a_brokers_clock_has_no_holes_where_it_jumps(timeframe: str) -> None:
    clock = zone_clock("Europe/Athens")
    step = SECONDS[timeframe]
    first, last = at("2025-03-10T00:00"), at("2025-11-20T00:00")
    if step <= HOUR:
        first, last = (first, last) if step == HOUR else (at("2025-03-24T00:00"), at("2025-04-07T00:00"))
        times = list(range(first, last, step))
    else:
        times = sorted({clock.to_utc(server) for server in range(first, last, step)})
    assert told(times, timeframe, clock) == []
    lost = times[:40] + times[43:]
    (gap,) = told(lost, timeframe, clock)
    assert (int(gap.from_.timestamp()), int(gap.to.timestamp()), gap.count) == (times[40], times[42], 3)


def test_in_the_brokers_clock_the_break_keeps_its_name() -> None:
    ahead = zone_clock("America/New_York")
    clock = ServerClock(lambda ts: ahead.to_server(ts) + 7 * HOUR, lambda ts: ahead.to_utc(ts - 7 * HOUR))
    times = market("2025-01-06T00:00", "2025-06-01T00:00", 900, close=3_600)
    gaps = told(times, "M15", clock)
    assert losses(gaps) == []
    assert set(names(gaps)) == {"weekend", "daily break 00:00–01:00"}


def test_a_market_without_sessions_knows_none() -> None:
    times = list(range(at("2025-02-01T00:00"), at("2025-03-01T00:00"), 60))
    lost = without(times, "2025-02-22T10:00", "2025-02-22T12:59")  # a Saturday
    assert losses(told(lost, "M1")) == losses(lived(lost, "M1")) == [("2025-02-22T10:00", "2025-02-22T12:59", 180)]
    assert told(without(times, "2025-02-22T10:00", "2025-02-22T10:00"), "M1")[0].kind == "no tick"
    assert losses(lived(without(times, "2025-02-14T21:00", "2025-02-16T21:59"), "M1"))  # as long as a weekend


@pytest.mark.parametrize("judge", [told, lived])
def test_christmas_is_a_holiday(judge: object) -> None:
    times = without(market("2024-11-10T00:00", "2025-01-10T00:00", 60), "2024-12-24T22:00", "2024-12-25T22:59")
    times = without(times, "2024-12-31T22:00", "2025-01-01T22:59")
    gaps = judge(times, "M1")  # type: ignore[operator]
    assert losses(gaps) == []
    assert {"holiday 2024-12-25", "holiday 2025-01-01"} <= set(names(gaps))


def test_a_whole_session_missing_is_a_holiday_and_a_part_of_one_is_not() -> None:
    times = market("2025-01-06T00:00", "2025-03-20T00:00", 900, close=3_600)
    whole = without(times, "2025-02-11T23:00", "2025-02-12T21:59")
    assert losses(told(whole, "M15")) == losses(lived(whole, "M15")) == []
    assert "holiday 2025-02-12" in names(told(whole, "M15"))
    more = without(times, "2025-02-11T20:00", "2025-02-12T21:59")
    assert losses(told(more, "M15")) == [
        ("2025-02-11T20:00", "2025-02-11T21:45", 8),
        ("2025-02-11T23:00", "2025-02-12T21:45", 92),
    ]


def test_a_young_series_is_judged_with_care() -> None:
    times = market("2025-02-10T08:00", "2025-02-26T00:00", 60)
    assert losses(lived(times, "M1")) == []  # its first weekend is known before it has seen one
    assert losses(lived(without(times, "2025-02-11T10:00", "2025-02-11T12:59"), "M1")) == [
        ("2025-02-11T10:00", "2025-02-11T12:59", 180)
    ]
    assert losses(lived(without(times, "2025-02-11T10:00", "2025-02-11T10:03"), "M1")) == []
    judged = lived(market("2025-02-10T08:00", "2025-02-15T00:00", 60, close=3_600), "M1")
    assert losses(judged) == []
    assert names(judged)["daily break 22:00–23:00"] == 4
    odd = lived(market("2025-02-10T09:00", "2025-02-14T00:00", 60, close=3_600, zone=ZoneInfo("Asia/Tokyo")), "M1")
    assert losses(odd) == [("2025-02-11T08:00", "2025-02-11T08:59", 60)]  # a break at such an hour is seen twice


def test_a_quiet_symbol_is_quiet() -> None:
    rng = np.random.default_rng(3)
    times = [ts for ts in market("2025-01-20T00:00", "2025-03-01T00:00", 600) if rng.random() < 0.5]
    assert len(losses(told(times, "M10"))) <= 1
    lost = told(without(times, "2025-02-18T10:00", "2025-02-18T15:50"), "M10")
    found = [g for g in lost if g.kind == "transport loss" and g.from_.date() == date(2025, 2, 18)]
    assert max(gap.count for gap in found) >= 36


def test_new_hours_are_learned() -> None:
    old = market("2025-01-06T00:00", "2025-02-10T00:00", 900)
    new = market("2025-02-10T00:00", "2025-04-20T00:00", 900, close=2 * HOUR)
    late = [gap for gap in lived([*old, *new], "M15") if gap.from_.date() > date(2025, 3, 5)]
    assert losses(late) == []


@pytest.mark.parametrize(
    ("timeframe", "times", "expected"),
    [
        ("MN1", ["2024-11-01", "2024-12-01", "2025-03-01"], ("2025-01-01", "2025-02-01", 2)),
        ("W1", ["2025-01-05", "2025-01-12", "2025-01-26"], ("2025-01-19", "2025-01-19", 1)),
        ("D1", [f"2025-01-{d:02}" for d in range(6, 31) if d % 7 not in (4, 5) and d not in (22, 23)], ("2025-01-22", "2025-01-23", 2)),
    ],
)  # fmt: skip
def test_long_bars(timeframe: str, times: list[str], expected: tuple[str, str, int]) -> None:
    moments = [at(f"{day}T00:00") for day in times]
    found = [(first[:10], last[:10], count) for first, last, count in losses(told(moments, timeframe))]
    assert found == [expected]


def test_a_hole_of_months_is_told_as_one_loss() -> None:
    times = [*market("2023-01-02T00:00", "2023-02-01T00:00", 60), *market("2024-01-02T00:00", "2024-01-03T00:00", 60)]
    gap = told(times, "M1")[-1]
    assert gap.kind == "transport loss"
    assert (gap.from_, gap.to) == (datetime(2023, 2, 1, tzinfo=UTC), datetime(2024, 1, 1, 23, 59, tzinfo=UTC))


# --- the calendar itself -------------------------------------------------------------------------------------------


def same(a: Calendar, b: Calendar) -> bool:
    return a.snapshot() == b.snapshot()


@given(st.data())
@settings(max_examples=25)
def test_any_cut_of_a_series_teaches_the_same(data: st.DataObject) -> None:
    step = data.draw(st.sampled_from([60, 900, 3_600]))
    timeframe = {60: "M1", 900: "M15", 3_600: "H1"}[step]
    times = market("2025-03-03T00:00", "2025-03-18T00:00", step, close=3_600)
    whole = Calendar(timeframe)
    learn(whole, times[0], holes(times, step), times[-1])
    cuts = sorted(data.draw(st.sets(st.integers(1, len(times) - 1), max_size=6)))
    parts = Calendar(timeframe)
    for lo, hi in pairwise([0, *cuts, len(times)]):
        for span in spans(times[lo:hi], step):
            parts.observe(*span)
    assert same(whole, parts)
    at_rest = msgspec.json.decode(msgspec.json.encode(parts.snapshot()), type=Snapshot)
    assert same(Calendar.restore(at_rest), whole)


def test_late_bars_teach_as_if_they_had_come_in_time() -> None:
    times = market("2025-03-03T00:00", "2025-03-18T00:00", 60)
    whole, late = Calendar("M1"), Calendar("M1")
    learn(whole, times[0], holes(times, 60), times[-1])
    cut = without(times, "2025-03-11T10:00", "2025-03-11T12:59")
    learn(late, cut[0], holes(cut, 60), cut[-1])
    assert not same(whole, late)
    late.observe(at("2025-03-11T10:00"), at("2025-03-11T12:59"))
    assert same(whole, late)


@given(
    st.sampled_from(TIMEFRAMES),
    st.integers(0, 400),
    st.integers(1, 300),
    st.sampled_from(["UTC", "Europe/Athens", "Asia/Kolkata"]),
)
@settings(max_examples=120)
def test_verdicts_cover_a_hole_without_overlap(timeframe: str, start: int, length: int, zone: str) -> None:
    clock = UTC_CLOCK if zone == "UTC" else zone_clock(zone)
    step = SECONDS[timeframe]
    calendar = Calendar(timeframe, clock)
    after = clock.to_utc(at("2025-01-01T00:00")) if step > HOUR else at("2025-01-01T00:00")
    calendar.observe(after, after)
    for _ in range(start % 7):
        after = calendar.following(after)
        calendar.observe(after, after)
    before = after
    for _ in range(min(length, 60 if step > HOUR else length) + 1):
        before = calendar.following(before)
    gaps = classify(calendar, after, before)
    assert int(gaps[0].from_.timestamp()) == calendar.following(after)
    assert int(gaps[-1].to.timestamp()) == calendar.previous(before)
    for one, other in pairwise(gaps):
        assert calendar.following(int(one.to.timestamp())) == int(other.from_.timestamp())
    calendar.observe(before, before)
    assert calendar.head == before


def test_holidays() -> None:
    assert [easter(year) for year in (1961, 2000, 2024, 2025, 2038)] == [
        date(1961, 4, 2),
        date(2000, 4, 23),
        date(2024, 3, 31),
        date(2025, 4, 20),
        date(2038, 4, 25),
    ]
    closed = [
        f"{date(2025, m, d):%m-%d}"
        for m in range(1, 13)
        for d in range(1, 29)
        if is_closed_day(datetime(2025, m, d, tzinfo=UTC))
    ]
    assert closed == ["01-01", "04-18", "12-25"]
    for day in (
        (2025, 1, 20),
        (2025, 2, 17),
        (2025, 5, 26),
        (2025, 9, 1),
        (2025, 11, 27),
        (2025, 11, 28),
        (2025, 4, 21),
    ):
        assert is_short_day(datetime(*day, tzinfo=UTC))
    assert not is_short_day(datetime(2025, 3, 3, tzinfo=UTC))
