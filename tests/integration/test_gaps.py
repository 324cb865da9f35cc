"""The gap report over a real archive, and what a gateway asks terminals for, from a real log and archive."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from actors.core.files import decode_lines, read_bars
from actors.core.sessions import Calendar, learn, no_clock, spans
from actors.features import Features
from actors.gateway.backfills import PAUSES, REACH, SPANS, Backfills, Past, Pasts
from actors.recorder import Recorder
from bus.client import Bus
from bus.store import Store, StoreUnavailable
from commands.gaps import gaps as gaps_command
from schema.messages import Backfill, Candle
from schema.settings import Settings
from tests.builders import put, running
from tests.gateway import served

SERIES = ("EURUSD", "M1")
MINUTE = 60


@pytest.fixture
async def store(pg_url: str) -> AsyncIterator[Store]:
    made = await Store.connect(pg_url, size=2, name="test")
    yield made
    await made.close()


def at(text: str) -> int:
    return int(datetime.fromisoformat(f"{text}Z").timestamp())


def read(file: Path) -> list[Candle]:
    with file.open("rb") as stream:
        return [row for rows in read_bars(decode_lines(iter(stream))) for row in rows]


def bar(ts: int) -> Candle:
    return Candle(ts=datetime.fromtimestamp(ts, UTC), open=1.1, high=1.2, low=1.0, close=1.1, volume=5.0)


def bars(times: Iterable[int]) -> list[Candle]:
    return [bar(ts) for ts in times]


def without(rows: Sequence[Candle], first: str, last: str) -> list[Candle]:
    return [row for row in rows if not at(first) <= row.ts.timestamp() <= at(last)]


async def archive(store: Store, rows: Sequence[Candle], symbol: str, timeframe: str, source: str | None = None) -> None:
    records = [
        (r.ts, symbol, timeframe, r.open, r.high, r.low, r.close, r.volume, r.spread, r.real_volume, source, r.ts, 1)
        for r in rows
    ]
    columns = [*("ts", "symbol", "timeframe"), *Candle.__struct_fields__[1:], "source", "received_at", "candles_seq"]
    async with store.connection() as connection:
        await connection.copy_records_to_table("market_data", records=records, columns=columns)


def asked(answer: Iterable[Backfill]) -> list[tuple[str, str]]:
    return [(f"{b.from_:%Y-%m-%dT%H:%M}", f"{b.to:%Y-%m-%dT%H:%M}") for b in answer]


# --- GET /candles/gaps ---------------------------------------------------------------------------------------------


async def test_real_gaps_are_told_with_their_sessions(store: Store, data: Path) -> None:
    await archive(store, read(data / "EURUSD_M1_202502.csv"), "EURUSD", "M1")
    await archive(store, read(data / "US30m_H1_202401.csv"), "US30m", "H1")
    async with served(store=store) as gate:
        async with gate.client.get("/candles/gaps", params={"symbol": "EURUSD", "timeframe": "M1"}) as response:
            minutes = await response.json()
        async with gate.client.get("/candles/gaps", params={"symbol": "US30m", "timeframe": "1h"}) as response:
            hours = await response.json()
    assert minutes["bars"] == 9_999
    assert (minutes["first"], minutes["last"]) == ("2025-02-13T01:33:00Z", "2025-02-24T00:48:00Z")
    assert minutes["missing"] == {"closed session": 5_762, "no tick": 35, "transport loss": 0}
    assert [gap for gap in minutes["gaps"] if gap["class"] == "closed session"] == [
        {
            "class": "closed session",
            "name": "weekend",
            "from": "2025-02-14T22:00:00Z",
            "to": "2025-02-16T21:59:00Z",
            "count": 2_880,
        },
        {
            "class": "closed session",
            "name": "weekend",
            "from": "2025-02-21T22:00:00Z",
            "to": "2025-02-23T22:01:00Z",
            "count": 2_882,
        },
    ]
    assert hours["missing"]["transport loss"] == 0
    assert {"weekend", "daily break 21:00–22:00", "daily break 22:00–23:00"} <= {gap["name"] for gap in hours["gaps"]}


async def test_a_span_and_a_limit_choose_gaps(store: Store, data: Path) -> None:
    rows = without(read(data / "EURUSD_M1_202502.csv"), "2025-02-18T10:00", "2025-02-18T12:59")
    await archive(store, rows, "EURUSD", "M1")
    path = "/candles/gaps?symbol=EURUSD&timeframe=M1"
    async with served(store=store) as gate:
        async with gate.client.get(f"{path}&from=2025-02-18T11:00:00Z&to=2025-02-18T11:30:00Z") as response:
            (gap,) = (await response.json())["gaps"]
        async with gate.client.get(f"{path}&limit=3") as response:
            newest = (await response.json())["gaps"]
        async with gate.client.get(path) as response:
            everything = (await response.json())["gaps"]
    assert gap == {
        "class": "transport loss",
        "name": None,
        "from": "2025-02-18T10:00:00Z",
        "to": "2025-02-18T12:59:00Z",
        "count": 180,
    }
    assert newest == everything[-3:]


@pytest.mark.parametrize(
    ("query", "status", "sentence"),
    [
        ("timeframe=M1", 400, "symbol is missing"),
        ("symbol=EURUSD", 400, "timeframe is missing"),
        ("symbol=EURUSD&timeframe=M1&from=2025-02-02&to=2025-02-01", 400, "swap them"),
        ("symbol=EURUSD&timeframe=M1&form=2025-02-02", 400, "no parameter"),
        ("symbol=NOBODY&timeframe=M1", 404, "no bar of NOBODY M1"),
        ("symbol=EURUSD&timeframe=M1&from=0001-01-01T00:00:00Z&to=9999-12-31T00:00:00Z", 404, "no bar"),
    ],
)
async def test_what_cannot_be_answered_is_told(store: Store, query: str, status: int, sentence: str) -> None:
    async with served(store=store) as gate, gate.client.get(f"/candles/gaps?{query}") as response:
        assert response.status == status
        assert sentence in (await response.json())["error"]


async def test_the_command_tells_one_series_or_all(
    store: Store, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pg_url: str, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MT5_HOME", str(tmp_path / "var"))
    monkeypatch.setenv("MT5_DATABASE_URL", pg_url)
    (tmp_path / "mt5.toml").write_text('[clock."Broker"]\nrule = "new_york+7"\n')
    options = {"symbol": None, "timeframe": None, "json": False}

    async def said(**more: Any) -> str:
        assert await gaps_command(argparse.Namespace(**(options | more))) == 0
        return str(capsys.readouterr().out)

    assert "no such candles" in await said()
    await archive(store, read(data / "US30m_H1_202401.csv"), "US30m", "H1", "Broker")
    await archive(store, read(data / "EURUSD_M1_202502.csv"), "EURUSD", "M1")
    listing = (await said()).splitlines()
    assert [line.split()[:3] for line in listing[1:]] == [["EURUSD", "M1", "9999"], ["US30m", "H1", "9890"]]
    assert "missing: closed session 5,762, no tick 35, transport loss 0" in await said(symbol="EURUSD")
    (report,) = json.loads(await said(symbol="US30m", timeframe="h1", json=True))["series"]
    # In the broker's clock the break has one name, the whole year round.
    breaks = {gap["name"] for gap in report["gaps"] if gap["class"] == "closed session"}
    assert {name for name in breaks if not name.startswith("holiday")} == {"weekend", "daily break 00:00–01:00"}
    assert report["missing"]["transport loss"] == 0


# --- backfill ------------------------------------------------------------------------------------------------------


def known(times: Sequence[int], timeframe: str = "M1") -> Past:
    calendar = Calendar(timeframe)
    runs = spans(times, calendar.step)
    holes = [(a[1], b[0]) for a, b in pairwise(runs)]
    learn(calendar, times[0], holes, times[-1])
    return Past(calendar, [hole for hole in holes if hole[1] > times[-1] - REACH * calendar.step], [])


class Memory:
    """A past that a test holds."""

    def __init__(self, times: Sequence[int]) -> None:
        self.times = list(times)
        self.loads = 0

    async def load(self, _symbol: str, timeframe: str) -> Past | None:
        self.loads += 1
        return known(self.times, timeframe) if self.times else None


async def settled(backfills: Backfills) -> None:
    task = asyncio.create_task(backfills.refresh())
    async with asyncio.timeout(10):
        await backfills.settled()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def fortnight(data: Path) -> list[int]:
    """Real minutes up to a Tuesday's noon."""
    return [int(row.ts.timestamp()) for row in read(data / "EURUSD_M1_202502.csv") if row.ts.timestamp() < at("2025-02-18T12:00")]  # fmt: skip


