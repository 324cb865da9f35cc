"""A fence before a stream: who took it last is the only one whose writes are stored, whatever others have in hand.

A condition by subject (`bus/writer.py`) stops a former owner only where its successor has written already. Of a series
that is quiet, and of a model that nobody has answered for, it would still be the first. So a message of the stream itself
marks who writes: whoever starts adds one on a subject of its own, and each write names that message as the last one there
(``Nats-Expected-Last-Subject-Sequence-Subject``).
"""

from __future__ import annotations

import secrets
import time
from typing import Final

from nats.errors import Error as NatsError
from nats.js.api import Header
from nats.js.errors import APIError, NotFoundError

from bus.client import NO_MESSAGE, Bus, BusUnavailable, Outgoing
from bus.subjects import fence_subject

RENEW_SECONDS: Final = 86_400.0  # well within the age at which a stream drops what it holds
TAKE_WAIT: Final = 10.0


class Fence:
    """One process' claim to write a stream; nothing before :meth:`take`."""

    def __init__(self, bus: Bus, stream: str) -> None:
        self.subject = fence_subject(stream)
        self.seq = 0
        self._bus = bus
        self._stream = stream
        self._token = secrets.token_hex(8)
        self._count = 0
        self._taken = 0.0

    async def take(self) -> None:
        """From here on everybody else's writes are refused. Raises BusUnavailable."""
        ack = await self._bus.store(self.marker(), timeout=TAKE_WAIT)
        self.moved(int(ack.seq))

    async def keep(self) -> None:
        """Takes it anew before it expires; a fence that is another's stays that. Raises BusUnavailable."""
        if time.monotonic() - self._taken < RENEW_SECONDS:
            return
        try:
            ack = await self._bus.store(self.marker(), timeout=TAKE_WAIT, subject_at=self.seq)
        except APIError as error:  # what is written next is refused for the same reason, and its writer sees to it
            raise BusUnavailable(f"{self.subject} was not renewed: {error.description}.") from error
        self.moved(int(ack.seq))

    async def stands(self) -> bool:
        """Whether it is still this process' own. Raises BusUnavailable."""
        try:
            raw = await self._bus.js.get_last_msg(self._stream, self.subject)
        except NotFoundError as error:
            if error.err_code == NO_MESSAGE:
                return False
            raise BusUnavailable(f"NATS does not know {self._stream} now: {error.description}.") from error
        except (NatsError, APIError, TimeoutError, OSError) as error:
            raise BusUnavailable(f"NATS does not say who writes {self._stream} ({type(error).__name__}).") from error
        if not (raw.headers or {}).get(Header.MSG_ID.value, "").startswith(f"{self._token}:"):
            return False
        self.moved(int(raw.seq or 0))  # a renewal whose acknowledgement was lost
        return True

    def marker(self) -> Outgoing:
        """The next message of the fence: stored, it is the claim, and :meth:`moved` must hear of it."""
        self._count += 1
        return Outgoing(self.subject, b"", f"{self._token}:{self._count}", self._stream)

    def moved(self, seq: int) -> None:
        self.seq, self._taken = seq, time.monotonic()
