"""HTTP calls that tell somebody something: bounded, followed nowhere else, and silent about URLs, which hold tokens."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from http import HTTPStatus
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import aiohttp

from actors.core.wording import cut, one_line
from actors.monitor.outbox import SendFailed
from bus.supervise import ConfigurationError

CALL_SECONDS: Final = 20.0
ANSWER_BYTES: Final = 4_096  # of an answer that are read
SHOWN: Final = 200  # characters of it that an error shows


class Answer(NamedTuple):
    status: int
    text: str  # one line
    retry_after: float | None  # seconds

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    def __str__(self) -> str:
        try:
            reason = HTTPStatus(self.status).phrase
        except ValueError:
            reason = ""
        return " ".join(f"{self.status} {reason}: {cut(self.text, SHOWN)}".split()).rstrip(": .")


def checked(url: str, setting: str) -> str:
    """The URL, if it can be called.

    Raises:
        ConfigurationError: it cannot; the sentence names the setting and not the URL.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and one_line(url) == url
    except ValueError:
        good = False
    if not good or " " in url:
        raise ConfigurationError(f"{setting} is no http:// or https:// URL.")
    return url


def host_of(url: str) -> str:
    """The part of a URL that may be shown."""
    return urlsplit(url).hostname or "its host"


async def call(
    method: str,
    url: str,
    *,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    seconds: float | None = None,
) -> Answer:
    """Makes one call, within ``seconds`` or :data:`CALL_SECONDS`. A redirect is an answer: what is told goes to the host that was configured, and to no other.

    Raises:
        SendFailed: there was no answer.
    """
    host = host_of(url)
    seconds = CALL_SECONDS if seconds is None else seconds
    try:
        async with (
            asyncio.timeout(seconds),
            aiohttp.ClientSession(headers={"User-Agent": "mt5-monitor"}) as session,
            session.request(method, url, data=body, headers=headers, allow_redirects=False) as response,
        ):
            text = await response.content.read(ANSWER_BYTES)
            return Answer(
                response.status,
                one_line(text.decode("utf-8", "replace")),
                _seconds(response.headers.get("Retry-After")),
            )
    except TimeoutError as error:
        raise SendFailed(f"{host} did not answer within {seconds:g} seconds.") from error
    except aiohttp.ClientConnectorError as error:
        why = error.os_error.strerror or type(error.os_error).__name__
        if isinstance(error.os_error, ssl.SSLError):
            why = "its certificate is not trusted"
        # `from None`: the library's errors hold the whole URL, and logs print causes.
        raise SendFailed(f"{host} cannot be reached: {one_line(why)}.") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise SendFailed(f"The call to {host} failed: {type(error).__name__}.") from None


def _seconds(header: str | None) -> float | None:
    return float(header) if header is not None and header.isascii() and header.isdigit() and len(header) < 8 else None
