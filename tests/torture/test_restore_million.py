"""A million rows are back within two minutes: fetched, every hash checked, restored, compared, and in place."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from tests.system import System

pytestmark = [pytest.mark.torture, pytest.mark.timeout(900)]

ROWS = 1_000_000
SECONDS = 120.0


def test_a_million_rows_are_restored_within_two_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    system = System(tmp_path, {"MT5_BACKUP_TARGET": str(tmp_path / "elsewhere")})
    try:
        system.start("up", "recorder")
        # Half of them bars, half of them their features: the widest tables, and those that grow.
        system.fetch(
            f"""INSERT INTO market_data (ts, symbol, timeframe, open, high, low, close, volume, spread, real_volume, revision,
                       source, ts_source, received_at, candles_seq, live)
                SELECT timestamptz '2024-01-01' + i * interval '1 minute', 'S' || i % 20, 'M1', 1 + random(), 3, 0.5,
                       1 + random(), i % 500, i % 20, 0, 0, 'Broker-Demo', 'utc', now(), i, true
                FROM generate_series(1, {ROWS // 2}) i"""
        )
        system.fetch(
            f"""INSERT INTO features (ts, symbol, timeframe, close, volume, spread, rsi, macd, macd_signal, macd_hist, atr, ma60,
                       ret_1, fwd_ret_5, ready, bar, candle_revision, candles_seq, fwd_seq)
                SELECT timestamptz '2024-01-01' + i * interval '1 minute', 'S' || i % 20, 'M1', 1 + random(), i % 500, i % 20,
                       100 * random(), random(), random(), random(), random(), random(), random(), random(), true, i, 0, i, i
                FROM generate_series(1, {ROWS // 2}) i"""
        )
        made = system.mt5("backup", "run", "--json", timeout=600)
        assert made.returncode == 0, made.stderr
        system.stop()
        shutil.rmtree(system.home)
        began = time.monotonic()
        restored = system.mt5("backup", "restore", "latest", "--json", timeout=600)
        seconds = time.monotonic() - began
        assert restored.returncode == 0, restored.stderr
        said = json.loads(restored.stdout)
        with capsys.disabled():
            print(f"\n{said['rows']:,} rows restored in {seconds:.1f} s {said['parts']}; made: {made.stdout.strip()}")
        assert said["rows"] >= ROWS
        assert seconds < SECONDS
        system.start("up", "recorder")
        (count,) = system.fetch("SELECT (SELECT count(*) FROM market_data) + (SELECT count(*) FROM features) AS rows")
        assert count["rows"] == ROWS
    finally:
        system.end()
