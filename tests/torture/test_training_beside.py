"""Training on fifty thousand rows beside a live feed: signals come as fast as they did before."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from bus.consume import Reader
from bus.subjects import SIGNALS
from tests.builders import walk
from tests.system import MARKET, System
from tests.torture.rig import TALLIES, Tally

SYMBOLS = ("EURUSD", "GBPUSD")
ROWS = 25_400  # of each symbol: fifty thousand rows that are ready and labelled, and some bars before and after them
POSTS_A_SECOND = 20.0
IDLE_POSTS = 400
SLOWER = 1.5


async def latencies(system: System, first: int, going: Callable[[int], bool]) -> list[float]:
    """Posts live bars of the first symbol, evenly in time, while ``going(posted)``; seconds from POST to signal."""
    rows = walk(first + 6_000)
    began: dict[int, float] = {}
    took: list[float] = []
    async with system.bus() as bus, aiohttp.ClientSession() as http:
        start = (await bus.js.stream_info(str(SIGNALS.stream))).state.last_seq + 1

        async def listen() -> None:
            async with Reader(bus, SIGNALS, name="latencies", start=start) as reader:
                while True:
                    ts = int((await reader.next()).message.ts.timestamp())
                    took.append(time.perf_counter() - began.pop(ts))

        listening = asyncio.create_task(listen(), name="listen")
        url, due, posted = system.ready["gateway"] + "/ingest", time.perf_counter(), 0
        while going(posted):
            row = rows[first + posted]
            due += 1 / POSTS_A_SECOND
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            ts = int(row.ts.timestamp())
            began[ts] = time.perf_counter()
            async with http.post(url, json=payload(SYMBOLS[0], first + posted, 1, rows)) as answer:
                assert answer.status == 200, await answer.text()
            posted += 1
        async with asyncio.timeout(30):
            while began and not listening.done():
                await asyncio.sleep(0.01)
        listening.cancel()
    return took


def payload(symbol: str, first: int, count: int, rows: list, history: bool = False) -> dict[str, object]:  # type: ignore[type-arg]
    chosen = rows[first : first + count]
    candles = [
        {
            "time": int(row.ts.timestamp()),
            "open": row.open,
            "high": row.high,
            "low": row.low,
            "close": row.close,
            "volume": row.volume,
        }
        for row in chosen
    ]
    now = {"history": True} if history else {"replay": True, "gmt_time": candles[-1]["time"] + 60}
    return {"symbol": symbol, "timeframe": "M1", **now, "candles": candles}


@pytest.mark.torture
@pytest.mark.timeout(900)
def test_a_training_on_fifty_thousand_rows_leaves_signals_as_fast(tmp_path: Path, torture_seed: int) -> None:
    tally = Tally("a training on 50,000 rows beside a live feed", torture_seed)
    TALLIES.append(tally)
    began = time.monotonic()
    system = System(tmp_path, {}, MARKET)
    try:
        system.start()
        rows = walk(ROWS)
        for symbol in SYMBOLS:
            for first in range(0, ROWS, 1_000):
                system.post(payload(symbol, first, min(1_000, ROWS - first), rows, history=True))
        system.settle()
        asyncio.run(latencies(system, ROWS, lambda posted: posted < 100))  # warms everything up
        idle = asyncio.run(latencies(system, ROWS + 100, lambda posted: posted < IDLE_POSTS))
        with system.running("train", "--timeframe", "M1", "--json") as training:
            beside = asyncio.run(
                latencies(system, ROWS + 100 + IDLE_POSTS, lambda posted: training.poll() is None and posted < 5_000)
            )
            said, wrong = training.communicate(timeout=300)
        verdict = json.loads(said or "{}")
        assert verdict.get("ok") is True, said + wrong
        assert verdict["rows"] >= 50_000 * 0.98  # ties are dropped
    finally:
        system.end()
        tally.seconds = time.monotonic() - began
    assert len(beside) >= IDLE_POSTS, "the training was over too soon to say anything"
    p50 = [float(np.percentile(figures, 50)) * 1e3 for figures in (idle, beside)]
    p99 = [float(np.percentile(figures, 99)) * 1e3 for figures in (idle, beside)]
    tally.acknowledged = len(SYMBOLS) * ROWS + 100 + len(idle) + len(beside)
    tally.done["training"] += 1
    tally.notes.append(
        f"POST → signal p50 {p50[0]:.1f} → {p50[1]:.1f} ms, p99 {p99[0]:.1f} → {p99[1]:.1f} ms, {len(beside)} posts beside it"
    )
    assert p99[1] < SLOWER * p99[0], tally.notes
