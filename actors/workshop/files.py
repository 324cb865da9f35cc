"""The trainer's files: a folder a run, versions that appear whole or not at all, the link to the serving pickle."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
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


def link(models: Path, name: str, version: str) -> None:
    """Points ``<name>.pkl`` at a version's pickle, in one step; a version whose files are elsewhere changes nothing."""
    target, place = Path(name) / version / PICKLE_FILE, models / f"{name}.pkl"
    if not (models / target).exists() or (place.is_symlink() and place.readlink() == target):
        return
    fresh = models / f".{name}.pkl"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(place)
    sync_folder(models)
