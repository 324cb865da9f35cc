"""Whether each live series still gets its bars, in its own sessions.

The archive's newest bar of each series is one query a beat. Only of those that look overdue more is asked: their newest
message in CANDLES (the recorder may be behind, or the archive away), and their sessions, which are learnt from their
bars once a day. Both are bounded a beat, so that a Friday evening with a thousand series costs no more than any other.
Times are epoch seconds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias

import msgspec
from nats.js.errors import NotFoundError

from actors.monitor.watch import Probe, in_thread, result
from bus.client import Bus
from bus.store import Store, StoreUnavailable
from bus.subjects import CANDLES
from schema.health import CheckResult
from schema.messages import CandleBlock
from schema.settings import Settings
from schema.timeframes import SECONDS

MOST_SERIES: Final = 1_000  # that are watched: those with the newest bars
MOST_ASKED: Final = 64  # series whose newest message is asked for in a beat ...
AT_ONCE: Final = 16  # ... so many at a time
MOST_LEARNT: Final = 16  # series whose sessions are learnt in a beat ...
LEARN_SECONDS: Final = 3.0  # ... and how long that may take
LEARN_WEEKS: Final = 16  # of bars that sessions are learnt from, and ...
LEARN_BARS: Final = 120_000  # ... at most so many
LEARNT_FOR: Final = 86_400.0
YOUNG: Final = 28 * 86_400  # of history, before which sessions are learnt anew ...
YOUNG_FOR: Final = 600.0  # ... so often
SUBJECTS_EVERY: Final = 300.0  # how often series are looked for that the archive has not got yet
LIVE_BARS: Final = 2_000  # newest bars of which one came live where a series is a live one
JUDGED_FOR: Final = 60.0  # how long a verdict other than fresh stands while no bar comes

Series: TypeAlias = tuple[str, str]  # symbol, timeframe


@dataclass(slots=True)
class Feed:
    """A series. ``live``: its bars come live; None while nobody knows."""

    symbol: str
    timeframe: str
    head: int = 0
    live: bool | None = None
    asked: float = 0.0  # when the stream was last asked, by the monotonic clock
    calendar: Any = None  # actors.core.sessions.Calendar
    learnt: float = 0.0
    verdict: Any = None  # actors.core.freshness.Freshness, ...
    judged: tuple[int, float] = (0, 0.0)  # ... of which head and when

    @property
    def name(self) -> str:
        return f"feed.{self.timeframe}.{self.symbol}"

    @property
    def step(self) -> int:
        return SECONDS[self.timeframe]

    def wants_learning(self, now: float) -> bool:
        """A young series' sessions are learnt anew as it grows."""
        if not self.learnt or self.calendar is None:
            return not self.learnt or bool(self.live)
        first, last = self.calendar.first, self.calendar.head
        young = first is None or last - first < YOUNG
        return now - self.learnt > (YOUNG_FOR if young else LEARNT_FOR)

    def heard(self, opened: int, received: float, *, live: bool) -> None:
        """A newer bar; ``live``: it was no history and no replay."""
        from actors.core.freshness import is_live

        if opened > self.head:
            self.head = opened
        if live and is_live(opened, self.timeframe, received):
            self.live = True


