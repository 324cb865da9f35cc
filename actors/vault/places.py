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
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, Final, Protocol, TypeVar, cast

import asyncssh
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
CONNECT_SECONDS: Final = 20.0
CLOSE_SECONDS: Final = 3.0
KEEPALIVE_SECONDS: Final = 15  # a line that is dead for four of these is given up
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
        async with connect(target, settings) as place:
            yield place
    else:
        yield LocalPlace(Path(target).expanduser().absolute())  # noqa: ASYNC240 - no file is touched


def _check_manifest(manifest: BackupManifest, name: str) -> None:
    """A path of a manifest must lead nowhere but into the backup's own folder."""
    for defect in entry_problems(manifest):
        raise PlaceFailed(f"The manifest of {name} cannot be believed: {defect.path} {defect.problem}.")


def _kept(name: str, manifest: bytes | None, mark: bytes | None) -> Kept:
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


def _mark_of(name: str) -> str:
    return f".{name}.verified"


def _mark(at: datetime, manifest: bytes) -> bytes:
    return msgspec.json.encode(Mark(at=at, manifest=hashlib.sha256(manifest).hexdigest())) + b"\n"


def _draft_of(prefix: str, name: str) -> str:
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
                draft, final = self.root / _draft_of(UPLOADING, manifest.name), self.root / manifest.name
                if final.exists():
                    raise PlaceFailed(_taken(self.title, manifest.name))
                draft.mkdir(mode=0o700)
                try:
                    done = 0
                    for entry in [*manifest.files, _manifest_entry(folder)]:
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
        _check_manifest(manifest, name)
        stage, total = f"from {self.title}", kept.bytes

        def copy(count: Callable[[int], None]) -> Path:
            with self._translated():
                draft = into / _draft_of(FETCHING, name)
                draft.mkdir(mode=0o700, parents=True)
                try:
                    done = 0
                    for entry in [*manifest.files, _manifest_entry(self.root / name)]:
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
            doomed = self.root / _draft_of(DELETING, name)
            (self.root / name).rename(doomed)
            (self.root / _mark_of(name)).unlink(missing_ok=True)
            shutil.rmtree(doomed)

        await self._do(remove)

    async def mark_verified(self, name: str, at: datetime) -> None:
        def write() -> None:
            self._one(name)
            data = _mark(at, (self.root / name / MANIFEST).read_bytes())
            draft = self.root / f"{_mark_of(name)}.{secrets.token_hex(4)}"
            handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            draft.replace(self.root / _mark_of(name))

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
        return _kept(name, _read(self.root / name / MANIFEST), _read(self.root / _mark_of(name)))

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


def _manifest_entry(folder: Path) -> FileEntry:
    """The manifest as one more file to carry; its hash is nobody's business."""
    return FileEntry(path=MANIFEST, size=(folder / MANIFEST).stat().st_size, sha256="")


def _taken(title: str, name: str) -> str:
    return f"{title} has another backup {name} already: move it away, or wait for the next one."


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- SFTP --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def connect(target: SshTarget, settings: Backup) -> AsyncIterator[SshPlace]:
    """The folder of a host that is known, by a key of ours. Raises PlaceFailed."""
    known_hosts = Path(settings.known_hosts or "~/.ssh/known_hosts").expanduser()  # noqa: ASYNC240 - no file is touched
    if not await asyncio.to_thread(known_hosts.is_file):
        port = f"-p {target.port} " if target.port else ""
        raise PlaceFailed(
            f"{known_hosts} does not exist, so no host is known: run `ssh-keyscan {port}{target.host} >> {known_hosts}` and "
            "compare the key with the host's own."
        )
    options: dict[str, Any] = {
        "known_hosts": str(known_hosts),
        "preferred_auth": ["publickey"],
        "connect_timeout": CONNECT_SECONDS,
        "login_timeout": CONNECT_SECONDS,
        "keepalive_interval": KEEPALIVE_SECONDS,
        "keepalive_count_max": 4,
    }
    if target.user is not None:
        options["username"] = target.user
    if target.port is not None:
        options["port"] = target.port
    if settings.ssh_key is not None:
        key = Path(settings.ssh_key).expanduser()  # noqa: ASYNC240 - as above
        await asyncio.to_thread(_check_key, key)
        options |= {"client_keys": [str(key)], "agent_path": None}
    connection: asyncssh.SSHClientConnection | None = None
    try:
        with _told(target):
            connection = await asyncssh.connect(target.host, **options)
            sftp = await connection.start_sftp_client()
        yield SshPlace(target, sftp)
    finally:
        if connection is not None:
            await _hang_up(connection)


