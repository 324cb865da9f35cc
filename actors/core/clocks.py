"""Every sender's clock as the gateway knows it: what payloads teach, and how their times are converted.

Pure: ledgers, rules, zones and the time come in; conversions, alerts and ledgers to be saved come out. What is known of
a source is its ledger's newest book. A new book begins whenever times are converted differently from then on, so that
the older ones always say how an archived bar was converted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Final

import msgspec
from msgspec import Struct

from actors.core.clock import (
    AS_UTC,
    BEGIN,
    DAY,
    HOUR,
    NEW_YORK,
    UTC_LINE,
    ClockAlert,
    Conversion,
    Timeline,
    Zones,
    timeline,
)
from actors.core.clock_evidence import Newest, Openings, family, newest_bar, waking, with_observation
from actors.core.timeframe import from_epoch
from schema.clock import HIGHEST, LOWEST, STEP, ClockBook, ClockLedger, ClockRun, offset_text
from schema.settings import Clock
from schema.timeframes import SECONDS

MAX_SOURCES: Final = 1_024
MAX_BOOKS: Final = 64
SKEW: Final = 300  # seconds that a sender's own clock may differ from ours
PERSISTS: Final = 600  # seconds that a change no rule explains must last before the ledger takes it
PERSISTS_BARS: Final = 10  # and so many newest bars, where bars are all there is to go by
ROUNDING: Final = (
    600  # a difference this close to the known offset is that offset: the fields may lie a few minutes off
)
SAVE_EVERY: Final = HOUR  # how often "still so" is written down
SAY_EVERY: Final = 6 * HOUR  # how often the same alert is raised again
UTC_STANDS: Final = 7 * DAY  # after bars that fit UTC, one bar from the future is an error and no clock

Series = Mapping[tuple[str, str], Sequence[int]]  # bar times in the sender's clock by (symbol, timeframe)


def name_of(source: str) -> str:
    return source or "the source without a name"


def moment(now: float) -> datetime:
    """Our clock's time as messages carry it."""
    return from_epoch(int(now)).replace(microsecond=int(now % 1 * 1e6))


class _Change(Struct):
    """Observations that contradict the ledger and may be the beginning of a new offset."""

    offset: int
    since: int
    began: float
    count: int = 0
    bar: int = 0


class _Source(Struct):
    """A source's ledger at work. ``until`` is the newest observation of its last run."""

    ledger: ClockLedger
    line: Timeline
    openings: Openings
    until: int = 0
    utc_until: int | None = None
    saved_at: float = 0.0
    unsaved: bool = False
    change: _Change | None = None

    @property
    def book(self) -> ClockBook:
        return self.ledger.book

    def runs(self) -> tuple[ClockRun, ...]:
        runs = self.book.runs
        if not runs or runs[-1].until >= self.until:
            return runs
        return (*runs[:-1], msgspec.structs.replace(runs[-1], until=self.until))


