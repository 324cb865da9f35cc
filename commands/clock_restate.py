"""``clock restate``: archived bars are moved to where their source's clock says they belong.

The log is the truth: the changes are published on CANDLES, bars withdrawn and bars added, and features, signals and the
archive follow. What is right is decided from the archive alone, so that a run that was interrupted is finished by another.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

import msgspec

from actors.core.clock_restate import REACH, Books, Change, Restatement, Version
from actors.core.clocks import Clocks
from actors.core.timeframe import from_epoch
from bus.client import BusUnavailable
from bus.ledger import LedgerChanged, Ledgers, zone_steps
from commands.clock import UNNAMED, at_text, gateway_runs, known, load, taken_over, time_of
from commands.output import DONE, WRONG, CommandError, complain, say, stderr_console, write_json, write_table
from commands.places import bus_of, find, store_of
from commands.settings import Loaded, read
from schema.clock import ClockLedger
from schema.messages import MAX_BLOCK_ROWS, Candle, CandleBlock
from schema.timeframes import SECONDS, canonical

if TYPE_CHECKING:
    from bus.client import Bus, Outgoing
    from bus.store import Store

PAGE: Final = 5_000  # bars' length of time that is read at once
PATIENCE: Final = 30.0  # seconds for which a block that NATS did not acknowledge is sent again
RETRY_EVERY: Final = 0.25


@dataclass(slots=True)
class Tally:
    """One series' changes."""

    symbol: str
    timeframe: str
    counts: Counter[str]
    first: int | None = None
    last: int | None = None

    def add(self, change: Change) -> None:
        self.counts[change.what] += 1
        self.first = change.ts if self.first is None else self.first
        self.last = change.ts


@dataclass(frozen=True, slots=True)
class Span:
    """A series with bars of the source, and what of it may move."""

    symbol: str
    timeframe: str
    first: int
    last: int


async def restate(args: argparse.Namespace) -> int:
    """``clock restate SOURCE [--from TIME] [--to TIME] [--symbol S] [--timeframe TF] [--dry-run] [--json]``.

    Repeating one that was interrupted finishes it.
    """
    first = None if args.start is None else time_of(args.start, "--from")
    last = None if args.to is None else time_of(args.to, "--to")
    named = canonical(args.timeframe) if args.timeframe else None
    if args.timeframe and named is None:
        raise CommandError(f'"{args.timeframe}" is no timeframe: MT5\'s names are M1 to MN1.', WRONG)
    loaded = read()
    places = find(loaded)
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(bus_of(places, loaded))
        store = await stack.enter_async_context(store_of(places))
        ledger = await _in_force(bus, loaded, args.source)
        books = Books(ledger, zone_steps)
        spans = [
            span
            for span in await _spans(store, args.source)
            if args.symbol in (None, span.symbol) and named in (None, span.timeframe)
        ]
        plans = []
        for span in spans:
            tally = Tally(span.symbol, span.timeframe, Counter())
            work = Restatement(books, first=first, last=last)
            async for changes in _changes(store, args.source, span, work, first, last):
                for change in changes:
                    tally.add(change)
            tally.counts["unknown"] = work.unknown
            plans.append(tally)
        if not args.json:
            _tell(plans, args.source)
        todo = [(span, tally) for span, tally in zip(spans, plans, strict=True) if _moves(tally)]
        if todo and not args.dry_run:
            await _carry_out(bus, store, args.source, books, ledger, todo, first, last)
    if args.json:
        write_json({"source": args.source, "done": not args.dry_run, "series": [_builtins(tally) for tally in plans]})
    elif todo:
        say(
            "Nothing was changed (--dry-run)."
            if args.dry_run
            else "Done: features and signals follow as they are recomputed."
        )
    return DONE


def _moves(tally: Tally) -> int:
    return tally.counts["added"] + tally.counts["withdrawn"] + tally.counts["confirmed"]


def _builtins(tally: Tally) -> dict[str, Any]:
    kinds = ("added", "withdrawn", "confirmed", "unknown")
    counts = {kind: tally.counts[kind] for kind in kinds}
    return {
        "symbol": tally.symbol,
        "timeframe": tally.timeframe,
        **counts,
        "from": at_text(tally.first),
        "to": at_text(tally.last),
    }


def _tell(plans: list[Tally], source: str) -> None:
    if not any(map(_moves, plans)):
        say(f"Every archived bar of {source or UNNAMED} is where its clock says it belongs.")
    else:
        rows = [_builtins(tally) for tally in plans if _moves(tally)]
        columns = ("symbol", "timeframe", "added", "withdrawn", "confirmed", "from", "to")
        write_table(columns, [[row[name] for name in columns] for row in rows])
    unknown = sum(tally.counts["unknown"] for tally in plans)
    if unknown:
        complain(f"{unknown:,} bars stay where they are: the ledger does not say how they were converted.")


