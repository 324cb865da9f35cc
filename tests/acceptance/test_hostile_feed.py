"""The archive after the worst feed equals the archive after a clean one, bit by bit, on real actors and servers."""

from __future__ import annotations

import asyncio
import functools
import itertools
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

import aiohttp
import asyncpg
import msgspec
import pytest

from actors.collector import Collector
from actors.emitter import Emitter
from actors.features import Features
from actors.recorder import Recorder
from bus import topology
from bus.client import Bus
from bus.subjects import MODELS
from deploy.embedded import PostgresServer
from deploy.server import free_port
from schema.messages import IngestAnswer
from schema.settings import Gateway, Settings
from schema.settings import Recorder as RecorderSettings
from tests import hostile, models
from tests.archive import QUERIES, Archive, Table, bits, pass_through, read_archive
from tests.builders import PUBLIC_KEY_FILE, read_until, running
from tests.hostile import KINDS, Feed, Kind, Post
from tests.servers import OPERATOR, cloned_database, nats_server

SEEDS_A_RUN: Final = 50  # so many share the start of three systems
CI_SEEDS: Final = 200
RETRIES: Final = 10
TORTURE_SEEDS: Final = 2_000
PATIENCE: Final = 60.0  # seconds that the archive may take to become what was sent
QUIET: Final = 0.5  # seconds that bars before a series' first wait for more of them: ten in service


# A run takes some fifteen seconds of an idle core; the neighbours of a busy machine stretch that.
pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class Stage:
    """Where runs happen: PostgreSQL, a migrated template, and a folder for nats-servers."""

    postgres: str
    template: str
    folder: Path

    async def archive(self, feeds: Sequence[Feed], which: Literal["clean", "hostile"], senders: int = 1) -> Archive:
        """What a system of its own holds after these feeds, once it has nothing left to do."""
        port = free_port()
        settings = _settings(feeds, port)
        folder = Path(tempfile.mkdtemp(prefix="hostile-", dir=self.folder))
        artifacts = _model(
            _symbols(feeds)
        )  # before anything runs: a training would hold the actors' loop up for seconds
        with nats_server(folder) as server:
            url = server.url(OPERATOR)
            async with cloned_database(self.postgres, self.template) as database:
                bus = await Bus.connect(url, name="operator")
                try:
                    await topology.apply(bus, settings.streams)
                    async with running(
                        Collector, Features, Emitter, Recorder, nats_url=url, database_url=database, settings=settings
                    ):
                        await models.release(bus, artifacts, "champion")
                        await read_until(bus, MODELS, lambda events: any(e.event == "activated" for e in events))
                        gateway = f"http://127.0.0.1:{port}/ingest"
                        await _send(gateway, hostile.merged(feeds, which), senders)
                        return await _settled(gateway, database, feeds)
                finally:
                    await bus.close()


@pytest.fixture
def stage(postgres: PostgresServer, pg_template: str, server_folder: Path) -> Stage:
    return Stage(postgres.url, pg_template, server_folder)


def _settings(feeds: Sequence[Feed], port: int) -> Settings:
    symbols = {name: symbol for feed in feeds for name, symbol in feed.symbols.items()}
    clocks = {name: {"rule": rule} for feed in feeds for name, rule in feed.clocks.items()}
    tree: dict[str, Any] = {
        "gateway": msgspec.to_builtins(Gateway(port=port)),
        "recorder": msgspec.to_builtins(RecorderSettings(linger=0.2)),
        "features": {"quiet_seconds": QUIET},
        "models": {"public_key": str(PUBLIC_KEY_FILE)},
        "symbols": msgspec.to_builtins(symbols),
        "clock": clocks,
    }
    return msgspec.convert(tree, Settings)


def _symbols(feeds: Sequence[Feed]) -> tuple[str, ...]:
    return tuple(sorted({one.symbol for feed in feeds for one in feed.series if one.timeframe == "M1"}))


