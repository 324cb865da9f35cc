"""A frozen server is noticed within 45 seconds, and used again as soon as it thaws."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.servers import wait_until
from tests.torture.rig import Rig

NOTICED_SECONDS = 45.0


def health(rig: Rig) -> dict[str, Any]:
    """The gateway's word on everything, whatever its status."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{rig.port}/health", timeout=10) as answer:
            found: dict[str, Any] = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        found = json.loads(error.read())
    return found


@pytest.mark.torture
@pytest.mark.timeout(300)
def test_a_frozen_nats_server_is_noticed_within_45_s(tmp_path: Path, torture_seed: int) -> None:
    rig = Rig(tmp_path, torture_seed, "nats-server frozen")
    with rig.running():
        server = rig.child("nats-server")
        server.suspend()
        began = time.monotonic()
        try:
            wait_until(lambda: health(rig)["status"] == "down", NOTICED_SECONDS, "health says that the bus is down")
            noticed = time.monotonic() - began
        finally:
            server.resume()
        again = rig.feed.await_progress(100, 30)
        rig.tally.done["frozen"] += 1
        rig.tally.notes.append(f"noticed after {noticed:.1f} s, in use {again:.1f} s after the thaw")
        rig.assert_clean()


@pytest.mark.torture
@pytest.mark.timeout(300)
def test_a_frozen_postgres_is_noticed_within_45_s(tmp_path: Path, torture_seed: int) -> None:
    rig = Rig(tmp_path, torture_seed, "PostgreSQL frozen")
    with rig.running():
        postgres = rig.child("postgres")
        family = [postgres, *postgres.children(recursive=True)]
        for process in family:
            process.suspend()
        began = time.monotonic()
        try:
            wait_until(lambda: "recorder.away" in rig.system.log("recorder"), NOTICED_SECONDS, "the recorder notices")
            noticed = time.monotonic() - began
            rig.feed.await_progress(300, 30)  # candles and signals do not wait
        finally:
            for process in family:
                with contextlib.suppress(OSError):
                    process.resume()
        rig.tally.done["frozen"] += 1
        rig.tally.notes.append(f"noticed after {noticed:.1f} s")
        rig.assert_clean()
