"""How good a model is on market data that it has not seen: splits over time, rank and probability scores, a threshold.

Time is the only order: all symbols stand in one queue, and a fold's training rows end before its test rows start, less
the label's horizon (purge: five bars, which may take up to ten bars of time) and a further embargo. Labels overlap, so neighbouring rows are nearly copies: every interval
comes from a bootstrap that redraws whole blocks of time (all symbols of a block together), never single rows.

Times are int64 epoch seconds, probabilities float64 in 0..1, outcomes bool, returns and costs fractions of a price.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actors.core.timeframe import FORWARD_SPAN

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

EMBARGO_BARS: Final = 60  # the slowest indicator's window
BLOCK_BARS: Final = 60  # shorter blocks cover too little: an ordinary bootstrap's 95 % interval held 82 %
FIRST_TRAIN: Final = 1 / 3  # share of the rows that the first fold trains on
REPLICATES: Final = 400
MIN_TRADES: Final = 200
CURVE_BINS: Final = 10
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


# --- intervals ---------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """A mean with its two-sided 95 % interval, and the one-sided 95 % lower bound."""

    value: float
    low: float
    high: float
    floor: float


class Blocks:
    """Which block of time each row lies in, and how often each replicate of the bootstrap draws each block.

    Every figure of a report is redrawn by the same replicates, so that figures of one report can be compared.
    """

    def __init__(self, block: Ints, *, seed: int) -> None:
        self.block = block
        blocks = int(block.max()) + 1
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(blocks, np.full(blocks, 1.0 / blocks), size=REPLICATES)
        self.draws: Floats = drawn.astype(np.float64)  # shape (replicates, blocks)

    def take(self, rows: Ints | Bools) -> Blocks:
        """The same replicates over some of the rows."""
        part = Blocks.__new__(Blocks)
        part.block, part.draws = self.block[rows], self.draws
        return part

    def sums(self, values: Floats) -> Floats:
        """Each replicate's sum of ``values``, one a row."""
        drawn: Floats = self.draws @ np.bincount(self.block, weights=values, minlength=self.draws.shape[1])
        return drawn

    def mean(self, values: Floats) -> Interval:
        """The mean of ``values`` (at least one, all finite) and how far it can be trusted."""
        counts = self.sums(np.ones_like(values))
        drawn = counts > 0
        low, high, floor = np.quantile(self.sums(values)[drawn] / counts[drawn], (0.025, 0.975, 0.05))
        return Interval(float(values.mean()), float(low), float(high), float(floor))


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


def auc(up: Bools, score: Floats, cell: Ints | None = None) -> float | None:
    """Area under the ROC curve, within cells where they are given; None where only one class is present."""
    if not len(up):
        return None
    cell = np.zeros(len(up), dtype=np.int64) if cell is None else cell
    return _mean_auc([_Cell(up[m], score[m], cell[m]) for m in (cell == c for c in np.unique(cell))])


def auc_in_cells(up: Bools, score: Floats, cell: Ints, blocks: Blocks) -> Auc:
    """Mean AUC within cells (fold and symbol, weighted by rows) with a block-bootstrap percentile interval.

    Scores of different folds come from different models and are never ranked against each other.
    """
    cells = [_Cell(up[m], score[m], blocks.block[m]) for m in (cell == c for c in np.unique(cell))]
    value = _mean_auc(cells)
    if value is None:
        return Auc(None, None, None)
    draws = [_mean_auc(cells, counts) for counts in blocks.draws[: _replicates(len(up))]]
    low, high = np.quantile([d for d in draws if d is not None], (0.025, 0.975))
    return Auc(value, float(low), float(high))


