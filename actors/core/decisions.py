"""What a request may do to the registry: the step that it asks for, that there is none left, or why it cannot be done.

Pure, so that a decision which is asked again, after a restart or a lost answer, finds what has been done of it already.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from actors.core.registry import ACTION, AGAINST, ROLLBACK, Registry, Version
from actors.core.verdicts import DecisionRequest
from schema.messages import ModelState


class Step(NamedTuple):
    """An event to publish: ``state`` is what a release is for."""

    event: Literal["released", "retired"]
    version: Version
    state: ModelState
    evidence: dict[str, Any]


class Waits(NamedTuple):
    """The release is out and the emitter has not answered."""

    version: Version


class Settled(NamedTuple):
    """It is as was asked."""

    version: Version


Judgement = Step | Waits | Settled


def judge(registry: Registry, request: DecisionRequest) -> Judgement:
    """What to do about a decision by evidence. Raises ValueError, with a clause, where it is void or makes no sense."""
    version = registry.versions.get((request.model_name, request.version))
    if version is None:
        raise ValueError(f"there is no version {request.version} of {request.model_name}; `models list` shows them.")
    serving = registry.serving(request.model_name)
    match request.action:
        case "promote":
            return _promote(registry, request, version, serving)
        case "rollback":
            return _rollback(registry, request, version, serving)
        case "retire":
            _same(request, serving)
            return retire(registry, version, evidence=request.evidence)


def _promote(registry: Registry, request: DecisionRequest, version: Version, serving: Version | None) -> Judgement:
    itself = version is serving
    if itself and (version.state == "champion" or request.against not in (None, version.version)):
        return Settled(version)  # what took the place of a provisional version is provisional, and done
    if version.asked is not None:
        return Waits(version)
    if itself:
        return _release(registry, version, "champion", "promote", request.evidence)
    if version.state != "shadow":
        raise ValueError(f"{version.version} is {version.state}: only shadows and provisional versions are promoted.")
    _same(request, serving, named=True)
    # It has shown what it is worth beside the version that it replaces: where that was unproven, so is this one.
    state: ModelState = "champion" if serving is not None and serving.state == "champion" else "provisional"
    return _release(registry, version, state, "promote", request.evidence)


def _rollback(registry: Registry, request: DecisionRequest, version: Version, serving: Version | None) -> Judgement:
    waiting = registry.awaited(request.model_name)
    if waiting is not None and waiting.turns_back:
        return Waits(waiting)
    if version is not serving:
        if version.failed:
            return Settled(version)
        raise ValueError(f"{version.version} does not serve.")
    _same(request, serving)
    back = registry.previous(request.model_name, sound=True)
    if back is None:
        if version.state != "champion":
            return Settled(version)  # it says nothing as it is, and there is nothing to go back to
        return _release(registry, version, "provisional", ROLLBACK, request.evidence)
    return _release(registry, back, "champion" if back.spoke else "provisional", ROLLBACK, request.evidence)


def retire(registry: Registry, version: Version, *, evidence: dict[str, Any] | None = None) -> Judgement:
    """Takes a version that does not serve out of the running. Raises ValueError where it serves or is about to."""
    if version is registry.serving(version.model_name):
        raise ValueError(f"{version.version} serves: roll back or promote another version first.")
    if version.asked is not None:
        raise ValueError(f"{version.version} is released and waits for the emitter: ask again when it has answered.")
    if version.withdrawn:
        return Settled(version)
    return Step("retired", version, "retired", _facts(registry, version.model_name, "retire", evidence))


def by_hand(registry: Registry, version: Version, action: Literal["promote", "rollback"]) -> Step:
    """A person's word goes over any evidence: that version serves as champion.

    But a champion that is rolled back to itself, for want of an earlier version, serves as provisional.
    """
    itself = action == ROLLBACK and version is registry.serving(version.model_name)
    return _release(registry, version, "provisional" if itself else "champion", action, None)


def _release(
    registry: Registry, version: Version, state: ModelState, action: str, evidence: dict[str, Any] | None
) -> Step:
    return Step("released", version, state, _facts(registry, version.model_name, action, evidence))


def _facts(registry: Registry, model_name: str, action: str, evidence: dict[str, Any] | None) -> dict[str, Any]:
    serving = registry.serving(model_name)
    return {**(evidence or {}), ACTION: action, AGAINST: None if serving is None else serving.version}


def _same(request: DecisionRequest, serving: Version | None, *, named: bool = False) -> None:
    """Evidence is against the version that served when it was weighed; ``named``: it must say which."""
    now = None if serving is None else serving.version
    if request.against != now and (named or request.against is not None):
        raise ValueError(
            f"it was decided against {request.against or 'no version'}, and {now or 'none'} serves now: the decision is void."
        )
