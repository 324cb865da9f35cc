"""``verify``: signals made again from their bars and their model, and whether they are what was said, bit by bit."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from random import Random
from typing import TYPE_CHECKING, Any

from commands.output import DONE, NO, WRONG, CommandError, say, stderr_console, write_json, write_table
from commands.places import bus_of, find, store_of
from commands.settings import read

if TYPE_CHECKING:
    from actors.audit import Audit, Checked, Picks

SHOWN = 20  # different signals that are shown in full; --json has all


async def verify(args: argparse.Namespace) -> int:
    """``verify SIGNAL_ID`` | ``--sample N [--seed S] [--symbol S]`` | ``--all [--symbol S]``, each with ``--json``."""
    chosen = (args.signal is not None) + (args.sample is not None) + args.all
    if chosen != 1:
        raise CommandError("Name one signal, or give --sample N or --all.", WRONG)
    if args.signal is not None and (args.symbol is not None or args.seed is not None):
        raise CommandError("--symbol and --seed choose among many signals: leave them out with a signal's id.", WRONG)
    from actors.artifacts import Artifacts
    from actors.audit import Audit
    from bus.audit import Streams
    from bus.client import BusUnavailable

    loaded = read()
    places = find(loaded)
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(store_of(places))
        bus = await stack.enter_async_context(bus_of(places, loaded))
        audit = Audit(store, Streams(bus, "verify"), Artifacts(bus, loaded.settings).load)
        try:
            if args.signal is not None:
                return await _one(audit, args.signal, as_json=args.json)
            if args.all:
                picks = await audit.everything(args.symbol)
            else:
                picks = await audit.pick(args.sample, Random(args.seed), args.symbol)
            return await _many(audit, picks, as_json=args.json)
        except BusUnavailable as error:
            raise CommandError(str(error), NO) from error


async def _one(audit: Audit, signal_id: str, *, as_json: bool) -> int:
    checked = await audit.one(signal_id)
    if checked is None:
        raise CommandError(f"There is no signal {signal_id}: `mt5 signals tail` and GET /signals show their ids.", NO)
    if as_json:
        write_json(_facts(checked) | {"signal": checked.signal})
    else:
        _show(checked)
    return NO if checked.differences else DONE


async def _many(audit: Audit, picks: Picks, *, as_json: bool) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    count, wrong = 0, []
    console = stderr_console()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("series", total=len(picks))
        for series, ids in picks.items():
            progress.update(task, description=f"{' '.join(series)}: {count:,} signals")
            async for part in audit.run({series: ids}):
                count += len(part)
                wrong += [one for one in part if one.differences]
                progress.update(task, description=f"{' '.join(series)}: {count:,} signals")
            progress.advance(task)
    if as_json:
        write_json({"signals": count, "identical": count - len(wrong), "different": [_facts(one) for one in wrong]})
        return NO if wrong else DONE
    for one in wrong[:SHOWN]:
        _show(one)
    if not count:
        say("There are no archived signals to verify.")
    elif wrong:
        say(f"{len(wrong):,} of {count:,} signals differ ({_summary(wrong)}); {count - len(wrong):,} are identical.")
    else:
        say(f"{count:,} signals verified: all are identical.")
    return NO if wrong else DONE


def _summary(wrong: Sequence[Checked]) -> str:
    fields = Counter(one.differences[0].field for one in wrong)
    return ", ".join(f"{field} {times:,}" for field, times in fields.most_common(5))


def _facts(checked: Checked) -> dict[str, Any]:
    return {
        "id": checked.signal.id,
        "identical": not checked.differences,
        "differences": checked.differences,
    }


def _show(checked: Checked) -> None:
    signal = checked.signal
    name = (
        f"{signal.symbol} {signal.timeframe} {signal.ts:%Y-%m-%d %H:%M}, signal {signal.id} "
        f"of {signal.model_name} {signal.model_version or '(no version)'}, as of candle {signal.candles_seq}"
    )
    if not checked.differences:
        say(f"Identical: {name}.")
        return
    say(f"Different: {name}.")
    write_table(("field", "recorded", "rebuilt"), [(d.field, d.recorded, d.rebuilt) for d in checked.differences])
