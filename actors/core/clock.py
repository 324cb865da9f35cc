"""A sender's clock: its UTC offsets over time, and what they make of bar times, grids and ends.

Pure: the offsets of zones come in as tables. Times are epoch seconds; a *server* time is what the sender's clock shows,
written as if it were UTC. Offsets are seconds that the sender's clock is ahead of UTC.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Literal, TypeAlias, cast

from msgspec import Struct, field

from actors.core.timeframe import bar_end, on_grid
from schema.clock import ClockBook, ClockRule, ClockRun, TsSource, parse_rule
from schema.timeframes import SECONDS

HOUR: Final = 3_600
DAY: Final = 86_400
BEGIN: Final = -62_135_596_800  # the year 1: before every bar
NEW_YORK: Final = "America/New_York"
LONDON: Final = "Europe/London"
ATHENS: Final = "Europe/Athens"
SETTLED: Final = 2 * HOUR  # so long after an ambiguous hour a payload's clock still tells its newest bars apart
SAME_PHASE: Final = 60 * DAY  # no daylight-saving phase is so short: equal offsets this close leave none between

Steps: TypeAlias = Sequence[tuple[int, int]]  # (UTC time, the offset from then on), ascending
Zones: TypeAlias = Callable[[str], Steps]  # a zone's steps by its name; ValueError for an unknown one
Piece: TypeAlias = tuple[int, int, TsSource]  # (UTC time, offset, how it is known) from then on


class Timeline:
    """A clock's offsets over all time. Pieces begin at ``starts``; neighbours differ in offset or kind."""

    __slots__ = ("kinds", "offsets", "starts", "turns")

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self.starts: list[int] = []
        self.offsets: list[int] = []
        self.kinds: list[TsSource] = []
        for start, offset, kind in pieces:
            while self.starts and self.starts[-1] >= start:  # a piece that lasts no time
                del self.starts[-1], self.offsets[-1], self.kinds[-1]
            if self.starts and (self.offsets[-1], self.kinds[-1]) == (offset, kind):
                continue
            self.starts.append(start)
            self.offsets.append(offset)
            self.kinds.append(kind)
        # The server time from which each piece's successor counts: the first pass of an ambiguous hour belongs to the
        # piece before, and so does an hour that is missing.
        self.turns: list[int] = []
        for i, start in enumerate(self.starts[1:]):
            turn = start + max(self.offsets[i], self.offsets[i + 1])
            self.turns.append(max(turn, self.turns[-1]) if self.turns else turn)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Timeline) and self.pieces() == other.pieces()

    __hash__ = None  # type: ignore[assignment]

    def pieces(self) -> list[Piece]:
        return list(zip(self.starts, self.offsets, self.kinds, strict=True))

    def index(self, utc: int) -> int:
        return max(bisect_right(self.starts, utc) - 1, 0)

    def offset_at(self, utc: int) -> int:
        return self.offsets[self.index(utc)]

    def kind_at(self, utc: int) -> TsSource:
        return self.kinds[self.index(utc)]

    def to_server(self, utc: int) -> int:
        return utc + self.offsets[self.index(utc)]

    def to_utc(self, server: int, second: bool = False) -> int:
        """Of autumn's ambiguous hour the first pass, or the ``second``; spring's missing hour goes by the offset before."""
        i = bisect_right(self.turns, server)
        utc = server - self.offsets[i]
        if second and i < len(self.turns):
            later = server - self.offsets[i + 1]
            if later >= self.starts[i + 1]:
                return later
        return utc

    def second_pass(self, utc: int) -> bool:
        """Whether the clock shows at ``utc`` what it showed before, an hour ago."""
        return self.to_utc(self.to_server(utc)) != utc

    def end(self, utc: int, server: int, timeframe: str) -> int:
        """When the bar that opened at ``utc``, ``server`` on this clock, is over: the next step of the grid, by the
        offset valid then. A bar that the clock is set back in is the longer for it, unless it is no longer than that."""
        over = bar_end(server, timeframe)
        i = self.index(utc)
        end = utc + over - server
        while i + 1 < len(self.starts) and end >= (change := self.starts[i + 1]):
            back = self.offsets[i] - self.offsets[i + 1]
            if end == change and (back <= 0 or SECONDS[timeframe] <= back):
                break
            i += 1
            end = max(over - self.offsets[i], change)
        return end


UTC_LINE: Final = Timeline([(BEGIN, 0, "utc")])


# --- from rules and observations to a timeline ---------------------------------------------------------------------


def steps_of(rule: ClockRule, zones: Zones) -> Steps:
    """A rule's offsets from :data:`BEGIN` on. Raises ValueError for an unknown zone."""
    if rule.zone is None:
        return [(BEGIN, rule.shift)]
    return [(start, offset + rule.shift) for start, offset in zones(rule.zone)]


