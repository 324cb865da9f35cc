"""Who is judged against whom, by which bars, and what drifts."""

from __future__ import annotations

import random
from collections.abc import Iterable
from datetime import UTC, datetime

import msgspec
import pytest

from actors.core.docket import RATE_OFF, Bar, Docket, Party, Spoken, Window
from schema.messages import ModelState, Outcome
from schema.settings import Models

T0 = 1_735_776_000
MODELS = Models()


def outcome(
    bar: int, version: str = "v1", symbol: str = "EURUSD", prob: float = 0.5, up: bool | None = True
) -> Outcome:
    return Outcome(
        signal_id=f"{version}-{symbol}-{bar}",
        ts=datetime.fromtimestamp(T0 + 60 * bar, UTC),
        symbol=symbol,
        timeframe="M1",
        model_name="rf_m1",
        model_version=version,
        state="champion",
        prob_up=prob,
        base_rate=0.5,
        label=0,
        abstain=None,
        ret=0.0,
        up=up,
        won=None,
        gross=None,
        net=None,
        candles_seq=bar,
    )


def put(window: Window, outcomes: Iterable[Outcome]) -> list[Bar]:
    for one in outcomes:
        window.put(one)
    return window.complete()


def party(version: str, recipe: str = "r1", state: ModelState = "champion", seen_until: int | None = None) -> Party:
    return Party(version, recipe, state, seen_until)


def bar(n: int, **said: tuple[float, float, bool | None]) -> Bar:
    """One symbol's bar: version → probability, base rate, outcome."""
    ts = T0 + 60 * n
    return Bar(ts, ts + 300, {version: {"EURUSD": Spoken(*row)} for version, row in said.items()})


def test_a_bar_is_judged_once_all_its_symbols_must_be_there() -> None:
    window = Window("M1")
    assert put(window, [outcome(i) for i in range(10)]) == []
    (first,) = put(window, [outcome(10), outcome(0, symbol="GBPUSD", prob=0.4)])
    assert first.ts == T0
    assert first.spoken["v1"].keys() == {"EURUSD", "GBPUSD"}
    assert put(window, [outcome(0, symbol="USDJPY")]) == []  # too late for its bar


def test_a_bar_is_open_until_its_last_symbols_fifth_bar() -> None:
    window = Window("M1")
    sparse = [outcome(i, symbol="GBPUSD") for i in (0, 1, 3, 5, 7, 9, 11)]
    first, *_ = put(window, [outcome(i) for i in range(12)] + sparse)
    assert (first.ts, first.until) == (T0, T0 + 9 * 60)
    lonely = Window("M1")
    (alone,) = put(lonely, [outcome(0), outcome(400)])
    assert alone.until == T0 + 600  # whatever follows, its label spans no more than ten bars of time


def test_a_correction_counts_until_its_bar_is_judged() -> None:
    window = Window("M1")
    put(window, [outcome(0, up=True), outcome(0, up=False)])
    (first,) = put(window, [outcome(10)])
    assert first.spoken["v1"]["EURUSD"].up is False


def test_after_a_restart_nothing_is_judged_twice() -> None:
    window = Window("M1", done=T0 + 60)
    bars = put(window, [outcome(i) for i in range(13)])
    assert [b.ts for b in bars] == [T0 + 120]


def test_the_serving_version_is_tried_by_its_state() -> None:
    docket = Docket().sync(party("v1", state="provisional"), [])
    assert docket.standing is not None
    assert (docket.standing.kind, docket.standing.subject) == ("proof", "v1")
    docket = docket.add(bar(0, v1=(0.6, 0.5, True)), [party("v1")])
    retrained = docket.sync(party("v2", state="provisional"), [])
    assert retrained.standing is not None
    assert (retrained.standing.subject, retrained.standing.seen.bars) == ("v2", 1)  # evidence is the recipe's
    champion = docket.sync(party("v1"), [])
    assert champion.standing is not None
    assert (champion.standing.kind, champion.standing.seen.bars) == ("health", 0)
    fallen = champion.sync(party("v1", state="provisional"), [])
    assert fallen.standing is not None
    assert (fallen.standing.kind, fallen.standing.seen.bars) == ("proof", 0)  # what it had earned does not count again


