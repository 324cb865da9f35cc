"""The table of what the tortures did and what it cost, printed at the end of a session and written where asked."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.torture.rig import TALLIES, describe

COLUMNS = (
    "torture",
    "seed",
    "what was done",
    "acknowledged",
    "lost",
    "missing",
    "doubled",
    "different",
    "seconds",
    "notes",
)


@pytest.fixture(scope="session")
def torture_seed() -> int:
    """MT5_TORTURE_SEED repeats a run; CI always asks the same."""
    return int(os.environ.get("MT5_TORTURE_SEED", "1"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of xdist has its own list: each process appends its lines to the file that MT5_TORTURE_TABLE names."""
    path = os.environ.get("MT5_TORTURE_TABLE")
    if path and TALLIES:
        with Path(path).open("a") as file:
            for tally in TALLIES:
                file.write(json.dumps(describe(tally)) + "\n")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not TALLIES:
        return
    terminalreporter.section("what the tortures did")
    terminalreporter.write_line("| " + " | ".join(COLUMNS) + " |")
    terminalreporter.write_line("|" + "---|" * len(COLUMNS))
    for tally in TALLIES:
        line = describe(tally)
        terminalreporter.write_line(
            "| "
            + " | ".join(f"{line[c]:,}" if isinstance(line[c], int) and c != "seed" else str(line[c]) for c in COLUMNS)
            + " |"
        )
