"""What an update changes beside the checkout: the environment, the images, and the services that run from them.

Each can be kept as it is now and put back without a network, since a night on which an update fails may be one without.
"""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Final, NamedTuple, Protocol

import msgspec

from commands.jobs_programs import JobFailed, Ran, last_lines, run
from commands.places import running
from commands.settings import Loaded

INSTALL_SECONDS: Final = 1_800.0
RESTART_SECONDS: Final = 300.0
LOOK_SECONDS: Final = 120.0
MIGRATE_SECONDS: Final = 1_800.0
POLL_SECONDS: Final = 0.5

WISH: Final = "run/restart"  # under MT5_HOME: touched, it lets mt5-restart.path restart the services as root
WISH_UNIT: Final = "mt5-restart.path"
PROBLEMS: Final = frozenset({"warning", "critical"})


class Part(Protocol):
    """Something that is installed from the checkout. ``own_news``: it may become newer although the checkout stays."""

    own_news: ClassVar[bool]

    def keep(self) -> None:
        """Remembers it as it is now. May be called again after a run that was cut off."""

    def install(self) -> None:
        """Makes it what the checkout wants; raises JobFailed."""

    def changed(self) -> bool:
        """Whether it is another than the one that was kept, though the checkout is the same."""

    def put_back(self) -> None:
        """Makes it again what :meth:`keep` saw; does nothing where nothing was kept."""

    def forget(self) -> None:
        """Lets go of what was kept."""


class Environment:
    """The virtual environment, as the Makefile of the checkout fills it.

    Kept by hard links: it costs no room, and pip never writes into a file that is there, it replaces it.
    """

    own_news: ClassVar[bool] = False  # its versions are in the lock

    def __init__(self, checkout: Path, venv: Path, log: Path) -> None:
        self._checkout = checkout
        self._venv = venv
        self._log = log
        self._kept = venv.with_name(f"{venv.name}-before")
        self._gone = venv.with_name(f"{venv.name}-gone")

    def keep(self) -> None:
        draft = self._kept.with_name(f"{self._kept.name}.draft")
        for folder in (draft, self._kept, self._gone):
            _remove(folder)
        shutil.copytree(self._venv, draft, symlinks=True, copy_function=_link)
        draft.rename(self._kept)

    def install(self) -> None:
        # Its stamps say what there is to do; a stamp of the tests' extras, as in a developer's checkout, is kept up too.
        tested = (self._venv / ".tested").exists()
        goal = os.path.relpath(self._venv / ".tested", self._checkout) if tested else "install"
        words = ("make", goal, f"VENV={os.path.relpath(self._venv, self._checkout)}")
        made = run(words, cwd=self._checkout, seconds=INSTALL_SECONDS, output=self._log)
        if made.code != 0:
            lines = last_lines(self._log.read_text(errors="replace"))
            raise JobFailed(
                f"The dependencies could not be installed: `{shlex.join(words)}` ended with {made.code}.", lines
            )

    def changed(self) -> bool:
        return False

    def put_back(self) -> None:
        if self._kept.is_dir():
            _remove(self._gone)
            if self._venv.exists():
                self._venv.rename(self._gone)
            self._kept.rename(self._venv)
            _remove(self._gone)

    def forget(self) -> None:
        _remove(self._kept)


def _link(source: str, target: str) -> None:
    """Stamps are touched in place, so that they must not be one with their copy."""
    if os.path.basename(source).startswith("."):
        shutil.copy2(source, target)
    else:
        os.link(source, target, follow_symlinks=False)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


