"""Composing mails: what is put in comes out of a parser again, nothing else does, and the same notice is the same mail."""

from __future__ import annotations

import email
import re
from datetime import UTC, datetime, timedelta, timezone
from email.message import EmailMessage
from email.policy import SMTP, default
from typing import cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from actors.core.mail import address, compose, flatten, message_id
from actors.core.wording import HEADLINE, body, headline, one_line
from actors.monitor.telegram import LENGTH, message
from schema.health import SEVERITIES, Kind, Notice

AT = datetime(2026, 11, 27, 4, 0, 5, tzinfo=UTC)
SENDER = address("MT5 <mt5@example.org>")
RECIPIENTS = [address("owner@example.com"), address("Night Watch <night@example.net>")]
HEADERS = {
    "Subject", "From", "To", "Date", "Message-ID", "References", "Auto-Submitted", "X-Auto-Response-Suppress", "X-MT5-Kind",
    "X-MT5-Severity", "Importance", "X-Priority", "MIME-Version", "Content-Type", "Content-Transfer-Encoding",
}  # fmt: skip
KINDS: tuple[Kind, ...] = ("opened", "escalated", "reminder", "closed", "test", "report")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))

# Everything, with what matters to mail made likely.
hostile = st.text(
    st.one_of(
        st.characters(),
        st.sampled_from("\r\n\t\x00\x0b\x0c\x1c\x85\u2028\u2029\u202e\ud800 :;,<>@\"'\\=?._-()äß€😀"),
    ),
    max_size=300,
)
injections = st.sampled_from(
    [
        "down\r\nBcc: thief@example.org",
        "down\nBcc: thief@example.org",
        "down\rBcc: thief@example.org",
        "down\u2028Bcc: thief@example.org",
        "down\x85Bcc: thief@example.org",
        "down\r\n\r\n<script>",
        "=?utf-8?q?down=0D=0ABcc:_thief@example.org?=",
        "\r\n.\r\nMAIL FROM:<thief@example.org>",
        "x" * 990 + "\r\nBcc: thief@example.org",
    ]
)
texts = hostile | injections
notices = st.builds(
    Notice,
    id=texts,
    kind=st.sampled_from(KINDS),
    severity=st.sampled_from(SEVERITIES),
    title=texts,
    lines=st.lists(texts, max_size=4).map(tuple),
    at=st.datetimes(min_value=datetime(1970, 1, 2), max_value=datetime(2200, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
    incident=texts,
    checks=st.lists(texts, max_size=3).map(tuple),
    html=st.just("") | texts,
    pictures=st.dictionaries(
        st.from_regex(r"[A-Za-z0-9._-]{1,20}", fullmatch=True), st.binary(max_size=200), max_size=2
    ),
)


def parsed(raw: bytes) -> EmailMessage:
    return cast("EmailMessage", email.message_from_bytes(raw, policy=default))


def notice(**fields: object) -> Notice:
    base: dict[str, object] = {
        "id": "incident-7:opened",
        "kind": "opened",
        "severity": "critical",
        "title": "The database does not answer",
        "lines": ("database: connection refused.", "Start it again."),
        "at": AT,
        "incident": "incident-7",
        "checks": ("database", "pgbouncer"),
    }
    return Notice(**{**base, **fields})  # type: ignore[arg-type]


def text_of(mail: EmailMessage, kind: str = "plain") -> str:
    part = mail.get_body((kind,))
    assert part is not None
    return str(part.get_content()).replace("\r\n", "\n")


def test_an_alert_reads_well() -> None:
    mail = parsed(flatten(compose(notice(), SENDER, RECIPIENTS)))
    assert mail["Subject"] == "[MT5] critical: The database does not answer"
    assert mail["From"] == "MT5 <mt5@example.org>"
    assert mail["To"] == "owner@example.com, Night Watch <night@example.net>"
    assert mail["Date"].datetime == AT
    assert mail["Importance"] == "high"
    assert mail["Auto-Submitted"] == "auto-generated"
    assert mail.get_content_type() == "text/plain"
    assert text_of(mail) == (
        "database: connection refused.\nStart it again.\n\n"
        "At 2026-11-27 04:00:05 UTC\nChecks: database, pgbouncer\nIncident: incident-7\n"
    )


@pytest.mark.parametrize(
    ("kind", "begins"),
    [
        ("opened", "[MT5] warning: Slow"),
        ("escalated", "[MT5] now warning: Slow"),
        ("reminder", "[MT5] still warning: Slow"),
        ("closed", "[MT5] over: Slow"),
        ("test", "[MT5] test: Slow"),
        ("report", "[MT5] Slow"),
    ],
)
def test_the_subject_says_what_kind_of_news_it_is(kind: Kind, begins: str) -> None:
    assert headline(notice(kind=kind, severity="warning", title="Slow")) == begins


def test_mails_of_an_incident_are_one_conversation() -> None:
    opened = compose(notice(), SENDER, RECIPIENTS)
    closed = compose(notice(id="incident-7:closed", kind="closed"), SENDER, RECIPIENTS)
    other = compose(notice(id="incident-8:opened", incident="incident-8"), SENDER, RECIPIENTS)
    assert opened["References"] == closed["References"] != other["References"]
    assert opened["Message-ID"] != closed["Message-ID"]
    assert "Importance" not in closed


def test_a_report_has_its_page_and_its_pictures_inside() -> None:
    page = '<html><body><h1>Tagesbericht – ä</h1><img src="cid:equity"><img src="cid:lag.p99"></body></html>'
    report = notice(kind="report", html=page, pictures={"equity": PNG, "lag.p99": PNG[::-1]})
    mail = parsed(flatten(compose(report, SENDER, RECIPIENTS)))
    assert mail.get_content_type() == "multipart/alternative"
    plain, related = mail.iter_parts()
    assert plain.get_content_type() == "text/plain"
    assert related.get_content_type() == "multipart/related"
    assert text_of(mail, "html").strip() == page
    pictures = [part for part in related.walk() if part.get_content_type() == "image/png"]
    assert {str(part["Content-ID"]): part.get_content() for part in pictures} == {  # type: ignore[attr-defined]
        "<equity>": PNG,
        "<lag.p99>": PNG[::-1],
    }
    assert {part.get_content_disposition() for part in pictures} == {"inline"}


def test_pictures_without_a_page_are_attached() -> None:
    mail = parsed(flatten(compose(notice(pictures={"equity": PNG}), SENDER, RECIPIENTS)))
    (picture,) = mail.iter_attachments()
    assert picture.get_filename() == "equity.png"
    assert picture.get_content() == PNG  # type: ignore[attr-defined]


@given(notices)
@example(notice(title="down\r\nBcc: thief@example.org", id="a\r\nBcc: b", incident="x\n\ny", checks=("a\r\nB: c",)))
@example(notice(title="ä" * 300))
@example(notice(title='ß, "x" <a@b.c>, =?utf-8?b?Cg==?= ' * 8))
def test_nothing_of_a_notice_makes_a_header_a_part_or_a_recipient(told: Notice) -> None:
    raw = flatten(compose(told, SENDER, RECIPIENTS))
    assert raw.isascii()
    assert b"\0" not in raw
    lines = raw.split(b"\r\n")
    assert all(b"\r" not in line and b"\n" not in line for line in lines), "a bare CR or LF: SMTP smuggling"
    assert max(map(len, lines)) <= 998
    mail = parsed(raw)
    assert set(mail.keys()) <= HEADERS
    assert len(mail.keys()) == len(set(mail.keys()))
    assert [one.addr_spec for one in mail["To"].addresses] == ["owner@example.com", "night@example.net"]
    assert [one.addr_spec for one in mail["From"].addresses] == ["mt5@example.org"]
    assert mail["Message-ID"] == message_id(told.id, "example.org")
    assert not mail.defects
    kinds = [part.get_content_type() for part in mail.walk() if not part.is_multipart()]
    assert kinds == ["text/plain", *["text/html"] * bool(told.html), *["image/png"] * len(told.pictures)]
    assert text_of(mail) == body(told)
    assert not set(body(told)) & set("\r\0\x0b\x0c\x1b\x85\u2028\u2029\u202e\ud800")
    if told.html:
        expected = told.html.encode("utf-8", "replace").decode()
        assert _unbroken(text_of(mail, "html")) == _unbroken(expected)


def _unbroken(text: str) -> str:
    """Line ends are mail's to choose, and one more may stand at the end."""
    return re.sub(r"\r\n?|\n", "\n", text).rstrip("\n")


@given(texts, st.sampled_from(KINDS))
@example("a  b", "report")
@example("Grüße an alle, die nachts wachen und morgens lesen, was in der Nacht geschah, ohne aufzustehen", "opened")
def test_the_subject_survives_its_encoding(title: str, kind: Kind) -> None:
    told = notice(title=title, kind=kind)
    subject = str(parsed(flatten(compose(told, SENDER, RECIPIENTS)))["Subject"])
    assert subject == headline(told)
    assert len(subject) <= HEADLINE
    assert one_line(subject) == subject


@given(notices)
def test_the_same_notice_is_the_same_mail_to_the_byte(told: Notice) -> None:
    assert flatten(compose(told, SENDER, RECIPIENTS)) == flatten(compose(told, SENDER, RECIPIENTS))


@given(texts, texts)
def test_a_message_id_is_a_function_of_the_notices_id_and_of_nothing_else(one: str, other: str) -> None:
    assert re.fullmatch(r"<[0-9a-f]{32}@[a-z0-9.]+>", message_id(one))
    assert (message_id(one) == message_id(other)) == (one == other)
    first = compose(notice(id=one), SENDER, RECIPIENTS)
    second = compose(
        notice(id=one, kind="closed", title="other", lines=(), at=AT + timedelta(days=3), incident="", html="<p>"),
        SENDER,
        RECIPIENTS[:1],
    )
    assert first["Message-ID"] == second["Message-ID"] == message_id(one, "example.org")


def test_ids_are_never_folded_nor_encoded() -> None:
    sender = address(f"mt5@{'a' * 60}.{'b' * 60}.example.org")
    raw = flatten(compose(notice(), sender, [sender]))
    assert f"\r\nMessage-ID: {message_id('incident-7:opened', sender.domain)}\r\n".encode() in raw
    assert f"\r\nReferences: {message_id('incident incident-7', sender.domain)}\r\n".encode() in raw


def test_times_are_utc_whatever_the_notices_zone() -> None:
    told = notice(at=AT.astimezone(timezone(timedelta(hours=-7))))
    assert flatten(compose(told, SENDER, RECIPIENTS)) == flatten(compose(notice(), SENDER, RECIPIENTS))


@given(texts)
def test_a_boundary_stands_in_no_text(line: str) -> None:
    report = notice(kind="report", html="<p>", lines=(line, f"--=_{'0' * 32}_0", "--=_"))
    boundary = compose(report, SENDER, RECIPIENTS).get_boundary()
    copied = notice(kind="report", html=f"\n--{boundary}--\n", lines=(line, f"--{boundary}", f"--{boundary}--"))
    mail = parsed(flatten(compose(copied, SENDER, RECIPIENTS)))
    assert mail.get_boundary() == boundary
    assert text_of(mail) == body(copied)


# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "spec"),
    [
        ("mt5@example.org", "", "mt5@example.org"),
        ("MT5 <mt5@example.org>", "MT5", "mt5@example.org"),
        ('"Doe, J. <x>" <j.doe+mt5@mail.example.org>', "Doe, J. <x>", "j.doe+mt5@mail.example.org"),
        ("Wächter der Nacht <w@example.org>", "Wächter der Nacht", "w@example.org"),
    ],
)
def test_addresses_are_taken_as_people_write_them(text: str, name: str, spec: str) -> None:
    found = address(text)
    assert (found.display_name, found.addr_spec) == (name, spec)
    (back,) = parsed(flatten(compose(notice(), SENDER, [found])))["To"].addresses
    assert (back.display_name, back.addr_spec) == (name, spec)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nobody",
        "a@b@c",
        "a b@example.org",
        "one@example.org, two@example.org",
        "mt5@example.org\r\nBcc: thief@example.org",
        "MT5\r\nBcc: thief@example.org <mt5@example.org>",
        "mt5@example.org>\r\nRCPT TO:<thief@example.org",
        "<mt5@example.org> thief@example.org",
        '"quoted local"@example.org',
        "wächter@example.org",
        "w@exämple.org",
        "x@" + "a" * 260 + ".org",
    ],
)
def test_what_is_no_single_plain_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no mail address"):
        address(text)


