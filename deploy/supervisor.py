"""Starts servers and processes, brings back what dies, and ends everything within ten seconds.

One thread and no event loop: a select on signals and on the children's ready pipes. A child that answers for actors
gets a pipe's number in ``MT5_READY_FD`` and writes one line, ``ready NAME``, for each actor that became ready.
"""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final, Protocol

from deploy.home import Home
from deploy.notify import Notifier, Vigil
from deploy.process import Child, DeployError
from deploy.server import Server

READY_FD: Final = "MT5_READY_FD"

ACTOR_SECONDS: Final = 6.0  # to drain; PostgreSQL's three come after it, and a stop is promised within ten
FIRST_DELAY: Final = 0.2
LONGEST_DELAY: Final = 10.0
HEALTHY_SECONDS: Final = 30.0  # after that long alive a death is a new one, not the same failure again
TICK_SECONDS: Final = 5.0
LOOK_SECONDS: Final = 5.0  # between two looks at whether a server is well
LOG_BYTES: Final = 16 * 1024 * 1024  # of each log, and of the older one beside it
MISCONFIGURED: Final = 2  # the exit code of wrong usage or configuration: starting again does not mend it

STOP_STEPS: Final = ((signal.SIGTERM, ACTOR_SECONDS), (signal.SIGKILL, 2.0))


class Log(Protocol):
    """What structlog's loggers do: an event with its fields."""

    def info(self, event: str, /, **fields: Any) -> Any: ...

    def warning(self, event: str, /, **fields: Any) -> Any: ...


class StartFailed(DeployError):
    """Something did not become ready; ``missing`` names the actors."""

    def __init__(self, message: str, missing: tuple[str, ...] = ()) -> None:
        self.missing = missing
        super().__init__(message)


@dataclass(slots=True)
class _Task:
    """One thing that is kept running."""

    name: str
    launch: Callable[[], Child]
    log: Path | None
    actors: tuple[str, ...] = ()
    child: Child | None = None
    ready: set[str] = field(default_factory=set)
    started: float = 0.0
    failures: int = 0
    due: float | None = None  # when to start it again


