"""The walk-forward: in each fold everything is fitted anew on what was known, and asked about what came after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from actors.core import evaluate
from actors.core.evaluate import Floats, Ints
from actors.core.forest import CalibratedForest, TrainOptions, fit
from actors.core.inputs import Inputs

Progress = Callable[[str, float], None]


def no_progress(stage: str, done: float) -> None:
    """Says nothing."""


@dataclass(frozen=True, slots=True)
class Walk:
    """Out-of-sample predictions of all folds, one entry a test row; ``folds`` says what each was made of.

    ``rows`` are numbers of the dataset's rows, ``linear`` the logistic regression's probability, ``base`` the share of
    rises in the fold's training rows. ``newest`` is the last fold's model.
    """

    rows: Ints
    fold: Ints
    votes: Floats
    prob: Floats
    linear: Floats
    base: Floats
    folds: list[dict[str, Any]]
    newest: CalibratedForest


def walk(
    x: Inputs,
    ts: Ints,
    sign: Ints,
    options: TrainOptions,
    progress: Progress = no_progress,
    *,
    linear: bool = True,
) -> Walk | None:
    """Fits and calibrates in each fold exactly as the final model is made; None where no fold has returns of both signs.

    ``sign`` is 1, -1 or 0 (a tie). Without ``linear`` no logistic regression is fitted and its column is the base rate.
    """
    up, tie = sign > 0, sign == 0
    folds: list[dict[str, Any]] = []
    parts: list[tuple[Ints, Ints, Floats, Floats, Floats, Floats]] = []
    newest: CalibratedForest | None = None
    splits = evaluate.walk_forward(ts, folds=options.folds, bar_seconds=options.bar_seconds)
    for k, fold in enumerate(splits):
        progress(f"fold {k + 1} of {len(splits)}", 0.8 * k / len(splits))
        learn, test = fold.train[~tie[fold.train]], fold.test
        model = fit(x[learn], up[learn], ts[learn], options)
        if model is None:
            continue
        newest, votes = model, model.votes(x[test])
        base = np.full(len(test), up[learn].mean())
        other = base
        if linear:
            pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(x[learn], up[learn])
            other = pipeline.predict_proba(x[test])[:, 1]
        parts.append((test, np.full(len(test), k), votes, model.calibrate(votes), other, base))
        folds.append(
            {
                "fold": k,
                "train_rows": len(learn),
                "train_first_ts": int(ts[learn].min()),
                "train_last_ts": int(ts[learn].max()),
                "test_first_ts": int(ts[test].min()),
                "test_last_ts": int(ts[test].max()),
                "slope": model.slope,
            }
        )
    if newest is None:
        return None
    rows, fold_of, votes, prob, other, base = (np.concatenate(p) for p in zip(*parts, strict=True))
    return Walk(rows, fold_of, votes, prob, other, base, folds, newest)
