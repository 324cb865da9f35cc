"""The played terminal against a real HTTP server: same bytes again, in order, and counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from actors.core.market import INSTRUMENTS, Market
from actors.terminal import (
    GatewayAway,
    KeyRefused,
    PayloadRefused,
    Said,
    Tally,
    Terminal,
    TerminalError,
    encode,
    play,
    simulate,
)
from tests.recording_gateway import OPENS, Gateway, bars, free_port, serving, taken

REPLAY = Said(replay=True)


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    one = Gateway()
    async with serving(one.ingest) as one.url:
        yield one


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as one:
        yield one


async def test_a_payload_is_what_an_ea_sends(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    terminal = Terminal(session, gateway.url + "/", api_key="k1")
    said = Said(replay=True, gmt_time=1_748_815_260, source="Broker-Demo")
    tally = await terminal.post("EURUSD.m", "M1", bars(1), said, closed=True)
    assert tally == Tally(received=1, accepted=1)
    candle = {"time": 1_748_815_200, "open": 1.0, "high": 2.0, "low": 0.5, "close": 1.5}
    assert gateway.payloads == [
        {
            "symbol": "EURUSD.m",
            "timeframe": "M1",
            "replay": True,
            "gmt_time": 1_748_815_260,
            "source": "Broker-Demo",
            "candles": [candle | {"tick_volume": 1.0, "spread": 0.0, "real_volume": 0.0, "closed": True}],
        }
    ]
    assert gateway.headers[0]["X-API-Key"] == "k1"
    assert gateway.headers[0]["Content-Type"] == "application/json"


async def test_the_same_bytes_go_again_after_503_and_429(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    refusals = [
        web.Response(status=503, headers={"Retry-After": "0.3"}),
        web.Response(status=503),
        web.Response(status=429, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
    ]
    gateway.answer = lambda n, body: refusals[n] if n < len(refusals) else taken(body)
    waits: list[float] = []
    terminal = Terminal(session, gateway.url, on_wait=lambda why, seconds: waits.append(seconds))
    assert await terminal.post("EURUSD", "M1", bars(3), REPLAY) == Tally(received=3, accepted=3)
    assert len(gateway.bodies) == 4
    assert len(set(gateway.bodies)) == 1
    assert waits == [0.3, 0.2, 0.4]  # the gateway's wish where it is longer, else a growing pause


async def test_patience_is_bounded(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    gateway.answer = lambda n, body: web.Response(status=503, headers={"Retry-After": "0.2"})
    terminal = Terminal(session, gateway.url, patience=0.5)
    with pytest.raises(GatewayAway, match="503"):
        await terminal.post("EURUSD", "M1", bars(1), REPLAY)
    assert 2 <= len(gateway.bodies) <= 3


async def test_a_long_retry_after_is_not_waited_out_in_vain(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    gateway.answer = lambda n, body: web.Response(status=429, headers={"Retry-After": "86400"})
    with pytest.raises(GatewayAway, match="429"):
        await Terminal(session, gateway.url).post("EURUSD", "M1", bars(1), REPLAY)
    assert len(gateway.bodies) == 1


async def test_413_splits_and_keeps_the_order(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    def answer(n: int, body: dict[str, Any]) -> web.Response:
        return web.Response(status=413) if len(body["candles"]) > 3 else taken(body)

    gateway.answer = answer
    tally = await Terminal(session, gateway.url).post("EURUSD", "M1", bars(10), REPLAY)
    assert tally == Tally(received=10, accepted=10)
    sent = [c["tick_volume"] for p in gateway.payloads if len(p["candles"]) <= 3 for c in p["candles"]]
    assert sent == [float(i + 1) for i in range(10)]
    assert all(p["replay"] is True for p in gateway.payloads)


async def test_a_single_bar_that_is_too_large_is_an_error(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    gateway.answer = lambda n, body: web.json_response({"error": "Over 1 MiB."}, status=413)
    with pytest.raises(PayloadRefused, match=r"413: Over 1 MiB\."):
        await Terminal(session, gateway.url).post("EURUSD", "M1", bars(2), REPLAY)


async def test_counts_add_up(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    rejected = [{"index": 1, "error": "high is below open"}, {"index": 2, "error": "other"}]
    gateway.answer = lambda n, body: taken(body, accepted=1, duplicates=2, forming=1, rejected=rejected)
    terminal = Terminal(session, gateway.url)
    total = await terminal.post("A", "M1", bars(6), REPLAY)
    gateway.answer = lambda n, body: web.json_response(
        {"received": 1, "accepted": 0, "duplicates": 0, "forming": 0, "rejected": rejected[:1]}, status=422
    )
    total += await terminal.post("A", "M1", bars(1), REPLAY)
    assert total == Tally(received=7, accepted=1, duplicates=2, forming=1, rejected=3, reason="high is below open")


@pytest.mark.parametrize(
    ("status", "body", "kind", "says"),
    [
        (401, {"error": "Name a key."}, KeyRefused, "Name a key."),
        (403, {}, KeyRefused, "MT5_API_KEYS"),
        (400, {"error": "Not JSON."}, PayloadRefused, "400: Not JSON."),
        (404, {}, PayloadRefused, "is this the gateway"),
        (500, {"error": "Incident 1f."}, PayloadRefused, "Incident 1f."),
        (302, {}, PayloadRefused, "302"),
        (200, {"hello": 1}, PayloadRefused, "no gateway"),
        (422, {"error": "Another shape."}, PayloadRefused, "Another shape."),
    ],
)
async def test_refusals_are_one_sentence(
    gateway: Gateway,
    session: aiohttp.ClientSession,
    status: int,
    body: dict[str, Any],
    kind: type[TerminalError],
    says: str,
) -> None:
    gateway.answer = lambda n, payload: web.json_response(body, status=status)
    with pytest.raises(kind) as caught:
        await Terminal(session, gateway.url).post("EURUSD", "M1", bars(1), REPLAY)
    assert says in str(caught.value)
    assert len(gateway.bodies) == 1


@pytest.mark.parametrize("url", ["localhost", "not a url", "ftp://127.0.0.1:1"])
async def test_a_url_that_is_none(session: aiohttp.ClientSession, url: str) -> None:
    with pytest.raises(TerminalError, match=r"http://127\.0\.0\.1:8001"):
        await Terminal(session, url, first_patience=0.0).post("EURUSD", "M1", bars(1), REPLAY)


async def test_nobody_listens(session: aiohttp.ClientSession) -> None:
    with free_port() as port, pytest.raises(GatewayAway, match="start it with `mt5 up`"):
        await Terminal(session, f"http://127.0.0.1:{port}", first_patience=0.3).post("EURUSD", "M1", bars(1), REPLAY)


async def test_a_gateway_that_restarts_gets_the_same_bytes(session: aiohttp.ClientSession) -> None:
    before, after, back = Gateway(), Gateway(), asyncio.Event()
    waiting = asyncio.Event()

    async def restarted(port: int) -> None:
        await waiting.wait()
        async with serving(after.ingest, port):
            await back.wait()

    async with serving(before.ingest) as url:
        terminal = Terminal(session, url, on_wait=lambda why, seconds: waiting.set())
        await terminal.post("EURUSD", "M1", bars(1), REPLAY)
    restart = asyncio.create_task(restarted(int(url.rpartition(":")[2])))
    second = bars(1, OPENS + timedelta(minutes=1))
    assert (await terminal.post("EURUSD", "M1", second, REPLAY)).accepted == 1
    back.set()
    await restart
    assert after.bodies == [encode("EURUSD", "M1", second, REPLAY)]


async def test_a_connection_cut_before_the_answer_means_unknown(session: aiohttp.ClientSession) -> None:
    gateway = Gateway()

    async def cut_first(request: web.Request) -> web.Response:
        response = await gateway.ingest(request)
        if len(gateway.bodies) == 1 and request.transport is not None:
            request.transport.close()
        return response

    async with serving(cut_first) as url:
        await Terminal(session, url).post("EURUSD", "M1", bars(2), REPLAY)
    assert len(gateway.bodies) == 2
    assert gateway.bodies[0] == gateway.bodies[1]


async def test_one_series_waits_for_itself_and_not_for_others(session: aiohttp.ClientSession) -> None:
    gateway, release, arrived = Gateway(), asyncio.Event(), asyncio.Event()

    async def hold_eurusd(request: web.Request) -> web.Response:
        response = await gateway.ingest(request)
        if gateway.payloads[-1]["symbol"] == "EURUSD" and len(gateway.bodies) == 1:
            arrived.set()
            await release.wait()
        return response

    async with serving(hold_eurusd) as url:
        terminal = Terminal(session, url)
        first = asyncio.create_task(terminal.post("EURUSD", "M1", bars(1), REPLAY))
        await arrived.wait()
        later = [
            asyncio.create_task(terminal.post("EURUSD", "M1", bars(1, OPENS + timedelta(minutes=i)), REPLAY))
            for i in (1, 2)
        ]
        await terminal.post("GBPUSD", "M1", bars(1), REPLAY)
        assert [p["symbol"] for p in gateway.payloads] == ["EURUSD", "GBPUSD"]
        release.set()
        await asyncio.gather(first, *later)
    times = [p["candles"][0]["time"] for p in gateway.payloads if p["symbol"] == "EURUSD"]
    assert times == sorted(times)
    assert len(times) == 3


async def test_full_speed_sends_blocks_without_a_clock(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    terminal = Terminal(session, gateway.url)
    tallies = [t async for t in play(terminal, [bars(2_500)], symbol="EURUSD", timeframe="M1")]
    assert [t.accepted for t in tallies] == [1_000, 1_000, 500]
    assert all(p["replay"] is True and "gmt_time" not in p and "history" not in p for p in gateway.payloads)
    assert max(map(len, gateway.bodies)) < 1 << 20


async def test_history_says_history_and_nothing_of_a_replay(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    terminal = Terminal(session, gateway.url)
    for speed in (0.0, 1e6):
        async for _ in play(terminal, [bars(2)], symbol="EURUSD", timeframe="M1", speed=speed, history=True):
            pass
    assert len(gateway.payloads) == 3
    assert all(p["history"] is True and "replay" not in p and "gmt_time" not in p for p in gateway.payloads)


async def test_a_paced_replay_brings_its_clock(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    loop = asyncio.get_running_loop()
    rows = [*bars(4), *bars(1, OPENS + timedelta(days=2))]
    started = loop.time()
    tallies = [
        t async for t in play(Terminal(session, gateway.url), [rows], symbol="EURUSD", timeframe="M1", speed=600.0)
    ]
    took = loop.time() - started
    assert len(tallies) == 5
    for payload in gateway.payloads:
        assert payload["gmt_time"] == payload["candles"][0]["time"] + 60
    assert took >= 0.3  # three minutes at 600 times; the two days of silence are passed over
    assert took < 30


async def test_the_end_of_a_month_is_its_own_length(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    rows = bars(1, datetime(2025, 2, 1, tzinfo=UTC))
    async for _ in play(Terminal(session, gateway.url), [rows], symbol="EURUSD", timeframe="MN1", speed=1e9):
        pass
    assert gateway.payloads[0]["gmt_time"] == int(datetime(2025, 3, 1, tzinfo=UTC).timestamp())


async def test_the_simulated_market_lives_minute_by_minute(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    friday = datetime(2025, 6, 6, 21, 58, tzinfo=UTC)
    markets = [Market(instrument, seed=5, start=friday) for instrument in INSTRUMENTS[:2]]
    expected = {
        i.symbol: Market(i, seed=5, start=friday).until(friday + timedelta(days=2, minutes=5)) for i in INSTRUMENTS[:2]
    }
    enough = asyncio.Event()
    posted: list[tuple[str, datetime]] = []

    def on_post(symbol: str, ts: datetime) -> None:
        posted.append((symbol, ts))
        if ts >= friday + timedelta(days=2, minutes=4):
            enough.set()

    living = asyncio.create_task(
        simulate(Terminal(session, gateway.url), markets, speed=3_000.0, source="Simulator", on_post=on_post)
    )
    await asyncio.wait({living, asyncio.create_task(enough.wait())}, return_when=asyncio.FIRST_COMPLETED)
    living.cancel()
    with suppress(asyncio.CancelledError):
        await living
    for payload in gateway.payloads:
        (candle,) = payload["candles"]
        assert payload["replay"] is True
        assert payload["source"] == "Simulator"
        over = payload["gmt_time"] - candle["time"]
        assert candle["closed"] is (over == 60)
        assert 0 < over <= 60
    for symbol, rows in expected.items():
        mine = [p for p in gateway.payloads if p["symbol"] == symbol]
        closed = [p["candles"][0] for p in mine if p["candles"][0]["closed"]]
        want = [(int(b.ts.timestamp()), b.close) for b in rows][: len(closed)]
        assert [(c["time"], c["close"]) for c in closed] == want
        assert len(closed) >= 4  # beyond the weekend, without having waited for it
        times = [p["gmt_time"] for p in mine]
        assert times == sorted(times)
