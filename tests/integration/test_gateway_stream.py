"""GET /signals/stream over real sockets: live, resumed, filtered, too slow, and at the stop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import msgspec
import pytest

from actors.gateway import broadcast
from actors.gateway import stream as stream_module
from actors.gateway.stream import BATCH
from bus.client import BusUnavailable
from schema.messages import Signal
from tests.gateway import Served, served, signal

DECODER = msgspec.json.Decoder(Signal)


@dataclass
class Event:
    """One event as a browser's EventSource would dispatch it, or only its new last event id."""

    name: str = "message"
    data: str = ""
    id: int | None = None

    @property
    def signal(self) -> Signal:
        return DECODER.decode(self.data)


@dataclass
class EventSource:
    """Reads an event stream as the HTML standard says."""

    response: aiohttp.ClientResponse
    last_id: int | None = None
    comments: list[str] = field(default_factory=list)

    async def blocks(self) -> AsyncIterator[Event]:
        event = Event()
        async for line in self.response.content:
            text = line.decode().rstrip("\n")
            if not text:
                yield event
                event = Event()
                continue
            name, _, value = text.partition(":")
            value = value.removeprefix(" ")
            if name == "id":
                self.last_id = event.id = int(value)
            elif name == "data":
                event.data += value
            elif name == "event":
                event.name = value
            elif not name:
                self.comments.append(value)

    async def take(self, count: int) -> list[Event]:
        """The next events that hold data."""
        events = []
        async for event in self.blocks():
            if event.data:
                events.append(event)
                if len(events) == count:
                    return events
        raise AssertionError(f"the stream ended after {len(events)} of {count} events")

    async def until_marked(self) -> int:
        """Returns once the stream has said where it begins."""
        async for event in self.blocks():
            if event.id is not None:
                return event.id
        raise AssertionError("the stream ended")


@asynccontextmanager
async def listening(running: Served, last_id: int | str | None = None, query: str = "") -> AsyncIterator[EventSource]:
    headers = {} if last_id is None else {"Last-Event-ID": str(last_id)}
    async with running.client.get(f"/signals/stream{query}", headers=headers) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        assert response.headers["Cache-Control"] == "no-store"
        yield EventSource(response)


class Log:
    """A SIGNALS stream as the bus would read it; ``first`` is what it still keeps."""

    def __init__(self, count: int, first: int = 1) -> None:
        self.items = [(seq, signal(seq)) for seq in range(1, count + 1)]
        self.first = first
        self.reads: list[tuple[int, int]] = []
        self.available = True

    async def after(self, seq: int, limit: int) -> Sequence[tuple[int, Signal]]:
        self.reads.append((seq, limit))
        if not self.available:
            raise BusUnavailable("NATS is not connected.")
        return [item for item in self.items if item[0] > max(seq, self.first - 1)][:limit]

    def fill(self, running: Served, last: int) -> None:
        """As a gateway starts: its ring takes the stream's tail."""
        ring = running.broadcaster.recent
        running.broadcaster.reset(max(0, len(self.items) - last))
        for item in self.items[-last:]:
            running.broadcaster.publish(*item)
        assert len(ring) == min(last, len(self.items))


async def test_signals_come_as_they_are_published_with_the_streams_sequences() -> None:
    async with served() as running, listening(running) as first, listening(running) as second:
        assert await first.until_marked() == await second.until_marked() == 0
        for seq in (1, 2, 5):
            running.broadcaster.publish(seq, signal(seq))
        for source in (first, second):
            events = await source.take(3)
            assert [(event.id, event.signal) for event in events] == [(seq, signal(seq)) for seq in (1, 2, 5)]
            assert {event.name for event in events} == {"message"}


async def test_a_new_client_gets_what_comes_and_nothing_old() -> None:
    async with served() as running:
        running.broadcaster.publish(1, signal(1))
        async with listening(running) as source:
            assert await source.until_marked() == 1
            running.broadcaster.publish(2, signal(2))
            assert [event.id for event in await source.take(1)] == [2]


