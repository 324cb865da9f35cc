"""Stale or only closed: made-up markets of any timeframe, young series, and the real ones minute by minute."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.core.files import decode_lines, read_bars
from actors.core.freshness import ENDED, LIVE, freshness, is_due, is_live
from actors.core.sessions import Calendar, learn
from schema.timeframes import SECONDS

MINUTE, HOUR, DAY, WEEK = 60, 3_600, 86_400, 7 * 86_400
NEW_YORK = ZoneInfo("America/New_York")
PATIENCE = 180.0


def at(text: str) -> int:
    return int(datetime.fromisoformat(f"{text}+00:00").timestamp())


def is_open(ts: int) -> bool:
    """The week of foreign exchange: Sunday 17:00 to Friday 17:00 in New York, an hour's pause each day."""
    there = datetime.fromtimestamp(ts, NEW_YORK)
    if there.hour == 17 or there.weekday() == 5:
        return False
    return there.hour >= 18 if there.weekday() == 6 else there.weekday() < 4 or there.hour < 17


def market(start: int, end: int, step: int = MINUTE) -> list[int]:
    hours = [ts for ts in range(start // HOUR * HOUR, end, HOUR) if is_open(ts)]
    return [ts for hour in hours for ts in range(hour, hour + HOUR, step) if start <= ts < end]


def calendar_of(times: list[int], timeframe: str = "M1") -> Calendar:
    step = SECONDS[timeframe]
    made = Calendar(timeframe)
    holes = [(a, b) for a, b in pairwise(times) if b - a != step]
    learn(made, times[0], holes, times[-1])
    return made


LONG = market(at("2024-12-01"), at("2025-03-29"))
CALENDAR = calendar_of([ts for ts in LONG if ts < at("2025-02-15")])
CALM = [ts for ts in LONG if at("2025-02-09") <= ts < at("2025-02-15")]  # without any holiday
CHANGED = [
    ts for ts in LONG if at("2025-03-09") <= ts < at("2025-03-22")
]  # New York's clock has moved, Europe's has not


def outcome(calendar: Calendar, head: int, silence: int, ragged: int) -> None:
    """``ragged``: minutes beside a session's break of which nobody can say on which side they are."""
    now = head + 2 * MINUTE + silence
    found = freshness(calendar, head, now, PATIENCE)
    missing = sum(is_open(ts) for ts in range(head + MINUTE, int(now - PATIENCE) - MINUTE + 1, MINUTE))
    if not is_open(int(now - PATIENCE) // MINUTE * MINUTE):
        ragged = max(ragged, 80)  # once a session is over, its last hour may have been the clocks' change
    if missing == 0:
        assert found.state != "stale", found
    elif missing > ragged:
        assert found.state == "stale", found
        assert abs(found.missing - missing) <= 2 * ragged  # at both ends of a pause
        assert found.overdue == found.missing * MINUTE
    assert (found.state == "fresh") == (not is_due("M1", MINUTE, head, now, PATIENCE))


@given(st.sampled_from(CALM), st.integers(0, 2 * DAY))
@settings(max_examples=60)
def test_a_silent_market_is_stale_in_its_session_and_only_there(head: int, silence: int) -> None:
    outcome(CALENDAR, head, silence, ragged=20)


@given(st.sampled_from(CHANGED), st.integers(0, DAY))
@settings(max_examples=30)
def test_the_weeks_of_changing_clocks_cost_an_hour_at_most(head: int, silence: int) -> None:
    outcome(calendar_of([ts for ts in LONG if ts <= head]), head, silence, ragged=80)


@pytest.mark.parametrize("timeframe", ["M5", "M15", "H1", "H4"])
def test_longer_bars_are_no_different(timeframe: str) -> None:
    step = SECONDS[timeframe]
    times = (
        market(at("2024-12-01"), at("2025-02-22"), step)
        if step <= HOUR
        else [
            ts
            for ts in range(at("2024-12-01"), at("2025-02-22"), step)
            if any(map(is_open, range(ts, ts + step, HOUR)))
        ]
    )
    calendar = calendar_of(times, timeframe)
    week = [ts for ts in times if ts >= at("2025-02-16")]
    for head, following in pairwise(week):
        # Just before the next bar is due nothing is wrong, however long the pause between.
        assert freshness(calendar, head, following + step + 1, PATIENCE).state != "stale", (head, following)
    wednesday = at("2025-02-19T08:00:00")
    assert freshness(calendar, wednesday, wednesday + 6 * step, PATIENCE).state == "stale"


def test_a_young_series_needs_a_longer_silence_and_knows_weekends() -> None:
    young = [ts for ts in LONG if at("2025-01-08T10:00:00") <= ts < at("2025-01-10T22:00:00")]
    calendar, head = calendar_of(young), young[-1]
    sunday = at("2025-01-12T20:00:00")
    assert freshness(calendar, head, sunday, PATIENCE).state == "closed"
    half = young[: len(young) // 2]
    assert freshness(calendar_of(half), half[-1], half[-1] + 5 * MINUTE, PATIENCE).state in ("fresh", "quiet")
    assert freshness(calendar_of(half), half[-1], half[-1] + 20 * MINUTE, PATIENCE).state == "stale"


def test_without_any_history_half_an_hour_of_silence_is_stale() -> None:
    head = at("2025-03-19T10:00:00")
    assert freshness(Calendar("M1"), head, head + 5 * MINUTE, PATIENCE).state != "stale"
    assert freshness(Calendar("M1"), head, head + 45 * MINUTE, PATIENCE).state == "stale"


def test_a_day_without_a_bar_is_no_holiday_unless_it_is_a_known_one() -> None:
    tuesday = at("2025-02-11")
    head = max(ts for ts in LONG if ts < at("2025-02-10T22:00:00"))
    for hour in (8, 20, 22, 25):  # in its session, and after the whole of it
        assert freshness(CALENDAR, head, tuesday + hour * HOUR, PATIENCE).state == "stale", hour
    christmas = [ts for ts in LONG if ts < at("2024-12-24T18:00:00")]
    assert freshness(calendar_of(christmas), christmas[-1], at("2024-12-25T12:00:00"), PATIENCE).state == "closed"


def test_what_has_been_silent_for_weeks_has_ended() -> None:
    head = CALM[0]
    assert freshness(CALENDAR, head, head + ENDED - HOUR, PATIENCE).state == "stale"
    assert freshness(CALENDAR, head, head + ENDED + HOUR, PATIENCE).state == "ended"
    assert freshness(Calendar("MN1"), at("2025-01-01"), at("2025-03-05"), PATIENCE).state == "stale"


def test_a_bar_is_live_that_came_when_it_was_over() -> None:
    assert is_live(at("2025-03-19"), "D1", at("2025-03-20T00:59:00"))
    assert not is_live(at("2025-03-19"), "M1", at("2025-03-19") + LIVE + 61)
    assert is_live(at("2025-02-01"), "MN1", at("2025-03-01T00:10:00"))


@pytest.mark.parametrize("name", ["EURUSD_M1_202201.csv", "GBPUSD_M1_201202.csv"])
def test_real_feeds_raise_hardly_a_false_alarm(data: Path, name: str) -> None:
    """Each hole of a real file is judged minute by minute while it lasts, by what came before it alone."""
    file = data / name
    with file.open("rb") as stream:
        times = [int(row.ts.timestamp()) for rows in read_bars(decode_lines(iter(stream))) for row in rows]
    calendar, alarms, judged_from = Calendar("M1"), [], times[0] + WEEK
    for head, following in pairwise(times):
        calendar.observe(head, head)
        if following - head > 2 * MINUTE and head > judged_from:
            ends = np.unique(np.linspace(head + 2 * MINUTE, following + MINUTE, 6).astype(int))
            if any(freshness(calendar, head, float(end), PATIENCE).state == "stale" for end in ends):
                alarms.append(datetime.fromtimestamp(head, UTC))
    weeks = max(1.0, (times[-1] - judged_from) / WEEK)
    assert len(alarms) <= 1 + 0.5 * weeks, (len(alarms), weeks, alarms[:20])
