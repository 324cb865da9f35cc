"""The backup agent as it runs: on request with its own credentials, on schedule, and without it by the command."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

import actors.backup
from actors.backup import Backup as Agent
from actors.vault.make import folder_of, the_only_one
from actors.vault.places import LocalPlace
from actors.vault.work import BackupVerdict
from bus.client import Bus
from bus.status import Scrape, Status
from bus.subjects import BACKUP_RUN, BACKUPS, metrics_of, status_of
from bus.supervise import run_actors
from deploy.pginstall import installs
from schema.messages import BackupEvent
from schema.settings import Backup, Settings
from tests.servers import ROOT
from tests.system import System


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    made = System(tmp_path, {"MT5_BACKUP_TARGET": str(tmp_path / "there")})
    try:
        yield made
    finally:
        made.end()


def test_the_agent_works_with_its_own_credentials_and_the_command_without_it(system: System, tmp_path: Path) -> None:
    (tmp_path / "mt5.toml").write_text("[log]\nlevel = 'info'\n")
    system.start("up", "backup")
    done = system.mt5("backup", "run", "--json")
    assert done.returncode == 0, done.stderr
    verdict = msgspec.json.decode(done.stdout, type=BackupVerdict)
    assert verdict.shipped == (verdict.backup,)
    assert verdict.rows > 0
    assert (tmp_path / "there" / verdict.backup / "manifest.json").exists()
    assert "NATS" not in system.log("backup"), "a permission is missing"

    listed = system.mt5("backup", "list", "--json")
    assert listed.returncode == 0
    found = json.loads(listed.stdout)["backups"]
    assert [(one["backup"], one["place"]) for one in found] == [
        (verdict.backup, str(tmp_path / "var" / "backups")),
        (verdict.backup, str(tmp_path / "there")),
    ]
    assert found[0]["bytes"] == verdict.bytes

    async def asked() -> tuple[str, list[BackupEvent]]:
        async with system.bus() as bus:
            scrape = msgspec.json.decode(await bus.request(metrics_of("backup")), type=Scrape)
            return scrape.text, await events(bus)

    metrics, told = asyncio.run(asked())
    assert [event.event for event in told] == ["made", "shipped"]
    assert f"mt5_backup_bytes {verdict.bytes}" in metrics.replace(".0\n", "\n")
    assert 'mt5_backup_runs_total{outcome="ok"} 1' in metrics

    system.stop()
    again = system.mt5("backup", "run", "--unless-newer", "1h")
    assert (again.returncode, again.stdout) == (0, f"{verdict.backup} is new enough, none was made.\n"), again.stderr
    alone = system.mt5("backup", "run")
    assert alone.returncode == 0, alone.stderr
    assert " is made and shipped to " in alone.stdout
    assert "is not encrypted" in alone.stdout
    assert len(list((tmp_path / "there").iterdir())) == 1  # one a day
    with the_only_one(system.home):
        busy = system.mt5("backup", "run")
    assert busy.returncode == 1
    assert busy.stderr.startswith("mt5: Another process makes a backup in ")


async def events(bus: Bus) -> list[BackupEvent]:
    subscription = await bus.js.subscribe(BACKUPS.wildcard, ordered_consumer=True)
    found = []
    with contextlib.suppress(TimeoutError):
        while True:
            found.append(BACKUPS.decode((await subscription.next_msg(timeout=0.5)).data))
    return found


@contextlib.asynccontextmanager
async def agent(nats_url: str, pg_url: str, home: Path, **backup: Any) -> AsyncIterator[None]:
    """The actor in this process, until the block ends."""
    bins = {str(major): str(folder) for major, folder in installs().items()}
    settings = Settings(home=str(home), backup=Backup(postgres_bins=bins, **backup))
    ready, stop = asyncio.Event(), asyncio.Event()
    running = asyncio.create_task(
        run_actors(
            [Agent],
            settings,
            nats_urls={"backup": nats_url},
            database_url=pg_url,
            on_ready=lambda _: ready.set(),
            stop=stop,
        )
    )
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED, timeout=20)
    assert ready.is_set()
    try:
        yield
    finally:
        stop.set()
        await running


async def backups(home: Path) -> set[str]:
    return await LocalPlace(folder_of(home)).names()


async def test_a_missed_run_is_made_up_for_shipped_once_the_target_is_there_and_proved(
    bus: Bus, nats_url: str, pg_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way of a night: due, made, target away, tried again without making another one, then restored and compared."""
    home, there = tmp_path / "var", tmp_path / "there"
    monkeypatch.setattr(actors.backup, "MISSED_AFTER", 0.0)
    monkeypatch.setattr(actors.backup, "RETRY_FIRST", 0.2)
    environment = {"MT5_HOME": home, "MT5_NATS_URL": nats_url, "MT5_DATABASE_URL": pg_url, "PYTHONPATH": ROOT}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))  # what the command that proves a backup is started with
    there.write_text("a file where the folder should be")
    due = datetime.now(UTC) - timedelta(minutes=2)
    verified = await bus.nc.subscribe(BACKUPS.subject("verified"))
    async with agent(nats_url, pg_url, home, schedule=f"{due:%H:%M}", target=str(there)):

        async def concern() -> str:
            return msgspec.json.decode(await bus.request(status_of("backup")), type=Status).concern

        async with asyncio.timeout(30):
            while "is made, and not shipped" not in await concern():
                await asyncio.sleep(0.05)
        (made,) = await backups(home)
        there.unlink()
        assert BACKUPS.decode((await verified.next_msg(timeout=90)).data).backup == made
        assert (await LocalPlace(folder_of(home)).list())[0].verified_at is not None
        assert await LocalPlace(there).names() == await backups(home) == {made}
        assert await concern() == ""
    told = [event.event for event in await events(bus)]
    assert told[:2] == ["made", "failed"]
    assert told.count("made") == 1
    assert told[-2:] == ["shipped", "verified"]


