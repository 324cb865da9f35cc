"""The files' part of a backup, taken out of its archive: below one new folder, and nowhere else whatever the archive says.

All of this blocks: it is for a thread.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Final

from actors.vault.files import DATA, PLACES
from actors.vault.threads import Count, deaf

BLOCK: Final = 1024 * 1024


class BadArchive(Exception):
    """The archive is damaged, or holds what no archive of ours holds; the message is one clause."""


def unpack(archive: Path, target: Path, count: Count = deaf) -> int:
    """Unpacks into ``target``, which it makes, and returns the number of files. ``count`` hears of the bytes written so far.

    Only folders, plain files and links that stay inside are taken, and nobody but this user may read what is made; the data
    of other programs keeps its owners where root unpacks it.

    Raises:
        BadArchive: nothing of it may be used.
        OSError: the disk.
    """
    target.mkdir(mode=0o700)
    links: set[PurePosixPath] = set()
    files = done = 0
    try:
        # A stream: a member's bytes are read once, in order, and no index of all of them is kept.
        with gzip.open(archive) as content, tarfile.open(fileobj=content, mode="r|") as tar:
            for member in tar:
                path = _inside(member.name)
                if any(parent in links for parent in (path, *path.parents)):
                    raise BadArchive(f"{member.name} lies below a link")
                place = target / path
                _folder(place if member.isdir() else place.parent)
                if member.issym():
                    _inside(os.path.normpath(path.parent / member.linkname))
                    os.symlink(member.linkname, place)
                    links.add(path)
                elif member.isreg():
                    done = _write(tar, place, member, done, count)
                    files += 1
                elif not member.isdir():
                    raise BadArchive(f"{member.name} is neither a file, a folder nor a link")
                if path.parts[0] == DATA and os.geteuid() == 0 and not member.issym():
                    # Grafana's folder is Grafana's: its server could not read what belongs to root.
                    os.chown(place, member.uid, member.gid)
                    place.chmod(member.mode & 0o777)
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every head that it has read
            while content.read(BLOCK):
                pass  # to the end, where the checksum of all of it stands
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadArchive(f"it cannot be unpacked ({error})") from error
    except FileExistsError as error:
        raise BadArchive(f"it holds {Path(str(error.filename)).name} twice") from error
    return files


def _inside(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\x00" in name:
        raise BadArchive(f"{name!r} leads out of it")
    return path


def _folder(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


def _write(tar: tarfile.TarFile, place: Path, member: tarfile.TarInfo, done: int, count: Count) -> int:
    source = tar.extractfile(member)
    if source is None:
        raise BadArchive(f"{member.name} has no content")
    mode = 0o700 if member.mode & 0o100 else 0o600
    descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        while part := source.read(BLOCK):
            file.write(part)
            done += len(part)
            count(done)
    os.utime(place, (member.mtime, member.mtime))
    return done


def return_data(unpacked: Path) -> list[tuple[str, Path | None, str]]:
    """Moves the folders of ``[backup] data`` back to where they were: (where it was, where it is now, why not there).

    Only to a place where nothing is; what cannot go back stays below ``unpacked``, and its third field says why. A folder
    that did not exist when the backup was made has no place now.
    """
    out: list[tuple[str, Path | None, str]] = []
    places = json.loads((unpacked / PLACES).read_text()) if (unpacked / PLACES).is_file() else []
    for number, name in enumerate(places):
        kept, place = unpacked / DATA / str(number), Path(name)
        if not os.path.lexists(kept):
            out.append((name, None, "it was not there when the backup was made"))
            continue
        try:
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()
            if os.path.lexists(place):
                out.append((name, kept, "there is something already"))
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(kept, place)
        except OSError as error:
            out.append((name, kept, error.strerror or str(error)))
            continue
        out.append((name, place, ""))
    return out
