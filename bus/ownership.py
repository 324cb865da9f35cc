"""Who does an actor's work where two of them run: the server decides, by a pinned consumer.

Each owned role (an actor's share of the series, one partition so far) has a token: one message of the key-value bucket
``owners``, and one consumer on it with the priority policy ``pinned_client``. The server hands the token to one puller
only, again and again, for as long as that one keeps pulling; the others get nothing. When it falls silent for
:data:`PIN_SECONDS`, the token goes to another, which takes over.

A pin is no fence: a process that was stopped wakes up and goes on. What it writes then is refused, because every write
is conditional (:mod:`bus.writer`, the recorder's cursor). Holding the token only keeps two from working against each
other; that nothing is doubled does not rest on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import structlog
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from bus.client import Bus, BusUnavailable
from bus.subjects import OWNERS, bucket_stream, bucket_subject, owner_consumer
from bus.telemetry import owns_gauge

log = structlog.get_logger(__name__)

GROUP: Final = "owner"
PIN_SECONDS: Final = 2.0  # an owner that does not pull for this long has lost the token
TOKEN_SECONDS: Final = 1.0  # the token is handed out again this long after the last time
PULL_SECONDS: Final = 0.8  # a pull request lives this long, so that the owner pulls well within PIN_SECONDS
GRACE_SECONDS: Final = (
    6.0  # without the token, as after a restart of the server, until somebody else is taken to have it
)
INFO_SECONDS: Final = 2.0
KNOWN_PINS: Final = 8  # of this process that are remembered: each restart of the server makes a new one
REFUSED_PAUSE: Final = 0.2
WRONG_PIN: Final = "423"
EXPIRED: Final = "408"


class OwnershipLost(Exception):
    """Another process has this actor's work now: this one starts again, which makes it a standby."""


def consumer_config(actor: str, partition: int) -> dict[str, Any]:
    """The token's consumer, as nats-server's API takes it (nats-py has no words for priority groups)."""
    return {
        "durable_name": owner_consumer(actor, partition),
        "name": owner_consumer(actor, partition),
        "description": f"hands the work of {actor} to one process",
        "deliver_policy": "last_per_subject",
        "ack_policy": "explicit",
        "ack_wait": int(TOKEN_SECONDS * 1e9),
        "max_deliver": -1,
        "max_ack_pending": 1,
        "max_waiting": 512,
        "filter_subject": bucket_subject(OWNERS, f"{actor}.{partition}"),
        "replay_policy": "instant",
        "priority_groups": [GROUP],
        "priority_policy": "pinned_client",
        "priority_timeout": int(PIN_SECONDS * 1e9),
        "num_replicas": 0,
    }


class Ownership:
    """One process' claim to an actor's work."""

    def __init__(self, bus: Bus, actor: str, partition: int = 0) -> None:
        self._bus = bus
        self._actor = actor
        self._consumer = owner_consumer(actor, partition)
        self._stream = bucket_stream(OWNERS)
        self.handed = 0  # times that the token was handed to this process
        self._pin: str | None = None
        self._known: deque[str] = deque(maxlen=KNOWN_PINS)  # pins that this process was given
        self._token: Msg | None = None
        self._answered = asyncio.Event()
        self._refusal: str | None = None  # a status other than "nothing for you now"
        self._inbox = ""
        self._sub: Any = None

    async def acquire(self, standby: Callable[[], None] = lambda: None) -> None:
        """Waits for the token; ``standby`` is called once where somebody else has it.

        Raises BusUnavailable where there is no such consumer.
        """
        self._inbox = self._bus.nc.new_inbox()
        self._sub = await self._bus.nc.subscribe(self._inbox, cb=self._on_message)
        waiting = False
        started = time.monotonic()
        while not await self._pull():
            if not waiting and time.monotonic() - started > PIN_SECONDS + 2 * TOKEN_SECONDS:
                waiting = True
                owns_gauge.set(0, actor=self._actor)
                log.info(
                    "another process does this work, waits as a standby", action="owner.standby", actor=self._actor
                )
                standby()
        owns_gauge.set(1, actor=self._actor)
        log.info("owns its work", action="owner.acquired", actor=self._actor, took_over=waiting)

    async def hold(self) -> None:
        """Keeps the token until somebody else has it. Raises OwnershipLost.

        A token that does not come proves nothing: the server may have restarted, this process may have been too busy to
        hear it. Only a pin that is another's does.
        """
        seen = time.monotonic()
        while True:
            if await self._pull() or not self._bus.connected:
                seen = time.monotonic()  # while NATS is away nobody can take it; and nothing can be written either
            elif time.monotonic() - seen > GRACE_SECONDS:
                if await self._is_anothers():
                    owns_gauge.set(0, actor=self._actor)
                    raise OwnershipLost(f"Another process does the work of {self._actor}.")
                seen = time.monotonic()

    async def _is_anothers(self) -> bool:
        try:
            answer = await self._bus.nc.request(
                f"$JS.API.CONSUMER.INFO.{self._stream}.{self._consumer}", b"", timeout=INFO_SECONDS
            )
        except (NatsError, TimeoutError):
            return False
        groups = json.loads(answer.data).get("priority_groups") or []
        pins = {str(group["pinned_client_id"]) for group in groups if group.get("pinned_client_id")}
        return bool(pins - set(self._known))

    async def release(self) -> None:
        """Hands the token on at once, so that a restart does not wait for it."""
        if self._sub is None or not self._bus.connected:
            return
        with contextlib.suppress(NatsError, TimeoutError):
            if self._pin is not None:
                unpin = json.dumps({"group": GROUP}).encode()
                await self._bus.nc.request(
                    f"$JS.API.CONSUMER.UNPIN.{self._stream}.{self._consumer}", unpin, timeout=1.0
                )
            if self._token is not None:
                await self._bus.nc.publish(self._token.reply, b"-NAK")
            await self._sub.unsubscribe()
        self._pin = None

    async def _pull(self) -> bool:
        """One pull request: whether the token has come since the last one."""
        handed = self.handed
        self._answered.clear()
        request: dict[str, Any] = {"batch": 1, "expires": int(PULL_SECONDS * 1e9), "group": GROUP}
        if self._pin is not None:
            request["id"] = self._pin
        try:
            await self._bus.nc.publish(
                f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}",
                json.dumps(request).encode(),
                reply=self._inbox,
            )
        except NatsError as error:
            raise BusUnavailable(f"NATS does not take requests ({type(error).__name__}).") from error
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PULL_SECONDS + 0.2):
                await self._answered.wait()
        refusal, self._refusal = self._refusal, None
        if refusal is not None:
            if refusal.startswith(("503", "404")) or "Consumer Deleted" in refusal:
                raise BusUnavailable(f"The consumer {self._consumer} is missing: run `mt5 topology apply`.")
            await asyncio.sleep(REFUSED_PAUSE)  # what is refused at once must not be asked for without a pause
        return self.handed > handed

    async def _on_message(self, msg: Msg) -> None:
        """Counts whenever it comes: a busy process may hear of the token when its request is long over."""
        headers = msg.headers or {}
        status = headers.get("Status") if not msg.data else None
        if status is None:
            self._token = msg
            self._pin = headers.get("Nats-Pin-Id") or self._pin
            if self._pin is not None and self._pin not in self._known:
                self._known.append(self._pin)
            self.handed += 1
        elif status == WRONG_PIN:
            self._pin = None
            log.warning("the token was taken away", action="owner.unpinned", actor=self._actor)
        elif status != EXPIRED:
            self._refusal = f"{status} {headers.get('Description', '')}"
        self._answered.set()
