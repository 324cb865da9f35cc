"""Notices on their way to a person: through real mail servers, with and without TLS, and real HTTP receivers."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import socket
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import structlog
from structlog.testing import capture_logs

from actors.core.mail import message_id, token
from actors.core.wording import body, headline
from actors.monitor import calls, smtp
from actors.monitor.outbox import Sender, SendFailed
from actors.monitor.ping import ping
from actors.monitor.senders import senders
from bus.supervise import ConfigurationError
from schema.health import Notice
from schema.settings import Notify, Smtp, Telegram, Webhook
from tests.mailbox import certificate, mail_server
from tests.receivers import Receiver, receiver

AT = datetime(2026, 11, 27, 4, 0, tzinfo=UTC)
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 200
USER, PASSWORD = "mt5", "pässword-4711"
BOT = "123456:AAE-secret_token"
LOG = structlog.get_logger(__name__)

ALERT = Notice(
    id="incident-7:opened",
    kind="opened",
    severity="critical",
    title="Die Datenbank antwortet nicht",
    lines=("database: connection refused – ä", ".", "..", "From here on nothing is archived."),
    at=AT,
    incident="incident-7",
    checks=("database", "database.size"),
)
REPORT = Notice(
    id="report:2026-11-27",
    kind="report",
    severity="info",
    title="Friday, 27 November 2026",
    lines=("All is well.",),
    at=AT,
    html='<html><body><p>All is well – ä</p><img src="cid:lag"></body></html>',
    pictures={"lag": PNG},
)


def post_office(port: int, **fields: Any) -> Sender:
    base: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": port,
        "security": "none",
        "sender": "MT5 <mt5@example.org>",
        "recipients": ("owner@example.org", "Night <night@example.org>"),
    }
    return senders(Notify(smtp=Smtp(**{**base, **fields})), LOG)["smtp"]


async def refusal(sender: Sender, notice: Notice = ALERT) -> SendFailed:
    with pytest.raises(SendFailed) as failure:
        await sender.send(notice)
    assert PASSWORD not in str(failure.value)
    return failure.value


# --- mail ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("security", ["starttls", "tls"])
async def test_a_mail_goes_encrypted_and_with_a_login_and_comes_out_as_it_went_in(
    tmp_path: Path, security: str
) -> None:
    context, ca_file = certificate(tmp_path)
    way = {security: context}
    with mail_server(users={USER: PASSWORD}, **way) as box:  # type: ignore[arg-type]
        sender = post_office(box.port, security=security, user=USER, password=PASSWORD, ca_file=str(ca_file))
        assert await sender.send(ALERT) is None
        assert await sender.send(REPORT) is None
    alert, report = box.received
    for received in box.received:
        assert received.encrypted
        assert received.user == USER
        assert received.sender == "mt5@example.org"
        assert received.recipients == ("owner@example.org", "night@example.org")
        assert received.mail["To"] == "owner@example.org, Night <night@example.org>"
    assert alert.mail["Subject"] == headline(ALERT) == "[MT5] critical: Die Datenbank antwortet nicht"
    assert alert.mail["Message-ID"] == message_id(ALERT.id, "example.org")
    assert alert.mail.get_content().replace("\r\n", "\n") == body(ALERT)
    page = report.mail.get_body(("html",))
    assert page is not None
    assert page.get_content().strip() == REPORT.html
    (picture,) = (part for part in report.mail.walk() if part["Content-ID"] == "<lag>")
    assert cast("Any", picture).get_content() == PNG


async def test_without_tls_a_mail_goes_to_a_relay_on_this_host() -> None:
    with mail_server() as box:
        assert await post_office(box.port).send(ALERT) is None
    (received,) = box.received
    assert not received.encrypted
    assert received.user is None


@pytest.mark.parametrize("security", ["starttls", "tls"])
async def test_a_server_with_a_strange_certificate_gets_neither_mail_nor_password(
    tmp_path: Path, security: str
) -> None:
    context, _ = certificate(tmp_path / "theirs")
    _, ours = certificate(tmp_path / "ours")
    way = {security: context}
    with mail_server(users={USER: PASSWORD}, **way) as box:  # type: ignore[arg-type]
        for ca_file in (None, str(ours)):
            failure = await refusal(
                post_office(box.port, security=security, user=USER, password=PASSWORD, ca_file=ca_file)
            )
            assert not failure.permanent
            assert "certificate of 127.0.0.1" in str(failure)
            assert "ca_file" in str(failure)
    assert box.received == []
    assert box.logins == []


async def test_a_certificate_for_another_host_is_refused(tmp_path: Path) -> None:
    context, ca_file = certificate(tmp_path, host="mail.elsewhere.org")
    with mail_server(tls=context) as box:
        failure = await refusal(post_office(box.port, security="tls", ca_file=str(ca_file)))
    assert "certificate of 127.0.0.1" in str(failure)
    assert box.received == []


async def test_a_server_that_takes_tls_away_gets_nothing(tmp_path: Path) -> None:
    """Who sits in between strikes STARTTLS out of the greeting: then no mail goes, and no password."""
    with mail_server(users={USER: PASSWORD}) as box:
        failure = await refusal(post_office(box.port, security="starttls", user=USER, password=PASSWORD))
        assert not failure.permanent
        assert "STARTTLS" in str(failure)
    assert box.received == []
    assert box.logins == []


async def test_a_wrong_password_is_said_and_kept_out_of_the_sentence(tmp_path: Path) -> None:
    context, ca_file = certificate(tmp_path)
    with mail_server(starttls=context, users={USER: "other"}) as box:
        failure = await refusal(
            post_office(box.port, security="starttls", user=USER, password=PASSWORD, ca_file=str(ca_file))
        )
        assert not failure.permanent, "mended settings must let it through"
        assert "does not know user mt5 with this password: 535" in str(failure)
    assert box.logins[0] == (USER, PASSWORD)
    assert box.received == []


@pytest.mark.parametrize(
    ("stage", "answer", "permanent", "says"),
    [
        ("DATA", "554 5.7.1 looks like spam", True, "does not take the mail: 554 5.7.1 looks like spam."),
        ("DATA", "451 4.3.0 try later", False, "does not take the mail: 451 4.3.0 try later."),
        ("MAIL", "552 5.3.4 too large", True, "refuses the sender mt5@example.org: 552 5.3.4 too large."),
        ("MAIL", "550 5.7.1 not you", False, "refuses the sender mt5@example.org: 550 5.7.1 not you."),
        ("RCPT", "550 5.1.1 unknown", False, "refuses every recipient: owner@example.org: 550 5.1.1 unknown."),
        ("RCPT", "450 4.2.0 greylisted", False, "refuses every recipient: owner@example.org: 450 4.2.0 greylisted."),
    ],
)
async def test_only_a_refusal_of_the_mail_itself_is_permanent(
    stage: str, answer: str, permanent: bool, says: str
) -> None:
    with mail_server() as box:
        box.hook = lambda at, _: answer if at == stage else None
        failure = await refusal(post_office(box.port))
        assert failure.permanent is permanent
        assert says in str(failure)
        box.hook = lambda at, _: None
        assert await post_office(box.port).send(ALERT) is None
    assert len(box.received) == 1


def putting_off(**answers: str) -> Callable[[str, str], str | None]:
    """Answers RCPT by the recipient's name."""
    return lambda at, who: answers.get(who.partition("@")[0]) if at == "RCPT" else None


