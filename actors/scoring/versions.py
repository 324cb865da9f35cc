"""Which versions there are, by the events of the models, and the shadows among them, loaded."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from actors.artifacts import Artifacts
from actors.core.registry import Registry, Version
from actors.core.serving import ModelRefused, ServedModel
from bus.client import BusUnavailable
from bus.consume import Delivery, Done, Outcome
from schema.messages import ModelEvent

LOAD_AGAIN: Final = 1.0  # seconds between tries to load a shadow while NATS does not answer


class Versions:
    """The fold of the events, and the models of the shadows that could be loaded."""

    def __init__(self, artifacts: Artifacts, log: Any) -> None:
        self._artifacts = artifacts
        self._log = log
        self.registry = Registry()
        self.shadows: dict[tuple[str, str], ServedModel] = {}

    async def on_event(self, delivery: Delivery[ModelEvent]) -> Outcome:
        """Takes the next event; returns once a new shadow is loaded, or refused."""
        for version in self.registry.apply(delivery.message):
            key = (version.model_name, version.version)
            if version.state == "shadow":
                await self._load(*key)
            else:
                self.shadows.pop(key, None)
        return Done()

    async def _load(self, name: str, version: str) -> None:
        while (name, version) not in self.shadows:
            try:
                self.shadows[name, version] = await self._artifacts.load(name, version)
            except ModelRefused as error:
                self._log.error("shadow not followed", action="scorer.refused", version=version, reason=str(error))
                return
            except BusUnavailable as error:
                self._log.warning("a shadow is loaded again", action="scorer.retry", error=str(error))
                await asyncio.sleep(LOAD_AGAIN)
            else:
                self._log.info("shadow followed", action="scorer.shadow", version=version)

    def serving(self) -> list[Version]:
        """The versions that speak, one a model at most."""
        names = {version.model_name for version in self.registry.versions.values()}
        return [v for v in map(self.registry.serving, sorted(names)) if v is not None]

    def followed(self) -> list[Version]:
        """The versions that serve, and the shadows."""
        return [*self.serving(), *(self.registry.versions[key] for key in sorted(self.shadows))]
