"""Simulated forecasters, many runs at a time, and the books of `actors/core/evidence.py` written a second time, for arrays.

A bar's return is a drift that signals foretell, and noise; an outcome is the sign of the next five returns, so that
neighbouring outcomes overlap. A model sees one signal and gives the exact probability that follows from it. Signals
are AR(1) with the persistence ``phi``: 0 is fresh at every bar, and the nearer to 1, the more do overlapping outcomes
repeat each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter
from scipy.special import ndtr

from actors.core import evidence

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

AHEAD = 5
DAY = 1_440  # bars of M1


def signal(rng: np.random.Generator, shape: tuple[int, int], phi: float) -> Floats:
    """Standard normal AR(1) over the first axis, stationary from the beginning."""
    noise = rng.standard_normal(shape)
    if phi == 0:
        return noise
    begin = phi * rng.standard_normal((1, shape[1]))
    return lfilter([np.sqrt(1 - phi * phi)], [1, -phi], noise, axis=0, zi=begin)[0]


def correlation(auc: float) -> float:
    """Of a signal with the five returns' sum, so that the probabilities that follow from it rank outcomes with this AUC.

    AUC = 1/2 + E|u - u'| for calibrated probabilities 1/2 + u, and u is nearly normal with sd correlation/√(2π).
    """
    return (auc - 0.5) * np.sqrt(np.pi) / 2 * np.sqrt(2 * np.pi)


def market(
    rng: np.random.Generator, bars: int, runs: int, aucs: Sequence[float], phi: float
) -> tuple[list[Floats], Bools]:
    """(each model's probabilities, outcomes), arrays (bars, runs); the models' signals are independent."""
    lags = np.arange(AHEAD)
    foretold = (phi**lags).sum()  # of a signal of 1 over the next five bars
    spread = (phi ** np.abs(lags[:, None] - lags)).sum()
    drift = np.zeros((bars + AHEAD, runs))
    known: list[Floats] = []
    taken = 0.0
    for rho in map(correlation, aucs):
        z = signal(rng, drift.shape, phi)
        drift += rho / foretold * z
        taken += (rho / foretold) ** 2 * spread
        known.append(ndtr(rho * z[:bars] / np.sqrt(1 - rho * rho)))
    walk = np.zeros((bars + AHEAD + 1, runs))
    np.cumsum(drift + rng.standard_normal(drift.shape) * np.sqrt((1 - taken) / AHEAD), axis=0, out=walk[1:])
    return known, walk[AHEAD : AHEAD + bars] > walk[:bars]


def differences(p: Floats, q: Floats, up: Bools) -> tuple[Floats, Floats]:
    """(d, c): how much better p's Brier score is, and the most that it can be."""
    return (q - up) ** 2 - (p - up) ** 2, np.abs(p - q) * np.maximum(p + q, 2 - p - q)


def money(d: Floats, c: Floats, *, kept: bool = True, until: float = np.inf) -> Floats:
    """The e-values that p is better after each bar, (bars, runs), with five outcomes open at a time.

    Ends early, with fewer rows, once all runs have reached ``until``. Plain money, no logarithms. ``kept=False``: all of
    the purse is divided at the beginning.
    """
    bars, runs = d.shape
    sizes = np.array(evidence.SIZES)[:, None]
    share = evidence.KEPT if kept else 0.0
    free = np.full((len(sizes), runs), (1 - share) / len(sizes))
    back: list[Floats] = []
    out = np.empty((bars, runs))
    reached = np.zeros(runs, dtype=bool)
    ratio = np.divide(d, c, out=np.zeros_like(d), where=c > 0)
    rest = share / np.sqrt(1 + np.arange(1, bars + 1) // evidence.SLICE * evidence.SLICE / evidence.KEPT_BARS)
    for bar in range(bars):
        if bar >= AHEAD:
            free += back[bar % AHEAD]
        if kept and (bar + 1) % evidence.SLICE == 0:
            free += ((rest[bar - 1] if bar else share) - rest[bar]) / len(sizes)
        aside = free * np.minimum(sizes * c[bar], evidence.CAP)
        free -= aside
        aside *= 1 + ratio[bar]
        if len(back) < AHEAD:
            back.append(aside)
        else:
            back[bar % AHEAD] = aside
        np.add(free.sum(axis=0), rest[bar], out=out[bar])
        if until < np.inf:
            reached |= out[bar] >= until
            if reached.all():
                return out[: bar + 1]
    return out


def first(values: Floats, level: float) -> NDArray[np.int64]:
    """The bar, counted from one, at which each run first reaches a level; never is the largest integer."""
    reached = values >= level
    return np.where(reached.any(axis=0), reached.argmax(axis=0) + 1, np.iinfo(np.int64).max)
