"""The outbox on a real database: nothing lost, nothing doubled, order kept, and no sender in another's way."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from actors.core.mail import message_id
from actors.monitor import outbox as module
from actors.monitor.outbox import PAUSE_MAX, PAUSE_REFUSED, Outbox, Sender, SendFailed, pause_after
from actors.monitor.senders import senders
from bus.telemetry import notices_total
from schema.health import Notice
from schema.settings import Notify, Smtp, Webhook
from tests.mailbox import mail_server
from tests.outbox_process import database, notice
from tests.receivers import receiver

NOW = datetime(2026, 11, 27, 4, 0, tzinfo=UTC)


class Person:
    """Takes notices, or fails as a test says; what it took is in ``got``."""

    def __init__(self, name: str = "smtp") -> None:
        self.name = name
        self.got: list[str] = []
        self.tries = 0
        self.failure: Exception | None = None
        self.refuses: set[str] = set()
        self.remark: str | None = None
        self.gate: asyncio.Event | None = None
        self.begun = asyncio.Event()

    async def send(self, notice: Notice) -> str | None:
        self.tries += 1
        self.begun.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        if notice.id in self.refuses:
            raise SendFailed("Too large.", permanent=True)
        self.got.append(notice.id)
        return self.remark


def ids(*numbers: int) -> list[str]:
    return [notice(number).id for number in numbers]


def later(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(database(tmp_path)) as made:
        yield made


@pytest.fixture
def person() -> Person:
    return Person()


@pytest.fixture
def box(connection: sqlite3.Connection, person: Person) -> Outbox:
    return Outbox(connection, {"smtp": person})


def queue(box: Outbox, *numbers: int) -> None:
    box.enqueue([notice(number) for number in numbers], NOW)


async def until(condition: object, what: str) -> None:
    assert callable(condition)
    try:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.002)
    except TimeoutError:
        pytest.fail(f"not within 10 s: {what}")


async def stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# --- once, in order --------------------------------------------------------------------------------------------------


async def test_each_notice_is_told_once_in_order(box: Outbox, person: Person) -> None:
    queue(box, 0, 1, 2)
    queue(box, 1)
    assert box.waiting() == 3
    assert box.oldest() == NOW.timestamp()
    await box.deliver_due(NOW)
    queue(box, 0, 2)  # an incident told twice is a defect elsewhere; here it is the same notice
    await box.deliver_due(later(1e6))
    assert person.got == ids(0, 1, 2)
    assert box.waiting() == 0
    assert box.oldest() is None


async def test_what_was_queued_goes_back_with_its_transaction(
    box: Outbox, person: Person, connection: sqlite3.Connection
) -> None:
    connection.execute("BEGIN IMMEDIATE")
    queue(box, 0)
    connection.execute("ROLLBACK")
    await box.deliver_due(NOW)
    assert person.got == []
    assert box.waiting() == 0


@pytest.mark.parametrize("level", [None, "", "IMMEDIATE"])
async def test_any_mode_of_a_connection_will_do(tmp_path: Path, person: Person, level: str | None) -> None:
    """What was noted must be seen by others at once, whatever sqlite3's idea of transactions."""
    database(tmp_path).close()
    with (
        closing(sqlite3.connect(tmp_path / "health_checks.db", isolation_level=level)) as own,  # type: ignore[arg-type]
        closing(database(tmp_path)) as other,
    ):
        box = Outbox(own, {"smtp": person})
        with own:
            queue(box, 0)
        await box.deliver_due(NOW)
        assert not own.in_transaction
        assert other.execute("SELECT count(*) FROM outbox WHERE sent_at IS NOT NULL").fetchone() == (1,)
        assert box.prune(later(31 * 86_400), 30) == 1
        assert not own.in_transaction
        assert other.execute("SELECT count(*) FROM outbox").fetchone() == (0,)


async def test_it_goes_on_where_another_life_ended(tmp_path: Path) -> None:
    with closing(database(tmp_path)) as first:
        away = Person()
        away.failure = SendFailed("away")
        box = Outbox(first, {"smtp": away})
        queue(box, 0, 1)
        await box.deliver_due(datetime.now(UTC) + timedelta(seconds=600))
    with closing(database(tmp_path)) as second:
        person = Person()
        box = Outbox(second, {"smtp": person})
        assert box.waiting() == 2
        task = asyncio.create_task(box.run())
        await until(lambda: box.waiting() == 0, "what waited for its next try is tried at once")
        await stop(task)
    assert person.got == ids(0, 1)


# --- failures --------------------------------------------------------------------------------------------------------


