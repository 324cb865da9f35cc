"""Versions of models as whoever serves or follows gets them: from the object store, verified, loaded once."""

from __future__ import annotations

import asyncio

import msgspec
from nats.errors import Error as NatsError
from nats.js.errors import APIError

from actors.core.manifest import MANIFEST_FILE, ONNX_FILE, Manifest
from actors.core.serving import ModelRefused, ServedModel
from bus.client import Bus, BusUnavailable
from schema.settings import Settings


class Artifacts:
    def __init__(self, bus: Bus, settings: Settings) -> None:
        self._bus = bus
        self._settings = settings
        self._loaded: dict[tuple[str, str], ServedModel] = {}

    async def load(self, name: str, version: str) -> ServedModel:
        """Raises ModelRefused, or BusUnavailable where NATS does not answer."""
        known = self._loaded.get((name, version))
        if known is not None:
            return known
        try:
            async with asyncio.timeout(20.0):
                manifest = msgspec.json.decode(
                    await self._bus.get_object(f"{name}/{version}/{MANIFEST_FILE}"), type=Manifest
                )
                graph = await self._bus.get_object(f"{name}/{version}/{ONNX_FILE}")
        except KeyError as error:
            raise ModelRefused(f"{error.args[0]} is not in the object store: train again.") from error
        except (NatsError, APIError, TimeoutError) as error:
            raise BusUnavailable(f"NATS did not send {name}/{version}.") from error
        model = self._loaded[name, version] = await asyncio.to_thread(ServedModel, manifest, graph)
        return model
