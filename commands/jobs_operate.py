"""The jobs that only ask other commands, and tell: ``remote-backup``, ``daily-report`` and ``runner-check``.

The commands run as processes of their own: their exit code is the answer, their words are the mail's.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any, Final

import msgspec

from commands.jobs import ROOT, Job, Outcome
from commands.jobs_programs import JobFailed, Ran, last_lines, run

BACKUP_SECONDS: Final = 4 * 3_600.0
VERIFY_SECONDS: Final = 4 * 3_600.0
REPORT_SECONDS: Final = 600.0
LOOK_SECONDS: Final = 60.0


def backup(job: Job) -> Outcome:
    """Makes a backup, ships it, and proves it: a backup that was never restored is a hope."""
    made = _mt5("backup", "run", "--json", seconds=BACKUP_SECONDS)
    if made.code != 0:
        return Outcome(False, "No backup was made.", made.tail(), severity="critical")
    name = _json(made).get("name", "latest")
    verified = _mt5("backup", "verify", str(name), "--json", seconds=VERIFY_SECONDS)
    if verified.code != 0:
        lines = (*last_lines(made.err), *verified.tail())
        return Outcome(False, f"The backup {name} was made, and is not whole.", lines, severity="critical")
    where = "" if job.loaded.settings.backup.target else "; [backup] target names no place to ship it to"
    return Outcome(True, f"The backup {name} was made and verified{where}.", last_lines(made.err))


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


def _json(ran: Ran) -> dict[str, Any]:
    """The object that a command answers with; empty where it is none."""
    try:
        found = msgspec.json.decode(ran.out)
    except msgspec.DecodeError:
        return {}
    return found if isinstance(found, dict) else {}
