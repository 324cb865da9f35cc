"""The trainer's files: a folder a run, versions that appear whole or not at all, the link to the serving pickle."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Final

from actors.core.manifest import PICKLE_FILE

WORK_PREFIX: Final = ".run-"


@contextlib.asynccontextmanager
async def workspace(parent: Path) -> AsyncIterator[Path]:
    """A folder on the models' own file system, so that a rename can finish the work; gone afterwards."""
    folder = await asyncio.to_thread(_make, parent)
    try:
        yield folder
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def _make(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=WORK_PREFIX, dir=parent))


def sweep(models: Path) -> None:
    """Removes what runs that died have left."""
    for folder in models.glob(f"*/{WORK_PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)


def write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def place(folder: Path, contents: Mapping[str, bytes]) -> list[str]:
    """Makes a folder hold these files, each whole or not at all; returns the names of those that it did not hold."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [name for name, data in contents.items() if not _holds(folder / name, data)]
    for name in written:
        draft = folder / f".{name}.{os.getpid()}"
        write(draft, contents[name])
        draft.replace(folder / name)
    sync_folder(folder)
    return written


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data


def remove(folder: Path, name: str | None) -> None:
    """Removes a version's file, or its whole folder."""
    if name is not None:
        (folder / name).unlink(missing_ok=True)
    elif folder.is_dir():
        doomed = folder.with_name(f"{WORK_PREFIX}{folder.name}")  # half a folder would look like a version
        folder.replace(doomed)
        shutil.rmtree(doomed)


def link(models: Path, name: str, version: str) -> None:
    """Points ``<name>.pkl`` at a version's pickle, in one step; where that is not kept here, there is no such link."""
    target, place = Path(name) / version / PICKLE_FILE, models / f"{name}.pkl"
    if not (models / target).exists():
        place.unlink(missing_ok=True)  # another version's pickle would be taken for the one that serves
        return
    if place.is_symlink() and place.readlink() == target:
        return
    fresh = models / f".{name}.pkl"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(place)
    sync_folder(models)
