from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import structs

from actors.core.inputs import FEATURE_SETS, SCALE_FREE_V1, FeatureColumns
from schema.messages import FeatureRow
from tests import oracles_ml

ROW = FeatureRow(
    ts=datetime(2024, 1, 3, 14, 7, tzinfo=UTC),
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
NEEDED = ("rsi", "macd", "macd_signal", "macd_hist", "atr", "ma60", "ret_1")


def columns_of(rows: list[FeatureRow]) -> FeatureColumns:
    def column(name: str) -> np.ndarray:
        return np.array([math.nan if (v := getattr(r, name)) is None else v for r in rows], dtype=np.float64)

    ts = np.array([int(r.ts.timestamp()) for r in rows], dtype=np.int64)
    return FeatureColumns(ts, *(column(name) for name in FeatureColumns._fields[1:]))


def assert_same(rows: list[FeatureRow]) -> None:
    x, usable = SCALE_FREE_V1.of_columns(columns_of(rows))
    assert x.dtype == np.float32
    for i, row in enumerate(rows):
        one = SCALE_FREE_V1.of_row(row)
        assert (one is not None) == usable[i]
        if one is not None:
            assert one.shape == (1, len(SCALE_FREE_V1.inputs))
            assert one.dtype == np.float32
            assert np.isfinite(one).all()
            assert one[0].tobytes() == x[i].tobytes(), (row, one[0], x[i])


value = st.none() | st.floats() | st.floats(-1e-3, 1e-3) | st.sampled_from([0.0, -0.0, 5e-324, 1e-300, 1e300])


@given(
    st.floats() | st.floats(1e-5, 1e5),
    st.none() | st.floats(0, 100) | st.sampled_from([math.nan, math.inf]),
    st.lists(value, min_size=6, max_size=6),
    st.integers(0, 4_000_000_000),
)
@example(1.1, 50.0, [1e-4, 1e-4, 0.0, 0.0, 1.1, 0.0], 0)
@example(1.1, 50.0, [1e300, 1e-4, 0.0, 5e-324, 1.1, 0.0], 0)
def test_row_and_columns_agree_to_the_bit(close: float, rsi: float | None, rest: list[float | None], ts: int) -> None:
    macd, signal, hist, atr, ma60, ret = rest
    row = structs.replace(
        ROW,
        ts=datetime.fromtimestamp(ts, UTC),
        close=close,
        rsi=rsi,
        macd=macd,
        macd_signal=signal,
        macd_hist=hist,
        atr=atr,
        ma60=ma60,
        ret_1=ret,
    )
    assert_same([row, ROW])


def test_row_and_columns_agree_on_a_market() -> None:
    rows = oracles_ml.feature_rows(oracles_ml.random_walk(2_000, seed=3))
    assert_same([row for row in rows if row.ready])


def test_any_price_scale_gives_the_same_inputs() -> None:
    x = SCALE_FREE_V1.of_row(ROW)
    for factor in (2.0**-12, 2.0**12):  # powers of two scale without rounding
        scaled = structs.replace(
            ROW, **{n: getattr(ROW, n) * factor for n in ("close", "macd", "macd_signal", "macd_hist", "atr", "ma60")}
        )
        y = SCALE_FREE_V1.of_row(scaled)
        assert x is not None
        assert y is not None
        assert x.tobytes() == y.tobytes()


def test_values_are_what_their_names_say() -> None:
    x = SCALE_FREE_V1.of_row(ROW)
    assert x is not None
    got = dict(zip(SCALE_FREE_V1.inputs, x[0].tolist(), strict=True))
    assert got["rsi_centred"] == pytest.approx(0.22)
    assert got["macd_atr"] == pytest.approx(1.0)
    assert got["ma60_distance_atr"] == pytest.approx(3.5)
    assert got["return_atr"] == pytest.approx(0.55)
    assert got["atr_close"] == pytest.approx(2e-4 / 1.1)
    week, day = 2 * 1_440 + 14 * 60 + 7, 14 * 60 + 7  # a Wednesday
    assert got["week_sin"] == pytest.approx(math.sin(2 * math.pi * week / 10_080))
    assert got["day_cos"] == pytest.approx(math.cos(2 * math.pi * day / 1_440))


def test_a_flat_market_says_nothing_but_the_time() -> None:
    flat = structs.replace(ROW, atr=0.0, rsi=0.0, macd=0.0, macd_signal=0.0, macd_hist=0.0, ret_1=0.0, ma60=1.1)
    x = SCALE_FREE_V1.of_row(flat)
    assert x is not None
    assert x[0, :7].tolist() == [0.0] * 7
    assert np.abs(x[0, 7:]).sum() > 0
    assert_same([flat])


def test_not_ready_or_incomplete_rows_have_no_inputs() -> None:
    assert SCALE_FREE_V1.of_row(structs.replace(ROW, ready=False)) is None
    for name in NEEDED:
        for missing in (None, math.nan, math.inf):
            assert SCALE_FREE_V1.of_row(structs.replace(ROW, **{name: missing})) is None
    for close in (0.0, -37.6, math.nan, math.inf):
        assert SCALE_FREE_V1.of_row(structs.replace(ROW, close=close)) is None


def test_spread_volume_and_the_future_do_not_enter() -> None:
    x = SCALE_FREE_V1.of_row(ROW)
    other = structs.replace(ROW, spread=99.0, volume=1.0, fwd_ret_5=0.5, revision=3)
    y = SCALE_FREE_V1.of_row(other)
    assert x is not None
    assert y is not None
    assert x.tobytes() == y.tobytes()


def test_the_zone_of_a_time_does_not_matter() -> None:
    x = SCALE_FREE_V1.of_row(ROW)
    y = SCALE_FREE_V1.of_row(structs.replace(ROW, ts=ROW.ts.astimezone(timezone(timedelta(hours=7)))))
    assert x is not None
    assert y is not None
    assert x.tobytes() == y.tobytes()


def test_sets_are_registered_by_name() -> None:
    assert FEATURE_SETS["scale_free_v1"] is SCALE_FREE_V1
    assert len(set(SCALE_FREE_V1.inputs)) == len(SCALE_FREE_V1.inputs)
