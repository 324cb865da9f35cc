"""What POST /ingest says, word by word: the table that senders program against, on a real nats-server."""

from __future__ import annotations

import asyncio
import gzip
import io
import itertools
import json
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any, Final

import aiohttp
import pytest
import pytest_asyncio

from actors.collector import Collector
from bus import topology
from bus.client import Bus
from bus.subjects import REJECTS
from deploy.embedded import NatsServer
from deploy.server import free_port
from schema.settings import Gateway, Nats, Settings, Streams
from tests.builders import read_until, running
from tests.servers import OPERATOR, nats_server

pytestmark = pytest.mark.asyncio(loop_scope="module")

JSON: Final = {"Content-Type": "application/json"}
GZIP: Final = JSON | {"Content-Encoding": "gzip"}
OPEN: Final = {"open": 1.1, "high": 1.2, "low": 1.0, "close": 1.15, "volume": 7}
BASE: Final = 1_735_776_000  # 2025-01-02T00:00:00Z
BODY_TIMEOUT: Final = 0.4  # five seconds in service; a test of the default stands below
_NAMES: Final = (f"S{n}" for n in itertools.count())


def candle(minute: int = 0, symbol: str = "EURUSD", **more: Any) -> dict[str, Any]:
    return {"ts": BASE + 60 * minute, "symbol": symbol, "timeframe": "M1"} | OPEN | more


@dataclass(frozen=True)
class Answer:
    status: int
    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def error(self) -> str:
        assert set(self.body) == {"error"}, self.body
        return str(self.body["error"])


@dataclass(frozen=True)
class Door:
    """A running gateway and a client for it."""

    url: str
    http: aiohttp.ClientSession
    bus: Bus
    server: NatsServer

    async def post(self, body: Any, headers: dict[str, str] = JSON) -> Answer:
        if isinstance(body, bytes):
            body = io.BytesIO(body)
        elif not hasattr(body, "__aiter__"):
            body = io.BytesIO(json.dumps(body).encode())
        async with self.http.post(f"{self.url}/ingest", data=body, headers=headers) as response:
            assert response.content_type == "application/json"
            return Answer(response.status, await response.json(), dict(response.headers))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def door(server_folder: Path) -> AsyncIterator[Door]:
    async for made in _door(server_folder, Gateway(body_timeout=BODY_TIMEOUT)):
        yield made


async def _door(folder: Path, gateway: Gateway) -> AsyncIterator[Door]:
    port = free_port()
    settings = Settings(
        gateway=Gateway(**{name: getattr(gateway, name) for name in gateway.__struct_fields__} | {"port": port}),
        nats=Nats(),
    )
    with nats_server(Path(tempfile.mkdtemp(prefix="nats-", dir=folder))) as server:
        url = server.url(OPERATOR)
        bus = await Bus.connect(url, name="operator")
        await topology.apply(bus, Streams())
        async with running(Collector, nats_url=url, settings=settings), aiohttp.ClientSession() as http:
            yield Door(f"http://127.0.0.1:{port}", http, bus, server)
        await bus.close()


_PACKED: Final = gzip.compress(json.dumps(candle()).encode())
BROKEN: Final = _PACKED[:-8] + bytes(8)  # of another checksum

# --- the body ----------------------------------------------------------------------------------------------------

