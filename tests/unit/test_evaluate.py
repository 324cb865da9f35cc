from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from actors.core import evaluate
from actors.core.evaluate import Blocks, Candidate, Trades

BAR = 60

times = st.lists(st.integers(0, 5_000), min_size=12, max_size=400).map(lambda v: np.array(v, dtype=np.int64) * BAR)


@given(times, st.integers(1, 6))
def test_training_rows_end_before_the_test_begins(ts: np.ndarray, folds: int) -> None:
    tested: list[int] = []
    for fold in evaluate.walk_forward(ts, folds=folds, bar_seconds=BAR):
        known = ts[fold.train].max() + 10 * BAR  # when the last label of the training rows is known at the latest
        assert known + evaluate.EMBARGO_BARS * BAR <= ts[fold.test].min()
        assert not tested or ts[fold.test].min() > ts[tested].max()
        tested.extend(fold.test.tolist())
    assert len(tested) == len(set(tested))


def test_folds_cover_two_thirds_and_grow() -> None:
    ts = np.arange(30_000, dtype=np.int64) * BAR
    folds = evaluate.walk_forward(np.r_[ts, ts], folds=5, bar_seconds=BAR)  # two symbols
    assert len(folds) == 5
    assert sum(len(f.test) for f in folds) == pytest.approx(40_000, abs=4)
    sizes = [len(f.train) for f in folds]
    assert sizes == sorted(sizes)
    assert min(sizes) == pytest.approx(20_000 - 2 * 70, abs=2)


def test_too_few_rows_give_no_folds() -> None:
    assert evaluate.walk_forward(np.arange(5, dtype=np.int64), folds=5, bar_seconds=BAR) == []
    assert evaluate.walk_forward(np.arange(50, dtype=np.int64) * BAR, folds=2, bar_seconds=BAR) == []


@given(times, st.floats(0.1, 0.5))
def test_the_calibration_block_is_later_and_purged(ts: np.ndarray, share: float) -> None:
    parts = evaluate.later_block(ts, share=share, bar_seconds=BAR)
    assert len(parts.test)
    if len(parts.train):
        assert ts[parts.train].max() + 10 * BAR <= ts[parts.test].min()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 8)), min_size=2, max_size=80))
def test_auc_is_scikit_learns(rows: list[tuple[bool, int]]) -> None:
    up = np.array([u for u, _ in rows])
    score = np.array([s for _, s in rows], dtype=np.float64)
    got = evaluate.auc(up, score)
    if up.all() or not up.any():
        assert got is None
    else:
        assert got == pytest.approx(metrics.roc_auc_score(up, score), abs=1e-12)


def test_brier_and_log_loss_are_scikit_learns() -> None:
    rng = np.random.default_rng(5)
    prob, up = rng.random(500), rng.random(500) < 0.5
    assert evaluate.brier(up, prob) == pytest.approx(metrics.brier_score_loss(up, prob))
    assert evaluate.log_loss(up, prob) == pytest.approx(metrics.log_loss(up, prob))
    assert evaluate.hit_rate(up, prob) == pytest.approx(metrics.accuracy_score(up, prob >= 0.5))
    assert np.isfinite(evaluate.log_loss(np.array([True]), np.array([0.0])))


def test_auc_is_averaged_within_cells() -> None:
    # Each cell ranks perfectly; against each other the cells are upside down.
    up = np.array([False, True, False, True])
    score = np.array([0.8, 0.9, 0.1, 0.2])
    cell, blocks = np.array([0, 0, 1, 1]), Blocks(np.arange(4), seed=1)
    assert evaluate.auc(up, score) == pytest.approx(0.75)
    assert evaluate.auc_in_cells(up, score, cell, blocks).value == 1.0
    one_class = evaluate.auc_in_cells(np.ones(4, dtype=bool), score, cell, blocks)
    assert one_class == evaluate.Auc(None, None, None)


