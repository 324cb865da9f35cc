from __future__ import annotations

import time

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.core import outliers
from actors.core.inputs import SCALE_FREE_V1, Inputs
from actors.core.manifest import Outliers
from tests import oracles_ml


@pytest.fixture(scope="module")
def market() -> Inputs:
    x, _ = SCALE_FREE_V1.of_columns(oracles_ml.dataset({"A": oracles_ml.random_walk(20_000, seed=6)}).columns)
    return x


@pytest.fixture(scope="module")
def detector(market: Inputs) -> Outliers:
    found = outliers.fit_outliers(market[:15_000], SCALE_FREE_V1)
    assert found is not None
    return found


def test_the_limit_is_what_one_row_in_a_thousand_exceeds(market: Inputs, detector: Outliers) -> None:
    assert outliers.outlier_rate(detector, market[:15_000]) == pytest.approx(0.001, abs=1e-4)
    later = outliers.outlier_rate(detector, market[15_000:])
    assert later is not None
    assert later < 0.02
    assert outliers.outlier_rate(detector, market[:0]) is None


def test_one_row_gives_the_bits_of_many(market: Inputs, detector: Outliers) -> None:
    many = outliers.distances(detector, market[:2_000])
    assert [outliers.distance(detector, market[i : i + 1]) for i in range(2_000)] == many.tolist()
    # Through the manifest's JSON and back.
    again = msgspec.json.decode(msgspec.json.encode(detector), type=Outliers)
    assert again == detector


def test_it_is_a_mahalanobis_distance_where_nothing_is_robust_about_it() -> None:
    rng = np.random.default_rng(2)
    mixed = rng.standard_normal((50_000, 11)) @ rng.standard_normal((11, 11))
    x = mixed.astype(np.float32)
    found = outliers.fit_outliers(x, SCALE_FREE_V1)
    assert found is not None
    values = x[:, :7].astype(np.float64)
    inverse = np.linalg.inv(np.cov(values.T))
    centred = values - np.median(values, axis=0)
    oracle = np.einsum("ij,jk,ik->i", centred, inverse, centred)
    np.testing.assert_allclose(outliers.distances(found, x), oracle, rtol=0.05)


def test_what_is_far_out_in_any_direction_is_known(market: Inputs, detector: Outliers) -> None:
    typical = np.median(market, axis=0)[None].astype(np.float32)
    assert not outliers.is_outlier(detector, typical)
    for i in range(7):
        glitch = typical.copy()
        glitch[0, i] = 100.0  # where inputs are cut off
        assert outliers.is_outlier(detector, glitch), SCALE_FREE_V1.inputs[i]
    for i in range(7, 11):  # the time says nothing
        other = typical.copy()
        other[0, i] = -1.0
        assert outliers.distance(detector, other) == outliers.distance(detector, typical)
    assert outliers.is_outlier(detector, np.full((1, 11), np.nan, np.float32))


def test_outliers_in_training_do_not_hide_others(market: Inputs, detector: Outliers) -> None:
    marred = market[:15_000].copy()
    rows = np.random.default_rng(3).choice(15_000, 10, replace=False)  # a price a thousandfold, ten times
    marred[rows, :7] = 90.0
    found = outliers.fit_outliers(marred, SCALE_FREE_V1)
    assert found is not None
    assert found.limit < 3 * detector.limit
    assert outliers.distances(found, marred[rows]).min() > 10 * found.limit


@given(st.integers(0, 10_000))
def test_a_series_that_does_not_move_has_no_detector_or_one_that_takes_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    flat = np.zeros((200, 11), dtype=np.float32)
    assert outliers.fit_outliers(flat, SCALE_FREE_V1) is None
    flat[:, rng.integers(0, 7)] = rng.standard_normal(200) * (rng.random(200) < 0.3)  # most of it one value
    found = outliers.fit_outliers(flat, SCALE_FREE_V1)
    assert found is not None
    assert not outliers.is_outlier(found, np.zeros((1, 11), np.float32))
    assert outliers.fit_outliers(flat[:0], SCALE_FREE_V1) is None


def test_a_row_is_judged_in_microseconds(market: Inputs, detector: Outliers) -> None:
    rows = [market[i : i + 1] for i in range(2_000)]
    best = 1.0
    for _ in range(5):
        start = time.perf_counter()
        for row in rows:
            outliers.is_outlier(detector, row)
        best = min(best, (time.perf_counter() - start) / len(rows))
    assert best < 50e-6, f"{best * 1e6:.1f} µs"
    print(f"{best * 1e6:.1f} µs")
