"""A simulated market: seeded and pure, one :class:`Market` a symbol, one step a minute.

A minute's return is ``σ · (w + drift)``. σ carries the day's rhythm and a GARCH(1,1) variance (Bollerslev 1986), so that
volatility clusters; ``w`` is Student's t with six degrees of freedom, scaled to variance 1. High and low are drawn from
the law of a Brownian bridge's extremes between the minute's two ends. Prices lie on the symbol's grid of points, and the
walk goes on from the rounded price, so that rounding adds no correlation of its own.

**The known edge.** ``drift = -edge · tanh(z)`` with ``z = (close - ma60) / atr14`` of the bars sent so far: prices lean
back towards their own hour's mean. It is a function of two scale-free inputs that every model here sees, and the only
thing in this market that can be learned; with ``edge = 0`` it is a random walk. :func:`expected_auc` states how well
the best possible model ranks the sign of ``fwd_ret_5``.

Weeks open on Sunday 22:00 UTC and close on Friday 22:00; metals and indices pause daily from 22:00 to 23:00. Minutes
without a tick leave no bar, most of them at night. One step draws one row of variates whatever it yields, so that a
market is the same for every way of asking for its bars.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import exp, log, log10, sqrt, tanh
from typing import Final

import numpy as np

from schema.messages import Candle

EDGE: Final = 0.1  # in σ a minute: learned from about 8,000 bars a symbol, and still a weak signal
MINUTE: Final = timedelta(minutes=1)

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_WEEK: Final = 7 * 1_440  # minutes
_WEEK_CLOSES: Final = 5 * 1_440  # Friday 22:00, in minutes after Sunday 22:00
_FIRST_OPENING: Final = 3 * 1_440 + 22 * 60  # Sunday 1970-01-04 22:00 in minutes of the epoch
_ALPHA, _BETA = 0.06, 0.92  # GARCH: half of a shock to the variance is gone after 34 minutes
_DEGREES: Final = 6
_BLOCK: Final = 1_024  # minutes of variates drawn at a time

# Volatility by UTC hour as a part of the day's mean: quiet after New York, Asia, London's opening, London with New York.
_RHYTHM: Final = (
    *(0.55, 0.6, 0.6, 0.55, 0.5, 0.55, 0.8, 1.2, 1.3, 1.2, 1.1, 1.05),
    *(1.2, 1.6, 1.75, 1.65, 1.4, 1.1, 0.95, 0.85, 0.7, 0.5, 0.35, 0.45),
)


def _rhythm(minute: int) -> float:
    """A minute's volatility: the hours' figures stand in their middles, with straight lines between."""
    hour, into = divmod((minute - 30) % 1_440, 60)
    return _RHYTHM[hour] + (_RHYTHM[(hour + 1) % 24] - _RHYTHM[hour]) * into / 60


_RHYTHM_BY_MINUTE: Final = tuple(_rhythm(minute) for minute in range(1_440))


@dataclass(frozen=True, slots=True)
class Instrument:
    """A symbol of the simulated market. ``volatility`` is a day's, as a part of the price; ``spread`` is by day, in points."""

    symbol: str
    price: float
    point: float
    volatility: float
    spread: float
    ticks: float  # a minute, on the day's average
    pauses: bool = False  # daily from 22:00 to 23:00 UTC

    @property
    def digits(self) -> int:
        return max(0, round(-log10(self.point)))


INSTRUMENTS: Final = (
    Instrument("EURUSD", 1.08500, 0.00001, 0.0055, 6, 60),
    Instrument("GBPUSD", 1.27000, 0.00001, 0.0060, 9, 70),
    Instrument("USDJPY", 151.200, 0.001, 0.0065, 8, 75),
    Instrument("XAUUSD", 2_320.00, 0.01, 0.0100, 18, 130, pauses=True),
    Instrument("US30.m", 39_100.0, 0.1, 0.0090, 20, 110, pauses=True),
)


