"""Each check on what it looks at: PostgreSQL, PgBouncer, NATS, HTTP, a Docker socket, certificates, systemctl, the archive."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import psutil
import pytest
from aiohttp import web
from msgspec.structs import replace

from actors.monitor import maintenance
from actors.monitor.journal import Journal
from actors.monitor.probe_agents import AgentProbes
from actors.monitor.probe_database import DatabaseProbes
from actors.monitor.probe_endpoints import EndpointProbes, endpoint_name, gateway_of
from actors.monitor.probe_feeds import FeedProbes
from actors.monitor.probe_machine import MachineProbes
from actors.monitor.probe_nats import NatsProbes
from actors.monitor.probes import ACTORS, all_probes
from actors.monitor.watch import Probe, Watch
from bus.client import Bus, outgoing
from bus.permissions import users
from bus.store import Store
from bus.subjects import BACKUPS
from deploy.embedded import NatsServer, NatsUser
from schema.health import CheckResult
from schema.messages import BackupEvent
from schema.settings import Backup, Gateway, Health, Settings, Streams
from tests.builders import block, put, walk
from tests.mailbox import certificate
from tests.servers import nats_server, postgres_server

HOUR = 3_600


class Quiet:
    def __getattr__(self, _: str) -> Any:
        return lambda *words, **more: None


async def asked(probes: Sequence[Probe], names: Sequence[str] = (), timeout: float = 8.0) -> dict[str, CheckResult]:
    return {one.check: one for one in await Watch(probes, interval=30, timeout=timeout).once(names)}


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    made = Journal.open(tmp_path)
    yield made
    made.close()


@pytest.fixture
async def store(pg_url: str) -> Any:
    made = await Store.connect(pg_url, size=4)
    yield made
    await made.close()


# --- PostgreSQL ----------------------------------------------------------------------------------------------------


async def test_a_database_that_is_well(store: Store, journal: Journal, tmp_path: Path) -> None:
    health = Health(database_max_bytes=1024**3)
    probes = DatabaseProbes(store, None, health, tmp_path, journal)
    found = await asked(probes.probes())
    assert {name: one.status for name, one in found.items()} == {
        "database": "ok",
        "database.size": "ok",
        "database.growth": "skipped",
        "database.bloat": "ok",
        "database.partitions": "skipped",
        "database.maintenance": "skipped",
        "pgbouncer": "skipped",
    }
    assert found["database.size"].value is not None
    assert found["database.size"].value > 1_000_000
    probes.settings = replace(health, database_max_bytes=1_000_000)
    assert (await asked(probes.probes(), ["database.size"]))["database.size"].status == "critical"


async def test_growth_is_told_and_warns_before_the_room_is_used_up(
    store: Store, journal: Journal, tmp_path: Path
) -> None:
    from actors.monitor.probe_database import GROWTH, Grown

    row = (await store.fetch("health_size"))[0]
    before = Grown(time.time() - 12 * HOUR, 0, row["bytes"] - 1_000_000)
    import msgspec

    with journal.transaction():
        journal.set_place(GROWTH, msgspec.json.encode([before]).decode())
    probes = DatabaseProbes(store, None, Health(database_max_bytes=row["bytes"] + 1024**3), tmp_path, journal)
    found = (await asked(probes.probes(), ["database.growth"]))["database.growth"]
    assert found.status == "ok"
    assert "a day" in found.message
    probes.settings = Health(database_max_bytes=row["bytes"] + 10_000_000)
    found = (await asked(probes.probes(), ["database.growth"]))["database.growth"]
    assert found.status == "warning"
    assert "make room before then" in found.message


async def test_a_killed_and_a_frozen_postgresql_are_critical_and_heal(tmp_path: Path) -> None:
    with postgres_server(tmp_path / "pg") as server:
        store = await Store.connect(server.url, size=2)
        probes = DatabaseProbes(store, None, Health(), tmp_path, None).probes()
        try:
            assert (await asked(probes))["database"].status == "ok"
            pid = server.pid
            assert pid is not None
            family = [psutil.Process(pid), *psutil.Process(pid).children()]
            for process in family:
                process.send_signal(signal.SIGSTOP)
            began = time.monotonic()
            found = await asked(probes, timeout=1.5)
            assert time.monotonic() - began < 4
            assert found["database"].status == "critical"
            assert "hangs" in found["database"].message
            for process in family:
                process.send_signal(signal.SIGCONT)
            assert (await asked(probes))["database"].status == "ok"
            server.stop()
            found = await asked(probes)
            assert found["database"].status == "critical"
            assert "Nothing is lost" in found["database"].message
            assert server.url not in found["database"].message
            assert found["database.size"].status == "skipped", "one dead server is one critical check"
            server.start()
            assert (await asked(probes))["database"].status == "ok"
        finally:
            await store.close()


async def test_pgbouncer_is_told_apart_from_its_database(pg_url: str, pgbouncer_url: str, tmp_path: Path) -> None:
    direct, pooled = await Store.connect(pg_url, size=1), await Store.connect(pgbouncer_url, size=1)
    dead = await Store.connect(pgbouncer_url.replace(f":{urlsplit(pgbouncer_url).port}/", ":1/"), size=1)
    try:
        found = await asked(DatabaseProbes(direct, pooled, Health(), tmp_path, None).probes())
        assert (found["database"].status, found["pgbouncer"].status) == ("ok", "ok")
        found = await asked(DatabaseProbes(direct, dead, Health(), tmp_path, None).probes())
        assert (found["database"].status, found["pgbouncer"].status) == ("ok", "critical")
        # The nightly task works through it, too.
        done = await maintenance.maintain(pooled, Quiet())
        assert (done.error, done.tables > 10) == ("", True)
    finally:
        for store in (direct, pooled, dead):
            await store.close()


async def test_the_nightly_task_cleans_up_and_makes_partitions(
    store: Store, journal: Journal, pg_url: str, tmp_path: Path
) -> None:
    connection = await asyncpg.connect(pg_url)
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    try:
        await connection.execute("CREATE TABLE ticks (at timestamptz NOT NULL, v int) PARTITION BY RANGE (at)")
        await connection.execute(
            "CREATE TABLE ticks_old PARTITION OF ticks FOR VALUES FROM "
            f"('{(today - timedelta(days=3)).isoformat()}') TO ('{(today + timedelta(days=1)).isoformat()}')"
        )
        await connection.execute("CREATE TABLE junk AS SELECT n FROM generate_series(1, 60000) AS n")
        await connection.execute("DELETE FROM junk WHERE n > 20000")
        await connection.execute("SELECT pg_stat_force_next_flush()")
        probes = DatabaseProbes(store, None, Health(), tmp_path, journal).probes()
        found = await asked(probes)
        assert found["database.partitions"].status == "warning"
        assert (found["database.bloat"].status, "junk" in found["database.bloat"].message) == ("warning", True)
        done = await maintenance.maintain(store, Quiet())
        maintenance.keep(journal, done)
        assert (done.error, done.dead >= 40_000, done.partitions >= 8) == ("", True, True)
        await connection.execute("INSERT INTO ticks VALUES ($1, 1)", today + timedelta(days=34))
        assert (await maintenance.maintain(store, Quiet())).partitions == 0
        found = await asked(probes)
        assert found["database.partitions"].status == found["database.bloat"].status == "ok"
        assert found["database.maintenance"].status == "ok"
        assert "tables were vacuumed" in found["database.maintenance"].message
        maintenance.keep(journal, replace(done, at=done.at - timedelta(days=3)))
        assert (await asked(probes))["database.maintenance"].status == "warning"
        maintenance.keep(journal, replace(done, error="no room"))
        assert "no room" in (await asked(probes))["database.maintenance"].message
    finally:
        await connection.close()


# --- NATS ----------------------------------------------------------------------------------------------------------


async def test_nats_and_its_streams(bus: Bus, nats: NatsServer) -> None:
    probes = NatsProbes(bus, Settings(), ACTORS).probes()
    found = await asked(probes)
    assert {found[name].status for name in ("nats", "nats.publish", "nats.store", "nats.stream.CANDLES")} == {"ok"}
    assert {found[f"actor.{actor}"].status for actor in ACTORS} == {"critical"}, "none of them runs here"
    await bus.js.delete_stream("REJECTS")
    assert (await asked(probes, ["nats.stream"]))["nats.stream.REJECTS"].status == "critical"
    nats.stop()
    found = await asked(probes, timeout=3.0)
    assert (found["nats"].status, found["nats.publish"].status) == ("critical", "critical")
    assert found["nats.stream.look"].status == found["actor.look"].status == "skipped"
    nats.start()


async def test_a_full_stream_warns_only_where_it_refuses(bus: Bus) -> None:
    small = Streams(candles_max_bytes=145_000, derived_max_bytes=100_000)
    from bus import topology

    await topology.apply(bus, small)
    await put(bus, walk(1_000), size=50)
    found = await asked(NatsProbes(bus, Settings(streams=small), ()).probes(), ["nats.stream"])
    assert found["nats.stream.CANDLES"].status in ("warning", "critical")
    assert "[streams]" in found["nats.stream.CANDLES"].message
    assert found["nats.stream.FEATURES"].status == "ok"


async def test_the_monitors_own_user_may_do_all_of_it(tmp_path: Path, pg_url: str) -> None:
    """Under the rights that production gives it: a check that lacks one would be critical there for ever."""
    from bus import topology

    accounts = tuple(NatsUser(user.name, f"pw-{user.name}", user.publish, user.subscribe) for user in users())
    with nats_server(tmp_path / "nats", accounts) as server:
        operator = await Bus.connect(server.url("operator"), name="operator")
        await topology.apply(operator, Streams())
        await put(operator, walk(5), symbol="EURUSD.m")
        bus = await Bus.connect(server.url("health"), name="health")
        store = await Store.connect(pg_url, size=4)
        refused: list[str] = []
        try:
            settings = Settings(backup=Backup(schedule="02:00"), home=str(tmp_path))
            probes = all_probes(settings, tmp_path, bus=bus, store=store)
            found = await asked(probes)
            refused = [error for error in [str(bus.nc.last_error or "")] if "permissions" in error.lower()]
        finally:
            await bus.close()
            await operator.close()
            await store.close()
    assert not refused
    assert {found[name].status for name in ("nats", "nats.publish", "nats.store", "nats.stream.OBJ_models")} == {"ok"}
    assert found["backup.age"].message == "No backup has been made yet."
    assert found["feed"].status == "skipped"


# --- feeds ---------------------------------------------------------------------------------------------------------


async def archive_minutes(url: str, symbol: str, first: int, count: int, *, live: bool, delay: float = 1.0) -> None:
    """One bar a minute, each received ``delay`` seconds after its end."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(
            """INSERT INTO market_data (ts, symbol, timeframe, open, high, low, close, volume, spread, received_at,
                                        candles_seq, live)
               SELECT to_timestamp($1 + 60 * n), $2, 'M1', 1, 1, 1, 1, 1, 1, to_timestamp($1 + 60 * n + 60 + $3::float8), 1, $4
               FROM generate_series(0, $5 - 1) AS n""",
            first,
            symbol,
            delay,
            live,
            count,
        )
    finally:
        await connection.close()