class Supervisor:
    """Keeps servers and processes running from :meth:`start` to :meth:`stop`; use it as a context manager.

    Belongs to the main thread: it handles SIGTERM, SIGINT and SIGCHLD, and children die with the thread that
    started them.
    """

    def __init__(self, home: Home, log: Log, notifier: Notifier | None = None) -> None:
        self.home = home
        self.vigil = Vigil(notifier or Notifier())
        self.stopping = False  # a signal has asked for the stop
        self._settled = False  # everything has been ready once: from then on nothing refuses, it is started again
        self._log = log
        self._servers: list[tuple[Server, _Task]] = []
        self._tasks: list[_Task] = []
        self._foreground: _Task | None = None
        self._selector = selectors.DefaultSelector()
        self._partial: dict[int, bytes] = {}
        self._handlers: dict[signal.Signals, Any] = {}
        self._wakeup: tuple[socket.socket, socket.socket, int] | None = None
        self._next_rotation = 0.0
        self._next_look = 0.0
        self._away: tuple[str, ...] = ()  # servers that did not serve at the last look

    # --- what to run ---------------------------------------------------------------------------------------------

    def add_server(self, server: Server) -> None:
        """Runs a server; its output goes to ``logs/`` of the home."""
        server.log = self.home.log(server.name)
        self._servers.append((server, _Task(server.name, server.launch, server.log)))

    def add_process(self, name: str, argv: Sequence[str], env: Mapping[str, str], actors: Sequence[str] = ()) -> None:
        """Runs a program that reports each of ``actors`` ready; its output goes to ``logs/NAME.log`` of the home."""
        task = _Task(name, lambda: self._spawn(task, argv, env), self.home.log(name), tuple(actors))
        self._tasks.append(task)

    def set_foreground(self, name: str, argv: Sequence[str], env: Mapping[str, str]) -> None:
        """Runs a program on our own output once :meth:`run_until_signal` begins; its end is the end of that."""
        self._foreground = task = _Task(name, lambda: self._spawn(task, argv, env), None)

    def _spawn(self, task: _Task, argv: Sequence[str], env: Mapping[str, str]) -> Child:
        reader, writer = os.pipe()
        try:
            child = Child(
                argv,
                env={**env, READY_FD: str(writer)},
                record=self.home.record(task.name),
                log=task.log,
                stop=STOP_STEPS,
                pass_fds=(writer,),
            )
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        os.set_blocking(reader, False)
        self._partial[reader] = b""
        self._selector.register(reader, selectors.EVENT_READ, task)
        return child

    # --- life ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start_servers(self, timeout: float = 30.0) -> None:
        """Starts the servers and waits until they serve, so that migrations can run; raises ServerError."""
        self._listen()
        for server, task in self._servers:
            if server.pid is None:
                self._start(task)
        for server, task in self._servers:
            server.await_ready(timeout)
            task.child = server.child  # another one where it had to try again

    def start(self, timeout: float = 30.0) -> None:
        """Starts the servers, where they do not run yet, and then every process, without waiting for the actors."""
        self.start_servers(timeout)
        for task in self._tasks:
            self._start(task)

    def wait_ready(self, timeout: float) -> bool:
        """True when every actor is ready, False when a signal asks for the stop before that.

        Raises StartFailed, which names the missing actors, after ``timeout`` seconds or as soon as a process ends
        with exit code 2 (wrong configuration) before everything was ready once.
        """
        deadline = time.monotonic() + timeout
        while self.missing():
            if self.stopping:
                return False
            left = deadline - time.monotonic()
            if left <= 0:
                missing = self.missing()
                logs = {str(task.log): _last_line(task) for task in self._tasks if not task.ready >= set(task.actors)}
                words = "; ".join(f"{path}: {line or 'nothing yet'}" for path, line in logs.items())
                raise StartFailed(f"not ready after {timeout:g} s: {', '.join(missing)} ({words}).", missing)
            self.step(left)
        self._settled = True
        return True

    def missing(self) -> tuple[str, ...]:
        """The actors that are not ready now."""
        return tuple(actor for task in self._tasks for actor in task.actors if actor not in task.ready)

    def interrupted(self) -> bool:
        """Whether a signal has asked for the stop: what waits without turning asks, and is alive for the manager, too."""
        self._tell()
        return self.stopping

    def say_ready(self, status: str) -> None:
        """Tells the manager that everything runs; from now on it wants signs of life."""
        self.vigil.ready(time.monotonic(), status)

    def run_until_signal(self, seconds: float | None = None) -> int:
        """Supervises until SIGTERM or SIGINT, for at most ``seconds``, or until the foreground program ends.

        Returns that program's exit code (1 when a signal ended it), otherwise 0. :meth:`stop` comes next.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        if self._foreground is not None and not self.stopping:
            self._start(self._foreground)
        while not self.stopping:
            left = TICK_SECONDS if deadline is None else deadline - time.monotonic()
            if left <= 0:
                break
            self.step(left)
            program = self._foreground.child if self._foreground is not None else None
            if program is not None and (code := program.poll()) is not None:
                return code if code >= 0 else 1
        return 0

    def step(self, timeout: float) -> None:
        """One turn: waits at most that long for something to happen and sees to it."""
        now = time.monotonic()
        waits = [task.due - now for task in self._kept() if task.due is not None]
        waits.append(self.vigil.left(now))
        for key, _ in self._selector.select(max(0.0, min([timeout, TICK_SECONDS, *waits]))):
            if isinstance(key.data, _Task):
                self._read_ready(key.fd, key.data)
            else:
                self._drain_wakeup()
        for task in self._kept():
            self._check(task)
        self._mend_servers()
        self._rotate_logs()
        self._tell()

    def stop(self) -> None:
        """Ends the processes, then the servers, within ten seconds; nothing is started again after it."""
        self.vigil.stopping()
        self.home.withdraw()
        for descriptor in self._partial:
            self._selector.unregister(descriptor)
            os.close(descriptor)
        self._partial.clear()
        processes = [*self._tasks, *([self._foreground] if self._foreground else [])]
        self._end([task.child for task in processes if task.child is not None])
        self._end([task.child for _, task in self._servers if task.child is not None])
        for server, _ in self._servers:
            server.stop()
        for task in self._kept():
            task.due = None
        self._unlisten()

    # --- keeping them running ------------------------------------------------------------------------------------

    def _kept(self) -> list[_Task]:
        return [task for _, task in self._servers] + self._tasks

    def _start(self, task: _Task) -> None:
        task.due = None
        task.ready.clear()
        task.started = time.monotonic()
        task.child = task.launch()

    def _check(self, task: _Task) -> None:
        """Notices the end of a task and starts it again when its time has come."""
        if task.due is not None:
            if time.monotonic() >= task.due and not self.stopping:
                try:
                    self._start(task)
                except (DeployError, OSError) as error:
                    self._fail(task, reason=str(error))
                else:
                    self._log.info("process_restarted", process=task.name, pid=task.child.pid if task.child else None)
            return
        code = task.child.poll() if task.child is not None else None
        if code is None:
            return
        if code == MISCONFIGURED and task.actors and not self._settled:
            line = _last_line(task) or f"its log is {task.log}"
            raise StartFailed(f"{task.name} refused to start: {line}", task.actors)
        task.ready.clear()
        self._fail(task, code=code, last_line=_last_line(task))

    def _mend_servers(self) -> None:
        """Ends a server that only a new start would mend; :meth:`_check` then starts it again."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_SECONDS
        self._away = tuple(server.name for server, _ in self._servers if not server.ready())
        for server, task in self._servers:
            if task.child is None or task.child.poll() is not None or self.stopping:
                continue
            words = server.ailment()
            if words is not None:
                self._log.warning("server_mended", process=task.name, reason=words)
                task.child.end()

    def _tell(self) -> None:
        """Tells the manager how things are, and in the log why it is told nothing."""
        missing = self._away + self.missing()
        lacking = self.vigil.turn(time.monotonic(), missing)
        if lacking is not None:
            self._log.warning("watchdog_withheld", missing=", ".join(missing), seconds=round(lacking))

    def _fail(self, task: _Task, **fields: Any) -> None:
        if time.monotonic() - task.started >= HEALTHY_SECONDS:
            task.failures = 0
        delay = min(FIRST_DELAY * 2**task.failures, LONGEST_DELAY)
        task.failures += 1
        task.due = time.monotonic() + delay
        self._log.warning("process_died", process=task.name, restart_in=delay, **fields)

    def _read_ready(self, descriptor: int, task: _Task) -> None:
        data = os.read(descriptor, 65_536)
        if not data:
            self._selector.unregister(descriptor)
            os.close(descriptor)
            del self._partial[descriptor]
            return
        *lines, self._partial[descriptor] = (self._partial[descriptor] + data).split(b"\n")
        for line in lines:
            word, _, actor = line.decode(errors="replace").partition(" ")
            if word == "ready" and actor in task.actors:
                task.ready.add(actor)

    def _end(self, children: list[Child]) -> None:
        """Ends them side by side, each by its own steps, one step at a time."""
        step = 0
        while running := [child for child in children if child.poll() is None and step < len(child.steps)]:
            for child in running:
                child.send(child.steps[step][0])
            deadline = time.monotonic() + max(child.steps[step][1] for child in running)
            while (left := deadline - time.monotonic()) > 0 and any(child.poll() is None for child in running):
                self._selector.select(min(left, 0.1))
                self._drain_wakeup()
            step += 1

    def _rotate_logs(self) -> None:
        if time.monotonic() < self._next_rotation:
            return
        self._next_rotation = time.monotonic() + TICK_SECONDS
        for task in self._kept():
            if task.log is not None and task.log.exists() and task.log.stat().st_size > LOG_BYTES:
                # Copied and cut, not renamed: the child keeps its descriptor, which appends wherever the end is.
                try:
                    shutil.copy(task.log, task.log.with_suffix(".log.1"))
                except OSError as error:  # a full disk, most likely: cutting the log is what helps then
                    self._log.warning("log_not_kept", process=task.name, reason=str(error))
                os.truncate(task.log, 0)

    # --- signals -------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        if self._wakeup is not None:
            return
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._wakeup = (reader, writer, before)
        self._selector.register(reader, selectors.EVENT_READ)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            self._handlers[number] = signal.signal(number, self._on_signal)

    def _unlisten(self) -> None:
        if self._wakeup is None:
            return
        reader, writer, before = self._wakeup
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        self._selector.unregister(reader)
        reader.close()
        writer.close()
        self._handlers.clear()
        self._wakeup = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            self.stopping = True

    def _drain_wakeup(self) -> None:
        if self._wakeup is not None:
            try:
                while self._wakeup[0].recv(4_096):
                    pass
            except BlockingIOError:
                return


def _last_line(task: _Task) -> str:
    return task.child.tail(1) if task.child is not None else ""
