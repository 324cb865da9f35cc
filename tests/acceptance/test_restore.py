"""A machine is lost, its backup is not: on an empty home everything is as it was, goes on, and is to the bit the same."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest

from actors.core.series import SeriesState, append
from actors.vault.dump import table_entries
from bus.consume import Reader
from bus.subjects import BACKUPS, MODELS
from schema.backup import MANIFEST, BackupManifest, TableEntry
from schema.messages import BackupEvent, Candle, FeatureRow
from tests.acceptance.conftest import Make
from tests.builders import LIVE, read_until, walk
from tests.models import files, release, trust
from tests.servers import wait_until
from tests.system import System

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]

SYMBOLS = {"EURUSD": 1, "GBPUSD.m": 2}  # each its own walk
BEFORE, SINCE = 900, 60  # bars of a symbol that the backup holds, and that came after it and are lost with the machine
REVISED = BEFORE - 10
MINUTE = 60
FEATURES = ("close", "volume", "spread", "rsi", "macd", "macd_signal", "macd_hist", "atr", "ma60", "ret_1", "fwd_ret_5")
# What a system that runs writes by itself: places in streams, and what it checks now and then.
LIVING = {"cursors", "signal_audits", "model_trials"}


def bars(symbol: str) -> list[Candle]:
    return walk(BEFORE + SINCE, seed=SYMBOLS[symbol])


def final(symbol: str) -> list[Candle]:
    """As they are in the end: one bar of EURUSD is revised."""
    rows = bars(symbol)
    if symbol == "EURUSD":
        rows[REVISED] = msgspec.structs.replace(rows[REVISED], volume=12_345.0)
    return rows


def post(system: System, symbol: str, rows: Sequence[Candle], size: int = 300) -> None:
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        candles = [
            {"time": int(bar.ts.timestamp())}
            | {name: getattr(bar, name) for name in ("open", "high", "low", "close")}
            | {"volume": bar.volume, "spread": bar.spread}
            for bar in part
        ]
        clock = int(part[-1].ts.timestamp()) + MINUTE
        answer = system.post(
            {"symbol": symbol, "timeframe": "M1", "replay": True, "gmt_time": clock, "candles": candles}
        )
        assert answer["accepted"] == len(part), answer


def tables(system: System) -> dict[str, TableEntry]:
    async def ask() -> dict[str, TableEntry]:
        connection = await asyncpg.connect(system.ready["database"])
        try:
            async with connection.transaction(readonly=True):
                return {entry.name: entry for entry in await table_entries(connection)}
        finally:
            await connection.close()

    return asyncio.run(ask())


def streams(system: System) -> dict[str, tuple[int, int]]:
    """Where each stream begins and ends."""

    async def ask() -> dict[str, tuple[int, int]]:
        async with system.bus() as bus:
            found = await bus.js.streams_info()
            return {str(one.config.name): (one.state.first_seq, one.state.last_seq) for one in found}

    return asyncio.run(ask())


def plant_model(system: System) -> str:
    """A version that serves, as a training would leave it."""
    artifacts = files(1, tuple(SYMBOLS))

    async def put() -> str:
        async with system.bus() as bus:
            version = await release(bus, artifacts)
            await read_until(bus, MODELS, lambda found: bool(found) and found[-1].event == "activated", start=1)
            return version

    return asyncio.run(put())


def scored(system: System) -> bool:
    at = {row["reader"]: row["stream_seq"] for row in system.fetch("SELECT reader, stream_seq FROM cursors")}
    return all(at.get(f"scorer.{name}") == at.get(f"recorder.{name}") for name in ("features", "signals"))


def events(system: System) -> list[BackupEvent]:
    async def read() -> list[BackupEvent]:
        async with system.bus() as bus:
            last = (await bus.js.get_last_msg(str(BACKUPS.stream), BACKUPS.wildcard)).seq
            async with Reader(bus, BACKUPS, name="acceptance", start=1) as reader:
                found = []
                while reader.position < int(last or 0):
                    found.append((await reader.next(10.0)).message)
                return found

    return asyncio.run(read())


def answer(system: System, *words: str, code: int = 0) -> Any:
    done = system.mt5(*words, "--json", timeout=180)
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)


def check_features(system: System, symbol: str) -> None:
    """The archive's features are those of the pure core over all bars at once, bit by bit."""
    want: list[FeatureRow] = append(SeriesState(symbol, "M1"), final(symbol), LIVE).rows
    rows = system.fetch("SELECT * FROM features WHERE symbol = $1 ORDER BY ts", symbol)
    names = ("ts", *FEATURES, "bar", "ready")
    assert [tuple(row[n] for n in names) for row in rows] == [tuple(getattr(r, n) for n in names) for r in want]


