"""Making and shipping backups: on a real PostgreSQL, nats-server and sshd."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import psutil
import pyrage
import pytest
import structlog
from msgspec.structs import replace

from actors.core.backups import Step, compare
from actors.vault import crypt, files, snapshots
from actors.vault import make as maker
from actors.vault.dump import libpq_environment, table_entries
from actors.vault.make import (
    BackupBusy,
    BackupFailed,
    folder_of,
    make,
    read_manifest,
    silent,
    the_only_one,
    write_manifest,
)
from actors.vault.places import LocalPlace, PlaceFailed, open_place
from actors.vault.work import BackupRequest, Run
from bus.client import Bus
from bus.subjects import BACKUPS, CANDLES
from deploy.embedded import PostgresServer
from deploy.pginstall import installs
from schema.backup import DUMP, FILES, MANIFEST, STREAMS, BackupManifest
from schema.messages import BackupEvent, Candle, CandleBlock
from schema.settings import Backup, Settings
from tests.conftest import missing
from tests.servers import ROOT
from tests.sshd import PROGRAM, Sshd, sshd_server

AT = datetime(2024, 1, 2, tzinfo=UTC)
LOG = structlog.get_logger("test")


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    if PROGRAM is None:
        missing("sshd is not installed: apt-get install openssh-server")
    with sshd_server(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def home(tmp_path: Path) -> Path:
    made = tmp_path / "var"
    (made / "logs").mkdir(parents=True)
    (made / "keys").mkdir(mode=0o700)
    (made / "keys" / "models.key").write_text("secret")
    (made / "logs" / "up.log").write_text("it was ready\n")
    return made


@pytest.fixture
def settings(home: Path, postgres: PostgresServer) -> Settings:
    bins = {str(major): str(folder) for major, folder in installs().items()}
    return Settings(home=str(home), backup=Backup(postgres_bins=bins))


async def fill(url: str, rows: int = 500) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(
            """INSERT INTO market_data (ts, symbol, timeframe, open, high, low, close, volume, spread, received_at, candles_seq)
               SELECT '2024-01-01Z'::timestamptz + i * interval '1 min', 'EURUSD', 'M1', random(), 2, 0, random() / 3, i, 1,
                      '2024-02-01Z', i
               FROM generate_series(1, $1::int) i""",
            rows,
        )
    finally:
        await connection.close()


async def publish(bus: Bus, count: int) -> None:
    for number in range(count):
        candle = Candle(ts=AT + timedelta(minutes=number), open=1.0, high=1.0, low=1.0, close=1.0, volume=1.0)
        block = CandleBlock(symbol="EURUSD", timeframe="M1", rows=(candle,), received_at=datetime.now(UTC))
        await bus.publish(CANDLES, block, "M1", "EURUSD", msg_id=str(number))


async def made(
    home: Path, settings: Settings, bus: Bus, url: str, tell: Callable[[Step], None] = silent
) -> BackupManifest:
    with the_only_one(home):
        return await make(home=home, settings=settings, bus=bus, database_url=url, tell=tell)


def run_of(home: Path, settings: Settings, bus: Bus, url: str, **request: Any) -> Run:
    return Run(home, settings, bus, url, silent, LOG, BackupRequest(**request))


async def events(bus: Bus) -> list[BackupEvent]:
    """Everything that was told of backups so far."""
    subscription = await bus.js.subscribe(BACKUPS.wildcard, ordered_consumer=True)
    found = []
    with contextlib.suppress(TimeoutError):
        while True:
            found.append(BACKUPS.decode((await subscription.next_msg(timeout=0.5)).data))
    await subscription.unsubscribe()
    return found


# --- making --------------------------------------------------------------------------------------------------------


async def test_a_backup_holds_what_its_manifest_says(home: Path, settings: Settings, bus: Bus, pg_url: str) -> None:
    await fill(pg_url)
    await publish(bus, 20)
    steps: list[Step] = []
    manifest = await made(home, settings, bus, pg_url, steps.append)
    folder = folder_of(home) / manifest.name
    assert read_manifest(folder) == manifest
    assert compare(manifest, files.entries(folder)) == []
    tables = {table.name: table for table in manifest.tables}
    assert tables["market_data"].rows == 500
    assert tables["market_data"].content != tables["features"].content == "0" * 32
    streams = {stream.name: stream for stream in manifest.streams}
    assert (streams["CANDLES"].messages, streams["CANDLES"].first_seq, streams["CANDLES"].last_seq) == (20, 1, 20)
    assert {"FEATURES", "SIGNALS", "EVENTS", "KV_feature_state", "KV_clock", "OBJ_models"} <= streams.keys()
    assert not {"KV_owners", "PROBE"} & streams.keys()
    # The log reaches further than what the database was told.
    assert manifest.newest is not None
    assert datetime.now(UTC) - manifest.newest < timedelta(minutes=5)
    assert manifest.postgres.partition(".")[0] == manifest.pg_dump.partition(".")[0]
    assert manifest.migration.startswith("00")
    assert {step.stage for step in steps} >= {"database", "stream CANDLES", "files", "checksums"}


async def test_a_backup_is_for_this_user_only(home: Path, settings: Settings, bus: Bus, pg_url: str) -> None:
    manifest = await made(home, settings, bus, pg_url)
    for path in [folder_of(home), *(folder_of(home) / manifest.name).rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


async def test_the_dump_the_counts_and_the_hashes_are_of_one_moment(
    home: Path, settings: Settings, bus: Bus, pg_url: str, pg_empty_url: str
) -> None:
    """Somebody writes, changes and deletes all the while; what is restored is what the manifest says all the same."""
    await fill(pg_url, 20_000)
    writer = await asyncpg.connect(pg_url)
    stop = asyncio.Event()

    async def write() -> int:
        number = 0
        while not stop.is_set():
            number += 1
            await writer.execute(
                """INSERT INTO market_data (ts, symbol, timeframe, open, high, low, close, volume, spread, received_at,
                                            candles_seq)
                   VALUES (now() + $1::int * interval '1 min', 'GBPUSD', 'M1', 1, 1, 1, 1, 1, 1, now(), $1)""",
                number,
            )
            await writer.execute(
                "UPDATE market_data SET close = random(), revision = revision + 1 WHERE volume = $1", number
            )
            await writer.execute("DELETE FROM market_data WHERE volume = $1", 20_001 - number)
        return number

    writing = asyncio.create_task(write())
    try:
        manifest = await made(home, settings, bus, pg_url)
    finally:
        stop.set()
        assert await writing > 3, "nothing was written meanwhile: the test shows nothing"
        await writer.close()
    major = int(manifest.postgres.partition(".")[0])
    restore = subprocess.run(
        [installs()[major] / "pg_restore", "--no-password", "--exit-on-error", f"--dbname={pg_empty_url.rpartition('/')[2]}",
         folder_of(home) / manifest.name / DUMP],
        env=libpq_environment(pg_empty_url),
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert restore.returncode == 0, restore.stderr
    connection = await asyncpg.connect(pg_empty_url)
    try:
        async with connection.transaction(readonly=True):
            assert await table_entries(connection) == manifest.tables
    finally:
        await connection.close()


async def test_a_tables_hash_is_of_its_rows_and_not_of_their_order(pg_empty_url: str) -> None:
    connection = await asyncpg.connect(pg_empty_url)
    await connection.execute(
        'CREATE SCHEMA "o.ther"; CREATE TABLE "o.ther"."T" (r int, t text, f float8, j jsonb, at timestamptz)'
    )

    async def of(*rows: str) -> tuple[int, str]:
        await connection.execute('TRUNCATE "o.ther"."T"')
        for row in rows:
            await connection.execute(f'INSERT INTO "o.ther"."T" VALUES {row}')
        async with connection.transaction(readonly=True):
            (entry,) = await table_entries(connection)
        assert entry.name == "o.ther.T"
        return entry.rows, entry.content

    one = "(1, 'a', 0.1, '{\"b\": 1, \"a\": 2}', '2024-01-01Z')"
    two = "(2, 'b', 'NaN', NULL, NULL)"
    try:
        both = await of(one, two)
        await connection.execute("SET timezone = 'Asia/Tokyo'; SET extra_float_digits = -10; SET datestyle = 'German'")
        assert await of(two, one) == both
        others = [
            await of(one),
            await of(one, one),
            await of(one, two, two),
            await of(one.replace("'a'", "'b'"), two.replace("'b'", "'a'")),  # the same values, in other rows
            await of(one.replace("0.1", "0.10000000000000002"), two),
            await of(one, two.replace("NULL, NULL", "NULL, '2024-01-01Z'")),
        ]
        assert len({both, *others}) == 7
    finally:
        await connection.close()


async def test_nothing_is_left_of_a_backup_that_fails(home: Path, settings: Settings, bus: Bus, pg_url: str) -> None:
    without = replace(settings, backup=replace(settings.backup, postgres_bins={}))
    with pytest.raises(
        BackupFailed, match=r"^No backup was made\. The database is PostgreSQL \d+ and no pg_dump .* is here"
    ):
        await made(home, without, bus, pg_url)
    broken = replace(settings, backup=replace(settings.backup, postgres_bins={"99": str(home)}))
    with pytest.raises(BackupFailed, match="pg_dump cannot be started"):
        await made(home, broken, bus, pg_url)
    with pytest.raises(BackupFailed, match=r"MT5_DATABASE_DIRECT_URL") as told:
        await made(home, settings, bus, "postgresql://me:hidden@127.0.0.1:1/db")
    assert "hidden" not in str(told.value)
    assert {path.name for path in folder_of(home).iterdir()} == {".lock"}


async def test_a_cancelled_backup_leaves_nothing_and_no_program(
    home: Path, settings: Settings, bus: Bus, pg_url: str
) -> None:
    await fill(pg_url, 50_000)
    seen = asyncio.Event()
    making = asyncio.create_task(made(home, settings, bus, pg_url, lambda step: seen.set()))
    await seen.wait()
    await asyncio.sleep(0)
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    assert {path.name for path in folder_of(home).iterdir()} == {".lock"}
    assert not [one for one in psutil.process_iter(["cmdline"]) if str(home) in " ".join(one.info["cmdline"] or ())]


async def test_a_disk_without_room_is_told_before_anything_is_written(
    home: Path, settings: Settings, bus: Bus, pg_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maker, "SPARE_BYTES", 10**18)
    with pytest.raises(
        BackupFailed, match=r"^No backup was made: it may need \d\.\d GB, and of .* GB free .* must stay so"
    ):
        await made(home, settings, bus, pg_url)
    assert {path.name for path in folder_of(home).iterdir()} == {".lock"}


async def test_what_a_killed_maker_left_goes_away_with_the_next_one(home: Path) -> None:
    left = folder_of(home) / ".making-2024-01-01-abcd"
    left.mkdir(parents=True)
    with the_only_one(home) as backups:
        assert not left.exists()
        with pytest.raises(BackupBusy, match="Another process makes a backup"), the_only_one(home):
            pass
    assert backups == folder_of(home)


async def test_a_stream_that_the_server_does_not_have_is_told(bus: Bus, tmp_path: Path) -> None:
    with pytest.raises(snapshots.SnapshotFailed, match="stream not found"):
        await snapshots.snapshot(bus, "NOTHING", tmp_path)


async def test_a_snapshot_of_many_chunks_is_what_the_server_sent(bus: Bus, tmp_path: Path) -> None:
    """More than the server sends unacknowledged: it goes on only because each chunk is acknowledged."""
    for _ in range(24):
        await bus.js.publish("$O.models.C.test", os.urandom(700_000), stream="OBJ_models")
    sizes: list[int] = []
    taken = await snapshots.snapshot(bus, "OBJ_models", tmp_path, sizes.append)
    size = (tmp_path / "OBJ_models.snapshot").stat().st_size
    assert size == sizes[-1] > 24 * 690_000
    assert taken.entry.messages == 24
    described = json.loads((tmp_path / "OBJ_models.json").read_text())
    assert described["config"]["name"] == "OBJ_models"
    assert described["state"]["last_seq"] == 24


def test_effects_come_before_causes_and_candles_behind_all_that_is_made_of_them() -> None:
    order = snapshots.in_order(
        ["PROBE", "KV_clock", "CANDLES", "MINE", "EVENTS", "FEATURES", "KV_owners", "SIGNALS", "OBJ_models", "REJECTS"]
    )
    assert order == ["SIGNALS", "EVENTS", "OBJ_models", "FEATURES", "MINE", "REJECTS", "CANDLES", "KV_clock"]


# --- files ---------------------------------------------------------------------------------------------------------


def opened(archive: Path) -> dict[str, bytes | None]:
    with tarfile.open(archive) as tar:
        return {
            member.name: file.read() if (file := tar.extractfile(member)) is not None and member.isfile() else None
            for member in tar
        }


def test_the_files_of_a_home_and_their_places(home: Path, tmp_path: Path) -> None:
    data, config = tmp_path / "grafana", tmp_path / "mine.toml"
    data.mkdir()
    (data / "dashboard").write_text("d")
    config.write_text("[log]\n")
    version = home / "models" / "rf_m1" / "v1"
    version.mkdir(parents=True)
    (version / "model.pkl").write_bytes(b"pickle")
    (home / "models" / "rf_m1.pkl").symlink_to(
        version / "model.pkl"
    )  # an absolute link, which stays right as a relative one
    (home / "models" / "elsewhere").symlink_to("/etc/hostname")
    (home / "models" / "rf_m1" / ".run-x").mkdir()
    (home / "models" / "rf_m1" / ".run-x" / "rows").write_text("half")
    for foreign in ("nats", "postgres", "run", "backups"):
        (home / foreign).mkdir()
        (home / foreign / "state").write_text("x")
    packed = files.pack(
        tmp_path / FILES, home, configuration=config, in_force=b'{"a": 1}', data=[str(data), str(tmp_path / "gone")]
    )
    found = opened(tmp_path / FILES)
    assert found["home/keys/models.key"] == b"secret"
    assert found["home/logs/up.log"] == b"it was ready\n"
    assert found["configuration/mt5.toml"] == b"[log]\n"
    assert found["configuration/settings.json"] == b'{"a": 1}'
    assert found["data/0/dashboard"] == b"d"
    assert json.loads(found["data/places.json"] or b"") == [str(data), str(tmp_path / "gone")]
    assert not [
        name for name in found if ".run-" in name or name.startswith(("home/nats", "home/postgres", "home/backups"))
    ]
    with tarfile.open(tmp_path / FILES) as tar:
        assert tar.getmember("home/models/rf_m1.pkl").linkname == "rf_m1/v1/model.pkl"
        assert tar.getmember("home/keys").mode == 0o700
    assert packed.left_out == [
        f"{home}/models/elsewhere points outside (/etc/hostname)",
        f"{tmp_path}/gone does not exist",
    ]


def test_a_file_that_grows_or_shrinks_while_it_is_read_spoils_nothing(home: Path, tmp_path: Path) -> None:
    grows, shrinks, last = (home / "logs" / name for name in ("1.log", "2.log", "3.log"))
    grows.write_bytes(b"g" * 3_000_000)
    shrinks.write_bytes(b"s" * 3_000_000)
    last.write_bytes(b"end")

    def meddle(read: int) -> None:
        if 1_000_000 < read < 2_000_000:
            with grows.open("ab") as file:
                file.write(b"more")
        if read > 4_000_000:
            os.truncate(shrinks, 10)

    files.pack(tmp_path / FILES, home, read=meddle)
    found = opened(tmp_path / FILES)
    assert found["home/logs/1.log"] == b"g" * 3_000_000
    cut = found["home/logs/2.log"]
    assert cut is not None
    assert len(cut) == 3_000_000
    assert cut.rstrip(b"\0") == b"s" * len(cut.rstrip(b"\0"))
    assert cut.endswith(b"\0")
    assert found["home/logs/3.log"] == b"end"


WRITER = """
import sqlite3, sys, time
c = sqlite3.connect(sys.argv[1], isolation_level=None)
c.execute("PRAGMA journal_mode=WAL")
c.execute("CREATE TABLE t (a INTEGER, b INTEGER)")
c.execute("INSERT INTO t VALUES (0, 0)")
print("ready", flush=True)
n = 0
while True:
    n += 1
    c.execute("BEGIN")
    c.execute("UPDATE t SET a = ?", (n,))
    c.execute("UPDATE t SET b = ?", (n,))
    c.execute("COMMIT")
    if n == 50:
        print("busy", flush=True)
