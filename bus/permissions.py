"""Who may say and hear what: one NATS user per actor, each with its own subjects only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bus.subjects import (
    ALERTS,
    BACKUP_RUN,
    BACKUPS,
    CANDLES,
    CLOCK,
    DECIDE,
    FEATURE_STATE,
    FEATURES,
    FORMING,
    HEALTH_CHECK,
    MODEL_FILES,
    MODELS,
    OUTCOMES,
    OWNERS,
    PROBE,
    PROMOTE,
    REJECTS,
    RETIRE,
    ROLLBACK,
    SCORECARD,
    SEND_REPORT,
    SIGNAL_AGAIN,
    SIGNALS,
    TEST_ALERT,
    TRAIN,
    Channel,
    bucket_stream,
    bucket_subject,
    metrics_of,
    owner_consumer,
    status_of,
)
from bus.topology import model_name
from schema.timeframes import TIMEFRAMES

OPERATOR: Final = "operator"  # the person's user: may do everything
API: Final = "$JS.API"


@dataclass(frozen=True, slots=True)
class User:
    """A NATS user; empty tuples mean everything is allowed."""

    name: str
    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


def _read(stream: str) -> tuple[str, ...]:
    """What a reader of a stream needs: its consumers and single messages."""
    return (
        f"{API}.STREAM.INFO.{stream}",
        f"{API}.STREAM.MSG.GET.{stream}",
        f"{API}.DIRECT.GET.{stream}",
        f"{API}.DIRECT.GET.{stream}.>",
        f"{API}.CONSUMER.CREATE.{stream}.>",
        f"{API}.CONSUMER.CREATE.{stream}",
        f"{API}.CONSUMER.DURABLE.CREATE.{stream}.>",
        f"{API}.CONSUMER.DELETE.{stream}.>",
        f"{API}.CONSUMER.INFO.{stream}.>",
        f"{API}.CONSUMER.MSG.NEXT.{stream}.>",
    )


def _bucket(name: str) -> tuple[str, ...]:
    stream = bucket_stream(name)
    return (bucket_subject(name, ">"), *_read(stream), f"{API}.STREAM.PURGE.{stream}")


def _owner(actor: str) -> tuple[str, ...]:
    """What a process needs to be given its actor's work, and to hand it on."""
    stream, consumer = bucket_stream(OWNERS), owner_consumer(actor)
    return (
        f"{API}.CONSUMER.MSG.NEXT.{stream}.{consumer}",
        f"{API}.CONSUMER.INFO.{stream}.{consumer}",
        f"{API}.CONSUMER.UNPIN.{stream}.{consumer}",
        f"$JS.ACK.{stream}.{consumer}.>",
    )


_FILES_READ: Final = (*_read(f"OBJ_{MODEL_FILES}"), "$JS.FC.>")
_FILES_WRITE: Final = (f"$O.{MODEL_FILES}.>", *_FILES_READ, f"{API}.STREAM.PURGE.OBJ_{MODEL_FILES}")


def _name(channel: Channel) -> str:  # type: ignore[type-arg]
    return str(channel.stream)


# What every actor may do: answer people (the NATS CLI's inboxes and the operator's) and the actors that ask it, and
# learn which stream holds a subject, which nats-py asks before it reads a bucket.
_EVERYONE: Final = (
    "_INBOX.>",
    f"_INBOX_{OPERATOR}.>",
    "_INBOX_collector.>",
    "_INBOX_scorer.>",
    "_INBOX_health.>",
    f"{API}.STREAM.NAMES",
)

# Each model by name: models.promote and models.rollback are a person's requests.
_MODELS: Final = tuple(MODELS.subject(model_name(timeframe)) for timeframe in TIMEFRAMES)

_PUBLISH: Final[dict[str, tuple[str, ...]]] = {
    "collector": (
        CANDLES.wildcard,
        FORMING.wildcard,
        *_read(_name(CANDLES)),
        *_read(_name(SIGNALS)),
        ALERTS.wildcard,
        *_bucket(CLOCK),
        SCORECARD,
        status_of("*"),
        metrics_of("*"),
    ),
    "features": (
        FEATURES.wildcard,
        *_read(_name(CANDLES)),
        *_read(_name(FEATURES)),
        *_bucket(FEATURE_STATE),
        *_owner("features"),
    ),
    "emitter": (
        SIGNALS.wildcard,
        *_MODELS,
        *_read(_name(FEATURES)),
        *_read(_name(SIGNALS)),
        *_read(_name(MODELS)),
        *_FILES_READ,
        f"{API}.STREAM.INFO.{_name(CANDLES)}",
        *_owner("emitter"),
    ),
    "recorder": (
        *_read(_name(FEATURES)),
        *_read(_name(SIGNALS)),
        f"{API}.STREAM.INFO.{_name(CANDLES)}",
        *_owner("recorder"),
    ),
    "trainer": (*_MODELS, *_read(_name(MODELS)), *_FILES_WRITE),
    "scorer": (
        OUTCOMES.wildcard,
        ALERTS.wildcard,
        DECIDE,
        *_read(_name(CANDLES)),
        *_read(_name(FEATURES)),
        *_read(_name(SIGNALS)),
        *_read(_name(MODELS)),
        *_FILES_READ,
        *_owner("scorer"),
    ),
    # Looks at everything and changes nothing.
    "health": (
        ALERTS.wildcard,
        PROBE,
        *_read(_name(ALERTS)),
        f"{API}.DIRECT.GET.{_name(CANDLES)}.>",  # a series' newest message, when the archive seems behind
        f"{API}.INFO",
        f"{API}.STREAM.LIST",
        f"{API}.STREAM.INFO.*",
        f"{API}.CONSUMER.LIST.*",
        f"{API}.CONSUMER.INFO.*.*",
        status_of("*"),
        metrics_of("*"),
        *_owner("health"),
    ),
    # Reads every stream whole, and writes none but its own events.
    "backup": (
        BACKUPS.wildcard,
        *_read(_name(BACKUPS)),
        f"{API}.STREAM.LIST",
        f"{API}.STREAM.INFO.*",
        f"{API}.STREAM.SNAPSHOT.*",
        "$JS.SNAPSHOT.ACK.>",
        *_owner("backup"),
    ),
}

_SUBSCRIBE: Final[dict[str, tuple[str, ...]]] = {
    "collector": (),
    "features": (),
    "emitter": (SIGNAL_AGAIN,),
    "recorder": (),
    "trainer": (TRAIN, PROMOTE, ROLLBACK, RETIRE, DECIDE),
    "scorer": (SCORECARD,),
    "health": (HEALTH_CHECK, TEST_ALERT, SEND_REPORT),
    "backup": (BACKUP_RUN,),
}


def users() -> list[User]:
    """The operator and every actor, with what each may publish and subscribe to."""
    actors = [
        User(
            name,
            (*publish, f"{REJECTS.prefix}.{'candles' if name == 'collector' else name}", *_EVERYONE),
            (f"_INBOX_{name}.>", "$SRV.>", status_of(name), metrics_of(name), *_SUBSCRIBE[name]),
        )
        for name, publish in _PUBLISH.items()
    ]
    return [User(OPERATOR, (), ()), *actors]
