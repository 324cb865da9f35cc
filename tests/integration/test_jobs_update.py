"""`job update` on real git repositories: forward, and back to where it was, from every step at which it may fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from commands.jobs_git import Checkout
from commands.jobs_installed import Environment, Installed, Program, active_units
from commands.jobs_programs import JobFailed, run
from commands.jobs_update import Memory, Patience, Updater
from tests.checkouts import WELL, Project, git
from tests.servers import ROOT, wait_until

PATIENCE = Patience(deadline=1.0, steady=0.2, pause=0.05)
SICK = [{"nats": "ok", "database": "critical"}]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Project(tmp_path_factory.mktemp("project") / "p").create().folder


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Project:
    """A copy of the project of this test's own."""
    copy = tmp_path / "p"
    shutil.copytree(made, copy, symlinks=True)
    project = Project(copy)
    for clone in (project.work, project.checkout):
        git(clone, "remote", "set-url", "origin", str(copy / "remote"))
    return project


def updater(project: Project, patience: Patience = PATIENCE) -> Updater:
    home = project.folder / "home"
    home.mkdir(exist_ok=True)
    program = Program(project.venv / "bin" / "python", project.checkout)

    def restart() -> None:
        run(project.restart, cwd=project.checkout, seconds=10).need("The restart")

    return Updater(
        Checkout(project.checkout),
        [Environment(project.checkout, project.venv, home / "log")],
        Installed(program, "the test's service", restart),
        program,
        Memory(home),
        patience,
    )


def test_goes_forward_and_says_what_came(project: Project) -> None:
    project.push("two")
    three = project.push("three")
    outcome = updater(project).run(None)
    assert outcome.ok, outcome
    assert [line.partition(" ")[2] for line in outcome.details[:2]] == ["Make it three", "Make it two"]
    assert outcome.details[2:] == ("Restarted: the test's service.",)
    assert (project.revision, project.branch, project.library) == (three, "main", "lib==three")
    assert project.restarts == ["one", "three"]
    assert project.leftovers() == []
    # The old code is asked how it was, the new one migrates and says how it is.
    words = [line for line in project.said if "health" in line or "migrate" in line]
    assert words[:3] == ["one health check --json", "three migrate", "three health check --json"]


def test_nothing_new_is_nothing_to_tell(project: Project) -> None:
    outcome = updater(project).run(None)
    assert (outcome.ok, outcome.nothing) == (True, True)
    assert project.restarts == ["one"]


def test_what_is_not_healthy_is_put_back_and_not_tried_again_by_itself(project: Project) -> None:
    one = project.revision
    before = (project.venv / "library").stat().st_mtime_ns
    two = project.push("two", SICK)
    outcome = updater(project).run(None)
    assert not outcome.ok
    assert "critical: database" in outcome.summary
    assert (project.revision, project.branch, project.library) == (one, "main", "lib==one")
    assert (project.venv / "library").stat().st_mtime_ns == before, "the very files that were there"
    assert project.restarts == ["one", "two", "one"]
    assert project.leftovers() == []

    with pytest.raises(JobFailed, match="stays out: it was put back on"):
        updater(project).run(None)
    assert project.restarts == ["one", "two", "one"]
    assert not updater(project).run(two).ok, "asked for by name it is tried"
    assert project.restarts == ["one", "two", "one", "two", "one"]

    three = project.push("three")
    assert updater(project).run(None).ok
    assert project.revision == three


def test_health_must_be_steady(project: Project) -> None:
    """A process that crashes in a loop looks well between two crashes."""
    project.push("two", [state for _ in range(40) for state in (WELL[0], SICK[0])])
    assert not updater(project).run(None).ok
    assert project.library == "lib==one"


def test_it_may_take_its_time_to_become_healthy(project: Project) -> None:
    project.push("two", [SICK[0]] * 3 + WELL)
    assert updater(project, Patience(deadline=20.0, steady=0.2, pause=0.05)).run(None).ok


