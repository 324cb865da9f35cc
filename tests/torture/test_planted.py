"""The tortures have teeth: each planted bug is caught by the version that CI runs."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.servers import ROOT
from tests.torture.plan import SHORT, carry_out
from tests.torture.rig import Rig
from tests.torture.test_power import power_cuts

ROOMS = ("schema", "bus", "actors", "deploy", "commands", "runner.py")


@dataclass(frozen=True)
class Bug:
    """A piece of the code and what stands there instead."""

    file: str
    was: str
    now: str


CURSOR_BEFORE_PUBLISH = Bug(
    "actors/features.py",
    """        self._making = seq
        feature_rows_total.inc(len(change.rows))
""",
    """        self._making = seq
        await self._put([(_key(state), msgspec.json.encode(state))])
        await self._put([(CURSOR_KEY, msgspec.json.encode(Cursor(seq=seq, made=self.made)))])
        feature_rows_total.inc(len(change.rows))
""",
)
CURSOR_OUTSIDE_THE_TRANSACTION = Bug(
    "actors/recorder.py",
    """            async with self._store.transaction() as connection:
                moved =""",
    """            async with self._store.connection() as connection:
                moved =""",
)
TAIL_NOT_MADE_WHOLE = Bug(
    "actors/features.py",
    "        elif self.whole < cursor.made and self.first_seq <= cursor.made:\n",
    "        elif False:\n",
)
NOT_SYNCED = Bug("deploy/embedded.py", """'  sync_interval: "always"',""", """'  sync_interval: "2m"',""")


def planted(folder: Path, bug: Bug) -> Path:
    """A copy of the code with the bug in it."""
    for room in ROOMS:
        source = ROOT / room
        if source.is_dir():
            shutil.copytree(source, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / room)
    file = folder / bug.file
    text = file.read_text()
    assert text.count(bug.was) == 1, f"{bug.file} has changed: the bug no longer fits"
    file.write_text(text.replace(bug.was, bug.now))
    return folder


@pytest.mark.torture
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "bug",
    [CURSOR_BEFORE_PUBLISH, CURSOR_OUTSIDE_THE_TRANSACTION, TAIL_NOT_MADE_WHOLE],
    ids=["cursor-before-publish", "cursor-outside-the-transaction", "tail-not-made-whole"],
)
def test_a_planted_bug_is_caught_by_the_three_minutes(tmp_path: Path, torture_seed: int, bug: Bug) -> None:
    code = planted(tmp_path / "code", bug)
    rig = Rig(tmp_path / "rig", torture_seed, "planted bug", PYTHONPATH=str(code))
    with rig.running():
        carry_out(rig, SHORT)
        report = rig.verdict()
    rig.tally.notes.append(f"caught: {report.details[0] if report.details else 'no'}")
    assert not report.clean, "the planted bug was not caught"


@pytest.mark.torture
@pytest.mark.timeout(900)
def test_a_store_that_is_not_synced_is_caught_by_the_power_cuts(tmp_path: Path, torture_seed: int) -> None:
    planted(tmp_path / "code", NOT_SYNCED)
    with pytest.raises(AssertionError):
        power_cuts(tmp_path / "rig", torture_seed, 2, PYTHONPATH=str(tmp_path / "code"))
