"""Bus messages turned into the columns of one archive statement: each key once, its newest version last.

A statement must not meet a key twice, so a batch is reduced here by the very rules that the upserts follow:
a higher CANDLES sequence wins, a label (``fwd_ret_5``) has a sequence of its own, and at one sequence null gives way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain, repeat
from typing import Any, Final, NamedTuple, TypeAlias

from msgspec.structs import astuple

from schema.messages import FeatureBlock, FeatureRow, Signal

Columns: TypeAlias = tuple[Sequence[Any], ...]
Placed: TypeAlias = tuple[FeatureRow, FeatureBlock]
Label: TypeAlias = tuple[int, float | None]


@dataclass(frozen=True, slots=True)
class Statement:
    """A named query with its arrays, one a parameter and all of one length."""

    query: str
    columns: Columns

    @property
    def rows(self) -> int:
        return len(self.columns[0])


@dataclass(frozen=True, slots=True)
class Batch:
    """Statements to run in this order in one transaction, and the highest CANDLES sequence that is whole with them.

    ``candles_seq`` is 0 where none is: of a message in several parts only the last one completes its sequence.
    """

    statements: tuple[Statement, ...]
    candles_seq: int


@dataclass(slots=True)
class _Series:
    newest: dict[datetime, Placed] = field(default_factory=dict)
    versions: dict[datetime, list[Placed]] = field(default_factory=dict)  # only of bars met more than once
    labels: dict[datetime, Label] = field(default_factory=dict)  # only those that do not come with the newest row

    def add(self, row: FeatureRow, block: FeatureBlock) -> None:
        known = self.newest.get(row.ts)
        if known is None:
            self.newest[row.ts] = (row, block)
            return
        versions = self.versions.setdefault(row.ts, [known])
        last_row, last_block = versions[-1]
        if block.candles_seq >= last_block.candles_seq and _version(row) != _version(last_row):
            versions.append((row, block))
        loser_row, loser_block = (row, block)
        if block.candles_seq >= known[1].candles_seq:
            self.newest[row.ts] = (row, block)
            loser_row, loser_block = known
        self.label(row.ts, (loser_block.candles_seq, loser_row.fwd_ret_5))

    def label(self, ts: datetime, label: Label) -> None:
        known = self.labels.get(ts)
        if known is None or _label_wins(label, known):
            self.labels[ts] = label


def reduce_features(blocks: Iterable[FeatureBlock]) -> Batch:
    """Blocks in stream order, of any series.

    There may be several ``upsert_market_data``: the k-th holds the k-th version of each bar, so that every version
    passes through the table and those replaced are kept. Withdrawals stand where they came: after the rows before
    them, before those that follow, which may bring the same bars again.
    """
    statements: list[Statement] = []
    run: list[FeatureBlock] = []
    points: dict[str, float] = {}
    candles_seq = 0
    for block in blocks:
        if block.point is not None:
            points[block.symbol] = block.point
        if block.withdrawn:
            statements += _reduce(run)
            run = []
            gone = [
                (w.ts, block.symbol, block.timeframe, w.revision, block.candles_seq, block.received_at)
                for w in block.withdrawn
            ]
            statements.append(Statement("withdraw_bars", _turned(gone)))
        run.append(block)
        if block.part == block.parts:
            candles_seq = max(candles_seq, block.candles_seq)
    if points:
        statements.append(Statement("upsert_symbols", _turned(list(points.items()))))
    return Batch((*statements, *_reduce(run)), candles_seq)


def _reduce(blocks: Sequence[FeatureBlock]) -> tuple[Statement, ...]:
    series: dict[tuple[str, str], _Series] = {}
    for block in blocks:
        one = series.setdefault((block.symbol, block.timeframe), _Series())
        for row in block.rows:
            one.add(row, block)
        for fill in block.fills:
            one.label(fill.ts, (block.candles_seq, fill.fwd_ret_5))

    newest: list[Placed] = []
    labels: dict[int, Label] = {}  # by the row's place in newest
    fills: list[tuple[Any, ...]] = []
    waves: list[list[Placed]] = []
    for (symbol, timeframe), one in series.items():
        if one.labels:
            places = {ts: len(newest) + i for i, ts in enumerate(one.newest)}
            for ts, label in one.labels.items():
                placed = one.newest.get(ts)
                if placed is not None:
                    own = (placed[1].candles_seq, placed[0].fwd_ret_5)
                    if not _label_wins(label, own):
                        continue
                    labels[places[ts]] = label
                    if label[0] == own[0]:
                        continue
                # A row that the archive holds in a newer version is refused there, and its label must not go with it.
                fills.append((ts, symbol, timeframe, label[1], label[0]))
        newest.extend(one.newest.values())
        _add_waves(waves, one)
    statements = [("upsert_market_data", _market_columns(wave)) for wave in waves]
    statements += [("upsert_features", _feature_columns(newest, labels)), ("apply_fills", _turned(fills))]
    return _batch(statements, 0).statements


class Stages(NamedTuple):
    """What the headers of a signal tell: its trace, when its candle came and its features were stored, its candle's digest."""

    trace_id: str | None = None
    received_at: datetime | None = None
    features_at: datetime | None = None
    candle_digest: str | None = None


