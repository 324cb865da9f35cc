"""``topology``, ``topology apply`` and ``migrate``: what the servers hold against what this version wants."""

from __future__ import annotations

import argparse

from bus import topology
from commands.output import DONE, NO, CommandError, say, write_json, write_table
from commands.places import bus_of, find
from commands.settings import read


async def show(args: argparse.Namespace) -> int:
    """``topology [--json]``: exit code 1 where something differs."""
    loaded = read()
    async with bus_of(find(loaded), loaded) as bus:
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
    from nats.js.errors import APIError

    loaded = read()
    async with bus_of(find(loaded), loaded) as bus:
        try:
            done = await topology.apply(bus, loaded.settings.streams)
        except APIError as error:
            raise CommandError(f"nats-server refuses the wanted topology: {error.description}.") from error
    if args.json:
        write_json({"applied": [_builtins(item) for item in done]})
    elif not done:
        say("Every stream and bucket was as wanted already.")
    else:
        _table(done)
        say("Applied.")
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


def _builtins(item: topology.Difference) -> dict[str, str]:
    found = {"stream": item.stream, "field": item.field, "wanted": item.wanted, "found": item.found}
    return found | ({"consumer": item.consumer} if item.consumer else {})


def _table(differences: list[topology.Difference]) -> None:
    write_table(
        ("stream", "field", "wanted", "found"),
        [(f"{item.stream} {item.consumer}".rstrip(), item.field, item.wanted, item.found) for item in differences],
    )