def _model(symbols: tuple[str, ...]) -> dict[str, bytes]:
    """A version that serves these symbols and says up and down, so that labels are worth comparing."""
    return models.changed(_trained(), symbols=symbols, threshold=0.5, max_spread=dict.fromkeys(symbols, 20.0))


@functools.cache
def _trained() -> dict[str, bytes]:
    return models.files(1)


async def _send(url: str, posts: Sequence[Post], senders: int) -> None:
    """Posts everything; each sender takes the next payload and waits for what must have been answered before."""
    answered = [asyncio.Event() for _ in posts]
    todo = iter(range(len(posts)))

    async with aiohttp.ClientSession() as http, asyncio.TaskGroup() as group:

        async def sender() -> None:
            for at in todo:
                post = posts[at]
                for other in post.after:
                    await answered[other].wait()
                status, answer = await _post(http, url, post)
                said = msgspec.json.decode(answer, type=IngestAnswer) if status == 200 else None
                assert said is not None, f"{status} {answer!r} to {post.note}"
                assert not said.rejected, f"{answer!r} to {post.note}"
                answered[at].set()

        for _ in range(senders):
            group.create_task(sender())


async def _post(http: aiohttp.ClientSession, url: str, post: Post) -> tuple[int, bytes]:
    """As a terminal posts: what a busy machine answered with 503 is sent again, byte by byte."""
    headers = {"Content-Type": "application/json", **post.headers}
    for _ in range(RETRIES):
        async with http.post(url, data=post.body, headers=headers) as response:
            answer = await response.read()
            if response.status != 503:
                break
        await asyncio.sleep(float(response.headers["Retry-After"]))
    return response.status, answer


async def _settled(url: str, database: str, feeds: Sequence[Feed]) -> Archive:
    """The archive once nothing is on its way any more.

    Only bars before a series' first are taken in later than sent: market_data may lack them until the patience ends.
    """
    truth = _truth(feeds)
    connection = await asyncpg.connect(database)
    try:
        await pass_through(url, connection, 0)
        deadline = time.monotonic() + PATIENCE
        for number in itertools.count(1):
            while not await connection.fetchval("SELECT count(*) >= $1 FROM market_data", len(truth) + number):
                if time.monotonic() > deadline:
                    break
                await asyncio.sleep(QUIET / 10)
            # The rows may have come between the signal and the question: one more pass brings what they made.
            await pass_through(url, connection, number)
            archive = await read_archive(connection)
            if archive["market_data"] == truth or time.monotonic() > deadline:
                return archive
            await asyncio.sleep(QUIET / 4)
        raise AssertionError("unreachable")
    finally:
        await connection.close()


def _truth(feeds: Sequence[Feed]) -> Table:
    """What market_data must hold, from the generator itself."""
    return {
        (*one.key, datetime.fromtimestamp(bar.ts, UTC)): [tuple(map(bits, (*bar.truth, 0.0)))]
        for feed in feeds
        for one in feed.series
        for bar in one.bars
    }


