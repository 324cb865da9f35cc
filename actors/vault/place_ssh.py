"""Backups behind SFTP: a folder of another machine, over one connection to a host whose key is known.

A module of its own: asyncssh is read when a target asks for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import stat
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, Final, cast

import asyncssh

from actors.core.backups import Step, is_name, total_bytes
from actors.vault.places import (
    DELETING,
    FETCHING,
    MANIFEST_BYTES,
    STALE_SECONDS,
    UPLOADING,
    Kept,
    PlaceFailed,
    Tell,
    check_manifest,
    draft_name,
    kept_as,
    manifest_entry,
    mark_bytes,
    mark_name,
    taken_words,
)
from schema.backup import MANIFEST, BackupManifest, FileEntry
from schema.settings import Backup
from schema.targets import SshTarget

CONNECT_SECONDS: Final = 20.0
CLOSE_SECONDS: Final = 3.0
KEEPALIVE_SECONDS: Final = 15  # a line that is dead for four of these is given up


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
            draft, final = self.root / draft_name(UPLOADING, manifest.name), self.root / manifest.name
            if await self.sftp.exists(str(final)):
                raise PlaceFailed(taken_words(self.title, manifest.name))
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
        for entry in [*manifest.files, await asyncio.to_thread(manifest_entry, folder)]:
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
            check_manifest(kept.manifest, name)
            draft = into / draft_name(FETCHING, name)
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
            doomed = self.root / draft_name(DELETING, name)
            await self.sftp.rename(str(self.root / name), str(doomed))
            with contextlib.suppress(asyncssh.SFTPNoSuchFile):
                await self.sftp.remove(str(self.root / mark_name(name)))
            await self.sftp.rmtree(str(doomed))

    async def mark_verified(self, name: str, at: datetime) -> None:
        with _told(self.target):
            await self._one(name)
            manifest = await self._read(self.root / name / MANIFEST)
            if manifest is None:
                raise PlaceFailed(f"{self.title}/{name} has no {MANIFEST}.")
            final = self.root / mark_name(name)
            draft = final.with_name(f"{final.name}.{secrets.token_hex(4)}")
            async with self.sftp.open(str(draft), "wb", asyncssh.SFTPAttrs(permissions=0o600)) as file:
                await file.write(mark_bytes(at, manifest))
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
        return kept_as(name, manifest, await self._read(self.root / mark_name(name)))

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
