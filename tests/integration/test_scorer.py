"""The scorer beside the other actors on real servers: outcomes, once each, whatever is restarted or corrected."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest

from actors.core.hashing import features_hash, signal_id
from actors.core.manifest import MANIFEST_FILE, ONNX_FILE
from actors.core.series import SeriesState, append
from actors.core.serving import ServedModel
from actors.emitter import Emitter
from actors.features import Features
from actors.recorder import Recorder
from actors.scorer import Scorer
from bus.client import Bus
from bus.subjects import FEATURES, MODELS, OUTCOMES, SIGNALS
from schema.messages import Candle, ModelEvent, Outcome
from schema.settings import Features as FeatureSettings
from schema.settings import Recorder as RecorderSettings
from schema.settings import Scorer as ScorerSettings
from schema.settings import Settings, Symbol
from tests.builders import LIVE, put, read_until, running, walk
from tests.models import files, manifest_of, release
from tests.system import read_file

POINT = 1e-5
SETTINGS = Settings(
    features=FeatureSettings(snapshot_seconds=0.05, quiet_seconds=0.3),
    recorder=RecorderSettings(linger=0.01),
    scorer=ScorerSettings(poll_seconds=0.02),
    symbols={"EURUSD": Symbol(point=POINT)},
)
CHAIN = (Features, Emitter, Recorder)
FIRST = 320  # bars that come as history


def spoken(artifacts: Mapping[str, bytes], **changes: Any) -> dict[str, bytes]:
    """A version with a threshold that trades most of the time."""
    manifest = msgspec.structs.replace(manifest_of(dict(artifacts)), threshold=0.5, max_spread={}, **changes)
    return {**artifacts, MANIFEST_FILE: msgspec.json.encode(manifest)}


@pytest.fixture
async def archive(pg_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(pg_url)
    yield connection
    await connection.close()


async def until(archive: asyncpg.Connection, sql: str, expected: Any, seconds: float = 30.0) -> None:
    """Asks until the answer is as expected: each question is a round trip, so this waits for the archive itself."""
    deadline = time.monotonic() + seconds
    while (found := await archive.fetchval(sql)) != expected:
        assert time.monotonic() < deadline, f"{sql}: {found} instead of {expected}"


async def settled(bus: Bus, archive: asyncpg.Connection) -> None:
    """Until the scorer has handled all of both streams."""
    for stream, reader in (("FEATURES", "scorer.features"), ("SIGNALS", "scorer.signals")):
        last = (await bus.js.stream_info(stream)).state.last_seq
        await until(archive, f"SELECT stream_seq >= {last} FROM cursors WHERE reader = '{reader}'", True)


async def serve(bus: Bus, archive: asyncpg.Connection, artifacts: Mapping[str, bytes], state: Any = "champion") -> str:
    """Registers a version as the trainer does, and waits until the emitter serves it."""
    await register(archive, artifacts)
    version = await release(bus, dict(artifacts), state)
    await read_until(bus, MODELS, lambda found: any(e.event == "activated" and e.version == version for e in found))
    return version


async def register(archive: asyncpg.Connection, artifacts: Mapping[str, bytes], base_rate: float = 0.48) -> None:
    manifest = manifest_of(dict(artifacts))
    text = msgspec.json.encode(msgspec.to_builtins(manifest) | {"base_rate": base_rate}).decode()
    await archive.execute(
        "INSERT INTO models (model_name, version, timeframe, state, created_at, manifest) "
        "VALUES ($1, $2, $3, 'candidate', now(), $4::text::jsonb)",
        manifest.name,
        manifest.version,
        manifest.timeframe,
        text,
    )


async def shadow(bus: Bus, archive: asyncpg.Connection, artifacts: Mapping[str, bytes]) -> str:
    """Registers a version as a shadow."""
    await register(archive, artifacts)
    manifest = manifest_of(dict(artifacts))
    for name, data in artifacts.items():
        await bus.put_object(f"{manifest.name}/{manifest.version}/{name}", data)
    event = ModelEvent(
        event="registered",
        model_name=manifest.name,
        version=manifest.version,
        timeframe=manifest.timeframe,
        at=datetime.now(UTC),
        state="shadow",
    )
    await bus.publish(MODELS, event, manifest.name, msg_id=f"shadow-{manifest.version}")
    return manifest.version


def expected(rows: Sequence[Candle], i: int, prob: float, point: float = POINT) -> dict[str, Any]:
    """What came of a signal of bar ``i`` at a threshold of a half, from the candles alone."""
    entry, leave = rows[i + 1], rows[i + 5]
    ret = leave.close / rows[i].close - 1.0
    label = 1 if prob >= 0.5 else -1
    paid = entry if label > 0 else leave
    cost = 1.5 * paid.spread * point / paid.close if paid.spread else None
    gross = label * (leave.close / entry.open - 1.0)
    return {
        "ret": ret,
        "up": None if leave.close == rows[i].close else ret > 0,
        "label": label,
        "won": label * ret > 0,
        "gross": gross,
        "net": None if cost is None else gross - cost,
    }


def agree(found: Any, wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        have = found[name] if isinstance(found, asyncpg.Record) else getattr(found, name)
        if isinstance(value, float) and name != "label":
            assert have == pytest.approx(value, rel=1e-9, abs=1e-15), (name, found)
        else:
            assert have == value, (name, found)


async def test_outcomes_of_a_real_file_are_those_of_its_candles(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection, data: Path
) -> None:
    bars = read_file(data / "EURUSD_M1_202502.csv")[:1_800]  # weekday minutes, some missing
    rows = [Candle(**vars(bar)) for bar in bars]
    artifacts = spoken(files())
    async with running(*CHAIN, Scorer, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        await put(bus, rows[:FIRST], history=True)
        await read_until(bus, FEATURES, lambda blocks: bool(blocks))
        version = await serve(bus, archive, artifacts)
        await put(bus, rows[FIRST:400], size=1)
        await put(bus, rows[400:], size=37)
        await read_until(bus, SIGNALS, lambda found: len(found) >= len(rows) - FIRST)
        await settled(bus, archive)
    known = [i for i in range(FIRST, len(rows) - 5) if (rows[i + 5].ts - rows[i].ts).total_seconds() <= 600]
    stored = await archive.fetch("SELECT * FROM signal_outcomes ORDER BY seq")
    probs = {r["ts"]: r["prob_up"] for r in await archive.fetch("SELECT ts, prob_up FROM model_signals")}
    found = {r["ts"]: r for r in stored}
    assert [r["ts"] for r in stored] == [rows[i].ts for i in known], "each once, in the order in which they are known"
    traded = 0
    for i in known:
        row = found[rows[i].ts]
        agree(row, expected(rows, i, probs[rows[i].ts]))
        assert (row["state"], row["model_version"], row["base_rate"], row["void"]) == ("champion", version, 0.48, False)
        traded += row["net"] is not None
    assert traded > 1_000
    said = await read_until(bus, OUTCOMES, lambda found: len(found) >= len(known))
    assert [o.ts for o in said] == [rows[i].ts for i in known]
    for outcome in said:
        row = found[outcome.ts]
        assert outcome == Outcome(
            signal_id=row["id"], **{name: row[name] for name in Outcome.__struct_fields__ if name != "signal_id"}
        )
    info = await bus.js.stream_info("EVENTS", subjects_filter="outcomes.>")
    assert info.state.subjects == {"outcomes.M1.EURUSD": len(known)}
