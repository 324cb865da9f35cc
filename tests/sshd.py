"""A real sshd on a free port, which lets one key of ours in."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import asyncssh
import psutil

from deploy.server import free_port
from tests.servers import wait_until

PROGRAM = shutil.which("sshd", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")


@dataclass
class Sshd:
    """A running server; ``key`` is let in, and ``known_hosts`` knows it."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def key(self) -> Path:
        return self.folder / "client"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    @property
    def user(self) -> str:
        return getpass.getuser()

    def target(self, folder: Path) -> str:
        return f"{self.user}@127.0.0.1:{self.port}:{folder}"

    def start(self) -> None:
        assert PROGRAM is not None
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where sshd locks itself in before it knows who comes
        self.process = subprocess.Popen(
            [PROGRAM, "-D", "-f", str(self.folder / "config"), "-E", str(self.folder / "log")],
            stdin=subprocess.DEVNULL,
        )

        def listens() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, (self.folder / "log").read_text()
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0

        wait_until(listens, 10.0, "sshd listens")

    def hang_up(self) -> None:
        """Kills every session that is open, as a machine that goes away would."""
        assert self.process is not None
        for session in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                session.kill()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.hang_up()
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(10)


@contextlib.contextmanager
def sshd_server(folder: Path) -> Iterator[Sshd]:
    folder.mkdir(mode=0o700, exist_ok=True)
    server = Sshd(folder, free_port())
    host, client = asyncssh.generate_private_key("ssh-ed25519"), asyncssh.generate_private_key("ssh-ed25519")
    for name, key in (("host", host), ("client", client)):
        key.write_private_key(str(folder / name))
        (folder / name).chmod(0o600)
    (folder / "authorized_keys").write_bytes(client.export_public_key())
    server.known_hosts.write_text(f"[127.0.0.1]:{server.port} {host.export_public_key().decode()}")
    (folder / "config").write_text(
        f"""Port {server.port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/authorized_keys
PidFile {folder}/pid
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PermitRootLogin yes
Subsystem sftp internal-sftp
"""
    )
    server.start()
    try:
        yield server
    finally:
        server.stop()
