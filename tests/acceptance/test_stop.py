"""The stop: SIGTERM drains and exits 0 within ten seconds, whatever happens at that moment, and leaves nothing behind."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from deploy.server import free_port
from tests.acceptance.conftest import Make
from tests.acceptance.test_crash import check_whole
from tests.system import cut

pytestmark = pytest.mark.timeout(300)


def test_a_stop_in_the_middle_of_a_replay_drains_and_the_replay_goes_on_with_the_next_up(
    make: Make, data: Path, tmp_path: Path
) -> None:
    file, symbol = cut(data / "US30m_H1_202401.csv", tmp_path / "live.csv", 0, 800), "US30m"
    system = make(MT5_GATEWAY_PORT=str(free_port()))
    system.start()
    words = ("replay", str(file), "--symbol", symbol, "--timeframe", "H1", "--speed", "100000000")
    with system.running(*words) as replay:
        for messages in (200, 500):
            system.await_candles(symbol, "H1", messages)
            assert system.stop() < 10
            assert replay.poll() is None, "the replay was over before the stop"
            assert not (system.home / "ready.json").exists()
            assert {p.pid for p in system.processes()} <= {replay.pid, os.getpid()}
            system.start()
        out, error = replay.communicate(timeout=120)
        assert replay.returncode == 0, error
        assert "0 rejected" in out
    system.settle()
    check_whole(system, file, symbol, "H1")
    assert system.stop() < 10
    assert not (system.home / "ready.json").exists()
    assert not [p for p in system.processes() if p.pid != os.getpid()]
    assert "Traceback" not in system.logs()


def test_a_stop_before_it_is_ready_leaves_nothing_either(make: Make) -> None:
    system = make()
    with system.running("up") as process:
        while not (system.home / "lock").exists():
            assert process.poll() is None
        began = time.monotonic()
        process.terminate()
        _, error = process.communicate(timeout=15)
        assert time.monotonic() - began < 10
        assert process.returncode == 0
        assert "Traceback" not in error
    assert not (system.home / "ready.json").exists()
    assert not [p for p in system.processes() if p.pid != os.getpid()]


@pytest.mark.parametrize("frozen", [False, True], ids=["away", "frozen"])
def test_a_stop_while_it_waits_for_given_servers_is_as_quick(make: Make, frozen: bool) -> None:
    """As after a reboot, when the servers of another machine come later than we, or take connections and say nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if frozen:
            server.listen(16)
        place = f"127.0.0.1:{server.getsockname()[1]}"
        system = make(MT5_NATS_URL=f"nats://operator:x@{place}", MT5_DATABASE_URL=f"postgresql://mt5:x@{place}/mt5")
        with system.running("up") as process:
            assert process.stderr is not None
            while "nats error" not in (line := process.stderr.readline()):
                assert line, "it ended before it waited for NATS"
            began = time.monotonic()
            process.terminate()
            _, error = process.communicate(timeout=40)
            assert time.monotonic() - began < 10
            assert process.returncode == 0, error
            assert "Traceback" not in error
    assert not [p for p in system.processes() if p.pid != os.getpid()]
