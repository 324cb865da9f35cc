"""What bars by themselves say about a sender's clock: its offset from the newest bar, its family from week openings.

Pure. Foreign exchange opens on Sunday at 17:00 in New York. Seen through a sender's clock that moment moves with New
York's daylight saving and with the sender's own, and so eight openings around a change tell which one that is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from msgspec import Struct

from actors.core.clock import DAY, HOUR, LONDON, NEW_YORK, SAME_PHASE, Steps, Zones, offset_in
from schema.clock import HIGHEST, LOWEST, STEP, ClockRun, rule_text
from schema.timeframes import SECONDS

FIRST_SUNDAY: Final = 3 * DAY  # 1970-01-04
WEEK: Final = 7 * DAY
MAX_RUNS: Final = 64

AHEAD: Final = (STEP, HIGHEST)  # a newest bar so far ahead of our clock cannot be UTC
FINE: Final = 360  # the newest bar of M1 to M6 tells the offset to a quarter of an hour
COARSE: Final = HOUR  # that of M10 to H1 to the hour; longer bars tell nothing
LATE: Final = 300  # seconds that a fresh bar may take to reach us

OPENINGS: Final = 8
KEPT_OPENINGS: Final = 60  # a year and a few weeks
KEPT_SERIES: Final = 12
# A hole between two bars in which a week began: 48 hours, an hour more or less where a clock changes or a symbol opens
# later. In a longer one the first bar may have been lost.
WEEKEND: Final = (46 * HOUR + 1_800, 50 * HOUR + 1_800)
OPENS_WITHIN: Final = 90 * 60  # after Sunday 17:00 New York: some symbols open an hour later
AGREEING: Final = 0.9  # share of a series' openings that must agree; holidays open late


def with_observation(runs: Sequence[ClockRun], seen: ClockRun) -> tuple[ClockRun, ...] | None:
    """The runs with one observation more (``since`` equals ``until``); None where a run says otherwise for that time."""
    at, offset = seen.since, seen.offset
    after = sum(run.since <= at for run in runs)
    before, following = list(runs[:after]), list(runs[after:])
    if before and at <= before[-1].until:
        return tuple(runs) if before[-1].offset == offset else None
    since, until = at, at
    if before and before[-1].offset == offset and at - before[-1].until <= SAME_PHASE:
        since = before.pop().since
    if following and following[0].offset == offset and following[0].since - at <= SAME_PHASE:
        until = following.pop(0).until
    joined = ClockRun(since=since, until=until, offset=offset, origin=seen.origin)
    return (*before, joined, *following)[-MAX_RUNS:]


class Newest(NamedTuple):
    """What the newest bar of a payload says: the offset of now, how sure that is, and the bar's own time."""

    offset: int
    bar: int
    fine: bool
    fresh: bool  # at most a bar and a few minutes old by that offset
    ahead: bool  # it and the bar before it are too far ahead to be UTC


