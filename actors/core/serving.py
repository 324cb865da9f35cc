"""A model in service: one row to one probability, and one probability to one signal, as pure functions.

Rows are always asked one at a time: a graph run on a batch may add in another order, and then a bar's signal would
depend on how its block was cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from actors.core.hashing import features_hash, signal_id
from actors.core.inputs import FEATURE_SETS, FeatureSet
from actors.core.manifest import MANIFEST_FILE, ONNX_FILE, Manifest, ModelRefused, OtherRuntime
from actors.core.outliers import is_outlier
from actors.core.sealed import check_file
from actors.core.timeframe import end_time
from schema.messages import Abstain, CandleBlock, FeatureBlock, FeatureRow, Label, ModelState, Signal

RUNTIME: Final = "onnxruntime"  # as a manifest's libraries name it

__all__ = [  # the manifest's names too: who serves needs both
    "MANIFEST_FILE",
    "NO_ANSWER",
    "ONNX_FILE",
    "Answer",
    "Decision",
    "Manifest",
    "ModelRefused",
    "OnnxModel",
    "ServedModel",
    "build_signal",
    "decide",
    "expires_at",
    "features_hash",
    "judged_at",
    "makes_signal",
    "signal_id",
    "signal_of",
]


class OnnxModel:
    """A graph in ONNX Runtime on one thread: ``inputs`` float32 ``(1, width)`` to ``prob_up``."""

    def __init__(self, graph: bytes, width: int) -> None:
        """Raises ModelRefused where the bytes are no graph of this shape."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.enable_cpu_mem_arena = False
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises its own classes, which share no base but Exception
            raise ModelRefused(f"{ONNX_FILE} cannot be loaded ({type(error).__name__}): train again.") from error
        shapes = {i.name: i.shape for i in self._session.get_inputs()}
        outputs = [o.name for o in self._session.get_outputs()]
        if list(shapes) != ["inputs"] or shapes["inputs"][-1] != width or outputs != ["prob_up"]:
            raise ModelRefused(f"{ONNX_FILE} does not map {width} inputs to prob_up: train again.")

    def prob_up(self, inputs: NDArray[np.float32]) -> float:
        """The calibrated probability of a rise; exactly one row."""
        if len(inputs) != 1:
            raise ValueError(f"one row at a time, got {len(inputs)}")
        return float(self._session.run(("prob_up",), {"inputs": inputs})[0][0])

    def prob_up_of_rows(self, inputs: NDArray[np.float32]) -> NDArray[np.float64]:
        """The same of many rows at once, up to float32's last bit: for scores, never for a signal."""
        prob: NDArray[np.float64] = self._session.run(("prob_up",), {"inputs": inputs})[0].astype(np.float64)
        return prob


class Answer(NamedTuple):
    """``prob_up`` None: the row is not ready, its inputs are undefined, or the model was not trained on the symbol."""

    prob_up: float | None
    outlier: bool


NO_ANSWER: Final = Answer(None, False)


class ServedModel:
    """A verified version: its manifest, its graph and the feature set that feeds it.

    The manifest is taken as given: who has bytes of unknown origin asks :func:`actors.core.sealed.open_manifest` first.
    """

    def __init__(self, manifest: Manifest, graph: bytes) -> None:
        """Checks the graph against the manifest, before anything of it is parsed.

        Raises:
            ModelRefused: another SHA-256, an unknown feature set, another ONNX Runtime or a graph of another shape.
        """
        check_file(manifest, ONNX_FILE, graph)
        feature_set = FEATURE_SETS.get(manifest.feature_set)
        if feature_set is None or feature_set.inputs != manifest.inputs:
            raise ModelRefused(
                f"{manifest.name} {manifest.version} needs the feature set {manifest.feature_set}, "
                f"which this release does not know ({', '.join(FEATURE_SETS)}): train again or upgrade."
            )
        trained_with = manifest.libraries.get(RUNTIME, "an unknown version")
        if trained_with != onnxruntime.__version__:
            # Another release may add in another order: signals would no longer be those that a replay gives.
            raise OtherRuntime(
                f"{manifest.name} {manifest.version} was made with {RUNTIME} {trained_with} and {onnxruntime.__version__} is "
                f"installed: train again with this release, or install {RUNTIME}=={trained_with}."
                if RUNTIME in manifest.libraries
                else f"{manifest.name} {manifest.version} does not say which {RUNTIME} it was made with: train again."
            )
        self.manifest = manifest
        self.feature_set: FeatureSet = feature_set
        self._onnx = OnnxModel(graph, len(manifest.inputs))

    def prob_up(self, symbol: str, row: FeatureRow) -> float | None:
        """None where the row is not ready, its inputs are undefined, or the model was not trained on the symbol."""
        if symbol not in self.manifest.symbols:
            return None
        inputs = self.feature_set.of_row(row)
        return None if inputs is None else self._onnx.prob_up(inputs)

    def outlier(self, inputs: NDArray[np.float32]) -> bool:
        """Whether a row's inputs are unlike those that the model learnt from; False of a version without a detector."""
        detector = self.manifest.outliers
        return detector is not None and is_outlier(detector, inputs)

    def answer(self, symbol: str, row: FeatureRow) -> Answer:
        """What the model says of a row, and whether it knows such rows."""
        if symbol not in self.manifest.symbols:
            return NO_ANSWER
        inputs = self.feature_set.of_row(row)
        return NO_ANSWER if inputs is None else Answer(self._onnx.prob_up(inputs), self.outlier(inputs))


