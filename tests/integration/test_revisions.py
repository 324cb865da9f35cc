"""Late, revised and withdrawn bars through the real actors and into the archive."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec
import pytest

from actors.core.series import SeriesState, append
from actors.emitter import Emitter
from actors.features import Features
from actors.recorder import Recorder
from bus.client import Bus
from bus.subjects import FEATURE_STATE, FEATURES, MODELS, SIGNALS
from schema.messages import Candle
from schema.settings import Features as FeatureSettings
from schema.settings import Recorder as RecorderSettings
from schema.settings import Settings
from tests.builders import LIVE, TRUSTING, kept, put, read_until, running, walk
from tests.models import changed, files, release

SETTINGS = Settings(
    features=FeatureSettings(snapshot_seconds=0.05, quiet_seconds=0.3),
    recorder=RecorderSettings(linger=0.01),
    models=TRUSTING.models,
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
        before = len(await kept(bus, SIGNALS))
        started = time.perf_counter()
        await put(bus, [rows[2_099]], size=1)
        found = await read_until(bus, SIGNALS, lambda s: len(s) == before + 501)
        took = time.perf_counter() - started
        await until(archive, "SELECT count(*) FROM model_signals WHERE superseded_at IS NOT NULL", 501)
        assert await contents(archive) == undisturbed(rows)
        live = await archive.fetch("SELECT ts, id FROM model_signals WHERE superseded_at IS NULL ORDER BY ts")
        old_bar = await archive.fetchrow("SELECT close, revision FROM candle_revisions")
        revision = await archive.fetchval("SELECT revision FROM market_data WHERE ts = $1", rows[2_099].ts)
    assert [r["ts"] for r in live] == [r.ts for r in rows[2_000:]]
    new = found[before:]
    old = {s.ts: s.id for s in found[:before]}
    assert [s.supersedes for s in new] == [old[s.ts] for s in new]
    assert {s.model_version for s in new} == {version}
    assert (tuple(old_bar), revision) == ((rows[2_099].high, 0), 1)
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


LATER = datetime(2030, 1, 1, tzinfo=UTC)


def other(row: Candle, by: float = 1e-4) -> Candle:
    return msgspec.structs.replace(row, high=row.high + by)


async def age(bus: Bus, archive: asyncpg.Connection, bars: int) -> None:
    """What time does to the log: all of it is in the archive, and purged, while the actors run on."""
    await until(archive, "SELECT count(*) FROM features", bars)
    await bus.js.purge_stream("CANDLES")


@pytest.mark.parametrize("checkpoint", [False, True], ids=["whole", "checkpoint"])
async def test_a_correction_reads_the_archive_once_the_log_has_aged_under_a_running_actor(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection, checkpoint: bool
) -> None:
    rows = walk(1_500 if checkpoint else 900)
    at = 1_200 if checkpoint else 300
    sent = [*rows[:at], other(rows[at]), *rows[at + 1 :]]
    sent[at + 50] = msgspec.structs.replace(rows[at + 50], close=rows[at + 50].high)
    late = rows[at - 100]
    async with running(Features, Recorder, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        await put(bus, [row for row in sent if row is not late], size=100)
        await age(bus, archive, len(rows) - 1)
        await put(bus, [rows[at + 50]])
        await until(archive, "SELECT count(*) FROM candle_revisions", 1)
        await age(bus, archive, len(rows) - 1)
        await put(bus, walk(len(rows) + 40)[len(rows) :], size=1)
        await put(bus, [rows[at]])
        await put(bus, [late])
        await until(archive, "SELECT count(*) FROM features", len(rows) + 40)
        assert await contents(archive) == undisturbed(walk(len(rows) + 40))
        assert await archive.fetchval("SELECT count(*) FROM candle_revisions") == 2


async def test_a_purge_between_two_corrections_loses_nothing_that_was_deferred(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection
) -> None:
    """Bars that waited are published later than the log has them: the archive knows both places."""
    rows = walk(300)
    async with running(Features, Recorder, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        await put(bus, rows[200:250])
        await until(archive, "SELECT count(*) FROM features", 50)
        await put(bus, rows[:200], history=True)
        last = await put(bus, rows[250:299], size=1)
        await until(archive, "SELECT count(*) FROM features", 299)
        await bus.js.purge_stream("CANDLES", seq=last - 10)
    async with running(Features, Recorder, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        await put(bus, [other(rows[100]), rows[299]], size=1)
        await until(archive, "SELECT count(*) FROM candle_revisions", 1)
        await until(archive, "SELECT count(*) FROM features", 300)
        assert await contents(archive) == undisturbed([*rows[:100], other(rows[100]), *rows[101:]])


async def test_what_a_bar_was_and_whose_it_is_outlive_the_log(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection
) -> None:
    rows = walk(200)
    live: dict[str, Any] = {"replay": False}
    async with running(Features, Recorder, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        await put(bus, rows[:100], source="a", server_time=1_000, **live)
        await put(bus, [other(rows[10])], source="a", **live)
        await put(bus, [other(rows[20])], source="a", server_time=2_000, **live)
        await put(bus, [rows[99]], source="a", withdrawn=(rows[30].ts,), **live)
        await until(archive, "SELECT count(*) FROM candle_revisions", 3)
        await age(bus, archive, 99)
    async with running(Features, Recorder, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        await put(bus, [rows[100]], source="b", **live)
        await put(bus, [rows[10]], source="a", **live)  # what it was before
        await put(bus, [other(rows[20], 2e-4)], source="a", server_time=1_500, **live)  # older than what it is
        await put(bus, [other(rows[40])], source="b", **live)  # not the owner's
        await put(bus, [rows[30]], source="a", **live)  # comes back
        await put(bus, [other(rows[50])], source="a", **live)
        await until(archive, "SELECT count(*) FROM features", 101)
        await until(archive, "SELECT count(*) FROM candle_revisions", 4)
        now = list(rows[:101])
        for at in (10, 20, 50):
            now[at] = other(now[at])
        assert await contents(archive) == undisturbed(now)
        revisions = await archive.fetch("SELECT ts, revision FROM market_data WHERE revision > 0 ORDER BY ts")
        assert [tuple(r) for r in revisions] == [
            (rows[10].ts, 1),
            (rows[20].ts, 1),
            (rows[30].ts, 2),
            (rows[50].ts, 1),
        ]


async def test_bars_that_wait_do_not_overtake_what_came_after_them(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection
) -> None:
    rows = walk(120)
    async with running(Features, Recorder, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        await put(bus, rows[100:110])
        await put(bus, [*rows[90:95], other(rows[95]), *rows[96:100]], history=True)
        await put(bus, rows[90:111])
        await put(bus, rows[80:90], history=True)  # waits, and so must have what waited before
        await until(archive, "SELECT count(*) FROM features", 31)
        assert await contents(archive) == undisturbed(rows[80:111])
        assert await archive.fetchval("SELECT revision FROM market_data WHERE ts = $1", rows[95].ts) == 1


async def test_a_correction_keeps_the_verdict_on_its_bars_age(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection
) -> None:
    """What is computed again hours later is no staler than when it first came; a late bar is."""
    rows = walk(340)
    artifacts = changed(files(), threshold=0.5, max_spread={})
    standing = "SELECT count(*) FROM model_signals WHERE superseded_at IS NULL AND abstain IS "
    async with running(Features, Emitter, Recorder, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        await release(bus, artifacts, "champion")
        await until_served(bus)
        await put(bus, rows[:310], history=True)
        for row in [*rows[310:315], *rows[316:]]:
            await put(bus, [row], replay=False, received_at=row.ts + timedelta(seconds=61))
        await until(archive, standing + "NULL", 29)
        await put(bus, [other(rows[320])], replay=False, received_at=LATER)
        await put(bus, [msgspec.structs.replace(rows[330], close=rows[330].high)], replay=False, received_at=LATER)
        await until(archive, "SELECT count(*) FROM model_signals WHERE superseded_at IS NOT NULL", 30)
        assert await archive.fetchval(standing + "NULL") == 29
        await age(bus, archive, 339)
        await put(bus, [msgspec.structs.replace(rows[312], close=rows[312].high)], replay=False, received_at=LATER)
        await until(archive, "SELECT count(*) FROM model_signals WHERE superseded_at IS NOT NULL", 57)
        assert await archive.fetchval(standing + "NULL") == 29
        await put(bus, [rows[315]], replay=False, received_at=LATER)
        await until(archive, standing + "NOT NULL", 1)
        await until(archive, standing + "NULL", 29)
        stale = await archive.fetchrow("SELECT ts, label FROM model_signals WHERE abstain = 'stale_feed'")
        assert tuple(stale) == (rows[315].ts, 0)


async def until_served(bus: Bus) -> None:
    await read_until(bus, MODELS, lambda events: any(event.event == "activated" for event in events))


async def test_a_guessed_time_is_told_by_name(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection
) -> None:
    rows = walk(30)
    async with running(Features, Recorder, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        await put(bus, rows[:20], history=True, ts_source="assumed")
        await put(bus, rows[20:], ts_source="inferred")
        await until(archive, "SELECT count(*) FROM features_m1 WHERE NOT clock_assumed", 10)
        assert await archive.fetchval("SELECT count(*) FROM features_m1 WHERE clock_assumed") == 20
