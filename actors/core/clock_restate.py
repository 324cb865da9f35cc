"""What must change in the archive when a clock turns out to have been another: bars withdrawn at wrong times, bars added.

Pure. Every version of a bar that the archive holds, current or replaced, says with the book that was in force when it
was received what the sender's clock showed; the newest book says where that belongs. So what is right does not depend
on how far an earlier, interrupted restatement came, and bars that others were stored over come back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Final, Literal, NamedTuple

from msgspec import Struct

from actors.core.clock import HOUR, UTC_LINE, Timeline, Zones, timeline
from schema.clock import HIGHEST, LOWEST, ClockLedger, TsSource

REACH: Final = HIGHEST - LOWEST + 2 * HOUR  # seconds that a restatement may move a bar
CHUNK: Final = 4_096  # bars between two looks at what is decided


class Version(Struct, frozen=True):
    """A version of a bar in the archive. ``ts`` is where it was stored (UTC epoch seconds)."""

    ts: int
    received_at: datetime
    ts_source: str
    current: bool
    values: tuple[float, ...]


class Change(NamedTuple):
    """What one time of the series needs: ``added`` or ``confirmed`` with a version's values, or ``withdrawn``.

    A bar is confirmed whose time was a guess and is not any more; its values stay.
    """

    ts: int
    what: Literal["added", "confirmed", "withdrawn"]
    version: Version
    ts_source: TsSource


class Books:
    """A ledger's books compiled: how each bar was converted, and how it should have been."""

    def __init__(self, ledger: ClockLedger, zones: Zones) -> None:
        self._begin = [book.at for book in ledger.books]
        self._lines = [timeline(book, zones) for book in ledger.books]

    @property
    def now(self) -> Timeline:
        return self._lines[-1]

    def line(self, version: Version) -> Timeline | None:
        """How a version was converted; None where no book says what the archive says of it."""
        if version.ts_source == "utc":
            return UTC_LINE
        at = max(bisect_right(self._begin, version.received_at) - 1, 0)
        # The ledger may be younger than the archive, or a bar confirmed since: look on, newer books first.
        for line in (self._lines[at], *reversed(self._lines)):
            if line.kind_at(version.ts) == version.ts_source:
                return line
        return None

    def place(self, version: Version) -> int | None:
        """Where a version belongs by the newest book (UTC); None where that cannot be known."""
        was = self.line(version)
        if was is None:
            return None
        if was.offset_at(version.ts) == self.now.offset_at(version.ts):
            return version.ts
        return self.now.to_utc(was.to_server(version.ts), second=was.second_pass(version.ts))


class Restatement:
    """The changes of one source's bars in one series.

    Feed it every version, ascending in ``ts``, those of :data:`REACH` seconds around the span included. Bars stored
    before ``first`` or after ``last`` stay where they are, and no bar takes their place; what cannot be placed stays too
    (``unknown`` counts it).
    """

    def __init__(self, books: Books, *, first: int | None = None, last: int | None = None) -> None:
        self.books = books
        self.unknown = 0
        self._first = first
        self._last = last
        self._belongs: dict[int, Version] = {}  # the newest version that belongs to each time
        self._stands: dict[int, Version] = {}  # what the archive shows there
        self._full = CHUNK

    def feed(self, versions: Iterable[Version]) -> list[Change]:
        """Takes versions; returns the changes that are decided by now, ascending over all calls."""
        out: list[Change] = []
        for version in versions:
            self._take(version)
            if len(self._belongs) >= self._full:
                out += self._changes(version.ts - REACH)
                self._full = len(self._belongs) + CHUNK
        return out

    def finish(self) -> list[Change]:
        """The changes that are left once every version has been fed."""
        return list(self._changes(None))

    def _inside(self, ts: int) -> bool:
        return (self._first is None or ts >= self._first) and (self._last is None or ts <= self._last)

    def _take(self, version: Version) -> None:
        inside = self._inside(version.ts)
        place = self.books.place(version) if inside else None
        if version.current:
            self._stands[version.ts] = version
            self.unknown += inside and place is None
            place = version.ts if place is None else place
        if place is not None:
            other = self._belongs.get(place)
            if other is None or (version.current and not inside) or (self._inside(other.ts) and _newer(version, other)):
                self._belongs[place] = version

    def _changes(self, before: int | None) -> Iterator[Change]:
        """What is decided: no later version can belong to a time before ``before`` (None: to any)."""
        belongs, stands = self._belongs, self._stands
        for ts in sorted(ts for ts in belongs.keys() | stands.keys() if before is None or ts < before):
            right, shown = belongs.pop(ts, None), stands.pop(ts, None)
            kind = self.books.now.kind_at(ts)
            if right is None:
                if shown is not None:
                    yield Change(ts, "withdrawn", shown, kind)
            elif shown is None or right.values != shown.values:
                if right.current or right.ts != ts:
                    yield Change(ts, "added", right, kind)
            elif shown.ts_source == "assumed" and kind != "assumed":
                yield Change(ts, "confirmed", shown, kind)


def _newer(one: Version, other: Version) -> bool:
    if one.ts == other.ts and one.current != other.current:
        return one.current
    return one.received_at > other.received_at
