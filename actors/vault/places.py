"""Where backups are kept: a folder of this machine, or one behind SFTP. Both show a backup whole or not at all.

A backup is brought under a name that begins with a dot and gets its own by a rename, once every byte of it is there; to
delete one is to rename it away first. Beside it ``.<name>.verified`` says that it was proved, and of which manifest.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, Protocol, TypeVar

import msgspec
from msgspec import Struct

from actors.core.backups import Step, entry_problems, is_name, total_bytes
from actors.vault.files import sync_tree
from actors.vault.threads import in_thread
from schema.backup import MANIFEST, BackupManifest, FileEntry, UtcTime
from schema.settings import Backup
from schema.targets import SshTarget, parse_target

UPLOADING: Final = ".upload-"
DELETING: Final = ".delete-"
FETCHING: Final = ".fetch-"
STALE_SECONDS: Final = 86_400.0  # an upload that has not moved for so long was killed: another machine's may be alive
MANIFEST_BYTES: Final = 16 * 1024**2  # more than any manifest has
BLOCK: Final = 1024 * 1024

Tell = Callable[[Step], None]
R = TypeVar("R")


class PlaceFailed(Exception):
    """A place cannot be used, or has not what was asked for; the message is a sentence with the way out."""


class Mark(Struct, frozen=True, kw_only=True):
    """That a backup was verified, and the sha256 of the manifest that it had."""

    at: UtcTime
    manifest: str


@dataclass(frozen=True, slots=True)
class Kept:
    """A backup of a place; ``manifest`` is None where it cannot be read, and ``problem`` says why."""

    name: str
    manifest: BackupManifest | None
    problem: str = ""
    verified_at: datetime | None = None

    @property
    def bytes(self) -> int:
        return total_bytes(self.manifest.files) if self.manifest is not None else 0


class Place(Protocol):
    """Every method raises PlaceFailed."""

    @property
    def title(self) -> str:
        """What a person calls it."""
        ...

    async def names(self) -> set[str]:
        """The whole backups."""
        ...

    async def list(self) -> list[Kept]:
        """The whole backups, newest first."""
        ...

    async def upload(self, folder: Path, manifest: BackupManifest, tell: Tell) -> None:
        """Brings a backup there, under the name of its manifest, which must be free."""
        ...

    async def fetch(self, name: str, into: Path, tell: Tell) -> Path:
        """Brings a backup into the folder ``into``; returns its own folder there.

        A file that is missing there is missing here as well, and a damaged one damaged: judging is not this one's work.
        """
        ...

    async def delete(self, name: str) -> None: ...

    async def mark_verified(self, name: str, at: datetime) -> None:
        """Notes that the backup was proved as it lies there."""
        ...


@asynccontextmanager
async def open_place(settings: Backup) -> AsyncIterator[Place | None]:
    """The target of the settings, connected; None where there is none. Raises PlaceFailed."""
    if settings.target is None:
        yield None
        return
    try:
        target = parse_target(settings.target)
    except ValueError as error:
        raise PlaceFailed(str(error)) from error
    if isinstance(target, SshTarget):
        from actors.vault.place_ssh import connect  # asyncssh is read where a target asks for it

        async with connect(target, settings) as place:
            yield place
    else:
        yield LocalPlace(Path(target).expanduser().absolute())  # noqa: ASYNC240 - no file is touched


def check_manifest(manifest: BackupManifest, name: str) -> None:
    """A path of a manifest must lead nowhere but into the backup's own folder."""
    for defect in entry_problems(manifest):
        raise PlaceFailed(f"The manifest of {name} cannot be believed: {defect.path} {defect.problem}.")


def kept_as(name: str, manifest: bytes | None, mark: bytes | None) -> Kept:
    if manifest is None:
        return Kept(name, None, f"has no {MANIFEST}")
    try:
        decoded = msgspec.json.decode(manifest, type=BackupManifest)
    except msgspec.DecodeError as error:
        return Kept(name, None, f"has a {MANIFEST} that cannot be read ({error})")
    verified_at = None
    if mark is not None:
        with contextlib.suppress(msgspec.DecodeError):  # a mark that is cut proves nothing
            known = msgspec.json.decode(mark, type=Mark)
            verified_at = known.at if known.manifest == hashlib.sha256(manifest).hexdigest() else None
    return Kept(name, decoded, verified_at=verified_at)


def mark_name(name: str) -> str:
    return f".{name}.verified"


def mark_bytes(at: datetime, manifest: bytes) -> bytes:
    return msgspec.json.encode(Mark(at=at, manifest=hashlib.sha256(manifest).hexdigest())) + b"\n"


def draft_name(prefix: str, name: str) -> str:
    return f"{prefix}{name}-{secrets.token_hex(4)}"


