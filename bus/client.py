"""One connection to NATS: publish with an acknowledgement, emit without one, request, and the model files."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Final, NoReturn, TypeVar
from urllib.parse import unquote, urlsplit

import structlog
from nats.aio import transport
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import Header, PubAck
from nats.js.errors import APIError, NotFoundError, ObjectNotFoundError

from bus.acks import Acks, Answer
from bus.subjects import MODEL_FILES, Channel, bucket_stream, bucket_subject
from schema.messages import Message
from schema.settings import Nats

log = structlog.get_logger(__name__)
M = TypeVar("M", bound=Message)

MIN_SERVER: Final = (2, 12)  # older servers silently ignore fields that the topology relies on
MAX_IN_FLIGHT: Final = 256  # publishes awaiting their acknowledgement in publish_many
BURST_WAIT: Final = 5.0  # seconds for a burst of publish_many to be acknowledged before the rest is sent again
RECONNECT_WAIT: Final = 0.2
GIVE_UP_SECONDS: Final = 1.0  # for a first connection to heed its cancellation
CLOSED_EVERY: Final = 0.2  # seconds between two looks whether nats-py has given the connection up
RETRY_EVERY: Final = 0.25  # seconds between tries of an unacknowledged publish
STREAM_FULL: Final = frozenset({10047, 10077, 10023, 10028})  # err_codes that mean: no room now
OF_SUBJECT: Final = "Nats-Expected-Last-Subject-Sequence-Subject"  # nats-py has no name for it
NO_MESSAGE: Final = 10037  # err_code: the stream is there, and has no such message
OUT_OF_ORDER: Final = 10070  # err_code: the stream's last message is not the expected one


def _credentials(url: str) -> tuple[str, str | None, str | None]:
    """A URL without its credentials, and these decoded, which nats-py leaves percent-encoded."""
    parts = urlsplit(url)
    bare = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    user = unquote(parts.username) if parts.username else None
    return bare, user, unquote(parts.password) if parts.password else None


def passing(error: APIError) -> bool:
    """Whether the same message may be stored when it is sent again."""
    return error.err_code in STREAM_FULL or error.err_code == OUT_OF_ORDER or (error.code or 0) >= 500


class BusUnavailable(Exception):
    """The bus did not acknowledge in time: unknown whether it stored the message, so send it again with the same id."""


class BusTooOld(Exception):
    """The NATS server is older than 2.12: upgrade nats-server."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One encoded message on its way to a stream."""

    subject: str
    payload: bytes
    msg_id: str
    stream: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def wire_headers(
        self, after: Outgoing | None = None, subject_at: int | None = None, of: str | None = None
    ) -> dict[str, str]:
        """``after``: the stream takes this message only where its last one is that one (or has both).

        ``subject_at``: only where the last message of the subject (or of the subject ``of``) has that sequence.
        """
        headers = {**self.headers, Header.MSG_ID.value: self.msg_id, Header.EXPECTED_STREAM.value: self.stream}
        if subject_at is not None:
            headers[Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value] = str(subject_at)
            if of is not None:
                headers[OF_SUBJECT] = of
        if after is not None and after.stream == self.stream:
            headers[Header.EXPECTED_LAST_MSG_ID.value] = after.msg_id
        return headers


def outgoing(
    channel: Channel[M], message: M, *tokens: str, msg_id: str, headers: Mapping[str, str] | None = None
) -> Outgoing:
    """Encodes a message for its channel's stream."""
    if channel.stream is None:
        raise ValueError(f"{channel.prefix} has no stream: use emit")
    return Outgoing(channel.subject(*tokens), channel.encode(message), msg_id, channel.stream, headers or {})


async def _give_up(nc: Client, connecting: asyncio.Task[None]) -> None:
    """Ends a first connection that is still being made; nats-py may swallow a cancellation, but not its close."""
    connecting.cancel()
    await asyncio.wait({connecting}, timeout=GIVE_UP_SECONDS)
    await nc.close()
    await asyncio.wait({connecting}, timeout=GIVE_UP_SECONDS)
    if connecting.done() and not connecting.cancelled():
        connecting.exception()  # heard of: nobody else asks


class _Client(Client):
    """nats-py that closes whole while its server is away.

    It writes what is left to a transport that is closed: asyncio's own loop drops that without a word, uvloop raises
    RuntimeError, and subscriptions and callbacks are left as they were.
    """

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        if not self.is_connected:
            self._pending = []  # nobody takes it any more
            self._pending_data_size = 0
        await super()._close(status, do_cbs)


