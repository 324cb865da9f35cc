"""The power is cut: nats-server's disk holds what was synced and nothing more, and every acknowledged candle is there."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil
import pytest

from tests.torture.disks import Disk, need_mounts
from tests.torture.rig import ISOLATED, PROGRESS_SECONDS, Rig

MEGABYTES = 320


def cut(rig: Rig, disk: Disk) -> None:
    """Stops nats-server in mid-write, takes its disk as it is at that moment, and starts everything on that."""
    server = rig.child("nats-server")
    server.suspend()  # no write happens while the image is copied; what the kernel holds back is lost, as it should be
    copy = disk.snapshot()
    rig.system.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        server.kill()
    disk.restore(copy)
    rig.tally.done["power cut"] += 1
    rig.system.start("up", *ISOLATED, "--isolate")


def power_cuts(folder: Path, seed: int, cuts: int, **settings: str) -> None:
    need_mounts()
    settings["MT5_STREAMS_CANDLES_MAX_BYTES"] = str(128 * 1024**2)
    rig = Rig(folder, seed, "power cuts of nats-server", **settings)
    disk = Disk(rig.system.home / "nats", folder / "disk.img", MEGABYTES)
    disk.mount()
    try:
        with rig.running():
            for _ in range(cuts):
                rig.feed.await_progress(rig.rng.randrange(100, 600), PROGRESS_SECONDS)
                cut(rig, disk)
            rig.feed.await_progress(100, PROGRESS_SECONDS)
            rig.assert_clean()
    finally:
        rig.system.end()
        disk.unmount()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_power_cuts_lose_nothing(tmp_path: Path, torture_seed: int) -> None:
    power_cuts(tmp_path, torture_seed, 2)


@pytest.mark.torture
@pytest.mark.timeout(1_800)
def test_twelve_power_cuts_lose_nothing(tmp_path: Path, torture_seed: int) -> None:
    power_cuts(tmp_path, torture_seed + 1, 12)
