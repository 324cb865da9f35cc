from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from actors.core.manifest import build_manifest, version_name
from actors.core.registry import Registry
from schema.messages import ModelEvent

AT = datetime(2026, 1, 31, 23, 59, tzinfo=UTC)


def event(what: str, version: str, **more: Any) -> ModelEvent:
    return ModelEvent(event=what, model_name="rf_m1", version=version, timeframe="M1", at=AT, **more)  # type: ignore[arg-type]


def fold(*events: ModelEvent) -> Registry:
    registry = Registry()
    for one in events:
        registry.apply(one)
    return registry


FIRST = (
    event("released", "v1", state="provisional", reason="first"),
    event("activated", "v1", state="provisional", from_seq=7, by="emitter"),
)
SECOND = (
    event("registered", "v2"),
    event("released", "v2", state="champion", reason="better", by="hand"),
    event("activated", "v2", state="champion", from_seq=90, by="emitter"),
)


def test_a_release_counts_once_it_is_activated() -> None:
    registry = fold(FIRST[0])
    assert registry.serving("rf_m1") is None
    awaited = registry.awaited("rf_m1")
    assert awaited is not None
    assert (awaited.version, awaited.state, awaited.asked) == ("v1", "candidate", "provisional")
    registry.apply(FIRST[1])
    assert registry.awaited("rf_m1") is None
    serving = registry.serving("rf_m1")
    assert serving is not None
    assert (serving.state, serving.from_seq, serving.activated_at, serving.reason) == ("provisional", 7, AT, "first")


def test_an_activation_retires_the_version_before() -> None:
    registry = fold(*FIRST, *SECOND[:2])
    assert [v.version for v in registry.apply(SECOND[2])] == ["v2", "v1"]
    before = registry.find("v1")[0]
    assert (before.state, before.reason, before.by) == ("retired", "replaced by v2", "hand")
    now = registry.serving("rf_m1")
    assert now is not None
    assert (now.version, now.state, now.reason, now.by) == ("v2", "champion", "better", "hand")


def test_rollback_goes_to_the_version_that_served_before() -> None:
    registry = fold(*FIRST)
    assert registry.previous("rf_m1") is None
    registry = fold(*FIRST, *SECOND)
    assert registry.previous("rf_m1") is registry.find("v1")[0]
    back = [event("released", "v1", state="champion"), event("activated", "v1", state="champion", from_seq=120)]
    for one in back:
        registry.apply(one)
    assert registry.previous("rf_m1") is registry.find("v2")[0]
    assert registry.find("v2")[0].state == "retired"


def test_a_refusal_leaves_the_one_that_serves() -> None:
    registry = fold(*FIRST, *SECOND[:2], event("refused", "v2", reason="another SHA-256", by="emitter"))
    serving = registry.serving("rf_m1")
    assert serving is not None
    assert serving.version == "v1"
    assert registry.awaited("rf_m1") is None
    assert (registry.find("v2")[0].state, registry.find("v2")[0].reason) == ("refused", "another SHA-256")
    registry.apply(event("retired", "v1", reason="gone"))
    assert registry.serving("rf_m1") is None


def test_reading_the_events_again_changes_nothing() -> None:
    once, twice = fold(*FIRST, *SECOND), fold(*FIRST, *FIRST, *SECOND, SECOND[2])
    assert once.versions == twice.versions
    assert once.activations == twice.activations
    assert once.serving("rf_m1") == twice.serving("rf_m1")


def test_versions_sort_by_time() -> None:
    names = [version_name(AT + timedelta(seconds=s), b"x") for s in range(3)]
    assert names == sorted(names)
    assert names[0].startswith("20260131T235900Z-")
    assert version_name(AT, b"y") != names[0]


def test_a_manifest_expires_by_market_time() -> None:
    report = {
        "libraries": {},
        "feature_set": "scale_free_v1",
        "inputs": ("a",),
        "symbols": ["X"],
        "first_ts": 0,
        "last_ts": 86_400,
        "rows": 3,
        "threshold": None,
        "max_spread": {"X": None},
        "train_rate": 0.5,
        "outliers": None,
    }
    manifest = build_manifest(
        report, {"f": b"abc"}, name="rf_m1", version="v", timeframe="M1", created_at=AT, expire_days=2
    )
    assert manifest.expires_at == datetime(1970, 1, 4, tzinfo=UTC)
    assert manifest.files["f"].size == 3
    assert manifest.files["f"].sha256.startswith("ba7816bf")
    assert manifest.report["rows"] == 3
