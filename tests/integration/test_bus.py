"""The bus against a real server that is killed, frozen and restarted: publishing, reading, consuming, serving, searching."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from nats.aio.msg import Msg
from structlog.testing import capture_logs

from bus import consume as consuming
from bus import supervise, topology
from bus.client import Bus, BusUnavailable, Outgoing, outgoing
from bus.consume import (
    POISON_TRIES,
    Delivery,
    Done,
    Failing,
    Outcome,
    Reader,
    Rejected,
    Retry,
    StreamReplaced,
    consume,
    find,
    last_message,
)
from bus.subjects import CANDLES, FEATURES, REJECTS
from bus.supervise import run_tasks, serve
from deploy.embedded import NatsServer
from deploy.server import free_port
from schema.messages import Candle, CandleBlock, FeatureBlock, Reject
from schema.settings import Nats, Streams
from tests.builders import block, walk
from tests.servers import OPERATOR

ROWS = walk(400)
NOW = datetime(2025, 1, 2, tzinfo=UTC)


def message(n: int, row: Candle | None = None) -> Outgoing:
    """The n-th message: one bar, with an id that only its number decides."""
    made = CandleBlock(
        symbol="EURUSD", timeframe="M1", rows=(row or ROWS[n % len(ROWS)],), received_at=NOW, server_time=n
    )
    return outgoing(CANDLES, made, "M1", "EURUSD", msg_id=f"m{n}")


async def store_each(bus: Bus, numbers: Iterable[int]) -> None:
    for n in numbers:
        await bus.store(message(n))


async def stored(bus: Bus) -> list[int]:
    """The numbers of the messages in CANDLES, in the stream's order."""
    state = (await bus.js.stream_info("CANDLES")).state
    async with Reader(bus, CANDLES, name="stored", start=1, batch=512) as reader:
        return [(await reader.next(10.0)).message.server_time or 0 for _ in range(state.messages)]


async def publish(bus: Bus, first: int, last: int) -> None:
    await bus.publish_many([message(n) for n in range(first, last)])