BODIES: Final[list[tuple[str, bytes, dict[str, str], int, str]]] = [
    ("empty", b"", JSON, 400, "The body is empty: send a candle, or an array of candles, as JSON."),
    ("a NUL alone", b"\0", JSON, 400, "The body is empty: send a candle, or an array of candles, as JSON."),
    (
        "two documents",
        b"{} {}",
        JSON,
        400,
        "The body is not one JSON document: JSON is malformed: trailing characters (byte 4).",
    ),
    ("cut short", b'[{"ts": 1', JSON, 400, "The body is not one JSON document: Input data was truncated."),
    (
        "NaN",
        b'{"close": NaN}',
        JSON,
        400,
        "The body is not one JSON document: JSON is malformed: invalid character (byte 10).",
    ),
    (
        "NaN in a whole candle",
        json.dumps(candle(close=float("nan"))).encode(),
        JSON,
        400,
        "The body is not one JSON document: JSON is malformed: invalid character (byte 105).",
    ),
    (
        "Infinity",
        json.dumps([candle(high=float("inf"))]).encode(),
        JSON,
        400,
        "The body is not one JSON document: JSON is malformed: invalid character (byte 80).",
    ),
    (
        "1e999",
        b'[{"close": 1e999}]',
        JSON,
        400,
        "The JSON holds a number that no float can hold: Number out of range - at `$[0][...]`.",
    ),
    (
        "1e999 in a whole candle",
        json.dumps(candle()).replace("1.15", "1e999").encode(),
        JSON,
        400,
        "The JSON holds a number that no float can hold: Number out of range - at `$[...]`.",
    ),
    ("100,000 brackets", b"[" * 100_000, JSON, 400, "The JSON is nested too deeply: candles need three levels."),
    (
        "100,000 brackets, closed",
        b"[" * 100_000 + b"]" * 100_000,
        JSON,
        400,
        "The JSON is nested too deeply: candles need three levels.",
    ),
    ("100,000 braces", b'{"items":' * 100_000, JSON, 400, "The JSON is nested too deeply: candles need three levels."),
    ("invalid UTF-8", b'{"symbol": "\xff"}', JSON, 400, "The body is not UTF-8 at byte 12: send JSON in UTF-8."),
    (
        "BOM",
        b"\xef\xbb\xbf" + json.dumps(candle()).encode(),
        JSON,
        400,
        "The body starts with a byte order mark: send UTF-8 without one.",
    ),
    (
        "UTF-16",
        json.dumps(candle()).encode("utf-16"),
        JSON,
        400,
        "The body starts with a byte order mark: send UTF-8 without one.",
    ),
    ("lone surrogate", b'{"symbol": "\\ud800"}', JSON, 400, "The JSON holds a lone surrogate: send text in UTF-8."),
    (
        "lone surrogate in a whole candle",
        json.dumps(candle(symbol="\ud83d")).encode(),
        JSON,
        400,
        "The JSON holds a lone surrogate: send text in UTF-8.",
    ),
    (
        "two trailing NULs",
        json.dumps(candle()).encode() + b"\0\0",
        JSON,
        400,
        "The body holds a NUL byte: one is allowed, at its very end.",
    ),
    ("NUL inside", b'{"symbol": "A\0"}', JSON, 400, "The body holds a NUL byte: one is allowed, at its very end."),
    (
        "CSV",
        b"ts,open",
        {"Content-Type": "text/csv"},
        415,
        "The body's type is text/csv: send JSON with the header Content-Type: application/json.",
    ),
    (
        "a form",
        b"a=b",
        {"Content-Type": "application/x-www-form-urlencoded"},
        415,
        "The body's type is application/x-www-form-urlencoded: send JSON with the header Content-Type: application/json.",
    ),
    (
        "brotli",
        b"{}",
        JSON | {"Content-Encoding": "br"},
        415,
        "The body is packed with br: send it with gzip or as it is.",
    ),
    (
        "over 1 MiB",
        b" " * 1_048_577,
        JSON,
        413,
        "The body is over 1,048,576 bytes, packed or unpacked: send fewer candles at a time.",
    ),
    (
        "over 5,000 candles",
        json.dumps([candle(i) for i in range(5_001)]).encode(),
        JSON,
        413,
        "5,001 candles are over 5,000: send fewer at a time.",
    ),
    (
        "gzip bomb",
        gzip.compress(b" " * 50_000_000),
        GZIP,
        413,
        "The body is over 1,048,576 bytes, packed or unpacked: send fewer candles at a time.",
    ),
    (
        "broken gzip",
        BROKEN,
        GZIP,
        400,
        "The body is not gzip (Error -3 while decompressing data: incorrect data check): pack it again.",
    ),
    (
        "no gzip",
        json.dumps(candle()).encode(),
        GZIP,
        400,
        "The body is not gzip (Error -3 while decompressing data: incorrect header check): pack it again.",
    ),
    (
        "gzip cut short",
        gzip.compress(json.dumps(candle()).encode())[:-9],
        GZIP,
        400,
        "The gzip body is cut short: pack it again and send it whole.",
    ),
    (
        "a number",
        b"7",
        JSON,
        422,
        "The body is neither a candle, an array of candles, nor an object with items or candles.",
    ),
    (
        "a string",
        b'"candle"',
        JSON,
        422,
        "The body is neither a candle, an array of candles, nor an object with items or candles.",
    ),
    (
        "null",
        b"null",
        JSON,
        422,
        "The body is neither a candle, an array of candles, nor an object with items or candles.",
    ),
    ("no candle", b"[]", JSON, 422, "The body holds no candle: send at least one."),
    (
        "an empty object",
        b"{}",
        JSON,
        422,
        "The body holds no candle: send one, an array, or an object with items or candles.",
    ),
    ("items no array", b'{"items": 3}', JSON, 422, "items (or candles) must be an array of candles."),
    (
        "history no boolean",
        json.dumps({"items": [candle()], "history": "yes"}).encode(),
        JSON,
        422,
        "Beside the candles: history: Expected `bool`, got `str`.",
    ),
    (
        "server_time no number",
        json.dumps({"items": [candle()], "server_time": "now"}).encode(),
        JSON,
        422,
        "Beside the candles: server_time: Expected `int | float | null`, got `str`.",
    ),
]


