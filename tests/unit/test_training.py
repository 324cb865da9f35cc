from __future__ import annotations

import io
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import joblib
import msgspec
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from actors.core import evaluate, forest, training
from actors.core.dataset import Dataset, TradeBars, from_spool
from actors.core.forest import CalibratedForest, TrainOptions
from actors.core.inputs import SCALE_FREE_V1, FeatureColumns
from actors.core.serving import OnnxModel
from actors.core.spool import pack
from actors.core.training import Refused, Trained
from tests import oracles_ml

SMALL = TrainOptions(bar_seconds=60, trees=16, min_rows=3_000, points={"A": 1e-5, "B": 1e-5})


@pytest.fixture(scope="module")
def market() -> Dataset:
    return oracles_ml.dataset(
        {
            "A": oracles_ml.leaning(6_000, seed=1),
            "B": oracles_ml.leaning(5_000, seed=2),
            "short": oracles_ml.leaning(1_000, seed=3),
        }
    )


@pytest.fixture(scope="module")
def trained(market: Dataset) -> Trained:
    result = training.train(market, SMALL)
    assert isinstance(result, Trained)
    return result


def test_an_edge_is_learnt_and_reported(trained: Trained) -> None:
    report = trained.report
    assert 0.55 < report["auc"] < 0.65
    assert report["auc_ci"][0] < report["auc"] < report["auc_ci"][1]
    assert report["suspicious"] is False
    assert report["brier"] < report["base_rate"]["brier"]
    assert report["log_loss"] < report["base_rate"]["log_loss"]
    assert report["logistic"]["auc"] > 0.55
    assert 0.5 < report["hit_rate"] < 1
    assert report["calibration"]["slope"] > 0
    assert len(report["folds"]) == 5
    assert report["symbols"] == ["A", "B"]
    assert report["left_out"] == {"short": 696}
    assert report["max_spread"] == {"A": 8.0, "B": 8.0}
    assert report["feature_set"] == "scale_free_v1"
    msgspec.json.decode(msgspec.json.encode(report))


def test_folds_train_on_what_was_known(trained: Trained) -> None:
    for fold in trained.report["folds"]:
        assert fold["train_last_ts"] + (10 + evaluate.EMBARGO_BARS) * 60 <= fold["test_first_ts"]
        assert fold["test_first_ts"] < fold["test_last_ts"]
    assert trained.report["folds"][-1]["test_last_ts"] == trained.report["last_ts"]


def test_the_same_rows_give_the_same_model_in_any_order(market: Dataset, trained: Trained) -> None:
    shuffled = market.take(np.random.default_rng(1).permutation(len(market.spread)))
    again = training.train(shuffled, SMALL)
    assert isinstance(again, Trained)
    assert again.model_onnx == trained.model_onnx
    assert again.report == trained.report


def test_pickle_and_graph_agree_on_real_rows(market: Dataset, trained: Trained) -> None:
    model = joblib.load(io.BytesIO(trained.model_pkl))
    assert isinstance(model, CalibratedForest)
    x, usable = SCALE_FREE_V1.of_columns(market.columns)
    rows = x[usable][:1_500]
    served = OnnxModel(trained.model_onnx, x.shape[1])
    prob = model.predict_proba(rows)
    assert prob.shape == (len(rows), 2)
    assert prob.sum(axis=1) == pytest.approx(1.0)
    np.testing.assert_allclose([served.prob_up(rows[i : i + 1]) for i in range(len(rows))], prob[:, 1], atol=1e-5)
    assert trained.report["parity"]["max_abs_diff"] <= 1e-5


def test_a_random_walk_has_no_edge() -> None:
    data = oracles_ml.dataset({"X": oracles_ml.random_walk(30_000, seed=7)})
    result = training.train(data, TrainOptions(bar_seconds=60, trees=20, points={"X": 1e-5}))
    assert isinstance(result, Trained)
    assert result.report["auc"] == pytest.approx(0.5, abs=0.02)
    assert result.report["auc_ci"][0] < 0.5 < result.report["auc_ci"][1]
    assert result.report["threshold"] is None
    assert all(c["net_mean"] < 0 for c in result.report["candidates"] if c["trades"] >= evaluate.MIN_TRADES)
    assert result.report["suspicious"] is False