async def test_a_closed_way_is_tried_again_with_longer_pauses_and_keeps_its_order(box: Outbox, person: Person) -> None:
    person.failure = SendFailed("127.0.0.1:25 is away.")
    queue(box, 0, 1)
    await box.deliver_due(NOW)
    assert person.tries == 1, "the second would fail as well"
    at = 0.0
    for attempt in range(1, 12):
        pause = pause_after(attempt)
        await box.deliver_due(later(at + pause - 1))
        assert person.tries == attempt, "too early"
        at += pause + 1
        await box.deliver_due(later(at))
        assert person.tries == attempt + 1
    assert pause == PAUSE_MAX
    person.failure = None
    await box.deliver_due(later(at + PAUSE_MAX - 1))
    assert person.got == []
    await box.deliver_due(later(at + PAUSE_MAX + 1))
    assert person.got == ids(0, 1)


@given(st.integers(min_value=1, max_value=10**9))
def test_pauses_grow_to_a_bound(attempts: int) -> None:
    assert 5.0 <= pause_after(attempts) <= pause_after(attempts + 1) <= PAUSE_MAX
    assert [pause_after(n) for n in (1, 2, 3, 8, 9)] == [5, 10, 20, 640, 900]


async def test_a_server_that_says_when_to_come_again_is_heeded_within_reason(box: Outbox, person: Person) -> None:
    queue(box, 0)
    person.failure = SendFailed("429", retry_after=40.0)
    await box.deliver_due(NOW)
    await box.deliver_due(later(38))
    assert person.tries == 1
    person.failure = SendFailed("429", retry_after=1e9)
    await box.deliver_due(later(42))
    assert person.tries == 2
    await box.deliver_due(later(40 + PAUSE_MAX))
    assert person.tries == 2
    person.failure = None
    await box.deliver_due(later(42 + PAUSE_MAX + 1))
    assert person.got == ids(0)


async def test_a_refused_notice_lets_the_others_pass_and_is_tried_seldom(box: Outbox, person: Person) -> None:
    person.refuses = {notice(0).id}
    queue(box, 0, 1)
    await box.deliver_due(NOW)
    assert person.got == ids(1)
    assert box.waiting() == 1
    assert box.oldest() is None, "mail leaves: the dead man's switch need not fire"
    queue(box, 2)
    await box.deliver_due(later(3_600))
    assert person.got == ids(1, 2)
    assert person.tries == 3
    person.refuses = set()
    await box.deliver_due(later(PAUSE_REFUSED + 1))
    assert person.got == ids(1, 2, 0)
    assert box.waiting() == 0


async def test_while_the_way_is_closed_a_refused_one_is_not_tried_either(box: Outbox, person: Person) -> None:
    person.refuses = {notice(0).id}
    queue(box, 0)
    await box.deliver_due(NOW)
    queue(box, 1)
    person.failure = SendFailed("away")
    await box.deliver_due(later(PAUSE_REFUSED + 1))
    assert person.tries == 2


async def test_a_defect_that_one_notice_shows_keeps_back_no_other(box: Outbox, person: Person) -> None:
    class Odd(Person):
        async def send(self, told: Notice) -> str | None:
            if told.id == notice(0).id:
                raise ZeroDivisionError("secret in a message")
            return await super().send(told)

    odd = Odd()
    box._senders["smtp"] = odd
    queue(box, 0, 1)
    before = notices_total.value(sender="smtp", result="refused")
    with capture_logs() as logs:
        await box.deliver_due(NOW)
    assert odd.got == ids(1)
    assert box.waiting() == 1
    assert notices_total.value(sender="smtp", result="refused") == before + 1
    assert [line["action"] for line in logs] == ["notify.defect", "notify.refused", "notify.sent"]


async def test_a_row_that_nobody_can_read_keeps_back_no_other(
    box: Outbox, person: Person, connection: sqlite3.Connection
) -> None:
    queue(box, 0, 1)
    connection.execute("UPDATE outbox SET body = x'7b' WHERE notice = ?", ids(0))
    await box.deliver_due(NOW)
    assert person.got == ids(1)


async def test_a_sender_that_never_answers_is_cut_off(
    box: Outbox, person: Person, monkeypatch: pytest.MonkeyPatch, connection: sqlite3.Connection
) -> None:
    monkeypatch.setattr(module, "SEND_SECONDS", 0.05)
    person.gate = asyncio.Event()
    queue(box, 0)
    await box.deliver_due(NOW)
    (error,) = connection.execute("SELECT error FROM outbox").fetchone()
    assert error == "There was no answer within 0.05 seconds."
    person.gate.set()
    await box.deliver_due(later(6))
    assert person.got == ids(0)


