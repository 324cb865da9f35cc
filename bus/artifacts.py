"""The models' files in the object store: reads that end within a budget, and say what is wrong with an object."""

from __future__ import annotations

import asyncio
from typing import Final

from nats.errors import Error as NatsError
from nats.js.errors import APIError, BadObjectMetaError, DigestMismatchError, NotFoundError

from bus.client import Bus, BusUnavailable
from bus.subjects import MODEL_FILES

LOAD_BUDGET: Final = 20.0  # seconds that the object store has to send a model's file


class ArtifactLost(Exception):
    """The object store has not this file, or not whole: asking again would not help. The message is a clause."""


async def read_artifact(bus: Bus, path: str) -> bytes:
    """An object within :data:`LOAD_BUDGET`; ``path`` is ``<name>/<version>/<file>``.

    Raises:
        ArtifactLost: it is not there, or damaged.
        BusUnavailable: NATS does not answer in time.
    """
    try:
        async with asyncio.timeout(LOAD_BUDGET):
            store = await bus.js.object_store(MODEL_FILES)
            known = await store.get_info(path)
            # nats-py waits for ever for chunks that are lost, and asking again would not bring them back.
            chunks = f"$O.{MODEL_FILES}.C.{known.nuid}"
            info = await bus.js.stream_info(f"OBJ_{MODEL_FILES}", subjects_filter=chunks)
            if (info.state.subjects or {}).get(chunks, 0) < (known.chunks or 0):
                raise ArtifactLost(f"{path} is damaged in the object store, parts of it are lost")
            return await bus.get_object(path)
    except (NotFoundError, KeyError) as error:
        raise ArtifactLost(f"{path} is not in the object store") from error
    except BusUnavailable as error:
        if isinstance(error.__cause__, DigestMismatchError):
            raise ArtifactLost(f"{path} is damaged in the object store, its digest differs") from error
        raise
    except BadObjectMetaError as error:
        raise ArtifactLost(f"{path} is damaged in the object store, its description is") from error
    except (NatsError, APIError, TimeoutError) as error:
        raise BusUnavailable(f"NATS did not send {path} ({type(error).__name__}).") from error


async def remove_artifact(bus: Bus, path: str) -> None:
    """Takes an object out of the store, if it is there. Raises BusUnavailable."""
    try:
        async with asyncio.timeout(LOAD_BUDGET):
            store = await bus.js.object_store(MODEL_FILES)
            await store.delete(path)
    except NotFoundError:
        return
    except (NatsError, APIError, TimeoutError) as error:
        raise BusUnavailable(f"NATS did not remove {path} ({type(error).__name__}).") from error
