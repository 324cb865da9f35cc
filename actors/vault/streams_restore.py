"""A stream brought back from JetStream's own snapshot: the same messages under the same sequences and times.

The server keeps nothing of a restore that fails, and refuses one onto a stream that exists. What it does not keep is when
the stream was made: the archive's cursors, which name it, are told the new time (:func:`rebind`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final

import msgspec
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError

from actors.vault.dump import direct_connection
from bus.client import Bus
from bus.subjects import FEATURES, OUTCOMES, SIGNALS
from schema.backup import StreamEntry
from schema.sql import queries

API: Final = "$JS.API.STREAM"
CHUNK: Final = 256 * 1024  # bytes of a message; the server acknowledges each before the next is sent
ANSWER_SECONDS: Final = 30.0  # for the request, and for each chunk to be written
LAST_SECONDS: Final = 600.0  # for the last one: the server then unpacks and indexes the whole stream
SAME_TIME: Final = 0.001  # seconds: a time of storing has passed through a float

# Which stream a reader of the archive stands in, by the second word of its name (`recorder.features`).
_STREAMS: Final = {channel.prefix: str(channel.stream) for channel in (FEATURES, SIGNALS, OUTCOMES)}


class StreamNotRestored(Exception):
    """The server does not take a stream back; the message is one sentence that names the stream and the reason."""


async def present(bus: Bus, names: Collection[str]) -> list[str]:
    """Those of the named streams that the server has, sorted."""
    found = {str(info.config.name) for info in await bus.js.streams_info()}
    return sorted(found & set(names))


async def restore_stream(
    bus: Bus, wanted: StreamEntry, folder: Path, tell: Callable[[int], None] = lambda _: None
) -> StreamEntry:
    """Makes a stream from ``NAME.snapshot`` and ``NAME.json`` in ``folder``; returns what it holds then.

    While it is compared with ``wanted`` nothing expires: of an old backup that would be all. With its own configuration,
    which it has in the end, the server drops what is too old. ``tell`` hears the bytes that were sent.

    Raises:
        StreamNotRestored: it exists already, the snapshot is damaged or another one's, or the server does not answer.
            There is no such stream then, unless there was one before.
    """
    name = wanted.name
    snapshot = folder / f"{name}.snapshot"
    described = _described(folder / f"{name}.json", name)
    config = described["config"]
    try:
        await _send(bus.nc, name, snapshot, {"config": config | {"max_age": 0}, "state": described["state"]}, tell)
        state = (await bus.js.stream_info(name)).state
        found = StreamEntry(name=name, messages=state.messages, first_seq=state.first_seq, last_seq=state.last_seq)
        problem = difference(found, wanted)
        if problem is not None:
            await bus.js.delete_stream(name)
            raise StreamNotRestored(f"{problem}.")
        if config.get("max_age"):
            _refuse(name, await _ask(bus.nc, f"{API}.UPDATE.{name}", json.dumps(config).encode(), ANSWER_SECONDS))
    except (NatsError, TimeoutError) as error:
        raise StreamNotRestored(f"{name}: nats-server did not take it ({type(error).__name__}: {error}).") from error
    except OSError as error:
        raise StreamNotRestored(f"{name}: {snapshot.name} cannot be read ({error.strerror or error}).") from error
    return found


async def _send(nc: Client, name: str, snapshot: Path, request: dict[str, Any], tell: Callable[[int], None]) -> None:
    answer = await _ask(nc, f"{API}.RESTORE.{name}", json.dumps(request).encode(), ANSWER_SECONDS)
    _refuse(name, answer)
    target = str(answer["deliver_subject"])
    size = min(CHUNK, nc.max_payload)
    with await asyncio.to_thread(snapshot.open, "rb") as file:
        while chunk := await asyncio.to_thread(file.read, size):
            reply = await nc.request(target, chunk, timeout=ANSWER_SECONDS)
            if reply.data:  # an acknowledgement is empty: this says why it goes no further
                _refuse(name, _decoded(reply.data))
                raise StreamNotRestored(f"{name}: nats-server broke off ({reply.data[:200].decode(errors='replace')}).")
            tell(len(chunk))
    _refuse(name, await _ask(nc, target, b"", LAST_SECONDS))


def difference(found: StreamEntry, wanted: StreamEntry) -> str | None:
    """How a restored stream differs from what the manifest says of it, in words; None where it does not.

    A snapshot of a stream that is written meanwhile may hold more than the server said when it began.
    """
    if found == wanted or (found.last_seq == wanted.last_seq and not found.messages and not wanted.messages):
        return None  # an empty stream is said to begin at 0, at 1, or behind its end
    if found.last_seq > wanted.last_seq and found.first_seq >= wanted.first_seq:
        return None
    return f"{wanted.name} holds {_words(found)} instead of {_words(wanted)}"


def _words(entry: StreamEntry) -> str:
    return f"{entry.messages:,} messages ({entry.first_seq:,} to {entry.last_seq:,})"


async def rebind(bus: Bus, database_url: str) -> list[str]:
    """Tells the archive's cursors when their restored streams were made; returns the readers that read on.

    A reader that finds another time takes its stream for a new one and reads it from its start. That is right for a
    stream with other messages, so that only those are told whose message still stands where they stopped (or has
    expired since).
    """
    done = []
    async with direct_connection(database_url) as connection:
        if not await connection.fetchval("SELECT to_regclass('cursors') IS NOT NULL"):
            return []
        for row in await connection.fetch(queries()["all_cursors"]):
            stream = _STREAMS.get(row["reader"].partition(".")[2])
            if stream is None:
                continue
            info = await bus.js.stream_info(stream)
            if info.created is None or not await _stands(bus, stream, info.state.first_seq, info.state.last_seq, row):
                continue
            await connection.execute(queries()["rebind_cursor"], row["reader"], row["partition"], info.created)
            done.append(row["reader"])
    return done


async def _stands(bus: Bus, stream: str, first: int, last: int, row: Any) -> bool:
    seq = row["stream_seq"]
    if not seq or seq > last:
        return False
    if seq < first:
        return True
    try:
        message = await bus.js.get_msg(stream, seq=seq)
    except NotFoundError:
        return True  # deleted, as it may be in the middle of a stream of events
    return message.time is not None and abs((message.time - row["stored_at"]).total_seconds()) <= SAME_TIME


async def _ask(nc: Client, subject: str, data: bytes, seconds: float) -> dict[str, Any]:
    return _decoded((await nc.request(subject, data, timeout=seconds)).data)


def _decoded(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _refuse(name: str, answer: dict[str, Any]) -> None:
    if "error" in answer:
        raise StreamNotRestored(f"{name}: nats-server refuses it ({answer['error'].get('description', 'no reason')}).")


def _described(path: Path, name: str) -> dict[str, Any]:
    """``{"config", "state"}`` as the server said it beside its snapshot."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, dict[str, Any]])
        if found["config"]["name"] != name or "state" not in found:
            raise StreamNotRestored(f"{name}: {path.name} describes another stream.")
    except (OSError, msgspec.DecodeError, KeyError) as error:
        raise StreamNotRestored(f"{name}: {path.name} is no description of a stream ({error}).") from error
    return found
