"""The one table that binds struct, subject and stream. No subject literal stands anywhere else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Generic, TypeVar, cast

import msgspec

from schema.messages import (
    Alert,
    BackupEvent,
    CandleBlock,
    FeatureBlock,
    FormingCandle,
    Message,
    ModelEvent,
    Outcome,
    Reject,
    Signal,
)

M = TypeVar("M", bound=Message)

_FORBIDDEN: Final = re.compile(r"[.*>%\s\x00-\x1f\x7f]")


def encode_token(text: str) -> str:
    """A symbol as one subject token: what NATS forbids is percent-encoded as UTF-8 (``EURUSD.m`` → ``EURUSD%2Em``)."""
    return _FORBIDDEN.sub(lambda m: "".join(f"%{b:02X}" for b in m.group().encode()), text)


def decode_token(token: str) -> str:
    """The inverse of :func:`encode_token`."""
    raw = re.sub(rb"%([0-9A-F]{2})", lambda m: bytes([int(m.group(1), 16)]), token.encode())
    return raw.decode()


@dataclass(frozen=True, slots=True)
class Channel(Generic[M]):
    """A kind of message: its subject's first token, how many tokens follow, its struct and its stream (None: core NATS)."""

    prefix: str
    tokens: int
    struct: type[M]
    stream: str | None

    @property
    def wildcard(self) -> str:
        return f"{self.prefix}.>"

    def subject(self, *tokens: str) -> str:
        """``candles``, ``("M1", "EURUSD.m")`` → ``candles.M1.EURUSD%2Em``."""
        if len(tokens) != self.tokens:
            raise ValueError(f"{self.prefix} takes {self.tokens} tokens, got {len(tokens)}")
        return ".".join((self.prefix, *(encode_token(t) for t in tokens)))

    def parse(self, subject: str) -> tuple[str, ...]:
        """The decoded tokens after the prefix."""
        head, *tokens = subject.split(".")
        if head != self.prefix or len(tokens) != self.tokens:
            raise ValueError(f"{subject!r} is not a subject of {self.prefix}")
        return tuple(decode_token(t) for t in tokens)

    def encode(self, message: M) -> bytes:
        return _ENCODER.encode(message)

    def decode(self, data: bytes) -> M:
        """Raises msgspec.DecodeError (ValidationError among them) on anything that is not this channel's struct."""
        decoder = _DECODERS.get(self.struct)
        if decoder is None:
            decoder = _DECODERS[self.struct] = msgspec.json.Decoder(self.struct)
        return cast(M, decoder.decode(data))


_ENCODER: Final = msgspec.json.Encoder()
_DECODERS: Final[dict[type, msgspec.json.Decoder[Message]]] = {}

CANDLES: Final = Channel("candles", 2, CandleBlock, "CANDLES")
FEATURES: Final = Channel("features", 2, FeatureBlock, "FEATURES")
SIGNALS: Final = Channel("signals", 2, Signal, "SIGNALS")
FORMING: Final = Channel("forming", 2, FormingCandle, None)
MODELS: Final = Channel("models", 1, ModelEvent, "EVENTS")
OUTCOMES: Final = Channel("outcomes", 2, Outcome, "EVENTS")
ALERTS: Final = Channel("alerts", 2, Alert, "EVENTS")
BACKUPS: Final = Channel("backups", 1, BackupEvent, "EVENTS")
REJECTS: Final = Channel("rejects", 1, Reject, "REJECTS")

CHANNELS: Final[tuple[Channel[Message], ...]] = (  # type: ignore[assignment]
    CANDLES,
    FEATURES,
    SIGNALS,
    FORMING,
    MODELS,
    OUTCOMES,
    ALERTS,
    BACKUPS,
    REJECTS,
)

# Headers of a signal, beside its trace: what is true of this one making of it and not of any other, as its times are.
RECEIVED_AT: Final = "Mt5-Received-At"  # when the candle came to the gateway, RFC 3339
FEATURES_AT: Final = "Mt5-Features-At"  # when JetStream stored its features
CANDLE: Final = "Mt5-Candle"  # the digest of all values of its candle, of which its features use some only

# KV buckets and the object store (JetStream keeps them as streams KV_<name> and OBJ_<name>).
FEATURE_STATE: Final = "feature_state"
CLOCK: Final = "clock"
OWNERS: Final = "owners"
MODEL_FILES: Final = "models"

# Requests that actors answer as NATS micro services.
TRAIN: Final = "trainer.train"
PROMOTE: Final = "models.promote"
ROLLBACK: Final = "models.rollback"
RETIRE: Final = "models.retire"
DECIDE: Final = "models.decide"  # the scorer's, with evidence
SCORECARD: Final = "scorer.scorecard"
SIGNAL_AGAIN: Final = "emitter.again"
HEALTH_CHECK: Final = "health.check"
TEST_ALERT: Final = "health.test"
SEND_REPORT: Final = "health.report"
BACKUP_RUN: Final = "backup.run"

# What the health monitor publishes to see that JetStream stores; the stream PROBE keeps the newest one.
PROBE: Final = "probe.write"
PROBE_STREAM: Final = "PROBE"


def status_of(actor: str) -> str:
    """Asks each of an actor's processes how it is."""
    return f"status.{actor}"


def metrics_of(actor: str) -> str:
    """Asks each of an actor's processes for its metrics."""
    return f"metrics.{actor}"


def fence_subject(stream: str) -> str:
    """Where a stream keeps who writes it (`bus/fence.py`)."""
    return f"fence.{stream}"


def bucket_stream(bucket: str) -> str:
    """The stream that JetStream keeps a key-value bucket in."""
    return f"KV_{bucket}"


def bucket_subject(bucket: str, key: str) -> str:
    """The subject of a key in its bucket's stream; ``>`` for all of them."""
    return f"$KV.{bucket}.{key}"


def owner_consumer(actor: str, partition: int = 0) -> str:
    """The consumer of the bucket ``owners`` that hands out an actor's share of the series."""
    return f"{actor}-{partition}"


_KEY_SAFE: Final = re.compile(r"[^A-Za-z0-9_-]")


def key_token(text: str) -> str:
    """A symbol as part of a key-value key, whose alphabet is smaller than a subject's (``EURUSD.m`` → ``EURUSD=2Em``)."""
    return _KEY_SAFE.sub(lambda m: "".join(f"={b:02X}" for b in m.group().encode()), text)
