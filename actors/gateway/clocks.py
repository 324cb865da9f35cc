"""The gateway's clocks: learned from payloads, kept in the bucket ``clock``, and taken over when a command changes them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Final

from actors.core.clock import LONDON, NEW_YORK, ClockAlert, Conversion
from actors.core.clocks import REPLAYED, Clocks, Series, moment
from bus.client import Bus, BusUnavailable
from bus.ledger import LedgerChanged, Ledgers, zone_steps
from bus.subjects import ALERTS
from bus.supervise import ConfigurationError
from schema.clock import ClockLedger
from schema.messages import Alert
from schema.settings import Clock

CHECK: Final = "clock"
TRIES: Final = 5  # times that somebody else may be faster than we


class ClockKeeper:
    """What a collector holds: :meth:`resolve` for each payload, :meth:`follow` as a task beside it."""

    def __init__(self, bus: Bus, ledgers: Ledgers, clocks: Clocks, log: Any) -> None:
        self.bus = bus
        self.ledgers = ledgers
        self.clocks = clocks
        self.log = log
        self._saving = asyncio.Lock()

    @classmethod
    async def open(cls, bus: Bus, settings: Mapping[str, Clock], log: Any) -> ClockKeeper:
        """Reads every ledger and puts the settings' rules in force.

        Raises:
            ConfigurationError: a rule cannot be read or names an unknown zone.
            BusUnavailable: NATS does not answer.
        """
        for zone in (NEW_YORK, LONDON):  # their tables take a moment, which no payload should wait
            await asyncio.to_thread(zone_steps, zone)
        ledgers = Ledgers(bus)
        found = await ledgers.load()
        try:
            clocks = Clocks(settings, found.values(), zone_steps, time.time())
        except ValueError as error:
            raise ConfigurationError(f"{str(error)[:1].upper()}{str(error)[1:]}") from error
        keeper = cls(bus, ledgers, clocks, log)
        await keeper._save()
        return keeper

    async def resolve(
        self,
        source: str | None,
        *,
        server_time: int | None,
        gmt_time: int | None,
        series: Series,
        now: float,
        replay: bool = False,
    ) -> Conversion:
        """How a payload's times are converted; what it taught is saved before this returns.

        ``now`` is our clock and becomes the payload's time of receipt: ask for it right before.

        Raises:
            BusUnavailable: it could not be saved; publish nothing that was converted.
        """

        def learn() -> Conversion:
            return self.clocks.resolve(
                source, server_time=server_time, gmt_time=gmt_time, series=series, now=now, replay=replay
            )

        conversion = learn()
        alerts = conversion.alerts
        for _ in range(TRIES):
            if not await self._save():
                break
            conversion = learn()  # somebody else wrote the ledger meanwhile: theirs is in force
        for alert in alerts:
            await self._raise(alert, source or (REPLAYED if replay else ""), now)
        return conversion

    async def _save(self) -> bool:
        """Saves what was learned; returns whether somebody else's ledger was taken over instead."""
        changed = False
        async with self._saving:
            waiting = self.clocks.take_unsaved()
            while waiting:
                try:
                    await self.ledgers.save(waiting[0])
                except LedgerChanged as error:
                    self.clocks.adopt(error.theirs, time.time())
                    changed = True
                except BaseException:
                    for ledger in waiting:
                        self.clocks.keep(ledger.source)
                    raise
                waiting.pop(0)
        return changed

    async def _raise(self, alert: ClockAlert, source: str, now: float) -> None:
        """Tells people, at most once an hour for the same thing; a bus that is away has the log's word for it."""
        self.log.warning(alert.message, action=f"clock.{alert.kind}", source=source, **alert.details)
        message = Alert(
            severity="info" if alert.kind == "learned" else "warning",
            check=CHECK,
            message=alert.message,
            at=moment(now),
            source=source,
            details={"kind": alert.kind, **alert.details},
        )
        try:
            await self.bus.publish(
                ALERTS, message, message.severity, CHECK, msg_id=f"clock-{source}-{alert.kind}-{int(now) // 3_600}"
            )
        except BusUnavailable as error:
            self.log.warning("alert not stored", action="clock.alert", error=str(error))

    async def follow(self) -> None:
        """Takes over what commands write, until it is cancelled."""
        await self.ledgers.watch(self._changed)

    async def _changed(self, ledger: ClockLedger, revision: int) -> None:
        async with self._saving:
            if revision <= self.ledgers.revisions.get(ledger.source, 0):
                return
            self.ledgers.revisions[ledger.source] = revision
            try:
                self.clocks.adopt(ledger, time.time())
            except ValueError as error:
                self.log.error(
                    "clock ledger cannot be used", action="clock.adopt", source=ledger.source, error=str(error)
                )
                return
        self.log.info("clock taken over", action="clock.adopt", source=ledger.source)
        try:
            await self._save()
        except BusUnavailable as error:
            self.log.warning("clock not saved yet", action="clock.save", error=str(error))
