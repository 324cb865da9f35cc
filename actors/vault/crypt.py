"""Backups encrypted with age to a public key, file by file and as a stream, and back with the secret key.

The names stay, so that ``age -d -i key.txt database.dump`` gives what pg_restore reads. The manifest stays readable: it
says what a backup holds, and the hashes of the files as they lie there.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec
import pyrage

from actors.vault.threads import Count, deaf
from schema.backup import BackupManifest, FileEntry

SECRET: Final = "AGE-SECRET-KEY-1"  # noqa: S105 - how such a key begins


class KeyUnusable(Exception):
    """A key is none, or is not kept as one must be; the message is a sentence with the way out."""


class CannotDecrypt(Exception):
    """A file cannot be decrypted with these keys, or is damaged; the message is a sentence that names the file."""


def recipient(text: str) -> pyrage.x25519.Recipient:
    """An age public key. Raises KeyUnusable."""
    try:
        return pyrage.x25519.Recipient.from_str(text.strip())
    except pyrage.RecipientError as error:
        raise KeyUnusable(
            "[backup] recipient is no age public key: it begins with age1, as `age-keygen` prints it."
        ) from error


def identities(file: Path) -> list[pyrage.x25519.Identity]:
    """The secret keys of a file as ``age-keygen`` writes it, comments and all. Raises KeyUnusable."""
    try:
        info = file.stat()
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise KeyUnusable(
            f"The age key {file} cannot be read ({error.strerror}): set [backup] identity to the file that holds it."
        ) from error
    if stat.S_IMODE(info.st_mode) & 0o077:
        raise KeyUnusable(f"{file} holds a secret key and others may read it: chmod 600 {file}")
    lines = [line.strip() for line in text.splitlines()]
    try:
        keys = [pyrage.x25519.Identity.from_str(line) for line in lines if line.startswith(SECRET)]
    except pyrage.IdentityError as error:
        raise KeyUnusable(f"{file} holds no whole age secret key: copy it again from where it is kept.") from error
    if not keys:
        raise KeyUnusable(f"{file} holds no age secret key: a line of it must begin with {SECRET}.")
    return keys


def seal(folder: Path, manifest: BackupManifest, into: Path, key: str, read: Count = deaf) -> BackupManifest:
    """Encrypts a backup's files into another folder, which exists; the manifest that belongs there is returned.

    ``read`` is called with the bytes that were encrypted so far. Blocks.

    Raises:
        KeyUnusable: ``key`` is no age public key.
        OSError: a file cannot be read or written.
    """
    to = recipient(key)
    progress = _Progress(read)
    sealed = []
    for entry in manifest.files:
        target = into / entry.path
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (folder / entry.path).open("rb") as plain, _private(target) as file:
            hashed = _Hashed(file)
            _run(pyrage.encrypt_io, _Counted(plain, progress), hashed, [to])
            file.flush()
        sealed.append(FileEntry(path=entry.path, size=hashed.size, sha256=hashed.digest.hexdigest()))
    return msgspec.structs.replace(manifest, files=tuple(sealed), encrypted=key.strip())


def unseal(
    folder: Path, manifest: BackupManifest, into: Path, keys: Sequence[pyrage.x25519.Identity], read: Count = deaf
) -> BackupManifest:
    """Decrypts a backup's files into another folder, which exists; the manifest that belongs there is returned.

    Blocks. What age decrypts without complaint is what was encrypted: each of its 64 KiB is authenticated.

    Raises:
        CannotDecrypt: with these keys not, or a file is damaged.
        OSError: a file cannot be read or written.
    """
    progress = _Progress(read)
    plain = []
    for entry in manifest.files:
        target = into / entry.path
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (folder / entry.path).open("rb") as file, _private(target) as out:
            hashed = _Hashed(out)
            try:
                _run(pyrage.decrypt_io, _Counted(file, progress), hashed, list(keys))
            except pyrage.DecryptError as error:
                raise CannotDecrypt(
                    f"{entry.path} is encrypted to {manifest.encrypted} and cannot be decrypted ({str(error).lower()}): give the "
                    "file of its secret key in [backup] identity."
                ) from error
            except OSError as error:
                if error.errno is not None:
                    raise
                raise CannotDecrypt(f"{entry.path} is damaged: it cannot be decrypted whole ({error}).") from error
            out.flush()
        plain.append(FileEntry(path=entry.path, size=hashed.size, sha256=hashed.digest.hexdigest()))
    return msgspec.structs.replace(manifest, files=tuple(plain), encrypted=None)


def _private(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


def _run(work: Any, reader: _Counted, writer: _Hashed, keys: list[Any]) -> None:
    """pyrage wraps what goes wrong in our own files into errors of its own: told as what it was."""
    try:
        work(reader, writer, keys)
    except Exception:
        if (cause := reader.failure or writer.failure) is not None:
            raise cause from None
        raise


@dataclass(slots=True)
class _Progress:
    told: Count
    size: int = 0

    def add(self, size: int) -> None:
        self.size += size
        self.told(self.size)


class _Counted:
    def __init__(self, file: BinaryIO, progress: _Progress) -> None:
        self._file = file
        self._progress = progress
        self.failure: Exception | None = None

    def read(self, size: int = -1) -> bytes:
        try:
            part = self._file.read(size)
            self._progress.add(len(part))
        except Exception as error:
            self.failure = error
            raise
        return part


@dataclass(slots=True)
class _Hashed:
    file: BinaryIO
    size: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    failure: Exception | None = None

    def write(self, part: bytes) -> int:
        try:
            self.file.write(part)
        except Exception as error:
            self.failure = error
            raise
        self.digest.update(part)
        self.size += len(part)
        return len(part)

    def flush(self) -> None:
        """What pyrage asks for at the end; the file is flushed by who opened it."""
