"""A backtest's figures against plain arithmetic on the file's bars, and what a file's name says."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sklearn.metrics import brier_score_loss, roc_auc_score

from actors.core.backtest import Backtest, Serving, Taken
from actors.core.backtested import Model, Results
from actors.core.clocks import Clocks
from actors.core.manifest import ONNX_FILE
from actors.core.serving import ServedModel
from actors.terminal import at_once, encode
from bus.ledger import zone_steps
from commands.backtest import _named
from schema.messages import Candle, ModelState, Signal
from schema.settings import Symbol
from tests.builders import walk
from tests.models import files, manifest_of

NOW = datetime(2026, 1, 5, tzinfo=UTC)
POINT = 0.00001


@dataclass
class Run:
    taken: Taken
    signals: list[Signal]
    results: Results


def run(bars: list[Candle], *, symbol: Symbol | None = None, seen: datetime, state: ModelState = "champion") -> Run:
    """Everything posted as a replay posts it; ``seen`` is the newest bar that the model is said to have learnt from."""
    artifacts = files()
    manifest = msgspec.structs.replace(manifest_of(artifacts), threshold=0.505, max_spread={})
    symbols = {"EURUSD": symbol or Symbol(point=POINT)}
    system = Backtest(
        Clocks({}, (), zone_steps, NOW.timestamp()),
        symbols,
        {"M1": Serving(ServedModel(manifest, artifacts[ONNX_FILE]), state)},
        lambda timeframe: f"rf_{timeframe.lower()}",
    )
    out = Run(Taken(), [], Results(symbols, {"M1": Model(0.48, seen)}))
    for start in range(0, len(bars), 1_000):
        taken, steps = system.post(encode("EURUSD", "M1", bars[start : start + 1_000], at_once()), NOW)
        out.taken = out.taken.plus(taken)
        for step in steps:
            out.results.take(step)
            out.signals += step.signals
    return out


def expected(bars: list[Candle], signals: list[Signal], after: datetime | None = None) -> dict[str, Any]:
    """The same figures from the bars as they lie in the file, one signal after the other."""
    at = {bar.ts: i for i, bar in enumerate(bars)}
    ups, probs, wins, gross, net = [], [], [], [], []
    outcomes = ties = 0
    for signal in signals:
        i = at[signal.ts]
        if signal.prob_up is None or i + 5 >= len(bars) or (after is not None and signal.ts <= after):
            continue
        entry, leave = bars[i + 1], bars[i + 5]
        if leave.ts - signal.ts > timedelta(minutes=10):
            continue
        outcomes += 1
        move = leave.close - bars[i].close
        if move == 0:
            ties += 1
        else:
            ups.append(move > 0)
            probs.append(signal.prob_up)
        if signal.label:
            wins.append(signal.label * move > 0)
            gross.append(signal.label * (leave.close / entry.open - 1))
            pays = entry if signal.label == 1 else leave
            net.append(gross[-1] - 1.5 * pays.spread * POINT / pays.close)
    return {
        "outcomes": outcomes,
        "ties": ties,
        "auc": roc_auc_score(ups, probs),
        "brier": brier_score_loss(ups, probs),
        "brier_base_rate": brier_score_loss(ups, [0.48] * len(ups)),
        "hit_rate": sum((p >= 0.5) == up for p, up in zip(probs, ups, strict=True)) / len(ups),
        "rises": sum(ups) / len(ups),
        "trades": len(wins),
        "won": sum(wins) / len(wins),
        "gross_mean": sum(gross) / len(gross),
        "net_trades": len(net),
        "net_mean": sum(net) / len(net),
    }


def test_figures_are_those_of_the_bars() -> None:
    bars = walk(2_500, gaps=0.05)
    seen = bars[1_200].ts
    done = run(bars, seen=seen)
    found = done.results.outcomes()
    for part, after in (("all", None), ("unseen", seen + timedelta(minutes=10))):
        wanted = expected(bars, done.signals, after)
        assert {key: found[part][key] for key in wanted} == pytest.approx(wanted, rel=1e-9)
        low, high = found[part]["auc_ci"]
        assert low < found[part]["auc"] < high
        assert wanted["trades"] > 500
        assert wanted["ties"] > 5
    assert found["unseen"]["outcomes"] < found["all"]["outcomes"]


def test_a_correction_takes_the_place_of_what_was_said_before() -> None:
    bars = walk(1_010)
    other = msgspec.structs.replace(bars[600], close=bars[600].close + 3e-5, high=bars[600].high + 5e-5)
    done = run([*bars[:1_000], other, *bars[1_000:]], seen=bars[0].ts)
    now = [*bars[:600], other, *bars[601:]]
    standing = list({signal.ts: signal for signal in done.signals}.values())
    wanted = expected(now, standing)
    found = done.results.outcomes()["all"]
    assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-9)
    counts = done.results.counts()
    assert counts["signals"] == len(done.signals)
    assert counts["superseded"] == len(done.signals) - 1_010 > 300
    assert sum(counts["labels"].values()) == 1_010


def test_without_a_point_there_is_no_net_return() -> None:
    bars = walk(600)
    found = run(bars, symbol=Symbol(), seen=bars[0].ts).results.outcomes()["all"]
    assert (found["net_trades"], found["net_mean"]) == (0, None)
    assert found["gross_mean"] is not None


def test_where_nothing_is_known_there_are_no_figures() -> None:
    bars = walk(50)  # too few to be ready
    done = run(bars, seen=bars[-1].ts)
    for part in done.results.outcomes().values():
        assert (part["outcomes"], part["auc"], part["brier"], part["trades"]) == (0, None, None, 0)
    assert done.results.counts()["abstain"] == {"warming": 50}


def test_repeats_and_bad_bars_are_counted_as_a_gateway_counts_them() -> None:
    bars = walk(40)
    bad = msgspec.structs.replace(bars[39], high=bars[39].low / 2)
    done = run([*bars[:39], bars[38], bad], seen=bars[0].ts)
    assert done.taken._replace(reason=None) == Taken(41, 39, 1, 0, 1)
    assert done.taken.reason is not None
    assert "below open or close" in done.taken.reason
    assert len(done.signals) == 39


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("EURUSD_M1_202502.csv", ("EURUSD", "M1")),
        ("EURUSD.m_H4.csv", ("EURUSD.m", "H4")),
        ("US30_cash_M15_202401010000_202402010000.csv", ("US30_cash", "M15")),
        ("EURUSD_1h", ("EURUSD", "H1")),
        ("EURUSD.csv", None),
        ("M1_2025.csv", None),
        ("_M1.csv", None),
    ],
)
def test_a_file_may_be_named_after_its_series(name: str, found: tuple[str, str] | None) -> None:
    assert _named(Path(name)) == found