def test_what_was_wrong_before_is_no_reason_to_go_back(project: Project) -> None:
    bad_disk = [{"nats": "ok", "disk.home": "critical"}]
    assert updater(project).run(project.push("two", SICK)).ok is False
    (project.checkout.parent / "running").write_text(json.dumps(bad_disk))
    project.push("three", bad_disk)
    assert updater(project).run(None).ok


def test_an_answer_that_nobody_understands_is_not_health(project: Project) -> None:
    project.push("two", WELL, **{"runner.py": "import sys; sys.exit('broken')"})
    outcome = updater(project).run(None)
    assert not outcome.ok
    assert project.library == "lib==one"


@pytest.mark.parametrize(
    ("files", "reason"),
    [({"broken": ""}, "could not be installed"), ({"fails-migrate": "no such table"}, "The migration failed")],
)
def test_what_fails_before_the_restart_restarts_nothing(project: Project, files: dict[str, str], reason: str) -> None:
    one = project.revision
    project.push("two", WELL, **files)
    outcome = updater(project).run(None)
    assert not outcome.ok
    assert reason in outcome.summary
    assert any("no such" in line for line in outcome.details), outcome.details
    assert (project.revision, project.library, project.restarts) == (one, "lib==one", ["one"])
    assert project.leftovers() == []


def test_a_restart_that_fails_is_put_back(project: Project) -> None:
    project.push("two", states=WELL)
    git(project.work, "rm", "--quiet", "states")
    git(project.work, "commit", "--quiet", "--message", "Forget the states")
    git(project.work, "push", "--quiet", "origin", "HEAD:main")
    outcome = updater(project).run(None)
    assert not outcome.ok
    assert "The restart failed" in outcome.summary
    assert project.restarts == ["one", "one"]


def test_a_way_back_that_fails_is_critical(project: Project) -> None:
    """Both are ill, though the older one was well when the update began: somebody has to get up."""
    project.push("two", [{"database": "critical"}])
    git(project.checkout, "pull", "--quiet")
    project.push("three", [{"nats": "critical"}])
    outcome = updater(project).run(None)
    assert (outcome.ok, outcome.severity) == (False, "critical")
    assert "so did the way back" in outcome.summary
    assert "critical: nats" in outcome.summary
    assert "critical: database" in outcome.summary
    assert project.restarts == ["one", "three", "two"]


def test_a_migration_waits_for_a_backup(project: Project) -> None:
    one = project.revision
    two = project.push("two", WELL, **{"schema/sql/migrations/0002_more.sql": "SELECT 1;"})
    outcome = updater(project).run(None)
    assert outcome.ok
    words = [line for line in project.said if "backup" in line or "migrate" in line]
    assert words == ["one backup run --local --unless-newer 20h", "two migrate"]
    project.push("three")
    assert updater(project).run(None).ok
    assert not any("three backup" in line or "two backup" in line for line in project.said), "none without a migration"
    assert one != two


def test_without_its_backup_a_migration_does_not_happen(project: Project) -> None:
    project.push("two", WELL, **{"fails-backup": "the disk is full"})
    assert updater(project).run(None).ok
    two = project.revision
    project.push("three", WELL, **{"schema/sql/migrations/0002_more.sql": "SELECT 1;"})
    with pytest.raises(JobFailed, match="The backup before a migration failed"):
        updater(project).run(None)
    assert (project.revision, project.restarts) == (two, ["one", "two"])


# --- whose checkout it is ------------------------------------------------------------------------------------------


def test_changes_of_its_own_are_not_thrown_away(project: Project) -> None:
    project.push("two")
    (project.checkout / "states").write_text("mine")
    with pytest.raises(JobFailed, match="has changes of its own") as refused:
        updater(project).run(None)
    assert "states" in refused.value.details[0]
    assert (project.checkout / "states").read_text() == "mine"