async def eventually(condition: Callable[[], Awaitable[bool]] | Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while True:
            answer = condition()
            if await answer if isinstance(answer, Awaitable) else answer:
                return
            await asyncio.sleep(0.01)


# --- publishing ----------------------------------------------------------------------------------------------------


async def test_the_same_id_is_stored_once_also_after_a_crash_of_the_server(bus: Bus, nats: NatsServer) -> None:
    first = await bus.store(message(1))
    again = await bus.store(message(1))
    assert (again.seq, again.duplicate) == (first.seq, True)
    assert nats.pid is not None
    os.kill(nats.pid, signal.SIGKILL)
    await eventually(lambda: nats.pid is None)
    with pytest.raises(BusUnavailable):
        await bus.store(message(1))
    nats.start()
    await eventually(lambda: bus.connected)
    after = await bus.store(message(1))
    assert (after.seq, after.duplicate) == (first.seq, True)
    assert await stored(bus) == [1]


@pytest.mark.parametrize("after", [0.05, 0.15, 0.3])
async def test_publish_many_survives_a_killed_server_without_loss_double_or_disorder(
    bus: Bus, nats: NatsServer, after: float
) -> None:
    count = 3_000
    publishing = asyncio.create_task(publish(bus, 0, count))
    reached = int(count * after)

    async def far_enough() -> bool:
        return (await bus.js.stream_info("CANDLES")).state.messages >= reached

    await eventually(far_enough)
    assert nats.pid is not None
    os.kill(nats.pid, signal.SIGKILL)
    await eventually(lambda: nats.pid is None)
    assert not publishing.done()
    nats.start()
    await asyncio.wait_for(publishing, 60)
    assert await stored(bus) == list(range(count))


async def test_publish_many_takes_what_is_stored_already_as_stored(bus: Bus) -> None:
    await publish(bus, 0, 300)
    acks = await bus.publish_many([message(n) for n in range(100, 600)])
    assert [ack.seq for ack in acks] == list(range(101, 601))
    assert [bool(ack.duplicate) for ack in acks] == [True] * 200 + [False] * 300
    # The worst mixture: every second one is new.
    await bus.publish_many([message(n // 2 if n % 2 else 1_000 + n) for n in range(40)])
    assert (await stored(bus))[600:] == list(range(1_000, 1_040, 2))


async def test_two_writers_cost_tries_and_lose_nothing(bus: Bus) -> None:
    await asyncio.gather(publish(bus, 0, 600), publish(bus, 600, 1_200))
    found = await stored(bus)
    assert sorted(found) == list(range(1_200))
    assert [n for n in found if n < 600] == list(range(600))
    assert [n for n in found if n >= 600] == list(range(600, 1_200))


async def test_publish_many_gives_up_after_its_budget(bus: Bus, nats: NatsServer) -> None:
    nats.stop()
    began = time.monotonic()
    with pytest.raises(BusUnavailable, match="unacknowledged"):
        await bus.publish_many([message(n) for n in range(10)], budget=1.0)
    assert time.monotonic() - began < 10


async def test_a_full_stream_and_a_wrong_stream_are_told_apart(bus: Bus) -> None:
    await topology.apply(bus, Streams(candles_max_bytes=1_000))
    with pytest.raises(BusUnavailable, match="maximum"):
        await store_each(bus, range(100))
    with pytest.raises(Exception, match="(?i)expected stream"):
        await bus.store(Outgoing("features.M1.X", b"{}", "id", "CANDLES"))
    began = time.monotonic()
    with pytest.raises(Exception, match="(?i)expected stream"):
        await bus.publish_many([Outgoing("features.M1.X", b"{}", f"id{n}", "CANDLES") for n in range(3)])
    with pytest.raises(BusUnavailable, match="0 of 3"):
        await bus.store_all([message(n) for n in range(200, 203)])
    assert time.monotonic() - began < 1.4  # told by the server, not by the clock


async def test_wrong_credentials_and_an_absent_server_are_told_in_one_sentence(nats: NatsServer) -> None:
    absent = f"nats://operator:secret-word@127.0.0.1:{free_port()}"
    wrong = f"nats://operator:secret-word@127.0.0.1:{nats.port}"
    for url, word in ((absent, "MT5_NATS_URL"), (wrong, "Authorization"), ("nats://127.0.0.1:1:2", "MT5_NATS_URL")):
        began = time.monotonic()
        with pytest.raises(BusUnavailable) as caught:
            await Bus.connect(url, name="operator", patience=1.0)
        assert time.monotonic() - began < 5
        text = str(caught.value)
        assert word.lower() in text.lower()
        assert "\n" not in text
        assert text.endswith(".")
        assert "secret-word" not in text


async def test_wrong_credentials_do_not_use_up_patience(nats: NatsServer) -> None:
    began = time.monotonic()
    with pytest.raises(BusUnavailable, match="(?i)authorization"):
        await Bus.connect(f"nats://operator:wrong@127.0.0.1:{nats.port}", name="operator", patience=60.0)
    assert time.monotonic() - began < 10


async def test_a_request_that_nobody_serves_fails_at_once(bus: Bus) -> None:
    began = time.monotonic()
    with pytest.raises(BusUnavailable, match="Nobody answered"):
        await bus.request("trainer.train", timeout=30.0)
    assert time.monotonic() - began < 5


async def test_objects_come_back_as_they_went(bus: Bus) -> None:
    data = random.Random(1).randbytes(700_000)
    for name in ("rf_m1/v1/model.onnx", "rf_m1/v1/empty"):
        await bus.put_object(name, data if name.endswith("onnx") else b"")
    assert await bus.get_object("rf_m1/v1/model.onnx") == data
    assert await bus.get_object("rf_m1/v1/empty") == b""
    with pytest.raises(KeyError):
        await bus.get_object("rf_m1/v2/model.onnx")


# --- reading -------------------------------------------------------------------------------------------------------


async def take(reader: Reader[CandleBlock], count: int) -> list[int]:
    return [(await reader.next(30.0)).message.server_time or 0 for _ in range(count)]


async def test_a_reader_reads_in_order_and_resumes_where_it_is_told(bus: Bus) -> None:
    await publish(bus, 0, 500)
    async with Reader(bus, CANDLES, name="r", start=1) as reader:
        assert await take(reader, 300) == list(range(300))
        assert (reader.position, reader.caught_up) == (300, False)
    async with Reader(bus, CANDLES, name="r", start=301) as reader:
        delivery = await reader.next(10.0)
        assert (delivery.stream_seq, delivery.message.server_time, delivery.pending) == (301, 300, 199)
        assert await take(reader, 199) == list(range(301, 500))
        assert reader.caught_up
        with pytest.raises(TimeoutError):
            await reader.next(0.05)
        await publish(bus, 500, 503)
        assert await take(reader, 3) == [500, 501, 502]


async def test_a_batch_takes_what_is_there_and_no_more_than_asked(bus: Bus) -> None:
    await publish(bus, 0, 100)
    async with Reader(bus, CANDLES, name="r", start=1) as reader:
        await reader.next(10.0)
        batch = await reader.batch(40, linger=1.0)
        assert [d.stream_seq for d in batch] == list(range(2, 42))
        rest = await reader.batch(1_000, linger=0.3)
        assert [d.stream_seq for d in rest] == list(range(42, 101))


async def test_a_reader_of_one_subject_hears_nothing_else(bus: Bus) -> None:
    for n in range(20):
        symbol = ("EURUSD", "EURUSD.m")[n % 2]
        made = outgoing(CANDLES, block([ROWS[n]], symbol=symbol, server_time=n), "M1", symbol, msg_id=str(n))
        await bus.store(made)
    subject = CANDLES.subject("M1", "EURUSD.m")
    async with Reader(bus, CANDLES, name="r", start=1, subject=subject) as reader:
        assert await take(reader, 10) == list(range(1, 20, 2))


async def test_a_deleted_consumer_is_made_again_without_loss_or_double(bus: Bus) -> None:
    await publish(bus, 0, 10)
    async with Reader(bus, CANDLES, name="r", start=1) as reader:
        assert await take(reader, 10) == list(range(10))
        waiting = asyncio.create_task(take(reader, 10))
        await asyncio.sleep(0)
        await bus.js.delete_consumer("CANDLES", reader.consumer)
        await publish(bus, 10, 20)
        assert await waiting == list(range(10, 20))


async def test_a_restarted_server_is_read_on(bus: Bus, nats: NatsServer) -> None:
    await publish(bus, 0, 10)
    async with Reader(bus, CANDLES, name="r", start=1) as reader:
        assert await take(reader, 5) == list(range(5))
        assert nats.pid is not None
        os.kill(nats.pid, signal.SIGKILL)
        await eventually(lambda: nats.pid is None)
        nats.start()
        await eventually(lambda: bus.connected)
        await publish(bus, 10, 20)
        assert await take(reader, 15) == list(range(5, 20))


class LossyReader(Reader[CandleBlock]):
    """Some of what the server delivers never arrives, as when a connection breaks and the inbox is subscribed again."""

    rng = random.Random(3)

    async def _on_message(self, msg: Msg) -> None:
        if not msg.data or self.rng.random() > 0.02:
            await super()._on_message(msg)


async def test_what_the_server_counts_as_delivered_and_never_came_is_read_again(bus: Bus) -> None:
    await publish(bus, 0, 1_000)
    async with LossyReader(bus, CANDLES, name="r", start=1) as reader, asyncio.timeout(60):
        assert await take(reader, 1_000) == list(range(1_000))


async def test_a_stream_made_anew_is_not_read_on(bus: Bus) -> None:
    await publish(bus, 0, 10)
    async with Reader(bus, CANDLES, name="r", start=1) as reader:
        await take(reader, 10)
        await bus.js.delete_stream("CANDLES")
        await topology.apply(bus, Streams())
        await publish(bus, 20, 40)
        with pytest.raises(StreamReplaced, match="CANDLES"):
            await reader.next(30.0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same behaviour in a tenth of the time."""
    monkeypatch.setattr(consuming, "HEARTBEAT", 0.5)
    monkeypatch.setattr(consuming, "SILENCE", 1.2)


@pytest.mark.usefixtures("impatient")
async def test_a_frozen_server_is_noticed_and_read_on_when_it_thaws(bus: Bus, nats: NatsServer) -> None:
    await publish(bus, 0, 10)
    assert nats.pid is not None
    async with Reader(bus, CANDLES, name="r", start=1) as reader:
        assert await take(reader, 10) == list(range(10))
        waiting = asyncio.create_task(take(reader, 10))
        with capture_logs() as logs:
            os.kill(nats.pid, signal.SIGSTOP)
            try:
                await eventually(lambda: any(entry.get("action") == "consume.retry" for entry in logs), 30)
                with pytest.raises(BusUnavailable):
                    await bus.store(message(99))
            finally:
                os.kill(nats.pid, signal.SIGCONT)
            await eventually(lambda: any(entry.get("action") == "consume.healed" for entry in logs), 30)
        await publish(bus, 100, 110)
        found = await waiting
    # 99 was "unknown": the server may have stored it when it woke up, and then it is read once.
    assert found in ([99, *range(100, 109)], list(range(100, 110)))
    assert await stored(bus) in ([*range(10), 99, *range(100, 110)], [*range(10), *range(100, 110)])


async def test_a_frozen_server_is_noticed_by_the_connection_and_used_again(nats: NatsServer) -> None:
    bus = await Bus.connect(nats.url(OPERATOR), name="operator", settings=Nats(ping_interval=0.3))
    try:
        await topology.apply(bus, Streams())
        await publish(bus, 0, 5)
        assert nats.pid is not None
        os.kill(nats.pid, signal.SIGSTOP)
        try:
            await eventually(lambda: not bus.connected, 20)
            began = time.monotonic()
            with pytest.raises(BusUnavailable):
                await bus.store(message(5))
            assert time.monotonic() - began < 1  # no wait for what is known to be away
        finally:
            os.kill(nats.pid, signal.SIGCONT)
        await bus.publish_many([message(5)])
        assert await stored(bus) == list(range(6))
    finally:
        await bus.close()


@pytest.mark.usefixtures("impatient")
async def test_an_idle_reader_stays_alive_over_many_heartbeats(bus: Bus) -> None:
    async with Reader(bus, CANDLES, name="r", start=1) as reader:
        before = (await bus.js.consumer_info("CANDLES", reader.consumer)).created
        with capture_logs() as logs, pytest.raises(TimeoutError):
            await reader.next(3.0)
        assert (await bus.js.consumer_info("CANDLES", reader.consumer)).created == before
        assert not [entry for entry in logs if entry.get("action", "").startswith("consume.")]
        await publish(bus, 0, 1)
        assert await take(reader, 1) == [0]


async def test_more_than_a_pull_request_holds_keeps_coming(bus: Bus) -> None:
    async with Reader(bus, CANDLES, name="r", start=1, batch=8) as reader:
        publishing = asyncio.create_task(publish(bus, 0, 1_000))
        assert await take(reader, 1_000) == list(range(1_000))
        await publishing


async def test_what_cannot_be_decoded_is_parked_whole_and_skipped(bus: Bus) -> None:
    await publish(bus, 0, 1)
    bad = [b'{"symbol": 1}', b"not json \xff", b""]
    for n, data in enumerate(bad):
        await bus.js.publish("candles.M1.EURUSD", data, headers={"Nats-Msg-Id": f"bad{n}"})
    await publish(bus, 1, 2)
    async with Reader(bus, CANDLES, name="reader", start=1) as reader:
        assert await take(reader, 2) == [0, 1]
    parked = await rejects(bus, len(bad))
    assert [r.payload for r in parked] == [{"symbol": 1}, "not json \\xff", ""]
    assert all(r.reason.startswith("cannot be decoded") and r.where == "reader" for r in parked)
    assert [r.headers["Nats-Msg-Id"] for r in parked] == ["bad0", "bad1", "bad2"]


async def rejects(bus: Bus, count: int) -> list[Reject]:
    async with Reader(bus, REJECTS, name="rejects", start=1) as reader:
        return [(await reader.next(10.0)).message for _ in range(count)]


# --- consuming -----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def consuming_with(
    bus: Bus, handler: Callable[[Delivery[CandleBlock]], Awaitable[Outcome]], **options: Any
) -> AsyncIterator[asyncio.Task[None]]:
    async with Reader(bus, CANDLES, name="worker", start=1) as reader:
        options.setdefault("publish", bus.publish_many)
        task = asyncio.create_task(consume(reader, handler, **options))
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def number(delivery: Delivery[CandleBlock]) -> int:
    return delivery.message.server_time or 0


async def test_a_retry_lets_nothing_overtake_and_what_came_before_does_not_wait_for_it(bus: Bus) -> None:
    handled: list[int] = []
    left = {3: 3, 7: 2}

    async def handler(delivery: Delivery[CandleBlock]) -> Outcome:
        n = number(delivery)
        if left.get(n):
            left[n] -= 1
            return Retry(0.05, "not yet")
        handled.append(n)
        made = FeatureBlock(symbol="X", timeframe="M1", candles_seq=n + 1, rows=(), received_at=NOW)
        return Done((outgoing(FEATURES, made, "M1", "X", msg_id=str(n)),))

    committed: list[int] = []
    await publish(bus, 0, 10)
    async with consuming_with(bus, handler, committed=lambda d: committed.append(d.stream_seq)):
        await eventually(lambda: bool(committed) and committed[-1] == 10)
    assert handled == list(range(10))
    async with Reader(bus, FEATURES, name="made", start=1) as reader:
        assert [(await reader.next(5.0)).message.candles_seq for _ in range(10)] == list(range(1, 11))


async def test_while_one_is_retried_the_results_before_it_are_already_out(bus: Bus) -> None:
    release = asyncio.Event()

    async def handler(delivery: Delivery[CandleBlock]) -> Outcome:
        if number(delivery) == 2 and not release.is_set():
            return Retry(0.02, "held")
        made = FeatureBlock(symbol="X", timeframe="M1", candles_seq=number(delivery), rows=(), received_at=NOW)
        return Done((outgoing(FEATURES, made, "M1", "X", msg_id=str(number(delivery))),))

    await publish(bus, 0, 4)

    async def two_are_out() -> bool:
        return (await bus.js.stream_info("FEATURES")).state.messages == 2

    async def all_are_out() -> bool:
        return (await bus.js.stream_info("FEATURES")).state.messages == 4

    async with consuming_with(bus, handler):
        await eventually(two_are_out)
        release.set()
        await eventually(all_are_out)


async def test_a_rejected_message_is_parked_whole_with_its_reason_and_the_next_ones_go_on(bus: Bus) -> None:
    handled: list[int] = []

    async def handler(delivery: Delivery[CandleBlock]) -> Outcome:
        handled.append(number(delivery))
        return Rejected("it makes no sense") if number(delivery) == 1 else Done()

    await publish(bus, 0, 4)
    async with consuming_with(bus, handler):
        await eventually(lambda: handled == [0, 1, 2, 3])
        (parked,) = await rejects(bus, 1)
    assert (parked.where, parked.reason, parked.subject) == ("worker", "it makes no sense", "candles.M1.EURUSD")
    assert msgspec.convert(parked.payload, CandleBlock) == CANDLES.decode(message(1).payload)
    assert parked.headers["Nats-Msg-Id"] == "m1"


async def test_a_cancellation_waits_for_the_message_in_hand(bus: Bus) -> None:
    begun, finish = asyncio.Event(), asyncio.Event()
    committed: list[int] = []

    async def handler(delivery: Delivery[CandleBlock]) -> Outcome:
        begun.set()
        await finish.wait()
        made = FeatureBlock(symbol="X", timeframe="M1", candles_seq=delivery.stream_seq, rows=(), received_at=NOW)
        return Done((outgoing(FEATURES, made, "M1", "X", msg_id="only"),))

    await publish(bus, 0, 1)
    async with consuming_with(bus, handler, committed=lambda d: committed.append(d.stream_seq)) as task:
        await begun.wait()
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        finish.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert committed == [1]
    found = await last_message(bus, FEATURES)
    assert found is not None
    assert found[1].candles_seq == 1


async def test_a_cancellation_waits_no_longer_than_its_budget(bus: Bus) -> None:
    begun = asyncio.Event()
    committed: list[int] = []

    async def handler(delivery: Delivery[CandleBlock]) -> Outcome:
        begun.set()
        await asyncio.Event().wait()
        return Done()

    await publish(bus, 0, 1)
    async with consuming_with(
        bus, handler, committed=lambda d: committed.append(d.stream_seq), drain_budget=0.2
    ) as task:
        await begun.wait()
        began = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert 0.2 <= time.monotonic() - began < 3
    assert committed == []


async def test_a_failing_handler_ends_the_loop_with_its_error_and_nothing_counts_as_read(bus: Bus) -> None:
    committed: list[int] = []

    async def handler(delivery: Delivery[CandleBlock]) -> Outcome:
        raise ZeroDivisionError("a defect")

    await publish(bus, 0, 3)
    async with consuming_with(bus, handler, committed=lambda d: committed.append(d.stream_seq)) as task:
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(asyncio.shield(task), 10)
    assert committed == []


async def test_a_message_that_fails_again_and_again_is_parked_and_the_rest_goes_on(bus: Bus) -> None:
    """Each failure ends the loop, since the actor's state may be half changed; its next life remembers."""
    await publish(bus, 0, 5)
    failing, handled = Failing(), []

    async def handler(delivery: Delivery[CandleBlock]) -> Outcome:
        if number(delivery) == 2:
            raise ZeroDivisionError("of this message")
        handled.append(number(delivery))
        return Done()

    for life in range(1, POISON_TRIES + 1):
        handled.clear()
        async with consuming_with(bus, handler, failing=failing) as task:
            with pytest.raises(ZeroDivisionError):
                await asyncio.wait_for(task, 10)
        assert handled == [0, 1], life
    handled.clear()
    async with consuming_with(bus, handler, failing=failing):
        await eventually(lambda: handled == [0, 1, 3, 4])
    (parked,) = await rejects(bus, 1)
    assert parked.reason == "failed 3 times, last with ZeroDivisionError: of this message"
    assert parked.subject == "candles.M1.EURUSD"
    assert parked.payload["server_time"] == 2


async def test_what_ends_a_handler_without_its_message_is_no_poison(bus: Bus) -> None:
    await publish(bus, 0, 1)
    failing = Failing()

    async def handler(delivery: Delivery[CandleBlock]) -> Outcome:
        raise BusUnavailable("NATS is away")

    for _ in range(POISON_TRIES + 1):
        async with consuming_with(bus, handler, failing=failing) as task:
            with pytest.raises(BusUnavailable):
                await asyncio.wait_for(task, 10)
    assert failing.verdict("CANDLES", 1) is None


async def test_results_survive_a_server_killed_in_the_middle(bus: Bus, nats: NatsServer) -> None:
    count = 400
    handled: list[int] = []

    async def handler(delivery: Delivery[CandleBlock]) -> Outcome:
        handled.append(number(delivery))
        made = FeatureBlock(symbol="X", timeframe="M1", candles_seq=delivery.stream_seq, rows=(), received_at=NOW)
        return Done((outgoing(FEATURES, made, "M1", "X", msg_id=str(delivery.stream_seq)),))

    async def far_enough() -> bool:
        return (await bus.js.stream_info("FEATURES")).state.messages >= 40

    async def whole() -> bool:
        with contextlib.suppress(Exception):
            return bus.connected and (await bus.js.stream_info("FEATURES")).state.messages >= count
        return False

    await publish(bus, 0, count)
    async with consuming_with(bus, handler, most=8):
        await eventually(far_enough)
        assert nats.pid is not None
        os.kill(nats.pid, signal.SIGKILL)
        await eventually(lambda: nats.pid is None)
        nats.start()
        await eventually(whole, 40)
    assert handled == list(range(count))
    async with Reader(bus, FEATURES, name="made", start=1) as reader:
        assert [(await reader.next(5.0)).message.candles_seq for _ in range(count)] == list(range(1, count + 1))
        assert reader.caught_up


# --- serving -------------------------------------------------------------------------------------------------------


async def test_requests_are_served_side_by_side(bus: Bus, nats_url: str) -> None:
    asked: list[bytes] = []
    release = asyncio.Event()

    async def slow(data: bytes) -> bytes:
        asked.append(data)
        await release.wait()
        return data

    async def quick(data: bytes) -> bytes:
        return data[::-1]

    service = await serve(bus, "trainer", "waits", {"trainer.train": slow, "models.promote": quick})
    client = await Bus.connect(nats_url, name="operator")
    try:
        waiting = [asyncio.create_task(client.request("trainer.train", bytes([n]), timeout=20.0)) for n in range(5)]
        await eventually(lambda: len(asked) == 5)
        assert await client.request("models.promote", b"abc") == b"cba"
        release.set()
        assert await asyncio.gather(*waiting) == [bytes([n]) for n in range(5)]
    finally:
        await client.close()
        await service.stop()


async def test_a_failing_endpoint_answers_an_error_and_the_service_lives_on(bus: Bus, nats_url: str) -> None:
    async def sometimes(data: bytes) -> bytes:
        if data == b"bad":
            raise ZeroDivisionError("a secret of the inside")
        return b"fine"

    service = await serve(bus, "trainer", "fails", {"trainer.train": sometimes})
    client = await Bus.connect(nats_url, name="operator")
    try:
        with capture_logs() as logs:
            answer = await client.nc.request("trainer.train", b"bad", timeout=5)
        assert (answer.headers or {})["Nats-Service-Error-Code"] == "500"
        assert "secret" not in str(answer.headers) + answer.data.decode()
        assert [entry["action"] for entry in logs] == ["serve.failed"]
        assert await client.request("trainer.train", b"good") == b"fine"
    finally:
        await client.close()
        await service.stop()


async def test_an_actor_can_be_found_and_asked_for_its_endpoints(bus: Bus) -> None:
    async def echo(data: bytes) -> bytes:
        return data

    service = await serve(bus, "trainer", "echoes", {"trainer.train": echo})
    try:
        info = msgspec.json.decode(await bus.request("$SRV.INFO.trainer"))
        assert (info["name"], info["description"]) == ("trainer", "echoes")
        assert [e["subject"] for e in info["endpoints"]] == ["trainer.train"]
    finally:
        await service.stop()


# --- searching -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
async def test_find_is_a_linear_search_made_quick(bus: Bus, seed: int) -> None:
    """For every target: the first message with at least that candles_seq, over parts, gaps, deletions and a lost head."""
    chance = random.Random(seed)
    sequences: list[int] = []
    current = 0
    for _ in range(chance.randrange(1, 60)):
        current += chance.choice([0, 1, 1, 1, 2, 7])
        sequences.append(max(current, 1))
    made = [FeatureBlock(symbol="X", timeframe="M1", candles_seq=n, rows=(), received_at=NOW) for n in sequences]
    await bus.publish_many([outgoing(FEATURES, m, "M1", "X", msg_id=str(i)) for i, m in enumerate(made)])
    kept = dict(enumerate(sequences, start=1))
    for seq in list(kept):
        if chance.random() < 0.25:
            await bus.js.delete_msg("FEATURES", seq)
            del kept[seq]
    head = chance.randrange(0, 10)
    if head:
        await bus.js.purge_stream("FEATURES", seq=head)
        kept = {seq: n for seq, n in kept.items() if seq >= head}
    end = (await bus.js.stream_info("FEATURES")).state.last_seq + 1
    for target in range(current + 3):
        found = await find(bus, FEATURES, target)
        wanted = next((seq for seq, n in kept.items() if n >= target), end)
        # Anywhere between the last smaller message and the wanted one reads the same.
        assert [seq for seq in kept if seq >= found] == [seq for seq in kept if seq >= wanted], (target, found, wanted)


async def test_find_and_last_message_on_an_empty_stream(bus: Bus) -> None:
    assert await find(bus, FEATURES, 5) == 1
    assert await last_message(bus, FEATURES) is None


@pytest.mark.parametrize("after", [0.0, 0.001, 0.003])
async def test_a_first_connection_that_is_cancelled_leaves_nothing_behind(nats: NatsServer, after: float) -> None:
    """What is left would try for ever, and keep a process from ending once its server is gone."""
    before = asyncio.all_tasks()
    connecting = asyncio.create_task(Bus.connect(nats.url(OPERATOR), name="cancelled"))
    await asyncio.sleep(after)
    connecting.cancel()
    try:
        bus = await connecting
    except asyncio.CancelledError:
        assert asyncio.all_tasks() == before
    else:  # it was quicker
        await bus.close()


async def test_a_connection_whose_server_is_gone_closes_whole_whatever_was_still_to_be_written(
    nats: NatsServer,
) -> None:
    """It raised on the system's own loop, and left its tasks behind."""
    before = asyncio.all_tasks()
    other = await Bus.connect(nats.url(OPERATOR), name="other")

    async def hear(msg: Msg) -> None:
        raise AssertionError("nothing comes")

    await other.nc.subscribe("said", cb=hear)
    nats.stop()
    await eventually(lambda: not other.connected)
    await other.nc.publish("said", b"kept for the reconnect")
    await other.close()
    assert other.nc.is_closed
    await eventually(lambda: asyncio.all_tasks() == before)


async def test_a_task_that_swallows_its_cancellation_keeps_no_actor_from_its_restart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """nats-py does so where a cancellation meets one of its flushes."""
    monkeypatch.setattr(supervise, "CANCEL_AGAIN", 0.05)

    async def fails() -> None:
        raise BusUnavailable("gone")

    async def deaf() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    with capture_logs() as logs, pytest.raises(BusUnavailable, match="gone"):
        async with asyncio.timeout(10):
            await run_tasks({"fails": fails(), "deaf": deaf()})
    assert [line["tasks"] for line in logs if line["action"] == "supervise.cancel"] == ["deaf"]


async def test_whoever_stops_an_actor_twice_finds_nothing_of_it_left() -> None:
    """A gateway that still listened would keep the next one from its port."""
    ended = asyncio.Event()
    began = asyncio.Event()

    async def slow() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(2):  # the second cancellation comes while it ends
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.2)
            ended.set()

    task = asyncio.create_task(run_tasks({"slow": slow()}))
    await began.wait()
    task.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
