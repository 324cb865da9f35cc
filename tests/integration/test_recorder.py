"""The recorder between a real nats-server and a real PostgreSQL, and what happens when one of them goes away."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import structlog

from actors.recorder import Recorder
from bus.client import Bus
from bus.migrate import migrate
from bus.subjects import FEATURES, REJECTS, SIGNALS
from bus.supervise import ConfigurationError, Context, run_actors
from bus.topology import apply
from schema.messages import FeatureBlock, FeatureRow, Fill, Reject, Signal
from schema.settings import Recorder as RecorderSettings
from schema.settings import Settings, Streams
from tests.servers import postgres_server

T0 = datetime(2025, 2, 3, 9, 30, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
SETTINGS = Settings(recorder=RecorderSettings(batch_rows=50, linger=0.01))
TABLES = ("market_data", "candle_revisions", "features", "model_signals")


def row(bar: int, revision: int = 0) -> FeatureRow:
    price = 1.1 + bar / 1e5 + revision / 1e3
    return FeatureRow(
        ts=T0 + bar * MINUTE,
        open=price,
        high=price,
        low=price,
        close=price,
        volume=float(bar),
        spread=12.0,
        rsi=price / 3,
        bar=bar + 1,
        ready=bar >= 300,
        revision=revision,
    )


def block(seq: int, *rows: FeatureRow, symbol: str = "EURUSD", fill: int | None = None, **more: Any) -> FeatureBlock:
    fills = () if fill is None or fill < 0 else (Fill(ts=T0 + fill * MINUTE, fwd_ret_5=seq / 1e6),)
    return FeatureBlock(symbol=symbol, timeframe="M1", candles_seq=seq, rows=rows, received_at=T0, fills=fills, **more)


def signal(seq: int, symbol: str = "EURUSD") -> Signal:
    return Signal(
        id=f"{symbol}-{seq}",
        ts=T0 + seq * MINUTE,
        symbol=symbol,
        timeframe="M1",
        model_name="rf_m1",
        model_version=None,
        threshold=None,
        prob_up=None,
        label=0,
        abstain="no_model",
        candle_revision=0,
        candles_seq=seq,
        features_hash="00",
        created_at=T0,
        expires_at=T0 + MINUTE,
    )


async def publish(bus: Bus, *blocks: FeatureBlock, tag: str = "") -> None:
    for i, one in enumerate(blocks):
        msg_id = f"{tag}{one.symbol}-{one.candles_seq}-{one.part}-{i}"
        await bus.publish(FEATURES, one, one.timeframe, one.symbol, msg_id=msg_id)


async def publish_signals(bus: Bus, *signals: Signal, tag: str = "") -> None:
    for one in signals:
        await bus.publish(SIGNALS, one, one.timeframe, one.symbol, msg_id=tag + one.id)


async def until(condition: Callable[[], Awaitable[object]], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.02)


@pytest.fixture(autouse=True)
async def log_ahead(bus: Bus) -> None:
    """These tests make derived messages without candles: CANDLES counts as far all the same."""
    await bus.js.purge_stream("CANDLES", seq=1_000_000)


@contextlib.asynccontextmanager
async def recording(bus: Bus, url: str, settings: Settings = SETTINGS) -> AsyncIterator[asyncio.Task[None]]:
    """A recorder that is ready, stopped as the supervisor stops it; a failure of its own is raised at the end."""
    ready = asyncio.Event()
    log = structlog.get_logger("recorder")
    task = asyncio.create_task(Recorder(Context(settings, bus, url, ready.set, log)).run(), name="recorder")
    waiter = asyncio.create_task(ready.wait())
    try:
        await asyncio.wait({task, waiter}, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        assert ready.is_set(), "the recorder is not ready"
        yield task
    finally:
        waiter.cancel()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class Archive:
    """A look at what is stored."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    async def count(self, table: str) -> int:
        return int(await self.connection.fetchval(f"SELECT count(*) FROM {table}"))

    async def rows(self) -> dict[str, list[tuple[Any, ...]]]:
        return {
            table: [
                tuple(r) for r in await self.connection.fetch(f"SELECT * FROM {table} ORDER BY symbol, ts, candles_seq")
            ]
            for table in TABLES
        }

    async def cursor(self, stream: str) -> tuple[int, int]:
        """(candles_seq, stream_seq)"""
        found = await self.connection.fetchrow(
            "SELECT candles_seq, stream_seq FROM cursors WHERE reader = $1", f"recorder.{stream.lower()}"
        )
        return (0, 0) if found is None else (found[0], found[1])

    async def caught_up(self, bus: Bus, *streams: str) -> None:
        for stream in streams or ("FEATURES",):
            last = (await bus.js.stream_info(stream)).state.last_seq

            async def there(stream: str = stream, last: int = last) -> bool:
                return (await self.cursor(stream))[1] >= last

            await until(there, f"everything of {stream} is stored")


