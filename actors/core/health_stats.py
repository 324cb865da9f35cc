"""A check's figures over a period, from its results in order of time."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import Final, NamedTuple

from msgspec import Struct

from schema.health import Status

# A result stands until the check's next one, and at most this long: what nobody looked at says nothing. Longer than
# the distance at which old results are kept (actors/monitor/journal.py) and than the rarest checks' beat.
HOLD: Final = 900.0
QUANTILE: Final = 0.95


class Look(NamedTuple):
    """One result as the statistics need it: epoch seconds, seconds of latency."""

    at: float
    status: Status
    value: float | None
    latency: float


class Figures(Struct, frozen=True, kw_only=True):
    """``p95`` is the value that 95 % of the others do not exceed (nearest rank)."""

    average: float
    minimum: float
    maximum: float
    p95: float


class CheckStats(Struct, frozen=True, kw_only=True):
    """One check over a period. ``uptime`` is the share of the time looked at in which it was not critical, ``quiet`` the
    share in which it was ok; None where nothing but skipped results stood. ``seconds`` is the time that both are of.
    ``latency`` is in seconds, ``value`` in ``unit``; skipped results count for neither.
    """

    check: str
    count: int
    ok: int
    warning: int
    critical: int
    skipped: int
    seconds: float
    uptime: float | None
    quiet: float | None
    latency: Figures | None
    value: Figures | None
    unit: str = ""


def figures(values: Iterable[float]) -> Figures | None:
    """None where there is no value."""
    ordered = sorted(values)
    if not ordered:
        return None
    low, high = ordered[0], ordered[-1]
    return Figures(
        average=min(max(sum(ordered) / len(ordered), low), high),  # a sum rounds: the mean of equal values is theirs
        minimum=low,
        maximum=high,
        p95=ordered[ceil(QUANTILE * len(ordered)) - 1],
    )


def summarise(check: str, looks: Iterable[Look], *, since: float, until: float, unit: str = "") -> CheckStats:
    """``looks`` ascend in time; one before ``since`` may lead them, whose state reaches into the period.

    Times are epoch seconds.
    """
    counts: dict[Status, int] = {"ok": 0, "warning": 0, "critical": 0, "skipped": 0}
    lasted: dict[Status, float] = dict.fromkeys(counts, 0.0)
    values: list[float] = []
    latencies: list[float] = []
    before: Look | None = None
    for look in looks:
        if before is not None:
            lasted[before.status] += _overlap(before.at, look.at, since, until)
        before = look
        if not since <= look.at < until:
            continue
        counts[look.status] += 1
        if look.status != "skipped":
            latencies.append(look.latency)
            if look.value is not None:
                values.append(look.value)
    if before is not None:
        lasted[before.status] += _overlap(before.at, until, since, until)
    seconds = lasted["ok"] + lasted["warning"] + lasted["critical"]
    return CheckStats(
        check=check,
        count=sum(counts.values()),
        **counts,
        seconds=seconds,
        uptime=(lasted["ok"] + lasted["warning"]) / seconds if seconds else None,
        quiet=lasted["ok"] / seconds if seconds else None,
        latency=figures(latencies),
        value=figures(values),
        unit=unit,
    )


def _overlap(begin: float, end: float, since: float, until: float) -> float:
    """How long a result that stood from ``begin`` to ``end`` did so within the period."""
    return max(0.0, min(end, begin + HOLD, until) - max(begin, since))
