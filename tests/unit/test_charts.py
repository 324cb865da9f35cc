from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from actors.core import charts, evaluate
from actors.core.dataset import Dataset, inputs_of
from actors.core.evaluate import Candidate, Trades
from actors.core.forest import TrainOptions
from actors.core.inputs import SCALE_FREE_V1, Inputs
from actors.core.walk import Walk, walk
from tests import oracles_ml

OPTIONS = TrainOptions(bar_seconds=60, trees=12, folds=3, points={"A": 1e-5, "B": 1e-5})


@pytest.fixture(scope="module")
def made() -> tuple[Dataset, Inputs, Walk]:
    series = {"A": oracles_ml.leaning(3_000, seed=1), "B": oracles_ml.leaning(2_500, seed=2)}
    data = oracles_ml.dataset(series).in_order()
    x, _ = inputs_of(data, SCALE_FREE_V1)
    found = walk(x, data.columns.ts, data.sign, OPTIONS)
    assert found is not None
    return data, x, found


def test_the_input_that_the_market_leans_on_matters_most(made: tuple[Dataset, Inputs, Walk]) -> None:
    data, x, found = made
    importance = charts.importance(x, data, found, SCALE_FREE_V1.inputs, OPTIONS)
    assert [entry["input"] for entry in importance] == list(SCALE_FREE_V1.inputs)
    best = max(importance, key=lambda entry: float(entry["mean"]))
    assert best["input"] in {"ma60_distance_atr", "rsi_centred", "macd_atr"}  # three views of the same distance
    assert best["mean"] > 0.01
    assert all(entry["std"] >= 0 for entry in importance)
    assert importance == charts.importance(x, data, found, SCALE_FREE_V1.inputs, OPTIONS)


def test_curves_end_where_all_trades_together_do(made: tuple[Dataset, Inputs, Walk]) -> None:
    data, _, found = made
    trades = data.trades(OPTIONS.points, {})
    curves = charts.equity(data, found, trades, [], 0.52, OPTIONS)
    assert curves is not None
    side = evaluate.sides(found.prob, 0.52)
    net = np.where(side != 0, trades.take(found.rows).net(side), 0.0)
    assert curves["model"][-1] == pytest.approx(np.nansum(net) / 5 / 2)
    held = 0.0
    for symbol in (0, 1):
        close = data.columns.close[found.rows][data.symbol[found.rows] == symbol]
        held += float((close[1:] / close[:-1] - 1).sum()) / 2
    assert curves["buy_hold"][-1] == pytest.approx(held)
    assert (curves["edge"], curves["net"], curves["threshold"]) == (True, True, 0.52)
    assert len(curves["ts"]) == len(curves["model"]) == charts.POINTS
    assert curves["ts"] == sorted(curves["ts"])
    assert curves["ts"][-1] == data.columns.ts[found.rows].max()
    low, high = curves["random"]
    assert all(a <= b for a, b in zip(low, high, strict=True))
    # As many trades that know nothing lose their costs and little else.
    cost = np.nansum(np.where(side != 0, trades.take(found.rows).gross(side) - net, 0.0)) / 5 / 2
    assert low[-1] < -cost < high[-1]


def test_where_nothing_has_an_edge_the_best_candidate_is_drawn(made: tuple[Dataset, Inputs, Walk]) -> None:
    data, _, found = made
    trades = data.trades(OPTIONS.points, {})
    candidates = [
        Candidate(0.5, 5_000, gross_mean=1e-5, net_mean=-2e-5, net_low=-3e-5),
        Candidate(0.51, 900, gross_mean=2e-5, net_mean=-1e-5, net_low=-2e-5),
        Candidate(0.6, 3, gross_mean=9e-5, net_mean=9e-5, net_low=9e-5),  # too few to mean anything
        Candidate(0.7, 0),
    ]
    curves = charts.equity(data, found, trades, candidates, None, OPTIONS)
    assert curves is not None
    assert (curves["threshold"], curves["edge"]) == (0.51, False)
    nan = np.full(len(trades.ret), np.nan)
    unknown = [replace(c, net_mean=None, net_low=None) for c in candidates[:2]]
    gross = charts.equity(data, found, Trades(trades.ret, nan, nan), unknown, None, OPTIONS)
    assert gross is not None
    assert (gross["threshold"], gross["net"]) == (0.51, False)
    assert gross["model"][-1] > curves["model"][-1], "nothing is paid"
    assert charts.equity(data, found, trades, [], None, OPTIONS) is None
