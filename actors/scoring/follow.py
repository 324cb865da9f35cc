"""Reads FEATURES and SIGNALS behind the recorder: what it has archived, no more, and each stream from its own cursor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Self

from nats.errors import Error as NatsError

from bus.client import Bus, BusUnavailable
from bus.consume import Delivery, Reader
from bus.patience import Patience
from bus.store import Connection, Store
from bus.subjects import FEATURES, SIGNALS, Channel
from bus.writer import Superseded
from schema.messages import FeatureBlock, Signal

ACTOR: Final = "scorer"  # the readers' name, and whose cursors these are
PARTITION: Final = 0  # the derived streams are not partitioned
BATCH_BARS: Final = 1_000  # bars of a batch, and at most one message's more
READ_WAIT: Final = 0.5  # seconds that a message which the recorder has stored may take to come
SAME_TIME: Final = 0.001  # seconds: a time of storing has passed through a float

Bar = tuple[str, str, datetime]  # symbol, timeframe, open time


@dataclass(frozen=True, slots=True)
class Place:
    """A message's place in its stream, and what tells whether it is still the one that stands there."""

    seq: int
    created: datetime
    stored_at: datetime


@dataclass(slots=True)
class Mark:
    """One reader's row of ``cursors``: where it stands as this process knows it."""

    reader: str
    place: Place | None = None

    candles_seq: int = 0  # that was whole when it was loaded

    async def load(self, store: Store) -> Place | None:
        row = await store.fetchrow("load_cursor", self.reader, PARTITION)
        self.place = None if row is None else Place(row["stream_seq"], row["stream_created"], row["stored_at"])
        self.candles_seq = 0 if row is None else row["candles_seq"]
        return self.place

    async def move(self, store: Store, connection: Connection, to: Place, candles_seq: int) -> None:
        """In the caller's transaction, which a Superseded takes back: somebody else has moved it."""
        was = self.place
        moved = await connection.fetchval(
            store.sql("move_cursor"),
            self.reader,
            PARTITION,
            candles_seq,
            to.seq,
            to.created,
            to.stored_at,
            was.seq if was is not None else None,
            was.created if was is not None else None,
        )
        if moved is None:
            raise Superseded(f"The cursor of {self.reader} is no longer at {was.seq if was else 'its start'}.")


@dataclass(slots=True)
class _Source:
    channel: Channel[Any]
    touched: Callable[[Any], Iterable[Bar]]
    mark: Mark
    created: datetime
    reader: Reader[Any]
    first: Place | None  # the cursor's message, until it was seen again
    held: Delivery[Any] | None = None  # one that the recorder has not stored yet


@dataclass(slots=True)
class Read:
    """What was read at a time: the bars that it touched, and each source's newest message.

    Signals of a CANDLES sequence behind ``heard`` are still to be read: they are scored then, whatever of them the archive
    holds by now, since they would overtake those between.
    """

    touched: set[Bar] = field(default_factory=set)
    heard: int = 0
    newest: dict[str, Delivery[Any]] = field(default_factory=dict)  # by the channel's prefix
    whole: dict[str, int] = field(default_factory=dict)  # the CANDLES sequence that is whole with it


