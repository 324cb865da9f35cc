"""The leak guard: what every training must show before its figures are believed.

**Prefixes.** What is known of a bar must not change when the bars after it are taken away. Features are computed again
from bars, and inputs from features, on truncated prefixes: every value must have the same bits as in the full computation,
in the archive and in what serving computes of that row. The first that differs is named.

**Shuffled labels.** Labels that changed places in blocks (of at least 60 bars, so that they keep their own memory) have
nothing to do with the inputs; a pipeline that ranks them all the same has seen the answers.

**A random walk.** Simulated bars, in which nothing can be learned, go through the whole pipeline from bars to threshold;
a pipeline that finds an edge there finds one anywhere.

A control's AUC must lie within ``max(0.02, 2.3 / √n)`` of 0.5, ``n`` being the rows scored. Chance alone exceeds that in a
few runs of a hundred (labels overlap, so rows are worth less than their number): a control that fails is run once more with
another seed, and only the second failure refuses. A leak fails twice; chance does so in well under 1 % of trainings.
The controls use fewer rows and trees than the model, of the same depth and in the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from actors.core import evaluate
from actors.core.dataset import Dataset, History, TradeBars, inputs_of
from actors.core.evaluate import Blocks, Bools, Floats, Ints
from actors.core.features import READY_AFTER, Columns, FeatureState, forward_returns
from actors.core.forest import TrainOptions
from actors.core.inputs import FeatureColumns, FeatureSet, Inputs
from actors.core.timeframe import FORWARD_BARS, FORWARD_SPAN, from_epoch
from actors.core.walk import walk
from schema.messages import FeatureRow

CUTS: Final = 8  # prefixes of a series
CONTROL_ROWS: Final = 12_000  # newest rows that the shuffled labels go with
WALK_BARS: Final = 8_000
CONTROL_TREES: Final = 32
CONTROL_FOLDS: Final = 3
CONTROL_SEEDS: Final = 2
LIMIT_FLOOR: Final = 0.02
LIMIT_SCALE: Final = 2.3  # four standard deviations of an AUC of independent rows, two of overlapping ones
_BLOCK: Final = 50_000  # bars computed at a time: lists of floats are ten times as large as arrays

Compute = Callable[[Ints, Floats, Floats, Floats], FeatureColumns]


class Fault(NamedTuple):
    """The first value that is not what it should be; ``how`` ends the sentence that begins with the input's name."""

    name: str
    symbol: str
    ts: int
    how: str

    def sentence(self) -> str:
        bar = datetime.fromtimestamp(self.ts, UTC)
        return f"The input {self.name} {self.how} (first at the bar of {bar:%Y-%m-%d %H:%M} UTC of {self.symbol})."


@dataclass(frozen=True, slots=True)
class Checked:
    """What the guard found; ``refusal`` is None where nothing speaks against the training."""

    report: dict[str, Any]
    refusal: str | None


# --- prefixes ----------------------------------------------------------------------------------------------------


def features_of(ts: Ints, high: Floats, low: Floats, close: Floats) -> FeatureColumns:
    """Features of a series from its first bar on, by the code that serves; NaN where there is none yet."""
    state, parts = FeatureState(), []
    for start in range(0, len(ts), _BLOCK):
        part = slice(start, start + _BLOCK)
        made = state.update_block(ts[part], high[part], low[part], close[part])
        parts.append([np.array(getattr(made, name), dtype=np.float64) for name in Columns.__struct_fields__])
    columns = dict(zip(Columns.__struct_fields__, (np.concatenate(c) for c in zip(*parts, strict=True)), strict=True))
    return FeatureColumns(ts=ts, close=close, **columns)


def cuts(rows: int) -> list[int]:
    """Where a series is truncated: the numbers of rows that are left."""
    return (
        sorted({int(c) for c in np.linspace(min(READY_AFTER + 1, rows - 1), rows - 1, CUTS)} - {0}) if rows > 1 else []
    )


def differs(one: NDArray[Any], other: NDArray[Any]) -> Bools:
    """Where two float arrays have different bits; what is not a number equals its like."""
    bits = np.int64 if one.dtype == np.float64 else np.int32
    different: Bools = (one.view(bits) != other.view(bits)) & ~(np.isnan(one) & np.isnan(other))
    return different


