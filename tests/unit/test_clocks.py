"""What payloads teach about a sender's clock: fields, newest bars, week openings, and what is kept of it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from actors.core.clock import ClockAlert, Conversion, Timeline, timeline
from actors.core.clocks import Clocks, Series
from bus.ledger import zone_steps
from schema.clock import ClockBook, ClockLedger, PersonRule
from schema.settings import Clock

HOUR = 3_600
DAY = 86_400
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
BROKER = "Broker-Demo"


def utc(*parts: int) -> int:
    return int(datetime(*parts, tzinfo=UTC).timestamp())  # type: ignore[arg-type]


def by_rule(rule: str) -> Timeline:
    return timeline(ClockBook(at=EPOCH, rule=rule), zone_steps)


def clocks(*ledgers: ClockLedger, now: float = 0.0, **rules: Clock) -> Clocks:
    return Clocks(
        {BROKER if name == "broker" else name: rule for name, rule in rules.items()}, ledgers, zone_steps, now
    )


class Sender:
    """A terminal whose clock follows ``line``; ``fields`` says whether it sends its clock."""

    def __init__(self, to: Clocks, line: Timeline, *, fields: bool, source: str | None = BROKER) -> None:
        self.to, self.line, self.fields, self.source = to, line, fields, source
        self.alerts: list[ClockAlert] = []

    def send(self, now: float, bars: Series, *, replay: bool = False) -> Conversion:
        """``bars`` in UTC; they go out in the sender's clock."""
        series = {key: [self.line.to_server(at) for at in times] for key, times in bars.items()}
        conversion = self.to.resolve(
            self.source,
            server_time=self.line.to_server(int(now)) if self.fields else None,
            gmt_time=int(now) if self.fields else None,
            series=series,
            now=now,
            replay=replay,
        )
        self.alerts += conversion.alerts
        return conversion

    def right(self, now: float, bars: Series, *, replay: bool = False) -> bool:
        """Whether every bar of a payload is converted to the UTC time that it is of."""
        conversion = self.send(now, bars, replay=replay)
        return all(
            conversion.to_utc(self.line.to_server(at), timeframe) == at
            for (_, timeframe), times in bars.items()
            for at in times
        )


def minutes(now: float, count: int = 3, *, symbol: str = "EURUSD") -> Series:
    """The newest ``count`` minutes, the forming one last."""
    newest = int(now) // 60 * 60
    return {(symbol, "M1"): [newest - 60 * i for i in range(count - 1, -1, -1)]}


def kinds(alerts: list[ClockAlert]) -> list[str]:
    return [alert.kind for alert in alerts]


# --- rules -------------------------------------------------------------------------------------------------------


def test_a_rule_of_the_settings_is_in_force_from_the_first_payload() -> None:
    sender = Sender(clocks(broker=Clock(rule="new_york+7")), by_rule("new_york+7"), fields=False)
    now = utc(2025, 2, 13, 10, 0, 30)
    assert sender.right(now, minutes(now, 5_000))
    assert sender.send(now, minutes(now)).ts_source == "rule"
    assert sender.alerts == []


def test_a_rule_that_the_fields_contradict_holds_and_is_told() -> None:
    sender = Sender(clocks(broker=Clock(rule="+02:00")), by_rule("+03:00"), fields=True)
    now = utc(2025, 7, 13, 10)
    conversion = sender.send(now, minutes(now))
    assert conversion.to_utc(now) == now - 2 * HOUR
    assert kinds(sender.alerts) == ["contradiction"]
    sender.send(now + 60, minutes(now + 60))
    assert kinds(sender.alerts) == ["contradiction"]  # not with every payload


def test_a_rule_that_cannot_be_used_is_told_with_its_place() -> None:
    with pytest.raises(ValueError, match=r'clock\."Broker-Demo"\.rule: there is no time zone "Mars/Base"'):
        clocks(broker=Clock(rule="Mars/Base"))
    with pytest.raises(ValueError, match=r'clock\."Broker-Demo"\.grid: "7pm" is no rule'):
        clocks(broker=Clock(grid="7pm"))


