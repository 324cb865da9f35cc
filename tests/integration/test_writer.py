"""The one writer of a stream: in order, once, and refused where somebody else has written."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import pytest
from nats.errors import Error as NatsError

from bus.client import Bus, BusUnavailable, Outgoing
from bus.writer import ATOMIC_FROM, ATOMIC_MOST, Superseded, Writer
from deploy.embedded import NatsServer
from tests.servers import wait_until

STREAM = "FEATURES"
FEW, MANY = ATOMIC_FROM - 1, 3 * ATOMIC_FROM


def messages(*numbers: int, subjects: int = 1) -> list[Outgoing]:
    return [Outgoing(f"features.M1.S{n % subjects}", f"{n}".encode(), f"id{n}", STREAM) for n in numbers]


async def stored(bus: Bus) -> list[int]:
    state = (await bus.js.stream_info(STREAM)).state
    return [await number_at(bus, seq) for seq in range(1, state.last_seq + 1)]


async def number_at(bus: Bus, seq: int) -> int:
    """Asks again where a busy machine's answer comes late: what is tested is what is stored."""
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(NatsError, TimeoutError):
                return int((await bus.js.get_msg(STREAM, seq)).data or b"")


async def writer(bus: Bus) -> Writer:
    return Writer(bus, STREAM, (await bus.js.stream_info(STREAM)).state.last_seq)


@pytest.mark.parametrize("count", [1, FEW, MANY, 2 * ATOMIC_MOST + 7])
@pytest.mark.parametrize("subjects", [1, 5])
async def test_everything_is_stored_once_and_in_order(bus: Bus, count: int, subjects: int) -> None:
    out = await writer(bus)
    await out.publish(messages(*range(count), subjects=subjects))
    await out.publish(messages(count, subjects=subjects))
    assert await stored(bus) == list(range(count + 1))


@pytest.mark.parametrize("count", [1, FEW, MANY])
async def test_what_is_stored_already_is_not_stored_twice(bus: Bus, count: int) -> None:
    """A batch whose acknowledgement was lost is sent again by the same writer."""
    out = await writer(bus)
    await out.publish(messages(*range(count), subjects=3))
    fresh = await writer(bus)
    fresh._end = 0  # as it was before the messages whose acknowledgement never came
    assert await fresh._settle(messages(*range(count + 2), subjects=3)) == messages(count, count + 1, subjects=3)
    assert await stored(bus) == list(range(count))


@pytest.mark.parametrize("count", [1, MANY])
async def test_a_writer_that_wakes_up_late_is_refused(bus: Bus, count: int) -> None:
    zombie = await writer(bus)
    await zombie.publish(messages(0, 1, subjects=2))
    owner = await writer(bus)
    await owner.publish(messages(2, 3, subjects=2))
    with pytest.raises(Superseded):
        await zombie.publish(messages(*range(10, 10 + count), subjects=2))
    assert await stored(bus) == [0, 1, 2, 3]
    await owner.publish(messages(4, 5, subjects=2))
    assert await stored(bus) == [0, 1, 2, 3, 4, 5]


async def test_a_subject_met_for_the_first_time_must_be_as_it_was_at_the_start(bus: Bus) -> None:
    zombie = await writer(bus)
    await (await writer(bus)).publish(messages(0))
    with pytest.raises(Superseded, match="another process"):
        await zombie.publish(messages(1))
    assert await stored(bus) == [0]


@pytest.mark.parametrize("count", [1, MANY])
async def test_two_writers_at_once_never_double_or_interleave_a_subject(bus: Bus, count: int) -> None:
    """Both work on the same messages, as two owners of one series would: one of them writes all, the other nothing more."""
    writers = [await writer(bus), await writer(bus)]

    async def work(one: Writer) -> str:
        try:
            for lo in range(0, 10 * count, count):
                await one.publish(messages(*range(lo, lo + count)))
        except Superseded:
            return "refused"
        return "done"

    # The messages of both are the same, as are their ids: whoever finds its own stored already goes on behind it.
    assert "done" in await asyncio.gather(*map(work, writers))
    assert await stored(bus) == list(range(10 * count))


