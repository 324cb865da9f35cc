"""What the gateway asks terminals for: real losses at the live edge, each a few times and with growing pauses.

A series costs a few numbers. Its calendar (40 KB for M1) is read from the archive and the log beside the hot path, for
the series that lost something last; until it is there, nothing is asked for.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, TypeAlias

import structlog
from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError

from actors.core.gaps import classify
from actors.core.sessions import WEEK, WEEKS, Calendar, ClockOf, Hole, ServerClock, Span, learn, spans
from actors.core.timeframe import from_epoch
from bus.client import Bus, BusUnavailable
from bus.consume import Reader, StreamReplaced
from bus.store import Holes, Store, StoreUnavailable
from bus.subjects import CANDLES
from schema.messages import Backfill, Candle
from schema.timeframes import SECONDS

log = structlog.get_logger(__name__)
Key: TypeAlias = tuple[str, str]

REACH: Final = 5_000  # bars back that a terminal is asked for
PAUSES: Final = (60.0, 300.0, 1_800.0, 7_200.0)  # seconds after each question; after the last a span is given up
SPANS: Final = 20  # spans in one answer
OUTSTANDING: Final = 200  # spans a series may wait for
GIVEN_UP: Final = 200  # spans a series remembers as given up
CALENDARS: Final = 256  # in memory at once: 10 MB
PENDING: Final = 20_000  # bars of a series that may arrive while its calendar is read
RETRY_SECONDS: Final = 5.0


@dataclass(slots=True)
class Loss:
    """A span that is asked for: first and last missing bar, how often it was asked for, and when the next time is."""

    first: int
    last: int
    asks: int = 0
    due: float = 0.0


@dataclass(slots=True)
class Watch:
    """One series: its newest bar, the first bar of the unbroken run up to it that its calendar has not seen yet."""

    newest: int
    run: int
    losses: list[Loss] = field(default_factory=list)
    given_up: deque[Span] = field(default_factory=lambda: deque(maxlen=GIVEN_UP))
    pending: list[int] | None = None  # bars that arrived while the calendar is read; None: it is not being read


@dataclass(frozen=True, slots=True)
class Past:
    """A series as archive and log know it: its calendar, its newest holes, and bars newer than the archive."""

    calendar: Calendar
    holes: Sequence[Hole]
    tail: Sequence[int]


class Backfills:
    """The bookkeeping of one collector; ``load`` gives a series' past, None where it has none yet."""

    def __init__(self, load: Callable[[str, str], Awaitable[Past | None]], *, max_series: int = 20_000) -> None:
        self._load = load
        self._max_series = max_series
        self._watches: OrderedDict[Key, Watch] = OrderedDict()  # least recently used first
        self._calendars: OrderedDict[Key, Calendar] = OrderedDict()
        self._wanted: OrderedDict[Key, None] = OrderedDict()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def on_accepted(
        self, series: Key, rows: Sequence[Candle], now: float, *, history: bool = False
    ) -> tuple[Backfill, ...]:
        """Takes rows that the log has acknowledged, ascending, and gives what to ask the sender for.

        ``now`` is our clock (epoch seconds). ``history`` says that the rows' own holes are none of the live edge.
        """
        step = SECONDS[series[1]]
        watch = self._watches.get(series)
        if watch is None:
            if not rows:
                return ()
            watch = self._watch(series, int(rows[0].ts.timestamp()))
            if len(self._calendars) + len(self._wanted) < CALENDARS:
                self._want(series, watch)
        else:
            self._watches.move_to_end(series)
        if watch.pending is not None:
            if len(watch.pending) < PENDING:
                watch.pending += [int(row.ts.timestamp()) for row in rows]
            return ()
        if len(rows) == 1 and int(rows[0].ts.timestamp()) == watch.newest + step:
            watch.newest += step  # the usual bar: all that it costs
        elif rows:
            self._take(series, watch, [int(row.ts.timestamp()) for row in rows], now, live=not history)
        return self._due(series, watch, now) if watch.losses else ()

    def given_up(self, symbol: str, timeframe: str) -> Sequence[Span]:
        """Spans that the terminals have not got: they were asked for in vain."""
        watch = self._watches.get((symbol, timeframe))
        return tuple(watch.given_up) if watch is not None else ()

    def forget(self, series: Key) -> None:
        """Learns a series anew, as when its times have been restated."""
        self._watches.pop(series, None)
        self._calendars.pop(series, None)
        self._wanted.pop(series, None)

    async def refresh(self) -> None:
        """Reads the calendars that are wanted, one after the other, until cancelled."""
        while True:
            while self._wanted:
                series, _ = self._wanted.popitem(last=False)
                watch = self._watches.get(series)
                if watch is None or watch.pending is None:
                    continue
                try:
                    past = await self._load(*series)
                except (BusUnavailable, StreamReplaced, StoreUnavailable) as error:
                    log.info("calendar read again later", action="gaps.retry", series=series, error=str(error))
                    self._wanted[series] = None
                    await asyncio.sleep(RETRY_SECONDS)
                    continue
                if self._watches.get(series) is watch:
                    self._learnt(series, watch, past)
            self._idle.set()
            self._wake.clear()
            await self._wake.wait()

    async def settled(self) -> None:
        """Returns once no calendar is waited for."""
        await self._idle.wait()

    # --- inside ----------------------------------------------------------------------------------------------------

    def _watch(self, series: Key, newest: int) -> Watch:
        watch = self._watches[series] = Watch(newest, newest)
        if len(self._watches) > self._max_series:
            oldest, _ = self._watches.popitem(last=False)
            self._calendars.pop(oldest, None)
            self._wanted.pop(oldest, None)
        return watch

    def _want(self, series: Key, watch: Watch) -> None:
        watch.pending = []
        self._wanted[series] = None
        self._idle.clear()
        self._wake.set()

    def _learnt(self, series: Key, watch: Watch, past: Past | None) -> None:
        pending, watch.pending = watch.pending or [], None
        if past is None:
            return
        calendar = past.calendar
        self._calendars[series] = calendar
        while len(self._calendars) > CALENDARS:
            self._calendars.popitem(last=False)
        head = calendar.head
        if head is not None:
            watch.newest = watch.run = head
            before, watch.losses = watch.losses, []
            for hole in past.holes:
                self._lost(watch, calendar, hole)
            for loss in watch.losses:
                for old in before:
                    if old.first <= loss.last and loss.first <= old.last:
                        loss.asks, loss.due = old.asks, old.due
        for times in (past.tail, pending):
            self._take(series, watch, sorted(times), None, live=True)

    def _take(self, series: Key, watch: Watch, times: Sequence[int], now: float | None, *, live: bool) -> None:
        if not times:
            return
        step = SECONDS[series[1]]
        calendar = self._calendars.get(series)
        if calendar is None:
            # Without a calendar only the newest bar is kept. A hole that no weekend explains is worth reading the past.
            holes = [(a, b) for a, b in pairwise((watch.newest, *times)) if live and b - a > step]
            answered = any(loss.first <= ts <= loss.last for loss in watch.losses for ts in times)
            watch.newest = max(watch.newest, times[-1])
            if answered or any(
                gap.kind == "transport loss" for hole in holes for gap in classify(Calendar(series[1]), *hole)
            ):
                self._want(series, watch)
            return
        self._calendars.move_to_end(series)
        first_new = bisect_right(times, watch.newest)
        for first, last in spans(times[first_new:], step):
            if first != watch.newest + step:
                calendar.observe(watch.run, watch.newest)
                if live:
                    self._lost(watch, calendar, (watch.newest, first))
                watch.run = first
            watch.newest = last
        calendar.observe(watch.run, watch.newest)
        watch.run = watch.newest
        if first_new:
            late = spans(times[:first_new], step)
            for first, last in late:
                calendar.observe(first, last)
            for (_, after), (before, _) in pairwise(late):
                calendar.pass_over(after, before)
            self._heal(watch, calendar, times[:first_new], now)

    def _lost(self, watch: Watch, calendar: Calendar, hole: Hole) -> None:
        """Notes what of a hole is a loss, as far back as a terminal is asked."""
        oldest = hole[1] - REACH * calendar.step
        for gap in classify(calendar, *hole):
            first, last = int(gap.from_.timestamp()), int(gap.to.timestamp())
            in_vain = any(a <= first and last <= b for a, b in watch.given_up)
            if gap.kind == "transport loss" and last >= oldest and not in_vain:
                first += max(0, -(-(oldest - first) // calendar.step)) * calendar.step
                watch.losses.append(Loss(first, last))
        del watch.losses[:-OUTSTANDING]

    def _heal(self, watch: Watch, calendar: Calendar, times: Sequence[int], now: float | None) -> None:
        """Takes what arrived out of the spans that are waited for; what is left of one is judged again."""
        kept: list[Loss] = []
        due = (now or 0.0) + PAUSES[0]
        for loss in watch.losses:
            inside = sorted({ts for ts in times if loss.first <= ts <= loss.last})
            if not inside:
                kept.append(loss)
                continue
            ends = [calendar.previous(loss.first), *inside, calendar.following(loss.last)]
            for hole in pairwise(ends):
                kept += [
                    # An answer came: the rest of it may be on its way, and if not, one question more is due.
                    Loss(int(gap.from_.timestamp()), int(gap.to.timestamp()), max(loss.asks - 1, 0), due)
                    for gap in classify(calendar, *hole)
                    if gap.kind == "transport loss"
                ]
        watch.losses = kept

    def _due(self, series: Key, watch: Watch, now: float) -> tuple[Backfill, ...]:
        symbol, timeframe = series
        oldest = watch.newest - REACH * SECONDS[timeframe]
        out: list[Backfill] = []
        kept: list[Loss] = []
        for loss in watch.losses:
            if loss.last < oldest:
                continue
            if now >= loss.due:
                if loss.asks >= len(PAUSES):
                    watch.given_up.append((loss.first, loss.last))
                    log.info("span given up", action="gaps.given_up", symbol=symbol, timeframe=timeframe, at=loss.first)
                    continue
                if len(out) < SPANS:
                    first, last = from_epoch(loss.first), from_epoch(loss.last)
                    out.append(Backfill(symbol=symbol, timeframe=timeframe, from_=first, to=last))
                    loss.due = now + PAUSES[loss.asks]
                    loss.asks += 1
            kept.append(loss)
        watch.losses = kept
        return tuple(out)


class Pasts:
    """Reads a series' past: the archive's bars as far as the recorder is, and the log's from there on."""

    def __init__(self, bus: Bus, store: Store | None, clock_of: ClockOf) -> None:
        self._bus = bus
        self._store = store
        self._clock_of = clock_of

    async def load(self, symbol: str, timeframe: str) -> Past | None:
        """Raises BusUnavailable, StoreUnavailable or StreamReplaced: ask again later."""
        archived, cursor = await self._archived(symbol, timeframe)
        tail, source = await self._logged(symbol, timeframe, cursor)
        clock = self._clock_of(archived.source if archived is not None else source)
        return await asyncio.get_running_loop().run_in_executor(None, _past, timeframe, clock, archived, tail)

    async def _archived(self, symbol: str, timeframe: str) -> tuple[Holes | None, int]:
        if self._store is None:
            return None, 0
        # The cursor first: what is archived after it is read twice, which does no harm.
        row = await self._store.fetchrow("load_cursor", "recorder.features", 0)
        bars = min(WEEKS * WEEK // SECONDS[timeframe], WEEKS * WEEK // 60) + REACH
        return await self._store.holes(symbol, timeframe, limit=bars), row["candles_seq"] if row is not None else 0

    async def _logged(self, symbol: str, timeframe: str, after: int) -> tuple[list[int], str | None]:
        """Open times of the log's bars after a sequence, and who sent the newest."""
        subject = CANDLES.subject(timeframe, symbol)
        times: list[int] = []
        try:
            raw = await self._bus.js.get_last_msg(str(CANDLES.stream), subject, direct=True)
        except NotFoundError:
            return times, None
        except (NatsError, TimeoutError) as error:
            raise BusUnavailable(f"NATS did not say what it holds of {symbol} ({type(error).__name__}).") from error
        last = int(raw.seq or 0)
        if last <= after:
            return times, None
        source: str | None = None
        # One series is read at a time: the name needs to be no other.
        async with Reader(self._bus, CANDLES, name="collector-gaps", start=after + 1, subject=subject) as reader:
            async for delivery in reader:
                times += [int(row.ts.timestamp()) for row in delivery.message.rows]
                source = delivery.message.source
                if delivery.stream_seq >= last:
                    break
        return times, source


def _past(timeframe: str, clock: ServerClock, archived: Holes | None, tail: Iterable[int]) -> Past | None:
    calendar = Calendar(timeframe, clock)
    times = sorted(set(tail))
    if archived is None:
        if not times:
            return None
        holes = tuple((a, b) for a, b in pairwise(times) if b - a != calendar.step)
        archived, times = Holes(times[0], times[-1], len(times), holes), []
    learn(calendar, archived.first, archived.holes, archived.last)
    oldest = archived.last - REACH * calendar.step
    recent = [hole for hole in archived.holes if hole[1] >= oldest]
    return Past(calendar, recent, times)
