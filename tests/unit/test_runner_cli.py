"""The command line as a process: help, exit codes, and one sentence for whatever a user can get wrong."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest

from actors.core.verdicts import registered
from bus import permissions
from commands.up import ACTORS, actor_class, processes
from runner import parser

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ["up", "demo", "replay", "train", "models", "signals", "topology", "migrate", "settings", "doctor", "bench"]


def mt5(*words: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line in an empty folder, with no MT5_ variable but those given."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MT5_")}
    env |= {"PYTHONPATH": str(ROOT), "MT5_HOME": str(cwd / "var")} | environ
    return subprocess.run(
        [sys.executable, "-m", "runner", *words],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def sentence(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line on stderr of a command that failed as it should."""
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    return line


def test_help_lists_every_command_and_hides_the_inner_one(tmp_path: Path) -> None:
    done = mt5("--help", cwd=tmp_path)
    assert done.returncode == 0
    for name in COMMANDS:
        assert f"    {name} " in done.stdout
    assert "_run" not in done.stdout


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys, runner\ntry: runner.main(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {
        "msgspec",
        "nats",
        "asyncpg",
        "asyncio",
        "aiohttp",
        "numpy",
        "sklearn",
        "rich",
        "structlog",
        "uvloop",
    }


def test_help_is_fast(tmp_path: Path) -> None:
    best = 60.0
    for _ in range(5):
        began = time.perf_counter()
        mt5("--help", cwd=tmp_path)
        best = min(best, time.perf_counter() - began)
    assert best < 1.0  # about 70 ms when the machine is idle


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["sgnals"],
        ["models"],
        ["signals"],
        ["train"],
        ["models", "promote", "v1"],
        ["models", "retire", "v1"],
        ["replay", "file.csv"],
        ["demo", "--seconds", "soon"],
        ["demo", "--seconds", "-1"],
        ["signals", "tail", "--limit", "0"],
        ["settings", "--yaml"],
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(words: list[str], tmp_path: Path) -> None:
    line = sentence(mt5(*words, cwd=tmp_path), 2)
    assert line.startswith("mt5")
    assert "--help` shows the usage" in line


@pytest.mark.parametrize(
    "words", [["settings"], ["up"], ["topology"], ["models", "list"], ["train", "--timeframe", "M1"]]
)
def test_wrong_settings_stop_every_command_with_exit_code_2(words: list[str], tmp_path: Path) -> None:
    line = sentence(mt5(*words, cwd=tmp_path, MT5_GATEWAY_PROT="1"), 2)
    assert line == "mt5: MT5_GATEWAY_PROT is not a setting: did you mean MT5_GATEWAY_PORT?"


def test_a_settings_file_that_is_named_must_exist(tmp_path: Path) -> None:
    line = sentence(mt5("settings", cwd=tmp_path, MT5_CONFIG="nowhere.toml"), 2)
    assert line == "mt5: MT5_CONFIG names nowhere.toml, which does not exist: create it or unset MT5_CONFIG."


def test_a_settings_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "mt5.toml").write_bytes(b"\xff\xfe")
    assert sentence(mt5("settings", cwd=tmp_path), 2) == "mt5: mt5.toml is not UTF-8 text: save it as UTF-8."
    (tmp_path / "folder").mkdir()
    assert "cannot be read" in sentence(mt5("settings", cwd=tmp_path, MT5_CONFIG="folder"), 2)


def test_settings_tell_the_value_and_its_source_with_secrets_masked(tmp_path: Path) -> None:
    (tmp_path / "mt5.toml").write_text('[gateway]\nport = 9001\n[nats]\nurl = "nats://me:hunter2@h:4222"\n')
    done = mt5("settings", cwd=tmp_path, MT5_API_KEYS="hunter3")
    assert done.returncode == 0
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert lines["gateway.port"] == ["9001", "mt5.toml"]
    assert lines["nats.url"] == ["nats://me:***@h:4222", "mt5.toml"]
    assert lines["gateway.api_keys"] == ["***", "MT5_API_KEYS"]
    assert lines["log.level"] == ["info", "default"]
    described = json.loads(mt5("settings", "--json", cwd=tmp_path, MT5_API_KEYS="hunter3").stdout)
    assert described["gateway"]["port"] == 9001
    assert "hunter" not in json.dumps(described)


@pytest.mark.parametrize(
    "words",
    [
        ["topology"],
        ["topology", "apply"],
        ["migrate"],
        ["models", "list"],
        ["models", "show", "v1"],
        ["models", "promote", "v1", "--reason", "x"],
        ["models", "rollback", "--reason", "x"],
        ["models", "retire", "v1", "--reason", "x"],
        ["models", "restore"],
        ["signals", "tail"],
        ["train", "--timeframe", "M1"],
    ],
)
def test_with_nothing_running_it_says_how_to_start(words: list[str], tmp_path: Path) -> None:
    line = sentence(mt5(*words, cwd=tmp_path), 1)
    assert line.startswith(f"mt5: Nothing is running under {tmp_path / 'var'}: start it with `mt5 up`")


