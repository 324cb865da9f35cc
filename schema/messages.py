"""What travels on the bus and over HTTP, as frozen structs.

Rules of change: new fields come last and have defaults, types never change, and every wire version has a golden
file under ``tests/contract``. Times are aware UTC; prices are in the symbol's own units; ``spread`` is in points;
``volume`` is the tick volume. ``candles_seq`` is always the sequence of the CANDLES message that something came from.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

MAX_BLOCK_ROWS: Final = 1_000  # rows in one bus message: 1,000 feature rows stay well under NATS' 1 MB

UtcTime = Annotated[datetime, Meta(tz=True)]
Label = Literal[-1, 0, 1]
Abstain = Literal[
    "warming",
    "no_model",
    "unproven",
    "no_edge",
    "stale_feed",
    "spread",
    "out_of_distribution",
    "model_expired",
]
ModelState = Literal["candidate", "provisional", "champion", "shadow", "retired", "refused"]


class Message(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of everything that travels: immutable, keyword-only, absent means default."""


# --- candles -----------------------------------------------------------------------------------------------------


class Candle(Message, frozen=True):
    """One bar. ``ts`` is its open time; ``spread`` 0 and ``real_volume`` 0 mean unknown."""

    ts: UtcTime
    open: float
    high: float
    low: float
    close: float
    volume: float
    spread: float = 0.0
    real_volume: float = 0.0


class CandleBlock(Message, frozen=True):
    """One or many closed candles of one series, ascending in ``ts``; at most :data:`MAX_BLOCK_ROWS`.

    ``withdrawn`` names bars that were never there (a clock was restated); they go before ``rows`` come.
    ``ts_source`` says how times became UTC: utc, server, rule, inferred or assumed. ``point`` is the size of one point,
    where the sender says it. ``server_utc`` is ``server_time`` in UTC, which autumn does not repeat. ``history`` makes no signals. ``replay`` says that ``now`` (or, where that is absent, each bar's own end) stands
    in for the time of receipt wherever a bar's age is judged.
    """

    symbol: str
    timeframe: str
    rows: tuple[Candle, ...]
    received_at: UtcTime
    history: bool = False
    replay: bool = False
    now: UtcTime | None = None
    source: str | None = None
    server_time: int | None = None
    ts_source: str = "utc"
    withdrawn: tuple[UtcTime, ...] = ()
    point: float | None = None
    server_utc: int | None = None


class FormingCandle(Message, frozen=True):
    """The newest bar before its time is over: shown on the page, never stored."""

    symbol: str
    timeframe: str
    candle: Candle
    received_at: UtcTime


# --- features ----------------------------------------------------------------------------------------------------


class FeatureRow(Message, frozen=True):
    """A closed candle with its indicators; None where an indicator has no value yet.

    ``bar`` counts the bars of the series from 1; ``ready`` is ``bar >= 300``. ``revision`` is the candle's.
    ``live`` is False where the bar came as history only, which makes no signal. ``replaces`` is the features hash of
    the row that this one replaces, and ``replaces_seq`` the CANDLES sequence it was published with, where it was live.
    A row that was computed again says where its bar's values come from: ``brought_seq`` is the CANDLES sequence and
    ``server_time`` the clock of the version, ``heard_at`` the time at which the bar's age was judged when it first came
    live. Where ``brought_seq`` is absent, the block's own stand for all three.
    """

    ts: UtcTime
    open: float
    high: float
    low: float
    close: float
    volume: float
    spread: float
    real_volume: float = 0.0
    rsi: float | None = None
    macd: float | None = None
    macd_signal: float | None = None
    macd_hist: float | None = None
    atr: float | None = None
    ma60: float | None = None
    ret_1: float | None = None
    fwd_ret_5: float | None = None
    bar: int = 0
    ready: bool = False
    revision: int = 0
    live: bool = True
    replaces: str | None = None
    replaces_seq: int | None = None
    source: str | None = None
    ts_source: str = "utc"
    brought_seq: int | None = None
    server_time: int | None = None
    heard_at: UtcTime | None = None


class Withdrawn(Message, frozen=True):
    """A bar that is no more; ``revision`` counts on from its last one."""

    ts: UtcTime
    revision: int


class Fill(Message, frozen=True):
    """``fwd_ret_5`` of an earlier row, known now that its fifth following bar closed."""

    ts: UtcTime
    fwd_ret_5: float | None


class FeatureBlock(Message, frozen=True):
    """What one CANDLES message did to one series: new or changed rows, ascending, and labels now known.

    A recomputation may fill several parts: ``part`` of ``parts``, counted from 1, all with one ``candles_seq``.
    """

    symbol: str
    timeframe: str
    candles_seq: int
    rows: tuple[FeatureRow, ...]
    received_at: UtcTime
    fills: tuple[Fill, ...] = ()
    part: int = 1
    parts: int = 1
    history: bool = False
    replay: bool = False
    now: UtcTime | None = None
    source: str | None = None
    ts_source: str = "utc"
    withdrawn: tuple[Withdrawn, ...] = ()
    point: float | None = None
    server_time: int | None = None


# --- signals -----------------------------------------------------------------------------------------------------