async def _hang_up(connection: asyncssh.SSHClientConnection) -> None:
    """Within a budget: the other side may be frozen."""
    connection.close()
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await connection.wait_closed()
    except (TimeoutError, asyncssh.Error, OSError):
        connection.abort()


def _check_key(key: Path) -> None:
    try:
        mode = stat.S_IMODE(key.stat().st_mode)
    except OSError as error:
        raise PlaceFailed(f"The ssh key {key} cannot be read ({error.strerror}): mend [backup] ssh_key.") from error
    if mode & 0o077:
        raise PlaceFailed(f"The ssh key {key} can be read by others: chmod 600 {key}")


@contextmanager
def _told(target: SshTarget) -> Iterator[None]:
    """What goes wrong between two machines, as a sentence."""
    try:
        yield
    except asyncssh.HostKeyNotVerifiable as error:
        raise PlaceFailed(
            f"The key of {target.host} is not in the known hosts, or is another one than there ({error}): nothing was sent; "
            "compare it with the host's own, then add it with ssh-keyscan."
        ) from error
    except asyncssh.PermissionDenied as error:
        raise PlaceFailed(
            f"{target.host} does not let us in ({error}): add our public key to its authorized_keys, or set [backup] ssh_key."
        ) from error
    except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as error:
        raise PlaceFailed(f"The ssh key cannot be used ({error}): a key for backups has no passphrase.") from error
    except asyncssh.SFTPError as error:
        raise PlaceFailed(f"{target} refuses ({error}): look at its permissions and its free space.") from error
    except (asyncssh.Error, OSError, TimeoutError) as error:
        text = str(error) or type(error).__name__
        raise PlaceFailed(f"{target.host} cannot be reached, or went away ({text}).") from error


