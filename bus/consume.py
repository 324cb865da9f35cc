"""Reading a stream in order: one pull loop that heals itself, and the one place that decides what an outcome does.

Actors resume by their own cursor, so consumers keep no acknowledgements: a consumer is made at the cursor's next
sequence each time a reader opens, and made again when it was deleted, when the server restarted or went silent.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

import msgspec
import structlog
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, StreamInfo
from nats.js.errors import APIError, NotFoundError

from bus.client import NO_MESSAGE, Bus, BusUnavailable, Outgoing
from bus.store import StoreUnavailable
from bus.subjects import REJECTS, Channel
from bus.telemetry import parked_total
from bus.writer import Superseded
from schema.messages import Message, Reject

log = structlog.get_logger(__name__)
M = TypeVar("M", bound=Message)

BATCH: Final = 64  # messages asked for at once: blocks may hold 300 KB each, so this bounds memory to about 20 MB
EXPIRES: Final = 30.0  # seconds a pull request lives on the server
HEARTBEAT: Final = 5.0  # the server says this often that an idle request is alive; two missed ones mean trouble
SILENCE: Final = 2 * HEARTBEAT + 1.0
DRAIN_BUDGET: Final = 3.0  # seconds that a handler has to finish its message once the actor is asked to stop
REOPEN_MAX: Final = 5.0  # longest pause between tries to make a consumer again
INACTIVE: Final = 300.0  # the server drops a consumer that nobody reads for this long, as after a crash


POISON_TRIES: Final = 3  # times that a message may fail its actor before it is parked


class Failing:
    """Messages that failed their actor, over its restarts: one that fails again and again must not hold up the rest."""

    def __init__(self) -> None:
        self._failures: dict[tuple[str, int], tuple[int, str]] = {}

    def count(self, stream: str, seq: int, error: Exception) -> None:
        times = self._failures.get((stream, seq), (0, ""))[0]
        self._failures = {
            (stream, seq): (times + 1, f"{type(error).__name__}: {error}")
        }  # order is kept: one at a time

    def verdict(self, stream: str, seq: int) -> str | None:
        """Why a message is to be parked, None where it may be tried."""
        times, error = self._failures.get((stream, seq), (0, ""))
        return f"failed {times} times, last with {error}" if times >= POISON_TRIES else None


class StreamReplaced(Exception):
    """The stream under a reader was made anew or lost its tail: the actor restarts, which recovers from its cursor."""


@dataclass(frozen=True, slots=True)
class Delivery(Generic[M]):
    """One message with where it stood. ``pending`` counts what the server has still to deliver behind it."""

    message: M
    stream_seq: int
    subject: str
    pending: int
    stored_at: float  # epoch seconds at which the stream stored it
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Done:
    """Handled. ``messages`` are what it makes: the loop publishes them, in order, before anything counts as read."""

    messages: tuple[Outgoing, ...] = ()


@dataclass(frozen=True, slots=True)
class Retry:
    """Not now: the same message again after ``after`` seconds; nothing overtakes it."""

    after: float
    reason: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """Never: park the message whole on ``rejects.<actor>`` with the reason and move on."""

    reason: str


Outcome = Done | Retry | Rejected
Publish = Callable[[Sequence[Outgoing]], Awaitable[Any]]
# What ends a handler through no fault of its message.
PASSING: Final = (BusUnavailable, StreamReplaced, Superseded, NatsError, APIError, StoreUnavailable)


def _position(msg: Msg) -> tuple[int, int, float]:
    """(stream sequence, pending, stored at) from the reply subject ``$JS.ACK…``, old and new form."""
    tokens = msg.reply.split(".")
    at = 4 if len(tokens) == 9 else 6
    return int(tokens[at + 1]), int(tokens[at + 4]), int(tokens[at + 3]) / 1e9


def _delivery(msg: Msg) -> int:
    """How many messages the consumer has delivered with this one, from the same subject."""
    tokens = msg.reply.split(".")
    return int(tokens[6 if len(tokens) == 9 else 8])


class Reader(Generic[M]):
    """An ordered reader of one channel's stream from a sequence on; an async context manager and iterator."""

    def __init__(
        self,
        bus: Bus,
        channel: Channel[M],
        *,
        name: str,
        start: int,
        batch: int = BATCH,
        subject: str | None = None,
    ) -> None:
        if channel.stream is None:
            raise ValueError(f"{channel.prefix} has no stream to read")
        self.bus = bus
        self.channel = channel
        self.name = name
        self.consumer = f"{name}-{secrets.token_hex(4)}"  # its own: a process that wakes up late must not take it away
        self.stream = channel.stream
        self.position = max(start, 1) - 1  # last stream sequence handed out
        self.last_seen = 0  # the stream's last sequence as far as known
        self._subject = subject or channel.wildcard
        self._batch = batch
        self._queue: deque[Msg] = deque()
        self._received = self.position
        self._delivered = 0  # messages that came of the consumer as it was last made
        self._outstanding = 0
        self._wake = asyncio.Event()
        self._broken: str | None = None
        self._heard = 0.0
        self._created: str | None = None
        self._inbox = ""
        self._sub: Any = None
        self._forget: Callable[[], None] | None = None

    async def __aenter__(self) -> Self:
        self._forget = self.bus.on_reconnect(lambda: self._break("the connection was made anew"))
        await self._reopen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._forget is not None:
            self._forget()
        await self._unsubscribe()
        if self.bus.connected:
            with contextlib.suppress(NatsError, TimeoutError):
                await self.bus.js.delete_consumer(self.stream, self.consumer)

    async def __aiter__(self) -> AsyncIterator[Delivery[M]]:
        while True:
            yield await self.next()

    async def next(self, timeout: float | None = None) -> Delivery[M]:
        """The next message; what cannot be decoded is parked and skipped. Raises TimeoutError after ``timeout``."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            await self._wait(deadline)
            delivery = await self._take()
            if delivery is not None:
                return delivery

    async def batch(self, most: int, linger: float) -> list[Delivery[M]]:
        """Waits for one message, then gathers up to ``most`` of those that come within ``linger`` seconds."""
        first = await self.next()
        out = [first]
        deadline = time.monotonic() + linger
        while len(out) < most:
            if not self._queue:
                if time.monotonic() >= deadline:
                    break
                try:
                    await self._wait(deadline)
                except TimeoutError:
                    break
            delivery = await self._take()
            if delivery is not None:
                out.append(delivery)
        return out

    @property
    def caught_up(self) -> bool:
        """Nothing is waiting that was in the stream when the newest message was delivered."""
        return not self._queue and self.position >= self.last_seen

    async def _take(self) -> Delivery[M] | None:
        msg = self._queue.popleft()
        seq, pending, stored_at = _position(msg)
        self.position = seq
        self.last_seen = max(self.last_seen, seq + pending)
        headers = msg.headers or {}
        try:
            message = self.channel.decode(msg.data)
        except msgspec.DecodeError as error:
            await park(self.bus, self.name, msg.subject, msg.data, headers, f"cannot be decoded: {error}")
            return None
        return Delivery(message, seq, msg.subject, pending, stored_at, headers)

    async def _wait(self, deadline: float | None) -> None:
        while not self._queue:
            if self._broken is not None:
                await self._reopen()
            await self._ask()
            limit = self._heard + SILENCE
            if deadline is not None and deadline < limit:
                limit = deadline
            self._wake.clear()
            if self._queue or self._broken is not None:
                continue
            try:
                async with asyncio.timeout(limit - time.monotonic()):
                    await self._wake.wait()
            except TimeoutError:
                if deadline is not None and time.monotonic() >= deadline:
                    raise
                if time.monotonic() >= self._heard + SILENCE:
                    self._break("the server went silent")

    async def _ask(self) -> None:
        if self._outstanding + len(self._queue) > self._batch // 2:
            return
        request = {"batch": self._batch, "expires": int(EXPIRES * 1e9), "idle_heartbeat": int(HEARTBEAT * 1e9)}
        self._outstanding += self._batch
        await self.bus.nc.publish(
            f"$JS.API.CONSUMER.MSG.NEXT.{self.stream}.{self.consumer}", json.dumps(request).encode(), reply=self._inbox
        )

    async def _on_message(self, msg: Msg) -> None:
        self._heard = time.monotonic()
        headers = msg.headers
        status = headers.get("Status") if headers and not msg.data else None
        if status is None:
            self._outstanding -= 1
            seq = _position(msg)[0]
            if seq <= self._received:  # of a consumer that was replaced meanwhile
                return
            self._delivered += 1
            if _delivery(msg) != self._delivered:
                # What a broken connection swallowed counts as delivered for the server, which goes on behind it as soon
                # as the inbox is subscribed again.
                self._break("messages were lost on the way")
                return
            self._received = seq
            self._queue.append(msg)
        elif status == "100":
            return
        elif status in ("404", "408") or (
            status == "409" and "Batch Completed" in (headers or {}).get("Description", "")
        ):
            self._outstanding -= int((headers or {}).get("Nats-Pending-Messages") or self._batch)
        else:
            self._break(f"{status} {(headers or {}).get('Description', '')}")
        self._wake.set()

    def _break(self, reason: str) -> None:
        self._broken = self._broken or reason
        self._wake.set()

    async def _unsubscribe(self) -> None:
        if self._sub is not None:
            with contextlib.suppress(NatsError):
                await self._sub.unsubscribe()
            self._sub = None

    async def _reopen(self) -> None:
        """Makes the consumer at the position's next sequence; tries until it works."""
        pause = 0.1
        while True:
            reason, self._broken = self._broken, None
            try:
                await self._open()
            except (NatsError, APIError, TimeoutError, OSError) as error:
                log.warning(
                    "consumer not made, trying again",
                    action="consume.retry",
                    consumer=self.name,
                    stream=self.stream,
                    error=f"{type(error).__name__}: {error}",
                )
                self._broken = reason or "not made"
                await asyncio.sleep(pause)
                pause = min(2 * pause, REOPEN_MAX)
                continue
            if reason is not None:
                log.info("consumer made again", action="consume.healed", consumer=self.name, reason=reason)
            return

    async def _open(self) -> None:
        await self._unsubscribe()
        info: StreamInfo = await self.bus.js.stream_info(self.stream)
        if self._created is None:
            self._created = str(info.created)
        elif str(info.created) != self._created or info.state.last_seq < self._received:
            raise StreamReplaced(
                f"{self.stream} ends at {info.state.last_seq}, {self.name} had read {self._received}: reading starts again."
            )
        self.last_seen = max(self.last_seen, info.state.last_seq)
        with contextlib.suppress(NotFoundError):
            await self.bus.js.delete_consumer(self.stream, self.consumer)
        await self.bus.js.add_consumer(
            self.stream,
            ConsumerConfig(
                name=self.consumer,
                deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
                opt_start_seq=self._received + 1,
                ack_policy=AckPolicy.NONE,
                max_deliver=1,
                filter_subject=self._subject,
                inactive_threshold=INACTIVE,
                mem_storage=True,  # its whole state is the actor's cursor
                num_replicas=1,
            ),
        )
        self._inbox = self.bus.nc.new_inbox()
        self._outstanding = self._delivered = 0
        self._heard = time.monotonic()
        self._sub = await self.bus.nc.subscribe(self._inbox, cb=self._on_message)


