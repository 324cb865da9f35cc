"""The scorecard as it is asked for and answered: what the signals of a version have been worth, beside its base rate."""

from __future__ import annotations

from msgspec import Struct

from schema.messages import Message, ModelState, UtcTime

Interval = tuple[float, float]


class ScorecardRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which cards are wanted; None: whatever it is."""

    model: str | None = None
    symbol: str | None = None
    timeframe: str | None = None


class CalibrationBin(Message, frozen=True, kw_only=True, omit_defaults=False):
    """Outcomes whose probability lay from ``low`` to ``high``: the mean that was said and the share that rose."""

    low: float
    high: float
    count: int
    mean_prob: float
    rate: float
    rate_ci: Interval | None


class Card(Message, frozen=True, kw_only=True, omit_defaults=False):
    """One version on one symbol and timeframe, over its newest outcomes; ``first_ts`` to ``last_ts`` are their bars.

    ``outcomes`` counts those that rose or fell, ``ties`` the others. ``base_rate`` is the share of rises that the version
    was trained on and ``rate`` what came; ``base_*`` are the figures of saying ``base_rate`` each time, and ``brier_gain``
    (positive: the model is better) is their difference on the same bars. ``hit_rate``, ``gross_mean`` and ``net_mean`` are of the
    ``trades``, net of cost for those whose cost is known (``net_trades``). An interval is 95 %, from redrawing whole blocks of 60
    bars; None where there are too few to draw from.
    """

    model_name: str
    model_version: str
    state: ModelState
    symbol: str
    timeframe: str
    at: UtcTime
    first_ts: UtcTime
    last_ts: UtcTime
    outcomes: int
    ties: int
    base_rate: float
    rate: float | None
    rate_ci: Interval | None
    brier: float | None
    brier_ci: Interval | None
    base_brier: float | None
    brier_gain: float | None
    brier_gain_ci: Interval | None
    log_loss: float | None
    log_loss_ci: Interval | None
    base_log_loss: float | None
    trades: int
    hit_rate: float | None
    hit_rate_ci: Interval | None
    gross_mean: float | None
    gross_ci: Interval | None
    net_trades: int
    net_mean: float | None
    net_ci: Interval | None
    calibration: tuple[CalibrationBin, ...]


class Scorecard(Message, frozen=True, kw_only=True, omit_defaults=False):
    """The cards that fit, serving versions first; ``left_out`` counts those beyond what one answer holds."""

    cards: tuple[Card, ...]
    left_out: int = 0
