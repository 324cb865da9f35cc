"""Brokers' clocks on real servers: ledgers that survive, the gateway that learns, and the commands that set and restate."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import msgspec
import pytest

from actors.collector import Collector
from actors.core.clock import timeline
from actors.features import Features
from actors.recorder import Recorder
from bus.client import Bus
from bus.ledger import LedgerChanged, Ledgers, zone_steps
from bus.subjects import ALERTS, CANDLES
from deploy.server import free_port
from schema.clock import ClockBook, ClockLedger, ClockRun, PersonRule
from schema.messages import Alert, CandleBlock
from schema.settings import Clock, Gateway, Settings
from tests.builders import read_until, running

ROOT = Path(__file__).resolve().parents[2]
BROKER = "Broker-Demo"
HOUR = 3_600
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def book(**more: Any) -> ClockBook:
    return ClockBook(at=EPOCH, **more)


def ledger(source: str = BROKER, **more: Any) -> ClockLedger:
    seen = ClockRun(since=1_739_400_000, until=1_739_403_600, offset=2 * HOUR, origin="fields")
    return ClockLedger(source=source, books=(book(), book(runs=(seen,), **more)), openings={"EURUSD M1": (1, 2)})


# --- the bucket ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [BROKER, "", "Broker. >*%\\ Ltd", "Брокер", "~replay"])
async def test_a_ledger_comes_back_as_it_was(bus: Bus, source: str) -> None:
    assert await Ledgers(bus).load() == {}
    await Ledgers(bus).save(ledger(source))
    assert await Ledgers(bus).load() == {source: ledger(source)}
    assert await Ledgers(bus).get(source) == ledger(source)
    assert await Ledgers(bus).get("Another") is None


async def test_a_ledger_is_never_taken_for_none(bus: Bus) -> None:
    """nats-py's list of keys was empty once in some hundred times, on a busy connection: a start would forget every clock."""
    await Ledgers(bus).save(ledger())

    async def busy() -> None:
        while True:
            await bus.js.stream_info("CANDLES")

    others = [asyncio.create_task(busy()) for _ in range(5)]
    for _ in range(1_000):
        assert await Ledgers(bus).load() == {BROKER: ledger()}
    for other in others:
        other.cancel()


async def test_a_deleted_ledger_is_none(bus: Bus) -> None:
    await Ledgers(bus).save(ledger())
    bucket = await bus.js.key_value("clock")
    for key in await bus.keys("clock"):
        await bucket.delete(key)
    assert await Ledgers(bus).load() == {}
    assert await Ledgers(bus).get(BROKER) is None


async def test_of_two_writers_one_is_told_what_the_other_wrote(bus: Bus) -> None:
    one, other = Ledgers(bus), Ledgers(bus)
    await one.save(ledger())
    with pytest.raises(LedgerChanged) as caught:
        await other.save(ledger(family="new_york+7"))
    assert caught.value.theirs == ledger()
    await other.save(ledger(family="new_york+7"))
    with pytest.raises(LedgerChanged):
        await one.save(ledger())
    assert await one.get(BROKER) == ledger(family="new_york+7")


async def test_what_others_write_is_seen(bus: Bus) -> None:
    await Ledgers(bus).save(ledger("Earlier"))
    seen: asyncio.Queue[str] = asyncio.Queue()

    async def changed(new: ClockLedger, _: int) -> None:
        await seen.put(new.source)

    task = asyncio.create_task(Ledgers(bus).watch(changed))
    try:
        async with asyncio.timeout(10):
            assert await seen.get() == "Earlier"
            await Ledgers(bus).save(ledger("Later"))
            assert await seen.get() == "Later"
    finally:
        task.cancel()


# --- the gateway ---------------------------------------------------------------------------------------------------


@dataclass
class Gate:
    url: str
    http: aiohttp.ClientSession

    async def post(self, times: list[int], *, ok: bool = True, timeframe: str = "M1", **beside: Any) -> dict[str, Any]:
        candles = [{"time": at, "open": 1.1, "high": 1.2, "low": 1.0, "close": _close(at), "volume": 7} for at in times]
        body = {"symbol": "EURUSD", "timeframe": timeframe, "candles": candles, "source": BROKER} | beside
        async with self.http.post(f"{self.url}/ingest", json=body) as response:
            answer: dict[str, Any] = await response.json()
            assert response.status == 200 or not ok, answer
            return answer


def _close(at: int) -> float:
    """A price that tells the bar by its time in the sender's clock."""
    return 1.05 + at // 60 % 10_000 / 1e6


