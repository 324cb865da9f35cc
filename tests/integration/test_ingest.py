"""POST /ingest on a real nats-server: every accepted shape, every refusal, and what is stored when."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import pytest

from actors.collector import Collector
from bus.client import Bus
from bus.subjects import CANDLES, FORMING, REJECTS
from deploy.embedded import NatsServer
from deploy.server import free_port
from schema.messages import CandleBlock
from schema.settings import Gateway, Nats, Settings
from tests.builders import read_until, running

OPEN = {"open": 1.1, "high": 1.2, "low": 1.0, "close": 1.15, "volume": 7}
BASE = 1_735_776_000


def candle(minute: int = 0, **more: Any) -> dict[str, Any]:
    return {"ts": BASE + 60 * minute, "symbol": "EURUSD", "timeframe": "M1"} | OPEN | more


class Gate:
    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self.url = url
        self.http = http

    async def post(self, body: Any, **options: Any) -> tuple[int, dict[str, Any]]:
        data = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
        headers = {"Content-Type": "application/json"} | options.pop("headers", {})
        async with self.http.post(f"{self.url}/ingest", data=data, headers=headers, **options) as response:
            return response.status, await response.json()


@pytest.fixture
async def gate(bus: Bus, nats_url: str) -> AsyncIterator[Gate]:
    port = free_port()
    settings = Settings(gateway=Gateway(port=port, body_timeout=1.0), nats=Nats(publish_timeout=1.0))
    async with running(Collector, nats_url=nats_url, settings=settings), aiohttp.ClientSession() as http:
        yield Gate(f"http://127.0.0.1:{port}", http)


async def stored(bus: Bus, count: int) -> list[CandleBlock]:
    """Blocks on CANDLES, as many as hold ``count`` rows."""
    return await read_until(bus, CANDLES, lambda blocks: sum(len(b.rows) for b in blocks) >= count, seconds=5)


SHAPES: list[Any] = [
    candle(),
    [candle()],
    {"items": [candle()]},
    {"symbol": "EURUSD", "timeframe": "M1", "candles": [{"time": BASE, **OPEN}]},
    {"symbol": "EURUSD", "interval": "1m", "candles": [{"time": BASE * 1000, **OPEN}]},
    {k: v for k, v in candle(tick_volume=7).items() if k != "volume"},
    candle(ts="2025-01-02T00:00:00Z"),
    candle(ts="2025-01-02T02:00:00+02:00"),
    candle(spread=None, real_volume=None, comment="unknown fields are let pass"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
async def test_every_accepted_shape_stores_the_same_candle(gate: Gate, bus: Bus, shape: Any) -> None:
    status, body = await gate.post(shape)
    assert (status, body) == (
        200,
        {"received": 1, "accepted": 1, "duplicates": 0, "forming": 0, "rejected": [], "backfill": []},
    )
    (block,) = await stored(bus, 1)
    assert (block.symbol, block.timeframe) == ("EURUSD", "M1")
    (row,) = block.rows
    assert (row.ts, row.open, row.high, row.low, row.close, row.volume) == (
        datetime(2025, 1, 2, tzinfo=UTC),
        1.1,
        1.2,
        1.0,
        1.15,
        7.0,
    )


async def test_gzip_and_a_trailing_nul(gate: Gate, bus: Bus) -> None:
    packed = gzip.compress(json.dumps(candle()).encode() + b"\0")
    status, body = await gate.post(packed, headers={"Content-Encoding": "gzip"})
    assert (status, body["accepted"]) == (200, 1)


async def test_history_travels_in_blocks_and_few_candles_one_by_one(gate: Gate, bus: Bus) -> None:
    rows = [candle(i) for i in range(2_500)]
    assert (await gate.post({"items": rows, "history": True}))[1]["accepted"] == 2_500
    assert (await gate.post([candle(2_500), candle(2_501)]))[1]["accepted"] == 2
    blocks = await stored(bus, 2_502)
    assert [len(b.rows) for b in blocks] == [1_000, 1_000, 500, 1, 1]
    assert [b.history for b in blocks] == [True] * 3 + [False] * 2
    times = [row.ts for b in blocks for row in b.rows]
    assert times == sorted(times)


async def test_repeats_are_counted_and_not_stored_again(gate: Gate, bus: Bus) -> None:
    await gate.post([candle(0), candle(1)])
    status, body = await gate.post([candle(1), candle(0), candle(2), candle(2)])
    assert (status, body["accepted"], body["duplicates"]) == (200, 1, 3)
    assert (await bus.js.stream_info("CANDLES")).state.messages == 3


async def test_a_restarted_gateway_knows_the_newest_bars_from_the_log(bus: Bus, nats_url: str) -> None:
    port = free_port()
    settings = Settings(gateway=Gateway(port=port))
    for expected in ({"accepted": 1, "duplicates": 0}, {"accepted": 0, "duplicates": 1}):
        async with running(Collector, nats_url=nats_url, settings=settings), aiohttp.ClientSession() as http:
            _, body = await Gate(f"http://127.0.0.1:{port}", http).post(candle())
            assert {k: body[k] for k in expected} == expected


async def test_forming_bars_are_shown_and_never_stored(gate: Gate, bus: Bus) -> None:
    minute = datetime.now(UTC).replace(second=0, microsecond=0)
    seen: asyncio.Queue[bytes] = asyncio.Queue()
    sub = await bus.nc.subscribe(FORMING.wildcard)
    rows = [
        candle(ts=(minute - timedelta(minutes=1)).isoformat()),
        candle(ts=minute.isoformat(), closed=False),
    ]
    status, body = await gate.post(rows)
    assert (status, body["accepted"], body["forming"]) == (200, 1, 1)
    message = await sub.next_msg(timeout=5)
    assert FORMING.decode(message.data).candle.ts == minute
    assert seen.empty()
    assert sum(len(b.rows) for b in await stored(bus, 1)) == 1


async def test_broker_time_is_converted_and_its_clock_closes_the_bar(gate: Gate, bus: Bus) -> None:
    gmt = BASE + 600
    payload = {
        "symbol": "EURUSD",
        "timeframe": "M1",
        "source": "Broker-Demo",
        "server_time": gmt + 7_200,
        "gmt_time": gmt + 3,
        "candles": [{"time": gmt + 7_200 - 120, **OPEN}, {"time": gmt + 7_200, **OPEN, "close": 1.16}],
    }
    status, body = await gate.post(payload)
    assert (status, body["accepted"], body["forming"]) == (200, 1, 1)
    (block,) = await stored(bus, 1)
    assert block.rows[0].ts == datetime.fromtimestamp(gmt - 120, UTC)
    assert (block.source, block.ts_source) == ("Broker-Demo", "server")


REJECTIONS: list[tuple[dict[str, Any], str]] = [
    ({"symbol": ""}, "symbol is missing or empty"),
    ({"symbol": "A\nB"}, "symbol has control characters or outer spaces"),
    ({"symbol": "x" * 65}, "symbol is longer than 64 bytes"),
    ({"timeframe": "M7"}, "timeframe 'M7' is unknown"),
    ({"high": 1.12}, "high 1.12 is below open or close"),
    ({"low": 1.12}, "low 1.12 is above open or close"),
    ({"low": 0.0}, "low 0.0 is not positive"),
    ({"volume": -1}, "volume is negative"),
    ({"spread": -1}, "spread is negative"),
    ({"volume": 2**63}, "volume is not below 2^63"),
    ({"close": "1.15"}, "close: Expected `float`, got `str`"),
    ({"close": True}, "close: Expected `float`, got `bool`"),
    ({"ts": BASE + 30}, "ts 2025-01-02T00:00:30Z is off the grid of M1"),
    ({"ts": 4_102_444_800}, "ts is more than one bar in the future"),
    ({"ts": -60}, "ts is before 1970"),
    ({"ts": "yesterday"}, "ts 'yesterday' is neither RFC 3339"),
    ({"ts": None}, "ts (or time) is missing"),
]


@pytest.mark.parametrize(("change", "reason"), REJECTIONS, ids=[r for _, r in REJECTIONS])
async def test_a_bad_candle_is_rejected_with_its_reason_and_the_others_are_taken(
    gate: Gate, bus: Bus, change: dict[str, Any], reason: str
) -> None:
    bad = candle(1) | change
    status, body = await gate.post([candle(0), bad, candle(2)])
    assert (status, body["accepted"]) == (200, 2)
    (rejected,) = body["rejected"]
    assert rejected["index"] == 1
    assert rejected["error"].startswith(reason)
    (kept,) = await read_until(bus, REJECTS, lambda kept: len(kept) == 1, seconds=5)
    assert kept.reason == rejected["error"]
    assert kept.payload["candles"][0]["candle"].items() >= {k: v for k, v in bad.items() if v is not None}.items()
    status, body = await gate.post(bad)
    assert (status, len(body["rejected"])) == (422, 1)


async def test_a_jump_is_rejected_and_a_split_is_not(gate: Gate) -> None:
    far = {"open": 11.0, "high": 12.0, "low": 10.0, "close": 11.5}
    _, body = await gate.post([candle(0), candle(1, **far), candle(2)])
    assert [r["index"] for r in body["rejected"]] == [1]
    assert "price jumps from 1.15" in body["rejected"][0]["error"]
    _, body = await gate.post([candle(i, **far) for i in range(3, 7)])
    assert (body["accepted"], body["rejected"]) == (4, [])


WHOLE: list[tuple[bytes, int]] = [
    (b"", 400),
    (b"{} {}", 400),
    (b'{"replay": true, "gmt_time": 1e17, "items": []}', 422),
    (b'{"close": NaN}', 400),
    (b'[{"close": 1e999}]', 400),
    (b"[" * 100_000, 400),
    (b"\xff{}", 400),
    (b"\xef\xbb\xbf{}", 400),
    (b'{"symbol": "\\ud800"}', 400),
    (json.dumps(candle()).encode() + b"\0\0", 400),
    (b"7", 422),
    (b'"candle"', 422),
    (b"[]", 422),
    (b"{}", 422),
    (b'{"items": 3}', 422),
    (b'{"items": [], "history": "yes"}', 422),
    (json.dumps([candle(i) for i in range(5_001)]).encode(), 413),
    (b" " * 1_048_577, 413),
]


@pytest.mark.parametrize(("body", "status"), WHOLE, ids=range(len(WHOLE)))
async def test_a_bad_payload_gets_its_answer_and_stores_nothing(gate: Gate, bus: Bus, body: bytes, status: int) -> None:
    found, answer = await gate.post(body)
    assert (found, set(answer)) == (status, {"error"})
    assert answer["error"].endswith((".", "?"))
    assert (await bus.js.stream_info("CANDLES")).state.messages == 0
    assert (await gate.post(candle()))[0] == 200


async def test_wrong_type_and_a_body_that_does_not_come(gate: Gate) -> None:
    assert (await gate.post(candle(), headers={"Content-Type": "text/csv"}))[0] == 415

    async def trickle() -> AsyncIterator[bytes]:
        yield b"["
        await asyncio.Event().wait()

    async with gate.http.post(
        f"{gate.url}/ingest", data=trickle(), headers={"Content-Type": "application/json"}
    ) as response:
        assert response.status == 408


async def test_503_while_the_bus_is_away_and_sending_again_is_safe(gate: Gate, bus: Bus, nats: NatsServer) -> None:
    await gate.post(candle(0))
    nats.stop()
    async with asyncio.timeout(2.5):
        async with gate.http.post(f"{gate.url}/ingest", json=candle(1)) as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "1"
    nats.start()
    async with asyncio.timeout(20):
        while (await gate.post(candle(1)))[0] == 503:
            pass
    assert sum(len(b.rows) for b in await stored(bus, 2)) == 2


async def test_a_full_stream_answers_503_and_drops_nothing(gate: Gate, bus: Bus) -> None:
    await gate.post(candle(0))
    config = (await bus.js.stream_info("CANDLES")).config
    config.max_bytes = 600
    await bus.js.update_stream(config)
    statuses = [(await gate.post(candle(i)))[0] for i in range(1, 5)]
    assert statuses[-1] == 503
    config.max_bytes = 2**30
    await bus.js.update_stream(config)
    assert [(await gate.post(candle(i)))[0] for i in range(1, 5)] == [200] * 4
    assert sum(len(b.rows) for b in await stored(bus, 5)) == 5


async def test_many_senders_of_one_series_keep_its_order(gate: Gate, bus: Bus) -> None:
    async def sender(offset: int) -> None:
        for i in range(20):
            await gate.post([candle(j) for j in range(max(0, i - 3), i + 1)])

    await asyncio.gather(*(sender(n) for n in range(8)))
    times = [row.ts for b in await stored(bus, 20) for row in b.rows]
    assert times == sorted(set(times))
    assert len(times) == 20
