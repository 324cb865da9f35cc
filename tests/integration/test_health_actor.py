"""The monitor itself on real servers: what it is asked, what others tell it, and what it remembers over a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from actors.health import CheckAnswer, CheckRequest, Health, TrialAnswer
from actors.monitor.journal import Journal
from bus.client import Bus, outgoing
from bus.consume import Reader
from bus.subjects import ALERTS, HEALTH_CHECK, TEST_ALERT
from schema.messages import Alert
from schema.settings import Alerts, Notify, Settings, Smtp
from schema.settings import Health as HealthSettings
from tests.builders import running
from tests.mailbox import Mailbox, mail_server


def settings_of(home: Path, mailbox: Mailbox, **health: object) -> Settings:
    beat: dict[str, object] = {"interval_seconds": 0.1, "timeout_seconds": 3.0, "endpoints": (), "stale_seconds": 60.0}
    return Settings(
        home=str(home),
        health=HealthSettings(**(beat | health)),  # type: ignore[arg-type]
        alerts=Alerts(after=2, clear=2, group_seconds=0.0),
        notify=Notify(
            smtp=Smtp(
                host="127.0.0.1",
                port=mailbox.port,
                security="none",
                sender="mt5@example.org",
                recipients=("o@example.org",),
            )
        ),
    )


async def until(condition: Callable[[], object], what: str, seconds: float = 20.0) -> None:
    try:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {seconds:g} s: {what}") from None


async def say(bus: Bus, check: str, severity: str = "warning", *, source: str | None = None, number: int = 0) -> None:
    alert = Alert(
        severity=severity,  # type: ignore[arg-type]
        check=check,
        message=f"{check} is not as it should be",
        at=datetime.now(UTC),
        source=source,
    )
    await bus.store(outgoing(ALERTS, alert, severity, check, msg_id=f"{check}-{source}-{number}"))


def subjects(mailbox: Mailbox) -> list[str]:
    return [str(one.mail["Subject"]) for one in mailbox.received]


def about(mailbox: Mailbox, word: str) -> list[str]:
    """Mails that name something; the actors that do not run here are another incident."""
    return [text for one in mailbox.received if word in (text := f"{one.mail['Subject']}\n{one.raw.decode()}")]


async def test_it_answers_what_it_is_asked(bus: Bus, nats_url: str, pg_url: str, tmp_path: Path) -> None:
    with mail_server() as mailbox:
        async with running(Health, nats_url=nats_url, database_url=pg_url, settings=settings_of(tmp_path, mailbox)):
            request = msgspec.json.encode(CheckRequest(("database", "nats")))
            answer = msgspec.json.decode(await bus.request(HEALTH_CHECK, request), type=CheckAnswer)
            found = {one.check: one.status for one in answer.results}
            assert found["database"] == found["nats"] == found["nats.publish"] == "ok"
            assert not [check for check in found if check.startswith("disk")]
            whole = msgspec.json.decode(await bus.request(HEALTH_CHECK, b"not json"), type=CheckAnswer)
            assert {one.check for one in whole.results} >= {"actor.health", "disk.home", "outbox", *found}
            test = msgspec.json.decode(await bus.request(TEST_ALERT, timeout=20), type=TrialAnswer)
            assert {one.sender: one.sent_at is not None for one in test.deliveries} == {"nats": True, "smtp": True}
            assert any("test" in subject.lower() for subject in subjects(mailbox))


async def test_other_actors_alerts_are_told_once_and_its_own_are_not_taken_for_theirs(
    bus: Bus, nats_url: str, pg_url: str, tmp_path: Path
) -> None:
    with mail_server() as mailbox:
        async with running(Health, nats_url=nats_url, database_url=pg_url, settings=settings_of(tmp_path, mailbox)):
            await say(bus, "clock", source="Broker-Demo")
            await until(lambda: about(mailbox, "event.clock.Broker-Demo"), "a mail about the clock")
            await say(bus, "clock", source="Broker-Demo", number=2)
            await say(bus, "audit", "critical")
            await until(lambda: about(mailbox, "event.audit"), "a mail about the audit")
            assert len(about(mailbox, "event.clock.Broker-Demo")) == 1
            # The monitor's own stand on the same subjects, and name their incident.
            own: list[Alert] = []
            async with Reader(bus, ALERTS, name="operator", start=1, subject=ALERTS.wildcard) as reader:
                while len({one.check for one in own}) < 2:
                    message = (await reader.next(10.0)).message
                    own += [message] if message.incident else []
            assert {one.event for one in own} == {"opened"}
        journal = Journal.reading(tmp_path)
        assert journal is not None
        names = journal.checks()
        journal.close()
        assert "event.clock.Broker-Demo" in names
        assert not [name for name in names if name.startswith("event.event") or "event.actor" in name]


async def test_what_happens_while_it_is_away_is_told_when_it_is_back(
    bus: Bus, nats_url: str, pg_url: str, tmp_path: Path
) -> None:
    with mail_server() as mailbox:
        settings = settings_of(tmp_path, mailbox)
        async with running(Health, nats_url=nats_url, database_url=pg_url, settings=settings):
            await say(bus, "first")
            await until(lambda: about(mailbox, "event.first"), "a mail about the first")
        await say(bus, "second")
        async with running(Health, nats_url=nats_url, database_url=pg_url, settings=settings):
            await until(lambda: about(mailbox, "event.second"), "a mail about the second")
        assert len(about(mailbox, "event.first: ")) <= 2, "not told anew by the one that came back"
        journal = Journal.reading(tmp_path)
        assert journal is not None
        first = journal.results("event.first", datetime(2020, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC))
        journal.close()
        assert len(first) == 1, "taken in once"


async def test_an_incident_lasts_over_a_restart_and_is_closed_once(
    bus: Bus, nats_url: str, pg_url: str, tmp_path: Path
) -> None:
    pem = tmp_path / "server.pem"
    with mail_server() as mailbox:
        settings = settings_of(tmp_path / "home", mailbox, certificates=(str(pem),))

        async def whole(condition: Callable[[], object], what: str) -> None:
            async with running(Health, nats_url=nats_url, database_url=pg_url, settings=settings):
                await until(condition, what)

        word = f"certificate.{pem}"
        await whole(lambda: len(about(mailbox, word)) == 1, "it is opened")
        journal = Journal.open(tmp_path / "home")
        assert journal.incidents(datetime.now(UTC))[0].closed_at is None
        journal.close()
        gone = msgspec.structs.replace(settings, health=msgspec.structs.replace(settings.health, certificates=()))
        settings = (
            gone  # the setting is taken out while the monitor is away: nobody will ever say that it is well again
        )
        await whole(lambda: len(about(mailbox, word)) == 2, "it is closed")
    journal = Journal.open(tmp_path / "home")
    rows = journal.connection.execute("SELECT notice FROM outbox WHERE sender = 'smtp' ORDER BY rowid").fetchall()
    (incident,) = [one for one in journal.incidents(datetime(2020, 1, 1, tzinfo=UTC)) if word in one.checks]
    journal.close()
    assert incident.closed_at is not None
    assert [notice for (notice,) in rows if notice.startswith(f"{incident.id}:")] == [
        f"{incident.id}:opened",
        f"{incident.id}:closed",
    ]


async def test_it_runs_without_a_database_and_without_any_sender(bus: Bus, nats_url: str, tmp_path: Path) -> None:
    settings = Settings(home=str(tmp_path), health=HealthSettings(interval_seconds=0.1, timeout_seconds=3.0))
    async with running(Health, nats_url=nats_url, settings=settings):
        request = msgspec.json.encode(CheckRequest(("database",)))
        answer = msgspec.json.decode(await bus.request(HEALTH_CHECK, request), type=CheckAnswer)
        assert {one.status for one in answer.results if one.check == "database"} == {"critical"}
        test = msgspec.json.decode(await bus.request(TEST_ALERT, timeout=20), type=TrialAnswer)
        assert [one.sender for one in test.deliveries] == ["nats"]


async def test_nats_goes_and_comes_and_the_monitor_does_not_fall(
    bus: Bus, nats: object, nats_url: str, pg_url: str, tmp_path: Path
) -> None:
    from deploy.embedded import NatsServer

    assert isinstance(nats, NatsServer)
    began = datetime.now(UTC)
    with mail_server() as mailbox:
        settings = settings_of(tmp_path, mailbox)
        async with running(Health, nats_url=nats_url, database_url=pg_url, settings=settings):
            journal = Journal.reading(tmp_path)
            assert journal is not None

            def now_is(check: str, status: str) -> bool:
                return [one.status for one in journal.latest([check]) if one.check == check] == [status]

            try:
                await until(lambda: now_is("nats.publish", "ok"), "NATS is well")
                nats.stop()
                await until(lambda: now_is("nats", "critical"), "NATS is seen to be away")
                await until(lambda: any("nats" in subject for subject in subjects(mailbox)), "a mail without NATS")
                nats.start()
                await until(lambda: now_is("nats.publish", "ok") and now_is("nats", "ok"), "NATS is back")
                # On a busy machine one check sees it before the other, which the same incident then takes in.
                assert len([one for one in journal.incidents(began) if "nats" in one.checks]) == 1
            finally:
                journal.close()
