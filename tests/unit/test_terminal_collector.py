"""deploy/mt5/terminal_collector.py against a stand-in for its terminal and a real gateway on a real nats-server."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bus.client import Bus
from bus.subjects import CANDLES
from deploy.embedded import NatsServer
from deploy.mt5 import terminal_collector
from deploy.mt5.terminal_collector import Answer, Collector, Gateway, Queue, Settings, arguments, bar_end, split
from deploy.server import free_port
from schema.messages import Candle
from tests.builders import read_until
from tests.mql5.package import Mt5
from tests.terminals import START, archive, front, gateway, stored, walk

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "deploy" / "mt5" / "terminal_collector.py"


class Recording(Gateway):
    """The collector's own gateway, with what was posted."""

    posted: list[bytes]

    def post(self, body: bytes) -> Answer:
        self.posted.append(body)
        return super().post(body)


class Desk:
    """A terminal and a collector that share one clock."""

    def __init__(self, mt5: Mt5, path: Path, url: str, **settings: Any) -> None:
        self.mt5, self.now = mt5, float(START)
        self._settings = Settings(url=url, queue=str(path / "queue.db"), **({"history": 20} | settings))
        self.posted: list[bytes] = []
        self.collector = self._new()

    def _new(self) -> Collector:
        queue = Queue(self._settings.queue)
        collector = Collector(self.mt5, self._settings, queue, clock=lambda: self.now, ticks=lambda: self.now)
        recording = Recording(self._settings.url, self._settings.api_key, self._settings.timeout)
        recording.posted = self.posted
        collector.gateway = recording
        return collector

    def restart(self) -> None:
        """Killed, and started again over the same file."""
        self.collector.queue.close()
        self.collector = self._new()

    async def step(self, now: float | None = None, *, times: int = 1, ticking: bool = True) -> None:
        for _ in range(times):
            self.now = now if now is not None else self.now + 1
            if ticking:
                for symbol in self.mt5.symbols:
                    self.mt5.quote(symbol, self.now)
            await asyncio.to_thread(self.collector.step)

    async def begin(self) -> None:
        """Three looks at arriving ticks tell the offset; the last look is at the time that was set."""
        at = self.now
        self.now -= 3
        await self.step(times=3)
        assert self.now == at

    @property
    def waiting(self) -> int:
        return len(self.collector.queue)


@pytest.fixture
def mt5() -> Mt5:
    return Mt5()


@pytest.fixture
def desks(mt5: Mt5, tmp_path: Path) -> Iterator[Any]:
    made: list[Desk] = []

    def make(url: str, **settings: Any) -> Desk:
        made.append(Desk(mt5, tmp_path, url, **settings))
        return made[-1]

    yield make
    for desk in made:
        desk.collector.close()


def fixture(name: str) -> bytes:
    return (ROOT / "tests" / "fixtures" / "ea" / f"{name}.json").read_bytes()


def changed(row: Candle, close: float) -> Candle:
    return msgspec.structs.replace(
        row, close=close, high=max(row.high, close), low=min(row.low, close), volume=row.volume + 1, real_volume=0.0
    )


async def test_it_sends_what_the_ea_sends_byte_for_byte(bus: Bus, nats_url: str, mt5: Mt5, desks: Any) -> None:
    rows = walk(23, seed=5)
    async with gateway(nats_url) as url:
        d = desks(url)
        mt5.add("EURUSD", rows[:21])  # the last one forms
        d.now = START + 20 * 60 + 31
        await d.begin()
        assert d.posted[0] == fixture("first_run_history")
        mt5.add("EURUSD", rows[20:22])
        await d.step(START + 21 * 60 + 2)
        assert d.posted[-1] == fixture("live_tick")
        count = len(d.posted)
        await d.step()
        assert len(d.posted) == count, "nothing changed, nothing is sent"
        mt5.add("EURUSD", [changed(rows[21], 1.2)])
        d.now -= 1
        await d.step()
        d.posted[-1] = d.posted[-1].replace(b"1735784463", b"1735784464").replace(b"1735777263", b"1735777264")
        assert d.posted[-1] == fixture("forming_only")
        mt5.add("EURUSD", [changed(rows[20], 1.19)])
        await d.step(START + 21 * 60 + 5)
        assert d.posted[-1] == fixture("correction")
        held = await archive(bus)
    assert list(held["EURUSD", "M1"].values()) == [*rows[:20], changed(rows[20], 1.19)]
    assert {b.ts_source for b in await stored(bus)} == {"server"}