def is_open(instrument: Instrument, ts: datetime) -> bool:
    """Whether the minute that begins at ``ts`` is traded."""
    return _traded(instrument, (ts - _EPOCH) // MINUTE)


def expected_auc(edge: float) -> float:
    """The AUC that the best possible model reaches here: that of ``-z`` against the sign of ``fwd_ret_5``, ties dropped.

    To first order ``AUC - 1/2 = φ(0) · √5 · edge · E|tanh z₁ - tanh z₂|`` of two independent moments (AUC as a mean
    difference of probabilities). The expectation shrinks as the edge pulls z together; its line is fitted to five
    symbols of 32,000 minutes each, and holds within 0.01 up to an edge of 0.2.
    """
    return 0.5 + edge * (0.94 - edge)


def forming(bar: Candle, fraction: float, instrument: Instrument) -> Candle:
    """The bar as a terminal shows it when ``fraction`` (0 to 1) of its minute is over.

    The path runs from the open by way of the extreme that the bar turned away from, then the other one, to the close.
    """
    turns = (bar.low, bar.high) if bar.close >= bar.open else (bar.high, bar.low)
    path = (bar.open, *turns, bar.close)
    leg, along = divmod(min(max(fraction, 0.0), 1.0) * 3, 1)
    at = int(leg)
    here = path[-1] if at >= 3 else path[at] + along * (path[at + 1] - path[at])
    close = round(round(here / instrument.point) * instrument.point, instrument.digits)
    seen = (*path[: at + 1], close)
    return Candle(
        ts=bar.ts,
        open=bar.open,
        high=max(seen),
        low=min(seen),
        close=close,
        volume=max(1.0, float(int(bar.volume * fraction))),
        spread=bar.spread,
    )


class Market:
    """One symbol's endless minutes from ``start`` on. Equal (instrument, seed, start, edge) give equal bars for ever."""

    def __init__(self, instrument: Instrument, *, seed: int, start: datetime, edge: float = EDGE) -> None:
        if start.tzinfo is None:
            raise ValueError("start must be an aware time")
        self.instrument = instrument
        self.edge = edge
        self._minute = (start - _EPOCH) // MINUTE
        self._point, self._digits = instrument.point, instrument.digits
        self._rng = np.random.default_rng([seed, *instrument.symbol.encode()])
        self._normals: list[list[float]] = []
        self._uniforms: list[list[float]] = []
        self._drawn = _BLOCK
        self._close = instrument.price
        self._sigma = instrument.volatility / sqrt(1_440)
        self._variance = 1.0
        self._last_closed = False
        self._bars = 0
        self._closes: deque[float] = deque(maxlen=60)
        self._sum = 0.0
        self._atr = 0.0

    @property
    def now(self) -> datetime:
        """The open time of the next minute."""
        return _EPOCH + self._minute * MINUTE

    def step(self) -> Candle | None:
        """One minute later: its bar, or None where the session was closed or no tick came."""
        minute = self._minute
        self._minute += 1
        if not _traded(self.instrument, minute):
            self._last_closed = True
            return None
        if self._drawn == _BLOCK:
            self._draw()
        row, self._drawn = self._drawn, self._drawn + 1
        return self._trade(minute, self._normals[row], self._uniforms[row])

    def take(self, bars: int) -> list[Candle]:
        """The next ``bars`` bars."""
        taken: list[Candle] = []
        while len(taken) < bars:
            bar = self.step()
            if bar is not None:
                taken.append(bar)
        return taken

    def until(self, end: datetime) -> list[Candle]:
        """The bars that open before ``end``."""
        last = (end - _EPOCH) // MINUTE
        bars = (self.step() for _ in range(self._minute, last))
        return [bar for bar in bars if bar is not None]

    def z(self) -> float:
        """``(close - ma60) / atr14`` of the bars so far; 0 until both have a value."""
        if self._bars < 60 or self._atr <= 0:
            return 0.0
        return (self._close - self._sum / 60) / self._atr

    def _draw(self) -> None:
        chi = self._rng.chisquare(_DEGREES, _BLOCK)
        normals = self._rng.standard_normal((_BLOCK, 3))
        normals[:, 0] *= np.sqrt((_DEGREES - 2) / chi)
        self._normals = normals.tolist()
        self._uniforms = (1.0 - self._rng.random((_BLOCK, 3))).tolist()  # in (0, 1]: their logarithms are taken
        self._drawn = 0

    def _trade(self, minute: int, normals: list[float], uniforms: list[float]) -> Candle | None:
        rhythm = _RHYTHM_BY_MINUTE[minute % 1_440]
        shock, opening, activity = normals
        if uniforms[0] < 0.002 + 0.02 * max(0.0, 0.6 - rhythm):  # about 3 minutes in 1,000, most of them at night
            return None
        spec, before = self.instrument, self._close
        sigma = self._sigma * rhythm * sqrt(self._variance)
        self._variance = 1 - _ALPHA - _BETA + _BETA * self._variance + _ALPHA * self._variance * shock * shock
        gap = 3.0 * sigma if self._last_closed else 0.05 * sigma
        self._last_closed = False
        start = self._on_grid(before * exp(gap * opening))
        drift = -self.edge * tanh(self.z())
        # A gap after a pause belongs to the walk; the open's small noise does not, or returns would lean back by it.
        base = start if gap > sigma else before
        close = self._on_grid(base * exp(sigma * (shock + drift)))
        high, low = self._extremes(start, close, sigma, uniforms[1], uniforms[2])
        self._remember(high, low, close)
        night = 1.0 + 2.0 * max(0.0, 0.6 - rhythm) / 0.25
        spread = float(max(1, round(spec.spread * night * (1.0 + 0.25 * abs(opening)))))
        ticks = float(max(1, round(spec.ticks * rhythm * sqrt(self._variance) * exp(0.35 * activity))))
        return Candle(
            ts=_EPOCH + minute * MINUTE, open=start, high=high, low=low, close=close, volume=ticks, spread=spread
        )

    def _extremes(self, start: float, close: float, sigma: float, up: float, down: float) -> tuple[float, float]:
        """High and low of a Brownian bridge from ``start`` to ``close``, each by inverting its distribution."""
        move = log(close / start)
        variance = 2 * sigma * sigma
        high = start * exp((move + sqrt(move * move - variance * log(up))) / 2)
        low = start * exp((move - sqrt(move * move - variance * log(down))) / 2)
        return max(self._on_grid(high), start, close), min(self._on_grid(low), start, close)

    def _on_grid(self, price: float) -> float:
        return round(max(1, round(price / self._point)) * self._point, self._digits)

    def _remember(self, high: float, low: float, close: float) -> None:
        """ATR by Wilder's smoothing and the sum of the newest 60 closes, over bars as a receiver counts them."""
        if self._bars:
            true_range = max(high, self._close) - min(low, self._close)
            smoothing = min(self._bars, 14)
            self._atr += (true_range - self._atr) / smoothing
        if len(self._closes) == 60:
            self._sum -= self._closes[0]
        self._closes.append(close)
        self._sum += close
        self._bars += 1
        self._close = close


def _traded(instrument: Instrument, minute: int) -> bool:
    since_opening = (minute - _FIRST_OPENING) % _WEEK
    if since_opening >= _WEEK_CLOSES:
        return False
    return not (instrument.pauses and since_opening % 1_440 < 60)
