"""The collector: takes candles over HTTP, decides what each is, and answers once JetStream has what it accepted.

Everything else of the HTTP surface is in ``actors/gateway``; what a candle is, is decided in ``actors/core/ingest``.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import ClassVar, Final

import msgspec
from aiohttp import web
from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError

from actors import gateway
from actors.core.blocks import candle_blocks
from actors.core.clock import Conversion
from actors.core.ingest import (
    ANONYMOUS,
    REPLAYED,
    CheckedPayload,
    Close,
    Judged,
    Payload,
    PayloadError,
    Series,
    block_id,
    check_payload,
    judge,
    read,
)
from actors.core.recent import RecentSignals
from actors.core.sessions import ServerClock
from actors.core.timeframe import from_epoch
from actors.gateway.answers import Check
from actors.gateway.auth import Guard, check_bind
from actors.gateway.backfills import Backfills, Pasts
from actors.gateway.body import decode_json, read_body
from actors.gateway.broadcast import Broadcaster
from actors.gateway.clocks import ClockKeeper
from actors.gateway.deps import GatewayDeps
from actors.gateway.problems import HttpProblem, answer, unavailable
from actors.gateway.rejected import reject_messages
from bus.client import BusUnavailable, Outgoing, outgoing
from bus.consume import Reader, StreamReplaced
from bus.status import judge as judge_actor
from bus.status import scrape, statuses
from bus.store import Store, StoreUnavailable
from bus.subjects import CANDLES, FORMING, SCORECARD, SIGNALS
from bus.supervise import ConfigurationError, Context, run_tasks
from bus.telemetry import (
    TRACEPARENT,
    candles_total,
    child_traceparent,
    post_seconds,
    posts_total,
    rejected_total,
    series_gauge,
)
from schema.messages import (
    Backfill,
    Candle,
    FormingCandle,
    IngestAnswer,
    RejectedCandle,
    Signal,
)

GRACE: Final = 0.1  # seconds beyond publish_timeout that a whole request may wait for the bus: a 503 is due within 2 s
LEARNT_AT_ONCE: Final = 64  # series that the log is asked for side by side
LOOKED_UP: Final = 8  # bars of one payload for whose predecessor the archive is asked
LOOK_UP_WAIT: Final = 0.5
SCORECARD_WAIT: Final = 2.0  # seconds that the scorer has to answer; it answers from memory
PEERS: Final = (
    "features",
    "emitter",
    "recorder",
    "trainer",
    "scorer",
    "health",
    "backup",
)  # what /health of the gateway asks about

Key = tuple[str, str]


@dataclass(slots=True)
class Turn:
    """Whose turn a series is: requests take it one after the other. ``users`` have it or wait for it."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class Collector:
    name: ClassVar[str] = "collector"
    description: ClassVar[str] = "Takes candles over HTTP and serves signals."

    def __init__(self, ctx: Context) -> None:
        check_bind(ctx.settings.gateway)
        self.ctx = ctx
        self.bus = ctx.bus
        self.log = ctx.log
        self.limits = ctx.settings.gateway
        self.guard = Guard(self.limits)
        self.broadcaster = Broadcaster(RecentSignals(self.limits.recent_signals))
        self.series: OrderedDict[Key, Series] = OrderedDict()  # least recently used first
        self.store: Store | None = None
        self._turns: dict[Key, Turn] = {}  # of the series that a request is about right now
        self._any = msgspec.json.Decoder()
        self._patience = self.bus.settings.publish_timeout + GRACE
        self._queued: set[asyncio.Timeout] = set()  # of requests that wait for their turn

    async def run(self) -> None:
        url = self.ctx.database_url
        store = await Store.connect(url, size=self.ctx.settings.database.pool_size, name=self.name) if url else None
        self.store = store
        self.clock = await ClockKeeper.open(self.bus, self.ctx.settings.clock, self.log)
        self.backfills = Backfills(
            Pasts(self.bus, store, self._clock_of).load, max_series=self.ctx.settings.features.max_series
        )
        deps = GatewayDeps(
            settings=self.ctx.settings,
            guard=self.guard,
            broadcaster=self.broadcaster,
            store=store,
            ready=lambda: self.bus.connected,
            checks=self._checks,
            scrape=lambda: scrape(self.bus, PEERS, self.ctx.process),
            signals_after=self._signals_after,
            clock_of=self._clock_of,
            scorecard=lambda request: self.bus.request(SCORECARD, request, timeout=SCORECARD_WAIT),
            given_up=self.backfills.given_up,
        )
        app = gateway.application(deps)
        app.router.add_post("/ingest", self._ingest)
        runner = gateway.runner(app)
        await runner.setup()
        try:
            try:
                await web.TCPSite(runner, self.limits.host, self.limits.port, reuse_address=True).start()
            except OSError as error:
                raise ConfigurationError(
                    f"The gateway cannot listen on {self.limits.host}:{self.limits.port} ({error.strerror}): "
                    "end what listens there, or set MT5_GATEWAY_PORT."
                ) from error
            self.ctx.ready()
            await run_tasks(
                {
                    "collector-signals": self._follow_signals(),
                    "collector-clock": self.clock.follow(),
                    "collector-gaps": self.backfills.refresh(),
                }
            )
        finally:
            await runner.cleanup()
            if store is not None:
                await store.close()

    def _clock_of(self, source: str | None) -> ServerClock:
        line = self.clock.clocks.line(source)
        return ServerClock(line.to_server, line.to_utc)

    # --- POST /ingest ----------------------------------------------------------------------------------------------

    async def _ingest(self, request: web.Request) -> web.StreamResponse:
        started = time.perf_counter()
        status = 500
        try:
            response = await self._take(request)
            status = response.status
            return response
        except HttpProblem as problem:
            status = problem.status
            raise
        finally:
            posts_total.inc(status=str(status))
            post_seconds.observe(time.perf_counter() - started)

    async def _take(self, request: web.Request) -> web.StreamResponse:
        body = await read_body(request, self.limits)
        payload = self._payload(body)
        self.guard.charge(request, len(payload.candles))
        # Only what passed may name a subject: the server ends the connection of whoever asks for a monstrous one.
        checked = check_payload(payload, self.ctx.settings.symbols)
        keys = sorted(checked.sent)  # two requests take their turns in the same order
        turns = [self._turn(key) for key in keys]
        held = 0
        try:
            async with asyncio.timeout(self._patience) as limit:
                self._queued.add(limit)
                try:
                    for turn in turns:
                        await turn.lock.acquire()
                        held += 1
                finally:
                    self._queued.discard(limit)
                judged = await self._publish(request, body, payload, checked, limit)
                backfill = self._missing(payload, judged, keys)
        except (BusUnavailable, TimeoutError) as error:
            self.log.warning("candles not stored", action="ingest.unavailable", error=str(error) or "no answer in time")
            raise unavailable("The candles may or may not be stored: send the same again, which is safe.") from error
        finally:
            for turn in turns[:held]:
                turn.lock.release()
            for key, turn in zip(keys, turns, strict=True):
                turn.users -= 1
                if not turn.users:
                    del self._turns[key]
            self._forget()
        accepted = sum(len(layer) for layers in judged.layers.values() for layer in layers)
        for outcome, count in (
            ("accepted", accepted),
            ("duplicate", judged.duplicates),
            ("forming", len(judged.forming)),
            ("rejected", len(judged.rejected)),
        ):
            if count:
                candles_total.inc(count, outcome=outcome)
        for rejection in judged.rejected:
            rejected_total.inc(reason=rejection.code)
        result = IngestAnswer(
            received=len(payload.candles),
            accepted=accepted,
            duplicates=judged.duplicates,
            forming=len(judged.forming),
            rejected=tuple(RejectedCandle(index=r.place, error=r.error) for r in judged.rejected),
            backfill=tuple(backfill),
        )
        return answer(result, status=200 if accepted or judged.duplicates or judged.forming else 422)

    def _payload(self, body: bytes) -> Payload:
        try:
            payload = read(body)
        except PayloadError as error:
            raise HttpProblem(422, str(error)) from None
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            decode_json(body, self._any)  # raises the sentence for what is no JSON
            raise HttpProblem(400, f"The body is not one JSON document: {error}.") from None
        if not payload.candles:
            raise HttpProblem(422, "The body holds no candle: send at least one.")
        if len(payload.candles) > self.limits.max_candles:
            raise HttpProblem(
                413, f"{len(payload.candles):,} candles are over {self.limits.max_candles:,}: send fewer at a time."
            )
        return payload

    def _turn(self, key: Key) -> Turn:
        turn = self._turns.get(key)
        if turn is None:
            turn = self._turns[key] = Turn()
        turn.users += 1
        return turn

    def _heard(self, limit: asyncio.Timeout) -> None:
        """Told that the bus has answered a request with this limit.

        A bus that answers, if slowly, is not away: thousands of messages may take their time, and so may the requests
        that wait for them. Only silence ends in a 503, and all who wait hear the same silence.
        """
        until = asyncio.get_running_loop().time() + self._patience
        for waiting in (limit, *self._queued):
            if not waiting.expired():
                waiting.reschedule(until)

    async def _publish(
        self, request: web.Request, body: bytes, payload: Payload, checked: CheckedPayload, limit: asyncio.Timeout
    ) -> Judged:
        """Judges the payload and stores what is closed; what the stream acknowledged is remembered."""
        await self._learn(checked.sent, limit)
        now = time.time()
        conversion = await self.clock.resolve(
            payload.source,
            server_time=payload.server_time,
            gmt_time=payload.gmt_time,
            series=checked.sent,
            now=now,
            replay=payload.replay,
        )
        judged = judge(payload, checked, now, self.series, self.ctx.settings.symbols, conversion)
        if judged.unsure and (bases := await self._closes_before(judged.unsure)):
            judged = judge(payload, checked, now, self.series, self.ctx.settings.symbols, conversion, bases)
        received_at = from_epoch(int(now)).replace(microsecond=int(now % 1 * 1e6))
        headers = {TRACEPARENT: child_traceparent(request.headers.get(TRACEPARENT))}
        told = [(key, rows) for key, rows in judged.confirmed.items()]
        told += [(key, layer) for key, layers in judged.layers.items() for layer in layers]
        messages = [
            message
            for key, rows in told
            for message in _blocks(key, rows, payload, received_at, headers, conversion, checked.points.get(key[0]))
        ]
        messages += reject_messages(body, payload, judged.rejected, received_at, headers)
        if len(messages) == 1:
            await self.bus.store(messages[0])
        elif messages:
            await self.bus.store_all(messages, lambda: self._heard(limit))
        if messages and self._queued:
            self._heard(limit)
        sent_at = conversion.sent_at(payload.server_time)
        for key, rows in told:
            self.series[key].remember(rows, payload.origin, sent_at)
        for bar in judged.forming:
            await self.bus.emit(
                FORMING,
                FormingCandle(symbol=bar.symbol, timeframe=bar.timeframe, candle=bar.candle, received_at=received_at),
                bar.timeframe,
                bar.symbol,
            )
        return judged

    def _missing(self, payload: Payload, judged: Judged, keys: Sequence[Key]) -> list[Backfill]:
        """What to ask the terminal for; files and simulated markets have nothing more to give."""
        now = time.time()
        past = payload.history or payload.replay
        out: list[Backfill] = []
        for key in keys:
            layers = judged.layers.get(key)
            out += self.backfills.on_accepted(key, layers[0] if layers else (), now, history=past)
        return [] if past else out

    async def _learn(self, keys: Iterable[Key], limit: asyncio.Timeout) -> None:
        """Makes sure that memory knows what the log says of these series."""
        unknown = []
        for key in keys:
            if key in self.series:
                self.series.move_to_end(key)
            else:
                unknown.append(key)
        for start in range(0, len(unknown), LEARNT_AT_ONCE):
            part = unknown[start : start + LEARNT_AT_ONCE]
            if len(part) == 1:
                self.series[part[0]] = await self._newest(*part[0])
                continue
            learnt = await asyncio.gather(*(self._newest(*key) for key in part), return_exceptions=True)
            for key, known in zip(part, learnt, strict=True):
                if isinstance(known, BaseException):
                    raise known
                self.series[key] = known
            self._heard(limit)
        if unknown:
            series_gauge.set(len(self.series), actor=self.name)

    async def _newest(self, symbol: str, timeframe: str) -> Series:
        """A series as the log's newest message shows it, which holds the newest bars."""
        known = Series()
        try:
            raw = await self.bus.js.get_last_msg(str(CANDLES.stream), CANDLES.subject(timeframe, symbol), direct=True)
        except NotFoundError:
            return known
        except (NatsError, TimeoutError) as error:
            raise BusUnavailable(f"NATS did not say what it holds of {symbol} ({type(error).__name__}).") from error
        block = CANDLES.decode(raw.data or b"")
        sent_at = block.server_utc if block.server_utc is not None else block.server_time
        known.remember(block.rows, block.source or (REPLAYED if block.replay else ANONYMOUS), sent_at)
        return known

    async def _closes_before(self, bars: Sequence[tuple[Key, int]]) -> dict[tuple[Key, int], Close]:
        """The archive's newest bar before each of some bars that look like jumps; rare, so that nobody else waits for it.

        What it does not say in time, or beyond :data:`LOOKED_UP`, is judged by what memory knows.
        """
        out: dict[tuple[Key, int], Close] = {}
        if self.store is None:
            return out
        try:
            async with asyncio.timeout(LOOK_UP_WAIT):
                for (symbol, timeframe), ts in bars[:LOOKED_UP]:
                    found = await self.store.candles(symbol, timeframe, end=from_epoch(ts - 1), limit=1)
                    for bar in found:
                        out[(symbol, timeframe), ts] = Close(int(bar.ts.timestamp()), bar.close)
        except (StoreUnavailable, TimeoutError) as error:
            self.log.info("archive not asked", action="ingest.look_up", error=str(error) or "no answer in time")
        return out

    def _forget(self) -> None:
        """Bounds the memory: the least recently used series can be learnt again. What a request is about stays."""
        over = len(self.series) - self.ctx.settings.features.max_series
        if over > 0:
            free = (key for key in self.series if key not in self._turns)
            for key in list(itertools.islice(free, over)):
                del self.series[key]
            series_gauge.set(len(self.series), actor=self.name)

    # --- signals ---------------------------------------------------------------------------------------------------

    async def _follow_signals(self) -> None:
        """Keeps the newest signals in memory, for GET /signals and its stream."""
        while True:
            try:
                await self._follow_once()
            except StreamReplaced as error:
                self.log.warning("signals are read anew", action="collector.signals", reason=str(error))

    async def _follow_once(self) -> None:
        info = await self.bus.js.stream_info(str(SIGNALS.stream))
        last = info.state.last_seq
        start = max(info.state.first_seq, last - self.limits.recent_signals + 1, 1)
        self.broadcaster.reset(start - 1)
        async with Reader(self.bus, SIGNALS, name=self.name, start=start, batch=512) as reader:
            if last < start:
                self.broadcaster.caught_up()
            async for delivery in reader:
                self.broadcaster.publish(delivery.stream_seq, delivery.message)
                if delivery.stream_seq >= last:
                    self.broadcaster.caught_up()

    async def _signals_after(self, stream_seq: int, most: int) -> list[tuple[int, Signal]]:
        name = f"{self.name}-resume-{time.monotonic_ns()}"
        out: list[tuple[int, Signal]] = []
        try:
            async with Reader(self.bus, SIGNALS, name=name, start=stream_seq + 1, batch=most) as reader:
                while len(out) < most and not reader.caught_up:
                    delivery = await reader.next(timeout=2.0)
                    out.append((delivery.stream_seq, delivery.message))
        except (NatsError, StreamReplaced) as error:
            raise BusUnavailable(f"NATS did not answer in time ({type(error).__name__}).") from error
        return out

    # --- health ----------------------------------------------------------------------------------------------------

    async def _checks(self) -> Mapping[str, Check]:
        if not self.bus.connected:
            return {"bus": Check(status="down", detail="NATS is not connected: candles are refused with 503.")}
        checks = {"bus": Check(status="ok", detail="NATS is connected.")}
        for peer, found in (await statuses(self.bus, PEERS, own=self.ctx.process)).items():
            status, detail = judge_actor(peer, found)
            checks[peer] = Check(status=status, detail=detail)
        return checks


def _blocks(
    key: Key,
    rows: Sequence[Candle],
    payload: Payload,
    received_at: datetime,
    headers: Mapping[str, str],
    conversion: Conversion,
    point: float | None,
) -> Iterable[Outgoing]:
    symbol, timeframe = key
    for block in candle_blocks(key, rows, payload, received_at, conversion, point):
        msg_id = block_id(symbol, timeframe, block.rows, payload.server_time)
        yield outgoing(CANDLES, block, timeframe, symbol, msg_id=msg_id, headers=headers)
