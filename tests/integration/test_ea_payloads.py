"""The EA's payloads on a real gateway: kept as fixtures, and written anew by the EA's own source where a C++ compiler is.

``WRITE_EA_FIXTURES=1`` replaces the fixtures by what the source writes now.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from bus.client import Bus
from deploy.embedded import NatsServer
from schema.messages import Candle
from tests.conftest import missing
from tests.mql5 import host
from tests.mql5.host import PERIODS, Ea
from tests.terminals import START, archive, front, gateway, post, stored, walk

FIXTURES = Path(__file__).parents[1] / "fixtures" / "ea"
WRITE = os.environ.get("WRITE_EA_FIXTURES") == "1"
OFFSET = 7_200


# --- a gateway, and the EA beside it -------------------------------------------------------------------------------


def fixture(name: str) -> bytes:
    return (FIXTURES / f"{name}.json").read_bytes()


def check(name: str, body: bytes) -> None:
    """A body that the EA posted is the fixture, byte for byte."""
    if WRITE:
        FIXTURES.mkdir(parents=True, exist_ok=True)
        (FIXTURES / f"{name}.json").write_bytes(body)
    assert body == fixture(name)


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if host.compiler() is None:
        missing("no C++ compiler to run the EA's source with: apt-get install g++")
    return host.build(tmp_path_factory.mktemp("ea"))


class Desk:
    """A terminal with the EA on a chart: bars come in, time passes, the timer ticks."""

    def __init__(self, program: Path, folder: Path, url: str, inputs: dict[str, str]) -> None:
        self._start: Callable[[], Ea] = lambda: Ea(program, folder, url, inputs)
        self.ea = self._start()
        self.gmt = START
        self.offset = OFFSET

    async def do(self, *words: object) -> int:
        return await asyncio.to_thread(self.ea.do, *words)

    async def begin(self, *symbols: tuple[str, int]) -> None:
        for symbol, digits in symbols:
            await self.do("symbol", symbol, digits)

    async def bars(self, rows: Sequence[Candle], symbol: str = "EURUSD", timeframe: str = "M1") -> None:
        """Bars of the terminal's own history; times of ``rows`` are UTC."""
        for row in rows:
            time = int(row.ts.timestamp()) + self.offset
            values = (row.open, row.high, row.low, row.close, int(row.volume), int(row.spread), int(row.real_volume))
            await self.do("bar", symbol, PERIODS[timeframe], time, *values)

    async def init(self) -> int:
        await self.do("clock", self.gmt, self.offset)
        return await self.do("init")

    async def tick(self, gmt: int | None = None, times: int = 1) -> None:
        """Lets the timer fire; a second apart where no time is given."""
        for _ in range(times):
            self.gmt = gmt if gmt is not None else self.gmt + 1
            await self.do("clock", self.gmt, self.offset)
            await self.do("timer")

    async def run(self) -> None:
        assert await self.init() == 0, self.ea.said

    async def restart(self) -> None:
        """The terminal is killed and started again; its history survives."""
        self.ea.close()
        self.ea = self._start()


@pytest.fixture
def desk(program: Path, tmp_path: Path) -> Any:
    desks: list[Desk] = []

    def make(url: str, **inputs: object) -> Desk:
        desks.append(Desk(program, tmp_path, url, {name: str(value) for name, value in inputs.items()}))
        return desks[-1]

    yield make
    for made in desks:
        made.ea.close()


def changed(row: Candle, close: float) -> Candle:
    return Candle(
        ts=row.ts,
        open=row.open,
        high=max(row.high, close),
        low=min(row.low, close),
        close=close,
        volume=row.volume + 1,
        spread=row.spread,
    )


# --- what the fixtures are worth at the gateway --------------------------------------------------------------------


def answer(**counts: Any) -> dict[str, Any]:
    return {"received": 0, "accepted": 0, "duplicates": 0, "forming": 0, "rejected": []} | counts


