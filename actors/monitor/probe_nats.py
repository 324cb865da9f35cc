"""The bus' checks: whether it answers and stores, how full its streams are, and how the actors say they are."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from nats.errors import Error as NatsError
from nats.js.api import DiscardPolicy, StreamConfig, StreamInfo
from nats.js.errors import APIError

from actors.core.sizes import human
from actors.monitor.watch import Probe, result, words
from bus.client import Bus
from bus.status import LOOPING, STEADY, Process, Status, judge, statuses
from bus.subjects import OWNERS, PROBE, bucket_stream
from bus.topology import wanted
from schema.health import CheckResult
from schema.health import Status as Verdict
from schema.settings import Settings

FULL_WARNING: Final = 0.8  # share of what a stream that refuses may hold, ...
FULL_CRITICAL: Final = 0.95  # ... and share of what JetStream may store
SLOW_SECONDS: Final = 1.0  # for an answer or an acknowledgement
ANSWERS_WITHIN: Final = 3.0  # seconds for the actors' answers: a busy one is no dead one
PAGE: Final = 256  # streams in one answer of the server
MOST_PAGES: Final = 40


@dataclass(slots=True)
class NatsProbes:
    """``own`` is the process of the asker, where it is one of the actors' processes."""

    bus: Bus
    settings: Settings
    actors: Sequence[str]
    own: Process | None = None

    def probes(self) -> list[Probe]:
        return [
            Probe("nats", self.answers),
            Probe("nats.store", self.store, every=4, detail=True),
            Probe("nats.stream", self.streams, every=2, detail=True, many=True),
            Probe("nats.publish", self.publish),
            Probe("actor", self.asked, detail=True, many=True, also=("nats.lag",)),
        ]

    def _here(self) -> None:
        """At once, and not only after a timeout. Raises OSError."""
        if not self.bus.connected:
            raise ConnectionError("NATS is not connected")

    async def answers(self) -> list[CheckResult]:
        began = time.monotonic()
        if not self.bus.connected:
            way = "start it again; the EAs keep and send again what it does not take"
            return [result("nats", "critical", f"NATS is not connected ({words_of(self.bus)}): {way}.")]
        await self.bus.nc.flush(timeout=max(1, int(self.settings.health.timeout_seconds) - 1))
        took = time.monotonic() - began
        version = self.bus.nc.connected_server_version
        said = f"nats-server {version.major}.{version.minor}.{version.patch} answers"
        if took > SLOW_SECONDS:
            return [result("nats", "warning", f"{said}, but it took {took:.1f} s.", value=round(took, 6), unit="s")]
        return [result("nats", "ok", f"{said}.", value=round(took, 6), unit="s", latency=took)]

    async def publish(self) -> list[CheckResult]:
        """A message that JetStream must store, as a candle is: the connection alone says nothing of the disk."""
        self._here()
        began = time.monotonic()
        try:
            await self.bus.js.publish(
                PROBE, datetime.now(UTC).isoformat().encode(), timeout=self.bus.settings.ping_interval / 2
            )
        except (NatsError, APIError, TimeoutError) as error:
            way = "look at the disk of its store; after a full disk nats-server has to be started again"
            return [result("nats.publish", "critical", f"JetStream does not store ({words(error)}): {way}.")]
        took = time.monotonic() - began
        verdict: Verdict = "ok" if took <= SLOW_SECONDS else "warning"
        said = f"JetStream stored a message in {1_000 * took:.1f} ms."
        return [result("nats.publish", verdict, said, value=round(took, 6), unit="s", latency=took)]

    async def store(self) -> list[CheckResult]:
        self._here()
        answer = json.loads(
            (await self.bus.nc.request("$JS.API.INFO", b"", timeout=self.bus.settings.publish_timeout)).data
        )
        if "error" in answer:
            return [
                result(
                    "nats.store",
                    "warning",
                    f"JetStream does not tell what it stores: {answer['error']['description']}.",
                )
            ]
        used, most = int(answer["storage"]), int(answer["limits"]["max_storage"])
        said = f"JetStream stores {human(used)} in {answer['streams']} streams"
        if most <= 0:
            return [result("nats.store", "ok", f"{said}.", value=float(used), unit="bytes")]
        share = used / most
        verdict: Verdict = "critical" if share >= FULL_CRITICAL else "warning" if share >= FULL_WARNING else "ok"
        said = f"{said}, {share:.0%} of {human(most)}"
        way = "" if verdict == "ok" else ": raise max_file_store in nats.conf, or lower [streams]"
        return [result("nats.store", verdict, f"{said}{way}.", value=float(used), unit="bytes")]

    async def streams(self) -> list[CheckResult]:
        self._here()
        found: dict[str, StreamInfo] = {}
        for page in range(MOST_PAGES):
            some = await self.bus.js.streams_info(offset=PAGE * page)
            found |= {str(info.config.name): info for info in some}
            if len(some) < PAGE:
                break
        return [_stream(want, found.get(str(want.name))) for want in wanted(self.settings.streams)]

    # --- actors ------------------------------------------------------------------------------------------------------

    async def asked(self) -> list[CheckResult]:
        self._here()
        wait = min(ANSWERS_WITHIN, self.settings.health.timeout_seconds / 2)
        asking = asyncio.create_task(statuses(self.bus, self.actors, own=self.own, wait=wait))
        # nats-py may wait for ever in a connection that has just broken: then it is NATS that is told of.
        done, _ = await asyncio.wait({asking}, timeout=wait + 1.0)
        if not done or not self.bus.connected:
            asking.cancel()
            raise ConnectionError("NATS broke off while the actors were asked")
        found: Mapping[str, Sequence[Status]] = asking.result()
        out = []
        for actor in self.actors:
            health, sentence = judge(actor, found[actor])
            verdict: Verdict = "ok" if health == "ok" else _severity(found[actor])
            restarts = max((status.restarts for status in found[actor]), default=0)
            out.append(result(f"actor.{actor}", verdict, sentence, value=float(restarts), unit="restarts"))
            behind = [
                status.behind for status in found[actor] if status.state == "working" and status.behind is not None
            ]
            if behind:
                out.append(self._lag(actor, max(behind)))
        return out

    def _lag(self, actor: str, behind: int) -> CheckResult:
        most = self.settings.health.lag_messages
        said = f"{actor} is {behind:,} messages behind"
        if behind <= most:
            return result(f"nats.lag.{actor}", "ok", f"{said}.", value=float(behind), unit="messages")
        way = f"{most:,} are allowed: it catches up after a large replay, else see its log"
        return result(f"nats.lag.{actor}", "warning", f"{said}, and {way}.", value=float(behind), unit="messages")


