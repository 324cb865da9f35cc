"""Where backups are shipped to, as a person writes it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True, slots=True)
class SshTarget:
    """``user`` and ``port`` are None where ssh's own configuration says them."""

    host: str
    folder: str
    user: str | None = None
    port: int | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        where = f"{self.user}@{host}" if self.user else host
        return f"ssh://{where}:{self.port}/{self.folder.lstrip('/')}" if self.port else f"{where}:{self.folder}"


_SCP: Final = re.compile(r"(?:(?P<user>[^@/\s:]+)@)?(?P<host>\[[0-9A-Fa-f:.%]+\]|[^@/\s:\[\]]+):(?P<folder>\S.*)")


def parse_target(text: str) -> str | SshTarget:
    """``[user@]host:/folder``, ``ssh://[user@]host[:port]/folder`` or a local folder, which is returned as it is.

    Raises ValueError, one sentence, on what is none of these.
    """
    text = text.strip()
    form = f"A backup target is user@host:/folder, ssh://user@host:port/folder or a local folder, not {text!r}."
    if not text or text.startswith("-") or "\x00" in text:
        raise ValueError(form)
    if text.startswith(("ssh://", "sftp://")):
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as error:
            raise ValueError(form) from error
        if not parts.hostname or parts.hostname.startswith("-") or len(parts.path) < 2 or parts.query or parts.fragment:
            raise ValueError(form)
        if parts.password is not None:
            raise ValueError("A backup target holds no password: set [backup] ssh_key, or use the agent.")
        return SshTarget(parts.hostname, unquote(parts.path), unquote(parts.username) if parts.username else None, port)
    if text.startswith(("/", ".", "~")):
        return text
    found = _SCP.fullmatch(text)
    if found is not None:
        host = found["host"].strip("[]")
        if host.startswith("-"):
            raise ValueError(form)
        return SshTarget(host, found["folder"], found["user"])
    if ":" in text or "@" in text:
        raise ValueError(form)
    return text
