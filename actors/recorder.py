"""The recorder: FEATURES and SIGNALS into PostgreSQL, rows and cursor in one transaction.

Each stream has its own loop, cursor and connection. Start-up is recovery: the cursor says where to read on, and the
upserts are idempotent, so reading something twice is always safe. While PostgreSQL is away nothing more is read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Final, Generic, TypeVar

from nats.errors import Error as NatsError

from actors.core.batching import Batch, Stages, reduce_features, reduce_signals
from bus.client import BusUnavailable
from bus.consume import Delivery, Reader, park
from bus.forward import check_forward
from bus.store import Store, StoreRejected, StoreUnavailable
from bus.subjects import CANDLE, CANDLES, FEATURES, FEATURES_AT, RECEIVED_AT, SIGNALS, Channel
from bus.supervise import ConfigurationError, Context, run_tasks
from bus.telemetry import archive_up, cursor_lag, cursor_lag_seconds, recorder_rows_total, time_of, trace_id
from schema.messages import FeatureBlock, Message, Signal

M = TypeVar("M", bound=Message)

PARTITION: Final = 0  # the derived streams are not partitioned
BACKOFF_FIRST: Final = 0.1  # seconds between tries while PostgreSQL is away
BACKOFF_MAX: Final = 3.0
SAME_TIME: Final = 0.001  # seconds: a time of storing has passed through a float
TABLES: Final = {"upsert_market_data": "market_data", "upsert_features": "features", "upsert_signals": "model_signals"}


@dataclass(frozen=True, slots=True)
class Sink(Generic[M]):
    """What a stream's messages become: ``rows`` weighs one, ``reduce`` turns several into statements."""

    channel: Channel[M]
    rows: Callable[[M], int]
    reduce: Callable[[Sequence[Delivery[M]]], Batch]


FEATURE_SINK: Final[Sink[FeatureBlock]] = Sink(
    FEATURES,
    lambda block: len(block.rows) + len(block.fills),
    lambda blocks: reduce_features(d.message for d in blocks),
)
SIGNAL_SINK: Final[Sink[Signal]] = Sink(
    SIGNALS, lambda _: 1, lambda signals: reduce_signals((d.message for d in signals), map(_stages, signals))
)


@dataclass(frozen=True, slots=True)
class Cursor:
    """The last message that is stored: its place in the stream, and what tells whether it still stands there."""

    stream_seq: int
    stream_created: datetime
    stored_at: datetime


class CursorMoved(Exception):
    """Another recorder has stored meanwhile, or a commit of ours was not heard of: this one resumes from the cursor."""


class MessageMoved(Exception):
    """Another message stands at the cursor: the stream lost its tail and grew again, so it is read from its start."""


