"""Requests to the trainer and its answers, as they travel, and the sentences that they say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from schema.messages import Message, ModelEvent, ModelState

Outcome = Literal["provisional", "candidate", "shadow", "champion", "retired", "refused", "failed", "busy", "invalid"]


class TrainRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``progress`` is an inbox that hears :class:`Progress` while the run lasts.

    ``trees``, ``max_depth`` and ``min_samples_leaf`` go over the settings' for this run: another recipe, which has to prove
    itself against the one that serves.
    """

    timeframe: str
    seed: int | None = None
    progress: str | None = None
    trees: Annotated[int, Meta(ge=1, le=2_000)] | None = None
    max_depth: Annotated[int, Meta(ge=1, le=24)] | None = None
    min_samples_leaf: Annotated[int, Meta(ge=1)] | None = None


class ReleaseRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A person's word: ``version`` is the one to serve; a rollback without one means the version before."""

    reason: str
    version: str | None = None
    model_name: str | None = None


class DecisionRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the evidence says, from the scorer: ``promote`` a shadow or the provisional version, ``rollback`` the champion
    (to the version that served before, or to provisional where none did), ``retire`` a shadow that failed.

    ``against`` is the version that served when it was decided; where another one serves by now the decision is void.
    """

    model_name: str
    version: str
    action: Literal["promote", "rollback", "retire"]
    reason: str
    against: str | None = None
    evidence: dict[str, Any] = {}


class Progress(Message, frozen=True, kw_only=True, omit_defaults=False):
    """What a run is doing and how much of it is done, 0..1."""

    stage: str
    done: float


class Verdict(Message, frozen=True, kw_only=True, omit_defaults=False):
    """The answer to every request: what became of it, in one sentence and in figures.

    ``ok`` is False where the answer is no (``refused``) or there is none (``failed``, ``busy``, ``invalid``).
    """

    ok: bool
    verdict: Outcome
    message: str
    model_name: str | None = None
    version: str | None = None
    serving: bool = False
    from_seq: int | None = None
    rows: int | None = None
    auc: float | None = None
    auc_ci: tuple[float, float] | None = None
    brier: float | None = None
    threshold: float | None = None
    path: str | None = None


def invalid(message: str) -> Verdict:
    """The request itself is wrong."""
    return Verdict(ok=False, verdict="invalid", message=message)


def failed(message: str) -> Verdict:
    """Nothing was decided."""
    return Verdict(ok=False, verdict="failed", message=message)


def refused(model_name: str, reason: str, report: Mapping[str, Any]) -> Verdict:
    """A run that gave no model."""
    message = f"No model: {reason}"
    return Verdict(ok=False, verdict="refused", message=message, model_name=model_name, **_figures(report))


def registered(
    model_name: str, version: str, state: Literal["shadow", "candidate"], report: Mapping[str, Any], path: str
) -> Verdict:
    """A version that is stored while another serves."""
    call = f'mt5 models promote {version} --reason "…"'
    what = (
        "is followed as a shadow: it takes over when its outcomes show that it should"
        if state == "shadow"
        else "is stored as a candidate, since enough shadows are followed"
    )
    return Verdict(
        ok=True,
        verdict=state,
        message=f"{model_name} {version} {what}; `{call}` makes it serve at once.",
        model_name=model_name,
        version=version,
        path=path,
        **_figures(report),
    )


def settled(model_name: str, version: str, state: ModelState, serving: bool) -> Verdict:
    """A decision that needed, or needs, no word of the emitter's."""
    message = f"{model_name} {version} {'serves as' if serving else 'is'} {state}."
    return Verdict(ok=True, verdict=state, message=message, model_name=model_name, version=version, serving=serving)


def waits(model_name: str, version: str, state: ModelState, asked: str | None) -> Verdict:
    """The emitter has not answered an earlier release yet; nothing new was decided."""
    if version == asked:
        return released(model_name, version, state, None)
    message = f"{model_name} {version} is released and the emitter has not answered: ask again when it has."
    return Verdict(ok=False, verdict="failed", message=message, model_name=model_name, version=version)


def released(
    model_name: str,
    version: str,
    state: ModelState,
    answer: ModelEvent | None,
    report: Mapping[str, Any] | None = None,
    path: str | None = None,
) -> Verdict:
    """A version that was released, and what the emitter answered (None: nothing yet)."""
    name = f"{model_name} {version}"
    serving = answer is not None and answer.event == "activated"
    if answer is None:
        message = (
            f"{name} is released as {state}; the emitter has not answered: it will serve when the emitter is back."
        )
    elif serving:
        message = f"{name} serves as {state} from candle message {answer.from_seq} on."
    else:
        message = f"The emitter refused {name}: {answer.reason}"
    return Verdict(
        ok=answer is None or serving,
        verdict="refused" if answer is not None and not serving else state,
        message=message,
        model_name=model_name,
        version=version,
        serving=serving,
        from_seq=answer.from_seq if answer is not None and serving else None,
        path=path,
        **_figures(report or {}),
    )


def _figures(report: Mapping[str, Any]) -> dict[str, Any]:
    interval = report.get("auc_ci")
    return {key: report.get(key) for key in ("rows", "auc", "brier", "threshold")} | {
        "auc_ci": None if interval is None else (interval[0], interval[1])
    }
