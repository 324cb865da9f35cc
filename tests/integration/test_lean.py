"""What a process reads before it works: no library whose features nobody here uses, and no feature is lost by that."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.server import free_port
from tests.servers import OPERATOR, nats_server, python

ACTORS = ("features", "emitter", "trainer", "recorder", "scorer", "backup")


def said(code: str) -> str:
    """What a process of its own prints; it must end well."""
    process = python(code)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


@pytest.mark.parametrize("actor", ACTORS)
def test_an_actor_reads_neither_a_web_client_nor_a_terminals_library(actor: str) -> None:
    code = f"import runner, bus, sys; from commands.up import actor_class; actor_class({actor!r}); print(*sys.modules)"
    loaded = set(said(code).split())
    assert {"nats.aio.transport", "structlog.dev"} <= loaded
    assert not loaded & {"aiohttp", "rich"}


def test_whoever_wants_them_gets_them() -> None:
    code = """
import bus.client, structlog
import aiohttp, rich
from nats.aio import transport
assert aiohttp.ClientSession and rich.print and transport.aiohttp is None and structlog.dev.rich is None
import inspect
print(len(inspect.getsource(transport)))
"""
    assert int(said(code)) > 1_000


def test_what_is_there_already_stays() -> None:
    code = "import aiohttp, bus.client\nfrom nats.aio import transport\nassert transport.aiohttp is aiohttp"
    said(code)


def test_a_server_can_be_reached_by_websocket(server_folder: Path) -> None:
    """As through a proxy that passes nothing else."""
    port = free_port()
    with nats_server(server_folder, extra=f'websocket {{ host: "127.0.0.1", port: {port}, no_tls: true }}'):
        code = f"""
import asyncio
from bus.client import Bus
async def main():
    bus = await Bus.connect("ws://{OPERATOR.name}:{OPERATOR.password}@127.0.0.1:{port}", name="operator")
    print((await bus.js.account_info()).streams)
    await bus.close()
asyncio.run(main())
"""
        assert said(code).strip() == "0"
