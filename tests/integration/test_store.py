"""The archive's rules, statement by statement, on real PostgreSQL; and the pool's, through PgBouncer and trouble."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from actors.core.batching import Batch, reduce_features, reduce_signals
from bus.store import Store, StoreRejected, StoreUnavailable
from schema.messages import FeatureBlock, FeatureRow, Fill, Signal, Withdrawn

T0 = datetime(2025, 2, 3, 9, 30, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def row(bar: int, *, close: float = 1.1, revision: int = 0, **more: Any) -> FeatureRow:
    fields: dict[str, Any] = {"rsi": 50.0 + bar / 7, "bar": bar, "ready": bar >= 3} | more
    return FeatureRow(
        ts=T0 + bar * MINUTE,
        open=1.1,
        high=max(1.2, close),
        low=min(1.0, close),
        close=close,
        volume=10.0 + bar,
        spread=12.0,
        revision=revision,
        **fields,
    )


def block(
    seq: int, *rows: FeatureRow, fills: Sequence[tuple[int, float | None]] = (), symbol: str = "EURUSD", **more: Any
) -> FeatureBlock:
    return FeatureBlock(
        symbol=symbol,
        timeframe="M1",
        candles_seq=seq,
        rows=rows,
        received_at=T0 + seq % 1_000 * MINUTE,
        fills=tuple(Fill(ts=T0 + bar * MINUTE, fwd_ret_5=value) for bar, value in fills),
        **more,
    )


def signal(ident: str, seq: int, *, bar: int = 0, supersedes: str | None = None, symbol: str = "EURUSD") -> Signal:
    ts = T0 + bar * MINUTE
    return Signal(
        id=ident,
        ts=ts,
        symbol=symbol,
        timeframe="M1",
        model_name="rf_m1",
        model_version="v1",
        threshold=None,
        prob_up=0.5123456789,
        label=0,
        abstain="no_edge",
        candle_revision=0,
        candles_seq=seq,
        features_hash="00ff",
        created_at=ts + seq * MINUTE,
        expires_at=ts + 2 * MINUTE,
        supersedes=supersedes,
    )


async def run(store: Store, batch: Batch) -> None:
    async with store.transaction() as connection:
        for statement in batch.statements:
            await connection.execute(store.sql(statement.query), *statement.columns)


async def archive(store: Store, *batches: Sequence[FeatureBlock]) -> None:
    for blocks in batches:
        await run(store, reduce_features(blocks))


async def contents(store: Store) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of the archive's tables, with the transaction that wrote it, so that a rewrite shows."""
    out = {}
    async with store.connection() as connection:
        for table in ("market_data", "candle_revisions", "features", "model_signals"):
            rows = await connection.fetch(f"SELECT xmin::text, * FROM {table} ORDER BY symbol, ts, candles_seq")
            out[table] = [tuple(r) for r in rows]
    return out


@pytest.fixture
async def store(pg_url: str) -> AsyncIterator[Store]:
    made = await Store.connect(pg_url, size=2, name="test")
    yield made
    await made.close()


# --- rows ----------------------------------------------------------------------------------------------------------


async def test_values_come_back_bit_for_bit(store: Store) -> None:
    numbers = [0.1 + 0.2, math.pi * 1e-300, 5e-324, 1.7976931348623157e308, -1e-17]
    rows = [row(i, close=x if x > 0 else 1.1, rsi=x, macd=-x, ret_1=x / 3) for i, x in enumerate(numbers, 1)]
    await archive(store, [block(7, *rows)])
    assert await store.features("EURUSD", "M1", limit=10) == tuple(rows)
    candles = await store.candles("EURUSD", "M1", limit=10)
    assert [(c.ts, c.high, c.close) for c in candles] == [(r.ts, r.high, r.close) for r in rows]
    assert all(c.ts.tzinfo is not None for c in candles)


