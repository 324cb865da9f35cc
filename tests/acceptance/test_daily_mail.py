"""The daily report of a running system: the monitor makes it, and one mail leaves a day."""

from __future__ import annotations

import json
import re
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import pytest

from actors.monitor.journal import Journal
from tests.acceptance.conftest import Make, mailing
from tests.mailbox import Mailbox, Received
from tests.servers import wait_until
from tests.system import System

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def system(make: Make, mailbox: Mailbox) -> System:
    made = make(**mailing(mailbox), MT5_HEALTH_INTERVAL_SECONDS="1")
    made.start()
    return made


def reports(box: Mailbox) -> list[Received]:
    return [one for one in box.received if one.mail["X-MT5-Kind"] == "report"]


def looked_at(system: System, check: str) -> bool:
    journal = Journal.reading(system.home)
    if journal is None:
        return False
    with closing(journal):
        return any(one.status == "ok" for one in journal.latest([check]))


def asked(system: System, *words: str) -> Any:
    done = system.mt5("health", "report", "--json", *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_monitor_mails_it_once_a_day(system: System, mailbox: Mailbox) -> None:
    wait_until(lambda: looked_at(system, "actor.collector"), 60, "a look at the collector")
    day = f"{datetime.now(UTC):%Y-%m-%d}"  # by name, so that midnight may pass between the two
    first, second = (asked(system, "--mail", "--day", day) for _ in range(2))
    assert (first["notice"], first["new"], first["senders"]) == (f"report:day:{day}", True, ["smtp"])
    assert (second["notice"], second["new"], second["senders"]) == (f"report:day:{day}", False, ["smtp"])
    wait_until(lambda: reports(mailbox), 30, "the mail")
    (kept,) = reports(mailbox)
    mail = kept.mail
    assert "Daily report, " in str(mail["Subject"])
    page = mail.get_body(("html",))
    assert page is not None
    shown = set(re.findall(r'src="cid:([^"]+)"', page.get_content()))
    sent = {str(part["Content-ID"]).strip("<>") for part in mail.walk() if part.get_content_type() == "image/png"}
    assert shown == sent
    assert "services" in sent
    assert "collector" in page.get_content()


def test_a_terminal_shows_what_the_monitor_saw(system: System) -> None:
    said = asked(system)
    assert {"collector", "PostgreSQL", "NATS"} <= {service["name"] for service in said["watch"]["services"]}
    assert set(said["problems"]) <= {"commits"}  # where the tests' checkout is no git repository of its own
