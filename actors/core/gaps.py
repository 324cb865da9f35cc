"""What a hole in a series is: closed session, no tick or transport loss. Every verdict leaves the hole itself out.

A bar's slot is closed where the other weeks have hardly ever had one; what is missing while the market was open is a loss
where the series itself would hardly ever leave out so many bars at this time of the week.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal, TypeAlias

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from actors.core.holidays import is_closed_day, is_short_day
from actors.core.sessions import (
    DAY,
    FIRST_SUNDAY,
    HOUR,
    SATURDAY,
    UTC_CLOCK,
    WEEK,
    WEEKS,
    Bits,
    Calendar,
    Hole,
    Ints,
    ServerClock,
)
from actors.core.timeframe import from_epoch
from schema.messages import UtcTime

ENOUGH: Final = 3  # weeks after which a slot is judged by its own weekday alone
RARELY: Final = 0.1  # a slot with a bar in at most this share of the weeks is outside the session
NO_CHANCE: Final = 1e-5  # so improbable is a stretch without bars in all those weeks if it were open
LIQUID: Final = 0.9  # a series with more than this share of its bars
AHEAD: Final = 8 * WEEK  # a report judges a hole by the weeks on both sides of it
LONGEST: Final = 4 * WEEK  # a longer hole is told as one loss

EDGE: Final = 900  # a session may begin or end this much off its usual time
EDGE_SEASON: Final = HOUR  # the same beside a weekend, in the weeks when America and Europe change their clocks
MOVED: Final = 0.9  # the share of a hole that an hour's difference must explain
WEEKEND_FROM: Final = 5 * DAY + 21 * HOUR  # Friday 17:00 New York in summer, UTC, from Sunday
WEEKEND_TO: Final = 22 * HOUR  # Sunday 17:00 New York in winter
WEEKEND_SPAN: Final = (40 * HOUR, 56 * HOUR)  # a first weekend of other hours
BREAK_WITHIN: Final = (20 * HOUR + 3_300, 23 * HOUR + 300)  # 17:00 in New York and the hour after, UTC, both seasons
BREAK_SPAN: Final = 4_500
WHOLE_SESSION: Final = 20 * HOUR
HOLIDAY_MARGIN: Final = 3 * HOUR  # a closed day's own clock may differ from the broker's by this much
HOLIDAY_RUN: Final = 6 * HOUR
SHORT_BY: Final = 10 * HOUR  # a day of short hours is short by at most this much

SLOW: Final = 900  # from M15 on even one missing bar is worth a question, where they are rare
TINY: Final = 300  # up to M5 one bar may be empty by itself
RARE: Final = 0.2  # a hole that the series' own rate shows less often a week is a loss
CLUSTER: Final = 0.2  # empty bars come in runs: the chance of one after another, beside the rate itself
YOUNG: Final = 2 * WEEK  # of history: before that a loss must be longer
YOUNG_BARS: Final = 5
PRIOR: Final = 20.0  # observations that the whole week's rate is worth beside the local one
AROUND: Final = 1_800  # seconds on either side that make up the local rate

Kind = Literal["closed session", "no tick", "transport loss"]
Flags: TypeAlias = NDArray[np.bool_]


class Gap(Struct, frozen=True, kw_only=True, rename={"kind": "class", "from_": "from"}):
    """A span of missing bars, first and last open time included. ``name`` says which session; server times in it."""

    kind: Kind
    name: str | None
    from_: UtcTime
    to: UtcTime
    count: int


@dataclass(slots=True)
class _Part:
    """Consecutive missing bars of one verdict."""

    start: int
    stop: int
    kind: Kind
    name: str | None = None


def classify(calendar: Calendar, after: int, before: int) -> list[Gap]:
    """What the bars missing between two neighbours are, in order; [] where none is missing."""
    step = calendar.step
    if before - after > LONGEST and step < WEEK:
        span = (from_epoch(calendar.following(after)), from_epoch(calendar.previous(before)))
        return [Gap(kind="transport loss", name=None, from_=span[0], to=span[1], count=(before - after) // step - 1)]
    if before - after == 2 * step and step <= TINY:
        only = from_epoch(after + step)
        return [Gap(kind="no tick", name=None, from_=only, to=only, count=1)]
    judge = _Judge(calendar, (after, before))
    utc = judge.run.utc
    return [
        Gap(
            kind=part.kind,
            name=part.name,
            from_=from_epoch(int(utc[part.start])),
            to=from_epoch(int(utc[part.stop - 1])),
            count=part.stop - part.start,
        )
        for part in (judge.parts() if len(utc) else [])
    ]


def report(
    timeframe: str,
    first: int,
    holes: Sequence[Hole],
    last: int,
    clock: ServerClock = UTC_CLOCK,
) -> list[Gap]:
    """Every hole of a series with its class; each is judged by the weeks before and after it."""
    calendar = Calendar(timeframe, clock)
    spans = zip([first, *(before for _, before in holes)], [*(after for after, _ in holes), last], strict=True)
    pending = list(spans)[::-1]
    out: list[Gap] = []
    for after, before in holes:
        limit = before + AHEAD
        while pending and pending[-1][0] <= limit:
            start, stop = pending.pop()
            upto = stop if stop <= limit else start + (limit - start) // calendar.step * calendar.step
            if calendar.step > HOUR:
                upto = stop  # few slots: cutting them at a broker's day is not worth it
            calendar.observe(start, upto)
            if upto < stop:
                pending.append((upto + calendar.step, stop))
        out += classify(calendar, after, before)
    return out


class _Judge:
    """One hole before one calendar."""

    def __init__(self, calendar: Calendar, hole: Hole) -> None:
        self.calendar = calendar
        self.hole = hole
        self.step = calendar.step
        self.run = calendar.between(*hole)
        self.known = self._without()
        self.seen: Bits = calendar.seen & self.known

    def parts(self) -> list[_Part]:
        """The hole cut where the verdict changes."""
        closed, weekend = self._closed()
        holiday = self._closed_days() & ~closed
        state = closed.astype(np.int8) + weekend + 4 * holiday
        cuts = [0, *(np.flatnonzero(np.diff(state)) + 1).tolist(), len(state)]
        parts: list[_Part] = []
        for start, stop in pairwise(cuts):
            if weekend[start]:
                parts.append(_Part(start, stop, "closed session", "weekend"))
            elif closed[start]:
                parts.append(_Part(start, stop, "closed session", self._break(start, stop)))
            elif holiday[start] or self._is_short_day(start, stop):
                parts.append(_Part(start, stop, "closed session", self._holiday(start, stop)))
            else:
                parts.append(_Part(start, stop, "transport loss" if self._is_loss(start, stop) else "no tick"))
        return self._whole_sessions(parts)

    def _without(self) -> Bits:
        """The register of passed slots as if the hole itself had not been seen."""
        known = self.calendar.known.copy()
        back = self.calendar.week - self.run.week
        for weeks in np.unique(back[(back >= 0) & (back < WEEKS)]).tolist():
            known[self.run.slot[back == weeks]] &= ~np.uint16(1 << weeks)
        return known

    # --- sessions --------------------------------------------------------------------------------------------------

    def _closed(self) -> tuple[Flags, Flags]:
        """Which bars lie outside the session, and which of them in a weekend."""
        if self.step >= WEEK:
            return self._none(), self._none()
        run = self.run
        closed = self._unusual(run.slot, RARELY)
        for shift, neighbour in ((HOUR, self.hole[1]), (-HOUR, self.hole[0])):
            if self.step > HOUR or closed.all():
                break
            # The session has moved against our clock: the hole is one an hour off, and a bar stands where there is
            # none otherwise, or it is the time of year for it.
            if self._is_odd(neighbour) or _clocks_change(self.hole[0]):
                moved = self._unusual((run.slot + shift // self.step) % self.calendar.slots, 0.5)
                if moved.mean() >= MOVED:
                    closed |= moved
        closed |= self._first_break() | self._first_weekend()
        for start, stop in _stretches(closed):
            self._widen(closed, start, stop)
        weekend = self._none()
        if not self.calendar.trades_saturdays:
            for start, stop in _stretches(closed):
                weekend[start:stop] = self._saturday()[start:stop].any()
        return closed, weekend

    def _unusual(self, slot: Ints, share: float) -> Flags:
        """Bars whose slot has hardly ever one, by its own weeks or, where these are few, by the other weekdays."""
        passed, seen = self.known[slot], self.seen[slot]
        weeks, bars = _count(passed), _count(seen)
        rare, lately = bars <= share * weeks, self._lately(passed, seen)
        enough = weeks >= ENOUGH
        few = np.flatnonzero(~enough)
        per_day = self.calendar.per_day
        if len(few) and per_day > 1:
            days = range(7) if self.calendar.trades_saturdays else range(1, 6)
            known, seen_ = self.known.reshape(7, per_day), self.seen.reshape(7, per_day)
            day, time = np.divmod(slot[few], per_day)
            for other in days:
                use = (day != other) & np.isin(day, list(days))
                weeks[few] += np.where(use, _count(known[other, time]), 0)
                bars[few] += np.where(use, _count(seen_[other, time]), 0)
        out: Flags = np.where(enough, rare | lately, (weeks > 0) & (bars <= share * weeks))
        absent = np.where(enough & ~rare, 3, weeks - bars)
        fill = self._fill()
        empty = 0.001 if fill > LIQUID else 1.0 - fill  # what a liquid series lacks is holidays and losses
        least = 1 if self.step >= SLOW else 3
        for start, stop in _stretches(out):
            if stop - start < least or empty ** int(absent[start:stop].sum()) > NO_CHANCE:
                out[start:stop] = False
        return out

    def _lately(self, passed: Bits, seen: Bits) -> Flags:
        """No bar in the three weeks before the hole, or in the three after: the hours have changed."""
        back = np.clip(self.calendar.week - self.run.week, -1, WEEKS - 1)
        before, after = (back + 1).astype(np.uint16), np.maximum(back - 3, 0).astype(np.uint16)
        earlier = ((passed >> before) & 7 == 7) & ((seen >> before) & 7 == 0)
        later = (back >= 3) & ((passed >> after) & 7 == 7) & ((seen >> after) & 7 == 0)
        out: Flags = earlier | later
        return out

    def _fill(self) -> float:
        """The share of bars among the slots that have one in half of the weeks (or, with none such, that ever have)."""
        weeks, bars = _count(self.known), _count(self.seen)
        usual = (2 * bars >= weeks) & (bars > 0)
        if 10 * int(usual.sum()) < len(usual):
            usual = bars > 0
        passed = int(weeks[usual].sum())
        return int(bars[usual].sum()) / passed if passed else 0.5

    def _is_odd(self, ts: int) -> bool:
        """Whether a bar stands in a slot that has none in half of the other weeks."""
        week, slot = self.calendar.place(self.calendar.clock.to_server(ts))
        back = self.calendar.week - week
        others = int(self.known[slot]) & ~(1 << back if 0 <= back < WEEKS else 0)
        bars = int(self.seen[slot]) & others
        return others.bit_count() >= 2 and 2 * bars.bit_count() <= others.bit_count()

    def _first_break(self) -> Flags:
        """Before its own history tells: a short hole around 17:00 in New York."""
        at = self.run.utc % DAY
        if len(at) * self.step > BREAK_SPAN or at.min() < BREAK_WITHIN[0] or at.max() + self.step > BREAK_WITHIN[1]:
            return self._none()
        per_day = self.calendar.per_day
        weekdays = self.known.reshape(7, per_day)[1:6, self.run.slot % per_day]
        out: Flags = _count(weekdays).sum(axis=0) == 0
        return out

    def _first_weekend(self) -> Flags:
        """Before its own history tells: the weekend of New York, or a hole of a weekend's length around Saturday."""
        run = self.run
        saturday = self._saturday()
        if self.calendar.trades_saturdays or not saturday.any():
            return self._none()
        at = (run.utc - FIRST_SUNDAY) % WEEK
        usual = saturday | (at >= WEEKEND_FROM) | (at < WEEKEND_TO)
        day = (run.server - FIRST_SUNDAY) % WEEK // DAY
        if self.step >= DAY:
            usual = saturday | (day == 0)
        elif WEEKEND_SPAN[0] <= len(run.utc) * self.step <= WEEKEND_SPAN[1]:
            usual |= (day == 0) | (day == SATURDAY - 1)
        out: Flags = usual & (_count(self.known[run.slot]) < ENOUGH)
        return out

    def _widen(self, closed: Flags, start: int, stop: int) -> None:
        """Takes what little is missing beside a session break for its ragged edge."""
        length = (stop - start) * self.step
        edge = min(EDGE, length // 2)
        if length >= DAY and _clocks_change(int(self.run.utc[start])):
            edge = EDGE_SEASON
        low, high = start, stop
        while low > 0 and not closed[low - 1]:
            low -= 1
        while high < len(closed) and not closed[high]:
            high += 1
        if (start - low) * self.step <= edge:
            closed[low:start] = True
        if (high - stop) * self.step <= edge:
            closed[stop:high] = True

    # --- holidays --------------------------------------------------------------------------------------------------

    def _closed_days(self) -> Flags:
        """Bars of the days on which every market is closed, in a hole that is long enough to be one."""
        out, server = self._none(), self.run.server
        if len(server) * self.step < HOLIDAY_RUN or self.step > DAY or self.calendar.trades_saturdays:
            return out
        margin = HOLIDAY_MARGIN if self.step < DAY else 0
        days = np.unique(np.concatenate(((server - margin) // DAY, (server + margin) // DAY)))
        for day in days.tolist():
            if is_closed_day(from_epoch(day * DAY)):
                out |= (server >= day * DAY - margin) & (server < (day + 1) * DAY + margin)
        return out

    def _is_short_day(self, start: int, stop: int) -> bool:
        """Hours missing up to a session's end, or from its beginning, on a day of short hours."""
        beside = start > 0 or stop < len(self.run.utc)
        short = (stop - start) * self.step <= SHORT_BY
        return beside and short and is_short_day(from_epoch(int(self.run.server[start])))

    def _whole_sessions(self, parts: list[_Part]) -> list[_Part]:
        """A session that is missing from its opening to its close is a holiday, where sessions last the day."""
        for i, part in enumerate(parts):
            if part.kind == "transport loss":
                inside = 0 < i < len(parts) - 1
                if not inside or (part.stop - part.start) * self.step < WHOLE_SESSION:
                    return parts
        return [
            _Part(part.start, part.stop, "closed session", self._holiday(part.start, part.stop))
            if part.kind == "transport loss"
            else part
            for part in parts
        ]

    # --- losses ----------------------------------------------------------------------------------------------------

    def _is_loss(self, start: int, stop: int) -> bool:
        """Whether the series itself would hardly ever leave out so many bars at this time of the week."""
        if self.step >= WEEK:
            return True
        bars = stop - start
        calendar = self.calendar
        young = calendar.head is None or calendar.first is None or calendar.head - calendar.first < YOUNG
        if young and bars < (YOUNG_BARS if self.step < SLOW else 2):
            return False
        weeks, with_bar = _count(self.known), _count(self.seen)
        open_ = with_bar > RARELY * weeks
        all_weeks, all_bars = int(weeks[open_].sum()), int(with_bar[open_].sum())
        usual = (all_weeks - all_bars + 0.5) / (all_weeks + 1.0)
        reach = AROUND // self.step
        first = int(self.run.slot[start])
        near = np.arange(first - reach, first + min(bars, calendar.slots) + reach) % calendar.per_day
        time = np.zeros(calendar.per_day, np.bool_)
        time[near] = True
        here = open_ & np.tile(time, calendar.slots // calendar.per_day)
        passed, empty = int(weeks[here].sum()), int((weeks - with_bar)[here].sum())
        rate = (empty + PRIOR * usual) / (passed + PRIOR)
        if self.step >= SLOW and rate <= RARELY:
            return True
        a_week = max(int(open_.sum()), calendar.slots // 2)
        expected: float = a_week * rate * min(0.95, CLUSTER + rate) ** (bars - 1)
        return expected < RARE

    # --- pieces ----------------------------------------------------------------------------------------------------

    def _none(self) -> Flags:
        return np.zeros(len(self.run.utc), np.bool_)

    def _saturday(self) -> Flags:
        out: Flags = (self.run.server - FIRST_SUNDAY) % WEEK // DAY == SATURDAY
        return out

    def _break(self, start: int, stop: int) -> str:
        opened, end = int(self.run.server[start]), int(self.run.server[stop - 1]) + self.step
        return f"daily break {from_epoch(opened):%H:%M}–{from_epoch(end):%H:%M}"

    def _holiday(self, start: int, stop: int) -> str:
        return f"holiday {from_epoch(int(self.run.server[(start + stop) // 2])):%Y-%m-%d}"


def _count(bits: Bits) -> Ints:
    return np.bitwise_count(bits).astype(np.int64)


def _stretches(flags: Flags) -> list[tuple[int, int]]:
    """Start and stop of every stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _clocks_change(ts: int) -> bool:
    """From a week before America's change to two weeks after Europe's, and the other way round in autumn."""
    day = from_epoch(ts)
    return (3, 1) <= (day.month, day.day) <= (4, 14) or (10, 20) <= (day.month, day.day) <= (11, 21)
