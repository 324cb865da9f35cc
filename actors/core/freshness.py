"""Whether a live series has gone silent: judged by its own sessions, so that nights, weekends and holidays are none.

The bars that should have come since the newest one are taken for a hole and given to :mod:`actors.core.gaps`: what it
would call a loss, had the feed come back just now, is a stale feed.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Literal

from actors.core.gaps import Gap, classify
from actors.core.holidays import is_closed_day, is_short_day
from actors.core.sessions import DAY, HOUR, Calendar
from actors.core.timeframe import bar_end

State = Literal["fresh", "closed", "quiet", "stale", "ended"]

ENDED: Final = 14 * DAY  # of silence, after which a series is no longer traded or has another name
HOLIDAY: Final = "holiday "  # how actors/core/gaps.py names them
NEAR: Final = timedelta(hours=3)  # a closed day's own clock may differ from ours by this much
LIVE: Final = HOUR  # a bar that came within this time of its end came live, and not from a file


@dataclass(frozen=True, slots=True)
class Freshness:
    """``missing`` bars of open session have not come, which is ``overdue`` seconds; ``session`` names a closed one."""

    state: State
    overdue: float = 0.0
    missing: int = 0
    session: str = ""


def patience_of(timeframe_step: int, patience: float) -> float:
    """How long after its end a bar may come: bars above an hour follow the broker's day, which moves by an hour."""
    return patience + (HOUR if timeframe_step > HOUR else 0)


def is_due(timeframe: str, step: int, head: int, now: float, patience: float) -> bool:
    """Whether the bar after ``head`` should be there, were the market open all the time. Epoch seconds."""
    return now >= bar_end(bar_end(head, timeframe), timeframe) + patience_of(step, patience)


def is_live(opened: int, timeframe: str, received: float) -> bool:
    """Whether a bar came when it was over, as a live feed's does; a file's comes at any time."""
    return received - bar_end(opened, timeframe) <= LIVE


def freshness(calendar: Calendar, head: int, now: float, patience: float) -> Freshness:
    """``head`` is the newest bar's open time; ``calendar`` may be some hours older. Epoch seconds."""
    timeframe, step = calendar.timeframe, calendar.step
    if not is_due(timeframe, step, head, now, patience):
        return Freshness("fresh")
    if now - head > ENDED + 2 * step:
        return Freshness("ended", overdue=now - head)
    limit = now - patience_of(step, patience)
    if step > HOUR:
        before = calendar.following(head)
        while calendar.following(before) <= limit:
            before = calendar.following(before)
    else:
        before = head + int(limit - head) // step * step
    gaps = classify(calendar, head, before)
    shut = [_is_shut(gap) for gap in gaps]
    missing = sum(gap.count for gap, is_shut in zip(gaps, shut, strict=True) if not is_shut)
    overdue = float(missing * step)
    if any(gap.kind != "no tick" and not is_shut for gap, is_shut in zip(gaps, shut, strict=True)):
        return Freshness("stale", overdue, missing)
    if gaps and shut[-1]:
        return Freshness("closed", overdue, missing, gaps[-1].name or "closed session")
    return Freshness("quiet", overdue, missing)


def _is_shut(gap: Gap) -> bool:
    """Whether nothing was to come. A session that is missing whole passes for a holiday afterwards: here it must be a
    known one, or a feed that dies for a day would be well again at the day's end.
    """
    if gap.kind != "closed session":
        return False
    if gap.name is None or not gap.name.startswith(HOLIDAY):
        return True
    day, last = gap.from_ - NEAR, gap.to + NEAR
    while day <= last:
        if is_closed_day(day) or is_short_day(day):
            return True
        day = min(day + timedelta(days=1), last) if day < last else last + NEAR
    return False
