"""Who is promoted, rolled back and retired, on which evidence, and what is said of it."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest

from actors.core.evidence import Evidence, Paired
from actors.core.evidence_trials import PATIENCE, RETRAIN_PATIENCE, Decision, Trial, health, proof, shadow
from schema.settings import Models

BAR = 60
RULES = Models()


def run(
    trial: Trial, skill: float, rival_skill: float, *, bars: int, seed: int = 1, rules: Models = RULES, first: int = 0
) -> tuple[Trial, Decision | None]:
    """Coins whose chance is 1/2 ± 0.2: each side sees it with a skill of 1 (all), 0 (nothing) or -1 (the opposite).
    Stops at the first decision."""
    random = np.random.default_rng(seed)
    for at in range(first, first + bars):
        lean = 0.2 if random.random() < 0.5 else -0.2
        up = bool(random.random() < 0.5 + lean)
        trial = trial.add(at * BAR, (at + 5) * BAR, [Paired(0.5 + skill * lean, 0.5 + rival_skill * lean, up)])
        if (decision := trial.verdict(rules)) is not None:
            return trial, decision
    return trial, None


def other() -> Trial:
    return shadow("v2", "wide", "v1", "narrow")


def retrain() -> Trial:
    return shadow("v2", "narrow", "v1", "narrow")


def test_another_recipe_is_promoted_by_evidence() -> None:
    trial, decision = run(other(), 1, 0, bars=3_000)
    assert decision is not None
    assert (decision.action, decision.version, decision.against) == ("promote", "v2", "v1")
    assert trial.seen.outcomes < 1_000  # it need not wait for a window
    assert decision.evidence["e_value"] >= 100
    assert decision.evidence["difference"] == pytest.approx(
        decision.evidence["brier_rival"] - decision.evidence["brier"]
    )
    assert decision.evidence["from"] == "1970-01-01T00:00:00Z"
    assert decision.reason.startswith("Shadow v2 predicts better than version v1: evidence 1")
    assert "where 100 is asked for; Brier score 0.2" in decision.reason
    json.dumps(decision.evidence, allow_nan=False)


def test_an_equal_recipe_waits_and_is_retired_in_the_end() -> None:
    trial, decision = run(other(), 1, 1, bars=200)
    assert decision is None
    tired = msgspec.structs.replace(trial, seen=msgspec.structs.replace(trial.seen, outcomes=PATIENCE))
    decision = tired.verdict(RULES)
    assert decision is not None
    assert decision.action == "retire"
    assert decision.reason.startswith("Shadow v2 is not told from version v1 after 60,000 outcomes: Brier score")


@pytest.mark.parametrize("trial", [other(), retrain()])
def test_a_worse_shadow_is_retired(trial: Trial) -> None:
    _, decision = run(trial, -1, 1, bars=2_000)
    assert decision is not None
    assert (decision.action, decision.version, decision.against) == ("retire", "v2", "v1")
    assert decision.evidence["e_against"] >= 100
    assert decision.reason.startswith("Version v1 predicts better than shadow v2: evidence 1")


def test_a_retrain_replaces_its_like_after_a_thousand_outcomes() -> None:
    trial, decision = run(retrain(), 0.99, 1, bars=3_000)
    assert decision is not None
    assert decision.action == "promote"
    assert trial.seen.outcomes == RULES.retrain_outcomes
    assert "not worse by more than 0.002: Brier score" in decision.reason


def test_a_retrain_that_is_worse_by_more_does_not() -> None:
    """Skill 0.7 in place of 1 costs (0.3 · 0.2)² = 0.0036 of Brier score: too little for evidence, too much to be let by."""
    trial, decision = run(retrain(), 0.7, 1, bars=1_200, seed=4)
    assert decision is None
    assert trial.seen.brier is not None
    assert trial.seen.rival_brier is not None
    assert trial.seen.brier - trial.seen.rival_brier > RULES.retrain_tolerance
    seen = msgspec.structs.replace(
        trial.seen, outcomes=RETRAIN_PATIENCE * RULES.retrain_outcomes, loss=2_600.0, rival_loss=2_500.0
    )
    decision = msgspec.structs.replace(trial, seen=seen).verdict(RULES)
    assert decision is not None
    assert decision.action == "retire"


def test_a_provisional_version_proves_itself_against_its_base_rate() -> None:
    trial, decision = run(proof("v1", "narrow"), 1, 0, bars=3_000)
    assert decision is not None
    assert (decision.action, decision.version, decision.against) == ("promote", "v1", "v1")
    assert decision.reason.startswith("Version v1 predicts better than the base rate of its training: evidence 1")
    assert decision.evidence["rival"] == "base rate"
    assert run(proof("v1", "narrow"), -1, 0, bars=1_000)[1] is None
    # Once proven, what comes later does not change the answer.
    later, _ = run(trial, -1, 0, bars=500, first=trial.seen.bars)
    assert later.verdict(RULES) is not None


def test_a_champion_is_rolled_back_where_its_base_rate_is_better() -> None:
    _, decision = run(health("v1", "narrow"), -1, 0, bars=3_000)
    assert decision is not None
    assert (decision.action, decision.version, decision.against) == ("rollback", "v1", "v1")
    assert decision.reason.startswith("The base rate of its training predicts better than version v1: evidence 1")
    assert run(health("v1", "narrow"), 1, 0, bars=2_000)[1] is None


def test_the_levels_are_settings() -> None:
    strict = Models(promote_evidence=1e6, rollback_evidence=1e6)
    for trial, skill in ((other(), 1), (proof("v1", ""), 1), (health("v1", ""), -1)):
        early, _ = run(trial, skill, 0, bars=5_000)
        late, decision = run(trial, skill, 0, bars=5_000, rules=strict)
        assert decision is not None
        assert late.seen.outcomes > 1.5 * early.seen.outcomes


def test_evidence_belongs_to_the_recipe() -> None:
    trial, _ = run(other(), 0.8, 1, bars=100)
    assert trial.continued("v3").seen == trial.seen
    assert trial.continued("v3").subject == "v3"
    assert trial.continued("v2") is trial
    assert trial.against("v1", "narrow") is trial
    retrained = trial.against("v4", "narrow")  # a retrain of the champion: the question is the same
    assert (retrained.rival, retrained.seen) == ("v4", trial.seen)
    other_champion = trial.against("v5", "deep")
    assert other_champion == shadow("v2", "wide", "v5", "deep")
    assert other_champion.seen == Evidence()
    its_own = trial.against("v6", "wide")
    assert (its_own.kind, its_own.seen) == ("retrain", Evidence())


def test_a_retrain_is_judged_by_its_own_outcomes_against_who_serves() -> None:
    trial, _ = run(retrain(), 0.8, 1, bars=100)
    assert trial.continued("v3").seen == Evidence()
    assert trial.against("v4", "narrow").seen == Evidence()
    assert trial.against("v4", "narrow").kind == "retrain"
    assert trial.against("v4", "wide").kind == "recipe"


def test_a_trial_survives_its_storage() -> None:
    trial, _ = run(other(), 0.5, 0.4, bars=77)
    for codec in (msgspec.json, msgspec.msgpack):
        assert codec.decode(codec.encode(trial), type=Trial) == trial
    assert trial.add(3, 303, [Paired(0.1, 0.2, True)]) is trial