async def test_a_live_series_is_stale_and_comes_back(store: Store, bus: Bus, pg_url: str) -> None:
    now = int(time.time()) // 60 * 60
    week = 8 * 24 * 60  # eight days: every hour of every day of the week is among them
    await archive_minutes(pg_url, "BTC.x", now - 60 * (week + 10), week, live=True)
    await archive_minutes(pg_url, "FILE", now - 60 * (week + 10), 500, live=True, delay=50 * HOUR)
    await archive_minutes(pg_url, "OLD", now - 60 * 500, 400, live=False)
    feeds = FeedProbes(bus, store, Settings(health=Health(stale_seconds=60.0)))
    found = await asked(feeds.probes())
    assert set(found) == {"feed", "feed.M1.BTC.x"}, "neither a replay nor history is a feed"
    assert found["feed.M1.BTC.x"].status == "critical"
    assert "open session have not come" in found["feed.M1.BTC.x"].message
    assert found["feed"].value == 1.0
    # The archive is behind, and the newest message of CANDLES is not: the feed is well.
    bar = walk(1, start=now - 60)
    await put(bus, bar, symbol="BTC.x", replay=False, received_at=datetime.now(UTC))
    found = await asked(feeds.probes())
    assert found["feed.M1.BTC.x"].status == "ok"


