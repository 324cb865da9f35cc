"""Receipts on real servers: whatever a series and its models went through, each signal is made again to the bit; and what
was changed afterwards, be it one bit of one file, is found."""

from __future__ import annotations

import asyncio
import json
import os
import struct
import sys
import time
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import asyncpg
import msgspec
import onnxruntime
import pytest
import structlog

from actors.artifacts import Artifacts
from actors.audit import Audit, Auditor, Checked
from actors.core.manifest import MANIFEST_FILE, ONNX_FILE, SIGNATURE_FILE
from actors.core.verdicts import Verdict
from actors.emitter import Emitter
from actors.features import Features
from actors.recorder import Recorder
from actors.trainer import Trainer
from bus.audit import Streams
from bus.client import Bus
from bus.consume import last_message
from bus.store import Store
from bus.subjects import (
    ALERTS,
    CANDLES,
    FEATURE_STATE,
    FEATURES,
    MODELS,
    PROMOTE,
    ROLLBACK,
    SIGNALS,
    TRAIN,
    bucket_stream,
)
from bus.supervise import Context
from bus.telemetry import audited_total
from commands.series import move
from schema.messages import Candle
from schema.settings import Features as FeatureSettings
from schema.settings import Recorder as RecorderSettings
from schema.settings import Scorer, Settings
from schema.settings import Trainer as TrainerSettings
from tests.builders import PUBLIC_KEY_FILE, TRUSTING, block, put, read_until, running
from tests.models import changed, files, release, trust
from tests.servers import ROOT
from tests.system import read_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = Settings(
    features=FeatureSettings(snapshot_seconds=0.05, quiet_seconds=0.3),
    recorder=RecorderSettings(linger=0.01),
    models=TRUSTING.models,
    scorer=Scorer(audit_sample=40),
    trainer=TrainerSettings(min_rows=600, trees=12, folds=2),
)
SYMBOLS = ("EURUSD", "GBPUSD")
MINUTE = timedelta(minutes=1)
MUTATIONS = 100
MUTATIONS_IN_CI = 20
STRIDE = 13  # through the plan, so that a few mutations are of every table


@pytest.fixture
async def store(pg_url: str) -> AsyncIterator[Store]:
    store = await Store.connect(pg_url, size=2, name="test-receipts")
    yield store
    await store.close()


