"""A small real model for tests, trained once a session on a simulated walk, and how to release it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache

import msgspec

from actors.core.forest import TrainOptions
from actors.core.manifest import (
    MANIFEST_FILE,
    ONNX_FILE,
    PICKLE_FILE,
    PREDICTIONS_FILE,
    Manifest,
    build_manifest,
    version_name,
)
from actors.core.training import Trained, train
from bus.client import Bus
from bus.subjects import MODELS
from schema.messages import ModelEvent, ModelState
from tests.oracles_ml import dataset, random_walk


@cache
def files(seed: int = 1, symbols: tuple[str, ...] = ("EURUSD",)) -> dict[str, bytes]:
    """A version's artifacts by name."""
    data = dataset({symbol: random_walk(3_000, seed=seed + i) for i, symbol in enumerate(symbols)})
    result = train(data, TrainOptions(bar_seconds=60, trees=10, folds=2, min_rows=1_000, seed=seed))
    assert isinstance(result, Trained), result
    made = {PICKLE_FILE: result.model_pkl, ONNX_FILE: result.model_onnx, PREDICTIONS_FILE: result.predictions}
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
    return made | {MANIFEST_FILE: msgspec.json.encode(manifest)}


def manifest_of(artifacts: dict[str, bytes]) -> Manifest:
    return msgspec.json.decode(artifacts[MANIFEST_FILE], type=Manifest)


async def release(
    bus: Bus,
    artifacts: dict[str, bytes],
    state: ModelState = "provisional",
    headers: Mapping[str, str] | None = None,
) -> str:
    """Puts a version into the object store and asks the emitter to serve it; returns the version."""
    manifest = manifest_of(artifacts)
    for name, data in artifacts.items():
        await bus.put_object(f"{manifest.name}/{manifest.version}/{name}", data)
    event = ModelEvent(
        event="released",
        model_name=manifest.name,
        version=manifest.version,
        timeframe=manifest.timeframe,
        at=datetime.now(UTC),
        state=state,
    )
    msg_id = f"{manifest.version}-{event.at.timestamp()}"
    await bus.publish(MODELS, event, manifest.name, msg_id=msg_id, headers=headers)
    return manifest.version
