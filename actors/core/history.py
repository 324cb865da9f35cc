"""A window of one series, for what reaches into its past: late, revised and withdrawn bars, and what follows from them."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterable, MutableSequence, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np

from actors.core.features import Columns, FeatureState, Floats, Ints, forward_returns
from actors.core.hashing import features_hash
from actors.core.ingest import digest
from actors.core.series import (
    CHECKPOINT_EVERY,
    RECENT,
    Change,
    Checkpoint,
    Mark,
    Origin,
    SeriesState,
    Shown,
    effect,
    epoch,
    make_rows,
    newest_closes,
    origin,
    own,
)
from actors.core.timeframe import FORWARD_BARS, forward_span, from_epoch
from schema.messages import Candle, CandleBlock, FeatureRow, Fill, Withdrawn


class History:
    """A window of a series: every bar after its base checkpoint, in its current version, ascending in time.

    About 140 bytes a bar. ``base`` None: from the series' first bar on. ``owner`` owned the series before the first
    message that is applied.
    """

    def __init__(self, base: Checkpoint | None = None, owner: str | None = None) -> None:
        self.base = base
        self.owner = owner
        self.seq = base.seq if base is not None else 0  # CANDLES sequence of the newest message applied
        self.ts = array("q")
        self.values: tuple[array[float], ...] = tuple(
            array("d") for _ in range(7)
        )  # open, high, low, close, volume, spread, real_volume
        self.revision = array("i")
        self.clock = array("q")  # server_time of the version, -1 without
        self.utc = array("q")  # server_utc of the version, -1 without
        self.arrived = array("q")  # CANDLES sequence that brought the bar
        self.brought = array("q")  # CANDLES sequence that brought the bar's version
        self.heard = array("d")  # when the bar's age is judged, by its first live version; NaN: at its own end
        self.published = array("q")  # CANDLES sequence that its row was last published with
        self.live = bytearray()
        self.source = array("h")
        self.ts_source = array("h")
        self._names: dict[str, int] = {}
        self._former: dict[int, set[int]] = {}  # digests of a bar's former versions
        self._gone: dict[int, int] = {}  # revision with which a bar was withdrawn

    def __len__(self) -> int:
        return len(self.ts)

    @property
    def begins(self) -> int | None:
        """Bars up to this open time lie before the window; None where it begins with the series."""
        return self.base.last_ts if self.base is not None else None

    def _number(self, name: str) -> int:
        return self._names.setdefault(name, len(self._names))

    def row(self, at: int) -> Candle:
        o, h, lo, c, volume, spread, real = (column[at] for column in self.values)
        return Candle(
            ts=from_epoch(self.ts[at]), open=o, high=h, low=lo, close=c, volume=volume, spread=spread, real_volume=real
        )

    def mark(self, at: int) -> Mark:
        clock, utc = self.clock[at], self.utc[at]
        names = list(self._names)
        return Mark(
            digest(self.row(at)),
            None if clock < 0 else clock,
            names[self.source[at]],
            names[self.ts_source[at]],
            None if utc < 0 else utc,
        )

    # --- versions --------------------------------------------------------------------------------------------------

    def restore(self, row: Candle, revision: int, new: Origin, applied: int = 0) -> None:
        """Takes a bar as the archive holds it, later than all before; ``applied`` is the sequence of its first use.

        Whatever changed an earlier bar has published this one's row again.
        """
        before = self.published[-1] if self.published else 0
        self._insert(len(self.ts), row, new, revision)
        self.published[-1] = max(self.published[-1], applied, before)

    def recall(self, row: Candle) -> None:
        """Told of values that a bar had before those it was restored with: sent again, they are no news."""
        self._former.setdefault(epoch(row), set()).add(digest(row))

    def recall_withdrawals(self, gone: Iterable[tuple[int, int, int]]) -> None:
        """Told of bars that were withdrawn before the window's messages, ascending: open time, revision, sequence.

        They may have come back since. Bars behind them that were there already have had their rows published again.
        """
        at, newest = 0, 0

        def republish(until: int) -> None:
            for later in range(at, until):
                if self.arrived[later] < newest:
                    self.published[later] = max(self.published[later], newest)

        for ts, revision, seq in gone:
            place = bisect_left(self.ts, ts, at)
            republish(place)
            at, newest = place, max(newest, seq)
            if at == len(self.ts) or self.ts[at] != ts:
                self._gone[ts] = revision
        republish(len(self.ts))

    def apply(self, block: CandleBlock, seq: int, priority: Sequence[str]) -> int | None:
        """Takes a message of the log; returns the smallest index from which rows change, None if nothing changed.

        Bars before the window are passed over.
        """
        new = origin(block, seq)
        self.owner = own(self.owner, new, priority)
        changed = [at for ts in block.withdrawn if (at := self._withdraw(int(ts.timestamp()))) is not None]
        changed += [at for row in block.rows if (at := self._put(row, new)) is not None]
        self.seq = seq
        if not changed:
            return None
        first = min(changed)
        for at in range(first, len(self.ts)):
            self.published[at] = max(self.published[at], seq)
        return first

    def would_change(self, block: CandleBlock, seq: int, priority: Sequence[str]) -> int | None:
        """A lower bound of what :meth:`apply` would return, without applying anything."""
        new = origin(block, seq)
        owner = own(self.owner, new, priority)
        out: list[int] = []
        for ts in block.withdrawn:
            at = bisect_left(self.ts, int(ts.timestamp()))
            if at < len(self.ts) and self.ts[at] == int(ts.timestamp()):
                out.append(at)
        begins = self.begins
        for row in block.rows:
            ts_ = epoch(row)
            if begins is not None and ts_ <= begins:
                continue
            at = bisect_left(self.ts, ts_)
            if at == len(self.ts) or self.ts[at] != ts_:
                out.append(at)
            else:
                current = self.mark(at)
                what = effect(current, digest(row), new, owner, self._former.get(ts_, ()))
                if what == "revised" or (what == "confirmed" and new.ts_source != current.ts_source):
                    out.append(at)
        return min(out, default=None)

    def _put(self, row: Candle, new: Origin) -> int | None:
        ts = epoch(row)
        begins = self.begins
        if begins is not None and ts <= begins:
            return None
        at = len(self.ts) if not self.ts or ts > self.ts[-1] else bisect_left(self.ts, ts)
        if at == len(self.ts) or self.ts[at] != ts:
            self._insert(at, row, new, self._gone.pop(ts, -1) + 1)
            return at
        current = self.mark(at)
        mark = digest(row)
        former = self._former.get(ts, set())
        what = effect(current, mark, new, self.owner, former)
        if what not in ("confirmed", "revised"):
            return None
        self.clock[at] = -1 if new.server_time is None else new.server_time
        self.utc[at] = -1 if new.server_utc is None else new.server_utc
        self.source[at] = self._number(new.source)
        if what == "confirmed":
            if new.ts_source == current.ts_source:
                return None
            self.ts_source[at] = self._number(new.ts_source)  # a guessed time turned out right: its row says so
            return at
        self._former.setdefault(ts, set()).add(current.digest)
        self.revision[at] += 1
        self.brought[at] = new.seq
        if new.live and not self.live[at]:
            self.live[at], self.heard[at] = True, _moment(new.heard_at)
        self.ts_source[at] = self._number(new.ts_source)
        for column, value in zip(self.values, _values(row), strict=True):
            column[at] = value
        return at

    def _insert(self, at: int, row: Candle, new: Origin, revision: int) -> None:
        self.ts.insert(at, epoch(row))
        self.revision.insert(at, revision)
        self.clock.insert(at, -1 if new.server_time is None else new.server_time)
        self.utc.insert(at, -1 if new.server_utc is None else new.server_utc)
        self.arrived.insert(at, new.seq)
        self.brought.insert(at, new.seq)
        self.heard.insert(at, _moment(new.heard_at))
        # A checkpoint that was computed again published everything behind it again.
        self.published.insert(at, max(new.seq, self.base.seq if self.base is not None else 0))
        self.live.insert(at, new.live)
        self.source.insert(at, self._number(new.source))
        self.ts_source.insert(at, self._number(new.ts_source))
        for column, value in zip(self.values, _values(row), strict=True):
            column.insert(at, value)

    def _withdraw(self, ts: int) -> int | None:
        at = bisect_left(self.ts, ts)
        if at == len(self.ts) or self.ts[at] != ts:
            return None
        self._gone[ts] = self.revision[at] + 1
        columns: tuple[MutableSequence[Any], ...] = (
            *(self.ts, self.revision, self.clock, self.utc, self.arrived, self.brought, self.heard, self.published),
            *(self.source, self.ts_source, self.live),
            *self.values,
        )
        for column in columns:
            del column[at]
        return at

    def withdrawals(self, block: CandleBlock) -> list[Withdrawn]:
        """What the archive is to be told of a block's withdrawn bars, once it is applied."""
        return [
            Withdrawn(ts=ts, revision=self._gone[int(ts.timestamp())])
            for ts in block.withdrawn
            if int(ts.timestamp()) in self._gone
        ]

    # --- recomputation ---------------------------------------------------------------------------------------------

    def _column(self, number: int, start: int, stop: int) -> Floats:
        return np.frombuffer(self.values[number], np.float64)[start:stop]

    def _start(self) -> FeatureState:
        if self.base is None:
            return FeatureState()
        return msgspec.json.decode(msgspec.json.encode(self.base.features), type=FeatureState)

    def rows(self, changed: int, state: SeriesState, checkpoints: list[tuple[int, bytes]] | None = None) -> Change:
        """Runs the window anew into ``state.features``: the rows from index ``changed`` on, and labels before it.

        Every row from there on is given, since a recurrence never forgets; earlier rows keep their bits.
        """
        size = len(self)
        span = forward_span(state.timeframe)
        features = self._start()
        bars_before = features.bars
        ts: Ints = np.frombuffer(self.ts, np.int64)
        close = self._column(3, 0, size)
        earlier, labels = forward_returns(ts, close, features.times, newest_closes(features, len(features.times)), span)
        change = Change()
        before = max(changed - FORWARD_BARS, 0)
        if changed < FORWARD_BARS:
            change.fills += [Fill(ts=from_epoch(when), fwd_ret_5=value) for when, value in earlier]
        change.fills += [
            Fill(ts=from_epoch(self.ts[at]), fwd_ret_5=labels[at])
            for at in range(before, changed)
            if at + FORWARD_BARS < size
        ]
        start = 0
        while start < size:
            stop = min(start + CHECKPOINT_EVERY - features.bars % CHECKPOINT_EVERY, size)
            columns = features.update_block(
                ts[start:stop], self._column(1, start, stop), self._column(2, start, stop), close[start:stop]
            )
            lo = max(changed, start)
            if lo < stop:
                part = Columns(*(getattr(columns, name)[lo - start :] for name in Columns.__struct_fields__))
                change.rows += make_rows(
                    [self.row(at) for at in range(lo, stop)],
                    part,
                    labels[lo:stop],
                    bars_before + lo,
                    self._shown(lo, stop),
                )
                if checkpoints is not None and features.bars % CHECKPOINT_EVERY == 0:
                    point = Checkpoint(features, self.seq, min(self.arrived[stop:], default=self.seq + 1))
                    checkpoints.append((features.bars // CHECKPOINT_EVERY, msgspec.json.encode(point)))
            start = stop
        state.features = features
        del ts, close  # a numpy view pins the arrays: without this the next insertion would raise BufferError
        return change

    def _shown(self, start: int, stop: int) -> list[Shown]:
        names = list(self._names)
        return [
            Shown(
                self.revision[at],
                bool(self.live[at]),
                names[self.source[at]],
                names[self.ts_source[at]],
                self.brought[at],
                None if self.clock[at] < 0 else self.clock[at],
                # A bar's own open time stands for its own end: neither is ever late.
                datetime.fromtimestamp(self.ts[at] if math.isnan(self.heard[at]) else self.heard[at], UTC),
            )
            for at in range(start, stop)
        ]

    def hashes(self, changed: int, symbol: str, timeframe: str) -> dict[int, tuple[str, int]]:
        """Features hash and published sequence of each live row from index ``changed`` on, by open time."""
        scratch = SeriesState(symbol, timeframe)
        return {
            epoch_of(row): (features_hash(symbol, timeframe, row), self.published[changed + i])
            for i, row in enumerate(self.rows(changed, scratch).rows)
            if row.live
        }

    def settle(self, state: SeriesState) -> None:
        """Tells the state what the window knows of the newest bars."""
        if self.base is None:
            state.first_ts = self.ts[0] if self.ts else None
        size = len(self)
        recent = {self.ts[at]: self.mark(at) for at in range(max(0, size - RECENT), size)}
        begins = self.begins
        if begins is not None:
            recent |= {ts: mark for ts, mark in state.recent.items() if ts <= begins}
        state.recent = dict(sorted(recent.items())[-RECENT:])


def epoch_of(row: FeatureRow) -> int:
    return int(row.ts.timestamp())


def _values(row: Candle) -> tuple[float, ...]:
    return (row.open, row.high, row.low, row.close, row.volume, row.spread, row.real_volume)


def _moment(heard_at: datetime | None) -> float:
    return math.nan if heard_at is None else heard_at.timestamp()


def revise(history: History, state: SeriesState, block: CandleBlock, seq: int, priority: Sequence[str]) -> Change:
    """Applies a message that reaches into the past and gives all that it changes, from that bar to the head."""
    first = history.would_change(block, seq, priority)
    if first is None:
        history.apply(block, seq, priority)
        history.settle(state)
        return Change()
    old = history.hashes(first, state.symbol, state.timeframe) if first < len(history) else {}
    changed = history.apply(block, seq, priority)
    return _recomputed(history, state, first if changed is None else min(first, changed), old, [block])


def take_in(
    before: History,
    after: History,
    state: SeriesState,
    blocks: Sequence[CandleBlock],
    seq: int,
    priority: Sequence[str],
) -> Change:
    """What comes of messages that waited, and of ``blocks`` behind them, as one recomputation with the sequence ``seq``.

    ``before`` is the series as it was published, without them. In ``after`` they stand where the log has them, among
    what came meanwhile: so the end does not depend on how long they waited.
    """
    old = before.hashes(0, state.symbol, state.timeframe) if len(before) else {}
    for block in blocks:
        after.apply(block, seq, priority)
    after.seq = seq
    for at in range(len(after)):
        after.published[at] = seq
    return _recomputed(after, state, 0, old, blocks)


def _recomputed(
    history: History, state: SeriesState, first: int, old: dict[int, tuple[str, int]], blocks: Sequence[CandleBlock]
) -> Change:
    """Every row from index ``first`` on, each naming the one of ``old`` that it replaces, and the bars that are gone."""
    checkpoints: list[tuple[int, bytes]] = []
    change = history.rows(first, state, checkpoints)
    change.checkpoints = checkpoints
    change.withdrawn = [gone for block in blocks for gone in history.withdrawals(block)]
    for at, row in enumerate(change.rows):
        was = old.get(epoch_of(row))
        if was is not None:
            change.rows[at] = msgspec.structs.replace(row, replaces=was[0], replaces_seq=was[1])
    history.settle(state)
    return change
