"""Decisions by evidence and by hand: what a registry makes of them, and of the same ones asked again."""

from __future__ import annotations

from typing import Any

import pytest

from actors.core.decisions import Judgement, Settled, Step, Waits, by_hand, judge, retire
from actors.core.registry import Registry
from actors.core.verdicts import DecisionRequest
from tests.unit.test_registry import event, fold


def served(version: str, state: str, seq: int, recipe: str = "r", **evidence: Any) -> list[Any]:
    return [
        event("released", version, state=state, recipe=recipe, evidence=evidence),
        event("activated", version, state=state, recipe=recipe, from_seq=seq, by="emitter", evidence=evidence),
    ]


def shadow(version: str, recipe: str = "r") -> Any:
    return event("registered", version, state="shadow", recipe=recipe)


def request(action: str, version: str, against: str | None = None) -> DecisionRequest:
    evidence = {"e_value": 120.0, "action": "no", "against": "no"}
    return DecisionRequest(
        model_name="rf_m1",
        version=version,
        action=action,  # type: ignore[arg-type]
        reason="e",
        against=against,
        evidence=evidence,
    )


def ask(registry: Registry, action: str, version: str, against: str | None = None) -> Judgement:
    return judge(registry, request(action, version, against))


def take(registry: Registry, step: Judgement, answer: str | None = "activated") -> None:
    """The step's event, and the emitter's answer."""
    assert isinstance(step, Step)
    more = {"state": step.state, "evidence": step.evidence}
    registry.apply(event(step.event, step.version.version, **more))
    if step.event == "released" and answer is not None:
        registry.apply(event(answer, step.version.version, from_seq=500, by="emitter", **more))


def facts(step: Judgement) -> tuple[Any, ...]:
    assert isinstance(step, Step)
    return step.event, step.version.version, step.state, step.evidence["action"], step.evidence["against"]


def test_a_provisional_version_is_promoted_and_a_repeat_changes_nothing() -> None:
    registry = fold(*served("v1", "provisional", 7))
    step = ask(registry, "promote", "v1", "v1")
    assert facts(step) == ("released", "v1", "champion", "promote", "v1")
    assert isinstance(step, Step)
    assert step.evidence["e_value"] == 120.0
    assert facts(ask(registry, "promote", "v1")) == facts(step)
    take(registry, step, answer=None)
    assert ask(registry, "promote", "v1", "v1") == Waits(step.version), "a trainer that started again goes on waiting"
    registry.apply(event("activated", "v1", state="champion", from_seq=9, by="emitter"))
    assert ask(registry, "promote", "v1", "v1") == Settled(step.version)


@pytest.mark.parametrize("recipe", ["r", "another"])
@pytest.mark.parametrize("state", ["champion", "provisional"])
def test_what_beats_an_unproven_version_is_unproven_itself(state: str, recipe: str) -> None:
    registry = fold(*served("v1", state, 7), shadow("v2", recipe))
    step = ask(registry, "promote", "v2", "v1")
    assert facts(step) == ("released", "v2", state, "promote", "v1")
    take(registry, step)
    assert ask(registry, "promote", "v2", "v1") == Settled(registry.find("v2")[0])
    if state == "provisional":
        assert facts(ask(registry, "promote", "v2", "v2")) == ("released", "v2", "champion", "promote", "v2")


def test_a_shadow_that_follows_nobody_begins_unproven() -> None:
    registry = fold(shadow("v1"))
    assert facts(ask(registry, "promote", "v1")) == ("released", "v1", "provisional", "promote", None)


def test_a_decision_against_a_version_that_no_longer_serves_is_void() -> None:
    registry = fold(*served("v1", "champion", 7), shadow("v2"), shadow("v3"), *served("v2", "champion", 20))
    for action, version in (("promote", "v3"), ("retire", "v3")):
        with pytest.raises(ValueError, match="decided against v1, and v2 serves now: the decision is void"):
            ask(registry, action, version, "v1")
    with pytest.raises(ValueError, match="decided against no version, and v2 serves"):
        ask(registry, "promote", "v3")
    with pytest.raises(ValueError, match="v1 does not serve"):
        ask(registry, "rollback", "v1", "v1")
    with pytest.raises(ValueError, match="v1 is retired"):
        ask(registry, "promote", "v1", "v2")
    with pytest.raises(ValueError, match="no version v9"):
        ask(registry, "promote", "v9", "v2")


