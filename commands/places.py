"""Where the servers are: the settings where they say so, else what a running ``up`` wrote into its ready.json."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from commands.output import NO, WRONG, CommandError
from commands.settings import Loaded
from deploy.home import Ready, read_ready
from deploy.process import Identity
from schema.settings import Log

if TYPE_CHECKING:
    from bus.client import Bus
    from bus.store import Store

CLIENT: Final = "operator"  # the NATS user of people, and the name under which commands connect


@dataclass(frozen=True, slots=True)
class Places:
    """URLs that work as they are; None where neither the settings nor a running ``up`` name one."""

    home: Path
    nats: str | None
    database: str | None
    gateway: str | None

    def need_nats(self) -> str:
        return self.nats or self._nothing("MT5_NATS_URL")

    def need_database(self) -> str:
        return self.database or self._nothing("MT5_DATABASE_URL")

    def need_gateway(self) -> str:
        return self.gateway or self._nothing("--url")

    def _nothing(self, other: str) -> str:
        pid = starting(self.home)
        if pid is not None:
            raise CommandError(f"`mt5 up` (process {pid}) is not ready yet: wait for it, or see {self.home / 'logs'}.")
        raise CommandError(f"Nothing is running under {self.home}: start it with `mt5 up`, or give {other}.")


def find(loaded: Loaded) -> Places:
    """The servers' URLs; the database's is the direct one."""
    settings = loaded.settings
    ready = running(loaded.home)
    return Places(
        home=loaded.home,
        nats=settings.nats.url or (ready and ready["nats"]) or None,
        database=settings.database.direct_url or settings.database.url or (ready and ready["database"]) or None,
        gateway=(ready and ready["gateway"]) or (gateway_url(loaded) if settings.nats.url else None),
    )


def running(home: Path) -> Ready | None:
    """What a living ``up`` says of itself under this home."""
    try:
        return read_ready(home)
    except PermissionError:
        raise CommandError(f"{home} belongs to another user: run this as the user who runs `mt5 up`.", WRONG) from None
    except OSError as error:
        raise CommandError(
            f"{home} cannot be read ({error.strerror}): set MT5_HOME to the right folder.", WRONG
        ) from None


def starting(home: Path) -> int | None:
    """The process that holds this home without having said that it is ready."""
    try:
        holder = Identity(**json.loads((home / "lock").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return holder.pid if holder.alive() and running(home) is None else None


def gateway_url(loaded: Loaded, port: int | None = None) -> str | None:
    """How a client on this machine reaches a gateway with these settings; None where its port is not known."""
    host, port = loaded.settings.gateway.host, port or loaded.settings.gateway.port
    if host in {"0.0.0.0", "::", ""}:  # noqa: S104 - compared, not bound
        host = "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}" if port else None


@asynccontextmanager
async def bus_of(places: Places, loaded: Loaded, *, patience: float = 3.0) -> AsyncIterator[Bus]:
    """A connection to NATS for one command."""
    url = places.need_nats()
    from bus import logs
    from bus.client import Bus, BusTooOld, BusUnavailable

    logs.configure(Log(level="error"))  # a command says in its own words what went wrong

    try:
        bus = await Bus.connect(url, name=CLIENT, settings=loaded.settings.nats, patience=patience)
    except (BusUnavailable, BusTooOld) as error:
        raise CommandError(str(error)) from error
    try:
        yield bus
    finally:
        await bus.close()


@asynccontextmanager
async def store_of(places: Places) -> AsyncIterator[Store]:
    """A connection to PostgreSQL for one command; its errors are told as commands tell them."""
    url = places.need_database()
    from bus.store import Store, StoreRejected, StoreUnavailable

    try:
        store = await Store.connect(url, size=1, name=CLIENT)
    except ValueError as error:
        raise CommandError(str(error), WRONG) from error
    try:
        yield store
    except (StoreUnavailable, StoreRejected) as error:
        raise CommandError(str(error), NO) from error
    finally:
        await store.close()
