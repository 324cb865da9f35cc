"""``bench``: our figures beside the peers', measured side by side in one run, and each ratio beside its promise.

Every comparison takes turns with its peer on the same machine and the same servers; a figure is the median over rounds,
a ratio the median of the rounds' own ratios. The system under measure is a real ``up`` with a home of its own, which is
gone afterwards: what runs on this machine otherwise is left alone.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from commands.bench_figures import COLUMNS, Figure, as_json, misses, table
from commands.output import DONE, NO, WRONG, CommandError, complain, say, stderr_console, write_json, write_table

if TYPE_CHECKING:
    from rich.console import Console

ROOT: Final = Path(__file__).resolve().parents[1]
PEERS: Final = ROOT.parent / "shared" / "peers"

NAMES: Final = {
    "chain": "POST → signal beside the bare chain and the polling API",
    "features": "one feature step beside talipp, and blocks of 1,000",
    "prediction": "one prediction beside scikit-learn",
    "history": "history load beside asyncpg's bare upserts",
    "series": "10,000 series beside 10",
    "memory": "resident memory of every process",
    "start": "seconds until everything is ready",
}
CORE: Final = ("features", "prediction", "series")  # these run without servers, before there are any


@dataclass(frozen=True, slots=True)
class Effort:
    """How often and how much is measured."""

    core: int
    series: int
    chain: int
    posts: int
    history: int
    bars: int
    actors: int  # rounds of many series through every actor; 0: not at all
    count: int
    starts: int


FULL: Final = Effort(core=15, series=5, chain=7, posts=300, history=5, bars=20_000, actors=5, count=500, starts=3)
QUICK: Final = Effort(core=3, series=1, chain=2, posts=40, history=2, bars=5_000, actors=0, count=0, starts=1)


async def bench(args: argparse.Namespace) -> int:
    """``bench [--quick] [--json] [--peers DIR] [NAME …]``: 0 where every promise holds, 1 where one does not."""
    names = chosen(args.names)
    peers = peers_folder(getattr(args, "peers", None))
    console = stderr_console()
    started, load = time.monotonic(), os.getloadavg()[0]
    figures = await measure(names, QUICK if args.quick else FULL, peers, _teller(console))
    machine = {
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_before": round(load, 2),
        "seconds": round(time.monotonic() - started, 1),
    }
    missed = misses(figures)
    if args.json:
        write_json(
            {"ok": not missed, "quick": args.quick, "machine": machine, "figures": [as_json(f) for f in figures]}
        )
    else:
        write_table(COLUMNS, table(figures))
        say(
            f"{machine['cpus']} processors, {machine['system']}, Python {machine['python']}, load {machine['load_before']} "
            f"before; measured in {machine['seconds']:.0f} s."
        )
    for sentence in missed:
        complain(sentence)
    return NO if missed else DONE


def peers_folder(given: str | None) -> Path:
    """Where the peers' programs are; they are no part of the project."""
    return Path(given).expanduser().absolute() if given else PEERS


def chosen(names: list[str]) -> tuple[str, ...]:
    """The benchmarks to run, in their own order; raises CommandError for an unknown name."""
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise CommandError(f"There is no benchmark {unknown[0]}: there are {', '.join(NAMES)}.", WRONG)
    return tuple(name for name in NAMES if not names or name in names)


async def measure(names: tuple[str, ...], effort: Effort, peers: Path, tell: Callable[[str], None]) -> list[Figure]:
    """Runs the named benchmarks; figures in the order of :data:`NAMES`."""
    from commands import bench_core

    found: list[Figure] = []
    if "series" in names and not effort.actors:
        found.append(
            Figure(
                name="series", what="through every actor", unit="µs", why_not="only without --quick, it takes minutes"
            )
        )
    if "features" in names:
        tell("features")
        found += bench_core.feature_steps(effort.core)
    if "prediction" in names:
        tell("prediction")
        found += bench_core.predictions(effort.core)
    if "series" in names:
        tell("series, the core alone")
        found += bench_core.many_series(effort.series)
    if set(names) - set(CORE) or ("series" in names and effort.actors):
        found += await _with_servers(names, effort, peers, tell)
    return sorted(found, key=lambda figure: list(NAMES).index(figure.name))


async def _with_servers(
    names: tuple[str, ...], effort: Effort, peers: Path, tell: Callable[[str], None]
) -> list[Figure]:
    from bus import logs
    from commands import bench_archive, bench_chain, bench_series, bench_system
    from schema.settings import Log

    logs.configure(Log(level="error"))
    tell("start")
    async with bench_system.started(effort.starts if "start" in names else 0) as (system, scratch, found):
        if "chain" in names:
            tell("chain")
            found += await bench_chain.chain(system, peers, effort.chain, effort.posts, scratch)
        if "history" in names:
            tell("history")
            found += await bench_archive.history(system, effort.history, effort.bars)
        if "memory" in names:
            found += bench_system.memory(system.pid)
        if "series" in names and effort.actors:
            tell("series, through every actor")
            found += await bench_series.many_series(system, effort.actors, effort.count)
    return found


def _teller(console: Console) -> Callable[[str], None]:
    def tell(what: str) -> None:
        if console.is_terminal:
            console.print(f"measuring {what} …", style="dim")

    return tell
