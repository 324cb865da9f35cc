"""The command line on real servers: start, supervision, stop, and the commands that ask a running system."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest

from bus import permissions
from bus.client import Bus
from bus.subjects import SIGNALS
from commands.up import ACTORS
from schema.messages import Signal
from tests.servers import nats_server, postgres_server, wait_until

ROOT = Path(__file__).resolve().parents[2]
READY_SECONDS = 60  # the promise of ten is for an idle machine; the benchmark holds it to that

pytestmark = pytest.mark.timeout(180)


def environment(home: Path, **extra: str) -> dict[str, str]:
    foreign = {name: value for name, value in os.environ.items() if not name.startswith("MT5_")}
    return foreign | {"PYTHONPATH": str(ROOT), "MT5_HOME": str(home), "MT5_GATEWAY_PORT": "0"} | extra


@dataclass
class Running:
    """A `mt5 up` of ours."""

    process: subprocess.Popen[str]
    home: Path
    output: Path

    @property
    def ready(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.home / "ready.json").read_text())
        return found

    def await_ready(self) -> dict[str, Any]:
        def ready_or_ended() -> bool:
            return (self.home / "ready.json").exists() or self.process.poll() is not None

        wait_until(ready_or_ended, READY_SECONDS, f"ready.json; the output: {self.said()}")
        assert self.process.poll() is None, self.said()
        return self.ready

    def said(self) -> str:
        return self.output.read_text()

    def mt5(self, *words: str, **extra: str) -> subprocess.CompletedProcess[str]:
        """Another command on the same home."""
        command = [sys.executable, "-m", "runner", *words]
        return subprocess.run(
            command,
            cwd=self.home.parent,
            env=environment(self.home, **extra),
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )

    def child(self, *words: str) -> psutil.Process:
        """The one descendant whose command line has all of these words."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(
                psutil.NoSuchProcess
            ):  # a program that ended meanwhile, or is still to be waited for
                if all(word in process.cmdline() for word in words):
                    found.append(process)
        (one,) = found
        return one

    def terminate(self, number: signal.Signals = signal.SIGTERM) -> float:
        """Asks for the stop and returns the seconds until the exit; the exit code must be 0."""
        began = time.monotonic()
        self.process.send_signal(number)
        assert self.process.wait(30) == 0, self.said()
        return time.monotonic() - began


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    """Starts `mt5 up …`; whatever still runs at the end is killed."""
    started: list[Running] = []

    def begin(*words: str, home: Path | None = None, **extra: str) -> Running:
        folder = tmp_path_factory.mktemp("up")
        output = folder / "output"
        home = home or folder / "var"
        with output.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "runner", *(words or ("up",))],
                cwd=folder,
                env=environment(home, **extra),
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
            )
        started.append(Running(process, home, output))
        return started[-1]

    yield begin
    for running in started:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


@pytest.fixture(scope="module")
def system(start: Callable[..., Running]) -> Running:
    """One whole system on embedded servers, shared by the tests that leave it running."""
    running = start()
    running.await_ready()
    return running


def living(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended; a zombie has, whoever has yet to hear of it."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def get(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except OSError:
        return 0


async def ping(url: str, actor: str) -> str | None:
    """The instance of an actor's micro service."""
    bus = await Bus.connect(url, name=permissions.OPERATOR, patience=10)
    try:
        answer = await bus.request(f"$SRV.PING.{actor}", timeout=5)
        return str(json.loads(answer)["id"])
    finally:
        await bus.close()


# --- ready -------------------------------------------------------------------------------------------------------


async def test_ready_json_says_where_everything_is_and_only_to_its_owner(system: Running) -> None:
    ready = system.ready
    assert ready.keys() == {"pid", "gateway", "nats", "database"}
    assert ready["pid"] == system.process.pid
    assert stat.S_IMODE((system.home / "ready.json").stat().st_mode) == 0o600
    assert get(f"{ready['gateway']}/live") == 200
    connection = await asyncpg.connect(ready["database"])
    assert await connection.fetchval("SELECT count(*) FROM market_data") == 0
    await connection.close()
    for actor in ACTORS:
        assert await ping(ready["nats"], actor)


def test_the_page_is_told_once_everything_is_ready(system: Running) -> None:
    wait_until(lambda: "Ready: " in system.said(), 5, "the line")
    assert f"Ready: {system.ready['gateway']}/" in system.said()


def test_no_password_stands_on_a_command_line(system: Running) -> None:
    secrets = {system.ready[name].split("@")[0].rpartition(":")[2] for name in ("nats", "database")}
    children = psutil.Process(system.process.pid).children(recursive=True)
    assert len(children) >= 6  # nats-server, postgres, hot, recorder, trainer, scorer
    for child in children:
        assert not any(secret in word for secret in secrets for word in child.cmdline())


def test_each_actor_has_its_own_credentials_and_no_process_the_operators(system: Running) -> None:
    operator = system.ready["nats"].split("@")[0]
    hot = system.child("_run", "collector", "features", "emitter").environ()
    recorder = system.child("_run", "recorder").environ()
    assert hot["MT5_NATS_URLS"].count("nats://") == 3
    assert recorder["MT5_NATS_URLS"].startswith("recorder=nats://recorder:")
    for env in (hot, recorder):
        assert operator not in str(env)


def test_a_second_up_says_who_holds_the_home(system: Running) -> None:
    done = system.mt5("up")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"mt5: {system.home} is in use by process {system.process.pid}: stop it, or set MT5_HOME to another folder."
    ]
    assert (system.home / "ready.json").exists()


