"""A gateway for terminals to post to, what became of their candles, and a server in front that changes its answers."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import aiohttp
from aiohttp import web

from actors.collector import Collector
from bus.client import Bus
from bus.subjects import CANDLES
from deploy.server import free_port
from schema.messages import Candle, CandleBlock
from schema.settings import Gateway, Nats, Settings
from tests.builders import read_until, running

HEADERS = {"Content-Type": "application/json"}
START = 1_735_776_000  # 2025-01-02T00:00:00Z


def walk(count: int, *, seed: int = 1, start: int = START, step: int = 60) -> list[Candle]:
    """Bars that kept fixtures are made of: the same for ever, and a shorter walk is the start of a longer one."""
    rng = random.Random(seed)
    out, price = [], 110_000
    for i in range(count):
        close = price + rng.randint(-15, 15)
        high, low = max(price, close) + rng.randint(0, 8), min(price, close) - rng.randint(0, 8)
        out.append(
            Candle(
                ts=datetime.fromtimestamp(start + i * step, UTC),
                open=price / 100_000,
                high=high / 100_000,
                low=low / 100_000,
                close=close / 100_000,
                volume=float(rng.randint(1, 200)),
                spread=float(rng.randint(1, 20)),
            )
        )
        price = close
    return out


@contextlib.asynccontextmanager
async def gateway(nats_url: str, **limits: Any) -> AsyncIterator[str]:
    port = limits.pop("port", None) or free_port()
    settings = Settings(gateway=Gateway(port=port, **limits), nats=Nats(publish_timeout=1.0))
    async with running(Collector, nats_url=nats_url, settings=settings):
        yield f"http://127.0.0.1:{port}"


async def post(url: str, body: bytes) -> tuple[int, dict[str, Any]]:
    async with aiohttp.ClientSession() as http, http.post(f"{url}/ingest", data=body, headers=HEADERS) as response:
        return response.status, await response.json()


async def stored(bus: Bus) -> list[CandleBlock]:
    """Everything on CANDLES."""
    count = (await bus.js.stream_info(str(CANDLES.stream))).state.messages
    return await read_until(bus, CANDLES, lambda blocks: len(blocks) >= count, seconds=5)


async def archive(bus: Bus) -> dict[tuple[str, str], dict[datetime, Candle]]:
    """What the log holds: the newest version of each bar."""
    out: dict[tuple[str, str], dict[datetime, Candle]] = {}
    for block in await stored(bus):
        out.setdefault((block.symbol, block.timeframe), {}).update({row.ts: row for row in block.rows})
    return out


@contextlib.asynccontextmanager
async def front(url: str | None, adds: dict[str, Any]) -> AsyncIterator[str]:
    """A server in front of a gateway that adds to its answers; without a gateway it is a proxy's welcome page."""

    async def handle(request: web.Request) -> web.Response:
        if url is None:
            return web.Response(text="<html>Welcome</html>", content_type="text/html")
        status, body = await post(url, await request.read())
        return web.json_response(
            body | adds, status=status, dumps=lambda value: json.dumps(value, separators=(",", ":"))
        )

    app = web.Application(client_max_size=2**21)
    app.router.add_post("/ingest", handle)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()
