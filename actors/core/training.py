"""From labelled feature rows to a calibrated forest, its ONNX graph and an honest account of what it is worth.

``train`` is pure: the same dataset and options give the same model. The walk-forward fits and calibrates in each fold
exactly as the final model is made.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import joblib
import numpy as np
import onnx
import onnxruntime
import skl2onnx
import sklearn
from msgspec import structs
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from actors.core import evaluate
from actors.core.evaluate import Bools, Floats, Ints
from actors.core.forest import PARITY_ROWS, TrainOptions, fit, parity, to_onnx, two_classes
from actors.core.inputs import FEATURE_SETS, FeatureColumns, Inputs
from actors.core.spool import FIELDS

PARITY_LIMIT: Final = 1e-5
SUSPICIOUS_AUC: Final = 0.65  # real minute bars give about 0.52, the simulator's known edge at most 0.60
MAX_SPREAD_QUANTILE: Final = 0.99

Progress = Callable[[str, float], None]


def no_progress(stage: str, done: float) -> None:
    """Says nothing."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Ready, labelled feature rows of all symbols, in any order; columns of one length, NaN for null.

    ``symbol`` indexes ``symbols``; ``columns.ts`` is epoch seconds; ``spread`` in points, 0 = unknown.
    """

    symbols: tuple[str, ...]
    symbol: NDArray[np.int32]
    columns: FeatureColumns
    spread: Floats
    fwd_ret_5: Floats

    def take(self, rows: Ints) -> Dataset:
        return Dataset(
            self.symbols, self.symbol[rows], self.columns.take(rows), self.spread[rows], self.fwd_ret_5[rows]
        )


def from_spool(symbols: Sequence[str], spools: Sequence[bytes]) -> Dataset:
    """The dataset of rows packed by :mod:`actors.core.spool`, one spool a symbol."""
    kind = np.dtype([("ts", "<i8"), *((name, "<f8") for name in FIELDS)])
    parts = [np.frombuffer(spool, kind) for spool in spools]
    rows = np.concatenate(parts) if parts else np.empty(0, kind)
    symbol = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
    columns = FeatureColumns(*(np.ascontiguousarray(rows[name]) for name in FeatureColumns._fields))
    return Dataset(tuple(symbols), symbol, columns, rows["spread"].copy(), rows["fwd_ret_5"].copy())


@dataclass(frozen=True, slots=True)
class Trained:
    """A model that may serve. ``report`` is JSON-able and goes into the manifest and model_metrics."""

    model_pkl: bytes
    model_onnx: bytes
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Refused:
    """No model, and why, in one sentence."""

    reason: str
    report: dict[str, Any]


# --- a run -------------------------------------------------------------------------------------------------------


def train(dataset: Dataset, options: TrainOptions, progress: Progress = no_progress) -> Trained | Refused:
    """Evaluates by walk-forward, then fits on everything, exports and compares; refusals are values."""
    data, kept, left_out = _enough(dataset, options)
    report: dict[str, Any] = {
        "auc": None,
        "auc_ci": None,
        "brier": None,
        "rows": 0,
        "symbols": kept,
        "left_out": left_out,
        "options": structs.asdict(options),
        "libraries": libraries(),
    }
    if not kept:
        most = max(left_out.values(), default=0)
        reason = f"Too few rows: {options.min_rows} ready rows of one symbol are needed, the most there are is {most}."
        return Refused(f"{reason} Load more history, or lower [trainer] min_rows.", report)
    feature_set = FEATURE_SETS[options.feature_set]
    x, usable = feature_set.of_columns(data.columns)
    usable &= np.isfinite(data.fwd_ret_5)
    rows = np.flatnonzero(usable)
    rows = rows[np.lexsort((data.symbol[rows], data.columns.ts[rows]))]
    data, x = data.take(rows), x[rows]
    ts, up, tie = data.columns.ts, data.fwd_ret_5 > 0, data.fwd_ret_5 == 0
    learn = np.flatnonzero(~tie)
    report |= {
        "rows": len(learn),
        "ties": int(tie.sum()),
        "feature_set": feature_set.name,
        "inputs": feature_set.inputs,
    }
    if not two_classes(up[learn]):
        return Refused("All labels are the same: a model needs returns of both signs to learn from.", report)
    report |= {"first_ts": int(ts[0]), "last_ts": int(ts[-1]), "max_spread": _max_spreads(data, kept)}
    report |= _walk(x, data, up, tie, options, progress)
    if report["auc"] is None:
        return Refused("No fold of the walk-forward has returns of both signs: load more history.", report)
    if report["suspicious"]:
        best = max(auc for auc in (report["auc"], report["logistic"]["auc"]) if auc is not None)
        reason = (
            f"An out-of-sample AUC of {best:.3f} is a leak until proved otherwise, since honest features stay below "
            f"{SUSPICIOUS_AUC:g}: look for an input that knows the future, mend it and train again."
        )
        return Refused(reason, report)
    progress("fit", 0.8)
    model = fit(x[learn], up[learn], ts[learn], options)
    if model is None:
        return Refused("All labels of the newest rows are the same: load more history.", report)
    progress("export", 0.95)
    served = to_onnx(model)
    difference = parity(model, served, x)
    report |= {
        "calibration": {"slope": model.slope, "intercept": model.intercept},
        "parity": {"max_abs_diff": difference, "limit": PARITY_LIMIT, "rows": min(len(x), PARITY_ROWS)},
    }
    if not difference <= PARITY_LIMIT:
        return Refused(f"The ONNX graph differs from the pickle by {difference:.2g}, above {PARITY_LIMIT:g}.", report)
    pickle = io.BytesIO()
    joblib.dump(model, pickle, compress=3)
    return Trained(pickle.getvalue(), served, report)


def _enough(data: Dataset, options: TrainOptions) -> tuple[Dataset, list[str], dict[str, int]]:
    """The rows of symbols that have ``min_rows``, those symbols, and the counts of the others."""
    counts = np.bincount(data.symbol, minlength=len(data.symbols))
    kept = counts >= max(options.min_rows, 1)
    left_out = {name: int(n) for name, n, k in zip(data.symbols, counts, kept, strict=True) if not k}
    names = [name for name, k in zip(data.symbols, kept, strict=True) if k]
    return (data if kept.all() else data.take(np.flatnonzero(kept[data.symbol]))), names, left_out


def _max_spreads(data: Dataset, symbols: list[str]) -> dict[str, float | None]:
    """By symbol, the spread in points that 99 % of its known ones do not exceed."""
    out: dict[str, float | None] = {}
    for name in symbols:
        known = data.spread[(data.symbol == data.symbols.index(name)) & (data.spread > 0)]
        out[name] = float(np.quantile(known, MAX_SPREAD_QUANTILE)) if len(known) else None
    return out


def costs(data: Dataset, options: TrainOptions) -> tuple[Floats, Floats]:
    """Per row the cost of trading at its bar and at the bar where its trade ends; NaN where unknown."""
    entry, leave = np.full(len(data.spread), np.nan), np.full(len(data.spread), np.nan)
    for i, name in enumerate(data.symbols):
        own = np.flatnonzero(data.symbol == i)
        if len(own):
            point, spread = options.points.get(name), options.spreads.get(name)
            entry[own] = evaluate.cost(data.spread[own], data.columns.close[own], point, spread)
            leave[own] = entry[own][evaluate.exit_rows(data.columns.ts[own], bar_seconds=options.bar_seconds)]
    return entry, leave


def _walk(x: Inputs, data: Dataset, up: Bools, tie: Bools, options: TrainOptions, progress: Progress) -> dict[str, Any]:
    """The walk-forward's figures: the forest's, beside those of the base rate and of a logistic regression.

    AUC ranks the forest's votes, whether or not a fold's sigmoid kept them; the other figures judge what would be served.
    Ties are neither learnt nor scored, but they are traded, and cost.
    """
    ts = data.columns.ts
    folds: list[dict[str, Any]] = []
    parts: list[tuple[Ints, Ints, Floats, Floats, Floats, Floats]] = []
    splits = evaluate.walk_forward(ts, folds=options.folds, bar_seconds=options.bar_seconds)
    for k, fold in enumerate(splits):
        progress(f"fold {k + 1} of {len(splits)}", 0.8 * k / len(splits))
        learn = fold.train[~tie[fold.train]]
        model = fit(x[learn], up[learn], ts[learn], options)
        if model is None:
            continue
        linear = make_pipeline(StandardScaler(), LogisticRegression()).fit(x[learn], up[learn])
        votes, test, scored = model.votes(x[fold.test]), fold.test, ~tie[fold.test]
        prob = model.calibrate(votes)
        parts.append(
            (
                test,
                np.full(len(test), k),
                votes,
                prob,
                linear.predict_proba(x[test])[:, 1],
                np.full(len(test), up[learn].mean()),
            )
        )
        folds.append(
            {
                "train_rows": len(learn),
                "test_rows": int(scored.sum()),
                "train_last_ts": int(ts[learn].max()),
                "test_first_ts": int(ts[test].min()),
                "test_last_ts": int(ts[test].max()),
                "auc": evaluate.auc(up[test][scored], votes[scored]),
                "brier": evaluate.brier(up[test][scored], prob[scored]) if scored.any() else None,
                "slope": model.slope,
            }
        )
    if not parts:
        return {"folds": folds}
    test, number, votes, prob, linear_prob, base = (np.concatenate(p) for p in zip(*parts, strict=True))
    return {"folds": folds} | _figures(data, up, tie, test, number, votes, prob, linear_prob, base, options)


def _figures(
    data: Dataset,
    up: Bools,
    tie: Bools,
    test: Ints,
    fold: Ints,
    votes: Floats,
    prob: Floats,
    linear: Floats,
    base: Floats,
    options: TrainOptions,
) -> dict[str, Any]:
    """Out-of-sample figures of all folds together; arrays are by test row."""
    block = evaluate.time_blocks(data.columns.ts[test], bar_seconds=options.bar_seconds)
    scored, won = ~tie[test], up[test]
    cell = fold * len(data.symbols) + data.symbol[test]

    def ranked(score: Floats) -> dict[str, Any]:
        auc = evaluate.auc_in_cells(won[scored], score[scored], cell[scored], block[scored], seed=options.seed)
        return {"auc": auc.value, "auc_ci": None if auc.value is None else [auc.low, auc.high]}

    def judged(p: Floats) -> dict[str, float]:
        return {"brier": evaluate.brier(won[scored], p[scored]), "log_loss": evaluate.log_loss(won[scored], p[scored])}

    figures: dict[str, Any] = ranked(votes)
    if figures["auc"] is None:
        return {}
    logistic = ranked(linear)
    entry, leave = costs(data, options)
    candidates = evaluate.thresholds(prob, data.fwd_ret_5[test], entry[test], leave[test], block, seed=options.seed)
    return (
        figures
        | judged(prob)
        | {
            "suspicious": max(figures["auc"], logistic["auc"] or 0.0) > SUSPICIOUS_AUC,
            "hit_rate": evaluate.hit_rate(won[scored], prob[scored]),
            "test_rows": int(scored.sum()),
            "base_rate": {"rate": float(won[scored].mean())} | judged(base),
            "logistic": logistic | judged(linear),
            "threshold": evaluate.choose(candidates),
            "candidates": [
                {
                    "threshold": c.threshold,
                    "trades": c.trades,
                    "hit_rate": c.hit_rate,
                    "gross_mean": c.gross_mean,
                    "net_mean": c.net_mean,
                    "net_low": c.net_low,
                }
                for c in candidates
            ],
        }
    )


def libraries() -> dict[str, str]:
    """Versions of what made the model."""
    return {
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
        "skl2onnx": skl2onnx.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
