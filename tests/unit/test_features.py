"""Indicators against TA-Lib on every prefix, blocks against single bars, and state through JSON, all bit by bit."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import talib
from hypothesis import given
from hypothesis import strategies as st

from actors.core.features import READY_AFTER, Columns, FeatureState, forward_returns
from actors.core.files import decode_lines, read_bars
from actors.core.series import SeriesState, append, split
from schema.messages import Candle
from tests.builders import LIVE, walk

NAMES = Columns.__struct_fields__


def arrays(rows: list[Candle]) -> tuple[np.ndarray, ...]:
    ts = np.array([int(r.ts.timestamp()) for r in rows], np.int64)
    return ts, *(np.array([getattr(r, name) for r in rows]) for name in ("high", "low", "close"))


def oracle(rows: list[Candle]) -> dict[str, np.ndarray]:
    _, high, low, close = arrays(rows)
    macd, signal, hist = talib.MACD(close, 12, 26, 9)
    return {
        "rsi": talib.RSI(close, 14),
        "macd": macd,
        "macd_signal": signal,
        "macd_hist": hist,
        "atr": talib.ATR(high, low, close, 14),
        "ma60": talib.SMA(close, 60),
        "ret_1": talib.ROCP(close, 1),
    }


def compare(columns: Columns, expected: dict[str, np.ndarray]) -> None:
    for name in NAMES:
        found = np.array([np.nan if v is None else v for v in getattr(columns, name)])
        want = expected[name]
        assert (np.isnan(found) == np.isnan(want)).all(), f"{name} begins elsewhere than TA-Lib's"
        np.testing.assert_allclose(found, want, rtol=1e-9, atol=0, err_msg=name)


def columns_of(state: FeatureState, rows: list[Candle], sizes: list[int]) -> Columns:
    """Blocks of the given sizes, in a circle; size 1 goes the single-candle way."""
    out = Columns(*([] for _ in NAMES))
    at, turn = 0, 0
    while at < len(rows):
        size = sizes[turn % len(sizes)]
        part = rows[at : at + size]
        if size == 1:
            ts, row = int(part[0].ts.timestamp()), part[0]
            for name, value in zip(NAMES, state.update(ts, row.high, row.low, row.close), strict=True):
                getattr(out, name).append(value)
        else:
            block = state.update_block(*arrays(part))
            for name in NAMES:
                getattr(out, name).extend(getattr(block, name))
        at += size
        turn += 1
    return out


FILES = [("EURUSD_M1_202502.csv", "M1"), ("GBPUSD_M1_201202.csv", "M1"), ("US30m_H1_202401.csv", "H1")]


@pytest.mark.parametrize(("name", "timeframe"), FILES)
def test_real_files_equal_talib_over_the_whole_history(data: Path, name: str, timeframe: str) -> None:
    with (data / name).open("rb") as file:
        rows = [bar for chunk in read_bars(decode_lines(iter(file))) for bar in chunk]
    expected = oracle(rows)
    compare(columns_of(FeatureState(), rows, [1_000]), expected)
    compare(columns_of(FeatureState(), rows, [1]), expected)


@pytest.mark.parametrize("length", [1, 2, 14, 15, 16, 25, 26, 27, 33, 34, 35, 59, 60, 61, 120, 121, 300])
def test_every_first_bar_is_talibs(length: int) -> None:
    rows = walk(length)
    compare(columns_of(FeatureState(), rows, [1]), oracle(rows))
    compare(columns_of(FeatureState(), rows, [length + 1]), oracle(rows))


def flat(count: int) -> list[Candle]:
    return [msgspec.structs.replace(r, open=1.5, high=1.5, low=1.5, close=1.5) for r in walk(count)]


def test_flat_and_extreme_prices() -> None:
    compare(columns_of(FeatureState(), flat(200), [1, 7]), oracle(flat(200)))
    wild = [
        msgspec.structs.replace(r, open=p, high=p * 1.5, low=p / 1.5, close=p)
        for r, p in zip(walk(300), np.geomspace(1e-8, 1e9, 300).tolist(), strict=True)
    ]
    compare(columns_of(FeatureState(), wild, [1]), oracle(wild))
    assert columns_of(FeatureState(), wild, [1]) == columns_of(FeatureState(), wild, [64])


def test_returns_are_null_where_the_base_is_not_positive() -> None:
    rows = [
        msgspec.structs.replace(r, open=p, high=p + 1, low=p - 1, close=p)
        for r, p in zip(walk(100), [5.0, -3.0, 0.0, 2.0] * 25, strict=True)
    ]
    for sizes in ([1], [100], [61, 39]):
        ret = columns_of(FeatureState(), rows, sizes).ret_1
        assert ret[:5] == [None, -1.6, None, None, 1.5]
        assert ret[-4:] == [1.5, -1.6, None, None]


@given(
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=12),
    count=st.integers(1, 400),
    restart=st.integers(0, 400),
    seed=st.integers(0, 50),
    gaps=st.sampled_from([0.0, 0.2]),
)
def test_any_split_and_any_restart_is_bit_identical(
    sizes: list[int], count: int, restart: int, seed: int, gaps: float
) -> None:
    rows = walk(count, seed=seed, gaps=gaps)
    whole = append(SeriesState("X", "M1"), rows, LIVE) if rows else None
    state = SeriesState("X", "M1")
    made: dict[object, object] = {}
    at, turn = 0, 0
    while at < len(rows):
        size = sizes[turn % len(sizes)]
        fresh, older = split(state, rows[at : at + size], LIVE)
        assert not older
        change = append(state, fresh, LIVE)
        made |= {row.ts: row for row in change.rows}
        for fill in change.fills:
            made[fill.ts] = msgspec.structs.replace(made[fill.ts], fwd_ret_5=fill.fwd_ret_5)
        if at <= restart < at + size:
            state = msgspec.json.decode(msgspec.json.encode(state), type=SeriesState)
        at += size
        turn += 1
    assert list(made.values()) == (whole.rows if whole else [])


@given(count=st.integers(1, 60), cut=st.integers(0, 60), gaps=st.sampled_from([0.0, 0.5, 0.8]), seed=st.integers(0, 20))
def test_labels_are_the_fifth_following_close(count: int, cut: int, gaps: float, seed: int) -> None:
    rows = walk(count, seed=seed, gaps=gaps)
    ts, _, _, close = arrays(rows)
    expected: list[float | None] = []
    for i in range(len(rows)):
        j = i + 5
        known = j < len(rows) and ts[j] - ts[i] <= 600
        expected.append((close[j] - close[i]) / close[i] if known else None)
    cut = min(cut, len(rows))
    before = slice(max(0, cut - 5), cut)
    fills, own = forward_returns(ts[cut:], close[cut:], ts[before].tolist(), close[before].tolist(), 600)
    found = expected[: max(0, cut - 5)] + [None] * (cut - max(0, cut - 5)) + own
    for when, value in fills:
        found[ts.tolist().index(when)] = value
    _, head = forward_returns(ts[:cut], close[:cut], [], [], 600)
    for i, value in enumerate(head):
        found[i] = value if value is not None else found[i]
    assert found == expected


def test_a_row_is_ready_after_300_bars() -> None:
    rows = append(SeriesState("X", "M1"), walk(400), LIVE).rows
    assert next(row.bar for row in rows if row.ready) == READY_AFTER == 300


def test_a_block_costs_a_fraction_of_single_steps() -> None:
    rows = walk(20_000)
    ts, high, low, close = arrays(rows)

    def single() -> float:
        state = FeatureState()
        steps = list(zip(ts.tolist(), high.tolist(), low.tolist(), close.tolist(), strict=True))
        begin = time.process_time()
        for step in steps:
            state.update(*step)
        return time.process_time() - begin

    def blocks() -> float:
        state = FeatureState()
        begin = time.process_time()
        for at in range(0, len(ts), 1_000):
            state.update_block(*(column[at : at + 1_000] for column in (ts, high, low, close)))
        return time.process_time() - begin

    many, few = [], []
    for _ in range(15):  # in turns, so that a busy moment meets both
        many.append(blocks())
        few.append(single())
        if min(many) * 2 < min(few):
            break
    assert min(many) * 2 < min(few)
