"""What POST /ingest survives on a real nats-server: monstrous names and bodies, more series than fit, a bus that hangs."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Final

import aiohttp
import asyncpg
import pytest

from actors.collector import Collector
from actors.features import Features
from actors.recorder import Recorder
from bus.client import Bus, BusUnavailable
from bus.subjects import CANDLES, FEATURES, FORMING, REJECTS
from bus.supervise import Context
from bus.telemetry import actor_restarts_total, rejected_total
from deploy.embedded import NatsServer
from deploy.server import free_port
from schema.messages import Candle, FormingCandle, Reject
from schema.settings import Features as FeatureSettings
from schema.settings import Gateway, Settings, Symbol
from tests.builders import read_until, running

BASE: Final = 1_735_776_000
OPEN: Final = {"open": 1.1, "high": 1.2, "low": 1.0, "close": 1.15, "volume": 7}
FAR: Final = {"open": 11.0, "high": 12.0, "low": 10.0, "close": 11.5}
MAX_PAYLOAD: Final = 1_048_576


def candle(minute: int = 0, symbol: str = "EURUSD", **more: Any) -> dict[str, Any]:
    return {"ts": BASE + 60 * minute, "symbol": symbol, "timeframe": "M1"} | OPEN | more


@dataclass(frozen=True)
class Gate:
    url: str
    http: aiohttp.ClientSession

    async def post(self, value: Any) -> tuple[int, dict[str, Any]]:
        data = io.BytesIO(value if isinstance(value, bytes) else json.dumps(value).encode())
        headers = {"Content-Type": "application/json"}
        async with self.http.post(f"{self.url}/ingest", data=data, headers=headers) as response:
            return response.status, await response.json()

    async def taken(self, value: Any) -> dict[str, Any]:
        status, body = await self.post(value)
        assert status == 200, (status, body)
        return body


@contextlib.asynccontextmanager
async def gateway(nats_url: str, *others: Any, database_url: str | None = None, **settings: Any) -> AsyncIterator[Gate]:
    port = free_port()
    wanted = Settings(gateway=Gateway(port=port), **settings)
    async with (
        running(Collector, *others, nats_url=nats_url, database_url=database_url, settings=wanted),
        aiohttp.ClientSession() as http,
    ):
        yield Gate(f"http://127.0.0.1:{port}", http)


@pytest.fixture
async def gate(bus: Bus, nats_url: str) -> AsyncIterator[Gate]:
    async with gateway(nats_url) as made:
        yield made


async def kept(bus: Bus, candles: int) -> list[Reject]:
    """Messages of REJECTS, as many as hold so many candles."""
    return await read_until(
        bus, REJECTS, lambda found: sum(len(r.payload["candles"]) for r in found) >= candles, seconds=5
    )


# --- the connection ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [True, False])
async def test_a_monstrous_symbol_is_rejected_and_the_gateway_lives_on(gate: Gate, bus: Bus, beside: bool) -> None:
    restarts = actor_restarts_total.value(actor="collector")
    long = "x" * 5_000
    body = {"symbol": long, "candles": [{"ts": BASE, "timeframe": "M1"} | OPEN]} if beside else candle(0, long)
    status, answer = await gate.post(body)
    assert (status, answer["rejected"]) == (422, [{"index": 0, "error": "symbol is longer than 64 bytes"}])
    assert (await gate.taken([candle(0), candle(1, long)]))["accepted"] == 1
    assert actor_restarts_total.value(actor="collector") == restarts
    assert len(await kept(bus, 2)) == 2


async def test_a_connection_that_is_closed_for_good_is_told(bus: Bus, nats_url: str) -> None:
    mine = await Bus.connect(nats_url, name="mine")
    lost = asyncio.create_task(mine.lost())
    await mine.nc.publish("x" * 5_000, b"")
    with pytest.raises(BusUnavailable, match="closed the connection for good .*aximum control line"):
        await asyncio.wait_for(lost, 5)
    at = datetime.fromtimestamp(BASE, UTC)
    row = Candle(ts=at, open=1.0, high=1.0, low=1.0, close=1.0, volume=1.0)
    shown = FormingCandle(symbol="EURUSD", timeframe="M1", candle=row, received_at=at)
    with pytest.raises(BusUnavailable):
        await mine.emit(FORMING, shown, "M1", "EURUSD")
    await mine.close()


async def test_a_connection_that_was_closed_on_purpose_is_not_lost(bus: Bus, nats_url: str) -> None:
    mine = await Bus.connect(nats_url, name="mine")
    await mine.close()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(mine.lost(), 0.5)


class Idle:
    """An actor that waits, and hands its connections to the test."""

    name: ClassVar[str] = "idle"
    description: ClassVar[str] = "Waits."
    lives: ClassVar[list[Bus]] = []

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    async def run(self) -> None:
        self.lives.append(self.ctx.bus)
        self.ctx.ready()
        await asyncio.Event().wait()


async def test_an_actor_whose_connection_is_closed_for_good_gets_a_new_one(bus: Bus, nats_url: str) -> None:
    Idle.lives.clear()
    async with running(Idle, nats_url=nats_url):
        await Idle.lives[0].nc.publish("x" * 5_000, b"")
        async with asyncio.timeout(10):
            while len(Idle.lives) < 2:
                await asyncio.sleep(0.01)
        assert Idle.lives[1].connected


# --- the body ----------------------------------------------------------------------------------------------------


async def test_candles_count_although_items_is_null(gate: Gate, bus: Bus) -> None:
    answer = await gate.taken({"items": None, "candles": [candle(0), candle(1, high=1.0)]})
    assert (answer["accepted"], [r["index"] for r in answer["rejected"]]) == (1, [1])
    answer = await gate.taken({"items": None, "candles": [candle(2), candle(3, close="x")]})
    assert (answer["accepted"], [r["index"] for r in answer["rejected"]]) == (1, [1])
    assert [r.payload["candles"][0]["candle"]["ts"] for r in await kept(bus, 2)] == [BASE + 60, BASE + 180]


async def test_rejected_candles_fit_the_bus_whatever_their_size(gate: Gate, bus: Bus) -> None:
    good, bad = candle(0), candle(1, high=1.0)
    note = "é" * 150_000
    bodies = [
        {"items": [good, bad | {"note": "x" * 1_000_000}]},
        {"items": [good, bad], "note": "x" * 1_000_000},
        {"items": [good, *(bad | {"note": note, "n": n} for n in range(3))]},
        {"items": [good, bad], **{f"f{n}": "x" * 20 for n in range(25_000)}},
        {"items": [good, bad], "x" * 1_000_000: 1},
        {"items": [good, bad | {"note": [1e15] * 40_000}]},
        {"items": [good, *([{}] * 4_990)]},
    ]
    counts = [1, 1, 3, 1, 1, 1, 4_990]
    for body, count in zip(bodies, counts, strict=True):
        data = json.dumps(body, ensure_ascii=False).replace("1000000000000000.0", "1E15").encode()
        assert len(data) <= 1_048_576
        answer = await gate.taken(data)
        assert (len(answer["rejected"]), answer["accepted"] + answer["duplicates"]) == (count, 1)
    found = await kept(bus, sum(counts))
    assert all(len(REJECTS.encode(reject)) < 0.75 * MAX_PAYLOAD for reject in found)
    assert {r["index"] for reject in found[-25:] for r in reject.payload["candles"]} == set(range(1, 4_991))
    cut = found[0].payload["candles"][0]["candle"]["truncated"]
    assert cut.startswith('{"ts":1735776060,') and cut.endswith("bytes)")
    size = len(json.dumps(bad | {"note": "x" * 1_000_000}, separators=(",", ":")))
    assert f"(cut: these are the first 1,000 of {size:,} bytes)" in cut
    beside = found[1].payload
    assert beside["candles"][0]["candle"] == bad
    assert beside["note"]["truncated"].endswith("(cut: these are the first 1,000 of 1,000,002 bytes)")
    assert [r.payload["candles"][0]["candle"]["note"] == note for r in found[2:5]] == [True] * 3, "what fits is whole"


async def test_a_number_that_no_float_holds_beside_a_rejected_candle_is_kept_as_its_text(gate: Gate, bus: Bus) -> None:
    rows = json.dumps([candle(0), candle(1, high=1.0)])
    answer = await gate.taken(b'{"note": 1e999, "deep": %s, "items": %s}' % (b"[" * 900 + b"]" * 900, rows.encode()))
    assert (answer["accepted"], len(answer["rejected"])) == (1, 1)
    (reject,) = await kept(bus, 1)
    assert reject.payload["note"] == "1e999"


# --- memory ------------------------------------------------------------------------------------------------------


async def test_more_series_than_memory_holds_are_taken_in_order_and_without_doubles(bus: Bus, nats_url: str) -> None:
    names = [f"S{n}" for n in range(6)]

    async def sender(gate: Gate, first: int) -> None:
        for i in range(12):
            picked = [names[(first + i + k) % len(names)] for k in range(3)]
            await gate.taken([candle(m, name) for name in picked for m in (max(i - 1, 0), i)])

    async with gateway(nats_url, features=FeatureSettings(max_series=1)) as gate:
        await asyncio.gather(*(sender(gate, n) for n in range(6)))
        assert (await gate.taken([candle(12, name) for name in names]))["accepted"] == len(names)
    rows = await read_until(bus, CANDLES, lambda found: sum(r.rows[-1].ts.minute == 12 for r in found) >= 6, seconds=5)
    blocks: dict[str, list[datetime]] = {}
    for block in rows:
        blocks.setdefault(block.symbol, []).extend(row.ts for row in block.rows)
    assert all(times[-1].minute == 12 for times in blocks.values())
    assert len(blocks) == len(names)


async def test_thousands_of_new_series_in_one_payload(gate: Gate, bus: Bus) -> None:
    answer = await gate.taken([candle(0, f"N{n}") for n in range(3_000)])
    assert answer["accepted"] == 3_000


# --- a bus that hangs --------------------------------------------------------------------------------------------


async def test_requests_that_queue_for_a_series_are_answered_within_two_seconds_as_well(
    gate: Gate, nats: NatsServer
) -> None:
    await gate.taken(candle(0))

    async def timed(value: Any) -> tuple[int, float]:
        started = time.monotonic()
        status, _ = await gate.post(value)
        return status, time.monotonic() - started

    assert nats.pid is not None
    os.kill(nats.pid, signal.SIGSTOP)
    try:
        values = [candle(1), candle(2), [candle(i) for i in range(1, 30)], candle(3), [candle(1), candle(1, "UNSEEN")]]
        found = await asyncio.gather(*map(timed, values))
    finally:
        os.kill(nats.pid, signal.SIGCONT)
    assert [status for status, _ in found] == [503] * len(values)
    assert max(seconds for _, seconds in found) < 2, found
    async with asyncio.timeout(20):
        while (await gate.post([candle(i) for i in range(1, 30)]))[0] == 503:
            await asyncio.sleep(0.05)


async def test_a_long_queue_before_a_slow_bus_that_answers_is_no_reason_to_send_again(
    gate: Gate, nats: NatsServer
) -> None:
    """The bus stands still for half a second before each answer or two: the last one waits far longer than 2 s."""
    await gate.taken(candle(0))
    pid = nats.pid
    assert pid is not None
    waiting = {asyncio.create_task(gate.post(candle(n))) for n in range(1, 13)}
    found: list[int] = []
    try:
        while waiting:
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(0.4)
            os.kill(pid, signal.SIGCONT)
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            found += [task.result()[0] for task in done]
    finally:
        os.kill(pid, signal.SIGCONT)
    assert found == [200] * 12


# --- what a bar is measured by -----------------------------------------------------------------------------------


async def test_a_bar_older_than_memory_is_measured_by_the_archive(bus: Bus, nats_url: str, pg_url: str) -> None:
    head, old = 50_000, 49_000
    connection = await asyncpg.connect(pg_url)
    await connection.execute(
        "INSERT INTO market_data (ts, symbol, timeframe, open, high, low, close, volume, spread, candles_seq, received_at)"
        " VALUES (to_timestamp($1), 'WITH', 'M1', 11.5, 11.5, 11.5, 11.5, 1, 0, 1, now())",
        BASE + 60 * (old - 7),
    )
    await connection.close()
    for name, url, accepted in (("WITH", pg_url, [1, 0]), ("WITHOUT", None, [0, 1])):
        async with gateway(nats_url, database_url=url) as gate:
            await gate.taken(candle(head, name))
            bars = [candle(old, name, **FAR), candle(old + 100, name)]
            assert [(await gate.post(bar))[1]["accepted"] for bar in bars] == accepted


async def test_after_a_restart_a_late_bar_at_the_logs_end_is_not_what_the_newest_is_measured_by(
    bus: Bus, nats_url: str, pg_url: str
) -> None:
    async with gateway(nats_url, Features, Recorder, database_url=pg_url) as gate:
        await gate.taken([candle(n, **FAR) for n in range(100, 110)])
        await gate.taken({"history": True, "items": [candle(n) for n in range(3)]})
        connection = await asyncpg.connect(pg_url)
        async with asyncio.timeout(20):
            while await connection.fetchval("SELECT count(*) FROM market_data") < 10:
                await asyncio.sleep(0.01)
        await connection.close()
    async with gateway(nats_url, database_url=pg_url) as gate:
        assert (await gate.taken(candle(111, **FAR)))["accepted"] == 1


# --- versions ----------------------------------------------------------------------------------------------------


async def test_a_confirmed_version_stands_although_the_gateway_is_started_again(bus: Bus, nats_url: str) -> None:
    def version(close: float, clock: int) -> dict[str, Any]:
        return {"source": "A", "server_time": BASE + clock, "gmt_time": BASE + clock, "items": [candle(0, close=close)]}

    async with gateway(nats_url, Features) as gate:
        await gate.taken(version(1.15, 100))
        await gate.taken(version(1.16, 120))
        answer = await gate.taken(version(1.16, 140))
        assert (answer["accepted"], answer["duplicates"]) == (0, 1)
        await gate.taken({"source": "A", "items": [candle(1)]})
    async with gateway(nats_url, Features) as gate:
        await gate.taken(version(1.17, 130))  # under way since before the last word
        await gate.taken({"source": "A", "items": [candle(2)]})
        blocks = await read_until(bus, FEATURES, lambda found: any(r.ts.minute == 2 for b in found for r in b.rows))
    closes = [row.close for block in blocks for row in block.rows if row.ts.minute == 0]
    assert closes == [1.15, 1.16]


# --- counted -----------------------------------------------------------------------------------------------------

CODES: Final[list[tuple[dict[str, Any], str]]] = [
    ({"close": "x"}, "type"),
    ({"symbol": ""}, "symbol"),
    ({"timeframe": "M7"}, "timeframe"),
    ({"ts": None}, "missing"),
    ({"ts": "yesterday"}, "time"),
    ({"ts": -60}, "before_1970"),
    ({"ts": BASE + 61}, "off_grid"),
    ({"low": 0.0}, "price"),
    ({"high": 1.0}, "high_low"),
    ({"volume": -1}, "amount"),
    ({"ts": "2100-01-01T00:00:00Z"}, "future"),
    (FAR, "jump"),
]
_NAMES: Final = (f"C{n}" for n in itertools.count())


async def test_rejected_candles_are_counted_by_reason(gate: Gate) -> None:
    before = {code: rejected_total.value(reason=code) for _, code in CODES}
    for change, _ in CODES:
        name = next(_NAMES)
        answer = await gate.taken([candle(0, name), candle(1, name) | change])
        assert len(answer["rejected"]) == 1
    found = Counter({code: int(rejected_total.value(reason=code) - before[code]) for _, code in CODES})
    assert found == Counter(code for _, code in CODES)
    async with gate.http.get(f"{gate.url}/metrics") as response:
        text = await response.text()
    lines = [line for line in text.splitlines() if line.startswith("mt5_rejected_candles_total{")]
    for _, code in CODES:
        assert any(f'reason="{code}"' in line and 'process="' in line for line in lines), code


async def test_a_bar_ahead_of_the_clock_by_one_is_taken_and_by_more_is_not(gate: Gate) -> None:
    minute = datetime.now(UTC).replace(second=0, microsecond=0).timestamp()
    ahead = [candle(0) | {"ts": minute + 60 * n} for n in (1, 3)]
    status, answer = await gate.post(ahead)
    assert (status, answer["forming"]) == (200, 1)
    assert answer["rejected"] == [{"index": 1, "error": "ts is more than one bar in the future"}]


async def test_non_positive_symbols_may_not_jump_either(bus: Bus, nats_url: str) -> None:
    async with gateway(nats_url, symbols={"WTI": Symbol(allow_non_positive=True)}) as gate:
        answer = await gate.taken([candle(0, "WTI"), candle(1, "WTI", **FAR), candle(2, "WTI", low=-40.0, close=-37.0)])
        assert (answer["accepted"], [r["index"] for r in answer["rejected"]]) == (2, [1])
