"""What an actor parked is kept whole and can be tried again: it comes out as if it had never failed, and once."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.core.series import SeriesState, append
from actors.emitter import Emitter
from actors.features import Features
from bus.client import Bus
from bus.consume import park
from bus.store import Store
from bus.subjects import CANDLES, FEATURES, REJECTS, SIGNALS
from schema.messages import FeatureBlock
from tests.builders import LIVE, block, final_rows, put, read_until, running, walk
from tests.servers import ROOT

pytestmark = pytest.mark.timeout(90)
Mt5 = Callable[..., Any]


@pytest.fixture
def mt5(nats_url: str, pg_url: str, tmp_path: Path) -> Mt5:
    async def run(*words: str) -> subprocess.CompletedProcess[str]:
        env = {"PYTHONPATH": str(ROOT), "MT5_HOME": str(tmp_path / "var"), "PATH": "/usr/bin:/bin"}
        env |= {"MT5_NATS_URL": nats_url, "MT5_DATABASE_URL": pg_url}
        command = [sys.executable, "-m", "runner", "rejects", *words]
        return await asyncio.to_thread(
            subprocess.run, command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
        )

    return run


async def left(bus: Bus) -> int:
    return int((await bus.js.stream_info(str(REJECTS.stream))).state.messages)


async def test_candles_that_features_parked_go_through_the_log_again(bus: Bus, nats_url: str, mt5: Mt5) -> None:
    rows = walk(80)
    async with running(Features, nats_url=nats_url):
        await put(bus, rows[:40])
        await put(bus, rows[50:])  # ten are missing: their message was parked
        await park(bus, "features", "candles.M1.EURUSD", CANDLES.encode(block(rows[40:50])), {}, "failed 3 times")
        done = await mt5("replay", "--seq", "1", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["parked"] == 1
        blocks = await read_until(bus, FEATURES, lambda found: len(final_rows(found)) == 80)
    want = append(SeriesState("EURUSD", "M1"), rows, LIVE).rows
    assert [(r.ts, r.rsi, r.bar) for _, r in sorted(final_rows(blocks).items())] == [(r.ts, r.rsi, r.bar) for r in want]
    assert await left(bus) == 0
    assert (await mt5("replay", "--seq", "1")).returncode == 1  # nothing is left to replay


def features_of(rows: Any, seq: int) -> FeatureBlock:
    made = append(SeriesState("EURUSD", "M1"), rows, LIVE).rows
    source = block(rows)
    return FeatureBlock(
        symbol="EURUSD",
        timeframe="M1",
        candles_seq=seq,
        rows=tuple(made),
        received_at=source.received_at,
        replay=True,
    )


async def test_features_that_the_emitter_parked_become_signals_once(bus: Bus, nats_url: str, mt5: Mt5) -> None:
    parked = FEATURES.encode(features_of(walk(3), 5))
    async with running(Features, Emitter, nats_url=nats_url):
        await put(bus, walk(2, seed=2), symbol="OTHER")
        await read_until(bus, SIGNALS, lambda found: len(found) == 2)
        await park(bus, "emitter", "features.M1.EURUSD", parked, {}, "failed 3 times")
        done = await mt5("replay", "--seq", "1")
        assert done.returncode == 0, done.stderr
        made = await read_until(bus, SIGNALS, lambda found: len(found) == 5)
        assert [s.candles_seq for s in made if s.symbol == "EURUSD"] == [5, 5, 5]
    async with running(Features, Emitter, nats_url=nats_url):  # reads on where it was, and says nothing twice
        await put(bus, walk(3, seed=2)[2:], symbol="OTHER")
        made = await read_until(bus, SIGNALS, lambda found: len(found) == 6)
    assert len({s.id for s in made}) == 6
    assert await left(bus) == 0


async def test_features_that_the_recorder_parked_are_archived_once(bus: Bus, pg_url: str, mt5: Mt5) -> None:
    parked = FEATURES.encode(features_of(walk(3), 5))
    await park(bus, "recorder", "features.M1.EURUSD", parked, {}, "the archive refused it: a disk quota")
    for _ in range(2):
        await mt5("replay", "--reason", "quota")
    store = await Store.connect(pg_url)
    try:
        assert await store.pool.fetchval("SELECT count(*) FROM market_data WHERE symbol = 'EURUSD'") == 3
        assert await store.pool.fetchval("SELECT count(*) FROM features_m1 WHERE symbol = 'EURUSD'") == 3
    finally:
        await store.close()
    assert await left(bus) == 0


async def test_what_cannot_be_repeated_stays_and_says_why(bus: Bus, mt5: Mt5) -> None:
    await park(bus, "features", "candles.M1.EURUSD", b"no json", {}, "cannot be decoded")
    done = await mt5("replay", "--seq", "1")
    assert done.returncode == 1
    assert done.stderr == (
        "mt5: 1, parked by features, stays: it is no message of candles (Expected `object`, got `str`).\n"
    )
    assert await left(bus) == 1
