"""The nightly jobs beside a running system: what they ask of it is done, and its monitor mails what came of it."""

from __future__ import annotations

import json

import pytest

from tests.acceptance.conftest import Make, mailing
from tests.mailbox import Mailbox
from tests.servers import wait_until
from tests.system import System

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def system(make: Make, mailbox: Mailbox) -> System:
    made = make(**mailing(mailbox), MT5_HEALTH_INTERVAL_SECONDS="2")
    made.start()
    return made


def mails(box: Mailbox, word: str) -> list[str]:
    return [str(got.mail["Subject"]) for got in list(box.received) if word in str(got.mail["Subject"])]


def test_a_backup_is_made_verified_and_told(system: System, mailbox: Mailbox) -> None:
    done = system.mt5("job", "remote-backup", "--json", timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["ok"]
    assert result["summary"].endswith(" was made and verified.")
    assert any(line.startswith("Restored for proof: ") for line in result["details"]), result
    assert json.loads((system.home / "jobs" / "remote-backup.json").read_text()) == result
    wait_until(lambda: mails(mailbox, "remote-backup"), 15, "its mail")
    assert mails(mailbox, "remote-backup") == [f"[MT5] remote-backup: {result['summary']}"], "once"


def test_the_report_is_the_mail_of_its_job(system: System, mailbox: Mailbox) -> None:
    for _ in range(2):
        done = system.mt5("job", "daily-report", "--json")
        assert done.returncode == 0, done.stderr
    wait_until(lambda: mails(mailbox, ""), 15, "the report")
    assert mails(mailbox, "daily-report") == [], "no mail about the mail"
    reports = [got for got in mailbox.received if got.mail.get_body(("html",)) is not None]
    assert len(reports) == 1, "a day has one report"


def test_a_machine_without_a_runner_is_told_nothing(system: System, mailbox: Mailbox) -> None:
    done = system.mt5("job", "runner-check", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["summary"] == "There is no CI runner here."
    assert mails(mailbox, "runner-check") == []


def test_a_version_that_was_put_back_starts_on_the_database_of_the_newer_one(system: System) -> None:
    """Migrations only add: what an update has applied before it was put back must not keep the older version down."""
    system.fetch("INSERT INTO schema_migrations (version) VALUES ('9999_later')")
    system.stop()
    system.start()
    assert "the database is newer than this version" in system.logs()
    system.fetch("DELETE FROM schema_migrations WHERE version = '9999_later'")