async def test_a_client_resumes_from_memory_without_hole_or_repeat() -> None:
    log = Log(50)
    async with served(signals_after=log.after) as running:
        log.fill(running, 50)
        async with listening(running, last_id=20) as source:
            running.broadcaster.publish(51, signal(51))
            assert [event.id for event in await source.take(31)] == list(range(21, 52))
    assert log.reads == []


async def test_a_client_resumes_from_the_stream_where_memory_ends() -> None:
    count = 3 * BATCH + 7
    log = Log(count)
    async with served(capacity=40, signals_after=log.after) as running:
        log.fill(running, 40)
        async with listening(running, last_id=3) as source:
            events = await source.take(count - 3)
            assert [event.id for event in events] == list(range(4, count + 1))
            assert events[0].signal == signal(4)
            running.broadcaster.publish(count + 1, signal(count + 1))
            assert [event.id for event in await source.take(1)] == [count + 1]
    assert all(limit == BATCH for _, limit in log.reads)


async def test_what_the_stream_no_longer_keeps_is_told() -> None:
    log = Log(100, first=61)
    async with served(capacity=10, signals_after=log.after) as running:
        log.fill(running, 10)
        async with listening(running, last_id=5) as source:
            events = await source.take(41)
            assert (events[0].name, events[0].id) == ("resync", 60)
            assert "no longer kept" in events[0].data
            assert [event.id for event in events[1:]] == list(range(61, 101))


async def test_without_the_bus_a_client_resumes_from_memory_and_is_told() -> None:
    log = Log(100)
    async with served(capacity=10, signals_after=log.after) as running:
        log.fill(running, 10)
        log.available = False
        async with listening(running, last_id=5) as source:
            events = await source.take(11)
            assert (events[0].name, events[0].id) == ("resync", 90)
            assert [event.id for event in events[1:]] == list(range(91, 101))


async def test_a_failure_ends_the_stream_and_nothing_else_is_written_to_it() -> None:
    async def broken(_after: int, _limit: int) -> Sequence[tuple[int, Signal]]:
        raise ZeroDivisionError

    async with served(capacity=1, signals_after=broken) as running:
        Log(10).fill(running, 1)
        async with listening(running, last_id=2) as source:
            text = b""
            with contextlib.suppress(aiohttp.ClientPayloadError):
                async for line in source.response.content:
                    text += line
            assert text == b"retry: 2000\n\nid: 2\n\n"
        async with running.client.get("/live") as response:
            assert response.status == 200


@pytest.mark.parametrize("last_id", ["4000", "-1", "x", "", "9" * 30, "1.5"])
async def test_an_id_that_this_stream_did_not_issue_begins_with_a_resync(last_id: str) -> None:
    async with served() as running:
        running.broadcaster.publish(7, signal(7))
        async with listening(running, last_id=last_id) as source:
            events = await source.take(1)
            assert (events[0].name, events[0].id) == ("resync", 7)
            running.broadcaster.publish(8, signal(8))
            assert [event.id for event in await source.take(1)] == [8]


async def test_a_stream_made_anew_is_followed() -> None:
    async with served() as running:
        running.broadcaster.publish(900, signal(1))
        async with listening(running) as source:
            assert await source.until_marked() == 900
            running.broadcaster.reset()
            assert [(event.name, event.id) for event in await source.take(1)] == [("resync", 0)]
            running.broadcaster.publish(1, signal(2))
            assert [event.id for event in await source.take(1)] == [1]


async def test_a_client_of_a_gateway_that_has_just_started_waits_for_its_memory() -> None:
    log = Log(30)
    async with served(caught_up=False) as running, listening(running, last_id=25) as source:
        log.fill(running, 10)
        running.broadcaster.caught_up()
        assert [event.id for event in await source.take(5)] == [26, 27, 28, 29, 30]


