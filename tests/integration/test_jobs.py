"""What is around every job: its result, its mail, one at a time; and the jobs that look: tests, vuln-check, runner-check."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import shlex
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from actors.monitor.journal import Journal
from commands.jobs import Job, Outcome, run_job
from commands.jobs_audit import audit
from commands.jobs_operate import runner
from commands.jobs_programs import JobFailed, run
from commands.jobs_tests import tests as run_tests
from commands.jobs_tests import tools
from commands.output import CommandError
from commands.settings import read
from deploy.server import free_port
from schema.jobs import JobResult
from tests.checkouts import Project, git
from tests.mailbox import Mailbox, mail_server
from tests.servers import ROOT, wait_until


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MT5_HOME of jobs that run in this process; nobody is told."""
    for name in [name for name in os.environ if name.startswith("MT5_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MT5_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def mailbox(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mailbox]:
    with mail_server() as box:
        configure(monkeypatch, box.port)
        yield box


def configure(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    settings = {"HOST": "127.0.0.1", "PORT": str(port), "SECURITY": "none", "RECIPIENTS": "owner@example.org"}
    for name, value in settings.items():
        monkeypatch.setenv(f"MT5_NOTIFY_SMTP_{name}", value)


def asked(**options: Any) -> Namespace:
    return Namespace(**{"json": False, "mail": "always"} | options)


def job(home: Path, name: str = "test") -> Job:
    folder = home / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    return Job(name, read(), folder, home / "job.log")


def kept(home: Path, name: str) -> JobResult:
    return msgspec.json.decode((home / "jobs" / f"{name}.json").read_bytes(), type=JobResult)


def subjects(box: Mailbox) -> list[str]:
    return [str(received.mail["Subject"]) for received in box.received]


# --- around each ---------------------------------------------------------------------------------------------------


def test_an_outcome_is_kept_printed_and_mailed(
    home: Path, mailbox: Mailbox, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = Outcome(False, "Two of three.", ("first", "second"))
    assert run_job("update", asked(), lambda job: outcome) == 1
    result = kept(home, "update")
    assert (result.name, result.ok, result.summary, result.details) == (
        "update",
        False,
        "Two of three.",
        outcome.details,
    )
    said = capsys.readouterr()
    assert said.out.splitlines() == ["first", "second", "Two of three."]
    assert "Told by smtp." in said.err
    mail = mailbox.received[0].mail
    assert mail["Subject"] == "[MT5] update failed: Two of three."
    assert mail["To"] == "owner@example.org"
    text = mail.get_body(("plain",)).get_content()  # type: ignore[union-attr]
    assert "first\r\nsecond" in text.replace("\n", "\r\n").replace("\r\r", "\r")
    assert "`mt5 job update` on " in text


def test_what_is_kept_is_for_the_owner_alone(home: Path, mailbox: Mailbox) -> None:
    run_job("tests", asked(), lambda job: Outcome(job.log.write_text("x") == 1, "Fine."))
    for path in (home, *home.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & 0o077 == 0, f"{path} {mode:o}"


def test_json_is_the_result(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job("tests", asked(json=True), lambda job: Outcome(True, "Fine.")) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["summary"] == "Fine."
    assert "Nobody is told" in said.err


@pytest.mark.parametrize(
    ("mail", "runs", "told"),
    [
        ("always", [(True, False), (True, True), (False, False)], ["", " failed"]),
        (
            "failure",
            [(True, False), (False, False), (False, False), (True, False), (True, False)],
            [" failed"] * 2 + [""],
        ),
        ("never", [(False, False), (True, False)], []),
    ],
)
def test_who_is_told_of_what(
    home: Path, mailbox: Mailbox, mail: str, runs: list[tuple[bool, bool]], told: list[str]
) -> None:
    for ok, nothing in runs:
        run_job("tests", asked(mail=mail), lambda job, ok=ok, nothing=nothing: Outcome(ok, "So.", nothing=nothing))
    assert subjects(mailbox) == [f"[MT5] tests{words}: So." for words in told]


def test_a_defect_is_told_like_any_failure(home: Path, mailbox: Mailbox) -> None:
    def breaks(job: Job) -> Outcome:
        raise ZeroDivisionError("a\nb")

    assert run_job("tests", asked(), breaks) == 1
    assert kept(home, "tests").summary.startswith("Unexpected ZeroDivisionError: a b (details are in ")
    assert "ZeroDivisionError: a" in (home / "logs" / "mt5.log").read_text()
    assert len(mailbox.received) == 1


def test_one_at_a_time(home: Path) -> None:
    run_job("tests", asked(), lambda job: Outcome(True, "Fine."))
    with (home / "jobs" / "tests.lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(CommandError, match="runs already"):
            run_job("tests", asked(), lambda job: Outcome(False, "Never."))
        assert run_job("update", asked(), lambda job: Outcome(True, "Another job.")) == 0
    assert kept(home, "tests").summary == "Fine."


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has other users' homes")
def test_another_users_home_is_left_alone(home: Path) -> None:
    home.mkdir()
    os.chown(home, pwd.getpwnam("nobody").pw_uid, -1)
    with pytest.raises(CommandError, match="belongs to another user"):
        run_job("tests", asked(), lambda job: Outcome(True, "Fine."))
    assert list(home.iterdir()) == []


# --- telling -------------------------------------------------------------------------------------------------------


def test_a_living_monitor_is_left_to_send_it(home: Path, mailbox: Mailbox) -> None:
    """It looks at everything once more and empties the outbox: nobody else sends."""
    monitor = threading.Thread(target=live, args=(home, 1))
    run_job("tests", asked(mail="never"), lambda job: Outcome(True, "Fine."))
    Journal.open(home).close()
    check(home)
    monitor.start()
    began = time.monotonic()
    run_job("tests", asked(), lambda job: Outcome(True, "Fine."))
    monitor.join(10)
    assert time.monotonic() - began < 20
    assert mailbox.received == []
    assert [row[0] for row in rows(home, "SELECT sent_at IS NOT NULL FROM outbox")] == [1]


def test_a_monitor_that_has_died_just_now_is_not_waited_for_in_vain(
    home: Path, mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MT5_HEALTH_INTERVAL_SECONDS", "0.5")
    monkeypatch.setenv("MT5_HEALTH_TIMEOUT_SECONDS", "0.5")
    home.mkdir(mode=0o700)
    Journal.open(home).close()
    check(home)
    run_job("update", asked(), lambda job: Outcome(False, "It has ended the monitor."))
    assert subjects(mailbox) == ["[MT5] update failed: It has ended the monitor."]


def test_a_mail_server_that_is_away_loses_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("commands.jobs_tell.DELIVER_SECONDS", 1.0)
    port = free_port()
    configure(monkeypatch, port)
    run_job("update", asked(), lambda job: Outcome(False, "First."))
    assert "it waits in the outbox for the monitor" in capsys.readouterr().err
    with mail_server(port=port) as box:
        monkeypatch.setattr("commands.jobs_tell.DELIVER_SECONDS", 30.0)
        run_job("tests", asked(), lambda job: Outcome(True, "Second."))
        wait_until(lambda: len(box.received) == 2, 5, "both mails")
    assert subjects(box) == ["[MT5] update failed: First.", "[MT5] tests: Second."]


def test_a_home_that_takes_no_file_keeps_no_mail_back(
    home: Path, mailbox: Mailbox, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a full disk would, folders in their places refuse the result and the outbox."""
    run_job("update", asked(mail="never"), lambda job: Outcome(True, "Fine."))
    for name in ("jobs/update.json", "health_checks.db"):
        (home / name).unlink(missing_ok=True)
        (home / name).mkdir()
    assert run_job("update", asked(), lambda job: Outcome(False, "No room.")) == 1
    assert subjects(mailbox) == ["[MT5] update failed: No room."]
    said = capsys.readouterr().err
    assert "the result is not kept" in said
    assert "Told by smtp." in said


def test_a_sender_that_cannot_work_is_a_failure(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, 25)
    monkeypatch.setenv("MT5_NOTIFY_SMTP_SECURITY", "tls")
    monkeypatch.setenv("MT5_NOTIFY_SMTP_CA_FILE", str(home / "none.pem"))
    with pytest.raises(CommandError, match="Nobody could be told of it"):
        run_job("tests", asked(), lambda job: Outcome(True, "Fine."))
    assert kept(home, "tests").ok


def live(home: Path, rounds: int) -> None:
    """What a monitor does to health_checks.db that others see: it looks, and marks what it has sent."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if rows(home, "SELECT 1 FROM outbox"):
            check(home)
            with contextlib.closing(sqlite3.connect(home / "health_checks.db", timeout=5)) as connection, connection:
                connection.execute("UPDATE outbox SET sent_at = ?", (time.time(),))
            return
        time.sleep(0.02)


def check(home: Path) -> None:
    with contextlib.closing(sqlite3.connect(home / "health_checks.db", timeout=5)) as connection, connection:
        connection.execute(
            "INSERT INTO checks (at, \"check\", status, latency, message) VALUES (?, 'nats', 'ok', 0, '')",
            (time.time(),),
        )


def rows(home: Path, query: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(home / "health_checks.db", timeout=5)) as connection:
        return connection.execute(query).fetchall()


# --- programs ------------------------------------------------------------------------------------------------------


def test_a_program_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    script = f"sleep 300 & echo $! >{tmp_path}/pid; wait"
    with pytest.raises(JobFailed, match=r"had not ended after 0\.5 s"):
        run(("sh", "-c", script), cwd=tmp_path, seconds=0.5)
    child = int((tmp_path / "pid").read_text())
    wait_until(lambda: not alive(child), 5, "the child has ended")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="`no-such-program` cannot be run here"):
        run(("no-such-program",), cwd=tmp_path, seconds=1)


# --- tests ---------------------------------------------------------------------------------------------------------

SUITE: Final = f"""
test:
\t@mkdir -p $(VENV) && touch $(VENV)/here
\t@test ! -e broken || {{ echo 'cannot import' >&2; exit 2; }}
\t@{shlex.quote(sys.executable)} -m pytest --rootdir=. $(PYTEST_ARGS) suite.py
"""
PASSING: Final = """
import os, pathlib
def test_one(): pass
def test_nothing_leads_to_what_serves(): assert not [name for name in os.environ if name.startswith("MT5_")]
def test_only_what_git_keeps(): assert not pathlib.Path("lies-about").exists()
"""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose `make test` runs three tests."""
    monkeypatch.setenv("PYTEST_ARGS", "-q -p no:cacheprovider -p no:xdist")
    folder = tmp_path / "suite"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "Makefile").write_text(SUITE)
    commit(folder, PASSING)
    (folder / "lies-about").touch()
    return folder


def commit(folder: Path, text: str) -> None:
    (folder / "suite.py").write_text(text)
    git(folder, "add", "Makefile", "suite.py")
    git(folder, "commit", "--quiet", "--message", "tests")


def test_tests_run_in_a_copy_and_are_counted(home: Path, suite: Path) -> None:
    outcome = run_tests(job(home), suite)
    assert outcome.ok, outcome
    assert outcome.summary == f"3 passed at {git(suite, 'rev-parse', 'HEAD')[:12]}."
    assert (tools(job(home)) / "here").exists(), "their environment is one of their own"
    assert sorted(path.name for path in suite.iterdir()) == [".git", "Makefile", "lies-about", "suite.py"]
    assert not (home / "jobs" / "tests" / "checkout").exists()


def test_failing_tests_are_named(home: Path, suite: Path) -> None:
    commit(suite, PASSING + "def test_two(): assert 0\nimport pytest\n@pytest.mark.skip\ndef test_three(): pass\n")
    outcome = run_tests(job(home), suite)
    assert not outcome.ok
    assert outcome.summary.startswith("3 passed, 1 failed, 1 skipped at ")
    assert outcome.details == ("suite::test_two",)


def test_a_suite_that_cannot_be_collected_is_a_failure(home: Path, suite: Path) -> None:
    commit(suite, "def test_one(:")
    outcome = run_tests(job(home), suite)
    assert not outcome.ok
    assert "1 broken" in outcome.summary


def test_a_suite_that_cannot_be_run_is_a_failure(home: Path, suite: Path) -> None:
    (suite / "broken").touch()
    git(suite, "add", "broken")
    commit(suite, PASSING)
    with pytest.raises(JobFailed, match="could not be run: `make test` ended with 2") as failed:
        run_tests(job(home), suite)
    assert any("cannot import" in line for line in failed.value.details)


# --- vuln-check ----------------------------------------------------------------------------------------------------


class Advisories(BaseHTTPRequestHandler):
    """What OSV answers, in its own format: a hole in each package called `holey`."""

    asked: list[str]

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name, version = question["package"]["name"], question["version"]
        self.asked.append(f"{name} {version}")
        vulnerability = {
            "id": "GHSA-xxxx-yyyy-zzzz",
            "aliases": ["CVE-2026-0001"],
            "summary": "Reads what it should not",
            "details": "Reads what it\nshould not.",
            "affected": [
                {
                    "package": {"ecosystem": "PyPI", "name": name},
                    "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.0"}]}],
                }
            ],
        }
        body = json.dumps({"vulns": [vulnerability]} if name.startswith("holey") else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def advisories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A service that pip-audit asks instead of the world's; yields what it was asked."""
    handler = type("Handler", (Advisories,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    monkeypatch.setenv("PIP_AUDIT_VULNERABILITY_SERVICE", "osv")
    monkeypatch.setenv("PIP_AUDIT_OSV_URL", f"http://127.0.0.1:{server.server_port}/v1/query")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    try:
        yield handler.asked  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def locks(tmp_path: Path) -> Path:
    folder = tmp_path / "locked"
    (folder / "requirements").mkdir(parents=True)
    lock(folder, "test", "sound", "tested")
    lock(folder, "runtime", "sound")
    lock(folder, "embedded", "sound")
    return folder


def lock(folder: Path, name: str, *packages: str) -> None:
    lines = [f"{package}==1.0 \\\n    --hash=sha256:{'0' * 64}\n" for package in packages]
    (folder / "requirements" / f"{name}.lock").write_text("".join(lines))


def test_no_hole_is_good_news(home: Path, locks: Path, advisories: list[str]) -> None:
    outcome = audit(job(home), locks)
    assert outcome == Outcome(True, "No known hole in the dependencies.")
    assert sorted(advisories) == ["sound 1.0", "tested 1.0"], "each package once"


def test_a_hole_in_what_serves_is_critical(home: Path, locks: Path, advisories: list[str]) -> None:
    lock(locks, "test", "sound", "holey", "holey-tool")
    lock(locks, "runtime", "sound", "Holey")
    outcome = audit(job(home), locks)
    assert (outcome.ok, outcome.severity) == (False, "critical")
    assert outcome.summary == "1 known hole in what serves, 1 in what only tests use."
    assert outcome.details[0].startswith("holey 1.0: CVE-2026-0001, mended in 2.0. Reads what it should not")
    assert outcome.details[1].startswith("holey-tool 1.0 (tests only)")


def test_an_accepted_hole_is_mentioned_only(home: Path, locks: Path, advisories: list[str]) -> None:
    lock(locks, "test", "holey")
    accepted = locks / "requirements" / "accepted-vulnerabilities.txt"
    accepted.write_text("# known\nCVE-2026-0001  that function is never called\n")
    outcome = audit(job(home), locks)
    assert outcome.ok
    assert outcome.summary == "No known hole in the dependencies; 1 accepted."
    assert "that function is never called" in outcome.details[0]
    accepted.write_text("CVE-2026-0001\n")
    with pytest.raises(JobFailed, match="without a reason"):
        audit(job(home), locks)


def test_without_a_network_nobody_knows(
    home: Path, locks: Path, advisories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_AUDIT_OSV_URL", f"http://127.0.0.1:{free_port()}/")
    with pytest.raises(JobFailed, match="Nobody knows about holes") as failed:
        audit(job(home), locks)
    assert failed.value.details


def test_what_npm_says_counts_too(
    home: Path, locks: Path, advisories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = locks / "deploy" / "web"
    page.mkdir(parents=True)
    (page / "package-lock.json").write_text("{}")
    monkeypatch.setenv("PATH", f"{program(locks, 'npm', ANSWER)}{os.pathsep}{os.environ['PATH']}")
    outcome = audit(job(home), locks)
    assert not outcome.ok
    assert outcome.details[0].startswith("left-pad <1.3.0: npm:left-pad")


ANSWER: Final = """test "$*" = "audit --json --package-lock-only" || exit 2
echo '{"vulnerabilities": {"left-pad": {"severity": "high", "range": "<1.3.0"}}}'; exit 1"""


def program(folder: Path, name: str, script: str) -> Path:
    """A folder with one program of that name, for the front of a PATH."""
    place = folder / "bin"
    place.mkdir(exist_ok=True)
    (place / name).write_text(f"#!/bin/sh\n{script}\n")
    (place / name).chmod(0o755)
    return place


# --- runner-check --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "ok", "word"),
    [
        ("active", True, "The CI runner works."),
        ("failed", False, "The CI runner does not work: actions.runner.owner-mt5.host."),
    ],
)
def test_a_runner_that_is_down(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, ok: bool, word: str
) -> None:
    """With the answers of systemctl: no systemd runs in a test that could be asked."""
    script = f"""case "$1" in
      list-unit-files) echo "actions.runner.owner-mt5.host.service enabled enabled" ;;
      is-active) echo {state}; test {state} = active ;;
    esac"""
    monkeypatch.setenv("PATH", f"{program(tmp_path, 'systemctl', script)}{os.pathsep}{os.environ['PATH']}")
    outcome = runner(job(home))
    assert outcome.ok == ok, outcome
    assert outcome.summary.startswith(word)
    assert "actions.runner.owner-mt5.host.service" in outcome.details[0]


def test_no_runner_is_nothing_to_tell(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{program(tmp_path, 'systemctl', 'exit 1')}{os.pathsep}{os.environ['PATH']}")
    outcome = runner(job(home))
    assert (outcome.ok, outcome.nothing) == (True, True)


# --- the command line, whole ---------------------------------------------------------------------------------------


def test_update_from_the_command_line(tmp_path: Path) -> None:
    """As its timer runs it: an environment of the checkout's own, a service that is restarted, a mail."""
    project = Project(tmp_path / "p").create()
    # The very environment of this run, under a prefix that is the checkout's: a virtual environment is its pyvenv.cfg.
    (project.venv / "pyvenv.cfg").write_text(f"home = {Path(os.path.realpath(sys.executable)).parent}\n")
    libraries = next(path for path in sys.path if path.endswith("site-packages"))
    three = project.push("three")
    with mail_server() as box:
        env = {name: value for name, value in os.environ.items() if not name.startswith("MT5_")}
        env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), libraries]), "MT5_HOME": str(tmp_path / "home")}
        env |= {"MT5_NOTIFY_SMTP_HOST": "127.0.0.1", "MT5_NOTIFY_SMTP_PORT": str(box.port)}
        env |= {"MT5_NOTIFY_SMTP_SECURITY": "none", "MT5_NOTIFY_SMTP_RECIPIENTS": "owner@example.org"}
        words = ["job", "update", "--json", "--checkout", str(project.checkout), "--deadline", "20"]
        words += ["--restart", shlex.join(project.restart)]
        command = [str(project.venv / "bin" / "python"), str(ROOT / "runner.py"), *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    result = msgspec.json.decode(done.stdout, type=JobResult)
    assert (result.ok, result.details[0]) == (True, f"{three[:7]} Make it three")
    assert (project.revision, project.library, project.restarts) == (three, "lib==three", ["one", "three"])
    assert subjects(box) == [f"[MT5] update: {result.summary}"]
