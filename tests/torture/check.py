"""What is in the archive and in the streams against what an undisturbed run leaves, bit by bit."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any

import asyncpg
import msgspec

from actors.core.hashing import features_hash, signal_id
from actors.core.series import SeriesState, append
from actors.core.serving import NO_ANSWER, ServedModel, decide, expires_at
from actors.core.timeframe import end_time
from bus.client import Bus
from bus.consume import Reader
from bus.subjects import CANDLES, FEATURES, MODELS, SIGNALS
from schema.messages import FeatureRow, ModelEvent, Signal
from tests.builders import LIVE
from tests.torture.feed import TIMEFRAME, Series

CANDLE = ("open", "high", "low", "close", "volume", "spread")
FEATURE = ("close", "volume", "spread", "rsi", "macd", "macd_signal", "macd_hist", "atr", "ma60", "ret_1", "fwd_ret_5")
SHOWN = 5


@dataclass
class Report:
    """How far a run is from an undisturbed one: all zero where nothing was lost, doubled or changed."""

    candles: int = 0
    signals: int = 0
    lost: int = 0
    missing: int = 0
    doubled: int = 0
    different: int = 0
    details: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.lost or self.missing or self.doubled or self.different)

    def add(self, what: str, detail: str, count: int = 1) -> None:
        setattr(self, what, getattr(self, what) + count)
        if len(self.details) < SHOWN:
            self.details.append(f"{what}: {detail}")

    def __add__(self, other: Report) -> Report:
        return Report(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Report)))


def check(nats_url: str, database_url: str, series: Sequence[Series], models: Mapping[str, ServedModel]) -> Report:
    """Compares everything; ``models`` are those that may serve, by version."""
    return asyncio.run(_check(nats_url, database_url, series, models))


async def _check(
    nats_url: str, database_url: str, series: Sequence[Series], models: Mapping[str, ServedModel]
) -> Report:
    bus = await Bus.connect(nats_url, name="operator", patience=20)
    connection = await asyncpg.connect(database_url)
    try:
        report = Report()
        streams = await _Streams.read(bus)
        activations = [e for e in streams.events if e.event == "activated"]
        for one in series:
            await _check_series(connection, streams, one, activations, models, report)
        order = [block.candles_seq for block in streams.features]
        if order != sorted(order):
            report.add("different", "FEATURES is not in the order of CANDLES")
        said = Counter((s.id, s.candles_seq) for s in streams.signals)
        for key, times in said.items():
            if times > 1:
                report.add("doubled", f"signal {key} stands {times} times on SIGNALS", times - 1)
        return report
    finally:
        await connection.close()
        await bus.close()


@dataclass
class _Streams:
    candles: set[tuple[str, int, tuple[float, ...]]]
    features: list[Any]
    signals: list[Signal]
    events: list[ModelEvent]

    @classmethod
    async def read(cls, bus: Bus) -> _Streams:
        blocks = await _all(bus, CANDLES)
        candles = {
            (b.symbol, int(r.ts.timestamp()), tuple(getattr(r, n) for n in CANDLE)) for b in blocks for r in b.rows
        }
        events = await _all(bus, MODELS)
        return cls(candles, await _all(bus, FEATURES), await _all(bus, SIGNALS), events)


async def _all(bus: Bus, channel: Any) -> list[Any]:
    info = await bus.js.stream_info(str(channel.stream), subjects_filter=channel.wildcard)
    count = sum((info.state.subjects or {}).values())
    async with Reader(bus, channel, name="torture", start=1, batch=512) as reader:
        return [(await reader.next(20.0)).message for _ in range(count)]


async def _check_series(
    connection: Any,
    streams: _Streams,
    series: Series,
    activations: Sequence[ModelEvent],
    models: Mapping[str, ServedModel],
    report: Report,
) -> None:
    want = append(SeriesState(series.symbol, TIMEFRAME), series.candles(), LIVE).rows
    report.candles += len(series.versions)
    for ts, values in series.versions:
        if (series.symbol, ts, tuple(map(float, values))) not in streams.candles:
            report.add("lost", f"{series.symbol} {ts} {values} is not in CANDLES")

    market = await _rows(connection, "market_data", series.symbol)
    stored = await _rows(connection, "features", series.symbol)
    streamed = _final(series.symbol, streams.features, report)
    for name, rows in (("market_data", market), ("features", stored), ("FEATURES", streamed)):
        for ts in [row.ts for row in want if row.ts not in rows]:
            report.add("missing", f"{name} of {series.symbol} has no {ts}")
        for ts in rows.keys() - {row.ts for row in want}:
            report.add("different", f"{name} of {series.symbol} has {ts}, which was never sent")
    for row in want:
        _same(report, "market_data", market.get(row.ts), row, CANDLE)
        _same(report, "features", stored.get(row.ts), row, (*FEATURE, "bar", "ready"))
        _same(report, "FEATURES", streamed.get(row.ts), row, (*CANDLE, *FEATURE, "bar", "ready"))
    await _check_signals(connection, streams, series, want, activations, models, report)


def _final(symbol: str, blocks: Sequence[Any], report: Report) -> dict[datetime, FeatureRow]:
    """A series' rows as FEATURES leaves them: newest version, labels filled."""
    rows: dict[datetime, FeatureRow] = {}
    for block in blocks:
        if block.symbol == symbol:
            rows.update({row.ts: row for row in block.rows})
            for fill in block.fills:
                if fill.ts in rows:
                    rows[fill.ts] = msgspec.structs.replace(rows[fill.ts], fwd_ret_5=fill.fwd_ret_5)
                else:
                    report.add("missing", f"FEATURES of {symbol} fills {fill.ts}, which it does not hold")
    return rows


