from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from actors.core import inputs, leaks, training
from actors.core.dataset import Dataset, History, inputs_of
from actors.core.features import FeatureState
from actors.core.forest import TrainOptions
from actors.core.inputs import SCALE_FREE_V1, FeatureColumns, FeatureSet, Inputs
from actors.core.training import Refused, Trained
from schema.messages import FeatureRow
from tests import oracles_ml

SMALL = TrainOptions(bar_seconds=60, trees=16, folds=3, min_rows=2_000, points={"A": 1e-5, "B": 1e-5})


def own_rows(symbol: str, bars: oracles_ml.Bars) -> tuple[Dataset, History]:
    """A training set whose features the archive got from the code that serves, and the bars that it got them from."""
    history = oracles_ml.history(symbol, bars)
    data = oracles_ml.dataset({symbol: bars})
    made = leaks.features_of(bars.ts, bars.high, bars.low, bars.close)
    return replace(data, columns=made.take(np.searchsorted(bars.ts, data.columns.ts))), history


@pytest.fixture(scope="module")
def market() -> tuple[Dataset, History]:
    return own_rows("A", oracles_ml.leaning(4_000, seed=1, lean=0.12))


# --- prefixes ----------------------------------------------------------------------------------------------------


def test_features_come_out_as_bar_by_bar() -> None:
    bars = oracles_ml.random_walk(700, seed=2)
    state = FeatureState()
    steps = zip(bars.ts.tolist(), bars.high.tolist(), bars.low.tolist(), bars.close.tolist(), strict=True)
    rows = np.array([state.update(*bar) for bar in steps], dtype=np.float64)
    made = leaks.features_of(bars.ts, bars.high, bars.low, bars.close)
    for i, name in enumerate(FeatureColumns._fields[2:]):
        assert not leaks.differs(getattr(made, name), np.ascontiguousarray(rows[:, i])).any(), name


def test_an_honest_training_passes_and_says_what_was_compared(market: tuple[Dataset, History]) -> None:
    data, history = market
    result = training.train(data, SMALL, histories=[history])
    assert isinstance(result, Trained), result
    guard = result.report["guard"]
    assert guard["prefix"] == {
        "rows": len(data.symbol),
        "bars": 4_000,
        "inputs_ok": True,
        "columns_ok": True,
        "archive_ok": True,
        "symbols": ["A"],
        "from_first_bar": ["A"],
        "fault": None,
    }
    for name in ("shuffled", "random_walk"):
        control = guard[name]
        assert control["limit"] == max(0.02, 2.3 / control["n"] ** 0.5)
        assert abs(control["auc"] - 0.5) <= control["limit"]
    assert guard["random_walk"]["threshold"] is None


def peeking(ahead: int) -> FeatureSet:
    """scale_free_v1 and one input more, that knows the close ``ahead`` bars later."""

    def of_columns(columns: FeatureColumns) -> tuple[Inputs, np.ndarray]:
        x, usable = SCALE_FREE_V1.of_columns(columns)
        later = np.concatenate((columns.close[ahead:], np.repeat(columns.close[-1:], ahead)))
        return np.column_stack([x, (later / columns.close - 1).astype(np.float32)]), usable

    def of_row(row: FeatureRow) -> Inputs | None:
        x = SCALE_FREE_V1.of_row(row)
        return None if x is None else np.column_stack([x, np.zeros((1, 1), np.float32)])

    return FeatureSet("peeking_v1", (*SCALE_FREE_V1.inputs, "next_move"), of_row, of_columns)


