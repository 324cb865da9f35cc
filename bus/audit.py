"""What receipts are checked against: the archive as of one moment, and what the streams still hold of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeVar

from nats.errors import Error as NatsError
from nats.js.errors import APIError, NotFoundError

from bus.client import Bus, BusUnavailable
from bus.consume import Delivery, Reader, find
from bus.store import Connection, Row, Store
from bus.subjects import CANDLE, CANDLES, FEATURES, FEATURES_AT, MODELS, RECEIVED_AT, SIGNALS, Channel
from bus.telemetry import time_of, trace_id
from schema.messages import CandleBlock, FeatureBlock, Message, ModelEvent, Signal
from schema.timeframes import TIMEFRAMES

M = TypeVar("M", bound=Message)

PAGE: Final = 20_000  # versions or signals read at a time
SINGLE: Final = 64  # so many messages are asked for one by one; of more the whole span is read
READ: Final = 512  # messages asked for at once where a span is read
SILENCE: Final = 5.0  # seconds without the next message of a span that the stream said it holds
FEATURES_READER: Final = "recorder.features"
SIGNALS_READER: Final = "recorder.signals"
_FIELDS: Final = Signal.__struct_fields__


@dataclass(frozen=True, slots=True)
class Kept:
    """A signal as the archive or the stream keeps it, with its trace and the times of its stages."""

    signal: Signal
    trace_id: str | None
    received_at: datetime | None
    features_at: datetime | None
    candle_digest: str | None


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far the archive reaches: a CANDLES sequence that is whole, and a place in the derived stream."""

    candles_seq: int = 0
    stream_seq: int = 0


class Snapshot:
    """The archive as of one moment, whatever is written meanwhile."""

    def __init__(self, store: Store, connection: Connection) -> None:
        self._store = store
        self._connection = connection

    async def _fetch(self, query: str, *args: Any) -> list[Row]:
        rows: list[Row] = await self._connection.fetch(self._store.sql(query), *args)
        return rows

    async def cursors(self) -> tuple[Cursor, Cursor]:
        """Of features and of signals."""
        found = {
            row["reader"]: Cursor(row["candles_seq"], row["stream_seq"]) for row in await self._fetch("audit_cursors")
        }
        return found.get(FEATURES_READER, Cursor()), found.get(SIGNALS_READER, Cursor())

    async def signal(self, signal_id: str) -> Kept | None:
        rows = await self._fetch("audit_signal", signal_id)
        return _kept(rows[0]) if rows else None

    async def random(self, ids: Sequence[str], symbol: str | None, until: int) -> list[tuple[str, str, str]]:
        """(id, symbol, timeframe) of the signals that follow random ``ids`` in their order."""
        return [tuple(row) for row in await self._fetch("audit_random", ids, symbol, until)]

    async def newest(self, count: int, symbol: str | None, until: int) -> list[tuple[str, str, str]]:
        """(id, symbol, timeframe) of the signals of the newest bars."""
        return [tuple(row) for row in await self._fetch("audit_newest", list(TIMEFRAMES), symbol, until, count)]

    async def series(self, symbol: str | None) -> list[tuple[str, str]]:
        """Every (symbol, timeframe) that has signals."""
        return [tuple(row) for row in await self._fetch("audit_series", symbol)]

    async def signals(
        self, symbol: str, timeframe: str, ids: Sequence[str] | None, until: int, after: datetime | None, limit: int
    ) -> list[Kept]:
        """A series' signals by ``ts``, those of ``ids`` or all; ``until`` is a CANDLES sequence."""
        rows = await self._fetch("audit_signals", symbol, timeframe, ids, until, after, limit)
        return [_kept(row) for row in rows]

    async def features(self, symbol: str, timeframe: str, times: Collection[datetime]) -> dict[datetime, Row]:
        """The archive's rows of these bars, by open time."""
        return {row["ts"]: row for row in await self._fetch("audit_features", symbol, timeframe, sorted(times))}

    async def versions(self, symbol: str, timeframe: str, until: datetime) -> AsyncIterator[list[Row]]:
        """Every version of the bars up to ``until``, in the order in which features used them, :data:`PAGE` at a time."""
        cursor = await self._connection.cursor(self._store.sql("audit_versions"), symbol, timeframe, until)
        while page := await cursor.fetch(PAGE):
            yield page

    async def activations(self) -> list[tuple[str, int, str]]:
        """(timeframe, from_seq, version): the registry's newest activation of each version."""
        return [tuple(row) for row in await self._fetch("audit_activations")]


@asynccontextmanager
async def snapshot(store: Store) -> AsyncIterator[Snapshot]:
    """Raises StoreUnavailable and StoreRejected."""
    async with store.transaction() as connection:
        await connection.execute(store.sql("audit_snapshot"))
        yield Snapshot(store, connection)


def _kept(row: Row) -> Kept:
    return Kept(
        Signal(**{name: row[name] for name in _FIELDS}),
        row["trace_id"],
        row["received_at"],
        row["features_at"],
        row["candle_digest"],
    )


# --- the streams ---------------------------------------------------------------------------------------------------