def newest_bar(series: Mapping[tuple[str, str], Sequence[int]], now: float) -> Newest | None:
    """The offset by which the newest bar is about one bar old. None where no bar is short enough to tell."""
    best: tuple[int, int, Sequence[int]] | None = None
    for (_, timeframe), times in series.items():
        length = SECONDS[timeframe]
        if times and length <= COARSE:
            found = (length, -max(times), times)
            best = found if best is None or found[:2] < best[:2] else best
    if best is None:
        return None
    length, bar, times = best[0], -best[1], best[2]
    ahead_by = bar - now
    if length <= FINE:
        offset = round((ahead_by + length) / STEP) * STEP
    else:
        offset = -int(-(ahead_by - 60) // HOUR) * HOUR
    if not LOWEST <= offset <= HIGHEST:
        return None
    previous = max((t for t in times if t < bar), default=bar)
    return Newest(
        offset,
        bar,
        length <= FINE,
        -2 * length - LATE < ahead_by - offset,
        AHEAD[0] <= ahead_by <= AHEAD[1] and previous - now >= AHEAD[0],
    )


# --- week openings -------------------------------------------------------------------------------------------------


def week_of(server: int) -> int:
    """The week (from 1970-01-04 on, Sunday to Saturday) of a server time."""
    return (server - FIRST_SUNDAY) // WEEK


def market_opens(week: int, new_york: Steps) -> int:
    """Sunday 17:00 in New York of a week, UTC."""
    local = FIRST_SUNDAY + week * WEEK + 17 * HOUR
    return local - offset_in(new_york, local + 5 * HOUR)


class Openings(Struct):
    """The first bars of weeks, in the sender's clock, of some series of one source."""

    by_series: dict[str, dict[int, int]] = {}
    last: dict[tuple[str, str], int] = {}  # newest bar of each series followed
    fresh: bool = False  # something was added that nobody has judged yet

    def note(self, series: tuple[str, str], times: Iterable[int], new_york: Steps) -> None:
        """Takes bar times of a series, ascending."""
        previous = self.last.get(series)
        if previous is None and len(self.last) >= 4 * KEPT_SERIES:
            return
        for at in times:
            if previous is None:
                previous = at
            elif at > previous:
                if WEEKEND[0] <= at - previous <= WEEKEND[1]:
                    self._opening(" ".join(series), at, new_york)
                previous = at
        if previous is not None:
            self.last[series] = previous

    def _opening(self, series: str, at: int, new_york: Steps) -> None:
        week = week_of(at)
        if not LOWEST <= at - market_opens(week, new_york) <= HIGHEST + OPENS_WITHIN:
            return
        weeks = self.by_series.get(series)
        if weeks is None:
            if len(self.by_series) >= KEPT_SERIES:
                return
            weeks = self.by_series[series] = {}
        if week in weeks:
            return
        weeks[week] = at
        self.fresh = True
        while len(weeks) > KEPT_OPENINGS:
            del weeks[min(weeks)]

    def at_rest(self) -> dict[str, tuple[int, ...]]:
        return {series: tuple(sorted(weeks.values())) for series, weeks in self.by_series.items()}


def waking(kept: Mapping[str, Sequence[int]]) -> Openings:
    """Openings from their form at rest."""
    return Openings({series: {week_of(at): at for at in times} for series, times in kept.items()}, fresh=bool(kept))


def family(openings: Openings, at: int, offset: int, zones: Zones) -> str | None:
    """The daylight-saving rule of a sender whose offset at ``at`` is known; None until the openings tell.

    At least eight openings of a series must agree with one of New York, the European Union and none, and one more of
    them than with each of the others: they must lie around a change.
    """
    decided: Counter[str] = Counter()
    for weeks in openings.by_series.values():
        rule = _family_of(weeks, at, offset, zones)
        if rule is not None:
            decided[rule] += len(weeks)
    return decided.most_common(1)[0][0] if decided else None


def _family_of(weeks: Mapping[int, int], at: int, offset: int, zones: Zones) -> str | None:
    if len(weeks) < OPENINGS:
        return None
    new_york = zones(NEW_YORK)
    ranked: list[tuple[int, str]] = []
    for zone in (NEW_YORK, LONDON, None):
        steps: Steps = [(0, 0)] if zone is None else zones(zone)
        shift = offset - offset_in(steps, at)
        # How long after Sunday 17:00 New York a series opens by this rule: always the same, if it is the right one.
        delays: Counter[int] = Counter()
        for week, opened in weeks.items():
            opens = market_opens(week, new_york)
            delays[(opened - shift - offset_in(steps, opens) - opens) // STEP * STEP] += 1
        delay, agreeing = delays.most_common(1)[0]
        if 0 <= delay <= OPENS_WITHIN:
            ranked.append((agreeing, rule_text(zone, shift)))
    ranked.sort(key=lambda item: -item[0])
    if not ranked or ranked[0][0] < max(OPENINGS, AGREEING * len(weeks)):
        return None
    return None if len(ranked) > 1 and ranked[1][0] == ranked[0][0] else ranked[0][1]