@asynccontextmanager
async def gateway(
    nats_url: str, *actors: Any, database_url: str | None = None, rule: Clock | None = None
) -> AsyncIterator[Gate]:
    port = free_port()
    settings = Settings(gateway=Gateway(port=port), clock={} if rule is None else {BROKER: rule})
    async with (
        running(Collector, *actors, nats_url=nats_url, database_url=database_url, settings=settings),
        aiohttp.ClientSession() as http,
    ):
        yield Gate(f"http://127.0.0.1:{port}", http)


def minute(now: float) -> int:
    return int(now) // 60 * 60


async def stored(bus: Bus, count: int) -> list[CandleBlock]:
    return await read_until(bus, CANDLES, lambda blocks: sum(len(b.rows) for b in blocks) >= count, seconds=10)


async def test_what_payloads_teach_survives_a_restart(bus: Bus, nats_url: str) -> None:
    now = int(time.time())
    opened = minute(now) - 120
    async with gateway(nats_url) as gate:
        await gate.post([opened + 3 * HOUR], server_time=now + 3 * HOUR, gmt_time=now)
    (block,) = await stored(bus, 1)
    assert (block.rows[0].ts.timestamp(), block.ts_source, block.source) == (opened, "server", BROKER)
    (kept,) = (await Ledgers(bus).load()).values()
    assert [(run.offset, run.origin) for run in kept.book.runs] == [(3 * HOUR, "fields")]
    async with gateway(nats_url) as gate:  # it has the clock still, though this payload does not tell it
        await gate.post([opened + 60 + 3 * HOUR])
    assert (await stored(bus, 2))[1].rows[0].ts.timestamp() == opened + 60


async def test_bars_from_the_future_are_inferred_and_alerted(bus: Bus, nats_url: str) -> None:
    now = minute(time.time())
    async with gateway(nats_url) as gate:
        answer = await gate.post([now - 60 + 7 * HOUR, now + 7 * HOUR])
        assert (answer["accepted"], answer["forming"]) == (1, 1)
    (block,) = await stored(bus, 1)
    assert (block.rows[0].ts.timestamp(), block.ts_source) == (now - 60, "inferred")
    alerts = await read_until(bus, ALERTS, bool, seconds=5)
    assert isinstance(alerts[0], Alert)
    assert (alerts[0].severity, alerts[0].check, alerts[0].source) == ("warning", "clock", BROKER)
    assert "+07:00" in alerts[0].message


async def test_a_senders_wrong_clock_is_alerted_unless_it_replays(bus: Bus, nats_url: str) -> None:
    now = int(time.time())
    async with gateway(nats_url) as gate:
        await gate.post([minute(now) - 3 * HOUR], server_time=now - 7_000, gmt_time=now - 7_000, replay=True)
        await gate.post([minute(now) - 2 * HOUR], server_time=now - 400, gmt_time=now - 400)
    alerts = await read_until(bus, ALERTS, bool, seconds=5)
    assert [alert.details["kind"] for alert in alerts] == ["skew"]


async def test_d1_and_h4_bars_of_a_broker_are_taken_and_others_are_off_the_grid(bus: Bus, nats_url: str) -> None:
    async with gateway(nats_url, rule=Clock(rule="new_york+7")) as gate:
        day = int(datetime(2025, 3, 10, tzinfo=UTC).timestamp())
        await gate.post([day - 86_400, day], timeframe="D1", history=True)
        answer = await gate.post([day + HOUR], timeframe="H4", history=True, ok=False)
        assert "off the grid of H4" in answer["rejected"][0]["error"]
    times = [row.ts for block in await stored(bus, 2) for row in block.rows]
    assert times == [datetime(2025, 3, 8, 22, tzinfo=UTC), datetime(2025, 3, 9, 21, tzinfo=UTC)]


# --- commands ------------------------------------------------------------------------------------------------------