@contextlib.asynccontextmanager
async def looking(url: str) -> AsyncIterator[Archive]:
    connection = await asyncpg.connect(url)
    try:
        yield Archive(connection)
    finally:
        await connection.close()


@pytest.fixture
async def archive(pg_url: str) -> AsyncIterator[Archive]:
    async with looking(pg_url) as archive:
        yield archive


def market(bars: int) -> list[FeatureBlock]:
    """Two series: history in a block, then single bars with labels, and one revision in two parts."""
    blocks = [block(1, *(row(i) for i in range(60))), block(2, row(0), symbol="GBPUSD!")]
    blocks += [block(3 + i, row(60 + i), fill=55 + i) for i in range(bars)]
    seq = 3 + bars
    blocks += [block(seq, row(40, 1), part=1, parts=2), block(seq, row(41), row(42), fill=41, part=2, parts=2)]
    return blocks


@pytest.mark.parametrize("pooled", [False, True], ids=["direct", "pgbouncer"])
async def test_all_that_is_published_is_archived_once(
    bus: Bus, archive: Archive, pg_url: str, pgbouncer_url: str, pooled: bool
) -> None:
    url = pgbouncer_url if pooled else pg_url
    await publish(bus, *market(30))
    async with recording(bus, url):
        await publish_signals(bus, *(signal(i) for i in range(1, 20)))
        await archive.caught_up(bus, "FEATURES", "SIGNALS")
        assert {table: await archive.count(table) for table in TABLES} == {
            "market_data": 91,
            "candle_revisions": 1,
            "features": 91,
            "model_signals": 19,
        }
        assert await archive.count("features_m1 WHERE fwd_ret_5 IS NOT NULL") == 31
        before = await archive.rows()
        await publish(bus, *market(30), tag="again-")
        await publish_signals(bus, *(signal(i) for i in range(1, 20)), tag="again-")
        await archive.caught_up(bus, "FEATURES", "SIGNALS")
    assert await archive.rows() == before
    async with recording(bus, url):  # starts from its cursor
        await publish(bus, block(100, row(200)))
        await archive.caught_up(bus)
    assert await archive.count("features") == 92


async def test_the_candles_cursor_waits_for_the_last_part(bus: Bus, archive: Archive, pg_url: str) -> None:
    async with recording(bus, pg_url):
        await publish(bus, block(5, row(1)), block(6, row(2), part=1, parts=2))
        await archive.caught_up(bus)
        assert await archive.cursor("FEATURES") == (5, 2)
        await publish(bus, block(6, row(3), part=2, parts=2))
        await archive.caught_up(bus)
        assert await archive.cursor("FEATURES") == (6, 3)


