"""What operators look at: one scrape of every process, a health that is honest, and a doctor who asks the actors."""

from __future__ import annotations

import json
import signal
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

from deploy.server import free_port
from tests.acceptance.conftest import Make
from tests.exposition import Family, parse
from tests.servers import wait_until
from tests.system import System

pytestmark = pytest.mark.timeout(180)

OPENED = 1_735_804_800


def scrape(system: System) -> dict[str, Family]:
    with urllib.request.urlopen(system.ready["gateway"] + "/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        return parse(answer.read().decode())


def up(system: System) -> dict[str, float]:
    return {dict(labels)["process"]: value for (_, labels), value in scrape(system)["mt5_up"].samples.items()}


def all_are(system: System, wanted: dict[str, float]) -> None:
    """On a busy machine an answer may come after the half second that a scrape waits."""
    wait_until(lambda: up(system) == wanted, 20, f"mt5_up is {wanted}")


def findings(system: System, **extra: str) -> dict[str, dict[str, Any]]:
    return {item["check"]: item for item in json.loads(system.mt5("doctor", "--json", **extra).stdout)["findings"]}


@contextmanager
def frozen(process: psutil.Process) -> Iterator[None]:
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def test_one_scrape_has_the_metrics_of_every_process(system: System) -> None:
    candle = {"time": OPENED, "open": 1.0, "high": 1.0, "low": 1.0, "close": 1.0, "volume": 1}
    system.post({"symbol": 'A"B\\', "timeframe": "M1", "replay": True, "gmt_time": OPENED + 60, "candles": [candle]})
    system.settle()
    all_are(system, {"hot": 1, "recorder": 1, "trainer": 1, "scorer": 1, "health": 1, "backup": 1})
    families = scrape(system)
    assert families["mt5_candles_total"].of(process="hot", outcome="accepted") == [2]
    assert families["mt5_candles_total"].of(process="recorder") == []
    wait_until(
        lambda: scrape(system)["mt5_recorder_rows_total"].of(table="market_data") == [2], 10, "the rows archived"
    )
    assert scrape(system)["mt5_archive_up"].of(process="recorder") == [1]


def test_a_process_that_says_nothing_is_missing_and_holds_nobody_up(system: System) -> None:
    with frozen(system.child("trainer")):
        began = time.monotonic()
        assert up(system)["trainer"] == 0
        assert time.monotonic() - began < 2
        all_are(system, {"hot": 1, "recorder": 1, "trainer": 0, "scorer": 1, "health": 1, "backup": 1})
        health = system.get("/health")
        assert health["status"] == "degraded"
        assert health["checks"]["trainer"]["status"] == "degraded"
        assert health["checks"]["features"] == {"status": "ok", "detail": "Works, 0 messages behind."}
        found = findings(system)
        assert found["trainer"]["state"] == "wrong"
        assert found["trainer"]["seen"].startswith(f"does not answer; {system.home}/logs/trainer.log ends with: ")
        assert "`mt5 up trainer`" in found["trainer"]["mend"]
        assert found["recorder"]["state"] == found["gateway"]["state"] == "ok"
    wait_until(lambda: system.get("/health")["status"] == "ok", 20, "health is ok again")


def test_with_given_servers_the_doctor_asks_the_actors_too(system: System, make: Make) -> None:
    """As on another host, or in a container, of which no ready.json tells."""
    ready = system.ready
    port = str(free_port())
    other = make(MT5_NATS_URL=ready["nats"], MT5_DATABASE_URL=ready["database"], MT5_GATEWAY_PORT=port)
    with other.running("up", "features") as second:
        wait_until(lambda: "a standby waits" in findings(other)["features"]["seen"], 60, "a standby")
        found = findings(other)
        assert {
            found[name]["state"]
            for name in ("collector", "features", "emitter", "recorder", "trainer", "scorer", "health", "backup")
        } == {"ok"}
        assert found["gateway"]["state"] == "note", "there is none on the port that these settings name"
        # The standby's own process is a part of the scrape as well, under a name of its own.
        wait_until(lambda: up(system).get("features-standby") == 1, 10, "the standby's metrics")
        second.terminate()
        second.communicate(timeout=30)
    actors_own = ready["nats"].replace("operator:", "trainer:")
    assert findings(other, MT5_NATS_URL=actors_own)  # and no traceback


@pytest.mark.slow
def test_isolated_actors_are_processes_of_their_own(make: Make) -> None:
    system = make()
    system.start("up", "--isolate")
    all_are(
        system,
        dict.fromkeys(("collector", "features", "emitter", "recorder", "trainer", "scorer", "health", "backup"), 1),
    )
    wait_until(lambda: system.get("/health")["status"] == "ok", 20, "health is ok")
    wait_until(lambda: scrape(system)["mt5_owner"].of(process="features", actor="features") == [1], 10, "its owner")
    # Only the actor dies: its process is started again, and until then it is missing.
    system.child("emitter").kill()
    wait_until(
        lambda: up(system)["emitter"] == 1 and system.get("/health")["status"] == "ok", 30, "the emitter is back"
    )
    assert system.stop() < 10