async def park(
    bus: Bus, where: str, subject: str, data: bytes, headers: Mapping[str, str], reason: str, source: str = ""
) -> None:
    """Keeps what cannot be processed, whole, on ``rejects.<where>``; waits until it is kept."""
    try:
        payload: Any = msgspec.json.decode(data)
    except msgspec.DecodeError:
        payload = data.decode(errors="backslashreplace")
    reject = Reject(
        where=where,
        reason=reason,
        at=datetime.now(UTC),
        payload=payload,
        subject=subject,
        source=source,
        headers=dict(headers),
    )
    log.error("parked", action="consume.parked", where=where, subject=subject, reason=reason)
    parked_total.inc(actor=where)
    while True:
        try:
            await bus.publish(
                REJECTS, reject, where, msg_id=f"{where}:{hashlib.blake2b(data, digest_size=16).hexdigest()}"
            )
            return
        except BusUnavailable as error:
            log.warning("parking is tried again", action="consume.park_retry", error=str(error))
            await asyncio.sleep(1.0)


async def consume(
    reader: Reader[M],
    handler: Callable[[Delivery[M]], Awaitable[Outcome]],
    *,
    publish: Publish | None = None,
    committed: Callable[[Delivery[M]], None] = lambda _: None,
    gate: asyncio.Lock | None = None,
    failing: Failing | None = None,
    most: int = BATCH,
    drain_budget: float = DRAIN_BUDGET,
) -> None:
    """Hands each message to ``handler`` in order and does what its outcome says, until cancelled.

    All that waits is handled as one batch and its messages go to ``publish`` together; ``committed`` then hears of the
    batch's last delivery. A handler that makes none needs no ``publish``. ``gate`` is held meanwhile: whoever else takes it finds the actor between two batches.
    A message that failed its actor :data:`POISON_TRIES` times, as ``failing`` remembers, is parked.
    A cancellation waits up to ``drain_budget`` seconds for the batch in hand.
    """
    gate = gate or asyncio.Lock()
    failing = failing or Failing()

    async def work(batch: list[Delivery[M]]) -> None:
        async with gate:
            await _handle(reader, batch, handler, publish or _nowhere, failing)
            committed(batch[-1])

    while True:
        batch = await reader.batch(most, linger=0.0)
        task = asyncio.ensure_future(work(batch))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.done():
                _, late = await asyncio.wait([task], timeout=drain_budget)
                if late:
                    log.warning("batch cut off by the stop", action="consume.cut", consumer=reader.name)
                    task.cancel()
            raise


