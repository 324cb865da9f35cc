"""A whole `mt5 up` as a process of its own, with clients for what it serves, for the acceptance tests."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import psutil

from bus.client import Bus
from bus.consume import Reader
from bus.permissions import OPERATOR
from bus.subjects import CANDLES, SIGNALS
from schema.messages import Signal
from tests.servers import ROOT, wait_until

MARKET = (
    "collector",
    "features",
    "emitter",
    "recorder",
    "trainer",
    "scorer",
)  # the candles' way, without who operates it
READY_SECONDS = 60.0  # the promise of ten is held by one test; all others share the machine with their neighbours
ARCHIVE_SECONDS = 90.0
SENTINEL = "ZZZ"  # begins the symbols of the candles that `settle` sends


def environment(home: Path, **extra: str) -> dict[str, str]:
    foreign = {name: value for name, value in os.environ.items() if not name.startswith("MT5_")}
    return foreign | {"PYTHONPATH": str(ROOT), "MT5_HOME": str(home), "MT5_GATEWAY_PORT": "0"} | extra


@dataclass
class System:
    """`mt5 up` on a home of its own under ``folder``; it may be started, killed and started again."""

    folder: Path
    settings: dict[str, str] = field(default_factory=dict)
    actors: tuple[str, ...] = ()  # these only; none: all
    process: subprocess.Popen[bytes] | None = None
    _sentinels: int = 0

    @property
    def home(self) -> Path:
        return self.folder / "var"

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def ready(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.home / "ready.json").read_text())
        return found

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def log(self, name: str) -> str:
        file = self.home / "logs" / f"{name}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def logs(self) -> str:
        """Everything that the run and its children wrote."""
        return self.said() + "".join(f.read_text(errors="replace") for f in (self.home / "logs").glob("*.log*"))

    # --- its life --------------------------------------------------------------------------------------------------

    def start(self, *words: str) -> float:
        """Starts `mt5 up` and returns the seconds until ready.json stood there."""
        began = time.monotonic()
        with self.output.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "runner", *(words or ("up", *self.actors))],
                cwd=self.folder,
                env=environment(self.home, **self.settings),
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.process = process

        def ready_or_ended() -> bool:
            if process.poll() is not None:
                return True
            with contextlib.suppress(OSError, ValueError):
                return bool(self.ready["pid"] == process.pid)
            return False

        wait_until(ready_or_ended, READY_SECONDS, f"ready.json; so far: {self.said()}")
        assert process.poll() is None, self.said()
        return time.monotonic() - began

    def children(self) -> list[psutil.Process]:
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def child(self, name: str) -> psutil.Process:
        """The process of ``hot``, ``recorder``, ``trainer``, ``nats-server`` or ``postgres`` (its postmaster)."""
        assert self.process is not None
        actors = {"hot": "collector"}
        for process in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                if process.name() == name or ("_run" in words and actors.get(name, name) in words):
                    return process
        raise LookupError(f"{name} does not run")

    def kill(self) -> None:
        """SIGKILL to the runner and to everything below it."""
        assert self.process is not None
        below = self.children()
        self.process.kill()
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(10)
        _, alive = psutil.wait_procs(below, timeout=10)
        assert not alive

    def stop(self) -> float:
        """SIGTERM; returns the seconds until it had exited, with 0."""
        assert self.process is not None
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0, self.said()
        return time.monotonic() - began

    def end(self) -> None:
        """Whatever state it is in."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.kill()

    def processes(self) -> list[psutil.Process]:
        """Every process of this machine that works on this home, clients included."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if str(self.home) in " ".join([*process.cmdline(), process.environ().get("MT5_HOME", "")]):
                    found.append(process)
        return found

    # --- the command line ------------------------------------------------------------------------------------------

    def mt5(self, *words: str, timeout: float = 120.0, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "runner", *words],
            cwd=self.folder,
            env=environment(self.home, **{**self.settings, **extra}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    @contextlib.contextmanager
    def running(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        """A command beside the test; killed where it outlives the block."""
        with self.running_env({}, *words) as process:
            yield process

    @contextlib.contextmanager
    def running_env(self, more: dict[str, str], *words: str) -> Iterator[subprocess.Popen[str]]:
        """:meth:`running` with more in its environment."""
        process = subprocess.Popen(
            [sys.executable, "-m", "runner", *words],
            cwd=self.folder,
            env=environment(self.home, **{**self.settings, **more}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def replay(self, file: Path, symbol: str, timeframe: str, *options: str) -> dict[str, Any]:
        """Replays a file and returns what it summed up."""
        done = self.mt5("replay", str(file), "--symbol", symbol, "--timeframe", timeframe, "--json", *options)
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    # --- HTTP ------------------------------------------------------------------------------------------------------

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.ready["gateway"] + path, timeout=10) as answer:
            return json.loads(answer.read())

    def post(self, document: Any) -> Any:
        request = urllib.request.Request(
            self.ready["gateway"] + "/ingest",
            data=json.dumps(document).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read())

    # --- the database ----------------------------------------------------------------------------------------------

    def fetch(self, sql: str, *values: Any) -> list[Any]:
        async def ask() -> list[Any]:
            connection = await asyncpg.connect(self.ready["database"])
            try:
                return list(await connection.fetch(sql, *values))
            finally:
                await connection.close()

        return asyncio.run(ask())

    def counts(self, symbol: str) -> dict[str, int]:
        """Rows of a symbol by table."""
        (row,) = self.fetch(
            """SELECT (SELECT count(*) FROM market_data WHERE symbol = $1) AS market_data,
                      (SELECT count(*) FROM features WHERE symbol = $1) AS features,
                      (SELECT count(*) FROM model_signals WHERE symbol = $1) AS model_signals""",
            symbol,
        )
        return dict(row)

    def contents(self, symbol: str) -> str:
        """A hash of every column of every row of a symbol, in order: equal exactly where nothing has changed."""
        digest = hashlib.sha256()
        for table, order in (("market_data", "ts"), ("features", "ts"), ("model_signals", "ts, id")):
            for row in self.fetch(f"SELECT t::text AS row FROM {table} t WHERE symbol = $1 ORDER BY {order}", symbol):
                digest.update(row["row"].encode())
        return digest.hexdigest()

    def settle(self, seconds: float = ARCHIVE_SECONDS) -> None:
        """Returns once everything that was sent before is in the archive: a candle sent now has come out of every end.

        The streams are ordered, so what is archived of this candle stands behind all that came before it.
        """
        self._sentinels += 1
        symbol = f"{SENTINEL}{self._sentinels}"
        opened = int(datetime(2025, 1, 2, tzinfo=UTC).timestamp())
        candle = {"time": opened, "open": 1.0, "high": 1.0, "low": 1.0, "close": 1.0, "volume": 1}
        answer = self.post(
            {"symbol": symbol, "timeframe": "M1", "replay": True, "gmt_time": opened + 60, "candles": [candle]}
        )
        assert answer["accepted"] == 1

        async def archived() -> None:
            connection = await asyncpg.connect(self.ready["database"])
            try:
                async with asyncio.timeout(seconds):
                    while not await connection.fetchval(
                        """SELECT EXISTS (SELECT FROM model_signals WHERE symbol = $1)
                              AND EXISTS (SELECT FROM market_data WHERE symbol = $1)""",
                        symbol,
                    ):
                        await asyncio.sleep(0.05)
            finally:
                await connection.close()

        asyncio.run(archived())

    # --- NATS ------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def bus(self) -> AsyncIterator[Bus]:
        """The operator's connection."""
        bus = await Bus.connect(self.ready["nats"], name=OPERATOR)
        try:
            yield bus
        finally:
            await bus.close()

    def await_candles(self, symbol: str, timeframe: str, messages: int, seconds: float = 60.0) -> None:
        """Returns as soon as CANDLES holds that many messages of a series."""
        subject = CANDLES.subject(timeframe, symbol)

        async def look() -> None:
            async with self.bus() as bus, asyncio.timeout(seconds):
                while True:
                    info = await bus.js.stream_info(str(CANDLES.stream), subjects_filter=subject)
                    if (info.state.subjects or {}).get(subject, 0) >= messages:
                        return
                    await asyncio.sleep(0.01)

        asyncio.run(look())

    def streamed_signals(self, symbol: str, timeframe: str) -> list[Signal]:
        """Every signal of a series on its public subject, in the stream's order."""

        async def read() -> list[Signal]:
            subject = SIGNALS.subject(timeframe, symbol)
            async with self.bus() as bus:
                info = await bus.js.stream_info(str(SIGNALS.stream), subjects_filter=subject)
                count = (info.state.subjects or {}).get(subject, 0)
                async with Reader(bus, SIGNALS, name="acceptance", start=1, batch=512, subject=subject) as reader:
                    return [(await reader.next(10.0)).message for _ in range(count)]

        return asyncio.run(read())

    def passwords(self) -> dict[str, str]:
        """The NATS users of this run with their passwords, from the server's configuration."""
        text = (self.home / "nats" / "nats.conf").read_text()
        return dict(re.findall(r'user: "([^"]+)", password: "([^"]+)"', text))


# --- files of candles ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A line of a file, read without any code of the project."""

    ts: datetime
    open: float
    high: float
    low: float
    close: float
    volume: float
    spread: float


def read_file(file: Path) -> list[Bar]:
    with file.open(newline="") as stream:
        rows = list(csv.reader(stream, delimiter="\t" if stream.readline().startswith("<") else ","))
    if len(rows[0]) == 9:  # the terminal's export: date, time, prices, tick volume, volume, spread
        return [
            Bar(datetime.strptime(f"{r[0]} {r[1]} +0000", "%Y.%m.%d %H:%M:%S %z"), *_floats(r[2:7]), float(r[8]))
            for r in rows
        ]
    return [Bar(datetime.fromtimestamp(int(r[0]), UTC), *_floats(r[1:6]), float(r[6])) for r in rows]


def _floats(words: Sequence[str]) -> Iterator[float]:
    return map(float, words)


def cut(file: Path, target: Path, first: int, last: int) -> Path:
    """A file of the bars ``first`` to ``last`` (counted from 0, the last excluded) with the same header."""
    header, *lines = file.read_text().splitlines(keepends=True)
    target.write_text("".join([header, *lines[first:last]]))
    return target
