"""What the table says of rounds: medians, ratios pair by pair, and a sentence for each promise that does not hold."""

from __future__ import annotations

import pytest

from commands.bench_figures import Figure, Promise, alone, compare, misses, number, quantile, quartiles, table, verdict

AT_MOST = Promise("≤ 2 ×", 2.0, "at most")
AT_LEAST = Promise("≥ 4 × faster", 4.0, "at least")
OURS = Promise("≤ 10 s", 10.0, "at most", of="ours")


def test_a_ratio_is_the_median_of_the_pairs_own_ratios() -> None:
    # The machine was three times slower in the last round, for both.
    figure = compare("chain", "p50", "ms", [2.0, 3.0, 9.0], "peer", [1.0, 2.0, 6.0], AT_MOST)
    assert (figure.ours, figure.theirs, figure.ratio, figure.rounds) == (3.0, 2.0, 1.5, 3)
    assert figure.holds is True
    assert misses([figure]) == []


def test_faster_turns_the_ratio_over() -> None:
    figure = compare("features", "step", "µs", [5.0], "peer", [15.0], AT_LEAST, faster=True)
    assert figure.ratio == 3.0
    assert figure.holds is False
    assert misses([figure]) == ["features, step: 3.00 × where ≥ 4 × faster is promised, 25% off."]


def test_a_promise_may_bind_our_own_figure() -> None:
    figure = alone("start", "empty home", "s", [9.0, 12.0, 11.0], OURS)
    assert figure.quartiles == (10.0, 11.5)
    assert misses([figure]) == ["start, empty home: 11.0 s where ≤ 10 s is promised, 10% off."]


def test_what_was_not_measured_is_a_miss_and_says_why() -> None:
    figure = Figure(name="chain", what="p50", unit="ms", ours=3.0, promise=AT_MOST, why_not="the peer is not there.")
    assert figure.holds is None
    assert verdict(figure) == "not measured"
    assert misses([figure]) == ["chain, p50: not measured, the peer is not there."]


def test_what_is_not_promised_is_no_miss() -> None:
    figure = alone("memory", "all", "MB", [300.0])
    assert misses([figure]) == []
    assert next(table([figure])) == ("memory", "all", "300 MB", None, None, None, None, None, "")


def test_quantiles() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([float(i) for i in range(100)], 0.99) == 99.0
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0271, "0.0271"), (1.06, "1.06"), (14.5, "14.5"), (104512.3, "104,512"), (0.0, "0")]
)
def test_three_digits(value: float, text: str) -> None:
    assert number(value) == text
