"""What came of a backtest's signals: counts, and figures beside the base rate wherever the five following bars are known.

What is predicted is the sign of ``fwd_ret_5``. What is traded begins at the next bar's open and ends at the fifth
following bar's close; a long pays the spread of the bar it is entered at, a short that of the bar it is left at.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from math import nan
from typing import Any, Final, NamedTuple

import numpy as np
from msgspec import Struct, field

from actors.core import evaluate
from actors.core.backtest import Step
from actors.core.timeframe import FORWARD_BARS, FORWARD_SPAN
from schema.messages import FeatureRow, Signal
from schema.settings import Symbol
from schema.timeframes import SECONDS

SEED: Final = 7  # of the intervals' redraws
NOBODY: Final = -2  # a bar without a signal

Floats = evaluate.Floats


class Model(NamedTuple):
    """What the figures have to know of the version that spoke."""

    base_rate: float | None  # share of rises that it was trained on
    last_ts: datetime  # of its newest training row


class Bars(Struct):
    """A series' bars in their newest version, ascending, with the signal that stands for each; NaN where unknown."""

    ts: array[int] = field(default_factory=lambda: array("q"))
    open: array[float] = field(default_factory=lambda: array("d"))
    close: array[float] = field(default_factory=lambda: array("d"))
    spread: array[float] = field(default_factory=lambda: array("d"))
    ret: array[float] = field(default_factory=lambda: array("d"))
    prob: array[float] = field(default_factory=lambda: array("d"))
    label: array[int] = field(default_factory=lambda: array("b"))
    abstain: dict[int, str] = {}

    def place(self, ts: int) -> int | None:
        at = bisect_left(self.ts, ts)
        return at if at < len(self.ts) and self.ts[at] == ts else None

    def take(self, row: FeatureRow) -> None:
        ts = int(row.ts.timestamp())
        at = len(self.ts) if not self.ts or ts > self.ts[-1] else bisect_left(self.ts, ts)
        if at == len(self.ts) or self.ts[at] != ts:
            for column in (self.open, self.close, self.spread, self.ret, self.prob):
                column.insert(at, nan)
            self.ts.insert(at, ts)
            self.label.insert(at, NOBODY)
        self.open[at], self.close[at], self.spread[at] = row.open, row.close, row.spread
        self.ret[at] = nan if row.fwd_ret_5 is None else row.fwd_ret_5

    def hear(self, signal: Signal) -> None:
        ts = int(signal.ts.timestamp())
        at = self.place(ts)
        if at is None:
            raise ValueError(f"there is no bar {signal.ts} of {signal.symbol} for its signal")
        self.prob[at] = nan if signal.prob_up is None else signal.prob_up
        self.label[at] = signal.label
        if signal.abstain is None:
            self.abstain.pop(ts, None)
        else:
            self.abstain[ts] = signal.abstain


