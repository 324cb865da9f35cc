"""A drill's figures, and how an actor has one done: by the command, in a process with servers of its own.

An actor chooses no servers, and a restore's memory and load must not be the actor's. The command publishes what came of
it on ``backups.drilled`` (or ``verified``, ``failed``) itself, whoever started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from datetime import datetime
from typing import Final, TypeVar

import msgspec
from msgspec import Struct

from actors.core.backups import Defect
from schema.backup import BackupManifest

BUDGET: Final = 6 * 3_600.0  # seconds of one command: a bound for what hangs
END_SECONDS: Final = 15.0  # for the command to stop its servers and to remove what it has made
NICENESS: Final = 10  # the hot path goes first; the command's servers inherit it
SAID: Final = 600  # characters of a complaint that are told


class Proof(Struct, frozen=True, kw_only=True):
    """What ``backup verify`` has found. ``unproved`` says what could not be looked at on this machine, and why."""

    backup: str
    ok: bool
    problems: tuple[Defect, ...] = ()
    files: int = 0
    tables: int = 0
    rows: int = 0
    streams: int = 0
    messages: int = 0
    seconds: float = 0.0
    unproved: str = ""


class Drill(Struct, frozen=True, kw_only=True):
    """What ``backup drill`` took. ``rto_seconds``: until everything was there again, from the fetch on; ``rpo_seconds``: how
    old the newest candle in it was by then, None where it holds none. ``signals`` were made again and were identical.
    """

    backup: str
    ok: bool
    rto_seconds: float
    rpo_seconds: float | None
    parts: dict[str, float] = {}
    bytes: int = 0
    rows: int = 0
    messages: int = 0
    signals: int = 0
    problem: str = ""
    unproved: str = ""
    home: str | None = None


R = TypeVar("R", Proof, Drill)


class CommandFailed(Exception):
    """The command came to no answer; the message is its own sentence."""


def rpo(manifest: BackupManifest, at: datetime) -> float | None:
    """Seconds of data that a restore of this backup at that time would have lost at most; None where it holds no candle."""
    return None if manifest.newest is None else max(0.0, round((at - manifest.newest).total_seconds(), 3))


async def drill() -> Drill:
    """``mt5 backup drill``: of the newest backup. Raises CommandFailed."""
    return await _command(Drill, "drill")


async def verify(name: str) -> Proof:
    """``mt5 backup verify NAME``. Raises CommandFailed."""
    return await _command(Proof, "verify", name)


async def _command(answer: type[R], *words: str) -> R:
    """Runs ``mt5 backup …`` with this process' environment to its end; a cancellation ends it first."""
    process = await asyncio.create_subprocess_exec(
        # -P: a folder with a `schema` or `bus` of its own must not stand in for ours.
        *(sys.executable, "-P", "-m", "runner", "backup", *words, "--json"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    with contextlib.suppress(OSError):  # it has ended already
        os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
    try:
        async with asyncio.timeout(BUDGET):
            said, complaint = await process.communicate()
    except TimeoutError:
        raise CommandFailed(f"`mt5 backup {words[0]}` did not end within {BUDGET / 3_600:.0f} hours.") from None
    finally:
        if process.returncode is None:
            await _end(process)
    try:
        return msgspec.json.decode(said, type=answer)
    except msgspec.DecodeError as error:
        words_said = " ".join(complaint.decode(errors="replace").split())[-SAID:]
        raise CommandFailed(words_said or f"`mt5 backup {words[0]}` ended with {process.returncode}.") from error


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        try:
            async with asyncio.timeout(END_SECONDS):
                await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
