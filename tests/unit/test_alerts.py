"""Alert rules: what opens, who is told, how often, and what explains what; then a model of all of it at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actors.core.alert_words import MOST_SHOWN, duration
from actors.core.alerts import (
    ABSENT,
    CAUSE_WAIT,
    EVENT_QUIET,
    LONGEST_STEP,
    MOST_NAMED,
    MOST_OF_A_KIND,
    MOST_WAIT,
    RECOVERY,
    UNJUDGED,
    AlertState,
    Incident,
    Step,
    advance,
    standing,
    tell,
)
from actors.core.causes import CAUSES, NEAR, explaining, group_of, near
from actors.core.windows import muted
from schema.health import KINDS, SEVERITIES, CheckResult, Notice, Severity, Status
from schema.messages import Alert
from schema.settings import Alerts, Maintenance, Rule

START = datetime(2026, 1, 5, 12, tzinfo=UTC)  # a Monday
ROUND = 30.0
STEP = LONGEST_STEP.total_seconds()
RULES = Alerts()


def result(check: str, status: Status, at: datetime, message: str = "") -> CheckResult:
    return CheckResult(check=check, status=status, at=at, message=message or f"it is {status}")


class Monitor:
    """The rules at work: a clock of its own, and what has been told. Every step goes through JSON."""

    def __init__(self, rules: Alerts = RULES, start: datetime = START) -> None:
        self.rules = rules
        self.now = start
        self.state = AlertState()
        self.told: list[Notice] = []
        self.incidents: list[Incident] = []

    def round(self, statuses: dict[str, Status], seconds: float = ROUND) -> list[Notice]:
        self.now += timedelta(seconds=seconds)
        return self.take([result(check, status, self.now) for check, status in statuses.items()])

    def rounds(self, count: int, seconds: float = ROUND, **statuses: Status) -> list[Notice]:
        return [notice for _ in range(count) for notice in self.round(dict(statuses), seconds)]

    def take(self, results: Sequence[CheckResult]) -> list[Notice]:
        step = advance(self.state, results, self.now, self.rules)
        self.state = reread(step.state)
        self.told += step.notices
        self.incidents += step.incidents
        return list(step.notices)


def reread(state: AlertState) -> AlertState:
    return msgspec.json.decode(msgspec.json.encode(state), type=AlertState)


def kinds(notices: Iterable[Notice]) -> list[tuple[str, str]]:
    """Kind and main check of each."""
    return [(notice.kind, notice.checks[0]) for notice in notices]


# --- opening and closing -----------------------------------------------------------------------------------------


def test_failures_in_a_row_open_and_successes_in_a_row_close_with_one_notice_each() -> None:
    monitor = Monitor(Alerts(after=3, clear=2))
    monitor.rounds(2, database="critical")
    monitor.rounds(1, database="ok")
    monitor.rounds(2, database="critical")
    assert monitor.told == []  # never three in a row
    monitor.rounds(2, database="critical")
    (opened,) = monitor.told
    assert (opened.kind, opened.severity, opened.checks) == ("opened", "critical", ("database",))
    assert opened.title == "database: it is critical"
    assert opened.lines == ("Since 2026-01-05 12:02:00 UTC.", "database (critical): it is critical")
    monitor.rounds(1, database="ok")
    monitor.rounds(1, database="critical")
    monitor.rounds(1, database="ok")
    assert len(monitor.told) == 1
    monitor.rounds(1, database="ok")
    assert kinds(monitor.told) == [("opened", "database"), ("closed", "database")]
    closed = monitor.told[1]
    assert closed.incident == opened.incident
    assert closed.lines == ("It lasted 3 min 30 s, since 2026-01-05 12:02:00 UTC.", "database: it is ok")
    assert monitor.incidents[0] == Incident(
        id=opened.incident,
        opened_at=START + timedelta(minutes=2),
        closed_at=None,
        severity="critical",
        title="database: it is critical",
        checks=("database",),
    )
    assert monitor.incidents[1] == msgspec.structs.replace(monitor.incidents[0], closed_at=monitor.now)
    assert monitor.state == AlertState(at=monitor.now, opened=1, watches=monitor.state.watches)
    monitor.rounds(1, seconds=RULES.flap_seconds, database="ok")
    assert monitor.state == AlertState(at=monitor.now, opened=1)  # a healthy system is remembered by nothing


def test_an_incident_waits_for_what_fails_with_it() -> None:
    monitor = Monitor(Alerts(group_seconds=45))
    monitor.rounds(2, **{"feed.M1.A": "critical"})
    monitor.rounds(1, **{"feed.M1.A": "critical", "feed.M1.B": "critical"})
    assert monitor.told == []
    monitor.rounds(1, **{"feed.M1.A": "critical", "feed.M1.B": "critical"})
    (opened,) = monitor.told
    assert opened.checks == ("feed.M1.A", "feed.M1.B")
    assert opened.title == "feed.M1.A: it is critical (and 1 more)"
    monitor.rounds(2, **{"feed.M1.A": "ok", "feed.M1.B": "critical"})
    assert len(monitor.told) == 1
    monitor.rounds(2, **{"feed.M1.A": "ok", "feed.M1.B": "ok"})
    assert kinds(monitor.told) == [("opened", "feed.M1.A"), ("closed", "feed.M1.A")]


def test_without_a_wait_it_is_told_at_once() -> None:
    monitor = Monitor(Alerts(after=1, group_seconds=0))
    assert kinds(monitor.round({"outbox": "warning"})) == [("opened", "outbox")]


def test_what_is_over_before_it_was_told_is_kept_and_not_told() -> None:
    monitor = Monitor(Alerts(after=1, clear=1))
    monitor.rounds(1, database="critical")
    monitor.rounds(1, seconds=10, database="ok")
    monitor.rounds(20, database="ok")
    assert monitor.told == []
    (incident,) = monitor.incidents
    assert (incident.title, incident.closed_at) == ("database: it is critical", START + timedelta(seconds=40))


def test_time_passes_without_results_too() -> None:
    monitor = Monitor()
    monitor.rounds(2, database="critical")
    assert monitor.rounds(1, seconds=19) == []
    assert kinds(monitor.rounds(1, seconds=1)) == [("opened", "database")]


def test_nothing_unrelated_is_told_together() -> None:
    monitor = Monitor()
    monitor.rounds(3, **{"disk.home": "warning", "certificate.web": "warning", "runner.x": "critical"})
    assert sorted(kinds(monitor.told)) == [
        ("opened", "certificate.web"),
        ("opened", "disk.home"),
        ("opened", "runner.x"),
    ]
    assert len({notice.incident for notice in monitor.told}) == 3


def test_skipped_says_nothing_for_or_against() -> None:
    monitor = Monitor()
    monitor.rounds(1, database="critical")
    monitor.rounds(5, database="skipped")
    monitor.rounds(2, database="critical")
    assert len(monitor.told) == 1
    monitor.rounds(1, database="ok")
    monitor.rounds(5, database="skipped")
    assert len(monitor.told) == 1
    monitor.rounds(1, database="ok")
    assert kinds(monitor.told)[1:] == [("closed", "database")]


def test_what_is_looked_at_no_longer_is_over_after_a_day() -> None:
    monitor = Monitor()
    monitor.rounds(3, **{"disk.old": "critical"})
    monitor.rounds(round(ABSENT / STEP) - 1, seconds=STEP)
    assert kinds(monitor.told) == [("opened", "disk.old")]  # and no reminders of what nobody has looked at
    (closed,) = monitor.rounds(1, seconds=STEP)
    assert (closed.kind, closed.lines[1]) == ("closed", "disk.old: is no longer looked at")


def test_what_cannot_be_judged_any_more_is_over_after_a_week_and_a_weekend_is_none() -> None:
    monitor = Monitor()
    monitor.rounds(3, **{"feed.M1.A": "critical"})
    assert monitor.rounds(round(UNJUDGED / STEP) - 1, seconds=STEP, **{"feed.M1.A": "skipped"}) == []
    (closed,) = monitor.rounds(1, seconds=STEP, **{"feed.M1.A": "skipped"})
    assert closed.lines[1] == "feed.M1.A: could not be judged for a week"


def test_a_monitor_that_did_not_run_concludes_nothing_from_having_seen_nothing() -> None:
    monitor = Monitor()
    monitor.rounds(3, database="critical")
    assert monitor.rounds(1, seconds=20 * 86_400.0) == []
    assert kinds(monitor.rounds(1, database="critical")) == [("reminder", "database")]


# --- severity ----------------------------------------------------------------------------------------------------


def test_it_gets_worse_once() -> None:
    monitor = Monitor()
    monitor.rounds(4, **{"disk.home": "warning"})
    monitor.rounds(1, **{"disk.home": "critical"})
    assert len(monitor.told) == 1  # as many in a row as it takes to open
    monitor.rounds(1, **{"disk.home": "critical"})
    monitor.rounds(10, **{"disk.home": "warning"})
    monitor.rounds(10, **{"disk.home": "critical"})
    assert [(notice.kind, notice.severity) for notice in monitor.told] == [
        ("opened", "warning"),
        ("escalated", "critical"),
    ]
    assert monitor.told[1].lines[0] == "Severity is critical now."
    monitor.rounds(2, **{"disk.home": "ok"})
    assert monitor.told[-1].severity == monitor.incidents[-1].severity == "critical"


def test_a_rule_says_how_severe_a_check_may_be_at_most() -> None:
    monitor = Monitor(Alerts(rules={"disk": Rule(severity="warning"), "disk.scratch": Rule(severity="info")}))
    monitor.rounds(3, **{"disk.home": "critical"})
    assert [notice.severity for notice in monitor.told] == ["warning"]
    other = Monitor(monitor.rules)
    other.rounds(3, **{"disk.scratch": "critical"})
    assert [notice.severity for notice in other.told] == ["info"]
    other.rounds(1, seconds=RULES.remind_seconds, **{"disk.scratch": "critical"})
    assert len(other.told) == 1  # what is only said is said once


def test_the_longest_rule_that_says_something_wins() -> None:
    rules = Alerts(
        rules={
            "feed": Rule(after=4, mute=True),
            "feed.M1": Rule(clear=1, mute=False),
            "feed.M1.EURUSD.m": Rule(after=1),
            "feed.M15": Rule(after=9),
        }
    )
    monitor = Monitor(rules)
    monitor.rounds(4, **{"feed.M1.EURUSD": "critical", "feed.M5.GBPUSD": "critical"})
    monitor.rounds(1, **{"feed.M1.EURUSD": "critical"})
    assert [notice.checks for notice in monitor.told] == [("feed.M1.EURUSD",)]
    monitor.rounds(1, **{"feed.M1.EURUSD": "ok"})
    assert kinds(monitor.told)[1:] == [("closed", "feed.M1.EURUSD")]
    other = Monitor(rules)
    other.rounds(1, **{"feed.M1.EURUSD.m": "critical"})
    assert kinds(other.rounds(1)) == [("opened", "feed.M1.EURUSD.m")]


def test_what_is_mute_is_observed_and_never_told_and_explains_nothing() -> None:
    monitor = Monitor(Alerts(rules={"database": Rule(mute=True), "pgbouncer": Rule(mute=False)}))
    monitor.rounds(5, **{"database": "critical", "database.size": "critical", "pgbouncer": "critical"})
    assert [notice.checks for notice in monitor.told] == [("pgbouncer",)]
    assert monitor.state.watches["database"].is_open
    monitor.rounds(5, **{"database": "ok", "database.size": "ok", "pgbouncer": "ok"})
    assert [notice.kind for notice in monitor.told] == ["opened", "closed"]


def test_a_check_that_is_made_mute_while_it_fails_is_only_closed() -> None:
    monitor = Monitor(Alerts(remind_seconds=60))
    monitor.rounds(3, database="critical")
    monitor.rules = Alerts(remind_seconds=60, rules={"database": Rule(mute=True)})
    monitor.rounds(20, database="critical")
    assert kinds(monitor.told) == [("opened", "database")]
    monitor.rounds(2, database="ok")
    assert kinds(monitor.told)[1:] == [("closed", "database")]


def test_an_incident_that_becomes_milder_is_told_by_reminders_only() -> None:
    monitor = Monitor()
    monitor.rounds(5, **{"disk.a": "critical", "disk.b": "warning"})
    monitor.rounds(20, **{"disk.a": "ok", "disk.b": "warning"})
    assert kinds(monitor.told) == [("opened", "disk.a")]
    notices = monitor.rounds(1, seconds=RULES.remind_seconds, **{"disk.a": "ok", "disk.b": "warning"})
    assert kinds(notices) == [("reminder", "disk.b")]
    assert notices[0].lines[-1] == "Works again: disk.a."
    assert notices[0].severity == "warning"
    assert monitor.rounds(2, **{"disk.a": "ok", "disk.b": "ok"})[0].severity == "critical"  # the worst that it was


def test_only_failures_in_a_row_make_it_worse() -> None:
    monitor = Monitor()
    statuses: tuple[Status, ...] = ("warning", "critical")
    for number in range(20):
        monitor.round({"disk.home": statuses[number % 2]})
    assert [(notice.kind, notice.severity) for notice in monitor.told] == [("opened", "warning")]


# --- reminders ---------------------------------------------------------------------------------------------------


def test_reminders_come_at_intervals_while_it_is_seen_to_fail() -> None:
    monitor = Monitor(Alerts(remind_seconds=600))
    monitor.rounds(3 + 60, database="critical")
    assert [notice.kind for notice in monitor.told] == ["opened", *["reminder"] * 3]
    gaps = {after.at - before.at for before, after in zip(monitor.told, monitor.told[1:], strict=False)}
    assert gaps == {timedelta(seconds=600)}
    assert [notice.id.rpartition(":")[2] for notice in monitor.told[1:]] == ["1", "2", "3"]
    monitor.rounds(100, database="skipped")
    assert len(monitor.told) == 4
    assert kinds(monitor.rounds(1, database="critical")) == [("reminder", "database")]


def test_the_most_impatient_check_of_an_incident_reminds() -> None:
    monitor = Monitor(Alerts(remind_seconds=6_000, rules={"disk.b": Rule(remind_seconds=600)}))
    monitor.rounds(3 + 20, **{"disk.a": "critical", "disk.b": "warning"})
    assert kinds(monitor.told) == [("opened", "disk.a"), ("reminder", "disk.a")]


# --- grouping ----------------------------------------------------------------------------------------------------


def test_what_fails_later_of_the_same_kind_is_told_in_the_same_incident() -> None:
    monitor = Monitor()
    failing: dict[str, Status] = {"actor.trainer": "critical"}
    monitor.rounds(10, **failing)
    failing["actor.emitter"] = "critical"
    monitor.rounds(3, **failing)
    assert kinds(monitor.told) == [("opened", "actor.trainer"), ("escalated", "actor.emitter")]
    assert len({notice.incident for notice in monitor.told}) == 1
    assert monitor.told[1].lines[0] == "More fails than before."
    assert monitor.told[1].checks == ("actor.emitter", "actor.trainer")
    monitor.rounds(2, **{"actor.trainer": "critical", "actor.emitter": "ok"})
    assert len(monitor.told) == 2
    monitor.rounds(4, **failing)  # it had come back: that it fails again is news
    assert kinds(monitor.told)[2:] == [("escalated", "actor.emitter")]
    monitor.rounds(2, **dict.fromkeys(failing, "ok"))
    assert kinds(monitor.told)[3:] == [("closed", "actor.trainer")]
    assert monitor.incidents[-1].checks == ("actor.trainer", "actor.emitter")


def test_an_incident_that_grows_by_the_minute_is_told_ever_less_often() -> None:
    monitor = Monitor()
    failing: dict[str, Status] = {}
    for number in range(120):  # one more every minute, for two hours
        failing[f"feed.M1.S{number}"] = "critical"
        monitor.rounds(2, **failing)
    monitor.rounds(20, **failing)
    assert {notice.kind for notice in monitor.told} == {"opened", "escalated"}
    assert len(monitor.told) <= 2 + 7_200 / MOST_WAIT + 4
    named = {check for notice in monitor.told for check in notice.checks}
    assert len(named) >= MOST_NAMED
    assert all(watch.told for watch in monitor.state.watches.values())


# --- causes ------------------------------------------------------------------------------------------------------

TORN_DOWN: dict[str, Status] = {
    "database": "critical",
    "database.size": "critical",
    "pgbouncer": "critical",
    "endpoint./health": "critical",
    "actor.recorder": "critical",
    "actor.trainer": "critical",
    "nats.lag.recorder": "warning",
    "model.rf_m1": "critical",
}


def test_a_dead_database_sends_one_mail_and_not_ten() -> None:
    monitor = Monitor()
    monitor.rounds(100, **TORN_DOWN)
    (opened,) = monitor.told
    assert opened.title == "database: it is critical"
    assert set(opened.checks) == set(TORN_DOWN)
    assert opened.lines[-1] == (
        "Fails with it, probably because of it: actor.recorder, actor.trainer, database.size, endpoint./health, model.rf_m1, "
        "nats.lag.recorder, pgbouncer."
    )
    monitor.rounds(3, **dict.fromkeys(TORN_DOWN, "ok"))
    assert kinds(monitor.told)[1:] == [("closed", "database")]


@pytest.mark.parametrize("seed", range(3))
def test_the_order_in_which_they_are_noticed_does_not_matter(seed: int) -> None:
    names = [*TORN_DOWN][seed:] + [*TORN_DOWN][:seed]
    for late in range(len(names)):  # all but the last so many fail a round earlier
        monitor = Monitor()
        early = {name: TORN_DOWN[name] for name in names[: len(names) - late]}
        monitor.round(early)
        monitor.rounds(30, **TORN_DOWN)
        assert kinds(monitor.told) == [("opened", "database")]


def test_a_cause_that_is_noticed_after_its_consequence_still_takes_it_over() -> None:
    monitor = Monitor(Alerts(group_seconds=0))
    monitor.rounds(1, **{"endpoint./health": "critical"})
    monitor.rounds(1, **{"endpoint./health": "critical", "database": "critical"})
    assert monitor.told == []  # nothing is told while its cause may be about to open
    monitor.rounds(1, **{"endpoint./health": "critical", "database": "critical"})
    (opened,) = monitor.told
    assert opened.checks == ("database", "endpoint./health")
    assert len(monitor.state.cases) == 1


def test_a_possible_cause_that_does_not_open_holds_nothing_back_for_long() -> None:
    monitor = Monitor(Alerts(group_seconds=0, rules={"database": Rule(after=1_000)}))
    monitor.rounds(1, **{"endpoint./health": "critical", "database": "critical"})
    notices = monitor.rounds(30, **{"endpoint./health": "critical", "database": "critical"})
    assert kinds(notices) == [("opened", "endpoint./health")]
    assert notices[0].at - START == timedelta(seconds=2 * ROUND + CAUSE_WAIT)


def test_a_cause_explains_what_fails_after_it_was_told_too() -> None:
    monitor = Monitor()
    monitor.rounds(10, database="critical")
    monitor.rounds(100, **TORN_DOWN)
    assert kinds(monitor.told) == [("opened", "database")]
    assert set(monitor.incidents[-1].checks) == set(TORN_DOWN)


def test_what_fails_on_after_its_cause_is_over_is_told_then() -> None:
    monitor = Monitor()
    monitor.rounds(10, **TORN_DOWN)
    left: dict[str, Status] = {name: "critical" if name == "endpoint./health" else "ok" for name in TORN_DOWN}
    notices = monitor.rounds(10, **left)
    assert kinds(notices) == [("escalated", "endpoint./health")]
    assert (
        timedelta(seconds=RECOVERY)
        <= notices[0].at - monitor.now + timedelta(seconds=8 * ROUND)
        <= timedelta(minutes=4)
    )
    assert notices[0].lines[-1].startswith("Works again: ")
    assert kinds(monitor.rounds(2, **dict.fromkeys(left, "ok"))) == [("closed", "database")]


def test_what_was_told_before_its_cause_failed_is_not_reminded_of_meanwhile_and_is_closed() -> None:
    monitor = Monitor(Alerts(remind_seconds=600))
    monitor.rounds(5, **{"endpoint./docs": "critical"})
    monitor.rounds(15, **{"endpoint./docs": "critical", "database": "critical"})
    assert kinds(monitor.told) == [("opened", "endpoint./docs"), ("opened", "database")]
    assert kinds(monitor.rounds(20, **{"endpoint./docs": "critical", "database": "critical"})) == [
        ("reminder", "database")
    ]
    assert kinds(monitor.rounds(2, **{"endpoint./docs": "ok", "database": "critical"})) == [
        ("closed", "endpoint./docs")
    ]


def test_a_warning_does_not_explain_what_is_critical() -> None:
    monitor = Monitor()
    monitor.rounds(5, **{"database": "warning", "endpoint./health": "critical"})
    assert sorted(kinds(monitor.told)) == [("opened", "database"), ("opened", "endpoint./health")]
    other = Monitor()
    other.rounds(5, **{"database": "warning", "endpoint./health": "warning"})
    assert kinds(other.told) == [("opened", "database")]


def test_feeds_need_no_database_and_a_dead_gateway_explains_them() -> None:
    monitor = Monitor()
    monitor.rounds(5, **{"database": "critical", "feed.M1.EURUSD": "critical"})
    assert sorted(kinds(monitor.told)) == [("opened", "database"), ("opened", "feed.M1.EURUSD")]
    other = Monitor()
    other.rounds(5, **{"actor.collector": "critical", "feed.M1.EURUSD": "critical", "endpoint./live": "critical"})
    assert kinds(other.told) == [("opened", "actor.collector")]


def test_a_symbol_that_is_stale_explains_its_longer_bars_only() -> None:
    monitor = Monitor()
    monitor.rounds(5, **{"feed.M1.EURUSD": "critical"})
    monitor.rounds(5, **{"feed.M1.EURUSD": "critical", "feed.H1.EURUSD": "critical"})
    assert kinds(monitor.told) == [("opened", "feed.M1.EURUSD")]
    monitor.rounds(5, **{"feed.M1.EURUSD": "critical", "feed.H1.EURUSD": "critical", "feed.H1.GBPUSD": "critical"})
    assert kinds(monitor.told)[1:] == [("escalated", "feed.H1.GBPUSD")]


def test_a_full_disk_is_one_incident_in_which_what_it_breaks_is_told() -> None:
    monitor = Monitor()
    monitor.rounds(10, **{"disk.home": "critical"})
    monitor.rounds(10, **{"disk.home": "critical", "database": "critical", "endpoint./health": "critical"})
    assert kinds(monitor.told) == [("opened", "disk.home"), ("escalated", "database")]
    assert len({notice.incident for notice in monitor.told}) == 1
    monitor.rounds(3, **dict.fromkeys(("disk.home", "database", "endpoint./health"), "ok"))
    assert kinds(monitor.told)[2:] == [("closed", "disk.home")]


def test_a_container_explains_what_runs_in_it() -> None:
    monitor = Monitor()
    monitor.rounds(
        5, **{"actor.recorder": "critical", "container.mt5-recorder-1": "critical", "actor.emitter": "critical"}
    )
    assert sorted(kinds(monitor.told)) == [("opened", "actor.emitter"), ("opened", "container.mt5-recorder-1")]


def test_the_tables_of_causes_have_no_circle_and_name_checks() -> None:
    """Over every name that the tables hold and one of each kind: something must always be left to be told."""
    names = {"feed.M1.A", "feed.H1.A", "container.nats", "container.postgres", "container.pgbouncer", "disk.home"}
    actors = ("backup", "collector", "features", "recorder", "scorer", "trainer")
    for dependent, needs in (*CAUSES, *NEAR):
        for name in (dependent, *needs):
            assert re.split(r"[.:]", name)[0] in KINDS
            full = {name.removesuffix(".") + ".x"} if name.endswith(".") else {name}
            names |= {name.replace("*", actor) for actor in actors} if "*" in name else full
    names = {name for name in names if ":" not in name}
    names |= {f"{kind}.{actor}" for actor in actors for kind in ("actor", "nats.lag", "container")}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " needs ".join((*path, name))
        if name in done:
            return
        for cause in (*explaining(name, sorted(names)), *near(name, sorted(names))):
            visit(cause, (*path, name))
        done.add(name)

    for name in sorted(names):
        visit(name, ())
    assert done >= {"endpoint.x", "nats.lag.scorer", "backup.x", "actor.collector"}


def test_what_is_told_together() -> None:
    assert group_of("disk.home") == group_of("disk.data") == "disk"
    assert group_of("nats.lag.recorder") == "nats.lag"
    assert group_of("nats.store") == "nats"
    assert group_of("event.clock.Broker-Demo.1") == "event.clock"


# --- flapping ----------------------------------------------------------------------------------------------------


def test_what_comes_and_goes_stays_open_until_it_is_steady() -> None:
    rules = Alerts(flap_changes=3, flap_seconds=1_800)
    monitor = Monitor(rules)
    for _ in range(20):
        monitor.rounds(3, database="critical")
        monitor.rounds(2, database="ok")
    assert [notice.kind for notice in monitor.told] == ["opened", "closed", "opened", "closed", "opened"]
    assert monitor.told[-1].lines[-1] == (
        "It comes and goes: database counts as failing until it has been steady for 30 min."
    )
    steady_since = monitor.now - timedelta(seconds=2 * ROUND)
    monitor.rounds(56, database="ok")
    assert len(monitor.told) == 5
    monitor.rounds(2, database="ok")
    assert [notice.kind for notice in monitor.told][5:] == ["closed"]
    assert monitor.told[-1].at - steady_since == timedelta(seconds=rules.flap_seconds)


def test_what_stays_open_until_it_is_steady_explains_only_what_fails_when_it_does() -> None:
    monitor = Monitor(Alerts(flap_changes=1))
    monitor.rounds(5, database="critical")
    monitor.rounds(10, database="ok")
    monitor.rounds(20, **{"database": "ok", "endpoint./health": "critical"})
    assert kinds(monitor.told) == [("opened", "database"), ("opened", "endpoint./health")]


def test_an_incident_that_grows_for_ever_is_still_told() -> None:
    monitor = Monitor(Alerts(flap_changes=10_000))
    monitor.rounds(4, **{"disk.a": "critical"})
    (case,) = monitor.state.cases.values()
    grown = msgspec.structs.replace(case, escalations=10_000)
    monitor.state = msgspec.structs.replace(monitor.state, cases={case.id: grown})
    notices = monitor.rounds(13, **{"disk.a": "critical", "disk.b": "critical"})
    assert [notice.id.rpartition(":")[2] for notice in notices] == ["10001"]


# --- windows -----------------------------------------------------------------------------------------------------

NIGHT = {"night": Maintenance(start="22:00", end="23:00")}


def at(hour: int, minute: int = 0) -> datetime:
    return datetime(2026, 1, 5, hour, minute, tzinfo=UTC)


def until(monitor: Monitor, end: datetime, **statuses: Status) -> list[Notice]:
    notices = []
    while monitor.now + timedelta(seconds=ROUND) <= end:
        notices += monitor.round(dict(statuses))
    return notices


def test_what_still_fails_at_a_window_s_end_is_told_then() -> None:
    monitor = Monitor(Alerts(maintenance=NIGHT), start=at(22, 10))
    assert until(monitor, at(22, 59), database="critical", outbox="critical") == []
    notices = until(monitor, at(23, 5), database="critical", outbox="ok")
    assert kinds(notices) == [("opened", "database")]
    assert notices[0].at == at(23)
    assert "Since 2026-01-05 22:10:30 UTC." in notices[0].lines


def test_what_comes_and_goes_within_a_window_is_kept_and_never_told() -> None:
    monitor = Monitor(Alerts(maintenance=NIGHT), start=at(22, 10))
    until(monitor, at(22, 30), database="critical")
    until(monitor, at(23, 30), database="ok")
    assert monitor.told == []
    assert [incident.closed_at is not None for incident in monitor.incidents] == [True]


def test_an_incident_that_was_told_before_the_window_is_closed_after_it() -> None:
    monitor = Monitor(Alerts(maintenance=NIGHT, remind_seconds=300), start=at(21, 50))
    until(monitor, at(21, 59), database="critical")
    assert [notice.kind for notice in monitor.told] == ["opened", "reminder"]
    assert until(monitor, at(22, 10), database="critical") == []  # no reminders
    assert until(monitor, at(22, 20), database="ok") == []
    assert until(monitor, at(22, 30), database="critical") == []  # again: the incident goes on
    assert until(monitor, at(22, 59), database="ok") == []
    (closed,) = until(monitor, at(23, 10), database="ok")
    assert (closed.kind, closed.at) == ("closed", at(23))
    assert closed.lines[0].startswith("It lasted 40 min")
    assert monitor.incidents[-1].closed_at == at(22, 31)


def test_a_window_for_some_checks_holds_back_these_and_what_they_explain() -> None:
    windows = {"night": Maintenance(start="22:00", end="23:00", checks=("database",))}
    monitor = Monitor(Alerts(maintenance=windows), start=at(22, 10))
    until(monitor, at(22, 59), **{"database": "critical", "endpoint./health": "critical", "disk.home": "warning"})
    assert kinds(monitor.told) == [("opened", "disk.home")]
    notices = until(
        monitor, at(23, 5), **{"database": "critical", "endpoint./health": "critical", "disk.home": "warning"}
    )
    assert [notice.checks for notice in notices] == [("database", "endpoint./health")]


# --- alerts of other actors --------------------------------------------------------------------------------------


def alert(severity: Any = "warning", source: str | None = "Demo", **more: Any) -> Alert:
    return Alert(severity=severity, check="clock", message="Its clock jumped.", at=START, source=source, **more)


def test_another_actor_s_alert_opens_at_once_and_is_over_when_it_is_not_repeated() -> None:
    monitor = Monitor(Alerts(remind_seconds=60))
    said = tell(alert(), START)
    assert said == CheckResult(check="event.clock.Demo", status="warning", at=START, message="Its clock jumped.")
    monitor.take([said])
    (opened,) = monitor.rounds(1)
    assert (opened.title, opened.severity) == ("event.clock.Demo: Its clock jumped.", "warning")
    assert monitor.rounds(118) == []  # an hour later it is said again
    monitor.take([said])
    quiet = round(EVENT_QUIET / ROUND)
    assert monitor.rounds(quiet - 1) == []
    (closed,) = monitor.rounds(1)
    assert closed.lines[1] == "event.clock.Demo: not said again for 1 h 15 min"
    assert monitor.rounds(1_000) == []


def test_what_the_monitor_says_itself_is_not_taken_in_and_information_opens_nothing() -> None:
    assert tell(alert(event="opened"), START) is None
    assert tell(alert(incident="database-1"), START) is None
    monitor = Monitor()
    monitor.take([said for _ in range(5) if (said := tell(alert(severity="info"), monitor.now)) is not None])
    assert monitor.rounds(5) == []
    without = tell(alert(severity="critical", source=None), START - timedelta(days=1))
    assert without is not None
    assert (without.check, without.status, without.at) == ("event.clock", "critical", START - timedelta(days=1))


# --- the rest ----------------------------------------------------------------------------------------------------


def test_a_clock_that_is_set_back_postpones_nothing() -> None:
    monitor = Monitor(Alerts(remind_seconds=600))
    monitor.rounds(2, database="critical")
    monitor.rounds(1, seconds=-400 * 86_400.0, database="critical")
    assert kinds(monitor.rounds(1, database="critical")) == [("opened", "database")]
    monitor.rounds(1, seconds=-400 * 86_400.0, database="critical")
    assert kinds(monitor.rounds(21, database="critical")) == [("reminder", "database")]
    monitor.rounds(2, seconds=-86_400.0, database="ok")
    assert kinds(monitor.told)[2:] == [("closed", "database")]
    last = monitor.incidents[-1]
    assert last.closed_at is not None
    assert last.closed_at >= last.opened_at


def test_a_round_in_which_nothing_changes_changes_nothing() -> None:
    """So that the state need not be written every second while something fails."""
    monitor = Monitor()
    monitor.rounds(10, **TORN_DOWN)
    before = monitor.state
    monitor.rounds(5, seconds=1)
    assert monitor.state == msgspec.structs.replace(before, at=monitor.now)


def test_a_naive_time_is_refused() -> None:
    with pytest.raises(ValueError, match="aware"):
        advance(AlertState(), [], datetime(2026, 1, 1), RULES)  # noqa: DTZ001


def test_what_stands_is_listed() -> None:
    monitor = Monitor()
    monitor.rounds(1, **{"disk.a": "critical"})
    monitor.rounds(1, **{"disk.a": "critical"})
    assert standing(monitor.state) == ()
    monitor.rounds(3, **{"disk.a": "critical", "outbox": "critical"})
    assert [incident.checks for incident in standing(monitor.state)] == [("disk.a",), ("outbox",)]


def test_thousands_of_failing_checks_are_one_mail_of_bounded_size_and_bounded_state() -> None:
    monitor = Monitor()
    failing: dict[str, Status] = {f"feed.M1.S{n}": "critical" for n in range(MOST_OF_A_KIND + 500)}
    monitor.rounds(4, **failing, outbox="critical")
    assert sorted(kinds(monitor.told)) == [("opened", "feed.M1.S0"), ("opened", "outbox")]
    opened = next(notice for notice in monitor.told if notice.checks[0] != "outbox")
    assert len(opened.checks) == MOST_NAMED
    assert len(opened.lines) == MOST_SHOWN + 2
    assert opened.lines[-1] == f"… and {MOST_OF_A_KIND - MOST_SHOWN} more."
    assert len(monitor.state.watches) == MOST_OF_A_KIND + 1
    assert len(msgspec.json.encode(monitor.state)) < 1_000_000


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.6, "1 min"), (61, "1 min 1 s"), (3_600, "1 h"), (90_061, "1 d 1 h"), (-5, "0 s")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_ids_fit_into_subjects_and_headers_whatever_checks_are_called() -> None:
    monitor = Monitor()
    monitor.rounds(3, **{"event.a b/ü\r\n.x": "critical", "endpoint./ü?a=1": "critical"})
    assert len(monitor.told) == 2
    for notice in monitor.told:
        assert re.fullmatch(r"[A-Za-z0-9.-]+:opened", notice.id)


# --- a model of all of it ----------------------------------------------------------------------------------------

# Who needs whom, written down a second time.
NEEDS: dict[str, set[str]] = {
    "database": set(),
    "database.size": {"database"},
    "pgbouncer": {"database"},
    "nats": set(),
    "nats.publish": {"nats"},
    "disk.home": set(),
    "disk.data": set(),
    "actor.collector": {"nats"},
    "actor.recorder": {"nats", "database", "pgbouncer"},
    "endpoint./health": {"actor.collector", "nats", "nats.publish", "database", "pgbouncer"},
    "endpoint./docs": {"actor.collector", "nats", "nats.publish", "database", "pgbouncer"},
    "feed.M1.EURUSD": {"actor.collector", "nats", "nats.publish"},
    "feed.M5.EURUSD": {"actor.collector", "nats", "nats.publish", "feed.M1.EURUSD"},
    "outbox": set(),
}
CHECKS = sorted(NEEDS)
BAD: tuple[Status, ...] = ("warning", "critical")
STATUSES = st.sampled_from(("ok", "ok", "skipped", "warning", "critical", "critical"))
SETTINGS = st.builds(
    Alerts,
    after=st.integers(1, 3),
    clear=st.integers(1, 3),
    remind_seconds=st.sampled_from((300.0, 3_600.0)),
    group_seconds=st.sampled_from((0.0, 20.0, 70.0)),
    flap_changes=st.integers(1, 4),
    flap_seconds=st.sampled_from((300.0, 3_600.0)),
    rules=st.dictionaries(
        st.sampled_from(("database", "disk", "disk.home", "endpoint", "feed.M1", "outbox")),
        st.builds(
            Rule,
            after=st.none() | st.integers(1, 4),
            clear=st.none() | st.integers(1, 4),
            severity=st.none() | st.sampled_from(SEVERITIES),
            mute=st.booleans(),
        ),
        max_size=2,
    ),
    maintenance=st.dictionaries(
        st.sampled_from(("a", "b")),
        st.builds(
            Maintenance,
            start=st.sampled_from(("12:30", "13:00", "23:30")),
            end=st.sampled_from(("13:30", "14:10", "01:00")),
            checks=st.sampled_from(((), ("database",), ("disk", "feed"))),
        ),
        max_size=2,
    ),
)


class Opening:
    """The model of one check: does it count as failing?"""

    def __init__(self) -> None:
        self.bad = self.good = self.hot = 0
        self.open = False
        self.severe = False
        self.steady = False
        self.failed_at = START
        self.openings: list[datetime] = []


class AlertRules(RuleBasedStateMachine):
    """Any results at any times under any settings: what must hold for every incident, notice and state."""

    @initialize(rules=SETTINGS)
    def start(self, rules: Alerts) -> None:
        self.rules = rules
        self.now = START
        self.state = AlertState()
        self.model = {check: Opening() for check in CHECKS}
        self.notices: dict[str, list[Notice]] = {}
        self.incidents: dict[str, Incident] = {}
        self.ids: set[str] = set()
        self.statuses: dict[str, Status] = {}

    # --- what may happen ---

    @rule(statuses=st.dictionaries(st.sampled_from(CHECKS), STATUSES), seconds=st.sampled_from((1, 15, 30, 400)))
    def look(self, statuses: dict[str, Status], seconds: int) -> None:
        self.statuses |= statuses
        self.go(statuses, seconds)

    @rule(statuses=st.dictionaries(st.sampled_from(CHECKS), STATUSES, min_size=1), rounds=st.integers(2, 6))
    def last(self, statuses: dict[str, Status], rounds: int) -> None:
        self.statuses |= statuses
        for _ in range(rounds):
            self.go(self.statuses, 30)

    @rule(check=st.sampled_from(CHECKS), times=st.integers(2, 8))
    def flap(self, check: str, times: int) -> None:
        for number in range(times):
            for _ in range(4):
                self.go({check: "ok" if number % 2 else "critical"}, 10)
        self.statuses[check] = "ok" if (times - 1) % 2 else "critical"

    @rule(seconds=st.sampled_from((0, 5, 60, 1_800)))
    def wait(self, seconds: int) -> None:
        self.go({}, seconds)

    @precondition(lambda self: any(status in BAD for status in self.statuses.values()))
    @rule()
    def settle(self) -> None:
        """Nothing changes for a while: whatever nothing explains and nothing holds back is known by then."""
        untold = set(CHECKS)
        for _ in range(24):
            self.go(self.statuses, 30)
            untold &= {check for check in CHECKS if self.must_be_told(check)}
        for check in untold:
            watch = self.state.watches[check]
            assert watch.told, f"{check} fails and nobody knows"
            assert any(check in notice.checks for notice in self.notices[watch.incident])

    def teardown(self) -> None:
        """All is well at last: every incident is closed, and nothing is remembered."""
        if not hasattr(self, "state"):
            return
        for _ in range(2 * 30):  # past the longest window
            self.go(dict.fromkeys(CHECKS, "ok"), 1_800)
        assert self.state.watches == {}
        assert self.state.cases == {}
        for incident, notices in self.notices.items():
            assert [notice.kind for notice in notices if notice.kind in ("opened", "closed")] == ["opened", "closed"]
            assert self.incidents[incident].closed_at is not None

    # --- one step, looked at from all sides ---

    def go(self, statuses: dict[str, Status], seconds: int) -> None:
        self.now += timedelta(seconds=seconds)
        results = [result(check, status, self.now) for check, status in statuses.items()]
        before = msgspec.json.encode(self.state)
        step = advance(self.state, results, self.now, self.rules)
        assert msgspec.json.encode(self.state) == before, "the old state is left as it is"
        assert advance(reread(self.state), results, self.now, self.rules) == step, "JSON changes nothing"
        assert advance(step.state, [], self.now, self.rules) == Step(step.state, (), ()), "no time, nothing new"
        for one in results:
            self.follow(one)
        self.state = step.state
        changed = {incident.id: incident for incident in step.incidents}
        assert len(changed) == len(step.incidents)
        for incident in step.incidents:
            self.note(incident)
        for notice in step.notices:
            self.hear(notice, self.incidents[notice.incident])

    def follow(self, one: CheckResult) -> None:
        model = self.model[one.check]
        after, clear = self.counts(one.check)
        if one.status == "ok":
            model.bad = model.hot = 0
            model.good += 1
            steady = not model.steady or self.now - model.failed_at >= timedelta(seconds=self.rules.flap_seconds)
            if model.open and model.good >= clear and steady:
                model.open = model.severe = False
        elif one.status in BAD:
            model.good = 0
            model.bad += 1
            model.hot = model.hot + 1 if one.status == "critical" else 0
            model.failed_at = self.now
            if not model.open and model.bad >= after:
                model.open = True
                model.openings.append(self.now)
                lately = [at for at in model.openings if self.now - at < timedelta(seconds=self.rules.flap_seconds)]
                assert len(lately) <= self.rules.flap_changes, "flapping is bounded"
                model.steady = len(lately) >= self.rules.flap_changes
            model.severe = model.severe or (model.open and model.hot >= after)

    def note(self, incident: Incident) -> None:
        known = self.incidents.get(incident.id)
        if known is not None:
            assert known.closed_at is None, "what is closed stays closed"
            assert known.opened_at == incident.opened_at
            assert SEVERITIES.index(incident.severity) >= SEVERITIES.index(known.severity)
            assert set(known.checks) <= set(incident.checks)
            assert known != incident
        if incident.closed_at is not None:
            assert incident.opened_at <= incident.closed_at <= self.now
        self.incidents[incident.id] = incident

    def hear(self, notice: Notice, incident: Incident) -> None:
        assert notice.id not in self.ids, "an id is never used twice"
        self.ids.add(notice.id)
        assert notice.at == self.now
        said = self.notices.setdefault(notice.incident, [])
        assert (notice.kind == "opened") == (not said), "the first notice, and only that one, opens"
        assert all(earlier.kind != "closed" for earlier in said), "nothing follows the end"
        assert (notice.kind == "closed") == (incident.closed_at is not None)
        main = notice.checks[0]
        if notice.kind == "closed":
            assert not muted(self.rules.maintenance, main, self.now)
            assert all(not self.model[check].open for check in incident.checks if self.of(check) == incident.id)
        else:
            assert self.model[main].open
            assert self.must_be_told(main), "neither explained nor held back"
            for check in notice.checks:
                assert not self.mute(check) and not muted(self.rules.maintenance, check, self.now)
        if said:
            worst = max(SEVERITIES.index(earlier.severity) for earlier in said)
            worse = SEVERITIES.index(notice.severity) > worst
            assert not worse or notice.kind == "escalated"
            if notice.kind == "escalated":
                lately = {check for check in notice.checks if not self.knew(check)}
                assert worse or lately, "an escalation says something new"
            if notice.kind == "reminder":
                assert notice.at - said[-1].at >= timedelta(seconds=self.rules.remind_seconds)
                assert incident.severity != "info"
        if notice.kind in ("opened", "reminder"):
            assert notice.severity == self.capped(main), "the worst comes first"
        said.append(notice)

    def of(self, check: str) -> str:
        watch = self.state.watches.get(check)
        return watch.incident if watch is not None else ""

    def knew(self, check: str) -> bool:
        """Whether a notice that was about the check itself has come since it opened."""
        since = self.model[check].openings[-1]
        return any(
            notice.at > since and any(line.startswith(f"{check} (") for line in notice.lines)
            for notices in self.notices.values()
            for notice in notices
        )

    # --- what the settings say ---

    def ruled(self, check: str) -> list[Rule]:
        names = [name for name in self.rules.rules if check == name or check.startswith(f"{name}.")]
        return [self.rules.rules[name] for name in sorted(names, key=len)]

    def counts(self, check: str) -> tuple[int, int]:
        after, clear = self.rules.after, self.rules.clear
        for one in self.ruled(check):
            after, clear = one.after or after, one.clear or clear
        return after, clear

    def mute(self, check: str) -> bool:
        ruled = self.ruled(check)
        return bool(ruled) and ruled[-1].mute

    def capped(self, check: str) -> Severity:
        most = next((one.severity for one in reversed(self.ruled(check)) if one.severity is not None), "critical")
        return min("critical" if self.model[check].severe else "warning", most, key=SEVERITIES.index)

    def must_be_told(self, check: str) -> bool:
        model = self.model[check]
        explained = any(
            self.model[cause].open
            and (self.model[cause].bad or self.now - self.model[cause].failed_at < timedelta(seconds=RECOVERY))
            and not self.mute(cause)
            and self.model[cause].severe >= model.severe
            for cause in NEEDS[check]
        )
        return (
            model.open and not explained and not self.mute(check) and not muted(self.rules.maintenance, check, self.now)
        )

    # --- what is always so ---

    @invariant()
    def the_state_is_the_model_s(self) -> None:
        if not hasattr(self, "state"):
            return
        for check, model in self.model.items():
            watch = self.state.watches.get(check)
            assert (watch is not None and watch.is_open) == model.open
            if watch is not None and watch.is_open:
                assert (watch.severity == "critical") == model.severe
                assert bool(watch.incident) == (not self.mute(check))
                assert not watch.incident or watch.incident in self.state.cases
        for case in self.state.cases.values():
            held = case.recovered_at is not None
            assert held == (not any(watch.incident == case.id for watch in self.state.watches.values()))
        assert {incident.id for incident in standing(self.state)} == {
            incident.id for incident in self.incidents.values() if incident.closed_at is None
        }


AlertRules.TestCase.settings = settings(max_examples=50, stateful_step_count=20, deadline=None)
test_any_results_at_any_times_under_any_settings = AlertRules.TestCase
