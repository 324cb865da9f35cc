"""``topology``, ``topology apply`` and ``migrate``: what the servers hold against what this version wants."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nats.errors import Error as NatsError
from nats.js.errors import APIError

from bus import topology
from bus.client import Bus, BusUnavailable
from commands.output import DONE, NO, CommandError, say, write_json, write_table
from commands.places import Places, bus_of, find, store_of
from commands.servers import serving
from commands.settings import Loaded, read


async def show(args: argparse.Namespace) -> int:
    """``topology [--json]``: exit code 1 where something differs."""
    loaded = read()
    async with _operators(loaded) as bus:
        differences = await topology.diff(bus, loaded.settings.streams)
    if args.json:
        write_json({"current": not differences, "differences": [_builtins(item) for item in differences]})
    elif not differences:
        say("Every stream and bucket is as wanted.")
    else:
        _table(differences)
        say("`mt5 topology apply` makes them as wanted.")
    return NO if differences else DONE


async def apply(args: argparse.Namespace) -> int:
    """``topology apply [--json]``: makes and updates what differs."""
    loaded = read()
    async with _operators(loaded) as bus:
        done = await topology.apply(bus, loaded.settings.streams)
    if args.json:
        write_json({"applied": [_builtins(item) for item in done]})
    elif not done:
        say("Every stream and bucket was as wanted already.")
    else:
        _table(done)
        say("Applied.")
    return DONE


async def forward(args: argparse.Namespace) -> int:
    """``topology forward [--json]``: for a CANDLES stream that went backwards, as when an older store was put back.

    Lets it count on behind everything that refers to it. Candles that were acknowledged and are neither in the stream
    nor in the archive are lost, and the answer says how many messages that may concern.
    """
    from bus.forward import NotArchived, go_forward, reach

    loaded = read()
    with serving(loaded) as places:
        async with _operators(loaded, places) as bus, store_of(places) as store:
            try:
                found = await reach(bus, store)
                next_seq = await go_forward(bus, found) if found.backwards else found.last + 1
            except NotArchived as error:
                raise CommandError(str(error)) from error
    lost = max(0, found.known - max(found.archived, found.last))
    if args.json:
        write_json(
            {
                "forward": found.backwards,
                "was": found.last,
                "known": found.known,
                "next": next_seq,
                "not_archived": lost,
            }
        )
    elif not found.backwards:
        say(f"CANDLES ends at {found.last}, and nothing refers to more: there is nothing to do.")
    else:
        say(
            f"CANDLES ended at {found.last} and goes on at {next_seq}. "
            + (
                f"Of {lost} messages after {found.archived} neither the stream nor the archive has the candles: send "
                "them again from the terminal (`mt5 gaps` names what is missing)."
                if lost
                else "Every candle before that is in the archive: nothing is lost."
            )
        )
    return DONE


async def migrate(args: argparse.Namespace) -> int:
    """``migrate [--json]``: over the direct connection, which migrations need."""
    url = find(read()).need_database()
    from bus.migrate import MigrationError
    from bus.migrate import migrate as apply_migrations

    try:
        done = await apply_migrations(url)
    except MigrationError as error:
        raise CommandError(str(error)) from error
    if args.json:
        write_json({"applied": done})
    else:
        say("\n".join(f"applied {version}" for version in done) or "The database has every migration already.")
    return DONE


@asynccontextmanager
async def _operators(loaded: Loaded, places: Places | None = None) -> AsyncIterator[Bus]:
    """The operator's connection; what NATS refuses is said in one sentence."""
    try:
        async with bus_of(places or find(loaded), loaded) as bus:
            yield bus
    except APIError as error:
        raise CommandError(f"nats-server refuses it: {error.description}.") from error
    except (NatsError, TimeoutError, BusUnavailable) as error:
        raise CommandError(
            f"NATS did not answer ({type(error).__name__}): streams are looked at and changed with the operator's user, "
            "which MT5_NATS_URL must name, and JetStream must be on."
        ) from error


def _builtins(item: topology.Difference) -> dict[str, str]:
    found = {"stream": item.stream, "field": item.field, "wanted": item.wanted, "found": item.found}
    return found | ({"consumer": item.consumer} if item.consumer else {})


def _table(differences: list[topology.Difference]) -> None:
    write_table(
        ("stream", "field", "wanted", "found"),
        [(f"{item.stream} {item.consumer}".rstrip(), item.field, item.wanted, item.found) for item in differences],
    )
