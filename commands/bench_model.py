"""The forests that the benchmarks serve: 200 trees of depth 8, learned from the simulated market."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import onnxruntime
from sklearn.ensemble import RandomForestClassifier

from actors.core.forest import CalibratedForest, to_onnx
from actors.core.inputs import SCALE_FREE_V1, FeatureColumns
from actors.core.manifest import ONNX_FILE, Manifest, ModelFile, version_name
from actors.core.market import INSTRUMENTS, Market
from actors.core.series import SeriesState, append, origin
from actors.core.serving import RUNTIME, ServedModel
from bus.topology import model_name
from schema.messages import Candle, CandleBlock, FeatureRow

TREES: Final = 200
DEPTH: Final = 8
DRAW: Final = 2_000  # rows of one tree: enough to fill depth 8
LEARNED: Final = 6_000  # bars
TIMEFRAME: Final = "M1"
STARTS: Final = datetime(2025, 6, 1, 22, tzinfo=UTC)  # a Sunday: the market opens


class Served(NamedTuple):
    """One version in every form that a benchmark asks."""

    forest: RandomForestClassifier
    calibrated: CalibratedForest
    model: ServedModel
    manifest: bytes
    graph: bytes


def candles(count: int, *, seed: int = 7) -> list[Candle]:
    """The newest market's first bars."""
    return Market(INSTRUMENTS[0], seed=seed, start=STARTS).take(count)


def features(bars: Sequence[Candle]) -> list[FeatureRow]:
    """A new series' rows."""
    return append(SeriesState(INSTRUMENTS[0].symbol, TIMEFRAME), bars, origin(block(bars), 1)).rows


def block(bars: Sequence[Candle]) -> CandleBlock:
    """Bars as the log holds them."""
    return CandleBlock(symbol=INSTRUMENTS[0].symbol, timeframe=TIMEFRAME, rows=tuple(bars), received_at=STARTS)


@cache
def _learned() -> tuple[list[FeatureRow], Any]:
    """Ready, labelled rows and whether the price rose."""
    rows = [row for row in features(candles(LEARNED, seed=1)) if row.ready and row.fwd_ret_5]
    return rows, np.array([row.fwd_ret_5 for row in rows]) > 0


def fit(x: Any, up: Any, *, jobs: int = 2) -> RandomForestClassifier:
    forest = RandomForestClassifier(
        n_estimators=TREES, max_depth=DEPTH, max_samples=min(DRAW, len(x)), n_jobs=jobs, random_state=7
    ).fit(x, up)
    forest.n_jobs = 1  # more make the prediction of one row slower
    return forest


@cache
def served(symbol: str) -> Served:
    """A version that serves ``symbol``, as the trainer would release it."""
    rows, up = _learned()
    fields = FeatureColumns._fields[1:]
    columns = FeatureColumns(
        np.array([int(row.ts.timestamp()) for row in rows], np.int64),
        *(np.array([getattr(row, name) for row in rows], np.float64) for name in fields),
    )
    x, _ = SCALE_FREE_V1.of_columns(columns)
    forest = fit(x, up.astype(np.int64))
    calibrated = CalibratedForest(forest, 4.0, -2.0, SCALE_FREE_V1.inputs)
    graph = to_onnx(calibrated)
    now = datetime.now(UTC)
    manifest = Manifest(
        name=model_name(TIMEFRAME),
        version=version_name(now, graph),
        timeframe=TIMEFRAME,
        created_at=now,
        files={ONNX_FILE: ModelFile(sha256=sha256(graph).hexdigest(), size=len(graph))},
        libraries={RUNTIME: onnxruntime.__version__},
        feature_set=SCALE_FREE_V1.name,
        inputs=SCALE_FREE_V1.inputs,
        symbols=(symbol,),
        first_ts=rows[0].ts,
        last_ts=rows[-1].ts,
        rows=len(rows),
        expires_at=datetime(9000, 1, 1, tzinfo=UTC),
        threshold=0.55,
    )
    return Served(forest, calibrated, ServedModel(manifest, graph), msgspec.json.encode(manifest), graph)


def on_columns(names: Sequence[str]) -> RandomForestClassifier:
    """A forest of the same size on named feature columns as they are."""
    rows, up = _learned()
    return fit(np.array([[getattr(row, name) for name in names] for row in rows]), up)
