"""Two years of a broker's candles in its own time, through the gateway into the archive: the bars of a clean UTC feed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import aiohttp
import asyncpg
import pytest

from actors.collector import Collector
from actors.features import Features
from actors.recorder import Recorder
from bus.client import Bus
from deploy.server import free_port
from schema.settings import Clock, Gateway, Settings
from tests.builders import running

FIRST, LAST = datetime(2023, 6, 5), datetime(2025, 6, 6)  # noqa: DTZ001 - the broker's own time
SHIFTS = {"new_york+7": ("America/New_York", 7), "Europe/Athens": ("Europe/Athens", 0)}


def to_utc(rule: str, server: datetime) -> datetime:
    """The standard library's word on a broker's time, which stands for the clean feed."""
    zone, shift = SHIFTS[rule]
    return (server - timedelta(hours=shift)).replace(tzinfo=ZoneInfo(zone)).astimezone(UTC)


def open_times(rule: str) -> dict[str, list[datetime]]:
    """H4 and D1 throughout, M1 for a day on either side of every change; weekdays only, as brokers show them."""
    days = [FIRST + timedelta(days=i) for i in range((LAST - FIRST).days)]
    trading = [day for day in days if day.weekday() < 5]
    changes = [a for a, b in pairwise(days) if b - a != to_utc(rule, b) - to_utc(rule, a)]
    near = sorted({d for c in changes for d in trading if abs((d - c).days) <= 3})
    return {
        "D1": trading,
        "H4": [day + timedelta(hours=h) for day in trading for h in range(0, 24, 4)],
        "M1": [day + timedelta(minutes=5 * m) for day in near for m in range(288)],
    }


def seconds(server: datetime) -> int:
    return int(server.replace(tzinfo=UTC).timestamp())


def payloads(rule: str, times: dict[str, list[datetime]], fields: bool) -> Iterator[dict[str, Any]]:
    """A month at a time, as a terminal would send it at the month's end (``fields``), or at once, as history."""
    for timeframe, opened in times.items():
        months = sorted({(t.year, t.month) for t in opened})
        for year, month in months:
            rows = [t for t in opened if (t.year, t.month) == (year, month)]
            items = [
                {
                    "time": seconds(t),
                    "open": 1.1,
                    "high": 1.2,
                    "low": 1.0,
                    "close": 1.1 + i % 50 / 1e3,
                    "tick_volume": i,
                }
                for i, t in enumerate(rows, 1)
            ]
            beside: dict[str, Any] = {
                "symbol": "EURUSD",
                "timeframe": timeframe,
                "source": "Broker",
                "history": True,
                "point": 1e-05,
            }
            if fields:
                now = rows[-1] + timedelta(days=1)
                clock = {"server_time": seconds(now), "gmt_time": int(to_utc(rule, now).timestamp()), "replay": True}
                beside |= clock
            for at in range(0, len(items), 2_000):
                yield beside | {"candles": items[at : at + 2_000]}


@pytest.mark.parametrize("rule", sorted(SHIFTS))
@pytest.mark.parametrize("fields", [False, True], ids=["rule", "fields"])
async def test_two_years_in_broker_time_are_the_bars_of_a_clean_feed(
    bus: Bus, nats_url: str, pg_url: str, rule: str, fields: bool
) -> None:
    port = free_port()
    clock = {} if fields else {"Broker": Clock(rule=rule)}
    settings = Settings(gateway=Gateway(port=port), clock=clock)
    times = open_times(rule)
    expected = {(tf, to_utc(rule, t)) for tf, opened in times.items() for t in opened}
    async with (
        running(Collector, Features, Recorder, nats_url=nats_url, database_url=pg_url, settings=settings),
        aiohttp.ClientSession() as http,
    ):
        for payload in payloads(rule, times, fields):
            status = 503
            while status == 503:  # a busy disk: sending again is safe
                async with http.post(f"http://127.0.0.1:{port}/ingest", json=payload) as response:
                    answer, status = await response.json(), response.status
            assert (status, answer.get("rejected", answer)) == (200, [])
            assert answer["accepted"] == len(payload["candles"])
        connection = await asyncpg.connect(pg_url)
        try:
            async with asyncio.timeout(60):
                while await connection.fetchval("SELECT count(*) FROM market_data") < len(expected):
                    pass
            stored = await connection.fetch("SELECT timeframe, ts FROM market_data")
            points = await connection.fetch("SELECT symbol, point FROM symbols")
        finally:
            await connection.close()
    assert {(r["timeframe"], r["ts"]) for r in stored} == expected
    assert [tuple(r) for r in points] == [("EURUSD", 1e-05)]


async def test_a_correction_in_autumns_repeated_hour_counts(bus: Bus, nats_url: str, pg_url: str) -> None:
    """Server time runs from 03:00 to 04:00 twice: the later of two payloads bears the earlier time."""
    change = datetime(2024, 10, 27, 1, tzinfo=UTC)
    opened = change - timedelta(minutes=90)
    port = free_port()
    candle = {"open": 1.1, "high": 1.2, "low": 1.0, "volume": 1}

    def payload(sent: datetime, close: float) -> dict[str, Any]:
        def server(utc: datetime) -> int:
            return int(utc.astimezone(ZoneInfo("Europe/Athens")).replace(tzinfo=UTC).timestamp())

        clock = {"source": "Broker", "server_time": server(sent), "gmt_time": int(sent.timestamp()), "replay": True}
        bar = candle | {"time": server(opened), "close": close}
        return clock | {"symbol": "BTCUSD", "timeframe": "M1", "candles": [bar]}

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