def history() -> list[FeatureBlock]:
    """Two series, with single bars, a block, a revision that is recomputed in two parts, and labels."""
    blocks = [block(1, *(row(i, fwd_ret_5=i / 1e4 if i < 5 else None) for i in range(10)))]
    blocks += [block(2, row(0), symbol="US30m")]
    blocks += [block(2 + i, row(9 + i), fills=[(4 + i, i / 1e5)]) for i in range(1, 6)]
    blocks += [
        block(8, row(6, close=1.15, revision=1), row(7, rsi=1.0), fills=[(1, 0.5), (2, None)], part=1, parts=2),
        block(8, row(8, rsi=2.0), fills=[(6, 0.25)], part=2, parts=2),
        block(9, row(15), fills=[(10, -0.125)]),
    ]
    return blocks


async def test_the_same_messages_again_in_any_order_and_cut_change_nothing(store: Store) -> None:
    blocks = history()
    await archive(store, *([one] for one in blocks))
    before = await contents(store)
    assert len(before["market_data"]) == len(before["features"]) == 17
    assert len(before["candle_revisions"]) == 1
    chance = random.Random(5)
    for _ in range(12):
        again = chance.choices(blocks, k=chance.randint(1, 2 * len(blocks)))
        cut = chance.randint(0, len(again))
        await archive(store, again[:cut], again[cut:])
        assert await contents(store) == before


async def test_any_cut_into_batches_gives_the_same_rows(store: Store) -> None:
    blocks = history()
    await archive(store, *([one] for one in blocks))

    def values(found: dict[str, list[tuple[Any, ...]]]) -> list[list[tuple[Any, ...]]]:
        return [[r[1:] for r in rows] for rows in found.values()]

    expected = values(await contents(store))
    for cut in range(len(blocks) + 1):
        async with store.connection() as connection:
            await connection.execute("TRUNCATE market_data, candle_revisions, features")
        await archive(store, blocks[:cut], blocks[cut:])
        assert values(await contents(store)) == expected


async def test_an_older_sequence_never_wins(store: Store) -> None:
    await archive(store, [block(5, row(1, close=1.5, revision=1, rsi=55.0))])
    await archive(store, [block(4, row(1, close=1.4, rsi=44.0))])
    assert [(r.close, r.rsi, r.revision) for r in await store.features("EURUSD", "M1", limit=9)] == [(1.5, 55.0, 1)]
    assert [c.close for c in await store.candles("EURUSD", "M1", limit=9)] == [1.5]
    assert (await contents(store))["candle_revisions"] == []
    await archive(store, [block(7, row(1, close=1.5, revision=1, rsi=55.0))])  # made again, with nothing changed
    await archive(store, [block(6, row(1, close=1.5, revision=1, rsi=66.0))])
    assert [r.rsi for r in await store.features("EURUSD", "M1", limit=9)] == [55.0]


@pytest.mark.parametrize("together", [True, False], ids=["one batch", "three batches"])
async def test_every_version_of_a_bar_is_kept(store: Store, together: bool) -> None:
    blocks = [
        block(1, row(1, source="Broker-Demo"), row(2)),
        block(2, row(1, close=1.15, revision=1), row(2)),
        block(3, row(1, close=1.16, revision=2), row(2)),
    ]
    await archive(store, *([blocks] if together else [[one] for one in blocks]))
    async with store.connection() as connection:
        kept = await connection.fetch(
            "SELECT close, revision, source, candles_seq, replaced_by_seq FROM candle_revisions ORDER BY revision"
        )
        current = await connection.fetch("SELECT close, revision, candles_seq FROM market_data ORDER BY ts")
    assert [tuple(r) for r in kept] == [(1.1, 0, "Broker-Demo", 1, 2), (1.15, 1, None, 2, 3)]
    assert [tuple(r) for r in current] == [(1.16, 2, 3), (1.1, 0, 1)]


