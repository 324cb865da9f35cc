"""Everything that a backup holds, brought back onto servers and into a folder that are empty, and compared on the way.

The same steps for a restore, for the proof that a backup can be restored, and for a drill.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nats.errors import Error as NatsError

from actors.core.backups import Step
from actors.vault.restore import NotEmpty, NotRestored, differences, refuse_full, restore_database
from actors.vault.streams_restore import StreamNotRestored, present, rebind, restore_stream
from actors.vault.threads import in_thread
from actors.vault.unpack import BadArchive, unpack
from bus.client import Bus
from schema.backup import DUMP, FILES, STREAMS, BackupManifest

Tell = Callable[[Step], None]


@dataclass(slots=True)
class Restored:
    """What was brought back, and the seconds that each part took; ``notes`` are sentences for the person."""

    rows: int = 0
    tables: int = 0
    streams: list[str] = field(default_factory=list)
    messages: int = 0
    files: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


async def refuse_occupied(manifest: BackupManifest, database_url: str, bus: Bus | None) -> None:
    """Raises NotEmpty where a table or a stream of ours is there already, NotRestored where a server does not answer."""
    await refuse_full(database_url)
    if bus is None:
        return
    try:
        found = await present(bus, [stream.name for stream in manifest.streams])
    except (NatsError, TimeoutError) as error:
        raise NotRestored(f"nats-server does not say which streams it has ({type(error).__name__}).") from error
    if found:
        raise NotEmpty(
            f"nats-server is not empty (it has the stream {found[0]}): restore onto a new one, or delete what it has first."
        )


async def bring_back(
    folder: Path,
    manifest: BackupManifest,
    *,
    database_url: str,
    bus: Bus | None,
    bins: Mapping[str, str],
    files: Path | None,
    passing: bool,
    tell: Tell,
) -> Restored:
    """Restores streams, database and files from a folder whose hashes are right; ``files`` is a folder that it makes.

    ``passing``: the database is thrown away where this fails. Otherwise what was made of the streams is taken back, and
    the database is one transaction: after a failure the servers are as empty as before.

    Raises:
        NotEmpty: nothing was changed.
        NotRestored: with the reason; it names the file.
    """
    await refuse_occupied(manifest, database_url, bus)
    out = Restored()
    try:
        if bus is not None:
            with _timed(out, "streams"):
                await _streams(folder / STREAMS, manifest, bus, out, tell)
        with _timed(out, "database"):
            await _database(folder / DUMP, manifest, database_url, bins, out, passing=passing, tell=tell)
        if files is not None:
            with _timed(out, "files"):
                out.files = await _files(folder / FILES, files, tell)
    except BaseException:
        if bus is not None and not passing:
            await _take_back(bus, out.streams)
        raise
    if bus is not None:
        await rebind(bus, database_url)
    return out


async def _streams(folder: Path, manifest: BackupManifest, bus: Bus, out: Restored, tell: Tell) -> None:
    for wanted in manifest.streams:
        stage, total, sent = f"stream {wanted.name}", (folder / f"{wanted.name}.snapshot").stat().st_size, 0

        def heard(size: int, stage: str = stage, total: int = total) -> None:
            nonlocal sent
            sent += size
            tell(Step(stage=stage, done=sent, total=total))

        try:
            found = await restore_stream(bus, wanted, folder, heard)
        except StreamNotRestored as error:
            path = f"{STREAMS}/{wanted.name}.snapshot"
            raise NotRestored(f"{path} does not give its stream back: {error}", path) from error
        out.streams.append(wanted.name)
        out.messages += found.messages


async def _database(
    dump: Path, manifest: BackupManifest, url: str, bins: Mapping[str, str], out: Restored, *, passing: bool, tell: Tell
) -> None:
    tell(Step(stage="database"))
    complaint = await restore_database(
        url, dump, manifest, bins, parallel=passing, look=lambda: tell(Step(stage="database"))
    )
    tell(Step(stage="comparison"))
    problems = await differences(url, manifest)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise NotRestored(
            f"{dump.name} does not give back what the manifest says: {', '.join(problems[:3])}{more}."
            + (f" pg_restore said: {complaint}" if complaint else ""),
            dump.name,
        )
    if complaint:
        out.notes.append(f"Every row is there, though pg_restore complained: {complaint}")
    out.tables, out.rows = len(manifest.tables), sum(table.rows for table in manifest.tables)


async def _files(archive: Path, target: Path, tell: Tell) -> int:
    try:
        return await in_thread(
            lambda count: unpack(archive, target, count), lambda done: tell(Step(stage="files", done=done))
        )
    except BadArchive as error:
        raise NotRestored(f"{archive.name} is no archive of ours: {error}.", archive.name) from error
    except OSError as error:
        raise NotRestored(f"{error.filename or target} cannot be written ({error.strerror or error}).") from error


async def _take_back(bus: Bus, streams: list[str]) -> None:
    """Deletes the streams that this run has made, so that another try finds the server empty."""
    for name in streams:
        with contextlib.suppress(NatsError, TimeoutError):  # the reason why it failed is told, not this one
            await bus.js.delete_stream(name)


@contextlib.contextmanager
def _timed(out: Restored, part: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    out.seconds[part] = round(time.monotonic() - started, 3)