async def test_rows_and_cursor_are_one_transaction(bus: Bus, archive: Archive, pg_url: str) -> None:
    """Its connections are killed all the while: whenever one looks, the cursor tells exactly what is there."""
    one_by_one = Settings(recorder=RecorderSettings(batch_rows=1, linger=0.001))
    await publish(bus, *(block(i + 1, row(i)) for i in range(150)))
    goal, killed = 10, 0
    async with recording(bus, pg_url, one_by_one), looking(pg_url) as other:
        while True:
            seen = await archive.connection.fetchrow(
                "SELECT (SELECT count(*) FROM market_data), (SELECT count(*) FROM features),"
                " (SELECT coalesce(max(stream_seq), 0) FROM cursors WHERE reader = 'recorder.features')"
            )
            assert seen[0] == seen[1] == seen[2]
            if seen[2] == 150:
                break
            if seen[2] >= goal:
                goal = seen[2] + 10
                killed += await other.connection.fetchval(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                    " WHERE application_name = 'mt5-recorder' AND datname = current_database()"
                )
    assert killed > 3


async def test_a_recorder_that_is_stopped_anywhere_leaves_nothing_out(bus: Bus, archive: Archive, pg_url: str) -> None:
    await publish(bus, *market(80))
    goals = (1, 20, 45)
    for goal in goals:
        async with recording(bus, pg_url, Settings(recorder=RecorderSettings(batch_rows=1, linger=0.001))):

            async def far(goal: int = goal) -> bool:
                return (await archive.cursor("FEATURES"))[1] >= goal

            await until(far, f"message {goal} is stored")
    async with recording(bus, pg_url):
        await archive.caught_up(bus)
    stopped = await archive.rows()
    await archive.connection.execute(f"TRUNCATE {', '.join(TABLES)}, cursors")
    async with recording(bus, pg_url):
        await archive.caught_up(bus)
    assert await archive.rows() == stopped


async def test_a_stream_made_anew_is_read_from_its_start(bus: Bus, archive: Archive, pg_url: str) -> None:
    async with recording(bus, pg_url):
        await publish(bus, *market(10))
        await archive.caught_up(bus)
    before = await archive.rows()
    await bus.js.delete_stream("FEATURES")
    await apply(bus, Streams())
    await publish(bus, *market(10)[3:], block(50, row(100)), tag="rebuilt-")
    async with recording(bus, pg_url):
        await archive.caught_up(bus)

        async def whole() -> bool:
            return await archive.count("features") == 72

        await until(whole, "the new row is stored")
        assert await archive.cursor("FEATURES") == (50, 12)
    after = await archive.rows()
    assert [r for r in after["features"] if r[0] != T0 + 100 * MINUTE] == before["features"]


async def test_a_tail_that_was_lost_and_grew_again_is_noticed(bus: Bus, archive: Archive, pg_url: str) -> None:
    async with recording(bus, pg_url):
        await publish(bus, *(block(i, row(i)) for i in range(1, 11)))
        await archive.caught_up(bus)
    # As after a power cut: the last messages are gone, their sequences hold others, and the stream's age is the same.
    info = await bus.js.stream_info("FEATURES")
    await archive.connection.execute(
        "UPDATE cursors SET stream_seq = 10, stored_at = stored_at - interval '1 second' WHERE reader = 'recorder.features'"
    )
    await archive.connection.execute("DELETE FROM market_data; DELETE FROM features")
    assert info.state.last_seq == 10
    await publish(bus, block(11, row(11)))
    async with recording(bus, pg_url):
        await archive.caught_up(bus)

        async def whole() -> bool:
            return await archive.count("features") == 11

        await until(whole, "the stream is read again")


