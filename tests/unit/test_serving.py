from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from actors.core import forest, serving
from actors.core.features import FeatureState
from actors.core.inputs import SCALE_FREE_V1
from actors.core.manifest import Manifest, ModelFile
from actors.core.serving import Decision, ModelRefused, OnnxModel, ServedModel
from schema.messages import CandleBlock, FeatureRow, ModelState
from tests import oracles_ml

TS = datetime(2024, 1, 3, 14, 7, tzinfo=UTC)
END = TS + timedelta(minutes=1)
ROW = FeatureRow(
    ts=TS,
    open=1.1,
    high=1.1,
    low=1.1,
    close=1.1,
    volume=10.0,
    spread=8.0,
    rsi=61.0,
    macd=2e-4,
    macd_signal=1e-4,
    macd_hist=1e-4,
    atr=2e-4,
    ma60=1.0993,
    ret_1=1e-4,
    bar=300,
    ready=True,
)
MANIFEST = Manifest(
    name="rf_m1",
    version="20240101T000000Z-00000000",
    timeframe="M1",
    created_at=TS,
    files={},
    libraries={"onnxruntime": onnxruntime.__version__},
    feature_set=SCALE_FREE_V1.name,
    inputs=SCALE_FREE_V1.inputs,
    symbols=("EURUSD",),
    first_ts=TS - timedelta(days=30),
    last_ts=TS - timedelta(days=1),
    rows=10_000,
    expires_at=TS + timedelta(days=80),
    threshold=0.55,
    max_spread={"EURUSD": 20.0},
)


@pytest.fixture(scope="module")
def market() -> tuple[np.ndarray, forest.CalibratedForest, bytes]:
    data = oracles_ml.dataset({"EURUSD": oracles_ml.leaning(8_000, seed=5)})
    x, _ = SCALE_FREE_V1.of_columns(data.columns)
    up = data.fwd_ret_5 > 0
    model = forest.fit(x, up, data.columns.ts, forest.TrainOptions(bar_seconds=60))
    assert model is not None
    return x, model, forest.to_onnx(model)


def manifest_of(graph: bytes, **changes: Any) -> Manifest:
    files = {"model.onnx": ModelFile(sha256=sha256(graph).hexdigest(), size=len(graph))}
    return structs.replace(MANIFEST, files=files, **changes)


# --- probabilities -----------------------------------------------------------------------------------------------


def test_a_rows_probability_does_not_depend_on_its_neighbours(market: tuple[Any, Any, bytes]) -> None:
    x, _, graph = market
    one, other = OnnxModel(graph, x.shape[1]), OnnxModel(graph, x.shape[1])
    forward = [one.prob_up(x[i : i + 1]) for i in range(600)]
    order = np.random.default_rng(1).permutation(600)
    shuffled = {int(i): other.prob_up(x[i : i + 1]) for i in order}
    assert [shuffled[i] for i in range(600)] == forward
    with pytest.raises(ValueError, match="one row at a time"):
        one.prob_up(x[:2])


def test_one_prediction_is_a_hundred_times_faster_than_scikit_learns(market: tuple[Any, Any, bytes]) -> None:
    x, model, graph = market
    assert len(model.forest.estimators_) == 200
    served = OnnxModel(graph, x.shape[1])

    def best(act: Any, rounds: int) -> float:
        times = []
        for i in range(rounds):
            start = time.perf_counter()
            act(x[i : i + 1])
            times.append(time.perf_counter() - start)
        return min(times)

    served.prob_up(x[:1])
    ours, theirs = best(served.prob_up, 1_000), best(model.predict_proba, 12)
    assert theirs / ours >= 100, f"ONNX Runtime {ours * 1e6:.0f} µs, scikit-learn {theirs * 1e6:.0f} µs"


def test_a_served_model_answers_for_its_symbols(market: tuple[Any, Any, bytes]) -> None:
    _, model, graph = market
    served = ServedModel(manifest_of(graph), graph)
    prob = served.prob_up("EURUSD", ROW)
    inputs = SCALE_FREE_V1.of_row(ROW)
    assert prob == pytest.approx(float(model.predict_proba(inputs)[0, 1]), abs=1e-5)
    assert served.prob_up("GBPUSD", ROW) is None
    assert served.prob_up("EURUSD", structs.replace(ROW, ready=False)) is None