def test_a_sender_in_utc_may_name_the_grid_of_its_broker() -> None:
    known = clocks(broker=Clock(grid="new_york+7"))
    opened = utc(2025, 7, 14, 21)
    conversion = known.resolve(
        BROKER, server_time=None, gmt_time=None, series={("EURUSD", "D1"): [opened]}, now=opened + DAY + 5
    )
    assert conversion.on_grid(opened, "D1")
    assert conversion.to_utc(opened, "D1") == opened
    assert conversion.end(opened, "D1") == opened + DAY
    assert conversion.ts_source == "utc"


# --- clock fields ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", ["-05:00", "+00:00", "+02:00", "+05:45"])
def test_clock_fields_give_the_offset_of_now(offset: str) -> None:
    sender = Sender(clocks(), by_rule(offset), fields=True)
    now = utc(2025, 2, 13, 10, 0, 30)
    assert sender.right(now, minutes(now, 500))
    assert sender.send(now, minutes(now)).ts_source == "server"
    assert sender.alerts == []


def test_fields_that_lie_a_few_minutes_off_are_rounded_to_quarters() -> None:
    known = clocks()
    now = utc(2025, 2, 13, 10)
    for seconds in (-300, 0, 449):
        conversion = known.resolve(
            None, server_time=now + 2 * HOUR + seconds, gmt_time=now, series={("X", "M1"): [now + 2 * HOUR]}, now=now
        )
        assert conversion.to_utc(now + 2 * HOUR) == now


def test_a_computer_whose_clock_is_wrong_is_told_once_but_not_in_a_replay() -> None:
    now = utc(2025, 2, 13, 10)
    for seconds, replay, expected in (
        (299, False, []),
        (301, False, ["skew"]),
        (-900, False, ["skew"]),
        (9_999, True, []),
    ):
        known = clocks()
        found = [
            alert.kind
            for _ in range(3)
            for alert in known.resolve(
                BROKER,
                server_time=now + seconds + 2 * HOUR,
                gmt_time=now + seconds,
                series=minutes(now + seconds + 2 * HOUR),
                now=now,
                replay=replay,
            ).alerts
        ]
        assert found == expected


def test_an_offset_that_no_broker_has_is_not_used() -> None:
    known = clocks()
    now = utc(2025, 2, 13, 10)
    conversion = known.resolve(
        BROKER, server_time=now + 20 * HOUR, gmt_time=now, series={("X", "M1"): [now - 60]}, now=now
    )
    assert kinds(list(conversion.alerts)) == ["implausible"]
    assert conversion.to_utc(now - 60) == now - 60


