"""A full disk: what cannot be stored is refused in time, and room is all that it takes to go on."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.torture.disks import fill, need_mounts, tmpfs
from tests.torture.rig import Rig

REFUSAL_SECONDS = 2.0
RECOVERY_SECONDS = 60.0
FULL_SECONDS = 8.0  # full for this long

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_a_full_disk_of_nats_server_is_refused_within_2_s_and_heals_within_60_s_of_room(
    tmp_path: Path, torture_seed: int
) -> None:
    need_mounts()
    rig = Rig(tmp_path, torture_seed, "nats-server's disk full", MT5_STREAMS_CANDLES_MAX_BYTES=str(64 * 1024**2))
    with tmpfs(rig.system.home / "nats", 160) as disk, rig.running():
        rig.swap_model()
        rig.feed.await_progress(300, 60)
        full_since = time.monotonic()
        filler = fill(disk)
        time.sleep(FULL_SECONDS)  # what is measured meanwhile is how long the gateway takes to say no
        refusals = [took for sender in rig.feed.senders for when, took in sender.refusals if when > full_since]
        assert refusals, "nothing was refused although the disk is full"
        assert max(refusals) < REFUSAL_SECONDS, f"a refusal took {max(refusals):.2f} s"
        filler.unlink()
        healed = rig.feed.await_progress(300, RECOVERY_SECONDS)
        rig.tally.done["disk full"] += 1
        rig.tally.notes += [f"refused within {max(refusals):.2f} s", f"went on {healed:.1f} s after there was room"]
        rig.assert_clean()


@pytest.mark.torture
def test_a_full_disk_of_postgres_holds_nothing_up_and_is_made_good(tmp_path: Path, torture_seed: int) -> None:
    need_mounts()
    rig = Rig(tmp_path, torture_seed, "PostgreSQL's disk full")
    with tmpfs(rig.system.home / "postgres", 400) as disk, rig.running():
        rig.feed.await_progress(300, 60)
        filler = fill(disk)
        began = time.monotonic()
        signals = count_signals(rig)
        rig.feed.await_progress(600, 60)  # candles and signals do not wait for the archive
        assert count_signals(rig) > signals
        time.sleep(max(0.0, began + FULL_SECONDS - time.monotonic()))
        filler.unlink()
        freed = time.monotonic()
        rig.system.settle(RECOVERY_SECONDS)
        rig.tally.done["disk full"] += 1
        rig.tally.notes.append(f"archived what had waited {time.monotonic() - freed:.1f} s after there was room")
        rig.assert_clean()


def count_signals(rig: Rig) -> int:
    found = rig.system.get("/signals?timeframe=M1&limit=10000")
    return max((signal["candles_seq"] for signal in found["signals"]), default=0)