@pytest.mark.slow
@pytest.mark.skipif(not oracles_ml.DATA.is_dir(), reason="the shared market data is not beside this checkout")
def test_a_real_market_is_barely_predictable() -> None:
    data = oracles_ml.dataset({"EURUSD": oracles_ml.file_bars("EURUSD_M1_202201.csv")})
    result = training.train(data, TrainOptions(bar_seconds=60, trees=20, points={"EURUSD": 1e-5}))
    assert isinstance(result, Trained)
    assert 0.48 <= result.report["auc"] <= 0.58
    assert result.report["max_spread"] == {"EURUSD": None}  # this file's spreads are unknown
    assert result.report["threshold"] is None
    assert result.report["ties"] > 0


def test_too_few_rows_are_refused(market: Dataset) -> None:
    result = training.train(market, TrainOptions(bar_seconds=60, min_rows=10_000))
    assert isinstance(result, Refused)
    assert "10000 ready rows of one symbol are needed, the most there are is 5696" in result.reason
    assert result.report["auc"] is None
    empty = training.train(market.take(np.array([], dtype=np.int64)), SMALL)
    assert isinstance(empty, Refused)


def leaking(market: Dataset, share: float) -> Dataset:
    """A market whose RSI knows the sign of the next five bars, in that share of its rows."""
    rng = np.random.default_rng(5)
    knows = rng.random(len(market.spread)) < share
    rsi = np.where(knows, 50 + 20 * np.sign(market.fwd_ret_5), market.columns.rsi)
    return replace(market, columns=market.columns._replace(rsi=rsi))


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_an_auc_that_no_honest_feature_gives_is_refused_as_a_leak(market: Dataset, share: float) -> None:
    stages: list[str] = []
    result = training.train(leaking(market, share), SMALL, lambda stage, _: stages.append(stage))
    assert isinstance(result, Refused)
    assert result.report["suspicious"] is True
    best = max(result.report["auc"], result.report["logistic"]["auc"])
    assert f"AUC of {best:.3f}" in result.reason
    assert "a leak until proved otherwise" in result.reason
    assert "fit" not in stages, "nothing is made of it"


def test_one_class_is_refused(market: Dataset) -> None:
    for sign in (1.0, -1.0, 0.0):
        rising = replace(market, fwd_ret_5=sign * np.abs(market.fwd_ret_5) + sign * 1e-9)
        result = training.train(rising, SMALL)
        assert isinstance(result, Refused)
        assert "returns of both signs" in result.reason


def test_a_graph_unlike_its_pickle_is_refused(market: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "PARITY_LIMIT", 1e-12)
    result = training.train(market, SMALL)
    assert isinstance(result, Refused)
    assert "differs from the pickle" in result.reason