async def test_who_was_put_off_gets_it_later_and_nobody_gets_it_twice() -> None:
    with mail_server() as box:
        sender = post_office(box.port, recipients=("a@example.org", "b@example.org", "c@example.org"))
        for hook, says in (
            (putting_off(b="450 greylisted", c="451 busy"), "puts off b@example.org, c@example.org: 450 greylisted"),
            (putting_off(c="451 busy"), "puts off c@example.org: 451 busy"),
            (putting_off(c="452 full"), "puts off c@example.org: 452 full"),
        ):
            box.hook = hook
            failure = await refusal(sender)
            assert not failure.permanent
            assert says in str(failure)
        box.hook = putting_off()
        assert await sender.send(ALERT) is None
        assert await sender.send(REPORT) is None
    assert [one.recipients for one in box.received] == [
        ("a@example.org",),
        ("b@example.org",),
        ("c@example.org",),
        ("a@example.org", "b@example.org", "c@example.org"),
    ]
    assert len({one.mail["Message-ID"] for one in box.received}) == 2


async def test_who_is_put_off_and_then_refused_keeps_nobody_waiting() -> None:
    with mail_server() as box:
        sender = post_office(box.port)
        box.hook = putting_off(night="450 greylisted")
        await refusal(sender)
        box.hook = putting_off(night="550 no such user")
        assert "refuses night@example.org: 550 no such user" in str(await sender.send(ALERT))
        box.hook = putting_off()
        assert await sender.send(REPORT) is None
    assert [one.recipients for one in box.received] == [
        ("owner@example.org",),
        ("owner@example.org", "night@example.org"),
    ]