class Images:
    """The images of docker-compose.yml: our own is built from the checkout, the others are pulled."""

    own_news: ClassVar[bool] = True  # a tag such as nats:2.12-alpine moves on with each patch
    BEFORE: Final = "-before"  # the end of the tag under which an image is kept

    def __init__(self, checkout: Path, log: Path) -> None:
        self._checkout = checkout
        self._log = log

    def keep(self) -> None:
        for name in self._names():
            self._docker("image", "tag", name, f"{name}{self.BEFORE}", needed=False)  # one not pulled yet has none

    def install(self) -> None:
        self._docker("compose", "pull", "--quiet", "--ignore-buildable")
        self._docker("compose", "build", "--quiet", "--pull")

    def changed(self) -> bool:
        return any(self._id(name) != self._id(f"{name}{self.BEFORE}") for name in self._names())

    def put_back(self) -> None:
        for name in self._names():
            if self._id(f"{name}{self.BEFORE}"):
                self._docker("image", "tag", f"{name}{self.BEFORE}", name)

    def forget(self) -> None:
        for name in self._names():
            self._docker("image", "rm", f"{name}{self.BEFORE}", needed=False)

    def _names(self) -> list[str]:
        ran = run(("docker", "compose", "config", "--images"), cwd=self._checkout, seconds=LOOK_SECONDS)
        return sorted(set(ran.need("Reading docker-compose.yml").out.split()))

    def _id(self, name: str) -> str:
        """Empty where there is none of that name."""
        words = ("docker", "image", "inspect", "--format", "{{.Id}}", name)
        ran = run(words, cwd=self._checkout, seconds=LOOK_SECONDS)
        return ran.out.strip() if ran.code == 0 else ""

    def _docker(self, *words: str, needed: bool = True) -> bool:
        ran = run(("docker", *words), cwd=self._checkout, seconds=INSTALL_SECONDS, output=self._log)
        if needed and ran.code != 0:
            lines = last_lines(self._log.read_text(errors="replace"))
            raise JobFailed(f"`{shlex.join(ran.words)}` ended with {ran.code}.", lines)
        return ran.code == 0


# --- what runs -----------------------------------------------------------------------------------------------------


class Look(NamedTuple):
    """What `health check` says. ``failing``: names of checks by their state; None where it could not say."""

    failing: dict[str, str] | None
    words: str

    def worse_than(self, before: Look) -> str:
        """What is critical now and was not before, in words; empty where nothing is.

        What was wrong before an update (a disk that fills, a backup that is late) is no reason to take it back.
        """
        if self.failing is None:
            return self.words
        known = before.failing or {}
        new = sorted(check for check, status in self.failing.items() if status == "critical" and check not in known)
        return f"critical: {', '.join(new)}" if new else ""


class Service(Protocol):
    """What runs from the checkout, and how it is started anew."""

    @property
    def words(self) -> str:
        """What it is, for people."""

    def restart(self) -> None:
        """Returns once it has been started again; raises JobFailed."""

    def look(self) -> Look: ...

    def migrate(self) -> None:
        """Brings the database to the checkout's schema where that is not left to the start; raises JobFailed."""


class Program:
    """The command line of the checkout, always as it is there now: this process may be older."""

    def __init__(self, python: Path, checkout: Path) -> None:
        self._words = (str(python), str(checkout / "runner.py"))
        self._checkout = checkout

    def run(self, *words: str, seconds: float = LOOK_SECONDS) -> Ran:
        return run((*self._words, *words), cwd=Path.cwd(), seconds=seconds)


class Nothing:
    """Nothing runs here: that the new code starts at all is what can be seen."""

    words: Final = "nothing that runs"

    def __init__(self, program: Program) -> None:
        self._program = program

    def restart(self) -> None:
        pass

    def look(self) -> Look:
        ran = self._program.run("settings")
        return Look({}, "") if ran.code == 0 else Look(None, f"it does not start: {_last(ran)}")

    def migrate(self) -> None:
        pass  # `mt5 up` does it


class Installed:
    """Actors of this machine, restarted by ``restart``."""

    def __init__(self, program: Program, words: str, restart: Callable[[], None]) -> None:
        self._program = program
        self._restart = restart
        self._words = words

    @property
    def words(self) -> str:
        return self._words

    def restart(self) -> None:
        self._restart()

    def look(self) -> Look:
        return read_look(self._program.run("health", "check", "--json"))

    def migrate(self) -> None:
        self._program.run("migrate", seconds=MIGRATE_SECONDS).need("The migration")


class Composed:
    """The containers of docker-compose.yml; its service `setup` migrates at every start."""

    words: Final = "docker compose"

    def __init__(self, checkout: Path, log: Path) -> None:
        self._checkout = checkout
        self._log = log

    def restart(self) -> None:
        words = ("docker", "compose", "up", "--detach", "--remove-orphans", "--quiet-pull")
        ran = run(words, cwd=self._checkout, seconds=RESTART_SECONDS, output=self._log)
        if ran.code != 0:
            raise JobFailed(
                f"`{shlex.join(words)}` ended with {ran.code}.", last_lines(self._log.read_text(errors="replace"))
            )

    def look(self) -> Look:
        words = ("docker", "compose", "exec", "-T", "health", "mt5", "health", "check", "--json")
        return read_look(run(words, cwd=self._checkout, seconds=LOOK_SECONDS))

    def migrate(self) -> None:
        pass


