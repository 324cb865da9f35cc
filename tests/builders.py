"""Small makers of candles and series, and running actors, for tests."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from nats.js.errors import NotFoundError

from actors.core.series import Origin
from bus.client import Bus, outgoing
from bus.consume import Delivery, Reader
from bus.subjects import CANDLES, Channel
from bus.supervise import Actor, run_actors
from schema.messages import Candle, CandleBlock, FeatureRow
from schema.settings import Models, Settings

_COUNT = itertools.count()
PUBLIC_KEY_FILE = Path(__file__).parent / "keys" / "models.pub"  # of tests/models.py
TRUSTING = Settings(models=Models(public_key=str(PUBLIC_KEY_FILE)))  # settings that take what tests sign
LIVE = Origin("", None, True, True, "utc", 1)  # a live terminal without a name
START = 1_735_776_000  # 2025-01-02T00:00:00Z


def walk(count: int, *, seed: int = 1, start: int = START, step: int = 60, gaps: float = 0.0) -> list[Candle]:
    """A random walk of ``count`` bars around 1.1; ``gaps`` is the share of bars that are missing."""
    # A generator a column: a longer walk begins with the shorter one.
    moves, highs, lows, volumes, spreads, holes = (np.random.default_rng((seed, i)) for i in range(6))
    close = np.round(1.1 + np.cumsum(moves.normal(0, 1e-4, count)), 5)
    opened = np.concatenate((close[:1], close[:-1]))
    high = np.round(np.maximum(opened, close) + np.abs(highs.normal(0, 5e-5, count)), 5)
    low = np.round(np.minimum(opened, close) - np.abs(lows.normal(0, 5e-5, count)), 5)
    volume = volumes.integers(1, 200, count)
    spread = spreads.integers(1, 20, count)
    keep = holes.random(count) >= gaps
    return [
        Candle(
            ts=datetime.fromtimestamp(start + i * step, UTC),
            open=float(opened[i]),
            high=float(high[i]),
            low=float(low[i]),
            close=float(close[i]),
            volume=float(volume[i]),
            spread=float(spread[i]),
        )
        for i in range(count)
        if keep[i]
    ]


def block(rows: Sequence[Candle], *, symbol: str = "EURUSD", timeframe: str = "M1", **more: Any) -> CandleBlock:
    beside: dict[str, Any] = {"replay": True, "received_at": datetime.now(UTC)}
    return CandleBlock(symbol=symbol, timeframe=timeframe, rows=tuple(rows), **(beside | more))


async def put(bus: Bus, rows: Sequence[Candle], *, size: int = 1_000, **more: Any) -> int:
    """Publishes rows as blocks on CANDLES; returns the last stream sequence."""
    messages = []
    for start in range(0, len(rows), size):
        message = block(rows[start : start + size], **more)
        messages.append(
            outgoing(CANDLES, message, message.timeframe, message.symbol, msg_id=f"{id(rows)}-{next(_COUNT)}")
        )
    return int((await bus.publish_many(messages))[-1].seq)


@contextlib.asynccontextmanager
async def running(
    *actors: type[Actor], nats_url: str, database_url: str | None = None, settings: Settings | None = None
) -> AsyncIterator[None]:
    """Runs actors in this loop; ready inside, stopped (drained) at the end."""
    stop = asyncio.Event()
    waiting = {actor.name for actor in actors}
    ready = asyncio.Event()

    def on_ready(name: str) -> None:
        waiting.discard(name)
        if not waiting:
            ready.set()

    task = asyncio.create_task(
        run_actors(
            actors,
            settings or TRUSTING,
            nats_urls={actor.name: nats_url for actor in actors},
            database_url=database_url,
            on_ready=on_ready,
            stop=stop,
        )
    )
    waiter = asyncio.create_task(ready.wait())
    try:
        async with asyncio.timeout(20):
            await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            raise AssertionError("actors ended before they were ready")
        yield
    finally:
        waiter.cancel()
        stop.set()
        async with asyncio.timeout(15):
            await asyncio.gather(task, return_exceptions=True)


async def read_until(
    bus: Bus, channel: Channel[Any], enough: Callable[[list[Any]], bool], *, start: int = 1, seconds: float = 30.0
) -> list[Any]:
    """Messages of a stream from ``start`` on until ``enough`` says so."""
    out: list[Any] = []
    async with (
        asyncio.timeout(seconds),
        Reader(bus, channel, name=f"test-{channel.prefix}-{id(out)}", start=start) as reader,
    ):
        while not enough(out):
            out.append((await reader.next()).message)
    return out


async def kept(bus: Bus, channel: Channel[Any]) -> list[Delivery[Any]]:
    """All that a channel's stream holds of it now, with headers and sequences."""
    try:
        last = (await bus.js.get_last_msg(str(channel.stream), channel.wildcard)).seq or 0
    except NotFoundError:
        return []
    out: list[Delivery[Any]] = []
    async with asyncio.timeout(30), Reader(bus, channel, name=f"test-kept-{id(out)}", start=1) as reader:
        while not out or out[-1].stream_seq < last:
            out.append(await reader.next())
    return out


def final_rows(blocks: Sequence[Any]) -> dict[datetime, FeatureRow]:
    """What an archive would hold after these FeatureBlocks: the last version of each row, labels filled."""
    import msgspec

    rows: dict[datetime, FeatureRow] = {}
    for message in blocks:
        for row in message.rows:
            rows[row.ts] = row
        for fill in message.fills:
            rows[fill.ts] = msgspec.structs.replace(rows[fill.ts], fwd_ret_5=fill.fwd_ret_5)
    return rows