def test_unusable_rows_and_ties_are_dropped(market: Dataset, trained: Trained) -> None:
    n = len(market.spread)
    atr = market.columns.atr.copy()
    atr[:: n // 50] = np.nan
    fwd = market.fwd_ret_5.copy()
    fwd[1 :: n // 50] = 0.0
    marred = replace(market, columns=market.columns._replace(atr=atr), fwd_ret_5=fwd)
    result = training.train(marred, SMALL)
    assert isinstance(result, Trained)
    kept = np.flatnonzero(marred.symbol != 2)
    usable = np.isfinite(atr[kept])
    assert result.report["ties"] == int((usable & (fwd[kept] == 0)).sum())
    assert result.report["rows"] == int((usable & (fwd[kept] != 0)).sum())


def test_a_vote_that_points_the_wrong_way_gives_the_base_rate() -> None:
    rng = np.random.default_rng(3)
    up = rng.random(2_000) < 0.4
    votes = np.where(up, 0.45, 0.55) + 0.02 * rng.standard_normal(2_000)
    slope, intercept = forest.sigmoid(votes, up)
    assert slope == 0.0
    assert 1 / (1 + np.exp(-intercept)) == pytest.approx(up.mean())
    assert forest.sigmoid(np.full(2_000, 0.5), up) == (0.0, pytest.approx(intercept))


def test_the_sigmoid_is_the_likeliest_one() -> None:
    rng = np.random.default_rng(4)
    votes = 0.5 + 0.03 * rng.standard_normal(5_000)
    up = rng.random(5_000) < 1 / (1 + np.exp(-20 * (votes - 0.49)))
    slope, intercept = forest.sigmoid(votes, up)
    assert slope == pytest.approx(20, rel=0.25)
    oracle = LogisticRegression(C=1e12, tol=1e-10, max_iter=5_000).fit(100 * votes[:, None], up)
    assert slope == pytest.approx(100 * oracle.coef_[0, 0], rel=1e-3)
    prob = 1 / (1 + np.exp(-(slope * votes + intercept)))
    assert prob.mean() == pytest.approx(up.mean(), abs=1e-4)  # the score equation of the intercept


def test_a_trade_enters_at_the_next_open_and_shorts_pay_where_it_ends() -> None:
    walk = oracles_ml.random_walk(1_000, seed=5)
    bars = walk._replace(spread=np.arange(1_000) % 50 + 1.0, open=walk.open + 3e-5)
    data = oracles_ml.dataset({"A": bars})
    trades = data.trades({"A": 1e-5}, {})
    at = np.searchsorted(bars.ts, data.columns.ts)
    np.testing.assert_allclose(trades.ret, bars.close[at + 5] / bars.open[at + 1] - 1, rtol=0, atol=1e-15)
    np.testing.assert_allclose(trades.cost_long, 1.5 * bars.spread[at + 1] * 1e-5 / bars.close[at + 1])
    np.testing.assert_allclose(trades.cost_short, 1.5 * bars.spread[at + 5] * 1e-5 / bars.close[at + 5])
    assert np.isnan(data.trades({}, {"A": 9.0}).cost_long).all()
    unpriced = replace(data, bars=data.bars._replace(entry_open=np.full(len(at), np.nan))).trades({"A": 1e-5}, {})
    assert np.isnan(unpriced.ret).all()
    assert np.isnan(unpriced.net(np.ones(len(at), dtype=np.int64))).all()


def test_spooled_rows_come_back(market: Dataset) -> None:
    def rows(symbol: int) -> list[dict[str, Any]]:
        own = np.flatnonzero(market.symbol == symbol)[:50]
        return [
            {
                name: None if np.isnan(v := float(getattr(market.columns, name)[i])) else v
                for name in FeatureColumns._fields[1:]
            }
            | {
                "ts": datetime.fromtimestamp(int(market.columns.ts[i]), UTC),
                "spread": float(market.spread[i]),
                "fwd_ret_5": None if i % 7 == 0 else float(market.fwd_ret_5[i]),
            }
            | {name: float(getattr(market.bars, name)[i]) for name in TradeBars._fields}
            for i in own
        ]

    first, second = rows(0), rows(1)
    data = from_spool(["A", "B"], [pack(first[:20]) + pack(first[20:]), pack(second)])
    assert data.symbols == ("A", "B")
    assert data.symbol.tolist() == [0] * 50 + [1] * 50
    assert data.columns.ts.tolist() == [int(r["ts"].timestamp()) for r in first + second]
    for name in FeatureColumns._fields[1:]:
        assert getattr(data.columns, name).tolist() == [r[name] for r in first + second]
    assert [None if np.isnan(v) else v for v in data.fwd_ret_5.tolist()] == [r["fwd_ret_5"] for r in first + second]
    for name in TradeBars._fields:
        assert getattr(data.bars, name).tolist() == [r[name] for r in first + second]
    assert len(from_spool([], []).spread) == 0
