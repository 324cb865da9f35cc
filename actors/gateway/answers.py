"""What the reading routes answer with."""

from __future__ import annotations

from typing import Any, Literal

from bus.store import ModelRecord
from schema.messages import Candle, FeatureRow, Message, ModelState, UtcTime

Status = Literal["ok", "degraded", "down"]


class CandleList(Message, frozen=True, omit_defaults=False):
    """Oldest first."""

    symbol: str
    timeframe: str
    candles: tuple[Candle, ...]


class FeatureList(Message, frozen=True, omit_defaults=False):
    """Oldest first."""

    symbol: str
    timeframe: str
    features: tuple[FeatureRow, ...]


class ModelSummary(Message, frozen=True, omit_defaults=False):
    """A version in the registry without its manifest."""

    model_name: str
    version: str
    timeframe: str
    state: ModelState
    created_at: UtcTime
    from_seq: int | None
    activated_at: UtcTime | None
    reason: str
    by: str


class ModelList(Message, frozen=True, omit_defaults=False):
    """Newest version of each model first."""

    models: tuple[ModelSummary, ...]


class ModelDetail(Message, frozen=True, omit_defaults=False):
    """One model: the version that serves (None: none does) and its versions with their manifests, newest first."""

    model_name: str
    serving: str | None
    versions: tuple[ModelRecord, ...]


class Check(Message, frozen=True, omit_defaults=False):
    """One part's health; ``detail`` is a sentence for a person."""

    status: Status
    detail: str


class HealthReport(Message, frozen=True, omit_defaults=False):
    """``status`` is the worst of the checks."""

    status: Status
    checks: dict[str, Check]


class Probe(Message, frozen=True, omit_defaults=False):
    """The answer to an orchestrator."""

    status: Literal["ok", "starting"]


def summary(record: ModelRecord) -> ModelSummary:
    fields: dict[str, Any] = {name: getattr(record, name) for name in ModelSummary.__struct_fields__}
    return ModelSummary(**fields)