@pytest.fixture
async def archive(pg_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(pg_url)
    yield connection
    await connection.close()


def candles(file: Path, count: int) -> list[Candle]:
    return [
        Candle(ts=b.ts, open=b.open, high=b.high, low=b.low, close=b.close, volume=b.volume, spread=b.spread)
        for b in read_file(file)[:count]
    ]


def other(row: Candle) -> Candle:
    return msgspec.structs.replace(row, close=row.open, high=max(row.high, row.open), low=min(row.low, row.open))


class Life:
    """Two series of real bars and two models, and all that may happen to them."""

    def __init__(self, bus: Bus, archive: asyncpg.Connection, eur: list[Candle], gbp: list[Candle]) -> None:
        self.bus = bus
        self.archive = archive
        self.eur = eur
        self.gbp = gbp

    async def put(self, rows: Sequence[Candle], symbol: str = "EURUSD", size: int = 50, **more: Any) -> None:
        await put(self.bus, rows, size=size, symbol=symbol, **more)

    async def settle(self, last: Candle, symbol: str = "EURUSD") -> None:
        """One bar more, and until it and all before it is in the archive."""
        seq = await put(self.bus, [last], size=1, symbol=symbol)
        deadline = time.monotonic() + 30
        while True:
            assert time.monotonic() < deadline, "the archive does not become whole"
            tails = [await last_message(self.bus, channel) for channel in (FEATURES, SIGNALS)]
            if any(tail is None or tail[1].candles_seq < seq for tail in tails):
                continue
            at = dict(await self.archive.fetch("SELECT reader, stream_seq FROM cursors"))
            if [at.get("recorder.features"), at.get("recorder.signals")] == [tail[0] for tail in tails if tail]:
                return

    async def serve(self, artifacts: dict[str, bytes], state: Any) -> str:
        """A version serves; every signal made from now on is its."""
        known = (await self.bus.js.stream_info("EVENTS")).state.last_seq
        version = await release(self.bus, artifacts, state)
        await read_until(
            self.bus, MODELS, lambda found: bool(found) and found[-1].event == "activated", start=known + 1
        )
        return version

    async def ask(self, subject: str, **request: Any) -> Verdict:
        """What the trainer says to a request, which must succeed."""
        answer = await self.bus.request(subject, msgspec.json.encode(request), timeout=100)
        verdict = msgspec.json.decode(answer, type=Verdict)
        assert verdict.ok, verdict.message
        return verdict

    async def until(self, sql: str, *values: Any) -> None:
        deadline = time.monotonic() + 30
        while not await self.archive.fetchval(sql, *values):
            assert time.monotonic() < deadline, sql


async def live(life: Life, nats_url: str, pg_url: str, store: Store, home: Path) -> None:
    """A life of some 5,000 signals: restarts, trainings, promotions, a rollback, revised, late, withdrawn, deferred and
    renamed bars.
    """
    eur, gbp = life.eur, life.gbp
    first = files(1, SYMBOLS)
    # A threshold that every probability passes one way or the other, so that labels come of it.
    second = changed(files(2, SYMBOLS), threshold=0.5)
    three = (Features, Emitter, Recorder)
    servers: dict[str, Any] = {"nats_url": nats_url, "database_url": pg_url, "settings": SETTINGS}
    async with running(*three, **servers):
        await life.put(eur[100:500])
        await life.put(gbp[:450], "GBPUSD", 100)
        await life.serve(first, "provisional")
        await life.put(eur[500:700], size=1)
        await life.put(gbp[450:800], "GBPUSD", 40)
        await life.settle(gbp[800], "GBPUSD")
    async with running(*three, **servers):
        # History of before the first bar waits, and what comes meanwhile is signalled without it.
        await life.put(eur[:100], history=True)
        await life.put(eur[700:719], size=1)
        await life.settle(eur[719])
        await life.until("SELECT bar = 720 FROM features WHERE symbol = 'EURUSD' AND ts = $1", eur[719].ts)
        await life.settle(eur[720])
    async with running(*three, **servers):
        await life.serve(second, "champion")
        await life.put([*eur[721:850], *eur[851:1000]])
        # Late by the replay's own clock.
        for row in eur[1000:1020]:
            await life.put([row], now=row.ts + 3 * MINUTE)
        await life.put([*gbp[801:900], *gbp[901:1200]], "GBPUSD", 37)
        await life.put([other(eur[640])])  # a revision
        await life.put([eur[850]])  # a late bar
        await life.put([gbp[900]], "GBPUSD")
        gone = block([], symbol="GBPUSD", withdrawn=(gbp[1100].ts,))
        await life.bus.publish(CANDLES, gone, "M1", "GBPUSD", msg_id="withdrawn")
        await life.settle(gbp[1200], "GBPUSD")
    # The calculator without its snapshots: all of it from the log.
    await life.bus.js.purge_stream(bucket_stream(FEATURE_STATE))
    async with running(*three, **servers):
        await life.put([gbp[1100]], "GBPUSD")  # withdrawn, and here again
        await life.put([eur[640]])  # the correction is taken back
        # Confirmed: published again without a change, and with another model by now.
        await life.serve(first, "champion")
        await life.put([eur[1010]], ts_source="server", server_time=int(eur[1010].ts.timestamp()))
        await life.put(eur[1020:1300], size=1)
        await life.put([other(gbp[1000]), *gbp[1201:1300]], "GBPUSD")
        await life.put([other(eur[1290]), other(eur[1295])])
        await life.put([msgspec.structs.replace(eur[1297], open=eur[1297].low)])  # features do not look at it
        await life.settle(eur[1300])
        await move(life.bus, store, "GBPUSD", "GBPUSD.m", "M1")
        await life.put(gbp[1300:1400], "GBPUSD.m", 1)
        await life.settle(gbp[1400], "GBPUSD.m")
        await life.put(eur[1301:1400])
        await life.settle(eur[1400])
    # The trainer's own versions: made beside the feed, promoted by hand, rolled back, and made once more.
    trust(home)
    servers["settings"] = msgspec.structs.replace(SETTINGS, home=str(home))
    async with running(*three, Trainer, **servers):
        retrained = await life.ask(TRAIN, timeframe="M1", seed=3)
        await life.put(eur[1401:1500], size=3)
        promoted = await life.ask(PROMOTE, version=retrained.version, reason="to be seen")
        assert (promoted.version, promoted.serving) == (retrained.version, True)
        await life.put(eur[1500:1649], size=7)
        await life.put([other(eur[1495]), other(eur[1510])])  # a bar of before the promotion, and one of after it
        await life.settle(eur[1649])
        back = await life.ask(ROLLBACK, reason="seen")
        assert back.serving
        assert back.version != retrained.version
        await life.put(eur[1650:1799], size=1)
        await life.settle(eur[1799])
        await life.ask(TRAIN, timeframe="M1", seed=4)
        await life.put(eur[1800:1900])
        await life.settle(eur[1900])
    async with running(*three, **servers):
        await life.put(eur[1901:2000])
        await life.settle(eur[2000])
    said = {row[0] for row in await life.archive.fetch("SELECT DISTINCT model_version FROM model_signals")}
    assert retrained.version in said


def audit(store: Store, bus: Bus) -> Audit:
    return Audit(store, Streams(bus, "test"), Artifacts(bus, SETTINGS).load)


async def everything(store: Store, bus: Bus) -> list[Checked]:
    look = audit(store, bus)
    return [one async for part in look.run(await look.everything()) for one in part]


@pytest.mark.parametrize("count", [MUTATIONS_IN_CI, pytest.param(MUTATIONS, marks=pytest.mark.torture)])
async def test_every_signal_of_a_hard_life_is_made_again_and_every_change_is_found(
    bus: Bus,
    nats_url: str,
    pg_url: str,
    archive: asyncpg.Connection,
    store: Store,
    data: Path,
    tmp_path: Path,
    count: int,
) -> None:
    life = Life(
        bus, archive, candles(data / "EURUSD_M1_202502.csv", 2_001), candles(data / "GBPUSD_M1_201202.csv", 1_401)
    )
    await live(life, nats_url, pg_url, store, tmp_path)
    began = time.perf_counter()
    checked = await everything(store, bus)
    took = time.perf_counter() - began
    assert [(one.signal, one.differences) for one in checked if one.differences] == []
    assert len(checked) == await archive.fetchval("SELECT count(*) FROM model_signals") >= 5_000
    assert took < 60, f"{len(checked)} signals took {took:.1f} s"
    print(f"{len(checked)} signals verified in {took:.1f} s")
    await found_by_their_ids(store, bus, checked)
    await the_command(bus, nats_url, pg_url, [one.signal.id for one in checked], len(checked))
    await the_standing_audit(bus, store, archive, nats_url, pg_url)
    await not_archived_yet(life, nats_url, pg_url, store)
    missed = [what async for what, found in mutations(archive, bus, store, Random(5), count) if not found]
    assert missed == []


async def found_by_their_ids(store: Store, bus: Bus, checked: Sequence[Checked]) -> None:
    for one in Random(1).sample(list(checked), 5):
        assert await audit(store, bus).one(one.signal.id) == one
    assert await audit(store, bus).one("0" * 32) is None
    sample = await audit(store, bus).pick(60, Random(3))
    assert sample == await audit(store, bus).pick(60, Random(3))
    assert sum(map(len, filter(None, sample.values()))) == 60
    assert set(sample) <= {(symbol, "M1") for symbol in (*SYMBOLS, "GBPUSD.m")}
    of_one = await audit(store, bus).pick(30, Random(3), "GBPUSD.m")
    assert set(of_one) == {("GBPUSD.m", "M1")}


async def the_command(bus: Bus, nats_url: str, pg_url: str, ids: Sequence[str], count: int) -> None:
    """``mt5 verify`` as a process: what it prints, and its exit codes."""

    async def mt5(*words: str) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "runner",
            "verify",
            *words,
            cwd=ROOT,
            env=os.environ
            | {"MT5_NATS_URL": nats_url, "MT5_DATABASE_URL": pg_url, "MT5_MODELS_PUBLIC_KEY": str(PUBLIC_KEY_FILE)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        return int(process.returncode or 0), out.decode(), err.decode()

    one, everything_, nothing, both = await asyncio.gather(
        mt5(ids[0]), mt5("--all", "--json"), mt5("f" * 32), mt5(ids[0], "--all")
    )
    assert one[0] == 0 and one[1].startswith("Identical: ") and ids[0] in one[1], one
    assert everything_[0] == 0, everything_
    assert json.loads(everything_[1]) == {"signals": count, "identical": count, "different": []}
    assert nothing[0] == 1 and nothing[1] == "" and nothing[2].count("\n") == 1, nothing
    assert both[0] == 2 and both[2].count("\n") == 1, both


async def the_standing_audit(bus: Bus, store: Store, archive: asyncpg.Connection, nats_url: str, pg_url: str) -> None:
    context = Context(SETTINGS, bus, pg_url, lambda: None, structlog.get_logger())
    auditor = Auditor(context, store, lambda: Artifacts(bus, SETTINGS).load, Random(7))
    before = audited_total.value(result="identical")
    assert [one.differences for one in await auditor.once()] == [()] * 40
    assert audited_total.value(result="identical") == before + 40
    assert await archive.fetchval("SELECT count(*) FROM signal_audits WHERE identical AND difference IS NULL") == 40
    newest = await archive.fetchrow("SELECT id, label FROM model_signals ORDER BY ts DESC LIMIT 1")
    await archive.execute("UPDATE model_signals SET label = $2 WHERE id = $1", newest["id"], 1 - abs(newest["label"]))
    wrong = [one for one in await auditor.once() if one.differences]
    await archive.execute("UPDATE model_signals SET label = $2 WHERE id = $1", newest["id"], newest["label"])
    assert [one.signal.id for one in wrong] == [newest["id"]]
    assert audited_total.value(result="different") == 1
    (row,) = await archive.fetch("SELECT signal_id, difference FROM signal_audits WHERE NOT identical")
    assert row["signal_id"] == newest["id"] and json.loads(row["difference"])[0]["field"] == "label"
    (alert,) = await read_until(bus, ALERTS, bool)
    assert (alert.severity, alert.check) == ("critical", "receipts") and newest["id"] in alert.message
    # Another ONNX Runtime cannot make these signals again, which is no fault of theirs: nobody is woken up for it.
    with patch.object(onnxruntime, "__version__", "0.0"):
        checked = await auditor.once()
    assert not [one for one in checked if one.differences]
    assert audited_total.value(result="unverifiable") == 40 - len(checked) > 0
    assert len(await read_until(bus, ALERTS, bool)) == 1


async def not_archived_yet(life: Life, nats_url: str, pg_url: str, store: Store) -> None:
    """While the recorder is away, signal and bars stand in the streams only."""
    servers: dict[str, Any] = {"nats_url": nats_url, "database_url": pg_url, "settings": SETTINGS}
    seen = (await life.bus.js.stream_info(str(SIGNALS.stream))).state.last_seq
    async with running(Features, Emitter, **servers):
        await life.put([other(life.gbp[1390]), life.gbp[1400]], "GBPUSD.m")
        last = msgspec.structs.replace(life.gbp[1400], ts=life.gbp[1400].ts + MINUTE)
        await life.put([last], "GBPUSD.m")
        made = await read_until(life.bus, SIGNALS, lambda found: found[-1:] and found[-1].ts == last.ts, start=seen + 1)
    assert len(made) == 12  # eleven of them made again
    for signal in made:
        assert await life.archive.fetchval("SELECT count(*) FROM model_signals WHERE id = $1", signal.id) == 0
        checked = await audit(store, life.bus).one(signal.id)
        assert checked is not None and checked.differences == ()
    async with running(Features, Emitter, Recorder, **servers):
        await life.settle(msgspec.structs.replace(last, ts=last.ts + MINUTE), "GBPUSD.m")


# --- mutations -----------------------------------------------------------------------------------------------------

STANDING = """
    SELECT {columns} FROM {table} AS t JOIN model_signals AS s USING (symbol, timeframe, ts)
    WHERE {condition} ORDER BY md5(s.id || $1) LIMIT 1
"""
KINDS: dict[str, tuple[tuple[str, ...], str]] = {
    "market_data": (
        ("ts", "open", "high", "low", "close", "volume", "spread", "real_volume", "revision", "live"),
        "s.superseded_at IS NULL AND t.live AND s.candle_revision = t.revision",
    ),
    "candle_revisions": (
        ("ts", "open", "high", "low", "close", "volume", "spread", "real_volume", "revision", "live"),
        "s.candles_seq >= t.applied_seq AND s.candles_seq < t.replaced_by_seq AND s.candle_revision = t.revision",
    ),
    "features": (
        (
            *("close", "volume", "spread", "rsi", "macd", "macd_signal", "macd_hist", "atr", "ma60", "ret_1"),
            *("fwd_ret_5", "ready", "bar", "candle_revision"),
        ),
        "s.superseded_at IS NULL AND t.fwd_ret_5 IS NOT NULL AND t.ready",
    ),
    "model_signals": (
        (
            *("ts", "symbol", "model_name", "threshold", "prob_up", "label", "id", "model_version", "abstain"),
            *("candle_revision", "candles_seq", "features_hash", "expires_at", "supersedes", "trace_id"),
            *("received_at", "features_at", "candle_digest"),
        ),
        "s.candle_digest IS NOT NULL",
    ),
}
FILES = (ONNX_FILE, MANIFEST_FILE, SIGNATURE_FILE)


def turned(value: Any, column: str, chance: Random) -> Any:
    """Another value, as near as can be: of a number one bit, of a time the least step, of a text one character."""
    match value:
        case None:
            return {"abstain": "spread", "threshold": 0.5, "prob_up": 0.5}.get(column, "0" * 32)
        case bool():
            return not value
        case float():
            bits = int.from_bytes(struct.pack("<d", value), "little") ^ (1 << chance.randrange(52))
            return struct.unpack("<d", bits.to_bytes(8, "little"))[0]
        case int() if column == "label":
            return chance.choice([label for label in (-1, 0, 1) if label != value])
        case int():
            return value + 1
        case datetime():
            return value + (MINUTE * 100_000 if column == "ts" else timedelta(microseconds=1))
        case _:
            at = chance.randrange(len(value))
            return value[:at] + chance.choice([c for c in "0123456789abcdef" if c != value[at]]) + value[at + 1 :]


async def mutations(
    archive: asyncpg.Connection, bus: Bus, store: Store, chance: Random, count: int
) -> AsyncIterator[tuple[str, bool]]:
    """Changes one thing after the other, and takes it back; each with whether a look at one signal has found it."""
    await archive.execute("SET session_replication_role = replica")  # what corrupts a row fires no trigger
    plan = [(table, column) for table, (columns, _) in KINDS.items() for column in columns]
    plan += [("files", file) for file in FILES]
    look = audit(store, bus)  # it reads the models once: those whose files are changed are looked at anew
    for number in range(count):
        table, column = plan[number * STRIDE % len(plan)]
        if table == "files":
            yield f"{column} ({number})", await file_mutated(archive, bus, store, column, chance)
            continue
        query = STANDING.format(
            columns="s.symbol, s.timeframe, s.id, t.ctid AS place, t.*", table=table, condition=KINDS[table][1]
        )
        if table == "model_signals":
            query = f"SELECT s.*, s.ctid AS place FROM model_signals AS s WHERE {KINDS[table][1]} ORDER BY md5(s.id || $1) LIMIT 1"
        row = await archive.fetchrow(query, str(number))
        assert row is not None, table
        value = turned(row[column], column, chance)
        place = await archive.fetchval(
            f"UPDATE {table} SET {column} = $1 WHERE ctid = $2::tid RETURNING ctid", value, row["place"]
        )
        symbol, signal = row["symbol"], row["id"]
        if table == "model_signals":
            symbol, signal = (value if column == "symbol" else symbol), (value if column == "id" else signal)
        found = await differs(look, symbol, signal)
        await archive.execute(f"UPDATE {table} SET {column} = $1 WHERE ctid = $2::tid", row[column], place)
        yield f"{table}.{column}: {row[column]} → {value} of {signal} ({number})", found


async def differs(look: Audit, symbol: str, signal: str) -> bool:
    checked = [one async for part in look.run({(symbol, "M1"): [signal]}) for one in part]
    assert len(checked) == 1
    return bool(checked[0].differences)


async def file_mutated(archive: asyncpg.Connection, bus: Bus, store: Store, file: str, chance: Random) -> bool:
    row = await archive.fetchrow(
        "SELECT id, symbol, model_name, model_version FROM model_signals WHERE prob_up IS NOT NULL"
        " ORDER BY md5(id || $1) LIMIT 1",
        str(chance.random()),
    )
    path = f"{row['model_name']}/{row['model_version']}/{file}"
    data = await bus.get_object(path)
    at, bit = chance.randrange(len(data)), 1 << chance.randrange(8)
    await bus.put_object(path, data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
    found = await differs(audit(store, bus), row["symbol"], row["id"])
    await bus.put_object(path, data)
    return found