class Recorder:
    name: ClassVar[str] = "recorder"
    owned: ClassVar[bool] = True
    description: ClassVar[str] = "archives candles, features and signals in PostgreSQL"

    def __init__(self, ctx: Context) -> None:
        if ctx.database_url is None:
            raise ConfigurationError("The recorder needs PostgreSQL: set MT5_DATABASE_URL, or leave it to `up`.")
        self._ctx = ctx
        self._url = ctx.database_url
        self._archive = _Archive(ctx.log)
        self._at: dict[str, Cursor | None] = {}  # by reader: the cursor as this recorder knows it
        self._opening = {FEATURE_SINK.channel.prefix, SIGNAL_SINK.channel.prefix}

    async def run(self) -> None:
        # A connection for each of the two loops: they never wait for each other.
        self._store = await Store.connect(self._url, size=2, name="mt5-recorder")
        try:
            await run_tasks(
                {
                    "recorder-features": self._follow(FEATURE_SINK),
                    "recorder-signals": self._follow(SIGNAL_SINK),
                }
            )
        finally:
            await self._store.close()

    async def _follow(self, sink: Sink[M]) -> None:
        """Reads a stream from its cursor on and stores it, for ever."""
        cursor, created = await self._resume(sink)
        try:
            await self._read(sink, cursor, created)
        except MessageMoved as moved:
            self._ctx.log.warning("reads a stream from its start", action="recorder.moved", reason=str(moved))
            await self._read(sink, None, created)

    async def _read(self, sink: Sink[M], cursor: Cursor | None, created: datetime) -> None:
        # The cursor's own message comes first: whether it is still the same shows whether the rest may be trusted.
        start = 1 if cursor is None else cursor.stream_seq
        async with Reader(self._ctx.bus, sink.channel, name=self.name, start=start) as reader:
            self._opened(sink)
            if cursor is not None:
                await self._verify(sink, cursor, created, await reader.next())
            await self._pump(sink, reader, created)

    async def _pump(self, sink: Sink[M], reader: Reader[M], created: datetime) -> None:
        """Stores batch after batch; the next one is read and reduced while PostgreSQL works on the last."""
        stream = str(sink.channel.stream)
        ahead = asyncio.create_task(self._gather(sink, reader), name=f"recorder-gather-{stream}")
        try:
            while True:
                deliveries, batch = await ahead
                ahead = asyncio.create_task(self._gather(sink, reader), name=f"recorder-gather-{stream}")
                await self._store_all(sink, deliveries, created, batch)
                newest = deliveries[-1]
                cursor_lag.set(newest.pending, actor=self.name, stream=stream)
                cursor_lag_seconds.set(max(0.0, time.time() - newest.stored_at), actor=self.name, stream=stream)
        finally:
            ahead.cancel()
            await asyncio.gather(ahead, return_exceptions=True)

    async def _resume(self, sink: Sink[M]) -> tuple[Cursor | None, datetime]:
        """Where to read on (None: from the start) and when the stream was made."""
        row = await self._archive.insist(lambda: self._store.fetchrow("load_cursor", _reader(sink), PARTITION))
        stream = str(sink.channel.stream)
        try:
            info = await self._ctx.bus.js.stream_info(stream)
        except (NatsError, TimeoutError, OSError) as error:
            raise BusUnavailable(f"Stream {stream} cannot be read ({error}): run `mt5 topology apply`.") from error
        created = info.created
        if created is None:
            raise BusUnavailable(f"NATS does not say when stream {stream} was made.")
        if row is None:
            self._at[_reader(sink)] = None
            return None, created
        await self._check_log(row["candles_seq"])
        cursor = self._at[_reader(sink)] = Cursor(row["stream_seq"], row["stream_created"], row["stored_at"])
        if cursor.stream_created != created or info.state.last_seq < cursor.stream_seq:
            self._ctx.log.warning(
                "stream was made anew or lost its tail, reads it from its start",
                action="recorder.restart",
                stream=stream,
                cursor=cursor.stream_seq,
                last=info.state.last_seq,
            )
            return None, created
        lost = info.state.first_seq - cursor.stream_seq - 1
        if lost > 0:
            self._ctx.log.error(
                "messages were dropped from the stream before they were stored",
                action="recorder.gap",
                stream=stream,
                messages=lost,
            )
        return cursor, created

    async def _check_log(self, archived: int) -> None:
        try:
            info = await self._ctx.bus.js.stream_info(str(CANDLES.stream))
        except (NatsError, TimeoutError, OSError) as error:
            raise BusUnavailable(f"Stream CANDLES cannot be read ({error}): run `mt5 topology apply`.") from error
        check_forward(info.state.last_seq, archived)

    async def _verify(self, sink: Sink[M], cursor: Cursor, created: datetime, first: Delivery[M]) -> None:
        """Compares the cursor's message with what stands there; stores ``first`` where it is a later one."""
        if first.stream_seq > cursor.stream_seq:
            await self._store_all(sink, [first], created)
        elif abs(first.stored_at - cursor.stored_at.timestamp()) > SAME_TIME:
            raise MessageMoved(f"{sink.channel.stream} holds another message at {cursor.stream_seq}")

    def _opened(self, sink: Sink[M]) -> None:
        if sink.channel.prefix in self._opening:
            self._opening.remove(sink.channel.prefix)
            if not self._opening:
                self._ctx.ready()

    async def _gather(self, sink: Sink[M], reader: Reader[M]) -> tuple[list[Delivery[M]], Batch | None]:
        """One message and those that come within ``linger`` of it, up to about ``batch_rows`` rows."""
        settings = self._ctx.settings.recorder
        out = [await reader.next()]
        rows = sink.rows(out[0].message)
        deadline = time.monotonic() + settings.linger
        while rows < settings.batch_rows:
            try:
                out.append(await reader.next(deadline - time.monotonic()))
            except TimeoutError:
                break
            rows += sink.rows(out[-1].message)
        try:
            return out, _reduced(sink, out)
        except StoreRejected:
            return out, None  # which of them it is comes out where they are stored

    async def _store_all(
        self, sink: Sink[M], deliveries: Sequence[Delivery[M]], created: datetime, batch: Batch | None = None
    ) -> None:
        """Stores a batch; what PostgreSQL refuses is bisected down to single messages, which are parked."""
        try:
            await self._write(sink, deliveries, created, batch or _reduced(sink, deliveries))
        except StoreRejected as error:
            if len(deliveries) > 1:
                middle = len(deliveries) // 2
                await self._store_all(sink, deliveries[:middle], created)
                await self._store_all(sink, deliveries[middle:], created)
                return
            bad = deliveries[0]
            data = sink.channel.encode(bad.message)
            await park(self._ctx.bus, self.name, bad.subject, data, bad.headers, f"the archive refused it: {error}")
            await self._write(sink, deliveries, created, Batch((), 0))

    async def _write(self, sink: Sink[M], deliveries: Sequence[Delivery[M]], created: datetime, batch: Batch) -> None:
        last = deliveries[-1]
        reader, stored_at = _reader(sink), datetime.fromtimestamp(last.stored_at, UTC)
        was = self._at[reader]

        async def attempt() -> None:
            async with self._store.transaction() as connection:
                moved = await connection.fetchval(
                    self._store.sql("move_cursor"),
                    reader,
                    PARTITION,
                    batch.candles_seq,
                    last.stream_seq,
                    created,
                    stored_at,
                    was.stream_seq if was is not None else None,
                    was.stream_created if was is not None else None,
                )
                if moved is None:
                    raise CursorMoved(
                        f"the cursor of {reader} is no longer at {was.stream_seq if was else 'its start'}"
                    )
                for statement in batch.statements:
                    await connection.execute(self._store.sql(statement.query), *statement.columns)

        await self._archive.insist(attempt)
        self._at[reader] = Cursor(last.stream_seq, created, stored_at)
        for statement in batch.statements:
            table = TABLES.get(statement.query)
            if table is not None:
                recorder_rows_total.inc(statement.rows, table=table)


