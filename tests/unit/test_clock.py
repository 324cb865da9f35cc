"""A sender's clock: rules, offsets over time, bar ends and grids, against zoneinfo."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.core.clock import AS_UTC, Conversion, Timeline, timeline
from actors.core.timeframe import bar_end, on_grid
from bus.ledger import zone_steps
from schema.clock import ClockBook, ClockRule, ClockRun, PersonRule, offset_text, parse_rule, rule_text
from schema.timeframes import SECONDS, TIMEFRAMES

HOUR = 3_600
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
RULES = {"new_york+7": ("America/New_York", 7), "Europe/Athens": ("Europe/Athens", 0)}


def utc(*parts: int) -> int:
    return int(datetime(*parts, tzinfo=UTC).timestamp())  # type: ignore[arg-type]


def shown(zone: str, shift: int, at: int) -> int:
    """What a clock that follows a zone shows at a UTC time: the oracle."""
    local = datetime.fromtimestamp(at, ZoneInfo(zone)).replace(tzinfo=None) + timedelta(hours=shift)
    return int((local.replace(tzinfo=UTC) - EPOCH).total_seconds())


def by_rule(rule: str) -> Timeline:
    return timeline(ClockBook(at=EPOCH, rule=rule), zone_steps)


def changes(rule: str, start: int = utc(2023, 1, 1), end: int = utc(2027, 1, 1)) -> list[int]:
    line = by_rule(rule)
    return [at for at in line.starts if start <= at < end]


# --- rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("Europe/Athens", ClockRule("Europe/Athens")),
        ("new_york+7", ClockRule("America/New_York", 7 * HOUR)),
        ("New_York + 7", ClockRule("America/New_York", 7 * HOUR)),
        ("America/New_York+7", ClockRule("America/New_York", 7 * HOUR)),
        ("new_york", ClockRule("America/New_York")),
        ("london+2", ClockRule("Europe/London", 2 * HOUR)),
        ("Asia/Kolkata-0:30", ClockRule("Asia/Kolkata", -1_800)),
        ("Etc/GMT-3", ClockRule("Etc/GMT-3")),
        ("America/Port-au-Prince", ClockRule("America/Port-au-Prince")),
        ("+02:00", ClockRule(None, 2 * HOUR)),
        ("utc+2", ClockRule(None, 2 * HOUR)),
        ("GMT-5", ClockRule(None, -5 * HOUR)),
        ("2", ClockRule(None, 2 * HOUR)),
        ("+5:30", ClockRule(None, 19_800)),
        ("-0330", ClockRule(None, -12_600)),
        ("utc", ClockRule(None)),
    ],
)
def test_a_rule_is_read(text: str, rule: ClockRule) -> None:
    assert parse_rule(text) == rule
    assert parse_rule(rule_text(rule.zone, rule.shift)) == rule


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no rule for a clock"),
        ("Europe/Athens+", "no rule for a clock"),
        ("two hours", "no rule for a clock"),
        ("+15:00", "from -12:00 to"),
        ("-13", "from -12:00 to"),
        ("+02:07", "quarters of an hour"),
        ("new_york+20", "more than 14 hours"),
        ("new_york+7:10", "quarters of an hour"),
    ],
)
def test_what_is_no_rule_is_told(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_rule(text)


def test_an_unknown_zone_is_told() -> None:
    with pytest.raises(ValueError, match='there is no time zone "Europe/Atens"'):
        zone_steps("Europe/Atens")
    with pytest.raises(ValueError, match="there is no time zone"):
        zone_steps("../etc/passwd")


@pytest.mark.parametrize("zone", ["America/New_York", "Europe/Athens", "Europe/London", "Australia/Lord_Howe", "UTC"])
def test_a_zones_table_is_zoneinfos(zone: str) -> None:
    line = Timeline([(at, offset, "rule") for at, offset in zone_steps(zone)])
    for at in range(utc(1990, 1, 1), utc(2040, 1, 1), 17 * HOUR):
        assert line.to_server(at) == shown(zone, 0, at), datetime.fromtimestamp(at, UTC)


# --- to UTC and back ---------------------------------------------------------------------------------------------

TIMES = st.integers(utc(2005, 1, 1) // 60, utc(2035, 1, 1) // 60).map(lambda minute: minute * 60)


@given(TIMES, st.sampled_from(sorted(RULES)))
def test_there_and_back(at: int, rule: str) -> None:
    line = by_rule(rule)
    server = line.to_server(at)
    assert server == shown(*RULES[rule], at)
    back = line.to_utc(server)
    if line.second_pass(at):
        assert back == at - HOUR  # the first offset holds
        assert line.to_utc(server, second=True) == at
    else:
        assert back == at
    assert Conversion(line).to_utc(server) == back


@given(st.lists(TIMES, min_size=1, max_size=30), st.sampled_from(sorted(RULES)))
def test_a_conversion_agrees_with_its_timeline_in_any_order(times: list[int], rule: str) -> None:
    line = by_rule(rule)
    conversion = Conversion(line)
    for at in times:
        server = line.to_server(at)
        assert conversion.to_utc(server) == line.to_utc(server)
        for timeframe in ("M1", "H1", "H4", "D1"):
            opened = server - server % SECONDS[timeframe]
            end = line.end(line.to_utc(opened), opened, timeframe)
            assert conversion.end(opened, timeframe) == end
            assert conversion.bar(opened, timeframe) == (line.to_utc(opened), end)
            assert conversion.bar(opened + 30, timeframe) is None


@given(st.sampled_from(sorted(RULES)), st.sampled_from(TIMEFRAMES), TIMES)
def test_a_bar_ends_after_it_opens_and_when_the_next_one_opens(rule: str, timeframe: str, at: int) -> None:
    line = by_rule(rule)
    server = line.to_server(at)
    opened = _floor(server, timeframe)
    start = line.to_utc(opened)
    end = line.end(start, opened, timeframe)
    assert start < end <= start + SECONDS[timeframe] + HOUR
    over = bar_end(opened, timeframe)
    if SECONDS[timeframe] > HOUR:
        # The clock has reached the next step, and has not shown it before.
        assert line.to_server(end) >= over
        assert line.to_server(end - 60) < over


def _floor(server: int, timeframe: str) -> int:
    if timeframe == "MN1":
        return int(datetime.fromtimestamp(server, UTC).replace(day=1, hour=0, minute=0, second=0).timestamp())
    first = 3 * 86_400 if timeframe == "W1" else 0
    return server - (server - first) % SECONDS[timeframe]


@pytest.mark.parametrize("rule", sorted(RULES))
def test_minutes_around_every_change(rule: str) -> None:
    line = by_rule(rule)
    assert len(changes(rule)) == 8
    for change in changes(rule):
        conversion = Conversion(line)
        ends: list[int] = []
        for at in range(change - 26 * HOUR, change + 26 * HOUR, 60):
            server = shown(*RULES[rule], at)
            second = line.second_pass(at)
            assert conversion.to_utc(server) == at - (HOUR if second else 0)
            assert conversion.on_grid(server, "M1")
            if not second:
                end = conversion.end(server, "M1")
                assert end == at + 60
                ends.append(end)
        assert ends == sorted(ends)


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("timeframe", ["H4", "D1"])
def test_long_bars_over_four_years(rule: str, timeframe: str) -> None:
    """The broker opens a bar whenever its clock passes a step: the oracle walks that clock hour by hour."""
    opened: list[tuple[int, int]] = []
    seen: set[int] = set()
    for at in range(utc(2023, 1, 1), utc(2027, 1, 1), HOUR):
        server = shown(*RULES[rule], at)
        step = server - server % SECONDS[timeframe]
        if step not in seen and (server == step or opened):
            seen.add(step)
            opened.append((at, step))
    conversion = Conversion(by_rule(rule))
    lengths: dict[int, int] = {}
    for (at, server), (following, _) in pairwise(opened):
        assert conversion.to_utc(server, timeframe) == at
        assert conversion.on_grid(server, timeframe)
        assert not conversion.on_grid(server + HOUR, timeframe)
        assert conversion.end(server, timeframe) == following
        lengths[(following - at) // HOUR] = lengths.get((following - at) // HOUR, 0) + 1
    usual = SECONDS[timeframe] // HOUR
    assert set(lengths) == {usual - 1, usual, usual + 1}
    assert lengths[usual - 1] == lengths[usual + 1] == 4


def test_weeks_and_months() -> None:
    conversion = Conversion(by_rule("new_york+7"))
    sunday = utc(2025, 3, 9)  # the clock goes forward within this week
    assert conversion.on_grid(sunday, "W1")
    assert not conversion.on_grid(sunday + 86_400, "W1")
    assert conversion.end(sunday, "W1") - conversion.to_utc(sunday, "W1") == 7 * 86_400 - HOUR
    march = utc(2025, 3, 1)
    assert conversion.on_grid(march, "MN1")
    assert conversion.to_utc(march, "MN1") == utc(2025, 2, 28, 22)
    assert conversion.end(march, "MN1") == utc(2025, 3, 31, 21)


def test_an_hour_that_is_there_twice() -> None:
    line = by_rule("Europe/Athens")
    change = utc(2025, 10, 26, 1)
    server = utc(2025, 10, 26, 3, 30)
    first, second = change - HOUR // 2, change + HOUR // 2
    assert Conversion(line).to_utc(server) == first
    # The payload's clock decides: what would lie in its future cannot be the second pass.
    assert Conversion(line, now=second + 30).to_utc(server) == second
    assert Conversion(line, now=second - 60).to_utc(server) == first
    assert Conversion(line, now=first + 60).to_utc(server) == first
    assert Conversion(line, now=change + 2 * HOUR).to_utc(server) == second
    assert Conversion(line, now=change + 86_400).to_utc(server) == first  # long over: both passes are possible
    assert Conversion(line, now=second + 30).end(server, "M1") == second + 60
    # A bar longer than the hour is one bar; it began in the first pass and is the longer for it.
    early = utc(2025, 10, 26, 0)
    assert Conversion(line, now=second + 30).end(early, "H4") - Conversion(line).to_utc(early, "H4") == 5 * HOUR


def test_an_hour_that_is_missing_goes_by_the_offset_before() -> None:
    line = by_rule("Europe/Athens")
    assert Conversion(line).to_utc(utc(2025, 3, 30, 3, 30)) == utc(2025, 3, 30, 1, 30)
    assert Conversion(line).to_utc(utc(2025, 3, 30, 4)) == utc(2025, 3, 30, 1)


def test_bars_of_a_sender_in_utc_may_follow_a_brokers_day() -> None:
    conversion = Conversion(None, grid=by_rule("new_york+7"))
    for midnight in (utc(2025, 1, 14, 22), utc(2025, 7, 14, 21)):
        assert conversion.on_grid(midnight, "D1")
        assert conversion.to_utc(midnight, "D1") == midnight
        assert conversion.end(midnight, "D1") == midnight + 86_400
        assert not conversion.on_grid(midnight + HOUR, "D1")
        assert conversion.on_grid(midnight + 4 * HOUR, "H4")
    assert conversion.end(utc(2025, 3, 8, 22), "D1") == utc(2025, 3, 9, 21)
    assert not conversion.on_grid(utc(2025, 1, 15), "D1")
    assert conversion.on_grid(utc(2025, 1, 15, 3, 7), "M1")


@given(TIMES, st.sampled_from(TIMEFRAMES))
def test_without_any_clue_times_are_utc(at: int, timeframe: str) -> None:
    assert AS_UTC.to_utc(at, timeframe) == at
    assert AS_UTC.end(at, timeframe) == bar_end(at, timeframe)
    assert AS_UTC.on_grid(at, timeframe) == on_grid(at, timeframe)
    assert AS_UTC.ts_source == "utc"
    assert AS_UTC.assumed_until is None


def test_a_candle_costs_less_than_two_microseconds() -> None:
    line = by_rule("new_york+7")
    start = utc(2025, 3, 7)
    times = [line.to_server(start + 60 * i) for i in range(5_000)]  # over the change of March 9
    best = 9.9
    for _ in range(5):
        conversion = Conversion(line)
        began = time.perf_counter()
        for server in times:
            conversion.bar(server, "M1")
        best = min(best, time.perf_counter() - began)
    assert best / len(times) < 2e-6


# --- books -------------------------------------------------------------------------------------------------------


def run(since: int, until: int, offset: int, origin: str = "fields") -> ClockRun:
    return ClockRun(since=since, until=until, offset=offset * HOUR, origin=origin)  # type: ignore[arg-type]


def test_a_person_goes_over_the_settings_and_these_over_observations() -> None:
    moved = utc(2024, 6, 1)
    book = ClockBook(
        at=EPOCH,
        rule="new_york+7",
        persons=(PersonRule(rule="+03:00", since=moved),),
        runs=(run(utc(2024, 1, 1), utc(2024, 2, 1), 5),),
    )
    line = timeline(book, zone_steps)
    assert line.offset_at(utc(2024, 1, 10)) == 2 * HOUR
    assert line.offset_at(moved - 1) == 3 * HOUR
    assert {line.offset_at(at) for at in range(moved, moved + 400 * 86_400, 86_400)} == {3 * HOUR}
    assert set(line.kinds) == {"rule"}


def test_a_change_between_two_observations_is_dated_by_the_rule_that_explains_it() -> None:
    new_york, europe = utc(2025, 3, 9, 7), utc(2025, 3, 30, 1)
    for change, before, after in ((new_york, 2, 3), (europe, 2, 3)):
        runs = (
            run(change - 40 * 86_400, change - 50 * HOUR, before),
            run(change + 20 * HOUR, change + 30 * HOUR, after),
        )
        line = timeline(ClockBook(at=EPOCH, runs=runs), zone_steps)
        assert line.offset_at(change - 1) == before * HOUR
        assert line.offset_at(change) == after * HOUR
    # Nothing explains a change in July: it counts from the first observation that shows it.
    runs = (run(utc(2025, 7, 1), utc(2025, 7, 2), 2), run(utc(2025, 7, 20), utc(2025, 7, 21), 3))
    line = timeline(ClockBook(at=EPOCH, runs=runs), zone_steps)
    assert line.offset_at(utc(2025, 7, 20) - 1) == 2 * HOUR
    assert line.offset_at(utc(2025, 7, 20)) == 3 * HOUR


def test_history_before_the_first_observation_is_assumed_until_the_family_is_known() -> None:
    seen = run(utc(2025, 6, 10), utc(2025, 6, 11), 3)
    line = timeline(ClockBook(at=EPOCH, runs=(seen,)), zone_steps)
    # No clock changes between the last change of Europe and the observation: that much is certain.
    assert line.kind_at(utc(2025, 3, 30, 1)) == "server"
    assert line.kind_at(utc(2025, 3, 30, 1) - 1) == "assumed"
    assert Conversion(line).assumed_until == utc(2025, 3, 30, 1)
    assert line.offset_at(utc(2025, 1, 10)) == 2 * HOUR  # as most brokers do
    learned = timeline(ClockBook(at=EPOCH, runs=(seen,), family="+03:00"), zone_steps)
    assert learned.offset_at(utc(2025, 1, 10)) == 3 * HOUR
    assert learned.kind_at(utc(2025, 1, 10)) == "inferred"
    assert Conversion(learned).assumed_until is None


def test_what_a_newest_bar_implies_reaches_back_a_day() -> None:
    at = utc(2025, 6, 10)
    line = timeline(ClockBook(at=EPOCH, runs=(run(at, at, 3, "inferred"),)), zone_steps)
    assert line.kind_at(at - 86_000) == "inferred"
    assert line.kind_at(at - 87_000) == "assumed"


def test_a_known_family_fills_what_nobody_observed() -> None:
    runs = (run(utc(2024, 8, 1), utc(2024, 8, 2), 3), run(utc(2025, 5, 1), utc(2025, 5, 2), 3))
    line = timeline(ClockBook(at=EPOCH, runs=runs, family="new_york+7"), zone_steps)
    assert line.offset_at(utc(2025, 1, 1)) == 2 * HOUR
    assert line.offset_at(utc(2025, 12, 1)) == 2 * HOUR


def test_offsets_are_spelled_for_people() -> None:
    assert [offset_text(x) for x in (0, 7_200, -19_800)] == ["+00:00", "+02:00", "-05:30"]