@dataclass(frozen=True, slots=True)
class SshPlace:
    """A folder of another machine, over one connection."""

    target: SshTarget
    sftp: asyncssh.SFTPClient

    @property
    def title(self) -> str:
        return str(self.target)

    @property
    def root(self) -> PurePosixPath:
        return PurePosixPath(self.target.folder)

    async def names(self) -> set[str]:
        with _told(self.target):
            return {name for name in await self._entries() if is_name(name)}

    async def list(self) -> list[Kept]:
        with _told(self.target):
            return [await self._one(name) for name in sorted(await self._entries(), reverse=True) if is_name(name)]

    async def upload(self, folder: Path, manifest: BackupManifest, tell: Tell) -> None:
        with _told(self.target):
            await self.sftp.makedirs(str(self.root), exist_ok=True)
            await self._sweep()
            draft, final = self.root / _draft_of(UPLOADING, manifest.name), self.root / manifest.name
            if await self.sftp.exists(str(final)):
                raise PlaceFailed(_taken(self.title, manifest.name))
            try:
                await self._carry(folder, manifest, draft, tell)
                await self.sftp.rename(str(draft), str(final))
            except asyncio.CancelledError:
                raise  # the next upload sweeps: a stop has no time for another machine
            except Exception:
                with contextlib.suppress(asyncssh.Error, OSError):  # swept by a later upload then
                    await self.sftp.rmtree(str(draft))
                raise

    async def _carry(self, folder: Path, manifest: BackupManifest, draft: PurePosixPath, tell: Tell) -> None:
        stage, total, before = f"to {self.target.host}", total_bytes(manifest.files), 0
        tell(Step(stage=stage, total=total))
        await self.sftp.mkdir(str(draft), asyncssh.SFTPAttrs(permissions=0o700))
        made = {draft}
        for entry in [*manifest.files, await asyncio.to_thread(_manifest_entry, folder)]:
            remote = draft / entry.path
            for parent in reversed(remote.parents):
                if parent.is_relative_to(draft) and parent not in made:
                    await self.sftp.mkdir(str(parent), asyncssh.SFTPAttrs(permissions=0o700))
                    made.add(parent)

            def moved(_: bytes, __: bytes, done: int, ___: int, base: int = before) -> None:
                tell(Step(stage=stage, done=base + done, total=total))

            await self.sftp.put(str(folder / entry.path), str(remote), progress_handler=moved)
            await self.sftp.chmod(str(remote), 0o600)
            await self._settle(remote, entry)
            before += entry.size

    async def _settle(self, remote: PurePosixPath, entry: FileEntry) -> None:
        """All of a file is on the other machine's disk, as far as it can say so."""
        async with self.sftp.open(str(remote), "r+b") as file:
            with contextlib.suppress(asyncssh.SFTPOpUnsupported):
                await file.fsync()
            size = (await file.stat()).size
        if size != entry.size:
            raise PlaceFailed(f"{self.title} holds {size} of {entry.size} bytes of {entry.path}: ship it again.")

    async def fetch(self, name: str, into: Path, tell: Tell) -> Path:
        with _told(self.target):
            kept = await self._one(name)
            if kept.manifest is None:
                raise PlaceFailed(f"{self.title}/{name} {kept.problem}.")
            _check_manifest(kept.manifest, name)
            draft = into / _draft_of(FETCHING, name)
            await asyncio.to_thread(draft.mkdir, mode=0o700, parents=True)
            try:
                await self._bring(kept, draft, tell)
                await asyncio.to_thread(draft.rename, into / name)
            finally:
                await asyncio.to_thread(shutil.rmtree, draft, ignore_errors=True)
        return into / name

    async def _bring(self, kept: Kept, draft: Path, tell: Tell) -> None:
        stage, total, before = f"from {self.target.host}", kept.bytes, 0
        tell(Step(stage=stage, total=total))
        listed = kept.manifest.files if kept.manifest is not None else ()
        for path in [*(entry.path for entry in listed), MANIFEST]:
            local = draft / path
            await asyncio.to_thread(local.parent.mkdir, mode=0o700, parents=True, exist_ok=True)

            def moved(_: bytes, __: bytes, done: int, ___: int, base: int = before) -> None:
                tell(Step(stage=stage, done=base + done, total=total))

            try:
                await self.sftp.get(str(self.root / kept.name / path), str(local), progress_handler=moved)
            except asyncssh.SFTPNoSuchFile:
                continue
            await asyncio.to_thread(local.chmod, 0o600)
            before += (await asyncio.to_thread(local.stat)).st_size

    async def delete(self, name: str) -> None:
        with _told(self.target):
            await self._one(name)
            doomed = self.root / _draft_of(DELETING, name)
            await self.sftp.rename(str(self.root / name), str(doomed))
            with contextlib.suppress(asyncssh.SFTPNoSuchFile):
                await self.sftp.remove(str(self.root / _mark_of(name)))
            await self.sftp.rmtree(str(doomed))

    async def mark_verified(self, name: str, at: datetime) -> None:
        with _told(self.target):
            await self._one(name)
            manifest = await self._read(self.root / name / MANIFEST)
            if manifest is None:
                raise PlaceFailed(f"{self.title}/{name} has no {MANIFEST}.")
            final = self.root / _mark_of(name)
            draft = final.with_name(f"{final.name}.{secrets.token_hex(4)}")
            async with self.sftp.open(str(draft), "wb", asyncssh.SFTPAttrs(permissions=0o600)) as file:
                await file.write(_mark(at, manifest))
            await self.sftp.posix_rename(str(draft), str(final))

    async def _entries(self) -> Sequence[str]:
        try:
            return [str(name) for name in await self.sftp.listdir(str(self.root))]
        except asyncssh.SFTPNoSuchFile:
            return []

    async def _one(self, name: str) -> Kept:
        if not is_name(name) or not await self.sftp.isdir(str(self.root / name)):
            raise PlaceFailed(f"There is no backup {name} in {self.title}: `mt5 backup list` shows those that are.")
        manifest = await self._read(self.root / name / MANIFEST)
        return _kept(name, manifest, await self._read(self.root / _mark_of(name)))

    async def _read(self, path: PurePosixPath) -> bytes | None:
        try:
            async with self.sftp.open(str(path), "rb") as file:
                return cast(bytes, await file.read(MANIFEST_BYTES))  # opened for bytes
        except asyncssh.SFTPNoSuchFile:
            return None

    async def _sweep(self) -> None:
        """What killed uploads and deletions have left, our own and other machines'."""
        now = time.time()
        for name in await self._entries():
            if not name.startswith((UPLOADING, DELETING)):
                continue
            with contextlib.suppress(asyncssh.SFTPNoSuchFile):  # another one sweeps, too
                if now - await self._moved(self.root / name) > STALE_SECONDS:
                    await self.sftp.rmtree(str(self.root / name))

    async def _moved(self, folder: PurePosixPath) -> float:
        """When something last changed in it; an upload's folders are two levels deep."""
        newest = float((await self.sftp.stat(str(folder))).mtime or 0)
        for entry in await self.sftp.readdir(str(folder)):
            if str(entry.filename) in {".", ".."}:
                continue
            newest = max(newest, float(entry.attrs.mtime or 0))
        return newest
