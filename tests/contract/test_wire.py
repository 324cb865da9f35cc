"""What travels, byte by byte: each golden file is a message as some version wrote it, and every later version reads it.

A message's new field comes last, has a default, and is shown in a new golden file, ``<name>.v<next>.json``; the old
files stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import inspect

from bus.subjects import CANDLES, CHANNELS, FEATURES, FORMING, MODELS, REJECTS, SIGNALS, decode_token, encode_token
from schema import messages
from schema.messages import (
    Alert,
    Backfill,
    BackupEvent,
    Candle,
    CandleBlock,
    FeatureBlock,
    FeatureRow,
    Fill,
    FormingCandle,
    IngestAnswer,
    Message,
    ModelEvent,
    Outcome,
    Problem,
    Reject,
    RejectedCandle,
    Signal,
    SignalList,
    Withdrawn,
)

GOLDEN = Path(__file__).parent / "golden"
T0 = datetime(2025, 2, 13, 1, 33, tzinfo=UTC)
T1 = datetime(2025, 2, 13, 1, 34, tzinfo=UTC)
RECEIVED = datetime(2025, 2, 13, 1, 35, 0, 123456, tzinfo=UTC)

CANDLE = Candle(
    ts=T0, open=1.03941, high=1.03945, low=1.03938, close=1.03939, volume=69.0, spread=4.0, real_volume=1_500_000.0
)
BARE_CANDLE = Candle(ts=T1, open=1.03938, high=1.03948, low=1.03932, close=1.03947, volume=55.0)
FEATURE_ROW = FeatureRow(
    ts=T0,
    open=1.03941,
    high=1.03945,
    low=1.03938,
    close=1.03939,
    volume=69.0,
    spread=4.0,
    real_volume=1_500_000.0,
    rsi=48.73648219012345,
    macd=-1.2345678901234567e-05,
    macd_signal=2.5e-06,
    macd_hist=-1.4845678901234567e-05,
    atr=0.00011428571428571427,
    ma60=1.0394123333333334,
    ret_1=-1.9241688156247e-05,
    fwd_ret_5=0.0,
    bar=300,
    ready=True,
    revision=2,
)
REPLACING_ROW = msgspec.structs.replace(
    FEATURE_ROW,
    live=False,
    replaces="0f1e2d3c4b5a69788796a5b4c3d2e1f0",
    replaces_seq=4_700,
    source="Broker-Demo",
    ts_source="rule",
)
RECOMPUTED_ROW = msgspec.structs.replace(REPLACING_ROW, brought_seq=4_690, server_time=1_739_417_640, heard_at=T1)
BARE_FEATURE_ROW = FeatureRow(ts=T1, open=1.0, high=1.0, low=1.0, close=1.0, volume=0.0, spread=0.0)
SIGNAL = Signal(
    id="5a1c0f6bb1f0b8a54c39bd8f6d9b3f02",
    ts=T0,
    symbol="EURUSD.m",
    timeframe="M1",
    model_name="rf_m1",
    model_version="20260131T235900Z-1a2b3c4d",
    threshold=0.5725,
    prob_up=0.6132456064224243,
    label=1,
    abstain=None,
    candle_revision=2,
    candles_seq=4_711,
    features_hash="0f1e2d3c4b5a69788796a5b4c3d2e1f0",
    created_at=RECEIVED,
    expires_at=datetime(2025, 2, 13, 1, 35, tzinfo=UTC),
    supersedes="ffffffffffffffffffffffffffffffff",
)
ABSTAINING = msgspec.structs.replace(
    SIGNAL, model_version=None, threshold=None, prob_up=None, label=0, abstain="no_model", supersedes=None
)

# File → what it says. The newest version of a message shows each of its fields with another value than its default.
WIRE: dict[str, Message] = {
    "candles.v1": CandleBlock(
        symbol="EURUSD.m",
        timeframe="M1",
        rows=(CANDLE, BARE_CANDLE),
        received_at=RECEIVED,
        history=True,
        replay=True,
        now=T1,
        source="Broker-Demo",
        server_time=1_739_417_700,
        ts_source="server",
    ),
    "candles.v1.bare": CandleBlock(symbol="EURUSD", timeframe="M1", rows=(BARE_CANDLE,), received_at=RECEIVED),
    "candles.v2": CandleBlock(
        symbol="EURUSD.m",
        timeframe="M1",
        rows=(CANDLE, BARE_CANDLE),
        received_at=RECEIVED,
        history=True,
        replay=True,
        now=T1,
        source="Broker-Demo",
        server_time=1_739_417_700,
        ts_source="rule",
        withdrawn=(T0, T1),
        point=1e-05,
    ),
    "candles.v3": CandleBlock(
        symbol="EURUSD.m",
        timeframe="M1",
        rows=(CANDLE, BARE_CANDLE),
        received_at=RECEIVED,
        history=True,
        replay=True,
        now=T1,
        source="Broker-Demo",
        server_time=1_739_417_700,
        ts_source="rule",
        withdrawn=(T0, T1),
        point=1e-05,
        server_utc=1_739_410_500,
    ),
    "features.v1": FeatureBlock(
        symbol="EURUSD.m",
        timeframe="M1",
        candles_seq=4_711,
        rows=(FEATURE_ROW, BARE_FEATURE_ROW),
        received_at=RECEIVED,
        fills=(Fill(ts=T0, fwd_ret_5=-0.00012), Fill(ts=T1, fwd_ret_5=None)),
        part=2,
        parts=3,
        history=True,
        replay=True,
        now=T1,
        source="Broker-Demo",
        ts_source="server",
    ),
    "features.v1.bare": FeatureBlock(
        symbol="EURUSD", timeframe="M1", candles_seq=1, rows=(BARE_FEATURE_ROW,), received_at=RECEIVED
    ),
    "features.v2": FeatureBlock(
        symbol="EURUSD.m",
        timeframe="M1",
        candles_seq=4_711,
        rows=(REPLACING_ROW, BARE_FEATURE_ROW),
        received_at=RECEIVED,
        fills=(Fill(ts=T0, fwd_ret_5=-0.00012), Fill(ts=T1, fwd_ret_5=None)),
        part=2,
        parts=3,
        history=True,
        replay=True,
        now=T1,
        source="Broker-Demo",
        ts_source="rule",
        withdrawn=(Withdrawn(ts=T1, revision=3),),
        point=1e-05,
    ),
    "features.v3": FeatureBlock(
        symbol="EURUSD.m",
        timeframe="M1",
        candles_seq=4_711,
        rows=(RECOMPUTED_ROW, BARE_FEATURE_ROW),
        received_at=RECEIVED,
        fills=(Fill(ts=T0, fwd_ret_5=-0.00012), Fill(ts=T1, fwd_ret_5=None)),
        part=2,
        parts=3,
        history=True,
        replay=True,
        now=T1,
        source="Broker-Demo",
        ts_source="rule",
        withdrawn=(Withdrawn(ts=T1, revision=3),),
        point=1e-05,
        server_time=1_739_417_700,
    ),
    "signals.v1": SIGNAL,
    "signals.v1.bare": ABSTAINING,
    "forming.v1": FormingCandle(symbol="EURUSD.m", timeframe="M1", candle=CANDLE, received_at=RECEIVED),
    "models.v1": ModelEvent(
        event="activated",
        model_name="rf_m1",
        version="20260131T235900Z-1a2b3c4d",
        timeframe="M1",
        at=RECEIVED,
        state="provisional",
        from_seq=4_712,
        reason="the first version that passed",
        by="emitter",
    ),
    "models.v2": ModelEvent(
        event="released",
        model_name="rf_m1",
        version="20260131T235900Z-1a2b3c4d",
        timeframe="M1",
        at=RECEIVED,
        state="champion",
        from_seq=4_712,
        reason="version 20260131T235900Z-1a2b3c4d predicts better than the base rate of its training",
        by="scorer",
        recipe="0f1e2d3c4b5a",
        evidence={"kind": "proof", "e_value": 104.5, "outcomes": 12_000},
    ),
    "models.v1.bare": ModelEvent(event="registered", model_name="rf_m1", version="v", timeframe="M1", at=RECEIVED),
    "outcomes.v1": Outcome(
        signal_id="5a1c0f6bb1f0b8a54c39bd8f6d9b3f02",
        ts=T0,
        symbol="EURUSD.m",
        timeframe="M1",
        model_name="rf_m1",
        model_version="20260131T235900Z-1a2b3c4d",
        state="champion",
        prob_up=0.6132456064224243,
        base_rate=0.4931,
        label=1,
        abstain=None,
        ret=4.811538461538461e-05,
        up=True,
        won=True,
        gross=5.772616e-05,
        net=-1.4e-07,
        candles_seq=4_716,
    ),
    "outcomes.v1.bare": Outcome(
        signal_id="f",
        ts=T0,
        symbol="EURUSD",
        timeframe="M1",
        model_name="rf_m1",
        model_version="v",
        state="shadow",
        prob_up=0.5,
        base_rate=0.5,
        label=0,
        abstain="no_edge",
        ret=0.0,
        up=None,
        won=None,
        gross=None,
        net=None,
        candles_seq=1,
    ),
    "alerts.v1": Alert(
        severity="warning",
        check="clock",
        message="The offset of Broker-Demo is inferred.",
        at=RECEIVED,
        source="Broker-Demo",
        details={"offset": 7_200, "weeks": 8},
    ),
    "alerts.v1.bare": Alert(severity="info", check="clock", message="The clock agrees.", at=RECEIVED),
    "alerts.v2": Alert(
        severity="critical",
        check="database",
        message="PostgreSQL does not answer.",
        at=RECEIVED,
        details={"checks": ["database"]},
        event="opened",
        incident="20250213T013500-database",
    ),
    "backups.v1": BackupEvent(
        event="verified",
        backup="2025-02-13",
        at=RECEIVED,
        bytes=1_048_576,
        seconds=12.5,
        rpo_seconds=61.5,
        target="backup@example.org:/srv/mt5",
        error="none of it",
        details={"rows": 1_000, "streams": 4},
    ),
    "backups.v1.bare": BackupEvent(event="made", backup="2025-02-13", at=RECEIVED),
    "rejects.v1": Reject(
        where="candles",
        reason="high 1.0 is below open 1.2",
        at=RECEIVED,
        payload={"symbol": "EURUSD", "candles": [{"index": 0, "candle": {"open": 1.2, "high": 1.0}}]},
        subject="candles.M1.EURUSD",
        source="Broker-Demo",
        headers={"Nats-Msg-Id": "a1b2"},
    ),
    "rejects.v1.bare": Reject(where="recorder", reason="cannot be decoded", at=RECEIVED, payload="not json"),
    "http_ingest_answer.v1": IngestAnswer(
        received=5,
        accepted=1,
        duplicates=1,
        forming=1,
        rejected=(RejectedCandle(index=4, error="the price is not positive."),),
        backfill=(Backfill(symbol="EURUSD", timeframe="M1", from_=T0, to=T1),),
    ),
    "http_ingest_answer.v1.bare": IngestAnswer(received=1, accepted=1, duplicates=0, forming=0),
    "http_signals.v1": SignalList(signals=(SIGNAL, ABSTAINING)),
    "http_problem.v1": Problem(error="The body is not JSON."),
}


def name_of(file: str) -> str:
    return file.partition(".")[0]


def version_of(file: str) -> int:
    return int(file.split(".")[1].removeprefix("v"))


def newest(file: str) -> bool:
    return version_of(file) == max(version_of(other) for other in WIRE if name_of(other) == name_of(file))


def test_every_golden_file_is_read_by_a_test() -> None:
    assert {path.name.removesuffix(".json") for path in GOLDEN.iterdir()} == set(WIRE)


@pytest.mark.parametrize("file", WIRE)
def test_what_any_version_wrote_is_read_as_it_was_meant(file: str) -> None:
    data = (GOLDEN / f"{file}.json").read_bytes()
    assert msgspec.json.decode(data, type=type(WIRE[file])) == WIRE[file]


@pytest.mark.parametrize("file", WIRE)
def test_it_is_written_with_the_same_bytes(file: str) -> None:
    message = WIRE[file]
    if not newest(file) and not type(message).__struct_config__.omit_defaults:
        pytest.skip("this message writes its defaults, so that a later version says more")
    assert (GOLDEN / f"{file}.json").read_bytes() == msgspec.json.encode(message) + b"\n"


@pytest.mark.parametrize("file", WIRE)
def test_a_later_versions_fields_do_not_hurt(file: str) -> None:
    document = msgspec.json.decode((GOLDEN / f"{file}.json").read_bytes())
    later = msgspec.json.encode(document | {"of_a_later_version": {"x": 1}})
    assert msgspec.json.decode(later, type=type(WIRE[file])) == WIRE[file]


@pytest.mark.parametrize("channel", CHANNELS, ids=lambda channel: channel.prefix)
def test_every_channel_has_golden_files_of_its_struct(channel: Any) -> None:
    files = [file for file in WIRE if name_of(file) == channel.prefix]
    assert files
    for file in files:
        data = (GOLDEN / f"{file}.json").read_bytes()
        assert channel.decode(data) == WIRE[file]
        assert channel.encode(channel.decode(data)) == msgspec.json.encode(WIRE[file])


def travelling(message: Any) -> Iterator[msgspec.Struct]:
    """A message and every struct inside it."""
    if isinstance(message, msgspec.Struct):
        yield message
        for name in message.__struct_fields__:
            yield from travelling(getattr(message, name))
    elif isinstance(message, tuple):
        for item in message:
            yield from travelling(item)


def test_every_field_of_every_struct_is_shown_with_a_value_of_its_own() -> None:
    shown: dict[type, set[str]] = {}
    for message in WIRE.values():
        for struct in travelling(message):
            for info in msgspec.structs.fields(struct):
                if info.required or getattr(struct, info.name) != default_of(info):
                    shown.setdefault(type(struct), set()).add(info.name)
    for struct_type, names in shown.items():
        missing = [name for name in struct_type.__struct_fields__ if name not in names]
        assert not missing, f"{struct_type.__name__}.{missing[0]} is in no golden file: add the next version of one"


def default_of(info: Any) -> Any:
    return info.default_factory() if info.default is msgspec.NODEFAULT else info.default


def structs_of_messages() -> list[type[msgspec.Struct]]:
    return [
        found
        for found in vars(messages).values()
        if isinstance(found, type) and issubclass(found, msgspec.Struct) and found.__module__ == messages.__name__
    ]


@pytest.mark.parametrize("struct", structs_of_messages(), ids=lambda struct: struct.__name__)
def test_structs_are_frozen_and_take_aware_times_only(struct: type[msgspec.Struct]) -> None:
    assert struct.__struct_config__.frozen
    for found in inspect.type_info(struct).fields:
        members = getattr(found.type, "types", (found.type,))
        for member in members:
            assert not isinstance(member, inspect.DateTimeType) or member.tz, f"{found.name} may be naive"


def test_naive_times_are_refused() -> None:
    data = (GOLDEN / "candles.v1.bare.json").read_bytes()
    naive = data.replace(b"Z", b"")
    assert naive != data
    with pytest.raises(msgspec.ValidationError, match="timezone"):
        CANDLES.decode(naive)


@pytest.mark.parametrize(
    "value", [0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0, 1e22, 123456789.12345679, 2**53 + 0.0]
)
def test_prices_keep_every_bit(value: float) -> None:
    candle = msgspec.structs.replace(CANDLE, close=value)
    again = msgspec.json.decode(msgspec.json.encode(candle), type=Candle)
    assert again.close.hex() == value.hex()


# --- subjects --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("symbol", "token"),
    [
        ("EURUSD", "EURUSD"),
        ("EURUSD.m", "EURUSD%2Em"),
        ("GBPUSD!", "GBPUSD!"),
        ("@ES", "@ES"),
        ("US 30*", "US%2030%2A"),
        ("100%>", "100%25%3E"),
        ("Ärger\t", "Ärger%09"),
        ("#BRK.B", "#BRK%2EB"),
    ],
)
def test_symbols_as_tokens(symbol: str, token: str) -> None:
    assert encode_token(symbol) == token
    assert decode_token(token) == symbol
    assert SIGNALS.subject("M1", symbol) == f"signals.M1.{token}"
    assert SIGNALS.parse(f"signals.M1.{token}") == ("M1", symbol)


def test_subjects_and_streams_are_the_contracts() -> None:
    assert {channel.prefix: (channel.stream, channel.tokens) for channel in CHANNELS} == {
        "candles": ("CANDLES", 2),
        "features": ("FEATURES", 2),
        "signals": ("SIGNALS", 2),
        "forming": (None, 2),
        "models": ("EVENTS", 1),
        "outcomes": ("EVENTS", 2),
        "alerts": ("EVENTS", 2),
        "backups": ("EVENTS", 1),
        "rejects": ("REJECTS", 1),
    }
    assert CANDLES.subject("H1", "US30.m") == "candles.H1.US30%2Em"
    assert (FEATURES.wildcard, MODELS.wildcard, FORMING.wildcard) == ("features.>", "models.>", "forming.>")
    with pytest.raises(ValueError, match="2 tokens"):
        CANDLES.subject("M1")
    with pytest.raises(ValueError, match="no subject|not a subject"):
        REJECTS.parse("candles.M1.EURUSD")
