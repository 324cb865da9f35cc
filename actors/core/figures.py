"""What the walk-forward's predictions are worth, in figures that each carry an interval.

The forest is compared with the base rate, a logistic regression and the champion, all on the same out-of-sample rows.
AUC ranks the forest's votes, whether or not a fold's sigmoid kept them; the other figures judge what would be served. Ties
are neither learnt nor scored, but they are traded, and cost.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from actors.core import evaluate
from actors.core.dataset import Dataset, inputs_of
from actors.core.evaluate import Blocks, Bools, Floats, Ints, Trades
from actors.core.forest import TrainOptions
from actors.core.inputs import FEATURE_SETS
from actors.core.serving import OnnxModel
from actors.core.timeframe import FORWARD_SPAN
from actors.core.walk import Walk

SUSPICIOUS_AUC: Final = 0.65  # real minute bars give about 0.52, the simulator's known edge at most 0.60


class Judge:
    """Scores any probability of some test rows on the same rows, cells and redrawn blocks."""

    def __init__(self, up: Bools, cell: Ints, blocks: Blocks) -> None:
        self.up, self.cell, self.blocks = up, cell, blocks

    def take(self, rows: Bools) -> Judge:
        return Judge(self.up[rows], self.cell[rows], self.blocks.take(rows))

    def ranked(self, score: Floats) -> dict[str, Any]:
        auc = evaluate.auc_in_cells(self.up, score, self.cell, self.blocks)
        return {"auc": auc.value, "auc_ci": None if auc.value is None else [auc.low, auc.high]}

    def judged(self, prob: Floats) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, loss in (("brier", evaluate.squared_error), ("log_loss", evaluate.surprise)):
            mean = self.blocks.mean(loss(self.up, prob))
            out |= {name: mean.value, f"{name}_ci": [mean.low, mean.high]}
        return out


def figures(
    data: Dataset, found: Walk, trades: Trades, options: TrainOptions, champion: Champion | None
) -> tuple[dict[str, Any], bytes]:
    """The report's out-of-sample figures, and the predictions that they were computed from (see :func:`pack`).

    ``trades`` are of all rows. Only ``auc`` (None) is given where no cell has returns of both signs.
    """
    ts, sign, symbol = data.columns.ts[found.rows], data.sign[found.rows], data.symbol[found.rows]
    trades = trades.take(found.rows)
    blocks = Blocks(evaluate.time_blocks(ts, bar_seconds=options.bar_seconds), seed=options.seed)
    scored = sign != 0
    whole = Judge(sign > 0, found.fold * len(data.symbols) + symbol, blocks)
    judge = whole.take(scored)
    prob, linear, base = found.prob[scored], found.linear[scored], found.base[scored]
    report = judge.ranked(found.votes[scored])
    if report["auc"] is None:
        return report, b""
    rate, hit = judge.blocks.mean(judge.up.astype(np.float64)), judge.blocks.mean(evaluate.hits(judge.up, prob))
    by_rate = judge.ranked(base) | judge.judged(base) | {"rate": rate.value, "rate_ci": [rate.low, rate.high]}
    logistic = judge.ranked(linear) | judge.judged(linear)
    theirs = np.full(len(ts), np.nan) if champion is None else champion.predict(data, found.rows, options)
    candidates = evaluate.thresholds(found.prob, trades, blocks)
    nested = evaluate.nested_sides(found.prob, ts, found.fold, trades, blocks, bar_seconds=options.bar_seconds)
    report |= judge.judged(prob) | {
        "suspicious": max(report["auc"], logistic["auc"] or 0.0) > SUSPICIOUS_AUC,
        "hit_rate": hit.value,
        "hit_rate_ci": [hit.low, hit.high],
        "test_rows": int(scored.sum()),
        "calibration_curve": [_plain(bin_) for bin_ in evaluate.calibration_curve(judge.up, prob, judge.blocks)],
        "base_rate": by_rate,
        "logistic": logistic,
        "baselines": {
            "base_rate": by_rate,
            "logistic": logistic,
            "champion": None if champion is None else _beside(champion, whole, found, theirs, scored),
        },
        "threshold": evaluate.choose(candidates),
        "candidates": [_plain(candidate) for candidate in candidates],
        "nested": {"trades": 0} | _figures_of_trades(nested.side, trades, blocks),
        "folds": [],
    }
    for fold in found.folds:
        own = found.fold == fold["fold"]
        side = np.where(own, nested.side, 0)
        chosen = {"threshold": nested.thresholds[fold["fold"]]} | _figures_of_trades(side, trades, blocks)
        report["folds"].append(fold | _of_fold(whole.take(own & scored), found, own & scored) | {"chosen": chosen})
    return report, pack(data, found, theirs)


def _of_fold(judge: Judge, found: Walk, rows: Bools) -> dict[str, Any]:
    if not rows.any():
        return {"test_rows": 0, "auc": None, "brier": None, "log_loss": None}
    return {
        "test_rows": int(rows.sum()),
        "auc": evaluate.auc(judge.up, found.votes[rows], judge.cell),
        "brier": evaluate.brier(judge.up, found.prob[rows]),
        "log_loss": evaluate.log_loss(judge.up, found.prob[rows]),
    }


def _plain(value: Any) -> dict[str, Any]:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(value).items()}


def _figures_of_trades(side: Ints, trades: Trades, blocks: Blocks) -> dict[str, Any]:
    figures = _plain(evaluate.traded(0.0, side, trades, blocks))
    del figures["threshold"]
    return figures


# --- the champion ------------------------------------------------------------------------------------------------

_AT_ONCE: Final = 10_000  # rows that the champion's graph is asked at a time


@dataclass(frozen=True, slots=True)
class Champion:
    """The version that serves: its graph, and the newest row (epoch seconds) that it learnt from."""

    version: str
    graph: bytes
    feature_set: str
    symbols: tuple[str, ...]
    last_ts: int

    def predict(self, data: Dataset, rows: Ints, options: TrainOptions) -> Floats:
        """Its probability for those ``rows`` that are later than all that it was trained on; NaN for the others."""
        prob = np.full(len(rows), np.nan)
        known = np.isin(np.array(data.symbols)[data.symbol[rows]], self.symbols)
        fresh = np.flatnonzero(known & (data.columns.ts[rows] > self.last_ts + FORWARD_SPAN * options.bar_seconds))
        feature_set = FEATURE_SETS.get(self.feature_set)
        if feature_set is None or not len(fresh):
            return prob
        x, usable = inputs_of(data.take(rows[fresh]), feature_set)
        model = OnnxModel(self.graph, len(feature_set.inputs))
        for start in range(0, len(x), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            prob[fresh[part]] = np.where(usable[part], model.prob_up_of_rows(x[part]), np.nan)
        return prob


def _beside(champion: Champion, whole: Judge, found: Walk, theirs: Floats, scored: Bools) -> dict[str, Any] | None:
    """Champion and model on the rows that neither has seen; None where there are none with returns of both signs."""
    rows = scored & np.isfinite(theirs)
    judge = whole.take(rows)
    if not rows.any():
        return None
    ranked = judge.ranked(theirs[rows])
    if ranked["auc"] is None:
        return None
    own = judge.ranked(found.votes[rows]) | judge.judged(found.prob[rows])
    return {"version": champion.version, "rows": int(rows.sum())} | ranked | judge.judged(theirs[rows]) | {"model": own}


# --- the predictions themselves ----------------------------------------------------------------------------------


def pack(data: Dataset, found: Walk, champion: Floats) -> bytes:
    """``predictions.npz``: one entry an out-of-sample row, so that every figure can be computed again from the archive.

    ``ts`` (epoch seconds), ``symbol`` (an index into ``symbols``), ``fold``, the forest's ``votes`` and the probabilities
    ``prob``, ``logistic``, ``base_rate`` and ``champion`` (NaN where it was not asked).
    """
    file = io.BytesIO()
    np.savez_compressed(
        file,
        symbols=np.array(data.symbols),
        ts=data.columns.ts[found.rows],
        symbol=data.symbol[found.rows].astype(np.int16),
        fold=found.fold.astype(np.int16),
        votes=found.votes,
        prob=found.prob,
        logistic=found.linear,
        base_rate=found.base,
        champion=champion,
    )
    return file.getvalue()