async def test_a_run_that_is_not_due_waits(bus: Bus, nats_url: str, pg_url: str, tmp_path: Path) -> None:
    home = tmp_path / "var"
    later = datetime.now(UTC) + timedelta(hours=2)
    async with agent(nats_url, pg_url, home, schedule=f"{later:%H:%M}"):
        answer = msgspec.json.decode(await bus.request(BACKUP_RUN, b"{}", timeout=30), type=BackupVerdict)
        assert answer.ok, answer.message
        assert await backups(home) == {answer.backup}


async def test_requests_that_are_none_and_one_too_many(bus: Bus, nats_url: str, pg_url: str, tmp_path: Path) -> None:
    async with agent(nats_url, pg_url, tmp_path / "var"):
        for wrong in (b"[", b'{"what": 1}', b'{"progress": "candles.M1.EURUSD"}'):
            answer = msgspec.json.decode(await bus.request(BACKUP_RUN, wrong), type=BackupVerdict)
            assert not answer.ok
            assert answer.message.startswith("This is not a request for a backup: ")
        both = await asyncio.gather(*(bus.request(BACKUP_RUN, b"", timeout=30) for _ in range(2)))
        verdicts = [msgspec.json.decode(one, type=BackupVerdict) for one in both]
        assert sorted((one.ok, one.busy) for one in verdicts) == [(False, True), (True, False)]


async def test_an_agent_that_stops_meanwhile_says_so(
    bus: Bus, nats_url: str, pg_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "var"
    begun = asyncio.Event()
    inbox = bus.nc.new_inbox()

    async def on_progress(_: Any) -> None:
        begun.set()

    monkeypatch.setattr(actors.backup, "TELL_EVERY", 0.001)
    await bus.nc.subscribe(inbox, cb=on_progress)
    async with agent(nats_url, pg_url, home):
        asking = asyncio.create_task(
            bus.request(BACKUP_RUN, msgspec.json.encode({"progress": inbox}), timeout=30), name="ask"
        )
        await begun.wait()
    answer = msgspec.json.decode(await asking, type=BackupVerdict)
    assert not answer.ok
    assert "is stopping; ask again" in answer.message
    assert await backups(home) == set()
    assert {path.name for path in folder_of(home).iterdir()} == {".lock"}