def test_a_model_unlike_its_manifest_is_refused(market: tuple[Any, Any, bytes]) -> None:
    _, _, graph = market
    with pytest.raises(ModelRefused, match="not the one its manifest names"):
        ServedModel(MANIFEST, graph)
    with pytest.raises(ModelRefused, match="not the one its manifest names"):
        ServedModel(manifest_of(graph), graph[:-1])
    with pytest.raises(ModelRefused, match="scale_free_v9"):
        ServedModel(manifest_of(graph, feature_set="scale_free_v9"), graph)
    with pytest.raises(ModelRefused, match="feature set"):
        ServedModel(manifest_of(graph, inputs=("rsi",)), graph)
    with pytest.raises(ModelRefused, match="cannot be loaded"):
        ServedModel(manifest_of(b"no graph"), b"no graph")
    with pytest.raises(ModelRefused, match="does not map 3 inputs"):
        OnnxModel(graph, 3)


# --- decisions ---------------------------------------------------------------------------------------------------


def decide(
    row: FeatureRow = ROW,
    symbol: str = "EURUSD",
    prob: float | None = 0.6,
    manifest: Manifest | None = MANIFEST,
    state: ModelState | None = "champion",
    late: bool = False,
) -> Decision:
    expires = serving.expires_at(TS, END)
    at = expires + timedelta(microseconds=1) if late else expires
    return serving.decide(row, symbol, prob, manifest, state, judged_at=at, expires_at=expires)


def test_labels_follow_the_threshold() -> None:
    assert decide(prob=0.55) == Decision(0.55, 1, 0.55, None)
    assert decide(prob=0.549) == Decision(0.549, 0, 0.55, None)
    assert decide(prob=0.44) == Decision(0.44, -1, 0.55, None)


def test_reasons_take_precedence_in_their_order() -> None:
    """Everything is wrong at first; each step mends the reason that was given, and the next one shows."""
    row, symbol, manifest, state, late = (
        structs.replace(ROW, ready=False, spread=21.0),
        "X",
        MANIFEST,
        "provisional",
        True,
    )
    manifest = structs.replace(manifest, threshold=None, expires_at=TS - timedelta(days=1))
    seen = []
    for mend in ("", "warming", "no_model", "unproven", "no_edge", "stale_feed", "spread", "model_expired"):
        if mend == "warming":
            row = structs.replace(row, ready=True)
        elif mend == "no_model":
            symbol = "EURUSD"
        elif mend == "unproven":
            state = "champion"
        elif mend == "no_edge":
            manifest = structs.replace(manifest, threshold=0.55)
        elif mend == "stale_feed":
            late = False
        elif mend == "spread":
            row = structs.replace(row, spread=20.0)
        elif mend == "model_expired":
            manifest = structs.replace(manifest, expires_at=TS)
        decision = decide(row=row, symbol=symbol, manifest=manifest, state=state, late=late)  # type: ignore[arg-type]
        seen.append(decision.abstain)
        assert (decision.prob_up is None) == (decision.abstain in ("warming", "no_model"))
        assert decision.label == (1 if decision.abstain is None else 0)
    assert seen == ["warming", "no_model", "unproven", "no_edge", "stale_feed", "spread", "model_expired", None]


def test_without_a_model_there_is_no_probability() -> None:
    assert decide(manifest=None, state=None, prob=None) == Decision(None, 0, None, "no_model")
    assert decide(prob=None).abstain == "warming"  # ready, but an input is undefined


def test_unknown_spreads_never_abstain() -> None:
    wide = structs.replace(ROW, spread=1e9)
    assert decide(row=wide).abstain == "spread"
    for limits in ({}, {"EURUSD": None}):
        assert decide(row=wide, manifest=structs.replace(MANIFEST, max_spread=limits)).abstain is None


def test_age_is_judged_at_receipt_or_in_a_replay_at_its_now() -> None:
    block = CandleBlock(symbol="EURUSD", timeframe="M1", rows=(), received_at=END + timedelta(days=9))
    assert serving.judged_at(block, END) == block.received_at
    replay = structs.replace(block, replay=True)
    assert serving.judged_at(replay, END) == END
    assert serving.judged_at(structs.replace(replay, now=END + timedelta(hours=1)), END) == END + timedelta(hours=1)
    assert serving.expires_at(TS, END) == TS + timedelta(minutes=2)