async def test_a_recipient_that_does_not_exist_is_told_of_and_keeps_nobody_from_the_mail() -> None:
    with mail_server() as box:
        box.hook = putting_off(night="550 no such user")
        remark = await post_office(box.port).send(ALERT)
    assert remark is not None
    assert "refuses night@example.org: 550 no such user" in remark
    assert [one.recipients for one in box.received] == [("owner@example.org",)]


async def test_what_a_server_says_cannot_break_a_line() -> None:
    with mail_server() as box:
        box.hook = lambda at, _: "554-first\r\n554 second \x1b[31m" + "x" * 300 if at == "DATA" else None
        failure = str(await refusal(post_office(box.port)))
    assert failure.isprintable()
    assert len(failure) < 300


async def test_a_server_that_is_not_there_or_says_nothing_is_a_passing_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtp, "STEP_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        assert not (await refusal(post_office(port))).permanent
        silent.listen()
        failure = await refusal(post_office(port))
        assert not failure.permanent
        assert f"127.0.0.1:{port}" in str(failure)


async def test_a_server_that_keeps_the_mail_and_never_says_goodbye_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtp, "QUIT_SECONDS", 0.1)
    quitting, ended = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.test\r\n")
        while line := await reader.readline():
            if line.startswith(b"QUIT"):
                quitting.set()
                continue
            if line.startswith(b"DATA"):
                writer.write(b"354 go on\r\n")
                await reader.readuntil(b"\r\n.\r\n")
            writer.write(b"250 fine\r\n")
        writer.close()
        await writer.wait_closed()
        ended.set()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        assert await post_office(server.sockets[0].getsockname()[1]).send(ALERT) is None
        assert quitting.is_set()
        async with asyncio.timeout(5):
            await ended.wait()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"recipients": ()}, "needs a host and recipients"),
        ({"recipients": ("owner",)}, '"owner" is no mail address'),
        ({"recipients": ("owner@example.org\r\nBcc: thief@example.org",)}, "is no mail address"),
        ({"sender": "MT5 <>"}, "is no mail address"),
        ({"user": "mt5", "password": "x", "host": "mail.example.org"}, "in clear to mail.example.org"),
        ({"user": "mt5", "security": "tls"}, "MT5_NOTIFY_SMTP_PASSWORD"),
        ({"security": "tls", "ca_file": "/nowhere/ca.pem"}, "ca_file /nowhere/ca.pem cannot be read"),
        ({"security": "tls", "ca_file": __file__}, "cannot be read as PEM certificates"),
    ],
)
def test_mail_settings_that_cannot_work_are_said_at_the_start(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=r"\[notify.smtp\]") as error:
        post_office(25, **fields)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


# --- webhook ---------------------------------------------------------------------------------------------------------


@pytest.fixture
async def http() -> AsyncIterator[Receiver]:
    async with receiver() as made:
        yield made


def hook(url: str, secret: str | None = None) -> Sender:
    return senders(Notify(webhook=Webhook(url=url, secret=secret)), LOG)["webhook"]


