"""When a bar ends and whether an open time lies on its timeframe's grid, in the clock that the times are given in."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from schema.timeframes import SECONDS

# 1970-01-04 was the first Sunday: MT5's weeks open on Sunday at 00:00.
_FIRST_SUNDAY: Final = 3 * 86_400
FORWARD_BARS: Final = 5  # bars ahead that a label looks
FORWARD_SPAN: Final = 10  # bars of time that those five bars may span before the label is void


def from_epoch(ts: int) -> datetime:
    """Epoch seconds as an aware UTC datetime."""
    return datetime.fromtimestamp(ts, UTC)


def bar_end(ts: int, timeframe: str) -> int:
    """The open time of the next grid step (epoch seconds): the moment at which the bar that opened at ``ts`` is over."""
    if timeframe != "MN1":
        return ts + SECONDS[timeframe]
    opened = from_epoch(ts)
    year, month = divmod(opened.year * 12 + opened.month, 12)
    return int(datetime(year, month + 1, 1, tzinfo=UTC).timestamp())


def on_grid(ts: int, timeframe: str) -> bool:
    """Whether a bar may open at ``ts``: multiples of the length from midnight, W1 on Sunday, MN1 on the 1st."""
    if timeframe == "MN1":
        opened = from_epoch(ts)
        return ts % 86_400 == 0 and opened.day == 1
    if timeframe == "W1":
        return (ts - _FIRST_SUNDAY) % SECONDS["W1"] == 0
    return ts % SECONDS[timeframe] == 0


def forward_span(timeframe: str) -> int:
    """Seconds that five following bars may span for ``fwd_ret_5`` to mean what it says."""
    return FORWARD_SPAN * SECONDS[timeframe]


def end_time(ts: datetime, timeframe: str) -> datetime:
    """:func:`bar_end` for aware datetimes."""
    return ts + timedelta(seconds=bar_end(int(ts.timestamp()), timeframe) - int(ts.timestamp()))
