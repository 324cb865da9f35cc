"""CI/CD as files: the workflows as actionlint reads them, what they promise, and the scripts that they call."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.mailbox import certificate, mail_server

ROOT: Final = Path(__file__).parents[2]
WORKFLOWS: Final = ROOT / ".github" / "workflows"
NAMES: Final = sorted(path.name for path in WORKFLOWS.glob("*.yml"))
VERSION: Final = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.load((WORKFLOWS / name).read_text(), Loader=yaml.BaseLoader)
    return found


def steps(workflow: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, job in workflow["jobs"].items():
        for step in job["steps"]:
            yield name, step


def commands(workflow: dict[str, Any], job: str) -> str:
    return "\n".join(step.get("run", "") for name, step in steps(workflow) if name == job)


def test_actionlint_is_content() -> None:
    assert NAMES == ["ci.yml", "release.yml"]
    checker = Path(sys.executable).with_name("actionlint")
    options = ("-config-file", ROOT / ".github" / "actionlint.yaml")  # by itself it looks for a folder .git beside
    command = [checker, *options, *(WORKFLOWS / name for name in NAMES)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("name", NAMES)
def test_actions_are_pinned_to_a_commit_with_its_version_beside(name: str) -> None:
    """A tag can be moved by whoever takes over an action's repository; a commit cannot."""
    text = (WORKFLOWS / name).read_text()
    used = re.findall(r"uses: (.*)", text)
    assert used
    assert [line for line in used if not re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []


@pytest.mark.parametrize("name", NAMES)
def test_what_others_write_is_never_part_of_a_script(name: str) -> None:
    """A branch or a commit's message that holds a command would be run: scripts get values by their environment."""
    for job, step in steps(read(name)):
        assert "${{" not in step.get("run", ""), f"{job}: {step['name']}"


@pytest.mark.parametrize("name", NAMES)
def test_rights_are_the_least(name: str) -> None:
    workflow = read(name)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert int(job["timeout-minutes"]) <= 60
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] == "false"


def test_ci_has_every_step_that_was_asked_for() -> None:
    ci = read("ci.yml")
    for job in ("lint", "test", "image", "tell"):
        first = ci["jobs"][job]["steps"][0]
        assert first["uses"].startswith("actions/checkout@"), job
    assert any(step.get("uses", "").startswith("actions/setup-python@") for job, step in steps(ci) if job == "test")
    assert "make lint" in commands(ci, "lint")
    assert "make test" in commands(ci, "test")
    assert "make test" in (ROOT / "README.md").read_text(), "the README's command"
    assert "docker build" in commands(ci, "image")
    assert set(ci["on"]) == {"push", "pull_request", "workflow_dispatch"}


def test_only_main_is_deployed_and_only_what_passed() -> None:
    deploy = read("ci.yml")["jobs"]["deploy"]
    assert deploy["runs-on"] == ["self-hosted", "mt5"]
    assert set(deploy["needs"]) == {"lint", "test", "image"}
    assert "github.event_name == 'push' && github.ref == 'refs/heads/main'" in deploy["if"]
    assert deploy["concurrency"]["cancel-in-progress"] == "false"
    assert "mt5-update@$GITHUB_SHA.service" in deploy["steps"][0]["run"]
    assert not any("checkout" in step.get("uses", "") for step in deploy["steps"]), (
        "nothing of the runner's is deployed"
    )


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_the_deployment_runs_on_our_machine(name: str) -> None:
    for job, wanted in read(name)["jobs"].items():
        assert (wanted["runs-on"] == ["self-hosted", "mt5"]) == (job == "deploy"), job


def test_a_mail_follows_each_commit_and_each_failure() -> None:
    for name in NAMES:
        workflow = read(name)
        tell = workflow["jobs"]["tell"]
        assert set(tell["needs"]) == set(workflow["jobs"]) - {"tell"}, name
        assert tell["if"].startswith("always()"), name
        assert "python3 .ci/mail.py" in commands(workflow, "tell"), name
    assert "github.event_name == 'push' || contains(needs.*.result, 'failure')" in read("ci.yml")["jobs"]["tell"]["if"]


