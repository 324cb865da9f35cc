"""``gaps``: what is missing of the archived candles and why."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from commands.output import DONE, WRONG, CommandError, say, write_json, write_table
from commands.places import Places, bus_of, find, store_of
from commands.settings import Loaded, read
from schema.timeframes import canonical

if TYPE_CHECKING:
    from actors.core.clocks import Clocks
    from actors.gateway.gaps import GapReport

SHOWN = 40  # gaps of one series on a terminal, the newest; --json has all


async def gaps(args: argparse.Namespace) -> int:
    """``gaps [--symbol S] [--timeframe TF] [--json]``: one series in detail, several as a table."""
    from actors.core.sessions import ServerClock
    from actors.gateway.gaps import BARS, gap_report

    timeframe = canonical(args.timeframe) if args.timeframe else None
    if args.timeframe and timeframe is None:
        raise CommandError(f'"{args.timeframe}" is no timeframe: MT5\'s names are M1 to MN1.', WRONG)
    loaded = read()
    places = find(loaded)
    clocks = await _clocks(places, loaded)
    reports: list[GapReport] = []
    async with store_of(places) as store:
        for symbol, name in await store.series(args.symbol, timeframe):
            holes = await store.holes(symbol, name, limit=BARS)
            if holes is not None:
                line = clocks.line(holes.source)
                reports.append(gap_report(symbol, name, holes, ServerClock(line.to_server, line.to_utc)))
    if args.json:
        write_json({"series": reports})
    elif not reports:
        say("The archive has no such candles: `mt5 gaps` without options lists every series.")
    elif len(reports) == 1:
        _detail(reports[0])
    else:
        columns = ("symbol", "timeframe", "bars", "first", "last", "closed session", "no tick", "transport loss")
        write_table(columns, [_row(report) for report in reports])
    return DONE


async def _clocks(places: Places, loaded: Loaded) -> Clocks:
    """Every source's clock: by the ledgers where the bus is known, by the settings' rules alone elsewhere."""
    from actors.core.clocks import Clocks
    from bus.client import BusUnavailable
    from bus.ledger import Ledgers, zone_steps

    ledgers = []
    if places.nats is not None:
        async with bus_of(places, loaded) as bus:
            try:
                ledgers = list((await Ledgers(bus).load()).values())
            except BusUnavailable as error:
                raise CommandError(str(error)) from error
    try:
        return Clocks(loaded.settings.clock, ledgers, zone_steps, time.time())
    except ValueError as error:
        raise CommandError(str(error), WRONG) from error


def _row(report: GapReport) -> tuple[object, ...]:
    return (
        report.symbol,
        report.timeframe,
        report.bars,
        f"{report.first:%Y-%m-%d %H:%M}",
        f"{report.last:%Y-%m-%d %H:%M}",
        *report.missing.values(),
    )


def _detail(report: GapReport) -> None:
    if not report.gaps:
        say(f"{report.symbol} {report.timeframe}: {report.bars:,} bars, none is missing.")
        return
    shown = report.gaps[-SHOWN:]
    rows = [(gap.kind, gap.name, f"{gap.from_:%Y-%m-%d %H:%M}", f"{gap.to:%Y-%m-%d %H:%M}", gap.count) for gap in shown]
    write_table(("class", "name", "from (UTC)", "to", "bars"), rows)
    left = (
        f" (the newest {len(shown)} of {len(report.gaps)} gaps; --json has all)"
        if len(shown) < len(report.gaps)
        else ""
    )
    counts = ", ".join(f"{kind} {count:,}" for kind, count in report.missing.items())
    say(f"{report.symbol} {report.timeframe}: {report.bars:,} bars; missing: {counts}{left}")
