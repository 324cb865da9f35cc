"""Everything that can die dies, in a seeded order, while eight senders post: nothing is lost, doubled or different."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture.plan import FULL, SHORT, carry_out
from tests.torture.rig import Rig


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_three_minutes_of_everything(tmp_path: Path, torture_seed: int) -> None:
    rig = Rig(tmp_path, torture_seed, "three minutes of everything")
    with rig.running():
        carry_out(rig, SHORT)
        rig.assert_clean()


@pytest.mark.torture
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("part", range(4))
def test_a_hundred_kills(tmp_path: Path, torture_seed: int, part: int) -> None:
    rig = Rig(
        tmp_path,
        100 * torture_seed + part,
        f"a quarter of 112 kills of actors, 52 of nats-server, 28 of PostgreSQL ({part + 1})",
    )
    with rig.running():
        carry_out(rig, FULL)
        rig.assert_clean()
