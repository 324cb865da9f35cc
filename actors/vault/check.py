"""Whether a backup's folder holds what its manifest says: every byte is read, and every file that differs is named."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec

from actors.core.backups import Defect, compare, is_name
from actors.vault.threads import Count, deaf
from schema.backup import MANIFEST, VERSION, BackupManifest, FileEntry

READ_BYTES: Final = 1024**2
MANIFEST_BYTES: Final = (
    16 * 1024**2
)  # far above any that was ever written: a disk image named manifest.json fills no memory


class Damaged(Exception):
    """A backup is not what its manifest says: nothing of it may be restored."""

    def __init__(self, defects: list[Defect]) -> None:
        super().__init__("; ".join(f"{defect.path} {defect.problem}" for defect in defects))
        self.defects = defects


def read_manifest(folder: Path) -> BackupManifest:
    """Raises Damaged where there is none, or none that this version understands."""
    file = folder / MANIFEST
    try:
        if file.stat().st_size > MANIFEST_BYTES:
            raise Damaged([Defect(MANIFEST, "is far too long to be a manifest")])
        data = file.read_bytes()
    except FileNotFoundError:
        raise Damaged([Defect(MANIFEST, "is missing")]) from None
    except OSError as error:
        raise Damaged([Defect(MANIFEST, f"cannot be read ({error.strerror})")]) from error
    if not data:
        raise Damaged([Defect(MANIFEST, "is empty")])
    try:
        manifest = msgspec.json.decode(data, type=BackupManifest)
    except msgspec.DecodeError as error:
        raise Damaged([Defect(MANIFEST, f"is no manifest of a backup ({error})")]) from error
    if manifest.version > VERSION:
        raise Damaged([Defect(MANIFEST, f"is of version {manifest.version}: this mt5 is older and does not know it")])
    return manifest


def check_files(folder: Path, count: Count = deaf) -> BackupManifest:
    """The manifest of a folder in which every file is as it says. ``count`` hears of the bytes read so far. Blocks.

    Raises:
        Damaged: all that is wrong, by file.
    """
    manifest = read_manifest(folder)
    defects = []
    if is_name(folder.name) and folder.name != manifest.name:
        defects.append(Defect(MANIFEST, f"is that of backup {manifest.name}"))
    found: list[FileEntry] = []
    done = 0
    for path in sorted(_files(folder)):
        name = path.relative_to(folder).as_posix()
        if name == MANIFEST:
            continue
        try:
            found.append(_entry(name, path, done, count))
            done += found[-1].size
        except OSError as error:
            defects.append(Defect(name, f"cannot be read ({error.strerror or error})"))
    unread = {defect.path for defect in defects}
    defects += [defect for defect in compare(manifest, found) if defect.path not in unread]
    if defects:
        raise Damaged(defects)
    return manifest


def _files(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (Path(root) / name for name in names)


def _entry(name: str, path: Path, done: int, count: Count) -> FileEntry:
    # A link or a device may be read for ever, or lead to what is not in the backup.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    digest, size = sha256(), 0
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "it is no regular file")
        while part := file.read(READ_BYTES):
            digest.update(part)
            size += len(part)
            count(done + size)
    return FileEntry(path=name, size=size, sha256=digest.hexdigest())
