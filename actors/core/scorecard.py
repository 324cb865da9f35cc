"""A version's figures over its newest outcomes, each beside the base rate that it has to beat and with an interval.

Outcomes overlap by four bars in five, so neighbours are nearly copies: intervals come from redrawing whole blocks of 60
bars of time. Every figure here is a mean, and a mean of redrawn blocks is a ratio of two sums a block, which makes
400 replicates of 5,000 outcomes a matrix product of milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actors.core.evaluate import REPLICATES, time_blocks
from schema.messages import ModelState
from schema.scorecard import CalibrationBin, Card, Interval
from schema.timeframes import SECONDS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

MIN_BLOCKS: Final = 10  # an interval from fewer would be a guess
BINS: Final = 10
SEED: Final = 7
_CLIP: Final = 1e-12  # probabilities are kept so far off 0 and 1 in the log loss


class Outcomes(NamedTuple):
    """Outcomes as columns of one length, in any order.

    ``ts`` int64 epoch seconds; ``up`` 1, 0 or NaN (a tie); ``label`` -1, 0 or 1; ``won`` 1, 0 or NaN (no trade); ``gross`` and
    ``net`` fractions, NaN where unknown.
    """

    ts: Ints
    prob: Floats
    base: Floats
    up: Floats
    label: Ints
    won: Floats
    gross: Floats
    net: Floats

    @classmethod
    def of(cls, rows: Sequence[Sequence[float | None]]) -> Outcomes:
        """From rows of these fields, None for null."""
        table = np.array(rows, dtype=np.float64).reshape(len(rows), len(cls._fields)).T
        ts, prob, base, up, label, won, gross, net = table
        return cls(ts.astype(np.int64), prob, base, up, label.astype(np.int64), won, gross, net)


class Key(NamedTuple):
    """Whose card it is."""

    model_name: str
    model_version: str
    symbol: str
    timeframe: str


class _Draws:
    """Means over redrawn blocks of the rows of one card."""

    def __init__(self, ts: Ints, timeframe: str) -> None:
        self._block = time_blocks(ts, bar_seconds=SECONDS[timeframe])
        self._blocks = int(self._block.max()) + 1
        rng = np.random.default_rng(SEED)
        even = np.full(self._blocks, 1.0 / self._blocks)
        self._counts = rng.multinomial(self._blocks, even, size=REPLICATES).astype(np.float64)

    def interval(self, values: Floats) -> Interval | None:
        """The 95 % interval of the mean of those that are numbers; None where they fill too few blocks."""
        known = np.isfinite(values)
        block = self._block[known]
        if len(np.unique(block)) < MIN_BLOCKS:
            return None
        sums = np.bincount(block, weights=values[known], minlength=self._blocks)
        rows = np.bincount(block, minlength=self._blocks).astype(np.float64)
        drawn = self._counts @ rows
        means = (self._counts @ sums)[drawn > 0] / drawn[drawn > 0]
        low, high = np.quantile(means, (0.025, 0.975))
        return float(low), float(high)


def make_card(key: Key, state: ModelState, outcomes: Outcomes, at: datetime) -> Card:
    """The card of one version, symbol and timeframe; at least one outcome."""
    draws = _Draws(outcomes.ts, key.timeframe)
    said = np.isfinite(outcomes.up)
    brier, base_brier = _squares(outcomes.prob, outcomes.up), _squares(outcomes.base, outcomes.up)
    loss, base_loss = _losses(outcomes.prob, outcomes.up), _losses(outcomes.base, outcomes.up)
    traded = outcomes.label != 0
    gross, net = np.where(traded, outcomes.gross, np.nan), np.where(traded, outcomes.net, np.nan)
    won = np.where(traded, outcomes.won, np.nan)
    return Card(
        **key._asdict(),
        state=state,
        at=at,
        first_ts=datetime.fromtimestamp(int(outcomes.ts.min()), UTC),
        last_ts=datetime.fromtimestamp(int(outcomes.ts.max()), UTC),
        outcomes=int(said.sum()),
        ties=int((~said).sum()),
        base_rate=float(outcomes.base.mean()),
        rate=_mean(outcomes.up),
        rate_ci=draws.interval(outcomes.up),
        brier=_mean(brier),
        brier_ci=draws.interval(brier),
        base_brier=_mean(base_brier),
        brier_gain=_mean(base_brier - brier),
        brier_gain_ci=draws.interval(base_brier - brier),
        log_loss=_mean(loss),
        log_loss_ci=draws.interval(loss),
        base_log_loss=_mean(base_loss),
        trades=int(traded.sum()),
        hit_rate=_mean(won),
        hit_rate_ci=draws.interval(won),
        gross_mean=_mean(gross),
        gross_ci=draws.interval(gross),
        net_trades=int(np.isfinite(net).sum()),
        net_mean=_mean(net),
        net_ci=draws.interval(net),
        calibration=_calibration(outcomes, draws),
    )


def _squares(prob: Floats, up: Floats) -> Floats:
    squares: Floats = (prob - up) ** 2
    return squares


def _losses(prob: Floats, up: Floats) -> Floats:
    p = np.clip(prob, _CLIP, 1 - _CLIP)
    losses: Floats = np.where(np.isfinite(up), -np.where(up > 0, np.log(p), np.log1p(-p)), np.nan)
    return losses


def _mean(values: Floats) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def _calibration(outcomes: Outcomes, draws: _Draws) -> tuple[CalibrationBin, ...]:
    """Ten bins of as many outcomes each, by probability; fewer where many probabilities are equal."""
    said = np.isfinite(outcomes.up)
    prob = outcomes.prob[said]
    if not len(prob):
        return ()
    edges = np.unique(np.quantile(prob, np.linspace(0, 1, BINS + 1)))
    number = np.clip(np.searchsorted(edges, outcomes.prob, side="right") - 1, 0, max(len(edges) - 2, 0))
    out = []
    for i in range(max(len(edges) - 1, 1)):
        here = said & (number == i)
        if not here.any():
            continue
        rates = np.where(here, outcomes.up, np.nan)
        out.append(
            CalibrationBin(
                low=float(edges[i]),
                high=float(edges[min(i + 1, len(edges) - 1)]),
                count=int(here.sum()),
                mean_prob=float(outcomes.prob[here].mean()),
                rate=float(outcomes.up[here].mean()),
                rate_ci=draws.interval(rates),
            )
        )
    return tuple(out)