async def watching(times: Sequence[int]) -> Backfills:
    """A gateway that has heard the newest bar of a series and read its past."""
    backfills = Backfills(Memory(times).load)
    assert backfills.on_accepted(SERIES, bars(times[-1:]), 0.0) == ()
    await settled(backfills)
    return backfills


async def test_a_loss_is_asked_for_exactly_and_never_after_it_came(fortnight: list[int]) -> None:
    backfills = await watching(fortnight)
    after = at("2025-02-18T15:00")
    assert asked(backfills.on_accepted(SERIES, bars([after]), 1_000.0)) == [("2025-02-18T12:00", "2025-02-18T14:59")]
    assert backfills.on_accepted(SERIES, bars([after + MINUTE]), 1_001.0) == ()  # not every few seconds
    answer = bars(range(at("2025-02-18T12:00"), after, MINUTE))
    assert backfills.on_accepted(SERIES, answer, 1_002.0, history=True) == ()
    for later in (2_000.0, 20_000.0, 200_000.0):
        assert backfills.on_accepted(SERIES, [], later) == ()


async def test_an_unanswered_loss_is_asked_for_with_growing_pauses_and_given_up(fortnight: list[int]) -> None:
    backfills = await watching(fortnight)
    after = at("2025-02-18T15:00")
    said = []
    for second in range(0, 40_000, 10):
        rows = bars([after + second // MINUTE * MINUTE]) if second % MINUTE == 0 else []
        if backfills.on_accepted(SERIES, rows, float(second)):
            said.append(second)
    assert said == [0, *(sum(PAUSES[: i + 1]) for i in range(len(PAUSES) - 1))]
    assert backfills.given_up(*SERIES) == ((at("2025-02-18T12:00"), at("2025-02-18T14:59")),)


async def test_a_part_of_an_answer_leaves_the_rest_to_be_asked_for(fortnight: list[int]) -> None:
    backfills = await watching(fortnight)
    after = at("2025-02-18T15:00")
    assert backfills.on_accepted(SERIES, bars([after]), 0.0)
    part = [ts for ts in range(at("2025-02-18T12:30"), at("2025-02-18T14:00"), MINUTE) if ts != at("2025-02-18T13:07")]
    assert backfills.on_accepted(SERIES, bars(part), 1.0, history=True) == ()  # more may be on its way
    assert asked(backfills.on_accepted(SERIES, bars([after + MINUTE]), 62.0)) == [
        ("2025-02-18T12:00", "2025-02-18T12:29"),
        ("2025-02-18T14:00", "2025-02-18T14:59"),
    ]


async def test_sessions_quiet_minutes_and_history_are_not_asked_for(data: Path) -> None:
    times = [int(row.ts.timestamp()) for row in read(data / "EURUSD_M1_202502.csv")]
    backfills = await watching(times[:1_000])
    asked_for = [
        backfill
        for i, ts in enumerate(times[1_000:])
        for backfill in backfills.on_accepted(SERIES, bars([ts]), 60.0 * i)
    ]
    assert asked_for == []
    hour = at("2025-02-24T05:00")
    assert backfills.on_accepted(SERIES, bars([hour]), 1e9, history=True) == ()


async def test_at_most_so_many_bars_back_and_so_many_spans(fortnight: list[int]) -> None:
    backfills = await watching(fortnight)
    far = fortnight[-1] + 3 * 86_400  # Friday noon: three days were lost
    ((first, last),) = asked(backfills.on_accepted(SERIES, bars([far]), 0.0))
    assert (first, last) == ("2025-02-18T12:00", f"{datetime.fromtimestamp(far - MINUTE, UTC):%Y-%m-%dT%H:%M}")
    day = Backfills(Memory(range(at("2025-01-01T00:00"), at("2025-02-01T00:00"), MINUTE)).load)
    day.on_accepted(SERIES, bars([at("2025-01-31T23:59")]), 0.0)
    await settled(day)
    much = at("2025-02-01T00:00") + (REACH + 2_000) * MINUTE
    ((first, _),) = asked(day.on_accepted(SERIES, bars([much]), 0.0))
    assert at(first) == much - REACH * MINUTE
    holes = [much + MINUTE + i * 1_200 for i in range(30)]
    assert len(day.on_accepted(SERIES, bars(holes), 1.0)) == SPANS


async def test_without_its_past_a_series_is_not_asked_for_until_it_is_read(fortnight: list[int]) -> None:
    memory = Memory(fortnight)
    backfills = Backfills(memory.load, max_series=2)
    after = at("2025-02-18T15:00")
    assert backfills.on_accepted(SERIES, bars([after]), 0.0) == ()  # a restarted gateway's first bar, after an outage
    memory.times.append(after)
    assert backfills.on_accepted(SERIES, bars([after + MINUTE]), 0.0) == ()
    await settled(backfills)
    assert asked(backfills.on_accepted(SERIES, [], 1.0)) == [("2025-02-18T12:00", "2025-02-18T14:59")]
    assert memory.loads == 1
    for symbol in ("A", "B", "C"):  # bounded: what was not heard of for longest is learnt anew
        backfills.on_accepted((symbol, "M1"), bars([after]), 2.0)
    await settled(backfills)
    assert backfills.on_accepted(SERIES, [], 3.0) == ()
    backfills.on_accepted(SERIES, bars([after + 2 * MINUTE]), 3.0)
    await settled(backfills)
    assert memory.loads == 4  # one was forgotten before its turn
    backfills.forget(SERIES)
    assert backfills.on_accepted(SERIES, [], 3.0) == ()


async def test_a_calendar_that_left_memory_is_read_again_and_what_was_asked_stays_asked(
    fortnight: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(fortnight)
    monkeypatch.setattr("actors.gateway.backfills.CALENDARS", 1)
    backfills = Backfills(memory.load)
    after = at("2025-02-18T15:00")
    backfills.on_accepted(SERIES, bars(fortnight[-1:]), 0.0)
    await settled(backfills)
    assert backfills.on_accepted(SERIES, bars([after]), 1.0)
    memory.times.append(after)
    other = ("GBPUSD", "M1")
    backfills.on_accepted(other, bars(fortnight[-1:]), 2.0)
    backfills.on_accepted(other, bars([after]), 2.0)
    await settled(backfills)
    answer = list(range(at("2025-02-18T12:00"), at("2025-02-18T13:00"), MINUTE))
    memory.times = sorted([*memory.times, *answer])
    assert backfills.on_accepted(SERIES, bars(answer), 3.0, history=True) == ()
    await settled(backfills)
    assert backfills.on_accepted(SERIES, [], 4.0) == ()
    assert asked(backfills.on_accepted(SERIES, [], 1.0 + PAUSES[0])) == [("2025-02-18T13:00", "2025-02-18T14:59")]


async def test_older_history_that_comes_later_teaches_the_sessions(data: Path) -> None:
    times = [int(row.ts.timestamp()) for row in read(data / "US30m_H1_202401.csv")][:2_000]
    backfills = Backfills(Memory(times[-200:]).load)
    series = ("US30m", "H1")
    backfills.on_accepted(series, bars(times[-1:]), 0.0)
    await settled(backfills)
    for start in range(0, 1_800, 600):
        backfills.on_accepted(series, bars(times[start : start + 600]), 1.0, history=True)
    step = 3_600
    until = [ts for ts in (int(r.ts.timestamp()) for r in read(data / "US30m_H1_202401.csv")) if ts > times[-1]][:400]
    assert [b for ts in until for b in backfills.on_accepted(series, bars([ts]), ts / step)] == []


async def test_the_past_comes_from_the_archive_and_the_log_behind_it(
    bus: Bus, nats_url: str, pg_url: str, store: Store, data: Path
) -> None:
    rows = without(read(data / "EURUSD_M1_202502.csv"), "2025-02-18T10:00", "2025-02-18T12:59")
    archived = [row for row in rows if row.ts.timestamp() < at("2025-02-18T09:00")]
    rest = rows[len(archived) : len(archived) + 200]
    pasts = Pasts(bus, store, no_clock)
    assert await pasts.load(*SERIES) is None
    async with running(Features, Recorder, nats_url=nats_url, database_url=pg_url, settings=Settings()):
        await put(bus, archived, history=True)
        async with asyncio.timeout(30):
            while (await store.holes(*SERIES, limit=REACH)) is None or len(
                await store.candles(*SERIES, limit=10_000)
            ) < len(archived):
                await asyncio.sleep(0.05)
    await put(bus, rest, size=1)  # nobody archives these
    backfills = Backfills(pasts.load)
    assert backfills.on_accepted(SERIES, rest[-1:], 0.0) == ()
    await settled(backfills)
    newest = int(rest[-1].ts.timestamp())
    assert asked(backfills.on_accepted(SERIES, bars([newest + MINUTE]), 1.0)) == [
        ("2025-02-18T10:00", "2025-02-18T12:59")
    ]
    alone = Backfills(Pasts(bus, None, no_clock).load)  # without an archive the log alone
    alone.on_accepted(SERIES, rest[-1:], 0.0)
    await settled(alone)
    assert asked(alone.on_accepted(SERIES, bars([newest + MINUTE]), 1.0)) == [("2025-02-18T10:00", "2025-02-18T12:59")]


async def test_an_archive_that_is_away_is_asked_again(bus: Bus) -> None:
    nowhere = await Store.connect("postgresql://mt5:secret@127.0.0.1:1/mt5", size=1, name="test")
    with pytest.raises(StoreUnavailable):
        await Pasts(bus, nowhere, no_clock).load(*SERIES)
    await nowhere.close()
