"""The trainer between a real nats-server, a real PostgreSQL and the real emitter."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import joblib
import msgspec
import numpy as np
import psutil
import pytest
import structlog

from actors.core.inputs import SCALE_FREE_V1
from actors.core.manifest import ARTIFACTS, Manifest
from actors.core.serving import ServedModel
from actors.core.verdicts import Progress, Verdict
from actors.emitter import Emitter
from actors.trainer import Trainer
from bus.client import Bus
from bus.store import Store
from bus.subjects import MODELS, PROMOTE, ROLLBACK, TRAIN
from bus.supervise import Context
from schema.messages import FeatureRow, ModelEvent
from schema.settings import Settings, Symbol
from schema.settings import Trainer as TrainerSettings
from tests import oracles_ml
from tests.archive import archive_bars
from tests.builders import kept, read_until, running

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    trainer = TrainerSettings(min_rows=2_000, trees=12, folds=3)
    return Settings(home=str(tmp_path), trainer=trainer, symbols={"EURUSD.m": Symbol(point=1e-5)})


@pytest.fixture
async def store(pg_url: str) -> AsyncIterator[Store]:
    store = await Store.connect(pg_url)
    yield store
    await store.close()


async def load(store: Store, symbol: str, bars: int, seed: int = 1) -> list[FeatureRow]:
    """The bars and feature rows of a market with an edge, as the recorder would archive them."""
    return await archive_bars(store, symbol, oracles_ml.leaning(bars, seed=seed, lean=0.12))


async def ask(bus: Bus, subject: str, **request: Any) -> Verdict:
    answer = await bus.request(subject, msgspec.json.encode(request), timeout=200)
    return msgspec.json.decode(answer, type=Verdict)


async def metrics(store: Store) -> list[dict[str, Any]]:
    rows = await store.pool.fetch("SELECT model_name, metrics::text AS metrics FROM model_metrics ORDER BY id")
    return [json.loads(row["metrics"]) for row in rows]


@pytest.mark.slow
@pytest.mark.timeout(300)  # the children run at low priority: a busy machine starves them
async def test_a_models_life(bus: Bus, nats_url: str, pg_url: str, store: Store, settings: Settings) -> None:
    rows = await load(store, "EURUSD.m", 3_500)
    await load(store, "thin", 500)
    home = Path(settings.home)
    link = home / "models" / "rf_m1.pkl"
    async with running(Trainer, Emitter, nats_url=nats_url, database_url=pg_url, settings=settings):
        inbox, heard = bus.nc.new_inbox(), []

        async def hear(message: Any) -> None:
            heard.append(msgspec.json.decode(message.data, type=Progress))

        await bus.nc.subscribe(inbox, cb=hear)
        first = await ask(bus, TRAIN, timeframe="1m", seed=3, progress=inbox)
        assert first.ok, first.message
        assert (first.verdict, first.serving, first.model_name) == ("provisional", True, "rf_m1")
        assert first.auc is not None
        assert first.rows == 3_500 - 299 - 5
        stages = [p.stage for p in heard]
        assert stages[0] == "read"
        assert stages[-1] == "release"
        assert "fold 2 of 3" in stages

        folder = home / "models" / "rf_m1" / str(first.version)
        assert first.path == str(folder)
        assert {p.name for p in folder.iterdir()} == {*ARTIFACTS, "manifest.json", "manifest.sig"}
        manifest = msgspec.json.decode((folder / "manifest.json").read_bytes(), type=Manifest)
        for name, file in manifest.files.items():
            data = (folder / name).read_bytes()
            assert (sha256(data).hexdigest(), len(data)) == (file.sha256, file.size)
            assert await bus.get_object(f"rf_m1/{first.version}/{name}") == data
        assert manifest.symbols == ("EURUSD.m",)
        assert manifest.report["left_out"] == {}
        assert manifest.report["guard"]["prefix"]["from_first_bar"] == ["EURUSD.m"]
        assert manifest.report["baselines"]["champion"] is None
        assert manifest.outliers is not None
        assert manifest.base_rate == manifest.report["train_rate"]
        assert manifest.last_ts == rows[-6].ts
        assert (manifest.expires_at - manifest.last_ts).days == 90
        assert set(manifest.libraries) >= {"python", "scikit-learn", "onnxruntime", "skl2onnx", "numpy"}
        assert link.readlink() == Path("rf_m1") / str(first.version) / "model.pkl"
        model, served = joblib.load(link), ServedModel(manifest, (folder / "model.onnx").read_bytes())
        inputs = SCALE_FREE_V1.of_row(rows[-1])
        assert served.prob_up("EURUSD.m", rows[-1]) == pytest.approx(model.predict_proba(inputs)[0, 1], abs=1e-5)
        assert not list((home / "models").rglob(".run-*"))

        second = await ask(bus, TRAIN, timeframe="M1", seed=4)
        assert (second.ok, second.verdict, second.serving) == (True, "shadow", False)
        assert str(second.version) in second.message
        beside = msgspec.json.decode((Path(str(second.path)) / "manifest.json").read_bytes(), type=Manifest).report
        # The champion learnt from these very rows: there are none on which it could be compared fairly.
        assert (beside["baselines"]["champion"], beside["champion_note"]) == (None, "")
        assert link.readlink().parts[1] == first.version

        promoted = await ask(bus, PROMOTE, version=second.version, reason="looks better")
        assert (promoted.verdict, promoted.serving) == ("champion", True), promoted.message
        assert link.readlink().parts[1] == second.version
        states = {m.version: m for m in await store.models("rf_m1")}
        assert (states[str(second.version)].state, states[str(first.version)].state) == ("champion", "retired")
        assert (states[str(second.version)].reason, states[str(second.version)].by) == ("looks better", "hand")
        assert states[str(second.version)].from_seq == promoted.from_seq
        assert states[str(first.version)].manifest["version"] == first.version

        back = await ask(bus, ROLLBACK, reason="worse after all")
        assert (back.version, back.verdict, back.serving) == (first.version, "champion", True), back.message
        assert link.readlink().parts[1] == first.version
        states = {m.version: m for m in await store.models("rf_m1")}
        assert (states[str(first.version)].state, states[str(first.version)].reason) == (
            "champion",
            "rollback: worse after all",
        )

        refused = await ask(bus, TRAIN, timeframe="M5")
        assert (refused.ok, refused.verdict) == (False, "refused")
        assert "Too few rows: 2000 ready rows" in refused.message
        for request, text in (
            ({"timeframe": "M7"}, "'M7' is no timeframe"),
            ({"timeframe": "M1", "tree": 1}, "unknown field"),
            ({"timeframe": "M1", "progress": "signals.M1.X"}, "inbox"),
        ):
            invalid = await ask(bus, TRAIN, **request)
            assert invalid.verdict == "invalid"
            assert text in invalid.message
        for request, text in (
            ({"version": first.version, "reason": " "}, "a reason is needed"),
            ({"version": first.version}, "reason"),
            ({"version": "nope", "reason": "x"}, "no version nope"),
            ({"reason": "x"}, "name the version"),
            ({"version": first.version, "reason": "x"}, "is the champion already"),
        ):
            invalid = await ask(bus, PROMOTE, **request)
            assert invalid.verdict == "invalid"
            assert text in invalid.message

    runs = await metrics(store)
    assert [(r["verdict"], r["version"], r["rows"]) for r in runs] == [
        ("provisional", first.version, first.rows),
        ("shadow", second.version, second.rows),
        ("refused", None, 0),
    ]
    assert runs[0]["auc"] == first.auc
    assert runs[0]["brier"] == first.brier
    assert len(runs[0]["folds"]) == 3
    events = await read_until(bus, MODELS, lambda m: len(m) == 7)
    assert [(e.event, e.version, e.by) for e in events] == [
        ("released", first.version, "trainer"),
        ("activated", first.version, "emitter"),
        ("registered", second.version, "trainer"),
        ("released", second.version, "hand"),
        ("activated", second.version, "emitter"),
        ("released", first.version, "hand"),
        ("activated", first.version, "emitter"),
    ]
    traces = [delivery.headers for delivery in await kept(bus, MODELS)]
    ids = [headers["traceparent"].split("-")[1] for headers in traces]
    assert ids[0] == ids[1] != ids[2], "an activation goes on with the trace of its release"


async def test_what_happened_while_it_was_away_is_caught_up_with(
    bus: Bus, nats_url: str, pg_url: str, store: Store, settings: Settings
) -> None:
    at = datetime.now(UTC)
    for version in ("v1", "v2"):
        await store.execute("upsert_model", "rf_m1", version, "M1", "candidate", at, "{}")
        pickle = Path(settings.home) / "models" / "rf_m1" / version / "model.pkl"
        pickle.parent.mkdir(parents=True)
        pickle.write_bytes(b"")
    (Path(settings.home) / "models" / "rf_m1" / ".run-dead").mkdir()
    for i, (event, version) in enumerate(
        [("released", "v1"), ("activated", "v1"), ("released", "v2"), ("activated", "v2")]
    ):
        message = ModelEvent(
            event=event,
            model_name="rf_m1",
            version=version,
            timeframe="M1",
            at=at,
            state="champion",
            from_seq=i,
            reason="r",
        )  # type: ignore[arg-type]
        await bus.publish(MODELS, message, "rf_m1", msg_id=str(i))
    async with running(Trainer, nats_url=nats_url, database_url=pg_url, settings=settings):
        invalid = await ask(bus, PROMOTE, version="v2", reason="x")  # it knows who serves as soon as it answers
        assert "is the champion already" in invalid.message
        async with asyncio.timeout(10):
            while {m.version: m.state for m in await store.models()} != {"v1": "retired", "v2": "champion"}:
                await asyncio.sleep(0.02)
            while not (Path(settings.home) / "models" / "rf_m1.pkl").exists():
                await asyncio.sleep(0.02)
    assert not (Path(settings.home) / "models" / "rf_m1" / ".run-dead").exists()


async def test_one_run_at_a_time_and_a_stop_ends_it(bus: Bus, pg_url: str, store: Store, settings: Settings) -> None:
    await load(store, "EURUSD.m", 3_500)
    slow = msgspec.structs.replace(settings, trainer=msgspec.structs.replace(settings.trainer, trees=5_000))
    ready = asyncio.Event()
    trainer = Trainer(Context(slow, bus, pg_url, ready.set, structlog.get_logger()))
    task = asyncio.create_task(trainer.run())
    async with asyncio.timeout(20):
        await ready.wait()
    request = b'{"timeframe": "M1"}'
    running_one = asyncio.create_task(trainer._on_train(request))
    me = psutil.Process()
    async with asyncio.timeout(30):
        while not (children := [c for c in me.children() if "spawn_main" in " ".join(c.cmdline())]):
            await asyncio.sleep(0.02)
    busy = msgspec.json.decode(await trainer._on_train(request), type=Verdict)
    assert (busy.verdict, busy.ok) == ("busy", False)
    started = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - started < 5
    stopped = msgspec.json.decode(await running_one, type=Verdict)
    assert stopped.verdict == "failed"
    assert "stopping" in stopped.message
    assert not psutil.wait_procs(children, timeout=5)[1]
    assert await metrics(store) == []


class SoonAndThenNever:
    """A schedule whose first slot is now."""

    def __init__(self) -> None:
        self.slots = [datetime.now(UTC)]

    def next_run(self, after: datetime) -> datetime:
        return self.slots.pop() if self.slots else after + timedelta(days=1)


async def test_a_scheduled_run_that_meets_another_one_comes_after_it(
    bus: Bus, pg_url: str, store: Store, settings: Settings
) -> None:
    both = msgspec.structs.replace(settings, trainer=msgspec.structs.replace(settings.trainer, timeframes=("M1", "M5")))
    trainer = Trainer(Context(both, bus, pg_url, lambda: None, structlog.get_logger()))
    asked = asyncio.create_task(trainer._on_train(b'{"timeframe": "M15"}'))
    await asyncio.sleep(0)  # it is in the queue before anything runs
    trainer._schedule = SoonAndThenNever()  # type: ignore[assignment]
    task = asyncio.create_task(trainer.run())
    try:
        async with asyncio.timeout(60):
            first = msgspec.json.decode(await asked, type=Verdict)
            while len(await metrics(store)) < 3:
                await asyncio.sleep(0.02)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert (first.model_name, first.verdict) == ("rf_m15", "refused")
    names = [row["model_name"] for row in await store.pool.fetch("SELECT model_name FROM model_metrics ORDER BY id")]
    assert names == ["rf_m15", "rf_m1", "rf_m5"], "each of the slot's timeframes, once and in order"


CHILD = """
import asyncio, sys
from actors.workshop.child import Job, run_child
async def tell(progress):
    print(progress.stage, flush=True)
asyncio.run(run_child(Job(folder=sys.argv[1], symbols=["X"], options={"bar_seconds": 60, "trees": 5000, "min_rows": 1000}), tell))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)  # the children run at low priority: a busy machine starves them
def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    data = oracles_ml.dataset({"X": oracles_ml.random_walk(4_000, seed=1)})
    packed = np.column_stack([data.columns.close, data.spread, *data.columns[2:], data.fwd_ret_5, *data.bars])
    kind = np.dtype([("ts", "<i8"), ("values", "<f8", (packed.shape[1],))])
    rows = np.empty(len(packed), kind)
    rows["ts"], rows["values"] = data.columns.ts, packed
    (tmp_path / "0.rows").write_bytes(rows.tobytes())
    parent = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"guard\n"
        assert parent.stdout.readline().startswith(b"fold 1")
        children = psutil.Process(parent.pid).children(recursive=True)
        training = [c for c in children if "spawn_main" in " ".join(c.cmdline())]
        assert len(training) == 1
        assert training[0].nice() >= 10
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait(5)
        assert not psutil.wait_procs(children, timeout=5)[1]
    finally:
        parent.kill()
        parent.wait()
        if parent.stdout is not None:
            parent.stdout.close()