@dataclass(slots=True)
class FeedProbes:
    bus: Bus | None
    store: Store | None
    settings: Settings
    feeds: dict[Series, Feed] = field(default_factory=dict)
    _subjects_at: float = -1e9

    def probes(self) -> list[Probe]:
        return [Probe("feed", self.look, many=True)]

    async def look(self) -> list[CheckResult]:
        # Late: numpy takes a moment, and `up` is ready without it.
        from actors.core.freshness import freshness, is_due

        within = self.settings.health.timeout_seconds
        patience = self.settings.health.stale_seconds
        began, now = time.monotonic(), time.time()
        archived = await self._read_archive(within)
        await self._read_subjects()
        if not archived and not self.feeds:
            return [result("feed", "skipped", "The archive is away, and no series is known yet.")]
        feeds = sorted(self.feeds.values(), key=lambda feed: feed.head, reverse=True)
        for feed in feeds[MOST_SERIES:]:
            del self.feeds[feed.symbol, feed.timeframe]
        feeds = feeds[:MOST_SERIES]
        overdue = [
            feed
            for feed in feeds
            if feed.live is not False and is_due(feed.timeframe, feed.step, feed.head, now, patience)
        ]
        # Who looks stale is asked for first in CANDLES: an archive that is behind is no stale feed.
        await self._ask_stream([feed for feed in overdue if feed.live and not _is_shut(feed)])
        if archived and self.store is not None:
            await self._learn(overdue, began, self.store)
        else:
            _take_for_usual([feed for feed in overdue if feed.live and feed.calendar is None])
        todo = [feed for feed in feeds if feed.live and feed.calendar is not None and not self._is_judged(feed, began)]

        def judge() -> None:
            for feed in todo:
                feed.verdict = freshness(feed.calendar, feed.head, now, patience)
                feed.judged = (feed.head, began)

        if todo:
            await in_thread("feed", judge)
        return self._results(feeds, now)

    # --- what there is -----------------------------------------------------------------------------------------------

    async def _read_archive(self, within: float) -> bool:
        """Whether the archive answered."""
        if self.store is None:
            return False
        try:
            async with asyncio.timeout(within / 3):  # a frozen server must leave time for the stream
                rows = await self.store.fetch("health_newest", MOST_SERIES)
        except (StoreUnavailable, TimeoutError):
            return False
        for row in rows:
            self._feed(row["symbol"], row["timeframe"]).heard(
                int(row["ts"].timestamp()), row["received_at"].timestamp(), live=row["live"]
            )
        return True

    async def _read_subjects(self) -> None:
        """Series that stand in CANDLES only: new ones, and all of them while the archive is away."""
        now = time.monotonic()
        if self.bus is None or not self.bus.connected or now - self._subjects_at < SUBJECTS_EVERY:
            return
        self._subjects_at = now
        info = await self.bus.js.stream_info(str(CANDLES.stream), subjects_filter=CANDLES.wildcard)
        unknown: list[Feed] = []
        for subject in info.state.subjects or {}:
            try:
                timeframe, symbol = CANDLES.parse(subject)
            except ValueError:
                continue
            if timeframe in SECONDS and (symbol, timeframe) not in self.feeds and len(unknown) < MOST_SERIES:
                unknown.append(Feed(symbol, timeframe))
        await self._ask_stream(unknown)
        for feed in unknown:
            if feed.head:
                self.feeds.setdefault((feed.symbol, feed.timeframe), feed)

    def _feed(self, symbol: str, timeframe: str) -> Feed:
        return self.feeds.setdefault((symbol, timeframe), Feed(symbol, timeframe))

    async def _ask_stream(self, feeds: Sequence[Feed]) -> None:
        """The newest message of each; those that were asked longest ago come first."""
        if self.bus is None or not self.bus.connected:
            return
        gate = asyncio.Semaphore(AT_ONCE)

        async def ask(feed: Feed, bus: Bus) -> None:
            async with gate:
                feed.asked = time.monotonic()
                try:
                    subject = CANDLES.subject(feed.timeframe, feed.symbol)
                    raw = await bus.js.get_last_msg(str(CANDLES.stream), subject, direct=True)
                except NotFoundError:  # older than the stream keeps
                    return
            try:
                block: CandleBlock = CANDLES.decode(raw.data or b"")
            except msgspec.DecodeError:  # another version's; the archive knows more
                return
            if block.rows:
                live = not block.history and not block.replay
                feed.heard(int(block.rows[-1].ts.timestamp()), block.received_at.timestamp(), live=live)

        chosen = sorted(feeds, key=lambda feed: feed.asked)[:MOST_ASKED]
        await asyncio.gather(*(ask(feed, self.bus) for feed in chosen))

    # --- sessions ----------------------------------------------------------------------------------------------------

    async def _learn(self, feeds: Sequence[Feed], began: float, store: Store) -> None:
        """Sessions, and whether a series is a live one at all, of those that are overdue and were not learnt lately."""
        due = [feed for feed in feeds if feed.wants_learning(began)]
        for feed in sorted(due, key=lambda feed: (feed.learnt, feed.step))[:MOST_LEARNT]:
            if time.monotonic() - began > LEARN_SECONDS:
                return
            await self._learn_one(feed, store)

    async def _learn_one(self, feed: Feed, store: Store) -> None:
        from actors.core.freshness import LIVE
        from actors.core.sessions import WEEK, Calendar, learn

        within = self.settings.health.timeout_seconds / 2
        if not feed.live:
            row = await store.fetchval(
                "health_was_live", feed.symbol, feed.timeframe, feed.step + LIVE, LIVE_BARS, within=within
            )
            feed.live = bool(row)
        feed.learnt = time.monotonic()
        if not feed.live:
            return
        start = datetime.fromtimestamp(max(0, feed.head - LEARN_WEEKS * WEEK), UTC)
        holes = await store.holes(feed.symbol, feed.timeframe, start=start, limit=LEARN_BARS)
        calendar = Calendar(feed.timeframe)
        if holes is not None:
            await in_thread("sessions", lambda: learn(calendar, holes.first, holes.holes, holes.last))
        feed.calendar = calendar

    @staticmethod
    def _is_judged(feed: Feed, now: float) -> bool:
        """A verdict stands while no bar comes, for a minute: sessions change with the hours, not with the seconds."""
        if feed.verdict is None or feed.judged[0] != feed.head:
            return False
        return feed.verdict.state not in ("fresh", "quiet") and now - feed.judged[1] < JUDGED_FOR

    # --- what is said ------------------------------------------------------------------------------------------------

    def _results(self, feeds: Sequence[Feed], now: float) -> list[CheckResult]:
        live = [feed for feed in feeds if feed.live]
        stale = [feed for feed in live if feed.verdict is not None and feed.verdict.state == "stale"]
        if not live:
            said = (
                f"No series has live bars: {len(feeds)} came from files or replays."
                if feeds
                else "There is no series yet."
            )
            return [result("feed", "skipped", said, value=0.0, unit="stale")]
        said = f"{len(live)} live series are watched, {len(stale)} of them stale."
        return [
            result("feed", "ok", said, value=float(len(stale)), unit="stale"),
            *(_result(feed, now) for feed in live),
        ]


