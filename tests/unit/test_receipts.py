"""A row is made again as of its sequence, whatever was revised, late, withdrawn, deferred or confirmed before and after."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.core.hashing import features_hash
from actors.core.history import History, revise, take_in
from actors.core.rebuild import PRICES, Rebuilder, Version
from actors.core.receipts import Receipt, Service, compare
from actors.core.series import Change, SeriesState, append, epoch, origin, split
from actors.core.serving import build_signal, decide, expires_at
from actors.core.timeframe import end_time
from schema.messages import Candle, CandleBlock, FeatureRow, ModelEvent, Signal
from tests.builders import block, walk

Published = tuple[int, FeatureRow]  # with the CANDLES sequence of its block


class Calculator:
    """The feature actor's decisions and what the archive keeps of them, without a bus and without a window's checkpoint."""

    def __init__(self) -> None:
        self.log: list[CandleBlock] = []
        self.state = SeriesState("EURUSD", "M1")
        self.published: list[Published] = []
        self.versions: list[Version] = []
        self._kept: dict[int, tuple[Any, ...]] = {}

    def take(self, message: CandleBlock) -> None:
        self.log.append(message)
        seq = len(self.log)
        new = origin(message, seq)
        self.state.hear(new, ())
        fresh, older = split(self.state, message.rows, new)
        if not message.withdrawn and not older:
            self._publish(seq, append(self.state, fresh, new), message)
        elif (
            not message.withdrawn
            and not fresh
            and self.state.first_ts is not None
            and epoch(older[-1]) < self.state.first_ts
        ):
            self.state.deferred.append(seq)
        elif self.state.deferred:
            self._take_in([message], seq)
        else:
            self._publish(seq, revise(self._window(()), self.state, message, seq, ()), message)

    def quiet(self) -> None:
        """Nothing older has come for a while: what waits is taken in with the newest sequence."""
        if self.state.deferred:
            self._take_in([], len(self.log))

    def _take_in(self, blocks: list[CandleBlock], seq: int) -> None:
        until = seq - 1 if blocks else seq
        before, after = self._window(self.state.deferred, until), self._window((), until)
        self._publish(seq, take_in(before, after, self.state, blocks, seq, ()), self.log[-1])
        self.state.deferred = []

    def _window(self, without: Any, until: int | None = None) -> History:
        history = History()
        for seq, message in enumerate(self.log[: len(self.log) - 1 if until is None else until], 1):
            if seq not in without:
                history.apply(message, seq, ())
        return history

    def _publish(self, seq: int, change: Change, message: CandleBlock) -> None:
        """As the recorder keeps it: a version that is known keeps the sequence it was first used with."""
        for gone in change.withdrawn:
            self.versions.append(Version(seq, int(gone.ts.timestamp()), None, gone.revision, brought_seq=seq))
            self._kept.pop(int(gone.ts.timestamp()), None)
        for row in change.rows:
            self.published.append((seq, row))
            values = tuple(getattr(row, name) for name in PRICES)
            if self._kept.get(epoch_of(row)) != (values, row.revision):
                self._kept[epoch_of(row)] = (values, row.revision)
                own = row.brought_seq is None
                heard = message.received_at if own else row.heard_at
                self.versions.append(
                    Version(
                        seq, epoch_of(row), values, row.revision, row.live, heard, seq if own else row.brought_seq or 0
                    )
                )


def epoch_of(row: FeatureRow) -> int:
    return int(row.ts.timestamp())


def live(rows: list[Candle], clock: int, **more: Any) -> CandleBlock:
    return block(rows, replay=False, server_time=clock, source="Broker", **more)


def other(row: Candle, chance: Random) -> Candle:
    return msgspec.structs.replace(row, close=row.close + chance.choice([-1e-5, 1e-5]), high=row.high + 2e-5)


def lived(chance: Random, bars: int, troubles: int) -> Calculator:
    """A series with a random life: blocks and single bars, and at random moments every kind of trouble."""
    rows = walk(bars, seed=chance.randrange(1_000))
    calculator = Calculator()
    first = chance.randrange(20)
    at, clock, missing = first, 0, []
    when = {chance.randrange(at + 2, bars) for _ in range(troubles)}
    while at < bars:
        clock += 1
        size = chance.choice([1, 1, 1, 40])
        part = rows[at : at + size]
        if len(part) > 2 and chance.random() < 0.3:
            missing.append(part.pop(1))
        calculator.take(live(part, clock))
        if when & set(range(at, at + size)):
            clock += 1
            trouble(calculator, chance, rows, at, first, clock, missing)
        at += size
    calculator.quiet()
    return calculator


def trouble(
    calculator: Calculator, chance: Random, rows: list[Candle], at: int, first: int, clock: int, missing: list[Candle]
) -> None:
    match chance.randrange(6):
        case 0:
            calculator.take(live([other(rows[max(first, at - chance.choice([0, 3, 80, 1_100]))], chance)], clock))
        case 1 if missing:
            calculator.take(live([missing.pop()], clock))
        case 2:
            gone = rows[max(first, at - chance.randrange(1, 60))]
            calculator.take(live([], clock, withdrawn=(gone.ts,)))
            if chance.random() < 0.5:
                calculator.take(live([gone], clock + 1))
        case 3:  # confirmed: its row is published again, its values are the same
            calculator.take(live([rows[at]], clock, ts_source="server"))
        case 4 if first:
            calculator.take(block(rows[:first], replay=False, history=True))
            if chance.random() < 0.5:
                calculator.quiet()
        case 5:  # two changes in one message, with what follows
            places = sorted({max(first, at - 30), max(first, at - 2)})
            calculator.take(live([other(rows[place], chance) for place in places], clock))
        case _:
            pass


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_every_row_that_was_ever_published_is_made_again(seed: int) -> None:
    chance = Random(seed)
    calculator = lived(chance, 1_500 if chance.random() < 0.3 else 250, chance.randrange(1, 12))
    wanted = [(epoch_of(row), seq) for seq, row in calculator.published]
    past = rebuilt(calculator, wanted, chance)
    for seq, row in calculator.published:
        digest = features_hash("EURUSD", "M1", row)
        # Five bars more at a series' beginning are not felt by any bit of its features, five hundred bars later.
        forms = [f for f in past.found[epoch_of(row), seq] if (f.digest, f.row.bar) == (digest, row.bar)]
        assert forms, (epoch_of(row), seq)
        made = next((form for form in forms if form.replaces == row.replaces), forms[0])
        same = (
            "ts",
            *PRICES,
            "rsi",
            "macd",
            "macd_signal",
            "macd_hist",
            "atr",
            "ma60",
            "ret_1",
            "bar",
            "ready",
            "revision",
        )
        assert [getattr(made.row, name) for name in same] == [getattr(row, name) for name in same]
        assert made.row.live == row.live
        if made.published == seq:
            assert made.replaces == row.replaces
        elif row.replaces is not None:  # published again without a change
            assert made.replaces == row.replaces == made.digest


def rebuilt(calculator: Calculator, wanted: list[tuple[int, int]], chance: Random) -> Rebuilder:
    past = Rebuilder("EURUSD", "M1", wanted)
    versions = sorted(calculator.versions, key=lambda v: (v.seq, v.brought_seq < v.seq, v.values is not None, v.ts))
    while versions:  # cut anyhow
        size = chance.randrange(1, 400)
        past.feed(versions[:size])
        versions = versions[size:]
    past.finish()
    return past


# --- comparison ----------------------------------------------------------------------------------------------------


def event(version: str, from_seq: int, state: str = "champion", timeframe: str = "M1") -> ModelEvent:
    return ModelEvent(
        event="activated",
        model_name="rf_m1",
        version=version,
        timeframe=timeframe,
        at=datetime(2025, 1, 1, tzinfo=UTC),
        state=state,
        from_seq=from_seq,
    )


def test_who_served_is_the_newest_activation_up_to_the_candle() -> None:
    service = Service(
        [event("a", 1, "provisional"), event("b", 10), event("a", 20)], [("M1", 5, "lost"), ("H1", 3, "x")]
    )
    assert service.at("M1", 0) is None
    assert [service.version_at("M1", seq) for seq in (1, 9, 10, 19, 20, 99)] == ["a", "a", "b", "b", "a", "a"]
    assert service.version_at("H1", 3) == "x"
    assert service.versions_between("M1", 1, 20) == {"a", "b"}
    # What the stream has forgotten, the registry tells, but for its state.
    forgotten = Service([event("b", 10)], [("M1", 2, "a"), ("M1", 10, "b")])
    assert forgotten.at("M1", 5) == (2, "a", None)
    assert forgotten.version_at("M1", 10) == "b"


def emitted(calculator: Calculator, service: Service, at: int) -> tuple[Signal, dict[str, Any]]:
    """The signal of a published row, as the emitter makes it without a model's file, and the archive's features row."""
    seq, row = calculator.published[at]
    end = end_time(row.ts, "M1")
    expires = expires_at(row.ts, end)
    heard = next(v.heard_at for v in reversed(calculator.versions) if v.ts == epoch_of(row) and v.seq <= seq)
    signal = build_signal(
        symbol="EURUSD",
        timeframe="M1",
        row=row,
        decision=decide(row, "EURUSD", None, None, None, judged_at=heard or end, expires_at=expires),
        model_name="rf_m1",
        model_version=service.version_at("M1", seq),
        candles_seq=seq,
        expires_at=expires,
        created_at=datetime(2025, 1, 2, tzinfo=UTC),
    )
    names = (
        "close",
        "volume",
        "spread",
        "rsi",
        "macd",
        "macd_signal",
        "macd_hist",
        "atr",
        "ma60",
        "ret_1",
        "ready",
        "bar",
    )
    features = {name: getattr(row, name) for name in names}
    return signal, features | {"fwd_ret_5": row.fwd_ret_5, "candle_revision": row.revision, "candles_seq": seq}


@pytest.fixture(scope="module")
def plain_life() -> Calculator:
    calculator = Calculator()
    for clock, row in enumerate(walk(320), 1):
        calculator.take(live([row], clock))
    return calculator


def checked(calculator: Calculator, receipt: Receipt, service: Service) -> list[str]:
    past = rebuilt(calculator, list(receipt.wanted), Random(1))
    return [d.field for d in compare(receipt, past, service, None, "rf_m1")]


def test_an_honest_receipt_has_no_difference(plain_life: Calculator) -> None:
    service = Service([])
    signal, features = emitted(plain_life, service, 310)
    _, known = past_label(plain_life, signal)
    receipt = Receipt(signal, features | {"fwd_ret_5": known}, signal)
    assert checked(plain_life, receipt, service) == []


def past_label(calculator: Calculator, signal: Signal) -> tuple[bool, float | None]:
    past = rebuilt(calculator, [], Random(1))
    return past.label(int(signal.ts.timestamp()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("id", "0" * 32),
        ("model_name", "rf_h1"),
        ("model_version", "20250101T000000Z-00000000"),
        ("threshold", 0.5),
        ("prob_up", 0.5),
        ("label", 1),
        ("abstain", "no_edge"),
        ("candle_revision", 1),
        ("candles_seq", 312),
        ("features_hash", "0" * 32),
        ("supersedes", "0" * 32),
    ],
)
def test_every_part_of_a_signal_is_compared(plain_life: Calculator, name: str, value: Any) -> None:
    service = Service([])
    signal, _ = emitted(plain_life, service, 310)
    wrong = msgspec.structs.replace(signal, **{name: value})
    assert name in checked(plain_life, Receipt(wrong, None), service)
    # The stream's copy tells it too.
    assert f"stream.{name}" in checked(plain_life, Receipt(wrong, None, signal), service)
    later = msgspec.structs.replace(signal, expires_at=signal.expires_at + timedelta(microseconds=1))
    assert checked(plain_life, Receipt(later), service) == ["expires_at"]


def test_a_bars_prices_are_compared_with_the_logs(plain_life: Calculator) -> None:
    service = Service([])
    signal, _ = emitted(plain_life, service, 310)
    row = plain_life.published[310][1]
    prices = tuple(getattr(row, name) for name in PRICES)
    assert checked(plain_life, Receipt(signal, logged=prices), service) == []
    assert checked(plain_life, Receipt(signal, logged=(prices[0] + 1e-9, *prices[1:])), service) == ["candle.open"]