@dataclass
class Mt5:
    """The command line on a test's servers."""

    home: Path
    nats: str
    database: str | None = None

    async def __call__(self, *words: str) -> tuple[int, str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MT5_")}
        env = inherited | {"MT5_HOME": str(self.home), "MT5_NATS_URL": self.nats, "PYTHONPATH": str(ROOT)}
        if self.database is not None:
            env["MT5_DATABASE_URL"] = self.database
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(ROOT / "runner.py"),
            *words,
            env=env,
            cwd=self.home,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            out, err = await asyncio.wait_for(process.communicate(), 60)
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    async def json(self, *words: str) -> Any:
        code, out, err = await self(*words, "--json")
        assert code == 0, err
        return json.loads(out)


@pytest.fixture
def mt5(tmp_path: Path, nats_url: str) -> Mt5:
    return Mt5(tmp_path, nats_url)


async def test_show_tells_what_is_known(bus: Bus, mt5: Mt5) -> None:
    assert "No source has told its clock yet" in (await mt5("clock", "show"))[1]
    said = PersonRule(rule="+03:00", since=1_739_500_000, reason="moved", by="ann")
    await Ledgers(bus).save(ledger(persons=(said,), family="new_york+7"))
    await Ledgers(bus).save(ClockLedger(source="", books=(book(),)))
    code, out, _ = await mt5("clock", "show")
    assert code == 0
    assert [line.split("  ")[0] for line in out.splitlines()] == ["source", "(unnamed)", BROKER]
    code, out, _ = await mt5("clock", "show", BROKER)
    assert code == 0
    assert "person (ann, moved)" in out
    assert "clock fields" in out
    assert "week openings" in out
    shown = await mt5.json("clock", "show", BROKER)
    assert (shown["offset"], shown["by"], shown["rule"]) == ("+03:00", "rule", "+03:00")
    assert msgspec.convert(shown["ledger"], ClockLedger).book.persons == (said,)
    code, _, err = await mt5("clock", "show", "Nobody")
    assert (code, err) == (1, f"mt5: Nothing is known of a clock of \"Nobody\": known are '', {BROKER}.\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("set", BROKER, "Mars/Base"), 'There is no time zone "Mars/Base"'),
        (("set", BROKER, "7pm"), '"7pm" is no rule for a clock'),
        (("set", BROKER, "utc+2", "--from", "yesterday"), "--from: 'yesterday' is neither RFC 3339"),
        (("restate", BROKER, "--timeframe", "M7"), '"M7" is no timeframe'),
    ],
)
async def test_wrong_use_is_one_sentence_and_exit_code_two(
    bus: Bus, mt5: Mt5, words: tuple[str, ...], says: str
) -> None:
    code, out, err = await mt5("clock", *words)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


async def test_set_without_a_gateway_is_taken_over_by_the_next(bus: Bus, nats_url: str, mt5: Mt5) -> None:
    code, out, _ = await mt5("clock", "set", BROKER, "Europe/Athens", "--reason", "support said so")
    assert code == 0
    assert "no gateway runs" in out
    kept = await Ledgers(bus).get(BROKER)
    assert kept is not None
    assert (kept.book.adopted, kept.book.persons[0].reason) == (False, "support said so")
    async with gateway(nats_url):
        pass
    taken = await Ledgers(bus).get(BROKER)
    assert taken is not None
    assert (taken.book.adopted, taken.book.at) == (True, kept.book.at)


async def test_set_is_in_force_at_a_running_gateway_when_the_command_returns(bus: Bus, nats_url: str, mt5: Mt5) -> None:
    opened = int(datetime(2025, 7, 1, 12, tzinfo=UTC).timestamp())
    async with gateway(nats_url) as gate:
        await gate.post([opened], history=True)
        code, out, err = await mt5("clock", "set", BROKER, "new_york+7")
        assert code == 0, err
        assert "the gateway has taken it over" in out
        assert f"mt5 clock restate {BROKER}" in out
        await gate.post([opened + 60], history=True)
        assert (await mt5("clock", "set", BROKER, "auto"))[0] == 0
        await gate.post([opened + 120], history=True)
    rows = [(block.rows[0].ts.timestamp() - opened, block.ts_source) for block in await stored(bus, 3)]
    assert rows == [(0, "utc"), (60 - 3 * HOUR, "rule"), (120, "utc")]
    kept = await Ledgers(bus).get(BROKER)
    assert kept is not None
    assert len(kept.books) == 3
    assert all(one.adopted for one in kept.books)


