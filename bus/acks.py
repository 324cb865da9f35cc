"""Publishes under way on one connection: many at once, each with the stream's own word on it.

In nats-py's ``publish_async`` a refusal never resolves its future, and a publish that fails keeps its place for ever.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import NoRespondersError
from nats.js.api import PubAck
from nats.js.errors import APIError

Answer = PubAck | Exception


class Acks:
    """The inbox of a connection's publishes: the reply subject's last token tells which one was answered."""

    def __init__(self, nc: Client) -> None:
        self._nc = nc
        self._inbox = ""
        self._opening = asyncio.Lock()
        self._numbers = itertools.count()
        self._waiting: dict[str, asyncio.Future[Answer]] = {}

    async def publish(self, subject: str, payload: bytes, headers: Mapping[str, str]) -> asyncio.Future[Answer]:
        """Sends and returns what will hold the answer: the acknowledgement or the refusal.

        It is never resolved where the connection breaks: bound the wait and cancel it. Raises nats' errors.
        """
        if not self._inbox:
            async with self._opening:
                if not self._inbox:
                    inbox = self._nc.new_inbox()
                    await self._nc.subscribe(f"{inbox}.*", cb=self._on_answer)
                    self._inbox = inbox
        number = str(next(self._numbers))
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        future.add_done_callback(lambda _: self._waiting.pop(number, None))
        try:
            await self._nc.publish(subject, payload, reply=f"{self._inbox}.{number}", headers=dict(headers))
        except BaseException:
            future.cancel()
            raise
        return future

    async def _on_answer(self, msg: Msg) -> None:
        future = self._waiting.get(msg.subject.rpartition(".")[2])
        if future is not None and not future.done():
            future.set_result(_read(msg))


def _read(msg: Msg) -> Answer:
    if not msg.data:  # status 503: no stream listens on the subject
        return NoRespondersError()
    answer = msgspec.json.decode(msg.data)
    if "error" not in answer:
        return PubAck.from_response(answer)
    try:
        refusal: Exception = APIError.from_error(answer["error"])  # raises what it makes
    except APIError as error:
        return error
    return refusal