@given(texts)
def test_any_text_is_an_address_that_survives_or_is_refused(text: str) -> None:
    for written in (text, f"{text} <mt5@example.org>", f'"{text}" <mt5@example.org>', f"mt5@{text}"):
        try:
            found = address(written)
        except ValueError:
            continue
        raw = flatten(compose(notice(), found, [found]))
        mail = parsed(raw)
        assert set(mail.keys()) <= HEADERS
        assert [one.addr_spec for one in mail["To"].addresses] == [found.addr_spec]
        assert [one.addr_spec for one in mail["From"].addresses] == [found.addr_spec]


def test_a_mail_to_nobody_and_a_picture_with_an_odd_name_are_errors() -> None:
    with pytest.raises(ValueError, match="recipient"):
        compose(notice(), SENDER, [])
    with pytest.raises(ValueError, match="content id"):
        compose(notice(html="<p>", pictures={"a>\r\nX: y": PNG}), SENDER, RECIPIENTS)


# --- text for other senders ------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.sampled_from("a😀ä\n "), max_size=4_200), max_size=3).map(tuple))
@example(("a" * 4_000 + "😀" * 100,))
@example(("😀" * 3_000,))
def test_a_telegram_message_fits(lines: tuple[str, ...]) -> None:
    text = message(notice(lines=lines))
    assert len(text.encode("utf-16-le")) // 2 <= LENGTH
    assert text.startswith("[MT5] critical: The database does not answer\n\n")


def test_smtp_is_the_policy_of_what_goes_over_the_wire() -> None:
    """Parsed and written again by the standard library it is the same mail."""
    raw = flatten(compose(notice(kind="report", html="<p>ä</p>", pictures={"a": PNG}), SENDER, RECIPIENTS))
    assert email.message_from_bytes(raw, policy=SMTP).as_bytes() == raw