async def test_an_outage_of_everything_loses_nothing_and_repeats_the_same_bytes(
    bus: Bus, nats_url: str, nats: NatsServer, mt5: Mt5, desks: Any
) -> None:
    rows, others = walk(80, seed=8), walk(80, seed=9)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    d = desks(url, symbols=("EURUSD", "XAU USD"))

    async def market(start: int, stop: int) -> None:
        for minute in range(start, stop):
            mt5.add("EURUSD", rows[minute : minute + 1])
            mt5.add("XAU USD", others[minute : minute + 1])
            await d.step(START + minute * 60 + 1)

    mt5.add("EURUSD", rows[:21])
    mt5.add("XAU USD", others[:21])
    d.now = START + 20 * 60 + 5
    async with gateway(nats_url, port=port):
        await d.begin()
        await d.step(times=3)
        await market(21, 25)
        nats.stop()  # the gateway answers 503
        await market(25, 30)
        assert d.waiting == 5
    await market(30, 35)  # nobody listens
    assert d.waiting == 10
    d.restart()
    mt5.add("EURUSD", rows[35:50])  # nobody collects
    mt5.add("XAU USD", others[35:50])
    nats.start()
    async with gateway(nats_url, port=port):
        d.now = START + 49 * 60 + 5
        async with asyncio.timeout(30):
            while d.waiting or (await _rows(bus)) < 2 * 49:
                await d.step(d.now + 1)
        await market(50, 55)
        held = await archive(bus)
    assert list(held["EURUSD", "M1"].values()) == rows[:54]
    assert list(held["XAU USD", "M1"].values()) == others[:54]
    repeated = [body for body in dict.fromkeys(d.posted) if d.posted.count(body) > 1]
    assert repeated, "bytes were sent again as they were"
    assert not any(json.loads(body).get("history") for body in d.posted[-8:])


async def _rows(bus: Bus) -> int:
    return sum(len(bars) for bars in (await archive(bus)).values())


