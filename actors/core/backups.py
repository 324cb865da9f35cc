"""What a backup is, in values: its name, its places, the programs that make it, and whether a folder holds what it says.

Nothing is opened here. The content hash of a table is SQL, so that a million rows never leave the server.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from msgspec import Struct

from schema.backup import MANIFEST, STREAMS, BackupManifest, FileEntry

# A backup's folder: the UTC day, and the time for a day's second one.
NAME: Final = re.compile(r"\d{4}-\d{2}-\d{2}(-\d{6})?")

# The text of a row depends on these; they hold for the transaction that hashes, wherever it runs.
HASH_SETTINGS: Final[dict[str, str]] = {
    "TimeZone": "UTC",
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "iso_8601",
    "extra_float_digits": "1",  # the shortest text that reads back as the same bits
    "bytea_output": "hex",
    "xmlbinary": "base64",
    "lc_monetary": "C",
    "statement_timeout": "0",
}


class Step(Struct, frozen=True, kw_only=True):
    """How far a backup is. Bytes; ``total`` is 0 where nobody knows it before."""

    stage: str
    done: int = 0
    total: int = 0


class NoPrograms(Exception):
    """No pg_dump here can read that server; the message is a sentence with the way out."""


# --- names -------------------------------------------------------------------------------------------------------


def free_name(at: datetime, taken: Collection[str]) -> str:
    """A name for a backup begun at ``at``: the UTC day, and the time, too, where that day has one already.

    A day's later name sorts behind its earlier ones, also where the first of them was pruned. Raises ValueError where the
    name is taken: a second one within the same second.
    """
    at = at.astimezone(UTC)
    day = f"{at:%Y-%m-%d}"
    if not any(name.startswith(day) for name in taken):
        return day
    name = f"{at:%Y-%m-%d-%H%M%S}"
    if name in taken:
        raise ValueError(f"there is a backup {name} already")
    return name


def is_name(text: str) -> bool:
    return NAME.fullmatch(text) is not None


# --- tables ------------------------------------------------------------------------------------------------------


def table_name(schema: str, name: str) -> str:
    """How the manifest calls a table: by its name alone in ``public``."""
    return name if schema == "public" else f"{schema}.{name}"


def quoted(*parts: str) -> str:
    """An SQL identifier, whatever it holds."""
    return ".".join('"{}"'.format(part.replace('"', '""')) for part in parts)


def split_table(name: str) -> tuple[str, str]:
    """The schema and the name of a table of a manifest; the inverse of :func:`table_name`."""
    schema, dot, table = name.partition(".")
    return (schema, table) if dot else ("public", name)


def content_hash(a: int, b: int) -> str:
    """128 bits as 32 hexadecimal digits."""
    return f"{a % 2**64:016x}{b % 2**64:016x}"


# --- programs ----------------------------------------------------------------------------------------------------


def choose_bin(bins: Mapping[str, str], server_major: int) -> tuple[int, str]:
    """The major version and the folder of the PostgreSQL programs for a server: its own, else the next newer one.

    Raises NoPrograms: an older pg_dump refuses a newer server.
    """
    fitting = sorted((int(major), folder) for major, folder in bins.items() if int(major) >= server_major)
    if fitting:
        return fitting[0]
    found = ", ".join(f"{major} in {folder}" for major, folder in sorted(bins.items())) or "none"
    raise NoPrograms(
        f"The database is PostgreSQL {server_major} and no pg_dump of that version or a newer one is here (found: {found}): "
        f"install postgresql-client-{server_major}, or name its folder in [backup] postgres_bins."
    )


# --- whether a folder holds what its manifest says ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Defect:
    """A file of a backup and what is wrong with it, as a clause."""

    path: str
    problem: str


def entry_problems(manifest: BackupManifest) -> list[Defect]:
    """What is wrong with a manifest by itself: paths that lead out of the folder, or that stand there twice."""
    found = []
    seen: set[str] = set()
    for entry in manifest.files:
        parts = entry.path.split("/")
        if entry.path == MANIFEST or any(part in {"", ".", ".."} or "\\" in part or "\x00" in part for part in parts):
            found.append(Defect(entry.path, "is no path of a file within the backup"))
        elif entry.path in seen:
            found.append(Defect(entry.path, "stands in the manifest twice"))
        seen.add(entry.path)
    named = {f"{STREAMS}/{stream.name}.{end}" for stream in manifest.streams for end in ("snapshot", "json")}
    found += [Defect(path, "is not in the manifest, which names its stream") for path in sorted(named - seen)]
    return found


def compare(manifest: BackupManifest, found: Iterable[FileEntry]) -> list[Defect]:
    """What differs between a manifest and the files that lie in its folder, by path; empty where all is as it says.

    ``found`` has every file but the manifest. A file of size 0 that should hold something is called empty, a shorter one
    cut, one with another file's content swapped.
    """
    have = {entry.path: entry for entry in found}
    by_hash = {entry.sha256: entry.path for entry in manifest.files}
    defects = entry_problems(manifest)
    for entry in manifest.files:
        seen = have.get(entry.path)
        if seen is None:
            defects.append(Defect(entry.path, "is missing"))
        elif seen.sha256 == entry.sha256 and seen.size == entry.size:
            continue
        elif seen.size == 0:
            defects.append(Defect(entry.path, f"is empty, and should hold {entry.size:,} bytes"))
        elif (other := by_hash.get(seen.sha256)) is not None and other != entry.path:
            defects.append(Defect(entry.path, f"holds what should be in {other}"))
        elif seen.size < entry.size:
            defects.append(Defect(entry.path, f"is cut: {seen.size:,} of {entry.size:,} bytes"))
        elif seen.size > entry.size:
            defects.append(Defect(entry.path, f"is too long: {seen.size:,} instead of {entry.size:,} bytes"))
        else:
            defects.append(Defect(entry.path, "is changed: its sha256 differs from the manifest's"))
    known = {entry.path for entry in manifest.files}
    defects += [Defect(path, "is not in the manifest") for path in sorted(have.keys() - known)]
    return defects


def total_bytes(files: Sequence[FileEntry]) -> int:
    return sum(entry.size for entry in files)
