"""A check's figures against slow and obvious oracles."""

from __future__ import annotations

import math
import statistics

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.core.health_stats import HOLD, Look, figures, summarise
from schema.health import Status

NUMBERS = st.floats(-1e9, 1e9, allow_nan=False)
STATUSES = st.sampled_from(["ok", "warning", "critical", "skipped"])


def looks_of(gaps: list[tuple[int, Status, float | None]], start: int) -> list[Look]:
    at, out = float(start), []
    for gap, status, value in gaps:
        at += gap
        out.append(Look(at, status, value, abs(value or 0.0)))
    return out


LOOKS = st.lists(st.tuples(st.integers(1, 2_000), STATUSES, st.none() | NUMBERS), max_size=12)


@given(st.lists(NUMBERS, min_size=1))
def test_figures_are_those_of_the_values(values: list[float]) -> None:
    found = figures(values)
    assert found is not None
    assert found.minimum == min(values)
    assert found.maximum == max(values)
    assert math.isclose(found.average, statistics.fmean(values), rel_tol=1e-9, abs_tol=1e-6)
    assert found.minimum <= found.average <= found.maximum
    assert found.p95 in values
    assert sum(value <= found.p95 for value in values) >= 0.95 * len(values)
    assert sum(value < found.p95 for value in values) < 0.95 * len(values)


def test_nothing_has_no_figures() -> None:
    assert figures([]) is None
    assert summarise("x", [], since=0, until=10).uptime is None


@given(LOOKS, st.integers(-1_000, 8_000), st.integers(1, 2_500))
@settings(max_examples=50)
def test_uptime_is_what_stands_second_by_second(
    gaps: list[tuple[int, Status, float | None]], since: int, length: int
) -> None:
    looks, until = looks_of(gaps, 0), since + length
    found = summarise("x", looks, since=since, until=until)
    stands = {"ok": 0, "warning": 0, "critical": 0, "skipped": 0}
    for second in range(since, until):
        last = next((one for one in reversed(looks) if one.at <= second), None)
        if last is not None and second < last.at + HOLD:
            stands[last.status] += 1
    seconds = stands["ok"] + stands["warning"] + stands["critical"]
    assert found.seconds == seconds
    if seconds:
        assert found.uptime == (stands["ok"] + stands["warning"]) / seconds
        assert found.quiet == stands["ok"] / seconds
    else:
        assert found.uptime is found.quiet is None
    inside = [one for one in looks if since <= one.at < until]
    assert found.count == len(inside)
    assert [found.ok, found.warning, found.critical, found.skipped] == [
        sum(one.status == status for one in inside) for status in ("ok", "warning", "critical", "skipped")
    ]
    assert found.value == figures(one.value for one in inside if one.status != "skipped" and one.value is not None)


@given(LOOKS, st.integers(0, 10_000))
def test_a_monitor_that_was_away_says_nothing_of_that_time(
    gaps: list[tuple[int, Status, float | None]], away: int
) -> None:
    before = looks_of(gaps, 0)
    last = before[-1].at if before else 0.0
    after = looks_of(gaps, int(last + HOLD + away))
    until = (after[-1].at if after else last) + HOLD
    whole = summarise("x", [*before, *after], since=0, until=until)
    halves = [summarise("x", part, since=0, until=until) for part in (before, after)]
    assert math.isclose(whole.seconds, sum(half.seconds for half in halves))