async def _in_force(bus: Bus, loaded: Loaded, source: str) -> ClockLedger:
    """The ledger by which bars are to be restated; the settings' rule is put in force where no gateway has done it."""
    ledgers = Ledgers(bus)
    found = await load(ledgers)
    rules = {name: clock for name, clock in loaded.settings.clock.items() if name == source}
    if source not in found and not rules:
        known(found, source)
    ledger = found.get(source)
    wanted = rules[source].rule if source in rules else None
    runs = await gateway_runs(bus)
    if runs and ledger is not None and not ledger.book.adopted:
        await taken_over(bus, ledgers, source)
        ledger = await ledgers.get(source)
    if ledger is not None and ledger.book.rule == wanted:
        return ledger
    if runs:
        raise CommandError(
            f"The running gateway does not follow the [clock] rule that mt5.toml has for {source or UNNAMED}: start "
            "`mt5 up` again first."
        )
    try:
        clocks = Clocks(rules, [ledger] if ledger is not None else [], zone_steps, time.time())
    except ValueError as error:
        raise CommandError(f"{str(error)[:1].upper()}{str(error)[1:]}", WRONG) from error
    (new,) = clocks.take_unsaved()
    try:
        await ledgers.save(new)
    except (LedgerChanged, BusUnavailable) as error:
        raise CommandError(f"{error} Run this again.") from error
    return new


async def _spans(store: Store, source: str) -> list[Span]:
    rows = await store.fetch("clock_series", source or None)
    return [
        Span(row["symbol"], row["timeframe"], int(row["first_ts"].timestamp()), int(row["last_ts"].timestamp()))
        for row in rows
    ]


async def _changes(
    store: Store, source: str, span: Span, work: Restatement, first: int | None, last: int | None
) -> AsyncIterator[list[Change]]:
    """A series' changes, a page of the archive at a time."""
    start = span.first if first is None else max(span.first, first - REACH)
    end = span.last if last is None else min(span.last, last + REACH)
    step = PAGE * SECONDS[span.timeframe]
    for at in range(start, end + 1, step):
        until = min(at + step, end + 1)
        rows = await store.fetch(
            "clock_versions", span.symbol, span.timeframe, source or None, from_epoch(at), from_epoch(until)
        )
        yield work.feed(_version(row) for row in rows)
    yield work.finish()


def _version(row: Any) -> Version:
    values = tuple(row[name] for name in ("open", "high", "low", "close", "volume", "spread", "real_volume"))
    return Version(int(row["ts"].timestamp()), row["received_at"], row["ts_source"], row["current"], values)


async def _carry_out(
    bus: Bus,
    store: Store,
    source: str,
    books: Books,
    ledger: ClockLedger,
    todo: list[tuple[Span, Tally]],
    first: int | None,
    last: int | None,
) -> None:
    """Publishes the changes, series by series, in order."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    now = datetime.now(UTC)
    server_time = books.now.to_server(int(now.timestamp()))  # newer than every version of before
    console = stderr_console()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        for span, tally in todo:
            task = progress.add_task(f"{span.symbol} {span.timeframe}", total=_moves(tally))
            work = Restatement(books, first=first, last=last)
            waiting: list[Change] = []
            async for changes in _changes(store, source, span, work, first, last):
                waiting += changes
                while len(waiting) >= MAX_BLOCK_ROWS:
                    waiting = await _publish(bus, span, source, ledger, waiting, now, server_time)
                    progress.update(task, completed=_moves(tally) - len(waiting))
            while waiting:
                waiting = await _publish(bus, span, source, ledger, waiting, now, server_time)


async def _publish(
    bus: Bus, span: Span, source: str, ledger: ClockLedger, changes: list[Change], now: datetime, server_time: int
) -> list[Change]:
    """One block of the first changes; returns the others."""
    part = list(_alike(changes[:MAX_BLOCK_ROWS]))
    message = _block(span, source, ledger, part, now, server_time)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            await bus.store(message)
            return changes[len(part) :]
        except BusUnavailable as error:
            if time.monotonic() > deadline:
                raise CommandError(f"{error} What was published stands; run the same again for the rest.") from error
            await asyncio.sleep(RETRY_EVERY)


def _alike(changes: Iterable[Change]) -> Iterator[Change]:
    """The first changes whose rows became UTC in one way, since a block says it once for all."""
    kind: str | None = None
    for change in changes:
        if change.what != "withdrawn":
            if kind not in (None, change.ts_source):
                return
            kind = change.ts_source
        yield change


def _block(
    span: Span, source: str, ledger: ClockLedger, changes: list[Change], now: datetime, server_time: int
) -> Outgoing:
    from bus.client import outgoing
    from bus.subjects import CANDLES

    rows = tuple(_candle(change) for change in changes if change.what != "withdrawn")
    withdrawn = tuple(from_epoch(change.ts) for change in changes if change.what == "withdrawn")
    kinds = [change.ts_source for change in changes if change.what != "withdrawn"]
    block = CandleBlock(
        symbol=span.symbol,
        timeframe=span.timeframe,
        rows=rows,
        received_at=now,
        history=True,
        source=source or None,
        server_time=server_time,
        server_utc=int(now.timestamp()),
        ts_source=kinds[0] if kinds else "utc",
        withdrawn=withdrawn,
    )
    # The book is part of the id: going back to an earlier clock publishes the same rows again.
    content = (source, span.symbol, span.timeframe, ledger.book.at, rows, withdrawn)
    mark = blake2b(msgspec.json.encode(content), digest_size=16).hexdigest()
    return outgoing(CANDLES, block, span.timeframe, span.symbol, msg_id=f"clock-{mark}")


def _candle(change: Change) -> Candle:
    o, h, lo, c, volume, spread, real = change.version.values
    return Candle(
        ts=from_epoch(change.ts), open=o, high=h, low=lo, close=c, volume=volume, spread=spread, real_volume=real
    )
