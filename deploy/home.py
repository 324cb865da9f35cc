"""The folder that holds all state: who owns it now, and where others find what runs in it."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import TypedDict

from deploy.process import DeployError, Identity, InUse, end_leftover, identify, myself, write_private


class HomeBusy(DeployError):
    """Another process owns the home: `pid`, None where it has not said so yet."""

    def __init__(self, path: Path, pid: int | None) -> None:
        self.path = path
        self.pid = pid
        holder = "another process" if pid is None else f"process {pid}"
        super().__init__(f"{path} is in use by {holder}: stop it, or set MT5_HOME to another folder.")


class Ready(TypedDict):
    """What ``ready.json`` says; the URLs work as they are."""

    pid: int
    gateway: str
    nats: str
    database: str


class Home:
    """``$MT5_HOME``. As a context manager it is locked: whoever runs servers in it is the only one who does.

    A home that does not exist is made with mode 0700. The mode of one that exists is the user's own choice (it may be
    a shared folder, named by mistake); what is written into it is private by itself.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.logs = self.path / "logs"
        self.run = self.path / "run"
        self.ready_file = self.path / "ready.json"
        self._lock: int | None = None
        self._announced = False

    def create(self) -> None:
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (self.logs, self.run):
                folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            reason = error.strerror or str(error)
            raise DeployError(f"{self.path} cannot be used: {reason}; set MT5_HOME to a folder of your own.") from error

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def record(self, name: str) -> Path:
        """Where the identity of a child is kept; unlocked homes may have several owners, so ours is in its name."""
        return self.run / f"{name}.{os.getpid()}.json"

    # --- one owner -----------------------------------------------------------------------------------------------

    def lock(self) -> None:
        """Takes the home for this process until :meth:`release` or its death; raises HomeBusy."""
        self.create()
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            holder = _holder(self.path)
            raise HomeBusy(self.path, holder.pid if holder else None) from None
        me = myself()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": me.pid, "started": me.started, "program": me.program}).encode(), 0)
        self._lock = descriptor
        self.ready_file.unlink(missing_ok=True)  # a dead run's

    def release(self) -> None:
        self.withdraw()
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Home:
        self.lock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    # --- what others need to know --------------------------------------------------------------------------------

    def announce(self, *, gateway: str, nats: str, database: str) -> None:
        """Writes ``ready.json``: everything runs, and this is where."""
        ready: Ready = {"pid": os.getpid(), "gateway": gateway, "nats": nats, "database": database}
        write_private(self.ready_file, json.dumps(ready, indent=2) + "\n")
        self._announced = True

    def withdraw(self) -> None:
        """Removes the ``ready.json`` that this process wrote."""
        if self._announced:
            self.ready_file.unlink(missing_ok=True)
            self._announced = False


def _holder(home: Path) -> Identity | None:
    try:
        return Identity(**json.loads((home / "lock").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def read_ready(home: str | Path) -> Ready | None:
    """What runs in this home; None when nothing does, or what wrote it is dead."""
    try:
        ready: Ready = json.loads((Path(home) / "ready.json").read_text())
        pid = ready["pid"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    holder = _holder(Path(home))
    if holder is not None and holder.pid == pid:
        return ready if holder.alive() else None
    return ready if identify(pid) is not None else None


def end_leftovers(home: Home) -> list[int]:
    """Ends what a dead run left in a home that this process has locked; returns the pids that were ended.

    A process is known by its number, its start time and its command, so nothing foreign is ever ended.
    """
    records = [home.path / name / "process.json" for name in ("nats", "postgres")]
    ended = []
    for record in [*sorted(home.run.glob("*.json")), *records]:
        try:
            pid = end_leftover(record)
        except InUse:  # of a living run that brought its own servers: it needs no lock
            continue
        if pid is not None:
            ended.append(pid)
    return ended
