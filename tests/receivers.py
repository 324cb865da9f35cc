"""A real HTTP server that keeps what it is sent and answers what a test has laid out."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass(frozen=True)
class Call:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    url: str = ""
    calls: list[Call] = field(default_factory=list)
    answers: list[web.Response] = field(default_factory=list)  # the next ones, then 200

    async def _take(self, request: web.Request) -> web.Response:
        self.calls.append(Call(request.method, request.path_qs, dict(request.headers), await request.read()))
        return self.answers.pop(0) if self.answers else web.json_response({"ok": True})

    def answer(self, status: int, body: Any = None, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.answers.append(web.json_response(body, status=status, headers=named))


@contextlib.asynccontextmanager
async def receiver(tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    made = Receiver()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", made._take)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        port = runner.addresses[0][1]
        made.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
        yield made
    finally:
        await runner.cleanup()