class Follower:
    """An async context manager over both streams.

    Signals never run ahead of features in CANDLES sequences, so that outcomes become known in the order of their bars but for
    the last few, however far the recorder is with either stream: evidence is a matter of order.
    """

    def __init__(self, bus: Bus, store: Store, patience: Patience, log: Any) -> None:
        self._bus = bus
        self._store = store
        self._patience = patience
        self._log = log
        self._stack = AsyncExitStack()
        self._sources: list[_Source] = []
        self._whole = 0  # the CANDLES sequence up to which features were read
        self._heard = 0  # and up to which signals were

    async def __aenter__(self) -> Self:
        try:
            for channel, touched in ((FEATURES, bars_of_block), (SIGNALS, bars_of_signal)):
                self._sources.append(await self._open(channel, touched))
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _open(self, channel: Channel[Any], touched: Callable[[Any], Iterable[Bar]]) -> _Source:
        mark = Mark(f"{ACTOR}.{channel.prefix}")
        place = await self._patience.insist(lambda: mark.load(self._store))
        created, last = await stream_state(self._bus, str(channel.stream))
        if place is not None and (place.created != created or last < place.seq):
            self._log.warning(
                "stream was made anew or lost its tail, reads it from its start",
                action="scorer.restart",
                stream=channel.stream,
                cursor=place.seq,
                last=last,
            )
            place = None
        if channel is FEATURES and place is not None:
            self._whole = mark.candles_seq
        # The cursor's own message comes first: whether it is still the same shows whether the rest may be trusted.
        reader = await self._read(channel, 1 if place is None else place.seq)
        return _Source(channel, touched, mark, created, reader, place)

    async def _read(self, channel: Channel[Any], start: int) -> Reader[Any]:
        return await self._stack.enter_async_context(Reader(self._bus, channel, name=ACTOR, start=start))

    async def read(self) -> Read:
        """A batch of what the recorder has stored and this reader has not seen; empty where there is nothing now.

        Raises StreamReplaced where a stream is no longer the one that was opened.
        """
        limits = await self._limits()
        out = Read()
        for source in self._sources:
            prefix = source.channel.prefix
            before = len(out.touched)
            limit, whole = limits.get(prefix, (0, 0))
            while len(out.touched) - before < BATCH_BARS:
                delivery = await self._next(source, limit)
                if delivery is None:
                    # What the stream has lost of what was stored till then, or never had, is not to be waited for.
                    if source.channel is SIGNALS:
                        self._heard = max(self._heard, whole)
                    break
                message = delivery.message
                if source.channel is SIGNALS and message.candles_seq > self._whole:
                    source.held = delivery
                    self._heard = max(self._heard, message.candles_seq - 1)
                    break
                if source.channel is SIGNALS:
                    self._heard = max(self._heard, message.candles_seq)
                out.touched.update(source.touched(message))
                out.newest[prefix] = delivery
                if getattr(message, "part", 1) == getattr(message, "parts", 1):
                    out.whole[prefix] = max(out.whole.get(prefix, 0), message.candles_seq)
                    if source.channel is FEATURES:
                        self._whole = max(self._whole, message.candles_seq)
        out.heard = self._heard
        return out

    async def _limits(self) -> dict[str, tuple[int, int]]:
        """Up to where the recorder has stored each stream, and the CANDLES sequence that is whole with it.

        Nothing counts where it means another stream of that name.
        """
        rows = await self._patience.insist(lambda: self._store.fetch("recorder_cursors"))
        created = {source.channel.prefix: source.created for source in self._sources}
        out = {}
        for row in rows:
            prefix = row["reader"].partition(".")[2]
            if created.get(prefix) == row["stream_created"]:
                out[prefix] = int(row["stream_seq"]), int(row["candles_seq"])
        return out

    async def _next(self, source: _Source, limit: int) -> Delivery[Any] | None:
        while True:
            delivery, source.held = source.held, None
            if delivery is None:
                if source.reader.position >= limit:
                    return None
                try:
                    delivery = await source.reader.next(READ_WAIT)
                except TimeoutError:
                    return None  # the rest of what the recorder has stored is no longer in the stream
            first, source.first = source.first, None
            if first is not None and delivery.stream_seq == first.seq:
                if abs(delivery.stored_at - first.stored_at.timestamp()) > SAME_TIME:
                    self._log.warning(
                        "another message stands at the cursor, reads the stream from its start",
                        action="scorer.moved",
                        stream=source.channel.stream,
                    )
                    source.reader = await self._read(source.channel, 1)
                continue  # handled before, or of no use
            if delivery.stream_seq > limit:
                source.held = delivery
                return None
            return delivery

    async def move(self, connection: Connection, read: Read) -> None:
        """Moves the cursors to what was read, in the caller's transaction. Raises Superseded."""
        for source, place, candles_seq in self._places(read):
            await source.mark.move(self._store, connection, place, candles_seq)

    def moved(self, read: Read) -> None:
        """After the commit of :meth:`move`."""
        for source, place, _ in self._places(read):
            source.mark.place = place

    def _places(self, read: Read) -> Iterable[tuple[_Source, Place, int]]:
        for source in self._sources:
            newest = read.newest.get(source.channel.prefix)
            if newest is not None:
                stored_at = datetime.fromtimestamp(newest.stored_at, UTC)
                place = Place(newest.stream_seq, source.created, stored_at)
                yield source, place, read.whole.get(source.channel.prefix, 0)


def bars_of_block(block: FeatureBlock) -> Iterable[Bar]:
    """The bars whose outcomes a block may change; what came as history and was never anything else has none."""
    for row in block.rows:
        if row.live or row.revision or row.replaces is not None:
            yield block.symbol, block.timeframe, row.ts
    for fill in block.fills:
        yield block.symbol, block.timeframe, fill.ts
    for gone in block.withdrawn:
        yield block.symbol, block.timeframe, gone.ts


def bars_of_signal(signal: Signal) -> Iterable[Bar]:
    """One that says no probability has no outcome, but may stand in the place of one that had."""
    if signal.prob_up is not None or signal.supersedes is not None:
        yield signal.symbol, signal.timeframe, signal.ts


async def stream_state(bus: Bus, stream: str) -> tuple[datetime, int]:
    """When a stream was made, and its last sequence. Raises BusUnavailable."""
    try:
        info = await bus.js.stream_info(stream)
    except (NatsError, TimeoutError, OSError) as error:
        raise BusUnavailable(f"Stream {stream} cannot be read ({error}): run `mt5 topology apply`.") from error
    if info.created is None:
        raise BusUnavailable(f"NATS does not say when stream {stream} was made.")
    return info.created, info.state.last_seq