def test_a_ready_file_of_a_dead_run_counts_as_nothing_running(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "var").mkdir()
    (tmp_path / "var" / "ready.json").write_text(json.dumps({"pid": dead.pid, "nats": "nats://x@127.0.0.1:1"}))
    assert "Nothing is running" in sentence(mt5("topology", cwd=tmp_path), 1)


def test_servers_that_do_not_answer_are_one_sentence(tmp_path: Path) -> None:
    line = sentence(mt5("topology", cwd=tmp_path, MT5_NATS_URL="nats://127.0.0.1:1"), 1)
    assert "NATS does not take our connection" in line
    line = sentence(mt5("migrate", cwd=tmp_path, MT5_DATABASE_URL="postgresql://a:hunter2@127.0.0.1:1/mt5"), 1)
    assert "PostgreSQL" in line
    assert "hunter2" not in line


def test_unknown_actors_and_timeframes_list_or_name_the_known_ones(tmp_path: Path) -> None:
    line = sentence(mt5("up", "collecter", cwd=tmp_path), 2)
    assert "collector, features, emitter, recorder, trainer, scorer" in line
    assert "M1 to MN1" in sentence(mt5("train", "--timeframe", "M7", cwd=tmp_path), 2)


def test_a_gateway_open_to_others_needs_keys(tmp_path: Path) -> None:
    line = sentence(mt5("up", cwd=tmp_path, MT5_GATEWAY_HOST="0.0.0.0"), 2)
    assert "MT5_API_KEYS" in line


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MT5_")}
    writer = subprocess.Popen(
        [sys.executable, "-m", "runner", "settings"], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert writer.stdout is not None
    writer.stdout.close()
    assert writer.stderr is not None
    assert writer.stderr.read() == b""
    assert writer.wait(30) == 0
    writer.stderr.close()


def test_what_nobody_foresaw_is_a_sentence_and_a_log(tmp_path: Path) -> None:
    home = tmp_path / "var"
    home.mkdir()
    code = (
        "import sys, commands.settings, runner\n"
        "def broken(args): raise LookupError('surprise')\n"
        "commands.settings.show = broken\n"
        "sys.exit(runner.main(['settings']))"
    )
    env = dict(os.environ) | {"MT5_HOME": str(home), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    log = home / "logs" / "mt5.log"
    assert sentence(done, 1) == f"mt5: unexpected LookupError: surprise (details are in {log})."
    assert "Traceback" in log.read_text()
    assert stat.S_IMODE(log.parent.stat().st_mode) == 0o700


def test_every_command_names_a_handler_and_can_be_parsed() -> None:
    top = parser()
    assert top.parse_args(["up", "collector", "--isolate"]).actors == ["collector"]
    assert top.parse_args(["demo", "--seconds", "90"]).seconds == 90
    args = top.parse_args(
        ["replay", "f.csv", "--symbol", "EURUSD", "--timeframe", "M1", "--speed", "0", "--url", "http://h"]
    )
    assert (args.file, args.symbol, args.timeframe, args.speed, args.history, args.url) == (
        "f.csv", "EURUSD", "M1", 0.0, False, "http://h",
    )  # fmt: skip
    assert top.parse_args(["topology"]).handler == "commands.topology:show"
    assert top.parse_args(["topology", "apply", "--json"]).handler == "commands.topology:apply"
    assert top.parse_args(["topology", "--json"]).json
    assert top.parse_args(["models", "rollback", "--reason", "drift"]).reason == "drift"
    assert top.parse_args(["models", "rollback"]).reason == "by hand"


@pytest.mark.parametrize("state", ["shadow", "candidate"])
def test_the_call_that_a_verdict_names_is_one_that_works(state: Literal["shadow", "candidate"]) -> None:
    message = registered("rf_m1", "v2", state, {}, "/models").message
    program, *words = shlex.split(message.split("`")[1])
    args = parser().parse_args(words)
    assert (program, args.handler, args.version) == ("mt5", "commands.models:promote", "v2")


@pytest.mark.parametrize(
    ("names", "isolate", "expected"),
    [
        (
            [],
            False,
            {"hot": ("collector", "features", "emitter")}
            | {name: (name,) for name in ("recorder", "trainer", "scorer", "health", "backup")},
        ),
        ([], True, {name: (name,) for name in ACTORS}),
        (["emitter", "collector", "emitter"], False, {"hot": ("collector", "emitter")}),
        (["trainer", "features"], False, {"features": ("features",), "trainer": ("trainer",)}),
    ],
)
def test_the_hot_path_shares_a_process(names: list[str], isolate: bool, expected: dict[str, tuple[str, ...]]) -> None:
    assert processes(names, isolate=isolate) == expected


def test_every_actor_of_the_registry_is_an_actor() -> None:
    for name in ACTORS:
        assert actor_class(name).name == name
    assert {user.name for user in permissions.users()} == {*ACTORS, permissions.OPERATOR}
