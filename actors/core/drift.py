"""Whether a model still sees what it was trained on: the population stability index of its inputs, hour by hour.

The index of a window against a reference is ``Σ (p - q) · ln(p / q)`` over bins of ten per cent of the reference each. Markets
breathe with the day: so a window spans whole trading days, and the reference is weighted to the window's own hours. They
also swing from week to week: over five days the index of the range (ATR / close) of unchanged EURUSD and GBPUSD minutes
reaches 0.36, and 0.1 in any other input, where a daily comparison passes the textbook's 0.2 on most days. An input that is
broken, or a symbol whose range has doubled, is far above :data:`LIMIT`.

An episode begins above :data:`LIMIT` and ends below :data:`OVER`, so that one change is told once.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LIMIT: Final = 0.5
OVER: Final = 0.25
BINS: Final = 10
DAYS: Final = 5  # trading days that a window spans at least …
ROWS: Final = 2_000  # … and rows that it holds at least: fewer are a poor histogram, as with bars of an hour
MOST_ROWS: Final = 5 * 1_440 + ROWS  # rows that a window may need: five days of minutes
REFERENCE_ROWS: Final = 50_000  # newest rows of the training that a reference is made of
_DAY: Final = 86_400
_HOURS: Final = 24
_LEAST: Final = 1e-4  # share of an empty bin
_OF_TIME: Final = ("_sin", "_cos")  # inputs that are functions of the time alone cannot drift


class Reference(NamedTuple):
    """What training saw of one symbol: per input its bins' edges, and rows by hour (0..23) and bin."""

    inputs: tuple[str, ...]
    edges: tuple[Floats, ...]
    rows: tuple[Floats, ...]


def make_reference(inputs: tuple[str, ...], values: NDArray[np.floating], ts: Ints) -> Reference:
    """From training rows: ``values`` of shape (n, inputs), ``ts`` epoch seconds."""
    names, edges, rows = [], [], []
    for i, name in enumerate(inputs):
        if name.endswith(_OF_TIME):
            continue
        column = values[:, i].astype(np.float64)
        cuts = np.unique(np.quantile(column, np.arange(1, BINS) / BINS))
        names.append(name)
        edges.append(cuts)
        rows.append(_counts(column, ts, cuts))
    return Reference(tuple(names), tuple(edges), tuple(rows))


def window(ts: Ints) -> Ints | None:
    """Which of the rows (ascending) are the newest window; None where they are too few or span too few trading days."""
    days = np.unique(ts // _DAY)
    if len(days) < DAYS or len(ts) < ROWS:
        return None
    first = min(int(np.searchsorted(ts, days[-DAYS] * _DAY)), len(ts) - ROWS)
    return np.arange(first, len(ts))


def stability(
    reference: Reference, inputs: tuple[str, ...], values: NDArray[np.floating], ts: Ints
) -> dict[str, float]:
    """The index of each input over a window's rows; hours that training never saw are left out."""
    out = {}
    for name, edges, known in zip(reference.inputs, reference.edges, reference.rows, strict=True):
        now = _counts(values[:, inputs.index(name)].astype(np.float64), ts, edges)
        per_hour = known.sum(axis=1)
        there = per_hour > 0
        weight = now.sum(axis=1) * there
        total = float(weight.sum())
        if total == 0:
            continue
        mix = known[there] / per_hour[there, None]
        out[name] = _index((now * there[:, None]).sum(axis=0) / total, (mix * weight[there, None]).sum(axis=0) / total)
    return out


def _counts(column: Floats, ts: Ints, edges: Floats) -> Floats:
    counts = np.zeros((_HOURS, len(edges) + 1))
    np.add.at(counts, (ts // 3_600 % _HOURS, np.searchsorted(edges, column, side="right")), 1.0)
    return counts


def _index(window_shares: Floats, reference_shares: Floats) -> float:
    p, q = np.maximum(window_shares, _LEAST), np.maximum(reference_shares, _LEAST)
    return float(np.sum((p - q) * np.log(p / q)))


def episodes(values: dict[str, float], running: frozenset[str]) -> tuple[frozenset[str], frozenset[str]]:
    """The inputs whose episode begins, and those that are in one now."""
    begun = frozenset(name for name, value in values.items() if value > LIMIT and name not in running)
    still = frozenset(name for name in running if values.get(name, LIMIT) > OVER)
    return begun, begun | still
