"""A small project in git, with a remote, that an update can be tried on: its Makefile, its command line, and what "runs"."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

# What the command line of the project does, told by files of the revision: a real program, in few lines.
RUNNER: Final = """
import json, pathlib, sys
here = pathlib.Path(__file__).parent
words = sys.argv[1:]
with open(here.parent / "said", "a") as file:
    print((here / "version").read_text().strip(), *words, file=file)
if words[:2] == ["health", "check"]:
    running = here.parent / "running"
    if not running.exists():
        sys.exit("nothing runs")
    looks = here.parent / "looks"
    count = len(looks.read_text()) if looks.exists() else 0
    looks.write_text("x" * (count + 1))
    states = json.loads(running.read_text())
    state = states[min(count, len(states) - 1)]
    print(json.dumps({"results": [{"check": check, "status": status} for check, status in state.items()]}))
    sys.exit(int("critical" in state.values()))
failing = here / ("fails-" + words[0])
if failing.exists():
    sys.exit(failing.read_text().strip())
"""

MAKEFILE: Final = """
install: $(VENV)/.installed
$(VENV)/.installed: requirements/test.lock
\t@cat hang 2>/dev/null || true
\t@test ! -e broken || { echo "no such version" >&2; exit 3; }
\t@rm -f $(VENV)/library
\t@cp requirements/test.lock $(VENV)/library
\t@touch $@
"""

# What runs is what a revision's file `states` says of its health, look by look; it is started by copying it.
RESTART: Final = """
import pathlib, sys
here, there = map(pathlib.Path, sys.argv[1:])
(there / "looks").unlink(missing_ok=True)
(there / "running").write_text((here / "states").read_text())
with open(there / "restarts", "a") as file:
    print((here / "version").read_text().strip(), file=file)
"""

WELL: Final = [{"nats": "ok", "database": "ok"}]


def git(folder: Path, *words: str) -> str:
    """Answers of git with a name of its own, whoever runs the tests."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    options = ("-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "init.defaultBranch=main")
    done = subprocess.run(["git", *options, *words], cwd=folder, env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@dataclass
class Project:
    """A remote, the work tree of somebody who pushes to it, and the checkout that is to be updated."""

    folder: Path

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def checkout(self) -> Path:
        return self.folder / "place" / "checkout"

    @property
    def venv(self) -> Path:
        return self.checkout / ".venv"

    def create(self) -> Project:
        """The remote with a first revision, and a checkout of it that is installed and "runs"."""
        self.folder.mkdir(parents=True, exist_ok=True)
        git(self.folder, "init", "--quiet", "--bare", "remote")
        git(self.folder, "clone", "--quiet", "remote", "work")
        git(self.work, "symbolic-ref", "HEAD", "refs/heads/main")
        (self.work / ".gitignore").write_text(".venv*/\n")
        (self.work / "Makefile").write_text(MAKEFILE)
        (self.work / "runner.py").write_text(RUNNER)
        self.push("one")
        self.checkout.parent.mkdir()
        git(self.folder, "clone", "--quiet", "remote", str(self.checkout))
        (self.venv / "bin").mkdir(parents=True)
        (self.venv / "bin" / "python").symlink_to(sys.executable)
        (self.venv / ".made").touch()
        subprocess.run(["make", "-s", "install", "VENV=.venv"], cwd=self.checkout, check=True)
        subprocess.run(self.restart, check=True)
        return self

    @property
    def restart(self) -> list[str]:
        return [sys.executable, "-c", RESTART, str(self.checkout), str(self.checkout.parent)]

    def push(self, version: str, states: Any = None, **files: str) -> str:
        """A revision more at the remote; ``states`` is its health, look by look. Returns the revision."""
        written = {
            "version": version,
            "states": json.dumps(states or WELL),
            "requirements/test.lock": f"lib=={version}\n",
        }
        for name, text in (written | files).items():
            path = self.work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        git(self.work, "add", "--all")
        git(self.work, "commit", "--quiet", "--message", f"Make it {version}")
        git(self.work, "push", "--quiet", "origin", "HEAD:main")
        return git(self.work, "rev-parse", "HEAD")

    # --- what is there now -----------------------------------------------------------------------------------------

    @property
    def revision(self) -> str:
        return git(self.checkout, "rev-parse", "HEAD")

    @property
    def branch(self) -> str:
        return git(self.checkout, "branch", "--show-current")

    @property
    def library(self) -> str:
        return (self.venv / "library").read_text().strip()

    @property
    def restarts(self) -> list[str]:
        """The versions that were started, oldest first."""
        return (self.checkout.parent / "restarts").read_text().split()

    @property
    def said(self) -> list[str]:
        """What the command line was asked, with the version that was asked."""
        file = self.checkout.parent / "said"
        return file.read_text().splitlines() if file.exists() else []

    def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.checkout.glob(".venv?*"))
