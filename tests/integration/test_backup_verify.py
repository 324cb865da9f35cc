"""Backups are proved, damage of every kind is found and named, and nothing is ever restored onto something."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pyrage
import pytest

from actors.vault.check import Damaged, check_files
from actors.vault.crypt import seal
from actors.vault.files import file_entry
from actors.vault.make import make, silent, the_only_one, write_manifest
from actors.vault.restore import NotRestored
from actors.vault.snapshots import snapshot
from actors.vault.streams_restore import StreamNotRestored, restore_stream
from actors.vault.unpack import BadArchive, return_data, unpack
from actors.vault.whole import bring_back
from bus import topology
from bus.client import Bus
from bus.migrate import migrate
from commands.backup_open import check_room
from commands.backup_restore import refuse_used
from commands.output import CommandError
from deploy.embedded import NatsServer, PostgresServer
from deploy.process import DeployError
from schema.backup import DUMP, FILES, MANIFEST, STREAMS, BackupManifest
from schema.settings import Backup, Settings, Streams
from tests.builders import put, walk
from tests.conftest import missing
from tests.servers import OPERATOR, cloned_database, nats_server, postgres_server, wait_until
from tests.system import environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

ROWS = 5_000


@dataclass
class Made:
    """A whole backup in a home whose servers are gone."""

    home: Path
    folder: Path
    manifest: BackupManifest


@pytest.fixture(scope="module")
def made(server_folder: Path) -> Made:
    """Made of real servers, of candles in the log and rows in the archive."""
    folder = Path(tempfile.mkdtemp(prefix="made-", dir=server_folder))
    home = folder / "var"
    (home / "models" / "rf_m1").mkdir(parents=True)
    (home / "models" / "rf_m1" / "model.onnx").write_bytes(random.Random(1).randbytes(50_000))
    (home / "models" / "rf_m1.pkl").symlink_to("rf_m1/model.onnx")
    (home / "keys").mkdir()
    (home / "keys" / "models.key").write_text("secret")

    async def work(nats: NatsServer, postgres: PostgresServer) -> BackupManifest:
        await migrate(postgres.url)
        connection = await asyncpg.connect(postgres.url)
        try:
            await connection.execute(
                """INSERT INTO market_data SELECT timestamptz '2025-01-01' + i * interval '1 minute', 'EURUSD', 'M1',
                          1 + random(), 3, 0.5, 1 + random(), i, 1, 0, 0, NULL, 'utc', now(), i, true
                   FROM generate_series(1, $1) i""".replace("$1", str(ROWS))
            )
            bus = await Bus.connect(nats.url(OPERATOR), name="operator")
            try:
                await topology.apply(bus, Streams())
                await put(bus, walk(3_000), size=100)
                settings = Settings(home=str(home), backup=Backup(postgres_bins={"18": str(postgres.bin)}))
                with the_only_one(home):
                    return await make(home=home, settings=settings, bus=bus, database_url=postgres.url)
            finally:
                await bus.close()
        finally:
            await connection.close()

    try:
        with nats_server(folder / "nats") as nats, postgres_server(server_folder / "made") as postgres:
            manifest = asyncio.run(work(nats, postgres))
    except DeployError as error:
        missing(str(error))
    return Made(home, home / "backups" / manifest.name, manifest)


@pytest.fixture
def tmp_path(server_folder: Path) -> Iterator[Path]:
    """In memory, as the servers' own folders are: a disk would be most of the time that a new database takes."""
    folder = Path(tempfile.mkdtemp(prefix="backups-", dir=server_folder))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    """The backup's folder, to be damaged."""
    return Path(shutil.copytree(made.folder, tmp_path / "copies" / made.folder.name))


def mt5(home: Path, *words: str, timeout: float = 120.0, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runner", *words],
        cwd=home.parent,
        env=environment(home, **extra),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def problems(folder: Path) -> dict[str, str]:
    try:
        check_files(folder)
    except Damaged as error:
        return {defect.path: defect.problem for defect in reversed(error.defects)}  # the first of a path
    return {}


# --- six corruptions ---------------------------------------------------------------------------------------------


def remove(path: Path, other: Path) -> None:
    path.unlink()


def truncate(path: Path, other: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path, other: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(path.name).randrange(len(data))] ^= 1 << random.Random(len(data)).randrange(8)
    path.write_bytes(data)


def swap(path: Path, other: Path) -> None:
    aside = path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


DAMAGE: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "missing": (remove, "is missing"),
    "truncated": (truncate, "is cut: "),
    "zero size": (empty, "is empty"),
    "flipped bit": (flip, "is changed"),
    "swapped": (swap, "holds what should be in "),
}