async def _rows(connection: Any, table: str, symbol: str) -> dict[datetime, Any]:
    rows = await connection.fetch(f"SELECT * FROM {table} WHERE symbol = $1", symbol)
    return {row["ts"]: row for row in rows}


def _same(report: Report, name: str, found: Any, want: FeatureRow, columns: Sequence[str]) -> None:
    if found is None:
        return
    for column in columns:
        value = getattr(found, column) if isinstance(found, FeatureRow) else found[column]
        if value != getattr(want, column):
            report.add("different", f"{name} {want.ts} {column} is {value!r}, not {getattr(want, column)!r}")
            return


async def _check_signals(
    connection: Any,
    streams: _Streams,
    series: Series,
    want: Sequence[FeatureRow],
    activations: Sequence[ModelEvent],
    models: Mapping[str, ServedModel],
    report: Report,
) -> None:
    rows = await connection.fetch("SELECT * FROM model_signals WHERE symbol = $1 ORDER BY candles_seq", series.symbol)
    report.signals += len(rows)
    live: dict[datetime, list[Any]] = {}
    for row in rows:
        if row["superseded_at"] is None:
            live.setdefault(row["ts"], []).append(row)
    newest: dict[datetime, Signal] = {}
    for signal in streams.signals:
        if signal.symbol == series.symbol:
            newest[signal.ts] = signal
    for row in want:
        found = live.get(row.ts, [])
        if not found or row.ts not in newest:
            report.add("missing", f"{series.symbol} {row.ts} has no signal ({len(found)} archived)")
            continue
        if len(found) > 1:
            report.add("doubled", f"{series.symbol} {row.ts} has {len(found)} signals that stand", len(found) - 1)
        (stands, said) = (found[-1], newest[row.ts])
        digest = features_hash(series.symbol, TIMEFRAME, row)
        version, state = None, None
        for event in activations:
            if (event.from_seq or 0) <= stands["candles_seq"]:
                version, state = event.version, event.state
        model = models[version] if version is not None else None
        end = end_time(row.ts, TIMEFRAME)
        decision = decide(
            row,
            series.symbol,
            model.answer(series.symbol, row) if model is not None else NO_ANSWER,
            model.manifest if model is not None else None,
            state,
            judged_at=end,
            expires_at=expires_at(row.ts, end),
        )
        wanted = (
            signal_id(series.symbol, TIMEFRAME, row.ts, version, digest),
            version,
            digest,
            decision.prob_up,
            decision.label,
            decision.threshold,
        )
        names = ("id", "model_version", "features_hash", "prob_up", "label", "threshold")
        for where, values in (
            ("model_signals", tuple(stands[n] for n in names)),
            ("SIGNALS", tuple(getattr(said, n) for n in names)),
        ):
            if values != wanted:
                report.add("different", f"{where} {series.symbol} {row.ts}: {values}, not {wanted}")