async def test_a_series_is_known_as_it_was_before_a_sequence(store: Store) -> None:
    versions = [
        block(1, row(1), row(2)),
        block(5, row(1, close=1.15, revision=1)),
        block(9, row(1, close=1.16, revision=2)),
    ]
    await archive(store, *([one] for one in versions))

    async def before(seq: int) -> list[tuple[float, int]]:
        return [(bar.candle.close, bar.revision) for bar in await store.bars_before("EURUSD", "M1", None, seq)]

    assert await before(1) == []
    assert await before(2) == await before(5) == [(1.1, 0), (1.1, 0)]
    assert await before(6) == [(1.15, 1), (1.1, 0)]
    assert await before(10) == [(1.16, 2), (1.1, 0)]
    (later,) = await store.bars_before("EURUSD", "M1", T0 + MINUTE, 10)
    assert later.candle.ts == T0 + 2 * MINUTE


async def test_a_withdrawn_bar_is_gone_its_values_are_kept_and_its_signal_is_superseded(store: Store) -> None:
    gone = [Withdrawn(ts=T0 + MINUTE, revision=1)]
    await archive(store, [block(1, row(1), row(2))])
    early = reduce_signals([signal("a", 1, bar=1), signal("b", 1, bar=2)])
    late = reduce_signals([signal("c", 1, bar=1)])
    await execute(store, early)
    await archive(store, [block(2, withdrawn=tuple(gone)), block(3, row(3))])
    await execute(store, late)  # archived after the withdrawal, made before it
    assert [c.ts for c in await store.candles("EURUSD", "M1", limit=9)] == [T0 + 2 * MINUTE, T0 + 3 * MINUTE]
    assert len(await store.features("EURUSD", "M1", limit=9)) == 2
    async with store.connection() as connection:
        kept = await connection.fetch("SELECT close, revision, replaced_by_seq FROM candle_revisions")
        live = await connection.fetch("SELECT id FROM model_signals WHERE superseded_at IS NULL")
    assert [tuple(r) for r in kept] == [(1.1, 0, 2)]
    assert [r["id"] for r in live] == ["b"]
    await archive(store, [block(2, withdrawn=tuple(gone))], [block(4, row(1, revision=2))])
    assert len(await store.candles("EURUSD", "M1", limit=9)) == 3
    assert [bar.candle.ts for bar in await store.bars_before("EURUSD", "M1", None, 2)] == [T0 + MINUTE, T0 + 2 * MINUTE]


async def test_rows_whose_time_is_a_guess_are_not_trained_on(store: Store) -> None:
    known = [row(bar, ts_source=kind, fwd_ret_5=0.1) for bar, kind in ((4, "utc"), (5, "assumed"), (6, "server"))]
    await archive(store, [block(1, *known)])
    async with store.connection() as connection:
        rows = await connection.fetch("SELECT bar FROM trainset_m1 ORDER BY bar")
    assert [r["bar"] for r in rows] == [4, 6]


async def execute(store: Store, batch: Batch) -> None:
    async with store.transaction() as connection:
        for statement in batch.statements:
            await connection.execute(store.sql(statement.query), *statement.columns)


async def test_labels_have_a_sequence_of_their_own(store: Store) -> None:
    async def label() -> float | None:
        return (await store.features("EURUSD", "M1", limit=1))[0].fwd_ret_5

    await archive(store, [block(1, row(1))])
    await archive(store, [block(6, fills=[(1, 0.25)])])
    assert await label() == 0.25
    await archive(store, [block(1, row(1))])  # the row again, from before its label was known
    assert await label() == 0.25
    await archive(store, [block(8, row(1, rsi=1.0), part=1, parts=2)], [block(8, fills=[(1, 0.5)], part=2, parts=2)])
    assert await label() == 0.5
    await archive(store, [block(9, fills=[(1, None)])])  # a revision may take a label back
    assert await label() is None
    # A row that the archive has in a newer version is refused; the label that came with it in the batch is not.
    await archive(store, [block(1, row(1)), block(10, fills=[(1, 0.75)])])
    found = (await store.features("EURUSD", "M1", limit=1))[0]
    assert (found.rsi, found.fwd_ret_5) == (1.0, 0.75)


