"""What systemd is told, on a real datagram socket in its place: ready, alive, silent when something stays away, stopping."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from deploy.embedded import NatsServer
from deploy.home import Home
from deploy.notify import MISSING_SECONDS, Notifier, Vigil
from deploy.supervisor import Supervisor
from tests.integration.test_supervisor import ACTOR as CHILD
from tests.integration.test_supervisor import SERVE, Notes
from tests.servers import OPERATOR, wait_until
from tests.system import System


class Manager:
    """The manager's end: hears every message of a service."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.heard: list[dict[str, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self._socket.setblocking(False)

    def listen(self) -> list[dict[str, str]]:
        """Everything that was said so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                lines = self._socket.recv(4_096).decode().splitlines()
                self.heard.append(dict(line.partition("=")[::2] for line in lines))
        return self.heard

    def count(self, name: str) -> int:
        return sum(1 for message in self.listen() if name in message)

    def status(self) -> str | None:
        """The newest status line."""
        return next((message["STATUS"] for message in reversed(self.listen()) if "STATUS" in message), None)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@mt5-test-{os.getpid()}-{id(request)}"
    manager = Manager(address)
    yield manager
    manager.close()


# --- the environment -------------------------------------------------------------------------------------------------


def test_the_environment_is_taken_so_that_no_child_speaks_for_us(manager: Manager) -> None:
    environ = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "1500000", "WATCHDOG_PID": str(os.getpid()), "A": "b"}
    notifier = Notifier.take(environ)
    assert environ == {"A": "b"}
    assert notifier.watchdog == 1.5
    assert notifier.tell("READY=1", "STATUS=Grüß Gott")
    assert manager.listen() == [{"READY": "1", "STATUS": "Grüß Gott"}]


@pytest.mark.parametrize("extra", [{"WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"}])
def test_a_watchdog_that_is_not_meant_for_us_is_none(extra: dict[str, str]) -> None:
    assert Notifier.take({"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "1000000", **extra}).watchdog is None


def test_without_a_manager_or_with_a_dead_one_nothing_fails(tmp_path: Path) -> None:
    assert not Notifier.take({}).tell("READY=1")
    assert not Notifier(str(tmp_path / "nobody")).tell("READY=1")
    assert not Notifier("/" + "x" * 200).tell("READY=1")
    full = Manager(str(tmp_path / "deaf"))
    began = time.monotonic()
    while Notifier(full.address).tell("STATUS=" + "x" * 4_000):
        assert time.monotonic() - began < 10, "its socket never fills"
    assert time.monotonic() - began < 10  # the last one waited a second and gave up
    full.close()


# --- what is told when -----------------------------------------------------------------------------------------------


def test_a_start_asks_for_time_at_a_steady_pace_and_has_no_watchdog(manager: Manager) -> None:
    vigil = Vigil(Notifier(manager.address, watchdog=6.0))
    for second in range(0, 2_000, 5):
        assert vigil.turn(float(second), ("recorder", "trainer")) is None, "a start is never given up"
        manager.listen()
    assert manager.count("EXTEND_TIMEOUT_USEC") == 200  # every ten seconds
    assert manager.count("WATCHDOG") == 0
    assert [m["STATUS"] for m in manager.heard if "STATUS" in m] == ["Starting: waiting for recorder, trainer."]


def test_signs_of_life_come_at_a_third_of_the_watchdogs_time(manager: Manager) -> None:
    vigil = Vigil(Notifier(manager.address, watchdog=6.0))
    vigil.ready(100.0, "Ready: here")
    told = []
    now = 100.0
    while now < 130.0:
        before = manager.count("WATCHDOG")
        vigil.turn(now, ())
        if manager.count("WATCHDOG") > before:
            told.append(now)
        assert vigil.left(now) <= 2.0
        now += 0.5
    assert told == [100.0 + 2.0 * i for i in range(15)]


def test_it_falls_silent_only_while_something_has_been_missing_for_long(manager: Manager) -> None:
    vigil = Vigil(Notifier(manager.address, watchdog=6.0))
    vigil.turn(0.0, ("trainer",))
    start = 2 * MISSING_SECONDS  # what a start waited for is not held against it
    vigil.ready(start, "Ready.")

    def silent(since: float, until: float, missing: tuple[str, ...]) -> list[bool]:
        answers = []
        for turn in range(int(since), int(until), 2):
            before = manager.count("WATCHDOG")
            lacking = vigil.turn(float(turn), missing)
            assert (lacking is not None) == (manager.count("WATCHDOG") == before)
            answers.append(lacking is not None)
        return answers

    assert not any(silent(start, start + MISSING_SECONDS, ("trainer",)))
    assert all(silent(start + MISSING_SECONDS, start + MISSING_SECONDS + 60, ("trainer",)))
    assert manager.status() == "Missing: trainer."
    assert not any(silent(start + MISSING_SECONDS + 60, start + MISSING_SECONDS + 70, ()))
    assert manager.status() == "Ready."
    assert not any(silent(start + MISSING_SECONDS + 70, start + MISSING_SECONDS + 140, ("trainer",)))  # counted anew


def test_without_a_watchdog_there_is_no_sign_to_withhold(manager: Manager) -> None:
    vigil = Vigil(Notifier(manager.address))
    vigil.ready(0.0, "Ready.")
    assert vigil.turn(0.0, ("trainer",)) is None
    assert vigil.turn(10 * MISSING_SECONDS, ("trainer",)) is None
    assert manager.count("WATCHDOG") == 0


# --- the supervisor with real children -------------------------------------------------------------------------------


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "manager"))
    yield manager
    manager.close()


def turning(supervisor: Supervisor, condition: Callable[[], object], seconds: float, what: str) -> None:
    def turned() -> object:
        supervisor.step(0.05)
        return condition()

    wait_until(turned, seconds, what)


def test_a_supervisor_with_an_actor_that_stays_away_gives_no_more_signs_and_says_why(
    tmp_path: Path, told: Manager
) -> None:
    notes = Notes()
    lock = tmp_path / "away"
    code = f"import pathlib\nif pathlib.Path({str(lock)!r}).exists(): sys.exit(1)\n{SERVE}"
    with Home(tmp_path / "home") as home, Supervisor(home, notes, Notifier(told.address, watchdog=0.3)) as supervisor:
        supervisor.vigil.patience = 1.0
        supervisor.add_process(
            "hot", [sys.executable, "-c", CHILD, str(tmp_path / "pids"), code], dict(os.environ), ("a",)
        )
        supervisor.start()
        assert supervisor.wait_ready(20.0)
        assert told.count("READY") == 0  # that is for the owner of the supervisor to say
        supervisor.say_ready("Ready: a")
        turning(supervisor, lambda: told.count("WATCHDOG") >= 3, 10, "three signs of life")

        lock.touch()
        os.kill(int((tmp_path / "pids").read_text()), signal.SIGKILL)
        turning(supervisor, lambda: notes.count("watchdog_withheld"), 20, "it falls silent")
        assert told.status() == "Missing: a."
        signs = told.count("WATCHDOG")
        quiet = time.monotonic() + 1.0
        turning(supervisor, lambda: time.monotonic() > quiet, 5, "a second of silence")
        assert told.count("WATCHDOG") == signs

        lock.unlink()  # it comes back by itself after all
        turning(supervisor, lambda: told.count("WATCHDOG") > signs, 30, "it speaks again")
        assert told.status() == "Ready: a"
    assert told.listen()[-1]["STOPPING"] == "1"
    (fields, *_) = [fields for name, fields in notes.events if name == "watchdog_withheld"]
    assert fields["missing"] == "a"
    assert fields["seconds"] >= 1


def test_a_server_that_does_not_serve_is_missing_though_its_process_lives(tmp_path: Path, told: Manager) -> None:
    with Home(tmp_path / "home") as home, Supervisor(home, Notes(), Notifier(told.address, watchdog=9.0)) as supervisor:
        server = NatsServer(home.path / "nats", (OPERATOR,))
        supervisor.add_server(server)
        supervisor.start()
        supervisor.say_ready("Ready.")
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        try:
            turning(supervisor, lambda: told.status() == "Missing: nats-server.", 15, "it is missed")
        finally:
            os.kill(server.pid, signal.SIGCONT)
        turning(supervisor, lambda: told.status() == "Ready.", 15, "it is back")


# --- the whole -------------------------------------------------------------------------------------------------------


@pytest.fixture
def system(tmp_path: Path, told: Manager) -> Iterator[System]:
    system = System(tmp_path, {"NOTIFY_SOCKET": told.address, "WATCHDOG_USEC": "900000"})
    yield system
    system.end()


@pytest.mark.timeout(180)
def test_up_says_ready_once_everything_is_and_its_children_cannot_speak_for_it(system: System, told: Manager) -> None:
    system.start("up", "collector", "features", "emitter")
    wait_until(lambda: told.count("READY"), 10, "ready is told")
    first = next(i for i, message in enumerate(told.heard) if "READY" in message)
    assert told.heard[first]["STATUS"] == f"Ready: {system.ready['gateway']}/"
    before = told.heard[:first]
    assert any("EXTEND_TIMEOUT_USEC" in message for message in before)
    assert not any("WATCHDOG" in message for message in before)
    assert any(message.get("STATUS", "").startswith("Starting: waiting for ") for message in before)
    wait_until(lambda: told.count("WATCHDOG") >= 3, 10, "signs of life")
    for child in system.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & set(child.environ()), child.cmdline()
    assert system.process is not None
    system.stop()
    assert told.listen()[-1] == {"STOPPING": "1", "STATUS": "Stopping."}
    assert told.count("READY") == 1
