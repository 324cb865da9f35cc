"""``clock show`` and ``clock set``: what is known of brokers' clocks, and a person's word on it."""

from __future__ import annotations

import argparse
import asyncio
import getpass
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec

from actors.core.clock import BEGIN, timeline
from actors.core.ingest import parse_time
from actors.core.timeframe import from_epoch
from bus.client import BusUnavailable
from bus.ledger import LedgerChanged, Ledgers, zone_steps
from commands.output import DONE, NO, WRONG, CommandError, say, write_json, write_table
from commands.places import bus_of, find
from commands.settings import read
from schema.clock import ClockBook, ClockLedger, PersonRule, offset_text, parse_rule

if TYPE_CHECKING:
    from bus.client import Bus

AUTO: Final = "auto"
TAKEN_WITHIN: Final = 5.0  # seconds that a running gateway has to take over what was set
LOOK_EVERY: Final = 0.1
UNNAMED: Final = "(unnamed)"  # how tables show the source that names itself nothing; commands take '' for it

# --- show --------------------------------------------------------------------------------------------------------


async def show(args: argparse.Namespace) -> int:
    """``clock show [SOURCE] [--json]``."""
    loaded = read()
    async with bus_of(find(loaded), loaded) as bus:
        ledgers = await load(Ledgers(bus))
    if args.source is not None:
        return _show_one(known(ledgers, args.source), as_json=args.json)
    if args.json:
        write_json({"clocks": [_facts(ledger) for _, ledger in sorted(ledgers.items())]})
    elif not ledgers:
        say("No source has told its clock yet, and mt5.toml has no [clock] rule: all times are taken as UTC.")
    else:
        columns = ("source", "now", "by", "rule", "since", "last seen", "assumed before")
        facts = [_facts(ledger) for _, ledger in sorted(ledgers.items())]
        write_table(
            columns,
            [
                (
                    f["source"] or UNNAMED,
                    f["offset"],
                    f["by"],
                    f["rule"],
                    *map(_short, (f["since"], f["seen"], f["assumed_before"])),
                )
                for f in facts
            ],
        )
    return DONE


def _show_one(ledger: ClockLedger, *, as_json: bool) -> int:
    if as_json:
        write_json(_facts(ledger) | {"ledger": ledger})
        return DONE
    facts = _facts(ledger)
    write_table(("what", "value"), [(name.replace("_", " "), value) for name, value in facts.items()])
    book = ledger.book
    lines: list[tuple[Any, ...]] = []
    for said in book.persons:
        why = ", ".join(filter(None, (said.by, said.reason)))
        lines.append((at_text(said.since), None, said.rule, f"person ({why})" if why else "person"))
    if book.rule is not None:
        lines.append((None, None, book.rule, "rule of mt5.toml"))
    for seen in book.runs:
        by = "clock fields" if seen.origin == "fields" else "newest bars"
        lines.append((at_text(seen.since), at_text(seen.until), offset_text(seen.offset), by))
    if book.family is not None:
        lines.append((None, None, book.family, "week openings"))
    if lines:
        say("")
        write_table(("from", "to", "clock", "known by"), lines)
    say("")
    write_table(
        ("in force from", "offsets of the time from 2023 on"),
        [(f"{b.at:%Y-%m-%d %H:%M:%S}", _line_text(b)) for b in ledger.books],
    )
    return DONE


def _line_text(book: ClockBook) -> str:
    line = timeline(book, zone_steps)
    offsets = sorted({offset for start, offset, _ in line.pieces() if start >= 1_672_531_200 or start == BEGIN})
    return " / ".join(map(offset_text, offsets)) + f" ({line.kinds[-1]})"


def _facts(ledger: ClockLedger) -> dict[str, Any]:
    book, now = ledger.book, int(time.time())
    line = timeline(book, zone_steps)
    at = line.index(now)
    person = next((said.rule for said in reversed(book.persons) if (said.since or BEGIN) <= now), None)
    sure = next((start for start, kind in zip(line.starts, line.kinds, strict=True) if kind != "assumed"), None)
    return {
        "source": ledger.source,
        "offset": offset_text(line.offsets[at]),
        "by": line.kinds[at],
        "rule": person or book.rule or book.family,
        "since": at_text(line.starts[at]) if line.starts[at] > 0 else None,
        "seen": at_text(book.runs[-1].until) if book.runs else None,
        "assumed_before": at_text(sure) if line.kinds[0] == "assumed" and sure is not None else None,
        "adopted": book.adopted,
    }


def at_text(ts: int | None) -> str | None:
    return None if ts is None else f"{from_epoch(ts):%Y-%m-%dT%H:%M:%SZ}"


