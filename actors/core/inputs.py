"""What a model sees of a bar: the feature set ``scale_free_v1``, from one row or from whole columns, equal to the bit.

Every input is a ratio, so that one model serves symbols of any price: distances and momenta in units of the average
true range (ATR), RSI centred on 0, the range relative to the price, and the bar's open time on the circles of the day
and of the week. No price level, tick volume or spread (points of unknown size) enters.

In a flat market (ATR 0) there is nothing to measure with: every input but the time is 0, RSI's neutral value included.
Ratios are bounded at ``LIMIT`` ATRs, beyond which a value is a glitch rather than a market.

The two paths use the same IEEE double operations in the same order and round once to float32; sines come from one
table, because libm's and numpy's differ in the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from schema.messages import FeatureRow

LIMIT: Final = 100.0
_WEEK: Final = 7 * 1_440  # minutes
_MONDAY: Final = 3 * 1_440  # the epoch is a Thursday


class FeatureColumns(NamedTuple):
    """Feature rows as columns of one length, NaN for null: ``ts`` int64 epoch seconds, the rest float64."""

    ts: NDArray[np.int64]
    close: NDArray[np.float64]
    rsi: NDArray[np.float64]
    macd: NDArray[np.float64]
    macd_signal: NDArray[np.float64]
    macd_hist: NDArray[np.float64]
    atr: NDArray[np.float64]
    ma60: NDArray[np.float64]
    ret_1: NDArray[np.float64]

    def take(self, rows: NDArray[np.int64]) -> FeatureColumns:
        return FeatureColumns(self.ts[rows], *(column[rows] for column in self[1:]))


Inputs = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """A named, versioned way from features to a model's inputs; a change of any value is a new name.

    ``circular`` inputs say where on a circle (day, week) the bar lies, and nothing of the bar itself.
    """

    name: str
    inputs: tuple[str, ...]
    of_row: Callable[[FeatureRow], Inputs | None]
    of_columns: Callable[[FeatureColumns], tuple[Inputs, NDArray[np.bool_]]]
    circular: tuple[str, ...] = ()


def _circles() -> list[tuple[float, float, float, float]]:
    week, day = 2 * math.pi / _WEEK, 2 * math.pi / 1_440
    return [
        (math.sin(week * m), math.cos(week * m), math.sin(day * (m % 1_440)), math.cos(day * (m % 1_440)))
        for m in range(_WEEK)
    ]


_CIRCLES: Final = _circles()  # by minute of the week, from Monday 00:00 UTC
_CIRCLES_ARRAY: Final = np.array(_CIRCLES, dtype=np.float64)

_SCALE_FREE_V1: Final = (
    "rsi_centred",
    "macd_atr",
    "macd_signal_atr",
    "macd_hist_atr",
    "ma60_distance_atr",
    "return_atr",
    "atr_close",
    "week_sin",
    "week_cos",
    "day_sin",
    "day_cos",
)


def scale_free_v1(row: FeatureRow) -> Inputs | None:
    """One row's inputs, shape ``(1, 11)``; None where the row is not ready, a value is missing or not finite, or close ≤ 0."""
    close, rsi, macd, signal, hist = row.close, row.rsi, row.macd, row.macd_signal, row.macd_hist
    atr, ma60, ret_1 = row.atr, row.ma60, row.ret_1
    if (
        not row.ready
        or rsi is None
        or macd is None
        or signal is None
        or hist is None
        or atr is None
        or ma60 is None
        or ret_1 is None
    ):
        return None
    finite = math.isfinite
    if not (
        close > 0.0
        and finite(close)
        and finite(rsi)
        and finite(macd)
        and finite(signal)
        and finite(hist)
        and finite(atr)
        and finite(ma60)
        and finite(ret_1)
    ):
        return None
    circles = _CIRCLES[(int(row.ts.timestamp()) // 60 + _MONDAY) % _WEEK]
    if atr <= 0.0:
        return np.array([(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, *circles)], dtype=np.float32)
    low, high = -LIMIT, LIMIT
    return np.array(
        [
            (
                (rsi - 50.0) / 50.0,
                max(low, min(high, macd / atr)),
                max(low, min(high, signal / atr)),
                max(low, min(high, hist / atr)),
                max(low, min(high, (close - ma60) / atr)),
                max(low, min(high, ret_1 * close / atr)),
                max(low, min(high, atr / close)),
                *circles,
            )
        ],
        dtype=np.float32,
    )


def scale_free_v1_columns(columns: FeatureColumns) -> tuple[Inputs, NDArray[np.bool_]]:
    """Inputs of ready rows, shape ``(n, 11)``, and which rows are usable; an unusable row's inputs are 0.

    Readiness is the caller's to check: columns carry no bar count.
    """
    close, atr = columns.close, columns.atr
    usable = (close > 0.0) & np.logical_and.reduce([np.isfinite(c) for c in columns[1:]])
    moving = usable & (atr > 0.0)
    values = np.zeros((len(close), len(_SCALE_FREE_V1)), dtype=np.float64)
    with np.errstate(all="ignore"):  # what overflows ends at LIMIT, as in the scalar path
        ratios = (
            (columns.macd, atr),
            (columns.macd_signal, atr),
            (columns.macd_hist, atr),
            (close - columns.ma60, atr),
            (columns.ret_1 * close, atr),
            (atr, close),
        )
        values[:, 0] = np.where(moving, (columns.rsi - 50.0) / 50.0, 0.0)
        for i, (value, unit) in enumerate(ratios, start=1):
            values[:, i] = np.where(moving, np.minimum(np.maximum(value / unit, -LIMIT), LIMIT), 0.0)
    values[:, 7:] = np.where(usable[:, None], _CIRCLES_ARRAY[(columns.ts // 60 + _MONDAY) % _WEEK], 0.0)
    return values.astype(np.float32), usable


SCALE_FREE_V1: Final = FeatureSet(
    "scale_free_v1",
    _SCALE_FREE_V1,
    scale_free_v1,
    scale_free_v1_columns,
    circular=("week_sin", "week_cos", "day_sin", "day_cos"),
)

FEATURE_SETS: Final[dict[str, FeatureSet]] = {s.name: s for s in (SCALE_FREE_V1,)}
