"""Maintenance windows: days, midnight and the hours that daylight saving skips and repeats."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.core.windows import DAYS, covers, is_open, muted
from schema.settings import Maintenance

ATHENS = ZoneInfo("Europe/Athens")
NEW_YORK = ZoneInfo("America/New_York")
MINUTE = timedelta(minutes=1)


def at(text: str, zone: ZoneInfo | None = None) -> datetime:
    """``"2026-03-29 04:30"``; in UTC where no zone is given."""
    return datetime.fromisoformat(text).replace(tzinfo=zone or UTC)


def open_minutes(window: Maintenance, start: datetime, hours: int) -> list[datetime]:
    """The minutes of UTC within the window, from ``start`` on."""
    start = start.astimezone(UTC)
    return [now for n in range(hours * 60) if is_open(window, now := start + n * MINUTE)]


def test_a_window_holds_its_start_and_not_its_end() -> None:
    window = Maintenance(start="03:00", end="03:30")
    minutes = open_minutes(window, at("2026-01-05 00:00"), 24)
    assert (minutes[0], minutes[-1], len(minutes)) == (at("2026-01-05 03:00"), at("2026-01-05 03:29"), 30)


def test_a_window_past_midnight_belongs_to_the_day_on_which_it_begins() -> None:
    window = Maintenance(start="22:00", end="02:00", days=("Sat",))
    minutes = open_minutes(window, at("2026-01-05 00:00"), 7 * 24)  # from a Monday on
    assert (minutes[0], minutes[-1], len(minutes)) == (at("2026-01-10 22:00"), at("2026-01-11 01:59"), 4 * 60)


def test_a_whole_day_and_a_whole_weekend() -> None:
    window = Maintenance(start="00:00", end="24:00", days=("Sat", "Sun"))
    minutes = open_minutes(window, at("2026-01-05 00:00"), 7 * 24)
    assert (minutes[0], minutes[-1], len(minutes)) == (at("2026-01-10 00:00"), at("2026-01-11 23:59"), 48 * 60)


def test_the_day_is_the_zone_s_own() -> None:
    window = Maintenance(start="00:30", end="01:30", zone="Asia/Tokyo", days=("Mon",))
    assert is_open(window, at("2026-01-04 15:30"))  # a Sunday in UTC
    assert not is_open(window, at("2026-01-05 15:30"))


def test_times_are_given_in_any_zone_and_naive_ones_refused() -> None:
    windows = {"night": Maintenance(start="22:00", end="06:00", zone="Europe/Athens")}
    assert muted(windows, "database", at("2026-07-01 23:00", ATHENS).astimezone(NEW_YORK))
    with pytest.raises(ValueError, match="aware"):
        muted(windows, "database", datetime(2026, 7, 1, 23))  # noqa: DTZ001


def test_the_window_follows_daylight_saving() -> None:
    window = Maintenance(start="22:00", end="23:00", zone="Europe/Athens")
    assert open_minutes(window, at("2026-01-05 00:00"), 24)[0] == at("2026-01-05 20:00")
    assert open_minutes(window, at("2026-07-06 00:00"), 24)[0] == at("2026-07-06 19:00")


# Clocks in Athens jump from 03:00 to 04:00 at 01:00 UTC on 29 March 2026 and back from 04:00 at 01:00 UTC on 25 October.


@pytest.mark.parametrize(
    ("start", "end", "first", "minutes"),
    [
        ("03:00", "04:00", "01:00", 60),  # all of it is skipped: an hour later, as long as it is written
        ("03:30", "04:30", "01:30", 60),
        ("03:15", "03:45", "01:15", 30),
        ("02:00", "03:30", "00:00", 60),  # begins before: ends where its end would be
        ("02:00", "05:00", "00:00", 120),  # three hours of the clock are two
        ("22:00", "06:00", "20:00", 7 * 60),
    ],
)
def test_the_hour_that_spring_skips(start: str, end: str, first: str, minutes: int) -> None:
    window = Maintenance(start=start, end=end, zone="Europe/Athens")
    day = at("2026-03-28 12:00")
    found = open_minutes(window, day, 24)
    date_ = "2026-03-28" if start == "22:00" else "2026-03-29"
    assert found[0] == at(f"{date_} {first}")
    assert len(found) == minutes
    assert found == [found[0] + n * MINUTE for n in range(minutes)]


@pytest.mark.parametrize(
    ("start", "end", "first", "minutes"),
    [
        ("03:00", "04:00", "00:00", 120),  # the clock shows it twice
        ("03:30", "03:45", "00:30", 30),  # and so does a piece of it, an hour apart
        ("02:00", "05:00", "23:00", 240),
        ("22:00", "06:00", "19:00", 9 * 60),
    ],
)
def test_the_hour_that_autumn_repeats(start: str, end: str, first: str, minutes: int) -> None:
    window = Maintenance(start=start, end=end, zone="Europe/Athens")
    found = open_minutes(window, at("2026-10-24 12:00"), 24)
    assert f"{found[0]:%H:%M}" == first
    assert len(found) == minutes


def test_which_checks_a_window_is_for() -> None:
    assert covers((), "database")
    assert covers(("feed", "disk.home"), "feed.M1.EURUSD.m")
    assert covers(("feed.M1",), "feed.M1.EURUSD")
    assert not covers(("feed.M1",), "feed.M15.EURUSD")
    assert not covers(("disk.home",), "disk.homes")
    windows = {
        "a": Maintenance(start="00:00", end="24:00", checks=("feed",)),
        "b": Maintenance(start="03:00", end="04:00", checks=("database",)),
    }
    assert muted(windows, "feed.M1.EURUSD", at("2026-01-05 12:00"))
    assert muted(windows, "database.size", at("2026-01-05 03:00"))
    assert not muted(windows, "database.size", at("2026-01-05 12:00"))
    assert not muted({}, "database", at("2026-01-05 12:00"))


TIMES = st.times().map(lambda t: f"{t:%H:%M}")
WINDOWS = st.builds(
    Maintenance,
    start=TIMES,
    end=TIMES | st.just("24:00"),
    zone=st.sampled_from(["UTC", "Europe/Athens", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe"]),
    days=st.lists(st.sampled_from(DAYS), unique=True).map(tuple),
).filter(lambda window: window.start != window.end)


@given(WINDOWS, st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC)))  # noqa: DTZ001
def test_on_a_day_without_a_change_of_clocks_it_is_what_the_clock_shows(window: Maintenance, now: datetime) -> None:
    zone = ZoneInfo(window.zone)
    local = now.astimezone(zone)
    nights = [datetime.combine(local.date() + timedelta(days=n), time(), zone).utcoffset() for n in (-1, 0, 1, 2)]
    if len(set(nights)) > 1:
        return

    def open_on(day: date, shown: str) -> bool:
        passes = window.end <= window.start
        wanted = not window.days or DAYS[day.weekday()] in window.days
        if day == local.date():
            return wanted and window.start <= shown and (passes or shown < window.end)
        return wanted and passes and shown < window.end

    shown = f"{local:%H:%M}"
    assert is_open(window, now) == (open_on(local.date(), shown) or open_on(local.date() - timedelta(days=1), shown))


@settings(max_examples=30)
@given(WINDOWS, st.dates(date(2025, 1, 1), date(2028, 1, 1)))
def test_every_window_of_every_day_opens_and_is_never_longer_than_a_day_and_its_repeated_hour(
    window: Maintenance, day: date
) -> None:
    """Also on the days when clocks change: none is lost, and none stays open."""
    if window.days and DAYS[day.weekday()] not in window.days:
        return
    alone = Maintenance(start=window.start, end=window.end, zone=window.zone, days=(DAYS[day.weekday()],))
    start = datetime.combine(day, time(), ZoneInfo(window.zone)).astimezone(UTC)
    found = open_minutes(alone, start, 51)
    assert 0 < len(found) <= 25 * 60