# --- decisions ---------------------------------------------------------------------------------------------------


class Decision(NamedTuple):
    """A signal's judgement; ``label`` is 0 whenever ``abstain`` is not None."""

    prob_up: float | None
    label: Label
    threshold: float | None
    abstain: Abstain | None


def judged_at(block: CandleBlock | FeatureBlock, bar_end: datetime) -> datetime:
    """When a bar's age is judged: the receipt; in a replay its now, or without one the bar's own end (never stale)."""
    if not block.replay:
        return block.received_at
    return block.now if block.now is not None else bar_end


def makes_signal(row: FeatureRow) -> bool:
    """Whether a row is spoken of at all: it is live, and neither its return nor the one ahead has a base of 0 or less.

    Such prices come only where ``[symbols]`` allows them. A series' first bar has no base at all: it is ``warming``.
    """
    return row.live and row.close > 0.0 and (row.ret_1 is not None or row.bar <= 1)


def expires_at(ts: datetime, bar_end: datetime) -> datetime:
    """The bar's end plus one bar."""
    return bar_end + (bar_end - ts)


def decide(
    row: FeatureRow,
    symbol: str,
    answer: Answer,
    manifest: Manifest | None,
    state: ModelState | None,
    *,
    judged_at: datetime,
    expires_at: datetime,
) -> Decision:
    """From a probability to a label, or to the first reason that forbids one.

    An answer without ``prob_up`` of a model that knows the symbol means that the row's inputs are undefined: ``warming``.

    A bar's age is judged once, when its first live version comes. A correction, or what is computed again because of an
    earlier bar's, may come hours later: it brings better values, and the feed was no staler for it. So the row's own
    ``heard_at`` goes over ``judged_at``, which is the block's.
    """
    if row.heard_at is not None:
        judged_at = row.heard_at
    if not row.ready:
        return Decision(None, 0, None, "warming")
    if manifest is None or symbol not in manifest.symbols:
        return Decision(None, 0, None, "no_model")
    prob_up = answer.prob_up
    if prob_up is None:
        return Decision(None, 0, manifest.threshold, "warming")
    threshold = manifest.threshold
    limit = manifest.max_spread.get(symbol)
    reason: Abstain | None = None
    if state == "provisional":
        reason = "unproven"
    elif threshold is None:
        reason = "no_edge"
    elif judged_at > expires_at:
        reason = "stale_feed"
    elif limit is not None and row.spread > limit:
        reason = "spread"
    elif answer.outlier:
        reason = "out_of_distribution"
    elif row.ts > manifest.expires_at:
        reason = "model_expired"
    if reason is not None or threshold is None:
        return Decision(prob_up, 0, threshold, reason)
    label: Label = 1 if prob_up >= threshold else -1 if prob_up <= 1.0 - threshold else 0
    return Decision(prob_up, label, threshold, None)


# --- signals -----------------------------------------------------------------------------------------------------


def build_signal(
    *,
    symbol: str,
    timeframe: str,
    row: FeatureRow,
    decision: Decision,
    model_name: str,
    model_version: str | None,
    candles_seq: int,
    expires_at: datetime,
    created_at: datetime,
    supersedes: str | None = None,
) -> Signal:
    """The signal of one row; only ``created_at`` comes from a clock."""
    digest = features_hash(symbol, timeframe, row)
    return Signal(
        id=signal_id(symbol, timeframe, row.ts, model_version, digest),
        ts=row.ts,
        symbol=symbol,
        timeframe=timeframe,
        model_name=model_name,
        model_version=model_version,
        threshold=decision.threshold,
        prob_up=decision.prob_up,
        label=decision.label,
        abstain=decision.abstain,
        candle_revision=row.revision,
        candles_seq=candles_seq,
        features_hash=digest,
        created_at=created_at,
        expires_at=expires_at,
        supersedes=supersedes,
    )


def signal_of(
    block: FeatureBlock,
    row: FeatureRow,
    *,
    model: ServedModel | None,
    version: str | None,
    state: ModelState | None,
    model_name: str,
    versions: Sequence[tuple[int, str]],
    created_at: datetime,
) -> Signal:
    """What is said of one row of a block by the version that serves there.

    ``version`` is its name also where it does not load (``model`` None). ``versions`` are all activations of the
    timeframe, (first CANDLES sequence, version) ascending: they name the signal that this one supersedes.
    """
    end = end_time(row.ts, block.timeframe)
    expires = expires_at(row.ts, end)
    decision = decide(
        row,
        block.symbol,
        model.answer(block.symbol, row) if model is not None else NO_ANSWER,
        model.manifest if model is not None else None,
        state,
        judged_at=judged_at(block, end),
        expires_at=expires,
    )
    return build_signal(
        symbol=block.symbol,
        timeframe=block.timeframe,
        row=row,
        decision=decision,
        model_name=model_name,
        model_version=version,
        candles_seq=block.candles_seq,
        expires_at=expires,
        created_at=created_at,
        supersedes=_replaced(block, row, versions),
    )


def _replaced(block: FeatureBlock, row: FeatureRow, versions: Sequence[tuple[int, str]]) -> str | None:
    """The id of the signal that this row's supersedes: as pure a function as the id itself."""
    if row.replaces is None:
        return None
    version = None
    for from_seq, name in versions:
        if from_seq <= (row.replaces_seq or 0):
            version = name
    return signal_id(block.symbol, block.timeframe, row.ts, version, row.replaces)
