"""Real servers and other users for tests; ``conftest.py`` makes the fixtures of them."""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from deploy.embedded import NatsServer, NatsUser, PostgresServer

ROOT = Path(__file__).resolve().parents[1]
OPERATOR = NatsUser("operator", "operators-own")


@contextlib.contextmanager
def nats_server(folder: Path, users: tuple[NatsUser, ...] = (OPERATOR,), **options: Any) -> Iterator[NatsServer]:
    """A running nats-server with its state under ``folder``; JetStream, authentication on."""
    server = NatsServer(folder, users, **options)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def postgres_server(folder: Path, **options: Any) -> Iterator[PostgresServer]:
    """A running PostgreSQL with its state under ``folder``."""
    server = PostgresServer(folder, **options)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextlib.asynccontextmanager
async def cloned_database(url: str, template: str = "mt5") -> AsyncIterator[str]:
    """The URL of a copy of a database that nobody is connected to; dropped at the end."""
    name = f"test_{uuid.uuid4().hex}"
    base = url.rpartition("/")[0]
    admin = await asyncpg.connect(f"{base}/postgres")
    try:
        await admin.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY FILE_COPY')
        try:
            yield f"{base}/{name}"
        finally:
            await admin.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    finally:
        await admin.close()


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Returns as soon as the condition holds; fails, saying what was awaited, when it does not hold in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.02)


def ordinary_user() -> str | None:
    """Whom to run as in order to be an ordinary user; None when we are one."""
    return "nobody" if os.geteuid() == 0 else None


@functools.cache
def interpreter(user: str | None) -> tuple[str, str]:
    """A Python that this user can run, and the PYTHONPATH with which it finds the repository and the wheels."""
    path = os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])
    probe = "import deploy.embedded as e, deploy.pginstall as p; e.find_nats_server(); p.find_install()"
    for program in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(PermissionError, FileNotFoundError):
            if subprocess.run([program, "-c", probe], **_as(user, path), capture_output=True).returncode == 0:
                return program, path
    pytest.skip(f"{user} can run no Python that sees this repository: both lie below closed folders")


def _as(user: str | None, path: str) -> dict[str, Any]:
    options: dict[str, Any] = {"cwd": "/", "env": {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}}
    if user:
        options |= {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
    return options


def python(code: str, *args: object, user: str | None = None, **options: Any) -> subprocess.Popen[str]:
    """A Python process that can import the repository, its output piped, as another user where one is named."""
    program, path = interpreter(user)
    return subprocess.Popen(
        [program, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **_as(user, path),
        **options,
    )
