"""`mt5 bench` itself: a quick run prints every line, and wrong words are told in a sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from commands.bench import NAMES, PEERS
from tests.conftest import missing

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("talipp", "fastapi", "uvicorn", "pandas", "talib", "psutil")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "runner.py", "bench", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_named_benchmarks_print_their_lines() -> None:
    made = run("--quick", "--json", "features", "prediction")
    assert made.returncode in (0, 1), made.stderr
    assert {figure["name"] for figure in json.loads(made.stdout)["figures"]} == {"features", "prediction"}


@pytest.mark.torture
def test_a_quick_run_prints_every_line() -> None:
    lacking = [name for name in NEEDED if find_spec(name) is None]
    if lacking:
        missing(f"{', '.join(lacking)} not installed: install the extras `bench` and `test`")
    made = run("--quick", "--json")
    assert made.returncode in (0, 1), made.stderr  # whether the promises hold here and now is not asked
    answer: dict[str, Any] = json.loads(made.stdout)
    figures = answer["figures"]
    assert {figure["name"] for figure in figures} == set(NAMES)
    assert answer["ok"] == (made.returncode == 0) == (not made.stderr.strip())
    for figure in figures:
        measured = figure["ours"] is not None
        compared = figure["ratio"] is not None or not figure["promise"] or figure["promise"]["of"] == "ours"
        assert (measured and compared) or figure["why_not"], figure
    whats = [figure["what"] for figure in figures if figure["name"] == "memory"]
    for process in ("runner", "nats-server", "postgres", "hot", "recorder", "trainer", "scorer"):
        assert any(process in what for what in whats), whats
    if PEERS.is_dir():
        assert all(figure["ratio"] for figure in figures if figure["name"] == "chain")


def test_an_unknown_name_is_told() -> None:
    made = run("chian")
    assert made.returncode == 2
    assert made.stderr.strip() == f"mt5: There is no benchmark chian: there are {', '.join(NAMES)}."
