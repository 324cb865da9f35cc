"""Versions of models as whoever serves, follows or verifies gets them: from the object store, verified, loaded once.

Only ``manifest.json``, ``manifest.sig`` and ``model.onnx`` are read for a load: never a pickle, which runs code.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from pathlib import Path
from typing import Final

from actors.core.manifest import MANIFEST_FILE, ONNX_FILE, PICKLE_FILE, SIGNATURE_FILE, Manifest, ModelRefused
from actors.core.sealed import check_file, open_manifest
from actors.core.serving import ServedModel
from bus.artifacts import ArtifactLost, read_artifact
from bus.client import Bus
from schema.settings import Settings

KEPT: Final = 16  # loaded versions, some megabytes each: more than serve and are followed at a time


def public_key_file(settings: Settings) -> Path:
    """Where the keys are that a manifest must be signed with."""
    named = settings.models.public_key
    return Path(named or f"{settings.home}/keys/models.pub").expanduser()


class Artifacts:
    """The object store's versions behind a bus; a version that was verified and loaded is kept, the newest asked for."""

    def __init__(self, bus: Bus, settings: Settings, *, kept: int = KEPT) -> None:
        self._bus = bus
        self._key = public_key_file(settings)
        self._kept = kept
        self._loaded: OrderedDict[tuple[str, str], ServedModel] = OrderedDict()

    async def load(self, name: str, version: str) -> ServedModel:
        """A version that may serve.

        Raises:
            ModelRefused: a file is missing or damaged, was not signed, is not the one that was, or does not fit this
                release; the sentence says what to do.
            BusUnavailable: NATS does not answer: ask again.
        """
        key = (name, version)
        known = self._loaded.get(key)
        if known is None:
            manifest = await self.manifest(name, version)
            graph = await self.file(f"{name}/{version}/{ONNX_FILE}")
            # Parsing a graph takes some 100 ms: beside the loop, so that no candle waits for it.
            known = self._loaded[key] = await asyncio.to_thread(ServedModel, manifest, graph)
        self._loaded.move_to_end(key)
        while len(self._loaded) > self._kept:
            self._loaded.popitem(last=False)
        return known

    async def manifest(self, name: str, version: str) -> Manifest:
        """A version's manifest, its signature verified. Raises as :meth:`load`."""
        return (await self._sealed(name, version))[0]

    async def files(self, name: str, version: str) -> dict[str, bytes]:
        """All files of a version, each as its signed manifest names it, whatever release could serve it.

        The pickle is missing among them where it is no longer kept. It is bytes here, and is not loaded.

        Raises:
            ModelRefused, BusUnavailable: as :meth:`load`.
        """
        manifest, data, signature = await self._sealed(name, version)
        found = {MANIFEST_FILE: data, SIGNATURE_FILE: signature}
        for file in sorted(manifest.files):
            try:
                found[file] = await read_artifact(self._bus, f"{name}/{version}/{file}")
            except ArtifactLost as error:
                if file == PICKLE_FILE:  # older versions keep what signals need only
                    continue
                raise ModelRefused(f"{error}: train again.") from error
            check_file(manifest, file, found[file])
        return found

    async def file(self, path: str) -> bytes:
        """An object's bytes as they are, unverified; ``path`` is ``<name>/<version>/<file>``. Raises as :meth:`load`."""
        try:
            return await read_artifact(self._bus, path)
        except ArtifactLost as error:
            raise ModelRefused(f"{error}: train again.") from error

    async def _sealed(self, name: str, version: str) -> tuple[Manifest, bytes, bytes]:
        public = await asyncio.to_thread(self._public_key)
        folder = f"{name}/{version}"
        data = await self.file(f"{folder}/{MANIFEST_FILE}")
        try:
            signature = await read_artifact(self._bus, f"{folder}/{SIGNATURE_FILE}")
        except ArtifactLost as error:
            raise ModelRefused(f"{error}, and nothing unsigned is loaded: train again.") from error
        return open_manifest(name, version, data, signature, public), data, signature

    def _public_key(self) -> bytes:
        try:
            return self._key.read_bytes()
        except OSError as error:
            raise ModelRefused(
                f"The public key of models, {self._key}, cannot be read ({error.strerror}): copy keys/models.pub of the "
                "trainer's MT5_HOME there, or name the file in [models] public_key."
            ) from error