async def told(url: str, name: str) -> dict[str, Any]:
    status, body = await post(url, fixture(name))
    assert status == 200, body
    body.pop("backfill")
    return body


async def test_history_live_resend_and_correction(bus: Bus, nats_url: str) -> None:
    async with gateway(nats_url) as url:
        assert await told(url, "first_run_history") == answer(received=20, accepted=20)
        assert await told(url, "live_tick") == answer(received=2, accepted=1, forming=1)
        assert await told(url, "live_tick") == answer(received=2, duplicates=1, forming=1)
        assert await told(url, "forming_only") == answer(received=1, forming=1)
        assert await told(url, "correction") == answer(received=1, accepted=1)
        blocks = await stored(bus)
    assert [(b.history, b.source, b.ts_source) for b in blocks] == [(True, "Broker-Demo", "server")] + [
        (False, "Broker-Demo", "server")
    ] * 2
    rows = [row for b in blocks for row in b.rows]
    assert rows[:21] == walk(21, seed=5)
    assert rows[21].ts == rows[20].ts
    assert rows[21] != rows[20]


async def test_one_nul_behind_a_payload_is_taken_and_two_are_not(bus: Bus, nats_url: str) -> None:
    """The EA strips the NUL that StringToCharArray appends; older EAs do not."""
    async with gateway(nats_url) as url:
        assert (await post(url, fixture("live_tick") + b"\0"))[0] == 200
        assert (await post(url, fixture("live_tick") + b"\0\0"))[0] == 400


async def test_halves_hold_what_the_whole_held(bus: Bus, nats_url: str) -> None:
    whole, first, second = (json.loads(fixture(n)) for n in ("split_whole", "split_first", "split_second"))
    assert first["items"] + second["items"] == whole["items"]
    assert {k: v for k, v in first.items() if k != "items"} == {k: v for k, v in whole.items() if k != "items"}
    async with gateway(nats_url, max_candles=12) as url:
        status, body = await post(url, fixture("split_whole"))
        assert (status, set(body)) == (413, {"error"})
        assert await told(url, "split_first") == answer(received=10, accepted=10)
        assert await told(url, "split_second") == answer(received=10, accepted=10)
        assert [row for b in await stored(bus) for row in b.rows] == walk(20, seed=7)


async def test_broker_time_before_and_after_its_daylight_saving(bus: Bus, nats_url: str) -> None:
    async with gateway(nats_url) as url:
        assert (await told(url, "dst_winter"))["accepted"] == 2
        assert (await told(url, "dst_summer"))["accepted"] == 2
        held = await archive(bus)
    assert list(held["EURUSD", "H1"]) == [datetime(2025, 3, 28, 9, tzinfo=UTC), datetime(2025, 3, 31, 8, tzinfo=UTC)]
    assert list(held["EURUSD", "H4"]) == [datetime(2025, 3, 28, 6, tzinfo=UTC), datetime(2025, 3, 31, 5, tzinfo=UTC)]


async def test_symbols_and_brokers_keep_their_names(bus: Bus, nats_url: str) -> None:
    assert fixture("suffix_symbols").isascii()
    async with gateway(nats_url) as url:
        assert await told(url, "suffix_symbols") == answer(received=5, accepted=5)
        blocks = await stored(bus)
    assert {b.symbol for b in blocks} == {"EURUSD.m", "GBPUSD!", "@ES", "XAU USD", 'Öl "Brent"'}
    assert {b.source for b in blocks} == {'Брокер "Demo" \\ 1'}
    assert {b.rows[0].close for b in blocks if b.symbol == "@ES"} == {5_912.25}


# --- the EA's own source -------------------------------------------------------------------------------------------