async def test_trainset_holds_ready_rows_with_their_label(store: Store) -> None:
    await archive(store, [block(1, *(row(i, fwd_ret_5=(i - 4) / 10 if i < 6 else None) for i in range(8)))])
    async with store.connection() as connection:
        rows = await connection.fetch("SELECT bar, label, timeframe FROM trainset_m1 ORDER BY ts")
        assert await connection.fetch("SELECT * FROM trainset_m5") == []
        assert await connection.fetchval("SELECT count(*) FROM features_m1") == 8
    assert [tuple(r) for r in rows] == [(3, -1, "M1"), (4, 0, "M1"), (5, 1, "M1")]
    assert [tuple(r) for r in await store.fetch("trainset_symbols", "M1")] == [
        ("EURUSD", 3, T0 + 3 * MINUTE, T0 + 5 * MINUTE)
    ]
    newest = await store.fetch("trainset_rows", "M1", "EURUSD", T0 + 5 * MINUTE, 1)
    assert [(r["ts"], r["fwd_ret_5"]) for r in newest] == [(T0 + 4 * MINUTE, 0.0)]


async def test_trainset_rows_bring_the_bars_of_their_trades_however_they_are_cut(store: Store) -> None:
    minutes = [m for m in range(40) if m not in (11, 12, 30)]  # bars are missing, and one is not ready
    bars = [
        msgspec.structs.replace(
            row(m, ready=m not in (0, 20), fwd_ret_5=None if m in (5, 38) or m > minutes[-6] else 0.1),
            open=1.1 + m / 1e3,
            close=1.1 + m / 1e4,
            spread=float(m),
        )
        for m in minutes
    ]
    other = [msgspec.structs.replace(bar, open=9.0, close=9.0, high=9.0) for bar in bars]
    await archive(store, [block(1, *bars), block(2, *other, symbol="GBPUSD")])
    expected = [
        (bar.ts, entry.open, entry.spread, entry.close, leave.spread, leave.close)
        for i, bar in enumerate(bars)
        if bar.ready and bar.fwd_ret_5 is not None
        for entry, leave in [(bars[i + 1], bars[i + 5])]
    ]
    names = ("ts", "entry_open", "entry_spread", "entry_close", "exit_spread", "exit_close")
    for size in (1, 2, 5, 7, 100):
        read: list[tuple[Any, ...]] = []
        before = T0 + 1_000 * MINUTE
        while chunk := await store.fetch("trainset_rows", "M1", "EURUSD", before, size):
            read += [tuple(r[name] for name in names) for r in chunk]
            before = chunk[-1]["ts"]
        assert read[::-1] == expected, f"chunks of {size}"
    assert len(expected) > 25
    assert await store.fetch("trainset_rows", "M1", "X", before, 5) == []
    assert tuple(await store.fetchrow("series_ends", "M1", "EURUSD")) == (0, 39)  # type: ignore[arg-type]
    assert tuple(await store.fetchrow("series_ends", "M5", "EURUSD")) == (None, None)  # type: ignore[arg-type]


async def test_a_trade_whose_bar_is_not_archived_has_no_price(store: Store) -> None:
    await archive(store, [block(1, *(row(i, fwd_ret_5=0.1 if i < 6 else None) for i in range(12)))])
    async with store.connection() as connection:
        await connection.execute("DELETE FROM market_data WHERE ts = $1", T0 + 5 * MINUTE)
    rows = await store.fetch("trainset_rows", "M1", "EURUSD", T0 + 100 * MINUTE, 100)
    assert [(r["ts"], r["entry_open"]) for r in rows] == [
        (T0 + 5 * MINUTE, 1.1),
        (T0 + 4 * MINUTE, None),
        (T0 + 3 * MINUTE, 1.1),
    ]


