"""Every sender's clock as the gateway knows it: what payloads teach, and how their times are converted.

Pure: ledgers, rules, zones and the time come in; conversions, alerts and ledgers to be saved come out. What is known of
a source is its ledger's newest book. A new book begins whenever times are converted differently from then on, so that
the older ones always say how an archived bar was converted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Final, cast

import msgspec
from msgspec import Struct

from actors.core.clock import (
    AS_UTC,
    BEGIN,
    DAY,
    HOUR,
    LONDON,
    NEW_YORK,
    UTC_LINE,
    ClockAlert,
    Conversion,
    Timeline,
    Zones,
    change_between,
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


REPLAYED: Final = "~replay"  # replays that name no source share a clock of their own


def title(source: str) -> str:
    """A source as a sentence begins with it."""
    return source or "The source without a name"


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
        self._unsaved: set[str] = set()
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
                self._unsaved.add(source)

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
        self._unsaved.add(known.ledger.source)
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
        source = ledger.source
        self._unsaved.discard(source)
        if not ledger.book.adopted:
            book = msgspec.structs.replace(ledger.book, at=max(moment(now), ledger.book.at), adopted=True)
            ledger = msgspec.structs.replace(ledger, books=(*ledger.books[:-1], book))
            self._unsaved.add(source)
        woken = self._wake(ledger)
        woken.saved_at = now
        if (known := self._sources.get(source)) is not None:
            woken.openings.last = known.openings.last
        self._sources[source] = woken

    def take_unsaved(self) -> list[ClockLedger]:
        """Ledgers to be saved before anything that was converted with them is published; :meth:`keep` what fails."""
        out = []
        while self._unsaved:
            known = self._sources.get(self._unsaved.pop())
            if known is not None:  # one source more than are kept is forgotten
                known.saved_at = self._now
                out.append(self._at_rest(known))
        return out

    def keep(self, source: str) -> None:
        """Told that a ledger could not be saved."""
        self._unsaved.add(source)

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
        only. What was learned waits in :meth:`take_unsaved`.
        """
        name = source or (REPLAYED if replay else "")
        known = self._sources.get(name)
        if known is None:
            known = self._fresh(name)
            if len(self._sources) < MAX_SOURCES:
                self._sources[name] = known
        alerts: list[ClockAlert] = []
        self._now = now
        offset = self._offset(known, server_time, gmt_time, now, replay, alerts)
        at = int(now) if gmt_time is None else gmt_time
        own: Timeline | None = None
        if known.line.kind_at(at) == "rule":
            self._compare(known, at, offset, alerts)
        else:
            self._note_openings(known, series)
            if offset is not None:
                # By the broker's own clock: where the computer's is some seconds off, a change is still seen when it happens.
                own = self._from_fields(known, cast(int, server_time) - offset, offset, now, alerts)
            elif not replay:
                self._from_newest(known, series, now, alerts)
            self._learn_family(known, now, alerts)
        line = own or known.line
        if now - known.saved_at >= SAVE_EVERY and (known.until or known.utc_until):
            self._unsaved.add(name)
        grid = self._grids.get(name)
        told = tuple(alert for alert in alerts if self._is_news(name, alert.kind, now))
        if line.kinds == ["utc"]:
            return AS_UTC if grid is None and not told else Conversion(None, grid=grid, alerts=told)
        by_rule = known.line.kind_at(at) == "rule"
        if (
            offset is not None
            and not by_rule
            and cast(int, server_time) - Conversion(line, now=gmt_time).to_utc(cast(int, server_time)) != offset
        ):
            # Payloads come in any order: one from just beside a change is converted by its own fields all the same.
            line = Timeline([(BEGIN, offset, "server")])
        newest = max((max(times) for times in series.values() if times), default=at)
        return Conversion(
            line,
            grid=grid,
            now=server_time - offset if server_time is not None and offset is not None else None,
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
        known: _Source,
        server_time: int | None,
        gmt_time: int | None,
        now: float,
        replay: bool,
        alerts: list[ClockAlert],
    ) -> int | None:
        """The offset of now by a payload's clock fields; None without them, or where they cannot be."""
        name = title(known.ledger.source)
        if gmt_time is not None and not replay and abs(gmt_time - now) > SKEW:
            message = (
                f"{name} sends from a computer whose clock differs from ours by {abs(gmt_time - now):.0f} s: set both "
                "by NTP; its offset from UTC may be wrong until then."
            )
            alerts.append(ClockAlert("skew", message, {"gmt_time": gmt_time, "ours": int(now)}))
        if server_time is None or gmt_time is None:
            return None
        difference = server_time - gmt_time
        offset = round(difference / STEP) * STEP
        if known.book.runs and abs(difference - known.line.offset_at(gmt_time)) < ROUNDING:
            offset = known.line.offset_at(gmt_time)
        if LOWEST <= offset <= HIGHEST:
            return offset
        message = (
            f"{name} says that its server is {difference} s from UTC, which no broker's is: its server_time and gmt_time "
            "are not used."
        )
        alerts.append(ClockAlert("implausible", message, {"server_time": server_time, "gmt_time": gmt_time}))
        return None

    def _compare(self, known: _Source, at: int, offset: int | None, alerts: list[ClockAlert]) -> None:
        by_rule = known.line.offset_at(at)
        if offset is not None and offset != by_rule:
            message = (
                f"{title(known.ledger.source)} is {offset_text(by_rule)} from UTC by its rule and {offset_text(offset)} "
                "by its clock fields: the rule holds; mend it if it is wrong (`mt5 clock show`)."
            )
            alerts.append(ClockAlert("contradiction", message, {"rule": by_rule, "fields": offset}))

    # --- observations ----------------------------------------------------------------------------------------------

    def _from_fields(
        self, known: _Source, at: int, offset: int, now: float, alerts: list[ClockAlert]
    ) -> Timeline | None:
        """Takes an observation; returns a clock for this payload alone where the ledger does not take it."""
        runs = known.book.runs
        agreed = known.line.offset_at(at) == offset
        still = agreed and bool(runs) and runs[-1].origin == "fields" and runs[-1].offset == offset
        if still and 0 <= at - known.until <= SAVE_EVERY:  # the common case
            known.until, known.change = at, None
            return None
        runs = known.runs()
        mine = tuple(run for run in runs if run.origin == "fields")  # they go over what was inferred before they came
        seen = ClockRun(since=at, until=at, offset=offset, origin="fields")
        explained = not mine or agreed or mine[-1].offset == offset or self._season(mine[-1], at, offset)
        alone = Timeline([(BEGIN, offset, "server")])
        if at > now + DAY:
            self._two_clocks(known, offset, alerts)
            return alone
        if not explained and at > mine[-1].until:
            change = known.change
            if change is None or change.offset != offset:
                change = known.change = _Change(offset, at // STEP * STEP, now)
            if at - mine[-1].until < PERSISTS:
                self._two_clocks(known, offset, alerts)
                return alone
            seen = msgspec.structs.replace(seen, since=max(change.since, mine[-1].until + 1))
        with_it = with_observation(mine, seen)
        if with_it is None:
            self._two_clocks(known, offset, alerts)
            return alone
        if with_it != runs:
            self._take(known, with_it, now, alerts, explained)
        return None if explained else alone

    def _season(self, run: ClockRun, at: int, offset: int) -> bool:
        """Whether a daylight-saving change of New York or Europe explains that a run's offset is over."""
        by = offset - run.offset
        return any(change_between(self.zones(zone), run.until, at, by) is not None for zone in (NEW_YORK, LONDON))

    def _take(
        self, known: _Source, runs: tuple[ClockRun, ...], now: float, alerts: list[ClockAlert], explained: bool
    ) -> None:
        """Puts observations into the ledger. A change that had to persist is in force since it was first seen."""
        began, known.change = (now if known.change is None else known.change.began), None
        before = known.line
        known.until = runs[-1].until
        if self._turn(known, msgspec.structs.replace(known.book, runs=runs), began) and not explained:
            at = runs[-1].until
            message = (
                f"{title(known.ledger.source)} went from {offset_text(before.offset_at(at))} to "
                f"{offset_text(known.line.offset_at(at))} from UTC, which no rule explains: see `mt5 clock show`."
            )
            details: dict[str, int | str] = {"before": before.offset_at(at), "after": known.line.offset_at(at)}
            alerts.append(ClockAlert("changed", message, details))

    def _two_clocks(self, known: _Source, offset: int, alerts: list[ClockAlert]) -> None:
        message = (
            f"{title(known.ledger.source)} sends {offset_text(offset)} from UTC where its clock is known otherwise: its "
            "clock was set, or two terminals send under one name, and each needs a source of its own."
        )
        alerts.append(ClockAlert("two_clocks", message, {"offset": offset}))

    def _from_newest(self, known: _Source, series: Series, now: float, alerts: list[ClockAlert]) -> None:
        """The offset of now from the newest bar, for a source without rule and clock fields."""
        runs = known.runs()
        found = newest_bar(series, now)
        if found is None or (runs and runs[-1].origin == "fields"):
            return
        at = int(now)
        seen = ClockRun(since=at, until=at, offset=found.offset, origin="inferred")
        if not runs:
            if found.offset == 0:
                known.utc_until = at if found.fresh and found.fine else known.utc_until
                known.change = None
            elif found.ahead:
                in_utc = known.utc_until is not None and at - known.utc_until < UTC_STANDS
                if not in_utc or self._persists(known, found, now):
                    self._take(known, (seen,), now, alerts, True)
                    self._say_inferred(known, found.offset, alerts)
            return
        expected = known.line.offset_at(at)
        if found.offset == expected:
            known.change = None
            if runs[-1].offset == expected and at - known.until <= SAVE_EVERY:
                known.until = max(known.until, at)
            elif found.fresh and (with_it := with_observation(runs, seen)) is not None:
                self._take(known, with_it, now, alerts, True)
            return
        # An hour up or down in bar after bar is daylight saving that nobody told us of; a late bar is no clock.
        likely = (found.offset - expected) % HOUR == 0 and (found.fine or found.offset > expected)
        if likely and self._persists(known, found, now) and known.change is not None:
            since = max(known.change.since, known.until + 1)
            run = ClockRun(since=min(since, at), until=at, offset=found.offset, origin="inferred")
            self._take(known, (*runs, run), now, alerts, False)

    def _persists(self, known: _Source, found: Newest, now: float) -> bool:
        """Whether bar after bar says the same; until then they were converted as before."""
        change = known.change
        if change is None or change.offset != found.offset:
            known.change = _Change(found.offset, int(now) // STEP * STEP, now, 1, found.bar)
            return False
        if found.bar > change.bar:
            change.count, change.bar = change.count + 1, found.bar
        if change.count < (PERSISTS_BARS if found.fine else 2) or now - change.began < PERSISTS:
            return False
        change.began = now
        return True

    def _say_inferred(self, known: _Source, offset: int, alerts: list[ClockAlert]) -> None:
        name = known.ledger.source
        message = (
            f"{title(name)} sends bars from the future: its times are taken as {offset_text(offset)} from UTC. Confirm it "
            f'in mt5.toml ([clock."{name}"] rule = ...) or send server_time and gmt_time; `mt5 clock restate` mends what '
            "was stored before."
        )
        alerts.append(ClockAlert("inferred", message, {"offset": offset}))

    # --- daylight saving from week openings ------------------------------------------------------------------------

    def _note_openings(self, known: _Source, series: Series) -> None:
        if known.book.family is not None:
            return
        for key, times in series.items():
            if times and SECONDS[key[1]] <= HOUR:
                known.openings.note(key, times if len(times) == 1 else sorted(times), self.zones(NEW_YORK))

    def _learn_family(self, known: _Source, now: float, alerts: list[ClockAlert]) -> None:
        book = known.book
        if book.family is not None or not book.runs or not known.openings.fresh:
            return
        known.openings.fresh = False
        rule = family(known.openings, known.until, book.runs[-1].offset, self.zones)
        if rule is None:
            return
        self._turn(known, msgspec.structs.replace(book, runs=known.runs(), family=rule), now)
        message = (
            f"{title(known.ledger.source)} follows {rule}, as its week openings show: `mt5 clock restate` confirms, or "
            "puts right, what was stored on an assumption before."
        )
        alerts.append(ClockAlert("learned", message, {"rule": rule}))
