"""``models list``, ``show``, ``promote`` and ``rollback``: the registry, and a person's word on what serves."""

from __future__ import annotations

import argparse
import getpass
from typing import TYPE_CHECKING, Any

import msgspec

from bus.client import BusUnavailable
from bus.subjects import PROMOTE, ROLLBACK
from commands.output import DONE, NO, WRONG, CommandError, say, write_json, write_table
from commands.places import bus_of, find, store_of
from commands.settings import read

if TYPE_CHECKING:
    from bus.store import ModelRecord

RELEASE_SECONDS = 60.0  # the trainer waits thirty for the emitter


async def listing(args: argparse.Namespace) -> int:
    """``models list [--model NAME] [--json]``, newest version first."""
    async with store_of(find(read())) as store:
        records = await store.models(args.model)
    if args.json:
        write_json({"models": [_facts(record) for record in records]})
    elif not records:
        say("No model has been trained yet: `mt5 train --timeframe M1` trains one.")
    else:
        columns = ("model", "version", "state", "created", "from_seq", "rows", "auc", "why")
        write_table(columns, [_row(record) for record in records])
    return DONE


async def show(args: argparse.Namespace) -> int:
    """``models show VERSION [--json]``: the manifest and the figures of its training."""
    async with store_of(find(read())) as store:
        records = [record for record in await store.models(args.model) if record.version == args.version]
    if not records:
        raise CommandError(f"There is no version {args.version}: `mt5 models list` shows them.", NO)
    if len(records) > 1:
        names = ", ".join(record.model_name for record in records)
        raise CommandError(f"Several models have a version {args.version}: name one of {names} with --model.", WRONG)
    (record,) = records
    if args.json:
        write_json(_facts(record) | {"manifest": record.manifest})
    else:
        write_table(("what", "value"), [*_facts(record).items(), *_flat(record.manifest)])
    return DONE


async def promote(args: argparse.Namespace) -> int:
    """``models promote VERSION --reason TEXT``."""
    return await _release(args, PROMOTE, args.version)


async def rollback(args: argparse.Namespace) -> int:
    """``models rollback [--reason TEXT] [VERSION]``; without a version, to the one that served before."""
    return await _release(args, ROLLBACK, args.version)


async def _release(args: argparse.Namespace, subject: str, version: str | None) -> int:
    reason = args.reason.strip()
    if not reason:
        raise CommandError("--reason is empty: say why, it is kept and shown with the model.", WRONG)
    request: dict[str, str] = {"reason": f"{reason} ({_person()})"}
    request |= {"version": version} if version else {}
    request |= {"model_name": args.model} if args.model else {}
    loaded = read()
    async with bus_of(find(loaded), loaded) as bus:
        try:
            answer = await bus.request(subject, msgspec.json.encode(request), timeout=RELEASE_SECONDS)
        except BusUnavailable as error:
            raise CommandError(f"{error} Is the trainer running? `mt5 doctor` tells.") from error
    verdict = msgspec.json.decode(answer)
    if args.json:
        write_json(verdict)
    elif verdict["ok"]:
        say(verdict["message"])
    else:
        raise CommandError(verdict["message"], NO)
    return DONE if verdict["ok"] else NO


def _person() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown user"


def _facts(record: ModelRecord) -> dict[str, Any]:
    return {
        "model_name": record.model_name,
        "version": record.version,
        "timeframe": record.timeframe,
        "state": record.state,
        "created_at": record.created_at,
        "from_seq": record.from_seq,
        "activated_at": record.activated_at,
        "rows": record.manifest.get("rows"),
        "auc": record.manifest.get("report", {}).get("auc"),
        "threshold": record.manifest.get("threshold"),
        "reason": record.reason,
        "by": record.by,
    }


def _row(record: ModelRecord) -> tuple[Any, ...]:
    facts = _facts(record)
    auc = facts["auc"]
    return (
        record.model_name,
        record.version,
        record.state,
        f"{record.created_at:%Y-%m-%d %H:%M}",
        record.from_seq,
        facts["rows"],
        f"{auc:.3f}" if isinstance(auc, float) else None,
        f"{record.reason} ({record.by})" if record.reason else record.by,
    )


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    lines: list[tuple[str, Any]] = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines += _flat(item, f"{prefix}{key}.")
        else:
            lines.append((f"{prefix}{key}", item))
    return lines
