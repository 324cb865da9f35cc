"""What is installed: the locks that `make` installs from, and a wheel that runs outside the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
PROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ROOMS: Final = ("schema", "bus", "actors", "deploy", "commands")
LOCKS: Final = {
    "runtime": (),
    "embedded": ("embedded",),
    "test": ("embedded", "test", "bench"),
}


def pins(lock: str) -> dict[str, str]:
    """Each package of a lock with its version; every one has hashes."""
    found: dict[str, str] = {}
    for block in re.split(r"\n(?=[a-z0-9])", (ROOT / "requirements" / f"{lock}.lock").read_text()):
        if match := re.match(r"([a-z0-9][a-z0-9._-]*)==(\S+)", block):
            assert "--hash=sha256:" in block, match[1]
            found[match[1]] = match[2]
    return found


def name(requirement: str) -> str:
    """``TA-Lib>=0.6`` → ``ta-lib``."""
    return re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower()


@pytest.mark.parametrize(("lock", "extras"), LOCKS.items())
def test_locks_hold_every_declared_package(lock: str, extras: tuple[str, ...]) -> None:
    declared = [
        *PROJECT["dependencies"],
        *(r for e in extras for r in PROJECT["optional-dependencies"][e]),
        "hatchling",
    ]
    missing = {name(requirement) for requirement in declared} - set(pins(lock))
    assert missing == set(), "run `make lock`"


def test_locks_agree() -> None:
    """So that `make demo` after `make test` changes nothing, and tests run what users run."""
    tested = pins("test")
    for lock in ("runtime", "embedded"):
        assert {package: tested.get(package) for package in pins(lock)} == pins(lock)


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_name_no_host(lock: str) -> None:
    text = (ROOT / "requirements" / f"{lock}.lock").read_text()
    assert not re.search(r"://|--(extra-)?index-url|--find-links", text)


def test_every_dependency_has_its_reason() -> None:
    listed = [
        line
        for line in (ROOT / "pyproject.toml").read_text().splitlines()
        if re.match(r'\s+"[A-Za-z0-9_-]+[<>=]=', line)
    ]
    assert len(listed) >= len(PROJECT["dependencies"])
    assert [line for line in listed if not re.search(r",\s+# \S", line)] == []


def test_changelog_knows_this_version() -> None:
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"mt5-trading-system:{PROJECT['version']}\n" in (ROOT / "docker-compose.yml").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dist = tmp_path_factory.mktemp("dist")
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(dist), str(ROOT)]
    run = subprocess.run([sys.executable, "-m", "pip", *build], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return next(dist.glob("*.whl"))


def test_wheel_carries_every_file_of_every_room(wheel: Path) -> None:
    wanted = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = {entry for entry in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in entry}
    assert found == wanted | {"runner.py", "deploy/nats.conf"}


ASK: Final = """
import importlib.resources, runner
assert "site-packages" in runner.__file__, runner.__file__
for place in ("schema/sql/schema.sql", "schema/sql/queries.sql", "deploy/web/index.html", "deploy/nats.conf"):
    room, *rest = place.split("/")
    assert importlib.resources.files(room).joinpath(*rest).read_text().strip(), place
assert any(p.name.endswith(".sql") for p in importlib.resources.files("schema").joinpath("sql", "migrations").iterdir())
"""


def test_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own; only the libraries are borrowed from this one."""
    home = tmp_path / "venv"
    venv.create(home, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}, scheme="venv"))
    python = home / "bin" / "python"
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MT5_", "PYTHON"))}

    def answer(*command: str | Path) -> str:
        run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    answer(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    answer(python, "-c", ASK)
    assert "Exit codes" in answer(home / "bin" / "mt5", "--help")
    assert "gateway" in answer(home / "bin" / "mt5", "settings")
