"""A running `mt5 up` that is broken in five ways: each opens exactly one mail, and closes it with exactly one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import psutil
import pytest

from actors.core.mail import address, compose, flatten, message_id
from actors.monitor.journal import Journal
from deploy.embedded import PostgresServer
from schema.health import CheckResult, Notice
from tests.acceptance.conftest import Make
from tests.conftest import missing
from tests.exposition import parse
from tests.mailbox import Mailbox, mail_server
from tests.servers import wait_until
from tests.system import System

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

SENDER, PERSON = "MT5 <mt5@example.org>", "owner@example.org"
RUNNER = "actions.runner.acme-mt5.box"
OPENS = (
    60.0  # seconds for an alert to arrive: two failures and the wait for what fails with it, beside what else runs here
)
DISK_BYTES = 8 * 1024**2

SYSTEMCTL = """#!/bin/sh
case "$1" in
  list-unit-files) echo "{runner}.service enabled enabled" ;;
  is-active) cat "{state}"; test "$(cat "{state}")" = active || exit 3 ;;
  *) exit 1 ;;
esac
"""


@dataclass
class Scene:
    """What the tests share: the system, what it depends on, and the mailbox of its owner."""

    system: System
    postgres: PostgresServer
    mailbox: Mailbox
    disk: Path | None
    runner: Path  # holds the state that systemctl tells

    def results(self, check: str) -> list[CheckResult]:
        """What the monitor has recorded of a check, oldest first."""
        journal = Journal.reading(self.system.home)
        assert journal is not None
        try:
            now = datetime.now(UTC)
            return journal.results(check, now - timedelta(hours=1), now + timedelta(minutes=1))
        finally:
            journal.close()

    def is_now(self, check: str, status: str) -> bool:
        found = self.results(check)
        return bool(found) and found[-1].status == status

    def notices(self) -> dict[str, Notice]:
        """Everything that was queued for mail, by its Message-ID."""
        journal = Journal.reading(self.system.home)
        assert journal is not None
        try:
            rows = journal.connection.execute("SELECT body FROM outbox WHERE sender = 'smtp'").fetchall()
        finally:
            journal.close()
        found = [msgspec.json.decode(body, type=Notice) for (body,) in rows]
        return {message_id(one.id, "example.org"): one for one in found}

    @contextmanager
    def told_once(self, check: str, severity: str, heal: Callable[[], None]) -> Iterator[None]:
        """The block breaks something: one mail opens it; it is healed, and one mail closes it; there is no other."""
        before = len(self.mailbox.received)
        yield
        wait_until(lambda: len(self.mailbox.received) > before, OPENS, f"a mail about {check}")
        self._goes_on(4)
        heal()
        wait_until(lambda: len(self.mailbox.received) > before + 1, OPENS, f"a mail that {check} is over")
        self._goes_on(4)
        mails = self.mailbox.received[before:]
        queued = self.notices()
        told = [queued[str(one.mail["Message-ID"])] for one in mails]
        assert [notice.kind for notice in told] == ["opened", "closed"], [one.mail["Subject"] for one in mails]
        opened, closed = told
        assert opened.incident == closed.incident
        assert opened.severity == closed.severity == severity
        assert check in opened.checks
        for one, notice in zip(mails, told, strict=True):
            assert one.recipients == (PERSON,)
            assert one.sender == "mt5@example.org"
            wanted = compose(notice, address(SENDER), [address(PERSON)])
            assert one.raw == flatten(wanted), "the mail is not what was decided"
            assert one.mail["Subject"] == wanted["Subject"]
        body = mails[0].mail.get_body(("plain",))
        assert body is not None
        assert all(line.split(":")[0] in body.get_content() for line in opened.lines if line)

    def _goes_on(self, beats: int) -> None:
        """Waits for some more beats, in which nothing more is to be told."""
        seen = len(self.results("nats"))
        wait_until(lambda: len(self.results("nats")) >= seen + beats, OPENS, f"{beats} more beats")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A file system of its own that may be filled; None where this user may not mount one."""
    folder = tmp_path_factory.mktemp("disk")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder], capture_output=True)
    if done.returncode != 0:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def scene(make: Make, disk: Path | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("scene")
    state = folder / "state"
    state.write_text("active\n")
    systemctl = folder / "bin" / "systemctl"
    systemctl.parent.mkdir()
    systemctl.write_text(SYSTEMCTL.format(runner=RUNNER, state=state))
    systemctl.chmod(0o755)
    postgres = PostgresServer(folder / "postgres")
    postgres.start()
    try:
        with mail_server() as mailbox:
            system = make(
                PATH=f"{systemctl.parent}{os.pathsep}{os.environ['PATH']}",
                MT5_DATABASE_URL=postgres.url,
                MT5_HEALTH_INTERVAL_SECONDS="0.5",
                MT5_HEALTH_TIMEOUT_SECONDS="6",
                MT5_HEALTH_STALE_SECONDS="30",
                MT5_HEALTH_DISKS=str(disk or ""),
                MT5_ALERTS_GROUP_SECONDS="1",
                MT5_NOTIFY_SMTP_HOST="127.0.0.1",
                MT5_NOTIFY_SMTP_PORT=str(mailbox.port),
                MT5_NOTIFY_SMTP_SECURITY="none",
                MT5_NOTIFY_SMTP_SENDER=SENDER,
                MT5_NOTIFY_SMTP_RECIPIENTS=PERSON,
            )
            system.start()
            made = Scene(system, postgres, mailbox, disk, state)
            checks = (
                "database",
                "actor.trainer",
                "actor.scorer",
                "actor.recorder",
                f"runner.{RUNNER}",
                "endpoint./health",
            )
            wait_until(lambda: all(made.is_now(check, "ok") for check in checks), 60, "everything is well")
            yield made
            system.end()
    finally:
        postgres.stop()


def test_what_is_well_is_told_by_no_mail_and_said_when_asked(scene: Scene) -> None:
    done = scene.system.mt5("health", "check", "--json")
    assert done.returncode == 0, done.stdout
    answer = json.loads(done.stdout)
    assert answer["by"] == "monitor"
    found = {one["check"]: one["status"] for one in answer["results"]}
    actors = ("collector", "features", "emitter", "recorder", "trainer", "scorer", "health", "backup")
    assert {found[f"actor.{actor}"] for actor in actors} == {"ok"}
    assert found["nats.publish"] == found["nats.stream.CANDLES"] == found["disk.home"] == "ok"
    assert "critical" not in found.values()
    assert scene.mailbox.received == []
    # The monitor's figures are in the gateway's scrape.
    with urllib.request.urlopen(scene.system.ready["gateway"] + "/metrics", timeout=10) as page:
        families = parse(page.read().decode())
    assert families["mt5_check_status"].of(process="health", check="database") == [0]
    assert families["mt5_incidents_open"].of(process="health") == [0]


def test_a_dead_postgresql_is_one_mail_and_not_ten(scene: Scene) -> None:
    pid = scene.postgres.pid
    assert pid is not None
    with scene.told_once("database", "critical", scene.postgres.start):
        psutil.Process(pid).kill()  # SIGKILL to the postmaster; its backends end with it
        scene.postgres.stop()  # and nobody brings it back
        wait_until(lambda: scene.is_now("database", "critical"), OPENS, "the monitor sees it")
        done = scene.system.mt5("health", "check", "database")
        assert done.returncode == 1
        assert "CRITICAL  database" in done.stdout


def test_a_full_disk(scene: Scene) -> None:
    if scene.disk is None:
        missing("this user may not mount a tmpfs: run the tests as root")
    file = scene.disk / "full"
    with scene.told_once(f"disk.{scene.disk.name}", "critical", file.unlink):
        file.write_bytes(b"\0" * (DISK_BYTES - 64 * 1024))


def test_a_stopped_actor(scene: Scene) -> None:
    process = scene.system.child("trainer")
    with scene.told_once("actor.trainer", "critical", lambda: process.send_signal(signal.SIGCONT)):
        process.send_signal(signal.SIGSTOP)


def test_a_dead_runner(scene: Scene) -> None:
    def back() -> None:
        scene.runner.write_text("active\n")

    with scene.told_once(f"runner.{RUNNER}", "critical", back):
        scene.runner.write_text("failed\n")


def bars(first: int, count: int) -> list[dict[str, float]]:
    return [
        {"time": first + 60 * n, "open": 1.0, "high": 1.0, "low": 1.0, "close": 1.0, "volume": 1} for n in range(count)
    ]


def test_a_stale_feed(scene: Scene) -> None:
    """Of a series that trades on weekends too, since nobody knows when this test runs."""
    payload = {"symbol": "BTCUSD", "timeframe": "M1"}
    now = int(time.time()) // 60 * 60
    span = 77 * 60  # minutes, more than three days: every hour of a weekday is among them
    day = now // 86_400
    noon = (day - (day - 2) % 7) * 86_400 + 43_200  # of the last Saturday
    saturday = noon if noon < now - 60 * span else noon - 7 * 86_400
    past = {**payload, "history": True}
    scene.system.post({**past, "candles": bars(saturday, 10)})
    scene.system.post({**past, "candles": bars(now - 60 * span, span - 30)})
    scene.system.settle()

    def back() -> None:
        scene.system.post({**payload, "candles": bars(now - 600, (int(time.time()) // 60 * 60 - now) // 60 + 10)})

    with scene.told_once("feed.M1.BTCUSD", "critical", back):
        scene.system.post({**payload, "candles": bars(now - 60 * 30, 20)})


def test_what_was_wrong_can_be_looked_up(scene: Scene) -> None:
    done = scene.system.mt5("health", "incidents", "--json")
    found = json.loads(done.stdout)["incidents"]
    assert len(found) >= 4
    assert all(one["closed_at"] is not None for one in found)
    stats = json.loads(scene.system.mt5("health", "stats", "database", "--json").stdout)["checks"]
    (database,) = [one for one in stats if one["check"] == "database"]
    assert database["critical"] >= 2
    assert 0 < database["uptime"] < 1
    assert database["latency"]["minimum"] <= database["latency"]["p95"] <= database["latency"]["maximum"]
    table = scene.system.mt5("health", "stats", "database").stdout
    assert table.splitlines()[0].startswith("check")
    test = scene.system.mt5("health", "test-alert", "--json")
    assert test.returncode == 0, test.stderr
    assert {one["sender"]: one["sent"] for one in json.loads(test.stdout)["deliveries"]} == {"nats": True, "smtp": True}
    assert shutil.which("systemctl", path=scene.system.settings["PATH"]) is not None


def test_without_a_running_system_the_command_says_so(make: Make) -> None:
    system = make()
    done = system.mt5("health", "check")
    assert done.returncode == 1
    assert "CRITICAL  nats" in done.stdout
    assert "start everything with `mt5 up`" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert system.mt5("health", "stats").returncode == 1
    assert "the monitor has never run there" in system.mt5("health", "incidents").stderr
    assert "Nobody is told of anything" in system.mt5("health", "test-alert").stderr
    assert system.mt5("health", "check", "nonsense").returncode == 2
