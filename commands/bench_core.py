"""Benchmarks without servers: one feature step, one prediction, and ten thousand series beside ten."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Final

import msgspec
import numpy as np

from actors.core.features import FeatureState
from actors.core.ingest import ANONYMOUS, Series, check_payload, judge, read
from actors.core.market import INSTRUMENTS, MINUTE
from actors.core.series import SeriesState, append, epoch, origin, split
from commands.bench_figures import Figure, Promise, alone, compare
from commands.bench_model import TIMEFRAME, block, candles, features, served
from schema.messages import Candle

BLOCK: Final = 1_000
WARM: Final = 300
REPEATS: Final = 3  # measurements of which a round takes the best, ours as the peer's
STEPS: Final = 1_000  # candles of a round, bar by bar
PREDICTIONS: Final = 500
PEER_PREDICTIONS: Final = 10
MANY: Final = 10_000
FEW: Final = 10
SLICE: Final = 2_000  # candles between two looks at the clock: both sides see the same machine
NOW: Final = 4e9  # every bar's time is over

STEP: Final = Promise("≥ 4 × faster", 4.0, "at least")
BLOCKS: Final = Promise("≤ 1 µs", 1.0, "at most", of="ours")
PREDICTION: Final = Promise("≥ 100 × faster", 100.0, "at least")
SERIES: Final = Promise("≤ 1.5 ×", 1.5, "at most")


def clocked(work: Callable[[], object]) -> float:
    """Seconds of processor time that ``work`` takes: what else the machine does is not its cost."""
    started = time.process_time()
    work()
    return time.process_time() - started


def best(measure: Callable[[], float]) -> float:
    """The least of a few: other work on the machine, by way of caches and clock rates, only adds to a cost."""
    return min(measure() for _ in range(REPEATS))


# --- features ----------------------------------------------------------------------------------------------------


def feature_steps(rounds: int) -> list[Figure]:
    """One incremental step of every feature beside talipp's RSI, MACD, ATR and SMA, and blocks of 1,000."""
    bars = candles(WARM + STEPS)
    singles, blocks = ours_by_step(bars), ours_by_block(candles(WARM + 10 * BLOCK))
    step, block, what = [], [], "one step of a series"
    try:
        peer = talipp_by_step(bars)
    except ImportError:
        for _ in range(rounds):
            step.append(best(singles))
            block.append(best(blocks))
        reason = "talipp is not installed: install the extra `bench`."
        missing = Figure(
            name="features", what=what, unit="µs", ours=float(np.median(step)), promise=STEP, why_not=reason
        )
        return [missing, alone("features", "a candle in blocks of 1,000", "µs", block, BLOCKS)]
    theirs = []
    for _ in range(rounds):
        step.append(best(singles))
        theirs.append(best(peer))
        block.append(best(blocks))
    return [
        compare("features", what, "µs", step, "talipp", theirs, STEP, faster=True),
        compare("features", "a candle in blocks of 1,000", "µs", block, "talipp", theirs, BLOCKS, faster=True),
    ]


def ours_by_step(bars: Sequence[Candle]) -> Callable[[], float]:
    """Measures a warm series bar by bar: microseconds a candle."""
    steps = [(epoch(bar), bar.high, bar.low, bar.close) for bar in bars]

    def measure() -> float:
        state = FeatureState()
        for step in steps[:WARM]:
            state.update(*step)
        update, rest = state.update, steps[WARM:]

        def work() -> None:
            for ts, high, low, close in rest:
                update(ts, high, low, close)

        return clocked(work) / len(rest) * 1e6

    return measure


def ours_by_block(bars: Sequence[Candle]) -> Callable[[], float]:
    """Measures a warm series in blocks of 1,000: microseconds a candle."""
    ts = np.array([epoch(bar) for bar in bars], np.int64)
    high, low, close = (np.array([getattr(bar, name) for bar in bars]) for name in ("high", "low", "close"))
    starts = range(WARM, len(bars), BLOCK)

    def measure() -> float:
        state = FeatureState()
        state.update_block(ts[:WARM], high[:WARM], low[:WARM], close[:WARM])

        def work() -> None:
            for at in starts:
                cut = slice(at, at + BLOCK)
                state.update_block(ts[cut], high[cut], low[cut], close[cut])

        return clocked(work) / (len(bars) - WARM) * 1e6

    return measure


def talipp_by_step(bars: Sequence[Candle]) -> Callable[[], float]:
    """The same for talipp. Raises ImportError."""
    indicators, ohlcv = import_module("talipp.indicators"), import_module("talipp.ohlcv")
    rows = [
        (bar.close, ohlcv.OHLCV(open=bar.open, high=bar.high, low=bar.low, close=bar.close, volume=bar.volume))
        for bar in bars
    ]

    def measure() -> float:
        rsi, macd = indicators.RSI(period=14), indicators.MACD(fast_period=12, slow_period=26, signal_period=9)
        atr, sma = indicators.ATR(period=14), indicators.SMA(period=60)

        def work(part: Sequence[Any]) -> None:
            for close, bar in part:
                rsi.add(close)
                macd.add(close)
                atr.add(bar)
                sma.add(close)

        work(rows[:WARM])
        rest = rows[WARM:]
        return clocked(lambda: work(rest)) / len(rest) * 1e6

    return measure


# --- prediction --------------------------------------------------------------------------------------------------


