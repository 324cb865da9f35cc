"""A random forest with a calibrated vote, and the one ONNX graph that says the same.

A forest is fitted on the older rows and its vote calibrated once, by a sigmoid on a later, purged block; a sigmoid that
slopes down means the vote is worth nothing, and the model then says the base rate.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx
import skl2onnx
from msgspec import Struct
from scipy.special import expit
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression

from actors.core import evaluate
from actors.core.evaluate import Bools, Floats, Ints
from actors.core.inputs import FEATURE_SETS, SCALE_FREE_V1, Inputs
from actors.core.serving import OnnxModel
from actors.core.timeframe import FORWARD_BARS

CALIBRATION_SHARE: Final = 0.2
SAMPLE_SHARE: Final = 1 / FORWARD_BARS  # a tree's draw: labels overlap five bars, so a fifth of the rows is distinct
MAX_SAMPLES: Final = 50_000  # of one tree, whatever the rows: 200 trees of depth 8 gain nothing beyond
PARITY_ROWS: Final = 10_000
OPSET: Final = {"": 17, "ai.onnx.ml": 3}


class TrainOptions(Struct, frozen=True, kw_only=True):
    """What a run is asked to do. ``points`` and ``spreads`` (in points, where the feed's is unknown) are by symbol."""

    bar_seconds: int
    seed: int = 7
    trees: int = 200
    max_depth: int = 8
    min_samples_leaf: int = 50
    folds: int = 5
    min_rows: int = 5_000
    points: dict[str, float] = {}
    spreads: dict[str, float] = {}
    feature_set: str = SCALE_FREE_V1.name


class CalibratedForest:
    """What ``model.pkl`` holds: a forest whose vote ``f`` becomes the probability ``1 / (1 + exp(-(slope f + intercept)))``."""

    def __init__(self, forest: RandomForestClassifier, slope: float, intercept: float, inputs: tuple[str, ...]) -> None:
        self.forest, self.slope, self.intercept, self.inputs = forest, slope, intercept, inputs
        self.classes_ = np.array([0, 1])

    def votes(self, x: Inputs) -> Floats:
        """The forest's own share for up, shape ``(n,)``: what AUC ranks, calibrated or not."""
        votes: Floats = self.forest.predict_proba(x)[:, 1]
        return votes

    def calibrate(self, votes: Floats) -> Floats:
        prob: Floats = expit(self.slope * votes + self.intercept)
        return prob

    def predict_proba(self, x: Inputs) -> Floats:
        """FeatureColumns down, up; shape ``(n, 2)``."""
        up = self.calibrate(self.votes(x))
        return np.column_stack([1.0 - up, up])


# --- fitting -----------------------------------------------------------------------------------------------------


def fit(x: Inputs, up: Bools, ts: Ints, options: TrainOptions) -> CalibratedForest | None:
    """A forest on the older rows, calibrated on the newest fifth; None where either part has one class only."""
    if len(ts) < 2:
        return None
    parts = evaluate.later_block(ts, share=CALIBRATION_SHARE, bar_seconds=options.bar_seconds)
    if not (two_classes(up[parts.train]) and two_classes(up[parts.test])):
        return None
    forest = RandomForestClassifier(
        n_estimators=options.trees,
        max_depth=options.max_depth,
        min_samples_leaf=options.min_samples_leaf,
        max_samples=max(2, min(MAX_SAMPLES, int(len(parts.train) * SAMPLE_SHARE))),
        max_features="sqrt",
        n_jobs=1,
        random_state=options.seed,
    ).fit(x[parts.train], up[parts.train].astype(np.int64))
    names = FEATURE_SETS[options.feature_set].inputs
    slope, intercept = sigmoid(forest.predict_proba(x[parts.test])[:, 1], up[parts.test])
    return CalibratedForest(forest, slope, intercept, names)


def sigmoid(votes: Floats, up: Bools) -> tuple[float, float]:
    """(slope, intercept) of Platt's sigmoid (maximum likelihood); slope 0 and the base rate's logit if it would fall."""
    rate = float(np.clip(up.mean(), 1e-6, 1 - 1e-6))
    flat = (0.0, float(np.log(rate / (1 - rate))))
    centre, scale = float(votes.mean()), float(votes.std())
    if scale == 0.0:
        return flat
    logistic = LogisticRegression(C=np.inf).fit(((votes - centre) / scale)[:, None], up)
    slope = float(logistic.coef_[0, 0]) / scale
    return (slope, float(logistic.intercept_[0]) - slope * centre) if slope > 0 else flat


def two_classes(up: Bools) -> bool:
    return bool(up.any() and not up.all())


# --- export ------------------------------------------------------------------------------------------------------


def to_onnx(model: CalibratedForest) -> bytes:
    """One graph, calibration included: ``inputs`` float32 ``(n, k)`` to ``prob_up`` float32 ``(n,)``."""
    kind = skl2onnx.common.data_types.FloatTensorType([None, len(model.inputs)])
    exported = skl2onnx.to_onnx(
        model.forest, initial_types=[("inputs", kind)], options={"zipmap": False}, target_opset=OPSET
    )
    graph = exported.graph
    votes = graph.output[1].name
    node, value = onnx.helper.make_node, onnx.numpy_helper.from_array
    graph.initializer.extend(
        [
            value(np.array(1, dtype=np.int64), "up_column"),
            value(np.array(model.slope, dtype=np.float32), "slope"),
            value(np.array(model.intercept, dtype=np.float32), "intercept"),
        ]
    )
    graph.node.extend(
        [
            node("Gather", [votes, "up_column"], ["votes_up"], axis=1),
            node("Mul", ["votes_up", "slope"], ["sloped"]),
            node("Add", ["sloped", "intercept"], ["logit"]),
            node("Sigmoid", ["logit"], ["prob_up"]),
        ]
    )
    del graph.output[:]
    graph.output.append(onnx.helper.make_tensor_value_info("prob_up", onnx.TensorProto.FLOAT, [None]))
    onnx.checker.check_model(exported)
    return bytes(exported.SerializeToString())


def parity(model: CalibratedForest, served: bytes, x: Inputs) -> float:
    """Largest difference between the served graph, asked row by row, and the pickle on real rows."""
    rows = x[np.linspace(0, len(x) - 1, min(len(x), PARITY_ROWS)).astype(np.int64)]
    onnx_model = OnnxModel(served, len(model.inputs))
    prob = np.array([onnx_model.prob_up(rows[i : i + 1]) for i in range(len(rows))])
    return float(np.max(np.abs(prob - model.predict_proba(rows)[:, 1])))
