"""The supervisor with real children: what dies comes back, a stop is bounded, nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import nats
import pytest

from deploy import supervisor as module
from deploy.embedded import NatsServer, PostgresServer
from deploy.home import Home
from deploy.process import identify
from deploy.supervisor import StartFailed, Supervisor
from tests.servers import OPERATOR, python, wait_until

# Says that it is ready, appends its pid to argv[1], and then does what argv[2] holds.
ACTOR = """
import os, pathlib, signal, subprocess, sys, time
with open(sys.argv[1], "a") as file: file.write(f"{os.getpid()}\\n")
ready = os.fdopen(int(os.environ["MT5_READY_FD"]), "w", buffering=1)
def say(name): print("ready", name, file=ready)
exec(sys.argv[2])
"""
SERVE = "say('a'); signal.pause()"


class Notes:
    """A log that a test can read."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, /, **fields: Any) -> None:
        self.events.append((event, fields))

    def warning(self, event: str, /, **fields: Any) -> None:
        self.events.append((event, fields))

    def count(self, event: str) -> int:
        return sum(1 for name, _ in self.events if name == event)


class Stage:
    """A supervisor and the pids of the children that it started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = Home(folder / "home")
        self.notes = Notes()
        self.supervisor = Supervisor(self.home, self.notes)

    def add(self, name: str, code: str, actors: tuple[str, ...] = ("a",)) -> None:
        self.supervisor.add_process(name, self.argv(name, code), dict(os.environ), actors)

    def argv(self, name: str, code: str) -> list[str]:
        return [sys.executable, "-c", ACTOR, str(self.folder / name), code]

    def pids(self, name: str) -> list[int]:
        file = self.folder / name
        return [int(line) for line in file.read_text().splitlines()] if file.exists() else []

    def step_until(self, condition: Any, seconds: float, what: str) -> None:
        def stepped() -> bool:
            self.supervisor.step(0.1)
            return bool(condition())

        wait_until(stepped, seconds, what)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    with stage.home, stage.supervisor:
        yield stage


def gone(pid: int) -> bool:
    return identify(pid) is None


# --- readiness ---------------------------------------------------------------------------------------------------


def test_ready_when_every_actor_has_said_so(stage: Stage) -> None:
    stage.add("hot", "say('a'); say('b'); signal.pause()", ("a", "b"))
    stage.add("recorder", "say('c'); signal.pause()", ("c",))
    stage.supervisor.start()
    assert stage.supervisor.missing() == ("a", "b", "c")
    assert stage.supervisor.wait_ready(20.0)
    assert stage.supervisor.missing() == ()


def test_who_is_missing_is_told_with_its_last_words(stage: Stage) -> None:
    stage.add("hot", "say('a'); print('b cannot reach the bus', flush=True); signal.pause()", ("a", "b"))
    stage.supervisor.start()
    stage.step_until(lambda: stage.supervisor.missing() == ("b",), 20.0, "a is ready")
    with pytest.raises(StartFailed, match=r"not ready after 0\.3 s: b .*hot\.log: b cannot reach the bus") as failure:
        stage.supervisor.wait_ready(0.3)
    assert failure.value.missing == ("b",)


def test_wrong_configuration_ends_the_start_at_once(stage: Stage) -> None:
    stage.add("hot", "print('port 70000 is no port: set MT5_GATEWAY_PORT', file=sys.stderr); sys.exit(2)")
    stage.supervisor.start()
    with pytest.raises(StartFailed, match="hot refused to start: port 70000 is no port"):
        stage.supervisor.wait_ready(20.0)


# --- restarts ----------------------------------------------------------------------------------------------------


def test_a_killed_process_comes_back_and_is_ready_again(stage: Stage) -> None:
    stage.add("hot", SERVE)
    stage.supervisor.start()
    assert stage.supervisor.wait_ready(20.0)
    os.kill(stage.pids("hot")[0], signal.SIGKILL)
    stage.step_until(lambda: stage.supervisor.missing() == ("a",), 5.0, "its death is noticed")
    assert stage.supervisor.wait_ready(20.0)
    first, second = stage.pids("hot")
    assert gone(first) and not gone(second)
    assert [name for name, _ in stage.notes.events] == ["process_died", "process_restarted"]
    assert stage.notes.events[0][1]["code"] == -signal.SIGKILL


def test_a_process_that_keeps_dying_is_started_ever_more_slowly(stage: Stage) -> None:
    stage.add("hot", "print('no luck', file=sys.stderr); sys.exit(1)")
    stage.supervisor.start()
    stage.step_until(lambda: stage.notes.count("process_died") == 4, 30.0, "four deaths")
    deaths = [fields for name, fields in stage.notes.events if name == "process_died"]
    assert [fields["restart_in"] for fields in deaths] == [0.2, 0.4, 0.8, 1.6]
    assert deaths[0]["last_line"] == "no luck"


def test_after_a_healthy_while_the_backoff_begins_anew(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEALTHY_SECONDS", 0.0)
    stage.add("hot", "sys.exit(1)")
    stage.supervisor.start()
    stage.step_until(lambda: stage.notes.count("process_died") == 3, 30.0, "three deaths")
    waits = [fields["restart_in"] for name, fields in stage.notes.events if name == "process_died"]
    assert waits == [0.2, 0.2, 0.2]


def test_what_a_process_started_ends_with_it(stage: Stage) -> None:
    code = """
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
print(child.pid, flush=True)
say('a'); signal.pause()
"""
    stage.add("trainer", code)
    stage.supervisor.start()
    assert stage.supervisor.wait_ready(20.0)
    grandchild = int(stage.home.log("trainer").read_text())
    assert not gone(grandchild)
    os.kill(stage.pids("trainer")[0], signal.SIGKILL)
    stage.step_until(lambda: gone(grandchild), 5.0, "the grandchild ends")


async def test_killed_servers_come_back_with_port_and_data(stage: Stage) -> None:
    bus = NatsServer(stage.home.path / "nats", (OPERATOR,))
    database = PostgresServer(stage.home.path / "postgres")
    stage.supervisor.add_server(bus)
    stage.supervisor.add_server(database)
    stage.supervisor.start()
    urls = bus.url(OPERATOR), database.url
    connection = await asyncpg.connect(urls[1])
    await connection.execute("CREATE TABLE t AS SELECT 7 AS n")
    client = await nats.connect(urls[0])
    await client.jetstream().add_stream(name="T", subjects=["t"])
    await client.jetstream().publish("t", b"kept")
    await client.close()
    for server in (bus, database):
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
    stage.step_until(lambda: stage.notes.count("process_died") >= 2, 10.0, "both deaths are noticed")
    stage.step_until(lambda: bus.ready() and database.ready(), 30.0, "both serve again")
    connection.terminate()
    assert (bus.url(OPERATOR), database.url) == urls
    connection = await asyncpg.connect(urls[1])
    assert await connection.fetchval("SELECT n FROM t") == 7
    await connection.close()
    client = await nats.connect(urls[0])
    assert (await client.jetstream().get_msg("T", 1)).data == b"kept"
    await client.close()
    stage.supervisor.stop()
    assert bus.pid is None and database.pid is None
    assert stage.home.log("nats-server").exists() and stage.home.log("postgres").exists()


# --- the end -----------------------------------------------------------------------------------------------------


def test_a_signal_ends_the_run_and_actors_drain(stage: Stage) -> None:
    stage.add("hot", "signal.signal(signal.SIGTERM, lambda *a: (print('drained'), sys.exit(0))); " + SERVE)
    stage.supervisor.start()
    assert stage.supervisor.wait_ready(20.0)
    stage.home.announce(gateway="g", nats="n", database="d")
    os.kill(os.getpid(), signal.SIGTERM)
    assert stage.supervisor.run_until_signal() == 0
    stage.supervisor.stop()
    assert stage.home.log("hot").read_text() == "drained\n"
    assert not stage.home.ready_file.exists()
    assert gone(stage.pids("hot")[0])
    assert list(stage.home.run.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_while_starting_is_a_stop_too(stage: Stage) -> None:
    stage.add("hot", "signal.pause()")
    stage.supervisor.start()
    os.kill(os.getpid(), signal.SIGTERM)
    assert not stage.supervisor.wait_ready(20.0)


def test_the_stubborn_are_killed_within_the_budget(stage: Stage) -> None:
    for name in ("one", "two"):
        stage.add(name, "signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SERVE)
    server = NatsServer(stage.home.path / "nats", (OPERATOR,))
    stage.supervisor.add_server(server)
    stage.supervisor.start()
    assert stage.supervisor.wait_ready(20.0)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)  # deaf to SIGTERM as well
    before = time.monotonic()
    stage.supervisor.stop()
    assert time.monotonic() - before < 10.0
    assert all(gone(stage.pids(name)[0]) for name in ("one", "two"))
    assert server.pid is None


def test_the_foreground_program_decides_the_end(stage: Stage) -> None:
    stage.add("hot", SERVE)
    stage.supervisor.set_foreground("demo", stage.argv("demo", "sys.exit(7)"), dict(os.environ))
    stage.supervisor.start()
    assert stage.supervisor.wait_ready(20.0)
    assert stage.pids("demo") == []
    assert stage.supervisor.run_until_signal() == 7
    assert not gone(stage.pids("hot")[0])


def test_a_run_of_some_seconds_ends_by_itself(stage: Stage) -> None:
    stage.add("hot", SERVE)
    stage.supervisor.start()
    assert stage.supervisor.run_until_signal(seconds=0.2) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_a_killed_supervisor_leaves_nothing(tmp_path: Path) -> None:
    code = """
