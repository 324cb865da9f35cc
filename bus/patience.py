"""Whether PostgreSQL takes an actor's work: tries until it does, and says once when it stops and when it starts again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from bus.store import StoreUnavailable

T = TypeVar("T")

BACKOFF_FIRST: Final = 0.1  # seconds between tries while PostgreSQL is away
BACKOFF_MAX: Final = 3.0


class Patience:
    """For one actor; ``log`` is its."""

    def __init__(self, log: Any, actor: str) -> None:
        self._log = log
        self._actor = actor
        self._away_since: float | None = None

    async def insist(self, work: Callable[[], Awaitable[T]]) -> T:
        """Runs ``work`` until PostgreSQL has answered; only StoreRejected and defects come out."""
        pause = BACKOFF_FIRST
        while True:
            try:
                result = await work()
            except StoreUnavailable as error:
                if self._away_since is None:
                    self._away_since = time.monotonic()
                    self._log.error("PostgreSQL is away, keeps trying", action=f"{self._actor}.away", error=str(error))
                await asyncio.sleep(pause)
                pause = min(2 * pause, BACKOFF_MAX)
                continue
            if self._away_since is not None:
                seconds = round(time.monotonic() - self._away_since, 1)
                self._away_since = None
                self._log.info("PostgreSQL is back", action=f"{self._actor}.back", seconds=seconds)
            return result
