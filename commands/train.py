"""``train``: asks the trainer for a run, shows how far it is, and prints its verdict."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Final

import msgspec
from nats.micro.service import ServiceVerb, control_subject

from bus.client import BusUnavailable
from bus.subjects import TRAIN
from commands.output import DONE, NO, WRONG, CommandError, say, stderr_console, write_json
from commands.places import bus_of, find
from commands.settings import read
from schema.timeframes import canonical

if TYPE_CHECKING:
    from bus.client import Bus

TRAIN_SECONDS: Final = 1_800.0
RECIPE: Final = ("trees", "max_depth", "min_samples_leaf")  # what one run may be told over the settings
PING_EVERY: Final = 5.0
LOST_AFTER: Final = 45.0  # seconds without a sign of the trainer: a restart of it or of NATS is over by then


async def train(args: argparse.Namespace) -> int:
    """``train --timeframe TF [--trees N] [--max-depth N] [--min-samples-leaf N] [--json]``.

    0 when the version serves or is registered, 1 when it is refused. The options make another recipe for this run.
    """
    timeframe = canonical(args.timeframe)
    if timeframe is None:
        raise CommandError(f'"{args.timeframe}" is no timeframe: MT5\'s names are M1 to MN1.', WRONG)
    loaded = read()
    async with bus_of(find(loaded), loaded) as bus:
        recipe = {name: value for name in RECIPE if (value := getattr(args, name)) is not None}
        verdict = await _ask(bus, timeframe, recipe)
    if args.json:
        write_json(verdict)
    elif verdict["ok"]:
        for line in _lines(verdict):
            say(line)
    elif verdict["verdict"] == "invalid":
        raise CommandError(verdict["message"], WRONG)
    else:
        raise CommandError(verdict["message"], NO)
    return DONE if verdict["ok"] else NO


async def _ask(bus: Bus, timeframe: str, recipe: dict[str, int]) -> dict[str, Any]:
    """The trainer's verdict; raises CommandError where none comes."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = stderr_console()
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    trainer = await _instance(bus)
    if trainer is None:
        raise CommandError("No trainer answers: start it with `mt5 up` or `mt5 up trainer`; `mt5 doctor` tells more.")
    inbox = bus.nc.new_inbox()
    request = msgspec.json.encode({"timeframe": timeframe, "progress": inbox, **recipe})
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(f"{timeframe}: asking the trainer", total=1.0)

        async def on_progress(message: Any) -> None:
            step = msgspec.json.decode(message.data)
            progress.update(task, completed=step["done"], description=f"{timeframe}: {step['stage']}")

        subscription = await bus.nc.subscribe(inbox, cb=on_progress)
        asking = asyncio.create_task(bus.request(TRAIN, request, timeout=TRAIN_SECONDS), name="train-request")
        watching = asyncio.create_task(_watch(bus, trainer), name="train-watch")
        try:
            await asyncio.wait({asking, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                raise CommandError(watching.result())
            verdict: dict[str, Any] = msgspec.json.decode(asking.result())
            return verdict
        except BusUnavailable as error:
            raise CommandError(f"{error} `mt5 models list` shows whether a version came of it.") from error
        finally:
            for waiting in (asking, watching):
                waiting.cancel()
            await asyncio.gather(asking, watching, return_exceptions=True)
            await subscription.unsubscribe()


async def _watch(bus: Bus, trainer: str) -> str:
    """Returns, with what to tell, once the trainer that was asked is no more: it would never answer."""
    loop = asyncio.get_running_loop()
    seen = loop.time()
    while loop.time() - seen < LOST_AFTER:
        await asyncio.sleep(PING_EVERY)
        now = await _instance(bus)
        if now == trainer:
            seen = loop.time()
        elif now is not None:
            return "The trainer was restarted meanwhile and has forgotten the request: train again."
    return f"The trainer has not been heard of for {LOST_AFTER:.0f} s: see `mt5 doctor`, then train again."


async def _instance(bus: Bus) -> str | None:
    """The running trainer's instance, which a restart changes; None where none answers."""
    with contextlib.suppress(BusUnavailable):  # nobody answers: that is the answer
        ping = msgspec.json.decode(await bus.request(control_subject(ServiceVerb.PING, "trainer"), timeout=2.0))
        return str(ping["id"])
    return None


def _lines(verdict: dict[str, Any]) -> list[str]:
    """The verdict in words, then the figures that it gives."""
    figures = []
    if verdict.get("rows") is not None:
        figures.append(f"{verdict['rows']:,} rows")
    if verdict.get("auc") is not None:
        low, high = verdict.get("auc_ci") or (None, None)
        interval = f" ({low:.3f} to {high:.3f})" if low is not None and high is not None else ""
        figures.append(f"out-of-sample AUC {verdict['auc']:.3f}{interval}")
    if verdict.get("brier") is not None:
        figures.append(f"Brier {verdict['brier']:.4f}")
    threshold = verdict.get("threshold")
    figures.append("no threshold pays its costs" if threshold is None else f"threshold {threshold:.3f}")
    lines = [verdict["message"], ", ".join(figures)]
    return lines + ([verdict["path"]] if verdict.get("path") else [])