async def test_without_the_archive_the_stream_tells(bus: Bus) -> None:
    now = int(time.time()) // 60 * 60
    await put(bus, walk(1, start=now - 60), symbol="LIVE", replay=False, received_at=datetime.now(UTC))
    await put(bus, walk(1, start=now - 60), symbol="REPLAYED")
    dead = await Store.connect("postgresql://mt5:x@127.0.0.1:1/mt5", size=1)
    try:
        found = await asked(FeedProbes(bus, dead, Settings()).probes())
        assert found["feed.M1.LIVE"].status == "ok"
        assert "feed.M1.REPLAYED" not in found
        found = await asked(FeedProbes(None, dead, Settings()).probes())
        assert found["feed"].status == "skipped"
    finally:
        await dead.close()


async def test_many_series_cost_little_and_are_bounded(
    store: Store, pg_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actors.monitor import probe_feeds

    connection = await asyncpg.connect(pg_url)
    now = int(time.time()) // 60 * 60
    await connection.execute(
        """INSERT INTO market_data (ts, symbol, timeframe, open, high, low, close, volume, spread, received_at, candles_seq)
           SELECT to_timestamp($1 - 60 * n), 'S' || s, 'M1', 1, 1, 1, 1, 1, 1, to_timestamp($1 - 60 * n + 61), 1
           FROM generate_series(1, 20) AS n, generate_series(1, 1500) AS s""",
        now,
    )
    await connection.close()
    feeds = FeedProbes(None, store, Settings())
    found = await asked(feeds.probes())
    assert len(found) == probe_feeds.MOST_SERIES + 1
    assert {one.status for one in found.values()} == {"ok"}
    assert len(feeds.feeds) == probe_feeds.MOST_SERIES
    # All of them overdue at once: a beat learns the sessions of some only.
    await store.pool.execute(
        "UPDATE market_data SET ts = ts - interval '1 hour', received_at = received_at - interval '1 hour'"
    )
    learning = FeedProbes(None, store, Settings())
    monkeypatch.setattr(probe_feeds, "MOST_LEARNT", 4)
    await asked(learning.probes())
    assert sum(feed.calendar is not None for feed in learning.feeds.values()) == 4


# --- models and backups --------------------------------------------------------------------------------------------


async def test_models_and_backups_have_an_age(bus: Bus, store: Store, journal: Journal) -> None:
    settings = Settings(backup=Backup(target="backup@host:/there"))
    probes = AgentProbes(bus, store, settings, journal).probes()
    found = await asked(probes)
    assert (found["model"].status, found["backup.age"].status, found["outbox"].status) == ("skipped", "skipped", "ok")
    made = datetime.now(UTC) - timedelta(days=60)
    for name, version, state in (("rf_m1", "v1", "champion"), ("rf_m1", "v2", "shadow"), ("rf_h1", "v1", "retired")):
        await store.execute("upsert_model", name, version, "M1", state, made, "{}")
    found = await asked(probes, ["model"])
    assert set(found) == {"model.rf_m1"}
    assert found["model.rf_m1"].status == "warning"

    async def say(event: Any, hours: float, size: int = 0, error: str = "") -> None:
        message = BackupEvent(
            event=event, backup="2026-03-01", at=datetime.now(UTC) - timedelta(hours=hours), bytes=size, error=error
        )
        ready = outgoing(BACKUPS, message, event, msg_id=f"{event}-{hours}")
        await bus.store(ready)

    await say("made", 3, 5_000)
    assert (await asked(probes, ["backup"]))["backup.age"].status == "skipped", "it is on this machine only"
    await say("shipped", 2)
    found = await asked(probes, ["backup"])
    assert (found["backup.age"].status, found["backup.size"].value) == ("ok", 5_000.0)
    with journal.transaction():
        journal.record([replace(found["backup.size"], value=float(size)) for size in (5_000, 5_200, 5_100)])
    await say("made", 1, 900)
    assert (await asked(probes, ["backup"]))["backup.size"].status == "warning"
    await say("failed", 0.5, error="no route to host")
    found = await asked(probes, ["backup.age"])
    assert (found["backup.age"].status, "no route to host" in found["backup.age"].message) == ("warning", True)
    old = AgentProbes(bus, store, replace(settings, health=Health(backup_hours=1.0)), journal).probes()
    assert (await asked(old, ["backup.age"]))["backup.age"].status == "critical"


# --- this machine --------------------------------------------------------------------------------------------------


async def test_disks_by_their_share(tmp_path: Path) -> None:
    room = os.statvfs(tmp_path)
    share = room.f_bavail / room.f_blocks
    other = tmp_path / "a" / tmp_path.name
    other.mkdir(parents=True)
    health = Health(disks=(str(tmp_path), str(other), "/no/such/folder"), disk_free=0.000001, disk_critical=0.0000001)
    found = await asked(MachineProbes(health, tmp_path).probes(), ["disk"])
    assert {name: one.status for name, one in found.items()} == {
        "disk.home": "ok",
        f"disk.{tmp_path.name}": "ok",
        f"disk.{tmp_path.name}-2": "ok",
        "disk.folder": "critical",
    }
    tight = Health(disk_free=min(0.999, share + 0.2 * (1 - share)), disk_critical=0.0000001)
    assert (await asked(MachineProbes(tight, tmp_path).probes(), ["disk.home"]))["disk.home"].status == "warning"
    full = Health(disk_free=0.9999, disk_critical=0.9998)
    assert (await asked(MachineProbes(full, tmp_path).probes(), ["disk.home"]))["disk.home"].status == "critical"


async def test_certificates_of_files_and_servers(tmp_path: Path) -> None:
    import asyncio

    fresh, fresh_file = certificate(tmp_path / "fresh", days=90)
    _, soon_file = certificate(tmp_path / "soon", days=10)
    _, last_file = certificate(tmp_path / "last", days=2)
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=fresh)
    place = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    (tmp_path / "none.pem").write_text("no certificate")
    files = (str(fresh_file), str(soon_file), str(last_file), str(tmp_path / "none.pem"), "127.0.0.1:1", place)
    try:
        found = await asked(MachineProbes(Health(certificates=files), tmp_path).probes(), ["certificate"])
    finally:
        server.close()
        await server.wait_closed()
    assert [found[f"certificate.{name}"].status for name in files] == [
        "ok",
        "warning",
        "critical",
        "critical",
        "critical",
        "ok",
    ]
    assert 88 < (found[f"certificate.{place}"].value or 0) < 91