def test_a_lost_machine_comes_back_from_its_backup_and_goes_on(make: Make, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    grafana = tmp_path / "grafana"
    grafana.mkdir()
    (grafana / "grafana.db").write_bytes(b"dashboards")
    system = make(MT5_BACKUP_TARGET=str(target), MT5_BACKUP_DATA=str(grafana), MT5_FEATURES_SNAPSHOT_SECONDS="1")
    settings = system.folder / "mt5.toml"
    settings.write_text('[symbols."WTI"]\nallow_non_positive = true\n')
    trust(system.home)
    system.start()
    version = plant_model(system)
    for symbol in SYMBOLS:
        post(system, symbol, bars(symbol)[:BEFORE])
    post(system, "EURUSD", [final("EURUSD")[REVISED]])
    system.settle()
    (used,) = system.fetch("SELECT count(*) FROM model_signals WHERE model_version = $1", version)
    assert used[0] > len(SYMBOLS) * (BEFORE - 300) / 2

    wait_until(lambda: scored(system), 60, "the scorer has read what the recorder has stored")

    # A backup, shipped; then proved and drilled from where it was shipped to, beside the running system.
    made = answer(system, "backup", "run")
    (grafana / "grafana.db").write_bytes(b"changed since")
    name = made["backup"]
    manifest = msgspec.json.decode((target / name / MANIFEST).read_bytes(), type=BackupManifest)
    assert {t.name: t.rows for t in manifest.tables}["market_data"] >= len(SYMBOLS) * BEFORE
    practice = tmp_path / "practice"
    drilled = answer(system, "backup", "drill", "--home", str(practice))
    assert {"keys", "nats", "postgres"} <= {path.name for path in practice.iterdir()}
    assert (grafana / "grafana.db").read_bytes() == b"changed since"
    assert (drilled["ok"], drilled["backup"], drilled["signals"]) == (True, name, 100), drilled
    assert drilled["rto_seconds"] >= sum(drilled["parts"].values()) > 0
    assert 0 <= drilled["rpo_seconds"] < 600
    assert [(e.event, e.backup) for e in events(system)][-1] == ("drilled", name)
    assert not (system.home / "scratch").exists()

    # The machine dies with what came since.
    for symbol in SYMBOLS:
        post(system, symbol, bars(symbol)[BEFORE : BEFORE + 10])
    system.settle()
    refused = system.mt5("backup", "restore", "latest")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1), refused.stderr
    assert "is in use by process" in refused.stderr
    system.kill()
    shutil.rmtree(system.home)
    shutil.rmtree(grafana)
    then = settings.read_text()
    settings.unlink()

    restored = answer(system, "backup", "restore", "latest")
    assert restored["backup"] == name
    assert restored["rows"] == sum(table.rows for table in manifest.tables)
    assert set(restored["streams"]) == {stream.name for stream in manifest.streams}
    assert not (system.home / "scratch").exists()
    assert (grafana / "grafana.db").read_bytes() == b"dashboards"
    kept = system.home / "restored" / "mt5.toml"
    assert kept.read_text() == then
    assert any(f"copy {kept} to mt5.toml" in note for note in restored["notes"])
    kept.rename(settings)
    again = system.mt5("backup", "restore", "latest")
    assert (again.returncode, len(again.stderr.splitlines())) == (1, 1), again.stderr
    assert "is not empty (it has nats)" in again.stderr

    # It starts as if nothing had been, and everything is as the backup says.
    system.start()
    found = tables(system)
    assert [found[t.name] for t in manifest.tables if t.name not in LIVING] == [
        t for t in manifest.tables if t.name not in LIVING
    ]
    begin, now = {stream.name: stream for stream in manifest.streams}, streams(system)
    for stream in ("CANDLES", "FEATURES", "SIGNALS"):
        taken = stream == "SIGNALS"  # an emitter that starts takes the fence before it
        assert now[stream] == (begin[stream].first_seq, begin[stream].last_seq + taken)
    assert all(now[name][1] >= stream.last_seq for name, stream in begin.items())
    assert answer(system, "topology") == {"current": True, "differences": []}

    # The terminals send what was lost, and more: sequences count on, features are those of an undisturbed life.
    for symbol in SYMBOLS:
        post(system, symbol, bars(symbol)[BEFORE:], size=7)
    system.settle()
    assert "made anew" not in system.log("recorder") + system.log("scorer")
    for symbol in SYMBOLS:
        assert system.counts(symbol)["market_data"] == BEFORE + SINCE
        check_features(system, symbol)
    assert streams(system)["CANDLES"][1] == begin["CANDLES"].last_seq + 1 + len(SYMBOLS) * -(-SINCE // 7)
    old = [
        row["id"]
        for row in system.fetch(
            "SELECT id FROM model_signals WHERE created_at < $1 AND symbol = ANY($2) ORDER BY id LIMIT 100",
            manifest.created_at,
            list(SYMBOLS),
        )
    ]
    assert len(old) == 100
    everything = answer(system, "verify", "--all")
    assert everything["different"] == []
    assert everything["signals"] == everything["identical"] >= len(SYMBOLS) * (BEFORE + SINCE)
    assert answer(system, "verify", old[0])["identical"]
    since = bars("EURUSD")[BEFORE].ts
    serving = system.fetch(
        "SELECT DISTINCT model_version FROM model_signals WHERE symbol = ANY($1) AND ts >= $2", list(SYMBOLS), since
    )
    assert [row["model_version"] for row in serving] == [version]
    assert system.stop() < 10
