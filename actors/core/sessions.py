"""When a series trades, learned from its own bars.

For every slot of the week (in the broker's clock; a slot is one bar) two registers of :data:`WEEKS` bits say in which of
the newest weeks the slot was passed, and in which of them it had a bar. Times are epoch seconds, UTC unless called
server time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, TypeAlias

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from actors.core.timeframe import from_epoch
from schema.timeframes import SECONDS

HOUR: Final = 3_600
DAY: Final = 24 * HOUR
WEEK: Final = 7 * DAY
FIRST_SUNDAY: Final = 3 * DAY  # 1970-01-04
SATURDAY: Final = 6  # days of a week that begins on Sunday

WEEKS: Final = 16  # a register's bits: long enough for a rate, short enough to follow a broker that changes its hours
LEARNT: Final = 4 * DAY  # longer holes say nothing about sessions (Easter and Christmas close for up to four days)

Ints: TypeAlias = NDArray[np.int64]
Bits: TypeAlias = NDArray[np.uint16]
Hole: TypeAlias = tuple[int, int]  # the open times of the bars on either side
Span: TypeAlias = tuple[int, int]  # the open times of the first and last missing bar


def _same(ts: int) -> int:
    return ts


@dataclass(frozen=True, slots=True)
class ServerClock:
    """The broker's clock: UTC to server time and back."""

    to_server: Callable[[int], int] = _same
    to_utc: Callable[[int], int] = _same


UTC_CLOCK: Final = ServerClock()
ClockOf: TypeAlias = Callable[[str | None], ServerClock]  # a source's clock


def no_clock(_source: str | None) -> ServerClock:
    """For sources whose clock is UTC."""
    return UTC_CLOCK


class Snapshot(Struct, frozen=True):
    """A calendar at rest."""

    timeframe: str
    week: int
    first: int | None
    head: int | None
    seen: bytes
    known: bytes


@dataclass(slots=True)
class Run:
    """A hole's missing bars: open times, their server times, weeks and slots."""

    utc: Ints
    server: Ints
    week: Ints
    slot: Ints


