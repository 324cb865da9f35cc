"""``models list``, ``show``, ``promote``, ``rollback``, ``retire``: the registry, and a person's word on what serves."""

from __future__ import annotations

import argparse
import asyncio
import getpass
from typing import TYPE_CHECKING, Any

import msgspec

from bus.client import BusUnavailable
from bus.subjects import MODELS, PROMOTE, RETIRE, ROLLBACK
from commands.output import DONE, NO, WRONG, CommandError, say, write_json, write_table
from commands.places import CLIENT, bus_of, find, store_of
from commands.settings import read

if TYPE_CHECKING:
    from actors.core.registry import Registry, Version
    from bus.client import Bus
    from bus.store import ModelRecord, Store

RELEASE_SECONDS = 60.0  # the trainer waits thirty for the emitter
READ_SECONDS = 60.0  # for the models' events, of which there are at most some thousands
DECISIONS = 200  # the newest on a version that `show` tells
SHOWN = 16  # entries of a list in one line
BRIEF = 3  # figures of some evidence in a column
HAND = "hand"


async def listing(args: argparse.Namespace) -> int:
    """``models list [--model NAME] [--json]``, newest version first."""
    async with store_of(find(read())) as store:
        records = await store.models(args.model)
        evidence = await _evidence(store, args.model)
    if args.json:
        write_json({"models": [_facts(record, evidence) for record in records]})
    elif not records:
        say("No model has been trained yet: `mt5 train --timeframe M1` trains one.")
    else:
        columns = ("model", "version", "state", "recipe", "created", "from_seq", "rows", "auc", "evidence", "why")
        write_table(columns, [_row(record, evidence) for record in records])
    return DONE


async def show(args: argparse.Namespace) -> int:
    """``models show VERSION [--json]``: its state, what was decided on it and why, its manifest and its figures."""
    async with store_of(find(read())) as store:
        records = [record for record in await store.models(args.model) if record.version == args.version]
        decisions = await _decisions(store, records[0]) if len(records) == 1 else []
        evidence = await _evidence(store, args.model)
    if not records:
        raise CommandError(f"There is no version {args.version}: `mt5 models list` shows them.", NO)
    if len(records) > 1:
        names = ", ".join(record.model_name for record in records)
        raise CommandError(f"Several models have a version {args.version}: name one of {names} with --model.", WRONG)
    (record,) = records
    facts = _facts(record, evidence)
    if args.json:
        write_json(facts | {"decisions": decisions, "manifest": record.manifest})
        return DONE
    lines = [(key, value) for key, value in facts.items() if key != "evidence"]
    write_table(("what", "value"), [*lines, *_flat(facts["evidence"], "evidence."), *_flat(record.manifest)])
    if decisions:
        say("")
        columns = ("at", "version", "decision", "by", "evidence", "why")
        write_table(columns, [_decision_row(decision) for decision in decisions])
    return DONE


async def promote(args: argparse.Namespace) -> int:
    """``models promote VERSION --reason TEXT``."""
    return await _ask(args, PROMOTE, args.version)


async def rollback(args: argparse.Namespace) -> int:
    """``models rollback [--reason TEXT] [VERSION]``; without a version, to the one that served before.

    A champion that nothing served before goes on as provisional: its signals say so and are no trades.
    """
    return await _ask(args, ROLLBACK, args.version)


async def retire(args: argparse.Namespace) -> int:
    """``models retire VERSION --reason TEXT``: a version that does not serve is followed and gone back to no more."""
    return await _ask(args, RETIRE, args.version)


async def restore(args: argparse.Namespace) -> int:
    """``models restore [VERSION] [--json]``: verified files from the object store into ``$MT5_HOME/models``.

    Without a version: those that serve.
    """
    loaded = read()
    from actors.artifacts import Artifacts
    from actors.core.manifest import ModelRefused
    from actors.workshop import files, shelf

    models = loaded.home / "models"
    restored = []
    async with bus_of(find(loaded), loaded) as bus:
        try:
            registry = await _registry(bus)
            artifacts = Artifacts(bus, loaded.settings, kept=1)
            for version in _to_restore(registry, args.version, args.model):
                written = await shelf.restore(artifacts, models, version.model_name, version.version)
                if version is registry.serving(version.model_name):
                    files.link(models, version.model_name, version.version)
                folder = models / version.model_name / version.version
                restored.append(
                    {
                        "model_name": version.model_name,
                        "version": version.version,
                        "path": str(folder),
                        "written": written,
                    }
                )
        except (ModelRefused, BusUnavailable) as error:
            raise CommandError(str(error), NO) from error
        except OSError as error:
            raise CommandError(
                f"{error.filename or models} cannot be written ({error.strerror}): mend its permissions, or set MT5_HOME.",
                NO,
            ) from error
    if args.json:
        write_json({"restored": restored})
    else:
        for entry in restored:
            say(f"{entry['path']}: {', '.join(entry['written']) or 'nothing was missing'}")
    return DONE