def predictions(rounds: int) -> list[Figure]:
    """One row's probability as the emitter asks for it, inputs included, beside the same forest in scikit-learn."""
    symbol = INSTRUMENTS[0].symbol
    one = served(symbol)
    rows = features(candles(WARM + PREDICTIONS))[WARM:]
    inputs = [x for row in rows[:PEER_PREDICTIONS] if (x := one.model.feature_set.of_row(row)) is not None]

    def ours() -> None:
        for row in rows:
            one.model.prob_up(symbol, row)

    def theirs() -> None:
        for x in inputs:
            one.forest.predict_proba(x)

    ours()
    pairs = [
        (
            best(lambda: clocked(ours)) / len(rows) * 1e6,
            best(lambda: clocked(theirs)) / len(inputs) * 1e6,
        )
        for _ in range(rounds)
    ]
    what = "one row through 200 trees of depth 8"
    return [
        compare(
            "prediction",
            what,
            "µs",
            [a for a, _ in pairs],
            "scikit-learn predict_proba",
            [b for _, b in pairs],
            PREDICTION,
            faster=True,
        )
    ]


def largest_difference() -> float:
    """Between the served graph's probabilities and the pickled forest's, over real rows."""
    symbol = INSTRUMENTS[0].symbol
    one = served(symbol)
    rows = features(candles(WARM + PREDICTIONS))[WARM:]
    inputs = np.concatenate([x for row in rows if (x := one.model.feature_set.of_row(row)) is not None])
    given = np.array([one.model.prob_up(symbol, row) for row in rows])
    return float(np.max(np.abs(given - one.calibrated.predict_proba(inputs)[:, 1])))


# --- many series -------------------------------------------------------------------------------------------------


class Fleet:
    """``count`` warm series and what the hot path decides of each posted candle: the collector's judgement, then features."""

    def __init__(self, count: int) -> None:
        bars = candles(WARM)
        known, state = Series(), SeriesState("", TIMEFRAME)
        known.remember(bars, ANONYMOUS, None)
        append(state, bars, origin(block(bars), 1))
        known_json, state_json = msgspec.json.encode(known), msgspec.json.encode(state)
        self.names = [f"S{i:05d}" for i in range(count)]
        # Every series gets objects of its own, as it would have after months of running.
        self.series: dict[tuple[str, str], Series] = {
            (name, TIMEFRAME): msgspec.json.decode(known_json, type=Series) for name in self.names
        }
        self.states: dict[tuple[str, str], SeriesState] = {
            (name, TIMEFRAME): msgspec.json.decode(state_json, type=SeriesState) for name in self.names
        }
        self._last = dict.fromkeys(self.names, bars[-1])
        self._at = 0

    def bodies(self, count: int) -> list[bytes]:
        """The next ``count`` candles as a terminal would post them, one series after the other."""
        out = []
        for _ in range(count):
            name = self.names[self._at % len(self.names)]
            self._at += 1
            last = self._last[name]
            close = round(last.close + (0.00003 if self._at % 3 else -0.00006), 5)
            bar = msgspec.structs.replace(
                last,
                ts=last.ts + MINUTE,
                open=last.close,
                high=max(last.close, close),
                low=min(last.close, close),
                close=close,
            )
            self._last[name] = bar
            out.append(post_body(name, bar))
        return out

    def history(self, size: int) -> bytes:
        """The next ``size`` candles of the series, one after the other, as one payload of history."""
        return b'{"history":true,"items":[' + b",".join(self.bodies(size)) + b"]}"

    def take(self, bodies: Sequence[bytes]) -> None:
        series, states = self.series, self.states
        for body in bodies:
            payload = read(body)
            judged = judge(payload, check_payload(payload, {}), NOW, series, {})
            for key, layers in judged.layers.items():
                for layer in layers:
                    series[key].remember(layer, payload.origin, payload.server_time)
                    state = states[key]
                    new = origin(block(layer), state.seq + 1)
                    fresh, _ = split(state, layer, new)
                    append(state, fresh, new)


def post_body(symbol: str, bar: Candle) -> bytes:
    """One candle as JSON."""
    return msgspec.json.encode(
        {
            "ts": epoch(bar),
            "symbol": symbol,
            "timeframe": TIMEFRAME,
            "open": bar.open,
            "high": bar.high,
            "low": bar.low,
            "close": bar.close,
            "tick_volume": bar.volume,
            "spread": bar.spread,
        }
    )


def many_series(rounds: int) -> list[Figure]:
    """The core's cost a candle at 10,000 series beside 10: read, judge, remember, features."""
    many, few = Fleet(MANY), Fleet(FEW)
    for fleet in (many, few):
        fleet.take(fleet.bodies(SLICE))
    at_many: list[float] = []
    at_few: list[float] = []
    for _ in range(rounds * (MANY // SLICE)):
        for fleet, costs in ((many, at_many), (few, at_few)):
            bodies = fleet.bodies(SLICE)
            costs.append(clocked(lambda: fleet.take(bodies)) / SLICE * 1e6)  # noqa: B023 - called at once
    return [compare("series", "core, a candle at 10,000 series", "µs", at_many, "at 10 series", at_few, SERIES)]


# --- blocks of any length ----------------------------------------------------------------------------------------


def history_cost(size: int, count: int = 4_000) -> float:
    """The core's microseconds a candle where history comes ``size`` candles a payload: read, judge, remember, features."""
    fleet = Fleet(1)
    bodies = [fleet.history(size) for _ in range(count // size)]
    return clocked(lambda: fleet.take(bodies)) / (len(bodies) * size) * 1e6