@pytest.fixture
async def archive(pg_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(pg_url)
    yield connection
    await connection.close()


async def bars(archive: asyncpg.Connection, timeframe: str = "M1") -> dict[int, tuple[float, str]]:
    rows = await archive.fetch(
        "SELECT ts, close, ts_source FROM market_data WHERE timeframe = $1 ORDER BY ts", timeframe
    )
    return {int(row["ts"].timestamp()): (row["close"], row["ts_source"]) for row in rows}


async def until(condition: Callable[[], Any], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.05)


async def test_a_restatement_moves_the_archive_to_where_a_right_clock_would_have_put_it(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection, mt5: Mt5
) -> None:
    mt5.database = pg_url
    line = timeline(book(rule="new_york+7"), zone_steps)
    start = int(datetime(2025, 3, 7, 18, tzinfo=UTC).timestamp())
    times = [start + 60 * i for i in range(180)] + [start + 51 * HOUR + 60 * i for i in range(180)]  # over a weekend
    days = [int(datetime(2025, 3, day, 12, tzinfo=UTC).timestamp()) for day in (4, 5, 6, 7, 10, 11)]
    days = [line.to_utc(line.to_server(at) // 86_400 * 86_400) for at in days]
    async with gateway(nats_url, Features, Recorder, database_url=pg_url) as gate:
        await gate.post([line.to_server(at) for at in times], history=True)
        await gate.post([line.to_server(at) for at in days], history=True, timeframe="D1")
        await until(lambda: _count(archive, len(times) + len(days)), "the archive holds what was sent")
        assert set(await bars(archive)) == {line.to_server(at) for at in times}  # as UTC, for want of a clue

        assert (await mt5("clock", "set", BROKER, "new_york+7"))[0] == 0
        plan = await mt5.json("clock", "restate", BROKER, "--dry-run")
        assert plan["done"] is False
        assert {one["timeframe"]: one["added"] for one in plan["series"]} == {"D1": len(days), "M1": len(times)}
        assert set(await bars(archive)) == {line.to_server(at) for at in times}

        code, out, err = await mt5("clock", "restate", BROKER)
        assert code == 0, err
        assert "Done" in out
        want = {at: (_close(line.to_server(at)), "rule") for at in times}

        async def moved() -> bool:
            return await bars(archive) == want and set(await bars(archive, "D1")) == set(days)

        await until(moved, "every bar is where its clock says it belongs")
        assert await archive.fetchval("SELECT count(*) FROM features WHERE timeframe = 'M1'") == len(times)
        again = await mt5.json("clock", "restate", BROKER)
        assert [(one["added"], one["withdrawn"], one["confirmed"]) for one in again["series"]] == [(0, 0, 0)] * 2
        assert "is where its clock says it belongs" in (await mt5("clock", "restate", BROKER))[1]


async def _count(archive: asyncpg.Connection, count: int) -> bool:
    return await archive.fetchval("SELECT count(*) FROM market_data") == count


async def test_a_restatement_that_was_interrupted_is_finished_by_the_next(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection, mt5: Mt5
) -> None:
    """The first run is killed at some point on its way; bars were stored over by then."""
    mt5.database = pg_url
    (mt5.home / "mt5.toml").write_text(f'[clock."{BROKER}"]\nrule = "+02:00"\n')
    start = int(datetime(2025, 7, 1, tzinfo=UTC).timestamp())
    times = [start + 60 * i for i in range(4_000)]
    async with gateway(nats_url, Features, Recorder, database_url=pg_url, rule=Clock(rule="+02:00")) as gate:
        await gate.post([at + HOUR for at in times], history=True)
        await until(lambda: _count(archive, len(times)), "the archive holds what was sent")
        assert (await mt5("clock", "set", BROKER, "utc+1"))[0] == 0
        before = (await bus.js.stream_info("CANDLES")).state.last_seq
        run = asyncio.create_task(mt5("clock", "restate", BROKER))
        await read_until(bus, CANDLES, bool, start=before + 1)
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        code, _, err = await mt5("clock", "restate", BROKER)
        assert code == 0, err
        want = {at: (_close(at + HOUR), "rule") for at in times}

        async def moved() -> bool:
            return await bars(archive) == want

        await until(moved, "every bar is where its clock says it belongs")


async def test_restate_follows_the_rule_of_the_settings(bus: Bus, nats_url: str, pg_url: str, mt5: Mt5) -> None:
    mt5.database = pg_url
    (mt5.home / "mt5.toml").write_text(f'[clock."{BROKER}"]\nrule = "new_york+7"\n')
    async with gateway(nats_url) as gate:
        await gate.post([1_751_328_000], history=True)
        code, _, err = await mt5("clock", "restate", BROKER)
        assert code == 1
        assert "start `mt5 up` again first" in err
    code, out, err = await mt5("clock", "restate", BROKER)
    assert code == 0, err
    assert "is where its clock says it belongs" in out  # nothing was archived
    kept = await Ledgers(bus).get(BROKER)
    assert kept is not None
    assert kept.book.rule == "new_york+7"
    code, _, err = await mt5("clock", "restate", "Nobody")
    assert (code, err.count("\n")) == (1, 1)


async def test_a_rule_that_cannot_be_used_keeps_the_gateway_from_starting(bus: Bus, nats_url: str) -> None:
    with pytest.raises(Exception, match=r'Clock\."Broker-Demo"\.rule: there is no time zone "Mars/Base"'):
        async with gateway(nats_url, rule=Clock(rule="Mars/Base")):
            pass
