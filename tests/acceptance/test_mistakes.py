"""What a user can get wrong: an exit code and one sentence with the way out, never a traceback."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.server import free_port
from tests.acceptance.conftest import Make
from tests.system import System

pytestmark = pytest.mark.timeout(180)

NO, WRONG = 1, 2
CSV = "timestamp,open,high,low,close,volume\n2025-01-02T00:00:00Z,1.1,1.2,1.0,1.15,10\n"


@pytest.fixture(scope="module")
def idle(make: Make) -> System:
    """A home where nothing runs."""
    return make()


def file(folder: Path, text: str | bytes, name: str = "bars.csv") -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def check(done: subprocess.CompletedProcess[str], code: int, word: str) -> None:
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("mt5")
    assert lines[0].endswith((".", "?"))
    assert word.lower() in lines[0].lower()
    assert "Traceback" not in done.stderr + done.stdout
    assert "unexpected" not in done.stderr
    assert len(lines[0]) < 500


REPLAY = ("--symbol", "EURUSD", "--timeframe", "M1")
NOBODY = (*REPLAY, "--url", "http://127.0.0.1:1")

# Arguments (a callable gets a folder), the exit code, and a word that the sentence must hold.
ARGUMENTS: dict[str, tuple[Callable[[Path], list[str]], int, str]] = {
    "no command": (lambda _: [], WRONG, "--help"),
    "unknown command": (lambda _: ["fly"], WRONG, "fly"),
    "unknown option": (lambda _: ["up", "--fast"], WRONG, "--fast"),
    "unknown actor": (lambda _: ["up", "predictor"], WRONG, "predictor"),
    "no file": (lambda d: ["replay", str(d / "none.csv"), *NOBODY], WRONG, "none.csv"),
    "a folder": (lambda d: ["replay", str(d), *NOBODY], WRONG, "directory"),
    "an empty file": (lambda d: ["replay", file(d, ""), *NOBODY], WRONG, "empty"),
    "a header alone": (lambda d: ["replay", file(d, CSV.splitlines()[0]), *NOBODY], WRONG, "no bars"),
    "not candles": (lambda d: ["replay", file(d, "# A title\n\nSome text.\n"), *NOBODY], WRONG, "header"),
    "binary": (lambda d: ["replay", file(d, bytes(range(256)) * 40), *NOBODY], WRONG, "line 1"),
    "a broken line": (lambda d: ["replay", file(d, CSV + "2025-01-02T00:01:00Z,1.1,x\n"), *NOBODY], WRONG, "line 3"),
    "newest first": (
        lambda d: ["replay", file(d, CSV + "".join(f"2025-01-0{n}T00:00:00Z,1,1,1,1,1\n" for n in (5, 4, 3))), *NOBODY],
        WRONG,
        "backwards",
    ),
    "no symbol": (lambda d: ["replay", file(d, CSV), "--timeframe", "M1"], WRONG, "--symbol"),
    "unknown timeframe": (
        lambda d: ["replay", file(d, CSV), "--symbol", "X", "--timeframe", "M7", *NOBODY[-2:]],
        WRONG,
        "M7",
    ),
    "negative speed": (lambda d: ["replay", file(d, CSV), *REPLAY, "--speed", "-1"], WRONG, "speed"),
    "no up": (lambda d: ["replay", file(d, CSV), *REPLAY], NO, "mt5 up"),
    "no address": (lambda d: ["replay", file(d, CSV), *REPLAY, "--url", "gateway"], NO, "gateway"),
    "nobody there": (
        lambda d: ["replay", file(d, CSV), *REPLAY, "--url", f"http://127.0.0.1:{free_port()}"],
        NO,
        "mt5 up",
    ),
    "train an unknown timeframe": (lambda _: ["train", "--timeframe", "M7"], WRONG, "M7"),
    "train without an up": (lambda _: ["train", "--timeframe", "M1"], NO, "mt5 up"),
    "models without an up": (lambda _: ["models", "list"], NO, "mt5 up"),
    "promote without a reason": (lambda _: ["models", "promote", "v1"], WRONG, "--reason"),
    "tail nothing": (lambda _: ["signals", "tail", "--limit", "0"], WRONG, "limit"),
    "topology without an up": (lambda _: ["topology"], NO, "mt5 up"),
    "migrate without an up": (lambda _: ["migrate"], NO, "mt5 up"),
    "half a second": (lambda _: ["demo", "--seconds", "soon"], WRONG, "seconds"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_wrong_arguments_get_one_sentence(idle: System, tmp_path: Path, case: str) -> None:
    words, code, word = ARGUMENTS[case]
    check(idle.mt5(*words(tmp_path)), code, word)


SETTINGS: dict[str, tuple[dict[str, str], str | None, int, str]] = {
    "unknown variable": ({"MT5_GATEWAY_PROT": "1"}, None, WRONG, "MT5_GATEWAY_PORT"),
    "no number": ({"MT5_GATEWAY_PORT": "many"}, None, WRONG, "MT5_GATEWAY_PORT"),
    "no such file": ({"MT5_CONFIG": "/nowhere/mt5.toml"}, None, WRONG, "/nowhere/mt5.toml"),
    "bad TOML": ({}, "[gateway\nport = 1\n", WRONG, "TOML"),
    "unknown key": ({}, "[gateway]\nprot = 8001\n", WRONG, "gateway.port"),
    "wrong type": ({}, '[trainer]\ntrees = "many"\n', WRONG, "trainer.trees"),
    "bad schedule": ({"MT5_TRAINER_SCHEDULE": "daily"}, None, WRONG, "schedule"),
    "bad NATS address": ({"MT5_NATS_URL": "http://x"}, None, WRONG, "nats"),
    "bad database address": ({"MT5_DATABASE_URL": "mysql://x"}, None, WRONG, "postgresql"),
    "open to all without a key": ({"MT5_GATEWAY_HOST": "0.0.0.0"}, None, WRONG, "MT5_API_KEYS"),
    "no address of ours": ({"MT5_GATEWAY_HOST": "203.0.113.9", "MT5_API_KEYS": "k", "MT5_GATEWAY_PORT": "8001"}, None, WRONG, "203.0.113.9"),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_wrong_settings_get_one_sentence(idle: System, tmp_path: Path, case: str) -> None:
    variables, toml, code, word = SETTINGS[case]
    given = dict(variables)
    if toml is not None:
        given["MT5_CONFIG"] = file(tmp_path, toml, "mt5.toml")
    check(idle.mt5("up", **given), code, word)
    assert not idle.processes()


def test_a_home_that_is_a_file(idle: System, tmp_path: Path) -> None:
    check(idle.mt5("up", MT5_HOME=file(tmp_path, "x", "home")), WRONG, "MT5_HOME")


def test_a_port_that_is_taken(idle: System) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        check(idle.mt5("up", MT5_GATEWAY_PORT=port), WRONG, port)


def test_a_second_up_on_the_same_home(system: System) -> None:
    check(system.mt5("up"), NO, f"process {system.ready['pid']}")
    check(system.mt5("demo", "--seconds", "5"), NO, f"process {system.ready['pid']}")


def test_a_running_system_says_what_it_does_not_have(system: System, tmp_path: Path) -> None:
    check(system.mt5("train", "--timeframe", "M1"), NO, "5000 ready rows")
    check(system.mt5("models", "show", "v1"), NO, "v1")
    check(system.mt5("models", "promote", "v1", "--reason", "x"), NO, "v1")
    check(system.mt5("models", "rollback", "--reason", "x"), NO, "served")


def test_a_file_of_impossible_prices_is_refused_by_the_gateway(system: System, tmp_path: Path) -> None:
    bad = file(tmp_path, CSV.splitlines()[0] + "\n2025-01-02T00:00:00Z,1.1,1.0,1.2,1.15,10\n")
    done = system.mt5("replay", bad, *REPLAY)
    assert done.returncode == NO
    assert "1 rejected" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("symbol", ["", " ", "a\nb", "x" * 300])
def test_a_symbol_that_is_none(system: System, tmp_path: Path, symbol: str) -> None:
    done = system.mt5("replay", file(tmp_path, CSV), "--symbol", symbol, "--timeframe", "M1")
    assert done.returncode in (NO, WRONG), done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stdout or len(done.stderr.splitlines()) == 1


def test_what_answers_is_no_gateway(system: System, tmp_path: Path) -> None:
    address = system.ready["database"].rpartition("@")[2].partition("/")[0]
    done = system.mt5("replay", file(tmp_path, CSV), *REPLAY, "--url", f"http://{address}")
    check(done, NO, address)
    done = system.mt5("replay", file(tmp_path, CSV), *REPLAY, "--url", f"{system.ready['gateway']}/docs")
    check(done, NO, "/docs")
