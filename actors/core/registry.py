"""The models' lives as a fold over their events: who serves, who is followed, who waits, who served before.

``models.<name>`` is the truth; the tables ``models`` and ``model_decisions`` and the link to the serving pickle are made
from this fold. A version serves from its ``activated`` event on, which retires the one before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal

from schema.messages import ModelEvent, ModelState

ACTION: Final = "action"  # in an event's evidence: what was decided, where the event alone does not say it
AGAINST: Final = "against"  # the version that served when it was decided
ROLLBACK: Final = "rollback"
PRUNE: Final = "prune"


@dataclass(slots=True)
class Version:
    """What the events say of one version; ``asked`` is the state that it was released for and has not reached yet.

    ``spoke``: it has been champion. ``failed``: it was taken out of service for what it did, so that nothing goes back to
    it by itself. ``withdrawn``: it was retired by decision and not just replaced. ``pruned``: its files are gone.
    """

    model_name: str
    version: str
    timeframe: str
    state: ModelState = "candidate"
    asked: ModelState | None = None
    from_seq: int | None = None
    activated_at: datetime | None = None
    reason: str = ""
    by: str = "trainer"
    recipe: str = ""
    evidence: dict[str, Any] = field(default_factory=dict)
    spoke: bool = False
    failed: bool = False
    withdrawn: bool = False
    pruned: bool = False
    turns_back: bool = False  # its release takes another one out of service for what that did


@dataclass(slots=True)
class Registry:
    """All versions by (model, version), and each model's activations, oldest first."""

    versions: dict[tuple[str, str], Version] = field(default_factory=dict)
    activations: dict[str, list[str]] = field(default_factory=dict)
    _serving: dict[str, str] = field(default_factory=dict)

    def apply(self, event: ModelEvent) -> list[Version]:
        """Takes the next event and returns the versions that it changed."""
        key = (event.model_name, event.version)
        version = self.versions.setdefault(key, Version(event.model_name, event.version, event.timeframe))
        version.recipe = event.recipe or version.recipe
        match event.event:
            case "registered":
                self._register(version, event)
            case "released":
                version.asked, version.turns_back = event.state, event.evidence.get(ACTION) == ROLLBACK
                version.reason, version.by, version.evidence = event.reason, event.by, event.evidence
            case "activated":
                return self._activate(version, event)
            case "refused":
                version.asked, version.turns_back = None, False
                version.reason, version.by = event.reason, event.by
                if version is not self.serving(event.model_name):  # else it goes on as it was
                    version.state = "refused"
            case "retired":
                version.state, version.asked, version.withdrawn = "retired", None, True
                version.pruned |= event.evidence.get(ACTION) == PRUNE
                version.reason, version.by, version.evidence = event.reason, event.by, event.evidence
                if self._serving.get(event.model_name) == version.version:
                    del self._serving[event.model_name]
        return [version]

    def _register(self, version: Version, event: ModelEvent) -> None:
        if version.activated_at is not None or version.state not in ("candidate", "shadow"):
            return  # what is read again takes nothing back
        version.state = "shadow" if event.state == "shadow" else "candidate"
        if version.asked is None:
            version.reason, version.by = event.reason, event.by

    def _activate(self, version: Version, event: ModelEvent) -> list[Version]:
        changed = [version]
        before = self.serving(event.model_name)
        if before is not None and before is not version:
            before.state, before.failed = "retired", version.turns_back
            why = f"rolled back to {version.version}" if version.turns_back else f"replaced by {version.version}"
            before.reason, before.by = why, version.by
            changed.append(before)
        version.state, version.asked, version.turns_back = version.asked or event.state, None, False
        version.from_seq, version.activated_at = event.from_seq, event.at
        version.spoke |= version.state == "champion"
        version.failed = version.withdrawn = False
        history = self.activations.setdefault(event.model_name, [])
        if not history or history[-1] != version.version:
            history.append(version.version)
        self._serving[event.model_name] = version.version
        return changed

    # --- who is what -----------------------------------------------------------------------------------------------

    def serving(self, model_name: str) -> Version | None:
        """The version that serves, None where none does."""
        version = self._serving.get(model_name)
        return None if version is None else self.versions[model_name, version]

    def awaited(self, model_name: str) -> Version | None:
        """The newest version that was released and neither activated nor refused yet."""
        waiting = [v for v in self.of(model_name) if v.asked is not None]
        return waiting[-1] if waiting else None

    def previous(self, model_name: str, *, sound: bool = False) -> Version | None:
        """The version that served before the one that serves now (or that served last), unless it was refused or withdrawn.

        ``sound``: nor was it ever taken out of service for what it did.
        """
        now = self._serving.get(model_name)
        for name in reversed(self.activations.get(model_name, [])):
            known = self.versions[model_name, name]
            out = known.state == "refused" or known.withdrawn or (sound and known.failed)
            if name != now and not out:
                return known
        return None

    def of(self, model_name: str) -> list[Version]:
        """A model's versions in the order in which they were first heard of."""
        return [v for v in self.versions.values() if v.model_name == model_name]

    def find(self, version: str) -> list[Version]:
        """The versions of that name, of whatever model."""
        return [v for (_, name), v in self.versions.items() if name == version]

    def place(self, model_name: str, shadows: int) -> Literal["shadow", "candidate"]:
        """What a version is registered as that does not serve: followed, while fewer than ``shadows`` are."""
        followed = [v for v in self.of(model_name) if v.state == "shadow"]
        return "shadow" if len(followed) < shadows else "candidate"

    def next_shadow(self, model_name: str, shadows: int) -> Version | None:
        """The newest candidate, where one more may be followed."""
        if self.place(model_name, shadows) == "candidate":
            return None
        waiting = [v for v in self.of(model_name) if v.state == "candidate" and v.asked is None]
        return waiting[-1] if waiting else None

    def beyond(self, model_name: str, keep: int) -> list[Version]:
        """The versions older than the newest ``keep`` that neither serve nor are followed, awaited or pruned."""
        serving = self.serving(model_name)
        old = sorted(self.of(model_name), key=lambda v: v.version, reverse=True)[keep:]
        return [v for v in old if v is not serving and v.state != "shadow" and v.asked is None and not v.pruned]