LOOKS_AHEAD: Final = "looks ahead: it changes when later bars are taken away"
UNLIKE_SERVING: Final = "is not what serving computes of the same row"
UNLIKE_ARCHIVE: Final = (
    "does not follow from the archived bars. If the series was being corrected while the training read it, train again; "
    "otherwise whatever wrote this feature used something else than the bars up to it"
)


def columns_fault(history: History, compute: Compute = features_of) -> Fault | None:
    """The first feature that a prefix of the bars gives otherwise than all bars do."""
    ts, high, low, close = history.ts, history.high, history.low, history.close
    whole = compute(ts, high, low, close)
    for cut in cuts(len(ts)):
        part = compute(ts[:cut], high[:cut], low[:cut], close[:cut])
        for name in FeatureColumns._fields[1:]:
            wrong = np.flatnonzero(differs(getattr(part, name), getattr(whole, name)[:cut]))
            if len(wrong):
                return Fault(name, history.symbol, int(history.ts[wrong[0]]), LOOKS_AHEAD)
    return None


def archive_fault(history: History, data: Dataset, bar_seconds: int, compute: Compute = features_of) -> Fault | None:
    """The first archived feature or label that the archived bars do not give; for a history from the first bar on."""
    own = np.flatnonzero(data.symbol == data.symbols.index(history.symbol))
    archived, labels = data.columns.take(own), data.fwd_ret_5[own]
    at = np.searchsorted(history.ts, archived.ts)
    there = np.flatnonzero((at < len(history.ts)) & (history.ts[np.minimum(at, len(history.ts) - 1)] == archived.ts))
    at = at[there]
    whole = compute(history.ts, history.high, history.low, history.close)
    for name in FeatureColumns._fields[1:]:
        wrong = np.flatnonzero(differs(getattr(whole, name)[at], getattr(archived, name)[there]))
        if len(wrong):
            return Fault(name, history.symbol, int(archived.ts[there[wrong[0]]]), UNLIKE_ARCHIVE)
    _, forward = forward_returns(history.ts, history.close, [], [], FORWARD_SPAN * bar_seconds)
    known = at + FORWARD_BARS < len(history.ts)
    expected = np.array(forward, dtype=np.float64)[at[known]]
    wrong = np.flatnonzero(differs(expected, labels[there[known]]))
    if len(wrong):
        return Fault("fwd_ret_5", history.symbol, int(archived.ts[there[known][wrong[0]]]), UNLIKE_ARCHIVE)
    return None


def inputs_fault(data: Dataset, x: Inputs, usable: Bools, feature_set: FeatureSet) -> Fault | None:
    """The first input of ``x`` (all rows, in order) that a prefix of its symbol's rows, or the serving path, gives otherwise."""
    for i in np.unique(data.symbol).tolist():
        own = np.flatnonzero(data.symbol == i)
        columns, full, good = data.columns.take(own), x[own], usable[own]
        for cut in cuts(len(own)):
            part, known = feature_set.of_columns(columns.take(np.arange(cut)))
            wrong = differs(np.ascontiguousarray(part), full[:cut]) | (known != good[:cut])[:, None]
            if wrong.any():
                row, column = np.argwhere(wrong)[0].tolist()
                return Fault(feature_set.inputs[column], data.symbols[i], int(columns.ts[row]), LOOKS_AHEAD)
            served = feature_set.of_row(_row(columns, cut - 1))
            if served is None or not good[cut - 1]:
                unlike = np.full(len(feature_set.inputs), (served is not None) != bool(good[cut - 1]))
            else:
                unlike = differs(served[0], full[cut - 1])
            if unlike.any():
                name = feature_set.inputs[int(np.flatnonzero(unlike)[0])]
                return Fault(name, data.symbols[i], int(columns.ts[cut - 1]), UNLIKE_SERVING)
    return None