async def _nowhere(messages: Sequence[Outgoing]) -> None:
    if messages:
        raise ValueError(f"{len(messages)} messages were made by a handler that has nowhere to publish them")


async def _handle(
    reader: Reader[M],
    batch: list[Delivery[M]],
    handler: Callable[[Delivery[M]], Awaitable[Outcome]],
    publish: Publish,
    failing: Failing,
) -> None:
    made: list[Outgoing] = []
    for delivery in batch:
        while True:
            outcome = await _outcome(reader, delivery, handler, failing)
            match outcome:
                case Done(messages):
                    made.extend(messages)
                    break
                case Retry(after, reason):
                    # What came before must not wait for it.
                    await publish(made)
                    made.clear()
                    log.warning("message is tried again", action="consume.again", reason=reason, after=after)
                    await asyncio.sleep(after)
                case Rejected(reason):
                    data = reader.channel.encode(delivery.message)
                    await park(reader.bus, reader.name, delivery.subject, data, delivery.headers, reason)
                    break
    await publish(made)


async def _outcome(
    reader: Reader[M],
    delivery: Delivery[M],
    handler: Callable[[Delivery[M]], Awaitable[Outcome]],
    failing: Failing,
) -> Outcome:
    """The handler's; a handler that fails has left its actor's state half changed, so the actor starts again."""
    reason = failing.verdict(reader.stream, delivery.stream_seq)
    if reason is not None:
        return Rejected(reason)
    try:
        return await handler(delivery)
    except PASSING:
        raise
    except Exception as error:
        failing.count(reader.stream, delivery.stream_seq, error)
        raise