class Results:
    """Takes every step of a backtest; ``symbols`` say what a point is and what an unknown spread costs."""

    def __init__(self, symbols: Mapping[str, Symbol], models: Mapping[str, Model]) -> None:
        self._symbols = symbols
        self._models = models  # by timeframe
        self._series: dict[tuple[str, str], Bars] = {}
        self.signals = 0
        self.superseded = 0

    def take(self, step: Step) -> None:
        block = step.block
        bars = self._series.setdefault((block.symbol, block.timeframe), Bars())
        for row in block.rows:
            bars.take(row)
        for fill in block.fills:
            at = bars.place(int(fill.ts.timestamp()))
            if at is not None:
                bars.ret[at] = nan if fill.fwd_ret_5 is None else fill.fwd_ret_5
        for signal in step.signals:
            bars.hear(signal)
            self.superseded += signal.supersedes is not None
        self.signals += len(step.signals)

    def counts(self) -> dict[str, Any]:
        """How many signals were made, were superseded, and stand, by label and by reason of abstention."""
        labels: Counter[int] = Counter()
        reasons: Counter[str] = Counter()
        for bars in self._series.values():
            labels.update(label for label in bars.label if label != NOBODY)
            reasons.update(bars.abstain.values())
        return {
            "signals": self.signals,
            "superseded": self.superseded,
            "labels": {"up": labels[1], "down": labels[-1], "none": labels[0]},
            "abstain": dict(sorted(reasons.items())),
        }

    def outcomes(self) -> dict[str, Any]:
        """Figures of all bars with a probability and a known outcome, and of those that training cannot have seen."""
        parts = [
            self._known(number, key, bars)
            for number, (key, bars) in enumerate(self._series.items())
            if key[1] in self._models
        ]
        if not parts:
            return {"all": _figures(_Known.none()), "unseen": _figures(_Known.none())}
        known = _Known(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        return {"all": _figures(known), "unseen": _figures(known.where(known.unseen))}

    def _known(self, number: int, key: tuple[str, str], bars: Bars) -> _Known:
        """One series' rows whose outcome is known; a trade's figures are NaN where there is none, or no cost."""
        symbol, timeframe = key
        model, step = self._models[timeframe], SECONDS[timeframe]
        ts = np.array(bars.ts, np.int64)
        ret, prob, label = np.array(bars.ret), np.array(bars.prob), np.array(bars.label, np.int64)
        at = np.flatnonzero(np.isfinite(ret) & np.isfinite(prob))
        entry, leave = at + 1, at + FORWARD_BARS  # there: a known return has five bars behind it
        opened, close, spread = np.array(bars.open), np.array(bars.close), np.array(bars.spread)
        settings = self._symbols.get(symbol, Symbol())
        cost = evaluate.cost(spread, close, settings.point, settings.spread)
        side = label[at]
        with np.errstate(divide="ignore", invalid="ignore"):
            gross = np.where((side != 0) & (opened[entry] > 0), side * (close[leave] / opened[entry] - 1.0), nan)
        net = gross - np.where(side > 0, cost[entry], cost[leave])
        seen = model.last_ts.timestamp() + FORWARD_SPAN * step  # that row's own label reaches as far
        base = nan if model.base_rate is None else model.base_rate
        return _Known(
            series=np.full(len(at), number),
            block=ts[at] // (evaluate.BLOCK_BARS * step),
            ret=ret[at],
            prob=prob[at],
            base=np.full(len(at), base),
            side=side,
            gross=gross,
            net=net,
            unseen=ts[at] > seen,
        )


class _Known(NamedTuple):
    series: evaluate.Ints
    block: evaluate.Ints
    ret: Floats
    prob: Floats
    base: Floats
    side: evaluate.Ints
    gross: Floats
    net: Floats
    unseen: evaluate.Bools

    @classmethod
    def none(cls) -> _Known:
        whole, real = np.empty(0, np.int64), np.empty(0)
        return cls(whole, whole, real, real, real, whole, real, real, np.empty(0, np.bool_))

    def where(self, rows: evaluate.Bools) -> _Known:
        return _Known(*(column[rows] for column in self))  # type: ignore[arg-type]  # each keeps its type


def _figures(known: _Known) -> dict[str, Any]:
    """Ties (a return of 0) are neither right nor wrong: they are traded, and not scored."""
    scored = known.where(known.ret != 0)
    up = scored.ret > 0
    out: dict[str, Any] = {"outcomes": len(known.ret), "ties": len(known.ret) - len(up)}
    out |= {"auc": None, "auc_ci": None, "brier": None, "brier_base_rate": None, "hit_rate": None, "rises": None}
    if len(up):
        block = np.unique(scored.block, return_inverse=True)[1].astype(np.int64)
        auc = evaluate.auc_in_cells(up, scored.prob, scored.series, evaluate.Blocks(block, seed=SEED))
        base = evaluate.brier(up, scored.base)
        out |= {
            "auc": auc.value,
            "auc_ci": None if auc.value is None else [auc.low, auc.high],
            "brier": evaluate.brier(up, scored.prob),
            "brier_base_rate": None if np.isnan(base) else base,
            "hit_rate": evaluate.hit_rate(up, scored.prob),
            "rises": float(up.mean()),
        }
    traded = known.where(np.isfinite(known.gross))
    paid = traded.net[np.isfinite(traded.net)]
    won = traded.side * traded.ret > 0
    return out | {
        "trades": len(won),
        "won": float(won.mean()) if len(won) else None,
        "gross_mean": float(traded.gross.mean()) if len(won) else None,
        "net_trades": len(paid),
        "net_mean": float(paid.mean()) if len(paid) else None,
    }
