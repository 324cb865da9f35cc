"""A training's report beside the same figures computed by scikit-learn from the archive's rows, on real files."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from sklearn import metrics

from actors.core.manifest import MANIFEST_FILE, PREDICTIONS_FILE, Manifest
from actors.core.verdicts import Verdict
from actors.emitter import Emitter
from actors.trainer import Trainer
from bus.client import Bus
from bus.store import Store
from bus.subjects import TRAIN
from schema.settings import Settings, Symbol
from schema.settings import Trainer as TrainerSettings
from tests import oracles_ml
from tests.archive import archive_bars
from tests.builders import running

FILES = {"EURUSD": "EURUSD_M1_202201.csv", "GBPUSD": "GBPUSD_M1_201202.csv"}
SPREADS = {"EURUSD": 6.0, "GBPUSD": None}  # points; the first file's are unknown, the second has its own
ROWS = """
SELECT symbol, extract(epoch FROM ts)::int8 AS ts, fwd_ret_5, ready FROM features
WHERE timeframe = 'M1' AND symbol = $1 ORDER BY ts
"""
BARS = """
SELECT extract(epoch FROM ts)::int8 AS ts, open, close, spread FROM market_data
WHERE timeframe = 'M1' AND symbol = $1 ORDER BY ts
"""
CLOSE = 1e-9


@pytest.fixture
async def store(pg_url: str) -> AsyncIterator[Store]:
    store = await Store.connect(pg_url)
    yield store
    await store.close()


@dataclass
class Out:
    """Out-of-sample rows: predictions joined with what the archive says came true, all in numpy."""

    symbol: np.ndarray
    fold: np.ndarray
    votes: np.ndarray
    prob: np.ndarray
    logistic: np.ndarray
    base: np.ndarray
    champion: np.ndarray
    ret: np.ndarray
    trade: np.ndarray
    long_cost: np.ndarray
    short_cost: np.ndarray


async def archived(store: Store, predictions: bytes) -> Out:
    with np.load(io.BytesIO(predictions), allow_pickle=False) as file:
        p = {name: file[name] for name in file.files}
    names = p["symbols"][p["symbol"]]
    ret, trade, long, short = (np.full(len(names), np.nan) for _ in range(4))
    async with store.connection() as connection:
        for symbol in FILES:
            rows = {r["ts"]: r for r in await connection.fetch(ROWS, symbol)}
            bars = [dict(r) for r in await connection.fetch(BARS, symbol)]
            at = {bar["ts"]: i for i, bar in enumerate(bars)}
            for k in np.flatnonzero(names == symbol).tolist():
                ts = int(p["ts"][k])
                assert rows[ts]["ready"]
                ret[k] = rows[ts]["fwd_ret_5"]
                entry, leave = bars[at[ts] + 1], bars[at[ts] + 5]
                trade[k] = leave["close"] / entry["open"] - 1
                for out, bar in ((long, entry), (short, leave)):
                    spread = bar["spread"] or SPREADS[symbol]
                    out[k] = np.nan if spread is None else 1.5 * spread * 1e-5 / bar["close"]
    return Out(
        names, p["fold"], p["votes"], p["prob"], p["logistic"], p["base_rate"], p["champion"], ret, trade, long, short
    )


def within(out: Out, score: np.ndarray, rows: np.ndarray) -> float:
    """AUC within fold and symbol, by scikit-learn, weighted by rows."""
    total, weight = 0.0, 0
    for fold in np.unique(out.fold):
        for symbol in FILES:
            own = rows & (out.fold == fold) & (out.symbol == symbol)
            up = out.ret[own] > 0
            if up.any() and not up.all():
                total += metrics.roc_auc_score(up, score[own]) * own.sum()
                weight += int(own.sum())
    return total / weight


def check(report: dict[str, Any], out: Out) -> None:
    scored = out.ret != 0
    up = out.ret[scored] > 0
    assert report["test_rows"] == scored.sum()
    assert report["auc"] == pytest.approx(within(out, out.votes, scored), abs=CLOSE)
    for figures, score, prob in (
        (report, out.votes, out.prob),
        (report["baselines"]["logistic"], out.logistic, out.logistic),
        (report["baselines"]["base_rate"], out.base, out.base),
    ):
        assert figures["auc"] == pytest.approx(within(out, score, scored), abs=CLOSE)
        assert figures["brier"] == pytest.approx(metrics.brier_score_loss(up, prob[scored]), abs=CLOSE)
        assert figures["log_loss"] == pytest.approx(metrics.log_loss(up, prob[scored]), abs=CLOSE)
        for name in ("auc", "brier", "log_loss"):
            low, high = figures[f"{name}_ci"]
            assert low <= figures[name] <= high
    assert report["hit_rate"] == pytest.approx(metrics.accuracy_score(up, out.prob[scored] >= 0.5), abs=CLOSE)
    for fold in report["folds"]:
        own = scored & (out.fold == fold["fold"])
        assert fold["test_rows"] == own.sum()
        assert fold["auc"] == pytest.approx(within(out, out.votes, own), abs=CLOSE)
        assert fold["brier"] == pytest.approx(metrics.brier_score_loss(out.ret[own] > 0, out.prob[own]), abs=CLOSE)
        assert fold["log_loss"] == pytest.approx(metrics.log_loss(out.ret[own] > 0, out.prob[own]), abs=CLOSE)


def check_curve(report: dict[str, Any], out: Out) -> None:
    scored = out.ret != 0
    prob, up = out.prob[scored], out.ret[scored] > 0
    edges = np.unique(np.quantile(prob, np.arange(11) / 10))
    curve = report["calibration_curve"]
    assert 5 < len(curve) <= 10
    assert sum(b["count"] for b in curve) == len(prob)
    for b, low, high in zip(curve, edges[:-1], edges[1:], strict=True):
        own = (prob >= low) & ((prob <= high) if high == edges[-1] else (prob < high))
        assert (b["low"], b["high"], b["count"]) == (pytest.approx(low), pytest.approx(high), own.sum())
        assert b["mean_prob"] == pytest.approx(prob[own].mean(), abs=CLOSE)
        assert b["rate"] == pytest.approx(up[own].mean(), abs=CLOSE)


def check_trades(report: dict[str, Any], out: Out) -> None:
    assert len(report["candidates"]) >= 5
    for candidate in report["candidates"]:
        t = candidate["threshold"]
        long = out.prob >= t
        short = (out.prob <= 1 - t) & ~long
        gross = np.concatenate([out.trade[long], -out.trade[short]])
        net = np.concatenate([out.trade[long] - out.long_cost[long], -out.trade[short] - out.short_cost[short]])
        known = np.isfinite(net)
        assert candidate["trades"] == known.sum()
        assert candidate["hit_rate"] == pytest.approx((gross > 0).mean(), abs=CLOSE)
        assert candidate["gross_mean"] == pytest.approx(gross.mean(), abs=CLOSE)
        assert candidate["net_mean"] == pytest.approx(net[known].mean(), abs=CLOSE * 1e-3)
        assert candidate["net_ci"][0] < candidate["net_low"] < candidate["net_mean"] < candidate["net_ci"][1]
    assert report["threshold"] is None, "honest costs leave no edge on these files"


@pytest.mark.slow
@pytest.mark.timeout(400)  # the children run at low priority: a busy machine starves them
async def test_figures_are_scikit_learns_on_the_archives_rows(
    bus: Bus, nats_url: str, pg_url: str, store: Store, data: Path, tmp_path: Path
) -> None:
    series = {symbol: oracles_ml.file_bars(name) for symbol, name in FILES.items()}
    newest = {symbol: len(bars.ts) - 4_000 for symbol, bars in series.items()}
    for symbol, bars in series.items():
        await archive_bars(store, symbol, oracles_ml.Bars(*(column[: newest[symbol]] for column in bars)))
    settings = Settings(
        home=str(tmp_path),
        trainer=TrainerSettings(trees=12, folds=3),
        symbols={symbol: Symbol(point=1e-5, spread=SPREADS[symbol]) for symbol in FILES},
    )

    async def train() -> tuple[Verdict, Manifest, bytes]:
        answer = await bus.request(TRAIN, b'{"timeframe": "M1"}', timeout=300)
        verdict = msgspec.json.decode(answer, type=Verdict)
        assert verdict.ok, verdict.message
        folder = Path(str(verdict.path))
        manifest = msgspec.json.decode((folder / MANIFEST_FILE).read_bytes(), type=Manifest)
        return verdict, manifest, (folder / PREDICTIONS_FILE).read_bytes()

    # The computations hold up the loop that the actors run in: they come when no actor runs.
    async with running(Trainer, Emitter, nats_url=nats_url, database_url=pg_url, settings=settings):
        first, manifest, predictions = await train()
    out = await archived(store, predictions)
    report = manifest.report
    check(report, out)
    check_curve(report, out)
    check_trades(report, out)
    assert np.isnan(out.champion).all()
    assert set(report["guard"]["prefix"]["from_first_bar"]) == set(FILES)
    assert report["outliers"]["train_rate"] < 0.002
    assert report["outliers"]["validation_rate"] < 0.05

    # The whole files: what serves by now is judged on what came after its rows.
    for symbol, bars in series.items():
        await archive_bars(store, symbol, bars)
    async with running(Trainer, Emitter, nats_url=nats_url, database_url=pg_url, settings=settings):
        _, manifest, predictions = await train()
    out = await archived(store, predictions)
    check(manifest.report, out)
    beside = manifest.report["baselines"]["champion"]
    rows = np.isfinite(out.champion) & (out.ret != 0)
    assert beside["version"] == first.version
    assert beside["rows"] == rows.sum() > 2_000
    up = out.ret[rows] > 0
    assert set(out.symbol[rows]) == {"EURUSD"}, "GBPUSD's rows of 2012 are all older than the champion's newest"
    assert beside["auc"] == pytest.approx(within(out, out.champion, rows), abs=CLOSE)
    assert beside["brier"] == pytest.approx(metrics.brier_score_loss(up, out.champion[rows]), abs=CLOSE)
    assert beside["log_loss"] == pytest.approx(metrics.log_loss(up, out.champion[rows]), abs=CLOSE)
    assert beside["model"]["auc"] == pytest.approx(within(out, out.votes, rows), abs=CLOSE)
    assert beside["model"]["brier"] == pytest.approx(metrics.brier_score_loss(up, out.prob[rows]), abs=CLOSE)
    nested = manifest.report["nested"]
    assert (nested["trades"], manifest.report["folds"][0]["chosen"]["threshold"]) == (0, None)
    equity = manifest.report["equity"]
    assert equity["edge"] is False
    assert {len(equity[name]) for name in ("ts", "model", "buy_hold")} == {500}
    assert [len(line) for line in equity["random"]] == [500, 500]
