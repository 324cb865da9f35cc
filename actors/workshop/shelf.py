"""A version's files in both their places: the folder under home, and the object store, from which others restore it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from actors.artifacts import Artifacts
from actors.core.manifest import MANIFEST_FILE, ONNX_FILE, PICKLE_FILE, SIGNATURE_FILE
from actors.workshop import files
from bus.artifacts import remove_artifact
from bus.client import Bus

# Who finds the manifest finds the others; who removes it first leaves nothing that looks whole.
ORDER: Final = (PICKLE_FILE, ONNX_FILE, SIGNATURE_FILE, MANIFEST_FILE)


async def restore(artifacts: Artifacts, models: Path, name: str, version: str) -> list[str]:
    """Writes a version's verified files into ``models/<name>/<version>``; returns those that were missing or differed.

    Raises:
        ModelRefused: they are not in the object store, or are not those that were signed.
        BusUnavailable: NATS does not answer.
        OSError: the folder cannot be written.
    """
    found = await artifacts.files(name, version)
    return await asyncio.to_thread(files.place, models / name / version, found)


async def prune(bus: Bus, models: Path, name: str, version: str, *, everything: bool) -> None:
    """Removes a version's pickle, or ``everything``. Raises BusUnavailable or OSError; may be repeated."""
    for file in reversed(ORDER) if everything else (PICKLE_FILE,):
        await remove_artifact(bus, f"{name}/{version}/{file}")
    await asyncio.to_thread(files.remove, models / name / version, None if everything else PICKLE_FILE)