@pytest.mark.parametrize("ahead", [1, 5])
def test_one_input_that_looks_ahead_refuses_the_model_and_is_named(
    market: tuple[Dataset, History], monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    monkeypatch.setitem(inputs.FEATURE_SETS, "peeking_v1", peeking(ahead))
    data, history = market
    options = TrainOptions(bar_seconds=60, trees=16, min_rows=2_000, feature_set="peeking_v1")
    result = training.train(data, options, histories=[history])
    assert isinstance(result, Refused)
    assert result.reason.startswith("The input next_move looks ahead"), result.reason
    assert "2024-01-01" in result.reason
    assert "of A" in result.reason
    assert result.report["guard"]["prefix"]["fault"]["name"] == "next_move"
    assert result.report["auc"] is None


def test_an_input_that_is_scaled_by_the_whole_series_is_named(market: tuple[Dataset, History]) -> None:
    def of_columns(columns: FeatureColumns) -> tuple[Inputs, np.ndarray]:
        x, usable = SCALE_FREE_V1.of_columns(columns)
        x[:, 3] /= x[:, 3].std()
        return x, usable

    scaled = replace(SCALE_FREE_V1, of_columns=of_columns)
    data, _ = market
    x, usable = inputs_of(data, scaled)
    fault = leaks.inputs_fault(data, x, usable, scaled)
    assert fault is not None
    assert (fault.name, fault.how) == ("macd_hist_atr", leaks.LOOKS_AHEAD)


def test_an_input_that_serving_computes_otherwise_is_named(market: tuple[Dataset, History]) -> None:
    def of_row(row: FeatureRow) -> Inputs | None:
        x = SCALE_FREE_V1.of_row(row)
        return None if x is None else np.nextafter(x, np.float32(9), where=np.arange(11) == 5, out=x.copy())

    data, _ = market
    x, usable = inputs_of(data, SCALE_FREE_V1)
    assert leaks.inputs_fault(data, x, usable, SCALE_FREE_V1) is None
    fault = leaks.inputs_fault(data, x, usable, replace(SCALE_FREE_V1, of_row=of_row))
    assert fault is not None
    assert (fault.name, fault.how) == ("return_atr", leaks.UNLIKE_SERVING)


@pytest.mark.parametrize("name", ["rsi", "macd", "macd_signal", "macd_hist", "atr", "ma60", "ret_1"])
def test_a_feature_that_looks_ahead_is_named(market: tuple[Dataset, History], name: str) -> None:
    def compute(ts: np.ndarray, high: np.ndarray, low: np.ndarray, close: np.ndarray) -> FeatureColumns:
        made = leaks.features_of(ts, high, low, close)
        column = getattr(made, name)
        return made._replace(**{name: np.concatenate((column[1:], column[-1:]))})

    _, history = market
    assert leaks.columns_fault(history) is None
    fault = leaks.columns_fault(history, compute)
    assert fault is not None
    assert (fault.name, fault.how) == (name, leaks.LOOKS_AHEAD)


@pytest.mark.parametrize("name", ["rsi", "atr", "close", "fwd_ret_5"])
def test_one_archived_value_that_the_bars_do_not_give_is_named(market: tuple[Dataset, History], name: str) -> None:
    """One bit of one row, among thousands."""
    data, history = market
    column = (data.fwd_ret_5 if name == "fwd_ret_5" else getattr(data.columns, name)).copy()
    column[1_234] = np.nextafter(column[1_234], 9.0)
    marred = (
        replace(data, fwd_ret_5=column)
        if name == "fwd_ret_5"
        else replace(data, columns=data.columns._replace(**{name: column}))
    )
    result = training.train(marred, SMALL, histories=[history])
    assert isinstance(result, Refused)
    assert f"The input {name} does not follow from the archived bars" in result.reason
    assert f"{datetime.fromtimestamp(int(data.columns.ts[1_234]), UTC):%Y-%m-%d %H:%M}" in result.reason
    assert "train again" in result.reason


def test_a_history_without_its_first_bars_is_compared_with_itself_only(market: tuple[Dataset, History]) -> None:
    data, history = market
    cut = History("A", False, *(column[500:] for column in (history.ts, history.high, history.low, history.close)))
    x, usable = inputs_of(data, SCALE_FREE_V1)
    found = leaks.check_prefixes(data, x, usable, SCALE_FREE_V1, [cut], SMALL)
    assert found.refusal is None
    assert (found.report["columns_ok"], found.report["archive_ok"]) == (True, None)
    without = leaks.check_prefixes(data, x, usable, SCALE_FREE_V1, [], SMALL)
    assert (without.report["columns_ok"], without.report["archive_ok"]) == (None, None)


# --- controls ----------------------------------------------------------------------------------------------------


def test_labels_change_places_in_blocks() -> None:
    rng = np.random.default_rng(1)
    sign = rng.integers(-1, 2, 1_000)
    symbol = np.tile(np.array([0, 1], dtype=np.int32), 500)
    moved = leaks.shuffle_in_blocks(sign, symbol, seed=3)
    for i in (0, 1):
        before, after = sign[symbol == i], moved[symbol == i]
        assert sorted(before) == sorted(after)
        blocks = {tuple(b) for b in np.array_split(before, 500 // 60)}
        assert min(len(b) for b in blocks) >= 60
        assert not np.array_equal(before, after)
        text = after.tolist()
        assert all(any(text[k : k + len(b)] == list(b) for k in range(len(text))) for b in blocks)


def test_a_pipeline_that_sees_its_answers_is_refused_whatever_the_labels(
    market: tuple[Dataset, History], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted mistake: each fold is tested on rows that it has learnt."""

    def overlapping(ts: np.ndarray, *, folds: int, bar_seconds: int) -> list[object]:
        return [replace(fold, train=np.arange(len(ts))) for fold in honest(ts, folds=folds, bar_seconds=bar_seconds)]

    honest = leaks.evaluate.walk_forward
    data, _ = market
    x, _ = inputs_of(data, SCALE_FREE_V1)
    free = TrainOptions(bar_seconds=60, min_samples_leaf=5)
    assert leaks.check_controls(x, data, SCALE_FREE_V1, free).refusal is None
    monkeypatch.setattr(leaks.evaluate, "walk_forward", overlapping)
    found = leaks.check_controls(x, data, SCALE_FREE_V1, free)
    assert found.refusal is not None
    assert "Shuffled labels are ranked with an AUC of 0." in found.refusal
    assert found.report["shuffled"]["attempts"] == leaks.CONTROL_SEEDS


def test_a_random_walk_that_can_be_foretold_is_refused(market: tuple[Dataset, History]) -> None:
    """Five bars of look-ahead in an input: shuffled labels know nothing of it, the walk does."""
    peek = peeking(5)
    data, _ = market
    x, _ = inputs_of(data, peek)
    found = leaks.check_controls(x, data, peek, TrainOptions(bar_seconds=60, trees=16))
    assert found.refusal is not None
    assert "On a simulated random walk" in found.refusal


@pytest.mark.slow
def test_the_controls_rarely_fail_by_chance() -> None:
    """Single runs of 50 seeds; a training is refused only where two in a row fail."""
    options = TrainOptions(bar_seconds=60, trees=16)
    data = oracles_ml.dataset({"A": oracles_ml.leaning(2_500, seed=4)})
    x, _ = inputs_of(data, SCALE_FREE_V1)
    shuffled = [leaks.shuffled_labels(x, data, options, seed=seed) for seed in range(50)]
    walks = [leaks.random_walk(SCALE_FREE_V1, options, seed=seed) for seed in range(50)]
    for controls in (shuffled, walks):
        failed = sum(not control.passed for control in controls)
        assert failed <= 4, f"{failed} of 50"
    assert all(control.threshold is None for control in walks)