# --- asking ------------------------------------------------------------------------------------------------------


def test_topology_and_migrations_are_current(system: Running) -> None:
    assert json.loads(system.mt5("topology", "--json").stdout) == {"current": True, "differences": []}
    assert json.loads(system.mt5("topology", "apply", "--json").stdout) == {"applied": []}
    assert json.loads(system.mt5("migrate", "--json").stdout) == {"applied": []}


def test_topology_tells_a_difference_and_apply_mends_it(system: Running) -> None:
    changed = {"MT5_STREAMS_CANDLES_MAX_AGE": "86400"}
    done = system.mt5("topology", "--json", **changed)
    assert done.returncode == 1
    assert json.loads(done.stdout)["differences"] == [
        {"stream": "CANDLES", "field": "max_age", "wanted": "86400.0", "found": "604800.0"}
    ]
    assert "apply" in system.mt5("topology", **changed).stdout
    assert system.mt5("topology", "apply", **changed).returncode == 0
    assert system.mt5("topology", **changed).returncode == 0
    assert system.mt5("topology", "apply").returncode == 0
    assert system.mt5("topology").returncode == 0


def test_doctor_finds_a_running_system_well(system: Running) -> None:
    done = system.mt5("doctor", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0, found
    assert found["ok"]
    assert {"up", "gateway", "nats", "topology", "database", "migrations"} <= {
        item["check"] for item in found["findings"]
    }


def test_doctor_finds_a_settings_file_that_others_can_read(system: Running, tmp_path: Path) -> None:
    file = tmp_path / "mt5.toml"
    file.write_text('[gateway]\napi_keys = ["hunter2"]\n')
    file.chmod(0o644)
    done = system.mt5("doctor", MT5_CONFIG=str(file))
    assert done.returncode == 1
    assert f"chmod 600 {file}" in done.stdout
    assert "hunter2" not in done.stdout
    file.chmod(0o600)
    assert system.mt5("doctor", MT5_CONFIG=str(file)).returncode == 0


def test_models_and_training_without_data(system: Running) -> None:
    assert json.loads(system.mt5("models", "list", "--json").stdout) == {"models": []}
    assert "No model" in system.mt5("models", "list").stdout
    for words in (
        ["show", "v1"],
        ["promote", "v1", "--reason", "x"],
        ["rollback"],
        ["retire", "v1", "--reason", "x"],
        ["restore"],
        ["restore", "v1"],
    ):
        done = system.mt5("models", *words)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
    done = system.mt5("train", "--timeframe", "M1")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


async def test_tail_prints_signals_as_they_come(system: Running) -> None:
    now = datetime(2025, 2, 3, 10, tzinfo=UTC)
    signal_of = {
        symbol: Signal(
            id=f"id-{symbol}",
            ts=now,
            symbol=symbol,
            timeframe="M1",
            model_name="rf_m1",
            model_version="v1",
            threshold=0.55,
            prob_up=0.61,
            label=1,
            abstain=None,
            candle_revision=0,
            candles_seq=0,  # CANDLES has none: a recorder that archived more than there is stops
            features_hash="h",
            created_at=now,
            expires_at=now + timedelta(minutes=2),
        )
        for symbol in ("OTHER", "TAIL.x")
    }
    tails = {
        output: subprocess.Popen(
            [sys.executable, "-m", "runner", "signals", "tail", "--symbol", "TAIL.x", "--limit", "1", *output],
            cwd=system.home.parent,
            env=environment(system.home),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for output in ((), ("--json",))
    }
    bus = await Bus.connect(system.ready["nats"], name=permissions.OPERATOR)
    try:
        deadline = time.monotonic() + 30
        while any(tail.poll() is None for tail in tails.values()):  # until each has subscribed and seen one
            assert time.monotonic() < deadline
            for symbol, message in signal_of.items():
                await bus.emit(SIGNALS, message, "M1", symbol)
            await bus.nc.flush()
    finally:
        await bus.close()
    text, as_json = (tail.communicate()[0] for tail in tails.values())
    assert "TAIL.x" in text
    assert "p(up) 0.610" in text
    assert json.loads(as_json)["id"] == "id-TAIL.x"
    assert all(tail.returncode == 0 for tail in tails.values())


# --- what dies comes back ----------------------------------------------------------------------------------------


async def test_a_killed_actor_comes_back_at_the_same_place(system: Running) -> None:
    before = system.ready
    for words, url in (
        (("_run", "collector", "features", "emitter"), f"{before['gateway']}/live"),
        (("_run", "recorder"), None),
    ):
        child = system.child(*words)
        actor = words[1]
        instance = await ping(before["nats"], actor)
        child.kill()
        child.wait(10)
        wait_until(lambda w=words: _there(system, *w), 30, f"{actor} is started again")
        if url:
            wait_until(lambda u=url: get(u) == 200, 30, "the gateway answers again")
        assert await ping_until(before["nats"], actor) != instance
    assert system.ready == before


def _there(system: Running, *words: str) -> bool:
    try:
        return system.child(*words).is_running()
    except (ValueError, psutil.NoSuchProcess):
        return False


async def ping_until(url: str, actor: str, seconds: float = 30.0) -> str:
    bus = await Bus.connect(url, name=permissions.OPERATOR, patience=seconds)
    deadline = time.monotonic() + seconds
    try:
        while True:
            try:
                answer = await bus.nc.request(f"$SRV.PING.{actor}", timeout=1)
            except Exception:
                if time.monotonic() > deadline:
                    raise
            else:
                return str(json.loads(answer.data)["id"])
    finally:
        await bus.close()


async def test_killed_servers_come_back_at_the_same_place(system: Running) -> None:
    before = system.ready
    children = psutil.Process(system.process.pid).children()
    servers = [child for child in children if child.name() in {"nats-server", "postgres"}]
    assert len(servers) == 2
    for server in servers:
        server.kill()
        server.wait(10)
    for actor in ACTORS:
        assert await ping_until(before["nats"], actor)
    wait_until(lambda: system.mt5("doctor").returncode == 0, 30, "doctor is content")
    assert system.ready == before


# --- isolation, orphans, given servers -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_up_leaves_no_orphans_and_the_next_one_starts(start: Callable[..., Running]) -> None:
    running = start("up", "--isolate")
    running.await_ready()
    assert len({running.child("_run", actor).pid for actor in ACTORS}) == len(ACTORS)
    children = psutil.Process(running.process.pid).children(recursive=True)
    running.process.kill()
    running.process.wait()
    wait_until(lambda: not living(children), 10, "no orphan")
    assert (running.home / "ready.json").exists()
    assert "Nothing is running" in running.mt5("topology").stderr
    again = start(home=running.home)
    wait_until(lambda: "Ready: " in again.said() or again.process.poll() is not None, READY_SECONDS, "ready again")
    assert again.ready["pid"] == again.process.pid
    assert again.terminate(signal.SIGINT) < 10


@pytest.mark.slow
def test_given_servers_take_any_number_of_ups_and_no_lock(start: Callable[..., Running], tmp_path: Path) -> None:
    with nats_server(tmp_path / "nats") as nats, postgres_server(tmp_path / "postgres") as postgres:
        given = {"MT5_NATS_URL": nats.url("operator"), "MT5_DATABASE_URL": postgres.url}
        home = tmp_path / "shared"
        ups = [start("up", actor, home=home, **given) for actor in ("recorder", "features", "trainer")]
        for running in ups:
            wait_until(
                lambda r=running: "Ready: " in r.said() or r.process.poll() is not None, READY_SECONDS, running.said()
            )
            assert running.process.poll() is None, running.said()
        assert not (home / "ready.json").exists()
        assert not (home / "lock").exists()
        assert ups[0].mt5("topology", **given).returncode == 0
        for running in ups:
            assert running.terminate() < 10


SLOW_IMPORTS = """
import sys, time

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("nats"):
            time.sleep(0.05)

sys.meta_path.insert(0, Slow())
"""


def test_a_slow_disk_does_not_mix_up_what_two_threads_import(start: Callable[..., Running], tmp_path: Path) -> None:
    """nats-py's modules import each other in a circle: two threads in it at once see half-made modules."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_IMPORTS)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    with nats_server(tmp_path / "nats") as nats, postgres_server(tmp_path / "postgres") as postgres:
        given = {"MT5_NATS_URL": nats.url("operator"), "MT5_DATABASE_URL": postgres.url, "PYTHONPATH": path}
        running = start("up", "recorder", **given)
        wait_until(lambda: "Ready: " in running.said() or running.process.poll() is not None, READY_SECONDS, "ready")
        assert running.process.poll() is None, running.said()
        assert "Traceback" not in running.said()
        assert running.terminate() < 10


def test_a_gateway_port_that_is_taken_is_told_at_once(system: Running, tmp_path: Path) -> None:
    port = system.ready["gateway"].rpartition(":")[2]
    done = Running(system.process, tmp_path / "var", tmp_path / "none").mt5("up", MT5_GATEWAY_PORT=port)
    assert done.returncode == 2
    assert f"127.0.0.1:{port}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# --- the stop, last: it ends the shared system --------------------------------------------------------------------


def test_a_stop_drains_within_ten_seconds_and_leaves_nothing(system: Running) -> None:
    children = psutil.Process(system.process.pid).children(recursive=True)
    assert system.terminate() < 10
    assert not (system.home / "ready.json").exists()
    assert not living(children)
    assert "Traceback" not in system.said()
