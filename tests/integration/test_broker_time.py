"""Two years of a broker's candles in its own time, through the gateway into the archive: the rows of a clean UTC feed."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from itertools import count, groupby, islice, product
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import aiohttp
import asyncpg
import pytest

from actors.collector import Collector
from actors.core.series import SeriesState, append
from actors.core.timeframe import end_time
from actors.features import Features
from actors.recorder import Recorder
from bus.client import Bus
from bus.ledger import Ledgers
from deploy.server import free_port
from schema.messages import Candle, FeatureRow
from schema.settings import Clock, Gateway, Settings
from tests.archive import CANDLE, FEATURE, PATIENCE, Archive, Table, bits, read_archive
from tests.builders import LIVE, running

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
FIRST, LAST = datetime(2023, 6, 1, tzinfo=UTC), datetime(2025, 6, 1, tzinfo=UTC)
SHIFTS = {"new_york+7": ("America/New_York", 7), "Europe/Athens": ("Europe/Athens", 0)}
# A market that never closes has minutes in the very hour of a change, and H4 and D1 bars an hour longer or shorter for
# it. Foreign exchange pauses then: the minutes nearest to a change are Friday's last and Sunday's first. So many of
# them a terminal sends together: the two passes of autumn's hour must not share a payload.
MINUTES_TOGETHER = {"BTCUSD": HOUR / 2, "EURUSD": 4 * HOUR}
AROUND = 4 * 60  # minutes of trading on either side of every change
# How a feed tells its clock, and what the archive says of times that became UTC in that way.
TS_SOURCE = {"clean": "utc", "rule": "rule", "fields": "server"}

Series = tuple[str, str]


def to_utc(rule: str, server: datetime) -> datetime:
    """The standard library's word on a broker's time (written as if it were UTC); of autumn's repeated hour the first pass."""
    zone, shift = SHIFTS[rule]
    return (server - shift * HOUR).replace(tzinfo=ZoneInfo(zone)).astimezone(UTC)


def to_server(rule: str, utc: datetime) -> datetime:
    zone, shift = SHIFTS[rule]
    return utc.astimezone(ZoneInfo(zone)).replace(tzinfo=UTC) + shift * HOUR


def repeated(rule: str, utc: datetime) -> bool:
    """Whether the broker's clock shows then what it showed an hour ago."""
    return to_utc(rule, to_server(rule, utc)) != utc


