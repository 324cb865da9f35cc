"""A series' rows made again as of any sequence of the log, in one pass over its past.

A row's features depend on the series' bars up to its own, each in the version that counted when the row was made. So the
series' past is gone through once, in the order of the log: bars that come behind all others change no earlier row, and what
reaches into the past (late, revised, withdrawn bars) takes back only what was computed behind it. Each wanted row is answered
where its own sequence stands in that order, by the very code that made it.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterable, MutableSequence, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import numpy as np
from msgspec import structs

from actors.core.features import READY_AFTER, Columns, FeatureState
from actors.core.hashing import features_hash
from actors.core.timeframe import FORWARD_BARS, forward_span, from_epoch
from schema.messages import FeatureRow

CHECKPOINT_EVERY: Final = 1_024  # bars between two states that a change of the past is computed again from
INDICATORS: Final = Columns.__struct_fields__
PRICES: Final = ("open", "high", "low", "close", "volume", "spread", "real_volume")


class Version(NamedTuple):
    """A version of a bar, as the archive keeps it. ``seq`` is the CANDLES sequence from which on features used it.

    ``values`` are those of :data:`PRICES`, None where the bar was withdrawn. ``brought_seq`` is the sequence that brought
    it. ``heard_at`` is when the bar's age was judged, None: at its own end.
    """

    seq: int
    ts: int
    values: tuple[float, ...] | None
    revision: int = 0
    live: bool = True
    heard_at: datetime | None = None
    brought_seq: int = 0


class Rebuilt(NamedTuple):
    """A row as features must have published it with a sequence.

    ``published`` is the newest sequence that made the row what it is. ``replaces`` is the features hash of the row that it
    replaced then, ``replaces_seq`` the sequence that one was published with.
    """

    row: FeatureRow
    digest: str
    published: int
    brought: int
    replaces: str | None = None
    replaces_seq: int = 0


Wanted = tuple[int, int]
"""An open time (epoch seconds) and the CANDLES sequence as of which its row is wanted."""


class Rebuilder:
    """One series' past, fed in the order of the log, and the rows that are wanted of it.

    About 180 bytes a bar. :meth:`feed` takes versions ascending by ``seq``; of one sequence those that waited come last, else
    the withdrawn first, then by ``ts``. ``found`` has every wanted row that existed once :meth:`finish` was called.

    Bars that waited are taken in together with the next message, or after a quiet while with the sequence of the last one,
    whose own rows are published already. The archive does not tell which: such a row has up to three forms.
    """

    def __init__(self, symbol: str, timeframe: str, wanted: Iterable[Wanted]) -> None:
        self.symbol = symbol
        self.timeframe = timeframe
        self.found: dict[Wanted, tuple[Rebuilt, ...]] = {}
        self._wanted = sorted(set(wanted), key=lambda w: (w[1], w[0]))
        self._at = 0  # of _wanted: those before are answered
        self._replaced: dict[Wanted, tuple[str, int]] = {}  # what rows were before the changes of _before_seq
        self._before_seq = 0
        self._early_seq = 0  # the newest sequence whose rows were looked at before what waited was taken in
        self._changes: list[tuple[int, int]] = []  # (sequence, earliest open time changed), where the past changed
        self._ts = array("q")
        self._values: tuple[array[float], ...] = tuple(array("d") for _ in PRICES)
        self._revision = array("i")
        self._live = bytearray()
        self._heard = array("d")
        self._applied = array("q")
        self._brought = array("q")
        self._columns: tuple[array[float], ...] = tuple(array("d") for _ in INDICATORS)  # NaN: no value
        self._state = FeatureState()
        self._points: list[FeatureState] = []  # states after each full multiple of bars

    @property
    def last_seq(self) -> int:
        """The newest sequence that is wanted: what comes later has no say."""
        return self._wanted[-1][1] if self._wanted else 0

    def feed(self, versions: Iterable[Version]) -> None:
        """Takes the next versions of the series' bars."""
        for version in versions:
            if 0 < version.brought_seq < version.seq and version.seq != self._early_seq:
                self._without_what_waited(version.seq)
            if version.values is not None and (not self._ts or version.ts > self._ts[-1]):
                self._insert(len(self._ts), version, version.values)
            else:
                self._into_the_past(version)

    def finish(self) -> None:
        """No more versions come: answers what is still open."""
        self._answer(2**63)

    def label(self, ts: int) -> tuple[bool, float | None]:
        """Whether ``fwd_ret_5`` of a bar is known after all that was fed, and its value."""
        at = bisect_left(self._ts, ts)
        if at + FORWARD_BARS >= len(self._ts) or self._ts[at] != ts:
            return False, None
        close = self._values[3]
        base, later = close[at], close[at + FORWARD_BARS]
        if self._ts[at + FORWARD_BARS] - ts > forward_span(self.timeframe) or base <= 0.0:
            return True, None
        return True, (later - base) / base

    # --- the past --------------------------------------------------------------------------------------------------

    def _into_the_past(self, version: Version) -> None:
        self._answer(version.seq)
        self._remember(version.seq)
        at = bisect_left(self._ts, version.ts)
        known = at < len(self._ts) and self._ts[at] == version.ts
        if version.values is None:
            if not known:
                return
            for column in self._stored():
                del column[at]
        elif known:
            if tuple(column[at] for column in self._values) == version.values:
                return  # a copy under the same name, as a rename makes it
            for column in self._stored():
                del column[at]
            self._insert(at, version, version.values)
        else:
            self._insert(at, version, version.values)
        self._changes.append((version.seq, version.ts))
        self._take_back(at)

    def _insert(self, at: int, version: Version, values: Sequence[float]) -> None:
        heard = math.nan if version.heard_at is None else version.heard_at.timestamp()
        fields = (version.ts, version.revision, version.live, heard, version.seq, version.brought_seq, *values)
        for column, value in zip(self._stored(), fields, strict=True):
            column.insert(at, value)

    def _stored(self) -> tuple[MutableSequence[Any], ...]:
        bars = (self._ts, self._revision, self._live, self._heard, self._applied, self._brought)
        return (*bars, *self._values)

    def _take_back(self, at: int) -> None:
        """Forgets what was computed from index ``at`` on."""
        if at >= self._state.bars:
            return
        del self._points[at // CHECKPOINT_EVERY :]
        self._state = _copy(self._points[-1]) if self._points else FeatureState()
        for column in self._columns:
            del column[self._state.bars :]

    def _compute(self, until: int) -> None:
        """Indicators of the bars before index ``until``."""
        state = self._state
        while state.bars < until:
            start = state.bars
            stop = min(start + CHECKPOINT_EVERY - start % CHECKPOINT_EVERY, until)
            high, low, close = (np.array(self._values[i][start:stop]) for i in (1, 2, 3))
            columns = state.update_block(np.array(self._ts[start:stop], np.int64), high, low, close)
            for column, name in zip(self._columns, INDICATORS, strict=True):
                column.extend([math.nan if value is None else value for value in getattr(columns, name)])
            if state.bars % CHECKPOINT_EVERY == 0:
                self._points.append(_copy(state))

    # --- answers ---------------------------------------------------------------------------------------------------

    def _answer(self, before: int) -> None:
        """Answers what is wanted as of a sequence below ``before``: nothing that came yet is of a later past."""
        start = self._at
        while self._at < len(self._wanted) and self._wanted[self._at][1] < before:
            self._at += 1
        for wanted, at in self._places(self._wanted[start : self._at]):
            seq = wanted[1]
            made = self._made(at)
            was = self._replaced.pop(wanted, None)
            if made.published != seq:
                was = made.digest, made.published
            final = made if was is None else made._replace(replaces=was[0], replaces_seq=was[1])
            early = self.found.get(wanted, ())
            later = [made._replace(replaces=e.digest, replaces_seq=e.published) for e in early if e.row.live]
            self.found[wanted] = (*early, final, *later)

    def _without_what_waited(self, seq: int) -> None:
        """Answers what is wanted at ``seq`` as it stands before what waited is taken in."""
        self._early_seq = seq
        self._answer(seq)
        self._remember(seq)
        for wanted, at in self._places(self._wanted_at(seq)):
            was = self._replaced.get(wanted)
            made = self._made(at)
            if made.published == seq:
                self.found[wanted] = (made if was is None else made._replace(replaces=was[0], replaces_seq=was[1]),)

    def _wanted_at(self, seq: int) -> list[Wanted]:
        stop = self._at
        while stop < len(self._wanted) and self._wanted[stop][1] == seq:
            stop += 1
        return self._wanted[self._at : stop]

    def _places(self, wanted: Sequence[Wanted]) -> list[tuple[Wanted, int]]:
        """The index of each bar that existed as of its sequence, computed."""
        found = [(want, bisect_left(self._ts, want[0])) for want in wanted]
        # Bars that came behind all others since then are there already, and change no earlier row.
        found = [
            (want, at)
            for want, at in found
            if at < len(self._ts) and self._ts[at] == want[0] and self._applied[at] <= want[1]
        ]
        self._compute(max((at + 1 for _, at in found), default=0))
        return found

    def _made(self, at: int) -> Rebuilt:
        row = self._row(at)
        digest = features_hash(self.symbol, self.timeframe, row)
        return Rebuilt(row, digest, self._published(at), self._brought[at])

    def _remember(self, seq: int) -> None:
        """What the rows wanted at ``seq`` were before its first change."""
        if self._before_seq == seq:
            return
        self._before_seq = seq
        self._replaced.clear()
        for wanted, at in self._places(self._wanted_at(seq)):
            if self._applied[at] < seq and self._live[at]:
                made = self._made(at)
                self._replaced[wanted] = (made.digest, made.published)

    def _published(self, at: int) -> int:
        """The newest sequence with which the row at ``at`` changed: its bar's own, or that of an earlier bar's change."""
        own, ts = self._applied[at], self._ts[at]
        for seq, first in reversed(self._changes):
            if seq <= own:
                break
            if first <= ts:
                return seq
        return own

    def _row(self, at: int) -> FeatureRow:
        o, high, low, close, volume, spread, real = (column[at] for column in self._values)
        indicators: dict[str, Any] = {
            name: None if math.isnan(column[at]) else column[at]
            for name, column in zip(INDICATORS, self._columns, strict=True)
        }
        heard = self._heard[at]
        return FeatureRow(
            ts=from_epoch(self._ts[at]),
            open=o,
            high=high,
            low=low,
            close=close,
            volume=volume,
            spread=spread,
            real_volume=real,
            bar=at + 1,
            ready=at + 1 >= READY_AFTER,
            revision=self._revision[at],
            live=bool(self._live[at]),
            heard_at=None if math.isnan(heard) else datetime.fromtimestamp(heard, UTC),
            **indicators,
        )


def _copy(state: FeatureState) -> FeatureState:
    return structs.replace(state, closes=list(state.closes), times=list(state.times))