def _replicates(rows: int) -> int:
    return max(100, min(REPLICATES, 40_000_000 // max(rows, 1)))


def squared_error(up: Bools, prob: Floats) -> Floats:
    """A row's part of the Brier score."""
    error: Floats = (prob - up) ** 2
    return error


def brier(up: Bools, prob: Floats) -> float:
    """Mean squared error of a probability."""
    return float(np.mean(squared_error(up, prob)))


def surprise(up: Bools, prob: Floats) -> Floats:
    """A row's negative log likelihood; probabilities are kept 1e-12 off 0 and 1."""
    p = np.clip(prob, 1e-12, 1 - 1e-12)
    return -np.where(up, np.log(p), np.log1p(-p))


def log_loss(up: Bools, prob: Floats) -> float:
    """Mean negative log likelihood."""
    return float(np.mean(surprise(up, prob)))


def hits(up: Bools, prob: Floats) -> Floats:
    """1 where the likelier side came true, else 0."""
    hit: Floats = ((prob >= 0.5) == up).astype(np.float64)
    return hit


def hit_rate(up: Bools, prob: Floats) -> float:
    """Share of rows whose likelier side came true."""
    return float(np.mean(hits(up, prob)))


@dataclass(frozen=True, slots=True)
class Bin:
    """Rows whose probability lies in ``low <= p < high`` (the last bin includes its end), and how many of them rose."""

    low: float
    high: float
    count: int
    mean_prob: float
    rate: float
    rate_ci: tuple[float, float]


def calibration_curve(up: Bools, prob: Floats, blocks: Blocks) -> list[Bin]:
    """At most ten bins of equal count; fewer where many rows share one probability."""
    edges = np.unique(np.quantile(prob, np.linspace(0.0, 1.0, CURVE_BINS + 1)))
    number = np.clip(np.searchsorted(edges, prob, side="right") - 1, 0, max(len(edges) - 2, 0))
    out: list[Bin] = []
    for k in np.unique(number).tolist():
        own = number == k
        rate = blocks.take(own).mean(up[own].astype(np.float64))
        low, high = float(edges[k]), float(edges[min(k + 1, len(edges) - 1)])
        out.append(Bin(low, high, int(own.sum()), float(prob[own].mean()), rate.value, (rate.low, rate.high)))
    return out


# --- costs and the threshold -------------------------------------------------------------------------------------


def cost(spread: Floats, close: Floats, point: float | None, default_spread: float | None) -> Floats:
    """A trade's cost as a fraction: 1.5 × spread × point / close; NaN where spread (0 = unknown) or point is unknown."""
    known = np.where(spread > 0, spread, np.nan if default_spread is None else default_spread)
    return COST_SPREADS * known * (np.nan if point is None else point) / close


class Trades(NamedTuple):
    """What a trade of each row would do: columns of one length, NaN where unknown.

    ``ret`` is the return of holding from the next bar's open to the fifth following bar's close. Bars are bid prices:
    a long pays the spread of the bar that it enters (``cost_long``), a short that of the bar that it leaves (``cost_short``).
    """

    ret: Floats
    cost_long: Floats
    cost_short: Floats

    def take(self, rows: Ints | Bools) -> Trades:
        return Trades(*(column[rows] for column in self))

    def gross(self, side: Ints) -> Floats:
        """Each row's return of a trade on ``side`` (1 long, -1 short), NaN where it is unknown."""
        gross: Floats = side * self.ret
        return gross

    def net(self, side: Ints) -> Floats:
        """The same less its cost; NaN where either is unknown."""
        return self.gross(side) - np.where(side > 0, self.cost_long, self.cost_short)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A threshold and what trading beyond it would have earned; figures are None where there was no trade of known outcome.

    ``trades`` counts those of known cost, or all where no cost is known; ``net_low`` is the one-sided 95 % lower bound,
    the other intervals are two-sided.
    """

    threshold: float
    trades: int
    hit_rate: float | None = None
    hit_rate_ci: tuple[float, float] | None = None
    gross_mean: float | None = None
    net_mean: float | None = None
    net_ci: tuple[float, float] | None = None
    net_low: float | None = None


def thresholds(prob: Floats, trades: Trades, blocks: Blocks) -> list[Candidate]:
    """Each candidate threshold's figures: long at ``prob >= t``, short at ``prob <= 1 - t``.

    Candidates are quantiles of the model's own confidence. Rows of unknown cost count in gross figures only.
    """
    confidence = np.maximum(prob, 1.0 - prob)
    levels = sorted({round(float(q), 6) for q in np.quantile(confidence, _CONFIDENCE_QUANTILES)}) if len(prob) else []
    return [traded(t, sides(prob, t), trades, blocks) for t in levels if 0.5 <= t < 1.0]


def traded(threshold: float, side: Ints, trades: Trades, blocks: Blocks) -> Candidate:
    """What came of trading ``side`` (0: no trade), whatever it was chosen by."""
    gross, net = trades.gross(side), trades.net(side)
    done = (side != 0) & np.isfinite(gross)
    if not done.any():
        return Candidate(threshold, 0)
    won = blocks.take(done).mean((gross[done] > 0).astype(np.float64))
    figures = Candidate(threshold, int(done.sum()), won.value, (won.low, won.high), float(gross[done].mean()))
    known = done & np.isfinite(net)
    if not known.any():
        return figures
    mean = blocks.take(known).mean(net[known])
    return replace(
        figures, trades=int(known.sum()), net_mean=mean.value, net_ci=(mean.low, mean.high), net_low=mean.floor
    )


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


class Nested(NamedTuple):
    """Each row's side, and by fold the threshold that gave it (None: no edge was known)."""

    side: Ints
    thresholds: dict[int, float | None]


def nested_sides(prob: Floats, ts: Ints, fold: Ints, trades: Trades, blocks: Blocks, *, bar_seconds: int) -> Nested:
    """Trades by a threshold that never saw them: each fold's is chosen on what the earlier folds had brought by then.

    The first fold, and a fold before which no threshold had an edge, trade nothing.
    """
    side = np.zeros(len(prob), dtype=np.int64)
    chosen: dict[int, float | None] = {}
    for k in np.unique(fold).tolist():
        own = fold == k
        known = (fold < k) & (ts <= ts[own].min() - FORWARD_SPAN * bar_seconds)
        found = thresholds(prob[known], trades.take(known), blocks.take(known)) if known.any() else []
        threshold = chosen[k] = choose(found)
        if threshold is not None:
            side[own] = sides(prob[own], threshold)
    return Nested(side, chosen)
