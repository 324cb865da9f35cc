"""Tables partitioned by time: how far they reach, and which partitions come next."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

_BOUND: Final = re.compile(r"FOR VALUES FROM \('([^']+)'\) TO \('([^']+)'\)")
MOST: Final = 400  # that are made at a time: a year of days


class Span(NamedTuple):
    """A partition's bounds: the first is in it, the last is not."""

    lower: datetime
    upper: datetime


def span(bound: str) -> Span | None:
    """A bound as ``pg_get_expr`` writes it; None for a default partition and for what is not bounded by times."""
    found = _BOUND.fullmatch(bound)
    if found is None:
        return None
    try:
        lower, upper = (_time(text) for text in found.groups())
    except ValueError:  # numbers or texts
        return None
    return Span(lower, upper)


def _time(text: str) -> datetime:
    at = datetime.fromisoformat(text)
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def newest(rows: Iterable[tuple[str, str]]) -> dict[str, Span]:
    """Each partitioned table's last partition, of pairs of a table and the bound of one of its partitions."""
    found: dict[str, Span] = {}
    for parent, bound in rows:
        one = span(bound)
        if one is not None and (parent not in found or one.upper > found[parent].upper):
            found[parent] = one
    return found


def following(last: Span, until: datetime) -> list[Span]:
    """The partitions after ``last``, as long as that one, until ``until`` is inside; whole months follow whole months."""
    made: list[Span] = []
    months = _months(last)
    while last.upper <= until and len(made) < MOST:
        upper = _add_months(last.upper, months) if months else last.upper + (last.upper - last.lower)
        last = Span(last.upper, upper)
        made.append(last)
    return made


def _months(one: Span) -> int:
    """How many whole months a partition is of; 0 where its bounds are no months' beginnings."""
    for at in one:
        if at.day != 1 or at - at.replace(hour=0, minute=0, second=0, microsecond=0) > timedelta():
            return 0
    return (one.upper.year - one.lower.year) * 12 + one.upper.month - one.lower.month


def _add_months(at: datetime, months: int) -> datetime:
    year, month = divmod(at.year * 12 + at.month - 1 + months, 12)
    return at.replace(year=year, month=month + 1)
