"""Notices by mail: SMTP with STARTTLS or TLS, the server's certificate checked, and a password never in clear."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Sequence
from typing import Any, ClassVar, Final

import aiosmtplib

from actors.core.mail import address, compose, flatten
from actors.core.wording import cut, one_line
from actors.monitor.outbox import SendFailed
from bus.supervise import ConfigurationError
from schema.health import Notice
from schema.settings import Smtp

STEP_SECONDS: Final = 20.0  # of one command; the whole is bounded by the outbox
QUIT_SECONDS: Final = 2.0
REMEMBERED: Final = 100  # notices that some recipients have and others not yet


class SmtpSender:
    """A connection for each mail: they are rare, and one kept open would be dead when it is needed.

    Raises:
        ConfigurationError: with these settings no mail can leave.
    """

    name: ClassVar[str] = "smtp"

    def __init__(self, settings: Smtp, log: Any) -> None:
        if settings.host is None or not settings.recipients:
            raise ConfigurationError("[notify.smtp] needs a host and recipients.")
        try:
            self._recipients = [address(text) for text in settings.recipients]
            self._sender = address(settings.sender) if settings.sender else self._recipients[0]
        except ValueError as error:
            raise ConfigurationError(f"[notify.smtp] {error}") from error
        if settings.user and settings.security == "none" and not _loopback(settings.host):
            raise ConfigurationError(
                f'[notify.smtp] security = "none" would send the password of {settings.user} in clear to {settings.host}: '
                'set security = "starttls" or "tls".'
            )
        if settings.user and not settings.password:
            raise ConfigurationError(
                f"[notify.smtp] user {settings.user} has no password: set MT5_NOTIFY_SMTP_PASSWORD in the environment."
            )
        self._settings = settings
        self._tls = None if settings.security == "none" else _context(settings.ca_file)
        self._log = log
        self._taken: dict[str, set[str]] = {}  # by notice: who has it, while others have been put off

    async def send(self, notice: Notice) -> str | None:
        """One mail to all recipients; those that a server has put off (greylisting) are tried again without the others."""
        try:
            message = flatten(compose(notice, self._sender, self._recipients))
        except ValueError as error:
            raise SendFailed(f"It makes no mail: {error}", permanent=True) from error
        taken = self._taken.get(notice.id, set())
        wanted = [one.addr_spec for one in self._recipients if one.addr_spec not in taken]
        try:
            refused = await self._transfer(wanted, message)
        except aiosmtplib.SMTPRecipientsRefused as error:
            if not taken:
                raise _failed(error, self._settings) from error
            refused = {one.recipient: aiosmtplib.SMTPResponse(one.code, one.message) for one in error.recipients}
        except (aiosmtplib.SMTPException, OSError) as error:
            raise _failed(error, self._settings) from error
        for_now = [who for who, answer in refused.items() if answer.code < 500]
        if for_now:
            while len(self._taken) >= REMEMBERED:
                self._taken.pop(next(iter(self._taken)))
            self._taken[notice.id] = taken | (set(wanted) - set(for_now))
            raise SendFailed(f"The server puts off {', '.join(for_now)}: {_answer(refused[for_now[0]])}.")
        self._taken.pop(notice.id, None)
        if refused:
            return f"The server refuses {', '.join(refused)}: {_answer(next(iter(refused.values())))}."
        return None

    async def _transfer(self, recipients: Sequence[str], message: bytes) -> dict[str, aiosmtplib.SMTPResponse]:
        """Returns what was answered to the recipients that were not taken.

        Raises:
            aiosmtplib.SMTPException, OSError: nobody has it, or nobody knows.
        """
        settings = self._settings
        server = aiosmtplib.SMTP(
            hostname=settings.host,
            port=settings.port,
            username=settings.user,
            password=settings.password,
            local_hostname=_own_name(),
            timeout=STEP_SECONDS,
            use_tls=settings.security == "tls",
            start_tls=settings.security == "starttls",
            tls_context=self._tls,
        )
        try:
            await server.connect()
            refused, _ = await server.sendmail(self._sender.addr_spec, recipients, message)
            # From here on the mail is taken: whatever the goodbye brings, it must not be sent again.
            try:
                async with asyncio.timeout(QUIT_SECONDS):
                    await server.quit()
            except (aiosmtplib.SMTPException, OSError) as error:
                self._log.debug("no goodbye", action="smtp.quit", error=type(error).__name__)
            return refused
        finally:
            server.close()


def _context(ca_file: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # an SSLError is one
        raise ConfigurationError(
            f"[notify.smtp] ca_file {ca_file} cannot be read as PEM certificates: {error}."
        ) from error


def _failed(error: aiosmtplib.SMTPException | OSError, settings: Smtp) -> SendFailed:
    """Which failures are the notice's: only what the server says after it has seen the mail or its size."""
    where = f"{settings.host}:{settings.port}"
    cause = error.__cause__ if isinstance(error, aiosmtplib.SMTPConnectError) else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return SendFailed(
            f"The certificate of {where} is not trusted ({one_line(cause.verify_message)}): "
            "set [notify.smtp] ca_file where it is your own."
        )
    match error:
        case aiosmtplib.SMTPDataError():
            return SendFailed(f"{where} does not take the mail: {_answer(error)}.", permanent=error.code >= 500)
        case aiosmtplib.SMTPAuthenticationError():
            return SendFailed(f"{where} does not know user {settings.user} with this password: {_answer(error)}.")
        case aiosmtplib.SMTPSenderRefused():
            too_large = error.code == 552
            return SendFailed(f"{where} refuses the sender {error.sender}: {_answer(error)}.", permanent=too_large)
        case aiosmtplib.SMTPRecipientsRefused():
            first = error.recipients[0]
            return SendFailed(f"{where} refuses every recipient: {first.recipient}: {_answer(first)}.")
        case aiosmtplib.SMTPResponseException():
            return SendFailed(f"{where} answered {_answer(error)}.")
        case _:
            return SendFailed(f"No mail through {where}: {type(error).__name__}: {cut(one_line(str(error)), 200)}")


def _answer(answer: Any) -> str:
    """A server's code and words; they may hold anything."""
    return f"{answer.code} {cut(one_line(str(answer.message)), 200)}".rstrip(". ")


def _own_name() -> str:
    """For EHLO. The full name would be asked of DNS, which may be what is down."""
    name = socket.gethostname()
    return name if name.isascii() and name.replace("-", "").replace(".", "").isalnum() else "localhost"


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
