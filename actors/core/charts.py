"""What a report draws beside its figures: how much each input matters, and what trading would have earned.

Both are bounded, whatever the rows: importance is measured on some of the newest fold's rows, curves have 500 points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from actors.core import evaluate
from actors.core.dataset import Dataset
from actors.core.evaluate import Candidate, Floats, Ints, Trades
from actors.core.forest import TrainOptions
from actors.core.inputs import Inputs
from actors.core.timeframe import FORWARD_BARS
from actors.core.walk import Walk

IMPORTANCE_ROWS: Final = 2_000
SHUFFLES: Final = 4
POINTS: Final = 500
RANDOM_CURVES: Final = 200
BAND: Final = (0.05, 0.95)
_MOST_CELLS: Final = 40_000_000  # of the random curves: fewer curves where there are many rows


def importance(
    x: Inputs, data: Dataset, found: Walk, names: Sequence[str], options: TrainOptions
) -> list[dict[str, Any]]:
    """By input, the AUC that the newest fold's forest loses when that input's values change places: mean and deviation.

    Inputs that say the same thing stand in for each other, and each of them then seems to matter little.
    """
    newest = found.rows[(found.fold == found.fold.max()) & (data.sign[found.rows] != 0)]
    rows = newest[np.linspace(0, len(newest) - 1, min(len(newest), IMPORTANCE_ROWS)).astype(np.int64)]
    up, symbol = data.sign[rows] > 0, data.symbol[rows].astype(np.int64)
    own = x[rows]
    whole = evaluate.auc(up, found.newest.votes(own), symbol)
    if whole is None:
        return []
    rng = np.random.default_rng([options.seed, 1])
    out: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        drops = []
        for _ in range(SHUFFLES):
            other = own.copy()
            other[:, i] = own[rng.permutation(len(own)), i]
            drops.append(whole - (evaluate.auc(up, found.newest.votes(other), symbol) or whole))
        out.append({"input": name, "mean": float(np.mean(drops)), "std": float(np.std(drops))})
    return out


def equity(
    data: Dataset,
    found: Walk,
    trades: Trades,
    candidates: Sequence[Candidate],
    threshold: float | None,
    options: TrainOptions,
) -> dict[str, Any] | None:
    """Cumulative returns out of sample: the model's trades, buying and holding, and random signals of the same number.

    Each trade stakes a fifth of its symbol's share, since five may be open at a time; returns are added, not compounded.
    Where no threshold has an edge the best candidate is drawn (``edge`` False). Random signals are the model's own, moved
    in time by a random distance: as many, as clustered, and knowing nothing. ``net`` False: costs are unknown.
    """
    drawn = threshold if threshold is not None else _best(candidates)
    if drawn is None:
        return None
    order = np.lexsort((data.symbol[found.rows], data.columns.ts[found.rows]))
    rows, trades = found.rows[order], trades.take(found.rows[order])
    side = evaluate.sides(found.prob[order], drawn)
    net = bool(np.isfinite(trades.cost_long).any())
    costs = (trades.cost_long, trades.cost_short) if net else (0.0, 0.0)
    share = 1.0 / (FORWARD_BARS * len(np.unique(data.symbol[rows])))
    long, short = (np.nan_to_num(share * r) for r in (trades.ret - costs[0], -trades.ret - costs[1]))
    edges = np.unique(np.linspace(0, len(rows), min(POINTS, len(rows)) + 1).astype(np.int64))

    def curve(returns: Floats) -> Floats:
        total: Floats = np.cumsum(np.add.reduceat(returns, edges[:-1]))
        return total

    def earned(signals: Ints) -> Floats:
        return curve(np.where(signals > 0, long, np.where(signals < 0, short, 0.0)))

    rng = np.random.default_rng([options.seed, 2])
    curves = max(50, min(RANDOM_CURVES, _MOST_CELLS // len(rows)))
    moved = rng.integers(min(evaluate.BLOCK_BARS, len(rows) - 1), len(rows), size=curves)
    low, high = np.quantile([earned(np.roll(side, by)) for by in moved.tolist()], BAND, axis=0)
    return {
        "ts": data.columns.ts[rows][edges[1:] - 1].tolist(),
        "model": earned(side).tolist(),
        "buy_hold": curve(_held(data, rows)).tolist(),
        "random": [low.tolist(), high.tolist()],
        "random_band": list(BAND),
        "threshold": drawn,
        "edge": threshold is not None,
        "net": net,
    }


def _best(candidates: Sequence[Candidate]) -> float | None:
    """The candidate that comes nearest to an edge: by its net bound, or by its gross return where costs are unknown."""
    ranked = [
        (
            c.trades >= evaluate.MIN_TRADES,
            c.net_low is not None,
            c.net_low if c.net_low is not None else c.gross_mean,
            c,
        )
        for c in candidates
        if c.gross_mean is not None
    ]
    return max(ranked, key=lambda r: r[:3])[3].threshold if ranked else None


def _held(data: Dataset, rows: Ints) -> Floats:
    """Each row's return since its symbol's row before, by the symbol's share of the stake."""
    returns = np.zeros(len(rows))
    present = np.unique(data.symbol[rows])
    for symbol in present:
        own = np.flatnonzero(data.symbol[rows] == symbol)
        close = data.columns.close[rows[own]]
        returns[own[1:]] = (close[1:] / close[:-1] - 1.0) / len(present)
    return returns
