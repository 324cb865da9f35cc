"""The bars of one series: which versions of them count, and what a block of the log changes in them.

The log may hold a bar several times, in any order. A bar's first values are its revision 0; other values make the
next revision; values that the bar has or had before change nothing. Live bars, later than all before, need only
:class:`SeriesState`; an older bar is decided against the whole :class:`History`.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from msgspec import Struct, field

from actors.core.features import READY_AFTER, Columns, FeatureState, Floats, Ints, forward_returns
from actors.core.ingest import digest
from actors.core.timeframe import FORWARD_BARS, forward_span, from_epoch
from schema.messages import Candle, FeatureRow, Fill

RECENT: Final = 64  # newest bars whose values are remembered, so that a terminal's repeats need no history
CHUNK: Final = 10_000  # bars that a recomputation takes at once


class SeriesState(Struct):
    """A series as the feature calculator holds it, and as its snapshot stores it.

    ``seq`` is the CANDLES sequence of the newest message that was applied.
    """

    symbol: str
    timeframe: str
    features: FeatureState = field(default_factory=FeatureState)
    seq: int = 0
    recent: dict[int, int] = {}

    def remember(self, ts: int, mark: int) -> None:
        self.recent[ts] = mark
        if len(self.recent) > RECENT:
            del self.recent[min(self.recent)]


class Change(Struct):
    """What a block changed: rows to publish, ascending, and labels of earlier rows that are known now."""

    rows: list[FeatureRow]
    fills: list[Fill]


def epoch(row: Candle) -> int:
    return int(row.ts.timestamp())


def split(state: SeriesState, rows: Sequence[Candle]) -> tuple[list[Candle], bool]:
    """The rows that are later than all before, and whether any other row might change the past.

    A row equal to one of the newest bars is a repeat and is dropped here.
    """
    last = state.features.last_ts
    fresh: list[Candle] = []
    older = False
    for row in rows:
        ts = epoch(row)
        if last is None or ts > last:
            fresh.append(row)
            last = ts
        elif state.recent.get(ts) != digest(row):
            older = True
    return fresh, older


def append(state: SeriesState, rows: Sequence[Candle]) -> Change:
    """Takes rows that are later than all before, ascending; one row goes the short way, many the block way."""
    for row in rows[-RECENT:]:
        state.remember(epoch(row), digest(row))
    if len(rows) == 1:
        return _append_one(state, rows[0])
    times = [epoch(row) for row in rows]
    ts = np.array(times, np.int64)
    high = np.array([r.high for r in rows])
    low = np.array([r.low for r in rows])
    close = np.array([r.close for r in rows])
    features = state.features
    bars = features.bars
    before = features.times
    before_close = _newest_closes(features, len(before))
    earlier, labels = forward_returns(ts, close, before, before_close, forward_span(state.timeframe))
    columns = features.update_block(ts, high, low, close)
    return Change(
        make_rows(rows, columns, labels, bars), [Fill(ts=from_epoch(t), fwd_ret_5=value) for t, value in earlier]
    )


def _append_one(state: SeriesState, row: Candle) -> Change:
    features = state.features
    ts = epoch(row)
    label = features.forward(ts, row.close, forward_span(state.timeframe))
    rsi, macd, signal, hist, atr, ma60, ret = features.update(ts, row.high, row.low, row.close)
    out = FeatureRow(
        ts=row.ts,
        open=row.open,
        high=row.high,
        low=row.low,
        close=row.close,
        volume=row.volume,
        spread=row.spread,
        real_volume=row.real_volume,
        rsi=rsi,
        macd=macd,
        macd_signal=signal,
        macd_hist=hist,
        atr=atr,
        ma60=ma60,
        ret_1=ret,
        bar=features.bars,
        ready=features.bars >= READY_AFTER,
    )
    return Change([out], [] if label is None else [Fill(ts=from_epoch(label[0]), fwd_ret_5=label[1])])


def _newest_closes(features: FeatureState, count: int) -> list[float]:
    return [features.closes[(features.bars - back) % len(features.closes)] for back in range(count, 0, -1)]


def make_rows(
    rows: Sequence[Candle],
    columns: Columns,
    labels: Sequence[float | None],
    bars_before: int,
    revisions: Iterable[int] | None = None,
) -> list[FeatureRow]:
    """Candles and their indicators as rows; ``bars_before`` is the number of bars before the first."""
    return [
        FeatureRow(
            ts=row.ts,
            open=row.open,
            high=row.high,
            low=row.low,
            close=row.close,
            volume=row.volume,
            spread=row.spread,
            real_volume=row.real_volume,
            rsi=rsi,
            macd=macd,
            macd_signal=signal,
            macd_hist=hist,
            atr=atr,
            ma60=ma60,
            ret_1=ret,
            fwd_ret_5=label,
            bar=bar,
            ready=bar >= READY_AFTER,
            revision=revision,
        )
        for bar, (row, rsi, macd, signal, hist, atr, ma60, ret, label, revision) in enumerate(
            zip(
                rows,
                columns.rsi,
                columns.macd,
                columns.macd_signal,
                columns.macd_hist,
                columns.atr,
                columns.ma60,
                columns.ret_1,
                labels,
                [0] * len(rows) if revisions is None else revisions,
                strict=True,
            ),
            bars_before + 1,
        )
    ]


class History:
    """Every bar of one series in its current version: eight numbers a bar, ascending in time."""

    def __init__(self) -> None:
        self.ts = array("q")
        self.values = tuple(array("d") for _ in range(7))  # open, high, low, close, volume, spread, real_volume
        self.revision = array("i")
        self._earlier: dict[int, set[int]] = {}  # digests of a bar's former versions
        self.seq = 0  # CANDLES sequence of the newest block applied

    def __len__(self) -> int:
        return len(self.ts)

    def row(self, at: int) -> Candle:
        o, h, lo, c, volume, spread, real = (column[at] for column in self.values)
        return Candle(
            ts=from_epoch(self.ts[at]),
            open=o,
            high=h,
            low=lo,
            close=c,
            volume=volume,
            spread=spread,
            real_volume=real,
        )

    def put(self, row: Candle, revision: int = 0) -> int | None:
        """Takes one version of a bar; returns its index where that changed anything (new, late or revised)."""
        ts = epoch(row)
        values = (row.open, row.high, row.low, row.close, row.volume, row.spread, row.real_volume)
        if not self.ts or ts > self.ts[-1]:
            self.ts.append(ts)
            self.revision.append(revision)
            for column, value in zip(self.values, values, strict=True):
                column.append(value)
            return len(self.ts) - 1
        at = bisect_left(self.ts, ts)
        if self.ts[at] != ts:
            self.ts.insert(at, ts)
            self.revision.insert(at, revision)
            for column, value in zip(self.values, values, strict=True):
                column.insert(at, value)
            return at
        current = self.row(at)
        mark = digest(row)
        former = self._earlier.setdefault(ts, set())
        if mark == digest(current) or mark in former:
            return None
        former.add(digest(current))
        self.revision[at] += 1
        for column, value in zip(self.values, values, strict=True):
            column[at] = value
        return at

    def apply(self, rows: Iterable[Candle]) -> int | None:
        """Takes a block of the log; returns the smallest index that it changed, None if it changed nothing."""
        changed = [at for row in rows if (at := self.put(row)) is not None]
        return min(changed) if changed else None

    def _column(self, number: int, start: int, stop: int) -> Floats:
        return np.frombuffer(self.values[number], np.float64)[start:stop]

    def recompute(self, state: SeriesState, changed: int) -> Change:
        """Runs the whole series anew into ``state``; gives the rows from index ``changed`` on and labels before it.

        Every row from there on is given, since a recurrence never forgets; earlier rows keep their bits.
        """
        size = len(self)
        span = forward_span(state.timeframe)
        ts: Ints = np.frombuffer(self.ts, np.int64)
        close = self._column(3, 0, size)
        first_label = max(changed - FORWARD_BARS, 0)
        _, labels = forward_returns(ts[first_label:], close[first_label:], [], [], span)
        fills = [
            Fill(ts=from_epoch(self.ts[first_label + i]), fwd_ret_5=label)
            for i, label in enumerate(labels[: changed - first_label])
            if first_label + i + FORWARD_BARS < size
        ]
        state.features = FeatureState()
        rows: list[FeatureRow] = []
        for start in range(0, size, CHUNK):
            stop = min(start + CHUNK, size)
            columns = state.features.update_block(
                ts[start:stop], self._column(1, start, stop), self._column(2, start, stop), close[start:stop]
            )
            lo = max(changed, start)
            if lo < stop:
                part = Columns(*(getattr(columns, name)[lo - start :] for name in Columns.__struct_fields__))
                rows += make_rows(
                    [self.row(at) for at in range(lo, stop)],
                    part,
                    labels[lo - first_label : stop - first_label],
                    lo,
                    self.revision[lo:stop],
                )
        state.recent = {}
        for at in range(max(0, size - RECENT), size):
            state.remember(self.ts[at], digest(self.row(at)))
        del ts, close  # a numpy view pins the arrays: without this the next append would raise BufferError
        return Change(rows, fills)
