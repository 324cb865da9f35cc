"""The jobs that only ask other commands, and tell: ``remote-backup``, ``daily-report`` and ``runner-check``.

The commands run as processes of their own: their exit code is the answer, their words are the mail's.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from commands.jobs import ROOT, Job, Outcome
from commands.jobs_programs import JobFailed, Ran, run

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
    """Whether every unit of GitHub's runner is active."""
    pattern = job.loaded.settings.health.runner_units
    if shutil.which("systemctl") is None:
        return Outcome(True, "There is no systemd here, and so no runner to look at.", nothing=True)
    words = ("systemctl", "list-units", "--all", "--plain", "--no-legend", "--type=service", pattern)
    ran = run(words, cwd=Path("/"), seconds=LOOK_SECONDS)
    if ran.code != 0:
        raise JobFailed("systemd does not say how the CI runner is.", ran.tail())
    # "actions.runner.owner-repository.host.service loaded active running GitHub Actions Runner (…)"
    units = {fields[0]: fields[2] for line in ran.out.splitlines() if len(fields := line.split(maxsplit=4)) >= 4}
    if not units:
        return Outcome(True, f"No unit {pattern} is installed here.", nothing=True)
    down = {unit: state for unit, state in units.items() if state != "active"}
    if down:
        lines = [
            f"{unit} is {state}: `systemctl restart {unit}`, and see `journalctl -u {unit}`."
            for unit, state in down.items()
        ]
        return Outcome(False, f"The CI runner does not work: {', '.join(down)}.", tuple(lines))
    return Outcome(True, f"The CI runner works: {', '.join(units)}.")


def _mt5(*words: str, seconds: float) -> Ran:
    return run((sys.executable, str(ROOT / "runner.py"), *words), cwd=Path.cwd(), seconds=seconds)


class _Made(msgspec.Struct):
    """What matters here of `backup run --json`."""

    message: str
    backup: str
    left_out: list[str] = []


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