async def test_a_webhook_gets_the_notice_as_signed_json(http: Receiver) -> None:
    assert await hook(f"{http.url}/hooks/T0K3N?x=1", "s3cret").send(ALERT) is None
    (call,) = http.calls
    assert (call.method, call.path) == ("POST", "/hooks/T0K3N?x=1")
    assert call.headers["Content-Type"] == "application/json"
    assert call.headers["X-MT5-Signature"] == hmac.new(b"s3cret", call.body, hashlib.sha256).hexdigest()
    assert call.headers["Idempotency-Key"] == token(ALERT.id)
    assert msgspec.json.decode(call.body, type=Notice) == ALERT
    assert msgspec.json.decode(call.body)["text"] == f"{headline(ALERT)}\n{body(ALERT)}"


async def test_a_webhook_without_a_secret_is_unsigned_and_gets_no_pictures(http: Receiver) -> None:
    await hook(http.url).send(REPORT)
    (call,) = http.calls
    assert "X-MT5-Signature" not in call.headers
    assert len(call.body) < 1_000
    assert msgspec.json.decode(call.body, type=Notice) == msgspec.structs.replace(REPORT, html="", pictures={})


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_a_webhook_that_refuses_the_body_refuses_it_for_good(http: Receiver, status: int) -> None:
    http.answer(status, {"error": "no_text"})
    failure = await refusal(hook(http.url))
    assert failure.permanent
    assert f"answered {status}" in str(failure)
    assert "no_text" in str(failure)


@pytest.mark.parametrize("status", [301, 307, 401, 403, 404, 408, 429, 500, 503])
async def test_anything_else_is_tried_again_and_a_redirect_is_not_followed(http: Receiver, status: int) -> None:
    http.answer(status, Location=f"{http.url}/elsewhere", Retry_After="17")
    failure = await refusal(hook(f"{http.url}/T0K3N"))
    assert not failure.permanent
    assert failure.retry_after == 17
    assert "T0K3N" not in str(failure)
    assert len(http.calls) == 1


async def test_no_failure_shows_the_webhooks_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "CALL_SECONDS", 0.2)
    context, _ = certificate(tmp_path)
    with socket.socket() as closed, socket.socket() as silent:
        closed.bind(("127.0.0.1", 0))
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        async with receiver(context) as encrypted:
            for url, says in (
                (f"http://127.0.0.1:{closed.getsockname()[1]}/T0K3N", "cannot be reached"),
                (f"http://127.0.0.1:{silent.getsockname()[1]}/T0K3N", "did not answer within"),
                (f"{encrypted.url}/T0K3N", "certificate is not trusted"),
                (encrypted.url.replace("https", "http") + "/T0K3N", "The call to 127.0.0.1 failed"),
                ("http://no-such-host.invalid/T0K3N", "no-such-host.invalid cannot be reached"),
            ):
                failure = await refusal(hook(url))
                assert says in str(failure)
                assert not failure.permanent
                chain: BaseException | None = failure
                while chain is not None:
                    assert "T0K3N" not in repr(chain)
                    chain = chain.__cause__
        assert encrypted.calls == []


@pytest.mark.parametrize(
    "url",
    [
        "",
        "mail.example.org/hook",
        "ftp://example.org/T0K3N",
        "http://",
        "http://a b/T0K3N",
        "http://x:99999/T0K3N",
        "http://[::1/T0K3N",
    ],
)
def test_a_url_that_is_none_is_said_at_the_start_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigurationError, match="no http:// or https:// URL") as error:
        hook(url)
    assert "T0K3N" not in str(error.value)


# --- Telegram --------------------------------------------------------------------------------------------------------


def bot(api: str, **fields: Any) -> Sender:
    return senders(Notify(telegram=Telegram(**{"token": BOT, "chat": "-100200", "api": api, **fields})), LOG)[
        "telegram"
    ]


async def test_telegram_gets_plain_text(http: Receiver) -> None:
    assert await bot(f"{http.url}/").send(ALERT) is None
    assert await bot(http.url).send(REPORT) is None
    alert, report = http.calls
    assert alert.path == f"/bot{BOT}/sendMessage"
    sent = msgspec.json.decode(alert.body)
    assert sent["chat_id"] == "-100200"
    assert sent["text"] == f"{headline(ALERT)}\n\n{body(ALERT)}".rstrip()
    assert "parse_mode" not in sent
    assert sent["disable_notification"] is False
    assert msgspec.json.decode(report.body)["disable_notification"] is True, "a report wakes nobody"