class Signal(Message, frozen=True, omit_defaults=False):
    """One closed candle's signal. ``label`` is 1 up, -1 down, 0 no trade; ``abstain`` says why it is 0."""

    id: str
    ts: UtcTime
    symbol: str
    timeframe: str
    model_name: str
    model_version: str | None
    threshold: float | None
    prob_up: float | None
    label: Label
    abstain: Abstain | None
    candle_revision: int
    candles_seq: int
    features_hash: str
    created_at: UtcTime
    expires_at: UtcTime
    supersedes: str | None = None


# --- models and other events -------------------------------------------------------------------------------------


class ModelEvent(Message, frozen=True):
    """A step in a model's life, on ``models.<name>``.

    ``released`` asks the emitter to serve a version; ``activated`` is the emitter's answer and records ``from_seq``,
    the first CANDLES sequence that the version serves. ``refused`` says why it does not serve. A version is ``registered``
    as a shadow, which the scorer follows, or as a candidate, which waits. ``recipe`` names what it was made by (features,
    label, hyperparameters): evidence belongs to it. ``evidence`` is what decided a step, in figures.
    """

    event: Literal["released", "activated", "refused", "registered", "retired"]
    model_name: str
    version: str
    timeframe: str
    at: UtcTime
    state: ModelState = "candidate"
    from_seq: int | None = None
    reason: str = ""
    by: str = "trainer"
    recipe: str = ""
    evidence: dict[str, Any] = {}


class Outcome(Message, frozen=True):
    """What came of one signal once its fifth following bar had closed, on ``outcomes.<tf>.<symbol>``.

    ``state`` is the model's when it spoke; of a ``shadow`` there is no signal, only this. ``ret`` is ``fwd_ret_5``, ``up``
    its sign (null: a tie) and ``base_rate`` the share of rises that the model was trained on, which it has to beat.
    ``won``, ``gross`` and ``net`` speak of a trade and are null where ``label`` is 0: entered at the next bar's open, left at
    the fifth bar's close; ``net`` is null where the cost is unknown. ``candles_seq`` is the sequence that made it known.
    """

    signal_id: str
    ts: UtcTime
    symbol: str
    timeframe: str
    model_name: str
    model_version: str
    state: ModelState
    prob_up: float
    base_rate: float
    label: Label
    abstain: Abstain | None
    ret: float
    up: bool | None
    won: bool | None
    gross: float | None
    net: float | None
    candles_seq: int


class Alert(Message, frozen=True):
    """Something that a person should know, on ``alerts.<severity>.<check>``. ``source`` is the terminal it is about.

    The health monitor's own name their ``incident`` and say what became of it in ``event``; others have neither.
    """

    severity: Literal["info", "warning", "critical"]
    check: str
    message: str
    at: UtcTime
    source: str | None = None
    details: dict[str, Any] = {}
    event: Literal["opened", "escalated", "reminder", "closed"] | None = None
    incident: str = ""


class BackupEvent(Message, frozen=True):
    """What became of a backup, on ``backups.<event>``. ``seconds`` is how long it took, ``rpo_seconds`` the age of the
    newest data in it by then; ``error`` says why it failed.
    """

    event: Literal["made", "shipped", "verified", "drilled", "failed", "pruned"]
    backup: str
    at: UtcTime
    bytes: int = 0
    seconds: float = 0.0
    rpo_seconds: float | None = None
    target: str = ""
    error: str = ""
    details: dict[str, Any] = {}


class Reject(Message, frozen=True):
    """What could not be processed, whole, with the reason; parked on ``rejects.<where>`` and never retried."""

    where: str
    reason: str
    at: UtcTime
    payload: Any
    subject: str = ""
    source: str = ""
    headers: dict[str, str] = {}


# --- HTTP --------------------------------------------------------------------------------------------------------


class RejectedCandle(Message, frozen=True):
    index: int
    error: str


class Backfill(Struct, frozen=True, kw_only=True, rename={"from_": "from"}):
    """A span of bars the gateway lacks, both ends included."""

    symbol: str
    timeframe: str
    from_: UtcTime
    to: UtcTime


class IngestAnswer(Message, frozen=True, omit_defaults=False):
    """The answer to ``POST /ingest``."""

    received: int
    accepted: int
    duplicates: int
    forming: int
    rejected: tuple[RejectedCandle, ...] = ()
    backfill: tuple[Backfill, ...] = ()


class SignalList(Message, frozen=True, omit_defaults=False):
    signals: tuple[Signal, ...]


class Problem(Message, frozen=True):
    """Every HTTP error's body: one clear sentence with the way out."""

    error: str


class IngestCandle(Struct, frozen=True, kw_only=True):
    """A candle as senders write it: aliases side by side, times still in the sender's own spelling."""

    open: float
    high: float
    low: float
    close: float
    ts: str | int | float | None = None
    time: str | int | float | None = None
    symbol: str | None = None
    timeframe: str | None = None
    interval: str | None = None
    volume: int | float | UnsetType = UNSET
    tick_volume: int | float | UnsetType = UNSET
    spread: int | float | None = None
    real_volume: int | float | None = None
    closed: bool | None = None
    point: float | None = None
