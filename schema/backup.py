"""A backup's manifest: what it holds, of what, and by which hashes it is known to be whole."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final

from msgspec import Meta, Struct

UtcTime = Annotated[datetime, Meta(tz=True)]

MANIFEST: Final = "manifest.json"
DUMP: Final = "database.dump"  # pg_dump's custom format
FILES: Final = "files.tar.gz"  # models, keys, configuration, logs, health_checks.db, configured folders
STREAMS: Final = "streams"  # a folder: one NAME.snapshot (JetStream's own) for each stream, beside NAME.json
VERSION: Final = 1


class FileEntry(Struct, frozen=True, kw_only=True):
    """A file of the backup; ``path`` is relative to its folder, with slashes. Sizes in bytes, as it lies there."""

    path: str
    size: int
    sha256: str


class TableEntry(Struct, frozen=True, kw_only=True):
    """A table as the dump saw it: both are taken in pg_dump's own snapshot.

    ``content`` is the order-independent hash of actors/core/backups.py, as hexadecimal digits.
    """

    name: str
    rows: int
    content: str


class StreamEntry(Struct, frozen=True, kw_only=True):
    """A stream as its snapshot holds it."""

    name: str
    messages: int
    first_seq: int
    last_seq: int


class BackupManifest(Struct, frozen=True, kw_only=True):
    """``name`` is the folder's. ``newest`` is when the newest candle in it was received, None where there is none.

    ``encrypted`` names the age recipient to whose key every file but this one is encrypted; hashes are then of what lies there.
    ``left_out`` says which files could not be read, and why.
    """

    version: int
    name: str
    created_at: UtcTime
    seconds: float
    home: str
    program: str
    postgres: str
    pg_dump: str
    nats_server: str
    migration: str
    timescaledb: str | None
    newest: UtcTime | None
    files: tuple[FileEntry, ...]
    tables: tuple[TableEntry, ...]
    streams: tuple[StreamEntry, ...]
    encrypted: str | None = None
    left_out: tuple[str, ...] = ()
