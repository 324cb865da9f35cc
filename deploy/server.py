"""What embedded servers have in common: a folder, a port that they keep, a start that waits until they serve."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Final

from deploy.process import POLL_SECONDS, Child, DeployError, Steps, end_leftover

LOOPBACK: Final = "127.0.0.1"
START_SECONDS: Final = 30.0

# Below every system's range for outgoing connections: there a client that dials a stopped server's port may be given
# that very port, connect to itself, and keep the server from coming back.
PORTS: Final = range(10_240, 32_768)

_PASSING: Final = ("address already in use", "shared memory block")  # reasons that a short wait mends


class ServerError(DeployError):
    """A server that cannot be started or found."""


def free_port() -> int:
    """A port of loopback that nothing listens on now."""
    for port in random.SystemRandom().sample(PORTS, 200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((LOOPBACK, port))
            return port
    raise ServerError("no free port was found on 127.0.0.1: stop what listens there.")


class Server(ABC):
    """A server with its state in one folder. ``port`` 0 takes a free one, once, and keeps it."""

    name: ClassVar[str]
    stop_steps: ClassVar[Steps]

    def __init__(self, state_dir: str | Path, port: int = 0, *, log: Path | None = None) -> None:
        self.state_dir = Path(state_dir).absolute()
        self.port = port
        self.log = log if log is not None else self.state_dir / "server.log"
        self.child: Child | None = None
        self._own_port = port == 0
        self._was_ready = False

    @property
    def pid(self) -> int | None:
        """None while it does not run."""
        return self.child.pid if self.child is not None and self.child.poll() is None else None

    def start(self, timeout: float = START_SECONDS) -> None:
        """Launches it and waits until it serves; raises ServerError, with the server's own words, when it does not."""
        self.launch()
        self.await_ready(timeout)

    def launch(self) -> Child:
        """Starts the process and returns without waiting for it; ends what a dead run left of it."""
        if self.pid is not None:
            raise RuntimeError(f"{self.name} runs already")
        self.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        end_leftover(self.record)
        if self._own_port and not self._was_ready:
            self._choose_ports()
        self.child = self._launch()
        return self.child

    def await_ready(self, timeout: float = START_SECONDS) -> None:
        deadline = time.monotonic() + timeout
        refusal = ""
        while not self.ready():
            late = time.monotonic() >= deadline
            if self.pid is None:
                refusal = self._words()
                if late or not any(reason in refusal.lower() for reason in _PASSING):
                    raise ServerError(f"{self.name} did not start: {refusal} (its log: {self.log})")
                time.sleep(10 * POLL_SECONDS)
                self.launch()
            elif late:
                words = refusal or self._words()
                self.stop()
                raise ServerError(f"{self.name} is not ready after {timeout:g} s: {words} (its log: {self.log})")
            time.sleep(POLL_SECONDS)
        self._was_ready = True

    def ready(self) -> bool:
        """Whether it runs and serves at this moment."""
        return self.pid is not None and self._serves()

    def ailment(self) -> str | None:
        """What only a new start would mend, in words; None while it is well, or while a new start would not help."""
        return None

    def stop(self) -> None:
        if self.child is not None:
            self.child.end()

    @property
    def record(self) -> Path:
        return self.state_dir / "process.json"

    def _words(self) -> str:
        return " | ".join((self.child.tail() if self.child else "").splitlines()) or "it said nothing"

    def _choose_ports(self) -> None:
        self.port = free_port()

    @abstractmethod
    def _launch(self) -> Child: ...

    @abstractmethod
    def _serves(self) -> bool: ...
