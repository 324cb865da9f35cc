"""Each actor's NATS user may say and hear its own subjects only, on the servers of a running system."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping

import pytest

from bus.permissions import OPERATOR
from tests.system import System

pytestmark = pytest.mark.timeout(120)

ACTORS = ("collector", "features", "emitter", "recorder", "trainer", "scorer", "health", "backup")
OWNED = ("features", "emitter", "recorder", "scorer", "health", "backup")

# What each may publish; nobody else may.
OWNERS = {
    "candles.M1.EURUSD": {"collector"},
    "forming.M1.EURUSD": {"collector"},
    "rejects.candles": {"collector"},
    "features.M1.EURUSD": {"features"},
    "$KV.feature_state.M1.EURUSD": {"features"},
    "signals.M1.EURUSD": {"emitter"},
    "models.rf_m1": {"emitter", "trainer"},
    "fence.SIGNALS": {"emitter"},
    "fence.EVENTS": {"emitter"},
    "$O.models.M.x": {"trainer"},
    "$O.models.C.x": {"trainer"},
    **{f"rejects.{actor}": {actor} for actor in ACTORS if actor != "collector"},
    "outcomes.M1.EURUSD": {"scorer"},
    "trainer.train": set(),
    "models.decide": {"scorer"},
    "models.retire": set(),
    "scorer.scorecard": {"collector"},
    "emitter.again": set(),
    "$KV.owners.features.0": set(),
    **{f"$JS.API.CONSUMER.MSG.NEXT.KV_owners.{a}-0": {a} for a in OWNED},
    **{f"$JS.API.CONSUMER.UNPIN.KV_owners.{a}-0": {a} for a in OWNED},
    **{f"$JS.ACK.KV_owners.{a}-0.x": {a} for a in OWNED},
    "$KV.clock.x": {"collector"},
    "alerts.warning.clock": {"collector", "scorer", "health"},
    "backups.made": {"backup"},
    "probe.write": {"health"},
    "health.check": set(),
    "health.test": set(),
    "backup.run": set(),
    "$JS.API.DIRECT.GET.CANDLES.candles.M1.EURUSD": {"collector", "features", "scorer", "health"},
    "$JS.API.STREAM.CREATE.MINE": set(),
    "$JS.API.STREAM.UPDATE.CANDLES": set(),
    "$JS.API.STREAM.DELETE.CANDLES": set(),
    "$JS.API.STREAM.PURGE.CANDLES": set(),
    "$JS.API.STREAM.MSG.DELETE.SIGNALS": set(),
    "$JS.API.STREAM.SNAPSHOT.CANDLES": {"backup"},
    "$JS.API.CONSUMER.CREATE.REJECTS.x": set(),
    "$SYS.REQ.SERVER.PING": set(),
}
READERS = {
    "CANDLES": {"collector", "features", "scorer"},
    "FEATURES": {"features", "emitter", "recorder", "scorer"},
    "SIGNALS": {"collector", "emitter", "recorder", "scorer"},
    "EVENTS": {"emitter", "trainer", "scorer", "health", "backup"},
}
# May ask how far it reaches, and read nothing of it; the monitor and the backup agent ask it of every stream.
LOOKERS = {stream: {"health", "backup"} for stream in READERS} | {
    "CANDLES": {"recorder", "emitter", "health", "backup"}
}


class Wire:
    """NATS' own protocol as one user: what the server refuses is known when it answers the ping that follows."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def refused(self, command: bytes) -> list[str]:
        """The server's refusals of a command."""
        self._writer.write(command + b"PING\r\n")
        found = []
        async with asyncio.timeout(10):
            while (line := await self._reader.readline()) != b"PONG\r\n":
                if not line:  # it hangs up on whom it does not know
                    break
                if line.startswith(b"-ERR"):
                    found.append(line.decode())
        return found

    async def publish(self, subject: str) -> list[str]:
        # The header keeps what is allowed from being stored: no stream has that name.
        header = b"NATS/1.0\r\nNats-Expected-Stream: NONE\r\n\r\n"
        return await self.refused(f"HPUB {subject} {len(header)} {len(header)}\r\n".encode() + header + b"\r\n")

    async def subscribe(self, subject: str) -> list[str]:
        return await self.refused(f"SUB {subject} 1\r\nUNSUB 1\r\n".encode())


@contextlib.asynccontextmanager
async def talking(system: System, who: Mapping[str, str]) -> AsyncIterator[tuple[Wire, list[str]]]:
    """A connection with these credentials, and what the server said against them."""
    host, _, port = system.ready["nats"].rpartition("@")[2].partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        await reader.readline()
        wire = Wire(reader, writer)
        options = {**who, "verbose": False, "pedantic": False, "headers": True}
        yield wire, await wire.refused(f"CONNECT {json.dumps(options)}\r\n".encode())
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def connected(system: System, actor: str) -> AsyncIterator[Wire]:
    async with talking(system, {"user": actor, "pass": system.passwords()[actor]}) as (wire, refused):
        assert not refused
        yield wire


@pytest.mark.parametrize("actor", ACTORS)
async def test_an_actor_publishes_its_own_subjects_only(system: System, actor: str) -> None:
    async with connected(system, actor) as wire:
        for subject, owners in OWNERS.items():
            refused = await wire.publish(subject)
            assert bool(refused) == (actor not in owners), f"{actor} and {subject}: {refused}"
        for stream, readers in READERS.items():
            refused = await wire.publish(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.x")
            assert bool(refused) == (actor not in readers), f"{actor} and the stream {stream}: {refused}"
            refused = await wire.publish(f"$JS.API.STREAM.INFO.{stream}")
            assert bool(refused) == (actor not in readers | LOOKERS.get(stream, set())), f"{actor}, {stream}: {refused}"


@pytest.mark.parametrize("actor", ACTORS)
async def test_an_actor_hears_its_own_inbox_and_requests_only(system: System, actor: str) -> None:
    others = [name for name in (*ACTORS, OPERATOR) if name != actor]
    forbidden = [">", "candles.>", "features.>", "signals.>", "models.>", "rejects.>", "$JS.>", "$KV.>", "_INBOX.>"]
    forbidden += [f"_INBOX_{name}.>" for name in others]
    allowed = [f"_INBOX_{actor}.x", f"$SRV.PING.{actor}"]
    requests = ["trainer.train", "models.promote", "models.rollback", "models.retire", "models.decide"]
    (allowed if actor == "trainer" else forbidden).extend(requests)
    (allowed if actor == "emitter" else forbidden).append("emitter.again")
    (allowed if actor == "scorer" else forbidden).append("scorer.scorecard")
    (allowed if actor == "health" else forbidden).extend(["health.check", "health.test", "health.report"])
    (allowed if actor == "backup" else forbidden).append("backup.run")
    async with connected(system, actor) as wire:
        for subject in [*forbidden, *allowed]:
            refused = await wire.subscribe(subject)
            assert bool(refused) == (subject in forbidden), f"{actor} and {subject}: {refused}"


async def test_strangers_and_old_passwords_are_refused(system: System) -> None:
    for who in ({}, {"user": "features", "pass": "guess"}, {"user": "nobody", "pass": "x"}):
        async with talking(system, who) as (_, refused):
            assert any("Authorization Violation" in text for text in refused), who
