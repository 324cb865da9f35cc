"""The emitter on a real nats-server: one signal a candle, restarts, lost tails, hot swaps and refusals."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import msgspec
import pytest
import structlog

from actors.core.manifest import ONNX_FILE
from actors.core.series import SeriesState, append
from actors.core.serving import ServedModel, signal_id
from actors.emitter import Emitter
from actors.features import Features
from bus import topology
from bus.client import Bus
from bus.status import judge, statuses
from bus.subjects import FEATURES, MODEL_FILES, MODELS, SIGNALS
from bus.supervise import Context
from bus.writer import Superseded
from deploy.embedded import NatsServer
from schema.messages import ModelEvent, Signal
from schema.settings import Streams
from tests.builders import LIVE, TRUSTING, put, read_until, running, walk
from tests.models import changed, files, manifest_of, release, store

BOTH = (Features, Emitter)


async def signals(bus: Bus, count: int) -> list[Signal]:
    return await read_until(bus, SIGNALS, lambda found: len(found) >= count)


async def answer(bus: Bus, version: str) -> ModelEvent:
    def answered(events: list[ModelEvent]) -> bool:
        return any(e.version == version and e.event in ("activated", "refused") for e in events)

    return (await read_until(bus, MODELS, answered))[-1]


async def lose_tail(bus: Bus, keep: int) -> None:
    """SIGNALS as a server has it that lost its tail: neither the messages nor their ids are known any more."""
    kept = [await bus.js.get_msg("SIGNALS", seq=seq) for seq in range(1, keep + 1)]
    await bus.js.delete_stream("SIGNALS")
    await topology.apply(bus, Streams())
    for raw in kept:
        headers = {"Nats-Msg-Id": (raw.headers or {})["Nats-Msg-Id"]}  # not the batch that it came in
        await bus.js.publish(str(raw.subject), raw.data or b"", headers=headers)


async def test_without_a_model_every_live_candle_says_why_and_history_says_nothing(bus: Bus, nats_url: str) -> None:
    rows = walk(310)
    async with running(*BOTH, nats_url=nats_url):
        await put(bus, rows[:290], history=True)
        last = await put(bus, rows[290:], size=4)
        found = await signals(bus, 20)
    assert [s.ts for s in found] == [r.ts for r in rows[290:]]
    assert [s.abstain for s in found] == ["warming"] * 9 + ["no_model"] * 11
    assert {(s.model_name, s.model_version, s.prob_up, s.label) for s in found} == {("rf_m1", None, None, 0)}
    assert found[-1].candles_seq == last
    assert (found[0].expires_at - found[0].ts).total_seconds() == 120


async def test_a_provisional_model_speaks_at_once_and_its_signals_are_a_pure_function(bus: Bus, nats_url: str) -> None:
    rows = walk(420)
    artifacts = files()
    served = ServedModel(manifest_of(artifacts), artifacts[ONNX_FILE])
    expected = append(SeriesState("EURUSD", "M1"), rows, LIVE).rows
    async with running(*BOTH, nats_url=nats_url):
        seq = await put(bus, rows[:320], history=True)
        await read_until(bus, FEATURES, lambda blocks: bool(blocks))
        version = await release(bus, artifacts)
        event = await answer(bus, version)
        await put(bus, rows[320:370], size=1)
        await put(bus, rows[370:], size=50)
        found = await signals(bus, 100)
    assert (event.event, event.from_seq, event.state) == ("activated", seq + 1, "provisional")
    assert {(s.model_version, s.abstain, s.label) for s in found} == {(version, "unproven", 0)}
    assert [s.prob_up for s in found] == [served.prob_up("EURUSD", row) for row in expected[320:]]
    assert [s.id for s in found] == [signal_id("EURUSD", "M1", s.ts, version, s.features_hash) for s in found]


async def test_a_restart_doubles_nothing_and_a_lost_tail_comes_back_with_the_same_ids(bus: Bus, nats_url: str) -> None:
    rows = walk(460)
    async with running(*BOTH, nats_url=nats_url):
        await put(bus, rows[:300], history=True)
        await answer(bus, await release(bus, files()))
        await put(bus, rows[300:400], size=1)
        before = await signals(bus, 100)
    async with running(*BOTH, nats_url=nats_url):
        await put(bus, rows[400:410], size=1)
        again = await signals(bus, 110)
    assert [s.id for s in again[:100]] == [s.id for s in before]
    assert len({s.id for s in again}) == 110
    await lose_tail(bus, keep=60)
    async with running(*BOTH, nats_url=nats_url):
        await put(bus, rows[410:411], size=1)
        found = await signals(bus, 111)
    stable = [msgspec.structs.replace(s, created_at=before[0].created_at) for s in found[:110]]
    assert stable == [msgspec.structs.replace(s, created_at=before[0].created_at) for s in again]


async def test_a_hot_swap_misses_no_candle_and_a_replay_chooses_the_same_models(bus: Bus, nats_url: str) -> None:
    rows = walk(500)
    async with running(*BOTH, nats_url=nats_url):
        await put(bus, rows[:300], history=True)
        first = await release(bus, files(1))
        await answer(bus, first)
        await put(bus, rows[300:350], size=1)
        second = await release(bus, files(2), "champion")
        await put(bus, rows[350:400], size=1)
        event = await answer(bus, second)
        await put(bus, rows[400:450], size=1)
        found = await signals(bus, 150)
    assert [s.ts for s in found] == [r.ts for r in rows[300:450]]
    assert event.from_seq is not None
    for s in found:
        assert s.model_version == (second if s.candles_seq >= event.from_seq else first)
    await lose_tail(bus, keep=0)
    async with running(*BOTH, nats_url=nats_url):
        await put(bus, rows[450:451], size=1)
        replayed = await signals(bus, 151)
    assert [s.id for s in replayed[:150]] == [s.id for s in found]


async def test_a_changed_graph_is_refused_and_the_old_model_keeps_serving(bus: Bus, nats_url: str) -> None:
    rows = walk(320)
    broken = files(2) | {ONNX_FILE: files(1)[ONNX_FILE]}
    async with running(*BOTH, nats_url=nats_url):
        await put(bus, rows[:300], history=True)
        good = await release(bus, files(1))
        await answer(bus, good)
        event = await answer(bus, await release(bus, broken))
        await put(bus, rows[300:], size=1)
        found = await signals(bus, 20)
    assert event.event == "refused"
    assert "model.onnx" in event.reason and event.reason.endswith("train again.")
    assert {s.model_version for s in found} == {good}


async def test_a_tail_lost_while_it_runs_comes_back_after_the_reconnect(
    bus: Bus, nats: NatsServer, nats_url: str
) -> None:
    rows = walk(400)
    async with running(*BOTH, nats_url=nats_url):
        await put(bus, rows[:300], history=True)
        await answer(bus, await release(bus, files()))
        await put(bus, rows[300:360], size=1)
        await put(bus, rows[360:], size=40)
        before = await signals(bus, 100)
        await lose_tail(bus, keep=80)  # in the middle of a message's signals
        nats.stop()
        nats.start()
        after = await signals(bus, 100)
    assert [s.id for s in after] == [s.id for s in before]


async def test_a_version_that_no_longer_loads_is_no_model_and_a_release_heals_it(bus: Bus, nats_url: str) -> None:
    rows = walk(400)
    async with running(*BOTH, nats_url=nats_url):
        await put(bus, rows[:300], history=True)
        first = await release(bus, files(1))
        await answer(bus, first)
        second = await release(bus, files(2))
        gone = await answer(bus, second)
        await put(bus, rows[300:310], size=1)
        before = await signals(bus, 10)
    assert {(s.model_version, s.abstain) for s in before} == {(second, "unproven")}
    objects = await bus.js.object_store(MODEL_FILES)
    await objects.delete(f"rf_m1/{second}/{ONNX_FILE}")
    async with running(*BOTH, nats_url=nats_url):
        await put(bus, rows[310:330], size=1)
        without = await signals(bus, 30)
        told = judge("emitter", (await statuses(bus, ["emitter"]))["emitter"])
        healed = await release(bus, files(3))
        event = await answer(bus, healed)
        await put(bus, rows[330:340], size=1)
        found = await signals(bus, 40)
        assert judge("emitter", (await statuses(bus, ["emitter"]))["emitter"]) == ("ok", "Works, 0 messages behind.")
    assert told[0] == "degraded"
    assert second in told[1]
    assert [s.id for s in without[:10]] == [s.id for s in before]
    # Never the version before in its place; and its name stays, so that ids and what supersedes them stay pure.
    assert {(s.model_version, s.abstain, s.prob_up, s.label) for s in without[10:]} == {(second, "no_model", None, 0)}
    assert event.from_seq is not None and gone.from_seq is not None and event.from_seq > gone.from_seq
    assert {(s.model_version, s.abstain) for s in found[30:]} == {(healed, "unproven")}


async def test_a_feature_set_that_an_upgrade_retired_is_no_model(bus: Bus, nats_url: str) -> None:
    manifest = await store(bus, changed(files(), feature_set="scale_free_v0"))
    rows = walk(310)
    activated = ModelEvent(
        event="activated",
        model_name="rf_m1",
        version=manifest.version,
        timeframe="M1",
        at=datetime.now(UTC),
        state="champion",
        from_seq=1,
    )
    await bus.publish(MODELS, activated, "rf_m1", msg_id="activated")
    async with running(*BOTH, nats_url=nats_url):
        await put(bus, rows[:300], history=True)
        await put(bus, rows[300:], size=1)
        found = await signals(bus, 10)
    assert {(s.model_version, s.abstain, s.label) for s in found} == {(manifest.version, "no_model", 0)}


async def test_an_object_that_lost_its_chunks_is_refused_and_holds_nobody_up(bus: Bus, nats_url: str) -> None:
    """nats-py waits for ever for the chunks of an object whose description alone is left."""
    rows = walk(310)
    artifacts = files()
    manifest = manifest_of(artifacts)
    async with running(*BOTH, nats_url=nats_url):
        await put(bus, rows[:300], history=True)
        await store(bus, artifacts)
        await bus.js.purge_stream(f"OBJ_{MODEL_FILES}", subject=f"$O.{MODEL_FILES}.C.>")
        released = ModelEvent(
            event="released",
            model_name="rf_m1",
            version=manifest.version,
            timeframe="M1",
            at=datetime.now(UTC),
            state="provisional",
        )
        await bus.publish(MODELS, released, "rf_m1", msg_id="released")
        event = await answer(bus, manifest.version)
        await put(bus, rows[300:], size=1)
        found = await signals(bus, 10)
    assert event.event == "refused"
    assert event.reason.endswith("train again.")
    assert {s.abstain for s in found} == {"no_model"}


async def test_an_answer_goes_on_with_the_trace_of_the_release(bus: Bus, nats_url: str) -> None:
    trace = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
    async with running(*BOTH, nats_url=nats_url):
        version = await release(bus, files(), headers={"traceparent": trace})
        await answer(bus, version)
        raw = await bus.js.get_last_msg("EVENTS", MODELS.wildcard)
    told = (raw.headers or {})["traceparent"].split("-")
    assert told[1] == "ab" * 16
    assert told[2] != "cd" * 8


async def test_no_version_serves_from_before_the_end_of_the_log_that_the_emitter_met(bus: Bus, nats_url: str) -> None:
    """FEATURES and SIGNALS may have lost what was said of these candles: it is said again by the model of that time."""
    last = await put(bus, walk(5), size=1)
    async with running(Emitter, nats_url=nats_url):  # the features are made again later
        event = await answer(bus, await release(bus, files()))
    assert (event.event, event.from_seq) == ("activated", last + 1)


@contextlib.asynccontextmanager
async def emitting(nats_url: str) -> AsyncIterator[asyncio.Task[None]]:
    """An emitter that asks nobody whether it may work: so does a process that was stopped, replaced, and goes on."""
    own = await Bus.connect(nats_url, name="emitter")
    ready = asyncio.Event()
    context = Context(TRUSTING, own, None, ready.set, structlog.get_logger("test"))
    task = asyncio.create_task(Emitter(context).run(), name="emitter")
    try:
        async with asyncio.timeout(20):
            await ready.wait()
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await own.close()


async def test_who_was_replaced_says_nothing_more_and_decides_nothing(bus: Bus, nats_url: str) -> None:
    """Not even of a series that its successor has not spoken of yet, nor of a model that nobody has answered for."""
    symbols = tuple(f"S{i}" for i in range(6))
    rows = {symbol: walk(312, seed=i) for i, symbol in enumerate(symbols)}
    async with running(Features, nats_url=nats_url), contextlib.AsyncExitStack() as stack:
        for symbol, bars in rows.items():
            await put(bus, bars[:306], symbol=symbol, history=True)
        before = await stack.enter_async_context(emitting(nats_url))
        for number, symbol in enumerate(symbols, start=1):
            owner = await stack.enter_async_context(emitting(nats_url))
            if number % 2:
                await put(bus, rows[symbol][306:307], symbol=symbol)
                await signals(bus, number)
            else:
                answered = await answer(bus, await release(bus, files(number // 2, symbols)))
                assert answered.event == "activated"
                await put(bus, rows[symbol][306:307], symbol=symbol)
                await signals(bus, number)
            with pytest.raises(Superseded):
                await asyncio.wait_for(asyncio.shield(before), 20)
            assert not owner.done()
            before = owner
        said = await signals(bus, len(symbols))
    events = await read_until(bus, MODELS, lambda found: sum(e.event == "activated" for e in found) == 3)
    activated = [(event.from_seq or 0, event.version) for event in events if event.event == "activated"]
    assert [(s.symbol, s.candles_seq) for s in said] == [(s.symbol, s.candles_seq) for s in said if s.symbol in symbols]
    for one in said:
        assert one.model_version == next((v for seq, v in reversed(activated) if seq <= one.candles_seq), None)
