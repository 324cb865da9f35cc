"""The facts of a daily report: what was seen of a period, ``since`` to ``until``.

What could not be asked is None or empty and has a sentence in ``Daily.problems`` under its section's name: a day on which
PostgreSQL is dead is the day on which the report is needed.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from msgspec import Meta, Struct

from actors.core.alerts import Incident
from schema.health import Status
from schema.scorecard import Card

UtcTime = Annotated[datetime, Meta(tz=True)]
Look = Literal[-1, 0, 1, 2]  # of a slot of time: nobody looked, all was well, a warning, critical


class Service(Struct, frozen=True, kw_only=True):
    """A service over the period: one check, or several of one kind, of which the worst counts.

    ``status`` is the newest one; ``fine`` the share of looks at the worst of its checks that were not critical; ``slow`` the
    95th percentile of a look's seconds; ``strip`` the worst look of each slot.
    """

    name: str
    status: Status
    message: str
    checks: int
    failing: tuple[str, ...]
    fine: float | None
    slow: float | None
    strip: tuple[Look, ...]


class Watch(Struct, frozen=True, kw_only=True):
    """What the health monitor saw. ``covered`` is the share of the slots in which it looked at anything."""

    services: tuple[Service, ...]
    absent: tuple[str, ...]  # of what is not here to be looked at
    covered: float
    incidents: tuple[Incident, ...]
    waiting: int = 0  # notices that no sender has taken yet


class Hour(Struct, frozen=True, kw_only=True):
    """Bars that came and signals that were made within an hour from ``at`` on."""

    at: UtcTime
    live: int = 0
    history: int = 0
    up: int = 0
    down: int = 0
    none: int = 0


class Series(Struct, frozen=True, kw_only=True):
    """``newest`` is the open time of its newest bar of those that came."""

    symbol: str
    timeframe: str
    bars: int
    revised: int
    newest: UtcTime | None
    up: int = 0
    down: int = 0
    none: int = 0


class Market(Struct, frozen=True, kw_only=True):
    """Bars by when they came and signals by when they were made. ``reasons`` counts abstentions; ``p50`` and ``p95`` are seconds
    from a candle's coming to its signal.
    """

    hours: tuple[Hour, ...]
    series: tuple[Series, ...]  # those with most bars first
    more: int  # series beside these
    revised: int
    superseded: int
    reasons: dict[str, int]
    p50: float | None
    p95: float | None

    @property
    def bars(self) -> int:
        return sum(hour.live + hour.history for hour in self.hours)

    @property
    def live(self) -> int:
        return sum(hour.live for hour in self.hours)

    @property
    def signals(self) -> int:
        return sum(hour.up + hour.down + hour.none for hour in self.hours)

    @property
    def traded(self) -> int:
        return sum(hour.up + hour.down for hour in self.hours)


class Version(Struct, frozen=True, kw_only=True):
    """A version that serves or is followed; ``auc`` is of its training. The rest is what came true within the period."""

    model_name: str
    version: str
    timeframe: str
    state: str
    created_at: UtcTime
    auc: float | None
    outcomes: int = 0
    hit_rate: float | None = None  # the likelier side was right
    gain: float | None = None  # Brier score better than the base rate's by
    trades: int = 0
    net: float | None = None  # mean return of a trade


class Step(Struct, frozen=True, kw_only=True):
    """A decision about a version."""

    at: UtcTime
    model_name: str
    version: str
    action: str
    by: str
    reason: str


class Skill(Struct, frozen=True, kw_only=True):
    """How much better than the base rate's a version's Brier score was over the ``window`` outcomes up to each time."""

    version: str
    window: int
    ts: tuple[float, ...]
    values: tuple[float, ...]


class Models(Struct, frozen=True, kw_only=True):
    versions: tuple[Version, ...]
    steps: tuple[Step, ...]
    cards: tuple[Card, ...]
    skills: tuple[Skill, ...]
    audited: int
    different: int  # signals that could not be made again bit by bit


class Copy(Struct, frozen=True, kw_only=True):
    """The newest backup that something became of; ``rpo`` is the age of its newest data in seconds."""

    event: str
    backup: str
    at: UtcTime
    bytes: int
    seconds: float
    rpo: float | None
    target: str
    error: str


class Backups(Struct, frozen=True, kw_only=True):
    """``newest`` by what became of them: made, shipped, verified, drilled, failed. ``wanted``: a schedule or target is set."""

    newest: dict[str, Copy]
    kept: int  # in this home
    wanted: bool


class Disk(Struct, frozen=True, kw_only=True):
    """A file system; bytes."""

    name: str
    free: int
    total: int

    @property
    def share(self) -> float:
        return self.free / self.total if self.total else 0.0


class Line(Struct, frozen=True, kw_only=True):
    """A figure over time: epoch seconds and values, ``full`` what it may reach at most."""

    name: str
    ts: tuple[float, ...]
    values: tuple[float, ...]
    full: float | None = None


class Room(Struct, frozen=True, kw_only=True):
    disks: tuple[Disk, ...]
    warn: float  # free shares from which on it is a warning, and critical
    critical: float
    database: int | None  # bytes
    growth: float | None  # bytes a day, over the days of its line
    lines: tuple[Line, ...]


class Job(Struct, frozen=True, kw_only=True):
    """The newest run of what a timer starts."""

    name: str
    at: UtcTime
    ok: bool
    seconds: float
    summary: str


class Commit(Struct, frozen=True, kw_only=True):
    id: str
    at: UtcTime
    author: str
    subject: str


class Daily(Struct, frozen=True, kw_only=True):
    """The report. ``day``: of a whole UTC day in the past, not of the hours up to now."""

    since: UtcTime
    until: UtcTime
    made_at: UtcTime
    day: bool
    host: str
    release: str
    watch: Watch | None = None
    market: Market | None = None
    models: Models | None = None
    backups: Backups | None = None
    room: Room | None = None
    jobs: tuple[Job, ...] = ()
    commits: tuple[Commit, ...] = ()
    problems: dict[str, str] = {}