class Calendar:
    """The sessions of one series; 40 KB for M1, less for longer bars. ``head`` is the newest bar."""

    def __init__(self, timeframe: str, clock: ServerClock = UTC_CLOCK) -> None:
        self.timeframe = timeframe
        self.clock = clock
        self.step = SECONDS[timeframe]
        self.slots = max(1, WEEK // self.step)
        self.per_day = max(1, DAY // self.step)
        self.week = 0
        self.first: int | None = None
        self.head: int | None = None
        self.seen: Bits = np.zeros(self.slots, np.uint16)
        self.known: Bits = np.zeros(self.slots, np.uint16)

    def snapshot(self) -> Snapshot:
        return Snapshot(self.timeframe, self.week, self.first, self.head, self.seen.tobytes(), self.known.tobytes())

    @classmethod
    def restore(cls, at_rest: Snapshot, clock: ServerClock = UTC_CLOCK) -> Calendar:
        made = cls(at_rest.timeframe, clock)
        made.week, made.first, made.head = at_rest.week, at_rest.first, at_rest.head
        made.seen = np.frombuffer(at_rest.seen, np.uint16).copy()
        made.known = np.frombuffer(at_rest.known, np.uint16).copy()
        return made

    @property
    def trades_saturdays(self) -> bool:
        return self.step < WEEK and bool(self.seen[SATURDAY * self.per_day :].any())

    # --- learning --------------------------------------------------------------------------------------------------

    def observe(self, first: int, last: int) -> None:
        """Takes bars at every step from ``first`` to ``last``; those before the head are late and only fill."""
        if self.head is None:
            self.first, self.week = first, self.place(self.clock.to_server(first))[0]
        elif first > self.head:
            self.pass_over(self.head, first)
        self._mark(first, last, present=True)
        self.head = last if self.head is None else max(self.head, last)
        self.first = first if self.first is None else min(self.first, first)

    def pass_over(self, after: int, before: int) -> None:
        """Takes it that there is no bar between two."""
        if before - after <= LEARNT:
            self._mark(self.following(after), self.previous(before), present=False)

    # --- the grid --------------------------------------------------------------------------------------------------

    def place(self, server: int) -> tuple[int, int]:
        """The week that a bar belongs to and its slot; months have no week: each is one."""
        if self.timeframe == "MN1":
            opened = from_epoch(server)
            return opened.year * 12 + opened.month, 0
        week, rest = divmod(server - FIRST_SUNDAY, WEEK)
        return week, rest // self.step

    def _follows_days(self) -> bool:
        # Bars up to an hour keep their UTC grid when clocks change; longer ones follow the broker's day.
        return self.step > HOUR

    def following(self, ts: int) -> int:
        """The open time after that of a bar."""
        return self.clock.to_utc(self._next(self.clock.to_server(ts))) if self._follows_days() else ts + self.step

    def previous(self, ts: int) -> int:
        """The open time before that of a bar."""
        if self.timeframe == "MN1":
            opened = from_epoch(self.clock.to_server(ts) - 1)
            return self.clock.to_utc(int(datetime(opened.year, opened.month, 1, tzinfo=UTC).timestamp()))
        return self.clock.to_utc(self.clock.to_server(ts) - self.step) if self._follows_days() else ts - self.step

    def _next(self, server: int) -> int:
        if self.timeframe != "MN1":
            return server + self.step
        opened = from_epoch(server)
        year, month = divmod(opened.year * 12 + opened.month, 12)
        return int(datetime(year, month + 1, 1, tzinfo=UTC).timestamp())

    def _mark(self, first: int, last: int, *, present: bool) -> None:
        for week, low, high in self._pieces(first, last):
            if week > self.week:
                self._advance(week)
            back = self.week - week
            if back < WEEKS:
                bit = np.uint16(1 << back)
                self.known[low : high + 1] |= bit
                if present:
                    self.seen[low : high + 1] |= bit

    def _advance(self, week: int) -> None:
        weeks = week - self.week
        if weeks >= WEEKS:
            self.seen[:] = 0
            self.known[:] = 0
        else:
            self.seen <<= np.uint16(weeks)
            self.known <<= np.uint16(weeks)
        self.week = week

    def _pieces(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Week, first and last slot of a span of bars, cut at weeks and where the clock changes."""
        if self.timeframe == "MN1":
            server, end = self.clock.to_server(first), self.clock.to_server(last)
            while server <= end:
                yield *self.place(server), 0
                server = self._next(server)
            return
        at = first
        while at <= last:
            server = self.clock.to_server(at)
            offset = server - at
            week, slot = self.place(server)
            stop = min(last, at + (self.slots - 1 - slot) * self.step)
            if self._follows_days():
                end = min(self.clock.to_server(last), server + (self.slots - 1 - slot) * self.step)
                yield week, slot, slot + (end - server) // self.step
                at = self.clock.to_utc(end + self.step)
                continue
            if self.clock.to_server(stop) - stop != offset:
                low, high = 0, (stop - at) // self.step  # the clock changes between these two bars
                while high - low > 1:
                    middle = (low + high) // 2
                    ts = at + middle * self.step
                    low, high = (middle, high) if self.clock.to_server(ts) - ts == offset else (low, middle)
                stop = at + low * self.step
            yield week, slot, slot + (stop - at) // self.step
            at = stop + self.step

    def between(self, after: int, before: int) -> Run:
        """The bars that the grid has between two."""
        if self._follows_days():
            servers, server, end = [], self._next(self.clock.to_server(after)), self.clock.to_server(before)
            # Half a bar's patience: a day may last 23 or 25 hours on a clock that we take for UTC.
            while server + self.step // 2 < end:
                servers.append(server)
                server = self._next(server)
            moved = np.array(servers, np.int64)
            utc = np.array([self.clock.to_utc(ts) for ts in servers], np.int64)
        else:
            utc = np.arange(after + self.step, before, self.step, dtype=np.int64)
            hours, inverse = np.unique(utc // HOUR, return_inverse=True)
            offsets = [self.clock.to_server(int(hour) * HOUR) - int(hour) * HOUR for hour in hours]
            moved = utc + np.array(offsets, np.int64)[inverse]
        if self.timeframe == "MN1":
            week = np.array([self.place(int(ts))[0] for ts in moved], np.int64)
            return Run(utc, moved, week, np.zeros(len(utc), np.int64))
        week, rest = np.divmod(moved - FIRST_SUNDAY, WEEK)
        return Run(utc, moved, week, rest // self.step)


def learn(calendar: Calendar, first: int, holes: Iterable[Hole], last: int) -> None:
    """Takes a whole series: bars from ``first`` to ``last`` but for the holes, ascending."""
    for after, before in holes:
        calendar.observe(first, after)
        first = before
    calendar.observe(first, last)


def spans(times: Iterable[int], step: int) -> list[Span]:
    """Ascending open times as unbroken runs: first and last of each."""
    out: list[Span] = []
    for ts in times:
        if out and ts == out[-1][1] + step:
            out[-1] = (out[-1][0], ts)
        else:
            out.append((ts, ts))
    return out
