"""``job tests``: the suite of the revision that runs, in a copy of its own, far from what it serves.

The copy is git's, so that nothing that lies about in the checkout counts; its environment is one of its own, so that the
tests' libraries never come into the one that serves; and no `MT5_` variable reaches it, so that no test can find a server
that matters. The environment is kept for the next night, and `job vuln-check` finds its pip-audit there.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Final, NamedTuple

from commands.jobs import Job, Outcome, remove
from commands.jobs_git import Checkout, short
from commands.jobs_programs import JobFailed, last_lines, run

SECONDS: Final = 3_600.0
NAMED: Final = 20  # failed tests that a mail names
DEFAULT_ARGS: Final = "-q -n 2 --dist loadfile -p no:cacheprovider"


class Counts(NamedTuple):
    """What a run of pytest has counted, and which tests failed."""

    tests: int
    failures: int
    errors: int
    skipped: int
    failed: tuple[str, ...]

    def words(self) -> str:
        passed = self.tests - self.failures - self.errors - self.skipped
        parts = [f"{passed} passed"]
        for count, name in ((self.failures, "failed"), (self.errors, "broken"), (self.skipped, "skipped")):
            parts += [f"{count} {name}"] if count else []
        return ", ".join(parts)


def tools(job: Job) -> Path:
    """The environment that the tests' libraries are installed into."""
    return job.folder / "tests" / "venv"


def tests(job: Job, checkout: Path) -> Outcome:
    """Raises JobFailed where the suite could not be run."""
    folder = job.folder / "tests"
    folder.mkdir(mode=0o700, exist_ok=True)
    copy, report = folder / "checkout", folder / "report.xml"
    report.unlink(missing_ok=True)
    revision = _copy(checkout, copy)
    arguments = f"{os.environ.get('PYTEST_ARGS', DEFAULT_ARGS)} --junitxml={report}"
    words = ("make", "test", f"VENV={tools(job)}", f"PYTEST_ARGS={arguments}")
    try:
        ran = run(words, cwd=copy, seconds=SECONDS, env=_clean(), output=job.log)
        counts = _counts(report)
    finally:
        remove(copy)
    if counts is None or (counts.failures + counts.errors == 0 and ran.code != 0):
        lines = last_lines(job.log.read_text(errors="replace"))
        raise JobFailed(f"The tests of {short(revision)} could not be run: `make test` ended with {ran.code}.", lines)
    details = tuple(counts.failed[:NAMED])
    if len(counts.failed) > NAMED:
        details += (f"… and {len(counts.failed) - NAMED} more, see {job.log}.",)
    return Outcome(ran.code == 0, f"{counts.words()} at {short(revision)}.", details)


def _copy(checkout: Path, copy: Path) -> str:
    """The files of the revision that is checked out; returns the revision."""
    git = Checkout(checkout)
    revision = git.position().revision
    remove(copy)
    copy.mkdir(mode=0o700)
    git.copy(revision, copy)
    return revision


def _clean() -> dict[str, str]:
    """The environment without what would lead to servers that matter, or into a working tree of git."""
    foreign = ("MT5_", "GIT_", "VIRTUAL_ENV", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


def _counts(report: Path) -> Counts | None:
    """pytest's own report; None where there is none, since it did not get so far."""
    try:
        root = xml.parse(report).getroot()  # noqa: S314 - pytest has just written it
    except (FileNotFoundError, xml.ParseError):
        return None
    suite = root.find("testsuite") if root.tag == "testsuites" else root
    if suite is None:
        return None
    failed = tuple(
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    )
    tests, failures, errors, skipped = (
        int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")
    )
    return Counts(tests, failures, errors, skipped, failed)