async def test_first_run_live_forming_and_correction(bus: Bus, nats_url: str, desk: Any) -> None:
    rows = walk(23, seed=5)
    async with gateway(nats_url) as url:
        d = desk(url, InpHistoryBars=20)
        await d.begin(("EURUSD", 5))
        await d.bars(rows[:21])  # the last one forms
        d.gmt = START + 20 * 60 + 30
        await d.run()
        await d.tick()
        check("first_run_history", d.ea.sent()[0])
        d.gmt = START + 21 * 60 + 1
        await d.bars(rows[20:22])
        await d.tick()
        check("live_tick", d.ea.sent()[-1])
        assert d.ea.queue() == []
        sent = len(d.ea.sent())
        await d.tick()
        assert len(d.ea.sent()) == sent, "nothing changed, nothing is sent"
        await d.bars([changed(rows[21], 1.2)])
        await d.tick()
        check("forming_only", d.ea.sent()[-1])
        await d.bars([changed(rows[20], 1.19)])
        await d.tick()
        check("correction", d.ea.sent()[-1])
        await d.tick(times=2)
        assert len(d.ea.sent()) == sent + 2
        held = await archive(bus)
    assert list(held["EURUSD", "M1"].values()) == [*rows[:20], changed(rows[20], 1.19)]


async def test_a_last_bar_without_successor_is_closed_by_the_servers_clock(bus: Bus, nats_url: str, desk: Any) -> None:
    rows = walk(21, seed=6)
    async with gateway(nats_url) as url:
        d = desk(url, InpHistoryBars=20, InpSendForming=0)
        await d.begin(("EURUSD", 5))
        await d.bars(rows)
        d.gmt = START + 20 * 60 + 30
        await d.run()
        await d.tick()
        await d.tick(START + 21 * 60 + 4)
        assert len(d.ea.sent()) == 1
        await d.tick(START + 21 * 60 + 5)
        assert len(d.ea.sent()) == 2
        assert list((await archive(bus))["EURUSD", "M1"].values()) == rows


async def test_an_outage_a_kill_and_a_restart_lose_nothing_and_repeat_the_same_bytes(
    bus: Bus, nats_url: str, nats: NatsServer, desk: Any
) -> None:
    rows = walk(60, seed=8)
    async with gateway(nats_url) as url:
        d = desk(url, InpHistoryBars=20)
        await d.begin(("EURUSD", 5))
        await d.bars(rows[:21])
        d.gmt = START + 20 * 60 + 1
        await d.run()
        await d.tick(times=2)
        nats.stop()
        for minute in range(21, 30):
            await d.bars(rows[minute : minute + 1])
            await d.tick(START + minute * 60 + 1)
        waiting = d.ea.queue()
        assert len(waiting) == 9
        kept = [path.read_bytes() for path in waiting]
        assert {body for body in d.ea.sent()[2:] if b'"closed":true' in body} == {kept[0]}, "only the first was tried"
        assert sum("answers 503" in line for line in d.ea.said) == 1, "one line, not one a second"

        await d.restart()
        await d.begin(("EURUSD", 5))
        await d.bars(rows[:41])  # it was away for eleven bars
        nats.start()
        d.gmt = START + 40 * 60 + 1
        await d.run()
        async with asyncio.timeout(30):
            while d.ea.queue() or len(d.ea.sent()) < 10:
                await d.tick(d.gmt + 60)
        replayed = [body for body in d.ea.sent() if body in kept]
        assert list(dict.fromkeys(replayed)) == kept, "in order, byte for byte"
        held = await archive(bus)
    assert list(held["EURUSD", "M1"].values())[:40] == rows[:40]
    last = json.loads(d.ea.sent()[-1])
    assert "history" not in last, "eleven missed bars are live"


async def test_too_large_payloads_go_in_halves(bus: Bus, nats_url: str, desk: Any) -> None:
    rows = walk(21, seed=7)
    async with gateway(nats_url, max_candles=12) as url:
        d = desk(url, InpHistoryBars=20, InpSendForming=0)
        await d.begin(("EURUSD", 5))
        await d.bars(rows)
        d.gmt = START + 20 * 60 + 1
        await d.run()
        await d.tick()
        for name, body in zip(("split_whole", "split_first", "split_second"), d.ea.sent(), strict=True):
            check(name, body)
        assert d.ea.queue() == []
        assert list((await archive(bus))["EURUSD", "M1"].values()) == rows[:20]


