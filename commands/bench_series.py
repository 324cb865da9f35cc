"""Ten thousand series beside ten through a real ``up``: what a candle costs from POST to signal when many are live."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import aiohttp
import msgspec

from bus.client import Bus
from bus.subjects import SIGNALS
from commands.bench_chain import post
from commands.bench_core import MANY, SERIES
from commands.bench_figures import Figure, compare
from commands.bench_model import TIMEFRAME, candles
from commands.bench_system import Running
from commands.output import CommandError
from commands.places import CLIENT
from schema.messages import Candle

FEW: Final = 10
A_POST: Final = 10  # candles of a payload, each of another series
FIRST: Final = 500  # candles of a payload that brings series into being
PATIENCE: Final = 120.0


async def many_series(system: Running, rounds: int, count: int) -> list[Figure]:
    """``rounds`` pairs of ``count`` candles each; every series has been seen before the first of them."""
    many, few = _Terminal("MANY", MANY), _Terminal("FEW", FEW)
    at_many: list[float] = []
    at_few: list[float] = []
    bus = await Bus.connect(system.nats, name=CLIENT)
    try:
        async with aiohttp.ClientSession() as session, _counted(bus) as signals:
            await many.play(session, system.gateway, signals, MANY, FIRST)
            await few.play(session, system.gateway, signals, count)
            for _ in range(rounds):
                for terminal, costs in ((many, at_many), (few, at_few)):
                    costs.append(await terminal.play(session, system.gateway, signals, count))
    finally:
        await bus.close()
    what = "through every actor, a candle at 10,000 series"
    return [compare("series", what, "µs", at_many, "at 10 series", at_few, SERIES)]


class _Signals:
    """How many signals have come, and a way to wait for the rest."""

    def __init__(self) -> None:
        self.count = 0
        self._wanted = 0
        self._reached = asyncio.Event()

    async def take(self, _: Any) -> None:
        self.count += 1
        if self.count >= self._wanted:
            self._reached.set()

    async def reach(self, wanted: int) -> None:
        self._wanted = wanted
        self._reached.clear()
        if self.count < wanted:
            try:
                async with asyncio.timeout(PATIENCE):
                    await self._reached.wait()
            except TimeoutError:
                raise CommandError(f"{wanted - self.count} signals are missing after {PATIENCE:g} s.") from None


@asynccontextmanager
async def _counted(bus: Bus) -> AsyncIterator[_Signals]:
    signals = _Signals()
    subscription = await bus.nc.subscribe(SIGNALS.wildcard, cb=signals.take)
    await bus.nc.flush()
    yield signals
    await subscription.unsubscribe()


class _Terminal:
    """``count`` series that all get the same bars, one after the other."""

    def __init__(self, prefix: str, count: int) -> None:
        self._names = [f"{prefix}{i:05d}" for i in range(count)]
        self._bars: list[Candle] = candles(5_000)
        self._sent = 0

    async def play(
        self, session: aiohttp.ClientSession, gateway: str, signals: _Signals, count: int, size: int = A_POST
    ) -> float:
        """Posts so many candles, ``size`` a payload, and waits for their signals; microseconds a candle."""
        bodies = [self._body(size) for _ in range(0, count, size)]
        wanted = signals.count + len(bodies) * size
        started = time.perf_counter()
        # One after the other: bars of a series must not overtake each other.
        for body in bodies:
            await post(session, gateway, body)
        await signals.reach(wanted)
        return (time.perf_counter() - started) / (len(bodies) * size) * 1e6

    def _body(self, size: int) -> bytes:
        items = []
        for _ in range(size):
            name, bar = self._names[self._sent % len(self._names)], self._bars[self._sent // len(self._names)]
            self._sent += 1
            items.append(
                {
                    "ts": int(bar.ts.timestamp()),
                    "symbol": name,
                    "timeframe": TIMEFRAME,
                    "open": bar.open,
                    "high": bar.high,
                    "low": bar.low,
                    "close": bar.close,
                    "volume": bar.volume,
                }
            )
        return msgspec.json.encode({"items": items})
