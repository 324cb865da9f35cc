"""The gateway's parts behind a real socket, and signals to feed them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
from aiohttp import web

from actors import gateway as parts
from actors.core.recent import RecentSignals
from actors.gateway.answers import Check
from actors.gateway.auth import Guard
from actors.gateway.broadcast import Broadcaster
from bus.store import Store
from schema.messages import Signal
from schema.settings import Gateway, Settings

T0 = datetime(2025, 2, 3, 9, 30, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def signal(bar: int, *, symbol: str = "EURUSD", timeframe: str = "M1", seq: int | None = None, **more: Any) -> Signal:
    """The signal of the series' ``bar``-th minute; ``seq`` is its CANDLES sequence."""
    ts = T0 + bar * MINUTE
    fields: dict[str, Any] = {
        "id": f"{symbol}-{timeframe}-{bar}",
        "model_version": "v1",
        "threshold": 0.55,
        "prob_up": 0.51,
        "label": 0,
        "abstain": "unproven",
    }
    return Signal(
        ts=ts,
        symbol=symbol,
        timeframe=timeframe,
        model_name="rf_m1",
        candle_revision=0,
        candles_seq=bar + 1 if seq is None else seq,
        features_hash="00ff",
        created_at=ts + MINUTE,
        expires_at=ts + 2 * MINUTE,
        **(fields | more),
    )


@dataclass(frozen=True)
class Served:
    """A running gateway: its address, a client without a key, and the parts to steer it by."""

    host: str
    port: int
    client: aiohttp.ClientSession
    broadcaster: Broadcaster
    app_runner: web.AppRunner

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


async def _all_well() -> Mapping[str, Check]:
    return {"bus": Check(status="ok", detail="NATS is connected.")}


async def _nothing_kept(_after: int, _limit: int) -> Sequence[tuple[int, Signal]]:
    return ()


@contextlib.asynccontextmanager
async def served(
    *,
    settings: Gateway | None = None,
    store: Store | None = None,
    capacity: int = 1_000,
    ready: Callable[[], bool] = lambda: True,
    checks: Callable[[], Awaitable[Mapping[str, Check]]] = _all_well,
    signals_after: Callable[[int, int], Awaitable[Sequence[tuple[int, Signal]]]] = _nothing_kept,
    guard: Guard | None = None,
    more: Callable[[Guard], list[web.RouteDef]] = lambda _: [],
    caught_up: bool = True,
) -> AsyncIterator[Served]:
    """Serves the gateway on a free port of loopback, whatever host its settings name; ``more`` are routes beside."""
    settings = settings or Gateway()
    guard = guard or Guard(settings)
    broadcaster = Broadcaster(RecentSignals(capacity))
    if caught_up:
        broadcaster.caught_up()
    deps = parts.GatewayDeps(
        settings=Settings(gateway=settings),
        guard=guard,
        broadcaster=broadcaster,
        store=store,
        ready=ready,
        checks=checks,
        signals_after=signals_after,
    )
    app = parts.application(deps)
    app.add_routes(more(guard))
    runner = parts.runner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        async with aiohttp.ClientSession(f"http://{host}:{port}") as client:
            yield Served(host, port, client, broadcaster, runner)
    finally:
        await runner.cleanup()