def read_look(ran: Ran) -> Look:
    """What `health check --json` has found; an answer that is none is not health."""
    try:
        answer = msgspec.json.decode(ran.out, type=_Answer)
    except msgspec.DecodeError:
        return Look(None, f"`health check` does not answer ({_last(ran)})")
    failing = {result.check: result.status for result in answer.results if result.status in PROBLEMS}
    return Look(failing, ", ".join(failing))


class _Result(msgspec.Struct):
    check: str
    status: str


class _Answer(msgspec.Struct):
    results: list[_Result]


def _last(ran: Ran) -> str:
    return (last_lines(ran.err or ran.out, 1) or (f"exit code {ran.code}",))[0]


# --- which of these it is ------------------------------------------------------------------------------------------


def find_service(loaded: Loaded, checkout: Path, program: Program, command: str | None, log: Path) -> Service:
    """What an update has to restart.

    Raises:
        JobFailed: something runs that nobody could restart.
    """
    if command is not None:
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise JobFailed(f"--restart is no command: {error}.") from None
        if not words:
            raise JobFailed("--restart names no command.")
        return Installed(program, f"`{words[0]} …`", lambda: _run_restart(words, checkout))
    if composed(checkout):
        return Composed(checkout, log)
    units = active_units()
    if units:
        return Installed(program, ", ".join(units), lambda: restart_units(units, loaded.home))
    ready = running(loaded.home)
    if ready is not None:
        raise JobFailed(
            f"`mt5 up` (process {ready['pid']}) was started by hand, and nothing would start it again: run it as a service "
            "(`mt5 install-systemd`), or say how to restart it with --restart COMMAND."
        )
    return Nothing(program)


def _run_restart(words: Sequence[str], checkout: Path) -> None:
    run(words, cwd=checkout, seconds=RESTART_SECONDS).need("The restart")


def composed(checkout: Path) -> bool:
    """Whether containers of this checkout's docker-compose.yml exist."""
    if shutil.which("docker") is None or not (checkout / ".env").is_file():
        return False
    ran = run(("docker", "compose", "ps", "--quiet"), cwd=checkout, seconds=LOOK_SECONDS)
    return ran.code == 0 and bool(ran.out.strip())


def active_units() -> list[str]:
    """The units of systemd in which the system runs: the one for the whole, or those of single actors."""
    if shutil.which("systemctl") is None:
        return []
    words = (
        "systemctl",
        "list-units",
        "--plain",
        "--no-legend",
        "--type=service",
        "--state=active,activating,reloading",
    )
    ran = run((*words, "mt5.service", "mt5@*.service"), cwd=Path("/"), seconds=LOOK_SECONDS)
    return [line.split()[0] for line in ran.out.splitlines() if line.strip()] if ran.code == 0 else []


def restart_units(units: Sequence[str], home: Path) -> None:
    """Restarts them as root, or lets mt5-restart.path do it; returns once each is up again.

    Raises JobFailed.
    """
    if os.geteuid() == 0:
        run(("systemctl", "restart", *units), cwd=Path("/"), seconds=RESTART_SECONDS).need("The restart")
        return
    if run(("systemctl", "is-active", "--quiet", WISH_UNIT), cwd=Path("/"), seconds=LOOK_SECONDS).code != 0:
        raise JobFailed(
            f"Only root may restart {', '.join(units)}, and {WISH_UNIT} does not run: install the units again "
            "(`mt5 install-systemd`), or give --restart COMMAND."
        )
    before = _runs(units)
    # Opened for writing and closed: that is what the unit waits for.
    os.close(os.open(home / WISH, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
    deadline = time.monotonic() + RESTART_SECONDS
    while not all(
        state == "active" and before.get(unit) != (invocation, state) for unit, invocation, state in _states(units)
    ):
        if time.monotonic() > deadline:
            raise JobFailed(f"{', '.join(units)} did not come up again within {RESTART_SECONDS:g} s.")
        time.sleep(POLL_SECONDS)


def _runs(units: Sequence[str]) -> dict[str, tuple[str, str]]:
    return {unit: (invocation, state) for unit, invocation, state in _states(units)}


def _states(units: Sequence[str]) -> Iterable[tuple[str, str, str]]:
    """Each unit with the id of its run and its state."""
    for unit in units:
        words = ("systemctl", "show", "--property=InvocationID", "--property=ActiveState", unit)
        pairs = run(words, cwd=Path("/"), seconds=LOOK_SECONDS).out.split()
        found = dict(pair.partition("=")[::2] for pair in pairs)
        yield unit, found.get("InvocationID", ""), found.get("ActiveState", "")