async def test_postgres_stopped_in_mid_stream_loses_nothing(bus: Bus, tmp_path: Path) -> None:
    with postgres_server(tmp_path / "postgres", settings={"fsync": "off"}) as server:
        await migrate(server.url)
        blocks = market(100)
        with structlog.testing.capture_logs() as logs:
            async with recording(bus, server.url):
                await publish(bus, *blocks[:60])
                await publish_signals(bus, *(signal(i) for i in range(1, 30)))

                async def some() -> bool:
                    async with looking(server.url) as archive:
                        return await archive.count("features") > 0

                await until(some, "the first rows are stored")
                await asyncio.to_thread(server.stop)
                await publish(bus, *blocks[60:])
                await publish_signals(bus, *(signal(i) for i in range(30, 60)))

                async def noticed() -> bool:
                    return any(line.get("action") == "recorder.away" for line in logs)

                await until(noticed, "the outage is noticed")
                server.start()  # children are started by the main thread
                async with looking(server.url) as archive:
                    await archive.caught_up(bus, "FEATURES", "SIGNALS")
                    assert await archive.count("market_data") == await archive.count("features") == 161
                    assert await archive.count("model_signals") == 59
                    assert await archive.count("candle_revisions") == 1
        actions = [line.get("action") for line in logs]
        assert (actions.count("recorder.away"), actions.count("recorder.back")) == (1, 1)


async def test_what_postgres_refuses_is_parked_whole_and_the_rest_is_stored(
    bus: Bus, archive: Archive, pg_url: str
) -> None:
    good = [block(i, row(i)) for i in range(1, 8)]
    bad = block(5, row(5), symbol="EUR\0USD")
    # In the stream before the recorder starts, so that they come in one batch.
    await publish(bus, *good[:4], bad, *good[4:])
    await publish_signals(bus, signal(1), signal(2, symbol="\0"), signal(3))
    await bus.js.publish("features.M1.EURUSD", b'{"rows": "none"}')
    await publish(bus, block(9, row(9)))
    async with recording(bus, pg_url):
        await archive.caught_up(bus, "FEATURES", "SIGNALS")
    assert await archive.count("features") == 8
    assert await archive.count("model_signals") == 2
    rejects = await parked(bus)
    assert {r.subject for r in rejects} == {
        FEATURES.subject("M1", bad.symbol),
        SIGNALS.subject("M1", "\0"),
        "features.M1.EURUSD",
    }
    by_subject = {r.subject: r for r in rejects}
    refused = by_subject[FEATURES.subject("M1", bad.symbol)]
    assert refused.where == "recorder"
    assert "refused" in refused.reason
    assert refused.payload["symbol"] == "EUR\0USD"
    assert len(refused.payload["rows"]) == 1
    assert "cannot be decoded" in by_subject["features.M1.EURUSD"].reason
    assert len(rejects) == 3


async def parked(bus: Bus) -> list[Reject]:
    last = (await bus.js.stream_info("REJECTS")).state.last_seq
    return [REJECTS.decode((await bus.js.get_msg("REJECTS", seq)).data or b"") for seq in range(1, last + 1)]


async def test_the_supervisor_runs_it_beside_a_stream_that_is_replaced(
    bus: Bus, archive: Archive, pg_url: str, nats_url: str
) -> None:
    """The stream is deleted under a running recorder; the supervisor restarts it and the new stream is stored."""
    stop, ready = asyncio.Event(), asyncio.Event()
    running = asyncio.create_task(
        run_actors(
            [Recorder],
            SETTINGS,
            nats_urls={"recorder": nats_url},
            database_url=pg_url,
            on_ready=lambda _: ready.set(),
            stop=stop,
        )
    )
    try:
        await asyncio.wait_for(ready.wait(), 20)
        await publish(bus, *(block(i, row(i)) for i in range(1, 5)))
        await archive.caught_up(bus)
        await bus.js.delete_stream("FEATURES")
        await apply(bus, Streams())
        await publish(bus, *(block(i, row(i)) for i in range(3, 9)), tag="rebuilt-")

        async def whole() -> bool:
            return await archive.count("features") == 8

        await until(whole, "the new stream is stored", 40)
    finally:
        stop.set()
        await running


def test_without_a_database_it_says_what_to_set(bus: Bus) -> None:
    with pytest.raises(ConfigurationError, match="MT5_DATABASE_URL"):
        Recorder(Context(SETTINGS, bus, None, lambda: None, structlog.get_logger()))
