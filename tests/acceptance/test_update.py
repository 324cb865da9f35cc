"""A night's update of a whole running system: a good revision is taken, one that does not work is put back.

The checkout is a clone of this one, and what runs is restarted by a loop in systemd's place.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from deploy.home import read_ready
from schema.jobs import JobResult
from tests.checkouts import git
from tests.mailbox import Mailbox, mail_server
from tests.servers import ROOT, wait_until

pytestmark = [pytest.mark.torture, pytest.mark.timeout(600)]

# What systemd does: starts it again whenever it ends, until it is told to stop.
LOOP: Final = 'while [ ! -e "$1/stop" ]; do "$2" "$3/runner.py" up >>"$1/output" 2>&1; done'
# `mt5 up` is asked to end by whoever runs it; this returns once the next one has the home.
RESTART: Final = """
import json, os, pathlib, signal, sys, time
lock = pathlib.Path(sys.argv[1], "lock")
pid = json.loads(lock.read_text())["pid"]
os.kill(pid, signal.SIGTERM)
for _ in range(600):
    try:
        if json.loads(lock.read_text())["pid"] != pid:
            sys.exit(0)
    except (OSError, ValueError):
        pass
    time.sleep(0.05)
sys.exit("nobody started it again")
"""


@dataclass
class Installation:
    folder: Path
    box: Mailbox

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def checkout(self) -> Path:
        return self.folder / "checkout"

    @property
    def home(self) -> Path:
        return self.folder / "var"

    @property
    def python(self) -> str:
        return str(self.checkout / ".venv" / "bin" / "python")

    def create(self) -> None:
        """The revision of the files as they lie here, pushed and cloned, in an environment of the checkout's own."""
        git(self.folder, "init", "--quiet", "--bare", "remote")
        git(self.folder, "clone", "--quiet", "remote", "work")
        git(self.work, "symbolic-ref", "HEAD", "refs/heads/main")
        files = git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
        for name in files:
            if (ROOT / name).is_file():
                (self.work / name).parent.mkdir(parents=True, exist_ok=True)
                (self.work / name).write_bytes((ROOT / name).read_bytes())
        self.push("As it is")
        git(self.folder, "clone", "--quiet", "remote", "checkout")
        venv = self.checkout / ".venv"
        (venv / "bin").mkdir(parents=True)
        (venv / "bin" / "python").symlink_to(sys.executable)
        (venv / "pyvenv.cfg").write_text(f"home = {Path(os.path.realpath(sys.executable)).parent}\n")
        for stamp in (".made", ".installed"):  # it borrows its libraries, so that there is nothing for pip to do
            (venv / stamp).touch()

    def push(self, message: str) -> str:
        git(self.work, "add", "--all")
        git(self.work, "commit", "--quiet", "--message", message)
        git(self.work, "push", "--quiet", "origin", "HEAD:main")
        return git(self.work, "rev-parse", "HEAD")

    @property
    def env(self) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("MT5_")}
        libraries = next(path for path in sys.path if path.endswith("site-packages"))
        env |= {"PYTHONPATH": libraries, "MT5_HOME": str(self.home), "MT5_GATEWAY_PORT": "0"}
        env |= {"MT5_NOTIFY_SMTP_HOST": "127.0.0.1", "MT5_NOTIFY_SMTP_PORT": str(self.box.port)}
        return env | {"MT5_NOTIFY_SMTP_SECURITY": "none", "MT5_NOTIFY_SMTP_RECIPIENTS": "owner@example.org"}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        command = ["sh", "-c", LOOP, "loop", str(self.folder), self.python, str(self.checkout)]
        loop = subprocess.Popen(command, cwd=self.folder, env=self.env)
        try:
            self.await_ready()
            yield
        finally:
            (self.folder / "stop").touch()
            with contextlib.suppress(OSError, ValueError):
                os.kill(json.loads((self.home / "lock").read_text())["pid"], signal.SIGTERM)
            try:
                loop.wait(40)
            except subprocess.TimeoutExpired:
                loop.kill()
                raise

    def await_ready(self) -> None:
        wait_until(lambda: read_ready(self.home), 90, "ready.json")

    def update(self) -> tuple[int, JobResult]:
        restart = shlex.join([sys.executable, "-c", RESTART, str(self.home)])
        words = ("job", "update", "--json", "--deadline", "60", "--restart", restart)
        command = [self.python, str(self.checkout / "runner.py"), *words]
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=400)
        assert done.stdout, done.stderr
        return done.returncode, msgspec.json.decode(done.stdout, type=JobResult)

    def health(self) -> dict[str, Any]:
        command = [self.python, str(self.checkout / "runner.py"), "health", "check", "--json"]
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=60)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    @property
    def revision(self) -> str:
        return git(self.checkout, "rev-parse", "HEAD")


def test_a_good_revision_is_taken_and_a_broken_one_is_put_back(tmp_path: Path) -> None:
    with mail_server() as box:
        installation = Installation(tmp_path, box)
        installation.create()
        with installation.running():
            (installation.work / "NEWS").write_text("harmless\n")
            good = installation.push("Say something harmless")
            code, result = installation.update()
            assert (code, installation.revision) == (0, good), result

            emitter = installation.work / "actors" / "emitter.py"
            text = emitter.read_text()
            assert text.count("    async def run(self) -> None:\n") == 1
            broken = '    async def run(self) -> None:\n        raise RuntimeError("it was never tried")\n'
            emitter.write_text(text.replace("    async def run(self) -> None:\n", broken))
            bad = installation.push("Break the emitter")
            code, result = installation.update()
            assert (code, result.ok) == (1, False), result
            assert result.summary.startswith(f"{bad[:12]} was put back, and {good[:12]} is in place again"), result
            assert installation.revision == good

            installation.await_ready()
            assert installation.health()["ok"]
        subjects = [str(received.mail["Subject"]) for received in box.received]
        told = [subject for subject in subjects if "update" in subject]
        assert len(told) == 2, subjects
        assert told[0].startswith("[MT5] update: ")
        assert told[1].startswith("[MT5] update failed: ")
