"""Real files through the whole system: the archive holds the files' values, TA-Lib's features, and no repeat changes it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import talib

from schema.timeframes import SECONDS
from tests.acceptance.conftest import Make
from tests.system import MARKET, Bar, System, read_file

pytestmark = pytest.mark.timeout(300)

FILES = [
    ("EURUSD_M1_202502.csv", "EURUSD", "M1", 9_999),
    ("GBPUSD_M1_201202.csv", "GBPUSD", "M1", 30_117),
    ("US30m_H1_202401.csv", "US30m", "H1", 9_890),
]
CANDLE = ("ts", "open", "high", "low", "close", "volume", "spread")
INDICATORS = ("rsi", "macd", "macd_signal", "macd_hist", "atr", "ma60", "ret_1", "fwd_ret_5")


def oracle(bars: list[Bar], timeframe: str) -> dict[str, np.ndarray]:
    """TA-Lib over the whole file; NaN where there is no value."""
    high, low, close = (np.array([getattr(b, name) for b in bars]) for name in ("high", "low", "close"))
    macd, macd_signal, macd_hist = talib.MACD(close, 12, 26, 9)
    ahead = np.append(talib.ROCP(close, 5)[5:], [np.nan] * 5)
    span = timedelta(seconds=10 * SECONDS[timeframe])
    for i in range(len(bars) - 5):
        if bars[i + 5].ts - bars[i].ts > span:
            ahead[i] = np.nan
    return {
        "rsi": talib.RSI(close, 14),
        "macd": macd,
        "macd_signal": macd_signal,
        "macd_hist": macd_hist,
        "atr": talib.ATR(high, low, close, 14),
        "ma60": talib.SMA(close, 60),
        "ret_1": talib.ROCP(close, 1),
        "fwd_ret_5": ahead,
    }


def compare_features(rows: list[Any], bars: list[Bar], timeframe: str) -> None:
    for name, want in oracle(bars, timeframe).items():
        found = np.array([np.nan if row[name] is None else row[name] for row in rows])
        assert (np.isnan(found) == np.isnan(want)).all(), f"{name} has values elsewhere than TA-Lib"
        np.testing.assert_allclose(found, want, rtol=1e-9, atol=0, err_msg=name)


@pytest.mark.parametrize(
    ("name", "symbol", "timeframe", "count"),
    [FILES[0], pytest.param(*FILES[1], marks=pytest.mark.torture), FILES[2]],
)
def test_a_file_is_archived_whole_with_talibs_features_and_a_repeat_changes_nothing(
    system: System, data: Path, name: str, symbol: str, timeframe: str, count: int
) -> None:
    bars = read_file(data / name)
    assert len(bars) == count
    said = system.replay(data / name, symbol, timeframe, "--speed", "0")
    assert (said["received"], said["accepted"], said["rejected"]) == (count, count, 0)
    system.settle()
    assert system.counts(symbol) == {"market_data": count, "features": count, "model_signals": count}
    candles = system.fetch(
        "SELECT * FROM market_data WHERE symbol = $1 AND timeframe = $2 ORDER BY ts", symbol, timeframe
    )
    assert [tuple(row[c] for c in CANDLE) for row in candles] == [tuple(getattr(b, c) for c in CANDLE) for b in bars]
    assert {row["revision"] for row in candles} == {0}
    rows = system.fetch(f"SELECT * FROM features_{timeframe.lower()} WHERE symbol = $1 ORDER BY ts", symbol)
    assert [(row["ts"], row["close"], row["volume"], row["spread"]) for row in rows] == [
        (b.ts, b.close, b.volume, b.spread) for b in bars
    ]
    compare_features(rows, bars, timeframe)
    assert [row["ready"] for row in rows] == [i >= 299 for i in range(count)]
    signals = system.fetch("SELECT ts, abstain FROM model_signals WHERE symbol = $1 ORDER BY ts", symbol)
    assert [row["ts"] for row in signals] == [b.ts for b in bars]
    assert [row["abstain"] for row in signals] == ["warming" if i < 299 else "no_model" for i in range(count)]
    before = system.contents(symbol)
    again = system.replay(data / name, symbol, timeframe, "--speed", "0")
    assert again["rejected"] == again["forming"] == 0
    system.settle()
    assert system.contents(symbol) == before
    assert system.fetch("SELECT count(*) AS n FROM candle_revisions WHERE symbol = $1", symbol)[0]["n"] == 0


def test_a_repeat_after_a_restart_changes_nothing_either(make: Make, data: Path) -> None:
    # A restarted collector knows the newest bars only: what it takes a second time has no effect further on.
    name, symbol, timeframe, count = FILES[2]
    system = make(*MARKET)
    system.start()
    system.replay(data / name, symbol, timeframe)
    system.settle()
    before, signals = system.contents(symbol), system.streamed_signals(symbol, timeframe)
    assert len(signals) == count
    system.stop()
    system.start()
    again = system.replay(data / name, symbol, timeframe)
    assert again["accepted"] + again["duplicates"] == count
    system.replay(data / name, symbol, timeframe, "--history")
    system.settle()
    assert system.contents(symbol) == before
    assert system.streamed_signals(symbol, timeframe) == signals
    assert "Traceback" not in system.logs()


def test_get_candles_and_features_answer_from_the_archive(system: System, data: Path) -> None:
    name, symbol, timeframe, _ = FILES[0]
    bars = read_file(data / name)
    system.replay(data / name, symbol, timeframe)
    system.settle()
    series = f"symbol={symbol}&timeframe={timeframe}"
    span = f"from={bars[4_000].ts:%Y-%m-%dT%H:%M:%SZ}&to={bars[4_099].ts:%Y-%m-%dT%H:%M:%SZ}"
    candles = system.get(f"/candles?{series}&{span}")["candles"]
    assert [c["close"] for c in candles] == [b.close for b in bars[4_000:4_100]]
    features = system.get(f"/features?{series}&{span}")["features"]
    assert len(features) == 100
    assert [f["rsi"] for f in features] == [
        row["rsi"]
        for row in system.fetch(
            "SELECT rsi FROM features WHERE symbol = $1 AND ts BETWEEN $2 AND $3 ORDER BY ts",
            symbol,
            bars[4_000].ts,
            bars[4_099].ts,
        )
    ]
