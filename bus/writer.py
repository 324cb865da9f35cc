"""The one writer of a stream's subjects: in order, each message on the condition that nobody else has written.

A process that was taken for dead may wake up and write on. So no message of a derived stream, and no snapshot, is stored
unconditionally: each names the sequence of its subject's last message as this writer knows it
(``Nats-Expected-Last-Subject-Sequence``), and the server refuses it where another one stands there. The condition is by
subject, so that several processes may share a stream by series.

Where what is written depends on more than its subject, a fence (`bus/fence.py`) takes the condition's place: a message
that goes alone names the fence, a batch names it once beside its subjects.

Nothing overtakes: a few messages go one after the other, many as one atomic batch, which is stored whole or not at all.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

import msgspec
import structlog
from nats.errors import Error as NatsError
from nats.js.api import Header
from nats.js.errors import APIError, NotFoundError

from bus.client import NO_MESSAGE, Bus, BusUnavailable, Outgoing, passing
from bus.fence import Fence

log = structlog.get_logger(__name__)

# An atomic batch under `sync_interval: always` costs as much as a dozen messages sent one after the other, whatever
# its size (measured: 15 to 18 ms against 1.6 ms a message), and far less a message when it is full (0.06 ms at 1,000).
ATOMIC_FROM: Final = 12
ATOMIC_MOST: Final = 500  # messages in a batch; the server takes 1,000
ATOMIC_BYTES: Final = 8 * 1024**2
ATOMIC_WAIT: Final = 10.0  # the server itself abandons a batch that is not committed in this time
LEARN_MOST: Final = 64  # subjects asked for at once
RETRY_FIRST: Final = 0.1
RETRY_MAX: Final = 1.0

WRONG_LAST: Final = frozenset({10071, 10164})  # err_codes: the subject's last message is not the expected one
CONTAINS_DUPLICATE: Final = 10201  # err_code: the batch holds a message id that is stored already
NO_BATCH_NOW: Final = frozenset({10176, 10210})  # err_codes: the batch was abandoned, or too many are under way


class Superseded(Exception):
    """Another process writes here now: this one starts again, and waits for its turn."""


class Writer:
    """Writes one stream from where ``end`` says that it ended when its owner looked.

    Whatever stands behind ``end`` and was not written here is somebody else's. A ``fence`` was taken before ``end``.
    """

    def __init__(self, bus: Bus, stream: str, end: int, fence: Fence | None = None) -> None:
        self._bus = bus
        self._stream = stream
        self._end = end
        self._fence = fence
        self._last: dict[str, int] = {}  # subject → sequence of its last message; a dozen bytes a series
        self._open: dict[str, set[str]] = {}  # subject → ids that were sent and not acknowledged: stored or not
        self._name = secrets.token_hex(4)
        self._numbers = itertools.count(1)

    async def publish(self, messages: Sequence[Outgoing], *, budget: float = 60.0) -> None:
        """Returns once all are stored, in this order and once each.

        Raises:
            Superseded: somebody else has written one of the subjects, or the stream has lost what was written.
            BusUnavailable: something is still unacknowledged after ``budget`` seconds.
        """
        deadline = time.monotonic() + budget
        for chunk in _chunks(messages):
            await self._insist(chunk, deadline)

    async def _insist(self, chunk: Sequence[Outgoing], deadline: float) -> None:
        left = list(chunk)
        pause = RETRY_FIRST
        unsure = single = False  # an answer is missing or was a refusal: what stands in the stream decides
        while left:
            try:
                if self._fence is not None:
                    await self._fence.keep()
                if unsure:
                    left, unsure = await self._settle(left), False
                    continue
                await self._learn({m.subject for m in left})
                if single or len(left) < ATOMIC_FROM:
                    left[:1] = await self._one(left[0])
                else:
                    await self._batch(left)
                    left = []
                pause = RETRY_FIRST
            except KnownId:
                unsure = single = True  # one of them is stored already, or was: each is asked for by itself
            except BusUnavailable as error:
                unsure = True
                if time.monotonic() > deadline:
                    raise BusUnavailable(f"NATS left {len(left)} messages of {self._stream} unacknowledged.") from error
                log.warning("publish is tried again", action="writer.retry", stream=self._stream, error=str(error))
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_MAX)

    # --- what stands in the stream ---------------------------------------------------------------------------------

    async def _learn(self, subjects: set[str]) -> None:
        """The last sequence of each subject that is met for the first time."""
        unknown = sorted(subjects - self._last.keys())
        for lo in range(0, len(unknown), LEARN_MOST):
            part = unknown[lo : lo + LEARN_MOST]
            for subject, (seq, _) in zip(part, await asyncio.gather(*map(self._tail, part)), strict=True):
                if seq > self._end:
                    raise Superseded(f"{subject} was written by another process (at {seq}).")
                self._last[subject] = seq

    async def _tail(self, subject: str) -> tuple[int, str]:
        """A subject's last sequence and message id; (0, "") where it has no message."""
        try:
            raw = await self._bus.js.get_last_msg(self._stream, subject)
        except NotFoundError as error:
            if error.err_code == NO_MESSAGE:
                return 0, ""
            raise BusUnavailable(f"NATS does not know {self._stream} now: {error.description}.") from error
        except (NatsError, APIError, TimeoutError, OSError) as error:
            raise BusUnavailable(f"NATS does not say how {subject} ends ({type(error).__name__}).") from error
        return int(raw.seq or 0), (raw.headers or {}).get(Header.MSG_ID.value, "")

    async def _settle(self, messages: list[Outgoing]) -> list[Outgoing]:
        """Those of ``messages`` that are not stored yet."""
        if self._fence is not None and not await self._fence.stands():
            raise Superseded(f"Another process writes {self._stream} now.")
        ids: dict[str, list[str]] = {}
        for message in messages:
            ids.setdefault(message.subject, []).append(message.msg_id)
        stored: set[str] = set()
        for subject, waiting in ids.items():
            seq, msg_id = await self._tail(subject)
            if msg_id in waiting:
                stored.update(waiting[: waiting.index(msg_id) + 1])
            elif msg_id in self._open.get(subject, ()):
                pass  # ours: a publish that was cancelled after it had been sent
            elif seq and subject in self._last and seq != self._last[subject]:
                raise Superseded(
                    f"{subject} ends with {msg_id or 'a message'} at {seq}, not at {self._last[subject]}: another process "
                    "has written it, or its tail is lost."
                )
            elif seq > self._end and subject not in self._last:
                raise Superseded(f"{subject} was written by another process (at {seq}).")
            self._stands_at(subject, seq)  # 0: everything of it is expired
        left = [message for message in messages if message.msg_id not in stored]
        if left != messages[len(messages) - len(left) :]:
            raise Superseded(f"{self._stream} holds later messages without earlier ones: another process writes it.")
        return left

    def _stands_at(self, subject: str, seq: int) -> None:
        self._last[subject] = seq
        self._open.pop(subject, None)

    # --- the two ways ----------------------------------------------------------------------------------------------

    async def _one(self, message: Outgoing) -> list[Outgoing]:
        """Sends one message; returns what is left of it to send."""
        self._open.setdefault(message.subject, set()).add(message.msg_id)
        try:
            if self._fence is not None:
                ack = await self._bus.store(message, subject_at=self._fence.seq, of=self._fence.subject)
            else:
                ack = await self._bus.store(message, subject_at=self._last[message.subject])
        except APIError as error:
            if error.err_code in WRONG_LAST:
                raise BusUnavailable(f"{message.subject}: {error.description}.") from error
            raise
        if not ack.duplicate:
            self._stands_at(message.subject, int(ack.seq))
            return []
        # The server knows the id. Where the message still stands it is stored; where the stream lost it, it goes out under
        # another id, which its condition allows: ids are for those who have no condition.
        if await self._stands(int(ack.seq), message.msg_id):
            self._stands_at(message.subject, int(ack.seq))
            return []
        return [replace(message, msg_id=f"{message.msg_id}:{self._name}")]

    async def _stands(self, seq: int, msg_id: str) -> bool:
        try:
            raw = await self._bus.js.get_msg(self._stream, seq)
        except NotFoundError as error:
            if error.err_code == NO_MESSAGE:
                return False
            raise BusUnavailable(f"NATS does not know {self._stream} now: {error.description}.") from error
        except (NatsError, APIError, TimeoutError, OSError) as error:
            raise BusUnavailable(f"NATS does not say what stands at {seq} ({type(error).__name__}).") from error
        return bool((raw.headers or {}).get(Header.MSG_ID.value, "") == msg_id)

    async def _batch(self, messages: Sequence[Outgoing]) -> None:
        for subject, msg_id in {m.subject: m.msg_id for m in messages}.items():  # of each subject the last
            self._open.setdefault(subject, set()).add(msg_id)
        met: set[str] = set()
        batch: list[tuple[Outgoing, dict[str, str]]] = []
        for message in messages:
            # Of each subject the first: the rest of the batch follows it anyway.
            at = None if message.subject in met else self._last[message.subject]
            met.add(message.subject)
            if not batch and self._fence is not None:
                headers = message.wire_headers(subject_at=self._fence.seq, of=self._fence.subject)
            else:
                headers = message.wire_headers(subject_at=at)
            batch.append((message, headers))
        last = await store_batch(self._bus, f"{self._name}-{next(self._numbers)}", batch)
        for seq, message in enumerate(messages, start=last - len(messages) + 1):
            self._stands_at(message.subject, seq)


