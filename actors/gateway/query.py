"""A read's query parameters: each checked, and each mistake told in a sentence."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

from aiohttp import web

from actors.gateway.problems import HttpProblem
from schema.timeframes import TIMEFRAMES, canonical

MAX_LIMIT: Final = 10_000
MAX_NAME: Final = 128
_MILLISECONDS_FROM: Final = 10**11  # as epoch seconds that would be the year 5138
_PLUS_LOST: Final = re.compile(r" (\d\d:?\d\d)$")  # "+02:00" sent without encoding its plus


class Query:
    """The parameters of one request; raises HttpProblem 400 for one that is unknown, repeated or badly written."""

    def __init__(self, request: web.Request, *known: str) -> None:
        for name in request.query:
            if name not in known:
                raise HttpProblem(400, f'"{name[:40]}" is no parameter here: {", ".join(known)} are.')
            if len(request.query.getall(name)) > 1:
                raise HttpProblem(400, f"{name} stands there twice: give it once.")
        self._values = request.query

    def symbol(self) -> str | None:
        return self.name("symbol")

    def name(self, what: str) -> str | None:
        value = self._values.get(what)
        return None if value is None else checked_name(what, value)

    def timeframe(self) -> str | None:
        """MT5's name of the timeframe, whatever spelling was given."""
        value = self._values.get("timeframe")
        if value is None:
            return None
        name = canonical(value)
        if name is None:
            raise HttpProblem(400, f'"{value[:40]}" is no timeframe: MT5 knows {", ".join(TIMEFRAMES)}.')
        return name

    def limit(self, default: int) -> int:
        value = self._values.get("limit")
        if value is None:
            return default
        if not (value.isascii() and value.isdecimal() and len(value) <= 9 and 1 <= int(value) <= MAX_LIMIT):
            raise HttpProblem(400, f"limit must be a whole number from 1 to {MAX_LIMIT:,}.")
        return int(value)

    def time(self, name: str) -> datetime | None:
        """RFC 3339, epoch seconds or epoch milliseconds; a time without an offset is UTC."""
        value = self._values.get(name)
        if value is None:
            return None
        try:
            return _parse_time(value)
        except (ValueError, OverflowError):
            raise HttpProblem(
                400, f"{name} must be a time such as 2025-02-03T09:30:00Z, or epoch seconds or milliseconds."
            ) from None


def required(name: str, value: str | None) -> str:
    if value is None:
        raise HttpProblem(400, f"{name} is missing: add ?{name}=… to the address.")
    return value


def checked_name(what: str, value: str) -> str:
    """A name that a query may carry to the archive."""
    if not value or len(value) > MAX_NAME or not value.isprintable():
        raise HttpProblem(400, f"{what} must be 1 to {MAX_NAME} printable characters.")
    return value


def _parse_time(text: str) -> datetime:
    if text.isascii() and text.isdecimal():
        number = int(text[:20])
        seconds = number / 1_000 if number >= _MILLISECONDS_FROM else number
        return datetime.fromtimestamp(seconds, UTC)
    time = datetime.fromisoformat(_PLUS_LOST.sub(r"+\1", text))
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
