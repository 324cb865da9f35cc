"""What a training learns from: labelled feature rows of many symbols, and the bars that their trades and checks need.

Columns of one length in numpy, NaN for null; times are int64 epoch seconds, spreads are in points (0 = unknown).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from actors.core import evaluate
from actors.core.evaluate import Bools, Floats, Ints, Trades
from actors.core.inputs import FeatureColumns, FeatureSet, Inputs
from actors.core.spool import BAR_FIELDS, FIELDS


class TradeBars(NamedTuple):
    """Of each row's trade: the next bar, at whose open it enters, and the fifth following one, at whose close it leaves."""

    entry_open: Floats
    entry_spread: Floats
    entry_close: Floats
    exit_spread: Floats
    exit_close: Floats

    def take(self, rows: Ints) -> TradeBars:
        return TradeBars(*(column[rows] for column in self))


@dataclass(frozen=True, slots=True)
class Dataset:
    """Ready, labelled feature rows of all symbols, in any order; ``symbol`` indexes ``symbols``."""

    symbols: tuple[str, ...]
    symbol: NDArray[np.int32]
    columns: FeatureColumns
    spread: Floats
    fwd_ret_5: Floats
    bars: TradeBars

    def take(self, rows: Ints) -> Dataset:
        return Dataset(
            self.symbols,
            self.symbol[rows],
            self.columns.take(rows),
            self.spread[rows],
            self.fwd_ret_5[rows],
            self.bars.take(rows),
        )

    def in_order(self) -> Dataset:
        """By time, and symbols of one time in their own order."""
        return self.take(np.lexsort((self.symbol, self.columns.ts)))

    @property
    def sign(self) -> Ints:
        """1 where the price rose, -1 where it fell, 0 for a tie."""
        return np.sign(self.fwd_ret_5).astype(np.int64)

    def trades(self, points: Mapping[str, float], spreads: Mapping[str, float]) -> Trades:
        """What each row's trade returns and costs; ``points`` and ``spreads`` (where the feed's is unknown) are by symbol."""
        bars, n = self.bars, len(self.symbol)
        ret = np.full(n, np.nan)
        priced = (bars.entry_open > 0) & (bars.exit_close > 0)
        ret[priced] = bars.exit_close[priced] / bars.entry_open[priced] - 1.0
        long, short = np.full(n, np.nan), np.full(n, np.nan)
        for i, name in enumerate(self.symbols):
            own = np.flatnonzero((self.symbol == i) & priced)
            point, spread = points.get(name), spreads.get(name)
            long[own] = evaluate.cost(bars.entry_spread[own], bars.entry_close[own], point, spread)
            short[own] = evaluate.cost(bars.exit_spread[own], bars.exit_close[own], point, spread)
        return Trades(ret, long, short)


@dataclass(frozen=True, slots=True)
class History:
    """One symbol's bars, ascending, from which its features are computed again.

    ``complete``: they reach back to the series' first bar, so that the archive's rows must come out to the bit.
    """

    symbol: str
    complete: bool
    ts: Ints
    high: Floats
    low: Floats
    close: Floats


def inputs_of(data: Dataset, feature_set: FeatureSet) -> tuple[Inputs, Bools]:
    """The inputs of rows that are in order, each symbol's computed from its own rows alone; and which are usable."""
    x = np.zeros((len(data.symbol), len(feature_set.inputs)), dtype=np.float32)
    usable = np.zeros(len(data.symbol), dtype=bool)
    for i in np.unique(data.symbol).tolist():
        own = np.flatnonzero(data.symbol == i)
        x[own], usable[own] = feature_set.of_columns(data.columns.take(own))
    return x, usable


# --- what the trainer spooled ------------------------------------------------------------------------------------


def from_spool(symbols: Sequence[str], spools: Sequence[bytes]) -> Dataset:
    """The dataset of rows packed by :mod:`actors.core.spool`, one spool a symbol."""
    kind = np.dtype([("ts", "<i8"), *((name, "<f8") for name in FIELDS)])
    parts = [np.frombuffer(spool, kind) for spool in spools]
    rows = np.concatenate(parts) if parts else np.empty(0, kind)
    symbol = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
    return Dataset(
        tuple(symbols),
        symbol,
        FeatureColumns(*(np.ascontiguousarray(rows[name]) for name in FeatureColumns._fields)),
        rows["spread"].copy(),
        rows["fwd_ret_5"].copy(),
        TradeBars(*(np.ascontiguousarray(rows[name]) for name in TradeBars._fields)),
    )


def history_from_spool(symbol: str, complete: bool, spool: bytes) -> History:
    """The bars of one symbol as :func:`actors.core.spool.pack_bars` packed them."""
    rows = np.frombuffer(spool, np.dtype([("ts", "<i8"), *((name, "<f8") for name in BAR_FIELDS)]))
    return History(symbol, complete, *(np.ascontiguousarray(rows[name]) for name in ("ts", *BAR_FIELDS)))
