"""``job update``: the newest revision, installed, restarted and looked at; or everything as it was.

The order is such that whatever can fail does so while the old code still runs: fetch, look at what is wrong anyhow, back up
where the database will change, install, migrate. Only then is anything restarted. A system that does not come up healthy within
the deadline is put back: the checkout, the environment or images as they were kept, and restarted again. How far it is
is written down before each step that changes something, so that an update that was cut off is put back by the next run.

This process runs the old code to its end. What it needs is imported before the checkout moves.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import Meta, Struct

import commands.jobs_tell  # noqa: F401 - with all that tells, before the code on disk is another
from commands.jobs import ROOT, Job, Outcome
from commands.jobs_git import Checkout, Position, short
from commands.jobs_installed import Environment, Images, Look, Part, Program, Service, composed, find_service
from commands.jobs_programs import JobFailed
from deploy.process import write_private

MIGRATIONS: Final = "schema/sql/migrations"
BACKUP_SECONDS: Final = 3_600.0
BACKUP_AGE: Final = "20h"  # a younger backup is good enough before a migration
STEADY_SECONDS: Final = 20.0  # of health after a restart: what crashes again and again looks well in between
PAUSE_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds: until it must be healthy, for how long it must be, and between two looks."""

    deadline: float
    steady: float
    pause: float = PAUSE_SECONDS


class Underway(Struct, frozen=True):
    """An update that has begun to change things."""

    before: Position
    target: str
    restarted: bool = False


class Refused(Struct, frozen=True):
    """A revision that was put back: it is not tried again by itself, night after night."""

    revision: str
    at: Annotated[datetime, Meta(tz=True)]
    reason: str


class Memory:
    """What must outlive the process, in files under ``$MT5_HOME/jobs``."""

    def __init__(self, folder: Path) -> None:
        self._underway = folder / "update-underway.json"
        self._refused = folder / "update-refused.json"

    def underway(self) -> Underway | None:
        return _read(self._underway, Underway)

    def begin(self, underway: Underway) -> None:
        write_private(self._underway, msgspec.json.encode(underway).decode())

    def end(self) -> None:
        self._underway.unlink(missing_ok=True)

    def refused(self) -> Refused | None:
        return _read(self._refused, Refused)

    def refuse(self, revision: str, reason: str) -> None:
        write_private(self._refused, msgspec.json.encode(Refused(revision, datetime.now(UTC), reason)).decode())

    def forgive(self) -> None:
        self._refused.unlink(missing_ok=True)


K = TypeVar("K", bound=Struct)


def _read(path: Path, kind: type[K]) -> K | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None


def update(job: Job, args: argparse.Namespace) -> Outcome:
    """The outcome of one update; raises JobFailed where nothing was changed."""
    path = ROOT if args.checkout is None else Path(args.checkout).absolute()
    checkout = Checkout(path)
    venv = environment(path)
    program = Program(venv / "bin" / "python", path)
    parts: list[Part] = [Environment(path, venv, job.log)]
    if composed(path):
        parts.append(Images(path, job.log))
    service = find_service(job.loaded, path, program, args.restart, job.log)
    patience = Patience(args.deadline, steady=min(STEADY_SECONDS, args.deadline / 4))
    updater = Updater(checkout, parts, service, program, Memory(job.folder), patience)
    return updater.run(args.to)


def environment(checkout: Path) -> Path:
    """The virtual environment that this runs in, which must be the checkout's own.

    Raises JobFailed: another one is not ours to change.
    """
    venv = Path(sys.prefix)
    if sys.prefix == sys.base_prefix or venv.parent != checkout or not (venv / ".made").exists():
        raise JobFailed(
            f"An update needs the environment that `make install` makes in {checkout}, and this runs in {venv}: "
            f"run {checkout / '.venv' / 'bin' / 'mt5'}."
        )
    return venv