def _row(columns: FeatureColumns, i: int) -> FeatureRow:
    def at(column: Floats) -> float | None:
        return None if np.isnan(column[i]) else float(column[i])

    close = float(columns.close[i])
    return FeatureRow(
        ts=from_epoch(int(columns.ts[i])),
        open=close,
        high=close,
        low=close,
        close=close,
        volume=0.0,
        spread=0.0,
        rsi=at(columns.rsi),
        macd=at(columns.macd),
        macd_signal=at(columns.macd_signal),
        macd_hist=at(columns.macd_hist),
        atr=at(columns.atr),
        ma60=at(columns.ma60),
        ret_1=at(columns.ret_1),
        ready=True,
    )


# --- controls ----------------------------------------------------------------------------------------------------


def limit(rows: int) -> float:
    """How far from 0.5 the AUC of ``rows`` rows may lie where nothing can be known."""
    return max(LIMIT_FLOOR, LIMIT_SCALE / float(np.sqrt(max(rows, 1))))


class Control(NamedTuple):
    """A pipeline's AUC where nothing can be known, of ``n`` scored rows; ``threshold`` should be None."""

    auc: float | None
    n: int
    threshold: float | None = None

    @property
    def passed(self) -> bool:
        return self.threshold is None and (self.auc is None or abs(self.auc - 0.5) <= limit(self.n))


