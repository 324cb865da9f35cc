"""Days on which markets everywhere are closed, and days on which many open late or close early.

Known dates only make a hole that looks like a holiday one; they never close a market that has bars.
"""

from __future__ import annotations

from datetime import date, datetime, timedelta
from functools import lru_cache
from typing import Final

_FIXED_CLOSED: Final = ((1, 1), (12, 25))
# Eve and Boxing Day, New Year's Eve, Labour Day in Europe; Independence Day and its eve, Juneteenth in America.
_FIXED_SHORT: Final = ((12, 24), (12, 26), (12, 31), (5, 1), (7, 3), (7, 4), (6, 19))
# Two days of a hurricane, and days of mourning for a president.
_ONCE_SHORT: Final = (date(2012, 10, 29), date(2012, 10, 30), date(2018, 12, 5), date(2025, 1, 9))
_MONDAY: Final = 0
_THURSDAY: Final = 3


def easter(year: int) -> date:
    """Easter Sunday of the Gregorian calendar (Meeus, Jones and Butcher's algorithm)."""
    a, (b, c) = year % 19, divmod(year, 100)
    d, e = divmod(b, 4)
    g = (8 * b + 13) // 25
    h = (19 * a + b - d - g + 15) % 30
    i, k = divmod(c, 4)
    m = (32 + 2 * e + 2 * i - h - k) % 7
    n = (a + 11 * h + 22 * m) // 451
    month, day = divmod(h + m - 7 * n + 114, 31)
    return date(year, month, day + 1)


def _nth(year: int, month: int, weekday: int, n: int) -> date:
    first = date(year, month, 1)
    return first + timedelta(days=(weekday - first.weekday()) % 7 + 7 * (n - 1))


@lru_cache(maxsize=64)
def _closed(year: int) -> frozenset[date]:
    return frozenset({*(date(year, *day) for day in _FIXED_CLOSED), easter(year) - timedelta(days=2)})


@lru_cache(maxsize=64)
def _short(year: int) -> frozenset[date]:
    last_monday = max(d for d in (_nth(year, 5, _MONDAY, 4), _nth(year, 5, _MONDAY, 5)) if d.month == 5)
    thanksgiving = _nth(year, 11, _THURSDAY, 4)
    return frozenset(
        {
            *(date(year, *day) for day in _FIXED_SHORT),
            _nth(year, 1, _MONDAY, 3),  # Martin Luther King
            _nth(year, 2, _MONDAY, 3),  # Washington
            last_monday,  # Memorial Day
            _nth(year, 9, _MONDAY, 1),  # Labor Day
            thanksgiving,
            thanksgiving + timedelta(days=1),
            easter(year) + timedelta(days=1),
        }
    )


def is_closed_day(day: datetime) -> bool:
    """New Year, Good Friday, Christmas."""
    return day.date() in _closed(day.year)


def is_short_day(day: datetime) -> bool:
    """As :func:`is_closed_day`, or a day of short hours in America or Europe."""
    return day.date() in _closed(day.year) or day.date() in _short(day.year) or day.date() in _ONCE_SHORT