class Updater:
    def __init__(
        self,
        checkout: Checkout,
        parts: Sequence[Part],
        service: Service,
        program: Program,
        memory: Memory,
        patience: Patience,
    ) -> None:
        self._checkout = checkout
        self._parts = parts
        self._service = service
        self._program = program
        self._memory = memory
        self._patience = patience
        self._notes: list[str] = []

    def run(self, wanted: str | None) -> Outcome:
        """Raises JobFailed where nothing was changed."""
        self._recover()
        self._checkout.refuse_changes()
        here = self._checkout.position()
        self._checkout.fetch()
        target = self._checkout.target(wanted)
        if target == here.revision and not any(part.own_news for part in self._parts):
            return Outcome(
                True, f"{short(target)} is the newest, and runs.", tuple(self._notes), nothing=not self._notes
            )
        refused = self._memory.refused()
        if wanted is None and refused is not None and refused.revision == target != here.revision:
            raise JobFailed(
                f"{short(target)} stays out: it was put back on {refused.at:%Y-%m-%d} ({refused.reason}). A newer revision is "
                f"taken by itself; `mt5 job update --to {short(target)}` tries this one again.",
                self._notes,
            )
        self._back_up(here.revision, target)
        return self._change(here, target, asked=wanted is not None)

    def _back_up(self, old: str, new: str) -> None:
        """The way back behind a migration, made by the code that still runs."""
        if not self._checkout.changed(old, new, MIGRATIONS):
            return
        words = ("backup", "run", "--local", "--unless-newer", BACKUP_AGE)
        self._program.run(*words, seconds=BACKUP_SECONDS).need("The backup before a migration")
        self._notes.append("The database's schema changes: a backup from before lies under MT5_HOME.")

    def _change(self, here: Position, target: str, *, asked: bool) -> Outcome:
        before = self._service.look()
        underway = Underway(here, target)
        for part in self._parts:
            part.keep()
        self._memory.begin(underway)
        try:
            self._checkout.go(here, target, asked=asked)
            for part in self._parts:
                part.install()
            if target == here.revision and not any(part.changed() for part in self._parts):
                self._settle()
                return Outcome(
                    True, f"{short(target)} is the newest, and runs.", tuple(self._notes), nothing=not self._notes
                )
            self._service.migrate()
            underway = Underway(here, target, restarted=True)
            self._memory.begin(underway)
            self._service.restart()
            self._await_health(before)
        except JobFailed as error:
            return self._put_back(underway, error, before)
        except BaseException as error:  # a defect, or a Ctrl-C: the system must not be left in between
            self._put_back(underway, JobFailed(f"the update broke off ({type(error).__name__})"), before)
            raise
        self._settle()
        self._memory.forgive()
        if target == here.revision:
            return Outcome(True, f"{short(target)} is the newest, and runs from newer images.", tuple(self._notes))
        commits = self._checkout.subjects(here.revision, target)
        summary = f"{short(target)} runs in the place of {short(here.revision)}."
        return Outcome(True, summary, (*self._notes, *commits, f"Restarted: {self._service.words}."))

    def _settle(self) -> None:
        self._memory.end()
        for part in self._parts:
            part.forget()

    def _await_health(self, before: Look) -> None:
        """Returns once nothing is critical that was not before, and has not been for a while.

        Raises JobFailed: at the deadline something still is, or is again.
        """
        deadline = time.monotonic() + self._patience.deadline
        well_since: float | None = None
        while True:
            worse = self._service.look().worse_than(before)
            now = time.monotonic()
            if worse and now >= deadline:
                raise JobFailed(f"after {self._patience.deadline:g} s it is not well: {worse}")
            if worse:
                well_since = None
            elif well_since is None:
                well_since = now
            elif now - well_since >= self._patience.steady:
                return
            time.sleep(self._patience.pause)

    # --- the way back ----------------------------------------------------------------------------------------------

    def _put_back(self, underway: Underway, error: JobFailed, before: Look) -> Outcome:
        """Everything as it was, whatever interrupts; says whether that works."""
        ignored = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            reason = str(error).rstrip(".")
            first = f"{short(underway.target)} was put back, and {short(underway.before.revision)} is in place again: {reason}."
            details = (*self._notes, *error.details)
            try:
                self._restore(underway)
                if underway.restarted:
                    self._await_health(before)
            except JobFailed as worse:
                summary = f"{short(underway.target)} failed ({reason}), and so did the way back to {short(underway.before.revision)}: {worse}"
                return Outcome(False, summary, (*details, *worse.details), severity="critical")
            self._memory.refuse(underway.target, reason)
            return Outcome(False, first, details)
        finally:
            for number, handler in ignored.items():
                signal.signal(number, handler)

    def _restore(self, underway: Underway) -> None:
        self._checkout.back(underway.before)
        for part in self._parts:
            part.put_back()
        if underway.restarted:
            self._service.restart()
        self._memory.end()

    def _recover(self) -> None:
        """Puts back what an update that was cut off (by a power cut, say) has left in between."""
        underway = self._memory.underway()
        if underway is None:
            return
        self._restore(underway)
        self._notes.append(
            f"An update to {short(underway.target)} had been cut off: {short(underway.before.revision)} was put back first."
        )
