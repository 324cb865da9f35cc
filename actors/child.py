"""Blocking work in a process of its own: lower priority, one thread, and it dies with its parent.

What the work imports is imported in the child alone, so that its memory goes with it.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from typing import Any, Final

NICE: Final = 10
LAST_SECONDS: Final = 5.0  # for the exit code of one whose pipe is closed

Work = Callable[
    ["connection.Connection[Any, Any]", bytes], None
]  # a function of a module: a spawned process imports it


class ChildDied(Exception):
    """It ended without its last word."""

    def __init__(self, exitcode: int | None) -> None:
        self.exitcode = exitcode
        super().__init__(f"exit code {exitcode}")


@dataclass(frozen=True, slots=True)
class Child:
    """A child at work."""

    _process: SpawnProcess
    _pipe: connection.Connection[Any, Any]

    async def hear(self) -> bytes:
        """Its next message. Raises ChildDied."""
        try:
            return await asyncio.to_thread(self._pipe.recv_bytes)
        except EOFError:
            await asyncio.to_thread(self._process.join, LAST_SECONDS)
            raise ChildDied(self._process.exitcode) from None


@asynccontextmanager
async def child(work: Work, data: bytes, *, name: str) -> AsyncIterator[Child]:
    """Runs ``work(pipe, data)`` and ends it with the block, whatever happens."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_live, args=(work, sender, data), name=name, daemon=True)
    await asyncio.to_thread(process.start)
    sender.close()
    try:
        yield Child(process, receiver)
    finally:
        process.kill()
        await asyncio.to_thread(process.join)
        receiver.close()


def _live(work: Work, pipe: connection.Connection[Any, Any], data: bytes) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's to handle
    threading.Thread(target=_die_with_parent, name="watch-parent", daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(NICE)
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"  # before numpy comes in: the other core is the hot path's
    work(pipe, data)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
