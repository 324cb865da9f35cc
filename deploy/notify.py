"""What a service tells systemd of itself (sd_notify(3)): ready, still starting, alive, stopping. No library is needed.

Without NOTIFY_SOCKET in the environment nothing is told and nothing fails.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import MutableMapping, Sequence
from typing import Final

SEND_SECONDS: Final = 1.0  # a datagram is taken at once; where it is not, telling is not worth waiting for
TELL_SECONDS: Final = 10.0  # between two messages at most
EXTEND_SECONDS: Final = 120.0  # what a start asks for with each of them
MISSING_SECONDS: Final = 600.0  # in which what is missing comes back by itself, if it ever will


class Notifier:
    """``address`` is the manager's socket, ``watchdog`` the seconds within which it wants a sign of life (None: never)."""

    def __init__(self, address: str | None = None, watchdog: float | None = None) -> None:
        self.address = address
        self.watchdog = watchdog if address else None

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> Notifier:
        """From the environment, out of which it is taken: a child must not speak for us."""
        address = environ.pop("NOTIFY_SOCKET", "")
        microseconds = environ.pop("WATCHDOG_USEC", "")
        pid = environ.pop("WATCHDOG_PID", "")
        ours = pid in ("", str(os.getpid()))
        watched = ours and microseconds.isdecimal() and int(microseconds) > 0
        return cls(address or None, int(microseconds) / 1e6 if watched else None)

    def tell(self, *lines: str) -> bool:
        """Sends ``NAME=value`` lines as one message; False where nobody took it, which is no reason to stop working."""
        if not self.address:
            return False
        # A leading @ names a socket of Linux' abstract kind.
        address = f"\0{self.address[1:]}" if self.address.startswith("@") else self.address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(SEND_SECONDS)
            sender.sendto("\n".join(lines).encode(), address)
            return True
        return False


class Vigil:
    """When to tell what, from monotonic seconds and the names of what is missing. Each call may be made at any rate.

    While starting, every turn lengthens the manager's patience: a long log takes its time, and only a start that does
    not turn any more is hung. Once ready, a sign of life is due at a third of the watchdog's time, and is withheld while
    anything has been missing for ``patience`` seconds: then the manager starts everything anew. That happens once: a
    start that lacks the same thing is never ready, so its watchdog never begins, and what does work goes on working.
    """

    def __init__(self, notifier: Notifier, patience: float = MISSING_SECONDS) -> None:
        self.notifier = notifier
        self.patience = patience
        self._ready: str | None = None  # the status line of readiness, once it was told
        self._status = ""
        self._next = 0.0
        self._missing_since: float | None = None

    def ready(self, now: float, status: str) -> None:
        self._ready = self._status = status
        self._next = now  # a first sign of life at the next turn
        self._missing_since = None  # what the start waited for is not counted
        self.notifier.tell("READY=1", f"STATUS={status}")

    def stopping(self) -> None:
        self.notifier.tell("STOPPING=1", "STATUS=Stopping.")

    def turn(self, now: float, missing: Sequence[str]) -> float | None:
        """Tells what is due; returns for how long something has been missing where a sign of life is withheld for it."""
        if not missing:
            self._missing_since = None
        elif self._missing_since is None:
            self._missing_since = now
        lacking = 0.0 if self._missing_since is None else now - self._missing_since
        lines = []
        if (status := self._words(missing)) != self._status:
            self._status = status
            lines.append(f"STATUS={status}")
        withheld = False
        if now >= self._next:
            self._next = now + self._interval()
            if self._ready is None:
                lines.append(f"EXTEND_TIMEOUT_USEC={int(EXTEND_SECONDS * 1e6)}")
            elif self.notifier.watchdog is not None:
                withheld = lacking >= self.patience
                if not withheld:
                    lines.append("WATCHDOG=1")
        if lines:
            self.notifier.tell(*lines)
        return lacking if withheld else None

    def left(self, now: float) -> float:
        """Seconds until the next turn is due."""
        return max(0.0, self._next - now)

    def _interval(self) -> float:
        if self._ready is None or self.notifier.watchdog is None:
            return TELL_SECONDS
        return min(TELL_SECONDS, self.notifier.watchdog / 3)

    def _words(self, missing: Sequence[str]) -> str:
        if missing:
            return f"{'Starting: waiting for' if self._ready is None else 'Missing:'} {', '.join(missing)}."
        return "Starting." if self._ready is None else self._ready
