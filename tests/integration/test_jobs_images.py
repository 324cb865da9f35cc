"""`job update` where docker compose runs the system: images are built, pulled, kept and put back.

There is no engine in a test: a program in docker's place keeps names and ids of images in a file, and knows only the
commands that are used here, as `docker` spells them.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from commands.jobs_git import Checkout
from commands.jobs_installed import Composed, Environment, Images, Program, composed
from commands.jobs_programs import JobFailed
from commands.jobs_update import Memory, Patience, Updater
from tests.checkouts import Project

DOCKER: Final = """
import json, pathlib, sys
here = pathlib.Path.cwd()
store = here.parent / "docker.json"
state = json.loads(store.read_text())
images = state["images"]
words = sys.argv[1:]
state["said"].append(" ".join(words))
code = 0
match words:
    case ["compose", "ps", "--quiet"]:
        print("\\n".join(["c1"] if state["running"] else []))
    case ["compose", "config", "--images"]:
        print("nats:2.12-alpine\\nmt5:0.1.0\\nmt5:0.1.0")
    case ["compose", "pull", "--quiet", "--ignore-buildable"]:
        images["nats:2.12-alpine"] = state["upstream"]
    case ["compose", "build", "--quiet", "--pull"]:
        if (here / "unbuildable").exists():
            print("no space left on device", file=sys.stderr)
            code = 17
        else:
            images["mt5:0.1.0"] = "built-of-" + (here / "version").read_text()
    case ["compose", "up", "--detach", "--remove-orphans", "--quiet-pull"]:
        state["running"] = {name: images[name] for name in ("nats:2.12-alpine", "mt5:0.1.0")}
        state["ups"].append(images["mt5:0.1.0"])
        state["health"] = state["by_image"].get(images["mt5:0.1.0"], "ok")
    case ["compose", "exec", "-T", "health", "mt5", "health", "check", "--json"]:
        print(json.dumps({"results": [{"check": "database", "status": state["health"]}]}))
        code = int(state["health"] == "critical")
    case ["image", "tag", old, new]:
        code = int(old not in images)
        if not code:
            images[new] = images[old]
    case ["image", "inspect", "--format", "{{.Id}}", name]:
        print(images.get(name, ""))
        code = int(name not in images)
    case ["image", "rm", name]:
        code = int(images.pop(name, None) is None)
    case _:
        sys.exit(f"docker: no such command: {words}")
store.write_text(json.dumps(state))
sys.exit(code)
"""


class Engine:
    """What the program in docker's place knows."""

    def __init__(self, project: Project) -> None:
        self._file = project.checkout.parent / "docker.json"
        images = {"nats:2.12-alpine": "nats-1", "mt5:0.1.0": "built-of-one"}
        self.write({"images": images, "running": dict(images), "upstream": "nats-1", "health": "ok"})
        self.write(self.read() | {"said": [], "ups": [], "by_image": {}})

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._file.read_text())
        return found

    def write(self, state: dict[str, Any]) -> None:
        self._file.write_text(json.dumps(state))

    def change(self, **changes: Any) -> None:
        self.write(self.read() | changes)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    project = Project(tmp_path / "p").create()
    place = tmp_path / "bin"
    place.mkdir()
    (place / "docker.py").write_text(DOCKER)
    (place / "docker").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {place}/docker.py "$@"\n')
    (place / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    return project


@pytest.fixture
def engine(project: Project) -> Engine:
    return Engine(project)


def updater(project: Project) -> Updater:
    home = project.folder / "home"
    home.mkdir(exist_ok=True)
    log = home / "log"
    program = Program(project.venv / "bin" / "python", project.checkout)
    parts = [Environment(project.checkout, project.venv, log), Images(project.checkout, log)]
    patience = Patience(deadline=0.5, steady=0.1, pause=0.05)
    return Updater(Checkout(project.checkout), parts, Composed(project.checkout, log), program, Memory(home), patience)


def test_containers_are_found_by_their_project(project: Project, engine: Engine) -> None:
    assert not composed(project.checkout), "without its .env nothing of it can run"
    (project.checkout / ".env").touch()
    assert composed(project.checkout)
    engine.change(running={})
    assert not composed(project.checkout)


def test_a_new_revision_is_built_and_runs(project: Project, engine: Engine) -> None:
    project.push("two")
    assert updater(project).run(None).ok
    state = engine.read()
    assert state["running"] == {"nats:2.12-alpine": "nats-1", "mt5:0.1.0": "built-of-two"}
    assert sorted(state["images"]) == ["mt5:0.1.0", "nats:2.12-alpine"], "nothing is left of what was kept"
    assert project.library == "lib==two"


def test_images_that_are_not_healthy_are_put_back(project: Project, engine: Engine) -> None:
    one = project.revision
    engine.change(upstream="nats-2", by_image={"built-of-two": "critical"})
    project.push("two")
    outcome = updater(project).run(None)
    assert not outcome.ok
    assert "critical: database" in outcome.summary
    state = engine.read()
    assert state["running"] == {"nats:2.12-alpine": "nats-1", "mt5:0.1.0": "built-of-one"}, "the server's, too"
    assert state["ups"] == ["built-of-two", "built-of-one"]
    assert (project.revision, project.library) == (one, "lib==one")


def test_an_image_that_cannot_be_built_restarts_nothing(project: Project, engine: Engine) -> None:
    engine.change(upstream="nats-2")
    project.push("two", unbuildable="")
    outcome = updater(project).run(None)
    assert not outcome.ok
    assert "`docker compose build --quiet --pull` ended with 17" in outcome.summary
    assert "no space left on device" in outcome.details
    state = engine.read()
    assert (state["ups"], state["images"]["nats:2.12-alpine"]) == ([], "nats-1")


def test_a_patched_server_is_taken_without_a_new_revision(project: Project, engine: Engine) -> None:
    engine.change(upstream="nats-2")
    outcome = updater(project).run(None)
    assert outcome.ok
    assert "runs from newer images" in outcome.summary
    state = engine.read()
    assert state["running"]["nats:2.12-alpine"] == "nats-2"
    assert state["ups"] == ["built-of-one"]


def test_nothing_new_restarts_nothing(project: Project, engine: Engine) -> None:
    outcome = updater(project).run(None)
    assert (outcome.ok, outcome.nothing) == (True, True)
    state = engine.read()
    assert state["ups"] == []
    assert sorted(state["images"]) == ["mt5:0.1.0", "nats:2.12-alpine"]


def test_a_compose_file_that_is_broken_changes_nothing(
    project: Project, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = project.revision
    project.push("two")
    (project.folder.parent / "bin" / "docker").write_text("#!/bin/sh\necho 'yaml: line 3' >&2; exit 15\n")
    with pytest.raises(JobFailed, match=r"Reading docker-compose\.yml failed"):
        updater(project).run(None)
    assert project.revision == one