def _short(text: str | None) -> str | None:
    return text and text[:16].replace("T", " ")


# --- set ---------------------------------------------------------------------------------------------------------


async def set_rule(args: argparse.Namespace) -> int:
    """``clock set SOURCE RULE [--from TIME] [--reason TEXT] [--json]``; RULE ``auto`` takes a person's word back."""
    since = None if args.start is None else time_of(args.start, "--from")
    if args.rule != AUTO:
        try:
            rule = parse_rule(args.rule)
            if rule.zone is not None:
                zone_steps(rule.zone)
        except ValueError as error:
            raise CommandError(f"{str(error)[:1].upper()}{str(error)[1:]}.", WRONG) from error
    loaded = read()
    async with bus_of(find(loaded), loaded) as bus:
        ledgers = Ledgers(bus)
        before, after = await _write(ledgers, args.source, lambda ledger: _said(ledger, args, since))
        taken = await taken_over(bus, ledgers, args.source)
    now = int(time.time())
    was, line = timeline(before, zone_steps), timeline(after.book, zone_steps)
    if args.json:
        write_json(_facts(after) | {"adopted": taken, "offset_before": offset_text(was.offset_at(now))})
        return DONE
    changed = was.pieces() != line.pieces()
    say(
        f"{args.source or UNNAMED} is {offset_text(line.offset_at(now))} from UTC now (before: "
        f"{offset_text(was.offset_at(now))}); {'the gateway has taken it over' if taken else 'no gateway runs: the next one takes it over'}."
    )
    if changed:
        say(f"Bars that are stored already stay where they are until `mt5 clock restate {_quoted(args.source)}`.")
    return DONE


def _said(ledger: ClockLedger, args: argparse.Namespace, since: int | None) -> ClockBook:
    """The newest word wins from its time on: what was said of later times before is gone."""
    kept = tuple(said for said in ledger.book.persons if since is not None and (said.since or BEGIN) < since)
    at = datetime.now(UTC)
    if args.rule != AUTO:
        kept += (PersonRule(rule=args.rule, since=since, reason=args.reason or "", by=_person(), said_at=at),)
    return msgspec.structs.replace(ledger.book, at=max(at, ledger.book.at), persons=kept, adopted=False)


async def _write(ledgers: Ledgers, source: str, change: Any) -> tuple[ClockBook, ClockLedger]:
    """Adds a book to a source's ledger; returns the book before it and the new ledger."""
    while True:
        try:
            ledger = await ledgers.get(source) or ClockLedger(source=source, books=(ClockBook(at=from_epoch(0)),))
            new = msgspec.structs.replace(ledger, books=(*ledger.books, change(ledger)))
            await ledgers.save(new)
            return ledger.book, new
        except LedgerChanged:
            continue  # the gateway writes too: read again
        except BusUnavailable as error:
            raise CommandError(str(error)) from error


async def gateway_runs(bus: Bus) -> bool:
    try:
        await bus.request("$SRV.PING.collector", timeout=1.0)
    except BusUnavailable:
        return False
    return True


async def taken_over(bus: Bus, ledgers: Ledgers, source: str) -> bool:
    """Waits until a running gateway has taken the newest book over; False where none runs."""
    if not await gateway_runs(bus):
        return False
    deadline = time.monotonic() + TAKEN_WITHIN
    while time.monotonic() < deadline:
        ledger = await ledgers.get(source)
        if ledger is not None and ledger.book.adopted:
            return True
        await asyncio.sleep(LOOK_EVERY)
    raise CommandError(
        f"The gateway has not taken the clock over within {TAKEN_WITHIN:.0f} s: it is written and counts from its next "
        "start; `mt5 doctor` may tell what keeps it."
    )


# --- all -----------------------------------------------------------------------------------------------------------


async def load(ledgers: Ledgers) -> dict[str, ClockLedger]:
    try:
        return await ledgers.load()
    except BusUnavailable as error:
        raise CommandError(str(error)) from error


def known(ledgers: dict[str, ClockLedger], source: str) -> ClockLedger:
    if source in ledgers:
        return ledgers[source]
    others = ", ".join(name or "''" for name in sorted(ledgers))
    hint = f"known are {others}" if others else "no source has told its clock yet"
    raise CommandError(f'Nothing is known of a clock of "{source}": {hint}.', NO)


def time_of(text: str, option: str) -> int:
    try:
        return parse_time(float(text) if text.isdigit() else text)
    except ValueError as error:
        raise CommandError(f"{option}: {str(error).removeprefix('ts ')}.", WRONG) from error


def _quoted(source: str) -> str:
    return f'"{source}"' if not source or " " in source else source


def _person() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown user"
