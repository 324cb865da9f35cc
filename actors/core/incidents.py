"""What the alert rules remember and what comes of a step: structs, JSON-encodable and bounded."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from schema.health import Notice, Severity, UtcTime


class Watch(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A check that fails, or has lately. Counts are of results in a row.

    ``seen_at`` and ``judged_at`` are when it was last looked at, and last with an answer; they are moved by what the monitor
    did not run. ``severity`` is the worst that it has been confirmed to be while it is open; ``since`` its first failure;
    ``told`` whether a notice has named it since it opened; ``steady``: open until it has not failed for ``flap_seconds``;
    ``freed_at``: when what had explained it was over.
    """

    check: str
    bad: int = 0
    hot: int = 0  # of the failures in a row, the last so many were critical
    good: int = 0
    message: str = ""
    severity: Severity = "warning"
    since: UtcTime
    failed_at: UtcTime
    seen_at: UtcTime
    judged_at: UtcTime
    opened_at: UtcTime | None = None
    openings: tuple[UtcTime, ...] = ()
    steady: bool = False
    incident: str = ""
    told: bool = False
    explained: bool = False
    freed_at: UtcTime | None = None

    @property
    def is_open(self) -> bool:
        return self.opened_at is not None


class Case(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An incident at work. ``due``: when its news are told; ``told_at``: the last notice, None before the first.

    ``checks``: those it has been about, what began it first. ``ended``: what its checks said when they came back.
    """

    id: str
    group: str
    opened_at: UtcTime
    severity: Severity
    title: str
    checks: tuple[str, ...] = ()
    due: UtcTime | None = None
    told_at: UtcTime | None = None
    escalations: int = 0
    reminders: int = 0
    recovered_at: UtcTime | None = None
    ended: dict[str, str] = {}


class AlertState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that the rules remember, JSON-encodable. ``opened`` counts incidents, so that no two have the same id."""

    at: UtcTime | None = None
    watches: dict[str, Watch] = {}
    cases: dict[str, Case] = {}
    opened: int = 0


class Incident(Struct, frozen=True, kw_only=True):
    """What became of an incident. ``severity`` is the worst that it has been."""

    id: str
    opened_at: UtcTime
    closed_at: UtcTime | None
    severity: Severity
    title: str
    checks: tuple[str, ...]


class Step(NamedTuple):
    """The state that follows, what is to be told, and the incidents that changed: one transaction's content."""

    state: AlertState
    notices: tuple[Notice, ...]
    incidents: tuple[Incident, ...]


def incident_of(case: Case, closed_at: datetime | None = None) -> Incident:
    """The case as others see it."""
    return Incident(
        id=case.id,
        opened_at=case.opened_at,
        closed_at=closed_at,
        severity=case.severity,
        title=case.title,
        checks=case.checks,
    )


def standing(state: AlertState) -> tuple[Incident, ...]:
    """The incidents that have been told and are not over, oldest first."""
    told = [incident_of(case) for case in state.cases.values() if case.told_at is not None]
    return tuple(sorted(told, key=lambda one: (one.opened_at, one.id)))


def turned_back(state: AlertState, by: timedelta) -> AlertState:
    """The state as if it had always been earlier by so much: a clock set back must not postpone what is due."""

    def earlier(at: datetime | None) -> datetime | None:
        return None if at is None else at - by

    return replace(
        state,
        watches={
            name: replace(
                watch,
                since=watch.since - by,
                failed_at=watch.failed_at - by,
                opened_at=earlier(watch.opened_at),
                openings=tuple(at - by for at in watch.openings),
                seen_at=watch.seen_at - by,
                judged_at=watch.judged_at - by,
                freed_at=earlier(watch.freed_at),
            )
            for name, watch in state.watches.items()
        },
        cases={
            name: replace(
                case, due=earlier(case.due), told_at=earlier(case.told_at), recovered_at=earlier(case.recovered_at)
            )
            for name, case in state.cases.items()
        },
    )
