"""Whose work it is where two run: one works, the other takes over within ten seconds, and a late riser changes nothing."""

from __future__ import annotations

import asyncio
import time
from typing import ClassVar

import pytest

from bus.client import Bus
from bus.ownership import PIN_SECONDS, Ownership, OwnershipLost
from bus.permissions import OPERATOR
from bus.supervise import Context, run_actors
from deploy.embedded import NatsServer
from schema.settings import Settings

TAKE_OVER_SECONDS = 10.0


async def connection(nats_url: str) -> Bus:
    return await Bus.connect(nats_url, name=OPERATOR)


async def test_the_first_has_it_at_once_and_the_second_waits(bus: Bus, nats_url: str) -> None:
    other = await connection(nats_url)
    first, second = Ownership(bus, "features"), Ownership(other, "features")
    began = time.monotonic()
    await first.acquire()
    assert time.monotonic() - began < 1.0
    holding = asyncio.create_task(first.hold())
    standby = asyncio.Event()
    waiting = asyncio.create_task(second.acquire(standby.set))
    async with asyncio.timeout(TAKE_OVER_SECONDS):
        await standby.wait()
    assert not waiting.done() and not holding.done()
    holding.cancel()
    await asyncio.gather(holding, return_exceptions=True)
    began = time.monotonic()
    await first.release()
    await waiting  # handed on, not timed out
    assert time.monotonic() - began < 1.5
    await other.close()


async def test_a_silent_owner_is_replaced_and_learns_of_it(bus: Bus, nats_url: str) -> None:
    other = await connection(nats_url)
    first, second = Ownership(bus, "recorder"), Ownership(other, "recorder")
    await first.acquire()  # and never pulls again, as a stopped process
    began = time.monotonic()
    async with asyncio.timeout(TAKE_OVER_SECONDS):
        await second.acquire()
    assert 1.0 < time.monotonic() - began < TAKE_OVER_SECONDS
    holding = asyncio.create_task(second.hold())
    with pytest.raises(OwnershipLost):
        async with asyncio.timeout(20):
            await first.hold()
    assert not holding.done()
    holding.cancel()
    await asyncio.gather(holding, return_exceptions=True)
    await other.close()


async def test_a_restarted_server_takes_nothing_away(bus: Bus, nats: NatsServer) -> None:
    only = Ownership(bus, "emitter")
    await only.acquire()
    holding = asyncio.create_task(only.hold())
    for _ in range(2):
        nats.stop()
        nats.start()
        async with asyncio.timeout(20):
            while not (bus.connected and await only_pulls(only)):
                await asyncio.sleep(0.05)
    assert not holding.done()
    holding.cancel()
    await asyncio.gather(holding, return_exceptions=True)


async def test_a_process_too_busy_to_hear_of_the_token_keeps_its_work(bus: Bus) -> None:
    """Nobody else is there: losing the pin again and again is no reason to start again, which would make it busier."""
    only = Ownership(bus, "emitter")
    await only.acquire()
    holding = asyncio.create_task(only.hold())
    for _ in range(4):
        time.sleep(PIN_SECONDS + 0.5)  # the whole loop is blocked
        await asyncio.sleep(0.05)
    assert not holding.done()
    handed = only.handed
    async with asyncio.timeout(10):
        while only.handed == handed:
            await asyncio.sleep(0.05)
    holding.cancel()
    await asyncio.gather(holding, return_exceptions=True)


async def only_pulls(ownership: Ownership) -> bool:
    """Whether it has been handed the token since the question was asked."""
    before = ownership.handed
    await asyncio.sleep(0.5)
    return ownership.handed > before


class Worker:
    """An owned actor that says when it works."""

    name: ClassVar[str] = "features"
    description: ClassVar[str] = "works"
    owned: ClassVar[bool] = True
    working: ClassVar[list[int]] = []

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    async def run(self) -> None:
        self.ctx.ready()
        Worker.working.append(id(self))
        try:
            await asyncio.Event().wait()
        finally:
            Worker.working.remove(id(self))


async def test_of_two_supervised_actors_one_works_and_both_are_ready(bus: Bus, nats_url: str) -> None:
    ready, stops = [asyncio.Event(), asyncio.Event()], [asyncio.Event(), asyncio.Event()]
    runs = [
        asyncio.create_task(
            run_actors(
                [Worker],
                Settings(),
                nats_urls={"features": nats_url},
                database_url=None,
                on_ready=lambda _, r=r: r.set(),
                stop=s,
            )
        )
        for r, s in zip(ready, stops, strict=True)
    ]
    async with asyncio.timeout(20):
        await asyncio.gather(*(r.wait() for r in ready))
    (first,) = Worker.working
    stops[0].set()
    stops[1].set()
    await asyncio.gather(*runs)
    assert Worker.working == []
    assert first
