"""Late, revised and withdrawn bars through the real actors and into the archive."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import msgspec
import pytest

from actors.core.series import SeriesState, append
from actors.emitter import Emitter
from actors.features import Features
from actors.recorder import Recorder
from bus.client import Bus
from bus.subjects import FEATURE_STATE, FEATURES, SIGNALS
from schema.messages import Candle
from schema.settings import Features as FeatureSettings
from schema.settings import Recorder as RecorderSettings
from schema.settings import Settings
from tests.builders import LIVE, put, read_until, running, walk
from tests.models import files, release

SETTINGS = Settings(
    features=FeatureSettings(snapshot_seconds=0.05, quiet_seconds=0.3), recorder=RecorderSettings(linger=0.01)
)
COLUMNS = "ts, close, volume, spread, rsi, macd, macd_signal, macd_hist, atr, ma60, ret_1, fwd_ret_5, ready, bar"


@pytest.fixture
async def archive(pg_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(pg_url)
    yield connection
    await connection.close()


async def until(archive: asyncpg.Connection, sql: str, expected: Any, seconds: float = 20.0) -> None:
    """Asks until the answer is as expected: each question is a round trip, so this waits for the archive itself."""
    deadline = time.monotonic() + seconds
    while (found := await archive.fetchval(sql)) != expected:
        assert time.monotonic() < deadline, f"{sql}: {found} instead of {expected}"


async def contents(archive: asyncpg.Connection) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in await archive.fetch(f"SELECT {COLUMNS} FROM features ORDER BY ts")]


def undisturbed(rows: list[Candle]) -> list[tuple[Any, ...]]:
    names = COLUMNS.split(", ")
    return [tuple(getattr(r, n) for n in names) for r in append(SeriesState("EURUSD", "M1"), rows, LIVE).rows]


async def test_a_correction_500_bars_back_is_in_features_and_signals_within_a_second(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection
) -> None:
    rows = walk(2_600)
    wrong = [msgspec.structs.replace(rows[2_099], close=rows[2_099].high)]
    async with running(Features, Emitter, Recorder, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        version = await release(bus, files())
        await put(bus, rows[:2_000], history=True)
        await put(bus, [*rows[2_000:2_099], *wrong, *rows[2_100:]], size=200)
        await until(archive, "SELECT count(*) FROM model_signals", 600)
        before = (await bus.js.stream_info("SIGNALS")).state.messages
        started = time.perf_counter()
        await put(bus, [rows[2_099]], size=1)
        found = await read_until(bus, SIGNALS, lambda s: len(s) == before + 501)
        took = time.perf_counter() - started
        await until(archive, "SELECT count(*) FROM model_signals WHERE superseded_at IS NOT NULL", 501)
        assert await contents(archive) == undisturbed(rows)
        live = await archive.fetch("SELECT ts, id FROM model_signals WHERE superseded_at IS NULL ORDER BY ts")
        kept = await archive.fetchrow("SELECT close, revision FROM candle_revisions")
        revision = await archive.fetchval("SELECT revision FROM market_data WHERE ts = $1", rows[2_099].ts)
    assert [r["ts"] for r in live] == [r.ts for r in rows[2_000:]]
    new = found[before:]
    old = {s.ts: s.id for s in found[:before]}
    assert [s.supersedes for s in new] == [old[s.ts] for s in new]
    assert {s.model_version for s in new} == {version}
    assert (tuple(kept), revision) == ((rows[2_099].high, 0), 1)
    assert took < 1.0


async def test_history_that_comes_backwards_is_taken_in_once_after_a_quiet_while(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection
) -> None:
    rows = walk(1_500)
    async with running(Features, Recorder, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        await put(bus, rows[1_400:], size=1)
        for at in range(1_200, -1, -200):
            await put(bus, rows[at : at + 200], history=True)
        await put(bus, walk(1_501)[1_500:], size=1)
        await until(archive, "SELECT count(*) FROM market_data", 1_501)
        await until(archive, "SELECT max(bar) FROM features", 1_501)
        assert await contents(archive) == undisturbed(walk(1_501))
    blocks = await read_until(bus, FEATURES, lambda b: bool(b) and sum(len(x.rows) for x in b) >= 101 + 1_501)
    assert [b.candles_seq for b in blocks] == sorted(b.candles_seq for b in blocks)


async def test_deferred_history_survives_a_restart(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection
) -> None:
    rows = walk(400)
    patient = msgspec.structs.replace(SETTINGS, features=FeatureSettings(snapshot_seconds=0.05, quiet_seconds=60.0))
    async with running(Features, nats_url=nats_url, database_url=pg_url, settings=patient):
        last = await put(bus, rows[300:], size=50)
        await read_until(bus, FEATURES, lambda b: bool(b) and b[-1].candles_seq == last)
        await put(bus, rows[:300], history=True)
    async with running(Features, Recorder, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        await until(archive, "SELECT count(*) FROM market_data", 400)
        await until(archive, "SELECT min(bar) FROM features WHERE ts >= '2025-01-02T05:00:00Z'", 301)
        assert await contents(archive) == undisturbed(rows)


async def test_a_withdrawn_bar_leaves_archive_and_live_signals(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection
) -> None:
    rows = walk(400)
    async with running(Features, Emitter, Recorder, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        await release(bus, files())
        await put(bus, rows, size=100)
        await until(archive, "SELECT count(*) FROM model_signals", 400)
        await put(bus, [rows[351]], withdrawn=(rows[350].ts,))
        await until(archive, "SELECT count(*) FROM market_data", 399)
        await until(archive, "SELECT count(*) FROM model_signals WHERE superseded_at IS NULL", 399)
        assert await contents(archive) == undisturbed([*rows[:350], *rows[351:]])
        assert await archive.fetchval("SELECT revision FROM candle_withdrawals") == 1


async def test_a_window_begins_at_a_checkpoint_also_after_the_log_has_aged(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection
) -> None:
    rows = walk(3_500)
    missing = [row for row in rows if row not in (rows[700], rows[2_500])]
    async with running(Features, Recorder, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        last = await put(bus, missing, size=100)
        await until(archive, "SELECT count(*) FROM market_data", 3_498)
        kv = await bus.js.key_value(FEATURE_STATE)
        assert sorted(await kv.keys()) >= ["M1.EURUSD", "M1.EURUSD.1", "M1.EURUSD.2", "M1.EURUSD.3"]
        await put(bus, [rows[2_500]], size=1)
        await until(archive, "SELECT count(*) FROM market_data", 3_499)
    await bus.js.purge_stream("CANDLES", seq=last - 3)
    async with running(Features, Recorder, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        await put(bus, [rows[700]], size=1)
        await until(archive, "SELECT count(*) FROM market_data", 3_500)
        await until(archive, "SELECT max(bar) FROM features", 3_500)
        assert await contents(archive) == undisturbed(rows)
