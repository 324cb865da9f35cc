"""Receipts: a signal made again from its bars, its model and the rules, and compared with what was said, bit by bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from msgspec import Struct, structs

from actors.core.hashing import signal_id
from actors.core.ingest import digest_text
from actors.core.rebuild import INDICATORS, PRICES, Rebuilder, Rebuilt, Wanted
from actors.core.serving import ServedModel, build_signal, decide, expires_at, makes_signal
from actors.core.timeframe import end_time
from schema.messages import ModelEvent, ModelState, Signal

FEATURES: Final = ("close", "volume", "spread", *INDICATORS, "fwd_ret_5", "ready", "bar", "candle_revision")
SAID: Final = (
    "candles_seq",
    "candle_revision",
    "features_hash",
    "model_name",
    "model_version",
    "threshold",
    "prob_up",
    "label",
    "abstain",
    "expires_at",
    "supersedes",
    "id",
)


# --- who served ----------------------------------------------------------------------------------------------------


class Served(NamedTuple):
    """From ``from_seq`` on (a CANDLES sequence) a version serves its timeframe; ``state`` None: not known any more."""

    from_seq: int
    version: str
    state: ModelState | None


class Service:
    """Who served which candle, as the models' events tell it; what they no longer tell, the registry may still know."""

    def __init__(self, events: Iterable[ModelEvent], known: Iterable[tuple[str, int, str]] = ()) -> None:
        """``events`` in the order of their stream. ``known``: timeframe, from_seq and version of newest activations."""
        told = [e for e in events if e.event == "activated"]
        versions = {(event.timeframe, event.version) for event in told}
        self._by: dict[str, list[Served]] = {}
        for timeframe, from_seq, version in sorted(known):
            if (timeframe, version) not in versions:
                self._by.setdefault(timeframe, []).append(Served(from_seq, version, None))
        for event in told:
            self._by.setdefault(event.timeframe, []).append(Served(event.from_seq or 0, event.version, event.state))

    def at(self, timeframe: str, candles_seq: int) -> Served | None:
        """The activation that counts for a candle; None where nothing served yet."""
        for served in reversed(self._by.get(timeframe, ())):
            if served.from_seq <= candles_seq:
                return served
        return None

    def version_at(self, timeframe: str, candles_seq: int) -> str | None:
        served = self.at(timeframe, candles_seq)
        return None if served is None else served.version

    def versions_between(self, timeframe: str, start: int, stop: int) -> set[str | None]:
        """Every version that served a candle from ``start`` on and before ``stop``."""
        later = [s.from_seq for s in self._by.get(timeframe, ()) if start < s.from_seq < stop]
        return {self.version_at(timeframe, seq) for seq in (start, *later)}


# --- comparison ----------------------------------------------------------------------------------------------------

Value = str | int | float | bool | None


class Difference(Struct, frozen=True):
    """One thing that is not what it must be: ``field`` as it was recorded, and as it was made again."""

    field: str
    recorded: Value
    rebuilt: Value


class Receipt(Struct, frozen=True):
    """A signal with all that was kept of it. Absent is None, or empty, and is not compared.

    ``features`` is the archive's row of the signal's bar (:data:`FEATURES`, ``candles_seq``), ``streamed`` the message that
    SIGNALS holds, ``logged`` the bar's values (:data:`PRICES`) in the log's message that brought them, ``candle_digest`` the
    digest of them all. ``stages`` are pairs of archive and stream, by name.
    """

    signal: Signal
    features: Mapping[str, Any] | None = None
    streamed: Signal | None = None
    logged: tuple[float, ...] | None = None
    candle_digest: str | None = None
    stages: Mapping[str, tuple[Value, Value]] = {}

    @property
    def bar(self) -> int:
        return int(self.signal.ts.timestamp())

    @property
    def wanted(self) -> tuple[Wanted, ...]:
        """What has to be rebuilt for the comparison."""
        own = (self.bar, self.signal.candles_seq)
        return (own,) if self.features is None else (own, (self.bar, self.features["candles_seq"]))


def compare(
    receipt: Receipt,
    past: Rebuilder,
    service: Service,
    model: ServedModel | str | None,
    model_name: str,
) -> tuple[Difference, ...]:
    """What of a signal is not as its bars, its model and the rules make it; empty where it is identical.

    ``model`` is the version that served, or a sentence that says why it cannot be loaded. ``model_name`` is the name that
    signals of the timeframe carry.
    """
    signal = receipt.signal
    out: list[Difference] = []
    forms = past.found.get((receipt.bar, signal.candles_seq), ())
    if not forms:
        out.append(Difference("candle", f"{signal.ts:%Y-%m-%dT%H:%M:%SZ}", None))
    else:
        out += _least(_signal(signal, form, service, model, model_name, receipt) for form in forms)
        if receipt.logged is not None:
            prices = [getattr(forms[0].row, name) for name in PRICES]
            out += _differences("candle.", PRICES, prices, receipt.logged)
        if receipt.candle_digest is not None:
            out += _differences("candle_", ["digest"], [receipt.candle_digest], [digest_text(forms[0].row)])
    if receipt.features is not None:
        out += _features(receipt, past)
    if receipt.streamed is not None:
        names = [name for name in Signal.__struct_fields__ if name != "created_at"]
        out += _differences(
            "stream.",
            names,
            [getattr(receipt.streamed, name) for name in names],
            [getattr(signal, name) for name in names],
        )
    out += [
        Difference(f"stream.{name}", _plain(archived), _plain(streamed))
        for name, (archived, streamed) in receipt.stages.items()
        if archived != streamed
    ]
    return tuple(out)


