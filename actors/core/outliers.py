"""Whether a bar is like those that a model learnt from: a robust Mahalanobis distance over its inputs, with a limit.

Inputs are centred on their medians and measured in median absolute deviations; correlations come from values cut off at
four such units, so that the outliers in the training rows do not hide others. Directions in which the inputs do not vary
(MACD, its signal and their difference span a plane) are left out. The time of day and week lies on circles, every part of
which is trained on or not, and says nothing of a bar: circular inputs do not enter.

The limit is the distance that 99.9 % of the training rows do not exceed. Markets drift, so later rows exceed it more often:
the honest figure is the rate on the later validation block, which goes into the manifest beside the detector.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from actors.core.evaluate import Floats
from actors.core.inputs import FeatureSet, Inputs
from actors.core.manifest import Outliers

LIMIT_QUANTILE: Final = 0.999
CUT: Final = 4.0  # robust standard deviations
_MAD_TO_SIGMA: Final = 1.482602218505602  # of a normal distribution
_FLAT: Final = 1e-6  # of the largest eigenvalue: what float32 inputs leave of an exact relation


def fit_outliers(x: Inputs, feature_set: FeatureSet) -> Outliers | None:
    """The detector of training rows ``x``, shape ``(n, k)``; None where they do not vary."""
    columns = [i for i, name in enumerate(feature_set.inputs) if name not in feature_set.circular]
    values = x[:, columns].astype(np.float64)
    if not len(values):
        return None
    centre = np.median(values, axis=0)
    scale = np.median(np.abs(values - centre), axis=0) * _MAD_TO_SIGMA
    scale = np.where(scale > 0, scale, values.std(axis=0))  # half of the rows may share one value
    moving = np.flatnonzero(scale > 0)
    if not len(moving):
        return None
    z = np.clip((values[:, moving] - centre[moving]) / scale[moving], -CUT, CUT)
    z -= z.mean(axis=0)
    variances, vectors = np.linalg.eigh(z.T @ z / len(z))
    kept = variances > _FLAT * variances[-1]
    directions = (vectors[:, kept] / np.sqrt(variances[kept])).T
    detector = Outliers(
        columns=tuple(columns[i] for i in moving.tolist()),
        centre=tuple(centre[moving].tolist()),
        scale=tuple(scale[moving].tolist()),
        directions=tuple(tuple(row) for row in directions.tolist()),
        limit=0.0,
    )
    limit = float(np.quantile(distances(detector, x), LIMIT_QUANTILE))
    return Outliers(
        columns=detector.columns,
        centre=detector.centre,
        scale=detector.scale,
        directions=detector.directions,
        limit=limit,
    )


def distances(detector: Outliers, x: Inputs) -> Floats:
    """Squared distance of each row, shape ``(n,)``; bit by bit what :func:`distance` gives for one."""
    z = [
        (x[:, i].astype(np.float64) - centre) / scale
        for i, centre, scale in zip(detector.columns, detector.centre, detector.scale, strict=True)
    ]
    total = np.zeros(len(x))
    for direction in detector.directions:
        along = np.zeros(len(x))
        for weight, value in zip(direction, z, strict=True):
            along = along + weight * value
        total = total + along * along
    return total


def distance(detector: Outliers, inputs: Inputs) -> float:
    """Squared distance of one row, shape ``(1, k)``: plain float64 arithmetic in one order, the same on every machine."""
    row = inputs[0].tolist()
    z = [(row[i] - c) / s for i, c, s in zip(detector.columns, detector.centre, detector.scale, strict=True)]
    total = 0.0
    for direction in detector.directions:
        along = 0.0
        for weight, value in zip(direction, z, strict=True):
            along += weight * value
        total += along * along
    return total


def is_outlier(detector: Outliers, inputs: Inputs) -> bool:
    """Whether a row is further out than the limit; what is not a number is."""
    found = distance(detector, inputs)
    return math.isnan(found) or found > detector.limit


def outlier_rate(detector: Outliers, x: Inputs) -> float | None:
    """Share of rows beyond the limit; None of no rows."""
    return float(np.mean(distances(detector, x) > detector.limit)) if len(x) else None
