"""The HTTP surface in parts: the collector makes :class:`GatewayDeps`, adds POST /ingest, and serves the rest from here."""

from __future__ import annotations

from functools import partial
from typing import Final

import msgspec
from aiohttp import web
from aiohttp.typedefs import Middleware

from actors.gateway import openapi, pages
from actors.gateway.auth import SESSION_PATH
from actors.gateway.deps import GatewayDeps
from actors.gateway.gaps import Gaps
from actors.gateway.problems import JSON, problems, server_logger
from actors.gateway.reads import Reads
from actors.gateway.stream import SignalStream
from bus.supervise import VERSION

KEEPALIVE: Final = 75.0  # seconds a connection may be idle, and that a request's headers may take
LINGER: Final = 2.0  # seconds that an early answer waits for the rest of the body, so that the sender reads the answer
STOP_WAIT: Final = 2.0  # seconds that running requests have at the stop

__all__ = ["GatewayDeps", "application", "middlewares", "routes", "runner"]


def routes(deps: GatewayDeps) -> list[web.RouteDef]:
    """Every route but POST /ingest."""
    document = msgspec.json.encode(openapi.document(deps.settings.gateway, VERSION))
    return [
        *Reads(deps).routes(),
        *Gaps(deps).routes(),
        # A HEAD of an endless stream would never end.
        web.get("/signals/stream", SignalStream(deps).handle, allow_head=False),
        web.get("/openapi.json", partial(_serve_document, document)),
        web.post(SESSION_PATH, deps.guard.open_session),
        web.delete(SESSION_PATH, deps.guard.close_session),
        *pages.routes(),
    ]


def middlewares(deps: GatewayDeps) -> list[Middleware]:
    """Outermost first: errors into sentences, then who asks."""
    return [problems, deps.guard.middleware]


def application(deps: GatewayDeps) -> web.Application:
    """The application without POST /ingest; open streams end as soon as it shuts down."""
    app = web.Application(middlewares=middlewares(deps), client_max_size=deps.settings.gateway.max_body)
    app.add_routes(routes(deps))

    async def end_streams(_: web.Application) -> None:
        await deps.broadcaster.close()

    app.on_shutdown.append(end_streams)
    return app


def runner(app: web.Application) -> web.AppRunner:
    """The server as the parts expect it: packed bodies are left to body.py, which bounds them."""
    return web.AppRunner(
        app,
        auto_decompress=False,
        keepalive_timeout=KEEPALIVE,
        lingering_time=LINGER,
        shutdown_timeout=STOP_WAIT,
        access_log=None,
        logger=server_logger(),
        handle_signals=False,
    )


async def _serve_document(document: bytes, _: web.Request) -> web.StreamResponse:
    return web.Response(body=document, content_type=JSON, headers={"Cache-Control": "no-cache"})
