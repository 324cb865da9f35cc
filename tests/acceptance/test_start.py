"""The start, and the demo that a newcomer sees first."""

from __future__ import annotations

import contextlib
import re
import signal
import threading

import psutil
import pytest

from tests.acceptance.conftest import Make
from tests.system import System

pytestmark = pytest.mark.timeout(400)

PROMISE = 10.0  # seconds on a machine of its own
DEMO_SECONDS = 60
LIFE_SECONDS = 330  # two minutes on a machine of its own; the tests share theirs


def timed_start(system: System) -> tuple[float, float]:
    """Seconds until ready, and the seconds that the promise allows.

    Where other programs use a share of the machine's processors meanwhile (other tests, above all), a start takes
    longer by as much, which says nothing of the system.
    """
    before = psutil.cpu_times()
    taken = system.start()
    after = psutil.cpu_times()
    assert system.process is not None
    ours = 0.0
    for process in [psutil.Process(system.process.pid), *system.children()]:
        with contextlib.suppress(psutil.NoSuchProcess):
            used = process.cpu_times()
            ours += used.user + used.system + used.children_user + used.children_system
    capacity = taken * (psutil.cpu_count() or 1)
    idle = (after.idle + after.iowait) - (before.idle + before.iowait)
    others = min(max(capacity - idle - ours, 0.0) / capacity, 0.8)
    return taken, PROMISE / (1.0 - others)


def test_a_fresh_and_a_used_home_are_ready_within_ten_seconds(make: Make) -> None:
    system = make()
    for _ in ("fresh", "used"):
        taken, allowed = timed_start(system)
        assert taken <= allowed
        assert "Traceback" not in system.logs()
        assert system.stop() < 10


@pytest.mark.slow
def test_the_demo_prints_signals_that_name_their_model_and_exits_with_0(make: Make) -> None:
    system = make()
    done = system.mt5("demo", "--seconds", str(DEMO_SECONDS), timeout=DEMO_SECONDS + 120)
    assert done.returncode == 0, done.stdout + done.stderr
    named = re.findall(r"p\(up\) 0\.\d{3}\s+rf_m1 \d{8}T\d{6}Z-[0-9a-f]{8}", done.stdout)
    assert named, done.stdout
    assert "Traceback" not in done.stdout + done.stderr + system.logs()
    assert not system.processes()


@pytest.mark.torture
def test_the_demo_shows_a_models_life(make: Make) -> None:
    """From provisional to champion by evidence, and a challenger that was planted to fail."""
    system = make()
    with system.running("demo") as demo:
        assert demo.stdout is not None
        watchdog = threading.Timer(LIFE_SECONDS, demo.kill)
        watchdog.start()
        said: list[str] = []
        for line in demo.stdout:
            said.append(line)
            if "The challenger" in line and "is retired" in line and any("becomes champion" in one for one in said):
                break
        watchdog.cancel()
        text = "".join(said)
        assert demo.poll() is None, text
        demo.send_signal(signal.SIGTERM)
        demo.communicate(timeout=30)
        assert demo.returncode == 0
    first, challenger = (
        re.search(pattern, text)
        for pattern in (r"The model (\S+) becomes provisional", r"A challenger is planted, (\S+):")
    )
    assert first is not None, text
    assert challenger is not None, text
    proved = re.search(rf"The model {first[1]} becomes champion: .* predicts better than the base rate", text)
    assert proved is not None, text
    assert int(re.findall(r"([\d,]+) outcomes of \S+ \(provisional\)", text)[-1].replace(",", "")) > 300
    failed = re.search(
        rf"The challenger {challenger[1]} is retired: .* than shadow {challenger[1]}: evidence (\d+)", text
    )
    assert failed is not None, text
    assert int(failed[1]) >= 100
