"""The books: nothing can be won from a true claim by any way of forecasting, staking's order or stopping."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from actors.core import evidence
from actors.core.evidence import Evidence, Paired
from tests.evidence_lab import AHEAD, differences, market, money

BAR = 60

probabilities = st.floats(0, 1)
rows = st.lists(st.builds(Paired, probabilities, probabilities, st.sampled_from([True, False, None])), max_size=4)
bars = st.lists(st.tuples(rows, st.integers(1, 9)), max_size=60)


def fold(bars: list[tuple[list[Paired], int]], seen: Evidence | None = None, first: int = 0) -> Evidence:
    seen = seen or Evidence()
    for at, (row, wait) in enumerate(bars, first):
        seen = seen.add(at * BAR, (at + wait) * BAR, row)
    return seen


# --- nothing is won from a true claim ----------------------------------------------------------------------------

COINS = 11  # the market: fair coins; an outcome says what most of the next five show
BETS = COINS - AHEAD

Forecaster = Callable[[tuple[int, ...], int], tuple[float, float]]


def follow(coins: tuple[int, ...], last: int) -> tuple[float, float]:
    """p leans the way that open outcomes look, and more so the clearer they do: what profits most from half-known outcomes."""
    recent = sum(coins[-3:])
    return (0.5 + 0.16 * recent, 0.5 - 0.16 * recent) if recent else (0.6, 0.4)


def fade(coins: tuple[int, ...], last: int) -> tuple[float, float]:
    p, q = follow(coins, last)
    return q, p


def erratic(coins: tuple[int, ...], last: int) -> tuple[float, float]:
    lean = 0.01 + 0.49 * ((hash(coins) >> 3) % 7) / 6
    return (0.5 + lean, 0.5 - lean) if hash(coins) % 2 else (0.5 - lean, 0.5 + lean)


def best_stop(values: list[np.ndarray]) -> float:
    """What may be expected at most by who sees every coin and stops when he likes: Snell's envelope, backwards."""
    best = values[-1]
    for now in reversed(values[:-1]):
        best = np.maximum(now, best.reshape(-1, 2).mean(axis=1))
    return float(best.mean())


def tree(forecast: Forecaster, symbols: int = 1) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """For every path of coins the e-values after each bar, and those of books that leave open bets out: (better, worse,
    careless). Since E[y | coins so far] = 1/2 = (p + q) / 2, no forecaster is better, whatever the two say.
    """
    better = [np.full(2 ** (t + 1), np.nan) for t in range(COINS)]
    worse = [np.full(2 ** (t + 1), np.nan) for t in range(COINS)]
    careless = [np.full(2 ** (t + 1), np.nan) for t in range(COINS)]
    for path in range(2**COINS):
        coins = tuple(1 if path >> (COINS - 1 - i) & 1 else -1 for i in range(COINS))
        seen, wealth, owed = Evidence(), 1.0, {}
        for t in range(COINS):
            p, q = forecast(coins[: t + 1], t) if t < BETS else (0.5, 0.5)
            up = sum(coins[t + 1 : t + 1 + AHEAD]) > 0
            seen = seen.add(t * BAR, (t + AHEAD) * BAR, [Paired(p, q, up)] * symbols)
            wealth += owed.pop(t, 0.0)
            owed[t + AHEAD] = wealth * 0.5 * ((q - up) ** 2 - (p - up) ** 2)
            node = path >> (COINS - 1 - t)
            for table, value in ((better, seen.e_better), (worse, seen.e_worse), (careless, wealth)):
                known = table[t][node]
                assert np.isnan(known) or known == value, "an e-value knows what comes later"
                table[t][node] = value
    return better, worse, careless


