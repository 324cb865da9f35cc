"""How soon a difference shows, and how seldom one shows that is none: the promises, simulated.

Probabilities are calibrated, outcomes of five bars overlap, models' signals are independent (see `evidence_lab`). "Fresh"
signals say something new at every bar; "lasting" ones (phi 0.9, half of a signal is left after six bars) repeat themselves
while outcomes overlap, which inflates the variance of Brier differences 3.3 times, as real models' are (2.7 to 3.9).
"""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from schema.settings import Models
from tests.evidence_lab import DAY, Bools, Floats, differences, first, market, money

FRESH, LASTING = 0.0, 0.9
LEVEL = Models().promote_evidence


def half(p: Floats) -> Floats:
    return np.full_like(p, 0.5)


def rng(seed: int, phi: float) -> np.random.Generator:
    return np.random.default_rng([seed, round(100 * phi)])


@pytest.mark.parametrize("phi", [FRESH, LASTING])
def test_the_simulation_makes_what_it_says(phi: float) -> None:
    """The AUC asked for, calibrated, and an inflation of the variance by overlap that is real."""
    known, up = market(rng(1, phi), 60_000, 4, [0.6, 0.53], phi)
    for p, auc in zip(known, (0.6, 0.53), strict=True):
        assert roc_auc_score(up.ravel(), p.ravel()) == pytest.approx(auc, abs=0.006)
        for low, high in ((0.0, 0.5), (0.5, 1.0)):
            part = (p >= low) & (p < high)
            assert up[part].mean() == pytest.approx(p[part].mean(), abs=0.01)
    d, _ = differences(known[0], half(known[0]), up)
    blocks = d[: len(d) // 60 * 60].reshape(-1, 60, d.shape[1]).sum(axis=1)
    inflation = blocks.var() / (60 * d.var())
    assert inflation == pytest.approx(3.2 if phi else 1.0, abs=0.35)


@pytest.mark.parametrize("phi", [FRESH, LASTING])
def test_a_better_recipe_is_promoted_within_20_000_outcomes(phi: float) -> None:
    (p, q), up = market(rng(2, phi), 20_000, 20, [0.60, 0.53], phi)
    assert (first(money(*differences(p, q, up), until=LEVEL), LEVEL) <= 20_000).sum() >= 19


@pytest.mark.parametrize("phi", [FRESH, LASTING])
@pytest.mark.parametrize("auc", [0.53, 0.60])
def test_an_equal_recipe_is_not_promoted(auc: float, phi: float) -> None:
    (p, q), up = market(rng(3, phi), 20_000, 100, [auc, auc], phi)
    assert (money(*differences(p, q, up)).max(axis=0) >= LEVEL).sum() <= 3


@pytest.mark.slow
def test_a_healthy_champion_stays_for_120_days() -> None:
    """M1, one symbol, 24 hours on five days a week."""
    phi = LASTING
    rolled_back = 0
    for part in range(2):
        (p,), up = market(rng(40 + part, phi), 120 * 5 // 7 * DAY, 50, [0.53], phi)
        rolled_back += int((money(*differences(half(p), p, up)).max(axis=0) >= LEVEL).sum())
    assert rolled_back <= 3


def inverted(seed: int, bars: int, runs: int, phi: float, symbols: int, healthy: int = 0) -> tuple[Floats, Floats]:
    """(d, c) of the base rate against an AUC 0.53 model that says the opposite from bar ``healthy`` on."""
    d, c = np.zeros((bars, runs)), np.zeros((bars, runs))
    random = rng(seed, phi)
    for _ in range(symbols):
        (p,), up = market(random, bars, runs, [0.53], phi)
        p[healthy:] = 1 - p[healthy:]
        more = differences(half(p), p, up)
        d += more[0] / np.sqrt(symbols)
        c += more[1] / np.sqrt(symbols)
    return d, c


@pytest.mark.parametrize(("phi", "symbols"), [(FRESH, 1), (LASTING, 3)])
def test_an_inverted_champion_is_rolled_back_within_five_days(phi: float, symbols: int) -> None:
    d, c = inverted(5, 5 * DAY, 20, phi, symbols)
    assert (first(money(d, c, until=LEVEL), LEVEL) <= 5 * DAY).sum() == 20


@pytest.mark.slow
def test_a_champion_that_fails_after_months_is_noticed_as_well() -> None:
    """What is kept back is what notices it: a purse that was divided at once has nothing left."""
    healthy, broken = 30 * DAY, 10 * DAY
    d, c = inverted(6, healthy + broken, 20, FRESH, 1, healthy)
    found = first(money(d, c)[healthy:], LEVEL)
    assert (found <= broken).sum() >= 19
    assert np.median(found) <= 5 * DAY
    assert (first(money(d, c, kept=False)[healthy:], LEVEL) <= broken).sum() <= 4


@pytest.mark.parametrize(("phi", "within"), [(FRESH, 4_000), (LASTING, 9_000)])
def test_a_provisional_model_proves_itself(phi: float, within: int) -> None:
    """AUC 0.58 against its base rate; the median of one symbol's outcomes."""
    (p,), up = market(rng(7, phi), 20_000, 40, [0.58], phi)
    found = first(money(*differences(p, half(p), up), until=LEVEL), LEVEL)
    assert np.median(found) <= within


def shuffled(random: np.random.Generator, up: Bools) -> Bools:
    return random.permuted(up, axis=0)


def test_a_forecaster_without_skill_is_not_promoted() -> None:
    """Signals that have nothing to do with what comes, against the base rate: they lose."""
    random = rng(8, LASTING)
    (p,), up = market(random, 20_000, 100, [0.55], LASTING)
    values = money(*differences(p, half(p), shuffled(random, up)))
    assert (values.max(axis=0) >= LEVEL).sum() <= 1
    assert np.median(values[-1]) < 0.3
