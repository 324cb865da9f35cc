"""From POST to signal: one live series through a real ``up``, beside the bare chain and the polling API on the same servers.

The three take turns, so that whatever the machine does meanwhile hits all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import aiohttp
import asyncpg
import joblib
import msgspec

from actors.core import signing
from actors.core.manifest import MANIFEST_FILE, ONNX_FILE, SIGNATURE_FILE, Manifest
from actors.core.market import INSTRUMENTS
from actors.workshop.keys import PRIVATE_FILE
from bus.client import Bus
from bus.subjects import MODELS, SIGNALS
from commands.bench_core import post_body
from commands.bench_figures import Figure, Promise, alone, compare, quantile
from commands.bench_model import TIMEFRAME, candles, on_columns, served
from commands.bench_system import Running
from commands.output import CommandError
from commands.places import CLIENT
from deploy.server import free_port
from schema.messages import Candle, ModelEvent

SYMBOL: Final = INSTRUMENTS[0].symbol
WARM: Final = 1_000  # bars of history before the first live one
SETTLE: Final = 20  # first posts of a round that do not count: connections and caches
BETWEEN: Final = 0.005  # seconds between two posts, as the bare chain does it
PATIENCE: Final = 10.0  # seconds for one signal
POLLING_INPUTS: Final = ("close", "volume", "spread", "rsi", "macd", "macd_signal", "macd_hist", "atr", "ma60", "ret_1")
POLLING_NEEDS: Final = ("fastapi", "uvicorn", "pandas", "talib")
POLLING_WARM: Final = 320
JSON: Final = {"Content-Type": "application/json"}
FLOOR: Final = "floor_chain.py"
POLLING: Final = "polling_api.py"

OVER_FLOOR: Final = Promise("≤ 2 ×", 2.0, "at most")
OVER_POLLING: Final = Promise("≥ 8 × faster", 8.0, "at least")

Round = Callable[[], Awaitable[list[float]]]  # milliseconds from each POST to its signal


async def chain(system: Running, peers: Path, rounds: int, posts: int, scratch: Path) -> list[Figure]:
    """p50 and p99 of ``rounds`` rounds of ``posts`` posts each (a third of them against the slow peer)."""
    async with contextlib.AsyncExitStack() as stack:
        bus = await Bus.connect(system.nats, name=CLIENT)
        stack.push_async_callback(bus.close)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        await release(bus, system.home)
        bars = iter(candles(WARM + rounds * (posts + SETTLE)))
        warm = [next(bars) for _ in range(WARM)]
        await post_history(session, system.gateway, SYMBOL, warm)
        live = await stack.enter_async_context(_live(bus))
        arms: dict[str, Round] = {"ours": lambda: _ours(session, system.gateway, live, bars, posts)}
        why_not = {name: missing(peers, name) for name in (FLOOR, POLLING)}
        if not why_not[FLOOR]:
            arms[FLOOR] = lambda: _floor(peers / FLOOR, system.nats, posts)
        if not why_not[POLLING]:
            url = await stack.enter_async_context(_polling(peers, system.database, scratch))
            theirs = iter(candles(POLLING_WARM + rounds * (posts + SETTLE))[POLLING_WARM:])
            arms[POLLING] = lambda: _ask_polling(session, url, theirs, max(posts // 3, 20))
        taken: dict[str, list[list[float]]] = {name: [] for name in arms}
        order = list(arms)
        for turn in range(rounds):
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                taken[name].append(await arms[name]())
    return _figures(taken, why_not)


def _figures(taken: dict[str, list[list[float]]], why_not: dict[str, str]) -> list[Figure]:
    def at(name: str, share: float) -> list[float]:
        return [quantile(one, share) for one in taken[name]]

    def figure(what: str, peer: str, share: float, promise: Promise, *, faster: bool = False) -> Figure:
        if peer in taken:
            label = "the bare chain" if peer == FLOOR else "the polling API"
            return compare("chain", what, "ms", at("ours", share), label, at(peer, share), promise, faster=faster)
        ours = alone("chain", what, "ms", at("ours", share), promise)
        return msgspec.structs.replace(ours, quartiles=None, why_not=why_not[peer])

    return [
        figure("POST → signal, p50", FLOOR, 0.5, OVER_FLOOR),
        figure("POST → signal, p99", FLOOR, 0.99, OVER_FLOOR),
        figure("POST → signal, p50", POLLING, 0.5, OVER_POLLING, faster=True),
    ]


def missing(peers: Path, name: str) -> str:
    """Why a peer cannot be measured; empty where it can."""
    if not (peers / name).is_file():
        return f"{peers / name} does not exist: name the peers' folder with --peers DIR."
    lacking = [need for need in POLLING_NEEDS if name == POLLING and find_spec(need) is None]
    return f"{', '.join(lacking)} not installed: install the extras `bench` and `test`." if lacking else ""


# --- ours --------------------------------------------------------------------------------------------------------


async def release(bus: Bus, home: Path) -> None:
    """Lets a model of 200 trees serve, signed with the key of ``home``'s trainer; returns once the emitter says so."""
    one = served(SYMBOL)
    signature = signing.sign(await asyncio.to_thread((home / "keys" / PRIVATE_FILE).read_bytes), one.manifest)
    manifest = msgspec.json.decode(one.manifest, type=Manifest)
    serves: asyncio.Future[ModelEvent] = asyncio.get_running_loop().create_future()

    async def on_event(message: Any) -> None:
        event = MODELS.decode(message.data)
        if event.version == manifest.version and event.event in ("activated", "refused") and not serves.done():
            serves.set_result(event)

    listening = await bus.nc.subscribe(MODELS.wildcard, cb=on_event)
    for file, data in ((ONNX_FILE, one.graph), (SIGNATURE_FILE, signature), (MANIFEST_FILE, one.manifest)):
        await bus.put_object(f"{manifest.name}/{manifest.version}/{file}", data)
    event = ModelEvent(
        event="released",
        model_name=manifest.name,
        version=manifest.version,
        timeframe=TIMEFRAME,
        at=datetime.now(UTC),
        state="provisional",
        by="bench",
    )
    await bus.publish(MODELS, event, manifest.name, msg_id=f"bench:{manifest.version}")
    async with asyncio.timeout(PATIENCE):
        answer = await serves
    await listening.unsubscribe()
    if answer.event == "refused":
        raise CommandError(f"The emitter refuses the benchmark's model: {answer.reason}")


