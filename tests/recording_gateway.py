"""A gateway that records what it is sent and answers as a test wants: a real HTTP server on a free port."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from aiohttp import web

from schema.messages import Candle

OPENS = datetime(2025, 6, 1, 22, tzinfo=UTC)  # a Sunday

Answer = Callable[[int, dict[str, Any]], web.Response]


def bars(count: int, start: datetime = OPENS) -> list[Candle]:
    return [
        Candle(ts=start + timedelta(minutes=i), open=1.0, high=2.0, low=0.5, close=1.5, volume=float(i + 1))
        for i in range(count)
    ]


def taken(body: dict[str, Any], **other: Any) -> web.Response:
    count = len(body["candles"])
    counts = {"received": count, "accepted": count, "duplicates": 0, "forming": 0, "rejected": [], "backfill": []}
    return web.json_response(counts | other)


class Gateway:
    """A server that records the bytes it gets; ``answer(n, body)`` answers the n-th request, counted from 0."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.answer: Answer = lambda n, body: taken(body)
        self.url = ""

    @property
    def payloads(self) -> list[dict[str, Any]]:
        return [json.loads(body) for body in self.bodies]

    async def ingest(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        return self.answer(len(self.bodies) - 1, json.loads(body))


@asynccontextmanager
async def serving(handler: Callable[[web.Request], Awaitable[web.Response]], port: int = 0) -> AsyncIterator[str]:
    app = web.Application(client_max_size=1 << 24)
    app.router.add_post("/ingest", handler)
    runner = web.AppRunner(app, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextmanager
def free_port() -> Iterator[int]:
    """A port that nothing listens on while the block lasts."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
