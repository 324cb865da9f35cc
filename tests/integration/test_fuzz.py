"""POST /ingest under chance: whatever comes, an answer of the documented shape, never a 5xx, and the gateway lives on.

``MT5_FUZZ_SECONDS`` sets how long (CI takes a minute). A failure prints the body, and hypothesis keeps it for the next run.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from actors.collector import Collector
from bus import topology
from bus.client import Bus
from deploy.server import free_port
from schema.messages import IngestAnswer, Problem
from schema.settings import Gateway, Nats, Settings, Streams
from tests.builders import running
from tests.servers import OPERATOR, nats_server

SECONDS: Final = float(os.environ.get("MT5_FUZZ_SECONDS") or (60 if os.environ.get("CI") == "true" else 15))
STATUSES: Final = frozenset({200, 400, 408, 413, 415, 422})
BASE: Final = 1_735_776_000
MIB: Final = 1_048_576


@dataclass(frozen=True)
class Target:
    """A gateway in a loop of its own thread, asked over one connection that is kept."""

    port: int
    loop: asyncio.AbstractEventLoop

    def post(self, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("POST", "/ingest", body, dict(headers))
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def target(server_folder: Path) -> Iterator[Target]:
    port = free_port()
    loop = asyncio.new_event_loop()
    ready, stop = threading.Event(), asyncio.Event()
    failed: list[BaseException] = []

    async def serve(url: str) -> None:
        bus = await Bus.connect(url, name="operator")
        await topology.apply(bus, Streams())
        wanted = Settings(gateway=Gateway(port=port), nats=Nats())
        async with running(Collector, nats_url=url, settings=wanted):
            ready.set()
            await stop.wait()
        await bus.close()

    def run(url: str) -> None:
        try:
            loop.run_until_complete(serve(url))
        except BaseException as error:  # shown by the fixture
            failed.append(error)
        finally:
            ready.set()
            loop.close()

    with nats_server(Path(tempfile.mkdtemp(prefix="nats-", dir=server_folder))) as server:
        thread = threading.Thread(target=run, args=(server.url(OPERATOR),), name="gateway")
        thread.start()
        try:
            assert ready.wait(30)
            assert not failed, failed
            yield Target(port, loop)
        finally:
            if not failed:
                loop.call_soon_threadsafe(stop.set)
            thread.join(20)
    assert not failed, failed


# --- what comes --------------------------------------------------------------------------------------------------

_NAMES: Final = [
    "ts",
    "time",
    "symbol",
    "timeframe",
    "interval",
    "open",
    "high",
    "low",
    "close",
    "volume",
    "tick_volume",
    "spread",
    "real_volume",
    "closed",
    "items",
    "candles",
    "source",
    "server_time",
    "gmt_time",
    "history",
    "replay",
    "point",
    "grid",
]
_EDGES: Final = st.sampled_from(
    [
        0,
        -0.0,
        -1,
        1,
        2**31,
        2**53,
        2**63 - 1,
        2**63,
        2**64,
        -(2**63),
        10**30,
        1e-320,
        5e-324,
        1.7e308,
        1e22,
        0.1,
        BASE,
        BASE * 1_000,
        BASE * 1_000_000,
        253_402_300_800,
        99_999_999_999,
        100_000_000_000,
        -1e18,
        1e18,
    ]
)
_WORDS: Final = st.sampled_from(
    [
        "",
        " ",
        "EURUSD",
        "EURUSD.m",
        "XAU USD",
        "@ES",
        "*",
        ">",
        "a.b",
        "%2E",
        "\0",
        "\n",
        "\x7f",
        "\u202e",
        "é" * 33,
        "x" * 64,
        "x" * 65,
        "x" * 5_000,
        "M1",
        "M5",
        "H4",
        "D1",
        "W1",
        "MN1",
        "M7",
        "1m",
        "1M",
        "PERIOD_H1",
        "NaN",
        "true",
        "12",
        "💹",
        "~replay",
        "2025-01-02T00:00:00Z",
        "2025-01-02T00:00:00+02:00",
        "2025-01-02 00:00",
        "20250102",
        "0001-01-01T00:00:00+23:59",
        "9999-12-31T23:59:59-23:59",
        "1969-12-31T23:59:00Z",
        "2025-01-02T24:00:00Z",
        "2025-W01-1",
        "2025-01-02T00:00:60Z",
    ]
)
_TIMES: Final = st.integers(0, 60).map(lambda n: BASE + 60 * n)
_LEAVES: Final = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
    _EDGES,
    _WORDS,
)
_JSON: Final = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(_NAMES) | st.text(max_size=6), inner, max_size=6)
    ),
)
_PRICES: Final = st.floats(0.9, 1.2).map(lambda price: round(price, 5))


@st.composite
def _candle(draw: st.DrawFn) -> dict[str, Any]:
    """A candle that is right, or right but for a field or two."""
    prices = sorted(draw(st.lists(_PRICES, min_size=4, max_size=4)))
    out: dict[str, Any] = {
        "ts": draw(_TIMES),
        "symbol": "EURUSD",
        "timeframe": draw(st.sampled_from(["M1", "M5", "1m", "D1"])),
    }
    out |= {
        "low": prices[0],
        "open": prices[1],
        "close": prices[2],
        "high": prices[3],
        "volume": draw(st.integers(0, 99)),
    }
    for name in draw(st.lists(st.sampled_from(_NAMES), max_size=2)):
        out[name] = draw(_LEAVES | _JSON)
    for name in draw(st.lists(st.sampled_from(sorted(out)), max_size=1)):
        del out[name]
    return out


@st.composite
def _payload(draw: st.DrawFn) -> Any:
    rows = draw(st.lists(_candle() | _JSON, max_size=6))
    shape = draw(st.sampled_from(["one", "array", "items", "candles", "both", "nulled"]))
    if shape == "one":
        return rows[0] if rows else {}
    if shape == "array":
        return rows
    beside = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "symbol": _WORDS,
                "timeframe": _WORDS,
                "interval": _WORDS | _LEAVES,
                "source": _WORDS | _LEAVES,
                "server_time": _EDGES | _TIMES | _LEAVES,
                "gmt_time": _EDGES | _TIMES | _LEAVES,
                "history": st.booleans() | _LEAVES,
                "replay": st.booleans() | _LEAVES,
                "point": _EDGES | _LEAVES,
                "grid": _WORDS | _LEAVES,
            },
        )
    )
    if shape in ("both", "nulled"):
        both = [rows, None if shape == "nulled" else rows]
        return beside | dict(zip(draw(st.permutations(["items", "candles"])), both, strict=True))
    return beside | {shape: rows}


def _bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


@st.composite
def _broken(draw: st.DrawFn) -> bytes:
    """A payload's bytes with some of them cut out, doubled or overwritten."""
    body = bytearray(draw(_payload().map(_bytes)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(body)))
        piece = draw(
            st.binary(max_size=4)
            | st.sampled_from([b"NaN", b"1e999", b"\\ud800", b"\xed\xa0\x80", b"[" * 3_000, b"\0"])
        )
        body[at : at + draw(st.integers(0, 5))] = piece
    return bytes(body)