async def test_a_remark_is_kept_and_logged(box: Outbox, person: Person, connection: sqlite3.Connection) -> None:
    person.remark = "The server refuses night@example.org: 550 unknown."
    queue(box, 0)
    with capture_logs() as logs:
        await box.deliver_due(NOW)
    assert connection.execute("SELECT error, sent_at IS NULL FROM outbox").fetchone() == (person.remark, 0)
    assert [(line["action"], line["log_level"]) for line in logs] == [
        ("notify.remark", "error"),
        ("notify.sent", "info"),
    ]


async def test_a_clock_that_is_set_back_delays_nothing_for_long(box: Outbox, person: Person) -> None:
    queue(box, 0)
    person.failure = SendFailed("away")
    await box.deliver_due(later(86_400))
    person.failure = None
    await box.deliver_due(NOW)
    assert person.got == ids(0)
    box.enqueue([notice(1)], later(10 * 86_400))
    await box.deliver_due(NOW)
    assert person.got == ids(0, 1)


# --- several senders -------------------------------------------------------------------------------------------------


async def test_one_sender_waits_for_no_other(connection: sqlite3.Connection) -> None:
    people: Mapping[str, Person] = {name: Person(name) for name in ("smtp", "webhook", "telegram")}
    people["smtp"].gate = asyncio.Event()
    people["webhook"].failure = SendFailed("away")
    box = Outbox(connection, people)
    task = asyncio.create_task(box.run())
    queue(box, 0, 1)
    await until(lambda: people["telegram"].got == ids(0, 1), "the third sender has both")
    assert people["smtp"].got == []
    assert box.waiting() == 4
    queue(box, 2)
    await until(lambda: people["telegram"].got == ids(0, 1, 2), "and what came since")
    people["smtp"].gate.set()
    await until(lambda: people["smtp"].got == ids(0, 1, 2), "the first has all, in order")
    await stop(task)
    assert people["webhook"].got == []
    assert box.waiting() == 3


async def test_through_real_servers_all_is_told_to_all(connection: sqlite3.Connection) -> None:
    with mail_server() as post:
        async with receiver() as http:
            http.answer(503)
            settings = Notify(
                smtp=Smtp(host="127.0.0.1", port=post.port, security="none", recipients=("owner@example.org",)),
                webhook=Webhook(url=http.url),
            )
            box = Outbox(connection, senders(settings, None))
            queue(box, 0, 1)
            await box.deliver_due(NOW)
            assert [str(one.mail["Message-ID"]) for one in post.received] == [
                message_id(one, "example.org") for one in ids(0, 1)
            ]
            assert len(http.calls) == 1
            await box.deliver_due(later(6))
            assert len(http.calls) == 3
            assert box.waiting() == 0


# --- its life --------------------------------------------------------------------------------------------------------


async def test_a_notice_leaves_at_once_and_not_at_the_next_look(
    box: Outbox, person: Person, monkeypatch: pytest.MonkeyPatch, connection: sqlite3.Connection
) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 3_600.0)
    task = asyncio.create_task(box.run())
    await asyncio.sleep(0)
    for number in range(3):
        connection.execute("BEGIN IMMEDIATE")
        queue(box, number)
        connection.execute("COMMIT")
        await until(lambda: box.waiting() == 0, "told")
    await stop(task)
    assert person.got == ids(0, 1, 2)


async def test_what_another_process_queues_is_seen(
    box: Outbox, person: Person, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.02)
    task = asyncio.create_task(box.run())
    await asyncio.sleep(0)
    with closing(database(tmp_path)) as other:
        queue(Outbox(other, {"smtp": Person()}), 0)
    await until(lambda: person.got == ids(0), "told")
    await stop(task)


async def test_run_and_a_request_to_deliver_never_send_the_same_twice(box: Outbox, person: Person) -> None:
    person.gate = asyncio.Event()
    task = asyncio.create_task(box.run())
    queue(box, 0)
    await person.begun.wait()
    asked = asyncio.create_task(box.deliver_due(NOW))
    await asyncio.sleep(0)
    person.gate.set()
    await asked
    await stop(task)
    assert person.got == ids(0)
    assert person.tries == 1


async def test_a_stop_lets_the_send_under_way_end_and_starts_no_other(
    box: Outbox, person: Person, connection: sqlite3.Connection
) -> None:
    person.gate = asyncio.Event()
    queue(box, 0, 1)
    task = asyncio.create_task(box.run())
    await person.begun.wait()
    task.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not task.done()
    person.gate.set()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    assert person.got == ids(0)
    assert connection.execute("SELECT notice FROM outbox WHERE sent_at IS NULL").fetchall() == [(notice(1).id,)]


