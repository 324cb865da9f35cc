"""A real SMTP server that keeps what it is sent, and may refuse at any point; certificates of its own for TLS."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import email
import ipaddress
import ssl
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.policy import SMTP
from pathlib import Path
from typing import Any, Final, cast

from aiosmtpd.smtp import SMTP as Server
from aiosmtpd.smtp import AuthResult, LoginPassword
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOST: Final = "127.0.0.1"
Hook = Callable[[str, str], str | None]
"""Called with the stage (EHLO, MAIL, RCPT, DATA before the mail is kept, KEPT after, REPLIED once the client may know) and
its argument; what it returns is answered instead."""


@dataclass(frozen=True)
class Received:
    sender: str
    recipients: tuple[str, ...]
    raw: bytes
    user: str | None
    encrypted: bool

    @property
    def mail(self) -> EmailMessage:
        return cast("EmailMessage", email.message_from_bytes(self.raw, policy=SMTP))


@dataclass
class Mailbox:
    """What the server received, and what it is to say; ``port`` is there once it runs."""

    port: int = 0
    received: list[Received] = field(default_factory=list)
    hook: Hook = lambda stage, argument: None
    logins: list[tuple[str, str]] = field(default_factory=list)

    # --- aiosmtpd calls these by their names -------------------------------------------------------------------------

    async def handle_EHLO(self, server: Any, session: Any, envelope: Any, name: str, answers: list[str]) -> list[str]:
        session.host_name = name
        said = self.hook("EHLO", name)
        return answers if said is None else [said]

    async def handle_MAIL(self, server: Any, session: Any, envelope: Any, address: str, options: list[str]) -> str:
        said = self.hook("MAIL", address)
        if said is None:
            envelope.mail_from = address
        return said or "250 OK"

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: list[str]) -> str:
        said = self.hook("RCPT", address)
        if said is None:
            envelope.rcpt_tos.append(address)
        return said or "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        said = self.hook("DATA", "")
        if said is not None:
            return said
        raw = bytes(envelope.original_content)
        user = session.auth_data.login.decode() if session.auth_data else None
        self.received.append(
            Received(
                envelope.mail_from,
                tuple(envelope.rcpt_tos),
                raw,
                user,
                server.transport.get_extra_info("sslcontext") is not None,
            )
        )
        said = self.hook("KEPT", "")
        # The reply is written after this has returned.
        asyncio.get_running_loop().call_soon(lambda: asyncio.get_running_loop().call_soon(self.hook, "REPLIED", ""))
        return said or "250 kept"


@contextlib.contextmanager
def mail_server(
    *,
    port: int = 0,
    starttls: ssl.SSLContext | None = None,
    tls: ssl.SSLContext | None = None,
    users: dict[str, str] | None = None,
    **options: Any,
) -> Iterator[Mailbox]:
    """A server in a thread of its own, so that a test that blocks does not stop it. With ``users`` one must log in."""
    box = Mailbox()

    def authenticate(server: Any, session: Any, envelope: Any, mechanism: str, data: LoginPassword) -> AuthResult:
        name, password = data.login.decode(), data.password.decode()
        box.logins.append((name, password))
        return AuthResult(success=(users or {}).get(name) == password, handled=False, auth_data=data)

    if users is not None:
        options |= {
            "auth_required": True,
            "authenticator": authenticate,
            "auth_require_tls": tls is None and starttls is not None,
        }
    loop = asyncio.new_event_loop()

    def protocol() -> Server:
        with warnings.catch_warnings():
            # It warns of logins outside TLS, and does not see the TLS around it.
            warnings.simplefilter("ignore", UserWarning)
            return Server(
                box,
                hostname="mail.test",
                loop=loop,
                tls_context=starttls,
                require_starttls=starttls is not None,
                **options,
            )

    async def start() -> asyncio.Server:
        return await loop.create_server(protocol, HOST, port, ssl=tls)

    async def stop(server: asyncio.Server) -> None:
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    thread = threading.Thread(target=loop.run_forever, name="mail-server")
    thread.start()
    try:
        server = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
        try:
            box.port = server.sockets[0].getsockname()[1]
            yield box
        finally:
            asyncio.run_coroutine_threadsafe(stop(server), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def certificate(folder: Path, host: str = HOST, days: int = 30) -> tuple[ssl.SSLContext, Path]:
    """A server's context with a self-signed certificate for ``host``, and its PEM file, as a client's ``ca_file``."""
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now = dt.datetime.now(dt.UTC)
    try:
        alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        alternative = x509.DNSName(host)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    public, private = folder / "server.pem", folder / "server.key"
    public.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(public, private)
    return context, public
