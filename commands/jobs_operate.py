"""The jobs that only ask other commands, and tell: ``remote-backup``, ``daily-report`` and ``runner-check``.

The commands run as processes of their own: their exit code is the answer, their words are the mail's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from commands.jobs import ROOT, Job, Outcome
from commands.jobs_programs import JobFailed, Ran, run
from schema.health import CheckResult

BACKUP_SECONDS: Final = 4 * 3_600.0
VERIFY_SECONDS: Final = 4 * 3_600.0
REPORT_SECONDS: Final = 600.0
LOOK_SECONDS: Final = 60.0


def backup(job: Job) -> Outcome:
    """Makes a backup, ships it, and proves it: one that was never restored is a hope."""
    made = _mt5("backup", "run", "--json", seconds=BACKUP_SECONDS)
    verdict = _decode(made, _Made)
    if made.code != 0 or verdict is None:
        words = made.tail() if verdict is None else (verdict.message, *made.tail())
        return Outcome(False, "No backup was made and shipped.", words, severity="critical")
    verified = _mt5("backup", "verify", verdict.backup, "--json", seconds=VERIFY_SECONDS)
    proof = _decode(verified, _Proof)
    if verified.code != 0 or proof is None:
        defects = () if proof is None else tuple(f"{defect.path} {defect.problem}" for defect in proof.problems)
        words = (verdict.message, *(defects or verified.tail()))
        return Outcome(False, f"The backup {verdict.backup} was made, and is not whole.", words, severity="critical")
    details = [
        verdict.message,
        f"Restored for proof: {proof.rows:,} rows of {proof.tables} tables, {proof.streams} streams.",
    ]
    details += [f"left out: {file}" for file in verdict.left_out]
    if not job.loaded.settings.backup.target:
        details.append("It lies on this machine only: [backup] target names a place to ship it to.")
    return Outcome(True, f"The backup {verdict.backup} was made and verified.", tuple(details))


def report(job: Job) -> Outcome:
    """Lets the daily report be mailed; its mail is the outcome."""
    ran = _mt5("health", "report", "--mail", seconds=REPORT_SECONDS)
    if ran.code != 0:
        return Outcome(False, "The daily report was not mailed.", ran.tail())
    return Outcome(True, "The daily report was mailed.", nothing=True)


def runner(job: Job) -> Outcome:
    """What the health monitor's own check of GitHub's runner says, now."""
    ran = _mt5("health", "check", "runner", "--json", seconds=LOOK_SECONDS)
    seen = _decode(ran, _Checks)
    if seen is None:
        raise JobFailed("Nobody knows how the CI runner is: `health check runner` gave no answer.", ran.tail())
    lines = tuple(result.message for result in seen.results)
    wrong = [result for result in seen.results if result.status in ("warning", "critical")]
    if wrong:
        names = ", ".join(result.check.removeprefix("runner.") for result in wrong)
        return Outcome(False, f"The CI runner does not work: {names}.", lines)
    if all(result.status == "skipped" for result in seen.results):
        return Outcome(True, "There is no CI runner here.", lines, nothing=True)
    return Outcome(True, "The CI runner works.", lines)


def _mt5(*words: str, seconds: float) -> Ran:
    return run((sys.executable, str(ROOT / "runner.py"), *words), cwd=Path.cwd(), seconds=seconds)


class _Made(msgspec.Struct):
    """What matters here of `backup run --json`."""

    message: str
    backup: str
    left_out: list[str] = []


class _Checks(msgspec.Struct):
    results: list[CheckResult]


class _Defect(msgspec.Struct):
    path: str
    problem: str


class _Proof(msgspec.Struct):
    """What matters here of `backup verify --json`."""

    rows: int
    tables: int
    streams: int
    problems: list[_Defect] = []


A = TypeVar("A", bound=msgspec.Struct)


def _decode(ran: Ran, kind: type[A]) -> A | None:
    """The object that a command answers with; None where it is none."""
    try:
        return msgspec.json.decode(ran.out, type=kind)
    except msgspec.DecodeError:
        return None