def test_a_release_is_tested_built_and_attested() -> None:
    release = read("release.yml")
    check = commands(release, "check")
    for word in ("make lint", "make test", "make wheel", ".ci/notes.py"):
        assert word in check
    assert "docker push" in commands(release, "image")
    assert "gh release create" in commands(release, "publish")
    assert any("attest-build-provenance" in step.get("uses", "") for _, step in steps(release))
    assert set(release["on"]) == {"push"}
    assert set(release["on"]["push"]) == {"tags"}


# --- the scripts ---------------------------------------------------------------------------------------------------


def github(**changes: str) -> dict[str, str]:
    """A run's environment as GitHub sets it."""
    foreign = {name: value for name, value in os.environ.items() if not name.startswith(("GITHUB_", "MAIL_"))}
    results = {"lint": {"result": "success"}, "test": {"result": "success"}, "deploy": {"result": "skipped"}}
    return foreign | {
        "GITHUB_WORKFLOW": "ci",
        "GITHUB_EVENT_NAME": "push",
        "GITHUB_SHA": "0123456789abcdef0123456789abcdef01234567",
        "GITHUB_REF_NAME": "main",
        "GITHUB_ACTOR": "owner",
        "GITHUB_SERVER_URL": "https://github.com",
        "GITHUB_REPOSITORY": "owner/mt5",
        "GITHUB_RUN_ID": "42",
        "GITHUB_RUN_ATTEMPT": "1",
        "RESULTS": json.dumps(results),
        "COMMIT_MESSAGE": "Mend the gap\n\nIt was one.",
        **changes,
    }


def script(name: str, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", str(ROOT / ".ci" / name), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_the_mail_of_a_commit(tmp_path: Path) -> None:
    context, ca_file = certificate(tmp_path, "localhost")
    with mail_server(starttls=context, users={"ci": "secret"}) as box:
        mine = {"MAIL_HOST": "localhost", "MAIL_PORT": str(box.port), "MAIL_USER": "ci", "MAIL_PASSWORD": "secret"}
        mine |= {"MAIL_FROM": "CI <ci@example.org>", "MAIL_TO": "owner@example.org", "SSL_CERT_FILE": str(ca_file)}
        done = script("mail.py", env=github(**mine))
        assert done.returncode == 0, done.stdout + done.stderr
        failing = {"lint": {"result": "success"}, "test": {"result": "failure"}}
        evil = "Look\rBcc: eve@example.org\n\nBcc: eve@example.org"
        done = script(
            "mail.py", env=github(**mine, RESULTS=json.dumps(failing), COMMIT_MESSAGE=evil, GITHUB_REF_NAME="fe\nat")
        )
        assert done.returncode == 0, done.stdout + done.stderr
    good, bad = (received.mail for received in box.received)
    assert all(received.encrypted and received.user == "ci" for received in box.received)
    assert good["Subject"] == "[MT5] ci passed: main 0123456 Mend the gap"
    assert "https://github.com/owner/mt5/actions/runs/42" in good.get_content()
    assert bad["Subject"].startswith("[MT5] ci failed in test: fe at 0123456 Look")
    assert "Bcc" not in bad
    assert [received.recipients for received in box.received] == [("owner@example.org",)] * 2


def test_a_mail_is_never_sent_in_clear() -> None:
    with mail_server() as box:
        done = script(
            "mail.py", env=github(MAIL_HOST="localhost", MAIL_PORT=str(box.port), MAIL_TO="owner@example.org")
        )
    assert done.returncode == 1
    assert "::error::The mail was not sent" in done.stdout
    assert box.received == []


def test_without_secrets_nobody_is_told_and_nothing_fails() -> None:
    done = script("mail.py", env=github())
    assert (done.returncode, done.stdout[:27]) == (0, "::notice::Nobody is told: t")


def test_the_notes_of_a_release() -> None:
    done = script("notes.py", f"v{VERSION}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not re.search(r"^## ", done.stdout, re.MULTILINE), "of this version only"
    refused = script("notes.py", "v9.9.9")
    assert refused.returncode == 1
    assert f"pyproject.toml says {VERSION}" in refused.stderr


def test_ci_run_knows_its_steps() -> None:
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"]).returncode == 0
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
