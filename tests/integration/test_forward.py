"""A CANDLES stream that went backwards: refused with a way out, which works; one made anew counts on by itself."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bus.client import Bus
from bus.forward import reach
from bus.subjects import FEATURES
from schema.messages import FeatureBlock
from tests.builders import put, walk
from tests.system import MARKET, System
from tests.torture.feed import BAR

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def post(system: System, first: int, count: int) -> None:
    for row in walk(first + count)[first:]:
        ts = int(row.ts.timestamp())
        candle = {
            "time": ts,
            "open": row.open,
            "high": row.high,
            "low": row.low,
            "close": row.close,
            "volume": row.volume,
        }
        document: dict[str, Any] = {"symbol": "EURUSD", "timeframe": "M1", "replay": True, "gmt_time": ts + BAR}
        assert system.post({**document, "candles": [candle]})["accepted"] == 1


def streams(system: System) -> Path:
    return system.home / "nats" / "jetstream" / "$G" / "streams"


def test_an_older_store_is_refused_and_forward_is_the_way_out(tmp_path: Path) -> None:
    system = System(tmp_path, {"MT5_FEATURES_SNAPSHOT_SECONDS": "0.2"}, MARKET)
    try:
        system.start()
        post(system, 0, 20)
        system.settle()
        system.stop()
        shutil.copytree(streams(system) / "CANDLES", tmp_path / "older")
        system.start()
        post(system, 20, 20)
        system.settle()
        system.stop()
        shutil.rmtree(streams(system) / "CANDLES")
        shutil.copytree(tmp_path / "older", streams(system) / "CANDLES")

        refused = system.mt5("up")
        assert refused.returncode == 1
        assert len(refused.stderr.strip().splitlines()[-1:]) == 1
        assert "CANDLES ends at 21, but candles up to 42 were read from it" in refused.stderr
        assert "mt5 topology forward" in refused.stderr
        assert "Traceback" not in refused.stderr

        moved = system.mt5("topology", "forward", "--json")  # starts the servers for itself
        assert moved.returncode == 0, moved.stderr
        assert json.loads(moved.stdout) == {"forward": True, "was": 21, "known": 42, "next": 43, "not_archived": 0}
        again = system.mt5("topology", "forward")
        assert "there is nothing to do" in again.stdout

        system.start()
        post(system, 40, 10)
        system.settle()
        assert system.counts("EURUSD") == {"market_data": 50, "features": 50, "model_signals": 50}
        bars = [row["bar"] for row in system.fetch("SELECT bar FROM features WHERE symbol = 'EURUSD' ORDER BY ts")]
        assert bars == list(range(1, 51))
    finally:
        system.end()


async def test_a_stream_that_grows_while_it_is_asked_went_nowhere(bus: Bus) -> None:
    """A second `up` beside a live feed: each candle is read, and its signal is there, while the questions are asked."""
    rows, asked = walk(600), asyncio.Event()

    async def live() -> None:
        for row in rows:
            seq = await put(bus, [row])
            features = FeatureBlock(symbol="EURUSD", timeframe="M1", candles_seq=seq, rows=(), received_at=row.ts)
            await bus.publish(FEATURES, features, "M1", "EURUSD", msg_id=f"f{seq}")
            if asked.is_set():
                return

    feed = asyncio.create_task(live(), name="live")
    found = [await reach(bus, None) for _ in range(60)]
    assert not feed.done(), "the stream has to grow all the while"
    asked.set()
    await feed
    assert len({one.last for one in found}) > 20
    assert [one for one in found if one.backwards] == []


def test_a_lost_nats_store_counts_on_behind_the_archive(tmp_path: Path) -> None:
    """The disk of nats-server is gone, the archive is not: corrections of what it holds must not be refused as old."""
    system = System(tmp_path, {}, MARKET)
    try:
        system.start()
        post(system, 0, 30)
        system.settle()
        system.stop()
        shutil.rmtree(system.home / "nats")
        system.start()
        post(system, 30, 10)
        (row,) = walk(30)[29:]
        ts = int(row.ts.timestamp())
        changed = {
            "time": ts,
            "open": row.open,
            "high": row.high + 1e-5,
            "low": row.low,
            "close": row.close,
            "volume": 7,
        }
        system.post(
            {"symbol": "EURUSD", "timeframe": "M1", "replay": True, "gmt_time": ts + 60 * BAR, "candles": [changed]}
        )
        system.settle()
        assert system.counts("EURUSD")["market_data"] == 40
        (found,) = system.fetch("SELECT volume, revision FROM market_data WHERE symbol = 'EURUSD' AND ts = $1", row.ts)
        assert tuple(found) == (7.0, 1)
        bars = [r["bar"] for r in system.fetch("SELECT bar FROM features WHERE symbol = 'EURUSD' ORDER BY ts")]
        assert bars == list(range(1, 41))
    finally:
        system.end()