@pytest.mark.parametrize(
    ("status", "reply", "permanent", "retry_after"),
    [
        (
            429,
            {"ok": False, "description": "Too Many Requests: retry after 31", "parameters": {"retry_after": 31}},
            False,
            31,
        ),
        (400, {"ok": False, "description": "Bad Request: message is too long"}, True, None),
        (400, {"ok": False, "description": "Bad Request: chat not found"}, False, None),
        (401, {"ok": False, "description": "Unauthorized"}, False, None),
        (200, {"ok": False, "description": "odd"}, False, None),
        (502, "Bad Gateway", False, None),
        (200, ["not", "an", "object"], False, None),
    ],
)
async def test_telegrams_refusals(
    http: Receiver, status: int, reply: Any, permanent: bool, retry_after: float | None
) -> None:
    http.answer(status, reply)
    failure = await refusal(bot(http.url))
    assert failure.permanent is permanent
    assert failure.retry_after == retry_after
    assert "127.0.0.1 answered" in str(failure)
    assert "secret_token" not in str(failure)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"chat": None}, "needs a token and a chat"),
        ({"token": None}, "needs a token and a chat"),
        ({"token": "secret_token/../x"}, "BotFather"),
        ({"api": "telegram"}, "api is no http"),
    ],
)
def test_telegram_settings_that_cannot_work_are_said_at_the_start(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match="notify.telegram") as error:
        bot(**{"api": "http://127.0.0.1", **fields})
    assert says in str(error.value)
    assert "secret_token" not in str(error.value)


def test_only_what_is_configured_sends() -> None:
    assert senders(Notify(), LOG) == {}
    everything = Notify(
        smtp=Smtp(host="127.0.0.1", recipients=("a@example.org",)),
        webhook=Webhook(url="http://127.0.0.1"),
        telegram=Telegram(token=BOT, chat="1"),
    )
    assert list(senders(everything, LOG)) == ["smtp", "webhook", "telegram"]


# --- the dead man's switch -------------------------------------------------------------------------------------------


async def until(condition: Any, what: str) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)
    assert condition(), what


async def test_the_switch_hears_us_only_while_all_is_well(http: Receiver) -> None:
    healthy = True
    asked = 0

    def well() -> bool:
        nonlocal asked
        asked += 1
        return healthy

    settings = Notify(ping_url=f"{http.url}/p/T0K3N", ping_seconds=0.02)
    with capture_logs() as logs:
        task = asyncio.create_task(ping(settings, well))
        try:
            await until(lambda: len(http.calls) >= 3, "three pings")
            assert {(call.method, call.path) for call in http.calls} == {("GET", "/p/T0K3N")}
            assert logs == []
            healthy = False
            before = asked
            await until(lambda: asked >= before + 2, "it was asked twice since")
            heard = len(http.calls)
            before = asked
            await until(lambda: asked >= before + 3, "it goes on asking")
            assert len(http.calls) == heard
            healthy = True
            await until(lambda: len(http.calls) > heard, "it pings again")
            http.answer(500)
            http.answer(500)
            await until(lambda: not http.answers, "the answers were fetched")
            await until(lambda: logs[-1]["action"] == "ping.back", "it is said when it is over")
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    assert [line["action"] for line in logs] == ["ping.silent", "ping.back", "ping.silent", "ping.back"]
    assert "T0K3N" not in str(logs)


async def test_a_switch_that_cannot_be_reached_stops_nothing() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/T0K3N"
        asked = 0

        def well() -> bool:
            nonlocal asked
            asked += 1
            return True

        with capture_logs() as logs:
            task = asyncio.create_task(ping(Notify(ping_url=url, ping_seconds=0.01), well))
            await until(lambda: asked >= 4, "it goes on")
            assert not task.done()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    assert [line["action"] for line in logs] == ["ping.silent"], "once, not each time"


async def test_without_a_url_nobody_is_asked_and_a_wrong_one_is_said() -> None:
    task = asyncio.create_task(ping(Notify(), lambda: pytest.fail("asked")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not task.done()
    task.cancel()
    with pytest.raises(ConfigurationError, match="ping_url"):
        await ping(Notify(ping_url="hc-ping.com/T0K3N"), lambda: True)
