"""How good a model is on market data that it has not seen: splits over time, rank and probability scores, a threshold.

Time is the only order: all symbols stand in one queue, and a fold's training rows end before its test rows start, less
the label's horizon (purge: five bars, which may take up to ten bars of time) and a further embargo. Labels overlap, so neighbouring rows are nearly copies: every interval
comes from a bootstrap that redraws whole blocks of time (all symbols of a block together), never single rows.

Times are int64 epoch seconds, probabilities float64 in 0..1, outcomes bool, returns fractions of the entry's close.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from actors.core.timeframe import FORWARD_BARS, FORWARD_SPAN

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

EMBARGO_BARS: Final = 60  # the slowest indicator's window
BLOCK_BARS: Final = 60  # shorter blocks cover too little: an ordinary bootstrap's 95 % interval held 82 %
FIRST_TRAIN: Final = 1 / 3  # share of the rows that the first fold trains on
REPLICATES: Final = 400
MIN_TRADES: Final = 200
COST_SPREADS: Final = 1.5  # MT5's bar spread is the bar's minimum
_CONFIDENCE_QUANTILES: Final = (0.0, 0.25, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98, 0.99)


# --- splits ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fold:
    """Row numbers of one step of the walk; every training label is known an embargo before the first test row."""

    train: Ints
    test: Ints


def walk_forward(ts: Ints, *, folds: int, bar_seconds: int) -> list[Fold]:
    """Expanding windows over time: the first fold trains on a third of the rows, the rest is tested in ``folds`` parts."""
    ordered = np.sort(ts)
    n = len(ordered)
    if n < folds + 1:
        return []
    shares = [FIRST_TRAIN + (1 - FIRST_TRAIN) * k / folds for k in range(folds)]
    edges = [int(ordered[int(n * share)]) for share in shares] + [int(ordered[-1]) + 1]
    out: list[Fold] = []
    for start, end in pairwise(edges):
        train = np.flatnonzero(ts <= start - (FORWARD_SPAN + EMBARGO_BARS) * bar_seconds)
        test = np.flatnonzero((ts >= start) & (ts < end))
        if len(train) and len(test):
            out.append(Fold(train, test))
    return out


def later_block(ts: Ints, *, share: float, bar_seconds: int) -> Fold:
    """The newest ``share`` of the rows as ``test``, and as ``train`` what was known when that block began."""
    start = int(np.sort(ts)[int(len(ts) * (1 - share))])
    return Fold(np.flatnonzero(ts <= start - FORWARD_SPAN * bar_seconds), np.flatnonzero(ts >= start))


def time_blocks(ts: Ints, *, bar_seconds: int) -> Ints:
    """Block numbers 0..m-1 of ``BLOCK_BARS`` bars of time each; rows of one block are redrawn together."""
    _, block = np.unique(ts // (BLOCK_BARS * bar_seconds), return_inverse=True)
    return block.astype(np.int64)


# --- scores ------------------------------------------------------------------------------------------------------


class _Cell:
    """One fold's and symbol's rows, sorted by score once, so that a replicate's AUC is a few cumulative sums."""

    def __init__(self, up: Bools, score: Floats, block: Ints) -> None:
        order = np.argsort(score, kind="stable")
        ordered = score[order]
        self.up = up[order].astype(np.float64)
        self.block = block[order]
        self.starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])  # of the groups of equal scores

    def auc(self, counts: Floats | None = None) -> tuple[float, float]:
        """(AUC, rows); NaN without both classes. Ties count a half (Mann-Whitney)."""
        weight = np.ones_like(self.up) if counts is None else counts[self.block]
        up = np.add.reduceat(weight * self.up, self.starts)
        down = np.add.reduceat(weight * (1.0 - self.up), self.starts)
        ups, downs = float(up.sum()), float(down.sum())
        if ups == 0.0 or downs == 0.0:
            return float("nan"), 0.0
        below = np.cumsum(down) - down / 2
        return float(up @ below) / (ups * downs), ups + downs


@dataclass(frozen=True, slots=True)
class Auc:
    """AUC with its 95 % interval; None where a class is missing."""

    value: float | None
    low: float | None
    high: float | None


def _mean_auc(cells: Sequence[_Cell], counts: Floats | None = None) -> float | None:
    pairs = [cell.auc(counts) for cell in cells]
    weight = sum(w for _, w in pairs)
    return sum(a * w for a, w in pairs if w) / weight if weight else None


def auc(up: Bools, score: Floats) -> float | None:
    """Area under the ROC curve of one set of rows; None where only one class is present."""
    return _mean_auc([_Cell(up, score, np.zeros(len(up), dtype=np.int64))]) if len(up) else None