async def test_two_offsets_of_one_broker(bus: Bus, nats_url: str, desk: Any) -> None:
    async with gateway(nats_url) as url:
        d = desk(url, InpHistoryBars=0, InpTimeframes="H1,H4", InpSendForming=0)
        await d.begin(("EURUSD", 5))
        for name, offset, day in (("dst_winter", 7_200, 28), ("dst_summer", 10_800, 31)):
            d.offset = offset
            noon = int(datetime(2025, 3, day, 12, tzinfo=UTC).timestamp()) - offset
            # H1 opens at 10:00, 11:00 and 12:00 by the server's clock, H4 at 04:00, 08:00 and 12:00.
            hours = walk(3, seed=day, start=noon - 7_200, step=3_600)
            fours = walk(3, seed=day, start=noon - 28_800, step=14_400)
            await d.bars(hours[:2], timeframe="H1")
            await d.bars(fours[:2], timeframe="H4")
            d.gmt = noon - 60
            if name == "dst_winter":
                await d.run()
            await d.tick(times=4)
            await d.bars(hours[2:], timeframe="H1")
            await d.bars(fours[2:], timeframe="H4")
            await d.tick(noon + 1)
            check(name, d.ea.sent()[-1])
            await d.tick(noon + 4 * 3_600 + 6)


async def test_strange_names(bus: Bus, nats_url: str, desk: Any) -> None:
    symbols = {"EURUSD.m": 5, "GBPUSD!": 5, "@ES": 2, "XAU USD": 2, 'Öl "Brent"': 3}

    def bar(minute: int, close: float) -> Candle:
        ts = datetime.fromtimestamp(START + 60 * minute, UTC)
        return Candle(ts=ts, open=5_912.0, high=5_913.0, low=5_911.0, close=close, volume=9.0, spread=3.0)

    async with gateway(nats_url) as url:
        d = desk(url, InpHistoryBars=0, InpSendForming=0)
        await d.do("server", 'Брокер "Demo" \\ 1')
        await d.begin(*symbols.items())
        for symbol in symbols:
            await d.bars([bar(0, 5_912.5), bar(1, 5_912.0)], symbol)
        d.gmt = START + 61
        await d.run()
        await d.tick(times=8)
        for symbol in symbols:
            await d.bars([bar(1, 5_912.25), bar(2, 5_912.0)], symbol)
        await d.tick(START + 121)
        check("suffix_symbols", d.ea.sent()[-1])


async def test_the_list_of_allowed_urls_is_explained_once(bus: Bus, nats_url: str, desk: Any) -> None:
    rows = walk(21)
    async with gateway(nats_url) as url:
        d = desk(url, InpHistoryBars=20)
        await d.begin(("EURUSD", 5))
        await d.bars(rows)
        d.gmt = START + 20 * 60 + 1
        await d.do("fail", 4014)
        await d.run()
        await d.tick(times=30)
        alerts = [line for line in d.ea.said if line.startswith("ALERT")]
        assert len(alerts) == 1
        assert "Allow WebRequest for listed URL" in alerts[0]
        assert url in alerts[0]
        assert sum("4014" in line for line in d.ea.said) == 2  # the alert and its line in the log
        assert len(d.ea.queue()) == 1
        assert len(d.ea.sent()) <= 6, "attempts are spaced out"
        await d.do("fail", 0)
        await d.tick(d.gmt + 61)
        assert d.ea.queue() == []
        assert any("takes candles again" in line for line in d.ea.said)
        assert list((await archive(bus))["EURUSD", "M1"].values()) == rows  # the last one has ended meanwhile


