"""The signal emitter: reads FEATURES in order, asks the model that serves, publishes one signal a closed candle.

Which model serves a candle is a matter of record: an activation names the first CANDLES sequence that a version
serves, it is stored before the version speaks, and a replay reads it back. ``created_at`` alone comes from the clock.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import ClassVar, Final

import msgspec
from msgspec import Struct
from nats.errors import Error as NatsError
from nats.js.api import Header
from nats.js.errors import APIError, NotFoundError

from actors.artifacts import Artifacts
from actors.core.ingest import digest_text
from actors.core.serving import ModelRefused, ServedModel, makes_signal, signal_of
from bus.client import BusUnavailable, Outgoing, outgoing
from bus.consume import Delivery, Done, Outcome, Reader, StreamReplaced, consume, find, last_message
from bus.fence import Fence
from bus.subjects import CANDLE, CANDLES, FEATURES, FEATURES_AT, MODELS, RECEIVED_AT, SIGNAL_AGAIN, SIGNALS
from bus.supervise import Context, run_tasks, serve, withdraw
from bus.telemetry import cursor_lag, cursor_lag_seconds, signal_seconds, signals_total, trace_headers
from bus.topology import model_name
from bus.writer import KnownId, Superseded, Writer, store_batch
from schema.messages import FeatureBlock, FeatureRow, ModelEvent, ModelState, Signal

READ_BACK: Final = 2_048  # signals read back at the start, and as many again until all of the newest message are read
ANSWER_BUDGET: Final = 60.0
ANSWER_PAUSE: Final = 0.25
CHECK_PAUSE: Final = 0.5  # between two questions to a JetStream that comes back later than its connections
ANSWERS: Final = ("activated", "refused")  # what an emitter says of a version


class Activation(Struct, frozen=True):
    """From ``from_seq`` on (a CANDLES sequence) ``model`` serves its timeframe, in ``state``.

    ``model`` is None where the version no longer loads: what it would have served has no model, and keeps its name.
    """

    from_seq: int
    version: str
    state: ModelState
    model: ServedModel | None


class Emitter:
    name: ClassVar[str] = "emitter"
    owned: ClassVar[bool] = True
    own_service: ClassVar[bool] = True
    description: ClassVar[str] = "Turns features into signals with the model that serves."

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.bus = ctx.bus
        self.log = ctx.log
        self.active: dict[str, list[Activation]] = {}  # by timeframe, in the order of their activation
        self.versions: dict[str, list[tuple[int, str]]] = {}  # every activation's (from_seq, version), by timeframe
        self.handled = 0  # CANDLES sequence up to which every signal is published
        # Where CANDLES ended when this run began. SIGNALS may have lost a tail that is being made again: what was said once,
        # by the model of that time, is said again by the same one, so no version activated now serves before this.
        self._log_end = 0
        self._done = 0  # the newest candles_seq that this run has read; never ahead of the stream, as handled may be
        self._said: set[tuple[str, int]] = (
            set()
        )  # (id, candles_seq) published before this run began, near its resume point
        self._said_until = 0
        self._tail = ""  # the message id of the newest signal that SIGNALS must hold
        # A version serves from where its activation says, for whoever speaks: so nobody speaks or activates who was replaced.
        self._fence = Fence(self.bus, str(SIGNALS.stream))
        self._models_fence = Fence(self.bus, str(MODELS.stream))
        self._out = Writer(self.bus, str(SIGNALS.stream), 0, self._fence)
        self._heard: dict[str, int] = {}  # model name → EVENTS sequence of the newest event of it that was read
        self._gate = asyncio.Lock()  # a batch of features, an activation and a repetition exclude each other
        self._artifacts = Artifacts(self.bus, ctx.settings)

    async def run(self) -> None:
        # First of all: what is read from here on is all that anybody else has said and decided.
        await self._fence.take()
        await self._models_fence.take()
        self._log_end = (await self.bus.js.stream_info(str(CANDLES.stream))).state.last_seq
        resume = await self._read_back()
        start = await find(self.bus, FEATURES, resume)
        self.handled = max(resume - 1, 0)
        async with Reader(self.bus, MODELS, name=f"{self.name}-models", start=1) as models:
            pending = await self._load_activations(models, resume)
            async with Reader(self.bus, FEATURES, name=self.name, start=start) as reader:
                for released in pending:
                    await self._catch_up(reader)
                    await self._activate(released)
                reconnected = asyncio.Event()
                forget = self.bus.on_reconnect(reconnected.set)
                service = await serve(self.bus, self.name, self.description, {SIGNAL_AGAIN: self._again})
                try:
                    self.ctx.ready()
                    await run_tasks(
                        {
                            "emitter-consume": consume(
                                reader,
                                self._handle,
                                publish=self._publish,
                                committed=self._committed,
                                gate=self._gate,
                                failing=self.ctx.failing,
                            ),
                            "emitter-models": self._follow(models),
                            "emitter-check": self._check(reconnected),
                        }
                    )
                finally:
                    forget()
                    await withdraw(service)

    # --- start-up --------------------------------------------------------------------------------------------------

    async def _read_back(self) -> int:
        """Remembers the signals of the newest CANDLES sequence that has any and returns it: the place to resume at.

        Signals are written in order and by one process, so everything before it is whole.
        """
        end = (await self.bus.js.stream_info(str(SIGNALS.stream))).state.last_seq
        self._out = Writer(self.bus, str(SIGNALS.stream), end, self._fence)
        tail = await last_message(self.bus, SIGNALS)
        if tail is None:
            return 1
        last_seq, self._tail = tail[0], _msg_id(tail[1])
        back = READ_BACK
        while True:
            start = max(1, last_seq - back + 1)
            sequences = await self._signals_from(start, last_seq)
            self._said_until = max(sequences)
            if start == 1 or sequences[0] < self._said_until:
                return self._said_until
            back *= 2

    async def _signals_from(self, start: int, last_seq: int) -> list[int]:
        sequences: list[int] = []
        async with Reader(self.bus, SIGNALS, name=f"{self.name}-tail", start=start, batch=512) as reader:
            async for delivery in reader:
                self._said.add((delivery.message.id, delivery.message.candles_seq))
                sequences.append(delivery.message.candles_seq)
                if delivery.stream_seq >= last_seq:
                    break
        return sequences

    async def _load_activations(self, models: Reader[ModelEvent], resume: int) -> list[Delivery[ModelEvent]]:
        """Reads the models' whole past; returns the releases that nobody answered yet."""
        activated: dict[str, list[ModelEvent]] = {}
        waiting: dict[tuple[str, str], Delivery[ModelEvent]] = {}
        try:
            last = int((await self.bus.js.get_last_msg(models.stream, MODELS.wildcard)).seq or 0)
        except NotFoundError:
            return []
        while models.position < last:
            delivery = await models.next()
            event = delivery.message
            self._heard[event.model_name] = max(self._heard.get(event.model_name, 0), delivery.stream_seq)
            key = (event.model_name, event.version)
            if event.event == "released":
                waiting[key] = delivery
            elif event.event in ANSWERS:
                waiting.pop(key, None)
                if event.event == "activated":
                    activated.setdefault(event.timeframe, []).append(event)
        for timeframe, events in activated.items():
            self.versions[timeframe] = [(event.from_seq or 0, event.version) for event in events]
            # What served before the resume point is history, but for the one that still serves there.
            first = max((i for i, e in enumerate(events) if (e.from_seq or 0) <= resume), default=0)
            for event in events[first:]:
                self.active.setdefault(timeframe, []).append(
                    Activation(event.from_seq or 0, event.version, event.state, await self._load_activated(event))
                )
            if self.active[timeframe][-1].model is None:
                self.ctx.standing.concerns[timeframe] = (
                    f"Model {events[-1].version} cannot be loaded: {timeframe} signals say no_model until `mt5 models "
                    f'rollback --model {events[-1].model_name}` or `mt5 models promote VERSION --reason "…"` gives another.'
                )
        return list(waiting.values())

    async def _load_activated(self, event: ModelEvent) -> ServedModel | None:
        """None where the version no longer loads: candles go on without a model until another one is released.

        Another version in its place would be a signal that nobody decided on, and that no replay would give.
        """
        try:
            return await self._artifacts.load(event.model_name, event.version)
        except ModelRefused as error:
            self.log.error(
                "the version that serves cannot be loaded, signals say no_model until another one is released",
                action="emitter.missing",
                version=event.version,
                timeframe=event.timeframe,
                reason=str(error),
            )
            return None

    async def _catch_up(self, reader: Reader[FeatureBlock]) -> None:
        # An activation counts from the newest candle that was handled; at the start that is the resume point, and
        # candles between it and the stream's end may already have signals of the model before.
        self.handled = max(self.handled, self._said_until)
        tail = await last_message(self.bus, FEATURES)
        if tail is not None:
            self.handled = max(self.handled, tail[1].candles_seq)

    # --- models ----------------------------------------------------------------------------------------------------

    async def _follow(self, models: Reader[ModelEvent]) -> None:
        async for delivery in models:
            event = delivery.message
            self._heard[event.model_name] = max(self._heard.get(event.model_name, 0), delivery.stream_seq)
            while event.event == "released":
                try:
                    await self._activate(delivery)
                    break
                except BusUnavailable as error:  # what serves now goes on meanwhile
                    self.log.warning("the release is tried again", action="emitter.retry", error=str(error))
                    await asyncio.sleep(ANSWER_PAUSE)

    async def _activate(self, delivery: Delivery[ModelEvent]) -> None:
        """Loads a released version and lets it serve from the next candle on; the record is stored first.

        Raises BusUnavailable where NATS answers neither within the budget.
        """
        event = delivery.message
        try:
            model = await self._artifacts.load(event.model_name, event.version)
        except ModelRefused as error:
            self.log.error("model refused", action="emitter.refused", version=event.version, reason=str(error))
            await self._answer(delivery, "refused", None, str(error))
            return
        async with self._gate:
            from_seq = max(self.handled, self._log_end) + 1
            await self._answer(delivery, "activated", from_seq, event.reason)
            serving = self.active.setdefault(event.timeframe, [])
            serving.append(Activation(from_seq, event.version, event.state, model))
            self.versions.setdefault(event.timeframe, []).append((from_seq, event.version))
            self.ctx.standing.concerns.pop(event.timeframe, None)
        while len(serving) > 1 and serving[1].from_seq <= self._done + 1:
            del serving[0]  # no candle will ask for it again
        self.log.info(
            "model serves", action="emitter.activated", version=event.version, state=event.state, from_seq=from_seq
        )

    async def _answer(self, delivery: Delivery[ModelEvent], what: str, from_seq: int | None, reason: str) -> None:
        event = delivery.message
        answer = msgspec.structs.replace(
            event, event=what, from_seq=from_seq, reason=reason, at=datetime.now(UTC), by=self.name
        )
        message = outgoing(
            MODELS,
            answer,
            event.model_name,
            msg_id=f"{what}:{event.version}:{secrets.token_hex(8)}",
            headers=trace_headers(delivery.headers),
        )
        await self._record(message)

    async def _record(self, message: Outgoing) -> None:
        """Stores the answer on the condition that no other process has answered for that model, or taken over, meanwhile.

        What a trainer writes in between is answered in its turn.
        """
        (name,) = MODELS.parse(message.subject)
        deadline = time.monotonic() + ANSWER_BUDGET
        while True:
            try:
                at = self._heard.get(name, 0)
                async for seq, msg_id, event in self._events_after(message.subject, at):
                    if msg_id == message.msg_id:  # stored, and its acknowledgement was lost
                        self._heard[name] = seq
                        return
                    if event.event in ANSWERS:
                        raise Superseded(f"{event.version} of {name} was {event.event} by another process.")
                    at = seq
                if not await self._models_fence.stands():
                    raise Superseded(f"Another process answers for {name} now.")
                marker = self._models_fence.marker()
                last = await store_batch(
                    self.bus,
                    secrets.token_hex(8),
                    [
                        (message, message.wire_headers(subject_at=at)),
                        (marker, marker.wire_headers(subject_at=self._models_fence.seq)),
                    ],
                )
                self._models_fence.moved(last)
                self._heard[name] = max(self._heard.get(name, 0), last - 1)
                return
            except (BusUnavailable, TimeoutError, KnownId) as error:
                if time.monotonic() > deadline:
                    raise
                self.log.warning(
                    "the answer is tried again", action="emitter.answer", error=str(error) or type(error).__name__
                )
                await asyncio.sleep(ANSWER_PAUSE)

    async def _events_after(self, subject: str, seq: int) -> AsyncIterator[tuple[int, str, ModelEvent]]:
        while True:
            try:
                raw = await self.bus.js.get_msg(str(MODELS.stream), seq=seq + 1, subject=subject, next=True)
            except NotFoundError:
                return
            seq = int(raw.seq or 0)
            yield seq, (raw.headers or {}).get(Header.MSG_ID.value, ""), MODELS.decode(raw.data or b"")

    def _serving(self, timeframe: str, candles_seq: int) -> Activation | None:
        for activation in reversed(self.active.get(timeframe, ())):
            if activation.from_seq <= candles_seq:
                return activation
        return None

    # --- the stream ------------------------------------------------------------------------------------------------

    async def _handle(self, delivery: Delivery[FeatureBlock]) -> Outcome:
        block = delivery.message
        activation = self._serving(block.timeframe, block.candles_seq)
        now = datetime.now(UTC)
        headers = trace_headers(delivery.headers) | {
            RECEIVED_AT: block.received_at.isoformat(),
            FEATURES_AT: datetime.fromtimestamp(delivery.stored_at, UTC).isoformat(),
        }
        out: list[Outgoing] = []
        for row in block.rows:
            if not makes_signal(row):
                continue
            signal = self._signal(block, row, activation, now)
            if signal.supersedes == signal.id:
                continue  # the bar changed, and nothing that its signal depends on
            if block.candles_seq <= self._said_until and (signal.id, block.candles_seq) in self._said:
                continue
            signals_total.inc(abstain=signal.abstain or "none")
            # A correction that is taken back makes the first signal again: the same id, and yet another message.
            msg_id = _msg_id(signal)
            own = headers | {CANDLE: digest_text(row)}
            out.append(outgoing(SIGNALS, signal, block.timeframe, block.symbol, msg_id=msg_id, headers=own))
        if len(block.rows) == 1 and not block.replay:
            signal_seconds.observe((now - block.received_at).total_seconds())
        return Done(tuple(out))

    async def _publish(self, messages: Sequence[Outgoing]) -> None:
        await self._out.publish(messages)
        if messages:
            self._tail = messages[-1].msg_id

    async def _check(self, reconnected: asyncio.Event) -> None:
        """After every reconnect: does SIGNALS still end with what was published last? If not, recover."""
        while True:
            await reconnected.wait()
            reconnected.clear()
            try:
                async with self._gate:
                    tail = await last_message(self.bus, SIGNALS)
                    expected = self._tail
            except (NatsError, APIError, TimeoutError) as error:
                self.log.warning("the check is tried again", action="emitter.check", error=type(error).__name__)
                await asyncio.sleep(CHECK_PAUSE)
                reconnected.set()
                continue
            found = _msg_id(tail[1]) if tail is not None else ""
            if found != expected:
                raise StreamReplaced(
                    f"SIGNALS ends with {found or 'nothing'} instead of {expected or 'nothing'}: it is made whole again."
                )

    async def _again(self, data: bytes) -> bytes:
        """`emitter.again`: a FeatureBlock that was parked, tried once more; answers {"signals": N} or {"error": why}."""
        try:
            block = FEATURES.decode(data)
        except msgspec.DecodeError as error:
            return msgspec.json.encode({"error": f"This is no block of features: {error}."})
        async with self._gate:
            delivery = Delivery(block, 0, FEATURES.subject(block.timeframe, block.symbol), 0, time.time(), {})
            outcome = await self._handle(delivery)
            messages = outcome.messages if isinstance(outcome, Done) else ()
            await self._publish(messages)
        return msgspec.json.encode({"signals": len(messages)})

    def _signal(self, block: FeatureBlock, row: FeatureRow, activation: Activation | None, now: datetime) -> Signal:
        return signal_of(
            block,
            row,
            model=activation.model if activation is not None else None,
            version=activation.version if activation is not None else None,
            state=activation.state if activation is not None else None,
            model_name=model_name(block.timeframe),
            versions=self.versions.get(block.timeframe, ()),
            created_at=now,
        )

    def _committed(self, delivery: Delivery[FeatureBlock]) -> None:
        self._done = delivery.message.candles_seq
        self.handled = max(self.handled, self._done)
        if self._said and self._done > self._said_until:
            self._said.clear()
        cursor_lag.set(delivery.pending, actor=self.name)
        cursor_lag_seconds.set(max(0.0, time.time() - delivery.stored_at), actor=self.name)


def _msg_id(signal: Signal) -> str:
    return f"{signal.id}:{signal.candles_seq}"