async def test_a_stop_does_not_wait_for_ever(box: Outbox, person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRAIN_SECONDS", 0.05)
    person.gate = asyncio.Event()
    queue(box, 0)
    task = asyncio.create_task(box.run())
    await person.begun.wait()
    async with asyncio.timeout(5):
        await stop(task)
    assert box.waiting() == 1


async def test_without_senders_nothing_is_queued_and_run_only_waits(connection: sqlite3.Connection) -> None:
    box = Outbox(connection, {})
    queue(box, 0)
    assert (box.waiting(), box.oldest(), box.prune(NOW, 30)) == (0, None, 0)
    await box.deliver_due(NOW)
    task = asyncio.create_task(box.run())
    await asyncio.sleep(0.01)
    assert not task.done()
    await stop(task)


async def test_while_it_cannot_be_noted_what_was_sent_is_not_sent_again(
    tmp_path: Path, person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, or a lock that stays, would otherwise send the same mail every few seconds."""
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.02)
    with closing(database(tmp_path)) as own, closing(database(tmp_path)) as other:
        box = Outbox(own, {"smtp": person})
        queue(box, 0, 1)
        person.gate = asyncio.Event()
        with capture_logs() as logs:
            task = asyncio.create_task(box.run())
            await person.begun.wait()
            own.execute("PRAGMA busy_timeout = 0")
            other.execute("BEGIN IMMEDIATE")
            person.gate.set()
            await until(lambda: any(line["action"] == "notify.unnoted" for line in logs), "it is said")
            for _ in range(20):
                await asyncio.sleep(0.005)
            assert person.got == ids(0)
            assert not task.done()
            other.execute("ROLLBACK")
            await until(lambda: box.waiting() == 0, "all is told and noted")
            await stop(task)
    assert person.got == ids(0, 1)
    assert [line["action"] for line in logs] == ["notify.sent", "notify.unnoted", "notify.sent"]


async def test_who_asks_once_is_told_that_it_cannot_be_noted(tmp_path: Path, person: Person) -> None:
    with closing(database(tmp_path)) as own, closing(database(tmp_path)) as other:
        box = Outbox(own, {"smtp": person})
        queue(box, 0)
        own.execute("PRAGMA busy_timeout = 0")
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            await box.deliver_due(NOW)


# --- what it keeps ---------------------------------------------------------------------------------------------------


async def test_pictures_leave_the_database_with_the_mail(box: Outbox, connection: sqlite3.Connection) -> None:
    report = Notice(
        id="report:2026-11-27", kind="report", severity="info", title="t", lines=("l",), at=NOW, html="<p>", pictures={"a": b"x" * 10_000},
    )  # fmt: skip
    box.enqueue([report], NOW)
    await box.deliver_due(NOW)
    (size,) = connection.execute("SELECT length(body) FROM outbox").fetchone()
    assert size < 300


async def test_pruning_forgets_what_was_told_and_never_what_waits(
    box: Outbox, person: Person, connection: sqlite3.Connection
) -> None:
    gone: Sender = Person("pager")
    Outbox(connection, {"pager": gone}).enqueue([notice(0)], NOW)
    person.refuses = {notice(0).id}
    queue(box, 0, 1)
    await box.deliver_due(NOW)
    person.failure = SendFailed("away")
    queue(box, 2)
    await box.deliver_due(later(60))
    assert box.waiting() == 2, "a sender that is gone waits for nobody"
    assert box.prune(later(29 * 86_400), 30) == 0
    with capture_logs() as logs:
        assert box.prune(later(31 * 86_400), 30) == 3
    assert {(line["action"], line["sender"]) for line in logs} == {
        ("notify.given_up", "smtp"),
        ("notify.given_up", "pager"),
    }
    assert connection.execute("SELECT notice, sender FROM outbox").fetchall() == [(notice(2).id, "smtp")]
    person.failure = None
    await box.deliver_due(later(365 * 86_400))
    assert person.got == ids(1, 2)


async def test_pruning_within_a_transaction_leaves_its_end_to_the_caller(
    box: Outbox, connection: sqlite3.Connection
) -> None:
    queue(box, 0)
    await box.deliver_due(NOW)
    connection.execute("BEGIN IMMEDIATE")
    assert box.prune(later(31 * 86_400), 30) == 1
    connection.execute("ROLLBACK")
    assert connection.execute("SELECT count(*) FROM outbox").fetchone() == (1,)