def offset_in(steps: Steps, utc: int) -> int:
    return steps[max(bisect_right(steps, utc, key=lambda step: step[0]) - 1, 0)][1]


def change_between(steps: Steps, after: int, until: int, by: int) -> int | None:
    """The first moment in (after, until] at which an offset changes ``by`` so many seconds."""
    for at in range(max(bisect_right(steps, after, key=lambda step: step[0]), 1), len(steps)):
        start, offset = steps[at]
        if start > until:
            return None
        if offset - steps[at - 1][1] == by:
            return start
    return None


def _within(steps: Steps, after: int, until: int | None, kind: TsSource) -> list[Piece]:
    """A rule's pieces of [after, until)."""
    later = [(start, offset, kind) for start, offset in steps if start > after and (until is None or start < until)]
    return [(after, offset_in(steps, after), kind), *later]


def fits(steps: Steps, runs: Sequence[ClockRun]) -> bool:
    """Whether a rule agrees with everything observed."""
    return all(
        offset_in(steps, run.since) == run.offset and not any(run.since < start <= run.until for start, _ in steps)
        for run in runs
    )


def assumed_family(runs: Sequence[ClockRun], zones: Zones) -> ClockRule | None:
    """The usual daylight-saving rule that agrees with every observation: New York + 7, else a European one, else none."""
    winter = runs[-1].offset - offset_in(zones(LONDON), runs[-1].until)
    candidates = [ClockRule(NEW_YORK, 7 * HOUR)]
    candidates += [ClockRule(LONDON, winter)] if winter in (HOUR, 2 * HOUR) else []
    return next((rule for rule in candidates if fits(steps_of(rule, zones), runs)), None)


def _sure_from(first: ClockRun, zones: Zones) -> int:
    """How far back the first observation reaches: no clock changes between two changes of New York and Europe.

    What a newest bar implies is believed for a day only.
    """
    changes = (max((at for at, _ in zones(zone) if at <= first.since), default=BEGIN) for zone in (NEW_YORK, LONDON))
    return max(*changes, first.since - DAY if first.origin == "inferred" else BEGIN)


def _observed(book: ClockBook, zones: Zones) -> list[Piece]:
    """What observations and the learned (or assumed) family say; the rules of settings and people come over it."""
    runs = book.runs
    if not runs:
        return [(BEGIN, 0, "utc")]
    learned = book.family is not None
    rule = parse_rule(book.family) if book.family is not None else assumed_family(runs, zones)
    family = steps_of(rule, zones) if rule is not None else None

    def agrees(utc: int, offset: int) -> bool:
        return family is not None and offset_in(family, utc) == offset

    first = runs[0]
    sure = _sure_from(first, zones)
    history: TsSource = "inferred" if learned else "assumed"
    if family is not None and agrees(first.since, first.offset):
        pieces = _within(family, BEGIN, sure, history)
    else:
        pieces = [(BEGIN, first.offset, history)]
    pieces.append((sure, first.offset, "server" if first.origin == "fields" else "inferred"))
    for at, run in enumerate(runs):
        following = runs[at + 1] if at + 1 < len(runs) else None
        kind: TsSource = "server" if run.origin == "fields" else "inferred"
        pieces.append((run.since, run.offset, kind))
        known = agrees(run.until, run.offset) and (following is None or agrees(following.since, following.offset))
        if family is not None and known:
            pieces += _within(family, run.until, None if following is None else following.since, kind)
        elif following is not None and following.offset != run.offset:
            by = following.offset - run.offset
            rules = [zones(NEW_YORK), zones(LONDON)] if family is None else [family, zones(NEW_YORK), zones(LONDON)]
            dated = (change_between(steps, run.until, following.since, by) for steps in rules)
            pieces.append((next((c for c in dated if c is not None), following.since), following.offset, kind))
    return pieces


def timeline(book: ClockBook, zones: Zones) -> Timeline:
    """A book's offsets: a person's word over the settings' rule over clock fields over what was inferred.

    Raises:
        ValueError: a rule that cannot be read, or an unknown zone.
    """
    if book.rule is not None:
        pieces = _within(steps_of(parse_rule(book.rule), zones), BEGIN, None, "rule")
    else:
        pieces = _observed(book, zones)
    for person in sorted(book.persons, key=lambda said: BEGIN if said.since is None else said.since):
        since = BEGIN if person.since is None else person.since
        steps = steps_of(parse_rule(person.rule), zones)
        pieces = [piece for piece in pieces if piece[0] < since] + _within(steps, since, None, "rule")
    return Timeline(pieces)


# --- one payload's conversion --------------------------------------------------------------------------------------