def _first_difference(feeds: Sequence[Feed], wanted: Table, found: Table) -> str | None:
    """The first bar in which two tables differ, with its seed; None where they are equal."""
    if wanted == found:
        return None
    key = min(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
    count = sum(wanted.get(k) != found.get(k) for k in wanted.keys() | found.keys())
    where = next(((f.seed, s) for f in feeds for s in f.series if s.key == key[:2]), None)
    if where is None:
        return f"{key} is no bar of any feed"
    seed, series = where
    seeds = sorted(
        {
            f.seed
            for f in feeds
            for s in f.series
            for k in wanted.keys() | found.keys()
            if k[:2] == s.key and wanted.get(k) != found.get(k)
        }
    )
    at = next((i for i, bar in enumerate(series.bars) if bar.ts == int(key[2].timestamp())), None)
    return (
        f"seed {seed} ({series.mode}; {', '.join(sorted(series.kinds))}): bar {at} of {len(series.bars)} "
        f"({series.history} history), {key}, and {count - 1} more rows (seeds {seeds}):\n"
        f"  wanted {wanted.get(key)}\n  found  {found.get(key)}"
    )


def _compare(feeds: Sequence[Feed], clean: Archive, hostile_: Archive, how: str) -> None:
    for table in QUERIES:
        difference = _first_difference(feeds, clean[table], hostile_[table])
        assert difference is None, f"{table} {how}: {difference}"


def _expected(feeds: Sequence[Feed], clean: Archive, found: Archive, senders: int) -> Archive:
    """The clean archive, but for signals of bars that came late by their payload's own now: these are stale.

    That is a bar's verdict for good, and its first payload's to give. Of several senders nobody knows whose came first:
    where some payload of a bar was in time and another late, either verdict is right.
    """
    moments: dict[tuple[str, str, datetime], set[int]] = {}
    told: set[tuple[str, str, datetime]] = set()
    for post in hostile.merged(feeds, "hostile"):
        if post.now is None:
            continue
        for shown in (post.perhaps, post.shows):
            for symbol, timeframe, ts in shown:
                key = (symbol, timeframe, datetime.fromtimestamp(ts, UTC))
                if senders > 1 or key not in told:
                    moments.setdefault(key, set()).add(post.now)
                if shown is post.shows:
                    told.add(key)
    signals = dict(clean["model_signals"])
    for key in told:
        expires = int(key[2].timestamp()) + 120 * hostile.MINUTES[key[1]]
        verdicts = {now > expires for now in moments[key]}
        ((prob, _, abstain, *names),) = signals[key]
        stale = [(prob, 0, "stale_feed", *names)]
        if abstain in ("warming", "no_model") or verdicts == {False}:
            continue
        if verdicts == {True} or found["model_signals"].get(key) == stale:
            signals[key] = stale
    return clean | {"model_signals": signals}


async def _hold(stage: Stage, seeds: range, kinds: Collection[Kind] = KINDS) -> None:
    feeds = [hostile.make(seed, kinds, int(time.time())) for seed in seeds]
    clean = await stage.archive(feeds, "clean")
    difference = _first_difference(feeds, _truth(feeds), clean["market_data"])
    assert difference is None, f"the clean feed is not stored as it is: {difference}"
    live = sum(len(one.bars) - one.history for feed in feeds for one in feed.series)
    assert sum(map(len, clean["model_signals"].values())) == live
    for senders in (1, 8):
        found = await stage.archive(feeds, "hostile", senders)
        _compare(feeds, _expected(feeds, clean, found, senders), found, f"with {senders} sender(s)")


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, CI_SEEDS, SEEDS_A_RUN))
async def test_the_archive_of_a_hostile_feed_equals_that_of_the_clean_one(stage: Stage, first: int) -> None:
    await _hold(stage, range(first, first + SEEDS_A_RUN))


@pytest.mark.torture
@pytest.mark.parametrize("first", range(CI_SEEDS, CI_SEEDS + TORTURE_SEEDS, SEEDS_A_RUN))
async def test_ten_times_as_many_seeds(stage: Stage, first: int) -> None:
    await _hold(stage, range(first, first + SEEDS_A_RUN))


@pytest.mark.torture
@pytest.mark.parametrize("kind", sorted(KINDS))
async def test_each_kind_of_hostility_alone(stage: Stage, kind: Kind) -> None:
    """Where the whole feed fails, this names the kind that is to blame."""
    needs: dict[Kind, set[Kind]] = {
        "taken_back": {"clock"},
        "dst": {"clock"},
        "fields": {"clock", "dst"},
        "nonstop": {"clock", "dst"},
        "long": {"clock"},
        "regret": {"sources"},
        "unranked": {"sources"},
    }
    kinds = {kind} | needs.get(kind, set())
    await _hold(stage, range(5), kinds)
