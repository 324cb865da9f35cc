"""A real ``up`` for the benchmarks: its own processes, a home of its own, embedded servers; its start and its memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from commands.bench_figures import Figure, Promise, alone
from commands.output import CommandError
from commands.up import ROOT
from deploy.home import Ready, read_ready

READY_WITHIN: Final = 60.0
STOP_WITHIN: Final = 20.0
MEGABYTE: Final = 1024**2

START: Final = Promise("≤ 10 s", 10.0, "at most", of="ours")


@dataclass(frozen=True, slots=True)
class Running:
    """An ``up`` that is ready; ``seconds`` is what its start took, from the launch of the program."""

    pid: int
    seconds: float
    home: Path
    gateway: str
    nats: str
    database: str


@contextlib.contextmanager
def temporary_home() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="mt5-bench-"))
    try:
        yield folder / "home"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.asynccontextmanager
async def running(home: Path) -> AsyncIterator[Running]:
    """`mt5 up` with defaults, whatever this shell's settings are. Raises CommandError where it does not get ready."""
    log_file = home.parent / "up.log"
    with log_file.open("ab") as log:
        started = time.perf_counter()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "runner", "up"),
            cwd=home.parent,
            env=environment(home),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
        )
    reading: asyncio.Task[None] | None = None
    try:
        ready = await _ready(process, home, log_file)
        seconds = time.perf_counter() - started
        reading = asyncio.create_task(_drain(process), name="bench-drain")
        yield Running(process.pid, seconds, home, ready["gateway"], ready["nats"], ready["database"])
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            async with asyncio.timeout(STOP_WITHIN):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        if reading is not None:
            await reading


def environment(home: Path) -> dict[str, str]:
    """Ours without the user's own settings: the benchmarks measure the defaults."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MT5_")}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return kept | {"MT5_HOME": str(home), "MT5_GATEWAY_PORT": "0", "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


async def _ready(process: asyncio.subprocess.Process, home: Path, log: Path) -> Ready:
    stdout = process.stdout
    if stdout is None:
        raise RuntimeError("the program has no output")
    try:
        async with asyncio.timeout(READY_WITHIN):
            async for line in stdout:
                if line.startswith(b"Ready:") and (ready := read_ready(home)) is not None:
                    return ready
    except TimeoutError:
        raise CommandError(
            f"`mt5 up` was not ready within {READY_WITHIN:g} s: try it by itself, it says why."
        ) from None
    said = (await asyncio.to_thread(log.read_text, errors="replace")).strip().splitlines()
    raise CommandError(f"`mt5 up` did not start: {said[-1] if said else 'it said nothing'}")


async def _drain(process: asyncio.subprocess.Process) -> None:
    """Nobody reads what it says, but a full pipe would stop it."""
    if process.stdout is not None:
        while await process.stdout.read(65_536):
            pass


# --- start -------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def started(rounds: int) -> AsyncIterator[tuple[Running, Path, list[Figure]]]:
    """A running system, a folder for scratch files, and how long its start took (nothing with 0 rounds).

    A round is a start on an empty home and one more on the same; the last of them stays.
    """
    empty: list[float] = []
    again: list[float] = []
    for _ in range(rounds - 1):
        with temporary_home() as home:
            for seconds in (empty, again):
                async with running(home) as system:
                    seconds.append(system.seconds)
    with temporary_home() as home:
        if rounds:
            async with running(home) as system:
                empty.append(system.seconds)
        async with running(home) as system:
            again.append(system.seconds)
            figures = [
                alone("start", f"everything to ready, {which}", "s", seconds, START)
                for which, seconds in (("empty home", empty), ("second start", again))
                if rounds
            ]
            yield system, home.parent, figures


# --- memory ------------------------------------------------------------------------------------------------------


def memory(pid: int) -> list[Figure]:
    """Resident memory of every process of an ``up``: PostgreSQL's shared pages are counted once."""
    try:
        psutil = import_module("psutil")
    except ImportError:
        reason = "psutil is not installed: install the extra `bench`."
        return [Figure(name="memory", what="resident, every process", unit="MB", why_not=reason)]
    top = psutil.Process(pid)
    sizes: dict[str, float] = {"runner": top.memory_info().rss}
    for child in top.children(recursive=True):
        try:
            name, size = _named(child), _size(child)
        except psutil.NoSuchProcess:
            continue
        sizes[name] = sizes.get(name, 0.0) + size
    figures = [alone("memory", f"resident, {name}", "MB", [size / MEGABYTE]) for name, size in sizes.items()]
    return [*figures, alone("memory", "resident, all", "MB", [sum(sizes.values()) / MEGABYTE])]


def _named(process: Any) -> str:
    words = process.cmdline()
    if "_run" in words:
        actors = words[words.index("_run") + 1 :]
        return actors[0] if len(actors) == 1 else f"hot ({', '.join(actors)})"
    return "postgres (sum)" if process.name().startswith("postgres") else str(process.name())


def _size(process: Any) -> float:
    if process.name().startswith("postgres"):
        # Every backend maps the same buffers; their share of them adds up to what is really there.
        full = process.memory_full_info()
        return float(getattr(full, "pss", 0) or full.rss)
    return float(process.memory_info().rss)