def test_a_shadow_meets_the_serving_version_on_the_same_bars_only() -> None:
    parties = [party("v1"), party("s1", "r2", "shadow")]
    docket = Docket().sync(parties[0], parties[1:])
    docket = docket.add(bar(0, v1=(0.5, 0.5, True), s1=(0.7, 0.5, True)), parties)
    docket = docket.add(bar(1, s1=(0.7, 0.5, True)), parties)
    docket = docket.add(bar(2, v1=(0.5, 0.5, True)), parties)
    (trial,) = docket.shadows
    assert (trial.kind, trial.rival, trial.seen.bars) == ("recipe", "v1", 1)
    assert docket.standing is not None
    assert docket.standing.seen.bars == 2
    heir = docket.sync(party("v1"), [party("s2", "r2", "shadow")])
    assert [(t.subject, t.seen.bars) for t in heir.shadows] == [("s2", 1)]
    assert Docket().sync(None, parties[1:]).shadows == ()  # no rival yet


def test_what_a_version_was_trained_on_is_no_evidence_for_it() -> None:
    parties = [party("v1"), party("s1", "r2", "shadow", seen_until=T0 + 60)]
    docket = Docket().sync(parties[0], parties[1:])
    for i in range(4):
        docket = docket.add(bar(i, v1=(0.5, 0.5, True), s1=(0.7, 0.5, True)), parties)
    assert docket.standing is not None
    assert (docket.standing.seen.bars, docket.shadows[0].seen.bars) == (4, 2)


def play(docket: Docket, parties: list[Party], bars: int, rate: float, **prob: float) -> Docket:
    rng = random.Random(5)
    for i in range(bars):
        up = rng.random() < rate
        docket = docket.add(bar(i, **{version: (p, 0.5, up) for version, p in prob.items()}), parties)
    return docket


def test_of_two_winners_the_stronger_is_promoted() -> None:
    parties = [party("v1"), party("s1", "r2", "shadow"), party("s2", "r3", "shadow")]
    docket = play(Docket().sync(parties[0], parties[1:]), parties, 3_000, 0.75, v1=0.5, s1=0.65, s2=0.75)
    assert all(trial.seen.peak_better >= 100 for trial in docket.shadows), "only one of them has won"
    promoted = [d.version for d in docket.decisions(MODELS) if d.action == "promote"]
    assert promoted == [max(docket.shadows, key=lambda t: t.seen.peak_better).subject]


@pytest.mark.parametrize(("rate", "higher"), [(0.6, True), (0.4, False)])
def test_a_base_rate_that_is_off_is_told_once(rate: float, higher: bool) -> None:
    parties = [party("v1")]
    docket = play(Docket().sync(parties[0], []), parties, 6_000, rate, v1=0.5)
    found = docket.rate_drift()
    assert (found.higher, found.outcomes) == (higher, 6_000)
    assert found.share >= 1
    assert not found.told
    told = docket.told_rate()
    assert told.rate_drift() == found._replace(told=True)
    assert told.sync(party("v1"), []).rate_drift().told
    fresh = told.sync(party("v2"), []).rate_drift()
    assert (fresh.told, fresh.outcomes, fresh.share) == (False, 0, pytest.approx(0.0, abs=1e-9))


def test_a_base_rate_within_what_is_asked_is_not_told() -> None:
    parties = [party("v1")]
    docket = play(Docket().sync(parties[0], []), parties, 6_000, 0.5 + RATE_OFF / 4, v1=0.5)
    assert docket.rate_drift().share < 1


def test_a_docket_goes_on_bit_by_bit_where_it_was_stored() -> None:
    parties = [party("v1"), party("s1", "r2", "shadow")]
    half = play(Docket().sync(parties[0], parties[1:]), parties, 100, 0.6, v1=0.5, s1=0.6)
    again = msgspec.json.decode(msgspec.json.encode(half), type=Docket)
    assert again == half
    next_bar = bar(200, v1=(0.5, 0.5, True), s1=(0.6, 0.5, True))
    assert again.add(next_bar, parties) == half.add(next_bar, parties)
