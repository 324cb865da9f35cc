"""Partitions by time: their bounds as PostgreSQL writes them, and what follows them without a hole."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.core.partitions import MOST, Span, following, newest, span

TIMES = st.integers(631_152_000, 3_786_912_000).map(lambda at: datetime.fromtimestamp(at, UTC))  # 1990 to 2090


def bound(lower: str, upper: str) -> str:
    return f"FOR VALUES FROM ('{lower}') TO ('{upper}')"


@pytest.mark.parametrize(
    ("text", "upper"),
    [
        (bound("2025-01-01 00:00:00+00", "2025-02-01 00:00:00+00"), datetime(2025, 2, 1, tzinfo=UTC)),
        (bound("2025-01-01", "2025-01-02"), datetime(2025, 1, 2, tzinfo=UTC)),
        (bound("2025-01-01 02:00:00+02", "2025-01-02 02:00:00+02"), datetime(2025, 1, 2, tzinfo=UTC)),
    ],
)
def test_bounds_are_read(text: str, upper: datetime) -> None:
    found = span(text)
    assert found is not None
    assert found.upper == upper


@pytest.mark.parametrize("text", ["DEFAULT", bound("1", "2"), "FOR VALUES FROM (MINVALUE) TO ('2025-01-01')", ""])
def test_what_is_no_time_is_none(text: str) -> None:
    assert span(text) is None


def test_the_last_partition_of_each_table_counts() -> None:
    rows = [
        ("bars", bound("2025-01-01", "2025-02-01")),
        ("bars", bound("2025-02-01", "2025-03-01")),
        ("bars", "DEFAULT"),
        ("ticks", bound("2024-01-01", "2025-01-01")),
    ]
    assert {name: one.upper.month for name, one in newest(rows).items()} == {"bars": 3, "ticks": 1}


@given(TIMES, st.timedeltas(timedelta(minutes=1), timedelta(days=400)), st.timedeltas(timedelta(), timedelta(days=900)))
def test_they_follow_without_hole_or_overlap(lower: datetime, length: timedelta, ahead: timedelta) -> None:
    last = Span(lower, lower + length)
    until = last.upper + ahead
    made = following(last, until)
    chain = [last, *made]
    assert all(a.upper == b.lower for a, b in pairwise(chain))
    assert all(one.upper > one.lower for one in made)
    assert chain[-1].upper > until or len(made) == MOST
    assert not made or made[-1].lower <= until


@given(st.integers(1990, 2080), st.integers(1, 12), st.sampled_from([1, 3, 12]))
def test_months_are_followed_by_months(year: int, month: int, length: int) -> None:
    first = datetime(year, month, 1, tzinfo=UTC)
    index = year * 12 + month - 1 + length
    last = Span(first, datetime(index // 12, index % 12 + 1, 1, tzinfo=UTC))
    for one in following(last, last.upper + timedelta(days=800)):
        assert one.lower.day == one.upper.day == 1
        assert (one.upper.year - one.lower.year) * 12 + one.upper.month - one.lower.month == length
