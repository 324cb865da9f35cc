"""The models' lives as a fold over their events: who serves, who waits, who served before.

``models.<name>`` is the truth; the ``models`` table and the link to the serving pickle are made from this fold. A
version serves from its ``activated`` event on, which retires the one before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from schema.messages import ModelEvent, ModelState


@dataclass(slots=True)
class Version:
    """What the events say of one version; ``asked`` is the state that it was released for and has not reached yet."""

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
        changed = [version]
        version.recipe = event.recipe or version.recipe
        match event.event:
            case "registered":
                version.state = event.state
                version.reason, version.by = event.reason, event.by
            case "released":
                version.asked, version.reason, version.by = event.state, event.reason, event.by
            case "activated":
                before = self.serving(event.model_name)
                if before is not None and before is not version:
                    before.state = "retired"
                    before.reason, before.by = f"replaced by {version.version}", version.by
                    changed.append(before)
                version.state, version.asked = version.asked or event.state, None
                version.from_seq, version.activated_at = event.from_seq, event.at
                history = self.activations.setdefault(event.model_name, [])
                if not history or history[-1] != version.version:
                    history.append(version.version)
                self._serving[event.model_name] = version.version
            case "refused" | "retired":
                version.state, version.asked = event.event, None
                version.reason, version.by = event.reason, event.by
                if self._serving.get(event.model_name) == version.version:
                    del self._serving[event.model_name]
        return changed

    def serving(self, model_name: str) -> Version | None:
        """The version that serves, None where none does."""
        version = self._serving.get(model_name)
        return None if version is None else self.versions[model_name, version]

    def awaited(self, model_name: str) -> Version | None:
        """The newest version that was released and neither activated nor refused yet."""
        waiting = [v for v in self.versions.values() if v.model_name == model_name and v.asked is not None]
        return waiting[-1] if waiting else None

    def previous(self, model_name: str) -> Version | None:
        """The version that served before the one that serves now (or that served last), unless it was refused."""
        now = self._serving.get(model_name)
        for name in reversed(self.activations.get(model_name, [])):
            if name != now and self.versions[model_name, name].state != "refused":
                return self.versions[model_name, name]
        return None

    def find(self, version: str) -> list[Version]:
        """The versions of that name, of whatever model."""
        return [v for (_, name), v in self.versions.items() if name == version]