async def test_a_terminal_that_goes_away_is_found_again_and_nothing_is_lost(
    bus: Bus, nats_url: str, mt5: Mt5, desks: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows, others = walk(40, seed=3), walk(40, seed=4)
    async with gateway(nats_url) as url:
        d = desks(url)
        mt5.add("EURUSD", rows[:21])
        mt5.add("GBPUSD", others[:21])
        d.now = START + 20 * 60 + 5
        await d.begin()
        await d.step(times=3)
        mt5.add("EURUSD", rows[21:23])
        mt5.add("GBPUSD", others[21:23])
        mt5.breaks_at, mt5.running = "GBPUSD", False  # after EURUSD was read, in the same look
        await d.step(START + 22 * 60 + 5, times=1)
        assert "The terminal does not answer (-10004 No IPC connection)" in caplog.text
        before = mt5.initialized
        await d.step(times=30)
        assert 3 <= mt5.initialized - before <= 6, "attempts are spaced out"
        mt5.running = True
        await d.step(times=60)
        held = await archive(bus)
    assert list(held["EURUSD", "M1"].values())[:22] == rows[:22]
    assert list(held["GBPUSD", "M1"].values())[:22] == others[:22]


async def test_history_that_comes_short_is_waited_for(bus: Bus, nats_url: str, mt5: Mt5, desks: Any) -> None:
    rows = walk(40)
    async with gateway(nats_url) as url:
        d = desks(url, history=30, forming=False)
        mt5.add("EURUSD")
        await d.begin()
        await d.step(times=5)  # None: there is no history at all yet
        mt5.add("EURUSD", rows[:31])
        mt5.limit = 5
        d.now = START + 30 * 60 + 1
        await d.step(times=10)
        assert d.posted == []
        mt5.limit = 1_000
        await d.step()
        await d.step()
        assert [len(json.loads(body)["items"]) for body in d.posted] == [30]
        assert json.loads(d.posted[0])["history"] is True


async def test_long_history_goes_in_chunks_and_other_series_stay_live(
    bus: Bus, nats_url: str, mt5: Mt5, desks: Any
) -> None:
    rows, others = walk(1_001, seed=1), walk(1_001, seed=2)
    async with gateway(nats_url) as url:
        d = desks(url, history=1_000, chunk=100, forming=False)
        mt5.add("EURUSD", rows)
        mt5.add("GBPUSD", others)
        d.now = START + 1_000 * 60 + 1
        await d.begin()
        await d.step(times=30)
        blocks = await stored(bus)
        held = await archive(bus)
    assert {b.history for b in blocks} == {True}
    assert max(len(b.rows) for b in blocks) == 100
    assert list(held["EURUSD", "M1"].values()) == rows[:1_000]
    assert list(held["GBPUSD", "M1"].values()) == others[:1_000]


async def test_a_tick_that_lay_there_says_nothing_of_the_clock(bus: Bus, nats_url: str, mt5: Mt5, desks: Any) -> None:
    async with gateway(nats_url) as url:
        d = desks(url)
        mt5.add("EURUSD", walk(21))
        mt5.quote("EURUSD", START)
        d.now = START + 50 * 3_600
        await d.step(times=5, ticking=False)
        mt5.quote("EURUSD", START + 30)  # the terminal is told of the week's last tick, which is old as well
        await d.step(times=5, ticking=False)
        assert d.posted == []
        await d.step(times=2)
        payload = json.loads(d.posted[0])
        assert payload["server_time"] - payload["gmt_time"] == 7_200
        assert payload["gmt_time"] == int(d.now)
        mt5.offset = 10_800  # daylight saving: unknown until two ticks agree
        count = len(d.posted)
        mt5.add("EURUSD", walk(3, seed=2, start=int(d.now) // 60 * 60))
        await d.step()
        assert len(d.posted) == count
        await d.step()
        payload = json.loads(d.posted[-1])
        assert payload["server_time"] - payload["gmt_time"] == 10_800
        await d.step(d.now + 7 * 3_600, ticking=False)
        count = len(d.posted)
        mt5.add("EURUSD", walk(1, seed=3, start=int(d.now) // 60 * 60))
        await d.step(ticking=False)
        assert len(d.posted) == count, "an offset that no tick confirms for hours is not believed"


async def test_without_a_clock_both_fields_are_left_out(bus: Bus, nats_url: str, mt5: Mt5, desks: Any) -> None:
    async with gateway(nats_url) as url:
        d = desks(url, no_clock=True, forming=False)
        mt5.add("EURUSD", walk(21))
        d.now = START + 50 * 3_600
        await d.step(ticking=False)
        assert json.loads(d.posted[0]).keys() == {"source", "history", "items"}


async def test_too_large_payloads_go_in_halves_and_refused_ones_aside(
    bus: Bus, nats_url: str, mt5: Mt5, desks: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = walk(23, seed=7)
    async with gateway(nats_url, max_candles=12) as url:
        d = desks(url, forming=False)
        mt5.add("EURUSD", rows[:21])
        d.now = START + 20 * 60 + 1
        await d.begin()
        assert [len(json.loads(body)["items"]) for body in d.posted] == [20, 10, 10]
        mt5.add("EURUSD", [Candle(ts=rows[20].ts, open=-1.0, high=1.0, low=-1.0, close=1.0, volume=1.0), rows[21]])
        await d.step(START + 21 * 60 + 1)
        ((status, answer, body),) = d.collector.queue.refused()
        assert (status, body) == (422, d.posted[-1])
        assert "is not positive" in answer
        assert "put aside (422)" in caplog.text
        mt5.add("EURUSD", [rows[22]])
        await d.step(START + 22 * 60 + 1)
        assert d.waiting == 0
        held = await archive(bus)
    assert list(held["EURUSD", "M1"].values()) == [*rows[:20], rows[21]]


async def test_a_wrong_key_and_a_rate_limit_are_waited_out(
    bus: Bus, nats_url: str, mt5: Mt5, desks: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = walk(41)
    mt5.add("EURUSD", rows)
    async with gateway(nats_url, api_keys=("right",), rate_limit=0.05) as url:
        d = desks(url, history=40, chunk=20, forming=False, api_key="wrong")
        d.now = START + 40 * 60 + 1
        await d.begin()
        await d.step(times=20)
        assert caplog.text.count("set COLLECTOR_API_KEY") == 1
        assert d.waiting == 1
        d.collector.close()
        d = desks(url, history=40, chunk=20, forming=False, api_key="right")
        d.now = START + 40 * 60 + 30
        await d.begin()
        await d.step()
        assert len(d.posted) == 2
        assert caplog.text.count("answers 429") == 1
        await d.step(d.now + 120)
        assert len(d.posted) == 2, "Retry-After is minutes"
        await d.step(d.now + 3_600)
        assert d.posted[2] == d.posted[1]


async def test_a_full_queue_pauses_and_the_terminals_history_fills_the_rest(
    bus: Bus, nats_url: str, mt5: Mt5, desks: Any
) -> None:
    rows = walk(61)
    port = free_port()
    d = desks(f"http://127.0.0.1:{port}", queue_most=3)
    mt5.add("EURUSD", rows[:21])
    d.now = START + 20 * 60 + 5
    await d.begin()
    for minute in range(21, 61):
        mt5.add("EURUSD", rows[minute : minute + 1])
        await d.step(START + minute * 60 + 1)
    assert d.waiting <= 3
    async with gateway(nats_url, port=port):
        await d.step(d.now + 61)
        await d.step(times=10)
        held = await archive(bus)
    assert [held["EURUSD", "M1"][row.ts] for row in rows[:60]] == rows[:60]


async def test_a_span_that_the_gateway_lacks_is_sent_once(
    bus: Bus, nats_url: str, mt5: Mt5, desks: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A front adds ``backfill`` to the real gateway's answers."""
    caplog.set_level("INFO")
    rows = walk(301, seed=9)
    asked = [
        {"symbol": "EURUSD", "timeframe": "M1", "from": "2025-01-02T01:40:00Z", "to": "2025-01-02T01:42:00Z"},
        {"symbol": "EURUSD", "timeframe": "M1", "from": "2024-01-02T01:40:00Z", "to": "2024-01-02T01:42:00Z"},
        {"symbol": "OTHER", "timeframe": "M1", "from": "2025-01-02T01:40:00Z", "to": "2025-01-02T01:42:00Z"},
    ]
    async with gateway(nats_url) as url, front(url, {"backfill": asked}) as shown:
        d = desks(shown, history=300, forming=False)
        mt5.add("EURUSD", [*rows[:100], *rows[103:]])  # the terminal misses three at first
        d.now = START + 300 * 60 + 1
        await d.begin()
        await d.step(times=20)
        count = len(d.posted)
        mt5.add("EURUSD", rows[100:103])
        await d.step(d.now + 601)  # a bar closes, and the answer asks again
        await d.step(times=60)
        assert len(d.posted) == count + 2
        items = json.loads(d.posted[-1])["items"]
        assert [item["time"] for item in items] == [item["time"] for item in json.loads(fixture("backfill"))["items"]]
        assert caplog.text.count("no such bars") == 1
        held = await archive(bus)
    assert [held["EURUSD", "M1"][row.ts] for row in rows] == rows


async def test_an_answer_of_something_else_deletes_nothing(
    mt5: Mt5, desks: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with front(None, {}) as shown:
        d = desks(shown)
        mt5.add("EURUSD", walk(21))
        d.now = START + 20 * 60 + 1
        await d.begin()
        await d.step(times=5)
        assert d.waiting == 1
        assert caplog.text.count("is no gateway") == 1


def test_two_collectors_do_not_share_a_queue(tmp_path: Path, mt5: Mt5, caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(url="http://127.0.0.1:9", queue=str(tmp_path / "queue.db"))
    queue = Queue(settings.queue)
    try:
        assert terminal_collector.run(mt5, settings, threading.Event()) == 2
    finally:
        queue.close()
    assert "end the other collector that holds it" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_ctrl_c_ends_it_cleanly(bus: Bus, nats_url: str, tmp_path: Path, number: signal.Signals) -> None:
    """The program itself, with a module named MetaTrader5 beside it."""
    (tmp_path / "MetaTrader5.py").write_text(
        "from tests.terminals import walk\nfrom tests.mql5.package import lively\n"
        "_terminal = lively('EURUSD', walk(31))\n"
        "globals().update({n: getattr(_terminal, n) for n in dir(_terminal) if not n.startswith('_')})\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "COLLECTOR_HISTORY": "30"}
    async with gateway(nats_url) as url:
        process = subprocess.Popen(
            [sys.executable, str(SOURCE), "--url", url, "--every", "0.05", "--queue", str(tmp_path / "q.db")],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            await read_until(bus, CANDLES, lambda blocks: len(blocks) == 1)
            process.send_signal(number)
            out, _ = await asyncio.to_thread(process.communicate, timeout=20)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 0, out
    assert "history is on its way, live from here." in out
    assert "Stopped; 0 payloads wait for the next start." in out.splitlines()[-1]


def test_it_is_one_file_for_old_pythons() -> None:
    tree = ast.parse(SOURCE.read_text(), feature_version=(3, 9))
    names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {str(n.module).split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names <= {*sys.stdlib_module_names, "__future__"}


def test_arguments_come_from_the_line_and_the_environment() -> None:
    env = {
        "COLLECTOR_URL": "https://gw.example",
        "COLLECTOR_API_KEY": "k",
        "COLLECTOR_CHUNK": "7",
        "COLLECTOR_QUEUE_MOST": "9",
    }
    settings = arguments(
        ["--symbols", "EURUSD.m, XAU USD", "--timeframes", "m1,H1", "--chunk", "8", "--no-forming"], env
    )
    assert settings == Settings(
        url="https://gw.example",
        api_key="k",
        symbols=("EURUSD.m", "XAU USD"),
        timeframes=("M1", "H1"),
        chunk=8,
        queue_most=9,
        forming=False,
    )
    for wrong in (["--timeframes", "M7"], ["--url", "127.0.0.1"], ["--chunk", "0"], ["--history", "x"]):
        with pytest.raises(SystemExit) as error:
            arguments(wrong, {})
        assert error.value.code == 2


@pytest.mark.parametrize(
    ("timeframe", "opened", "ends"),
    [
        ("M1", "2025-01-02T00:00", "2025-01-02T00:01"),
        ("H4", "2025-01-02T20:00", "2025-01-03T00:00"),
        ("W1", "2025-01-05T00:00", "2025-01-12T00:00"),
        ("MN1", "2024-02-01T00:00", "2024-03-01T00:00"),
        ("MN1", "2024-12-01T00:00", "2025-01-01T00:00"),
    ],
)
def test_when_bars_end(timeframe: str, opened: str, ends: str) -> None:
    at, end = (int(datetime.fromisoformat(t).replace(tzinfo=UTC).timestamp()) for t in (opened, ends))
    assert bar_end(at, timeframe) == end


def test_split_halves_as_the_ea_does() -> None:
    assert split(fixture("split_whole")) == (fixture("split_first"), fixture("split_second"))
    assert split(fixture("correction")) is None
