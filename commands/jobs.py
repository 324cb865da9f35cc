"""``job …``: what the timers run. Each does one thing, keeps what came of it, and mails it.

The result lies in ``$MT5_HOME/jobs/NAME.json`` for the daily report, what programs wrote in ``$MT5_HOME/logs/job-NAME.log``.
Exit codes: 0 the job's answer is good, 1 it is not, 2 it could not be run as asked.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec

from commands.jobs_programs import JobFailed
from commands.output import DONE, NO, WRONG, CommandError, complain, keep_traceback, say, write_json
from commands.settings import Loaded, read
from deploy.home import Home
from deploy.process import DeployError, write_private
from schema.health import Notice, Severity
from schema.jobs import FOLDER, JobResult

ROOT: Final = Path(__file__).resolve().parents[1]
DETAILS: Final = 60  # lines of a mail


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a job. ``nothing``: there was nothing to do or to look at, which nobody wants a mail about."""

    ok: bool
    summary: str
    details: tuple[str, ...] = ()
    nothing: bool = False
    severity: Severity = "warning"  # where it is not ok


@dataclass(frozen=True, slots=True)
class Job:
    """One run: its name, the settings, and where it may keep things."""

    name: str
    loaded: Loaded
    folder: Path  # $MT5_HOME/jobs
    log: Path  # emptied at each run


class Stopped(JobFailed):
    """A signal ended the job."""


# --- the jobs ------------------------------------------------------------------------------------------------------


def update(args: argparse.Namespace) -> int:
    """``job update [--to REVISION] [--restart COMMAND] [--deadline SECONDS]``."""
    from commands.jobs_update import update

    return run_job("update", args, lambda job: update(job, args))


def tests(args: argparse.Namespace) -> int:
    """``job tests``."""
    from commands.jobs_tests import tests

    return run_job("tests", args, lambda job: tests(job, ROOT))


def vuln_check(args: argparse.Namespace) -> int:
    """``job vuln-check``."""
    from commands.jobs_audit import audit

    return run_job("vuln-check", args, lambda job: audit(job, ROOT))


def remote_backup(args: argparse.Namespace) -> int:
    """``job remote-backup``."""
    from commands.jobs_operate import backup

    return run_job("remote-backup", args, backup)


def daily_report(args: argparse.Namespace) -> int:
    """``job daily-report``; the report is its mail, so that a second one tells of a failure only."""
    from commands.jobs_operate import report

    return run_job("daily-report", args, report)


def runner_check(args: argparse.Namespace) -> int:
    """``job runner-check``."""
    from commands.jobs_operate import runner

    return run_job("runner-check", args, runner)


# --- around each of them -------------------------------------------------------------------------------------------


def run_job(name: str, args: argparse.Namespace, work: Callable[[Job], Outcome]) -> int:
    """Runs the work alone, keeps its result, tells of it, and returns the exit code.

    Raises:
        CommandError: it cannot be run here, or runs already.
    """
    loaded = read()
    from bus import logs

    logs.configure(loaded.settings.log)
    job = _prepare(name, loaded)
    with _alone(job), _stoppable():
        before = last_result(job.folder, name)
        began, clock = datetime.now(UTC), time.monotonic()
        outcome = _outcome(job, work)
        result = JobResult(
            name=name,
            at=began,
            ok=outcome.ok,
            seconds=round(time.monotonic() - clock, 3),
            summary=outcome.summary,
            details=outcome.details[:DETAILS],
        )
        _keep(job, result)
        if args.json:
            write_json(result)
        else:
            for line in result.details:
                say(line)
            say(result.summary)
        if _is_told(args.mail, outcome, before):
            _tell(loaded, result, outcome)
    return DONE if outcome.ok else NO


def _prepare(name: str, loaded: Loaded) -> Job:
    home = Home(loaded.home)
    try:
        if os.geteuid() != home.path.stat().st_uid:
            raise CommandError(f"{home.path} belongs to another user: run this as the user who runs `mt5 up`.", WRONG)
    except FileNotFoundError:
        pass  # it is made by us
    try:
        home.create()
        folder = home.path / FOLDER
        folder.mkdir(mode=0o700, exist_ok=True)
        log = home.log(f"job-{name}")
    except DeployError as error:
        raise CommandError(str(error), WRONG) from error
    return Job(name, loaded, folder, log)


@contextlib.contextmanager
def _alone(job: Job) -> Iterator[None]:
    """One at a time: a timer and a person, or the deployment of CI, may well ask for the same at once."""
    descriptor = os.open(job.folder / f"{job.name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CommandError(f"The job {job.name} runs already: wait for its end, and see {job.log}.") from None
        # Emptied under the lock: it is the other run's log until then.
        os.close(os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """A SIGTERM, as of a systemd that has waited long enough, ends what runs and is told like any other failure."""

    def stop(number: int, frame: Any) -> NoReturn:
        raise Stopped(f"it was stopped by {signal.Signals(number).name}.")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _outcome(job: Job, work: Callable[[Job], Outcome]) -> Outcome:
    try:
        return work(job)
    except JobFailed as error:
        return Outcome(False, _sentence(error), error.details)
    except (CommandError, DeployError) as error:
        return Outcome(False, _sentence(error))
    except Exception as error:
        # A defect of ours; the person who sleeps is told of it as of anything else that went wrong.
        where = keep_traceback(error)
        words = " ".join(str(error).split()) or "no message"
        return Outcome(False, f"Unexpected {type(error).__name__}: {words} (details are in {where}).")


def _sentence(error: Exception) -> str:
    text = str(error)
    return text[:1].upper() + text[1:]


def _is_told(mail: str, outcome: Outcome, before: JobResult | None) -> bool:
    """``failure``: what went wrong, and once that it goes right again."""
    if mail == "always":
        return not (outcome.ok and outcome.nothing)
    recovered = before is not None and not before.ok
    return mail == "failure" and (not outcome.ok or recovered)


def _keep(job: Job, result: JobResult) -> None:
    path = job.folder / f"{result.name}.json"
    try:
        write_private(path, msgspec.json.encode(result).decode() + "\n")
    except OSError as error:  # a full disk must not keep the mail back that tells of it
        complain(f"the result is not kept, {path} cannot be written: {error.strerror}.")


def _tell(loaded: Loaded, result: JobResult, outcome: Outcome) -> None:
    from bus.supervise import ConfigurationError
    from commands.jobs_tell import tell

    notice = Notice(
        id=f"job:{result.name}:{result.at.isoformat()}",
        kind="report",
        severity="info" if result.ok else outcome.severity,
        title=f"{result.name}{'' if result.ok else ' failed'}: {result.summary}",
        lines=(result.summary, *(("", *result.details) if result.details else ()), "", _about(result)),
        at=result.at,
    )
    try:
        complain(tell(loaded, notice))
    except ConfigurationError as error:
        raise CommandError(f"Nobody could be told of it: {error}", NO) from error


def _about(result: JobResult) -> str:
    return f"`mt5 job {result.name}` on {os.uname().nodename}, begun {result.at:%Y-%m-%d %H:%M} UTC, took {result.seconds:.0f} s."


def last_result(folder: Path, name: str) -> JobResult | None:
    """What the run before left; None where there was none, or it cannot be read any more."""
    try:
        return msgspec.json.decode((folder / f"{name}.json").read_bytes(), type=JobResult)
    except (OSError, msgspec.DecodeError):
        return None


def remove(path: Path) -> None:
    """Takes away a folder of the job's own; one that is not there is fine."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)