def hours() -> list[datetime]:
    return [FIRST + i * HOUR for i in range((LAST - FIRST) // HOUR)]


@cache
def changes() -> list[datetime]:
    """When New York's or Europe's clocks change: a broker's bars must stand both its own changes and the others'."""
    return [b for b in hours() if any(to_server(rule, b) - to_server(rule, b - HOUR) != HOUR for rule in SHIFTS)]


def trades(symbol: str, at: datetime) -> bool:
    """Foreign exchange trades from Sunday 17:00 to Friday 17:00 in New York, whatever its broker's clock shows."""
    return symbol != "EURUSD" or to_server("new_york+7", at).weekday() < 5


def nearest(symbol: str, change: datetime) -> list[datetime]:
    """Every minute of the last hours of trading before a change and of the first ones after it."""
    found: list[datetime] = []
    for minutes in (count(-1, -1), count()):
        trading = (at for m in minutes if trades(symbol, at := change + m * MINUTE))
        found += islice(trading, AROUND)
    return sorted(found)


def open_times(rule: str, symbol: str) -> dict[str, list[datetime]]:
    """In UTC: the minutes around the changes, and every longer bar that has an hour of trading, by the broker's clock."""
    shown = [to_server(rule, at) for at in hours() if trades(symbol, at)]
    days = sorted({at - at.hour * HOUR for at in shown})
    server = {
        "H4": sorted({at - at.hour % 4 * HOUR for at in shown}),
        "D1": days,
        "W1": sorted({day - day.isoweekday() % 7 * DAY for day in days}),
        "MN1": sorted({day.replace(day=1) for day in days}),
    }
    longer = {timeframe: [to_utc(rule, at) for at in opened] for timeframe, opened in server.items()}
    return {"M1": [at for change in changes() for at in nearest(symbol, change)]} | longer


def candle(symbol: str, timeframe: str, ts: datetime) -> Candle:
    """Values that are this bar's alone: they tell where it belongs, wherever it is stored."""
    chance = random.Random(f"{symbol} {timeframe} {seconds(ts)}")
    opened, close = (round(chance.uniform(1.0, 1.2), 5) for _ in range(2))
    return Candle(
        ts=ts,
        open=opened,
        high=round(max(opened, close) + chance.uniform(0, 0.01), 5),
        low=round(min(opened, close) - chance.uniform(0, 0.01), 5),
        close=close,
        volume=float(chance.randrange(1, 10_000)),
        spread=float(chance.randrange(30)),
        real_volume=float(chance.randrange(1_000_000)),
    )


@cache
def clean(rule: str) -> Mapping[Series, list[Candle]]:
    """What every sender of these two years means, whatever its clock shows."""
    return {
        (symbol, timeframe): [candle(symbol, timeframe, ts) for ts in opened]
        for symbol in MINUTES_TOGETHER
        for timeframe, opened in open_times(rule, symbol).items()
    }


def values(row: Candle | FeatureRow, columns: Sequence[str]) -> tuple[Any, ...]:
    """A row as the archive would give it, to the last bit."""
    return tuple(bits(getattr(row, column)) for column in columns)


@cache
def expected(rule: str) -> Archive:
    """The archive of a clean feed: its candles as they are, and the features of each series computed at once."""
    archive: Archive = {"market_data": {}, "features": {}, "model_signals": {}}
    for (symbol, timeframe), rows in clean(rule).items():
        features: Sequence[FeatureRow] = append(SeriesState(symbol, timeframe), rows, LIVE).rows
        for name, columns, found in (("market_data", CANDLE, rows), ("features", FEATURE, features)):
            archive[name] |= {(symbol, timeframe, row.ts): [values(row, columns)] for row in found}
    return archive


def differences(found: Table, wanted: Table) -> list[tuple[Any, ...]]:
    """The first few rows that differ: (series and time, found, wanted)."""
    keys = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    return [(*key, found.get(key), wanted.get(key)) for key in keys[:5]]


def seconds(at: datetime) -> int:
    return int(at.timestamp())


def clock(rule: str, now: datetime) -> dict[str, Any]:
    return {"server_time": seconds(to_server(rule, now)), "gmt_time": seconds(now), "replay": True}


def candles(rows: list[Candle], times: list[datetime]) -> list[dict[str, Any]]:
    same = ("open", "high", "low", "close", "spread", "real_volume")
    return [
        {"time": seconds(shown), "tick_volume": int(row.volume)} | {name: getattr(row, name) for name in same}
        for row, shown in zip(rows, times, strict=True)
    ]


class Part(NamedTuple):
    """Bars of a series that a terminal sends together, and when: once the last of them is over."""

    sent: datetime
    series: Series
    rows: list[Candle]


def together(series: Series, row: Candle) -> int:
    """What the bars of a series that travel in one payload have in common."""
    symbol, timeframe = series
    if timeframe == "M1":
        return (row.ts - FIRST) // MINUTES_TOGETHER[symbol]
    return row.ts.year if timeframe in ("W1", "MN1") else row.ts.month


def parts(rule: str) -> list[Part]:
    """The two years in the order in which a terminal would have sent them."""
    out = []
    for series, rows in clean(rule).items():
        for _, group in groupby(rows, partial(together, series)):
            part = list(group)
            last, timeframe = part[-1].ts, series[1]
            over = last + MINUTE if timeframe == "M1" else to_utc(rule, end_time(to_server(rule, last), timeframe))
            out.append(Part(over, series, part))
    return sorted(out, key=lambda part: part.sent)


def source(symbol: str) -> str:
    """A terminal for each market: what the minutes of one show of a change must not help the other."""
    return f"Broker-{symbol}"


def payloads(rule: str, way: str) -> Iterator[dict[str, Any]]:
    for sent, (symbol, timeframe), rows in parts(rule):
        beside = {"symbol": symbol, "timeframe": timeframe, "source": source(symbol), "history": True, "point": 1e-05}
        times = [row.ts if way == "clean" else to_server(rule, row.ts) for row in rows]
        # A rule knows one of the two hours that autumn's clock shows alike, the first: only the fields tell the second.
        if way == "fields" or (way == "rule" and repeated(rule, rows[0].ts)):
            beside |= clock(rule, sent)
        yield beside | {"candles": candles(rows, times)}


async def post(http: aiohttp.ClientSession, port: int, payload: dict[str, Any], forming: int = 0) -> None:
    """Every bar of a payload is taken, but for the one that may be forming; sending again after a 503 is safe."""
    status = 503
    while status == 503:
        async with http.post(f"http://127.0.0.1:{port}/ingest", json=payload) as response:
            answer, status = await response.json(), response.status
    assert (status, answer.get("rejected", answer)) == (200, [])
    assert answer["forming"] <= forming
    assert answer["accepted"] + answer["forming"] == len(payload["candles"])


async def archived(connection: Any, wanted: Archive) -> Archive:
    """The archive once it holds as much as is wanted, or when patience is over: then its rows tell what is missing."""
    rows = len(wanted["features"])
    labels = sum(row[FEATURE.index("fwd_ret_5")] is not None for (row,) in wanted["features"].values())
    whole = (
        "SELECT (SELECT count(*) FROM market_data) >= $1 AND count(*) >= $1 AND count(fwd_ret_5) >= $2 FROM features"
    )
    deadline = time.monotonic() + PATIENCE
    while not await connection.fetchval(whole, rows, labels) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    return await read_archive(connection)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("way", "rule"), [("clean", "new_york+7"), *product(("rule", "fields"), sorted(SHIFTS))])
async def test_two_years_in_broker_time_are_the_rows_of_a_clean_feed(
    bus: Bus, nats_url: str, pg_url: str, way: str, rule: str
) -> None:
    assert len(changes()) == 8
    port = free_port()
    told = {"clean": Clock(grid=rule), "rule": Clock(rule=rule), "fields": Clock()}[way]
    settings = Settings(gateway=Gateway(port=port), clock={source(symbol): told for symbol in MINUTES_TOGETHER})
    async with (
        running(Collector, Features, Recorder, nats_url=nats_url, database_url=pg_url, settings=settings),
        aiohttp.ClientSession() as http,
    ):
        for payload in payloads(rule, way):
            await post(http, port, payload)
        connection = await asyncpg.connect(pg_url)
        try:
            archive = await archived(connection, expected(rule))
            kinds = await connection.fetch("SELECT DISTINCT ts_source, revision FROM market_data")
            points = await connection.fetch("SELECT symbol, point FROM symbols ORDER BY symbol")
        finally:
            await connection.close()
    for table, rows in expected(rule).items():
        assert differences(archive[table], rows) == [], table
    assert [tuple(r) for r in kinds] == [(TS_SOURCE[way], 0)]  # each bar was stored once, and its time is no guess
    assert [tuple(r) for r in points] == [("BTCUSD", 1e-05), ("EURUSD", 1e-05)]


def week(number: int) -> list[datetime]:
    """The first and the last half hour of a week of foreign exchange, from the one on that opens on 9 February 2025."""
    opening = to_utc("new_york+7", datetime(2025, 2, 10, tzinfo=UTC) + 7 * number * DAY)
    closing = to_utc("new_york+7", datetime(2025, 2, 15, tzinfo=UTC) + 7 * number * DAY)
    return [at + m * MINUTE for at in (opening, closing - HOUR / 2) for m in range(30)]


@pytest.mark.parametrize(("rule", "family"), [("Europe/Athens", "london+2"), ("new_york+7", "new_york+7")])
async def test_without_a_clock_history_is_assumed_and_not_trained_on_until_week_openings_tell_the_family(
    bus: Bus, nats_url: str, pg_url: str, rule: str, family: str
) -> None:
    """Weeks around the changes of spring; of the first one no weekend was sent, and so it has no opening that counts."""
    port = free_port()
    weeks = [[candle("EURUSD", "M1", at) for at in week(number)] for number in range(10)]
    before, after = [row for rows in weeks[:8] for row in rows], [row for rows in weeks[8:] for row in rows]
    features = {row.ts: row for row in append(SeriesState("EURUSD", "M1"), before + after, LIVE).rows}

    def minutes(rows: list[Candle], **beside: Any) -> dict[str, Any]:
        sent = candles(rows, [to_server(rule, row.ts) for row in rows])
        return {"timeframe": "M1", "source": "Broker", "candles": sent} | beside

    async with (
        running(
            Collector,
            Features,
            Recorder,
            nats_url=nats_url,
            database_url=pg_url,
            settings=Settings(gateway=Gateway(port=port)),
        ),
        aiohttp.ClientSession() as http,
        asyncpg.create_pool(pg_url, min_size=1, max_size=1) as archive,
    ):

        async def until(symbol: str, bars: int) -> None:
            async with asyncio.timeout(PATIENCE):
                while await archive.fetchval("SELECT count(*) FROM features_m1 WHERE symbol = $1", symbol) < bars:
                    await asyncio.sleep(0.05)

        now = datetime.now(UTC).replace(second=0, microsecond=0)
        newest = [candle("BTCUSD", "M1", at) for at in (now - MINUTE, now)]
        await post(http, port, minutes(newest, symbol="BTCUSD"), forming=1)
        await until("BTCUSD", 1)
        live = await archive.fetch("SELECT ts, close, ts_source FROM market_data ORDER BY ts LIMIT 1")
        assert [tuple(row) for row in live] == [(newest[0].ts, newest[0].close, "inferred")]

        for rows in weeks[:8]:
            await post(http, port, minutes(rows, symbol="EURUSD", history=True))
        await until("EURUSD", len(before))
        assert (await Ledgers(bus).load())["Broker"].book.family is None
        guessed = "SELECT count(*) FROM features_m1 WHERE clock_assumed AND symbol = 'EURUSD'"
        assert await archive.fetchval(guessed) == len(before)
        assert await archive.fetchval(f"{guessed} AND ready AND fwd_ret_5 IS NOT NULL") == 150
        assert await archive.fetch("SELECT * FROM trainset_m1") == []

        for rows in weeks[8:]:
            await post(http, port, minutes(rows, symbol="EURUSD", history=True))
        await until("EURUSD", len(before) + len(after))
        assert (await Ledgers(bus).load())["Broker"].book.family == family
        assert await archive.fetchval(guessed) == len(before)  # until `mt5 clock restate`
        found = await read_archive(archive)
        trained = await archive.fetch("SELECT ts FROM trainset_m1 ORDER BY ts")
        kinds = await archive.fetch("SELECT DISTINCT ts_source FROM market_data WHERE ts >= $1", after[0].ts)
    for row in after:
        key = ("EURUSD", "M1", row.ts)
        assert found["market_data"][key] == [values(row, CANDLE)]
        assert found["features"][key] == [values(features[row.ts], FEATURE)]
    assert [row["ts"] for row in trained] == [row.ts for row in after if features[row.ts].fwd_ret_5 is not None]
    assert [row["ts_source"] for row in kinds] == ["inferred"]


async def test_a_correction_in_autumns_repeated_hour_counts(bus: Bus, nats_url: str, pg_url: str) -> None:
    """Server time runs from 03:00 to 04:00 twice: the later of two payloads bears the earlier time."""
    change = datetime(2024, 10, 27, 1, tzinfo=UTC)
    opened = change - timedelta(minutes=90)
    port = free_port()

    def payload(sent: datetime, close: float) -> dict[str, Any]:
        shown = seconds(to_server("Europe/Athens", opened))
        bar = {"time": shown, "open": 1.1, "high": 1.2, "low": 1.0, "close": close, "volume": 1}
        series = {"source": "Broker", "symbol": "BTCUSD", "timeframe": "M1", "candles": [bar]}
        return series | clock("Europe/Athens", sent)

    async with (
        running(
            Collector,
            Features,
            Recorder,
            nats_url=nats_url,
            database_url=pg_url,
            settings=Settings(gateway=Gateway(port=port)),
        ),
        aiohttp.ClientSession() as http,
    ):
        for sent, close in ((change - timedelta(minutes=5), 1.11), (change + timedelta(minutes=10), 1.12)):
            async with http.post(f"http://127.0.0.1:{port}/ingest", json=payload(sent, close)) as response:
                answer = await response.json()
            assert (response.status, answer["accepted"]) == (200, 1)
        connection = await asyncpg.connect(pg_url)
        try:
            async with asyncio.timeout(10):
                while await connection.fetch("SELECT ts, close, revision FROM market_data") != [(opened, 1.12, 1)]:
                    pass
        finally:
            await connection.close()