class Streams:
    """What the log and the derived streams still hold. Every method raises BusUnavailable."""

    def __init__(self, bus: Bus, name: str) -> None:
        self._bus = bus
        self._name = name

    async def model_events(self) -> tuple[list[ModelEvent], bool]:
        """Every event of every model, and whether the stream still begins with its first message."""
        with _translated("what served"):
            state = (await self._bus.js.stream_info(str(MODELS.stream))).state
            events = [delivery.message async for delivery in self._span(MODELS, 1, MODELS.wildcard)]
            return events, state.first_seq <= 1

    async def signals(
        self, symbol: str, timeframe: str, wanted: Collection[tuple[str, int]]
    ) -> dict[tuple[str, int], Kept]:
        """A series' messages by (id, candles_seq), those of ``wanted`` that SIGNALS still holds."""
        subject = SIGNALS.subject(timeframe, symbol)
        sequences = sorted({seq for _, seq in wanted})
        out: dict[tuple[str, int], Kept] = {}
        with _translated("signals"):
            if len(sequences) > SINGLE:
                start = await find(self._bus, SIGNALS, sequences[0])
                async with aclosing(self._span(SIGNALS, start, subject)) as span:
                    async for delivery in span:
                        signal = delivery.message
                        if (signal.id, signal.candles_seq) in wanted:
                            out[signal.id, signal.candles_seq] = _streamed(signal, delivery.headers)
                        if signal.candles_seq > sequences[-1]:
                            break
                return out
            for seq in sequences:
                place = await find(self._bus, SIGNALS, seq)
                while (raw := await self._next(SIGNALS, subject, place)) is not None:
                    signal = SIGNALS.decode(raw.data or b"")
                    if signal.candles_seq != seq:
                        break
                    if (signal.id, seq) in wanted:
                        out[signal.id, seq] = _streamed(signal, raw.headers or {})
                    place = int(raw.seq or 0) + 1
        return out

    async def candles(self, symbol: str, timeframe: str, sequences: Collection[int]) -> dict[int, CandleBlock]:
        """The log's messages of a series with these sequences, as far as it still holds them."""
        subject = CANDLES.subject(timeframe, symbol)
        out: dict[int, CandleBlock] = {}
        with _translated("candles"):
            first = (await self._bus.js.stream_info(str(CANDLES.stream))).state.first_seq
            held = sorted(seq for seq in set(sequences) if seq >= max(first, 1))
            if len(held) > SINGLE:
                known = set(held)
                async with aclosing(self._span(CANDLES, held[0], subject)) as span:
                    async for delivery in span:
                        if delivery.stream_seq in known:
                            out[delivery.stream_seq] = delivery.message
                        if delivery.stream_seq >= held[-1]:
                            break
                return out
            for seq in held:
                raw = await self._next(CANDLES, subject, seq)
                if raw is not None and raw.seq == seq:
                    out[seq] = CANDLES.decode(raw.data or b"")
        return out

    async def unarchived_signal(self, signal_id: str, after: int) -> Kept | None:
        """A signal that stands in SIGNALS behind its sequence ``after``; the newest of that id."""
        found: Kept | None = None
        with _translated("signals"):
            async for delivery in self._span(SIGNALS, after + 1, SIGNALS.wildcard):
                if delivery.message.id == signal_id:
                    found = _streamed(delivery.message, delivery.headers)
        return found

    async def unarchived_features(self, symbol: str, timeframe: str, after: int, until: int) -> list[FeatureBlock]:
        """A series' blocks behind the FEATURES sequence ``after``, up to the CANDLES sequence ``until``."""
        out: list[FeatureBlock] = []
        with _translated("features"):
            async with aclosing(self._span(FEATURES, after + 1, FEATURES.subject(timeframe, symbol))) as span:
                async for delivery in span:
                    if delivery.message.candles_seq > until:
                        break
                    out.append(delivery.message)
        return out

    async def _next(self, channel: Channel[Any], subject: str, seq: int) -> Any:
        try:
            return await self._bus.js.get_msg(str(channel.stream), seq=seq, subject=subject, next=True, direct=True)
        except NotFoundError:
            return None

    async def _span(self, channel: Channel[M], start: int, subject: str) -> AsyncGenerator[Delivery[M], None]:
        """A subject's messages from ``start`` on to the newest that is there now."""
        try:
            last = int((await self._bus.js.get_last_msg(str(channel.stream), subject)).seq or 0)
        except NotFoundError:
            return
        if start > last:
            return
        async with Reader(self._bus, channel, name=self._name, start=start, batch=READ, subject=subject) as reader:
            while reader.position < last:
                delivery = await reader.next(SILENCE)
                if delivery.stream_seq > last:
                    return
                yield delivery


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Errors of NATS as BusUnavailable, which says what was being read."""
    try:
        yield
    except (NatsError, APIError, TimeoutError, OSError) as error:
        raise BusUnavailable(f"NATS did not send {what} ({type(error).__name__}): ask again.") from error


def _streamed(signal: Signal, headers: Mapping[str, str]) -> Kept:
    return Kept(
        signal, trace_id(headers), time_of(headers, RECEIVED_AT), time_of(headers, FEATURES_AT), headers.get(CANDLE)
    )
