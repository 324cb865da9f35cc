"""Decisions on models between a real nats-server, a real PostgreSQL, the real trainer and the real emitter."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog

from actors.core.manifest import MANIFEST_FILE, ONNX_FILE, PICKLE_FILE, PREDICTIONS_FILE, SIGNATURE_FILE
from actors.core.verdicts import Verdict
from actors.emitter import Emitter
from actors.trainer import Trainer
from bus.client import Bus
from bus.store import Store
from bus.subjects import DECIDE, MODEL_FILES, MODELS, PROMOTE, RETIRE, ROLLBACK
from bus.supervise import Context
from schema.messages import ModelEvent, ModelState
from schema.settings import Models, Settings
from tests import models
from tests.builders import kept, read_until, running
from tests.servers import ROOT
from tests.system import environment

BOTH = (Trainer, Emitter)
KEPT = {ONNX_FILE, PREDICTIONS_FILE, MANIFEST_FILE, SIGNATURE_FILE}  # predictions: what the report is checked by


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    models.trust(tmp_path)
    return Settings(home=str(tmp_path), models=Models(keep=2, shadows=1))


@pytest.fixture
async def store(pg_url: str) -> AsyncIterator[Store]:
    store = await Store.connect(pg_url)
    yield store
    await store.close()


async def ask(bus: Bus, subject: str, **request: Any) -> Verdict:
    return msgspec.json.decode(await bus.request(subject, msgspec.json.encode(request), timeout=60), type=Verdict)


async def decide(bus: Bus, action: str, version: str, against: str | None = None) -> Verdict:
    request = {"model_name": "rf_m1", "version": version, "action": action, "reason": f"{action} {version}"}
    evidence = {"e_value": 123.5, "outcomes": 4_000}
    return await ask(bus, DECIDE, against=against, evidence=evidence, **request)


async def known(bus: Bus, store: Store, seed: int, state: ModelState = "shadow") -> str:
    """A version as a training leaves it: in the object store, in the table, registered."""
    artifacts = models.files(seed)
    manifest = await models.store(bus, artifacts)
    text = artifacts[MANIFEST_FILE].decode()
    await store.execute("upsert_model", "rf_m1", manifest.version, "M1", "candidate", manifest.created_at, text)
    event = ModelEvent(
        event="registered",
        model_name="rf_m1",
        version=manifest.version,
        timeframe="M1",
        at=datetime.now(UTC),
        state=state,
        recipe=manifest.recipe,
    )
    await bus.publish(MODELS, event, "rf_m1", msg_id=f"registered-{manifest.version}-{state}")
    return manifest.version


async def served(bus: Bus, version: str, seed: int, state: ModelState) -> None:
    await models.release(bus, models.files(seed), state)
    await read_until(bus, MODELS, lambda es: any((e.event, e.version) == ("activated", version) for e in es))


async def events(bus: Bus) -> list[tuple[str, str, str, str]]:
    found = [delivery.message for delivery in await kept(bus, MODELS)]
    return [(e.event, e.version, e.state, e.by) for e in found]


async def rows(store: Store) -> list[tuple[str, str, str, dict[str, Any]]]:
    found = await store.pool.fetch("SELECT version, action, by, evidence::text FROM model_decisions ORDER BY at, id")
    return [(r["version"], r["action"], r["by"], json.loads(r["evidence"])) for r in found]


async def states(store: Store) -> dict[str, str]:
    return {record.version: record.state for record in await store.models("rf_m1")}


@pytest.mark.timeout(300)
async def test_a_life_by_evidence(
    bus: Bus, nats_url: str, pg_url: str, store: Store, settings: Settings, tmp_path: Path
) -> None:
    async with running(*BOTH, nats_url=nats_url, database_url=pg_url, settings=settings):
        v1 = await known(bus, store, 1, "candidate")
        await served(bus, v1, 1, "provisional")
        promoted = await decide(bus, "promote", v1, v1)
        assert (promoted.ok, promoted.verdict, promoted.serving) == (True, "champion", True), promoted.message
        before = await events(bus)
        again = await decide(bus, "promote", v1, v1)
        assert (again.ok, again.verdict, again.serving) == (True, "champion", True)
        assert await events(bus) == before, "a repeat changes nothing"

        v2, v3 = await known(bus, store, 2), await known(bus, store, 3, "candidate")
        void = await decide(bus, "promote", v2, "another")
        assert (void.ok, void.verdict) == (False, "invalid")
        assert "the decision is void" in void.message
        taken = await decide(bus, "promote", v2, v1)
        assert (taken.ok, taken.verdict, taken.serving) == (True, "champion", True), taken.message
        assert (await decide(bus, "promote", v2, v1)).ok
        assert ("registered", v3, "shadow", "trainer") in await events(bus), "the place that v2 left is v3's"
        back = await decide(bus, "rollback", v2, v2)
        assert (back.ok, back.version, back.verdict) == (True, v1, "champion"), back.message
        assert (await decide(bus, "rollback", v2, v2)).ok
        down = await decide(bus, "rollback", v1, v1)
        assert (down.ok, down.version, down.verdict, down.serving) == (True, v1, "provisional", True), down.message
        failed = await decide(bus, "retire", v3, v1)
        assert (failed.ok, failed.verdict) == (True, "retired"), failed.message
        assert (await decide(bus, "retire", v3, v1)).ok

        assert await states(store) == {v1: "provisional", v2: "retired", v3: "retired"}
        hand = await ask(bus, PROMOTE, version=v2, reason="I know better (anna)")
        assert (hand.ok, hand.verdict) == (True, "champion"), hand.message
        for subject, request, text in (
            (RETIRE, {"version": v2, "reason": "x"}, "serves: roll back or promote another version first"),
            (RETIRE, {"version": v1}, "reason"),
            (RETIRE, {"version": "v9", "reason": "x"}, "no version v9"),
            (DECIDE, {"model_name": "rf_m1", "version": v1, "action": "praise", "reason": "x"}, "praise"),
            (DECIDE, {"model_name": "rf_m1", "version": v1, "action": "retire", "reason": " "}, "a reason is needed"),
            (DECIDE, {"model_name": "rf_m5", "version": v1, "action": "retire", "reason": "x"}, "of rf_m5"),
        ):
            invalid = await ask(bus, subject, **request)
            assert (invalid.ok, invalid.verdict) == (False, "invalid")
            assert text in invalid.message
        retired = await ask(bus, RETIRE, version=v1, reason="done with it")
        assert (retired.ok, retired.verdict) == (True, "retired"), retired.message
        alone = await ask(bus, ROLLBACK, reason="drifts")
        assert (alone.version, alone.verdict, alone.serving) == (v2, "provisional", True), alone.message
        never = await ask(bus, ROLLBACK, reason="still")
        assert "no earlier version of rf_m1 has served" in never.message

    evidence = {"e_value": 123.5, "outcomes": 4_000}
    expected = [
        (v1, "release", "trainer", {}),  # by the test, in the trainer's name
        (v1, "promote", "scorer", evidence | {"against": v1}),
        (v2, "promote", "scorer", evidence | {"against": v1}),
        (v1, "rollback", "scorer", evidence | {"against": v2}),
        (v1, "rollback", "scorer", evidence | {"against": v1}),
        (v3, "retire", "scorer", evidence | {"against": v1}),
        (v2, "promote", "hand", {"against": v1}),
        (v1, "retire", "hand", {"against": v2}),
        (v2, "rollback", "hand", {"against": v2}),
    ]
    assert await rows(store) == expected
    # Another start reads the same events: the same registry, and no row twice.
    async with running(Trainer, nats_url=nats_url, database_url=pg_url, settings=settings):
        assert "serves" in (await ask(bus, RETIRE, version=v2, reason="x")).message
    assert await rows(store) == expected

    def mt5(*words: str) -> subprocess.CompletedProcess[str]:
        servers = {"MT5_NATS_URL": nats_url, "MT5_DATABASE_URL": pg_url}
        return subprocess.run(
            [sys.executable, "-m", "runner", "models", *words],
            cwd=ROOT,
            env=environment(tmp_path, **servers),
            capture_output=True,
            text=True,
            timeout=60,
        )

    listed = {m["version"]: m for m in json.loads((await asyncio.to_thread(mt5, "list", "--json")).stdout)["models"]}
    assert (listed[v2]["state"], listed[v2]["by_hand"], listed[v1]["state"]) == ("provisional", True, "retired")
    assert listed[v3]["evidence"] == evidence | {"against": v1}
    recipe = models.manifest_of(models.files(1)).recipe
    assert {m["recipe"] for m in listed.values()} == {recipe}
    table = (await asyncio.to_thread(mt5, "list")).stdout
    assert recipe in table
    assert "e_value 123.5, outcomes 4000" in table
    assert "rollback: drifts (by hand)" in table
    shown = json.loads((await asyncio.to_thread(mt5, "show", v2, "--json")).stdout)
    assert [(d["action"], d["by"], d["version"]) for d in shown["decisions"]] == [
        (action, by, version) for version, action, by, e in expected if v2 in (version, e.get("against"))
    ]
    text = (await asyncio.to_thread(mt5, "show", v2)).stdout
    assert "promote by hand" in text
    assert "I know better (anna)" in text
    folder = tmp_path / "models" / "rf_m1" / v2
    done = await asyncio.to_thread(mt5, "restore", "--json")
    assert json.loads(done.stdout)["restored"][0]["path"] == str(folder), done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == models.files(2)
    assert (tmp_path / "models" / "rf_m1.pkl").readlink() == Path("rf_m1") / v2 / PICKLE_FILE
    (tmp_path / "keys" / "models.pub").unlink()
    refused = await asyncio.to_thread(mt5, "restore", v2)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
    assert "[models] public_key" in refused.stderr


@pytest.mark.timeout(120)
async def test_a_trainer_that_dies_in_the_middle_of_a_decision_finishes_it(
    bus: Bus, nats_url: str, pg_url: str, store: Store, settings: Settings
) -> None:
    v1, v2 = await known(bus, store, 1, "candidate"), await known(bus, store, 2)
    async with running(Emitter, nats_url=nats_url, settings=settings):
        await served(bus, v1, 1, "champion")

    def out(version: str) -> Any:
        return lambda heard: any((e.event, e.version) == ("released", version) for e in heard)

    async with running(Trainer, nats_url=nats_url, database_url=pg_url, settings=settings):
        asking = asyncio.create_task(decide(bus, "promote", v2, v1))
        await read_until(bus, MODELS, out(v2))  # and no emitter is there to answer it
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    async with running(Trainer, nats_url=nats_url, database_url=pg_url, settings=settings):
        asking = asyncio.create_task(decide(bus, "promote", v2, v1))
        async with running(Emitter, nats_url=nats_url, settings=settings):
            verdict = await asking
            assert (verdict.ok, verdict.verdict, verdict.serving) == (True, "champion", True), verdict.message
            assert (await decide(bus, "promote", v2, v1)).ok
            assert await states(store) == {v1: "retired", v2: "champion"}
    heard = await events(bus)
    assert [e[0] for e in heard if e[1] == v2] == ["registered", "released", "activated"], "released once"
    assert [(version, action) for version, action, _, _ in await rows(store)] == [(v1, "release"), (v2, "promote")]


async def test_a_refused_promotion_is_told_and_the_champion_goes_on(
    bus: Bus, nats_url: str, pg_url: str, store: Store, settings: Settings
) -> None:
    v1, v2 = await known(bus, store, 1, "candidate"), await known(bus, store, 2)
    objects = await bus.js.object_store(MODEL_FILES)
    await objects.delete(f"rf_m1/{v2}/{SIGNATURE_FILE}")
    async with running(*BOTH, nats_url=nats_url, database_url=pg_url, settings=settings):
        await served(bus, v1, 1, "champion")
        verdict = await decide(bus, "promote", v2, v1)
        assert (verdict.ok, verdict.verdict, verdict.serving) == (False, "refused", False)
        assert "nothing unsigned is loaded: train again" in verdict.message
        assert await states(store) == {v1: "champion", v2: "refused"}
        repeated = await decide(bus, "promote", v2, v1)
        assert (repeated.ok, repeated.verdict) == (False, "invalid")
        assert "is refused" in repeated.message
    assert [action for _, action, _, _ in await rows(store)] == ["release", "promote", "refuse"]


async def test_what_serves_is_restored_at_the_start_and_old_versions_go(
    bus: Bus, pg_url: str, store: Store, settings: Settings, nats_url: str, tmp_path: Path
) -> None:
    """Five versions with [models] keep = 2: one that served and three that never did are older than the newest two."""
    v1 = await known(bus, store, 1, "candidate")
    async with running(Emitter, nats_url=nats_url, settings=settings):
        await served(bus, v1, 1, "provisional")
        v2, v3, v4 = [await known(bus, store, seed, "candidate") for seed in (2, 3, 4)]
        v5 = await known(bus, store, 5, "shadow")
        v6 = await known(bus, store, 6, "candidate")
        await served(bus, v3, 3, "champion")
    home = tmp_path / "models"
    for seed, version in ((1, v1), (2, v2)):
        (home / "rf_m1" / version).mkdir(parents=True)
        for name, data in models.files(seed).items():
            (home / "rf_m1" / version / name).write_bytes(data)
    ready = asyncio.Event()
    trainer = Trainer(Context(settings, bus, pg_url, ready.set, structlog.get_logger()))
    task = asyncio.create_task(trainer.run())
    try:
        async with asyncio.timeout(20):
            await ready.wait()
            await trainer._desk._settled.wait()
            assert (home / "rf_m1.pkl").read_bytes() == models.files(3)[PICKLE_FILE]
            assert {path.name for path in (home / "rf_m1" / v3).iterdir()} == KEPT | {PICKLE_FILE}
            for _ in range(2):  # a second time there is nothing left to do
                await trainer._desk.prune("rf_m1")
                await trainer._desk._settled.wait()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert {path.name for path in (home / "rf_m1").iterdir()} == {v1, v3}
    assert {path.name for path in (home / "rf_m1" / v1).iterdir()} == KEPT, "its signals stay verifiable"
    store_of = await bus.js.object_store(MODEL_FILES)
    left: dict[str, set[str]] = {}
    for entry in await store_of.list(ignore_deletes=True):
        _, version, name = str(entry.name).split("/")
        left.setdefault(version, set()).add(name)
    everything = KEPT | {PICKLE_FILE}
    assert left == {v1: KEPT, v3: everything, v5: everything, v6: everything}
    assert await states(store) == {
        v1: "retired",
        v2: "retired",
        v3: "champion",
        v4: "retired",
        v5: "shadow",
        v6: "candidate",
    }
    pruned = [(version, action) for version, action, _, _ in await rows(store) if action == "prune"]
    assert sorted(pruned) == [(v2, "prune"), (v4, "prune")]
