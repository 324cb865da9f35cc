"""A version for commands that use a model beside the running system: from the object store, or from a folder; verified."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from actors.artifacts import Artifacts, public_key_file
from actors.core.manifest import MANIFEST_FILE, ONNX_FILE, SIGNATURE_FILE, ModelRefused
from actors.core.sealed import open_manifest
from actors.core.serving import ServedModel
from commands.output import NO, WRONG, CommandError
from commands.settings import Loaded

if TYPE_CHECKING:
    from bus.client import Bus
    from bus.store import ModelRecord


class _Name(msgspec.Struct):
    """What a manifest calls itself, before anybody believes it."""

    name: str
    version: str


async def stored(bus: Bus, loaded: Loaded, name: str, version: str) -> ServedModel:
    """A version of the object store, verified. Raises CommandError."""
    from bus.client import BusUnavailable

    try:
        return await Artifacts(bus, loaded.settings).load(name, version)
    except (ModelRefused, BusUnavailable) as error:
        raise CommandError(str(error), NO) from error


def in_folder(folder: Path, loaded: Loaded) -> ServedModel:
    """A version that lies in a folder as the trainer writes it, verified. Raises CommandError."""
    public = public_key_file(loaded.settings)
    manifest, signature, graph = (_read(folder / file) for file in (MANIFEST_FILE, SIGNATURE_FILE, ONNX_FILE))
    try:
        key = public.read_bytes()
    except OSError as error:
        raise CommandError(
            f"The public key of models, {public}, cannot be read ({error.strerror}): copy keys/models.pub of the trainer's "
            "MT5_HOME there, or name the file in [models] public_key.",
            WRONG,
        ) from error
    try:
        said = msgspec.json.decode(manifest, type=_Name)
        return ServedModel(open_manifest(said.name, said.version, manifest, signature, key), graph)
    except msgspec.DecodeError as error:
        raise CommandError(f"{folder / MANIFEST_FILE} cannot be read ({error}): train again.", NO) from error
    except ModelRefused as error:
        raise CommandError(str(error), NO) from error


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CommandError(
            f"{file} cannot be read ({error.strerror}): name a version's folder, such as var/models/rf_m1/VERSION.",
            WRONG,
        ) from error


def only_one(records: Sequence[ModelRecord], version: str) -> ModelRecord:
    """The record of that version. Raises CommandError where there is none, or several models have it."""
    if not records:
        raise CommandError(f"There is no version {version}: `mt5 models list` shows them.", NO)
    if len(records) > 1:
        names = ", ".join(record.model_name for record in records)
        raise CommandError(f"Several models have a version {version}: name one of {names} with --model.", WRONG)
    return records[0]
