"""The files' part of a backup: one compressed archive of what lies under home and belongs to a person's installation.

What the archive holds, by its first folder:

``home/``           models, keys, reports, logs, jobs and ``health_checks.db`` as they lie under MT5_HOME
``configuration/``  ``mt5.toml`` as it is, and ``settings.json``: the settings in force, secrets masked
``data/0/`` …       the folders that ``[backup] data`` names, and ``data/places.json``: where each of them was

All of this blocks: it is for a thread or a process of its own.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import sqlite3
import stat
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

from schema.backup import MANIFEST, FileEntry

HOME: Final = "home"
CONFIGURATION: Final = "configuration"
DATA: Final = "data"
PLACES: Final = f"{DATA}/places.json"
SETTINGS_FILE: Final = f"{CONFIGURATION}/mt5.toml"
IN_FORCE: Final = f"{CONFIGURATION}/settings.json"

# Of MT5_HOME; the rest is the servers' own state, which the dump and the snapshots hold, or true of one run only.
KEPT: Final = ("models", "keys", "reports", "jobs", "logs", "health_checks.db")
COMPRESSION: Final = 4
BLOCK: Final = 1024 * 1024
SQLITE: Final = b"SQLite format 3\x00"
SQLITE_PAGES: Final = 2_000  # copied at a time, so that whoever writes waits for some milliseconds only
SQLITE_SECONDS: Final = 60.0  # after which a database that is written all the time is given up
SIDES: Final = ("-wal", "-shm", "-journal")  # of an SQLite database: its copy needs none


@dataclass(slots=True)
class Packed:
    """What an archive holds; ``left_out`` names what could not be read, with the reason."""

    files: int = 0
    bytes: int = 0
    left_out: list[str] = field(default_factory=list)


def pack(
    archive: Path,
    home: Path,
    *,
    configuration: Path | None = None,
    in_force: bytes = b"{}",
    data: Sequence[str] = (),
    read: Callable[[int], None] = lambda size: None,
) -> Packed:
    """Writes the archive; ``read`` is called with the bytes that were read so far.

    A file that goes away meanwhile is left out, as it would be a moment later; one that is cut meanwhile is filled up with
    zeros to the size that it had. What this user may not read is left out and told.

    Raises:
        OSError: the archive cannot be written.
    """
    packed = Packed()
    places = [str(Path(folder).expanduser().absolute()) for folder in data]
    with (
        archive.open("xb") as out,
        gzip.GzipFile(filename="", mode="wb", compresslevel=COMPRESSION, fileobj=out) as packing,
        tarfile.open(fileobj=packing, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        walker = _Packer(tar, packed, read, archive.parent)
        for name in KEPT:
            walker.add(home / name, f"{HOME}/{name}")
        if configuration is not None:
            walker.add(configuration, SETTINGS_FILE)
        walker.put(IN_FORCE, in_force)
        for number, place in enumerate(places):
            if not os.path.lexists(place):
                packed.left_out.append(f"{place} does not exist")
            walker.add(Path(place), f"{DATA}/{number}")
        walker.put(PLACES, json.dumps(places).encode())
    return packed


def size_of(home: Path, data: Sequence[str] = ()) -> int:
    """Bytes of all that :func:`pack` would read."""
    total = 0
    for root in [*(home / name for name in KEPT), *(Path(folder).expanduser() for folder in data)]:
        for path in [root, *(path for path, _ in _below(root, []))]:
            with contextlib.suppress(OSError):
                info = path.lstat()
                total += info.st_size if stat.S_ISREG(info.st_mode) else 0
    return total


class _Packer:
    def __init__(self, tar: tarfile.TarFile, packed: Packed, read: Callable[[int], None], scratch: Path) -> None:
        self._tar = tar
        self._packed = packed
        self._read = read
        self._scratch = scratch

    def add(self, path: Path, name: str) -> None:
        """A file, a link, or a folder with all that is in it; nothing where there is nothing."""
        if not os.path.lexists(path):
            return
        self._one(path, path, name)
        for found, below in _below(path, self._packed.left_out):
            self._one(path, found, f"{name}/{below}")

    def put(self, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = len(content), 0o600, int(time.time())
        self._tar.addfile(info, io.BytesIO(content))
        self._packed.files += 1

    def _one(self, root: Path, path: Path, name: str) -> None:
        try:
            info = path.lstat()
            if stat.S_ISLNK(info.st_mode):
                self._link(root, path, name)
            elif stat.S_ISDIR(info.st_mode):
                self._head(name, info, tarfile.DIRTYPE)
            elif stat.S_ISREG(info.st_mode):
                self._file(path, name)
        except FileNotFoundError:
            return  # it went away: rotated, or replaced
        except PermissionError as error:
            self._packed.left_out.append(f"{path} may not be read by this user ({error.strerror})")
        except sqlite3.Error as error:
            self._packed.left_out.append(f"{path} is an SQLite database that could not be copied ({error})")

    def _head(self, name: str, info: os.stat_result, kind: bytes, size: int = 0, link: str = "") -> tarfile.TarInfo:
        head = tarfile.TarInfo(name)
        head.type, head.size, head.linkname = kind, size, link
        head.mode, head.mtime, head.uid, head.gid = (
            stat.S_IMODE(info.st_mode),
            int(info.st_mtime),
            info.st_uid,
            info.st_gid,
        )
        if kind != tarfile.REGTYPE:
            self._tar.addfile(head)
        return head

    def _link(self, root: Path, path: Path, name: str) -> None:
        """Only a link within what is packed means anything on another machine, and only a relative one."""
        target = Path(os.path.normpath(path.parent / path.readlink()))
        if not target.is_relative_to(root):
            self._packed.left_out.append(f"{path} points outside ({target})")
            return
        self._head(name, path.lstat(), tarfile.SYMTYPE, link=os.path.relpath(target, path.parent))

    def _file(self, path: Path, name: str) -> None:
        with path.open("rb") as file:
            head = file.read(len(SQLITE))
            if head != SQLITE:
                if path.name.endswith(SIDES) and _is_sqlite(Path(str(path).rpartition("-")[0])):
                    return  # what it holds is in the copy of its database
                file.seek(0)
                self._stream(file, name, os.fstat(file.fileno()))
                return
        with tempfile.TemporaryDirectory(prefix=".sqlite-", dir=self._scratch) as folder:
            copy = Path(folder) / "copy"
            copy_sqlite(path, copy)
            with copy.open("rb") as file:
                self._stream(file, name, path.lstat(), os.fstat(file.fileno()).st_size)

    def _stream(self, file: BinaryIO, name: str, info: os.stat_result, size: int | None = None) -> None:
        size = info.st_size if size is None else size
        self._tar.addfile(self._head(name, info, tarfile.REGTYPE, size), _Exactly(file, size, self._advance))
        self._packed.files += 1

    def _advance(self, size: int) -> None:
        self._packed.bytes += size
        self._read(self._packed.bytes)


class _Exactly(io.RawIOBase):
    """A file as if it had exactly so many bytes: what grows is cut, what is cut meanwhile is filled up with zeros."""

    def __init__(self, file: BinaryIO, size: int, advance: Callable[[int], None]) -> None:
        self._file = file
        self._left = size
        self._advance = advance

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        size = self._left if size < 0 else min(size, self._left)
        part = self._file.read(size)
        part += bytes(size - len(part))
        self._left -= size
        self._advance(size)
        return part


def _below(root: Path, unread: list[str]) -> Iterator[tuple[Path, str]]:
    """Everything below a folder with its path from there, folders before what is in them. No link is followed."""
    if root.is_symlink() or not root.is_dir():
        return

    def on_error(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            unread.append(f"{error.filename} may not be read by this user ({error.strerror})")

    for folder, names, files in os.walk(root, onerror=on_error):
        names[:] = sorted(name for name in names if not name.startswith(".run-"))  # a training's workspace
        for name in [*names, *sorted(files)]:
            path = Path(folder) / name
            yield path, path.relative_to(root).as_posix()


def _is_sqlite(path: Path) -> bool:
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(len(SQLITE)) == SQLITE
    return False


def copy_sqlite(source: Path, target: Path) -> None:
    """A consistent copy of a database that others write to; one file, whatever its journal is.

    Raises:
        sqlite3.Error: it cannot be read, or is written so much that no copy comes to an end.
    """
    deadline = time.monotonic() + SQLITE_SECONDS

    def patience(status: int, remaining: int, total: int) -> None:
        if time.monotonic() > deadline:
            raise sqlite3.OperationalError("it is written all the time")

    url = f"{source.absolute().as_uri()}?mode=ro"
    with (
        contextlib.closing(sqlite3.connect(url, uri=True, timeout=10.0)) as reading,
        contextlib.closing(sqlite3.connect(target)) as writing,
    ):
        target.chmod(0o600)
        reading.backup(writing, pages=SQLITE_PAGES, progress=patience, sleep=0.01)
        # A copy of a database with a write-ahead log says that it has one; alone it must be readable without.
        writing.execute("PRAGMA journal_mode=DELETE")


# --- hashes ------------------------------------------------------------------------------------------------------


def file_entry(folder: Path, path: Path, read: Callable[[int], None] = lambda size: None) -> FileEntry:
    """A file's size and sha256, by its path within ``folder``; ``read`` is called with its bytes so far."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
            read(size)
    return FileEntry(path=path.relative_to(folder).as_posix(), size=size, sha256=digest.hexdigest())


def entries(folder: Path, read: Callable[[int], None] = lambda size: None) -> tuple[FileEntry, ...]:
    """Every file of a backup but its manifest, as they lie there; ``read`` is called with the bytes of all so far."""
    found: list[FileEntry] = []
    before = 0
    for path in _plain_files(folder):
        found.append(file_entry(folder, path, lambda size, base=before: read(base + size)))  # type: ignore[misc]
        before += found[-1].size
    return tuple(found)


def size_below(folder: Path) -> int:
    """Bytes of all that :func:`entries` reads."""
    return sum(path.stat().st_size for path in _plain_files(folder))


def _plain_files(folder: Path) -> list[Path]:
    """What is no plain file is not followed."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and path != folder / MANIFEST
    ]


def sync_tree(folder: Path) -> None:
    """What is in a folder, and that it is there, is on the disk afterwards."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
