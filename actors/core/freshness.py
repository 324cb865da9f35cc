"""Whether a live series has gone silent: judged by its own sessions, so that nights, weekends and holidays are none.

The bars that should have come since the newest one are taken for a hole and given to :mod:`actors.core.gaps`: what it
would call a loss, had the feed come back just now, is a stale feed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from actors.core.gaps import classify
from actors.core.sessions import DAY, HOUR, Calendar
from actors.core.timeframe import bar_end

State = Literal["fresh", "closed", "quiet", "stale", "ended"]

ENDED: Final = 14 * DAY  # of silence, after which a series is no longer traded or has another name
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
    missing = sum(gap.count for gap in gaps if gap.kind != "closed session")
    overdue = float(missing * step)
    if any(gap.kind == "transport loss" for gap in gaps):
        return Freshness("stale", overdue, missing)
    if gaps and gaps[-1].kind == "closed session":
        return Freshness("closed", overdue, missing, gaps[-1].name or "closed session")
    return Freshness("quiet", overdue, missing)