@pytest.mark.parametrize(("body", "headers", "status", "error"), [b[1:] for b in BODIES], ids=[b[0] for b in BODIES])
async def test_a_bad_body(door: Door, body: bytes, headers: dict[str, str], status: int, error: str) -> None:
    before = (await door.bus.js.stream_info("CANDLES")).state.messages
    answer = await door.post(body, headers)
    assert (answer.status, answer.error) == (status, error)
    assert (await door.bus.js.stream_info("CANDLES")).state.messages == before


# --- the candle --------------------------------------------------------------------------------------------------

SOON: Final = datetime.now(UTC).replace(second=0, microsecond=0) + timedelta(
    days=1
)  # of the collection: a long run gets here minutes later
REASONS: Final[list[tuple[str, dict[str, Any], str]]] = [
    ("symbol empty", {"symbol": ""}, "symbol is missing or empty"),
    ("symbol absent", {"symbol": None}, "symbol is missing or empty"),
    ("symbol a number", {"symbol": 7}, "symbol: Expected `str | null`, got `int`"),
    ("symbol with a newline", {"symbol": "A\nB"}, "symbol has control characters or outer spaces"),
    ("symbol with a NUL", {"symbol": "A\0"}, "symbol has control characters or outer spaces"),
    ("symbol with DEL", {"symbol": "A\x7f"}, "symbol has control characters or outer spaces"),
    ("symbol with C1", {"symbol": "A\x85B"}, "symbol has control characters or outer spaces"),
    ("symbol turned around", {"symbol": "A\u202eB"}, "symbol has control characters or outer spaces"),
    ("symbol with outer spaces", {"symbol": " A"}, "symbol has control characters or outer spaces"),
    ("symbol of 65 bytes", {"symbol": "x" * 65}, "symbol is longer than 64 bytes"),
    ("symbol of 66 bytes in 33 letters", {"symbol": "é" * 33}, "symbol is longer than 64 bytes"),
    (
        "timeframe unknown",
        {"timeframe": "M7"},
        "timeframe 'M7' is unknown: use one of M1, M2, M3, M4, M5, M6, M10, M12, M15, M20, M30, H1, H2, H3, H4, H6, H8, H12, D1, W1, MN1",
    ),
    ("timeframe absent", {"timeframe": None}, "timeframe is missing"),
    ("timeframe a number", {"timeframe": 1}, "timeframe: Expected `str | null`, got `int`"),
    ("high below low", {"high": 1.0, "low": 1.2}, "high 1.0 is below open or close"),
    ("high below close", {"high": 1.12}, "high 1.12 is below open or close"),
    ("high below open", {"open": 1.3}, "high 1.2 is below open or close"),
    ("low above open", {"open": 0.9}, "low 1.0 is above open or close"),
    ("low above close", {"low": 1.12}, "low 1.12 is above open or close"),
    ("open 0", {"open": 0}, "open 0.0 is not positive"),
    ("low 0", {"low": 0.0}, "low 0.0 is not positive"),
    ("close negative", {"close": -1.15}, "close -1.15 is not positive"),
    ("volume negative", {"volume": -1}, "volume is negative"),
    ("spread negative", {"spread": -1}, "spread is negative"),
    ("real volume negative", {"real_volume": -0.5}, "real_volume is negative"),
    ("volume absent", {"volume": None}, "volume (or tick_volume) is missing"),
    ("open absent", {"open": None}, "Object missing required field `open`"),
    ("close as text", {"close": "12"}, "close: Expected `float`, got `str`"),
    ("close true", {"close": True}, "close: Expected `float`, got `bool`"),
    ("volume as text", {"volume": "12"}, "volume: Expected `int | float`, got `str`"),
    ("volume true", {"volume": True}, "volume: Expected `int | float`, got `bool`"),
    ("spread as text", {"spread": "12"}, "spread: Expected `int | float | null`, got `str`"),
    ("closed a number", {"closed": 1}, "closed: Expected `bool | null`, got `int`"),
    ("volume 2^63", {"volume": 2**63}, "volume is not below 2^63"),
    ("volume 2^64", {"volume": 2**64}, "volume is not below 2^63"),
    ("volume 1e300", {"volume": 1e300}, "volume is not below 2^63"),
    ("real volume 2^63", {"real_volume": 2**63}, "real_volume is not below 2^63"),
    ("off the grid", {"ts": BASE + 30}, "ts 2025-01-02T00:00:30Z is off the grid of M1"),
    ("off the grid of H1", {"ts": BASE + 60, "timeframe": "1h"}, "ts 2025-01-02T00:01:00Z is off the grid of H1"),
    ("half a second", {"ts": BASE + 60.5}, "ts is not a whole second: bars open on whole minutes"),
    ("in the future", {"ts": int(SOON.timestamp())}, "ts is more than one bar in the future"),
    ("in 2100", {"ts": "2100-01-01T00:00:00Z"}, "ts is more than one bar in the future"),
    ("before 1970", {"ts": -60}, "ts is before 1970"),
    ("before 1970 as text", {"ts": "1969-12-31T23:59:00Z"}, "ts is before 1970"),
    ("after 9999", {"ts": 99_999_999_999_999_000}, "ts is after the year 9999"),
    ("no time", {"ts": "yesterday"}, "ts 'yesterday' is neither RFC 3339 (2025-02-13T01:33:00Z) nor an epoch number"),
    ("time true", {"ts": True}, "ts: Expected `int | float | str | null`, got `bool`"),
    ("time absent", {"ts": None}, "ts (or time) is missing"),
    (
        "jump up",
        {"open": 3.0, "high": 3.2, "low": 2.9, "close": 3.1},
        "price jumps from 1.15 (over twice, or under half)",
    ),
    (
        "jump down",
        {"open": 0.5, "high": 0.52, "low": 0.49, "close": 0.5},
        "price jumps from 1.15 (over twice, or under half)",
    ),
    ("jump of the high alone", {"high": 2.4}, "price jumps from 1.15 (over twice, or under half)"),
    ("jump of the low alone", {"low": 0.5}, "price jumps from 1.15 (over twice, or under half)"),
]