def auc_in_cells(up: Bools, score: Floats, cell: Ints, block: Ints, *, seed: int) -> Auc:
    """Mean AUC within cells (fold and symbol, weighted by rows) with a block-bootstrap percentile interval.

    Scores of different folds come from different models and are never ranked against each other.
    """
    cells = [_Cell(up[m], score[m], block[m]) for m in (cell == c for c in np.unique(cell))]
    value = _mean_auc(cells)
    if value is None:
        return Auc(None, None, None)
    draws = [_mean_auc(cells, counts) for counts in _draws(int(block.max()) + 1, _replicates(len(up)), seed)]
    low, high = np.quantile([d for d in draws if d is not None], (0.025, 0.975))
    return Auc(value, float(low), float(high))


def _replicates(rows: int) -> int:
    return max(100, min(REPLICATES, 40_000_000 // max(rows, 1)))


def _draws(blocks: int, replicates: int, seed: int) -> Floats:
    """How often each block is drawn, shape (replicates, blocks)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(blocks, np.full(blocks, 1.0 / blocks), size=replicates).astype(np.float64)


def brier(up: Bools, prob: Floats) -> float:
    """Mean squared error of a probability."""
    return float(np.mean((prob - up) ** 2))


def log_loss(up: Bools, prob: Floats) -> float:
    """Mean negative log likelihood; probabilities are kept 1e-12 off 0 and 1."""
    p = np.clip(prob, 1e-12, 1 - 1e-12)
    return float(-np.mean(np.where(up, np.log(p), np.log1p(-p))))


def hit_rate(up: Bools, prob: Floats) -> float:
    """Share of rows whose likelier side came true."""
    return float(np.mean((prob >= 0.5) == up))


# --- costs and the threshold -------------------------------------------------------------------------------------


def cost(spread: Floats, close: Floats, point: float | None, default_spread: float | None) -> Floats:
    """A trade's cost as a fraction: 1.5 × spread × point / close; NaN where spread (0 = unknown) or point is unknown."""
    known = np.where(spread > 0, spread, np.nan if default_spread is None else default_spread)
    return COST_SPREADS * known * (np.nan if point is None else point) / close


def exit_rows(ts: Ints, *, bar_seconds: int) -> Ints:
    """For rows of one symbol, ascending: the row at which each one's trade ends, or itself where that is not there."""
    n = len(ts)
    exits = np.arange(n)
    later = np.minimum(exits + FORWARD_BARS, n - 1)
    span = ts[later] - ts
    there = (span >= FORWARD_BARS * bar_seconds) & (span <= FORWARD_SPAN * bar_seconds)
    return np.where(there, later, exits)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A threshold and what trading beyond it would have earned; net figures are None where costs are unknown."""

    threshold: float
    trades: int
    hit_rate: float | None
    gross_mean: float | None
    net_mean: float | None
    net_low: float | None  # one-sided 95 % lower bound


def thresholds(
    prob: Floats, ret: Floats, cost_entry: Floats, cost_exit: Floats, block: Ints, *, seed: int
) -> list[Candidate]:
    """Each candidate threshold's figures: long at ``prob >= t`` pays at entry, short at ``prob <= 1 - t`` at exit.

    Candidates are quantiles of the model's own confidence. Rows of unknown cost count in gross figures only.
    """
    confidence = np.maximum(prob, 1.0 - prob)
    levels = sorted({round(float(q), 6) for q in np.quantile(confidence, _CONFIDENCE_QUANTILES)}) if len(prob) else []
    return [_candidate(t, prob, ret, cost_entry, cost_exit, block, seed) for t in levels if 0.5 <= t < 1.0]


def _candidate(
    t: float, prob: Floats, ret: Floats, cost_entry: Floats, cost_exit: Floats, block: Ints, seed: int
) -> Candidate:
    side = sides(prob, t)
    traded = side != 0
    count = int(traded.sum())
    if not count:
        return Candidate(t, 0, None, None, None, None)
    gross = side * ret
    net = gross - np.where(side > 0, cost_entry, cost_exit)
    known = traded & np.isfinite(net)
    hits, mean = float(np.mean(gross[traded] > 0)), float(gross[traded].mean())
    if not known.any():
        return Candidate(t, count, hits, mean, None, None)
    blocks = int(block.max()) + 1
    sums = np.bincount(block[known], weights=net[known], minlength=blocks)
    counts = np.bincount(block[known], minlength=blocks).astype(np.float64)
    draws = _draws(blocks, REPLICATES, seed)
    drawn = draws @ counts
    means = (draws @ sums)[drawn > 0] / drawn[drawn > 0]
    return Candidate(t, int(known.sum()), hits, mean, float(net[known].mean()), float(np.quantile(means, 0.05)))


def sides(prob: Floats, threshold: float) -> Ints:
    """1 where ``prob >= threshold``, -1 where ``prob <= 1 - threshold``, else 0."""
    return (prob >= threshold).astype(np.int64) - ((prob <= 1.0 - threshold) & (prob < threshold))


def choose(candidates: Sequence[Candidate]) -> float | None:
    """The threshold of the highest lower bound above 0 over at least ``MIN_TRADES`` trades of known cost; None: no edge."""
    good = [
        (c.net_low, c.threshold)
        for c in candidates
        if c.trades >= MIN_TRADES and c.net_low is not None and c.net_low > 0
    ]
    return max(good)[1] if good else None
