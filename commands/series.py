"""``series rename``: a series goes on under the name that the broker has given it.

The log is the truth: the bars are published under the new name as history, so that features continue from them to the
bit, and the archive's rows follow. Signals keep the name that they were made under.
"""

from __future__ import annotations

import argparse
import asyncio
import getpass
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import TYPE_CHECKING, Final

from commands.output import DONE, WRONG, CommandError, say, write_json
from commands.places import bus_of, find, store_of
from commands.settings import read
from schema.messages import MAX_BLOCK_ROWS, Candle, CandleBlock
from schema.timeframes import canonical

if TYPE_CHECKING:
    from bus.client import Bus, Outgoing
    from bus.store import Store

PAGE: Final = 10_000  # bars read, published and moved at a time
SYMBOL_BYTES: Final = 64
ARCHIVE_SECONDS: Final = 60.0  # that the recorder has to archive what the log holds under the old name
LOOK_EVERY: Final = 0.1


@dataclass(frozen=True, slots=True)
class Renamed:
    """One series' outcome."""

    timeframe: str
    bars: int
    candles_seq: int


async def rename(args: argparse.Namespace) -> int:
    """``series rename OLD NEW [--timeframe TF] [--json]``; repeating one that was interrupted finishes it."""
    old, new = args.old, args.new
    timeframe = canonical(args.timeframe) if args.timeframe else None
    if args.timeframe and timeframe is None:
        raise CommandError(f'"{args.timeframe}" is no timeframe: MT5\'s names are M1 to MN1.', WRONG)
    if old == new:
        raise CommandError("OLD and NEW are the same name: nothing is to be renamed.", WRONG)
    if not new or len(new.encode()) > SYMBOL_BYTES or not new.isprintable() or new != new.strip():
        raise CommandError(
            f"NEW must be 1 to {SYMBOL_BYTES} bytes of printable characters without outer spaces.", WRONG
        )
    loaded = read()
    places = find(loaded)
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(bus_of(places, loaded))
        store = await stack.enter_async_context(store_of(places))
        names = [name for _, name in await store.series(old, timeframe)]
        if not names:
            raise CommandError(f"The archive has no candles of {old}: `mt5 gaps` lists the series.")
        done = [await move(bus, store, old, new, name) for name in names]
    if args.json:
        write_json({"old": old, "new": new, "series": done})
    else:
        for one in done:
            say(f"{old} {one.timeframe} is now {new}: {one.bars:,} bars moved.")
        say(f"Signals of {old} keep their name. Let the terminals send {new} only: what comes as {old} begins anew.")
    return DONE


async def move(bus: Bus, store: Store, old: str, new: str, timeframe: str) -> Renamed:
    """Publishes a series' bars under the new name, then moves its archive, a page at a time.

    Raises:
        CommandError: the log does not take the bars, or the recorder has not archived what it holds.
    """
    from bus.client import BusUnavailable

    await _archived(bus, store, old, timeframe)
    bars, seq, after = 0, 0, None
    pages: list[tuple[datetime, int]] = []
    while page := await store.series_rows(old, timeframe, after=after, limit=PAGE):
        try:
            acks = await bus.publish_many(list(_blocks(page, new, timeframe)))
        except BusUnavailable as error:
            raise CommandError(
                f"{error} Nothing was moved in the archive: run the same again when the log takes candles."
            ) from error
        after = page[-1][0].ts
        pages.append((after, len(page)))
        bars, seq = bars + len(page), max(seq, *(int(ack.seq) for ack in acks))
    # Only when the log has all of it: an interruption until here has changed nothing that the archive says.
    for upto, count in pages:
        await store.rename_series(old, new, timeframe, upto=upto, bars=count, candles_seq=seq, by=_person())
    return Renamed(timeframe, bars, seq)


async def _archived(bus: Bus, store: Store, symbol: str, timeframe: str) -> None:
    """Waits until the newest bars that the log holds of a series are in the archive."""
    from nats.errors import Error as NatsError
    from nats.js.errors import NotFoundError

    from bus.subjects import CANDLES

    try:
        raw = await bus.js.get_last_msg(str(CANDLES.stream), CANDLES.subject(timeframe, symbol), direct=True)
    except NotFoundError:
        return
    except (NatsError, TimeoutError) as error:
        raise CommandError(f"NATS did not say what it holds of {symbol} ({type(error).__name__}).") from error
    rows = CANDLES.decode(raw.data or b"").rows
    if not rows:
        return
    deadline = time.monotonic() + ARCHIVE_SECONDS
    while True:
        stored = await store.candles(symbol, timeframe, start=rows[0].ts, end=rows[-1].ts, limit=PAGE)
        if {row.ts for row in rows} <= {row.ts for row in stored}:
            return
        if time.monotonic() > deadline:
            raise CommandError(
                f"The newest candles of {symbol} {timeframe} are not archived after {ARCHIVE_SECONDS:.0f} s: "
                "is the recorder running? `mt5 doctor` tells."
            )
        await asyncio.sleep(LOOK_EVERY)


def _blocks(page: Sequence[tuple[Candle, str | None, str]], symbol: str, timeframe: str) -> Iterator[Outgoing]:
    """History blocks, each of one source and one way in which times became UTC; the same page gives the same ids."""
    from actors.core.ingest import block_id
    from bus.client import outgoing
    from bus.subjects import CANDLES

    now = datetime.now(UTC)
    for (source, ts_source), group in groupby(page, key=lambda bar: bar[1:]):
        rows = [row for row, *_ in group]
        for start in range(0, len(rows), MAX_BLOCK_ROWS):
            part = tuple(rows[start : start + MAX_BLOCK_ROWS])
            yield outgoing(
                CANDLES,
                CandleBlock(
                    symbol=symbol,
                    timeframe=timeframe,
                    rows=part,
                    received_at=now,
                    history=True,
                    source=source,
                    ts_source=ts_source,
                ),
                timeframe,
                symbol,
                msg_id=block_id(symbol, timeframe, part, None),
            )


def _person() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown user"
