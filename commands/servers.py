"""Servers for one command where no ``up`` runs, and the check of CANDLES that every ``up`` makes."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from commands.output import NO, WRONG, CommandError
from commands.places import CLIENT, Places, find, running
from commands.settings import Loaded
from deploy.home import Home, HomeBusy, end_leftovers
from deploy.process import DeployError

if TYPE_CHECKING:
    from bus.client import Bus
    from bus.store import Store


@contextmanager
def serving(loaded: Loaded) -> Iterator[Places]:
    """What runs or is given; embedded servers that are started for this block where neither is."""
    settings = loaded.settings
    if running(loaded.home) is not None or (settings.nats.url and settings.database.url):
        yield find(loaded)
        return
    from deploy.embedded import NatsServer, NatsUser, PostgresServer

    places = find(loaded)
    home = Home(loaded.home)
    try:
        with ExitStack() as stack:
            stack.enter_context(home)
            end_leftovers(home)
            if settings.nats.url is None:
                nats = NatsServer(home.path / "nats", (NatsUser(CLIENT, secrets.token_urlsafe(24)),))
                stack.callback(nats.stop)
                nats.start()
                places = replace(places, nats=nats.url(CLIENT))
            if settings.database.url is None:
                postgres = PostgresServer(home.path / "postgres")
                stack.callback(postgres.stop)
                postgres.start()
                places = replace(places, database=postgres.url)
            yield places
    except HomeBusy as error:
        raise CommandError(f"{str(error)[:1].upper()}{str(error)[1:]}", NO) from error
    except DeployError as error:
        raise CommandError(f"{str(error)[:1].upper()}{str(error)[1:]}", WRONG) from error


async def keep_forward(bus: Bus, store: Store, log: Any) -> None:
    """Refuses a CANDLES stream that went backwards; one that was made anew is let count on behind the archive.

    Raises WentBackwards.
    """
    from bus.forward import check_forward, go_forward, reach

    found = await reach(bus, store)
    if found.backwards and found.last == 0:
        seq = await go_forward(bus, found)
        log.warning("CANDLES was made anew: it counts on behind what the archive holds", action="up.forward", next=seq)
        return
    check_forward(found.last, found.known)