async def test_a_wrong_key_waits_and_a_right_one_goes_on(bus: Bus, nats_url: str, desk: Any) -> None:
    rows = walk(21)
    async with gateway(nats_url, api_keys=("right",)) as url:
        d = desk(url, InpHistoryBars=20, InpApiKey="wrong")
        await d.begin(("EURUSD", 5))
        await d.bars(rows)
        d.gmt = START + 20 * 60 + 1
        await d.run()
        await d.tick(times=20)
        assert sum("set InpApiKey" in line for line in d.ea.said) == 1
        assert len(d.ea.queue()) == 1
        await d.do("deinit")
        d.ea.close()
        d = desk(url, InpHistoryBars=20, InpApiKey="right")
        await d.begin(("EURUSD", 5))
        await d.bars(rows)
        d.gmt = START + 20 * 60 + 1
        await d.run()
        await d.tick(times=2)
        assert d.ea.queue() == []
        assert list((await archive(bus))["EURUSD", "M1"].values()) == rows[:20]


async def test_retry_after_is_honoured(bus: Bus, nats_url: str, desk: Any) -> None:
    rows = walk(41)
    async with gateway(nats_url, rate_limit=0.05) as url:
        d = desk(url, InpHistoryBars=40, InpChunk=20, InpSendForming=0)
        await d.begin(("EURUSD", 5))
        await d.bars(rows)
        d.gmt = START + 40 * 60 + 1
        await d.run()
        await d.tick(times=3)
        sent = d.ea.sent()
        assert len(sent) == 2  # the second was refused with a wait of minutes
        assert any("answers 429" in line for line in d.ea.said)
        await d.tick(d.gmt + 120)
        assert len(d.ea.sent()) == 2
        await d.tick(d.gmt + 3_600)
        assert d.ea.sent()[2] == sent[1]


async def test_what_the_gateway_cannot_take_is_kept_aside(bus: Bus, nats_url: str, desk: Any) -> None:
    rows = walk(23)
    async with gateway(nats_url) as url:
        d = desk(url, InpHistoryBars=20, InpSendForming=0)
        await d.begin(("EURUSD", 5))
        await d.bars(rows[:21])
        d.gmt = START + 20 * 60 + 1
        await d.run()
        await d.tick()
        bad = rows[20]
        await d.bars([Candle(ts=bad.ts, open=-1.0, high=1.0, low=-1.0, close=1.0, volume=1.0), rows[21]])
        await d.tick(START + 21 * 60 + 1)
        payload, reason = d.ea.refused()
        assert payload.read_bytes() == d.ea.sent()[-1]
        assert reason.name == f"{payload.name}.answer.txt"
        assert reason.read_text().startswith('422 {"received":1')
        assert "is not positive" in reason.read_text()
        assert any("refused" in line and "is not positive" in line for line in d.ea.said)
        await d.bars([rows[22]])
        await d.tick(START + 22 * 60 + 1)
        assert d.ea.queue() == []
        assert rows[21].ts in (await archive(bus))["EURUSD", "M1"]


async def test_a_full_queue_pauses_and_the_terminals_history_fills_the_rest(bus: Bus, nats_url: str, desk: Any) -> None:
    rows = walk(101)
    async with gateway(nats_url) as url:
        d = desk(url, InpHistoryBars=20, InpQueueFiles=3)
        await d.begin(("EURUSD", 5))
        await d.bars(rows[:21])
        d.gmt = START + 20 * 60 + 1
        await d.run()
        await d.tick(times=2)
        await d.do("fail", 5203)
        for minute in range(21, 101):
            await d.bars(rows[minute : minute + 1])
            await d.tick(START + minute * 60 + 1)
        assert len(d.ea.queue()) == 3
        assert sum("queue is full" in line for line in d.ea.said) == 1
        await d.do("fail", 0)
        await d.tick(d.gmt + 3)
        await d.tick(d.gmt + 61)
        await d.tick(times=5)
        assert d.ea.queue() == []
        held = await archive(bus)
    assert [held["EURUSD", "M1"][row.ts] for row in rows[:100]] == rows[:100]


