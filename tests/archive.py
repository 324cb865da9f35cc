"""The archive as tests compare it: tables by series and time, floats as their bits; and how to wait until it is whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import aiohttp

from actors.core.batching import reduce_features
from actors.core.series import SeriesState, append
from bus.store import Store
from schema.messages import Candle, FeatureBlock, FeatureRow
from tests.builders import LIVE, final_rows
from tests.oracles_ml import Bars

PATIENCE: Final = 60.0
SENTINEL: Final = "SENTINEL"
CANDLE: Final = ("open", "high", "low", "close", "volume", "spread", "real_volume")
FEATURE: Final = (
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
    "fwd_ret_5",
    "ready",
    "bar",
)
SIGNAL: Final = ("prob_up", "label", "abstain", "features_hash", "model_version")
QUERIES: Final[Mapping[str, str]] = {
    "market_data": f"SELECT symbol, timeframe, ts, {', '.join(CANDLE)} FROM market_data",
    "features": f"SELECT symbol, timeframe, ts, {', '.join(FEATURE)} FROM features",
    "model_signals": f"SELECT symbol, timeframe, ts, {', '.join(SIGNAL)} FROM model_signals WHERE superseded_at IS NULL",
}

Key = tuple[str, str, datetime]
Table = dict[Key, list[tuple[Any, ...]]]  # a list, so that a bar with two signals that stand is seen
Archive = dict[str, Table]


async def read_archive(connection: Any) -> Archive:
    """The tables but for bookkeeping (revisions, sequences, times of receipt) and the sentinel's rows."""
    return {name: await _table(connection, query) for name, query in QUERIES.items()}


async def _table(connection: Any, query: str) -> Table:
    rows: Table = {}
    for symbol, timeframe, ts, *values in await connection.fetch(query):
        if symbol != SENTINEL:
            rows.setdefault((symbol, timeframe, ts), []).append(tuple(map(bits, values)))
    for found in rows.values():
        found.sort(key=repr)
    return rows


def bits(value: Any) -> Any:
    """A float as text that only the same float has."""
    return value.hex() if isinstance(value, float) else value


async def archive_bars(store: Store, symbol: str, bars: Bars, timeframe: str = "M1") -> list[FeatureRow]:
    """Archives a series' bars with the features that the system computes of them, labels filled; returns the rows."""
    columns = [column.tolist() for column in bars]
    candles = [
        Candle(ts=datetime.fromtimestamp(ts, UTC), open=o, high=h, low=lo, close=c, volume=1.0, spread=s)
        for ts, o, h, lo, c, s in zip(*columns, strict=True)
    ]
    change = append(SeriesState(symbol, timeframe), candles, LIVE)
    block = FeatureBlock(
        symbol=symbol,
        timeframe=timeframe,
        candles_seq=1,
        rows=tuple(change.rows),
        fills=tuple(change.fills),
        received_at=change.rows[-1].ts,
    )
    async with store.transaction() as connection:
        for statement in reduce_features([block]).statements:
            await connection.execute(store.sql(statement.query), *statement.columns)
    return list(final_rows([block]).values())


async def pass_through(url: str, connection: Any, number: int) -> None:
    """Posts the ``number``-th bar of a series of its own and waits until the archive has its signal.

    Streams are worked off in order: then all that was sent before is in the archive.
    """
    price = {"open": 1.1, "high": 1.1, "low": 1.1, "close": 1.1, "volume": 1}
    bar = {"ts": 1_700_000_040 + 60 * number, "symbol": SENTINEL, "timeframe": "M1"} | price
    async with aiohttp.ClientSession() as http, http.post(url, json=bar) as response:
        assert response.status == 200, await response.text()
    arrived = (
        "SELECT (SELECT count(*) FROM model_signals WHERE symbol = $1) > $2"
        " AND (SELECT count(*) FROM features WHERE symbol = $1) > $2"
    )
    deadline = time.monotonic() + PATIENCE
    while not await connection.fetchval(arrived, SENTINEL, number):
        assert time.monotonic() < deadline, "a bar's signal never reached the archive"
        await asyncio.sleep(0.02)
