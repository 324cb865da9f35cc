"""The wanted streams against a real server: told apart field by field, mended in place, never at the cost of a message."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from nats.js.api import DiscardPolicy
from nats.js.errors import APIError, NotFoundError

from bus import topology
from bus.client import Bus, BusUnavailable
from bus.subjects import CANDLES, MODELS, PROMOTE, ROLLBACK, SIGNALS, TRAIN
from bus.supervise import serve
from bus.topology import Difference, model_name
from schema.messages import ModelEvent
from schema.settings import Streams
from schema.timeframes import TIMEFRAMES
from tests.builders import block, put, walk

NAMES = {
    "CANDLES",
    "FEATURES",
    "SIGNALS",
    "EVENTS",
    "REJECTS",
    "PROBE",
    "KV_feature_state",
    "KV_clock",
    "KV_owners",
    "OBJ_models",
}


@pytest.fixture
async def empty(nats_url: str) -> AsyncIterator[Bus]:
    """An empty server."""
    bus = await Bus.connect(nats_url, name="operator")
    yield bus
    await bus.close()


async def test_an_empty_server_lacks_everything_and_apply_is_idempotent(empty: Bus) -> None:
    missing = await topology.diff(empty, Streams())
    assert {d.stream for d in missing} == NAMES
    assert {(d.field, d.found) for d in missing} == {("missing", "nothing")}
    assert {d.consumer for d in missing if d.wanted == "consumer"} == {
        "features-0",
        "emitter-0",
        "recorder-0",
        "scorer-0",
        "health-0",
        "backup-0",
    }
    assert await topology.apply(empty, Streams()) == missing
    assert await topology.diff(empty, Streams()) == []
    created = {name: (await empty.js.stream_info(name)).created for name in NAMES}
    assert await topology.apply(empty, Streams()) == []
    assert {name: (await empty.js.stream_info(name)).created for name in NAMES} == created


async def test_a_token_and_its_consumer_are_mended(bus: Bus) -> None:
    await bus.js.delete_consumer("KV_owners", "features-0")
    await bus.js.purge_stream("KV_owners", subject="$KV.owners.emitter.0")
    found = await topology.diff(bus, Streams())
    assert {(d.consumer, d.field) for d in found} == {("features-0", "missing"), ("emitter-0", "token")}
    assert await topology.apply(bus, Streams()) == found
    assert await topology.diff(bus, Streams()) == []


async def test_every_field_that_an_operator_changed_is_named_and_mended(bus: Bus) -> None:
    config = (await bus.js.stream_info("CANDLES")).config
    config.max_age = 3_600.0
    config.max_bytes = 4 * 1024**3
    config.discard = DiscardPolicy.OLD
    config.duplicate_window = 60.0
    config.subjects = ["candles.>", "bars.>"]
    config.allow_direct = False
    await bus.js.update_stream(config)
    await bus.js.delete_stream("KV_clock")
    found = await topology.diff(bus, Streams())
    assert set(found) == {
        Difference("CANDLES", "max_age", "604800.0", "3600.0"),
        Difference("CANDLES", "max_bytes", "2147483648", "4294967296"),
        Difference("CANDLES", "discard", "new", "old"),
        Difference("CANDLES", "duplicate_window", "120.0", "60.0"),
        Difference("CANDLES", "subjects", "candles.>", "candles.>, bars.>"),
        Difference("CANDLES", "allow_direct", "True", "False"),
        Difference("KV_clock", "missing", "stream", "nothing"),
    }
    assert await topology.apply(bus, Streams()) == found
    assert await topology.diff(bus, Streams()) == []


async def test_changed_settings_are_a_difference_too(bus: Bus) -> None:
    wanted = Streams(candles_max_age=86_400.0, derived_max_bytes=1024**3)
    found = await topology.diff(bus, wanted)
    assert {(d.stream, d.field) for d in found} == {
        ("CANDLES", "max_age"),
        ("FEATURES", "max_bytes"),
        ("SIGNALS", "max_bytes"),
        ("EVENTS", "max_bytes"),
    }
    await topology.apply(bus, wanted)
    assert await topology.diff(bus, wanted) == []


async def test_apply_deletes_no_message_and_leaves_what_it_does_not_compare(bus: Bus) -> None:
    rows = walk(50)
    await put(bus, rows, size=10)
    config = (await bus.js.stream_info("CANDLES")).config
    config.description = "ours"
    config.max_age = 30 * 86_400.0
    config.subjects = ["candles.>", "bars.>"]
    await bus.js.update_stream(config)
    await bus.js.publish("bars.x", b"kept")
    before = (await bus.js.stream_info("CANDLES")).state
    assert await topology.apply(bus, Streams())
    info = await bus.js.stream_info("CANDLES")
    assert (info.state.messages, info.state.first_seq, info.state.last_seq) == (6, 1, before.last_seq)
    assert info.config.description == "ours"
    kept = [CANDLES.decode((await bus.js.get_msg("CANDLES", seq)).data or b"") for seq in range(1, 6)]
    assert [row for block in kept for row in block.rows] == rows


async def test_apply_removes_no_stream_of_others(bus: Bus) -> None:
    await bus.js.add_stream(name="THEIRS", subjects=["theirs.>"])
    await bus.js.publish("theirs.x", b"1")
    assert await topology.diff(bus, Streams()) == []
    await topology.apply(bus, Streams(candles_max_age=1_000.0))
    assert (await bus.js.stream_info("THEIRS")).state.messages == 1


async def test_candles_are_refused_rather_than_dropped_when_the_stream_is_full(bus: Bus) -> None:
    await topology.apply(bus, Streams(candles_max_bytes=30_000))
    with pytest.raises(BusUnavailable, match="refused to store"):
        await store_each(bus, 100)
    state = (await bus.js.stream_info("CANDLES")).state
    assert state.first_seq == 1
    assert state.messages == state.last_seq > 5


async def store_each(bus: Bus, count: int) -> None:
    for n in range(count):
        await bus.publish(CANDLES, block(walk(20)), "M1", "EURUSD", msg_id=str(n))


async def test_requests_are_no_events(bus: Bus) -> None:
    async def echo(data: bytes) -> bytes:
        return b"heard " + data

    service = await serve(bus, "trainer", "echoes", {PROMOTE: echo, ROLLBACK: echo, TRAIN: echo})
    try:
        for subject in (PROMOTE, ROLLBACK, TRAIN):
            # A stream that captured the subject would answer first, with its acknowledgement.
            assert await bus.request(subject, b"x") == b"heard x"
    finally:
        await service.stop()
    assert (await bus.js.stream_info("EVENTS")).state.messages == 0


async def test_every_timeframes_model_events_are_kept(bus: Bus) -> None:
    for timeframe in TIMEFRAMES:
        name = model_name(timeframe)
        event = ModelEvent(
            event="registered", model_name=name, version="v", timeframe=timeframe, at=datetime(2025, 1, 1, tzinfo=UTC)
        )
        await bus.publish(MODELS, event, name, msg_id=name)
    assert (await bus.js.stream_info("EVENTS")).state.messages == len(TIMEFRAMES)


async def test_a_durable_consumer_reads_signals_by_their_public_subject(bus: Bus) -> None:
    await bus.js.publish(SIGNALS.subject("M1", "EURUSD.m"), b"{}")
    subscription = await bus.js.pull_subscribe("signals.M1.EURUSD%2Em", durable="trader")
    (message,) = await subscription.fetch(1, timeout=5)
    await message.ack()
    assert (await bus.js.consumer_info("SIGNALS", "trader")).num_pending == 0


async def test_wanted_streams_are_what_the_contract_says(bus: Bus) -> None:
    candles = (await bus.js.stream_info("CANDLES")).config
    assert (candles.discard, candles.deny_delete, candles.max_age) == (DiscardPolicy.NEW, True, 7 * 86_400.0)
    await bus.js.publish(CANDLES.subject("M1", "X"), b"{}")
    with pytest.raises(APIError, match="(?i)not permitted"):
        await bus.js.delete_msg("CANDLES", 1)
    with pytest.raises(NotFoundError):
        await bus.js.stream_info("FORMING")