def container(name: str, state: str, status: str, project: str = "mt5") -> dict[str, Any]:
    return {"Names": [f"/{name}"], "State": state, "Status": status, "Labels": {"com.docker.compose.project": project}}


async def test_containers_by_dockers_socket(tmp_path: Path) -> None:
    listed = [
        container("mt5-nats-1", "running", "Up 2 hours (healthy)"),
        container("mt5-postgres-1", "exited", "Exited (137) 3 seconds ago"),
        container("mt5-recorder-1", "running", "Up 2 hours (unhealthy)"),
        container("mt5-emitter-1", "running", "Up 1 second (health: starting)"),
        container("blog", "exited", "Exited (0) 2 years ago", project="blog"),
    ]

    async def answer(request: web.Request) -> web.Response:
        assert request.query["all"] == "1"
        return web.json_response(listed)

    app = web.Application()
    app.add_routes([web.get("/containers/json", answer)])
    runner = web.AppRunner(app)
    await runner.setup()
    socket = tmp_path / "docker.sock"
    await web.UnixSite(runner, str(socket)).start()
    try:
        found = await asked(MachineProbes(Health(docker_socket=str(socket)), tmp_path).probes(), ["container"])
        assert {name: one.status for name, one in found.items()} == {
            "container.mt5-nats-1": "ok",
            "container.mt5-postgres-1": "critical",
            "container.mt5-recorder-1": "critical",
            "container.mt5-emitter-1": "skipped",
        }
        named = Health(docker_socket=str(socket), containers=("blog", "gone"))
        found = await asked(MachineProbes(named, tmp_path).probes(), ["container"])
        assert {name: one.status for name, one in found.items()} == {
            "container.blog": "critical",
            "container.gone": "critical",
        }
    finally:
        await runner.cleanup()
    found = await asked(MachineProbes(Health(docker_socket=str(tmp_path / "none")), tmp_path).probes(), ["container"])
    assert found["container"].status == "skipped"


