"""What came of a signal: trades, costs, what changes, and which bars a change reaches."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from actors.core.outcomes import Cost, Followed, Known, Said, Span, compare, message_id, score, spans, unseen

T0 = datetime(2025, 2, 3, 9, 30, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
SAID = Said(
    id="s1",
    ts=T0,
    symbol="EURUSD",
    timeframe="M1",
    model_name="rf_m1",
    model_version="v1",
    state="champion",
    prob_up=0.6,
    base_rate=0.49,
    label=1,
    abstain=None,
    candles_seq=10,
)
# The next bar opens at 1.1 and closes at 1.101, the fifth closes at 1.102; spreads of 8 and 20 points.
BARS = Followed(
    ret=0.001,
    fwd_seq=15,
    entry_open=1.1,
    entry_close=1.101,
    entry_spread=8.0,
    exit_close=1.102,
    exit_spread=20.0,
    candles_seq=15,
)
COST = Cost(point=1e-5)


def said(**changes: Any) -> Said:
    return msgspec.structs.replace(SAID, **changes)


def bars(**changes: Any) -> Followed:
    return msgspec.structs.replace(BARS, **changes)


def test_a_long_pays_at_its_entry_and_a_short_at_its_exit() -> None:
    long, short = score(SAID, BARS, COST).outcome, score(said(label=-1), BARS, COST).outcome
    move = 1.102 / 1.1 - 1.0
    assert (long.gross, long.net) == (pytest.approx(move), pytest.approx(move - 1.5 * 8e-5 / 1.101))
    assert (short.gross, short.net) == (pytest.approx(-move), pytest.approx(-move - 1.5 * 20e-5 / 1.102))
    assert (long.won, short.won, long.up) == (True, False, True)


@pytest.mark.parametrize(
    ("cost", "spread", "paid"),
    [
        (Cost(point=1e-5), 0.0, None),  # unknown
        (Cost(point=1e-5, spread=6.0), 0.0, 1.5 * 6e-5 / 1.101),
        (Cost(point=1e-5, spread=6.0), 8.0, 1.5 * 8e-5 / 1.101),
        (Cost(spread=6.0), 8.0, None),  # points of unknown size
    ],
)
def test_a_cost_that_nobody_knows_leaves_no_net_figure(cost: Cost, spread: float, paid: float | None) -> None:
    outcome = score(SAID, bars(entry_spread=spread), cost).outcome
    assert outcome.gross is not None
    assert outcome.net == (None if paid is None else pytest.approx(outcome.gross - paid))


def test_without_a_trade_there_is_a_forecast_and_no_money() -> None:
    outcome = score(said(label=0, abstain="unproven", state="provisional"), BARS, COST).outcome
    assert (outcome.won, outcome.gross, outcome.net) == (None, None, None)
    assert (outcome.up, outcome.ret, outcome.prob_up, outcome.base_rate) == (True, 0.001, 0.6, 0.49)


def test_a_tie_is_neither_and_a_trade_on_it_is_not_won() -> None:
    outcome = score(SAID, bars(ret=0.0), COST).outcome
    assert (outcome.up, outcome.won) == (None, False)


def test_a_price_below_zero_gives_no_money() -> None:
    outcome = score(SAID, bars(entry_open=-1.0), COST).outcome
    assert (outcome.won, outcome.gross, outcome.net) == (True, None, None)


def test_the_newest_of_all_that_it_is_made_of_names_the_making() -> None:
    assert message_id(score(SAID, BARS, COST).outcome) == "s1:15"
    assert message_id(score(SAID, bars(candles_seq=99), COST).outcome) == "s1:99"
    assert message_id(score(said(candles_seq=100), BARS, COST).outcome) == "s1:100"


def known(name: str, **changes: Any) -> Known:
    return score(said(id=name), bars(**changes), COST)


def test_only_what_differs_is_written() -> None:
    same, moved, gone, back, fresh = (known(n) for n in ("same", "moved", "gone", "back", "fresh"))
    stored = {
        "same": same,
        "moved": moved,
        "gone": gone,
        "back": back._replace(void=True),
        "old": gone._replace(void=True),
    }
    wanted = {"same": same, "moved": known("moved", ret=-0.001), "back": back, "fresh": fresh}
    changes = compare(wanted, stored)
    assert [k.outcome.signal_id for k in changes.new] == ["fresh"]
    assert [k.outcome.signal_id for k in changes.changed] == ["back", "moved"]
    assert changes.void == (("gone", T0),)


def test_a_correction_that_changes_nothing_of_an_outcome_is_none() -> None:
    """Another volume of its fifth bar, say: another sequence and nothing else."""
    assert compare({"a": known("a", candles_seq=40)}, {"a": known("a")}) == ((), (), ())


def test_touched_bars_become_few_spans() -> None:
    touched = [("EURUSD", "M1", T0 + i * MINUTE) for i in (0, 3, 13, 24, 25)] + [("EURUSD", "H1", T0)]
    assert sorted(spans(touched)) == [
        Span("EURUSD", "H1", T0, T0),
        Span("EURUSD", "M1", T0, T0 + 13 * MINUTE),
        Span("EURUSD", "M1", T0 + 24 * MINUTE, T0 + 25 * MINUTE),
    ]
    assert spans([]) == []


def test_a_bar_is_unseen_once_no_trained_label_can_reach_it() -> None:
    assert not unseen(T0 + 10 * MINUTE, T0, "M1")
    assert unseen(T0 + 11 * MINUTE, T0, "M1")
    assert not unseen(T0 + 11 * MINUTE, T0, "H1")
