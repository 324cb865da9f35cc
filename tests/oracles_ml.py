"""Feature rows and training sets made with TA-Lib and numpy alone: what the models' code is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import talib
from numpy.typing import NDArray

from actors.core.dataset import Dataset, History, TradeBars
from actors.core.files import decode_lines, read_bars
from actors.core.inputs import FeatureColumns
from schema.messages import Candle, FeatureRow

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
MONDAY = int(datetime(2024, 1, 1, tzinfo=UTC).timestamp())

Floats = NDArray[np.float64]


class Bars(NamedTuple):
    """One series as columns."""

    ts: NDArray[np.int64]
    open: Floats
    high: Floats
    low: Floats
    close: Floats
    spread: Floats


def bars_of(candles: list[Candle]) -> Bars:
    return Bars(
        np.array([int(c.ts.timestamp()) for c in candles], dtype=np.int64),
        *(np.array([getattr(c, name) for c in candles]) for name in ("open", "high", "low", "close", "spread")),
    )


def file_bars(name: str) -> Bars:
    with (DATA / name).open("rb") as file:
        return bars_of([bar for chunk in read_bars(decode_lines(iter(file))) for bar in chunk])


def random_walk(n: int, *, seed: int, price: float = 1.1, spread: float = 8.0, step: int = 60) -> Bars:
    """A driftless walk on a grid of 1e-5 without a pause."""
    rng = np.random.default_rng(seed)
    close = np.round(price * np.exp(np.cumsum(rng.standard_normal(n) * 1e-4)), 5)
    before = np.concatenate(([price], close[:-1]))
    high = np.maximum(before, close) + np.round(rng.exponential(5e-5, n), 5)
    low = np.minimum(before, close) - np.round(rng.exponential(5e-5, n), 5)
    return Bars(MONDAY + step * np.arange(n), before, high, low, close, np.full(n, spread))


def leaning(n: int, *, seed: int, lean: float = 0.2) -> Bars:
    """A walk that leans back to its own hour's mean: an edge that a model can learn, and no larger than an honest one may be."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(n) * 1e-4
    close = np.empty(n)
    last, window = 1.1, [1.1] * 60
    total = sum(window)
    for i in range(n):
        last += float(noise[i]) - lean * 1e-4 * float(np.tanh((last - total / 60) / 2e-4))
        total += last - window[i % 60]
        window[i % 60] = last
        close[i] = last
    bars = random_walk(n, seed=seed)
    width = rng.exponential(5e-5, n)
    before = np.concatenate(([1.1], close[:-1]))
    high, low = np.maximum(before, close) + width, np.minimum(before, close) - width
    return bars._replace(open=before, close=close, high=high, low=low)


def indicators(bars: Bars) -> dict[str, Floats]:
    close = bars.close
    macd, signal, hist = talib.MACD(close, 12, 26, 9)
    fwd = np.full(len(close), np.nan)
    fwd[:-5] = (close[5:] - close[:-5]) / close[:-5]
    span = np.full(len(close), np.inf)
    span[:-5] = bars.ts[5:] - bars.ts[:-5]
    bar = int(np.median(np.diff(bars.ts)))
    return {
        "rsi": talib.RSI(close, 14),
        "macd": macd,
        "macd_signal": signal,
        "macd_hist": hist,
        "atr": talib.ATR(bars.high, bars.low, close, 14),
        "ma60": talib.SMA(close, 60),
        "ret_1": talib.ROCP(close, 1),
        "fwd_ret_5": np.where(span <= 10 * bar, fwd, np.nan),
    }


def trade_bars(bars: Bars, rows: NDArray[np.int64]) -> TradeBars:
    """The bars at which each row's trade enters and leaves."""
    entry, leave = rows + 1, rows + 5
    return TradeBars(bars.open[entry], bars.spread[entry], bars.close[entry], bars.spread[leave], bars.close[leave])


def history(symbol: str, bars: Bars, *, complete: bool = True) -> History:
    return History(symbol, complete, bars.ts, bars.high, bars.low, bars.close)


def dataset(series: Mapping[str, Bars]) -> Dataset:
    """Ready, labelled rows of all series, as the archive's training set holds them."""
    parts = []
    for i, bars in enumerate(series.values()):
        values = indicators(bars)
        rows = np.flatnonzero((np.arange(len(bars.ts)) >= 299) & np.isfinite(values["fwd_ret_5"]))
        columns = FeatureColumns(bars.ts, bars.close, *(values[name] for name in FeatureColumns._fields[2:])).take(rows)
        trades = trade_bars(bars, rows)
        parts.append(
            (np.full(len(rows), i, dtype=np.int32), columns, bars.spread[rows], values["fwd_ret_5"][rows], trades)
        )
    symbol, columns, spread, fwd, trades = zip(*parts, strict=True)
    return Dataset(
        tuple(series),
        np.concatenate(symbol),
        FeatureColumns(*(np.concatenate(c) for c in zip(*columns, strict=True))),
        np.concatenate(spread),
        np.concatenate(fwd),
        TradeBars(*(np.concatenate(c) for c in zip(*trades, strict=True))),
    )


def feature_rows(bars: Bars) -> list[FeatureRow]:
    values = indicators(bars)

    def at(name: str, i: int) -> float | None:
        value = float(values[name][i])
        return value if np.isfinite(value) else None

    return [
        FeatureRow(
            ts=datetime.fromtimestamp(int(bars.ts[i]), UTC),
            open=float(bars.open[i]),
            high=float(bars.high[i]),
            low=float(bars.low[i]),
            close=float(bars.close[i]),
            volume=1.0,
            spread=float(bars.spread[i]),
            bar=i + 1,
            ready=i >= 299,
            **{name: at(name, i) for name in values},
        )
        for i in range(len(bars.ts))
    ]