# --- a folder ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LocalPlace:
    """A folder of this machine: the home's own backups, another disk, or what is mounted there."""

    root: Path

    @property
    def title(self) -> str:
        return str(self.root)

    async def names(self) -> set[str]:
        return set(await self._do(self._names))

    async def list(self) -> list[Kept]:
        def look() -> Sequence[Kept]:
            return [self._one(name) for name in sorted(self._names(), reverse=True)]

        return [*await self._do(look)]

    async def upload(self, folder: Path, manifest: BackupManifest, tell: Tell) -> None:
        total = total_bytes(manifest.files)

        def copy(count: Callable[[int], None]) -> None:
            with self._translated():
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._sweep()
                draft, final = self.root / draft_name(UPLOADING, manifest.name), self.root / manifest.name
                if final.exists():
                    raise PlaceFailed(taken_words(self.title, manifest.name))
                draft.mkdir(mode=0o700)
                try:
                    done = 0
                    for entry in [*manifest.files, manifest_entry(folder)]:
                        done = _copy(folder / entry.path, draft / entry.path, done, count)
                    sync_tree(draft)
                    draft.rename(final)
                finally:
                    shutil.rmtree(draft, ignore_errors=True)
                _sync(self.root)

        stage = f"to {self.title}"
        tell(Step(stage=stage, total=total))
        await in_thread(copy, lambda size: tell(Step(stage=stage, done=size, total=total)))

    async def fetch(self, name: str, into: Path, tell: Tell) -> Path:
        kept = await self._do(lambda: self._one(name))
        if kept.manifest is None:
            raise PlaceFailed(f"{self.title}/{name} {kept.problem}.")
        manifest = kept.manifest
        check_manifest(manifest, name)
        stage, total = f"from {self.title}", kept.bytes

        def copy(count: Callable[[int], None]) -> Path:
            with self._translated():
                draft = into / draft_name(FETCHING, name)
                draft.mkdir(mode=0o700, parents=True)
                try:
                    done = 0
                    for entry in [*manifest.files, manifest_entry(self.root / name)]:
                        with contextlib.suppress(FileNotFoundError):
                            done = _copy(self.root / name / entry.path, draft / entry.path, done, count)
                    draft.rename(into / name)
                finally:
                    shutil.rmtree(draft, ignore_errors=True)
            return into / name

        tell(Step(stage=stage, total=total))
        return await in_thread(copy, lambda size: tell(Step(stage=stage, done=size, total=total)))

    async def delete(self, name: str) -> None:
        def remove() -> None:
            self._one(name)
            doomed = self.root / draft_name(DELETING, name)
            (self.root / name).rename(doomed)
            (self.root / mark_name(name)).unlink(missing_ok=True)
            shutil.rmtree(doomed)

        await self._do(remove)

    async def mark_verified(self, name: str, at: datetime) -> None:
        def write() -> None:
            self._one(name)
            data = mark_bytes(at, (self.root / name / MANIFEST).read_bytes())
            draft = self.root / f"{mark_name(name)}.{secrets.token_hex(4)}"
            handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            draft.replace(self.root / mark_name(name))

        await self._do(write)

    async def _do(self, work: Callable[[], R]) -> R:
        def translated() -> R:
            with self._translated():
                return work()

        return await asyncio.to_thread(translated)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PlaceFailed(f"{error.filename or self.title} cannot be used ({error.strerror or error}).") from error

    def _names(self) -> Sequence[str]:
        if not self.root.is_dir():
            return []
        return [path.name for path in self.root.iterdir() if is_name(path.name) and path.is_dir()]

    def _one(self, name: str) -> Kept:
        if not is_name(name) or not (self.root / name).is_dir():
            raise PlaceFailed(f"There is no backup {name} in {self.title}: `mt5 backup list` shows those that are.")
        return kept_as(name, _read(self.root / name / MANIFEST), _read(self.root / mark_name(name)))

    def _sweep(self) -> None:
        """What killed uploads and deletions have left."""
        for path in self.root.iterdir():
            if path.name.startswith((UPLOADING, DELETING)) and time.time() - _moved(path) > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _moved(folder: Path) -> float:
    """When something last changed in it."""
    newest = 0.0
    for path in [folder, *folder.rglob("*")]:
        with contextlib.suppress(FileNotFoundError):
            newest = max(newest, path.stat().st_mtime)
    return newest


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(MANIFEST_BYTES)
    except FileNotFoundError:
        return None


def _copy(source: Path, target: Path, done: int, count: Callable[[int], None]) -> int:
    """Copies a file, readable by this user only; the bytes of all so far."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (
        source.open("rb") as reading,
        os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as writing,
    ):
        while block := reading.read(BLOCK):
            writing.write(block)
            done += len(block)
            count(done)
    return done


def manifest_entry(folder: Path) -> FileEntry:
    """The manifest as one more file to carry; its hash is nobody's business."""
    return FileEntry(path=MANIFEST, size=(folder / MANIFEST).stat().st_size, sha256="")


def taken_words(title: str, name: str) -> str:
    return f"{title} has another backup {name} already: move it away, or wait for the next one."


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
