"""What the health monitor finds and tells, as frozen structs: results of checks, and notices about incidents."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

UtcTime = Annotated[datetime, Meta(tz=True)]
Severity = Literal["info", "warning", "critical"]
Status = Literal["ok", "warning", "critical", "skipped"]
Kind = Literal["opened", "escalated", "reminder", "closed", "test", "report"]

SEVERITIES: Final[tuple[Severity, ...]] = ("info", "warning", "critical")

# The first token of every check's name; rules and windows that name another are a mistake.
KINDS: Final = (
    "database",
    "pgbouncer",
    "nats",
    "disk",
    "endpoint",
    "actor",
    "feed",
    "model",
    "backup",
    "certificate",
    "container",
    "runner",
    "outbox",
    "event",
)


class CheckResult(Struct, frozen=True, kw_only=True):
    """One look at one thing. ``check`` is dotted, its kind first: ``database``, ``feed.M1.EURUSD``, ``disk.home``.

    ``skipped`` says nothing for or against: what would be looked at is not there (no Docker, no runner), or cannot be
    judged now. ``value`` is in ``unit``; ``latency`` is how long the look took, in seconds. ``message`` is one sentence that
    a person understands, with the way out where something is wrong.
    """

    check: str
    status: Status
    at: UtcTime
    message: str
    value: float | None = None
    unit: str = ""
    latency: float = 0.0


class Notice(Struct, frozen=True, kw_only=True):
    """One thing that a person is told once, through every sender: one mail, one call of the webhook, one message.

    ``id`` is a pure function of the incident, the kind and its number, so that what is sent again is known as the same.
    ``lines`` are plain text; ``html`` and ``pictures`` (PNG by content id) are the daily report's.
    """

    id: str
    kind: Kind
    severity: Severity
    title: str
    lines: tuple[str, ...]
    at: UtcTime
    incident: str = ""
    checks: tuple[str, ...] = ()
    html: str = ""
    pictures: dict[str, bytes] = {}
