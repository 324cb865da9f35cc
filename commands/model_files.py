"""A version's files for commands that use a model beside the running system: from the object store, or from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from actors.core.manifest import MANIFEST_FILE, ONNX_FILE, Manifest
from actors.core.serving import ModelRefused, ServedModel
from commands.output import NO, WRONG, CommandError
from commands.settings import Loaded

if TYPE_CHECKING:
    from bus.client import Bus
    from bus.store import ModelRecord


async def stored(bus: Bus, loaded: Loaded, name: str, version: str) -> ServedModel:
    """A version of the object store, verified. Raises CommandError."""
    from bus.client import BusUnavailable

    try:
        found = [await bus.get_object(f"{name}/{version}/{file}") for file in (MANIFEST_FILE, ONNX_FILE)]
    except KeyError as error:
        raise CommandError(f"{error.args[0]} is not in the object store: train again.", NO) from error
    except BusUnavailable as error:
        raise CommandError(str(error), NO) from error
    return _model(*found)


def in_folder(folder: Path, loaded: Loaded) -> ServedModel:
    """A version that lies in a folder as the trainer writes it, verified. Raises CommandError."""
    try:
        found = [(folder / file).read_bytes() for file in (MANIFEST_FILE, ONNX_FILE)]
    except OSError as error:
        raise CommandError(
            f"{error.filename or folder} cannot be read ({error.strerror}): name a folder such as "
            "var/models/rf_m1/VERSION.",
            WRONG,
        ) from error
    return _model(*found)


def _model(manifest: bytes, graph: bytes) -> ServedModel:
    try:
        return ServedModel(msgspec.json.decode(manifest, type=Manifest), graph)
    except msgspec.DecodeError as error:
        raise CommandError(f"{MANIFEST_FILE} cannot be read ({error}): train again.", NO) from error
    except ModelRefused as error:
        raise CommandError(str(error), NO) from error


def only_one(records: list[ModelRecord], version: str) -> ModelRecord:
    """The record of that version. Raises CommandError where there is none, or several models have it."""
    if not records:
        raise CommandError(f"There is no version {version}: `mt5 models list` shows them.", NO)
    if len(records) > 1:
        names = ", ".join(record.model_name for record in records)
        raise CommandError(f"Several models have a version {version}: name one of {names} with --model.", WRONG)
    return records[0]
