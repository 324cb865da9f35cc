"""JetStream's part of a backup: each stream's own snapshot, as nats-server sends it in chunks.

nats-server sends so much unacknowledged, and no more, so that a slow disk slows the sender down and fills no memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Final

from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from bus.client import Bus
from bus.subjects import (
    CANDLES,
    CLOCK,
    FEATURE_STATE,
    FEATURES,
    MODEL_FILES,
    MODELS,
    OWNERS,
    PROBE_STREAM,
    SIGNALS,
    bucket_stream,
)
from schema.backup import StreamEntry

CHUNK: Final = 128 * 1024
ANSWER_SECONDS: Final = 30.0  # until a snapshot begins: the server syncs the stream's files first
SILENT_SECONDS: Final = 30.0  # without a chunk: it will not come any more
LIST_SECONDS: Final = 5.0
# What is read faster makes others wait: at full speed an acknowledged publish took ten times as long meanwhile, at this
# one it takes hardly longer than ever.
BYTES_A_SECOND: Final = 20_000_000
QUEUE: Final = 1_024  # chunks that wait to be written; the server's window is smaller

# Effects before causes, and CANDLES, of which all is made, after all that is made of it: whatever a snapshot holds, a later
# one holds what it came of. The clock's offsets and the models' files are causes, too.
ORDER: Final = (
    str(SIGNALS.stream),
    str(MODELS.stream),
    f"OBJ_{MODEL_FILES}",
    bucket_stream(FEATURE_STATE),
    str(FEATURES.stream),
    str(CANDLES.stream),
    bucket_stream(CLOCK),
)
# Who owns which work and whether JetStream stores at all is true of a moment, and made anew with the topology.
LEFT_OUT: Final = frozenset({bucket_stream(OWNERS), PROBE_STREAM})


class SnapshotFailed(Exception):
    """A stream could not be read whole; the message is a sentence."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A stream's snapshot; ``last_at`` is when its last message was stored, None where it holds none."""

    entry: StreamEntry
    last_at: datetime | None


def in_order(streams: Iterable[str]) -> list[str]:
    """The streams that belong to a backup, in the order in which they are read."""
    names = set(streams) - LEFT_OUT
    first = [name for name in ORDER[:-2] if name in names]
    last = [name for name in ORDER[-2:] if name in names]
    return first + sorted(names - set(ORDER)) + last


async def list_streams(bus: Bus) -> dict[str, int]:
    """Every stream of the server and how many bytes it holds. Raises SnapshotFailed."""
    found: dict[str, int] = {}
    total = 1
    while len(found) < total:
        answer = await _ask(bus, "STREAM.LIST", {"offset": len(found)}, LIST_SECONDS)
        page = answer.get("streams") or []
        total = int(answer.get("total") or 0)
        if not page:
            break
        found |= {str(one["config"]["name"]): int(one["state"]["bytes"]) for one in page}
    return found


async def snapshot(bus: Bus, stream: str, folder: Path, grown: Callable[[int], None] = lambda size: None) -> Snapshot:
    """Writes ``<stream>.snapshot`` and ``<stream>.json`` (its configuration and state, which restoring needs).

    Without consumers: whoever reads keeps its own cursor and makes its consumer anew. ``grown`` is called with the bytes
    that are written so far.

    Raises:
        SnapshotFailed: the server refuses, falls silent, or finds the stream damaged.
        OSError: the disk.
    """
    chunks: asyncio.Queue[Msg] = asyncio.Queue(QUEUE)
    inbox = bus.nc.new_inbox()
    subscription = await bus.nc.subscribe(inbox, cb=chunks.put)
    try:
        wanted = {"deliver_subject": inbox, "no_consumers": True, "chunk_size": CHUNK, "jsck": False}
        answer = await _ask(bus, f"STREAM.SNAPSHOT.{stream}", wanted, ANSWER_SECONDS)
        with (folder / f"{stream}.snapshot").open("xb") as file:
            await _receive(bus, stream, chunks, file, grown)
    except (NatsError, TimeoutError) as error:
        raise SnapshotFailed(f"NATS did not send the stream {stream} whole ({type(error).__name__}).") from error
    finally:
        if not bus.nc.is_closed:
            with contextlib.suppress(NatsError):
                await subscription.unsubscribe()
    state = answer["state"]
    kept = {"config": answer["config"], "state": state}
    (folder / f"{stream}.json").write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    messages = int(state["messages"])
    entry = StreamEntry(
        name=stream, messages=messages, first_seq=int(state["first_seq"]), last_seq=int(state["last_seq"])
    )
    return Snapshot(entry, datetime.fromisoformat(state["last_ts"]) if messages else None)


async def _receive(
    bus: Bus, stream: str, chunks: asyncio.Queue[Msg], file: BinaryIO, grown: Callable[[int], None]
) -> None:
    size = 0
    started = time.monotonic()
    while True:
        async with asyncio.timeout(SILENT_SECONDS):
            message = await chunks.get()
        if not message.data:
            headers: dict[str, Any] = dict(message.headers or {})
            status = str(headers.get("Status", ""))
            if status and not status.startswith("2"):
                reason = headers.get("Description") or f"status {status}"
                raise SnapshotFailed(f"NATS broke off the snapshot of {stream}: {reason}.")
            return
        file.write(message.data)
        size += len(message.data)
        grown(size)
        if message.reply:
            if (ahead := size / BYTES_A_SECOND - (time.monotonic() - started)) > 0:
                await asyncio.sleep(ahead)
            await bus.nc.publish(message.reply)


async def _ask(bus: Bus, subject: str, request: dict[str, Any], timeout: float) -> dict[str, Any]:
    """JetStream's own API, where nats-py has no words for what it says."""
    try:
        reply = await bus.nc.request(f"$JS.API.{subject}", json.dumps(request).encode(), timeout=timeout)
    except (NatsError, TimeoutError) as error:
        raise SnapshotFailed(f"NATS did not answer {subject} ({type(error).__name__}).") from error
    answer: dict[str, Any] = json.loads(reply.data)
    if "error" in answer:
        raise SnapshotFailed(f"NATS refuses {subject}: {answer['error'].get('description', answer['error'])}.")
    return answer
