"""When a failing check becomes an incident, who is told of it and how often: a pure state machine.

The life of an incident::

    a check fails `after` times ──▶ waits `group_seconds` for what fails with it ──▶ opened ──▶ escalated, reminder … ──▶ closed
                                      │ over before that, or held back by a window: never told

A check that opens joins the incident of what explains it (:mod:`actors.core.causes`) and is not told by itself; else the
open incident of its kind; else it begins one. What is told are *news*: failing checks that nothing explains, that no window
holds back and that nobody knows of yet. Only failing checks and recent openings are remembered, so that the state of a
healthy system is empty.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple, TypeAlias

from msgspec.structs import replace

from actors.core.alert_words import MOST_SHOWN, back, duration, moment, shown, title
from actors.core.causes import explaining, group_of, near
from actors.core.incidents import AlertState, Case, Incident, Step, Watch, incident_of, standing, turned_back
from actors.core.windows import is_within, muted
from schema.health import SEVERITIES, CheckResult, Kind, Notice, Severity
from schema.messages import Alert
from schema.settings import Alerts

__all__ = ["AlertState", "Incident", "Step", "advance", "ruling", "standing", "tell"]

EVENT: Final = "event"  # checks of this kind are alerts that other actors have sent

# An actor says the same thing at most once an hour (clocks of terminals do): longer than that without a repeat is over.
EVENT_QUIET: Final = 75 * 60.0
# What a failed cause has torn down needs a while longer than the cause itself: only then it is news that it still fails.
RECOVERY: Final = 120.0
# A check whose possible cause has begun to fail waits so long for the cause to open.
CAUSE_WAIT: Final = 120.0
# An incident that grows is told after twice the wait each time, at most this.
MOST_WAIT: Final = 300.0
DOUBLINGS: Final = 10
# Seconds of the monitor's own running time without a result: what it no longer looks at is over …
ABSENT: Final = 86_400.0
# … and what it looks at and cannot judge as well; markets close for up to four days.
UNJUDGED: Final = 7 * 86_400.0
# More than this between two calls and the monitor did not run: nothing is concluded from that it saw nothing.
LONGEST_STEP: Final = timedelta(minutes=5)

MOST_OF_A_KIND: Final = 2_000  # failing checks of a kind that are followed; more add nothing that a person could read
MOST_WATCHED: Final = 20_000
MOST_NAMED: Final = 100  # checks that an incident names
MOST_OPENINGS: Final = 1_000
TEXT: Final = 500  # characters of a check's message
NAME: Final = 200

rank: Final = SEVERITIES.index

_UNFIT: Final = re.compile(r"[^A-Za-z0-9.-]+")


# --- rules -------------------------------------------------------------------------------------------------------


class Ruling(NamedTuple):
    """The settings in force for one check."""

    after: int
    clear: int
    remind_seconds: float
    most: Severity
    mute: bool


def ruling(rules: Alerts, check: str) -> Ruling:
    """``[alerts]`` and every rule whose name is the check's or above it; the longest name that says something wins."""
    event = is_within(check, EVENT)
    after, clear, remind, most, mute = 1 if event else rules.after, rules.clear, rules.remind_seconds, None, False
    for name in sorted((name for name in rules.rules if is_within(check, name)), key=len):
        rule = rules.rules[name]
        after = after if rule.after is None else rule.after
        clear = clear if rule.clear is None else rule.clear
        remind = remind if rule.remind_seconds is None else rule.remind_seconds
        most = most if rule.severity is None else rule.severity
        mute = rule.mute
    return Ruling(after, clear, remind, most or "critical", mute)


def tell(alert: Alert, now: datetime) -> CheckResult | None:
    """Another actor's alert as a result of ``event.<check>[.<source>]``; None for what the monitor has said itself.

    An ``info`` alert is kept and opens nothing. There is no result that says an event is over: it is, once it has not been
    repeated for :data:`EVENT_QUIET` seconds.
    """
    if alert.event is not None or alert.incident:
        return None
    name = ".".join((EVENT, alert.check, *([alert.source] if alert.source else [])))
    return CheckResult(
        check=name[:NAME],
        status="skipped" if alert.severity == "info" else alert.severity,
        at=min(alert.at, now),
        message=alert.message[:TEXT],
    )


# --- the step ----------------------------------------------------------------------------------------------------