async def test_history_that_comes_short_is_waited_for(bus: Bus, nats_url: str, desk: Any) -> None:
    rows = walk(21)
    async with gateway(nats_url) as url:
        d = desk(url, InpHistoryBars=20)
        await d.begin(("EURUSD", 5))
        await d.bars(rows)
        d.gmt = START + 20 * 60 + 1
        await d.do("limit", 3)
        await d.run()
        await d.tick(times=10)
        assert d.ea.sent() == [], "the terminal downloads"
        await d.do("limit", 1_000)
        await d.tick()
        assert len(json.loads(d.ea.sent()[0])["items"]) == 20

    async with gateway(nats_url) as url:  # a broker with a short history
        d = desk(url, InpHistoryBars=100, InpFolder="Other")
        await d.begin(("GBPUSD", 5))
        await d.bars(rows, "GBPUSD")
        d.gmt = START + 20 * 60 + 1
        await d.run()
        await d.tick(times=20)
        assert len(json.loads(d.ea.sent()[0])["items"]) == 20


async def test_a_span_that_the_gateway_lacks_is_sent_once(bus: Bus, nats_url: str, desk: Any) -> None:
    """A front adds ``backfill`` to the real gateway's answers."""
    rows = walk(301, seed=9)
    asked = [
        {"symbol": "EURUSD", "timeframe": "M1", "from": "2025-01-02T01:40:00Z", "to": "2025-01-02T01:42:00Z"},
        {"symbol": "EURUSD", "timeframe": "M1", "from": "2024-01-02T01:40:00Z", "to": "2024-01-02T01:42:00Z"},
        {"symbol": "NONE\\u0022", "timeframe": "M1", "from": "2025-01-02T01:40:00Z", "to": "2025-01-02T01:42:00Z"},
    ]
    async with gateway(nats_url) as url, front(url, {"backfill": asked}) as shown:
        d = desk(shown, InpHistoryBars=300, InpSendForming=0)
        await d.begin(("EURUSD", 5))
        await d.bars([*rows[:100], *rows[103:]])  # the terminal misses three at first
        d.gmt = START + 300 * 60 + 1
        await d.run()
        await d.tick(times=20)
        first = len(d.ea.sent())
        await d.bars(rows[100:103])
        await d.tick(d.gmt + 601)  # a bar closes, and the answer asks again
        await d.tick(times=60)
        check("backfill", d.ea.sent()[-1])
        payload = json.loads(d.ea.sent()[-1])
        assert "history" not in payload
        assert {item["closed"] for item in payload["items"]} == {True}
        assert len(payload["items"]) == 123, "an hour more on both sides"
        assert len(d.ea.sent()) == first + 2, "and once"
        assert any("has no bars" in line for line in d.ea.said)
        held = await archive(bus)
    assert [held["EURUSD", "M1"][row.ts] for row in rows] == rows


async def test_an_answer_of_something_else_deletes_nothing(tmp_path: Path, desk: Any) -> None:
    async with front(None, {}) as shown:
        d = desk(shown, InpHistoryBars=20)
        await d.begin(("EURUSD", 5))
        await d.bars(walk(21))
        d.gmt = START + 20 * 60 + 1
        await d.run()
        await d.tick(times=5)
        assert len(d.ea.queue()) == 1
        assert sum("is no gateway" in line for line in d.ea.said) == 1


async def test_inputs_that_make_no_sense_are_explained(desk: Any) -> None:
    for inputs, words in (
        ({"InpTimeframes": "M7"}, '"M7" is unknown'),
        ({"InpChunk": 0}, "out of range"),
        ({"InpFolder": ""}, "InpFolder is empty"),
    ):
        d = desk("http://127.0.0.1:9", **inputs)
        assert await d.init() != 0
        assert words in d.ea.said[-1]
    d = desk("127.0.0.1:9")
    assert await d.init() != 0
    assert "is no address" in d.ea.said[-1]
    d = desk("http://127.0.0.1:9")
    await d.do("tester", 1)
    assert await d.init() != 0
    assert "Strategy Tester" in d.ea.said[-1]