@pytest.mark.parametrize(("change", "reason"), [r[1:] for r in REASONS], ids=[r[0] for r in REASONS])
async def test_a_bad_candle_is_rejected_by_index_and_the_others_are_taken(
    door: Door, change: dict[str, Any], reason: str
) -> None:
    name = next(_NAMES)
    bad = {k: v for k, v in (candle(1, name) | change).items() if v is not None}
    before = (await door.bus.js.stream_info("REJECTS")).state.last_seq
    answer = await door.post([candle(0, name), bad, candle(2, name)])
    assert answer.body == {
        "received": 3,
        "accepted": 2,
        "duplicates": 0,
        "forming": 0,
        "rejected": [{"index": 1, "error": reason}],
        "backfill": [],
    }
    assert answer.status == 200
    (kept,) = await read_until(door.bus, REJECTS, lambda found: len(found) == 1, start=before + 1, seconds=5)
    assert kept.reason == reason
    assert kept.payload["candles"][0]["error"] == reason
    if not reason.startswith("price jumps"):  # three bars in a row that agree are no jump: the next test's matter
        alone = await door.post(bad)
        assert (alone.status, alone.body["accepted"], alone.body["rejected"]) == (
            422,
            0,
            [{"index": 0, "error": reason}],
        )


async def test_three_bars_that_agree_are_a_split_and_two_are_a_jump(door: Door) -> None:
    name = next(_NAMES)
    far = {"open": 11.0, "high": 12.0, "low": 10.0, "close": 11.5}
    jump = "price jumps from 1.15 (over twice, or under half)"
    answer = await door.post([candle(0, name), candle(1, name, **far), candle(2, name, **far), candle(3, name)])
    assert (answer.status, answer.body["accepted"], answer.body["rejected"]) == (
        200,
        2,
        [{"index": 1, "error": jump}, {"index": 2, "error": jump}],
    )
    answer = await door.post([candle(i, name, **far) for i in range(4, 8)])
    assert (answer.status, answer.body["accepted"], answer.body["rejected"]) == (200, 4, [])


