"""Blocking work beside the event loop that a cancellation ends: nothing is written into a folder that is gone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

R = TypeVar("R")
TELL_EVERY: Final = 0.1  # seconds between two words on how far it is

Count = Callable[[int], None]


class _Stopped(Exception):
    """The work was told to stop."""


def deaf(size: int) -> None:
    """Counts for nobody."""


async def in_thread(work: Callable[[Count], R], told: Count = deaf) -> R:
    """Runs ``work`` in a thread. It calls what it is given with how far it is, often, which is where it can be stopped.

    ``told`` hears of that in the event loop. A cancellation waits for the work to have stopped.
    """
    loop = asyncio.get_running_loop()
    stop = threading.Event()
    last = 0.0

    def count(size: int) -> None:
        nonlocal last
        if stop.is_set():
            raise _Stopped
        now = time.monotonic()
        if now - last >= TELL_EVERY:
            last = now
            loop.call_soon_threadsafe(told, size)

    task = asyncio.create_task(asyncio.to_thread(work, count), name="vault-thread")
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # heard of: nobody else asks
        raise