def _signal(
    signal: Signal,
    rebuilt: Rebuilt,
    service: Service,
    model: ServedModel | str | None,
    model_name: str,
    receipt: Receipt,
) -> list[Difference]:
    served = service.at(signal.timeframe, signal.candles_seq)
    if not makes_signal(rebuilt.row):
        return [Difference("candle.live", True, rebuilt.row.live)]
    loaded = model if isinstance(model, ServedModel) else None
    want = _made(signal, rebuilt, service, served, loaded, model_name)
    if isinstance(model, str) and rebuilt.row.ready and signal.abstain != "no_model":
        return [Difference("model", served.version if served else None, model)]
    if signal.abstain == "no_model" and want.abstain != "no_model" and served is not None:
        # The version could not be loaded when its candles came, and can be by now: they were said to have no model.
        want = _made(signal, rebuilt, service, served, None, model_name)
    want = _published(signal, want, rebuilt, service, receipt)
    return _differences("", SAID, [getattr(signal, name) for name in SAID], [getattr(want, name) for name in SAID])


def _made(
    signal: Signal,
    rebuilt: Rebuilt,
    service: Service,
    served: Served | None,
    model: ServedModel | None,
    model_name: str,
) -> Signal:
    """The signal of a rebuilt row, as the emitter makes it."""
    symbol, timeframe, row = signal.symbol, signal.timeframe, rebuilt.row
    end = end_time(row.ts, timeframe)
    expires = expires_at(row.ts, end)
    state = served.state if served is not None else None
    if served is not None and state is None:
        state = "provisional" if signal.abstain == "unproven" else "champion"
    decision = decide(
        row,
        symbol,
        model.prob_up(symbol, row) if model is not None else None,
        model.manifest if model is not None else None,
        state,
        judged_at=end,  # the archive says when a bar's age was judged, unless that was at its own end
        expires_at=expires,
    )
    return build_signal(
        symbol=symbol,
        timeframe=timeframe,
        row=row,
        decision=decision,
        model_name=model_name,
        model_version=served.version if served is not None else None,
        candles_seq=rebuilt.published,
        expires_at=expires,
        created_at=signal.created_at,
        supersedes=_replaced(signal, rebuilt, service.version_at(timeframe, rebuilt.replaces_seq)),
    )


def _replaced(signal: Signal, rebuilt: Rebuilt, version: str | None) -> str | None:
    if rebuilt.replaces is None:
        return None
    return signal_id(signal.symbol, signal.timeframe, signal.ts, version, rebuilt.replaces)


def _published(signal: Signal, want: Signal, rebuilt: Rebuilt, service: Service, receipt: Receipt) -> Signal:
    """Allows for a row that was published again although nothing had changed it.

    So it happens where a bar's time is confirmed, where a recomputation reaches further back than it must, and where one is
    repeated after a crash. Another model then speaks of the same row, or the same one again: what it supersedes must be a
    signal of this very row by a version that served in between, or what the row had replaced at first.
    """
    if rebuilt.published == signal.candles_seq:
        return want
    versions = service.versions_between(signal.timeframe, rebuilt.published, signal.candles_seq)
    same = {_replaced(signal, rebuilt, version) for version in versions}
    archived = receipt.features is not None and receipt.features["candles_seq"] == signal.candles_seq
    if signal.supersedes in same or (archived and signal.supersedes is not None):
        return structs.replace(want, candles_seq=signal.candles_seq, supersedes=signal.supersedes)
    return structs.replace(want, supersedes=None)


def _features(receipt: Receipt, past: Rebuilder) -> list[Difference]:
    archived = receipt.features or {}
    seq = archived["candles_seq"]
    forms = past.found.get((receipt.bar, seq), ())
    if seq < receipt.signal.candles_seq:  # both are archived as far as the signal's: then its row is, or a later one
        return [Difference("features.candles_seq", seq, receipt.signal.candles_seq)]
    known, label = past.label(receipt.bar)
    names = FEATURES if known else tuple(name for name in FEATURES if name != "fwd_ret_5")

    def differences(rebuilt: Rebuilt) -> list[Difference]:
        values = {**structs.asdict(rebuilt.row), "candle_revision": rebuilt.row.revision, "fwd_ret_5": label}
        return _differences("features.", names, [archived[name] for name in names], [values[name] for name in names])

    return _least(map(differences, forms)) if forms else [Difference("features.candles_seq", seq, None)]


def _least(found: Iterable[list[Difference]]) -> list[Difference]:
    """The differences from the form that comes nearest."""
    nearest, *others = found
    for one in others:
        if len(one) < len(nearest):
            nearest = one
    return nearest


def _differences(
    prefix: str, names: Sequence[str], recorded: Sequence[Any], rebuilt: Sequence[Any]
) -> list[Difference]:
    return [
        Difference(f"{prefix}{name}", _plain(a), _plain(b))
        for name, a, b in zip(names, recorded, rebuilt, strict=True)
        if _bits(a) != _bits(b)
    ]


def _bits(value: Any) -> Any:
    """What two values must agree in: of a float every bit."""
    return value.hex() if isinstance(value, float) else value


def _plain(value: Any) -> Value:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return value if value is None or isinstance(value, bool | int | float) else str(value)