class Conversion:
    """What a payload's bar times mean. The piece in use is kept at hand: under a microsecond a call.

    ``clock`` None: the times are UTC. ``grid`` None: bars follow the sender's own clock. ``now`` is the payload's own
    UTC clock where it has one; it tells the two passes of autumn's ambiguous hour apart.
    """

    __slots__ = ("_clock", "_grid", "_hi", "_lo", "_now", "_offset", "alerts", "ts_source")

    def __init__(
        self,
        clock: Timeline | None,
        *,
        grid: Timeline | None = None,
        now: int | None = None,
        ts_source: TsSource = "utc",
        alerts: tuple[ClockAlert, ...] = (),
    ) -> None:
        self._clock = clock
        self._grid = grid
        self._now = now
        self._lo, self._hi, self._offset = (0, -1, 0) if clock is not None else (BEGIN, 2**62, 0)
        self.ts_source = ts_source  # of the payload's newest bar
        self.alerts = alerts

    @property
    def assumed(self) -> bool:
        """Whether even the payload's newest bar was converted by a guess."""
        return self.ts_source == "assumed"

    @property
    def assumed_until(self) -> int | None:
        """Bars that open before this UTC time are converted by a guess (``ts_source`` assumed); None: no bar is."""
        if self._clock is None or self._clock.kinds[0] != "assumed":
            return None
        known = next(
            (start for start, kind in zip(self._clock.starts, self._clock.kinds, strict=True) if kind != "assumed"),
            None,
        )
        return 2**62 if known is None else known

    def bar(self, server: int, timeframe: str) -> tuple[int, int] | None:
        """Open time and end (UTC) of the bar that opened at ``server`` in the sender's clock; None: off the grid.

        :meth:`on_grid`, :meth:`to_utc` and :meth:`end` in one.
        """
        length = SECONDS[timeframe]
        if length <= DAY and self._grid is None and self._lo <= server and server + length <= self._hi:
            if server % length:
                return None
            utc = server - self._offset
            return utc, utc + length
        if not self.on_grid(server, timeframe):
            return None
        return self.to_utc(server, timeframe), self.end(server, timeframe)

    def to_utc(self, server: int, timeframe: str = "M1") -> int:
        """The open time in UTC of the bar that opened at ``server`` in the sender's clock."""
        if self._lo <= server < self._hi:
            return server - self._offset
        return self._find(server, timeframe)

    def sent_at(self, server_time: int | None) -> int | None:
        """A payload's ``server_time`` in UTC; by both its clock fields where it has them, so that autumn repeats nothing."""
        if server_time is None or self._now is not None:
            return self._now
        return self.to_utc(server_time)

    def ts_source_of(self, utc: int) -> TsSource:
        """How the bar that opens at ``utc`` was converted."""
        return "utc" if self._clock is None else self._clock.kind_at(utc)

    def on_grid(self, server: int, timeframe: str) -> bool:
        """Whether a bar may open then, in the clock that the sender's bars follow."""
        if self._grid is not None:
            server = self._grid.to_server(self.to_utc(server, timeframe))
        return on_grid(server, timeframe)

    def end(self, server: int, timeframe: str) -> int:
        """When (UTC) the bar that opened at ``server`` is over."""
        clock = self._clock
        if self._grid is not None:
            utc = self.to_utc(server, timeframe)
            return self._grid.end(utc, self._grid.to_server(utc), timeframe)
        over = bar_end(server, timeframe)
        if clock is None or (self._lo <= server and over <= self._hi):
            return over - self._offset
        utc = self.to_utc(server, timeframe)
        return over - self._offset if self._lo <= server and over <= self._hi else clock.end(utc, server, timeframe)

    def _find(self, server: int, timeframe: str) -> int:
        clock = cast(Timeline, self._clock)
        i = bisect_right(clock.turns, server)
        lo = clock.turns[i - 1] if i else -(2**62)
        if i == len(clock.turns):
            self._lo, self._hi, self._offset = lo, 2**62, clock.offsets[i]
            return server - self._offset
        change, before, after = clock.starts[i + 1], clock.offsets[i], clock.offsets[i + 1]
        sure = change + min(before, after)
        if server < sure:
            self._lo, self._hi, self._offset = lo, sure, before
            return server - before
        # The hour that is there twice, or never.
        back = before - after
        second = self._now is not None and SECONDS[timeframe] <= back
        second = second and server - after <= cast(int, self._now) <= change + back + SETTLED
        return clock.to_utc(server, second)


class ClockAlert(Struct, frozen=True):
    """Something about a source's clock that a person should know. ``kind`` names it; ``critical`` ones spoil data."""

    kind: Literal["inferred", "unknown", "skew", "changed", "contradiction", "two_clocks", "learned", "implausible"]
    message: str
    details: dict[str, int | str] = field(default_factory=dict)


AS_UTC: Final = Conversion(None)