"""


def test_the_copy_of_a_database_that_is_being_written_is_of_one_moment(home: Path, tmp_path: Path) -> None:
    database = home / "health_checks.db"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(database)], stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None
            assert [writer.stdout.readline() for _ in range(2)] == ["ready\n", "busy\n"]
            files.pack(tmp_path / FILES, home)
        finally:
            writer.kill()
    found = opened(tmp_path / FILES)
    assert not [name for name in found if name.endswith(("-wal", "-shm"))]
    copy = tmp_path / "copy.db"
    copy.write_bytes(found["home/health_checks.db"] or b"")
    with contextlib.closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        a, b = connection.execute("SELECT a, b FROM t").fetchone()
    assert a == b >= 50


def test_a_name_that_ends_like_a_databases_log_is_kept_where_it_is_none(home: Path, tmp_path: Path) -> None:
    (home / "logs" / "notes-wal").write_text("kept")
    files.pack(tmp_path / FILES, home)
    assert opened(tmp_path / FILES)["home/logs/notes-wal"] == b"kept"


# --- encryption ----------------------------------------------------------------------------------------------------


def backup(folder: Path, name: str = "2024-01-02", size: int = 1_000) -> tuple[Path, BackupManifest]:
    """A backup of nothing in particular, as a folder with a true manifest."""
    made_of = folder / name
    (made_of / STREAMS).mkdir(parents=True)
    (made_of / DUMP).write_bytes(os.urandom(size))
    (made_of / STREAMS / "A.snapshot").write_bytes(b"a" * 10)
    (made_of / FILES).write_bytes(gzip.compress(b"f"))
    manifest = BackupManifest(
        version=1, name=name, created_at=AT, seconds=1.0, home="/h", program="0", postgres="18", pg_dump="18",
        nats_server="2.15", migration="", timescaledb=None, newest=None, files=files.entries(made_of), tables=(), streams=(),
    )  # fmt: skip
    write_manifest(made_of, manifest)
    return made_of, manifest


def test_what_was_encrypted_comes_back_with_the_key_only(tmp_path: Path) -> None:
    folder, manifest = backup(tmp_path, size=300_000)
    key = pyrage.x25519.Identity.generate()
    sealed_in, plain_in = tmp_path / "sealed", tmp_path / "plain"
    sealed_in.mkdir()
    plain_in.mkdir()
    sealed = crypt.seal(folder, manifest, sealed_in, str(key.to_public()))
    assert sealed.encrypted == str(key.to_public())
    assert compare(sealed, files.entries(sealed_in)) == []
    assert all((sealed_in / entry.path).read_bytes().startswith(b"age-encryption.org/v1") for entry in sealed.files)
    assert crypt.unseal(sealed_in, sealed, plain_in, [key]) == manifest
    assert compare(manifest, files.entries(plain_in)) == []
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(crypt.CannotDecrypt, match=r"^database.dump is encrypted to age1.* cannot be decrypted"):
        crypt.unseal(sealed_in, sealed, other, [pyrage.x25519.Identity.generate()])


@pytest.mark.parametrize("spoil", ["cut", "flip"])
def test_an_encrypted_file_that_is_damaged_is_named(tmp_path: Path, spoil: str) -> None:
    folder, manifest = backup(tmp_path, size=300_000)
    key = pyrage.x25519.Identity.generate()
    sealed_in, plain_in = tmp_path / "sealed", tmp_path / "plain"
    sealed_in.mkdir()
    plain_in.mkdir()
    sealed = crypt.seal(folder, manifest, sealed_in, str(key.to_public()))
    data = bytearray((sealed_in / DUMP).read_bytes())
    if spoil == "cut":
        del data[-70_000:]
    else:
        data[200_000] ^= 1
    (sealed_in / DUMP).write_bytes(data)
    with pytest.raises(crypt.CannotDecrypt, match=r"^database.dump is damaged"):
        crypt.unseal(sealed_in, sealed, plain_in, [key])


def test_a_key_file_is_read_as_age_writes_it_and_refused_where_others_may_read_it(tmp_path: Path) -> None:
    key = pyrage.x25519.Identity.generate()
    file = tmp_path / "key.txt"
    file.write_text(f"# created: 2024-01-01\n# public key: {key.to_public()}\n{key}\n")
    file.chmod(0o644)
    with pytest.raises(crypt.KeyUnusable, match="chmod 600"):
        crypt.identities(file)
    file.chmod(0o600)
    assert [str(one) for one in crypt.identities(file)] == [str(key)]
    file.write_text("# nothing\n")
    with pytest.raises(crypt.KeyUnusable, match="holds no age secret key"):
        crypt.identities(file)
    with pytest.raises(crypt.KeyUnusable, match="is no age public key"):
        crypt.recipient("age1nonsense")


# --- places --------------------------------------------------------------------------------------------------------


def remote(sshd: Sshd, folder: Path) -> Backup:
    return Backup(target=sshd.target(folder), ssh_key=str(sshd.key), known_hosts=str(sshd.known_hosts))


@pytest.fixture(params=["folder", "sftp"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Backup:
    """Both kinds of a place, which must do the same."""
    there = tmp_path / "there" / "deep"
    if request.param == "folder":
        return Backup(target=str(there))
    return remote(request.getfixturevalue("sshd"), there)


async def test_a_backup_goes_to_a_place_and_comes_back(target: Backup, tmp_path: Path) -> None:
    folder, manifest = backup(tmp_path, size=3_000_000)
    there = tmp_path / "there" / "deep"
    steps: list[Step] = []
    async with open_place(target) as place:
        assert place is not None
        assert await place.list() == []
        await place.upload(folder, manifest, steps.append)
        assert await place.names() == {manifest.name}
        assert steps[-1].total == sum(entry.size for entry in manifest.files)
        assert steps[-1].done > 0
        for path in there.rglob("*"):
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
        with pytest.raises(PlaceFailed, match="has another backup 2024-01-02 already"):
            await place.upload(folder, manifest, silent)
        (there / ".upload-2024-01-03-x").mkdir()
        (there / "notes.txt").write_text("not a backup")
        (one,) = await place.list()
        assert (one.name, one.manifest, one.verified_at) == (manifest.name, manifest, None)
        fetched = await place.fetch(manifest.name, tmp_path / "back", silent)
        assert fetched == tmp_path / "back" / manifest.name
        assert compare(manifest, files.entries(fetched)) == []
        assert (fetched / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()
        await place.mark_verified(manifest.name, AT)
        assert (await place.list())[0].verified_at == AT
        await place.delete(manifest.name)
        assert await place.names() == set()
        assert {path.name for path in there.iterdir()} == {".upload-2024-01-03-x", "notes.txt"}
        with pytest.raises(PlaceFailed, match="There is no backup 2024-01-02 in"):
            await place.fetch(manifest.name, tmp_path / "back", silent)
        with pytest.raises(PlaceFailed, match="There is no backup"):
            await place.delete("../deep")


async def test_what_is_damaged_in_a_place_comes_back_as_it_is(target: Backup, tmp_path: Path) -> None:
    folder, manifest = backup(tmp_path)
    there = tmp_path / "there" / "deep" / manifest.name
    async with open_place(target) as place:
        assert place is not None
        await place.upload(folder, manifest, silent)
        (there / FILES).unlink()
        (there / DUMP).write_bytes(b"cut")
        fetched = await place.fetch(manifest.name, tmp_path / "back", silent)
        assert {defect.path for defect in compare(manifest, files.entries(fetched))} == {FILES, DUMP}


async def test_a_mark_is_of_one_manifest(target: Backup, tmp_path: Path) -> None:
    folder, manifest = backup(tmp_path)
    there = tmp_path / "there" / "deep" / manifest.name
    async with open_place(target) as place:
        assert place is not None
        await place.upload(folder, manifest, silent)
        await place.mark_verified(manifest.name, AT)
        write_manifest(there, replace(manifest, seconds=2.0))
        assert [one.verified_at for one in await place.list()] == [None]
        (there / MANIFEST).write_text("{")
        (broken,) = await place.list()
        assert broken.manifest is None
        assert "cannot be read" in broken.problem
        with pytest.raises(PlaceFailed, match="cannot be read"):
            await place.fetch(manifest.name, tmp_path / "back", silent)


async def test_a_manifest_from_a_place_cannot_lead_out_of_the_folder(target: Backup, tmp_path: Path) -> None:
    folder, manifest = backup(tmp_path)
    there = tmp_path / "there" / "deep" / manifest.name
    async with open_place(target) as place:
        assert place is not None
        await place.upload(folder, manifest, silent)
        evil = replace(manifest.files[0], path="../../escaped")
        write_manifest(there, replace(manifest, files=(evil,)))
        with pytest.raises(PlaceFailed, match="cannot be believed"):
            await place.fetch(manifest.name, tmp_path / "back", silent)
    assert not (tmp_path / "escaped").exists()


async def test_what_killed_uploads_left_is_swept_after_a_day(target: Backup, tmp_path: Path) -> None:
    folder, manifest = backup(tmp_path)
    there = tmp_path / "there" / "deep"
    old, new = there / ".upload-2024-01-01-aaaa", there / ".upload-2024-01-01-bbbb"
    for left in (old, new):
        left.mkdir(parents=True)
        (left / DUMP).write_text("half")
    past = datetime.now(UTC).timestamp() - 90_000
    for path in (old / DUMP, old):
        os.utime(path, (past, past))
    async with open_place(target) as place:
        assert place is not None
        await place.upload(folder, manifest, silent)
    assert {path.name for path in there.iterdir()} == {new.name, manifest.name}


# --- sshd ----------------------------------------------------------------------------------------------------------


async def test_a_host_that_is_not_known_gets_nothing(sshd: Sshd, tmp_path: Path) -> None:
    there = tmp_path / "there"
    known = remote(sshd, there)
    other = tmp_path / "other_hosts"
    # Another key under its name, as where somebody stands between.
    other.write_text(f"[127.0.0.1]:{sshd.port} {Path(f'{sshd.folder}/authorized_keys').read_text()}")
    empty = tmp_path / "no_hosts"
    empty.write_text("")
    for hosts in (other, empty):
        with pytest.raises(PlaceFailed, match="nothing was sent"):
            async with open_place(replace(known, known_hosts=str(hosts))):
                pytest.fail("let in")
    with pytest.raises(PlaceFailed, match=rf"does not exist, so no host is known: run `ssh-keyscan -p {sshd.port} 127"):
        async with open_place(replace(known, known_hosts=str(tmp_path / "none"))):
            pytest.fail("let in")
    assert not there.exists()


async def test_a_key_that_is_not_let_in_and_one_that_others_may_read(sshd: Sshd, tmp_path: Path) -> None:
    known = remote(sshd, tmp_path)
    with pytest.raises(PlaceFailed, match="does not let us in"):
        async with open_place(replace(known, ssh_key=str(sshd.folder / "host"))):
            pytest.fail("let in")
    open_key = tmp_path / "key"
    open_key.write_bytes(sshd.key.read_bytes())
    open_key.chmod(0o644)
    with pytest.raises(PlaceFailed, match="chmod 600"):
        async with open_place(replace(known, ssh_key=str(open_key))):
            pytest.fail("let in")


UPLOADER = """
import asyncio, sys, msgspec
from pathlib import Path
from actors.vault.make import read_manifest
from actors.vault.places import open_place
from schema.settings import Backup

