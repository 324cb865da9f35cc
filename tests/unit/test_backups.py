"""Names, targets, programs and manifests of backups, as values."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from actors.backup import previous_run
from actors.core.backups import (
    NoPrograms,
    choose_bin,
    compare,
    content_hash,
    entry_problems,
    free_name,
    is_name,
    quoted,
    split_table,
    table_name,
)
from actors.core.schedule import Schedule
from actors.vault.dump import libpq_environment
from schema.backup import BackupManifest, FileEntry, StreamEntry
from schema.targets import SshTarget, parse_target

AT = datetime(2026, 3, 29, 1, 2, 3, tzinfo=UTC)


def entry(path: str, content: str = "a", size: int = 10) -> FileEntry:
    return FileEntry(path=path, size=size, sha256=content * 64)


def manifest(*files: FileEntry, **more: Any) -> BackupManifest:
    given_fields: dict[str, Any] = {
        "version": 1, "name": "2026-03-29", "created_at": AT, "seconds": 1.0, "home": "/h", "program": "0", "postgres": "18",
        "pg_dump": "18", "nats_server": "2.15", "migration": "", "timescaledb": None, "newest": None, "tables": (), "streams": (),
    }  # fmt: skip
    return BackupManifest(files=files, **(given_fields | more))


# --- names ---------------------------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 3 * 86_400).map(lambda s: AT + timedelta(seconds=s)), max_size=12))
def test_names_are_new_and_sort_by_age(moments: set[datetime]) -> None:
    names: list[str] = []
    for at in sorted(moments):
        names.append(free_name(at, names))
        assert is_name(names[-1])
        assert names[-1].startswith(f"{at:%Y-%m-%d}")
    assert names == sorted(set(names))


def test_a_name_of_a_day_whose_first_backup_was_pruned_sorts_behind_those_that_are_left() -> None:
    assert free_name(AT + timedelta(hours=1), {"2026-03-29-010203"}) == "2026-03-29-020203"


def test_a_second_backup_within_a_second_is_refused() -> None:
    with pytest.raises(ValueError, match="2026-03-29-010203 already"):
        free_name(AT, {"2026-03-29", "2026-03-29-010203"})


def test_a_name_is_of_the_utc_day() -> None:
    assert free_name(AT.astimezone(ZoneInfo("America/New_York")), ()) == "2026-03-29"


@pytest.mark.parametrize("text", [".2026-03-29", "2026-03-29.x", "2026-03-29-1", "../2026-03-29", "", "2026-03-29\n"])
def test_what_is_no_name(text: str) -> None:
    assert not is_name(text)


# --- targets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("me@host:/srv/backups", SshTarget("host", "/srv/backups", "me")),
        ("host.example.org:/b", SshTarget("host.example.org", "/b")),
        ("me@host:2222:/b c", SshTarget("host", "/b c", "me", 2222)),
        ("me@[::1]:22:/b", SshTarget("::1", "/b", "me", 22)),
        ("/mnt/disk", "/mnt/disk"),
        ("backups", "backups"),
        ("./a:b", "./a:b"),
        ("~/backups", "~/backups"),
    ],
)
def test_targets(text: str, target: str | SshTarget) -> None:
    assert parse_target(text) == target
    assert str(parse_target(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "me@host",
        "me@host:b",
        "host:",
        "me@host:0:/b",
        "me@host:70000:/b",
        "-oProxyCommand=x:/b",
        "ssh://me@h/b",
        "a\0b",
    ],
)
def test_what_is_no_target_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="^A backup target is .*[.]$"):
        parse_target(text)


# --- PostgreSQL's programs -----------------------------------------------------------------------------------------


def test_the_servers_own_version_is_chosen_else_the_next_newer_one() -> None:
    bins = {"15": "/15", "18": "/18", "17": "/17"}
    assert choose_bin(bins, 17) == (17, "/17")
    assert choose_bin(bins, 16) == (17, "/17")
    with pytest.raises(
        NoPrograms, match=r"is PostgreSQL 19 and no pg_dump .* \(found: 15 in /15, 17 in /17, 18 in /18\)"
    ):
        choose_bin(bins, 19)
    with pytest.raises(NoPrograms, match=r"found: none"):
        choose_bin({}, 15)


def test_a_password_stands_in_the_environment_only_and_decoded() -> None:
    env = libpq_environment("postgresql://us%40er:p%2Fw%3A@[::1]:5433/d%20b?sslmode=require&application_name=x")
    wanted = {
        "PGUSER": "us@er",
        "PGPASSWORD": "p/w:",
        "PGHOST": "::1",
        "PGPORT": "5433",
        "PGDATABASE": "d b",
        "PGSSLMODE": "require",
    }
    assert wanted.items() <= env.items()
    assert "x" not in env.values()


def test_a_socket_and_a_password_of_the_query_are_understood() -> None:
    env = libpq_environment("postgresql:///db?host=/run/postgresql&password=secret&user=me")
    assert {
        "PGHOST": "/run/postgresql",
        "PGPASSWORD": "secret",
        "PGUSER": "me",
        "PGDATABASE": "db",
    }.items() <= env.items()
    assert "PGPORT" not in env


def test_several_hosts_are_handed_on() -> None:
    env = libpq_environment("postgresql://a:b@one:1,two:2/db")
    assert (env["PGHOST"], env["PGPORT"]) == ("one,two", "1,2")


# --- tables --------------------------------------------------------------------------------------------------------


@given(st.text('abc._"', min_size=1, max_size=8))
def test_a_tables_name_of_another_schema_is_told_apart(name: str) -> None:
    if "." not in name:
        assert split_table(table_name("other", name)) == ("other", name)
        assert split_table(table_name("public", name)) == ("public", name)


def test_identifiers_are_quoted() -> None:
    assert quoted('a"b', "c; DROP") == '"a""b"."c; DROP"'


def test_a_content_hash_is_of_128_bits_whatever_the_sums_are() -> None:
    assert content_hash(-1, 2**70 + 5) == "f" * 16 + "0" * 15 + "5"


# --- manifests -----------------------------------------------------------------------------------------------------


def test_a_folder_that_is_as_its_manifest_says_has_no_defect() -> None:
    files = (entry("database.dump", "a"), entry("streams/A.json", "b"), entry("streams/A.snapshot", "c"))
    told = manifest(*files, streams=(StreamEntry(name="A", messages=1, first_seq=1, last_seq=1),))
    assert compare(told, reversed(files)) == []


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ([], "is missing"),
        ([entry("x", "0", 0)], "is empty, and should hold 10 bytes"),
        ([entry("x", "0", 4)], "is cut: 4 of 10 bytes"),
        ([entry("x", "0", 14)], "is too long: 14 instead of 10 bytes"),
        ([entry("x", "0")], "is changed"),
        ([entry("x", "b")], "holds what should be in y"),
    ],
)
def test_each_corruption_is_named_with_its_file(found: list[FileEntry], problem: str) -> None:
    (defect,) = compare(manifest(entry("x", "a"), entry("y", "b")), [*found, entry("y", "b")])
    assert defect.path == "x"
    assert defect.problem.startswith(problem)


def test_a_file_that_nobody_wrote_down_is_named() -> None:
    (defect,) = compare(manifest(entry("x")), [entry("x"), entry("extra")])
    assert (defect.path, defect.problem) == ("extra", "is not in the manifest")


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a//b", "a/../b", "", "manifest.json", "a\\b"])
def test_a_manifest_that_leads_out_of_its_folder_is_not_believed(path: str) -> None:
    assert [defect.path for defect in entry_problems(manifest(entry(path)))] == [path]


def test_a_stream_without_its_files_is_named() -> None:
    told = manifest(entry("streams/A.json"), streams=(StreamEntry(name="A", messages=0, first_seq=0, last_seq=0),))
    assert [defect.path for defect in entry_problems(told)] == ["streams/A.snapshot"]
    assert [defect.path for defect in entry_problems(replace(told, streams=(), files=told.files * 2))] == [
        "streams/A.json"
    ]


# --- the schedule --------------------------------------------------------------------------------------------------


@given(
    st.builds(Schedule, st.integers(0, 23), st.integers(0, 59), st.none() | st.integers(0, 6)),
    st.integers(0, 400 * 86_400).map(lambda s: AT + timedelta(seconds=s)),
)
def test_the_previous_run_is_the_last_one_that_was_due(schedule: Schedule, at: datetime) -> None:
    before = previous_run(schedule, at)
    assert before <= at
    assert schedule.next_run(before) == schedule.next_run(at) > at
    assert schedule.next_run(before - timedelta(microseconds=1)) == before
