"""Notices on the bus: ``alerts.<severity>.<check>``, for the page and for whoever listens."""

from __future__ import annotations

from typing import Final

from nats.errors import Error as NatsError
from nats.js.errors import APIError

from actors.monitor.outbox import SendFailed
from bus.client import Bus, BusUnavailable
from bus.subjects import ALERTS
from schema.health import Notice
from schema.messages import Alert

NAME: Final = "nats"
NO_CHECK: Final = "monitor"  # what a notice is about that is about no check: a test


class NatsSender:
    """Publishes once: the notice's id is the message's, which JetStream knows for two minutes and readers beyond."""

    name = NAME

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def send(self, notice: Notice) -> str | None:
        if notice.kind == "report":
            return None  # for people, and larger than a message may be
        check = notice.checks[0] if notice.checks else NO_CHECK
        alert = Alert(
            severity=notice.severity,
            check=check,
            message=notice.title,
            at=notice.at,
            details={"lines": list(notice.lines), "checks": list(notice.checks)},
            event=None if notice.kind == "test" else notice.kind,
            incident=notice.incident or notice.id,  # by which the monitor knows its own
        )
        try:
            await self._bus.publish(ALERTS, alert, notice.severity, check, msg_id=notice.id)
        except BusUnavailable as error:
            raise SendFailed(str(error)) from error
        except APIError as error:
            raise SendFailed(f"JetStream refused it: {error.description}.", permanent=True) from error
        except NatsError as error:
            raise SendFailed(f"NATS did not take it ({type(error).__name__}).") from error
        return None