def shuffle_in_blocks(sign: Ints, symbol: NDArray[np.int32], *, seed: int) -> Ints:
    """Labels of rows in order, with each symbol's blocks of at least 60 rows in another order."""
    rng, out = np.random.default_rng(seed), sign.copy()
    for i in np.unique(symbol).tolist():
        own = np.flatnonzero(symbol == i)
        blocks = np.array_split(own, max(1, len(own) // evaluate.BLOCK_BARS))
        out[own] = sign[np.concatenate([blocks[k] for k in rng.permutation(len(blocks)).tolist()])]
    return out


def shuffled_labels(x: Inputs, data: Dataset, options: TrainOptions, *, seed: int) -> Control:
    """The pipeline on the newest rows (in order, usable), whose labels changed places."""
    newest = np.arange(max(0, len(x) - CONTROL_ROWS), len(x))
    symbol, ts = data.symbol[newest], data.columns.ts[newest]
    sign = shuffle_in_blocks(data.sign[newest], symbol, seed=seed)
    found = walk(x[newest], ts, sign, _small(options, seed), linear=False)
    if found is None:
        return Control(None, 0)
    scored = sign[found.rows] != 0
    rows, fold = found.rows[scored], found.fold[scored]
    auc = evaluate.auc(sign[rows] > 0, found.votes[scored], fold * len(data.symbols) + symbol[rows])
    return Control(auc, len(rows))


def random_walk(feature_set: FeatureSet, options: TrainOptions, *, seed: int) -> Control:
    """The pipeline, from bars to threshold, on a market without memory that costs what EURUSD does."""
    data = walk_dataset(WALK_BARS, bar_seconds=options.bar_seconds, seed=seed)
    x, usable = inputs_of(data, feature_set)
    rows = np.flatnonzero(usable)
    data, x = data.take(rows), x[rows]
    found = walk(x, data.columns.ts, data.sign, _small(options, seed), linear=False)
    if found is None:
        return Control(None, 0)
    ts, scored = data.columns.ts[found.rows], data.sign[found.rows] != 0
    auc = evaluate.auc(data.sign[found.rows][scored] > 0, found.votes[scored], found.fold[scored])
    blocks = Blocks(evaluate.time_blocks(ts, bar_seconds=options.bar_seconds), seed=seed)
    trades = data.trades({_WALK: _POINT}, {}).take(found.rows)
    return Control(auc, int(scored.sum()), evaluate.choose(evaluate.thresholds(found.prob, trades, blocks)))


def _small(options: TrainOptions, seed: int) -> TrainOptions:
    return structs.replace(
        options, seed=seed, trees=min(options.trees, CONTROL_TREES), folds=min(options.folds, CONTROL_FOLDS)
    )


_WALK: Final = "random walk"
_POINT: Final = 1e-5
_SPREAD: Final = 6.0


def walk_dataset(bars: int, *, bar_seconds: int, seed: int) -> Dataset:
    """Ready, labelled rows of a driftless walk of Student's t steps, from its bars by the features' own code.

    Prices are not rounded: a bounce between two points of the grid would be something to learn.
    """
    rng = np.random.default_rng([seed, 3])
    steps = rng.standard_t(6, bars) * 1e-4
    close = 1.1 * np.exp(np.cumsum(steps))
    before = np.concatenate(([1.1], close[:-1]))
    high = np.maximum(before, close) * np.exp(rng.exponential(5e-5, bars))
    low = np.minimum(before, close) * np.exp(-rng.exponential(5e-5, bars))
    ts = 1_704_067_200 + bar_seconds * np.arange(bars, dtype=np.int64)
    columns = features_of(ts, high, low, close)
    _, forward = forward_returns(ts, close, [], [], FORWARD_SPAN * bar_seconds)
    rows = np.arange(READY_AFTER - 1, bars - FORWARD_BARS)
    spread = np.full(len(rows), _SPREAD)
    entry, leave = rows + 1, rows + FORWARD_BARS
    trade = TradeBars(before[entry], spread, close[entry], spread, close[leave])
    labels = np.array(forward, dtype=np.float64)[rows]
    return Dataset((_WALK,), np.zeros(len(rows), dtype=np.int32), columns.take(rows), spread, labels, trade)


def _tried(run: Callable[[int], Control], seed: int) -> tuple[Control, int]:
    """A control and how often it was run: once more with another seed where the first run fails."""
    control = run(seed)
    for attempt in range(1, CONTROL_SEEDS):
        if control.passed:
            return control, attempt
        control = run(seed + 1_000_003 * attempt)
    return control, CONTROL_SEEDS


# --- all of it ---------------------------------------------------------------------------------------------------


def check_prefixes(
    data: Dataset,
    x: Inputs,
    usable: Bools,
    feature_set: FeatureSet,
    histories: Sequence[History],
    options: TrainOptions,
    compute: Compute = features_of,
) -> Checked:
    """Bits of features and inputs; ``data`` and ``x`` are all rows in order, usable or not."""
    fault = inputs_fault(data, x, usable, feature_set)
    compared = 0
    for history in histories:
        if fault is None:
            fault = columns_fault(history, compute)
        if fault is None and history.complete:
            fault = archive_fault(history, data, options.bar_seconds, compute)
            compared += 1
    whole = [history.symbol for history in histories if history.complete]
    report = {
        "rows": len(x),
        "bars": sum(len(history.ts) for history in histories),
        "inputs_ok": fault is None or fault.name not in feature_set.inputs,
        # None: no bars were there to compute from. A series whose first bars were pruned cannot give the archive's bits.
        "columns_ok": None if not histories else fault is None or fault.name in feature_set.inputs,
        "archive_ok": None if not whole else fault is None or fault.how != UNLIKE_ARCHIVE,
        "symbols": [history.symbol for history in histories],
        "from_first_bar": whole,
        "fault": None if fault is None else fault._asdict(),
    }
    refusal = None if fault is None else f"{fault.sentence()} Mend it and train again."
    return Checked(report, refusal)


def check_controls(x: Inputs, data: Dataset, feature_set: FeatureSet, options: TrainOptions) -> Checked:
    """Shuffled labels and the random walk; ``x`` and ``data`` are usable rows in order."""
    shuffled, again = _tried(lambda seed: shuffled_labels(x, data, options, seed=seed), options.seed)
    walked, anew = _tried(lambda seed: random_walk(feature_set, options, seed=seed), options.seed)
    report = {
        "shuffled": {"auc": shuffled.auc, "n": shuffled.n, "limit": limit(shuffled.n), "attempts": again},
        "random_walk": {
            "auc": walked.auc,
            "n": walked.n,
            "limit": limit(walked.n),
            "threshold": walked.threshold,
            "attempts": anew,
        },
    }
    refusal = None
    if not shuffled.passed:
        refusal = (
            f"Shuffled labels are ranked with an AUC of {shuffled.auc:.3f}, further from 0.5 than {limit(shuffled.n):.3f}: "
            "the evaluation sees its own answers. Mend it and train again."
        )
    elif not walked.passed:
        found = "a threshold with an edge" if walked.threshold is not None else f"an AUC of {walked.auc:.3f}"
        refusal = (
            f"On a simulated random walk the pipeline finds {found}, where nothing can be found: one of its inputs or labels "
            "knows the future. Mend it and train again."
        )
    return Checked(report, refusal)