def _take_for_usual(feeds: Sequence[Feed]) -> None:
    """While the archive cannot tell a series' sessions it is judged by those of most markets, and by a longer silence."""
    from actors.core.sessions import Calendar

    for feed in feeds:
        feed.calendar = Calendar(feed.timeframe)  # `learnt` stays 0: the archive is asked once it is back


def _is_shut(feed: Feed) -> bool:
    """Known to be in a closed session by its last verdict: its stream need not be asked."""
    return feed.verdict is not None and feed.judged[0] == feed.head and feed.verdict.state in ("closed", "ended")


def _result(feed: Feed, now: float) -> CheckResult:
    last = datetime.fromtimestamp(feed.head, UTC)
    age = round(now - feed.head - feed.step, 1)
    said = f"{feed.symbol} {feed.timeframe}: the newest bar is of {last:%Y-%m-%d %H:%M} UTC"
    verdict = feed.verdict
    if verdict is None:
        return result(feed.name, "ok", f"{said}.", value=age, unit="s")
    if verdict.state == "stale":
        way = "is the terminal running, connected and sending?"
        bars = f"{verdict.missing:,} bar{'s' if verdict.missing != 1 else ''}"
        return result(
            feed.name, "critical", f"{said}, and {bars} of open session have not come: {way}", value=age, unit="s"
        )
    if verdict.state == "closed":
        said = f"{said}; its market is closed ({verdict.session})"
    elif verdict.state == "ended":
        said = f"{said}: it is taken to have ended, and no longer watched"
    elif verdict.state == "quiet":
        said = f"{said}; {verdict.missing:,} bars are late, which this series often does"
    return result(feed.name, "ok", f"{said}.", value=age, unit="s")
