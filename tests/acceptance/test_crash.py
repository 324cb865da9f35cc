"""SIGKILL in the middle of a replay, of everything and of each part: nothing is lost, doubled or other than undisturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.core.files import decode_lines, read_bars
from actors.core.series import SeriesState, append
from actors.core.serving import features_hash, signal_id
from deploy.server import free_port
from schema.messages import Candle, FeatureRow
from tests.acceptance.conftest import Make
from tests.builders import LIVE
from tests.servers import wait_until
from tests.system import MARKET, System, cut

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]

FEATURES = ("close", "volume", "spread", "rsi", "macd", "macd_signal", "macd_hist", "atr", "ma60", "ret_1", "fwd_ret_5")
BLOCKS = 15_000  # bars of a replay that comes in blocks of 1,000
ONE_BY_ONE = 800  # bars of a replay that comes bar by bar
FILE = "EURUSD_M1_202502.csv"


def undisturbed(file: Path, symbol: str, timeframe: str) -> list[FeatureRow]:
    """The rows of the pure core over the whole file at once."""
    with file.open("rb") as stream:
        bars: list[Candle] = [bar for chunk in read_bars(decode_lines(iter(stream))) for bar in chunk]
    return append(SeriesState(symbol, timeframe), bars, LIVE).rows


def check_whole(system: System, file: Path, symbol: str, timeframe: str) -> None:
    """The archive and the stream hold what an undisturbed run would have left, bit by bit and once."""
    want = undisturbed(file, symbol, timeframe)
    count = len(want)
    assert system.counts(symbol) == {"market_data": count, "features": count, "model_signals": count}
    rows: list[Any] = system.fetch("SELECT * FROM features WHERE symbol = $1 ORDER BY ts", symbol)
    names = ("ts", *FEATURES, "bar", "ready")
    assert [tuple(row[n] for n in names) for row in rows] == [tuple(getattr(r, n) for n in names) for r in want]
    candles = system.fetch("SELECT * FROM market_data WHERE symbol = $1 ORDER BY ts", symbol)
    names = ("ts", "open", "high", "low", "close", "volume", "spread", "revision")
    assert [tuple(row[n] for n in names) for row in candles] == [tuple(getattr(r, n) for n in names) for r in want]
    ids = [signal_id(symbol, timeframe, r.ts, None, features_hash(symbol, timeframe, r)) for r in want]
    stored = system.fetch("SELECT id FROM model_signals WHERE symbol = $1 ORDER BY ts", symbol)
    assert [row["id"] for row in stored] == ids
    streamed = [s.id for s in system.streamed_signals(symbol, timeframe)]
    assert len(streamed) == len(set(streamed)) == count
    assert sorted(streamed) == sorted(ids)
    assert not system.fetch("SELECT ts FROM candle_revisions WHERE symbol = $1", symbol)


def test_everything_is_killed_twice_in_the_middle_of_a_replay(make: Make, data: Path, tmp_path: Path) -> None:
    file, symbol = cut(data / "GBPUSD_M1_201202.csv", tmp_path / "blocks.csv", 0, BLOCKS), "GBPUSD"
    # The port stays, so that the terminal finds the gateway again, as an EA would.
    system = make(*MARKET, MT5_GATEWAY_PORT=str(free_port()))
    system.start()
    with system.running("replay", str(file), "--symbol", symbol, "--timeframe", "M1", "--speed", "0") as replay:
        for messages in (3, 8):
            system.await_candles(symbol, "M1", messages)
            system.kill()
            assert replay.poll() is None, "the replay was over before the kill"
            system.start()
        out, error = replay.communicate(timeout=120)
        assert replay.returncode == 0, error
        assert "0 rejected" in out
    system.settle()
    check_whole(system, file, symbol, "M1")
    before = system.contents(symbol)
    system.replay(file, symbol, "M1", "--speed", "0")
    system.settle()
    assert system.contents(symbol) == before


@pytest.mark.parametrize("victim", ["hot", "recorder", "trainer", "scorer", "nats-server", "postgres"])
def test_one_part_is_killed_twice_while_bars_come_one_by_one(
    system: System, data: Path, tmp_path: Path, victim: str
) -> None:
    file, symbol = cut(data / FILE, tmp_path / "live.csv", 0, ONE_BY_ONE), f"KILL.{victim}"
    words = ("replay", str(file), "--symbol", symbol, "--timeframe", "M1", "--speed", "100000")
    with system.running(*words) as replay:
        for messages in (ONE_BY_ONE // 4, ONE_BY_ONE // 2):
            system.await_candles(symbol, "M1", messages)
            dead = system.child(victim)
            dead.kill()
            assert replay.poll() is None, "the replay was over before the kill"
            wait_until(lambda pid=dead.pid: comes_back(system, victim, pid), 30, f"{victim} is started again")
        out, error = replay.communicate(timeout=120)
        assert replay.returncode == 0, error
        assert "0 rejected" in out
    system.settle()
    check_whole(system, file, symbol, "M1")


def comes_back(system: System, name: str, dead: int) -> bool:
    try:
        return system.child(name).pid != dead
    except (LookupError, psutil.NoSuchProcess):
        return False
