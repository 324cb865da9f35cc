"""Where backups are shipped to, as a person writes it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_FORM: Final = re.compile(
    r"(?:(?P<user>[^@/\s:]+)@)?(?P<host>\[[0-9A-Fa-f:.%]+\]|[^@/\s:\[\]]+)(?::(?P<port>\d{1,5}))?:(?P<folder>/(?!/).*)"
)


@dataclass(frozen=True, slots=True)
class SshTarget:
    """A folder of another machine; ``user`` and ``port`` are None where ssh's own configuration says them."""

    host: str
    folder: str
    user: str | None = None
    port: int | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        user, port = f"{self.user}@" if self.user else "", f":{self.port}" if self.port else ""
        return f"{user}{host}{port}:{self.folder}"


def parse_target(text: str) -> str | SshTarget:
    """``user@host:/folder`` or ``user@host:port:/folder``, or a local folder, which is returned as it is.

    A local folder whose name looks like a host is written with a ``./`` before it. Raises ValueError, one sentence.
    """
    form = f"A backup target is user@host:/folder, user@host:port:/folder or a local folder, not {text!r}."
    found = _FORM.fullmatch(text)
    if found is not None:
        port = int(found["port"]) if found["port"] else None
        host = found["host"].strip("[]")
        if (
            host.startswith("-")
            or (found["user"] or "").startswith("-")
            or (port is not None and not 0 < port < 65_536)
        ):
            raise ValueError(form)
        return SshTarget(host, found["folder"], found["user"], port)
    place = text.partition("/")[0]
    if not text.strip() or "\x00" in text or ":" in place or "@" in place:
        raise ValueError(form)
    return text
