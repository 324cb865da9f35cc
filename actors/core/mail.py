"""A notice as an e-mail. The same notice is always the same mail to the byte, so that one sent again is known as such."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from datetime import UTC
from email.errors import HeaderParseError
from email.headerregistry import Address, HeaderRegistry, MessageIDHeader
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime, getaddresses
from typing import Any, ClassVar, Final

from actors.core.wording import body, headline, one_line
from schema.health import Notice

NO_DOMAIN: Final = "mt5.invalid"  # RFC 2606: belongs to nobody
LINE: Final = 78  # characters of a header's line, as RFC 5322 wishes
WORD: Final = 64  # longer plain words are encoded, so that lines can be folded
CHUNK: Final = 39  # bytes of an encoded word: with the header's name they make a line of at most 76

_ADDRESS: Final = re.compile(
    r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*"
)
_CONTENT_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


class _Subject:
    """A subject that is folded here: the library decodes what looks like an encoded word within a text, so that
    ``=?utf-8?b?Cg==?=`` in a title ends the line (CVE-2024-6923), and loses spaces between encoded words.
    """

    name: str
    max_count: ClassVar[int] = 1

    @classmethod
    def parse(cls, value: str, kwds: dict[str, Any]) -> None:
        kwds["parse_tree"] = None
        kwds["decoded"] = value

    def fold(self, *, policy: Any) -> str:
        return f"{self.name}: {_folded(str(self), len(self.name) + 2)}{policy.linesep}"


_headers = HeaderRegistry()
# The registry mixes its BaseHeader into what it is given, which typeshed does not know.
_headers.map_to_type("subject", _Subject)  # type: ignore[arg-type]
_headers.map_to_type("references", MessageIDHeader)  # type: ignore[arg-type]  # as text a long one would be encoded
POLICY: Final = SMTP.clone(max_line_length=LINE, header_factory=_headers)


def address(text: str) -> Address:
    """A mailbox as people write it: ``mt5@example.org`` or ``MT5 <mt5@example.org>``.

    Raises:
        ValueError: it is none. Quoted local parts and addresses outside ASCII are not taken: many servers refuse them.
    """
    name, spec = (getaddresses([text]) or [("", "")])[0]
    whole = text.strip() == spec or text.strip().endswith(f"<{spec}>")  # the parser takes the first of several
    plain = one_line(text) == text.strip() and "=?" not in text  # what looks like an encoded word would be decoded
    if not whole or not plain or not _ADDRESS.fullmatch(spec) or len(spec) > 254:
        raise ValueError(
            f'"{one_line(text)}" is no mail address: write it as name@example.org or Name <name@example.org>.'
        )
    try:
        return Address(display_name=one_line(name), addr_spec=spec)
    except (HeaderParseError, ValueError) as error:
        raise ValueError(f'"{one_line(text)}" is no mail address: {error}') from error


def token(notice_id: str) -> str:
    """A notice's id in 32 hexadecimal digits, fit for any header."""
    return hashlib.sha256(notice_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def message_id(notice_id: str, domain: str = NO_DOMAIN) -> str:
    """The Message-ID of a notice's mail: a pure function of its id, at the sender's domain."""
    return f"<{token(notice_id)}@{domain}>"


def compose(notice: Notice, sender: Address, recipients: Sequence[Address]) -> EmailMessage:
    """The whole mail: text, and for a report HTML with its pictures inside.

    Nothing of a notice can add a header or a recipient: what comes from it stands in headers as one line without control
    characters, encoded where it is not plain ASCII.

    Raises:
        ValueError: there is no recipient, or a picture's name is not fit to be a content id.
    """
    if not recipients:
        raise ValueError("A mail needs a recipient.")
    mail = EmailMessage(POLICY)
    mail["Subject"] = headline(notice)
    mail["From"] = sender
    mail["To"] = tuple(recipients)
    mail["Date"] = format_datetime(notice.at.astimezone(UTC))
    mail["Message-ID"] = message_id(notice.id, sender.domain)
    if notice.incident:
        # Nobody has ever sent that one: mail clients show what refers to the same as one conversation.
        mail["References"] = message_id(f"incident {notice.incident}", sender.domain)
    mail["Auto-Submitted"] = "auto-generated"  # RFC 3834: no out-of-office answers
    mail["X-Auto-Response-Suppress"] = "All"  # the same for Exchange
    mail["X-MT5-Kind"] = notice.kind
    mail["X-MT5-Severity"] = notice.severity
    if notice.severity == "critical" and notice.kind not in ("closed", "report"):
        mail["Importance"] = "high"
        mail["X-Priority"] = "1"
    # Quoted-printable writes "=" as "=3D", so that no text holds a boundary: those have "=_".
    mail.set_content(body(notice), cte="quoted-printable")
    if notice.html:
        mail.add_alternative(_printable(notice.html), subtype="html", cte="quoted-printable")
    pictures = {_content_id(name): data for name, data in notice.pictures.items()}
    page = mail.get_payload()[-1] if notice.html else None  # type: ignore[index]  # a multipart's payload is its parts
    for name, data in pictures.items():
        if page is not None:
            page.add_related(data, "image", "png", cid=f"<{name}>", filename=f"{name}.png", disposition="inline")  # type: ignore[union-attr]
        else:
            mail.add_attachment(data, "image", "png", filename=f"{name}.png")
    _bound(mail, token(notice.id))
    return mail


def flatten(mail: EmailMessage) -> bytes:
    """The mail as it goes over the wire: ASCII only, lines end in CRLF."""
    return mail.as_bytes(policy=POLICY)


def _folded(text: str, used: int) -> str:
    """One line of text as the value of a header whose name takes ``used`` characters; RFC 2047 where it is not plain."""
    words = text.split(" ")
    if not text.isascii() or "=?" in text or max(map(len, words)) > WORD:
        return "\r\n ".join(f"=?utf-8?b?{base64.b64encode(chunk).decode()}?=" for chunk in _chunks(text))
    lines = [words[0]]
    for word in words[1:]:
        room = LINE - (used if len(lines) == 1 else 1)
        if len(lines[-1]) + 1 + len(word) <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\r\n ".join(lines)


def _chunks(text: str) -> list[bytes]:
    """UTF-8 in pieces that make encoded words of less than 75 characters; no character is split."""
    pieces = [b""]
    for character in text:
        encoded = character.encode()
        if len(pieces[-1]) + len(encoded) > CHUNK:
            pieces.append(b"")
        pieces[-1] += encoded
    return pieces


def _bound(mail: EmailMessage, seed: str) -> None:
    """Gives every multipart a boundary of the notice's; the library would draw them by chance."""
    for number, part in enumerate(mail.walk()):
        if part.is_multipart():
            part.set_boundary(f"=_{seed}_{number}")


def _content_id(name: str) -> str:
    if not _CONTENT_ID.fullmatch(name):
        raise ValueError(
            f"a picture is called {name!r}: a content id has letters, digits, dots, dashes and underscores"
        )
    return name


def _printable(page: str) -> str:
    return page.encode("utf-8", "replace").decode()