def test_a_rollback_goes_to_the_last_that_was_sound_as_what_it_was() -> None:
    registry = fold(
        *served("v1", "champion", 7),
        shadow("v2"),
        *served("v2", "champion", 20),
        shadow("v3"),
        *served("v3", "champion", 30),
    )
    step = ask(registry, "rollback", "v3", "v3")
    assert facts(step) == ("released", "v2", "champion", "rollback", "v3")
    take(registry, step, answer=None)
    assert ask(registry, "rollback", "v3", "v3") == Waits(registry.find("v2")[0])
    registry.apply(event("activated", "v2", state="champion", from_seq=40, by="emitter"))
    v3 = registry.find("v3")[0]
    assert (v3.state, v3.reason, v3.failed) == ("retired", "rolled back to v2", True)
    assert ask(registry, "rollback", "v3", "v3") == Settled(v3)
    # v2 fails too: not back to v3, which served before it, but to v1; and then there is none.
    take(registry, ask(registry, "rollback", "v2", "v2"))
    serving = registry.serving("rf_m1")
    assert serving is not None
    assert (serving.version, serving.state) == ("v1", "champion")
    step = ask(registry, "rollback", "v1", "v1")
    assert facts(step) == ("released", "v1", "provisional", "rollback", "v1")
    take(registry, step)
    assert registry.serving("rf_m1") is serving
    assert serving.state == "provisional"
    assert not serving.failed
    assert ask(registry, "rollback", "v1", "v1") == Settled(serving)
    # Its evidence goes on, and may make it champion again.
    take(registry, ask(registry, "promote", "v1", "v1"))
    assert serving.state == "champion"


def test_what_never_spoke_does_not_speak_for_a_rollback() -> None:
    registry = fold(*served("v1", "provisional", 7), shadow("v2", "s"), *served("v2", "champion", 20, "s"))
    assert facts(ask(registry, "rollback", "v2")) == ("released", "v1", "provisional", "rollback", "v2")


def test_a_refused_rollback_leaves_what_serves() -> None:
    registry = fold(*served("v1", "champion", 7))
    take(registry, ask(registry, "rollback", "v1"), answer="refused")
    serving = registry.serving("rf_m1")
    assert serving is not None
    assert (serving.version, serving.state, serving.asked) == ("v1", "champion", None)
    registry = fold(*served("v1", "champion", 7), shadow("v2"), *served("v2", "champion", 20))
    take(registry, ask(registry, "rollback", "v2"), answer="refused")
    now = registry.serving("rf_m1")
    assert now is not None
    assert (now.version, now.state, now.failed) == ("v2", "champion", False)
    assert facts(ask(registry, "rollback", "v2"))[:3] == ("released", "v2", "provisional"), (
        "v1 cannot be had: none is left"
    )


def test_a_shadow_is_retired_once_and_what_serves_is_not() -> None:
    registry = fold(*served("v1", "champion", 7), shadow("v2"))
    step = ask(registry, "retire", "v2", "v1")
    assert facts(step) == ("retired", "v2", "retired", "retire", "v1")
    take(registry, step)
    assert ask(registry, "retire", "v2", "v1") == Settled(registry.find("v2")[0])
    with pytest.raises(ValueError, match="v1 serves: roll back or promote another version first"):
        ask(registry, "retire", "v1", "v1")
    waiting = fold(*served("v1", "champion", 7), shadow("v2"), event("released", "v2", state="champion"))
    with pytest.raises(ValueError, match="waits for the emitter"):
        retire(waiting, waiting.find("v2")[0])
    with pytest.raises(ValueError, match="v2 is retired"):
        ask(registry, "promote", "v2", "v1")


def test_a_persons_word_goes_over_evidence_and_is_told_from_it() -> None:
    registry = fold(*served("v1", "champion", 7), shadow("v2"), *served("v2", "champion", 20))
    back = registry.previous("rf_m1")
    assert back is not None
    take(registry, by_hand(registry, back, "rollback"))
    assert registry.find("v2")[0].failed
    again = registry.previous("rf_m1")
    assert again is registry.find("v2")[0], "a person may go back to it"
    assert registry.previous("rf_m1", sound=True) is None, "evidence may not"
    take(registry, retire(registry, registry.find("v2")[0]))
    assert registry.previous("rf_m1") is None
    step = by_hand(registry, registry.find("v1")[0], "rollback")
    assert facts(step) == ("released", "v1", "provisional", "rollback", "v1")


def test_a_place_that_becomes_free_goes_to_the_newest_candidate() -> None:
    registry = fold(*served("v1", "champion", 7), shadow("v2"), event("registered", "v3"), event("registered", "v4"))
    assert registry.place("rf_m1", 1) == "candidate"
    assert registry.place("rf_m1", 2) == "shadow"
    assert registry.next_shadow("rf_m1", 1) is None
    take(registry, ask(registry, "retire", "v2"))
    v4 = registry.next_shadow("rf_m1", 1)
    assert v4 is not None
    assert v4.version == "v4"
    registry.apply(event("registered", "v4", state="shadow"))
    assert v4.state == "shadow"
    assert registry.next_shadow("rf_m1", 1) is None


def test_old_versions_but_those_in_use_are_beyond_what_is_kept() -> None:
    registry = fold(
        *served("v1", "champion", 7),
        shadow("v2"),
        event("registered", "v3"),
        event("registered", "v4"),
        *served("v5", "champion", 30),
        event("registered", "v6"),
    )
    assert [v.version for v in registry.beyond("rf_m1", 2)] == ["v4", "v3", "v1"]
    registry.apply(event("retired", "v3", evidence={"action": "prune"}))
    assert registry.find("v3")[0].pruned
    assert [v.version for v in registry.beyond("rf_m1", 2)] == ["v4", "v1"]
    assert [v.version for v in registry.beyond("rf_m1", 1)] == ["v4", "v1"], "v5 serves"