class Bus:
    """A connection that reconnects for ever, and the few verbs that actors use."""

    def __init__(self, nc: Client, settings: Nats) -> None:
        self.nc = nc
        self.js: JetStreamContext = nc.jetstream(timeout=settings.publish_timeout)
        self._acks = Acks(nc)
        self.settings = settings
        self._reconnected: list[Callable[[], None]] = []
        self._closed: list[bool] = []

    @classmethod
    async def connect(cls, url: str, *, name: str, settings: Nats | None = None, patience: float = 10.0) -> Bus:
        """Connects within ``patience`` seconds; refuses a server that is too old.

        Raises:
            BusUnavailable: nobody answers at the URL, or the credentials are wrong.
            BusTooOld: the server is older than 2.12.
        """
        settings = settings or Nats()
        listeners: list[Callable[[], None]] = []
        loop = asyncio.get_running_loop()
        refused: asyncio.Future[str] = loop.create_future()
        last_error = "no answer"
        closing: list[bool] = []  # filled by close(): a disconnect is no news then

        async def on_error(error: Exception) -> None:
            nonlocal last_error
            before, last_error = last_error, str(error) or type(error).__name__
            if "authorization" in last_error.lower() and not refused.done():
                refused.set_result(last_error)
            if last_error != before:  # while NATS is away the same error comes five times a second
                log.warning("nats error", action="bus.error", client=name, error=last_error)

        async def on_disconnect() -> None:
            if not nc.is_closed and not closing:
                log.warning("nats disconnected", action="bus.disconnected", client=name)

        async def on_reconnect() -> None:
            log.info("nats reconnected", action="bus.reconnected", client=name)
            for listener in listeners:
                listener()

        server, user, password = _credentials(url)
        if server.startswith(("ws://", "wss://")):
            # Websockets need what bus/lean.py kept nats-py from reading.
            transport.aiohttp = import_module("aiohttp")  # type: ignore[attr-defined]
        # nats-py tries for ever, the first connection too: it is bounded here, and wrong credentials end it at once.
        nc = _Client()
        connecting = asyncio.create_task(
            nc.connect(
                server,
                user=user,
                password=password,
                name=name,
                inbox_prefix=f"_INBOX_{name.partition('-')[0]}".encode(),  # its own, so that permissions can name it
                max_reconnect_attempts=-1,
                reconnect_time_wait=RECONNECT_WAIT,  # type: ignore[arg-type]  # a float works as well
                connect_timeout=2,
                ping_interval=settings.ping_interval,  # type: ignore[arg-type]
                max_outstanding_pings=2,
                error_cb=on_error,
                disconnected_cb=on_disconnect,
                reconnected_cb=on_reconnect,
            )
        )
        futures: set[asyncio.Future[Any]] = {connecting, refused}
        try:
            await asyncio.wait(futures, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            # Left to itself it would try for ever, deaf to every later cancellation, and keep the process from ending.
            await _give_up(nc, connecting)
            raise
        if not connecting.done():
            await _give_up(nc, connecting)
            why = refused.result() if refused.done() else last_error
            raise BusUnavailable(
                f"NATS does not take our connection ({why}): check that nats-server runs at "
                f"{server} (MT5_NATS_URL) and that user and password are right."
            )
        try:
            connecting.result()
        except (NatsError, OSError, ValueError) as error:
            raise BusUnavailable(f"NATS cannot be reached at {server} (MT5_NATS_URL): {error}.") from error
        version = nc.connected_server_version
        if (version.major, version.minor) < MIN_SERVER:
            await nc.close()
            raise BusTooOld(f"nats-server {version.major}.{version.minor} is too old: 2.12 or newer is needed.")
        bus = cls(nc, settings)
        bus._reconnected, bus._closed = listeners, closing
        return bus

    @property
    def connected(self) -> bool:
        return bool(self.nc.is_connected)

    def on_reconnect(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Calls ``listener`` after every reconnect; returns the way to stop that."""
        self._reconnected.append(listener)
        return lambda: self._reconnected.remove(listener)

    async def keys(self, bucket: str, pattern: str = ">") -> list[str]:
        """The keys of a bucket, sorted, those of deleted values among them; ``pattern`` as of subjects. Raises nats' errors.

        nats-py lists them by a watch, whose end can overtake its first message: now and then a full bucket seems empty.
        """
        subject = bucket_subject(bucket, pattern)
        info = await self.js.stream_info(bucket_stream(bucket), subjects_filter=subject)
        return sorted(found[len(bucket_subject(bucket, "")) :] for found in info.state.subjects or {})

    async def lost(self) -> NoReturn:
        """Waits until the connection is closed for good although nobody closed it.

        nats-py closes, and never reconnects, when the server answers with an error such as a subject that is too long.
        It is looked at, since the callback for it does not come where nats-py's last flush fails.

        Raises:
            BusUnavailable: it is closed; whoever holds it needs a new one.
        """
        while self._closed or not self.nc.is_closed:  # noqa: ASYNC110  # no event tells
            await asyncio.sleep(CLOSED_EVERY)
        raise BusUnavailable(f"NATS closed the connection for good ({self.nc.last_error}).")

    async def publish(
        self, channel: Channel[M], message: M, *tokens: str, msg_id: str, headers: Mapping[str, str] | None = None
    ) -> int:
        """Publishes and waits for the stream's acknowledgement; returns the stream sequence.

        Raises:
            BusUnavailable: no acknowledgement within ``publish_timeout``, or the stream refused for want of room.
        """
        ack = await self.store(outgoing(channel, message, *tokens, msg_id=msg_id, headers=headers))
        return int(ack.seq)

    async def store(
        self,
        message: Outgoing,
        timeout: float | None = None,
        *,
        subject_at: int | None = None,
        of: str | None = None,
    ) -> PubAck:
        """:meth:`publish` for a message that is already encoded; a duplicate is an acknowledgement too.

        ``subject_at``: only where the last message of the subject (or of the subject ``of``) has this sequence (0: none),
        else APIError.
        """
        if not self.nc.is_connected:
            # nats-py would buffer it and may still store it after the reconnect: say "unknown" at once instead.
            raise BusUnavailable("NATS is not connected.")
        try:
            return await self.js.publish(
                message.subject,
                message.payload,
                timeout=timeout or self.settings.publish_timeout,
                headers=message.wire_headers(subject_at=subject_at, of=of),
            )
        except APIError as error:
            if passing(error):
                raise BusUnavailable(f"NATS refused to store on {message.subject}: {error.description}.") from error
            raise
        except (NatsError, TimeoutError, OSError) as error:
            raise BusUnavailable(
                f"NATS did not acknowledge {message.subject} in time ({type(error).__name__})."
            ) from error

    async def store_all(self, messages: Sequence[Outgoing], heard: Callable[[], None] = lambda: None) -> None:
        """:meth:`store` for many, in order and without a second try: for whoever is told "send again" instead.

        ``heard`` is called after each :data:`MAX_IN_FLIGHT` of them that are acknowledged.

        Raises:
            BusUnavailable: some were not acknowledged within ``publish_timeout``; which of them is unknown.
        """
        acks: dict[int, PubAck] = {}
        for lo in range(0, len(messages), MAX_IN_FLIGHT):
            burst = list(range(lo, min(lo + MAX_IN_FLIGHT, len(messages))))
            await self._burst(messages, burst, acks, self.settings.publish_timeout)
            if len(acks) < burst[-1] + 1:
                raise BusUnavailable(f"NATS acknowledged {len(acks)} of {len(messages)} messages in time.")
            heard()

    async def publish_many(self, messages: Sequence[Outgoing], *, budget: float = 60.0) -> list[PubAck]:
        """Publishes in order, :data:`MAX_IN_FLIGHT` in flight, and tries again (same ids) until all are acknowledged.

        The stream holds them in this order, whatever breaks meanwhile. Only for who is a stream's only writer: another
        one's messages in between cost a try each.

        Raises:
            BusUnavailable: something is still unacknowledged after ``budget`` seconds.
        """
        acks: dict[int, PubAck] = {}
        deadline = time.monotonic() + budget
        todo = list(range(len(messages)))
        while todo:
            for lo in range(0, len(todo), MAX_IN_FLIGHT):
                burst = todo[lo : lo + MAX_IN_FLIGHT]
                await self._burst(messages, burst, acks, BURST_WAIT, ordered=True)
                if any(i not in acks for i in burst):
                    break  # nothing overtakes it
            left = [i for i in todo if i not in acks]
            if left:
                if time.monotonic() > deadline:
                    raise BusUnavailable(f"NATS left {len(left)} of {len(messages)} messages unacknowledged.")
                if len(left) == len(todo) or not self.nc.is_connected:
                    await asyncio.sleep(RETRY_EVERY)
            todo = left
        return [acks[i] for i in range(len(messages))]

    async def _burst(
        self,
        messages: Sequence[Outgoing],
        indices: list[int],
        acks: dict[int, PubAck],
        wait: float,
        *,
        ordered: bool = False,
    ) -> None:
        """``ordered``: each message but the first names the one before it, so that the stream refuses what overtakes.

        A burst that a reconnect cuts in two would else lose its middle: what nats-py had buffered is sent after the
        reconnect, what was under way on the old connection is gone.
        """
        if len(indices) == 1:
            try:
                acks[indices[0]] = await self.store(messages[indices[0]])
            except BusUnavailable as error:
                log.warning("publish is tried again", action="bus.retry", error=str(error))
            return
        futures: dict[int, asyncio.Future[Answer]] = {}
        reconnected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        forget = self.on_reconnect(lambda: None if reconnected.done() else reconnected.set_result(None))
        try:
            for i in indices:
                if not self.nc.is_connected:
                    break
                m = messages[i]
                after = messages[i - 1] if ordered and i != indices[0] else None
                futures[i] = await self._acks.publish(m.subject, m.payload, m.wire_headers(after))
            # A future in flight when the server dies never resolves: the wait is bounded and the rest is sent again.
            if futures:
                answered = asyncio.gather(*futures.values(), return_exceptions=True)
                either: set[asyncio.Future[Any]] = {answered, reconnected}
                await asyncio.wait(either, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
        except (NatsError, OSError) as error:
            log.warning("publish is tried again", action="bus.retry", error=f"{type(error).__name__}: {error}")
        finally:
            forget()
            for future in futures.values():
                future.cancel()
        for i, future in futures.items():
            answer = None if future.cancelled() else future.result()
            if isinstance(answer, PubAck):
                acks[i] = answer
            elif isinstance(answer, APIError) and not passing(answer):
                raise answer

    async def emit(self, channel: Channel[M], message: M, *tokens: str) -> None:
        """Core NATS: at most once, nobody waits. Raises BusUnavailable where it cannot even be buffered."""
        try:
            await self.nc.publish(channel.subject(*tokens), channel.encode(message))
        except NatsError as error:
            raise BusUnavailable(f"NATS does not take {channel.prefix} ({type(error).__name__}).") from error

    async def request(self, subject: str, payload: bytes = b"", timeout: float = 5.0) -> bytes:
        """Asks an actor.

        Raises:
            BusUnavailable: nobody serves the subject, or no answer came in time.
        """
        try:
            answer = await self.nc.request(subject, payload, timeout=timeout)
        except (NatsError, TimeoutError) as error:
            raise BusUnavailable(f"Nobody answered {subject} ({type(error).__name__}).") from error
        return answer.data

    async def put_object(self, name: str, data: bytes) -> None:
        """Stores a model's file. Raises BusUnavailable."""
        try:
            store = await self.js.object_store(MODEL_FILES)
            await store.put(name, data)
        except (NatsError, APIError) as error:
            raise BusUnavailable(f"NATS did not store {name} ({type(error).__name__}: {error}).") from error

    async def get_object(self, name: str) -> bytes:
        """A model's file. Raises KeyError where there is no such object, BusUnavailable where nobody answers."""
        try:
            store = await self.js.object_store(MODEL_FILES)
            result = await store.get(name)
        except (ObjectNotFoundError, NotFoundError) as error:
            raise KeyError(name) from error
        except (NatsError, APIError) as error:
            raise BusUnavailable(f"NATS did not send {name} ({type(error).__name__}: {error}).") from error
        return bytes(result.data or b"")

    async def close(self, budget: float = 3.0) -> None:
        """Flushes what is written and closes, within ``budget`` seconds."""
        self._closed.append(True)
        try:
            async with asyncio.timeout(budget):
                await self.nc.flush(timeout=max(1, int(budget)))
                await self.nc.close()
        except (NatsError, TimeoutError, OSError) as error:
            log.warning("nats closed without a flush", action="bus.close", error=type(error).__name__)
            await self.nc.close()
