"""``signals tail``: signals as they come."""

from __future__ import annotations

import argparse

import msgspec

from bus.subjects import SIGNALS, encode_token
from commands.output import DONE, WRONG, CommandError, complain, say
from commands.places import bus_of, find
from commands.settings import read
from schema.messages import Signal
from schema.timeframes import canonical

ARROWS = {1: "▲", -1: "▼", 0: "·"}


def subject(timeframe: str | None, symbol: str | None) -> str:
    """The subject of one series' signals, or of all: a part that is not given is a wildcard."""
    return ".".join((SIGNALS.prefix, timeframe or "*", "*" if symbol is None else encode_token(symbol)))


def line(signal: Signal) -> str:
    """A signal for people, in columns."""
    probability = "  -  " if signal.prob_up is None else f"{signal.prob_up:.3f}"
    model = f"{signal.model_name} {signal.model_version or '-'}"
    why = f"  ({signal.abstain})" if signal.abstain else ""
    again = "  supersedes an earlier one" if signal.supersedes else ""
    return (
        f"{signal.ts:%Y-%m-%d %H:%M}  {signal.symbol:<10} {signal.timeframe:<4} {ARROWS[signal.label]}  "
        f"p(up) {probability}  {model}{why}{again}"
    )


async def tail(args: argparse.Namespace) -> int:
    """``signals tail [--symbol S] [--timeframe TF] [--limit N] [--json]``; runs until it is interrupted."""
    timeframe = canonical(args.timeframe) if args.timeframe else None
    if args.timeframe and timeframe is None:
        raise CommandError(f'"{args.timeframe}" is no timeframe: MT5\'s names are M1 to MN1.', WRONG)
    loaded = read()
    left = args.limit
    async with bus_of(find(loaded), loaded) as bus:
        subscription = await bus.nc.subscribe(subject(timeframe, args.symbol))
        await bus.nc.flush()
        if not args.json:
            complain("waiting for signals; Ctrl-C ends this.")
        async for message in subscription.messages:
            try:
                signal = SIGNALS.decode(message.data)
            except msgspec.DecodeError as error:
                complain(f"{message.subject} carried something that is no signal ({error}): who publishes there?")
                continue
            say(message.data.decode() if args.json else line(signal))
            if left is not None and (left := left - 1) <= 0:
                break
    return DONE