async def test_one_trailing_nul_is_taken_and_so_is_what_is_unusual_but_right(door: Door) -> None:
    for body, headers in (
        (json.dumps(candle(0, next(_NAMES))).encode() + b"\0", JSON),
        (gzip.compress(json.dumps(candle(0, next(_NAMES))).encode() + b"\0"), GZIP),
        (json.dumps(candle(0, next(_NAMES))).encode(), {"Content-Type": "application/json; charset=utf-8"}),
        (json.dumps(candle(0, "x" * 64)).encode(), JSON),
        (json.dumps(candle(0, next(_NAMES), volume=2**63 - 1024, spread=None)).encode(), JSON),
        (b" \r\n" + json.dumps([candle(0, next(_NAMES))], indent=1).encode() + b"\r\n", JSON),
        (json.dumps([candle(i, "MANY") for i in range(5_000)], separators=(",", ":")).encode(), JSON),
    ):
        answer = await door.post(body, headers)
        assert (answer.status, answer.body["rejected"]) == (200, [])
        assert answer.body["accepted"] == answer.body["received"] >= 1


# --- time, keys and allowances -----------------------------------------------------------------------------------


def _trickle(gap: float) -> AsyncIterator[bytes]:
    async def bytes_one_by_one() -> AsyncIterator[bytes]:
        for byte in json.dumps(candle()).encode():
            yield bytes([byte])
            await asyncio.sleep(gap)

    return bytes_one_by_one()


async def test_a_trickled_body_is_cut_off_in_its_time(door: Door) -> None:
    assert Gateway().body_timeout == 5.0
    started = time.monotonic()
    answer = await door.post(_trickle(0.05))
    assert (answer.status, answer.error) == (408, "The body was not there within 0.4 s: send it at once.")
    assert BODY_TIMEOUT <= time.monotonic() - started < BODY_TIMEOUT + 2


KEY: Final = "a-key-of-some-length-0123456789"
NO_KEY: Final = "A valid API key is needed: send it in the header X-API-Key, or as Authorization: Bearer."