async def test_the_runner_by_systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "systemctl"
    program.parent.mkdir()
    monkeypatch.setenv("PATH", str(program.parent))
    probes = MachineProbes(Health(), tmp_path).probes()
    assert (await asked(probes, ["runner"]))["runner"].status == "skipped", "no systemd"

    def answers(units: str, states: str) -> None:
        program.write_text(
            f'#!/bin/sh\ncase "$1" in\nlist-unit-files) printf "{units}" ;;\nis-active) printf "{states}"; exit 3 ;;\nesac\n'
        )
        program.chmod(0o755)

    answers("", "")
    assert (await asked(probes, ["runner"]))["runner"].status == "skipped", "no unit of that name"
    two = "actions.runner.a.service enabled enabled\\nactions.runner.b.service enabled enabled\\n"
    answers(two, "active\\nfailed\\n")
    found = await asked(probes, ["runner"])
    assert {name: one.status for name, one in found.items()} == {
        "runner.actions.runner.a": "ok",
        "runner.actions.runner.b": "critical",
    }
    assert "systemctl restart actions.runner.b.service" in found["runner.actions.runner.b"].message
    answers(two, "")
    assert (await asked(probes, ["runner"]))["runner"].status == "warning"


async def test_endpoints_answer_or_not() -> None:
    seen: list[str | None] = []

    async def health(request: web.Request) -> web.Response:
        seen.append(request.headers.get("X-API-Key"))
        return web.json_response({}, status=503 if "down" in request.query else 200)

    app = web.Application()
    app.add_routes([web.get("/health", health)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    (address,) = runner.addresses
    base = f"http://127.0.0.1:{address[1]}"
    paths = ("/health", "/health?down=1", "/nothing", f"{base}/health?token=secret")
    settings = Settings(health=Health(endpoints=paths), gateway=Gateway(api_keys=("ours", "other")))
    try:
        found = await asked(EndpointProbes(settings, base).probes())
    finally:
        await runner.cleanup()
    assert {name: one.status for name, one in found.items()} == {
        "endpoint./health": "ok",
        "endpoint./health-2": "critical",
        "endpoint./nothing": "critical",
        "endpoint.127.0.0.1/health": "ok",
    }
    assert sorted(map(str, seen)) == ["None", "ours", "ours"], "our key is nobody else's business"
    found = await asked(EndpointProbes(settings, base).probes())
    assert {one.status for one in found.values()} == {"critical"}
    assert (await asked(EndpointProbes(settings, None).probes()))["endpoint./health"].status == "skipped"


def test_names_and_the_gateways_url() -> None:
    assert endpoint_name("/signals?timeframe=M1&limit=1") == "endpoint./signals"
    assert endpoint_name("https://example.org:8443/health?key=x") == "endpoint.example.org/health"
    assert gateway_of(Settings(gateway=Gateway(host="0.0.0.0", port=8001))) == "http://127.0.0.1:8001"
    assert gateway_of(Settings(gateway=Gateway(host="::1", port=8001))) == "http://[::1]:8001"
    assert gateway_of(Settings(gateway=Gateway(port=0))) is None
    assert gateway_of(Settings(health=Health(gateway="https://mt5.example.org/"))) == "https://mt5.example.org"


def test_a_block_of_the_archive_is_no_live_bar() -> None:
    assert block(walk(1)).replay, "what tests put on the stream is a replay unless they say otherwise"
