"""An hour without PostgreSQL at a hundred series: signals go on as before, and what waits is archived within a minute."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from bus.consume import Reader
from bus.subjects import SIGNALS
from deploy.server import free_port
from tests.servers import OPERATOR, nats_server, postgres_server
from tests.system import System
from tests.torture.feed import BAR, BEGIN
from tests.torture.rig import TALLIES, Given, Tally

SERIES = 100
WARM_BARS = 5  # of each series, before anything is measured
BEFORE_BARS = 25
HOUR_BARS = 60
POSTS_A_SECOND = 150.0
SLOWER = 1.5
DRAIN_SECONDS = 60.0


async def latencies(system: System, first: int, bars: int) -> list[float]:
    """Posts so many bars of every series, evenly in time; seconds from each POST to its signal on NATS."""
    began: dict[tuple[str, int], float] = {}
    took: list[float] = []
    async with system.bus() as bus, aiohttp.ClientSession() as http:
        start = (await bus.js.stream_info(str(SIGNALS.stream))).state.last_seq + 1

        async def listen() -> None:
            async with Reader(bus, SIGNALS, name="latencies", start=start) as reader:
                while len(took) < SERIES * bars:
                    message = (await reader.next()).message
                    key = (message.symbol, int(message.ts.timestamp()))
                    if key in began:
                        took.append(time.perf_counter() - began.pop(key))

        listening = asyncio.create_task(listen())
        url = system.ready["gateway"] + "/ingest"
        posting: set[asyncio.Task[None]] = set()

        async def post(symbol: str, ts: int) -> None:
            candle = {"time": ts, "open": 1.1, "high": 1.2, "low": 1.0, "close": 1.1 + ts % 7 / 1e4, "volume": 5}
            body = {"symbol": symbol, "timeframe": "M1", "replay": True, "gmt_time": ts + BAR, "candles": [candle]}
            began[symbol, ts] = time.perf_counter()
            async with http.post(url, json=body) as answer:
                assert answer.status == 200, await answer.text()

        due = time.perf_counter()
        for bar in range(first, first + bars):
            for n in range(SERIES):
                due += 1 / POSTS_A_SECOND
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                task = asyncio.create_task(post(f"H{n}", BEGIN + bar * BAR))
                posting.add(task)
                task.add_done_callback(posting.discard)
        await asyncio.gather(*posting)
        async with asyncio.timeout(60):
            await listening
    return took


@pytest.mark.torture
@pytest.mark.timeout(600)
def test_an_hour_without_postgres_at_a_hundred_series(tmp_path: Path, torture_seed: int) -> None:
    tally = Tally("an hour without PostgreSQL, 100 series", torture_seed)
    TALLIES.append(tally)
    began = time.monotonic()
    with nats_server(tmp_path / "nats") as nats, postgres_server(tmp_path / "postgres") as postgres:
        urls = {"MT5_NATS_URL": nats.url(OPERATOR), "MT5_DATABASE_URL": postgres.url}
        system = Given(tmp_path, {**urls, "MT5_GATEWAY_PORT": str(free_port())})  # snapshots as they are by default
        system.nats_url, system.database_url = urls["MT5_NATS_URL"], urls["MT5_DATABASE_URL"]
        try:
            system.start()
            asyncio.run(latencies(system, 0, WARM_BARS))
            before = asyncio.run(latencies(system, WARM_BARS, BEFORE_BARS))
            postgres.stop()
            without = asyncio.run(latencies(system, WARM_BARS + BEFORE_BARS, HOUR_BARS))
            postgres.start()
            back = time.monotonic()
            bars = WARM_BARS + BEFORE_BARS + HOUR_BARS
            wanted = {"market_data": bars, "features": bars, "model_signals": bars}
            while any(system.counts(f"H{n}") != wanted for n in range(SERIES)):
                assert time.monotonic() - back < DRAIN_SECONDS, "the backlog is not drained"
            drained = time.monotonic() - back
        finally:
            system.end()
            tally.seconds = time.monotonic() - began
    tally.acknowledged = SERIES * (WARM_BARS + BEFORE_BARS + HOUR_BARS)
    p50 = [float(np.percentile(figures, 50)) * 1e3 for figures in (before, without)]
    p99 = [float(np.percentile(figures, 99)) * 1e3 for figures in (before, without)]
    tally.done["hour without PostgreSQL"] += 1
    tally.notes += [
        f"POST → signal p50 {p50[0]:.1f} → {p50[1]:.1f} ms, p99 {p99[0]:.1f} → {p99[1]:.1f} ms",
        f"drained in {drained:.1f} s",
    ]
    assert p99[1] < SLOWER * p99[0], tally.notes
