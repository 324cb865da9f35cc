"""One connection to PostgreSQL itself, past PgBouncer: for migrations, dumps and restores."""

from __future__ import annotations

from typing import Any, Final

import asyncpg

from schema.load import mask_url

CONNECT_SECONDS: Final = 10.0


class NotConnected(Exception):
    """PostgreSQL does not take our connection; the message is a sentence with the way out."""


async def connect_direct(url: str) -> Any:
    """Raises NotConnected."""
    try:
        return await asyncpg.connect(url, timeout=CONNECT_SECONDS, statement_cache_size=0)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError, ValueError) as error:
        text = str(error).replace(url, mask_url(url)) or type(error).__name__
        raise NotConnected(
            f"PostgreSQL at {mask_url(url)} does not take our connection ({text}): check MT5_DATABASE_DIRECT_URL and that "
            "the server runs."
        ) from error
