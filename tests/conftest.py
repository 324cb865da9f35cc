"""Real servers as fixtures, on free ports: nats-server fresh for each test, PostgreSQL once, a database for each test.

A server that this machine lacks skips a test with the reason; in CI (``CI=true``) it fails it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import pytest
import structlog
import uvloop
from hypothesis import HealthCheck, settings

from bus import logs, topology
from bus.client import Bus
from bus.migrate import migrate
from deploy.embedded import NatsServer, PostgresServer
from deploy.process import DeployError
from deploy.server import free_port
from schema.settings import Log, Streams
from tests.servers import OPERATOR, cloned_database, nats_server, postgres_server, wait_until

# CI asks the same questions every time, so that red means the change; every other run asks new ones.
settings.register_profile(
    "here",
    deadline=None,
    print_blob=True,
    derandomize=os.environ.get("CI") == "true",
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("here")
logs.configure(Log())
LOGGING = structlog.get_config()

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


# What takes longest comes first, so that the workers of a parallel run end together.
ORDER = ("torture", "acceptance", "bench", "integration", "contract", "unit")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent

    def rank(item: pytest.Item) -> int:
        room = item.path.relative_to(tests).parts[0]
        return ORDER.index(room) if room in ORDER else len(ORDER)

    items.sort(key=rank)  # stable: the order within a room stays


OWN_LOOP = ("test_bus.py", "test_writer.py")  # where a broken connection behaves otherwise than on asyncio's own loop


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """These tests run on the loop that the system runs on."""
    return {"loop": uvloop.new_event_loop if item.path.name in OWN_LOOP else asyncio.new_event_loop}


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A command that runs in this process quietens the log, and binds it to the stderr that it finds."""
    yield
    structlog.configure(**LOGGING)


def missing(reason: str) -> NoReturn:
    """Skips here, fails in CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real candles; its absence skips everywhere, since it is no part of the project."""
    if not DATA.is_dir():
        pytest.skip("no real candles beside this checkout (../shared/data)")
    return DATA


@pytest.fixture(scope="session")
def server_folder() -> Iterator[Path]:
    # In memory where there is room: every acknowledged candle is synced, and a disk would make that most of a run.
    # What a disk does to it is for the benchmarks and the tortures to tell.
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 * 1024**3
    folder = Path(tempfile.mkdtemp(prefix="mt5-tests-", dir=memory if roomy else None))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def nats(server_folder: Path, request: pytest.FixtureRequest) -> Iterator[NatsServer]:
    """A fresh nats-server with JetStream and one operator; yields the server object, so that tests can kill it."""
    folder = Path(tempfile.mkdtemp(prefix="nats-", dir=server_folder))
    try:
        with nats_server(folder) as server:
            yield server
    except DeployError as error:
        missing(str(error))


@pytest.fixture
def nats_url(nats: NatsServer) -> str:
    return nats.url(OPERATOR)


@pytest.fixture
async def bus(nats_url: str) -> AsyncIterator[Bus]:
    """The operator's connection, with the topology applied."""
    bus = await Bus.connect(nats_url, name="operator")
    await topology.apply(bus, Streams())
    yield bus
    await bus.close()


@pytest.fixture(scope="session")
def postgres(server_folder: Path) -> Iterator[PostgresServer]:
    """One PostgreSQL for the session; tests get databases of their own."""
    try:
        with postgres_server(server_folder / "postgres") as server:
            yield server
    except DeployError as error:
        missing(str(error))


@pytest.fixture(scope="session")
def pg_template(postgres: PostgresServer) -> str:
    """The name of a migrated database that tests are cloned from."""
    asyncio.run(migrate(postgres.url))
    return urlsplit(postgres.url).path.lstrip("/")


@pytest.fixture
async def pg_url(postgres: PostgresServer, pg_template: str) -> AsyncIterator[str]:
    """A migrated database of the test's own."""
    async with cloned_database(postgres.url, pg_template) as url:
        yield url


@pytest.fixture
async def pg_empty_url(postgres: PostgresServer) -> AsyncIterator[str]:
    """An empty database of the test's own."""
    async with cloned_database(postgres.url, "template1") as url:
        yield url


@pytest.fixture
def pgbouncer_url(pg_url: str, server_folder: Path) -> Iterator[str]:
    """PgBouncer in transaction mode in front of the test's database."""
    program = shutil.which("pgbouncer") or ("/usr/sbin/pgbouncer" if Path("/usr/sbin/pgbouncer").exists() else None)
    if program is None:
        missing("pgbouncer is not installed: apt-get install pgbouncer")
    target = urlsplit(pg_url)
    port = free_port()
    folder = Path(tempfile.mkdtemp(prefix="pgbouncer-", dir=server_folder))
    folder.chmod(0o755)
    name = target.path.lstrip("/")
    (folder / "users.txt").write_text(f'"{target.username}" "{target.password}"\n')
    (folder / "f.ini").write_text(
        f"""[databases]
{name} = host={target.hostname} port={target.port} dbname={name}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
auth_type = plain
auth_file = {folder}/users.txt
pool_mode = transaction
default_pool_size = 4
unix_socket_dir =
ignore_startup_parameters = extra_float_digits
"""
    )
    drop = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.geteuid() == 0 else []
    process = subprocess.Popen(
        [*drop, program, str(folder / "f.ini")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def listens() -> bool:
        import socket

        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(listens, 10.0, "PgBouncer listens")
        yield f"postgresql://{target.username}:{target.password}@127.0.0.1:{port}/{name}"
    finally:
        process.terminate()
        process.wait(10)