@pytest.mark.parametrize("rule", ["new_york+7", "Europe/Athens", "+03:00"])
def test_two_years_of_live_payloads(rule: str) -> None:
    """Some payloads a day with clock fields, weekends left out: every bar is where it belongs, changes included."""
    sender = Sender(clocks(), by_rule(rule), fields=True)
    start = utc(2023, 3, 6)
    for day in range(730):
        if (start // DAY + day + 4) % 7 in (6, 0):
            continue
        for hour in (0, 7, 14, 21):
            now = start + day * DAY + hour * HOUR + 30
            bars = {**minutes(now, 5), ("EURUSD", "H1"): [now // HOUR * HOUR - HOUR]}
            assert sender.right(now, bars), datetime.fromtimestamp(now, UTC)
    assert sender.alerts == []


@pytest.mark.parametrize("rule", ["new_york+7", "Europe/Athens"])
def test_minutes_around_a_change_in_a_market_that_never_closes(rule: str) -> None:
    line = by_rule(rule)
    for change in [at for at in line.starts if utc(2024, 1, 1) < at < utc(2026, 1, 1)]:
        sender = Sender(clocks(), line, fields=True)
        for now in range(change - 3 * HOUR, change + 3 * HOUR, 60):
            opened = now - 60
            assert sender.right(now + 1, {("BTCUSD", "M1"): [opened]}), datetime.fromtimestamp(now, UTC)
        assert sender.alerts == []


@pytest.mark.parametrize("rule", ["new_york+7", "Europe/Athens"])
def test_a_replay_of_two_years_teaches_the_clock_by_its_fields(rule: str) -> None:
    """Blocks of 5,000 minutes, cut anywhere, with the clock of each block's end."""
    sender = Sender(clocks(), by_rule(rule), fields=True, source=None)
    wall = utc(2026, 5, 1)
    line = sender.line
    for now in range(utc(2024, 1, 10), utc(2025, 12, 20), 5_000 * 60):
        times = [at for at in range(now - 5_000 * 60, now, 1_800) if not line.second_pass(at)]
        conversion = sender.to.resolve(
            None,
            server_time=line.to_server(now),
            gmt_time=now,
            series={("EURUSD", "M1"): [line.to_server(at) for at in times]},
            now=wall,
            replay=True,
        )
        # The first pass of autumn's hour counts wherever the block reaches beyond it.
        assert [conversion.to_utc(line.to_server(at), "M1") for at in times if not _doubtful(line, at)] == [
            at for at in times if not _doubtful(line, at)
        ]


def _doubtful(line: Timeline, at: int) -> bool:
    return line.to_utc(line.to_server(at), second=True) != at


def test_history_sent_with_the_clock_of_now_is_assumed_before_the_last_change() -> None:
    sender = Sender(clocks(), by_rule("new_york+7"), fields=True)
    now = utc(2025, 7, 10, 9)
    old = {("EURUSD", "H1"): [utc(2024, 1, 10) + HOUR * i for i in range(1_000)]}
    conversion = sender.send(now, old)
    assert conversion.assumed
    assert conversion.assumed_until == utc(2025, 3, 30, 1)
    assert conversion.to_utc(sender.line.to_server(old["EURUSD", "H1"][0]), "H1") == old["EURUSD", "H1"][0]
    assert sender.send(now + 1, minutes(now)).ts_source == "server"


def test_two_terminals_under_one_name_are_told_and_converted_each_by_its_own_clock() -> None:
    known = clocks()
    one, other = Sender(known, by_rule("+02:00"), fields=True), Sender(known, by_rule("+05:00"), fields=True)
    now = utc(2025, 2, 13, 10)
    for i in range(50):
        assert one.right(now + 20 * i, minutes(now + 20 * i))
        assert other.right(now + 20 * i + 10, minutes(now + 20 * i + 10))
    assert kinds(one.alerts) == []
    assert kinds(other.alerts) == ["two_clocks"]
    (ledger,) = known.take_unsaved()
    assert [seen.offset for seen in ledger.book.runs] == [2 * HOUR]


def test_a_clock_that_was_set_is_taken_over_once_it_persists() -> None:
    known = clocks()
    now = utc(2025, 2, 13, 10)
    before, after = Sender(known, by_rule("+02:00"), fields=True), Sender(known, by_rule("+03:00"), fields=True)
    for i in range(10):
        before.send(now + 60 * i, minutes(now + 60 * i))
    for i in range(10, 30):
        assert after.right(now + 60 * i, minutes(now + 60 * i, 1))
    assert kinds(after.alerts) == ["two_clocks", "changed"]
    assert known.line(BROKER).offset_at(now) == 2 * HOUR
    assert known.line(BROKER).offset_at(now + 3_000) == 3 * HOUR


# --- the newest bar ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeframe", ["M1", "M5", "M15", "H1"])
@pytest.mark.parametrize("offset", range(-12, 15))
def test_the_offset_is_inferred_from_the_first_newest_bar(offset: int, timeframe: str) -> None:
    length = {"M1": 60, "M5": 300, "M15": 900, "H1": HOUR}[timeframe]
    line = by_rule(f"{offset:+d}")
    for late in (1, 7, 44):  # seconds after the bar opened
        sender = Sender(clocks(), line, fields=False)
        opened = utc(2025, 2, 13, 10)
        now = opened + late
        bars = {("EURUSD", timeframe): [opened - length, opened]}
        if offset > (0 if length <= 900 else 1):
            assert sender.right(now, bars)
            assert kinds(sender.alerts) == ["inferred"]
            assert sender.send(now + 1, minutes(now)).ts_source == "inferred"
        elif offset <= 0:  # a bar that is not ahead is no clue
            conversion = sender.send(now, bars)
            assert conversion.ts_source == "utc"
            assert kinds(sender.alerts) == []


@given(
    offset=st.integers(2, 14 * 4 - 1),
    age=st.integers(0, 118),
    skew=st.integers(-240, 240),
    minute=st.integers(0, 500_000),
)
def test_closed_and_forming_bars_and_clocks_a_few_minutes_off_give_the_same_offset(
    offset: int, age: int, skew: int, minute: int
) -> None:
    opened = utc(2025, 2, 3) + 60 * minute
    sender = Sender(clocks(), by_rule(f"+{offset // 4}:{offset % 4 * 15:02d}"), fields=False)
    assert sender.right(opened + age + skew, {("EURUSD", "M1"): [opened]})


def test_one_bar_from_the_future_is_no_clock() -> None:
    now = utc(2025, 2, 13, 10)
    # In a payload whose other bars fit UTC:
    sender = Sender(clocks(), by_rule("utc"), fields=False)
    bars = minutes(now, 10)
    bars["EURUSD", "M1"] = [*bars["EURUSD", "M1"], now + 2 * HOUR]  # type: ignore[index]
    assert sender.send(now, bars).ts_source == "utc"
    # From a source whose bars have fitted UTC:
    sender.send(now + 60, minutes(now + 60))
    assert sender.send(now + 61, {("EURUSD", "M1"): [now + 2 * HOUR]}).ts_source == "utc"
    # Further ahead than any broker:
    fresh = Sender(clocks(), by_rule("utc"), fields=False)
    assert fresh.send(now, {("EURUSD", "M1"): [now + 15 * HOUR]}).ts_source == "utc"
    assert sender.alerts == fresh.alerts == []


def test_a_replay_infers_nothing_from_its_bars() -> None:
    now = utc(2025, 2, 13, 10)
    sender = Sender(clocks(), by_rule("+02:00"), fields=False)
    assert sender.send(now, minutes(now), replay=True).ts_source == "utc"
    assert sender.alerts == []


def test_an_inferred_clock_follows_the_usual_daylight_saving() -> None:
    sender = Sender(clocks(), by_rule("new_york+7"), fields=False)
    change = utc(2025, 3, 9, 7)
    for now in range(change - 3 * DAY, change + 3 * DAY, 300):
        if change - 2 * DAY < now < change + 15 * HOUR:
            continue  # the weekend
        assert sender.right(now, minutes(now))
    assert kinds(sender.alerts) == ["inferred"]


def test_an_inferred_clock_that_changes_otherwise_is_noticed_after_ten_bars() -> None:
    """Europe changes its clocks in autumn a week before New York does: bars seem to be an hour late."""
    sender = Sender(clocks(), by_rule("Europe/Athens"), fields=False)
    change = utc(2025, 10, 26, 1)
    for now in range(change - 3 * DAY, change - 2 * DAY, 60):
        assert sender.right(now, minutes(now))
    monday = change + 21 * HOUR
    rights = [sender.right(now, minutes(now, 1)) for now in range(monday, monday + HOUR, 60)]
    assert not rights[0]
    assert rights.index(True) <= 11
    assert all(rights[12:])
    assert kinds(sender.alerts) == ["inferred", "changed"]


def test_clock_fields_go_over_what_was_inferred() -> None:
    known = clocks()
    now = utc(2025, 7, 10, 9)
    line = by_rule("+02:00")
    Sender(known, line, fields=False).send(now, minutes(now))
    sender = Sender(known, line, fields=True)
    assert sender.send(now + 60, minutes(now)).ts_source == "server"
    assert [seen.origin for seen in known.take_unsaved()[0].book.runs] == ["fields"]


# --- week openings -----------------------------------------------------------------------------------------------


def weeks(first_sunday: int, count: int, *, delay: int = 0) -> Iterator[tuple[int, int]]:
    """(opening, close) of weeks of foreign exchange in UTC: Sunday to Friday 17:00 New York."""
    new_york = by_rule("new_york")
    for week in range(count):
        sunday = first_sunday + week * 7 * DAY
        yield new_york.to_utc(sunday + 17 * HOUR) + delay, new_york.to_utc(sunday + 5 * DAY + 17 * HOUR)


def week_bars(opening: int, close: int) -> Series:
    """The bars around a week's opening, sent with it: enough to see the weekend before the next."""
    return {("EURUSD", "M1"): [opening + 60 * i for i in range(5)] + [close - 60 * i for i in range(5, 0, -1)]}


@pytest.mark.parametrize("rule", ["new_york+7", "Europe/Athens", "+02:00"])
@pytest.mark.parametrize("first", [utc(2025, 2, 9), utc(2025, 9, 14)])
def test_the_family_is_known_after_eight_openings_around_a_change(rule: str, first: int) -> None:
    """Seven openings say nothing, the eighth does; the weeks in which New York and Europe differ are among them."""
    line = by_rule(rule)
    known = clocks()
    sender = Sender(known, line, fields=True)
    learned: list[int] = []
    for number, (opening, close) in enumerate(weeks(first, 9)):
        sender.send(close, week_bars(opening, close))
        if "learned" in kinds(sender.alerts) and not learned:
            learned.append(number)
    assert learned == [8]  # the first week's opening has no weekend before it that was seen
    ledger = known.take_unsaved()[0]
    assert ledger.book.family == {"new_york+7": "new_york+7", "Europe/Athens": "london+2", "+02:00": "+02:00"}[rule]
    for at in range(utc(2019, 1, 1), utc(2027, 1, 1), 37 * HOUR):
        assert known.line(BROKER).offset_at(at) == line.offset_at(at)
    assert known.line(BROKER).kind_at(utc(2020, 1, 1)) == "inferred"


@pytest.mark.parametrize("rule", ["new_york+7", "Europe/Athens"])
def test_history_sent_at_once_tells_the_family_too(rule: str) -> None:
    line = by_rule(rule)
    known = clocks()
    sender = Sender(known, line, fields=False)
    for opening, close in weeks(utc(2024, 9, 15), 30):
        conversion = sender.send(utc(2025, 7, 10), week_bars(opening, close))
        assert conversion.ts_source == "utc"  # nothing is ahead yet
    now = utc(2025, 7, 10, 9)
    assert sender.right(now, minutes(now))
    assert kinds(sender.alerts) == ["inferred", "learned"]
    history = {("EURUSD", "H1"): [utc(2023, 1, 3) + 13 * HOUR * i for i in range(900)]}
    assert sender.right(now, history)
    assert sender.send(now, history).ts_source == "inferred"


def test_openings_that_lie_around_no_change_tell_nothing() -> None:
    sender = Sender(clocks(), by_rule("new_york+7"), fields=True)
    for opening, close in weeks(utc(2025, 4, 6), 25):
        sender.send(close, week_bars(opening, close))
    assert sender.alerts == []


def test_a_symbol_that_opens_later_or_follows_another_market_does_not_mislead() -> None:
    sender = Sender(clocks(), by_rule("Europe/Athens"), fields=True)
    frankfurt = by_rule("Europe/Berlin")
    for (opening, close), (later, _) in zip(
        weeks(utc(2025, 2, 9), 12), weeks(utc(2025, 2, 9), 12, delay=HOUR), strict=True
    ):
        monday = frankfurt.to_utc((opening + 3 * HOUR) // DAY * DAY + 9 * HOUR)
        gold = week_bars(later, close)["EURUSD", "M1"]
        sender.send(close, {("XAUUSD", "M1"): gold, ("DE40", "M1"): week_bars(monday, close)["EURUSD", "M1"]})
    assert kinds(sender.alerts) == ["learned"]
    assert sender.alerts[0].details == {"rule": "london+2"}


def test_a_market_that_never_closes_has_no_openings() -> None:
    sender = Sender(clocks(), by_rule("new_york+7"), fields=True)
    for now in range(utc(2025, 2, 9), utc(2025, 4, 30), 4 * HOUR):
        sender.send(now, {("BTCUSD", "H1"): [now - HOUR * i for i in range(4, 0, -1)]})
    assert "learned" not in kinds(sender.alerts)


# --- books -------------------------------------------------------------------------------------------------------


def test_what_was_learned_survives_a_restart() -> None:
    known = clocks()
    sender = Sender(known, by_rule("Europe/Athens"), fields=True)
    for opening, close in weeks(utc(2025, 2, 9), 6):
        sender.send(close, week_bars(opening, close))
    stored = msgspec.json.encode(known.take_unsaved()[0])
    again = clocks(msgspec.json.decode(stored, type=ClockLedger))
    assert again.line(BROKER) == known.line(BROKER)
    sender = Sender(again, by_rule("Europe/Athens"), fields=True)
    for opening, close in weeks(utc(2025, 3, 23), 4):
        sender.send(close, week_bars(opening, close))
    assert kinds(sender.alerts) == ["learned"]  # of openings before and after


def test_nothing_is_written_that_is_not_new() -> None:
    known = clocks()
    sender = Sender(known, by_rule("+02:00"), fields=True)
    now = utc(2025, 2, 13, 10)
    sender.send(now, minutes(now))
    assert len(known.take_unsaved()) == 1
    for i in range(1, 3_000):
        sender.send(now + i, minutes(now + i))
    assert known.take_unsaved() == []
    sender.send(now + HOUR, minutes(now + HOUR))
    (ledger,) = known.take_unsaved()  # "still so" is written once an hour
    assert len(ledger.books) == 2
    assert ledger.book.runs[0].until == now + HOUR


def test_a_book_begins_whenever_times_are_converted_differently() -> None:
    known = clocks()
    now = utc(2025, 2, 13, 10) + 0.25
    sender = Sender(known, by_rule("+02:00"), fields=False)
    sender.send(now, minutes(now))
    (ledger,) = known.take_unsaved()
    utc_book, inferred = ledger.books
    assert utc_book.runs == ()
    assert inferred.at.timestamp() == now
    # The settings get a rule: the gateway starts again.
    again = clocks(ledger, now=now + 100, broker=Clock(rule="+02:00"))
    (ruled,) = again.take_unsaved()
    assert [book.rule for book in ruled.books] == [None, None, "+02:00"]
    assert again.line(BROKER).kind_at(int(now)) == "rule"
    # And loses it.
    last = clocks(ruled, now=now + 200).take_unsaved()[0]
    assert [book.rule for book in last.books] == [None, None, "+02:00", None]


def test_what_a_person_says_is_in_force_from_the_moment_it_is_taken_over() -> None:
    known = clocks()
    now = utc(2025, 7, 13, 10)
    sender = Sender(known, by_rule("+03:00"), fields=True)
    sender.send(now, minutes(now))
    (ledger,) = known.take_unsaved()
    said = ClockBook(
        at=datetime.fromtimestamp(now + 5, UTC),
        persons=(PersonRule(rule="+02:00"),),
        runs=ledger.book.runs,
        adopted=False,
    )
    known.adopt(msgspec.structs.replace(ledger, books=(*ledger.books, said)), now + 9.5)
    (taken,) = known.take_unsaved()
    assert taken.book.adopted
    assert taken.book.at.timestamp() == now + 9.5
    assert known.line(BROKER).offset_at(now) == 2 * HOUR


@settings(max_examples=25)
@example([(1, 0, True, False), (0, 2, True, False), (601, 1, True, False), (2, 1, True, False)])
@given(
    st.lists(
        st.tuples(st.integers(0, 3_000_000), st.integers(-12, 14), st.booleans(), st.booleans()),
        min_size=1,
        max_size=25,
    )
)
def test_whatever_comes_books_stay_in_order_and_payloads_with_fields_are_converted_by_them(
    payloads: list[tuple[int, int, bool, bool]],
) -> None:
    known = clocks()
    start = utc(2025, 2, 1)
    for at, offset, fields, replay in payloads:
        now = start + at
        conversion = known.resolve(
            BROKER,
            server_time=now + offset * HOUR if fields else None,
            gmt_time=now if fields else None,
            series={("EURUSD", "M1"): [now + offset * HOUR]},
            now=now,
            replay=replay,
        )
        if fields:
            assert conversion.to_utc(now + offset * HOUR) == now
    for ledger in known.take_unsaved():
        assert all(a.at <= b.at for a, b in pairwise(ledger.books))
        assert all(a.until < b.since for a, b in pairwise(ledger.book.runs))
        assert msgspec.json.decode(msgspec.json.encode(ledger), type=ClockLedger) == ledger


@pytest.mark.parametrize("ahead", [-120, -2, 2, 120], ids=lambda seconds: f"{seconds} s ahead")
def test_a_computer_some_seconds_off_does_not_move_a_change(ahead: int) -> None:
    """Its last word before a change may carry a time after it: the change is the broker's, and so is its clock."""
    line, change = by_rule("Europe/Athens"), utc(2025, 10, 26, 1)
    to, bar = clocks(), {("EURUSD", "M1"): [change]}
    for moment in [*range(change - 300, change, 20), change - 1, *range(change + 61, change + 300, 20)]:
        conversion = to.resolve(
            BROKER,
            server_time=line.to_server(moment),
            gmt_time=moment + ahead,
            series={key: [line.to_server(at) for at in times] for key, times in bar.items()},
            now=float(moment),
        )
    assert conversion.to_utc(line.to_server(change), "M1") == change
    book = next(ledger.books[-1] for ledger in to.take_unsaved())
    assert timeline(book, zone_steps).offset_at(change - 1) == 3 * HOUR
    assert timeline(book, zone_steps).offset_at(change) == 2 * HOUR