async def test_a_missing_and_a_wrong_key_are_told_apart_by_nobody(server_folder: Path) -> None:
    async for door in _door(server_folder, Gateway(api_keys=(KEY,))):
        asked = {
            "missing": {},
            "wrong": {"X-API-Key": "x" * len(KEY)},
            "nearly": {"X-API-Key": KEY[:-1] + "8"},
            "bearer": {"Authorization": "Bearer " + KEY[:-1]},
        }
        times: dict[str, list[float]] = {name: [] for name in asked}
        seen = set()
        for _ in range(60):
            for name, headers in asked.items():
                started = time.perf_counter()
                answer = await door.post(candle(), JSON | headers)
                times[name].append(time.perf_counter() - started)
                said = {k: v for k, v in answer.headers.items() if k != "Date"}
                seen.add((answer.status, answer.error, tuple(sorted(said.items()))))
        ((status, error, headers_said),) = seen
        assert (status, error) == (401, NO_KEY)
        assert dict(headers_said)["WWW-Authenticate"] == 'Bearer realm="mt5"'
        middle = [median(found) for found in times.values()]
        # Comparing keys takes microseconds; what a network could measure would be far above.
        assert max(middle) - min(middle) < max(0.5 * min(middle), 0.002), times
        for headers in ({"X-API-Key": KEY}, {"Authorization": f"Bearer {KEY}"}):
            assert (await door.post(candle(0, next(_NAMES)), JSON | headers)).status == 200
        assert (await door.bus.js.stream_info("CANDLES")).state.messages == 2


async def test_over_the_rate_429_says_when_to_come_again(server_folder: Path) -> None:
    async for door in _door(server_folder, Gateway(rate_limit=10.0)):
        first = await door.post([candle(i) for i in range(10)])
        assert (first.status, first.body["accepted"]) == (200, 10)
        answer = await door.post([candle(i) for i in range(10, 20)])
        assert (answer.status, answer.error, answer.headers["Retry-After"]) == (
            429,
            "Too many candles: send them again in 1 s.",
            "1",
        )
        assert (await door.bus.js.stream_info("CANDLES")).state.messages == 10 - 9  # ten bars travel as one block


# --- the bus -----------------------------------------------------------------------------------------------------

UNKNOWN: Final = "The candles may or may not be stored: send the same again, which is safe."


async def test_a_full_bus_answers_503_within_two_seconds(server_folder: Path) -> None:
    async for door in _door(server_folder, Gateway()):
        await door.post(candle(0))
        config = (await door.bus.js.stream_info("CANDLES")).config
        config.max_bytes = 600
        await door.bus.js.update_stream(config)
        started = time.monotonic()
        answers = [await door.post(candle(i)) for i in range(1, 4)]
        assert time.monotonic() - started < 3 * 2
        assert (answers[-1].status, answers[-1].error, answers[-1].headers["Retry-After"]) == (503, UNKNOWN, "1")
        config.max_bytes = 2**20
        await door.bus.js.update_stream(config)
        assert [(await door.post(candle(i))).status for i in range(1, 4)] == [200] * 3


async def test_a_bus_that_is_away_answers_503_within_two_seconds(server_folder: Path) -> None:
    async for door in _door(server_folder, Gateway()):
        await door.post(candle(0))
        for name in ("EURUSD", "UNSEEN"):
            door.server.stop()
            started = time.monotonic()
            answer = await door.post(candle(1, name))
            assert time.monotonic() - started < 2
            assert (answer.status, answer.error, answer.headers["Retry-After"]) == (503, UNKNOWN, "1")
            door.server.start()
            async with asyncio.timeout(20):
                while (await door.post(candle(1, name))).status == 503:
                    await asyncio.sleep(0.05)


async def test_a_frozen_bus_answers_503_within_two_seconds(server_folder: Path) -> None:
    async for door in _door(server_folder, Gateway()):
        await door.post(candle(0))
        assert door.server.pid is not None
        os.kill(door.server.pid, signal.SIGSTOP)
        try:
            # One bar of a known series, many of it, and a series that the log would have to be asked for.
            for payload in (candle(1), [candle(i) for i in range(1, 2_500)], candle(1, "UNSEEN")):
                started = time.monotonic()
                answer = await door.post(payload)
                assert time.monotonic() - started < 2
                assert (answer.status, answer.error, answer.headers["Retry-After"]) == (503, UNKNOWN, "1")
        finally:
            os.kill(door.server.pid, signal.SIGCONT)
        async with asyncio.timeout(20):
            while (await door.post(candle(1))).status == 503:
                await asyncio.sleep(0.05)