async def post_history(session: aiohttp.ClientSession, gateway: str, symbol: str, bars: Sequence[Candle]) -> None:
    """Posts bars as history, 1,000 a payload, one after the other."""
    for body in history_bodies(symbol, bars):
        await post(session, gateway, body)


def history_bodies(symbol: str, bars: Sequence[Candle], size: int = 1_000) -> list[bytes]:
    return [
        msgspec.json.encode(
            {
                "symbol": symbol,
                "timeframe": TIMEFRAME,
                "history": True,
                "candles": [
                    {
                        "time": int(bar.ts.timestamp()),
                        "open": bar.open,
                        "high": bar.high,
                        "low": bar.low,
                        "close": bar.close,
                        "tick_volume": bar.volume,
                        "spread": bar.spread,
                    }
                    for bar in bars[start : start + size]
                ],
            }
        )
        for start in range(0, len(bars), size)
    ]


async def post(session: aiohttp.ClientSession, gateway: str, body: bytes) -> None:
    """One payload; raises CommandError where the gateway does not take it."""
    async with session.post(f"{gateway}/ingest", data=body, headers=JSON) as response:
        answer = await response.read()
        if response.status != 200:
            raise CommandError(f"The gateway answered {response.status}: {answer.decode(errors='replace')[:200]}")


@contextlib.asynccontextmanager
async def _live(bus: Bus) -> AsyncIterator[dict[datetime, asyncio.Future[float]]]:
    """Futures by bar time; each gets the moment at which that bar's signal arrived on core NATS."""
    waiting: dict[datetime, asyncio.Future[float]] = {}

    async def on_signal(message: Any) -> None:
        arrived = time.perf_counter()
        signal = SIGNALS.decode(message.data)
        waiter = waiting.pop(signal.ts, None)
        if waiter is not None and not waiter.done():
            if signal.prob_up is None:
                waiter.set_exception(CommandError(f"No model was asked for {signal.ts} ({signal.abstain})."))
            else:
                waiter.set_result(arrived)

    subscription = await bus.nc.subscribe(SIGNALS.subject(TIMEFRAME, SYMBOL), cb=on_signal)
    await bus.nc.flush()
    yield waiting
    await subscription.unsubscribe()