def test_every_file_of_a_backup_is_missed_and_every_change_of_it_is_found(made: Made, copy: Path) -> None:
    assert problems(copy) == {}
    paths = [entry.path for entry in made.manifest.files]
    assert {DUMP, FILES, f"{STREAMS}/CANDLES.snapshot", f"{STREAMS}/CANDLES.json"} <= set(paths)
    for number, path in enumerate(paths):
        other = paths[number - 1]
        for name, (damage, said) in DAMAGE.items():
            damage(copy / path, copy / other)
            found = problems(copy)
            wanted = {path, other} if name == "swapped" else {path}
            assert set(found) == wanted, (name, path, found)
            assert found[path].startswith(said), (name, path, found)
            for touched in (path, other):
                shutil.copyfile(made.folder / touched, copy / touched)
    assert problems(copy) == {}


@pytest.mark.parametrize("name", DAMAGE)
def test_verify_says_no_and_names_the_file(made: Made, copy: Path, name: str) -> None:
    damage, said = DAMAGE[name]
    damage(copy / DUMP, copy / FILES)
    done = mt5(made.home, "backup", "verify", str(copy))
    assert done.returncode == 1, done.stderr + done.stdout
    assert f"{DUMP} {said}" in done.stdout
    assert "Traceback" not in done.stderr
    assert not (made.home / "scratch").exists()