def test_a_row_that_was_computed_again_is_as_old_as_when_its_bar_first_came() -> None:
    expires = serving.expires_at(TS, END)
    assert decide(row=structs.replace(ROW, heard_at=expires), late=True).abstain is None
    assert decide(row=structs.replace(ROW, heard_at=expires + timedelta(seconds=1))).abstain == "stale_feed"


def test_no_signal_is_made_where_a_base_is_not_positive() -> None:
    """WTI's May contract on 2020-04-20: returns from or to 0 and below are undefined."""
    state = FeatureState()
    rows = [
        structs.replace(ROW, bar=bar, close=close, ret_1=state.update(bar * 60, close, close, close)[6])
        for bar, close in enumerate((10.0, 1.0, 0.0, -37.0, 8.0, 9.0), 1)
    ]
    assert [serving.makes_signal(row) for row in rows] == [True, True, False, False, False, True]
    assert not serving.makes_signal(structs.replace(rows[-1], live=False))


# --- signals -----------------------------------------------------------------------------------------------------

FEATURES = ("close", "volume", "spread", "rsi", "macd", "macd_signal", "macd_hist", "atr", "ma60", "ret_1")
HASH = "9b3665bdabf8828e400c6d0f84c8a824"
ID = "3e9aac54a480bf1a0d681e4fb84b1d27"


def test_the_hash_covers_every_feature_and_no_future() -> None:
    base = serving.features_hash("EURUSD", "M1", ROW)
    assert len(base) == 32
    for name in FEATURES:
        value = getattr(ROW, name)
        assert serving.features_hash("EURUSD", "M1", structs.replace(ROW, **{name: np.nextafter(value, 9.0)})) != base
    nulls = {serving.features_hash("EURUSD", "M1", structs.replace(ROW, **{n: None})) for n in FEATURES[3:]}
    assert len(nulls | {base}) == 8
    same = structs.replace(ROW, fwd_ret_5=0.1, revision=2, open=1.0, high=1.2, low=1.0, real_volume=3.0)
    assert serving.features_hash("EURUSD", "M1", same) == base
    assert serving.features_hash("EURUSD", "M5", ROW) != base
    assert serving.features_hash("EURUSD.m", "M1", ROW) != base
    assert serving.features_hash("EURUSD", "M1", structs.replace(ROW, ts=END)) != base
    assert serving.features_hash("EURUSD", "M1", structs.replace(ROW, ready=False)) != base


def test_hash_and_id_never_change_with_a_release() -> None:
    digest = serving.features_hash("EURUSD", "M1", ROW)
    assert digest == HASH
    assert serving.signal_id("EURUSD", "M1", TS, MANIFEST.version, digest) == ID


@given(st.text(max_size=5), st.text(max_size=5), st.none() | st.text(min_size=1, max_size=5))
def test_an_id_names_one_signal(symbol: str, other: str, version: str | None) -> None:
    one = serving.signal_id(symbol, "M1", TS, version, "h")
    assert one == serving.signal_id(symbol, "M1", TS, version, "h")
    assert (one == serving.signal_id(other, "M1", TS, version, "h")) == (symbol == other)
    assert one != serving.signal_id(symbol, "M1", END, version, "h")
    assert one != serving.signal_id(symbol, "M1", TS, f"{version}+", "h")
    assert one != serving.signal_id(symbol, "M1", TS, version, "g")


def test_only_created_at_comes_from_a_clock() -> None:
    def build(created: datetime) -> Any:
        return serving.build_signal(
            symbol="EURUSD",
            timeframe="M1",
            row=structs.replace(ROW, revision=2),
            decision=decide(),
            model_name="rf_m1",
            model_version=MANIFEST.version,
            candles_seq=77,
            expires_at=serving.expires_at(TS, END),
            created_at=created,
        )

    signal = build(TS)
    assert structs.replace(build(END), created_at=TS) == signal
    assert (signal.label, signal.threshold, signal.prob_up, signal.abstain) == (1, 0.55, 0.6, None)
    assert (signal.candle_revision, signal.candles_seq, signal.expires_at) == (2, 77, TS + timedelta(minutes=2))
    assert signal.id == ID