class _Archive:
    """Whether PostgreSQL takes our work: tries until it does, and says once when it stops and when it starts again."""

    def __init__(self, log: Any) -> None:
        self._log = log
        self._away_since: float | None = None

    async def insist(self, work: Callable[[], Any]) -> Any:
        """Runs ``work`` until PostgreSQL has answered; only StoreRejected and defects come out."""
        pause = BACKOFF_FIRST
        while True:
            try:
                result = await work()
            except StoreUnavailable as error:
                if self._away_since is None:
                    self._away_since = time.monotonic()
                    self._log.error("PostgreSQL is away, keeps trying", action="recorder.away", error=str(error))
                archive_up.set(0)
                await asyncio.sleep(pause)
                pause = min(2 * pause, BACKOFF_MAX)
                continue
            archive_up.set(1)
            if self._away_since is not None:
                seconds = round(time.monotonic() - self._away_since, 1)
                self._away_since = None
                self._log.info("PostgreSQL is back", action="recorder.back", seconds=seconds)
            return result


def _reduced(sink: Sink[M], deliveries: Sequence[Delivery[M]]) -> Batch:
    """Raises StoreRejected where the messages cannot be turned into rows, so that the one at fault is found and parked."""
    try:
        return sink.reduce(deliveries)
    except Exception as error:
        raise StoreRejected(f"it cannot be turned into rows ({type(error).__name__}: {error})") from error


def _stages(delivery: Delivery[Signal]) -> Stages:
    """A signal's trace and stage times, as the headers of its message tell them."""
    headers = delivery.headers
    return Stages(trace_id(headers), time_of(headers, RECEIVED_AT), time_of(headers, FEATURES_AT), headers.get(CANDLE))


def _reader(sink: Sink[M]) -> str:
    return f"{Recorder.name}.{sink.channel.prefix}"