@pytest.mark.parametrize(("forecast", "symbols"), [(follow, 1), (fade, 1), (erratic, 3)])
def test_no_way_to_stop_wins_from_a_true_claim(forecast: Forecaster, symbols: int) -> None:
    better, worse, careless = tree(forecast, symbols)
    assert best_stop(better) <= 1 + 1e-12
    assert best_stop(worse) <= 1 + 1e-12
    assert max(float(values.max()) for values in better) > 1.2, "the bets are too small for a test"
    if forecast is follow:
        assert best_stop(careless) > 1.02, (
            "this market does not tempt: books that leave open bets out must be beaten by it"
        )


def test_where_the_claim_drifts_against_it_evidence_is_rare() -> None:
    """4,000 bars of a market whose chances swing by the hour, q always the nearer or as near: at most 1 in 100 reach 100."""
    rng = np.random.default_rng(11)
    bars, runs = 4_000, 400
    hours = np.arange(bars)[:, None] / 700
    chance = 0.5 + 0.2 * np.sin(hours + rng.uniform(0, 6, (1, runs)))
    gap = rng.choice([-0.3, -0.05, 0.05, 0.3], (bars, runs))
    p, q = np.clip(chance + gap, 0, 1), np.clip(chance - gap, 0, 1)  # as near: no difference in expectation
    chance = np.where(rng.random((bars, runs)) < 0.2, q, (p + q) / 2)
    values = money(*differences(p, q, rng.random((bars, runs)) < chance))
    assert (values.max(axis=0) >= 100).mean() <= 0.01
    assert values[-1].mean() <= 1


# --- the books ---------------------------------------------------------------------------------------------------


@given(bars, st.integers(0, 60))
def test_books_continue_from_what_was_stored(made: list[tuple[list[Paired], int]], cut: int) -> None:
    whole = fold(made)
    stored = msgspec.json.encode(fold(made[:cut]))
    assert msgspec.json.encode(fold(made[cut:], msgspec.json.decode(stored, type=Evidence), min(cut, len(made)))) == (
        msgspec.json.encode(whole)
    )


@given(bars)
@example([([Paired(0.0, 5e-324, True)], 1)] * 3)  # forecasts that differ by the smallest number there is
@example([([Paired(0.5, 0.5 + 1e-16, True)], 1)] * 3)
def test_a_fortune_is_finite_and_positive(made: list[tuple[list[Paired], int]]) -> None:
    seen = fold(made)
    for value in (seen.e_better, seen.e_worse, seen.peak_better, seen.peak_worse):
        assert isfinite(value)
        assert value > 0
    assert seen.peak_better >= seen.e_better * (1 - 1e-12)
    assert len(seen.open) <= evidence.OPEN


@given(bars, st.integers(0, 59))
@settings(max_examples=50)
def test_an_open_outcome_changes_nothing(made: list[tuple[list[Paired], int]], at: int) -> None:
    """What is known after the last bar is not used by it."""
    last = len(made) - 1
    other = [
        ([Paired(p, q, not up) for p, q, up in row], wait) if bar + wait > last else (row, wait)
        for bar, (row, wait) in enumerate(made)
    ]
    assert fold(made).e_better == fold(other).e_better
    assert fold(made).e_worse == fold(other).e_worse


@given(rows)
def test_what_is_put_aside_covers_the_worst_outcome(row: list[Paired]) -> None:
    for p, q, _ in row:
        bound = abs(p - q) * max(p + q, 2 - p - q)
        for up in (0, 1):
            assert abs((q - up) ** 2 - (p - up) ** 2) <= bound + 1e-15


def test_endless_wins_overflow_nothing_and_their_books_stay_small() -> None:
    seen = Evidence()
    for at in range(16_000):
        seen = seen.add(at * BAR, (at + AHEAD) * BAR, [Paired(1.0, 0.0, True)])
    assert seen.e_better > 1e299
    assert isfinite(seen.e_better)
    assert 0 < seen.e_worse < 0.2
    assert len(msgspec.json.encode(seen)) < 3_000
    assert msgspec.json.decode(msgspec.json.encode(seen), type=Evidence) == seen


