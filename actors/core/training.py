"""From labelled feature rows to a calibrated forest, its ONNX graph and an honest account of what it is worth.

``train`` is pure: the same dataset and options give the same model. The leak guard comes first; then the walk-forward fits
and calibrates in each fold exactly as the final model is made.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import joblib
import numpy as np
import onnx
import onnxruntime
import skl2onnx
import sklearn
from msgspec import structs

from actors.core import evaluate, leaks
from actors.core.charts import equity, importance
from actors.core.dataset import Dataset, History, inputs_of
from actors.core.evaluate import Candidate, Ints
from actors.core.figures import SUSPICIOUS_AUC, Champion, figures
from actors.core.forest import CALIBRATION_SHARE, PARITY_ROWS, TrainOptions, fit, parity, to_onnx, two_classes
from actors.core.inputs import FEATURE_SETS, FeatureSet, Inputs
from actors.core.outliers import fit_outliers, outlier_rate
from actors.core.walk import Progress, no_progress, walk

PARITY_LIMIT: Final = 1e-5
MAX_SPREAD_QUANTILE: Final = 0.99


@dataclass(frozen=True, slots=True)
class Trained:
    """A model that may serve. ``report`` is JSON-able and goes into the manifest and model_metrics.

    ``predictions`` are the walk-forward's, out of sample, as :func:`actors.core.figures.pack` lays them out.
    """

    model_pkl: bytes
    model_onnx: bytes
    predictions: bytes
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Refused:
    """No model, and why, in one sentence."""

    reason: str
    report: dict[str, Any]


def train(
    dataset: Dataset,
    options: TrainOptions,
    progress: Progress = no_progress,
    *,
    histories: Sequence[History] = (),
    champion: Champion | None = None,
) -> Trained | Refused:
    """Guards, evaluates by walk-forward, then fits on everything, exports and compares; refusals are values.

    ``histories`` are bars of some symbols, from which the guard computes their features again.
    """
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
    data = data.in_order()
    x, usable = inputs_of(data, feature_set)
    progress("guard", 0.0)
    histories = [history for history in histories if history.symbol in kept]
    bits = leaks.check_prefixes(data, x, usable, feature_set, histories, options)
    report["guard"] = {"prefix": bits.report}
    if bits.refusal is not None:
        return Refused(bits.refusal, report)
    rows = np.flatnonzero(usable & np.isfinite(data.fwd_ret_5))
    data, x = data.take(rows), x[rows]
    ts, sign = data.columns.ts, data.sign
    up, learn = sign > 0, np.flatnonzero(sign != 0)
    report |= {
        "rows": len(learn),
        "ties": int((sign == 0).sum()),
        "feature_set": feature_set.name,
        "inputs": feature_set.inputs,
    }
    if not two_classes(up[learn]):
        return Refused("All labels are the same: a model needs returns of both signs to learn from.", report)
    report |= {
        "first_ts": int(ts[0]),
        "last_ts": int(ts[-1]),
        "max_spread": _max_spreads(data, kept),
        "train_rate": float(up[learn].mean()),
    }
    controls = leaks.check_controls(x, data, feature_set, options)
    report["guard"] |= controls.report
    if controls.refusal is not None:
        return Refused(controls.refusal, report)
    found = walk(x, ts, sign, options, progress)
    if found is None:
        return Refused(_ONE_SIGN, report)
    progress("figures", 0.8)
    trades = data.trades(options.points, options.spreads)
    scores, predictions = figures(data, found, trades, options, champion)
    report |= scores
    if report["auc"] is None:
        return Refused(_ONE_SIGN, report)
    if report["suspicious"]:
        best = max(auc for auc in (report["auc"], report["logistic"]["auc"]) if auc is not None)
        reason = (
            f"An out-of-sample AUC of {best:.3f} is a leak until proved otherwise, since honest features stay below "
            f"{SUSPICIOUS_AUC:g}: look for an input that knows the future, mend it and train again."
        )
        return Refused(reason, report)
    candidates = [Candidate(**c) for c in report["candidates"]]
    report |= {
        "importance": importance(x, data, found, feature_set.inputs, options),
        "equity": equity(data, found, trades, candidates, report["threshold"], options),
        "outliers": _outliers(x, ts, feature_set, options),
    }
    progress("fit", 0.85)
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
    return Trained(pickle.getvalue(), served, predictions, report)


_ONE_SIGN: Final = "No fold of the walk-forward has returns of both signs: load more history."


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


def _outliers(x: Inputs, ts: Ints, feature_set: FeatureSet, options: TrainOptions) -> dict[str, Any] | None:
    """The detector of the rows that the final forest learns from, and its rates there and on the later block."""
    parts = evaluate.later_block(ts, share=CALIBRATION_SHARE, bar_seconds=options.bar_seconds)
    detector = fit_outliers(x[parts.train], feature_set)
    if detector is None:
        return None
    rates = {
        "train_rate": outlier_rate(detector, x[parts.train]),
        "validation_rate": outlier_rate(detector, x[parts.test]),
    }
    return structs.asdict(detector) | rates


def libraries() -> dict[str, str]:
    """Versions of what made the model."""
    return {
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
        "skl2onnx": skl2onnx.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