def advance(state: AlertState, results: Sequence[CheckResult], now: datetime, rules: Alerts) -> Step:
    """Takes in a round of results, in order, at ``now``; also to be called without any, for time passes.

    A pure function: the same arguments give the same step, and ``state`` is left as it is.

    Raises:
        ValueError: ``now`` is naive.
    """
    if now.tzinfo is None:
        raise ValueError("advance needs an aware time")
    now = now.astimezone(UTC)
    if state.at is not None and now < state.at:
        state = turned_back(state, state.at - now)
    round_ = _Round(state, now, rules)
    round_.wake()
    for result in results:
        round_.take(result)
    round_.forget()
    round_.assign()
    round_.explain()
    round_.gather()
    round_.tell()
    return round_.step()


Behind: TypeAlias = Callable[[str, Collection[str]], Iterator[str]]


class _Round:
    """One step at work: copies of the state's tables, and what comes out of it."""

    def __init__(self, state: AlertState, now: datetime, rules: Alerts) -> None:
        self.before = state
        self.now = now
        self.rules = rules
        self.watches = dict(state.watches)
        self.cases = dict(state.cases)
        self.opened = state.opened
        self.notices: list[Notice] = []
        self.incidents: dict[str, Incident] = {}
        self._rulings: dict[str, Ruling] = {}
        self._muted: dict[str, bool] = {}
        self._kinds: dict[str, int] = {}
        for name in self.watches:
            self._kinds[group_of(name)] = self._kinds.get(group_of(name), 0) + 1
        self._explained: dict[str, str] = {}  # check → the open check that explains it, or "" while one may yet

    def ruling(self, check: str) -> Ruling:
        found = self._rulings.get(check)
        if found is None:
            found = self._rulings[check] = ruling(self.rules, check)
        return found

    def held(self, check: str) -> bool:
        """Whether a window holds the check back now."""
        found = self._muted.get(check)
        if found is None:
            found = self._muted[check] = muted(self.rules.maintenance, check, self.now)
        return found

    def passed(self, since: datetime | None, seconds: float) -> bool:
        return since is None or self.now - since >= timedelta(seconds=seconds)

    # --- results ---

    def wake(self) -> None:
        """Nothing is concluded from what was not looked at while nobody looked."""
        slept = self.now - (self.before.at or self.now) - LONGEST_STEP
        if slept > timedelta():
            for name, watch in self.watches.items():
                self.watches[name] = replace(watch, seen_at=watch.seen_at + slept, judged_at=watch.judged_at + slept)

    def take(self, result: CheckResult) -> None:
        name = result.check[:NAME]
        watch = self.watches.get(name)
        if result.status == "skipped":
            if watch is not None and not is_within(name, EVENT):
                self.watches[name] = replace(watch, seen_at=self.now)
        elif result.status == "ok":
            if watch is not None:
                self.watches[name] = self._succeeded(watch, result)
        else:
            if watch is None:
                group = group_of(name)
                if self._kinds.get(group, 0) >= MOST_OF_A_KIND or len(self.watches) >= MOST_WATCHED:
                    return
                self._kinds[group] = self._kinds.get(group, 0) + 1
                at = min(result.at, self.now)
                watch = Watch(check=name, since=at, failed_at=at, seen_at=self.now, judged_at=self.now)
            self.watches[name] = self._failed(watch, result)

    def _failed(self, watch: Watch, result: CheckResult) -> Watch:
        rule = self.ruling(watch.check)
        hot = watch.hot + 1 if result.status == "critical" else 0
        if not watch.is_open and watch.bad == 0:
            watch = replace(watch, since=min(result.at, self.now))
        watch = replace(
            watch,
            bad=watch.bad + 1,
            hot=hot,
            good=0,
            failed_at=self.now,
            seen_at=self.now,
            judged_at=self.now,
            message=result.message[:TEXT],
        )
        severity: Severity = "critical" if hot >= rule.after else "warning"
        if watch.is_open:
            return replace(watch, severity="critical" if severity == "critical" else watch.severity)
        if watch.bad < rule.after:
            return watch
        openings = (*self._recent(watch), self.now)[-MOST_OPENINGS:]
        steady = len(openings) >= min(self.rules.flap_changes, MOST_OPENINGS)
        return replace(watch, opened_at=self.now, severity=severity, openings=openings, steady=steady)

    def _succeeded(self, watch: Watch, result: CheckResult) -> Watch:
        watch = replace(watch, bad=0, hot=0, good=watch.good + 1, seen_at=self.now, judged_at=self.now)
        if not watch.is_open or watch.good < self.ruling(watch.check).clear:
            return watch
        if watch.steady and not self.passed(watch.failed_at, self.rules.flap_seconds):
            return watch
        return self._ended(watch, result.message[:TEXT])

    def _ended(self, watch: Watch, message: str) -> Watch:
        """The check is closed and leaves its incident."""
        case = self.cases.get(watch.incident)
        if case is not None and (len(case.ended) < MOST_NAMED or watch.check in case.ended):
            self.cases[case.id] = replace(case, ended={**case.ended, watch.check: message})
        return replace(
            watch,
            bad=0,
            hot=0,
            opened_at=None,
            severity="warning",
            steady=False,
            incident="",
            told=False,
            explained=False,
            freed_at=None,
        )

    def _recent(self, watch: Watch) -> tuple[datetime, ...]:
        return tuple(at for at in watch.openings if not self.passed(at, self.rules.flap_seconds))

    def forget(self) -> None:
        """Ends what is not looked at any more, and drops what is neither failing nor has lately."""
        for name, watch in list(self.watches.items()):
            event = is_within(name, EVENT)
            if event and self.passed(watch.seen_at, EVENT_QUIET):
                if watch.is_open and watch.steady and not self.passed(watch.failed_at, self.rules.flap_seconds):
                    continue
                words = f"not said again for {duration(EVENT_QUIET)}"
            elif not event and self.passed(watch.seen_at, ABSENT):
                words = "is no longer looked at"
            elif not event and self.passed(watch.judged_at, UNJUDGED):
                words = "could not be judged for a week"
            else:
                if not watch.is_open and watch.bad == 0 and not self._recent(watch):
                    del self.watches[name]
                continue
            watch = self._ended(watch, words) if watch.is_open else replace(watch, bad=0, hot=0)
            self.watches[name] = watch
            if not self._recent(watch):
                del self.watches[name]

    # --- incidents ---

    def assign(self) -> None:
        """Gives every open check its incident."""
        groups: dict[str, str] = {}
        for case in self.cases.values():
            groups.setdefault(case.group, case.id)
        for name in list(self.watches):
            self._place(name, groups)

    def _place(self, name: str, groups: dict[str, str]) -> None:
        watch = self.watches[name]
        if not watch.is_open or watch.incident or self.ruling(name).mute:
            return
        cause = self._cause(watch)
        if cause:
            self._place(cause, groups)  # the tables have no circles
            self._join(name, self.watches[cause].incident)
            return
        group = group_of(name)
        if group not in groups:
            groups[group] = self._begin(group, watch)
        self._join(name, groups[group])

    def _begin(self, group: str, watch: Watch) -> str:
        self.opened += 1
        name = f"{_UNFIT.sub('-', group)}-{watch.since.astimezone(UTC):%Y%m%dT%H%M%S}-{self.opened}"
        self.cases[name] = Case(
            id=name,
            group=group,
            opened_at=watch.since,
            severity=self._severity(watch),
            title=title([watch]),
            due=self.now + timedelta(seconds=self.rules.group_seconds),
        )
        return name

    def _join(self, name: str, incident: str) -> None:
        case = self.cases[incident]
        checks = case.checks
        if name not in checks and len(checks) < MOST_NAMED:
            checks = (*checks, name)
        ended = {check: words for check, words in case.ended.items() if check != name}
        opened_at = case.opened_at
        if case.told_at is None:
            opened_at = min(opened_at, self.watches[name].since)
        self.cases[incident] = replace(case, checks=checks, ended=ended, opened_at=opened_at)
        self.watches[name] = replace(self.watches[name], incident=incident)

    def explain(self) -> None:
        """Finds for each open check what explains it, or may be about to."""
        for name, watch in list(self.watches.items()):
            if not watch.is_open:
                continue
            cause = self._cause(watch)
            if cause or (cause == "" and not self.passed(watch.opened_at, CAUSE_WAIT)):
                self._explained[name] = cause
            if bool(cause) != watch.explained:
                freed_at = None if cause else self.now
                self.watches[name] = replace(watch, explained=bool(cause), freed_at=freed_at)

    def _cause(self, watch: Watch, behind: Behind = explaining) -> str | None:
        """The open check that explains this one; "" if one that could has begun to fail; None."""
        begun = False
        for name in behind(watch.check, self.watches):
            other = self.watches[name]
            if name == watch.check or self.ruling(name).mute:
                continue  # what is never told explains nothing: somebody has to hear of it
            if other.is_open:
                # One that stays open until it is steady may have worked for long.
                fails = other.bad or not self.passed(other.failed_at, RECOVERY)
                if fails and rank(other.severity) >= rank(watch.severity):
                    return name
            elif other.bad:
                begun = True
        return "" if begun else None

    def gather(self) -> None:
        """Moves what nobody has been told of to the incidents of what is behind it, where that began later."""
        left: set[str] = set()
        moved = True
        while moved:  # a cause may move itself; the tables have no circles, so this ends
            moved = False
            for name, watch in list(self.watches.items()):
                case = self.cases.get(watch.incident)
                if case is None or case.told_at is not None or not watch.is_open:
                    continue
                cause = self._explained.get(name) or self._cause(watch, near)
                target = self.watches[cause].incident if cause else ""
                if target and target != case.id:
                    self._join(name, target)
                    left.add(case.id)
                    moved = True
        if left:
            members = self._members()
            for incident in [name for name in self.cases if name in left]:
                self._shrink(incident, members.get(incident, []))

    def _shrink(self, incident: str, stay: list[Watch]) -> None:
        if not stay:
            del self.cases[incident]
            return
        first = min(stay, key=lambda watch: watch.since)
        checks = tuple(watch.check for watch in stay[:MOST_NAMED])
        self.cases[incident] = replace(
            self.cases[incident],
            opened_at=first.since,
            title=title([first]),
            severity=self._severity(first),
            checks=checks,
        )

    def _members(self) -> dict[str, list[Watch]]:
        """The failing checks of every incident."""
        members: dict[str, list[Watch]] = {}
        for watch in self.watches.values():
            if watch.is_open and watch.incident:
                members.setdefault(watch.incident, []).append(watch)
        return members

    # --- telling ---

    def tell(self) -> None:
        members = self._members()
        for incident in list(self.cases):
            failing = members.get(incident, [])
            if failing:
                self._tell_failing(self.cases[incident], failing)
            else:
                self._tell_over(self.cases[incident])

    def _tell_over(self, case: Case) -> None:
        if case.recovered_at is None:
            case = self.cases[case.id] = replace(case, recovered_at=self.now, due=None)
        if case.told_at is not None:
            if case.checks and self.held(case.checks[0]):
                return  # it may yet fail again before the window ends; then the incident goes on
            lasted = duration(((case.recovered_at or self.now) - case.opened_at).total_seconds())
            lines = [
                f"It lasted {lasted}, since {moment(case.opened_at)}.",
                *shown(f"{check}: {words}" for check, words in case.ended.items()),
            ]
            self._notice(case, "closed", "closed", case.severity, case.title, lines, case.checks)
        del self.cases[case.id]
        self.incidents[case.id] = incident_of(case, closed_at=max(case.recovered_at or self.now, case.opened_at))

    def _tell_failing(self, case: Case, failing: list[Watch]) -> None:
        case = self.cases[case.id] = replace(case, recovered_at=None)
        loud = sorted((watch for watch in failing if self._is_loud(watch)), key=self._rank)
        if not loud:
            return
        news = [watch for watch in loud if not watch.told]
        severity = max((self._severity(watch) for watch in loud), key=rank)
        if case.told_at is None:
            if case.due is None or self.now >= case.due:
                self._open(case, loud, failing, severity)
            return
        worse = rank(severity) > rank(case.severity)
        if worse:
            due: datetime | None = self.now
        elif news:
            group = self.rules.group_seconds
            wait = min(group * 2 ** min(case.escalations, DOUBLINGS), max(MOST_WAIT, group))
            due = case.due or self.now + timedelta(seconds=wait)
        else:
            due = None
        case = self.cases[case.id] = replace(case, due=due)
        if due is not None:
            if self.now >= due:
                self._escalate(case, loud, news, failing, severity)
            return
        if case.severity == "info":
            return  # said once; there is nothing to do about it
        remind = min(self.ruling(watch.check).remind_seconds for watch in loud)
        judged = any(watch.judged_at == self.now for watch in loud if not is_within(watch.check, EVENT))
        if judged and self.passed(case.told_at, remind):
            self._remind(case, loud, failing, severity)

    def _is_loud(self, watch: Watch) -> bool:
        """Whether it is to be told: nothing explains it, or has just done so, and nothing holds it back."""
        if watch.check in self._explained or self.ruling(watch.check).mute or self.held(watch.check):
            return False
        return watch.freed_at is None or self.passed(watch.freed_at, RECOVERY)

    def _severity(self, watch: Watch) -> Severity:
        return min(watch.severity, self.ruling(watch.check).most, key=rank)

    def _rank(self, watch: Watch) -> tuple[int, datetime, str]:
        return -rank(self._severity(watch)), watch.since, watch.check

    def _open(self, case: Case, loud: list[Watch], failing: list[Watch], severity: Severity) -> None:
        case = replace(case, severity=severity, title=title(loud), checks=_main_first(loud, case.checks))
        lines = [f"Since {moment(case.opened_at)}.", *self._lines(loud, failing)]
        self._notice(case, "opened", "opened", severity, case.title, lines, self._about(loud, failing))
        self._told(replace(case, told_at=self.now, due=None), loud)

    def _escalate(
        self, case: Case, loud: list[Watch], news: list[Watch], failing: list[Watch], severity: Severity
    ) -> None:
        worse = rank(severity) > rank(case.severity)
        first = loud if worse else [*news, *(watch for watch in loud if watch not in news)]
        number = case.escalations + 1
        case = replace(case, escalations=number)
        if worse:
            case = replace(case, severity=severity, title=title(loud))
        lines = [
            f"Severity is {case.severity} now." if worse else "More fails than before.",
            f"The incident lasts since {moment(case.opened_at)}.",
            *self._lines(first, failing),
            *back(case),
        ]
        self._notice(
            case, "escalated", f"escalated:{number}", severity, title(first), lines, self._about(first, failing)
        )
        self._told(replace(case, told_at=self.now, due=None), loud)

    def _remind(self, case: Case, loud: list[Watch], failing: list[Watch], severity: Severity) -> None:
        number = case.reminders + 1
        lasted = duration((self.now - case.opened_at).total_seconds())
        lines = [f"It lasts for {lasted}, since {moment(case.opened_at)}.", *self._lines(loud, failing), *back(case)]
        self._notice(case, "reminder", f"reminder:{number}", severity, title(loud), lines, self._about(loud, failing))
        self._told(replace(case, reminders=number, told_at=self.now), loud)

    def _told(self, case: Case, loud: list[Watch]) -> None:
        self.cases[case.id] = case
        for watch in loud:
            self.watches[watch.check] = replace(watch, told=True)

    def _with(self, loud: list[Watch], failing: list[Watch]) -> list[str]:
        """Who fails with them and is explained; what is held back is not named."""
        named = {watch.check for watch in loud}
        return sorted(
            watch.check
            for watch in failing
            if watch.check not in named and not self.ruling(watch.check).mute and not self.held(watch.check)
        )

    def _about(self, loud: list[Watch], failing: list[Watch]) -> tuple[str, ...]:
        return (*(watch.check for watch in loud), *self._with(loud, failing))[:MOST_NAMED]

    def _lines(self, loud: list[Watch], failing: list[Watch]) -> list[str]:
        lines = shown(f"{watch.check} ({self._severity(watch)}): {watch.message}" for watch in loud)
        if any(watch.steady for watch in loud):
            names = ", ".join(watch.check for watch in loud if watch.steady)
            lines.append(
                f"It comes and goes: {names} counts as failing until it has been steady for "
                f"{duration(self.rules.flap_seconds)}."
            )
        with_it = self._with(loud, failing)
        if with_it:
            named = ", ".join(with_it[:MOST_SHOWN])
            more = f" and {len(with_it) - MOST_SHOWN} more" if len(with_it) > MOST_SHOWN else ""
            lines.append(f"Fails with it, probably because of it: {named}{more}.")
        return lines

    def _notice(
        self,
        case: Case,
        kind: Kind,
        suffix: str,
        severity: Severity,
        title: str,
        lines: Sequence[str],
        checks: tuple[str, ...],
    ) -> None:
        """``severity`` is that of now; of what is over, the worst that it has been."""
        self.notices.append(
            Notice(
                id=f"{case.id}:{suffix}",
                kind=kind,
                severity=severity,
                title=title,
                lines=tuple(lines),
                at=self.now,
                incident=case.id,
                checks=checks,
            )
        )

    # --- result ---

    def step(self) -> Step:
        for name, case in self.cases.items():
            if case.told_at is not None:
                incident = incident_of(case)
                old = self.before.cases.get(name)
                if old is None or old.told_at is None or incident_of(old) != incident:
                    self.incidents[name] = incident
        state = AlertState(at=self.now, watches=self.watches, cases=self.cases, opened=self.opened)
        return Step(state, tuple(self.notices), tuple(self.incidents.values()))


def _main_first(loud: Sequence[Watch], checks: tuple[str, ...]) -> tuple[str, ...]:
    """The incident's checks with the main one in front."""
    main = loud[0].check
    return (main, *(name for name in checks if name != main))