def test_ties_count_nothing() -> None:
    seen = fold([([Paired(0.6, 0.5, None)], 5)] * 50)
    assert (seen.outcomes, seen.bars, seen.brier) == (0, 50, None)
    assert seen.e_better == seen.e_worse < 0.8  # five bets are open
    for at in range(50, 55):
        seen = seen.add(at * BAR, (at + AHEAD) * BAR, [Paired(0.5, 0.5, True)])  # nothing to bet on
    assert seen.e_better == pytest.approx(1, rel=1e-12)  # all stakes came back


def test_repeated_and_late_bars_count_nothing() -> None:
    seen = fold([([Paired(0.6, 0.5, True)], 5)] * 20)
    assert seen.add(19 * BAR, 24 * BAR, [Paired(0.9, 0.1, True)]) is seen
    assert seen.add(3 * BAR, 8 * BAR, [Paired(0.9, 0.1, True)]) is seen
    assert seen.add(99 * BAR, 104 * BAR, []) is seen


@pytest.mark.parametrize("wrong", [-0.01, 1.01, float("nan")])
def test_what_is_no_probability_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="not two probabilities"):
        Evidence().add(0, 5, [Paired(wrong, 0.5, True)])
    with pytest.raises(ValueError, match="not two probabilities"):
        Evidence().add(0, 5, [Paired(0.5, wrong, None)])


def test_an_outcome_known_before_its_forecast_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be known"):
        Evidence().add(300, 300, [Paired(0.6, 0.5, True)])


def test_bars_stay_open_over_a_pause() -> None:
    """A symbol that closes for the weekend holds its last five bars open while another goes on."""
    seen = fold([([Paired(0.6, 0.5, True)], 5_000)] * 5)
    going = fold([([Paired(0.6, 0.5, True)], 5)] * 300, seen, 5)
    assert [bet.until // BAR for bet in going.open] == [5_000, 5_001, 5_002, 5_003, 5_004, 305, 306, 307, 308, 309]
    assert going.e_better > 2
    after = going.add(5_004 * BAR, 5_009 * BAR, [Paired(0.6, 0.5, True)])
    assert len(after.open) == 1
    assert after.e_better > going.e_better


def test_no_more_than_a_few_bars_are_open() -> None:
    """What comes while all places are taken is scored, and not bet on."""
    seen = fold([([Paired(0.6, 0.5, True)], 5_000)] * 40)
    assert len(seen.open) == evidence.OPEN
    assert seen.outcomes == 40
    assert seen.e_better == pytest.approx(fold([([Paired(0.6, 0.5, True)], 5_000)] * evidence.OPEN).e_better)


def test_brier_scores_are_of_the_same_outcomes() -> None:
    seen = fold([([Paired(0.7, 0.5, True), Paired(0.2, 0.5, True), Paired(0.9, 0.5, None)], 5)])
    assert seen.outcomes == 2
    assert seen.brier == pytest.approx((0.09 + 0.64) / 2)
    assert seen.rival_brier == pytest.approx(0.25)
    assert (seen.since, seen.to) == (0, 0)


@pytest.mark.parametrize("phi", [0.0, 0.9])
def test_the_books_are_those_of_the_simulations(phi: float) -> None:
    """The class, in logarithms and one by one, equals the arrays of `evidence_lab` in plain money."""
    (p, q), up = market(np.random.default_rng(5), 2_500, 2, [0.62, 0.53], phi)
    d, c = differences(p, q, up)
    for values, mine, other in ((money(d, c), p, q), (money(-d, c), q, p)):
        for run in range(2):
            seen = Evidence()
            for at in range(len(p)):
                row = [Paired(float(mine[at, run]), float(other[at, run]), bool(up[at, run]))]
                seen = seen.add(at * BAR, (at + AHEAD) * BAR, row)
                assert seen.e_better == pytest.approx(values[at, run], rel=1e-9)
            assert seen.peak_better == pytest.approx(max(1, values[:, run].max()), rel=1e-9)
            assert seen.e_worse == pytest.approx((money(-d, c) if mine is p else money(d, c))[-1, run], rel=1e-9)
