"""Rejected candles on their way to REJECTS: as they were sent and with their reasons, in messages that NATS takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from hashlib import blake2b
from typing import Any, Final

import msgspec

from actors.core.ingest import Payload, Rejection, whole
from bus.client import Outgoing, outgoing
from bus.subjects import REJECTS
from schema.messages import Reject

CANDLES: Final = 200  # rejected candles in one message
BYTES: Final = 600_000  # of them all together; with what stands beside, reason and headers well under NATS' 1 MB
ONE: Final = 400_000  # bytes of one candle that are kept
BESIDE: Final = 100_000  # bytes of all that stands beside the candles
SHOWN: Final = 1_000  # bytes of a longer one that are shown


def reject_messages(
    body: bytes, payload: Payload, rejected: Sequence[Rejection], received_at: datetime, headers: Mapping[str, str]
) -> Iterable[Outgoing]:
    """What of a payload was rejected, whole where it fits; what is cut says so, and how long it was."""
    if not rejected:
        return
    beside, candles = whole(body)
    beside = _bounded(beside)
    for part in _parts({"index": r.place, "error": r.error, "candle": _cut(candles[r.place], ONE)} for r in rejected):
        first = part[0]["error"]
        reject = Reject(
            where="candles",
            reason=first if len(part) == 1 else f"{len(part)} candles: {first}, ...",
            at=received_at,
            payload={**beside, "candles": part},
            source=payload.source or "",
        )
        mark = blake2b(msgspec.json.encode((reject.payload, reject.source)), digest_size=16).hexdigest()
        yield outgoing(REJECTS, reject, "candles", msg_id=mark, headers=headers)


def _parts(kept: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    part: list[dict[str, Any]] = []
    size = 0
    for one in kept:
        length = len(msgspec.json.encode(one))
        if part and (len(part) == CANDLES or size + length > BYTES):
            yield part
            part, size = [], 0
        part.append(one)
        size += length
    yield part


def _bounded(beside: dict[str, Any]) -> dict[str, Any]:
    """What stands beside the candles, its longest fields cut until all of it fits."""
    if len(msgspec.json.encode(beside)) <= BESIDE:
        return beside
    short = {name: _cut(value, SHOWN) for name, value in beside.items()}
    if len(msgspec.json.encode(short)) <= BESIDE:
        return short
    return {"beside": _cut(beside, SHOWN)}  # thousands of fields, or monstrous names: none that a sender needs


def _cut(value: Any, most: int) -> Any:
    """A value, or what is left of one that takes more than ``most`` bytes as JSON."""
    data = msgspec.json.encode(value)
    if len(data) <= most:
        return value
    shown = data[:SHOWN].decode(errors="ignore")
    return {"truncated": f"{shown}... (cut: these are the first {len(shown.encode()):,} of {len(data):,} bytes)"}