# --- signals and models ----------------------------------------------------------------------------------------------


async def test_signals_are_stored_once_and_superseded(store: Store) -> None:
    first, second, back = signal("a", 1), signal("b", 2, supersedes="a"), signal("a", 3, supersedes="b")
    messages = [first, second, back, signal("c", 4, bar=1)]

    async def state() -> list[tuple[Any, ...]]:
        async with store.connection() as connection:
            rows = await connection.fetch(
                "SELECT id, candles_seq, superseded_at IS NULL, xmin::text FROM model_signals ORDER BY id"
            )
        return [tuple(r) for r in rows]

    for one in messages[:2]:
        await run(store, reduce_signals([one]))
    assert [r[:3] for r in await state()] == [("a", 1, False), ("b", 2, True)]
    for one in messages[2:]:
        await run(store, reduce_signals([one]))
    before = await state()
    assert [r[:3] for r in before] == [("a", 3, True), ("b", 2, False), ("c", 4, True)]
    chance = random.Random(3)
    for _ in range(8):
        await run(store, reduce_signals(chance.choices(messages, k=5)))
        assert await state() == before
    async with store.connection() as connection:
        await connection.execute("TRUNCATE model_signals")
    await run(store, reduce_signals(messages))
    assert [r[:3] for r in await state()] == [r[:3] for r in before]


async def test_signals_come_newest_first_and_whole(store: Store) -> None:
    sent = [signal(f"{symbol}{bar}", bar, bar=bar, symbol=symbol) for bar in range(4) for symbol in ("EURUSD", "US30m")]
    await run(store, reduce_signals(sent))
    eurusd = [s for s in reversed(sent) if s.symbol == "EURUSD"]
    assert await store.signals("M1", symbol="EURUSD", limit=3) == tuple(eurusd[:3])
    assert await store.signals("M1", since=T0 + 2 * MINUTE, symbol="EURUSD", limit=9) == tuple(eurusd[:2])
    assert len(await store.signals("M1", limit=100)) == 8
    assert await store.signals("H1", limit=100) == ()


async def test_the_registry_keeps_states_apart_from_manifests(store: Store) -> None:
    manifest = {"auc": 0.5300000000000001, "files": {"model.onnx": "ab"}}
    text = msgspec.json.encode(manifest).decode()
    await store.execute("upsert_model", "rf_m1", "v1", "M1", "candidate", T0, text)
    await store.execute("set_model_state", "rf_m1", "v1", "champion", 42, T0, "better", "anna")
    await store.execute("upsert_model", "rf_m1", "v1", "M1", "candidate", T0, text)
    await store.execute("set_model_state", "rf_m1", "v1", "retired", None, None, "older", "trainer")
    await store.execute("upsert_model", "rf_h1", "v2", "H1", "candidate", T0, "{}")
    (one,) = await store.models("rf_m1")
    assert (one.state, one.from_seq, one.activated_at, one.reason, one.by) == ("retired", 42, T0, "older", "trainer")
    assert one.manifest == manifest
    assert [m.model_name for m in await store.models()] == ["rf_h1", "rf_m1"]
    assert await store.fetchval("insert_model_metrics", T0, "rf_m1", text) == 1


async def test_spans_are_ascending_and_include_both_ends(store: Store) -> None:
    await archive(store, [block(1, *(row(i) for i in range(10)))])

    async def bars(**span: Any) -> list[int]:
        found = [c.ts for c in await store.candles("EURUSD", "M1", **span)]
        assert found == [f.ts for f in await store.features("EURUSD", "M1", **span)]
        return [int((ts - T0) / MINUTE) for ts in found]

    assert await bars(limit=3) == [7, 8, 9]
    assert await bars(end=T0 + 5 * MINUTE, limit=2) == [4, 5]
    assert await bars(start=T0 + 2 * MINUTE, limit=2) == [2, 3]
    assert await bars(start=T0 + 2 * MINUTE, end=T0 + 4 * MINUTE, limit=100) == [2, 3, 4]
    assert await bars(start=T0 + 99 * MINUTE, limit=1) == []


