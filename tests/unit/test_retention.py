"""Retention over arbitrary calendars of backups."""

from __future__ import annotations

from datetime import date, timedelta

from hypothesis import given
from hypothesis import strategies as st

from actors.core.retention import Known, kept, to_delete

RULES = st.fixed_dictionaries(
    {
        "daily": st.integers(1, 10),
        "weekly": st.integers(1, 8),
        "monthly": st.integers(1, 14),
        "verified": st.integers(1, 5),
    }
)
DEFAULTS = {"daily": 7, "weekly": 4, "monthly": 12, "verified": 3}


@st.composite
def backups(draw: st.DrawFn) -> list[Known]:
    days = draw(st.lists(st.dates(date(2023, 12, 20), date(2026, 1, 10)), max_size=40))
    found = {}
    for day in days:
        time = draw(st.sampled_from(["", "-000001", "-041500", "-235959"]))
        known = Known(f"{day}{time}", draw(st.booleans()))
        found[known.name] = known
    return draw(st.permutations(list(found.values())))


@given(backups(), RULES)
def test_what_is_kept_is_there_and_the_newest_always_is(known: list[Known], rules: dict[str, int]) -> None:
    keep = kept(known, **rules)
    names = {one.name for one in known}
    assert keep <= names
    if names:
        assert max(names) in keep
    assert set(to_delete(known, **rules)) == names - keep
    assert list(to_delete(known, **rules)) == sorted(to_delete(known, **rules))


@given(backups(), RULES)
def test_never_fewer_verified_ones_than_asked_for(known: list[Known], rules: dict[str, int]) -> None:
    keep = kept(known, **rules)
    proved = sorted(one.name for one in known if one.verified)
    assert set(proved[-rules["verified"] :]) <= keep


@given(backups(), RULES)
def test_each_period_that_counts_keeps_its_newest(known: list[Known], rules: dict[str, int]) -> None:
    """Written the long way round: group, cut, and look for the newest of each group."""
    keep = kept(known, **rules)
    for count, form in ((rules["daily"], "%Y-%m-%d"), (rules["weekly"], "%G-%V"), (rules["monthly"], "%Y-%m")):
        groups: dict[str, list[str]] = {}
        for one in known:
            groups.setdefault(one.day.strftime(form), []).append(one.name)
        for period in sorted(groups)[-count:]:
            assert max(groups[period]) in keep


@given(backups(), RULES)
def test_nothing_is_kept_without_a_reason(known: list[Known], rules: dict[str, int]) -> None:
    assert len(kept(known, **rules)) <= sum(rules.values())


@given(backups(), backups(), RULES)
def test_pruning_often_keeps_what_pruning_seldom_keeps(
    old: list[Known], new: list[Known], rules: dict[str, int]
) -> None:
    together = {one.name: one for one in [*old, *new]}
    before = {one.name: together[one.name] for one in old}
    survivors = [one for one in before.values() if one.name in kept(before.values(), **rules)]
    pruned_between = {one.name: one for one in [*survivors, *(together[one.name] for one in new)]}
    assert kept(pruned_between.values(), **rules) == kept(together.values(), **rules)


def test_two_years_of_nights_come_down_to_a_week_a_month_and_a_year() -> None:
    """Pruned every night, as the agent does it."""
    first = date(2024, 1, 1)
    living: list[Known] = []
    for day in range(730):
        living.append(Known(str(first + timedelta(days=day))))
        keep = kept(living, **DEFAULTS)
        living = [one for one in living if one.name in keep]
    names = [one.name for one in living]
    assert names[-7:] == [str(date(2025, 12, 30) - timedelta(days=n)) for n in range(6, -1, -1)]
    # The last night of each of twelve months, and of four weeks (their Sundays, and this week so far).
    assert set(names) == {
        *names[-7:],
        "2025-12-28", "2025-12-21", "2025-12-14",
        "2025-01-31", "2025-02-28", "2025-03-31", "2025-04-30", "2025-05-31", "2025-06-30", "2025-07-31", "2025-08-31",
        "2025-09-30", "2025-10-31", "2025-11-30",
    }  # fmt: skip


def test_a_pause_of_a_year_deletes_nothing_of_before() -> None:
    before = [Known(f"2024-03-{day:02}") for day in range(1, 6)]
    assert kept([*before, Known("2025-06-01")], **DEFAULTS) == {one.name for one in before} | {"2025-06-01"}


def test_old_verified_ones_outlive_new_ones_that_nobody_has_verified() -> None:
    proved = [Known(f"2020-01-{day:02}", verified=True) for day in range(1, 6)]
    nights = [Known(str(date(2024, 1, 1) + timedelta(days=n))) for n in range(500)]
    keep = kept([*proved, *nights], **DEFAULTS)
    assert {"2020-01-03", "2020-01-04", "2020-01-05"} <= keep
    assert "2020-01-01" not in keep