def test_a_rewritten_history_is_followed_only_when_named(project: Project) -> None:
    one = project.revision
    project.push("two")
    assert updater(project).run(None).ok
    two = project.revision
    git(project.work, "reset", "--quiet", "--hard", one)
    (project.work / "version").write_text("other")
    git(project.work, "commit", "--quiet", "--all", "--message", "Another two")
    git(project.work, "push", "--quiet", "--force", "origin", "HEAD:main")
    other = git(project.work, "rev-parse", "HEAD")
    outcome = updater(project).run(None)
    assert not outcome.ok
    assert "does not go on from" in outcome.summary
    assert (project.revision, project.branch, project.library) == (two, "main", "lib==two")
    assert updater(project).run(other).ok
    assert (project.revision, project.branch) == (other, "")


def test_back_to_a_branch_from_a_revision_that_lies_elsewhere(project: Project) -> None:
    one = project.revision
    project.push("two")
    assert updater(project).run(None).ok
    two = project.revision
    (project.checkout.parent / "running").write_text(json.dumps(WELL))
    git(project.work, "checkout", "--quiet", "-b", "side", one)
    (project.work / "states").write_text(json.dumps(SICK))
    git(project.work, "commit", "--quiet", "--all", "--message", "A sick one aside")
    git(project.work, "push", "--quiet", "origin", "side")
    outcome = updater(project).run("side")
    assert not outcome.ok
    assert (project.revision, project.branch, project.library) == (two, "main", "lib==two")


@pytest.mark.parametrize("wanted", ["nowhere", "--upload-pack=evil", "main; rm -rf /"])
def test_a_revision_that_is_none(project: Project, wanted: str) -> None:
    with pytest.raises(JobFailed, match="There is no revision"):
        updater(project).run(wanted)


def test_a_remote_that_is_away(project: Project) -> None:
    shutil.rmtree(project.folder / "remote")
    with pytest.raises(JobFailed, match="could not be fetched") as failed:
        updater(project).run(None)
    assert failed.value.details, "git's own words"
    assert project.restarts == ["one"]


def test_no_checkout_at_all(tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="is no git checkout"):
        Checkout(tmp_path)


# --- cut off -------------------------------------------------------------------------------------------------------


WORK = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.checkouts import Project
from tests.integration.test_jobs_update import updater
from commands.jobs import _stoppable
with _stoppable():
    print(updater(Project(Path({folder!r}))).run(None).summary)
"""


def hanging(project: Project) -> subprocess.Popen[str]:
    """An update that has come to the installation, and stays there."""
    os.mkfifo(project.checkout / "hang")
    code = WORK.format(root=str(ROOT), folder=str(project.folder))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_until(lambda: (project.folder / "home" / "log").exists() or process.poll() is not None, 20, "make runs")
        assert process.poll() is None, process.communicate()[0]
    except AssertionError:
        process.kill()
        raise
    return process


def test_an_update_that_was_killed_is_put_back_by_the_next(project: Project) -> None:
    one = project.revision
    two = project.push("two")
    process = hanging(project)
    group = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.kill()
    process.communicate(timeout=10)
    for pid in group:
        os.killpg(pid, signal.SIGKILL)
    assert project.revision == two, "left in between"
    (project.checkout / "hang").unlink()
    shutil.rmtree(project.folder / "remote")
    with pytest.raises(JobFailed, match="could not be fetched"):
        updater(project).run(None)
    assert (project.revision, project.branch, project.library, project.restarts) == (one, "main", "lib==one", ["one"])


def test_a_signal_puts_it_back_at_once(project: Project) -> None:
    one = project.revision
    project.push("two")
    process = hanging(project)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 0, said
    assert "it was stopped by SIGTERM" in said
    assert (project.revision, project.library, project.restarts) == (one, "lib==one", ["one"])


def test_units_are_looked_for_without_a_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert active_units() == []