import json, os, sys
from deploy.embedded import *
from deploy.home import Home
from deploy.supervisor import Supervisor
class Quiet:
    def info(self, event, /, **fields): pass
    warning = info
with Home(sys.argv[1]) as home, Supervisor(home, Quiet()) as supervisor:
    servers = NatsServer(home.path / "nats", (NatsUser("a", "b"),)), PostgresServer(home.path / "postgres")
    for server in servers: supervisor.add_server(server)
    actor = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"
    supervisor.add_process("deaf", [sys.executable, "-c", actor], dict(os.environ))
    supervisor.start()
    deaf, = (json.loads(record.read_text())["process"]["pid"] for record in home.run.iterdir())
    print(json.dumps([*(server.pid for server in servers), deaf]), flush=True)
    supervisor.run_until_signal()
"""
    process = python(code, tmp_path / "home", stdin=subprocess.PIPE)
    assert process.stdout is not None
    pids = json.loads(process.stdout.readline())
    assert not any(gone(pid) for pid in pids)
    process.kill()
    process.communicate()
    wait_until(lambda: all(gone(pid) for pid in pids), 10.0, "servers and actors end with the supervisor")


# --- logs --------------------------------------------------------------------------------------------------------


def test_logs_are_bounded_while_they_are_written(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOG_BYTES", 10_000)
    monkeypatch.setattr(module, "TICK_SECONDS", 0.05)
    stage.add(
        "hot", "[print('x' * 99, flush=True) for _ in range(200)]; say('a'); time.sleep(3); print('after'); sys.exit(1)"
    )
    stage.supervisor.start()
    assert stage.supervisor.wait_ready(20.0)
    log = stage.home.log("hot")
    stage.step_until(lambda: log.stat().st_size < 10_000, 5.0, "the log is cut")
    assert "x" * 99 in log.with_suffix(".log.1").read_text()
    stage.step_until(lambda: stage.notes.count("process_died") == 1, 10.0, "it ends")
    assert stage.notes.events[0][1]["last_line"] == "after"  # it writes on where the cut log ends
    assert log.stat().st_mode & 0o777 == 0o600