async def _registry(bus: Bus) -> Registry:
    """The registry as the events tell it: no database is needed. Raises BusUnavailable."""
    from nats.errors import Error as NatsError
    from nats.js.errors import APIError

    from actors.core.registry import Registry
    from bus.consume import Reader, last_message

    registry = Registry()
    try:
        last = await last_message(bus, MODELS)
        if last is None:
            return registry
        async with asyncio.timeout(READ_SECONDS), Reader(bus, MODELS, name=CLIENT, start=1) as reader:
            while reader.position < last[0]:
                registry.apply((await reader.next()).message)
    except (NatsError, APIError, TimeoutError) as error:
        raise BusUnavailable(
            f"NATS did not send the models' events ({type(error).__name__}): see `mt5 doctor`."
        ) from error
    return registry


def _to_restore(registry: Registry, version: str | None, model: str | None) -> list[Version]:
    if version is None:
        names = {name for name, _ in registry.versions if model in (None, name)}
        serving = [one for name in sorted(names) if (one := registry.serving(name)) is not None]
        if not serving:
            raise CommandError("No version serves: name the one to restore; `mt5 models list` shows them.", NO)
        return serving
    found = [v for v in registry.find(version) if model in (None, v.model_name)]
    if not found:
        raise CommandError(f"There is no version {version}: `mt5 models list` shows them.", NO)
    if len(found) > 1:
        names_found = ", ".join(v.model_name for v in found)
        raise CommandError(f"Several models have a version {version}: name one of {names_found} with --model.", WRONG)
    return found


async def _ask(args: argparse.Namespace, subject: str, version: str | None) -> int:
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


async def _evidence(store: Store, model: str | None) -> dict[tuple[str, str], dict[str, Any]]:
    """Each version's newest decision's evidence."""
    rows = await store.fetch("model_evidence", model)
    return {(row["model_name"], row["version"]): msgspec.json.decode(row["evidence"]) for row in rows}


async def _decisions(store: Store, record: ModelRecord) -> list[dict[str, Any]]:
    rows = await store.fetch("model_decisions", record.model_name, record.version, DECISIONS)
    keys = ("at", "version", "action", "by", "reason")
    return [{key: row[key] for key in keys} | {"evidence": msgspec.json.decode(row["evidence"])} for row in rows]


def _decision_row(decision: dict[str, Any]) -> tuple[Any, ...]:
    brief = _brief(decision["evidence"])
    action = decision["action"] if decision["by"] != HAND else f"{decision['action']} by hand"
    return (f"{decision['at']:%Y-%m-%d %H:%M}", decision["version"], action, decision["by"], brief, decision["reason"])


def _brief(evidence: dict[str, Any]) -> str | None:
    """The first figures of some evidence, for a column."""
    figures = [(key, value) for key, value in evidence.items() if isinstance(value, (int, float)) and key != "against"]
    return ", ".join(f"{key} {value:.4g}" for key, value in figures[:BRIEF]) or None


def _facts(record: ModelRecord, evidence: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
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
        "recipe": record.manifest.get("recipe") or None,
        "expires_at": record.manifest.get("expires_at"),
        "reason": record.reason,
        "by": record.by,
        "by_hand": record.by == HAND,
        "evidence": evidence.get((record.model_name, record.version), {}),
    }


def _row(record: ModelRecord, evidence: dict[tuple[str, str], dict[str, Any]]) -> tuple[Any, ...]:
    facts = _facts(record, evidence)
    auc = facts["auc"]
    return (
        record.model_name,
        record.version,
        record.state,
        facts["recipe"],
        f"{record.created_at:%Y-%m-%d %H:%M}",
        record.from_seq,
        facts["rows"],
        f"{auc:.3f}" if isinstance(auc, float) else None,
        _brief(facts["evidence"]),
        f"{record.reason} ({'by hand' if facts['by_hand'] else record.by})" if record.reason else record.by,
    )


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    lines: list[tuple[str, Any]] = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines += _flat(item, f"{prefix}{key}.")
        elif isinstance(item, list) and (len(item) > SHOWN or any(isinstance(one, (list, dict)) for one in item)):
            lines.append((f"{prefix}{key}", f"{len(item)} entries, which --json shows"))
        else:
            lines.append((f"{prefix}{key}", item))
    return lines
