"""A model's way on real candles: trained on most of a file, serving the rest, one signal a candle wherever one looks."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest

from actors.core.files import decode_lines, read_bars
from actors.core.manifest import ARTIFACTS, MANIFEST_FILE, ONNX_FILE, PICKLE_FILE, Manifest
from actors.core.series import SeriesState, append
from actors.core.serving import ServedModel
from schema.messages import Signal, SignalList
from tests.acceptance.conftest import Make
from tests.builders import LIVE
from tests.system import MARKET, System, cut

pytestmark = pytest.mark.timeout(400)

FILE, SYMBOL, BARS, NEWEST = "EURUSD_M1_202201.csv", "EURUSD", 49_993, 2_000
NAME = "rf_m1"


@dataclass
class Trained:
    """A running system whose first model was trained on all but the newest bars of the file."""

    system: System
    file: Path
    verdict: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.system.home / "models" / NAME / str(self.verdict["version"])

    @property
    def manifest(self) -> Manifest:
        return msgspec.json.decode((self.folder / MANIFEST_FILE).read_bytes(), type=Manifest)


def train(system: System) -> dict[str, Any]:
    done = system.mt5("train", "--timeframe", "M1", "--json", timeout=240)
    assert done.returncode == 0, done.stderr + done.stdout
    verdict: dict[str, Any] = json.loads(done.stdout)
    return verdict


def check_figures(verdict: dict[str, Any], manifest: Manifest) -> None:
    report = manifest.report
    low, high = report["auc_ci"]
    assert 0.48 <= report["auc"] <= 0.58  # far above would be a leak
    assert low < report["auc"] < high
    assert high - low < 0.08
    assert (verdict["auc"], verdict["auc_ci"], verdict["rows"]) == (report["auc"], [low, high], report["rows"])


@pytest.fixture(scope="module")
def trained(make: Make, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    system = make(*MARKET)
    system.start()
    older = cut(data / FILE, tmp_path_factory.mktemp("data") / "older.csv", 0, BARS - NEWEST)
    said = system.replay(older, SYMBOL, "M1", "--history")
    assert said["accepted"] == BARS - NEWEST
    system.settle()
    assert system.counts(SYMBOL) == {"market_data": BARS - NEWEST, "features": BARS - NEWEST, "model_signals": 0}
    return Trained(system, data / FILE, train(system))


@pytest.mark.slow
def test_the_first_version_serves_provisionally_and_is_kept_whole_everywhere(trained: Trained) -> None:
    system, verdict, folder, manifest = trained.system, trained.verdict, trained.folder, trained.manifest
    version = verdict["version"]
    assert (verdict["verdict"], verdict["serving"], verdict["model_name"]) == ("provisional", True, NAME)
    check_figures(verdict, manifest)
    assert verdict["rows"] > 45_000
    assert manifest.symbols == (SYMBOL,)
    # The files, the link to the pickle, and the object store's copies are the manifest's.
    assert (system.home / "models" / f"{NAME}.pkl").resolve() == (folder / PICKLE_FILE).resolve()
    assert set(manifest.files) == set(ARTIFACTS)
    for name, entry in manifest.files.items():
        stored = (folder / name).read_bytes()
        assert (sha256(stored).hexdigest(), len(stored)) == (entry.sha256, entry.size)

    async def copies() -> dict[str, bytes]:
        async with system.bus() as bus:
            names = (*ARTIFACTS, MANIFEST_FILE)
            return {name: await bus.get_object(f"{NAME}/{version}/{name}") for name in names}

    for name, stored in asyncio.run(copies()).items():
        assert stored == (folder / name).read_bytes()
    # The archive and the readers agree.
    rows = system.fetch("SELECT model_name, metrics FROM model_metrics ORDER BY id")
    assert rows[0]["model_name"] == NAME
    metrics = json.loads(rows[0]["metrics"])
    for name in ("auc", "auc_ci", "brier", "rows"):
        assert metrics[name] == manifest.report[name]
    assert (metrics["version"], metrics["verdict"]) == (version, "provisional")
    assert len(metrics["folds"]) >= 3
    (row,) = system.fetch("SELECT state, from_seq FROM models WHERE version = $1", version)
    assert tuple(row) == ("provisional", verdict["from_seq"])
    listed = json.loads(system.mt5("models", "list", "--json").stdout)["models"]
    assert [m["version"] for m in listed if m["state"] == "provisional"] == [version]
    assert system.get(f"/models/{NAME}")["serving"] == version


def archived(system: System) -> list[Signal]:
    rows = system.fetch("SELECT * FROM model_signals WHERE symbol = $1 ORDER BY ts", SYMBOL)
    fields = Signal.__struct_fields__
    return [msgspec.convert({name: row[name] for name in fields}, Signal) for row in rows]


def served(system: System) -> list[Signal]:
    answer = system.get(f"/signals?timeframe=M1&symbol={SYMBOL}&limit={NEWEST + 500}")
    return list(reversed(msgspec.convert(answer, SignalList).signals))


@pytest.mark.slow
def test_the_newest_candles_have_one_signal_each_the_same_everywhere(trained: Trained, tmp_path: Path) -> None:
    system = trained.system
    newest = cut(trained.file, tmp_path / "newest.csv", BARS - NEWEST, BARS)
    assert system.replay(newest, SYMBOL, "M1")["accepted"] == NEWEST
    system.settle()
    with trained.file.open("rb") as file:
        bars = [bar for chunk in read_bars(decode_lines(iter(file))) for bar in chunk]
    rows = append(SeriesState(SYMBOL, "M1"), bars, LIVE).rows[-NEWEST:]
    streamed = system.streamed_signals(SYMBOL, "M1")
    assert [s.ts for s in streamed] == [row.ts for row in rows]
    assert len({s.id for s in streamed}) == NEWEST
    assert archived(system) == streamed
    assert served(system) == streamed
    assert {(s.model_name, s.model_version, s.abstain, s.label) for s in streamed} == {
        (NAME, trained.verdict["version"], "unproven", 0)
    }
    model = ServedModel(trained.manifest, (trained.folder / ONNX_FILE).read_bytes())
    assert [s.prob_up for s in streamed] == [model.prob_up(SYMBOL, row) for row in rows]
    # Sent again, and after a restart: the same signals, not one more.
    assert system.replay(newest, SYMBOL, "M1")["rejected"] == 0
    assert system.stop() < 10
    system.start()
    system.replay(newest, SYMBOL, "M1")
    system.settle()
    assert system.streamed_signals(SYMBOL, "M1") == streamed
    assert archived(system) == served(system) == streamed
    assert "Traceback" not in system.logs()


@pytest.mark.torture
def test_a_training_on_the_whole_file_is_a_shadow_beside_the_one_that_serves(trained: Trained) -> None:
    system = trained.system
    system.replay(trained.file, SYMBOL, "M1", "--history")
    system.settle()
    assert system.counts(SYMBOL)["features"] == BARS
    verdict = train(system)
    assert (verdict["verdict"], verdict["serving"]) == ("shadow", False)
    check_figures(verdict, Trained(system, trained.file, verdict).manifest)
    assert verdict["rows"] > trained.verdict["rows"]
    link = system.home / "models" / f"{NAME}.pkl"
    assert link.resolve() == (trained.folder / PICKLE_FILE).resolve()
    versions = [row["version"] for row in system.fetch("SELECT metrics->>'version' AS version FROM model_metrics")]
    assert versions == [trained.verdict["version"], verdict["version"]]
