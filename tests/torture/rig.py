"""A system, its feed and what is done to them: kills, stops, stand-ins and lost tails, by a seeded plan."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import asyncpg
import msgspec
import psutil

from actors.core.manifest import MANIFEST_FILE, ONNX_FILE, Manifest
from actors.core.serving import ServedModel
from bus.client import Bus
from deploy.server import free_port
from tests import models as made_models
from tests.servers import wait_until
from tests.system import MARKET, System
from tests.torture.check import Report, check
from tests.torture.feed import Feed

PROGRESS_SECONDS = 90.0  # for candles to be acknowledged again after anything
ISOLATED: Final = MARKET
SERVERS: Final = ("nats-server", "postgres")
# Snapshots often, so that kills fall between them and what follows; small streams, so that the store fits a small disk.
SETTINGS: Final = {
    "MT5_FEATURES_SNAPSHOT_SECONDS": "0.2",
    "MT5_FEATURES_QUIET_SECONDS": "1",
    "MT5_STREAMS_CANDLES_MAX_BYTES": str(256 * 1024**2),
    "MT5_STREAMS_DERIVED_MAX_BYTES": str(512 * 1024**2),
}


@dataclass
class Tally:
    """What was done and what it cost, for the table."""

    title: str
    seed: int
    done: Counter[str] = field(default_factory=Counter)
    acknowledged: int = 0
    seconds: float = 0.0
    report: Report = field(default_factory=Report)
    notes: list[str] = field(default_factory=list)


TALLIES: list[Tally] = []  # of this session; conftest.py prints them


class Given(System):
    """`mt5 up` with servers that are given to it; it writes no ready.json then, so what it would say is known here."""

    nats_url: str = ""
    database_url: str = ""

    @property
    def ready(self) -> dict[str, Any]:
        return {
            "pid": self.process.pid if self.process is not None else 0,
            "gateway": f"http://127.0.0.1:{self.settings['MT5_GATEWAY_PORT']}",
            "nats": self.nats_url,
            "database": self.database_url,
        }

    def start(self, *words: str) -> float:
        began = time.monotonic()
        said = self.said().count("Ready: ")
        super().start(*words)  # at once: our ready says its pid
        process = self.process
        assert process is not None
        wait_until(
            lambda: self.said().count("Ready: ") > said or process.poll() is not None, 90, f"ready; {self.said()}"
        )
        assert process.poll() is None, self.said()
        return time.monotonic() - began


class Rig:
    """One `mt5 up --isolate` on a home of its own, with the operator's hand on every process."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        title: str,
        *,
        senders: int = 8,
        given: tuple[str, str] | None = None,
        **settings: str,
    ) -> None:
        """``given``: URLs of NATS and of PostgreSQL as the tests reach them; the actors' own are in ``settings``."""
        self.seed = seed
        folder.mkdir(parents=True, exist_ok=True)
        self.rng = random.Random(seed)
        self.port = free_port()
        known = {**SETTINGS, "MT5_GATEWAY_PORT": str(self.port), **settings}
        if given is None:
            self.system = System(folder, known)
        else:
            self.system = system = Given(folder, known)
            system.nats_url, system.database_url = given
        self.feed = Feed(seed, lambda: self.port, senders)
        self.tally = Tally(title, seed)
        self.models: dict[str, ServedModel] = {}
        self._releases = 0
        TALLIES.append(self.tally)

    @contextlib.contextmanager
    def running(self) -> Iterator[Rig]:
        """The system and its feed; ends both."""
        began = time.monotonic()
        try:
            made_models.trust(self.system.home)
            self.system.start("up", *ISOLATED, "--isolate")
            with self.feed:
                self.feed.await_progress(200, PROGRESS_SECONDS)
                yield self
        finally:
            self.tally.seconds = time.monotonic() - began
            self.tally.acknowledged = self.feed.acknowledged
            self.system.end()

    def child(self, name: str) -> psutil.Process:
        """An actor's process of the isolated system, or a server's."""
        assert self.system.process is not None
        for process in psutil.Process(self.system.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                if process.name() == name or ("_run" in words and name in words):
                    return process
        raise LookupError(f"{name} does not run")

    # --- what is done ----------------------------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        """SIGKILL; the supervisor brings it back."""
        dead = self._await_child(name)
        dead.kill()
        self.tally.done[f"kill -9 {'actor' if name in ISOLATED else name}"] += 1
        wait_until(lambda: self._other(name, dead.pid), 60, f"{name} is started again")

    async def _connect(self) -> asyncpg.Connection:
        """To the archive, which may still be coming back from what was done before."""
        async with asyncio.timeout(PROGRESS_SECONDS):
            while True:
                try:
                    return await asyncpg.connect(self.system.ready["database"])
                except (OSError, asyncpg.CannotConnectNowError):
                    await asyncio.sleep(0.1)

    def kill_waiting(self, name: str, table: str = "features") -> None:
        """SIGKILL while the archive's table is locked by somebody else, as by maintenance: in the middle of a batch."""

        async def locked() -> None:
            connection = await self._connect()
            try:
                await connection.execute("BEGIN")
                await connection.execute(f"LOCK TABLE {table} IN EXCLUSIVE MODE")
                await asyncio.to_thread(self.feed.await_progress, 60, PROGRESS_SECONDS)
                async with asyncio.timeout(30):
                    while not await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                        await asyncio.sleep(0.01)
                self._await_child(name).kill()
                self.tally.done[f"kill -9 {'actor' if name in ISOLATED else name}"] += 1
            finally:
                connection.terminate()

        pid = self._await_child(name).pid
        asyncio.run(locked())
        wait_until(lambda: self._other(name, pid), 60, f"{name} is started again")

    def kill_everything(self) -> None:
        self.system.kill()
        self.tally.done["kill -9 everything"] += 1
        self.system.start("up", *ISOLATED, "--isolate")

    def freeze(self, name: str, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after a while: the process goes on as if nothing had been."""
        first = self._await_child(name)
        family = [first, *first.children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        try:
            time.sleep(seconds)
        finally:
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()
        self.tally.done["SIGSTOP"] += 1

    def swap_model(self) -> None:
        """Another model serves from the next candle on."""
        self._releases += 1
        symbols = tuple(one.symbol for one in self.feed.series)
        artifacts = made_models.files(1 + self._releases % 2, symbols)
        manifest = msgspec.json.decode(artifacts[MANIFEST_FILE], type=Manifest)
        self.models[manifest.version] = ServedModel(manifest, artifacts[ONNX_FILE])

        async def release() -> None:
            bus = await Bus.connect(self.system.ready["nats"], name="operator", patience=30)
            try:
                async with asyncio.timeout(60):
                    await made_models.release(bus, artifacts)
            finally:
                await bus.close()

        asyncio.run(release())
        self.tally.done["model swapped"] += 1

    def stand_in(self, names: tuple[str, ...], seconds: float) -> None:
        """A second process of each actor; the first is frozen until the second works, and wakes up while it does."""
        given = {"MT5_NATS_URL": self.system.ready["nats"], "MT5_DATABASE_URL": self.system.ready["database"]}
        given["MT5_MODELS_PUBLIC_KEY"] = str(self.system.home / "keys" / "models.pub")
        with self.system.running_env({**given, "MT5_HOME": str(self.system.folder / "second")}, "up", *names) as second:
            for name in names:
                self.freeze(name, seconds)
                self.tally.done["duplicated actor"] += 1
            self.feed.await_progress(100, PROGRESS_SECONDS)
            assert second.poll() is None, f"the second `up` ended: {second.communicate()}"
            second.send_signal(signal.SIGTERM)
            second.wait(30)

    def lose_tail(self, *streams: str) -> None:
        """Derived streams as a disk has them that lost the newest writes: an older copy of their folders."""
        store = self.system.home / "nats" / "jetstream" / "$G" / "streams"
        aside = self.system.folder / "aside"
        self.system.kill()
        shutil.rmtree(aside, ignore_errors=True)
        for name in streams:
            shutil.copytree(store / name, aside / name)
        self.system.start("up", *ISOLATED, "--isolate")
        self.feed.await_progress(150, PROGRESS_SECONDS)
        self.system.kill()
        for name in streams:
            shutil.rmtree(store / name)
            shutil.copytree(aside / name, store / name)
        self.tally.done["tail lost"] += 1
        self.system.start("up", *ISOLATED, "--isolate")

    # --- the end ---------------------------------------------------------------------------------------------------

    def verdict(self, settle_seconds: float = 180.0) -> Report:
        """Ends the feed, waits until everything is archived, and compares."""
        self.feed.finish()
        self.tally.acknowledged = self.feed.acknowledged
        self.system.settle(settle_seconds)
        ready = self.system.ready
        self.tally.report = check(ready["nats"], ready["database"], self.feed.series, self.models)
        return self.tally.report

    def assert_clean(self) -> None:
        report = self.verdict()
        assert report.clean, f"seed {self.seed}: {report}\n{self.system.said()[-2_000:]}"
        lines = [line for line in self.system.logs().splitlines() if "permissions violation" in line.lower()]
        assert not lines, lines[:3]

    def _await_child(self, name: str) -> psutil.Process:
        found: list[psutil.Process] = []

        def there() -> bool:
            with contextlib.suppress(LookupError, psutil.NoSuchProcess):
                found.append(self.child(name))
            return bool(found)

        wait_until(there, 60, f"{name} runs")
        return found[-1]

    def _other(self, name: str, pid: int) -> bool:
        with contextlib.suppress(LookupError, psutil.NoSuchProcess):
            return self.child(name).pid != pid
        return False


def describe(tally: Tally) -> dict[str, Any]:
    """A line of the table."""
    report = tally.report
    return {
        "torture": tally.title,
        "seed": tally.seed,
        "what was done": ", ".join(f"{count} × {what}" for what, count in sorted(tally.done.items())),
        "acknowledged": tally.acknowledged,
        "lost": report.lost,
        "missing": report.missing,
        "doubled": report.doubled,
        "different": report.different,
        "seconds": round(tally.seconds),
        "notes": "; ".join(tally.notes),
    }
