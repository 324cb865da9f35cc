"""Each actor's NATS user may say and hear its own subjects only, on the servers of a running system."""

from __future__ import annotations

import asyncio

import nats
import pytest
from nats.aio.client import Client

from bus.permissions import OPERATOR
from tests.system import System

pytestmark = pytest.mark.timeout(120)

ACTORS = ("collector", "features", "emitter", "recorder", "trainer")

# What each may publish; nobody else may.
OWNERS = {
    "candles.M1.EURUSD": {"collector"},
    "forming.M1.EURUSD": {"collector"},
    "rejects.candles": {"collector"},
    "features.M1.EURUSD": {"features"},
    "$KV.feature_state.M1.EURUSD": {"features"},
    "signals.M1.EURUSD": {"emitter"},
    "models.rf_m1": {"emitter", "trainer"},
    "$O.models.M.x": {"trainer"},
    "$O.models.C.x": {"trainer"},
    **{f"rejects.{actor}": {actor} for actor in ACTORS if actor != "collector"},
    "trainer.train": set(),
    "$KV.clock.x": set(),
    "alerts.high.x": set(),
    "$JS.API.STREAM.CREATE.MINE": set(),
    "$JS.API.STREAM.UPDATE.CANDLES": set(),
    "$JS.API.STREAM.DELETE.CANDLES": set(),
    "$JS.API.STREAM.PURGE.CANDLES": set(),
    "$JS.API.STREAM.MSG.DELETE.SIGNALS": set(),
    "$JS.API.STREAM.SNAPSHOT.CANDLES": set(),
    "$JS.API.CONSUMER.CREATE.REJECTS.x": set(),
    "$SYS.REQ.SERVER.PING": set(),
}
READERS = {
    "CANDLES": {"collector", "features"},
    "FEATURES": {"features", "emitter", "recorder"},
    "SIGNALS": {"collector", "emitter", "recorder"},
    "EVENTS": {"emitter", "trainer"},
}


class User:
    """A connection as one actor's user, with what the server refuses it."""

    def __init__(self, client: Client, refusals: list[str]) -> None:
        self.client = client
        self._refusals = refusals

    async def refused(self) -> list[str]:
        """The subjects refused since the last call: the server has read all that was sent once it answers a ping."""
        await self.client.flush()
        found, self._refusals[:] = list(self._refusals), []
        return found


async def connect(system: System, actor: str) -> User:
    refusals: list[str] = []

    async def note(error: Exception) -> None:
        refusals.append(str(error).lower())

    # The name tells these refusals in the server's log from those of the actors themselves.
    client = await nats.connect(
        system.ready["nats"].rpartition("@")[2],
        user=actor,
        password=system.passwords()[actor],
        name="test-of-privilege",
        inbox_prefix=f"_INBOX_{actor}",
        error_cb=note,
        allow_reconnect=False,
    )
    return User(client, refusals)


@pytest.mark.parametrize("actor", ACTORS)
async def test_an_actor_publishes_its_own_subjects_only(system: System, actor: str) -> None:
    user = await connect(system, actor)
    try:
        for subject, owners in OWNERS.items():
            await user.client.publish(subject, b"{}", headers={"Nats-Expected-Stream": "NONE"})
            refused = await user.refused()
            assert bool(refused) == (actor not in owners), f"{actor} and {subject}: {refused}"
            assert all(f'"{subject.lower()}"' in text for text in refused)
        for stream, readers in READERS.items():
            await user.client.publish(f"$JS.API.STREAM.INFO.{stream}", b"")
            assert bool(await user.refused()) == (actor not in readers), f"{actor} and the stream {stream}"
    finally:
        await user.client.close()


@pytest.mark.parametrize("actor", ACTORS)
async def test_an_actor_hears_its_own_inbox_and_requests_only(system: System, actor: str) -> None:
    user = await connect(system, actor)
    others = [name for name in (*ACTORS, OPERATOR) if name != actor]
    forbidden = [">", "candles.>", "features.>", "signals.>", "models.>", "rejects.>", "$JS.>", "$KV.>", "_INBOX.>"]
    forbidden += [f"_INBOX_{name}.>" for name in others]
    allowed = [f"_INBOX_{actor}.x", f"$SRV.PING.{actor}"]
    requests = ["trainer.train", "models.promote", "models.rollback"]
    (allowed if actor == "trainer" else forbidden).extend(requests)
    try:
        for subject in [*forbidden, *allowed]:
            subscription = await user.client.subscribe(subject)
            refused = await user.refused()
            assert bool(refused) == (subject in forbidden), f"{actor} and {subject}: {refused}"
            if subject in allowed:
                await subscription.unsubscribe()
    finally:
        await user.client.close()


async def test_strangers_and_old_passwords_are_refused(system: System) -> None:
    server = system.ready["nats"].rpartition("@")[2]
    for credentials in ({}, {"user": "features", "password": "guess"}, {"user": "nobody", "password": "x"}):
        with pytest.raises(nats.errors.Error, match="(?i)authorization"):
            async with asyncio.timeout(5):
                await nats.connect(
                    server, allow_reconnect=False, error_cb=_quiet, max_reconnect_attempts=0, **credentials
                )


async def _quiet(error: Exception) -> None:
    """The exception that connect raises says it all."""
