from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.core.schedule import Schedule, parse_schedule

SATURDAY = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)


def test_daily_runs_today_or_tomorrow() -> None:
    schedule = parse_schedule("13:30")
    assert schedule == Schedule(13, 30)
    assert schedule.next_run(SATURDAY) == datetime(2026, 1, 31, 13, 30, tzinfo=UTC)
    assert parse_schedule("11:00").next_run(SATURDAY) == datetime(2026, 2, 1, 11, 0, tzinfo=UTC)


def test_weekly_runs_on_its_day() -> None:
    schedule = parse_schedule("sat 06:00")
    assert schedule.next_run(SATURDAY) == datetime(2026, 2, 7, 6, 0, tzinfo=UTC)
    assert schedule.next_run(SATURDAY - timedelta(days=3)) == datetime(2026, 1, 31, 6, 0, tzinfo=UTC)


def test_the_very_moment_counts_as_run() -> None:
    schedule = parse_schedule("12:00")
    assert schedule.next_run(SATURDAY) == SATURDAY + timedelta(days=1)


def test_other_zones_are_converted_and_naive_times_refused() -> None:
    schedule = parse_schedule("13:30")
    assert schedule.next_run(SATURDAY.astimezone(timezone(timedelta(hours=5)))) == schedule.next_run(SATURDAY)
    with pytest.raises(ValueError, match="aware"):
        schedule.next_run(datetime(2026, 1, 1))  # noqa: DTZ001


@given(
    st.integers(0, 23),
    st.integers(0, 59),
    st.none() | st.integers(0, 6),
    st.datetimes(timezones=st.just(UTC)).filter(lambda t: t.year < 9999),
)
def test_next_run_is_the_first_later_match(hour: int, minute: int, weekday: int | None, after: datetime) -> None:
    run = Schedule(hour, minute, weekday).next_run(after)
    assert (run.hour, run.minute, run.second, run.microsecond) == (hour, minute, 0, 0)
    assert weekday in (None, run.weekday())
    assert timedelta(0) < run - after <= timedelta(days=1 if weekday is None else 7)


@pytest.mark.parametrize("text", ["", "6:00", "24:00", "12:60", "Foo 12:00", "Saturday 12:00", "12:00 UTC", "daily"])
def test_bad_text_says_what_is_wanted(text: str) -> None:
    with pytest.raises(ValueError, match='"HH:MM" or "Sat HH:MM"'):
        parse_schedule(text)
