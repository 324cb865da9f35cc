"""``replay``, and the demo's simulated terminal: what posts candles to a gateway, with the gateway found."""

from __future__ import annotations

import argparse
import asyncio
import signal
from pathlib import Path

from commands.places import find
from commands.settings import Loaded, read
from schema.settings import Log


async def replay_file(args: argparse.Namespace) -> int:
    """``replay FILE --symbol S --timeframe TF [--speed X] [--history] [--url URL] [--json]``."""
    from commands.replay import replay

    loaded = read()
    return await replay(
        Path(args.file),
        symbol=args.symbol,
        timeframe=args.timeframe,
        url=args.url or find(loaded).need_gateway(),
        api_key=_key(loaded),
        speed=args.speed,
        history=args.history,
        as_json=args.json,
    )


async def run_demo(args: argparse.Namespace) -> int:
    """The program that ``demo`` runs beside the actors once they are ready; SIGTERM ends it."""
    from bus import logs
    from commands.demo import demo

    logs.configure(Log(level="error"))  # the demo tells its own story
    loaded = read()
    places = find(loaded)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return await demo(
        places.need_gateway(),
        places.need_nats(),
        seconds=args.seconds,
        seed=args.seed,
        stop=stop,
        api_key=_key(loaded),
    )


def _key(loaded: Loaded) -> str | None:
    """A key that the gateway takes, where the settings know one."""
    return next(iter(loaded.settings.gateway.api_keys), None)
