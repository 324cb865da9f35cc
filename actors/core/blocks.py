"""How rows are cut into messages: closed candles into blocks of CANDLES, a change of features into blocks of FEATURES.

Pure, so that a backtest counts the very sequences that a running system does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Final

from actors.core.clock import Conversion
from actors.core.ingest import Payload
from actors.core.series import Change
from actors.core.timeframe import from_epoch
from schema.messages import MAX_BLOCK_ROWS, Candle, CandleBlock, FeatureBlock

FEW: Final = 3  # up to so many new candles of a series travel one a message, so that repeats cut alike


def candle_blocks(
    key: tuple[str, str],
    rows: Sequence[Candle],
    payload: Payload,
    received_at: datetime,
    conversion: Conversion,
    point: float | None,
) -> Iterator[CandleBlock]:
    """A payload's closed candles of one series (symbol, timeframe), ascending, as the log is to hold them."""
    symbol, timeframe = key
    size = 1 if len(rows) <= FEW else MAX_BLOCK_ROWS
    for start, stop, ts_source in _cuts(rows, size, conversion):
        yield CandleBlock(
            symbol=symbol,
            timeframe=timeframe,
            rows=tuple(rows[start:stop]),
            received_at=received_at,
            history=payload.history,
            replay=payload.replay,
            now=from_epoch(payload.gmt_time) if payload.replay and payload.gmt_time is not None else None,
            source=payload.source,
            server_time=payload.server_time,
            ts_source=ts_source,
            point=point,
            server_utc=conversion.sent_at(payload.server_time),
        )


def _cuts(rows: Sequence[Candle], size: int, conversion: Conversion) -> Iterator[tuple[int, int, str]]:
    """Where to cut rows into messages: after ``size`` rows, and where the way changes in which times became UTC."""
    kinds = [conversion.ts_source_of(int(row.ts.timestamp())) for row in (rows[0], rows[-1])]
    if kinds[0] == kinds[1]:
        for start in range(0, len(rows), size):
            yield start, min(start + size, len(rows)), kinds[0]
        return
    start = 0
    all_kinds = [conversion.ts_source_of(int(row.ts.timestamp())) for row in rows]
    for at in range(1, len(rows) + 1):
        if at == len(rows) or at - start == size or all_kinds[at] != all_kinds[start]:
            yield start, at, all_kinds[start]
            start = at


def feature_blocks(block: CandleBlock, seq: int, change: Change) -> Iterator[FeatureBlock]:
    """What the message ``block`` with the CANDLES sequence ``seq`` did to its series, in parts of bounded size."""
    parts = max(1, -(-len(change.rows) // MAX_BLOCK_ROWS))
    for part in range(1, parts + 1):
        yield FeatureBlock(
            symbol=block.symbol,
            timeframe=block.timeframe,
            candles_seq=seq,
            rows=tuple(change.rows[(part - 1) * MAX_BLOCK_ROWS : part * MAX_BLOCK_ROWS]),
            received_at=block.received_at,
            fills=tuple(change.fills) if part == 1 else (),
            part=part,
            parts=parts,
            history=block.history,
            replay=block.replay,
            now=block.now,
            source=block.source,
            ts_source=block.ts_source,
            withdrawn=tuple(change.withdrawn) if part == 1 else (),
            point=block.point,
            server_time=block.server_time,
        )
