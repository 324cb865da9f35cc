"""The scorer beside the other actors on real servers: outcomes, once each, whatever is restarted or corrected."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import msgspec
import numpy as np
import pytest
from nats.aio.msg import Msg
from sklearn.metrics import brier_score_loss, log_loss

from actors.collector import Collector
from actors.core import drift
from actors.core.docket import Docket
from actors.core.hashing import features_hash, signal_id
from actors.core.manifest import ONNX_FILE
from actors.core.series import SeriesState, append
from actors.core.serving import ServedModel
from actors.core.verdicts import DecisionRequest, Verdict
from actors.emitter import Emitter
from actors.features import Features
from actors.recorder import Recorder
from actors.scorer import Scorer
from actors.scoring import judge
from bus.client import Bus, outgoing
from bus.consume import Reader
from bus.subjects import ALERTS, DECIDE, FEATURES, MODELS, OUTCOMES, SCORECARD, SIGNALS
from deploy.server import free_port
from schema.messages import Alert, Candle, ModelEvent, Outcome
from schema.scorecard import Scorecard, ScorecardRequest
from schema.settings import Features as FeatureSettings
from schema.settings import Gateway, Settings, Symbol
from schema.settings import Recorder as RecorderSettings
from schema.settings import Scorer as ScorerSettings
from tests.builders import LIVE, START, TRUSTING, kept, put, read_until, running, walk
from tests.models import changed, files, manifest_of, release, store
from tests.system import read_file

POINT = 1e-5
SETTINGS = Settings(
    features=FeatureSettings(snapshot_seconds=0.05, quiet_seconds=0.3),
    recorder=RecorderSettings(linger=0.01),
    scorer=ScorerSettings(poll_seconds=0.02),
    symbols={"EURUSD": Symbol(point=POINT)},
    models=TRUSTING.models,
)
CHAIN = (Features, Emitter, Recorder)
FIRST = 320  # bars that come as history


def spoken(artifacts: Mapping[str, bytes], **changes: Any) -> dict[str, bytes]:
    """A version with a threshold that trades most of the time, and that takes every bar for one that it knows."""
    return changed(artifacts, threshold=0.5, max_spread={}, **{"outliers": None, **changes})


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


async def serve(
    bus: Bus, archive: asyncpg.Connection, artifacts: Mapping[str, bytes], *, base_rate: float = 0.48
) -> str:
    """Registers a version as the trainer does, and waits until the emitter serves it as champion."""
    await register(archive, artifacts, base_rate)
    version = await release(bus, dict(artifacts), "champion")
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
    await store(bus, artifacts)
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


def in_order(found: Sequence[Any], times: Sequence[datetime]) -> None:
    """Each bar once; a bar may overtake the five before it and no more."""
    order = [row["ts"] if isinstance(row, asyncpg.Record) else row.ts for row in found]
    assert sorted(order) == list(times)
    places = {ts: i for i, ts in enumerate(times)}
    assert max(abs(places[ts] - i) for i, ts in enumerate(order)) <= 5


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
    in_order(stored, [rows[i].ts for i in known])
    traded = 0
    for i in known:
        row = found[rows[i].ts]
        agree(row, expected(rows, i, probs[rows[i].ts]))
        assert (row["state"], row["model_version"], row["base_rate"], row["void"]) == ("champion", version, 0.48, False)
        traded += row["net"] is not None
    assert traded > 1_000
    said = await read_until(bus, OUTCOMES, lambda found: len(found) >= len(known))
    assert [o.ts for o in said] == [r["ts"] for r in stored]
    for outcome in said:
        row = found[outcome.ts]
        assert outcome == Outcome(
            signal_id=row["id"], **{name: row[name] for name in Outcome.__struct_fields__ if name != "signal_id"}
        )
    info = await bus.js.stream_info("EVENTS", subjects_filter="outcomes.>")
    assert info.state.subjects == {"outcomes.M1.EURUSD": len(known)}


async def test_a_signal_that_was_archived_since_the_scorer_looked_does_not_overtake(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection
) -> None:
    """The recorder goes on between the scorer's look at its cursors and its look at the archive."""
    rows = walk(FIRST + 400)
    async with running(*CHAIN, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        await put(bus, rows[:FIRST], history=True)
        await read_until(bus, FEATURES, lambda blocks: bool(blocks))
        await serve(bus, archive, spoken(files()))
        await put(bus, rows[FIRST:], size=10)
        await read_until(bus, SIGNALS, lambda found: len(found) >= 400)
        await until(archive, "SELECT count(*) FROM model_signals WHERE prob_up IS NOT NULL", 400)
    first, second = rows[FIRST + 99].ts, rows[FIRST + 199].ts
    last = {
        "signals": [d for d in await kept(bus, SIGNALS) if d.message.ts <= first][-1],
        "features": [d for d in await kept(bus, FEATURES) if d.message.rows[-1].ts <= second][-1],
    }
    ends = {
        r["reader"]: (r["stream_seq"], r["candles_seq"])
        for r in await archive.fetch("SELECT reader, stream_seq, candles_seq FROM cursors")
    }

    async def archived(reader: str, stream_seq: int, candles_seq: int) -> None:
        sql = "UPDATE cursors SET stream_seq = $2, candles_seq = $3 WHERE reader = $1"
        await archive.execute(sql, f"recorder.{reader}", stream_seq, candles_seq)

    async def scored(reader: str, seq: int) -> None:
        await until(archive, f"SELECT stream_seq >= {seq} FROM cursors WHERE reader = 'scorer.{reader}'", True)

    await archive.execute("CREATE TABLE later AS SELECT * FROM model_signals")
    await archive.execute("DELETE FROM model_signals WHERE ts > $1", first)
    for reader, delivery in last.items():
        await archived(reader, delivery.stream_seq, delivery.message.candles_seq)
    async with running(Scorer, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        for reader, delivery in last.items():
            await scored(reader, delivery.stream_seq)
        async with archive.transaction():
            await archive.execute("INSERT INTO model_signals SELECT * FROM later WHERE ts > $1", first)
            await archived("features", *ends["recorder.features"])
        await scored("features", ends["recorder.features"][0])
        await archived("signals", *ends["recorder.signals"])
        await settled(bus, archive)
        stored = await archive.fetch("SELECT * FROM signal_outcomes ORDER BY seq")
    in_order(stored, [row.ts for row in rows[FIRST:-5]])


async def published(bus: Bus) -> list[tuple[str, Outcome]]:
    """Every outcome of the stream with its message id."""
    info = await bus.js.stream_info("EVENTS", subjects_filter="outcomes.>")
    count = sum((info.state.subjects or {}).values())
    async with Reader(bus, OUTCOMES, name="test-outcomes", start=1) as reader:
        found = [await reader.next(10.0) for _ in range(count)]
    return [(d.headers["Nats-Msg-Id"], d.message) for d in found]


async def no_duplicates_known(bus: Bus) -> None:
    """Makes the server forget message ids, as it does after two minutes."""
    config = (await bus.js.stream_info("EVENTS")).config
    config.duplicate_window = 0.1
    await bus.js.update_stream(config)
    alert = Alert(severity="info", check="test", message="Forgotten?", at=datetime.now(UTC))
    message = outgoing(ALERTS, alert, "info", "test", msg_id="the same")
    while (await bus.store(message)).duplicate:
        pass


async def test_what_a_crash_left_published_and_not_stored_is_not_said_twice(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection
) -> None:
    rows = walk(500)
    async with running(*CHAIN, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        await put(bus, rows[:FIRST], history=True)
        await read_until(bus, FEATURES, lambda blocks: bool(blocks))
        await serve(bus, archive, spoken(files()))
        await put(bus, rows[FIRST:], size=1)
        await read_until(bus, SIGNALS, lambda found: len(found) >= len(rows) - FIRST)
        await until(archive, "SELECT count(*) FROM model_signals", len(rows) - FIRST)
        last = (await bus.js.stream_info("FEATURES")).state.last_seq
        await until(archive, f"SELECT stream_seq = {last} FROM cursors WHERE reader = 'recorder.features'", True)
    other = await asyncpg.connect(pg_url)
    try:
        held = other.transaction()
        await held.start()
        await other.execute("LOCK TABLE signal_outcomes IN SHARE MODE")  # it may be read, and takes no row
        async with running(Scorer, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
            await read_until(bus, OUTCOMES, lambda found: len(found) >= len(rows) - FIRST - 5)
        await held.rollback()
    finally:
        await other.close()
    assert await archive.fetchval("SELECT count(*) FROM signal_outcomes") == 0, "stored, so nothing was proved"
    await no_duplicates_known(bus)
    async with running(Scorer, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        await settled(bus, archive)
    async with running(Scorer, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        await settled(bus, archive)
    found = await published(bus)
    in_order([o for _, o in found], [r.ts for r in rows[FIRST:-5]])
    assert await archive.fetchval("SELECT count(*) FROM signal_outcomes") == len(rows) - FIRST - 5


async def test_a_standby_goes_on_where_the_first_one_stopped(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection
) -> None:
    rows = walk(620)
    async with running(*CHAIN, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        await put(bus, rows[:FIRST], history=True)
        await read_until(bus, FEATURES, lambda blocks: bool(blocks))
        await serve(bus, archive, spoken(files()))
        async with contextlib.AsyncExitStack() as second:
            async with running(Scorer, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
                await second.enter_async_context(
                    running(Scorer, nats_url=nats_url, database_url=pg_url, settings=SETTINGS)
                )
                await put(bus, rows[FIRST:450], size=1)
                await until(archive, "SELECT count(*) >= 20 FROM signal_outcomes", True)
            await put(bus, rows[450:], size=1)
            await until(archive, "SELECT count(*) FROM signal_outcomes", len(rows) - FIRST - 5)
            await settled(bus, archive)
    found = await published(bus)
    in_order([o for _, o in found], [r.ts for r in rows[FIRST:-5]])
    assert len({name for name, _ in found}) == len(found)


async def test_a_correction_after_the_outcome_changes_it_and_voids_what_was_superseded(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection
) -> None:
    rows = walk(420)
    async with running(*CHAIN, Scorer, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        await put(bus, rows[:FIRST], history=True)
        await read_until(bus, FEATURES, lambda blocks: bool(blocks))
        await serve(bus, archive, spoken(files()))
        await put(bus, rows[FIRST:], size=1)
        await until(archive, "SELECT count(*) FROM signal_outcomes", len(rows) - FIRST - 5)
        before = {r["ts"]: r for r in await archive.fetch("SELECT * FROM signal_outcomes")}
        # Bar 380 had another close: its own features and all later ones change, and the labels of the five before it.
        better = msgspec.structs.replace(rows[380], close=rows[380].close - 0.0004, low=rows[380].low - 0.0004)
        await put(bus, [better])
        await until(archive, "SELECT count(*) FROM signal_outcomes WHERE void", len(rows) - 5 - 380)
        await settled(bus, archive)
        # An open that no feature sees: two trades are entered at it.
        opened = msgspec.structs.replace(rows[360], open=rows[360].low)
        await put(bus, [opened])
        await until(archive, "SELECT count(*) FROM candle_revisions", 2)
        await settled(bus, archive)
    corrected = [*rows[:360], opened, *rows[361:380], better, *rows[381:]]
    stands = await archive.fetch("SELECT * FROM signal_outcomes WHERE NOT void ORDER BY ts")
    assert [r["ts"] for r in stands] == [r.ts for r in rows[FIRST:-5]]
    for i, row in enumerate(stands, start=FIRST):
        agree(row, expected(corrected, i, row["prob_up"]))
        assert (row["id"] == before[row["ts"]]["id"]) == (i < 380)
    told = {o.signal_id: o for _, o in await published(bus)}  # the last word of each
    for row in stands:
        agree(told[row["id"]], {name: row[name] for name in ("ret", "gross", "net", "won", "candles_seq")})


async def test_a_shadow_is_scored_without_a_signal_and_its_corrections_too(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection
) -> None:
    rows = walk(420)
    silent = spoken(files(2))
    model = ServedModel(manifest_of(silent), silent[ONNX_FILE])
    async with running(*CHAIN, Scorer, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        await put(bus, rows[:FIRST], history=True)
        await read_until(bus, FEATURES, lambda blocks: bool(blocks))
        await serve(bus, archive, spoken(files()))
        version = await shadow(bus, archive, silent)
        await until(archive, "SELECT count(*) FROM models", 2)
        await put(bus, rows[FIRST:400], size=1)
        await until(archive, "SELECT count(*) > 0 FROM signal_outcomes WHERE state = 'shadow'", True)
        better = msgspec.structs.replace(rows[390], close=rows[390].close - 0.0004, low=rows[390].low - 0.0004)
        await put(bus, [better])
        await put(bus, rows[400:], size=1)
        await until(archive, f"SELECT max(ts) = '{rows[-6].ts}' FROM signal_outcomes WHERE state = 'shadow'", True)
        await settled(bus, archive)
    corrected = [*rows[:390], better, *rows[391:]]
    features = append(SeriesState("EURUSD", "M1"), corrected, LIVE).rows
    said = await archive.fetch("SELECT * FROM signal_outcomes WHERE state = 'shadow' AND NOT void ORDER BY ts")
    first = next(i for i, r in enumerate(rows) if r.ts == said[0]["ts"])
    assert first < FIRST + 20
    assert [r["ts"] for r in said] == [r.ts for r in rows[first:-5]]
    for i, row in enumerate(said, start=first):
        assert row["prob_up"] == model.prob_up("EURUSD", features[i])
        assert row["id"] == signal_id("EURUSD", "M1", rows[i].ts, version, features_hash("EURUSD", "M1", features[i]))
        agree(row, expected(corrected, i, row["prob_up"]))
    assert await archive.fetchval("SELECT count(*) FROM model_signals WHERE model_version = $1", version) == 0
    assert {o.state for _, o in await published(bus)} == {"champion", "shadow"}


async def test_evidence_reaches_the_trainer_and_is_asked_for_until_it_answers(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Little evidence is enough here, so that it comes of what chance there is; nobody hears the first questions."""
    rows = walk(700)
    settings = msgspec.structs.replace(
        SETTINGS, models=msgspec.structs.replace(TRUSTING.models, rollback_evidence=1.0001)
    )
    monkeypatch.setattr(judge, "ASK_AGAIN", 0.05)
    asked: asyncio.Queue[Msg] = asyncio.Queue()
    async with running(*CHAIN, Scorer, nats_url=nats_url, database_url=pg_url, settings=settings):
        await put(bus, rows[:FIRST], history=True)
        await read_until(bus, FEATURES, lambda blocks: bool(blocks))
        version = await serve(bus, archive, spoken(files()), base_rate=0.5)
        await put(bus, rows[FIRST:], size=20)
        await until(archive, "SELECT count(*) > 300 FROM signal_outcomes", True)
        subscription = await bus.nc.subscribe(DECIDE, cb=asked.put)
        async with asyncio.timeout(20):
            message = await asked.get()
        request = msgspec.json.decode(message.data, type=DecisionRequest)
        await message.respond(msgspec.json.encode(Verdict(ok=True, verdict="champion", message="Rolled back.")))
        await subscription.unsubscribe()
        await settled(bus, archive)
        kept = msgspec.json.decode(await archive.fetchval("SELECT docket::text FROM model_trials"), type=Docket)
    assert (request.action, request.version, request.against) == ("rollback", version, version)
    assert kept.standing is not None
    assert (kept.standing.kind, kept.standing.subject) == ("health", version)
    # Every bar whose outcome is known to all, once: the newest ten wait for more.
    assert kept.standing.seen.bars == len(rows) - FIRST - 5 - 10


async def test_the_scorecard_is_what_numpy_says_of_the_outcomes(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection
) -> None:
    rows = walk(1_300)
    settings = msgspec.structs.replace(
        SETTINGS,
        scorer=ScorerSettings(poll_seconds=0.02, window=800),
        gateway=Gateway(port=free_port()),
    )
    async with running(*CHAIN, Collector, Scorer, nats_url=nats_url, database_url=pg_url, settings=settings):
        await put(bus, rows[:FIRST], history=True)
        await read_until(bus, FEATURES, lambda blocks: bool(blocks))
        version = await serve(bus, archive, spoken(files()))
        await put(bus, rows[FIRST:], size=50)
        await until(archive, "SELECT count(*) FROM signal_outcomes", len(rows) - FIRST - 5)
        async with asyncio.timeout(30):
            while True:
                raw = await bus.request(SCORECARD, msgspec.json.encode(ScorecardRequest(symbol="EURUSD")))
                cards = msgspec.json.decode(raw, type=Scorecard).cards
                if cards and cards[0].last_ts == rows[-6].ts:
                    break
                await asyncio.sleep(0.1)
        async with aiohttp.ClientSession() as client:
            url = f"http://127.0.0.1:{settings.gateway.port}/scorecard"
            async with client.get(url, params={"model": version, "timeframe": "1m"}) as response:
                over_http = msgspec.json.decode(await response.read(), type=Scorecard)
            assert over_http.cards == cards
            async with client.get(url, params={"model": "rf_h1"}) as response:
                assert (await response.json()) == {"cards": [], "left_out": 0}
        nothing = msgspec.json.decode(await bus.request(SCORECARD, b'{"symbol": "GBPUSD"}'), type=Scorecard)
        wrong = msgspec.json.decode(await bus.request(SCORECARD, b'{"colour": 1}'))
    (card,) = cards
    assert nothing.cards == ()
    assert "no request for a scorecard" in wrong["error"]
    assert (card.model_version, card.symbol, card.timeframe, card.state) == (version, "EURUSD", "M1", "champion")
    stored = await archive.fetch("SELECT * FROM signal_outcomes ORDER BY ts DESC LIMIT 800")
    known = [r for r in stored if r["up"] is not None]
    up, prob = np.array([r["up"] for r in known]), np.array([r["prob_up"] for r in known])
    net = np.array([r["net"] for r in stored if r["net"] is not None])
    assert (card.outcomes, card.ties) == (len(known), 800 - len(known))
    assert (card.first_ts, card.last_ts) == (stored[-1]["ts"], stored[0]["ts"])
    close = pytest.approx
    assert card.brier == close(brier_score_loss(up, prob), rel=1e-12)
    assert card.log_loss == close(log_loss(up, prob), rel=1e-12)
    assert card.base_brier == close(brier_score_loss(up, np.full(len(up), 0.48)), rel=1e-12)
    assert card.brier_gain == close(card.base_brier - card.brier, abs=1e-15)
    assert card.rate == close(up.mean())
    assert card.hit_rate == close(np.mean([r["won"] for r in stored if r["label"]]))
    assert (card.trades, card.net_trades) == (sum(r["label"] != 0 for r in stored), len(net))
    assert card.net_mean == close(net.mean(), rel=1e-12)
    for interval, value in (
        (card.brier_ci, card.brier),
        (card.net_ci, card.net_mean),
        (card.hit_rate_ci, card.hit_rate),
    ):
        assert interval is not None
        assert interval[0] < value < interval[1]
    assert sum(b.count for b in card.calibration) == len(known)
    for b in card.calibration:
        inside = (prob >= b.low) & ((prob < b.high) | (b is card.calibration[-1]))
        assert (b.count, b.rate) == (int(inside.sum()), close(up[inside].mean()))


async def test_without_a_scorer_the_gateway_says_so(bus: Bus, nats_url: str) -> None:
    settings = Settings(gateway=Gateway(port=free_port()))
    url = f"http://127.0.0.1:{settings.gateway.port}/scorecard"
    async with (
        running(Collector, nats_url=nats_url, settings=settings),
        aiohttp.ClientSession() as client,
        client.get(url) as response,
    ):
        assert (response.status, response.headers["Retry-After"]) == (503, "2")
        assert "scorer does not answer" in (await response.json())["error"]


async def test_a_base_rate_that_no_longer_holds_is_told_once(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection
) -> None:
    rows = walk(900)
    settings = msgspec.structs.replace(
        SETTINGS, models=msgspec.structs.replace(TRUSTING.models, rollback_evidence=1e12)
    )
    async with running(*CHAIN, nats_url=nats_url, database_url=pg_url, settings=settings):
        await put(bus, rows[:FIRST], history=True)
        await read_until(bus, FEATURES, lambda blocks: bool(blocks))
        version = await serve(bus, archive, spoken(files()), base_rate=0.9)
        async with running(Scorer, nats_url=nats_url, database_url=pg_url, settings=settings):
            await put(bus, rows[FIRST:700], size=20)
            (alert,) = await read_until(bus, ALERTS, lambda found: bool(found))
            await put(bus, rows[700:720], size=1)
            await until(archive, "SELECT (docket->>'rate_told')::bool FROM model_trials", True)
        async with running(Scorer, nats_url=nats_url, database_url=pg_url, settings=settings):
            await put(bus, rows[720:], size=20)
            await read_until(bus, SIGNALS, lambda found: len(found) >= len(rows) - FIRST)
            await settled(bus, archive)
            again = int(await archive.fetchval("SELECT docket->'higher'->>'to' FROM model_trials"))
            await until(archive, "SELECT (docket->'higher'->>'bars')::int > 500 FROM model_trials", True)
    assert again > rows[700].ts.timestamp()
    assert (alert.severity, alert.check) == ("warning", "drift")
    assert f"Rises are less frequent than when {version} was trained" in alert.message
    info = await bus.js.stream_info("EVENTS", subjects_filter="alerts.>")
    assert info.state.subjects == {"alerts.warning.drift": 1}


async def test_inputs_unlike_the_trainings_are_told_once(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the range after training; fewer rows than the five days and 2,000 of a real window, to be quick."""
    monkeypatch.setattr(drift, "DAYS", 2)
    monkeypatch.setattr(drift, "ROWS", 600)
    calm = walk(1_000, start=START)
    last = calm[-1].close
    wild = [
        msgspec.structs.replace(
            c,
            ts=c.ts,
            open=last + 3 * (c.open - last),
            high=last + 3 * (c.high - last),
            low=last + 3 * (c.low - last),
            close=last + 3 * (c.close - last),
        )
        for c in walk(3_200, start=START)[1_000:]
    ]
    rows = [*calm, *wild]
    artifacts = spoken(files(), first_ts=rows[0].ts, last_ts=rows[999].ts)
    async with running(*CHAIN, Scorer, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        await put(bus, rows[:1_000], history=True)
        await read_until(bus, FEATURES, lambda blocks: bool(blocks))
        version = await serve(bus, archive, artifacts)
        await put(bus, rows[1_000:], size=100)
        found = await read_until(bus, ALERTS, lambda found: bool(found))
        await settled(bus, archive)
    info = await bus.js.stream_info("EVENTS", subjects_filter="alerts.>")
    assert info.state.subjects == {"alerts.warning.drift": 1}
    assert found[0].details["symbol"] == "EURUSD"
    assert found[0].details["version"] == version
    assert set(found[0].details["stability"]) == {"atr_close"}


async def test_a_champion_whose_files_are_damaged_is_to_be_rolled_back(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection
) -> None:
    settings = msgspec.structs.replace(SETTINGS, scorer=ScorerSettings(poll_seconds=0.02, audit_seconds=0.1))
    asked: asyncio.Queue[Msg] = asyncio.Queue()
    await bus.nc.subscribe(DECIDE, cb=asked.put)
    async with running(*CHAIN, Scorer, nats_url=nats_url, database_url=pg_url, settings=settings):
        version = await serve(bus, archive, spoken(files()))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asked.get(), 1.0)  # it looks ten times, and all is well
        await bus.put_object(f"rf_m1/{version}/{ONNX_FILE}", files(2)[ONNX_FILE])
        message = await asyncio.wait_for(asked.get(), 20.0)
        request = msgspec.json.decode(message.data, type=DecisionRequest)
        await message.respond(msgspec.json.encode(Verdict(ok=True, verdict="champion", message="Rolled back.")))
    assert (request.action, request.version, request.evidence["kind"]) == ("rollback", version, "integrity")
    assert request.reason.startswith("Its files no longer verify. ")


async def test_a_champion_that_no_longer_knows_its_market_is_to_be_rolled_back(
    bus: Bus, nats_url: str, pg_url: str, archive: asyncpg.Connection
) -> None:
    known = manifest_of(files()).outliers
    assert known is not None
    strange = msgspec.structs.replace(known, limit=0.0)  # as if no bar were like those that it learnt from
    rows = walk(FIRST + 1_020)
    asked: asyncio.Queue[Msg] = asyncio.Queue()
    await bus.nc.subscribe(DECIDE, cb=asked.put)
    async with running(*CHAIN, Scorer, nats_url=nats_url, database_url=pg_url, settings=SETTINGS):
        await put(bus, rows[:FIRST], history=True)
        await read_until(bus, FEATURES, lambda blocks: bool(blocks))
        version = await serve(bus, archive, spoken(files(), outliers=strange))
        await put(bus, rows[FIRST : FIRST + 1_000], size=100)
        await until(archive, "SELECT count(*) FROM signal_outcomes", 995)
        assert asked.empty(), "a thousand outcomes are needed"
        await put(bus, rows[FIRST + 1_000 :], size=20)
        message = await asyncio.wait_for(asked.get(), 20.0)
        await message.respond(msgspec.json.encode(Verdict(ok=True, verdict="champion", message="Rolled back.")))
    request = msgspec.json.decode(message.data, type=DecisionRequest)
    assert (request.action, request.version, request.evidence["kind"]) == ("rollback", version, "integrity")
    assert request.reason.startswith("100% of its newest 1,000 signals are out of distribution")