@st.composite
def _large(draw: st.DrawFn) -> bytes:
    """A payload of nearly 1 MiB that holds a candle to be rejected: one that is long, many, or long ones beside them."""
    good, bad = draw(_candle()), draw(_candle()) | {"high": 0.1}
    filler = draw(st.sampled_from(["x", "é", "\\", '"']))
    size = draw(st.integers(MIB - 3_000, MIB - 1_000))
    where = draw(st.sampled_from(["in", "beside", "many", "name", "symbol"]))
    room = size // (len(json.dumps(filler, ensure_ascii=False).encode()) - 2)
    if where == "many":
        return _bytes({"items": [good] + [bad] * min(4_999, size // len(_bytes(bad) + b", "))})
    if where == "in":
        return _bytes({"items": [good, bad | {"note": filler * room}]})
    if where == "symbol":
        return _bytes({"items": [good, bad | {"symbol": filler * room}]})
    return _bytes({"candles": [good, bad]} | ({filler * room: 1} if where == "name" else {"note": filler * room}))


_BODIES: Final = st.integers(0, 40).flatmap(
    lambda n: (
        _large() if n == 40 else st.one_of(_payload().map(_bytes), _JSON.map(_bytes), _broken(), st.binary(max_size=64))
    )
)
_TYPES: Final = st.sampled_from(
    ["application/json"] * 8 + ["application/json; charset=utf-8", "text/plain", "", "application/json;="]
)


@st.composite
def _request(draw: st.DrawFn) -> tuple[bytes, dict[str, str]]:
    body, headers = draw(_BODIES), {"Content-Type": draw(_TYPES)}
    wrap = draw(st.sampled_from(["no", "no", "no", "nul", "gzip", "half", "lie"]))
    if wrap == "nul":
        body += b"\0"
    elif wrap in ("gzip", "half"):
        body, headers["Content-Encoding"] = gzip.compress(body, mtime=0), "gzip"
        if wrap == "half":
            body = body[: draw(st.integers(0, len(body)))]
    elif wrap == "lie":
        headers["Content-Encoding"] = draw(st.sampled_from(["gzip", "deflate", "br", "identity", "gzip, gzip", "x"]))
    return body, headers


# --- what is answered --------------------------------------------------------------------------------------------


def _holds(body: bytes, status: int, answer: bytes) -> None:
    assert status in STATUSES, (status, answer, body)
    if status == 200 or (status == 422 and b'"received"' in answer):
        counts = msgspec.json.decode(answer, type=IngestAnswer)
        parts = counts.accepted + counts.duplicates + counts.forming
        assert counts.received == parts + len(counts.rejected), (answer, body)
        assert (status == 200) == bool(parts), (status, answer, body)
        assert [r.index for r in counts.rejected] == sorted({r.index for r in counts.rejected})
        assert all(0 <= r.index < counts.received and r.error for r in counts.rejected)
    else:
        assert msgspec.json.decode(answer, type=Problem).error.endswith((".", "?")), answer
        assert set(json.loads(answer)) == {"error"}


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 120)
def test_no_body_makes_a_5xx(target: Target) -> None:
    deadline = time.monotonic() + SECONDS
    asked = 0
    found: list[bytes] = []

    @settings(
        max_examples=100,
        deadline=None,
        database=None,
        print_blob=True,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(_request())
    def probe(request: tuple[bytes, dict[str, str]]) -> None:
        nonlocal asked
        if time.monotonic() > deadline + (60 if found else 0):  # a failure has a minute more to be made small
            return
        body, headers = request
        asked += 1
        try:
            _holds(body, *target.post(body, headers))
        except AssertionError:
            found.append(body)
            raise

    good = {"symbol": "ALIVE", "timeframe": "M1", "open": 1, "high": 1, "low": 1, "close": 1, "volume": 1}
    rounds = 0
    while time.monotonic() < deadline:
        probe()
        # A new bar has to go the whole way: a gateway that has lost its bus would still know the old one.
        alive = json.dumps(good | {"ts": BASE + 60 * rounds}).encode()
        status, answer = target.post(alive, {"Content-Type": "application/json"})
        assert (status, json.loads(answer).get("accepted")) == (200, 1), answer
        rounds += 1
    assert asked >= 100