UNKNOWN: Final = Stages()


def reduce_signals(signals: Iterable[Signal], stages: Iterable[Stages] = ()) -> Batch:
    """Signals in stream order; of one id the one with the highest ``candles_seq``, the first among equals.

    ``stages`` are theirs, one by one; where there are fewer, nothing is known of the rest.
    """
    newest: dict[str, tuple[Signal, Stages]] = {}
    superseding: dict[tuple[str, str, datetime, str], Signal] = {}
    candles_seq = 0
    for signal, stage in zip(signals, chain(stages, repeat(UNKNOWN)), strict=False):
        known = newest.get(signal.id)
        if known is None or signal.candles_seq > known[0].candles_seq:
            newest[signal.id] = (signal, stage)
        if signal.supersedes is not None:
            key = (signal.symbol, signal.timeframe, signal.ts, signal.model_name)
            by = superseding.get(key)
            if by is None or signal.candles_seq >= by.candles_seq:
                superseding[key] = signal
        candles_seq = max(candles_seq, signal.candles_seq)
    rows = [
        (
            s.ts,
            s.symbol,
            s.timeframe,
            s.model_name,
            s.threshold,
            s.prob_up,
            s.label,
            s.created_at,
            s.id,
            s.model_version,
            s.abstain,
            s.candle_revision,
            s.candles_seq,
            s.features_hash,
            s.expires_at,
            s.supersedes,
            *stage,
        )
        for s, stage in newest.values()
    ]
    replaced = [
        (s.id, s.ts, s.symbol, s.timeframe, s.model_name, s.created_at, s.candles_seq) for s in superseding.values()
    ]
    statements = [("upsert_signals", _turned(rows)), ("supersede_signals", _turned(replaced))]
    if rows:
        statements.append(
            ("supersede_withdrawn", ([s.id for s, _ in newest.values()], [s.ts for s, _ in newest.values()]))
        )
    return _batch(statements, candles_seq)


def _batch(statements: Iterable[tuple[str, Columns]], candles_seq: int) -> Batch:
    return Batch(tuple(Statement(query, columns) for query, columns in statements if columns), candles_seq)


def _label_wins(label: Label, over: Label) -> bool:
    return label[0] > over[0] or (label[0] == over[0] and label[1] is not None)


def _version(row: FeatureRow) -> tuple[Any, ...]:
    values = (row.open, row.high, row.low, row.close, row.volume, row.spread, row.real_volume)
    return (*values, row.revision, row.ts_source)


def _add_waves(waves: list[list[Placed]], one: _Series) -> None:
    depth = max((len(versions) for versions in one.versions.values()), default=1)
    while len(waves) < depth:
        waves.append([])
    if not one.versions:
        waves[0].extend(one.newest.values())
        return
    waves[0].extend(one.versions[ts][0] if ts in one.versions else placed for ts, placed in one.newest.items())
    for versions in one.versions.values():
        for k, placed in enumerate(versions[1:], start=1):
            waves[k].append(placed)


def _by_name(placed: Sequence[Placed]) -> dict[str, Sequence[Any]]:
    fields = FeatureRow.__struct_fields__
    return dict(zip(fields, zip(*[astuple(row) for row, _ in placed], strict=True), strict=True))


def _market_columns(placed: Sequence[Placed]) -> Columns:
    if not placed:
        return ()
    column = _by_name(placed)
    brought = [_brought(row, block) for row, block in placed]
    return (
        column["ts"],
        [block.symbol for _, block in placed],
        [block.timeframe for _, block in placed],
        *(column[name] for name in ("open", "high", "low", "close", "volume", "spread", "real_volume", "revision")),
        column["source"],
        column["ts_source"],
        [block.received_at for _, block in placed],
        [seq for seq, _, _ in brought],
        column["live"],
        [server_time for _, server_time, _ in brought],
        [heard_at for _, _, heard_at in brought],
        [block.candles_seq for _, block in placed],
    )


def _brought(row: FeatureRow, block: FeatureBlock) -> tuple[int, int | None, datetime | None]:
    """The CANDLES sequence and clock of a row's version, and when its bar's age is judged (null: at its own end)."""
    if row.brought_seq is not None:
        return row.brought_seq, row.server_time, row.heard_at
    return block.candles_seq, block.server_time, block.now if block.replay else block.received_at


def _feature_columns(placed: Sequence[Placed], labels: dict[int, Label]) -> Columns:
    if not placed:
        return ()
    column = _by_name(placed)
    sequences = [block.candles_seq for _, block in placed]
    values, label_sequences = list(column["fwd_ret_5"]), list(sequences)
    for place, (seq, value) in labels.items():
        values[place], label_sequences[place] = value, seq
    indicators = ("rsi", "macd", "macd_signal", "macd_hist", "atr", "ma60", "ret_1")
    return (
        column["ts"],
        [block.symbol for _, block in placed],
        [block.timeframe for _, block in placed],
        *(column[name] for name in ("close", "volume", "spread", *indicators)),
        values,
        *(column[name] for name in ("ready", "bar", "revision")),
        sequences,
        label_sequences,
        column["ts_source"],
    )


def _turned(rows: Sequence[tuple[Any, ...]]) -> Columns:
    return tuple(zip(*rows, strict=True))