def test_a_wrong_manifest_is_named(made: Made, copy: Path, tmp_path: Path) -> None:
    manifest = copy / MANIFEST
    right = manifest.read_bytes()
    wrong = {
        b"": "is empty",
        right[: len(right) // 2]: "is no manifest of a backup",
        b"[]": "is no manifest of a backup",
        right.replace(made.manifest.name.encode(), b"2001-01-01"): "is that of backup 2001-01-01",
        msgspec.json.encode(msgspec.structs.replace(made.manifest, version=99)): "is of version 99",
    }
    for data, said in wrong.items():
        manifest.write_bytes(data)
        assert problems(copy)[MANIFEST].startswith(said)
    manifest.unlink()
    assert problems(copy) == {MANIFEST: "is missing"}
    # One that names another hash, or leaves a file out, blames that file.
    first, *rest = made.manifest.files
    write_manifest(
        copy, msgspec.structs.replace(made.manifest, files=(msgspec.structs.replace(first, sha256="0" * 64), *rest))
    )
    assert set(problems(copy)) == {first.path}
    write_manifest(copy, msgspec.structs.replace(made.manifest, files=tuple(rest)))
    assert problems(copy) == {first.path: "is not in the manifest"}
    # A path that leads out of the folder is never read.
    outside = msgspec.structs.replace(first, path="../../secret")
    write_manifest(copy, msgspec.structs.replace(made.manifest, files=(outside, *rest)))
    assert problems(copy)["../../secret"] == "is no path of a file within the backup"
    done = mt5(made.home, "backup", "verify", str(copy), "--json")
    assert done.returncode == 1
    assert "../../secret" in {one["path"] for one in json.loads(done.stdout)["problems"]}


# --- what hashes cannot see ----------------------------------------------------------------------------------------


def verify(home: Path, folder: Path | str, **extra: str) -> tuple[int, dict[str, Any]]:
    done = mt5(home, "backup", "verify", str(folder), "--json", **extra)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_a_whole_backup_is_restored_for_practice_and_marked(made: Made) -> None:
    code, proof = verify(made.home, "latest")
    assert (code, proof["ok"], proof["problems"]) == (0, True, []), proof
    assert proof["rows"] == sum(table.rows for table in made.manifest.tables) >= ROWS
    assert (proof["tables"], proof["streams"]) == (len(made.manifest.tables), len(made.manifest.streams))
    assert proof["messages"] == 30
    assert not (made.home / "scratch").exists()
    listed = json.loads(mt5(made.home, "backup", "list", "--local", "--json").stdout)["backups"]
    assert [one["verified_at"] is not None for one in listed] == [True]


@pytest.mark.parametrize("what", ["rows", "content", "table", "stream"])
async def test_what_comes_back_is_compared_with_the_manifest(
    made: Made, tmp_path: Path, nats: NatsServer, postgres: PostgresServer, pg_empty_url: str, what: str
) -> None:
    """Every hash is right, and the manifest says something else of what is in the files."""
    tables, streams = list(made.manifest.tables), list(made.manifest.streams)
    at = next(i for i, table in enumerate(tables) if table.name == "market_data")
    place = next(i for i, stream in enumerate(streams) if stream.name == "CANDLES")
    if what == "rows":
        tables[at] = msgspec.structs.replace(tables[at], rows=ROWS + 1)
    elif what == "content":
        tables[at] = msgspec.structs.replace(tables[at], content="0" * 32)
    elif what == "table":
        del tables[at]
    else:
        streams[place] = msgspec.structs.replace(streams[place], last_seq=31, messages=31)
    manifest = msgspec.structs.replace(made.manifest, tables=tuple(tables), streams=tuple(streams))
    bus = await Bus.connect(nats.url(OPERATOR), name="operator")
    try:
        with pytest.raises(NotRestored) as refused:
            await bring_back(
                made.folder,
                manifest,
                database_url=pg_empty_url,
                bus=bus,
                bins={"18": str(postgres.bin)},
                files=None,
                passing=True,
                tell=silent,
            )
    finally:
        await bus.close()
    assert refused.value.path == (f"{STREAMS}/CANDLES.snapshot" if what == "stream" else DUMP)
    said = {
        "rows": "5,000 rows instead of 5,001",
        "content": "with other content",
        "table": "table market_data is in the dump and not in the manifest",
        "stream": "30 messages (1 to 30) instead of 31",
    }
    assert said[what] in str(refused.value)


def test_verify_names_the_file_that_does_not_give_back_what_it_should(made: Made, copy: Path) -> None:
    tables = tuple(msgspec.structs.replace(table, rows=table.rows + 1) for table in made.manifest.tables)
    write_manifest(copy, msgspec.structs.replace(made.manifest, tables=tables))
    code, proof = verify(made.home, copy)
    assert (code, proof["ok"], [one["path"] for one in proof["problems"]]) == (1, False, [DUMP])


def test_an_encrypted_backup_is_proved_with_its_key_only(made: Made, tmp_path: Path) -> None:
    key = pyrage.x25519.Identity.generate()
    sealed = tmp_path / "sealed" / made.manifest.name
    sealed.mkdir(parents=True)
    write_manifest(sealed, seal(made.folder, made.manifest, sealed, str(key.to_public())))
    file = tmp_path / "key.txt"
    file.write_text(str(key))
    file.chmod(0o600)
    assert problems(sealed) == {}
    without = mt5(made.home, "backup", "verify", str(sealed))
    assert without.returncode == 2
    assert "[backup] identity" in without.stderr
    code, proof = verify(made.home, sealed, MT5_BACKUP_IDENTITY=str(file))
    assert (code, proof["ok"], proof["messages"]) == (0, True, 30), proof


# --- restore: onto nothing only ------------------------------------------------------------------------------------


def sentence(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The one sentence with which a command refused."""
    assert done.returncode == code, done.stderr + done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_restore_refuses_what_is_not_empty_and_changes_nothing(made: Made, tmp_path: Path) -> None:
    for name in ("nats", "postgres", "models", "keys", "jobs", "health_checks.db", "health_checks.db-wal"):
        home = tmp_path / name / "var"
        (home / name / "something").mkdir(parents=True)
        (home / "logs").mkdir()
        (home / "logs" / "mt5.log").write_text("said")
        with pytest.raises(CommandError, match=re.escape(f"{home} is not empty (it has {name})")):
            refuse_used(home, nats=True, postgres=True)
        (home / name / "something").rmdir()
        refuse_used(home, nats=True, postgres=True)
    home = tmp_path / "nats" / "var"
    (home / "nats" / "something").mkdir()
    said = sentence(mt5(home, "backup", "restore", str(made.folder)))
    assert f"{home} is not empty (it has nats)" in said
    assert {path.name for path in home.iterdir()} == {"nats", "logs", "run", "lock"}
    home = tmp_path / "new" / "var"
    home.mkdir(parents=True)
    assert "There is no backup yet in" in sentence(mt5(home, "backup", "restore", "latest"))
    assert "There is no backup nowhere:" in sentence(mt5(home, "backup", "restore", "nowhere"))


def test_a_damaged_or_newer_backup_is_not_restored(made: Made, copy: Path, tmp_path: Path) -> None:
    home = tmp_path / "var"
    write_manifest(copy, msgspec.structs.replace(made.manifest, migration="9999_later"))
    assert "newer version of mt5" in sentence(mt5(home, "backup", "restore", str(copy)))
    flip(copy / DUMP, copy)
    write_manifest(copy, made.manifest)
    said = sentence(mt5(home, "backup", "restore", str(copy)))
    assert f"{made.manifest.name} is not restored" in said
    assert f"{DUMP} is changed" in said
    assert {path.name for path in home.iterdir()} <= {"logs", "run", "lock"}


async def test_given_servers_are_filled_whole_or_left_as_they_were(
    made: Made, copy: Path, tmp_path: Path, nats: NatsServer, postgres: PostgresServer, pg_empty_url: str
) -> None:
    home = tmp_path / "var"
    given = {"MT5_NATS_URL": nats.url(OPERATOR), "MT5_DATABASE_URL": pg_empty_url}

    async def restore(folder: Path) -> subprocess.CompletedProcess[str]:
        return await asyncio.to_thread(mt5, home, "backup", "restore", str(folder), **given)

    async def state() -> tuple[int, int]:
        connection = await asyncpg.connect(pg_empty_url)
        bus = await Bus.connect(nats.url(OPERATOR), name="operator")
        try:
            relations = await connection.fetchval(
                "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
            )
            return relations, len(await bus.js.streams_info())
        finally:
            await bus.close()
            await connection.close()

    # A dump that breaks off in the middle: the streams that were there by then are gone again.
    broken = bytearray((made.folder / DUMP).read_bytes())
    broken[-2_000:] = bytes(2_000)
    (copy / DUMP).write_bytes(broken)
    entries = tuple(file_entry(copy, copy / entry.path) for entry in made.manifest.files)
    write_manifest(copy, msgspec.structs.replace(made.manifest, files=entries))
    said = sentence(await restore(copy))
    assert f"pg_restore failed on {DUMP}" in said
    assert await state() == (0, 0)
    assert not (home / "keys").exists()

    done = await restore(made.folder)
    assert done.returncode == 0, done.stderr
    assert (await state())[1] == len(made.manifest.streams)
    assert {path.name for path in home.iterdir()} == {"keys", "logs", "models", "restored", "run", "lock"}
    assert (home / "models" / "rf_m1.pkl").read_bytes() == (made.home / "models" / "rf_m1" / "model.onnx").read_bytes()
    assert (home / "keys" / "models.key").stat().st_mode & 0o077 == 0
    shutil.rmtree(home)
    said = sentence(await restore(made.folder))
    assert "is not empty (it has public." in said
    # A database alone, and a full one refused.
    async with cloned_database(postgres.url, "template1") as url:
        words = ("backup", "restore", str(made.folder), "--into", url)
        assert (await asyncio.to_thread(mt5, home, *words)).returncode == 0
        said = sentence(await asyncio.to_thread(mt5, home, *words))
        assert "is not empty" in said
        assert url.split(":")[2].split("@")[0] not in said  # its password
    assert {path.name for path in home.iterdir()} == {"logs", "run", "lock"}


def test_a_restore_that_is_killed_leaves_nothing_that_the_next_one_minds(made: Made, tmp_path: Path) -> None:
    home = tmp_path / "var"
    words = [sys.executable, "-m", "runner", "backup", "restore", str(made.folder)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def at_work(besides: set[Path]) -> set[Path]:
        """The folders of restores whose servers have started."""
        return {path.parents[3] for path in home.glob("scratch/*/servers/postgres/data/PG_VERSION")} - besides

    with subprocess.Popen(words, cwd=tmp_path, env=environment(home), **pipes) as dead:
        wait_until(lambda: at_work(set()), 60, "its servers start")
        dead.kill()
        dead.communicate()
    left = at_work(set())
    assert left
    assert not (home / "postgres").exists()
    with subprocess.Popen(words, cwd=tmp_path, env=environment(home), **pipes) as stopped:
        wait_until(lambda: at_work(left), 60, "its servers start again")
        assert not at_work(set()) & left
        stopped.terminate()
        _, said = stopped.communicate(timeout=60)
    assert (stopped.returncode, said.strip()) == (1, "mt5: Stopped: nothing is left of it.")
    assert not (home / "scratch").exists()
    done = mt5(home, "backup", "restore", str(made.folder), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["messages"] == 30
    assert (home / "nats").is_dir()
    assert (home / "postgres" / "data" / "PG_VERSION").is_file()
    assert not (home / "scratch").exists()


# --- archives that lie ---------------------------------------------------------------------------------------------


def lying() -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.mode = kind, link, 0o777
        return info

    yield "leads out of it", [member("../outside")]
    yield "leads out of it", [member("/etc/outside")]
    yield "leads out of it", [member("home/x", tarfile.SYMTYPE, "../../outside")]
    yield "leads out of it", [member("home/x", tarfile.SYMTYPE, "/etc/passwd")]
    yield "lies below a link", [member("home/x", tarfile.SYMTYPE, "y"), member("home/x/file")]
    yield "neither a file", [member("home/x", tarfile.LNKTYPE, "home/y")]
    yield "neither a file", [member("home/x", tarfile.FIFOTYPE)]
    yield "neither a file", [member("home/x", tarfile.CHRTYPE)]
    yield "twice", [member("home/x"), member("home/x")]


@pytest.mark.parametrize(("said", "members"), list(lying()))
def test_an_archive_writes_nowhere_else(tmp_path: Path, said: str, members: list[tarfile.TarInfo]) -> None:
    archive = tmp_path / FILES
    with tarfile.open(archive, "w:gz") as tar:
        for member in members:
            tar.addfile(member, BytesIO())
    before = {path for path in tmp_path.rglob("*") if "target" not in path.parts}
    with pytest.raises(BadArchive, match=said):
        unpack(archive, tmp_path / "target")
    assert {path for path in tmp_path.rglob("*") if "target" not in path.parts} == before


def test_what_is_unpacked_is_private_and_whole(made: Made, tmp_path: Path) -> None:
    assert unpack(made.folder / FILES, tmp_path / "target") == 4
    key = tmp_path / "target" / "home" / "keys" / "models.key"
    assert (key.read_text(), key.stat().st_mode & 0o777) == ("secret", 0o600)
    data = (made.folder / FILES).read_bytes()
    for cut in (len(data) // 2, len(data) - 4):
        (tmp_path / "cut").write_bytes(data[:cut])
        with pytest.raises(BadArchive):
            unpack(tmp_path / "cut", tmp_path / f"target{cut}")


def test_data_of_other_programs_goes_back_only_where_nothing_is(tmp_path: Path) -> None:
    unpacked = tmp_path / "unpacked"
    places = [tmp_path / name for name in ("gone", "empty", "used", "never")]
    for number, place in enumerate(places[:3]):
        (unpacked / "data" / str(number)).mkdir(parents=True)
        (unpacked / "data" / str(number) / "file").write_text(place.name)
    (unpacked / "data" / "places.json").write_text(json.dumps([str(place) for place in places]))
    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("since")
    assert return_data(unpacked) == [
        (str(tmp_path / "gone"), tmp_path / "gone", ""),
        (str(tmp_path / "empty"), tmp_path / "empty", ""),
        (str(tmp_path / "used"), unpacked / "data" / "2", "there is something already"),
        (str(tmp_path / "never"), None, "it was not there when the backup was made"),
    ]
    assert [(place / "file").read_text() for place in places[:3]] == ["gone", "empty", "since"]


def test_a_disk_without_room_is_not_filled(made: Made, tmp_path: Path) -> None:
    entries = tuple(msgspec.structs.replace(entry, size=10**15) for entry in made.manifest.files)
    with pytest.raises(CommandError, match="make room"):
        check_room(tmp_path, msgspec.structs.replace(made.manifest, files=entries))
    check_room(tmp_path, made.manifest)


async def test_a_stream_of_an_old_backup_comes_back_with_its_own_rules_and_counts_on(
    nats: NatsServer, tmp_path: Path
) -> None:
    bus = await Bus.connect(nats.url(OPERATOR), name="operator")
    try:
        await bus.js.add_stream(name="OLD", subjects=["old.>"], max_age=1.0)
        for _ in range(3):
            await bus.js.publish("old.news", b"x")
        taken = (await snapshot(bus, "OLD", tmp_path)).entry
        assert (taken.messages, taken.last_seq) == (3, 3)
        await bus.js.delete_stream("OLD")
        await asyncio.sleep(1.1)  # they expire: it is time itself that is waited for
        assert await restore_stream(bus, taken, tmp_path) == taken
        with pytest.raises(StreamNotRestored, match="already in use"):
            await restore_stream(bus, taken, tmp_path)
        info = await bus.js.stream_info("OLD")
        assert info.config.max_age == 1.0
        async with asyncio.timeout(10):
            while (await bus.js.stream_info("OLD")).state.messages:
                await asyncio.sleep(0.05)
        assert (await bus.js.publish("old.news", b"y")).seq == 4
    finally:
        await bus.close()
