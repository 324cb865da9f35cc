"""Maintenance windows: whether alerts of a check are held back at a time.

A window is what the clocks of its zone show: in autumn's repeated hour it lasts as long as they do, and one that would
begin within the hour that spring skips begins as much later and lasts as long as it is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from typing import Final
from zoneinfo import ZoneInfo

from schema.settings import Maintenance

DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_DAY: Final = timedelta(days=1)


def muted(windows: Mapping[str, Maintenance], check: str, at: datetime) -> bool:
    """Whether one of ``windows`` that is for ``check`` is open at ``at`` (aware).

    Raises:
        ValueError: a naive time, or a window whose times or zone cannot be read (settings are checked when they are loaded).
    """
    if at.tzinfo is None:
        raise ValueError("muted needs an aware time")
    return any(covers(window.checks, check) and is_open(window, at) for window in windows.values())


def covers(names: tuple[str, ...], check: str) -> bool:
    """Whether ``check`` is one of ``names`` or below one (``feed`` is every ``feed.…``); no names mean all."""
    return not names or any(is_within(check, name) for name in names)


def is_within(check: str, name: str) -> bool:
    return check == name or check.startswith(f"{name}.")


def is_open(window: Maintenance, at: datetime) -> bool:
    """Whether ``at`` lies within the window, its end excluded."""
    local = at.astimezone(_zone(window.zone))
    # A window of today, or of yesterday that has passed midnight; one that spring moved may reach a little further.
    return any(_covers_day(window, day, local) for day in (local.date(), local.date() - _DAY))


def _covers_day(window: Maintenance, day: date, local: datetime) -> bool:
    if window.days and DAYS[day.weekday()] not in window.days:
        return False
    midnight = datetime.combine(day, time())
    start = midnight + _since_midnight(window.start)
    end = midnight + _since_midnight(window.end)
    if end <= start:
        end += _DAY
    skipped = _skipped(start, window.zone)
    return start + skipped <= local.replace(tzinfo=None) < end + skipped


def _skipped(start: datetime, zone: str) -> timedelta:
    """By how much the zone's clocks jump over ``start``; zero where they show it."""
    there = start.replace(tzinfo=_zone(zone))
    return there.astimezone(UTC).astimezone(_zone(zone)).replace(tzinfo=None) - start


def _since_midnight(text: str) -> timedelta:
    """``"22:30"``; ``"24:00"`` is the end of a day."""
    hours, _, minutes = text.partition(":")
    return timedelta(hours=int(hours), minutes=int(minutes))


@lru_cache(maxsize=64)
def _zone(name: str) -> ZoneInfo:
    return ZoneInfo(name)