def pause(step):
    if step.done and step.done < step.total:
        print("midway", flush=True)
        sys.stdin.readline()  # this blocks the loop: nothing more leaves until it is answered

async def main():
    settings = msgspec.json.decode(sys.argv[1], type=Backup)
    folder = Path(sys.argv[2])
    async with open_place(settings) as place:
        await place.upload(folder, read_manifest(folder), pause)

asyncio.run(main())
"""


@pytest.mark.parametrize("killed", ["uploader", "sshd"])
async def test_an_upload_that_is_killed_midway_is_never_visible(sshd: Sshd, tmp_path: Path, killed: str) -> None:
    folder, manifest = backup(tmp_path, size=40_000_000)
    there = tmp_path / "there"
    settings = remote(sshd, there)
    words = [sys.executable, "-c", UPLOADER, msgspec.json.encode(settings).decode(), str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, cwd=ROOT, text=True, **pipes) as uploader:  # type: ignore[call-overload]
        assert uploader.stdout is not None
        assert uploader.stdout.readline() == "midway\n"
        if killed == "uploader":
            uploader.send_signal(signal.SIGKILL)
        else:
            sshd.hang_up()
        _, said = uploader.communicate("\n" * 1_000, timeout=60)
        assert uploader.returncode != 0
    if killed == "sshd":
        assert "cannot be reached, or went away" in said
    (left,) = there.glob(f".upload-*/{DUMP}")
    assert 0 < left.stat().st_size < 40_000_000
    async with open_place(settings) as place:
        assert place is not None
        assert await place.names() == set()
        assert await place.list() == []
        with pytest.raises(PlaceFailed, match="There is no backup"):
            await place.fetch(manifest.name, tmp_path / "back", silent)
        smaller, manifest = backup(tmp_path / "again", manifest.name)
        await place.upload(smaller, manifest, silent)  # and it can be sent again
        assert await place.names() == {manifest.name}


# --- whole runs ----------------------------------------------------------------------------------------------------


async def test_a_run_makes_ships_encrypted_and_prunes(
    home: Path, settings: Settings, bus: Bus, pg_url: str, sshd: Sshd, tmp_path: Path
) -> None:
    await fill(pg_url)
    await publish(bus, 3)
    key = pyrage.x25519.Identity.generate()
    there = tmp_path / "there"
    old = [str((datetime.now(UTC) - timedelta(days=days)).date()) for days in range(1, 12)]
    for name in old:
        backup(folder_of(home), name)
        backup(there, name)
    rules = replace(
        remote(sshd, there), postgres_bins=settings.backup.postgres_bins, recipient=str(key.to_public()), daily=3, weekly=1,
        monthly=1, verified=1,
    )  # fmt: skip
    await LocalPlace(there).mark_verified(old[-1], AT)
    settings = replace(settings, backup=rules)
    verdict = await run_of(home, settings, bus, pg_url).run()
    assert verdict.ok, verdict.message
    assert verdict.made
    assert verdict.encrypted
    assert verdict.shipped == (verdict.backup,)
    assert verdict.rpo_seconds is not None
    kept = {verdict.backup, *old[:2]}
    assert await LocalPlace(folder_of(home)).names() == kept
    assert await LocalPlace(there).names() == {*kept, old[-1]}  # the verified one
    assert {path.name for path in folder_of(home).iterdir()} == {*kept, ".lock"}
    shipped = read_manifest(there / verdict.backup)
    assert shipped.encrypted == str(key.to_public())
    assert compare(shipped, files.entries(there / verdict.backup)) == []
    plain = tmp_path / "plain"
    plain.mkdir()
    assert crypt.unseal(there / verdict.backup, shipped, plain, [key]) == read_manifest(
        folder_of(home) / verdict.backup
    )
    told = await events(bus)
    assert [event.event for event in told if event.event != "pruned"] == ["made", "shipped"]
    assert {event.backup for event in told if event.event == "pruned"} == set(old[2:])
    assert told[0].bytes == verdict.bytes > 0
    assert told[1].target == rules.target
    # Nothing is made, shipped or pruned again.
    again = await run_of(home, settings, bus, pg_url, unless_newer=3_600.0).run()
    assert again.ok
    assert (again.made, again.shipped, again.pruned, again.backup) == (False, (), (), verdict.backup)


async def test_what_could_not_be_shipped_is_shipped_by_the_next_run(
    home: Path, settings: Settings, bus: Bus, pg_url: str, tmp_path: Path
) -> None:
    blocked = tmp_path / "there"
    blocked.write_text("a file where the folder should be")
    settings = replace(settings, backup=replace(settings.backup, target=str(blocked), daily=5))
    first = await run_of(home, settings, bus, pg_url).run()
    assert not first.ok
    assert first.made
    assert "is made, and not shipped" in first.message
    told = await events(bus)
    assert [event.event for event in told] == ["made", "failed"]
    assert "is not shipped" in told[-1].error
    blocked.unlink()
    verdict = await run_of(home, settings, bus, pg_url, unless_newer=60.0).run()
    assert verdict.ok, verdict.message
    assert not verdict.made
    assert verdict.shipped == (first.backup,)
    assert await LocalPlace(blocked).names() == {first.backup}


async def test_backups_that_the_target_missed_follow(
    home: Path, settings: Settings, bus: Bus, pg_url: str, tmp_path: Path
) -> None:
    """The target was away for three nights; what is older than its newest one it once had, or never should have."""
    there = tmp_path / "there"
    days = [str((datetime.now(UTC) - timedelta(days=days)).date()) for days in range(6, 0, -1)]
    for name in days:
        backup(folder_of(home), name)
    backup(there, days[1])
    settings = replace(settings, backup=replace(settings.backup, target=str(there)))
    verdict = await run_of(home, settings, bus, pg_url).run()
    assert verdict.ok, verdict.message
    assert verdict.shipped == (*days[2:], verdict.backup)
    other, _ = backup(tmp_path / "other", days[4], size=5)
    write_manifest(there / days[4], replace(read_manifest(other), created_at=AT + timedelta(hours=1)))
    refused = await run_of(home, settings, bus, pg_url, unless_newer=60.0).run()
    assert refused.ok  # nothing newer than the newest is missing
    (there / verdict.backup / MANIFEST).write_bytes(
        msgspec.json.encode(replace(read_manifest(there / verdict.backup), created_at=AT))
    )
    refused = await run_of(home, settings, bus, pg_url, unless_newer=60.0).run()
    assert not refused.ok
    assert f"has another backup {verdict.backup}" in refused.message


async def test_a_local_run_asks_no_target(
    home: Path, settings: Settings, bus: Bus, pg_url: str, tmp_path: Path
) -> None:
    settings = replace(settings, backup=replace(settings.backup, target="me@127.0.0.1:1:/nowhere"))
    verdict = await run_of(home, settings, bus, pg_url, local=True).run()
    assert verdict.ok
    assert (verdict.target, verdict.shipped) == ("", ())


async def test_a_run_beside_another_one_says_that_it_is_busy(
    home: Path, settings: Settings, bus: Bus, pg_url: str
) -> None:
    with the_only_one(home):
        verdict = await run_of(home, settings, bus, pg_url).run()
    assert (verdict.ok, verdict.busy) == (False, True)
    assert await events(bus) == []


async def test_a_database_that_is_away_fails_the_run_and_prunes_nothing(
    home: Path, settings: Settings, bus: Bus, tmp_path: Path
) -> None:
    for days in range(1, 30):
        backup(folder_of(home), str((datetime.now(UTC) - timedelta(days=days)).date()))
    verdict = await run_of(home, settings, bus, "postgresql://me:hidden@127.0.0.1:1/db").run()
    assert not verdict.ok
    assert "hidden" not in verdict.message
    assert len(await LocalPlace(folder_of(home)).names()) == 29
    (event,) = await events(bus)
    assert (event.event, event.error) == ("failed", verdict.message)