async def _ours(
    session: aiohttp.ClientSession,
    gateway: str,
    waiting: dict[datetime, asyncio.Future[float]],
    bars: Iterator[Candle],
    posts: int,
) -> list[float]:
    loop = asyncio.get_running_loop()
    url = f"{gateway}/ingest"
    taken = []
    for _ in range(SETTLE + posts):
        bar = next(bars)
        body = post_body(SYMBOL, bar)
        arrival = waiting[bar.ts] = loop.create_future()
        started = time.perf_counter()
        async with session.post(url, data=body, headers=JSON) as response:
            answer = await response.read()
        if response.status != 200:
            raise CommandError(f"The gateway answered {response.status}: {answer.decode(errors='replace')[:200]}")
        async with asyncio.timeout(PATIENCE):
            taken.append(((await arrival) - started) * 1e3)
        await asyncio.sleep(BETWEEN)
    return taken[SETTLE:]


# --- the bare chain ----------------------------------------------------------------------------------------------


async def _floor(program: Path, nats_url: str, posts: int) -> list[float]:
    words = (sys.executable, str(program), str(SETTLE + posts), "--raw")
    said = await _run(words, {"NATS_URL": nats_url}, program.name)
    return list(msgspec.json.decode(said)["raw_ms"][SETTLE:])


async def _run(words: Sequence[str], environment: dict[str, str], name: str) -> bytes:
    process = await asyncio.create_subprocess_exec(
        *words, env=os.environ | environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        said, problems = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        lines = problems.decode(errors="replace").strip().splitlines()
        raise CommandError(f"{name} failed: {lines[-1] if lines else f'exit code {process.returncode}'}")
    return said


# --- the polling API ---------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _polling(peers: Path, database: str, scratch: Path) -> AsyncIterator[str]:
    """Its URL, with a forest of the same size and 320 bars behind it."""
    pickle = scratch / "polling.pkl"
    joblib.dump(await asyncio.to_thread(on_columns, POLLING_INPUTS), pickle)
    port = free_port()
    module = POLLING.removesuffix(".py")
    options = ("--host", "127.0.0.1", "--port", str(port), "--log-level", "error")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "uvicorn", f"{module}:app", "--app-dir", str(peers), *options),
        env=os.environ | {"DATABASE_URL": database, "MODEL": str(pickle), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=asyncio.subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        await _listens(url, process)
        await _warm_polling(database)
        yield url
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(PATIENCE):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


async def _listens(url: str, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(60.0), aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(f"{url}/signals") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            if process.returncode is not None:
                raise CommandError(f"{POLLING} did not start (exit code {process.returncode}).")
            await asyncio.sleep(0.1)


async def _warm_polling(database: str) -> None:
    connection = await asyncpg.connect(database)
    try:
        await connection.executemany(
            "INSERT INTO peer_market_data VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT DO NOTHING",
            [
                (SYMBOL, TIMEFRAME, b.ts, b.open, b.high, b.low, b.close, b.volume, b.spread)
                for b in candles(POLLING_WARM)
            ],
        )
    finally:
        await connection.close()


async def _ask_polling(session: aiohttp.ClientSession, url: str, bars: Iterator[Candle], posts: int) -> list[float]:
    """Posts a candle and asks for its signal, as a caller of that design must."""
    taken = []
    for _ in range(SETTLE // 4 + posts):
        bar = next(bars)
        named = {name: getattr(bar, name) for name in ("open", "high", "low", "close", "volume", "spread")}
        body = msgspec.json.encode({"ts": bar.ts.isoformat(), "symbol": SYMBOL, "timeframe": TIMEFRAME} | named)
        started = time.perf_counter()
        async with session.post(f"{url}/ingest", data=body, headers=JSON) as response:
            await response.read()
        async with session.get(f"{url}/signals", params={"timeframe": TIMEFRAME, "symbol": SYMBOL}) as response:
            answer = msgspec.json.decode(await response.read())
        taken.append((time.perf_counter() - started) * 1e3)
        if datetime.fromisoformat(answer[0]["ts"]) != bar.ts:
            raise CommandError(f"{POLLING} answered with the signal of another bar.")
        await asyncio.sleep(BETWEEN)
    return taken[SETTLE // 4 :]
