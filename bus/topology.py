"""The wanted streams and buckets, the difference to what a server has, and how to apply it.

Only the topology command (and ``up``, which runs it first) changes streams; actors bind to what is there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Final

from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig
from nats.js.errors import APIError, NotFoundError

from bus import ownership
from bus.client import Bus
from bus.subjects import (
    ALERTS,
    BACKUPS,
    CANDLES,
    CLOCK,
    FEATURE_STATE,
    FEATURES,
    MODEL_FILES,
    MODELS,
    OUTCOMES,
    OWNERS,
    PROBE,
    PROBE_STREAM,
    REJECTS,
    SIGNALS,
    bucket_stream,
    bucket_subject,
    fence_subject,
)
from schema.settings import Streams
from schema.timeframes import TIMEFRAMES

DUPLICATE_WINDOW: Final = 120.0  # seconds in which a message id is known; readers are idempotent beyond it
DERIVED_MAX_AGE: Final = 7 * 86_400.0
REJECTS_MAX_BYTES: Final = 256 * 1024**2
BUCKET_MAX_BYTES: Final = 1024**3
OWNERS_MAX_BYTES: Final = 1024**2
EVENTS_PER_SUBJECT: Final = 10_000
OWNED: Final = (
    "features",
    "emitter",
    "recorder",
    "scorer",
    "health",
    "backup",
)  # actors of which one process at a time does the work


def model_name(timeframe: str) -> str:
    """The model of a timeframe: ``M1`` → ``rf_m1``."""
    return f"rf_{timeframe.lower()}"


def _stream(name: str, subjects: list[str], **fields: Any) -> StreamConfig:
    base: dict[str, Any] = {
        "retention": RetentionPolicy.LIMITS,
        "storage": StorageType.FILE,
        "num_replicas": 1,
        "duplicate_window": DUPLICATE_WINDOW,
        "max_msgs": -1,
        "allow_direct": True,
        "discard": DiscardPolicy.OLD,
    }
    return StreamConfig(name=name, subjects=subjects, **(base | fields))


def _key_value(bucket: str, max_bytes: int, **fields: Any) -> StreamConfig:
    # The stream that a NATS key-value bucket is: one value a key, rollups allowed, no deletes by sequence.
    return _stream(
        bucket_stream(bucket),
        [bucket_subject(bucket, ">")],
        max_msgs_per_subject=1,
        max_bytes=max_bytes,
        discard=DiscardPolicy.NEW,
        allow_rollup_hdrs=True,
        deny_delete=True,
        **fields,
    )


def _object_store(bucket: str, max_bytes: int) -> StreamConfig:
    return _stream(
        f"OBJ_{bucket}",
        [f"$O.{bucket}.C.>", f"$O.{bucket}.M.>"],
        max_bytes=max_bytes,
        discard=DiscardPolicy.NEW,
        allow_rollup_hdrs=True,
    )


def wanted(streams: Streams) -> list[StreamConfig]:
    """Every stream that the system needs, buckets included."""
    # CANDLES is the one stream that cannot be made again: full means refuse (503), never drop.
    return [
        _stream(
            str(CANDLES.stream),
            [CANDLES.wildcard],
            max_age=streams.candles_max_age,
            max_bytes=streams.candles_max_bytes,
            discard=DiscardPolicy.NEW,
            deny_delete=True,
        ),
        # Their one writer stores many messages as one atomic batch (bus/writer.py).
        _stream(
            str(FEATURES.stream),
            [FEATURES.wildcard],
            max_age=DERIVED_MAX_AGE,
            max_bytes=streams.derived_max_bytes,
            allow_atomic=True,
        ),
        _stream(
            str(SIGNALS.stream),
            [SIGNALS.wildcard, fence_subject(str(SIGNALS.stream))],
            max_age=DERIVED_MAX_AGE,
            max_bytes=streams.derived_max_bytes,
            allow_atomic=True,
        ),
        _stream(
            str(MODELS.stream),
            # Each model by name: models.promote and models.rollback are requests, which a stream must not answer.
            [MODELS.subject(model_name(timeframe)) for timeframe in TIMEFRAMES]
            + [ALERTS.wildcard, BACKUPS.wildcard, OUTCOMES.wildcard, fence_subject(str(MODELS.stream))],
            # Outcomes come by the million, and must not push the models' lives out of the stream.
            max_msgs_per_subject=EVENTS_PER_SUBJECT,
            allow_atomic=True,  # the scorer's outcomes, many at once after a replay
            max_age=streams.events_max_age,
            max_bytes=streams.derived_max_bytes,
        ),
        _stream(str(REJECTS.stream), [REJECTS.wildcard], max_age=30 * 86_400.0, max_bytes=REJECTS_MAX_BYTES),
        _stream(PROBE_STREAM, [PROBE], max_msgs=1, max_bytes=OWNERS_MAX_BYTES),
        _key_value(FEATURE_STATE, BUCKET_MAX_BYTES, allow_atomic=True),
        _key_value(OWNERS, OWNERS_MAX_BYTES),
        _key_value(CLOCK, BUCKET_MAX_BYTES // 16),
        _object_store(MODEL_FILES, BUCKET_MAX_BYTES),
    ]


COMPARED: Final = (
    "subjects",
    "max_age",
    "max_bytes",
    "discard",
    "storage",
    "max_msgs_per_subject",
    "duplicate_window",
    "allow_direct",
    "deny_delete",
    "allow_rollup_hdrs",
    "num_replicas",
    "allow_atomic",
)
# What of a token's consumer is compared; the server fills in the rest.
COMPARED_CONSUMER: Final = ("filter_subject", "ack_wait", "priority_groups", "priority_policy", "priority_timeout")


@dataclass(frozen=True, slots=True)
class Difference:
    """One field of one stream that is not as wanted; ``field`` is ``missing`` where the stream does not exist.

    ``consumer`` names the stream's consumer where it is one that differs.
    """

    stream: str
    field: str
    wanted: str
    found: str
    consumer: str = ""


def _text(value: Any) -> str:
    value = getattr(value, "value", value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _differences(want: StreamConfig, have: StreamConfig | None) -> list[Difference]:
    name = str(want.name)
    if have is None:
        return [Difference(name, "missing", "stream", "nothing")]
    return [
        Difference(name, field, _text(getattr(want, field)), _text(getattr(have, field)))
        for field in COMPARED
        if _text(getattr(want, field) or None) != _text(getattr(have, field) or None)
    ]


async def _have(js: JetStreamContext, name: str) -> StreamConfig | None:
    try:
        return (await js.stream_info(name)).config
    except NotFoundError:
        return None


async def diff(bus: Bus, streams: Streams) -> list[Difference]:
    """What is missing or different on the server; empty when all is as wanted."""
    out: list[Difference] = []
    for want in wanted(streams):
        out += _differences(want, await _have(bus.js, str(want.name)))
    for actor in OWNED:
        out += await _owner_differences(bus, actor)
    return out


async def apply(bus: Bus, streams: Streams) -> list[Difference]:
    """Makes or updates what differs and returns what it did. Idempotent; never deletes or purges a stream."""
    done: list[Difference] = []
    for want in wanted(streams):
        have = await _have(bus.js, str(want.name))
        differences = _differences(want, have)
        if not differences:
            continue
        if have is None:
            await bus.js.add_stream(want)
        else:
            # What this module does not compare stays as the operator set it.
            await bus.js.update_stream(replace(have, **{field: getattr(want, field) for field in COMPARED}))
        done += differences
    for actor in OWNED:
        differences = await _owner_differences(bus, actor)
        if differences:
            await _make_owner(bus, actor, fresh=any(d.field != "token" for d in differences))
        done += differences
    return done


# --- the tokens of ownership -----------------------------------------------------------------------------------------


async def _owner_differences(bus: Bus, actor: str) -> list[Difference]:
    want = ownership.consumer_config(actor, 0)
    name, stream = str(want["name"]), bucket_stream(OWNERS)
    if await _have(bus.js, stream) is None:
        return [Difference(stream, "missing", "consumer", "nothing", name)]
    answer = await _ask(bus, f"CONSUMER.INFO.{stream}.{name}", {})
    have = answer.get("config")
    if have is None:
        return [Difference(stream, "missing", "consumer", "nothing", name)]
    out = [
        Difference(stream, field, str(want[field]), str(have.get(field)), name)
        for field in COMPARED_CONSUMER
        if want[field] != have.get(field)
    ]
    try:
        await bus.js.get_last_msg(stream, want["filter_subject"])
    except NotFoundError:
        out.append(Difference(stream, "token", "a message", "nothing", name))
    return out


async def _make_owner(bus: Bus, actor: str, *, fresh: bool) -> None:
    config = ownership.consumer_config(actor, 0)
    stream = bucket_stream(OWNERS)
    if fresh:
        await _ask(bus, f"CONSUMER.DELETE.{stream}.{config['name']}", {})  # most of its settings cannot be changed
        request = {"stream_name": stream, "config": config}
        answer = await _ask(bus, f"CONSUMER.DURABLE.CREATE.{stream}.{config['name']}", request)
        if "error" in answer:
            raise APIError(**answer["error"])
    await bus.js.publish(str(config["filter_subject"]), actor.encode())


async def _ask(bus: Bus, subject: str, request: dict[str, Any]) -> dict[str, Any]:
    """JetStream's own API, where nats-py has no words for what it says."""
    reply = await bus.nc.request(f"$JS.API.{subject}", json.dumps(request).encode(), timeout=5.0)
    answer: dict[str, Any] = json.loads(reply.data)
    return answer
