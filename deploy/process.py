"""Child processes that do not outlive their parent, and a process's identity across reuse of its number.

On Linux the kernel ends a child when the thread that started it dies, so children are started by the main thread.
Elsewhere a killed parent leaves its children running; their records on disk let the next start end them.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

LINUX: Final = platform.system() == "Linux"
LAUNCHER: Final = str(Path(__file__).with_name("launch.py"))
TAIL_BYTES: Final = 8_192
POLL_SECONDS: Final = 0.01

Steps = Sequence[tuple[signal.Signals, float]]  # signals to end a process with, and the seconds each is given


class DeployError(Exception):
    """Something the user can mend; the message is one sentence with the way out."""


class InUse(DeployError):
    """A living process uses what this one wants to start or end."""


@dataclass(frozen=True, slots=True)
class Account:
    """A user of the system, by number."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Identity:
    """One process: a number is reused, a number with its start time is not. ``program`` is its argv[0]."""

    pid: int
    started: str
    program: str

    def alive(self) -> bool:
        seen = _look(self.pid)
        # One that is on its way out has no arguments any more, and still holds its files and ports.
        return seen is not None and seen[0] == self.started and (self.program in seen[1] or not any(seen[1]))


@functools.cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _look(pid: int) -> tuple[str, list[str]] | None:
    """Start time and arguments of a process; None when it is gone or a zombie."""
    if LINUX:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return None
        fields = stat.rpartition(")")[2].split()  # from field 3, the state; field 22 is the start in ticks since boot
        if fields[0] in "ZX":
            return None
        return f"{_boot_id()} {fields[19]}", os.fsdecode(arguments).split("\0")
    command = ["ps", "-o", "stat=,lstart=,command=", "-p", str(pid)]
    words = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    if len(words) < 7 or words[0].startswith("Z"):
        return None
    return " ".join(words[1:6]), words[6:]


def identify(pid: int) -> Identity | None:
    """The process that has this number now; None when none has (a zombie counts as none)."""
    seen = _look(pid)
    return None if seen is None else Identity(pid, seen[0], seen[1][0])


def myself() -> Identity:
    identity = identify(os.getpid())
    if identity is None:
        raise RuntimeError("this process does not see itself: is /proc mounted?")
    return identity


def write_private(path: Path, text: str) -> None:
    """Writes a file of mode 0600, whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)


def launcher(argv: Sequence[str], account: Account | None, death_signal: signal.Signals) -> list[str]:
    """The command that becomes ``argv``, as that account, and gets the signal when this process dies."""
    if LINUX and threading.current_thread() is not threading.main_thread():
        raise RuntimeError("children are started by the main thread: they die with the thread that started them")
    uid, gid = (account.uid, account.gid) if account else (-1, -1)
    words = (os.getpid(), int(death_signal), uid, gid)
    return [sys.executable, "-I", "-S", LAUNCHER, *map(str, words), *argv]


def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    account: Account | None = None,
    pass_fds: Iterable[int] = (),
    stdin: str = "",
) -> subprocess.CompletedProcess[str]:
    """Runs a short command to its end, in ``/``; stderr is mixed into stdout."""
    return subprocess.run(
        launcher(argv, account, signal.SIGKILL),
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=env,
        cwd="/",
        umask=0o077,
        pass_fds=tuple(pass_fds),
        check=False,
    )


class Child:
    """A running program in its own session, with a record on disk and its output appended to a log.

    What it started and left in its session ends when it ends. ``log`` None: it writes where we write.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        record: Path,
        log: Path | None,
        stop: Steps,
        death_signal: signal.Signals = signal.SIGKILL,
        account: Account | None = None,
        cwd: str | None = None,
        pass_fds: Iterable[int] = (),
    ) -> None:
        self.record = record
        self.log = log
        self.steps = stop
        self._log_start = log.stat().st_size if log is not None and log.exists() else 0
        output = None if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._process = subprocess.Popen(
                launcher(argv, account, death_signal),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=env,
                cwd=cwd,
                umask=0o077,
                start_new_session=True,
                pass_fds=tuple(pass_fds),
            )
        finally:
            if output is not None:
                os.close(output)
        self.pid = self._process.pid
        self._ended = False
        identity = identify(self.pid)
        if identity is not None:  # else it has ended already, as poll() will tell
            _write_record(record, Identity(self.pid, identity.started, argv[0]), stop)

    def poll(self) -> int | None:
        """The exit code (negative: the signal that ended it), or None while it runs."""
        if not self._ended and self._exited():
            self._finish()
        return self._process.returncode

    def _exited(self) -> bool:
        if hasattr(os, "waitid"):  # leaves the zombie, so that its group's number is not reused before _finish
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        return self._process.poll() is not None

    def _finish(self) -> None:
        self.send_group(signal.SIGKILL)
        self._process.wait()
        self._ended = True
        self.record.unlink(missing_ok=True)

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def send_group(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):  # PermissionError: macOS's answer for a group of zombies
            return

    def wait(self, seconds: float) -> bool:
        """True when it has ended within that time."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def end(self) -> None:
        """Ends it by its own steps, the last of which is SIGKILL."""
        for number, seconds in self.steps:
            if self.poll() is not None:
                return
            self.send(number)
            if self.wait(seconds):
                return

    def tail(self, lines: int = 3) -> str:
        """The last lines that this run of it wrote to its log."""
        if self.log is None or not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = self._log_start if self._log_start <= size else 0  # smaller: the log was rotated meanwhile
            file.seek(max(start, size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


def _write_record(path: Path, identity: Identity, stop: Steps) -> None:
    document = {
        "process": _as_json(identity),
        "owner": _as_json(myself()),
        "stop": [[number.name, seconds] for number, seconds in stop],
    }
    write_private(path, json.dumps(document))


def _as_json(identity: Identity) -> dict[str, Any]:
    return {"pid": identity.pid, "started": identity.started, "program": identity.program}


def end_leftover(record: Path) -> int | None:
    """Ends the process that a dead run recorded; returns its pid, or None where there was none to end.

    Raises InUse while the process that started it lives: it is no leftover then.
    """
    try:
        document = json.loads(record.read_text())
        identity, owner = Identity(**document["process"]), Identity(**document["owner"])
        steps = [(signal.Signals[name], float(seconds)) for name, seconds in document["stop"]]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        record.unlink(missing_ok=True)  # not a record of ours: nothing in it can be trusted to name a process
        return None
    ended = None
    if identity.alive():
        if owner.alive():
            raise InUse(f"{record.parent} is in use by process {owner.pid}: stop it, or choose another folder.")
        if not _end(identity, steps):
            raise DeployError(
                f"process {identity.pid} of a dead run cannot be ended: end it by hand, then start again."
            )
        ended = identity.pid
    record.unlink(missing_ok=True)
    return ended


def _end(identity: Identity, steps: Steps) -> bool:
    for number, seconds in steps:
        if not identity.alive():
            return True
        try:
            os.kill(identity.pid, number)
        except ProcessLookupError:
            return True
        deadline = time.monotonic() + seconds
        while identity.alive():
            if time.monotonic() >= deadline:
                break
            time.sleep(POLL_SECONDS)
    return not identity.alive()