def words_of(bus: Bus) -> str:
    return words(bus.nc.last_error) if bus.nc.last_error is not None else "no answer"


def _severity(found: Sequence[Status]) -> Verdict:
    """One that does not work at all is critical; one that comes back by itself, or works less well, is a warning."""
    others = [status for status in found if status.state != "standby"]
    if not others:
        return "critical"
    one = min(others, key=lambda status: status.state != "working")
    looping = one.restarts >= LOOPING and (one.state != "working" or one.seconds < STEADY)
    return "critical" if looping else "warning"


def _stream(want: StreamConfig, have: StreamInfo | None) -> CheckResult:
    """What a stream holds; only where it refuses what is new is a full one an evil."""
    name = f"nats.stream.{want.name}"
    if have is None:
        return result(name, "critical", f"The stream {want.name} is missing: run `mt5 topology apply`.")
    state = have.state
    said = f"{want.name} holds {state.messages:,} messages, {human(state.bytes)}"
    most = have.config.max_bytes or -1
    if most <= 0:
        return result(name, "ok", f"{said}.", value=float(state.bytes), unit="bytes")
    share = state.bytes / most
    said = f"{said} ({share:.0%} of what it may)"
    verdict: Verdict = "ok"
    if have.config.discard == DiscardPolicy.NEW and want.name != bucket_stream(OWNERS):
        verdict = "critical" if share >= FULL_CRITICAL else "warning" if share >= FULL_WARNING else "ok"
    way = (
        ""
        if verdict == "ok"
        else ": once it is full it refuses; raise its bytes in [streams] and run `mt5 topology apply`"
    )
    return result(name, verdict, f"{said}{way}.", value=float(state.bytes), unit="bytes")
