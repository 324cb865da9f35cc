"""What evidence decides about a model's version: promote, roll back, retire, or wait.

A :class:`Trial` sets one version, the *subject*, against a rival on the same bars. There are four:

========= ===================================== ================= ======================================================
kind      subject                               rival             decision
========= ===================================== ================= ======================================================
retrain   a shadow of the serving recipe        serving version   promote after ``retrain_outcomes`` unless the mean Brier
                                                                  score is worse by more than ``retrain_tolerance``
recipe    a shadow of another recipe            serving version   promote at e ≥ ``promote_evidence`` that it is better
proof     the provisional version               its base rate     promote at e ≥ ``promote_evidence`` that it is better
health    the champion                          its base rate     roll back at e ≥ ``rollback_evidence`` that it is worse
========= ===================================== ================= ======================================================

A shadow is retired at e ≥ ``rollback_evidence`` that its rival is better, or once its outcomes decided nothing
(``PATIENCE``). A provisional version that fails its proof is not retired: it does not speak, and retrains follow.

Evidence of two recipes survives a retrain of either, because which version speaks for a recipe at a bar is known before
the outcome is; so :meth:`Trial.continued` and :meth:`Trial.against` go on where the recipe is the same. Everything is a pure
function of the bars: a trial may be stored (JSON or MessagePack, by msgspec) and continued, or folded again from rows. What
e-values promise, and how far a highest one may be trusted, stands in :mod:`actors.core.evidence`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal

from msgspec import Struct
from msgspec.structs import replace

from actors.core.evidence import Evidence, Paired
from schema.settings import Models

Kind = Literal["retrain", "recipe", "proof", "health"]
Action = Literal["promote", "rollback", "retire"]

PATIENCE: Final = 60_000  # outcomes of a shadow of another recipe: twice what tells AUC 0.53 from 0.57 …
RETRAIN_PATIENCE: Final = 10  # … and of a retrain, in units of retrain_outcomes


class Decision(Struct, frozen=True, kw_only=True):
    """What is to be done with ``version``, in the words of :class:`~actors.core.verdicts.DecisionRequest`.

    ``against`` is the version that serves: the rival of a shadow, and the subject itself where the base rate is the rival.
    """

    action: Action
    version: str
    against: str
    reason: str
    evidence: dict[str, Any]


class Trial(Struct, frozen=True, kw_only=True):
    """One comparison and all that it has seen. ``rival`` is a version, or None for the base rate of the subject's training.

    Recipes are empty where they do not matter (proof and health). A row's ``p`` is the subject's probability and ``q`` the
    rival's, base rates included.
    """

    kind: Kind
    subject: str
    recipe: str = ""
    rival: str | None = None
    rival_recipe: str = ""
    seen: Evidence = Evidence()

    def add(self, ts: int, until: int, rows: Sequence[Paired]) -> Trial:
        """The trial after one more bar: see :meth:`Evidence.add`."""
        seen = self.seen.add(ts, until, rows)
        return self if seen is self.seen else replace(self, seen=seen)

    def continued(self, version: str) -> Trial:
        """The same evidence, of which ``version``, another of the subject's recipe, speaks from the next bar on.

        A retrain is judged by its own outcomes: its trial begins anew.
        """
        if version == self.subject:
            return self
        seen = Evidence() if self.kind == "retrain" else self.seen
        return replace(self, subject=version, seen=seen)

    def against(self, rival: str, rival_recipe: str) -> Trial:
        """A shadow's trial once another version serves.

        It begins anew against it, but for one case: both are other recipes' than the subject's and the same recipe's. Its
        retrains would else, one after the other, keep every challenger from ever getting anywhere.
        """
        if rival == self.rival:
            return self
        if self.kind == "recipe" and rival_recipe == self.rival_recipe:
            return replace(self, rival=rival)
        return shadow(self.subject, self.recipe, rival, rival_recipe)

    def verdict(self, settings: Models) -> Decision | None:
        """What the evidence decides so far; None: it decides nothing yet.

        Once an e-value was high enough the answer stays, until the trial is over; so it does not matter when, or how often,
        it is asked for.
        """
        match self.kind:
            case "health":
                return self._lost(settings, "rollback")
            case "proof":
                return self._won(settings)
            case "recipe":
                return self._won(settings) or self._lost(settings, "retire") or self._endless(PATIENCE)
            case "retrain":
                patience = RETRAIN_PATIENCE * settings.retrain_outcomes
                return self._good_enough(settings) or self._lost(settings, "retire") or self._endless(patience)

    def evidence(self) -> dict[str, Any]:
        """The figures, for events and rows: ``e_value`` that the subject is better and ``e_against`` that its rival is, each
        the highest so far; ``difference`` is the rival's mean Brier score less the subject's, positive where it is better.
        """
        seen = self.seen
        brier, rival = seen.brier, seen.rival_brier
        return {
            "kind": self.kind,
            "version": self.subject,
            "rival": self.rival or "base rate",
            "e_value": seen.peak_better,
            "e_against": seen.peak_worse,
            "e_value_now": seen.e_better,
            "e_against_now": seen.e_worse,
            "outcomes": seen.outcomes,
            "bars": seen.bars,
            "brier": brier,
            "brier_rival": rival,
            "difference": None if brier is None or rival is None else rival - brier,
            "from": _iso(seen.since),
            "to": _iso(seen.to),
        }

    def _won(self, settings: Models) -> Decision | None:
        if self.seen.peak_better < settings.promote_evidence:
            return None
        reason = (
            f"{self._name} predicts better than {self._rival_name}: evidence {_e(self.seen.peak_better)}, where "
            f"{settings.promote_evidence:g} is asked for; {self._scores}."
        )
        return self._decision("promote", reason)

    def _lost(self, settings: Models, action: Action) -> Decision | None:
        if self.seen.peak_worse < settings.rollback_evidence:
            return None
        reason = (
            f"{self._rival_name} predicts better than {self._name}: evidence {_e(self.seen.peak_worse)}, where "
            f"{settings.rollback_evidence:g} is enough; {self._scores}."
        )
        return self._decision(action, reason)

    def _good_enough(self, settings: Models) -> Decision | None:
        seen = self.seen
        if seen.outcomes < settings.retrain_outcomes or seen.brier is None or seen.rival_brier is None:
            return None
        if seen.brier - seen.rival_brier > settings.retrain_tolerance:
            return None
        reason = (
            f"{self._name} is a retrain of the recipe of {self._rival_name} and not worse by more than "
            f"{settings.retrain_tolerance:g}: {self._scores}."
        )
        return self._decision("promote", reason)

    def _endless(self, patience: int) -> Decision | None:
        if self.seen.outcomes < patience:
            return None
        reason = f"{self._name} is not told from {self._rival_name} after {patience:,} outcomes: {self._scores}."
        return self._decision("retire", reason)

    def _decision(self, action: Action, reason: str) -> Decision:
        return Decision(
            action=action,
            version=self.subject,
            against=self.rival or self.subject,
            reason=reason[0].upper() + reason[1:],
            evidence=self.evidence(),
        )

    @property
    def _name(self) -> str:
        return f"version {self.subject}" if self.rival is None else f"shadow {self.subject}"

    @property
    def _rival_name(self) -> str:
        return "the base rate of its training" if self.rival is None else f"version {self.rival}"

    @property
    def _scores(self) -> str:
        """What was seen, as the end of a sentence."""
        brier, rival = self.seen.brier, self.seen.rival_brier
        if brier is None or rival is None:
            return "no outcome yet"
        return f"Brier score {brier:.5f} against {rival:.5f} over {self.seen.outcomes:,} outcomes"


def shadow(subject: str, recipe: str, rival: str, rival_recipe: str) -> Trial:
    """A shadow's trial against the version that serves, from its first outcome on."""
    kind: Kind = "retrain" if recipe == rival_recipe else "recipe"
    return Trial(kind=kind, subject=subject, recipe=recipe, rival=rival, rival_recipe=rival_recipe)


def proof(provisional: str, recipe: str) -> Trial:
    """A provisional version's trial against its base rate.

    A retrain that replaces it goes on with its evidence (:meth:`Trial.continued`). A champion that was rolled back to
    provisional begins a new one: what its recipe had earned would else promote it again at once.
    """
    return Trial(kind="proof", subject=provisional, recipe=recipe)


def health(champion: str, recipe: str) -> Trial:
    """A champion's trial against its base rate, from its activation on.

    A retrain that replaces it goes on with its evidence too: began each retrain anew, a recipe that fails would be replaced
    by itself faster than it is noticed. Any other change of champion begins a new one.
    """
    return Trial(kind="health", subject=champion, recipe=recipe)


def _e(value: float) -> str:
    return f"{value:,.0f}" if value < 1e6 else f"{value:.0e}"


def _iso(ts: int | None) -> str | None:
    return None if ts is None else datetime.fromtimestamp(ts, UTC).isoformat().replace("+00:00", "Z")
