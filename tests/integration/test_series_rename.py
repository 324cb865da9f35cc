"""``series rename`` on a real bus and archive: the series goes on to the bit, and nothing of the old name is lost."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from actors.emitter import Emitter
from actors.features import Features
from actors.recorder import Recorder
from bus.client import Bus
from bus.store import Store
from commands.output import NO, WRONG, CommandError
from commands.series import rename
from schema.messages import Candle
from schema.settings import Features as FeatureSettings
from schema.settings import Settings
from tests.builders import put, running, walk

QUICK = Settings(features=FeatureSettings(snapshot_seconds=0.05, quiet_seconds=0.1))
ACTORS = (Features, Emitter, Recorder)
COLUMNS = (
    "ts, close, volume, spread, rsi, macd, macd_signal, macd_hist, atr, ma60, ret_1, fwd_ret_5, ready, bar, "
    "candle_revision"
)


@pytest.fixture
async def store(pg_url: str) -> AsyncIterator[Store]:
    made = await Store.connect(pg_url, size=2, name="test")
    yield made
    await made.close()


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch, nats_url: str, pg_url: str, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MT5_HOME", str(tmp_path / "var"))
    monkeypatch.setenv("MT5_NATS_URL", nats_url)
    monkeypatch.setenv("MT5_DATABASE_URL", pg_url)


async def renamed(old: str, new: str, **more: Any) -> int:
    return await rename(argparse.Namespace(old=old, new=new, **({"timeframe": None, "json": True} | more)))


async def rows(store: Store, sql: str, *args: Any) -> list[tuple[Any, ...]]:
    async with store.connection() as connection:
        return [tuple(row) for row in await connection.fetch(sql, *args)]


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    async def wait() -> None:
        while not await condition():
            await asyncio.sleep(0.02)

    try:
        await asyncio.wait_for(wait(), 30)
    except TimeoutError:
        pytest.fail(f"not in time: {what}")


async def archived(store: Store, symbol: str, count: int) -> None:
    async def whole() -> bool:
        (found,) = await rows(store, "SELECT count(*) FROM features WHERE symbol = $1", symbol)
        return bool(found[0] == count)

    await until(whole, f"{count} rows of {symbol}")


async def features(store: Store, symbol: str) -> list[tuple[Any, ...]]:
    return await rows(store, f"SELECT {COLUMNS} FROM features WHERE symbol = $1 ORDER BY ts", symbol)


async def candles(store: Store, symbol: str) -> tuple[Candle, ...]:
    return await store.candles(symbol, "M1", limit=10_000)


async def live(bus: Bus, bars: list[Candle], symbol: str) -> None:
    await put(bus, bars, size=1, symbol=symbol, source="Broker-Live", replay=False)


async def test_a_renamed_series_goes_on_as_if_it_had_always_had_its_name(
    bus: Bus, nats_url: str, pg_url: str, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    bars = walk(1_260, gaps=0.01)
    first, rest = bars[:-40], bars[-40:]
    async with running(*ACTORS, nats_url=nats_url, database_url=pg_url, settings=QUICK):
        for symbol in ("EURUSD", "unrenamed"):
            await put(bus, first[:-10], size=300, symbol=symbol, source="Broker-Live", replay=False, history=True)
            await live(bus, first[-10:], symbol)
        await archived(store, "unrenamed", len(first))
        await archived(store, "EURUSD", len(first))
        assert await renamed("EURUSD", "EURUSD.m") == 0
        for symbol in ("EURUSD.m", "unrenamed"):
            await live(bus, rest, symbol)
        await archived(store, "EURUSD.m", len(bars))
        await archived(store, "unrenamed", len(bars))

        async def labelled() -> bool:
            return await features(store, "EURUSD.m") == await features(store, "unrenamed")

        await until(labelled, "the same features to the bit")

        async def signalled() -> bool:
            found = await rows(store, "SELECT symbol, count(*) FROM model_signals GROUP BY symbol ORDER BY symbol")
            return found == [("EURUSD", 10), ("EURUSD.m", 40), ("unrenamed", 50)]

        await until(signalled, "old signals keep their name, the history makes none")
    assert await candles(store, "EURUSD.m") == await candles(store, "unrenamed") == tuple(bars)
    assert await candles(store, "EURUSD") == ()
    assert await features(store, "EURUSD") == []
    sources = await rows(store, "SELECT DISTINCT symbol, source FROM market_data ORDER BY symbol")
    assert sources == [("EURUSD.m", "Broker-Live"), ("unrenamed", "Broker-Live")]
    # What the old name's signals were made of can still be read as it was then.
    said = json.loads(capsys.readouterr().out)
    assert [(one["timeframe"], one["bars"]) for one in said["series"]] == [("M1", len(first))]
    seq = said["series"][0]["candles_seq"]
    assert [bar.candle for bar in await store.bars_before("EURUSD", "M1", None, seq)] == first
    (recorded,) = await rows(store, "SELECT old_symbol, new_symbol, timeframe, bars, candles_seq FROM series_renames")
    assert recorded == ("EURUSD", "EURUSD.m", "M1", len(first), seq)
    superseded = await rows(store, "SELECT count(*) FROM model_signals WHERE superseded_at IS NOT NULL")
    assert superseded == [(0,)]


async def test_a_name_that_has_bars_already_gets_its_past(bus: Bus, nats_url: str, pg_url: str, store: Store) -> None:
    bars = walk(700)
    async with running(*ACTORS, nats_url=nats_url, database_url=pg_url, settings=QUICK):
        await put(bus, bars, size=200, symbol="unrenamed", history=True)
        await put(bus, bars[:600], size=200, symbol="GBPUSD", history=True)
        await archived(store, "GBPUSD", 600)
        await live(bus, bars[600:690], "GBPUSD!")  # the broker was faster than its user
        await archived(store, "GBPUSD!", 90)
        assert await renamed("GBPUSD", "GBPUSD!") == 0
        await live(bus, bars[690:], "GBPUSD!")
        await archived(store, "GBPUSD!", 700)

        async def equal() -> bool:
            return await features(store, "GBPUSD!") == await features(store, "unrenamed")

        await until(equal, "the same features to the bit")


async def test_renaming_again_and_back(bus: Bus, nats_url: str, pg_url: str, store: Store) -> None:
    bars = walk(500)
    async with running(*ACTORS, nats_url=nats_url, database_url=pg_url, settings=QUICK):
        await put(bus, bars, size=250, symbol="unrenamed", history=True)
        await put(bus, bars[:400], size=200, symbol="XAUUSD", history=True)
        await archived(store, "XAUUSD", 400)
        assert await renamed("XAUUSD", "GOLD") == 0
        with pytest.raises(CommandError, match="has no candles of XAUUSD") as error:
            await renamed("XAUUSD", "GOLD")
        assert error.value.code == NO
        await archived(store, "GOLD", 400)
        await live(bus, bars[400:450], "GOLD")
        await archived(store, "GOLD", 450)
        assert await renamed("GOLD", "XAUUSD", timeframe="1m") == 0
        await live(bus, bars[450:], "XAUUSD")
        await archived(store, "XAUUSD", 500)

        async def equal() -> bool:
            return await features(store, "XAUUSD") == await features(store, "unrenamed")

        await until(equal, "the same features to the bit")
    assert await candles(store, "GOLD") == ()


@pytest.mark.parametrize(
    ("old", "new", "more", "sentence"),
    [
        ("EURUSD", "EURUSD", {}, "same name"),
        ("EURUSD", " EURUSD", {}, "outer spaces"),
        ("EURUSD", "", {}, "printable"),
        ("EURUSD", "E" * 65, {}, "64 bytes"),
        ("EURUSD", "EURUSD.m", {"timeframe": "M7"}, "no timeframe"),
    ],
)
async def test_what_cannot_be_a_name_is_told(old: str, new: str, more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CommandError, match=sentence) as error:
        await renamed(old, new, **more)
    assert error.value.code == WRONG