async def store_batch(bus: Bus, name: str, batch: Sequence[tuple[Outgoing, dict[str, str]]]) -> int:
    """Stores messages with these headers as one atomic batch, whole or not at all; returns the last one's sequence.

    Raises:
        KnownId: one of the ids is stored already.
        BusUnavailable: refused by a condition or for now, or not acknowledged in time: whether it stands is unknown.
    """
    if not bus.connected:
        raise BusUnavailable("NATS is not connected.")
    try:
        for number, (message, headers) in enumerate(batch, start=1):
            headers = headers | {"Nats-Batch-Id": name, "Nats-Batch-Sequence": str(number)}
            if number < len(batch):
                await bus.nc.publish(message.subject, message.payload, headers=headers)
        headers["Nats-Batch-Commit"] = "1"
        reply = await bus.nc.request(message.subject, message.payload, timeout=ATOMIC_WAIT, headers=headers)
    except (NatsError, TimeoutError, OSError) as error:
        raise BusUnavailable(f"NATS did not acknowledge a batch in time ({type(error).__name__}).") from error
    answer = _ANSWER.decode(reply.data) if reply.data else _Answer()
    if answer.error is not None:
        code = answer.error.err_code
        if code == CONTAINS_DUPLICATE:
            raise KnownId
        refusal = APIError(code=answer.error.code, err_code=code, description=answer.error.description)
        if code in WRONG_LAST or code in NO_BATCH_NOW or passing(refusal):
            raise BusUnavailable(f"NATS refused a batch: {answer.error.description}.")
        raise refusal
    if answer.count != len(batch):
        raise BusUnavailable(f"a batch of {len(batch)} was acknowledged as {answer.count}.")
    return answer.seq


class KnownId(Exception):
    """The server knows the id of a message of the batch."""


class _Refusal(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Answer(msgspec.Struct):
    seq: int = 0
    count: int = 0
    error: _Refusal | None = None


_ANSWER: Final = msgspec.json.Decoder(_Answer)


def _chunks(messages: Sequence[Outgoing]) -> Iterator[Sequence[Outgoing]]:
    start = size = 0
    for at, message in enumerate(messages):
        if at > start and (at - start == ATOMIC_MOST or size + len(message.payload) > ATOMIC_BYTES):
            yield messages[start:at]
            start, size = at, 0
        size += len(message.payload)
    if start < len(messages):
        yield messages[start:]