class Clocks:
    """All sources. ``settings`` are the rules by source; ``zones`` gives a zone's steps.

    Raises:
        ValueError: a rule that cannot be read or names an unknown zone; the message says where.
    """

    def __init__(self, settings: Mapping[str, Clock], ledgers: Iterable[ClockLedger], zones: Zones, now: float) -> None:
        self.zones = zones
        self.settings = settings
        self._sources: dict[str, _Source] = {}
        self._told: dict[tuple[str, str], float] = {}
        self._grids: dict[str, Timeline] = {}
        self._now = now
        for source, clock in settings.items():
            for what, rule in (("rule", clock.rule), ("grid", clock.grid)):
                if rule is None:
                    continue
                try:
                    line = timeline(ClockBook(at=moment(now), rule=rule), zones)
                except ValueError as error:
                    raise ValueError(f'clock."{source}".{what}: {error}.') from None
                if what == "grid":
                    self._grids[source] = line
        for ledger in ledgers:
            self._sources[ledger.source] = self._wake(ledger)
        for source, clock in settings.items():
            known = self._sources.get(source)
            if known is None and clock.rule is not None:
                known = self._sources[source] = self._fresh(source)
            if known is not None and known.book.rule != clock.rule:
                self._turn(known, msgspec.structs.replace(known.book, rule=clock.rule), now)
        for source, known in self._sources.items():
            if source not in settings and known.book.rule is not None:
                self._turn(known, msgspec.structs.replace(known.book, rule=None), now)
            if not known.book.adopted:
                self._amend(known, msgspec.structs.replace(known.book, adopted=True))
                known.unsaved = True

    def _wake(self, ledger: ClockLedger) -> _Source:
        runs = ledger.book.runs
        return _Source(
            ledger,
            timeline(ledger.book, self.zones),
            waking(ledger.openings),
            until=runs[-1].until if runs else 0,
            utc_until=ledger.utc_until,
        )

    def _fresh(self, source: str) -> _Source:
        # Whatever the archive holds of a source that no ledger knows was taken as UTC.
        book = ClockBook(at=from_epoch(0))
        return _Source(ClockLedger(source=source, books=(book,)), UTC_LINE, waking({}))

    # --- books -----------------------------------------------------------------------------------------------------

    def _amend(self, known: _Source, book: ClockBook) -> None:
        """The newest book in another wording that converts alike."""
        known.ledger = msgspec.structs.replace(known.ledger, books=(*known.ledger.books[:-1], book))

    def _turn(self, known: _Source, book: ClockBook, now: float) -> bool:
        """Puts a book in force; returns whether times are converted differently from now on."""
        line = timeline(book, self.zones)
        known.unsaved = True
        if line == known.line:
            self._amend(known, book)
            return False
        at = max(moment(now), known.book.at)
        books = (*known.ledger.books, msgspec.structs.replace(book, at=at, adopted=True))
        known.ledger = msgspec.structs.replace(known.ledger, books=books[-MAX_BOOKS:])
        known.line = line
        return True

    def adopt(self, ledger: ClockLedger, now: float) -> None:
        """Takes a ledger that somebody else wrote: what a command put there is in force from now on."""
        book = ledger.book
        if not book.adopted:
            book = msgspec.structs.replace(book, at=max(moment(now), book.at), adopted=True)
            ledger = msgspec.structs.replace(ledger, books=(*ledger.books[:-1], book))
            unsaved = True
        else:
            unsaved = False
        known = self._sources.get(ledger.source)
        woken = self._wake(ledger)
        woken.unsaved = unsaved
        woken.saved_at = now
        if known is not None:
            woken.openings.last = known.openings.last
        self._sources[ledger.source] = woken

    def unsaved(self) -> list[ClockLedger]:
        """Ledgers to be saved before anything that was converted with them is published."""
        return [self._at_rest(known) for known in self._sources.values() if known.unsaved]

    def saved(self, ledger: ClockLedger, now: float) -> None:
        """Told that a ledger as :meth:`unsaved` gave it is safe."""
        known = self._sources[ledger.source]
        known.unsaved = self._at_rest(known) != ledger
        known.saved_at = now

    def _at_rest(self, known: _Source) -> ClockLedger:
        self._amend(known, msgspec.structs.replace(known.book, runs=known.runs()))
        return msgspec.structs.replace(known.ledger, openings=known.openings.at_rest(), utc_until=known.utc_until)

    def line(self, source: str | None) -> Timeline:
        """A source's offsets over all time as far as they are known: to_server, to_utc, offset_at."""
        known = self._sources.get(source or "")
        return known.line if known is not None else UTC_LINE

    # --- payloads --------------------------------------------------------------------------------------------------

    def resolve(
        self,
        source: str | None,
        *,
        server_time: int | None,
        gmt_time: int | None,
        series: Series,
        now: float,
        replay: bool = False,
    ) -> Conversion:
        """Learns from a payload and says how its times are converted.

        ``series`` holds the payload's bar times as sent. ``now`` is our clock. A ``replay`` teaches by its clock fields
        only. What was learned waits in :meth:`unsaved`.
        """
        name = source or ""
        known = self._sources.get(name)
        if known is None:
            known = self._fresh(name)
            if len(self._sources) < MAX_SOURCES:
                self._sources[name] = known
        alerts: list[ClockAlert] = []
        self._now = now
        offset = self._offset(name, server_time, gmt_time, now, replay, alerts)
        at = int(now) if gmt_time is None else gmt_time
        line = known.line
        ruled = line.kind_at(at) == "rule"
        if ruled:
            self._compare(name, line, at, offset, alerts)
        else:
            self._follow(known, series, replay, now)
            if offset is not None:
                line = self._from_fields(known, at, offset, now, alerts)
            elif not replay:
                line = self._from_newest(known, series, now, alerts)
            self._learn_family(known, now, alerts)
            if line is not known.line and known.change is None:
                line = known.line
        if not known.unsaved and now - known.saved_at >= SAVE_EVERY and (known.until or known.utc_until):
            known.unsaved = True
        grid = self._grids.get(name)
        told = tuple(alert for alert in alerts if self._is_news(name, alert.kind, now))
        if line is known.line and len(line.kinds) == 1 and line.kinds[0] == "utc":
            return AS_UTC if grid is None and not told else Conversion(None, grid=grid, alerts=told)
        newest = max((max(times) for times in series.values() if times), default=at)
        return Conversion(
            line,
            grid=grid,
            now=gmt_time if offset is not None else None,
            ts_source=line.kind_at(line.to_utc(newest)),
            alerts=told,
        )

    def _is_news(self, name: str, kind: str, now: float) -> bool:
        before = self._told.get((name, kind))
        if before is not None and 0 <= now - before < SAY_EVERY:
            return False
        self._told[name, kind] = now
        return True

    def _offset(
        self,
        name: str,
        server_time: int | None,
        gmt_time: int | None,
        now: float,
        replay: bool,
        alerts: list[ClockAlert],
    ) -> int | None:
        """The offset of now by a payload's clock fields; None without them, or where they cannot be."""
        if gmt_time is not None and not replay and abs(gmt_time - now) > SKEW:
            alerts.append(
                ClockAlert(
                    "skew",
                    f"The clock of the computer that sends for {name_of(name)} differs from ours by "
                    f"{abs(gmt_time - now):.0f} s: set the clocks of both by NTP.",
                    {"gmt_time": gmt_time, "ours": int(now)},
                )
            )
        if server_time is None or gmt_time is None:
            return None
        difference = server_time - gmt_time
        offset = round(difference / STEP) * STEP
        known = self._sources.get(name)
        if known is not None and known.book.runs and abs(difference - known.line.offset_at(gmt_time)) < ROUNDING:
            offset = known.line.offset_at(gmt_time)
        if LOWEST <= offset <= HIGHEST:
            return offset
        alerts.append(
            ClockAlert(
                "implausible",
                f"{name_of(name).capitalize()} says that its server is {offset_text(offset)} from UTC, which no broker "
                "is: its server_time and gmt_time are not used.",
                {"server_time": server_time, "gmt_time": gmt_time},
            )
        )
        return None

    def _compare(self, name: str, line: Timeline, at: int, offset: int | None, alerts: list[ClockAlert]) -> None:
        by_rule = line.offset_at(at)
        if offset is not None and offset != by_rule:
            alerts.append(
                ClockAlert(
                    "contradiction",
                    f"The rule says that {name_of(name)} is {offset_text(by_rule)} from UTC, its clock fields say "
                    f"{offset_text(offset)}: the rule holds; mend it if it is wrong (`mt5 clock show`).",
                    {"rule": by_rule, "fields": offset},
                )
            )

    # --- observations ----------------------------------------------------------------------------------------------

    def _from_fields(self, known: _Source, at: int, offset: int, now: float, alerts: list[ClockAlert]) -> Timeline:
        runs = known.book.runs
        last = runs[-1] if runs else None
        if last is not None and last.origin == "fields" and last.offset == offset and known.until <= at:
            if at - known.until <= SAVE_EVERY:  # the common case: still so
                known.until, known.change = at, None
                return known.line
        inferred = [run for run in runs if run.origin != "fields"]
        book = known.book
        if inferred:  # clock fields go over what was inferred before they came
            book = msgspec.structs.replace(book, runs=tuple(run for run in known.runs() if run.origin == "fields"))
        else:
            book = msgspec.structs.replace(book, runs=known.runs())
        seen = ClockRun(since=at, until=at, offset=offset, origin="fields")
        with_it = with_observation(book.runs, seen) if at - now <= DAY else None
        if with_it is None:
            self._two_clocks(known, offset, alerts)
            return Timeline([(BEGIN, offset, "server")])
        book = msgspec.structs.replace(book, runs=with_it)
        expected = not book.runs or known.line.offset_at(at) == offset or not runs or bool(inferred)
        if not expected and 0 <= at - known.until < PERSISTS:
            if known.change is None or known.change.offset != offset:
                known.change = _Change(offset, at, now)
            if at - known.change.since < PERSISTS:
                self._two_clocks(known, offset, alerts)
                return timeline(book, self.zones)
            seen = msgspec.structs.replace(seen, since=max(known.change.since, known.until + 1))
            book = msgspec.structs.replace(book, runs=(*known.runs(), seen))
        self._take(known, book, now, alerts, expected)
        return known.line

    def _take(self, known: _Source, book: ClockBook, now: float, alerts: list[ClockAlert], expected: bool) -> None:
        began, known.change = (known.change.began if known.change is not None else now), None
        known.until = book.runs[-1].until
        before = known.line
        if self._turn(known, book, min(began, now)) and not expected:
            at = book.runs[-1].since
            alerts.append(
                ClockAlert(
                    "changed",
                    f"The clock of {name_of(known.ledger.source)} went from {offset_text(before.offset_at(at))} to "
                    f"{offset_text(known.line.offset_at(at))}, which no rule explains: bars received before are not "
                    f"touched (`mt5 clock show`).",
                    {"before": before.offset_at(at), "after": known.line.offset_at(at)},
                )
            )

    def _two_clocks(self, known: _Source, offset: int, alerts: list[ClockAlert]) -> None:
        alerts.append(
            ClockAlert(
                "two_clocks",
                f"{name_of(known.ledger.source).capitalize()} sends {offset_text(offset)} where its clock was known "
                "otherwise: either its clock was set, or two terminals send under one name; give each its own source.",
                {"offset": offset},
            )
        )

    def _from_newest(self, known: _Source, series: Series, now: float, alerts: list[ClockAlert]) -> Timeline:
        """The offset of now from the newest bar, for a source without rule and clock fields."""
        found = newest_bar(series, now)
        if found is None or (known.book.runs and known.book.runs[-1].origin == "fields"):
            return known.line
        at = int(now)
        seen = ClockRun(since=at, until=at, offset=found.offset, origin="inferred")
        if not known.book.runs:
            if found.offset == 0:
                known.utc_until = at if found.fresh and found.fine else known.utc_until
                known.change = None
                return known.line
            if not found.ahead:
                return known.line
            in_utc = known.utc_until is not None and at - known.utc_until < UTC_STANDS
            if in_utc and not self._persists(known, found, now):
                return known.line
            self._take(known, msgspec.structs.replace(known.book, runs=(seen,)), now, alerts, True)
            self._say_inferred(known, found.offset, alerts)
            return known.line
        if found.offset == known.line.offset_at(at):
            known.change = None
            with_it = with_observation(known.runs(), seen) if found.fresh else None
            if with_it is not None and (len(with_it) != len(known.book.runs) or at - known.until > SAVE_EVERY):
                self._take(known, msgspec.structs.replace(known.book, runs=with_it), now, alerts, True)
            elif with_it is not None:
                known.until = max(known.until, at)
            return known.line
        # An hour up or down in bar after bar is daylight saving that nobody told us of; a late bar is no clock.
        whole_hours = (found.offset - known.line.offset_at(at)) % HOUR == 0
        if found.fine and whole_hours and self._persists(known, found, now):
            runs = known.runs()
            since = max(runs[-1].until + 1, known.change.since if known.change is not None else at)
            run = msgspec.structs.replace(seen, since=min(since, at))
            self._take(known, msgspec.structs.replace(known.book, runs=(*runs, run)), now, alerts, False)
            self._say_inferred(known, found.offset, alerts)
        return known.line

    def _persists(self, known: _Source, found: Newest, now: float) -> bool:
        change = known.change
        if change is None or change.offset != found.offset:
            known.change = _Change(found.offset, int(now), now, 1, found.bar)
            return False
        if found.bar > change.bar:
            change.count, change.bar = change.count + 1, found.bar
        if change.count < PERSISTS_BARS or now - change.began < PERSISTS:
            return False
        change.began = now  # until now its bars were converted by the old offset
        return True

    def _say_inferred(self, known: _Source, offset: int, alerts: list[ClockAlert]) -> None:
        name = known.ledger.source
        alerts.append(
            ClockAlert(
                "inferred",
                f"The newest bar of {name_of(name)} is ahead of our clock: its times are taken as "
                f'{offset_text(offset)} from UTC. Confirm it in mt5.toml ([clock."{name}"] rule), or send server_time '
                "and gmt_time; what was stored before is mended by `mt5 clock restate`.",
                {"offset": offset},
            )
        )

    # --- daylight saving from week openings ------------------------------------------------------------------------

    def _follow(self, known: _Source, series: Series, replay: bool, now: float) -> None:
        if known.book.family is not None:
            return
        for (symbol, timeframe), times in series.items():
            if SECONDS[timeframe] > HOUR or not times:
                continue
            ordered = times if len(times) == 1 else sorted(times)
            known.openings.note(f"{symbol} {timeframe}", ordered, self.zones(NEW_YORK))

    def _learn_family(self, known: _Source, now: float, alerts: list[ClockAlert]) -> None:
        book = known.book
        if book.family is not None or not book.runs or not known.openings.fresh:
            return
        known.openings.fresh = False
        rule = family(known.openings, known.until, book.runs[-1].offset, self.zones)
        if rule is None:
            return
        self._turn(known, msgspec.structs.replace(book, runs=known.runs(), family=rule), now)
        alerts.append(
            ClockAlert(
                "learned",
                f"The clock of {name_of(known.ledger.source)} follows {rule}, as its week openings show: "
                "`mt5 clock restate` puts right, and confirms, what was stored on an assumption before.",
                {"rule": rule},
            )
        )