async def test_filters() -> None:
    async with served() as running:
        queries = ("?symbol=GBPUSD", "?timeframe=5m", "?symbol=EURUSD&timeframe=M1")
        async with (
            listening(running, query=queries[0]) as pounds,
            listening(running, query=queries[1]) as fives,
            listening(running, query=queries[2]) as both,
        ):
            for source in (pounds, fives, both):
                await source.until_marked()
            running.broadcaster.publish(1, signal(1, symbol="GBPUSD"))
            running.broadcaster.publish(2, signal(2, timeframe="M5"))
            running.broadcaster.publish(3, signal(3))
            assert [event.id for event in await pounds.take(1)] == [1]
            assert [event.id for event in await fives.take(1)] == [2]
            assert [event.id for event in await both.take(1)] == [3]


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("?timeframe=M7", '"M7" is no timeframe'),
        ("?symbl=EURUSD", '"symbl" is no parameter here: symbol, timeframe are.'),
        ("?symbol=", "symbol must be 1 to 128 printable characters."),
    ],
)
async def test_a_badly_written_filter_is_told_before_the_stream_begins(query: str, sentence: str) -> None:
    async with served() as running, running.client.get(f"/signals/stream{query}") as response:
        assert response.status == 400
        assert (await response.json())["error"].startswith(sentence)
        assert len(running.broadcaster) == 0


async def test_silence_is_filled_with_comments_that_move_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "HEARTBEAT", 0.05)
    async with served() as running, listening(running, query="?symbol=GBPUSD") as source:
        assert await source.until_marked() == 0
        running.broadcaster.publish(1, signal(1))
        while await source.until_marked() != 1:
            pass
        assert source.comments


async def test_a_client_that_does_not_read_costs_no_memory_and_is_told_to_resync() -> None:
    capacity, total = 50, 30_000
    async with served(capacity=capacity) as running:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        raw.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(raw, (running.host, running.port))
        await loop.sock_sendall(raw, b"GET /signals/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while not len(running.broadcaster):
            await asyncio.sleep(0)
        async with listening(running) as reader:
            await reader.until_marked()
            for seq in range(1, total + 1):
                running.broadcaster.publish(seq, signal(seq))
                if seq % (capacity // 2) == 0:
                    await reader.take(capacity // 2)  # a client that does read misses nothing meanwhile
        received = b""
        async with asyncio.timeout(20):
            while b"event: resync" not in received:
                received += await loop.sock_recv(raw, 1 << 20)
            assert received.count(b"\ndata: ") < total // 2, "what was left out was never buffered"
            running.broadcaster.publish(total + 1, signal(total + 1))
            while f'"id":"EURUSD-M1-{total + 1}"'.encode() not in received:
                received += await loop.sock_recv(raw, 1 << 20)
        assert b"The client read too slowly" in received
        raw.close()


async def test_a_client_that_hangs_up_is_forgotten() -> None:
    async with served() as running:
        async with listening(running) as source:
            await source.until_marked()
            assert len(running.broadcaster) == 1
        running.broadcaster.publish(1, signal(1))
        async with asyncio.timeout(5):
            while len(running.broadcaster):
                running.broadcaster.publish(running.broadcaster.recent.last_seq + 1, signal(1))
                await asyncio.sleep(0.01)


async def test_open_streams_end_at_once_at_the_stop_even_those_nobody_reads() -> None:
    async with served(capacity=20_000) as running:
        stuck = socket.create_connection((running.host, running.port))
        stuck.sendall(b"GET /signals/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with listening(running) as source:
            await source.until_marked()
            while len(running.broadcaster) < 2:
                await asyncio.sleep(0)
            for seq in range(1, 20_001):
                running.broadcaster.publish(seq, signal(seq))
            await source.take(20_000)
            started = time.monotonic()
            await running.app_runner.cleanup()
            assert time.monotonic() - started < 1.0
            assert not [event async for event in source.blocks() if event.data]
        stuck.close()


async def test_the_number_of_streams_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "MAX_STREAMS", 2)
    async with served() as running, listening(running) as first, listening(running):
        await first.until_marked()
        async with running.client.get("/signals/stream") as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "30"


async def test_head_of_an_endless_stream_is_refused() -> None:
    async with served() as running, running.client.head("/signals/stream") as response:
        assert response.status == 405
