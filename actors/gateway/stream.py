"""GET /signals/stream: signals as Server-Sent Events, resumable by the SIGNALS stream's sequence.

A subscriber is a cursor into the ring of newest signals, not a queue of its own: whoever falls behind further than the
ring reaches is told to ``resync`` and goes on with what is newest, so that slow readers cost no memory.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Final

import msgspec
import structlog
from aiohttp import web

from actors.gateway.broadcast import Subscriber
from actors.gateway.deps import GatewayDeps
from actors.gateway.problems import NO_STORE
from actors.gateway.query import Query
from bus.client import BusUnavailable
from schema.messages import Signal

log = structlog.get_logger(__name__)

HEARTBEAT: Final = 15.0  # seconds without a signal after which a comment keeps proxies and clients patient
RETRY_MS: Final = 2_000  # what a browser waits before it connects again
BATCH: Final = 200  # signals in one write

_ENCODER: Final = msgspec.json.Encoder()


class SignalStream:
    """The route's handler."""

    def __init__(self, deps: GatewayDeps) -> None:
        self._broadcaster = deps.broadcaster
        self._recent = deps.broadcaster.recent
        self._signals_after = deps.signals_after

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Streams until the client goes or the gateway stops; ``symbol`` and ``timeframe`` narrow it down."""
        query = Query(request, "symbol", "timeframe")
        symbol, timeframe = query.symbol(), query.timeframe()
        last_id = request.headers.get("Last-Event-ID")
        subscriber = self._broadcaster.subscribe()
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": NO_STORE,
                "X-Accel-Buffering": "no",  # nginx would hold events back
                "X-Content-Type-Options": "nosniff",
            }
        )
        try:
            await response.prepare(request)
            await subscriber.write(response, b"retry: %d\n\n" % RETRY_MS)
            await self._broadcaster.wait_caught_up()
            async for data in self._events(subscriber, last_id, symbol, timeframe):
                if data:  # a filter may leave nothing of a batch
                    await subscriber.write(response, data)
            await response.write_eof()
        except ConnectionError as error:
            log.debug("client has gone", action="stream.gone", error=type(error).__name__)
        except Exception:
            # Its headers are sent: no other answer is possible, and the client connects again where it was.
            log.exception("stream ends", action="stream.failed")
        finally:
            self._broadcaster.unsubscribe(subscriber)
        return response

    async def _events(
        self, subscriber: Subscriber, last_id: str | None, symbol: str | None, timeframe: str | None
    ) -> AsyncIterator[bytes]:
        """Wire text to send, each piece leaving the client's last event id at the cursor."""
        cursor = self._recent.last_seq if last_id is None else _sequence(last_id)
        resuming = last_id is not None
        yield _mark(cursor)
        while not self._broadcaster.closed:
            subscriber.awake.clear()
            newer: Sequence[tuple[int, Signal]] | None
            if cursor > self._recent.last_seq or cursor < 0:
                cursor = self._recent.last_seq
                yield _resync(cursor, "This stream did not issue the last event id.")
                continue
            newer = self._recent.after(cursor, BATCH)
            if newer is None and resuming:
                newer, lost = await self._from_stream(cursor)
                if lost:
                    yield _resync(newer[0][0] - 1 if newer else self._recent.base, lost)
                if not newer:
                    cursor = self._recent.base
                    continue
            elif newer is None:
                cursor = self._recent.last_seq
                yield _resync(cursor, "The client read too slowly and signals were left out.")
                continue
            else:
                resuming = False
            if newer:
                cursor = newer[-1][0]
                yield b"".join(
                    _event(seq, signal)
                    for seq, signal in newer
                    if symbol in (None, signal.symbol) and timeframe in (None, signal.timeframe)
                )
            elif not await subscriber.wait(HEARTBEAT):
                yield b":\n" + _mark(cursor)

    async def _from_stream(self, cursor: int) -> tuple[Sequence[tuple[int, Signal]], str]:
        """The next signals from the SIGNALS stream, for a cursor older than memory; and what is lost, if anything is."""
        try:
            newer = await self._signals_after(cursor, BATCH)
        except BusUnavailable as error:
            log.warning("resumes from memory only", action="stream.resume", error=str(error))
            return (), "The bus is not reachable: signals before those in memory are left out."
        if not newer:
            return (), "Signals after the last event id are no longer kept."
        return newer, "Some signals after the last event id are no longer kept." if newer[0][0] > cursor + 1 else ""


def _sequence(last_id: str) -> int:
    """The sequence that an event id holds; -1 for an id of another kind."""
    return int(last_id) if last_id.isascii() and last_id.isdecimal() and len(last_id) <= 19 else -1


def _event(seq: int, signal: Signal) -> bytes:
    return b"id: %d\ndata: %s\n\n" % (seq, _ENCODER.encode(signal))


def _mark(cursor: int) -> bytes:
    """No event, but the client resumes from here."""
    return b"id: %d\n\n" % max(cursor, 0)


def _resync(cursor: int, reason: str) -> bytes:
    """Tells the client to read GET /signals again: it has missed some."""
    return b"event: resync\nid: %d\ndata: %s\n\n" % (cursor, _ENCODER.encode({"reason": reason}))
