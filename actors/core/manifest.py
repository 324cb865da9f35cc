"""What a version of a model is, in writing: its files and their hashes, its inputs, where it came from, what it is worth.

Light on purpose: actors that only handle models import neither numpy nor ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, Final

import msgspec
from msgspec import Struct, convert

from schema.messages import UtcTime

ONNX_FILE: Final = "model.onnx"
PICKLE_FILE: Final = "model.pkl"
PREDICTIONS_FILE: Final = "predictions.npz"  # out-of-sample predictions, from which the report's figures come
MANIFEST_FILE: Final = "manifest.json"
SIGNATURE_FILE: Final = "manifest.sig"  # over the exact bytes of manifest.json
ARTIFACTS: Final = (PICKLE_FILE, ONNX_FILE, PREDICTIONS_FILE)

LABEL: Final = "fwd_ret_5 > 0"
ALGORITHM: Final = "random forest, one sigmoid"  # another name where the same rows would be learnt from otherwise
# Options that decide how a model is judged, or by which rows: two models that differ in these only are one recipe.
NO_RECIPE: Final = frozenset({"bar_seconds", "seed", "folds", "min_rows", "points", "spreads"})


class ModelRefused(ValueError):
    """A version that must not serve; the message says why and what to do."""


class OtherRuntime(ModelRefused):
    """The version is whole, and was made with a library release that is not installed: another host may well serve it."""


class ModelFile(Struct, frozen=True, kw_only=True):
    """One artifact: its SHA-256 in hex and its size in bytes."""

    sha256: str
    size: int


class Outliers(Struct, frozen=True, kw_only=True):
    """The out-of-distribution detector's numbers; :mod:`actors.core.outliers` says how they are made and used.

    ``columns`` are indexes of inputs, ``centre`` and ``scale`` theirs; a row of ``directions`` has one weight a column.
    """

    columns: tuple[int, ...]
    centre: tuple[float, ...]
    scale: tuple[float, ...]
    directions: tuple[tuple[float, ...], ...]
    limit: float


class Manifest(Struct, frozen=True, kw_only=True):
    """What ``manifest.json`` says of a version; ``report`` holds the training's figures in full.

    ``threshold`` None: no edge was found. ``max_spread`` is in points by symbol, None where spreads are unknown.
    ``expires_at`` is in market time. ``recipe`` is empty in manifests of before there were recipes. ``base_rate`` is the
    share of rises that the model learnt from; ``outliers`` None: an older version, which takes every bar for one that it
    knows.
    """

    name: str
    version: str
    timeframe: str
    created_at: UtcTime
    files: dict[str, ModelFile]
    libraries: dict[str, str]
    feature_set: str
    inputs: tuple[str, ...]
    symbols: tuple[str, ...]
    first_ts: UtcTime
    last_ts: UtcTime
    rows: int
    expires_at: UtcTime
    threshold: float | None = None
    max_spread: dict[str, float | None] = {}
    report: dict[str, Any] = {}
    recipe: str = ""
    base_rate: float = 0.5
    outliers: Outliers | None = None


def recipe_name(report: Mapping[str, Any], timeframe: str) -> str:
    """What a version was made by, as 12 hex digits: inputs, label, algorithm and hyperparameters, not seed or rows.

    Evidence belongs to a recipe: what its versions have shown counts for the next one.
    """
    parameters = {key: value for key, value in report.get("options", {}).items() if key not in NO_RECIPE}
    facts = [timeframe, report["feature_set"], list(report["inputs"]), LABEL, ALGORITHM, sorted(parameters.items())]
    return sha256(msgspec.json.encode(facts)).hexdigest()[:12]


def version_name(created_at: datetime, graph: bytes) -> str:
    """Sorts by time: ``20260131T235900Z-1a2b3c4d``, the graph's hash at its end."""
    return f"{created_at.astimezone(UTC):%Y%m%dT%H%M%SZ}-{sha256(graph).hexdigest()[:8]}"


def build_manifest(
    report: Mapping[str, Any],
    files: Mapping[str, bytes],
    *,
    name: str,
    version: str,
    timeframe: str,
    created_at: datetime,
    expire_days: int,
) -> Manifest:
    """The manifest of a trained version; ``files`` are its artifacts by name."""
    last = datetime.fromtimestamp(report["last_ts"], UTC)
    return Manifest(
        name=name,
        version=version,
        timeframe=timeframe,
        created_at=created_at,
        files={file: ModelFile(sha256=sha256(data).hexdigest(), size=len(data)) for file, data in files.items()},
        libraries=report["libraries"],
        feature_set=report["feature_set"],
        inputs=tuple(report["inputs"]),
        symbols=tuple(report["symbols"]),
        first_ts=datetime.fromtimestamp(report["first_ts"], UTC),
        last_ts=last,
        rows=report["rows"],
        expires_at=last + timedelta(days=expire_days),
        threshold=report["threshold"],
        max_spread=report["max_spread"],
        report=dict(report),
        recipe=recipe_name(report, timeframe),
        base_rate=report["train_rate"],
        outliers=None if report["outliers"] is None else convert(report["outliers"], Outliers),
    )
