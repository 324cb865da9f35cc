"""GET /candles/gaps: what is missing of a series and why."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from aiohttp import web
from msgspec.structs import replace

from actors.core.gaps import AHEAD, Gap, Kind, report
from actors.core.sessions import ServerClock, Span
from actors.core.timeframe import from_epoch
from actors.gateway.problems import HttpProblem, answer
from actors.gateway.query import MAX_LIMIT, Query, required
from actors.gateway.reads import Reads
from bus.store import Holes
from schema.messages import Message, UtcTime

BARS: Final = 200_000  # of a series, the newest, that a report is made of: half a year of M1
KINDS: Final[tuple[Kind, ...]] = ("closed session", "no tick", "transport loss")


class GapReport(Message, frozen=True, omit_defaults=False):
    """A series' missing bars, oldest first; ``missing`` counts bars by class. ``first``, ``last`` and ``bars`` say what it is made of."""

    symbol: str
    timeframe: str
    first: UtcTime
    last: UtcTime
    bars: int
    missing: dict[str, int]
    gaps: tuple[Gap, ...]


class Gaps(Reads):
    """The handler over the gateway's parts."""

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/candles/gaps", self.gaps)]

    async def gaps(self, request: web.Request) -> web.StreamResponse:
        query = Query(request, "symbol", "timeframe", "from", "to", "limit")
        symbol = required("symbol", query.symbol())
        timeframe = required("timeframe", query.timeframe())
        start, end, limit = query.time("from"), query.time("to"), query.limit(MAX_LIMIT)
        if start is not None and end is not None and start > end:
            raise HttpProblem(400, "from is after to: swap them.")
        around = widened(start, end)
        holes = await self._only_archived(
            lambda store: store.holes(symbol, timeframe, start=around[0], end=around[1], limit=BARS)
        )
        if holes is None:
            raise HttpProblem(404, f"The archive has no bar of {symbol} {timeframe} there: check the spelling.")
        clock = self._deps.clock_of(holes.source)
        made = await asyncio.get_running_loop().run_in_executor(
            None, gap_report, symbol, timeframe, holes, clock, start, end, self._deps.given_up(symbol, timeframe)
        )
        return answer(replace(made, gaps=made.gaps[-limit:]))


def widened(start: datetime | None, end: datetime | None) -> tuple[datetime | None, datetime | None]:
    """The span whose bars teach the sessions of a span."""
    weeks = timedelta(seconds=AHEAD)
    floor, ceiling = from_epoch(0) + weeks, from_epoch(253_000_000_000)
    return (
        None if start is None else max(start, floor) - weeks,
        None if end is None else min(end, ceiling) + weeks,
    )


def gap_report(
    symbol: str,
    timeframe: str,
    holes: Holes,
    clock: ServerClock,
    start: datetime | None = None,
    end: datetime | None = None,
    given_up: Sequence[Span] = (),
) -> GapReport:
    """The gaps that reach into a span; a loss that the terminals have not got either is told as no tick."""
    found = [
        _known_empty(gap, given_up)
        for gap in report(timeframe, holes.first, holes.holes, holes.last, clock)
        if (start is None or gap.to >= start) and (end is None or gap.from_ <= end)
    ]
    return GapReport(
        symbol=symbol,
        timeframe=timeframe,
        first=from_epoch(holes.first),
        last=from_epoch(holes.last),
        bars=holes.bars,
        missing={kind: sum(gap.count for gap in found if gap.kind == kind) for kind in KINDS},
        gaps=tuple(found),
    )


def _known_empty(gap: Gap, given_up: Sequence[Span]) -> Gap:
    if gap.kind == "transport loss":
        first, last = int(gap.from_.timestamp()), int(gap.to.timestamp())
        if any(a <= first and last <= b for a, b in given_up):
            return replace(gap, kind="no tick", name="asked for in vain")
    return gap