async def test_an_expired_subject_is_written_on(bus: Bus) -> None:
    out = await writer(bus)
    await out.publish(messages(0))
    await bus.js.purge_stream(STREAM)  # as when everything of it is older than the stream keeps
    await out.publish(messages(1))
    state = (await bus.js.stream_info(STREAM)).state
    assert (state.messages, state.last_seq) == (1, 2)


async def test_a_lost_tail_is_noticed(bus: Bus) -> None:
    out = await writer(bus)
    await out.publish(messages(0, 1))
    await bus.js.delete_msg(STREAM, 2)
    with pytest.raises(Superseded, match="tail"):
        await out.publish(messages(2))


async def test_a_killed_server_costs_nothing(bus: Bus, nats: NatsServer) -> None:
    out = await writer(bus)

    async def work() -> None:
        for lo in range(0, 2_000, 40):
            await out.publish(messages(*range(lo, lo + 40), subjects=4))
            await out.publish(messages(*range(10_000 + lo, 10_000 + lo + 4), subjects=4))

    task = asyncio.create_task(work())
    for round_ in range(1, 4):
        async with asyncio.timeout(30):
            while await last_seq(bus) < round_ * 300:
                await asyncio.sleep(0)
        assert nats.pid is not None
        assert not task.done()
        os.kill(nats.pid, signal.SIGKILL)
        wait_until(lambda: nats.pid is None, 5, "the kill")
        nats.start()
        async with asyncio.timeout(20):
            while bus.nc.stats["reconnects"] < round_:  # for a moment the dead connection still calls itself connected
                await asyncio.sleep(0.01)
    async with asyncio.timeout(60):
        await task
    wanted = [n for lo in range(0, 2_000, 40) for n in (*range(lo, lo + 40), *range(10_000 + lo, 10_000 + lo + 4))]
    assert await stored(bus) == wanted


@pytest.mark.parametrize("count", [1, MANY])
async def test_a_publish_that_was_cancelled_leaves_its_writer_whole(bus: Bus, count: int) -> None:
    """Stopped between the sending and the acknowledgement: what it stored is its own, not another process's."""
    out = await writer(bus)
    await out.publish(messages(0))
    for round_ in range(1, 20):
        task = asyncio.create_task(out.publish(messages(*range(1_000 * round_, 1_000 * round_ + count))))
        for _ in range(round_):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await out.publish(messages(round_))
    found = await stored(bus)
    assert [n for n in found if n < 1_000] == list(range(20))
    assert len(found) == len(set(found))


@pytest.mark.parametrize("count", [1, MANY])
async def test_what_the_stream_lost_is_stored_again_although_its_id_is_known(bus: Bus, count: int) -> None:
    await (await writer(bus)).publish(messages(*range(count), subjects=2))
    for seq in range(1, count + 1):
        await bus.js.delete_msg(STREAM, seq)
    async with asyncio.timeout(20):
        await (await writer(bus)).publish(messages(*range(count + 1), subjects=2))
    state = (await bus.js.stream_info(STREAM)).state
    data = [int((await bus.js.get_msg(STREAM, seq)).data or b"") for seq in range(state.first_seq, state.last_seq + 1)]
    assert data == list(range(count + 1))


async def last_seq(bus: Bus) -> int:
    with contextlib.suppress(
        NatsError, TimeoutError
    ):  # a request that was under way when the server died has no answer
        return (await bus.js.stream_info(STREAM)).state.last_seq
    return 0


async def test_it_gives_up_after_its_budget(bus: Bus, nats: NatsServer) -> None:
    out = await writer(bus)
    await out.publish(messages(0))
    nats.stop()
    for count in (1, MANY):
        with pytest.raises(BusUnavailable, match=f"{count} messages"):
            await out.publish(messages(*range(1, 1 + count)), budget=0.5)