def test_blocks_widen_the_interval_of_overlapping_labels() -> None:
    rng = np.random.default_rng(11)
    n, run = 12_000, 30
    truth = np.repeat(rng.standard_normal(n // run), run)  # neighbours are copies
    score = truth * 0.3 + np.repeat(rng.standard_normal(n // run), run)
    up, cell = truth > 0, np.zeros(n, dtype=np.int64)
    ts = np.arange(n, dtype=np.int64) * BAR
    blocks = evaluate.time_blocks(ts, bar_seconds=BAR)
    assert np.bincount(blocks).max() == evaluate.BLOCK_BARS
    wide = evaluate.auc_in_cells(up, score, cell, Blocks(blocks, seed=3))
    narrow = evaluate.auc_in_cells(up, score, cell, Blocks(np.arange(n), seed=3))
    assert None not in (wide.low, wide.high, narrow.low, narrow.high)
    assert wide.high - wide.low > 2.5 * (narrow.high - narrow.low)  # type: ignore[operator]
    assert wide.low < wide.value < wide.high  # type: ignore[operator]
    assert evaluate.auc_in_cells(up, score, cell, Blocks(blocks, seed=3)) == wide


@pytest.mark.slow
def test_the_interval_covers_the_truth() -> None:
    truth, covered = 0.5, 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        n = 4_000
        noise = np.convolve(rng.standard_normal(n + 4), np.ones(5), "valid")  # five-bar labels
        score = np.convolve(rng.standard_normal(n + 19), np.ones(20), "valid")  # slow inputs
        blocks = evaluate.time_blocks(np.arange(n, dtype=np.int64) * BAR, bar_seconds=BAR)
        ci = evaluate.auc_in_cells(noise > 0, score, np.zeros(n, dtype=np.int64), Blocks(blocks, seed=seed))
        covered += ci.low <= truth <= ci.high  # type: ignore[operator]
    assert covered >= 52  # of 60; redrawing single rows covers 34 of them


def test_cost_needs_spread_and_point() -> None:
    spread, close = np.array([10.0, 0.0]), np.array([2.0, 2.0])
    assert evaluate.cost(spread, close, 0.01, None).tolist() == pytest.approx(
        [1.5 * 10 * 0.01 / 2, np.nan], nan_ok=True
    )
    assert evaluate.cost(spread, close, 0.01, 4.0).tolist() == pytest.approx([0.075, 0.03])
    assert np.isnan(evaluate.cost(spread, close, None, 4.0)).all()


def figures(
    prob: list[float], ret: list[float], entry: list[float], leave: list[float], repeat: int
) -> list[Candidate]:
    up, *trade = [np.tile(np.array(a), repeat) for a in (prob, ret, entry, leave)]
    return evaluate.thresholds(up, Trades(*trade), Blocks(np.arange(len(up)) // 60, seed=1))


def test_longs_pay_at_entry_and_shorts_at_exit() -> None:
    long, *_ = figures([0.7, 0.7], [0.02, 0.02], [0.001, 0.001], [9.0, 9.0], 300)
    assert (long.trades, long.gross_mean) == (600, pytest.approx(0.02))
    assert long.net_mean == pytest.approx(0.019)
    short, *_ = figures([0.3, 0.3], [-0.02, -0.02], [9.0, 9.0], [0.001, 0.001], 300)
    assert short.net_mean == pytest.approx(0.019)
    assert short.hit_rate == 1.0


def test_unknown_costs_give_null_net_figures_and_no_threshold() -> None:
    nan = float("nan")
    candidates = figures([0.7, 0.3], [0.02, -0.02], [nan, nan], [nan, nan], 300)
    assert candidates
    assert all(c.net_mean is None and c.net_low is None and c.gross_mean is not None for c in candidates)
    assert evaluate.choose(candidates) is None


def test_the_threshold_is_the_surest_of_those_with_enough_trades() -> None:
    def candidate(threshold: float, trades: int, low: float | None) -> Candidate:
        return Candidate(threshold, trades, net_low=low)

    assert evaluate.choose([candidate(0.5, 5_000, 1e-6), candidate(0.55, 900, 3e-6), candidate(0.6, 199, 9e-6)]) == 0.55
    assert evaluate.choose([candidate(0.5, 5_000, -1e-6), candidate(0.55, 900, None)]) is None
    assert evaluate.choose([]) is None


def test_an_edge_is_found_beyond_its_cost_only() -> None:
    rng = np.random.default_rng(2)
    n = 20_000
    prob = rng.uniform(0.3, 0.7, n)
    ret = 4e-4 * (prob - 0.5) + 1e-4 * rng.standard_normal(n)
    blocks = Blocks(np.arange(n) // 60, seed=1)
    dear, cheap = (Trades(ret, np.full(n, c), np.full(n, c)) for c in (2e-4, 4e-5))
    assert evaluate.choose(evaluate.thresholds(prob, dear, blocks)) is None
    chosen = evaluate.choose(evaluate.thresholds(prob, cheap, blocks))
    assert chosen is not None
    assert chosen > 0.6


def test_trades_of_unknown_outcome_are_not_counted() -> None:
    prob, nan = np.full(600, 0.7), np.full(600, np.nan)
    ret = np.where(np.arange(600) % 2, 0.02, np.nan)
    (only,) = evaluate.thresholds(prob, Trades(ret, nan, nan), Blocks(np.arange(600) // 60, seed=1))
    assert (only.trades, only.hit_rate, only.gross_mean) == (300, 1.0, pytest.approx(0.02))


def test_a_mean_and_its_interval_come_from_whole_blocks() -> None:
    rng = np.random.default_rng(8)
    values = np.repeat(rng.standard_normal(200), 60)  # each block is one value
    wide = Blocks(np.arange(12_000) // 60, seed=1).mean(values)
    assert wide.value == pytest.approx(values.mean())
    assert wide.high - wide.low == pytest.approx(2 * 1.96 / np.sqrt(200), rel=0.2)
    assert wide.low < wide.floor < wide.value < wide.high
    part = Blocks(np.arange(12_000) // 60, seed=1).take(np.arange(6_000)).mean(values[:6_000])
    assert part.value == pytest.approx(values[:6_000].mean())
    assert part.high - part.low == pytest.approx(2 * 1.96 / np.sqrt(100), rel=0.25)


def test_the_calibration_curve_has_ten_equal_bins_or_as_many_as_there_are_values() -> None:
    rng = np.random.default_rng(9)
    prob = rng.uniform(0.4, 0.6, 10_000)
    up = rng.random(10_000) < prob
    blocks = Blocks(np.arange(10_000) // 60, seed=1)
    curve = evaluate.calibration_curve(up, prob, blocks)
    assert [b.count for b in curve] == [1_000] * 10
    for b in curve:
        own = (prob >= b.low) & ((prob < b.high) | (b is curve[-1]))
        assert b.mean_prob == pytest.approx(prob[own].mean())
        assert b.rate == pytest.approx(up[own].mean())
        assert b.rate_ci[0] < b.rate < b.rate_ci[1]
    (flat,) = evaluate.calibration_curve(up, np.full(10_000, 0.5), blocks)
    assert (flat.low, flat.high, flat.count, flat.rate) == (0.5, 0.5, 10_000, pytest.approx(up.mean()))
    two = evaluate.calibration_curve(up, np.where(np.arange(10_000) % 2, 0.4, 0.6), blocks)
    assert sum(b.count for b in two) == 10_000


def test_a_threshold_is_chosen_on_what_earlier_folds_had_brought() -> None:
    """In the last fold the edge is gone: the choice made before must trade it all the same, and lose."""
    rng = np.random.default_rng(3)
    n = 12_000
    ts, fold = np.arange(n, dtype=np.int64) * BAR, np.repeat([0, 1, 2], n // 3)
    prob = rng.uniform(0.3, 0.7, n)
    ret = np.where(fold == 2, -1.0, 1.0) * 1e-3 * (prob - 0.5) + 1e-5 * rng.standard_normal(n)
    costs = np.full(n, 1e-5)
    found = evaluate.nested_sides(
        prob, ts, fold, Trades(ret, costs, costs), Blocks(np.arange(n) // 60, seed=1), bar_seconds=BAR
    )
    assert found.thresholds[0] is None
    assert None not in (found.thresholds[1], found.thresholds[2])
    assert (found.side[fold == 0] == 0).all()
    last = fold == 2
    np.testing.assert_array_equal(found.side[last], evaluate.sides(prob[last], float(found.thresholds[2] or 0)))
    changed = np.where(last, -ret, ret)
    again = evaluate.nested_sides(
        prob, ts, fold, Trades(changed, costs, costs), Blocks(np.arange(n) // 60, seed=1), bar_seconds=BAR
    )
    assert again.thresholds == found.thresholds, "a fold's own outcomes do not choose its threshold"


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=50), st.floats(0.5, 0.99))
def test_sides_never_contradict(prob: list[float], threshold: float) -> None:
    side = evaluate.sides(np.array(prob), threshold)
    for p, s in zip(prob, side.tolist(), strict=True):
        assert s == (1 if p >= threshold else -1 if p <= 1.0 - threshold else 0)