# --- the pool --------------------------------------------------------------------------------------------------------


async def test_pgbouncer_in_transaction_mode_serves_many_at_once(pgbouncer_url: str) -> None:
    store = await Store.connect(pgbouncer_url, size=8, name="test")

    async def work(i: int) -> None:
        for k in range(5):
            await archive(store, [block(10 * i + k + 1, row(k), symbol=f"S{i}")])
            assert len(await store.candles(f"S{i}", "M1", limit=100)) == k + 1

    try:
        await asyncio.gather(*(work(i) for i in range(12)))
        async with store.connection() as connection:
            assert await connection.fetchval("SELECT count(*) FROM features") == 60
    finally:
        await store.close()


async def test_a_refused_value_is_told_from_an_outage_and_rolls_back(store: Store) -> None:
    with pytest.raises(StoreRejected):
        await archive(store, [block(1, row(1), symbol="EUR\0USD")])
    with pytest.raises(StoreRejected):
        await archive(store, [block(2**63, row(1))])
    with pytest.raises(StoreRejected):
        await store.execute("upsert_model", "rf_m1", "v1", "M1", "candidate", T0, "no json")
    good, bad = reduce_features([block(1, row(1))]), reduce_signals([signal("\0", 1)])
    with pytest.raises(StoreRejected):
        await run(store, Batch((*good.statements, *bad.statements), 1))
    assert await store.candles("EURUSD", "M1", limit=1) == ()


async def test_an_outage_is_one_sentence_without_the_password(pg_url: str) -> None:
    scheme, rest = pg_url.split("://")
    for url in (
        f"{scheme}://mt5:hunter2hunter2@{rest.rpartition('@')[2]}",
        f"{scheme}://mt5:hunter2hunter2@127.0.0.1:1/mt5",
    ):
        store = await Store.connect(url, size=1, name="test")
        with pytest.raises(StoreUnavailable, match="cannot be used now") as caught:
            await store.wait_until_up(0.3)
        assert "hunter2" not in str(caught.value)
        await store.close()
    with pytest.raises(ValueError, match="is not a PostgreSQL URL") as wrong:
        await Store.connect("mysql://mt5:hunter2hunter2@127.0.0.1/mt5")
    assert "hunter2" not in str(wrong.value)


async def test_an_unmigrated_database_says_what_to_do(pg_empty_url: str) -> None:
    store = await Store.connect(pg_empty_url, size=1, name="test")
    with pytest.raises(StoreUnavailable, match="run `mt5 migrate`"):
        await store.candles("EURUSD", "M1", limit=1)
    await store.close()


async def test_killed_connections_are_replaced(store: Store, pg_url: str) -> None:
    other = await Store.connect(pg_url, size=1, name="other")
    async with store.connection() as connection:
        pid = await connection.fetchval("SELECT pg_backend_pid()")
    async with other.connection() as connection:
        await connection.fetchval("SELECT pg_terminate_backend($1, 5000)", pid)
    await store.wait_until_up(5.0)

    async def killed_half_way() -> None:
        statement = reduce_signals([signal("a", 1)]).statements[0]
        async with store.transaction() as connection:
            await connection.execute(store.sql(statement.query), *statement.columns)
            pid = await connection.fetchval("SELECT pg_backend_pid()")
            async with other.connection() as killer:
                await killer.fetchval("SELECT pg_terminate_backend($1, 5000)", pid)
            await connection.fetchval(store.sql("ping"))

    with pytest.raises(StoreUnavailable):
        await killed_half_way()
    assert await store.signals("M1", limit=1) == ()
    await other.close()
