"""The ledgers of broker clocks in the key-value bucket ``clock``, and the offsets of time zones as tables."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
import structlog
from nats.errors import Error as NatsError
from nats.js.errors import APIError, KeyDeletedError, KeyNotFoundError, KeyWrongLastSequenceError

from bus.client import Bus, BusUnavailable
from bus.subjects import CLOCK, key_token
from schema.clock import ClockLedger

log = structlog.get_logger(__name__)

FIRST_YEAR: Final = 1970
LAST_YEAR: Final = 2050
SCAN: Final = timedelta(days=7)  # no zone changes its offset twice within a week
LIST_WITHIN: Final = 5.0
AGAIN: Final = 1.0  # seconds until a watch that broke is opened again
_KEY: Final = "source."  # an unnamed source has an empty token, which a key alone must not be

_SECOND: Final = timedelta(seconds=1)
_NOTHING: Final = timedelta()


# --- zones ---------------------------------------------------------------------------------------------------------


@cache
def zone_steps(name: str) -> tuple[tuple[int, int], ...]:
    """A zone's UTC offsets from 1970 to 2050: (UTC epoch seconds, seconds ahead of UTC from then on), ascending.

    Raises:
        ValueError: there is no such zone.
    """
    try:
        zone = ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(
            f'there is no time zone "{name}": write a name of the tz database such as "Europe/Athens", "new_york+7", '
            'or an offset such as "+02:00"'
        ) from None

    def offset(at: int) -> int:
        return (datetime.fromtimestamp(at, zone).utcoffset() or _NOTHING) // _SECOND

    at = int(datetime(FIRST_YEAR, 1, 1, tzinfo=UTC).timestamp())
    end = int(datetime(LAST_YEAR, 1, 1, tzinfo=UTC).timestamp())
    current = offset(at)
    steps = [(-62_135_596_800, current)]
    span = int(SCAN.total_seconds())
    while at < end:
        if offset(at + span) != current:
            # Every change lies on a whole minute: find the first minute of the new offset.
            change = at + 60 * bisect_right(range(span // 60), 0, key=lambda m: int(offset(at + 60 * m) != current))
            current = offset(change)
            steps.append((change, current))
        at += span
    return tuple(steps)


# --- ledgers -------------------------------------------------------------------------------------------------------


class LedgerChanged(Exception):
    """Somebody else has written this ledger meanwhile: ``theirs`` is what stands there now."""

    def __init__(self, theirs: ClockLedger) -> None:
        super().__init__(
            f"The clock of {theirs.source or 'the unnamed source'} was changed by somebody else meanwhile."
        )
        self.theirs = theirs


def _key(source: str) -> str:
    return f"{_KEY}_{key_token(source)}"


_ENCODER: Final = msgspec.json.Encoder()
_DECODER: Final = msgspec.json.Decoder(ClockLedger)


class Ledgers:
    """Loads, saves (compare and set) and watches. Methods raise BusUnavailable where NATS does not answer."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.revisions: dict[str, int] = {}  # by source, as last read or written here

    async def load(self) -> dict[str, ClockLedger]:
        """Every ledger, by source."""
        try:
            async with asyncio.timeout(LIST_WITHIN):
                bucket = await self.bus.js.key_value(CLOCK)
                keys = await self.bus.keys(CLOCK)
        except (NatsError, APIError, TimeoutError) as error:
            raise BusUnavailable(f"NATS did not list the clock ledgers ({type(error).__name__}).") from error
        found = [await self._read(bucket, key) for key in keys]
        return {ledger.source: ledger for ledger in found if ledger is not None}

    async def get(self, source: str) -> ClockLedger | None:
        """One source's ledger as it stands now."""
        try:
            bucket = await self.bus.js.key_value(CLOCK)
        except (NatsError, APIError, TimeoutError) as error:
            raise BusUnavailable(f"NATS did not open the clock ledgers ({type(error).__name__}).") from error
        return await self._read(bucket, _key(source))

    async def _read(self, bucket: Any, key: str) -> ClockLedger | None:
        try:
            entry = await bucket.get(key)
        except (KeyNotFoundError, KeyDeletedError):
            return None
        except (NatsError, APIError, TimeoutError) as error:
            raise BusUnavailable(f"NATS did not read {key} ({type(error).__name__}).") from error
        return self._take(key, entry.value, entry.revision)

    def _take(self, key: str, value: bytes | None, revision: int | None) -> ClockLedger | None:
        try:
            ledger = _DECODER.decode(value or b"")
        except msgspec.DecodeError as error:
            log.error(
                "clock ledger cannot be read and is left out", action="ledger.unreadable", key=key, error=str(error)
            )
            return None
        self.revisions[ledger.source] = revision or 0
        return ledger

    async def save(self, ledger: ClockLedger) -> int:
        """Writes a ledger if nobody else has since it was read here; returns its revision.

        Raises:
            LedgerChanged: somebody has.
        """
        try:
            bucket = await self.bus.js.key_value(CLOCK)
            revision = await bucket.update(
                _key(ledger.source), _ENCODER.encode(ledger), last=self.revisions.get(ledger.source, 0)
            )
        except KeyWrongLastSequenceError:
            theirs = await self.get(ledger.source)
            if theirs is None:  # unreadable or deleted: what we know stands
                raise BusUnavailable(f"The clock ledger of {ledger.source} is not there to be compared with.") from None
            raise LedgerChanged(theirs) from None
        except (NatsError, APIError, TimeoutError) as error:
            raise BusUnavailable(f"NATS did not save the clock of {ledger.source} ({type(error).__name__}).") from error
        self.revisions[ledger.source] = revision
        return int(revision)

    async def watch(self, changed: Callable[[ClockLedger, int], Awaitable[None]]) -> None:
        """Calls ``changed`` with every ledger that is written, those that stand there first, until it is cancelled.

        What was written here comes too: compare its revision with :attr:`revisions`.
        """
        while True:
            try:
                bucket = await self.bus.js.key_value(CLOCK)
                watcher = await bucket.watchall()
                try:
                    lost = asyncio.Event()
                    forget = self.bus.on_reconnect(lost.set)
                    await self._follow(watcher, changed, lost)
                finally:
                    forget()
                    await watcher.stop()  # type: ignore[no-untyped-call]
            except (NatsError, APIError, TimeoutError) as error:
                log.warning("clock ledgers are watched anew", action="ledger.watch", error=type(error).__name__)
                await asyncio.sleep(AGAIN)

    async def _follow(
        self, watcher: Any, changed: Callable[[ClockLedger, int], Awaitable[None]], lost: asyncio.Event
    ) -> None:
        """Until the connection is made anew, when the watch may have missed something."""
        while not lost.is_set():
            try:
                entry = await watcher.updates(timeout=AGAIN)
            except (TimeoutError, NatsError):
                continue
            if entry is None or not entry.value:
                continue
            try:
                ledger = _DECODER.decode(entry.value)
            except msgspec.DecodeError as error:
                log.error("clock ledger cannot be read", action="ledger.unreadable", key=entry.key, error=str(error))
                continue
            await changed(ledger, int(entry.revision))