async def last_message(bus: Bus, channel: Channel[M]) -> tuple[int, M] | None:
    """The newest message of a channel's stream with its stream sequence, None where there is none."""
    try:
        raw = await bus.js.get_last_msg(str(channel.stream), channel.wildcard)
    except NotFoundError as error:
        if error.err_code != NO_MESSAGE:
            raise  # a stream that is not there now is no empty one
        return None
    return int(raw.seq or 0), channel.decode(raw.data or b"")


async def find(bus: Bus, channel: Channel[M], candles_seq: int) -> int:
    """The stream sequence of a derived stream's first message with at least this ``candles_seq``.

    One past the stream's end where there is none. Derived streams are written in the order of CANDLES, so this is a
    binary search of single messages.
    """
    state = (await bus.js.stream_info(str(channel.stream))).state
    low, high = max(state.first_seq, 1), state.last_seq + 1
    while low < high:
        middle = (low + high) // 2
        try:
            raw = await bus.js.get_msg(
                str(channel.stream), seq=middle, subject=channel.wildcard, next=True, direct=True
            )
        except NotFoundError as error:
            if error.err_code not in (None, NO_MESSAGE):  # None: a direct answer, which has no room for it
                raise
            high = middle
            continue
        if getattr(channel.decode(raw.data or b""), "candles_seq") >= candles_seq:  # noqa: B009
            high = middle
        else:
            low = max(middle, int(raw.seq or 0)) + 1
    return low
