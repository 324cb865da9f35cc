"""A small real model for tests, trained once a session on a simulated walk, signed, and how to release it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from actors.core import signing
from actors.core.forest import TrainOptions
from actors.core.manifest import (
    MANIFEST_FILE,
    ONNX_FILE,
    PICKLE_FILE,
    SIGNATURE_FILE,
    Manifest,
    build_manifest,
    version_name,
)
from actors.core.training import Trained, train
from bus.client import Bus
from bus.subjects import MODELS
from schema.messages import ModelEvent, ModelState
from tests.builders import PUBLIC_KEY_FILE
from tests.oracles_ml import dataset, random_walk

KEY = signing.private_key(b"the tests' own key, of 32 bytes.")
PUBLIC_KEY = PUBLIC_KEY_FILE.read_bytes()


def trust(home: str | Path) -> Path:
    """Puts the tests' keys under a home, as a trainer has them; returns the public one's file."""
    folder = Path(home) / "keys"
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / "models.key").write_bytes(KEY)
    (folder / "models.key").chmod(0o600)
    (folder / "models.pub").write_bytes(PUBLIC_KEY)
    return folder / "models.pub"


@cache
def files(seed: int = 1, symbols: tuple[str, ...] = ("EURUSD",)) -> dict[str, bytes]:
    """A version's artifacts by name, signed with the tests' key."""
    data = dataset({symbol: random_walk(3_000, seed=seed + i) for i, symbol in enumerate(symbols)})
    result = train(data, TrainOptions(bar_seconds=60, trees=10, folds=2, min_rows=1_000, seed=seed))
    assert isinstance(result, Trained), result
    made = {PICKLE_FILE: result.model_pkl, ONNX_FILE: result.model_onnx}
    created = datetime(2025, 1, seed, tzinfo=UTC)
    manifest = build_manifest(
        result.report,
        made,
        name="rf_m1",
        version=version_name(created, result.model_onnx),
        timeframe="M1",
        created_at=created,
        expire_days=100_000,
    )
    return signed(made, manifest)


def signed(artifacts: Mapping[str, bytes], manifest: Manifest) -> dict[str, bytes]:
    """The artifacts under that manifest, signed."""
    data = msgspec.json.encode(manifest)
    return {**artifacts, MANIFEST_FILE: data, SIGNATURE_FILE: signing.sign(KEY, data)}


def changed(artifacts: Mapping[str, bytes], **changes: Any) -> dict[str, bytes]:
    """The artifacts under a manifest that says something else, signed again."""
    return signed(artifacts, msgspec.structs.replace(manifest_of(artifacts), **changes))


def manifest_of(artifacts: Mapping[str, bytes]) -> Manifest:
    return msgspec.json.decode(artifacts[MANIFEST_FILE], type=Manifest)


async def store(bus: Bus, artifacts: Mapping[str, bytes]) -> Manifest:
    """Puts a version into the object store."""
    manifest = manifest_of(artifacts)
    for name, data in artifacts.items():
        await bus.put_object(f"{manifest.name}/{manifest.version}/{name}", data)
    return manifest


async def release(
    bus: Bus,
    artifacts: Mapping[str, bytes],
    state: ModelState = "provisional",
    headers: Mapping[str, str] | None = None,
) -> str:
    """Puts a version into the object store and asks the emitter to serve it; returns the version."""
    manifest = await store(bus, artifacts)
    event = ModelEvent(
        event="released",
        model_name=manifest.name,
        version=manifest.version,
        timeframe=manifest.timeframe,
        at=datetime.now(UTC),
        state=state,
        recipe=manifest.recipe,
    )
    msg_id = f"{manifest.version}-{event.at.timestamp()}"
    await bus.publish(MODELS, event, manifest.name, msg_id=msg_id, headers=headers)
    return manifest.version
