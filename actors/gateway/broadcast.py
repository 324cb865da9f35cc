"""Who streams signals now: the newest in a ring that all share, and what wakes each stream."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

from aiohttp import web

from actors.core.recent import RecentSignals
from actors.gateway.problems import unavailable
from schema.messages import Signal

MAX_STREAMS: Final = 256
CATCH_UP_WAIT: Final = 5.0  # seconds that a client waits for a gateway that has just started to know its signals


class Broadcaster:
    """Takes signals as the SIGNALS stream numbers them and wakes whoever streams them."""

    def __init__(self, recent: RecentSignals) -> None:
        self.recent = recent
        self.closed = False
        self._subscribers: set[Subscriber] = set()
        self._caught_up = asyncio.Event()

    def __len__(self) -> int:
        """Open streams."""
        return len(self._subscribers)

    def publish(self, stream_seq: int, signal: Signal) -> None:
        """The stream's next signal; one that was published before has no effect."""
        if self.recent.add(stream_seq, signal):
            self._wake()

    def reset(self, base: int = 0) -> None:
        """What follows comes after ``base``: called before the first signal, and when the stream was made anew."""
        self.recent.reset(base)
        self._wake()

    def caught_up(self) -> None:
        """The ring has reached the end that the stream had at the start: streams may begin."""
        self._caught_up.set()

    async def wait_caught_up(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(CATCH_UP_WAIT):
                await self._caught_up.wait()

    def subscribe(self) -> Subscriber:
        """Raises HttpProblem 503 where the gateway stops or already serves :data:`MAX_STREAMS`."""
        if self.closed:
            raise unavailable("The gateway stops: connect again in a moment.")
        if len(self._subscribers) >= MAX_STREAMS:
            raise unavailable(f"{MAX_STREAMS} streams are open already: close one, or read GET /signals.", 30)
        subscriber = Subscriber()
        self._subscribers.add(subscriber)
        return subscriber

    def unsubscribe(self, subscriber: Subscriber) -> None:
        self._subscribers.discard(subscriber)

    async def close(self) -> None:
        """Ends all streams at once; one that waits for a client that does not read is cut off."""
        self.closed = True
        self._caught_up.set()
        self._wake()
        for subscriber in self._subscribers:
            subscriber.cut_off()

    def _wake(self) -> None:
        for subscriber in self._subscribers:
            subscriber.awake.set()


class Subscriber:
    """What wakes one stream, and the task to cut off while its client does not read."""

    def __init__(self) -> None:
        self.awake = asyncio.Event()
        self._writing: asyncio.Task[object] | None = None

    async def write(self, response: web.StreamResponse, data: bytes) -> None:
        self._writing = asyncio.current_task()
        try:
            await response.write(data)
        finally:
            self._writing = None

    async def wait(self, seconds: float) -> bool:
        """False where nothing woke it in time."""
        try:
            async with asyncio.timeout(seconds):
                await self.awake.wait()
        except TimeoutError:
            return False
        return True

    def cut_off(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
