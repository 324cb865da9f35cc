"""The daily report on real servers: what it gathers, what it says of servers that are away, and its mail."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from importlib.resources import files as resources
from pathlib import Path

import asyncpg
import msgspec
import pytest

import runner
from actors.core import daily as words
from actors.monitor.journal import Journal
from actors.monitor.report import Sources, build_notice, gather
from actors.monitor.report_pictures import DrawingFailed, draw, drawing_of
from bus import topology
from bus.client import Bus
from bus.permissions import users
from bus.status import Process, Standing
from bus.store import Store
from bus.subjects import BACKUPS
from bus.supervise import Context
from commands.output import DONE, NO, WRONG
from deploy.embedded import NatsUser
from deploy.process import DeployError
from schema.backup import MANIFEST, BackupManifest, FileEntry
from schema.messages import BackupEvent
from schema.settings import Backup, Settings, Streams
from tests.conftest import missing
from tests.mailbox import Mailbox, mail_server
from tests.models import files, manifest_of
from tests.servers import nats_server

NOW = datetime(2026, 11, 27, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


async def mt5(*said: object) -> int:
    return await asyncio.to_thread(runner.main, [str(word) for word in said])


async def fill(url: str) -> str:
    """A day of two series, a version that serves, and what came of its signals; returns the version."""
    artifacts = files()
    version = manifest_of(artifacts).version
    store = await Store.connect(url, size=1)
    await store.execute(
        "upsert_model", "rf_m1", version, "M1", "candidate", NOW - 9 * HOUR, artifacts["manifest.json"].decode()
    )
    await store.execute("set_model_state", "rf_m1", version, "champion", 7, NOW - 9 * HOUR, "it won", "scorer")
    await store.execute("upsert_model", "rf_m1", "old", "M1", "retired", NOW - 90 * HOUR, "{}")
    await store.close()
    connection = await asyncpg.connect(url)
    try:
        # Bars of long ago that come now are candles of today; those of yesterday are not.
        await connection.executemany(
            "INSERT INTO market_data (ts, symbol, timeframe, open, high, low, close, volume, spread, revision, received_at,"
            " candles_seq, live) VALUES ($1, $2, 'M1', 1, 1, 1, 1, 1, 1, $3, $4, 1, $5)",
            [
                *(
                    (
                        datetime(2012, 1, 2, tzinfo=UTC) + i * HOUR,
                        "EURUSD",
                        int(i == 0),
                        NOW - HOUR * (i + 1) / 2,
                        i < 6,
                    )
                    for i in range(10)
                ),
                (NOW - 25 * HOUR, "EURUSD", 0, NOW - 25 * HOUR, True),
                (NOW - HOUR, "XAU.m", 0, NOW - HOUR, True),
            ],
        )
        await connection.executemany(
            "INSERT INTO model_signals (ts, symbol, timeframe, model_name, label, created_at, id, abstain, candle_revision,"
            " candles_seq, features_hash, expires_at, received_at, superseded_at)"
            " VALUES ($1, 'EURUSD', 'M1', 'rf_m1', $2, $3, $4, $5, 0, 1, '', $1, $6, $7)",
            [
                (NOW, label, NOW - HOUR, f"s{i}", abstain, NOW - HOUR - timedelta(milliseconds=8), gone)
                for i, (label, abstain, gone) in enumerate(
                    [(1, None, None), (-1, None, None), (0, "no_edge", None), (0, "no_edge", None), (1, None, NOW)]
                )
            ],
        )
        await connection.executemany(
            "INSERT INTO signal_outcomes (id, ts, void, prob_up, up, net, label, symbol, timeframe, model_name, model_version,"
            " state, base_rate, ret, candles_seq, fwd_seq, scored_at)"
            " VALUES ($1, $2, $3, $4, $5, 0.0001, 1, 'EURUSD', 'M1', 'rf_m1', $6, 'champion', 0.5, 0.1, 1, 1, $7)",
            [
                (
                    f"s{i}",
                    NOW - i * timedelta(minutes=1),
                    i == 0,
                    0.7 if i % 2 else 0.3,
                    bool(i % 2),
                    version,
                    NOW - i * HOUR / 4,
                )
                for i in range(200)
            ],
        )
        await connection.execute(
            "INSERT INTO model_decisions (at, model_name, version, action, by, reason) VALUES"
            " ($1, 'rf_m1', $3, 'promote', 'scorer', 'evidence 123'), ($2, 'rf_m1', 'old', 'retire', 'scorer', 'days ago')",
            NOW - HOUR,
            NOW - 50 * HOUR,
            version,
        )
        await connection.execute(
            "INSERT INTO signal_audits (at, signal_id, identical) VALUES ($1, 'a', true), ($1, 'b', false), ($2, 'c', false)",
            NOW - HOUR,
            NOW - 50 * HOUR,
        )
    finally:
        await connection.close()
    return version


def journal(home: Path) -> None:
    home.mkdir(exist_ok=True)
    with closing(sqlite3.connect(home / "health_checks.db")) as connection, connection:
        connection.executescript((resources("schema.sql") / "health.sql").read_text("utf-8"))
        connection.executemany(
            "INSERT INTO checks VALUES (?, ?, 'ok', NULL, '', 0.01, 'Works.')",
            [
                ((NOW - i * timedelta(minutes=5)).timestamp(), check)
                for i in range(300)
                for check in ("nats", "actor.emitter")
            ],
        )


async def test_it_is_gathered_from_everywhere(tmp_path: Path, pg_url: str, bus: Bus) -> None:
    version = await fill(pg_url)
    journal(tmp_path)
    (tmp_path / "jobs").mkdir()
    ran = {
        "name": "tests",
        "at": (NOW - HOUR).isoformat(),
        "ok": True,
        "seconds": 61.5,
        "summary": "passed",
        "details": ["x"],
    }
    (tmp_path / "jobs" / "tests.json").write_text(json.dumps(ran))
    (tmp_path / "jobs" / "torn.json").write_text('{"name": "to')
    for event, backup, hours in (("made", "2026-11-26", 30), ("failed", "2026-11-27", 5), ("made", "2026-11-27", 4)):
        message = BackupEvent(
            event=event, backup=backup, at=NOW - hours * HOUR, bytes=10, rpo_seconds=61.0, error="no room"
        )
        await bus.publish(BACKUPS, message, event, msg_id=f"{event} {backup}")
    await bus.publish(BACKUPS, BackupEvent(event="shipped", backup="later", at=NOW + HOUR), "shipped", msg_id="later")
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    author = ["-c", "user.name=Ann", "-c", "user.email=ann@example.org"]
    subprocess.run(
        ["git", "-C", str(checkout), *author, "commit", "-q", "--allow-empty", "-m", 'Say "hello"'], check=True
    )

    store = await Store.connect(pg_url, size=2)
    settings = Settings(backup=Backup(schedule="04:00"))
    sources = Sources(settings, tmp_path, bus, store, checkout=checkout)
    commits = (await gather(sources, datetime.now(UTC) + HOUR)).commits
    report = await gather(sources, NOW)
    await store.close()

    assert [(commit.subject, commit.author) for commit in commits] == [('Say "hello"', "Ann")]
    assert re.search(r"revision [0-9a-f]{7,}$", report.release)
    assert report.problems == {}
    assert report.watch is not None
    assert [(s.name, s.fine) for s in report.watch.services] == [("emitter", 1.0), ("NATS", 1.0)]
    assert report.watch.covered == 1.0
    market = report.market
    assert market is not None
    assert (market.bars, market.live, market.revised) == (11, 7, 1)
    assert (market.signals, market.traded, market.superseded, market.reasons) == (4, 2, 1, {"no_edge": 2})
    assert market.p50 == pytest.approx(0.008)
    assert {(s.symbol, s.bars, s.up, s.down, s.none) for s in market.series} == {
        ("EURUSD", 10, 1, 1, 2),
        ("XAU.m", 1, 0, 0, 0),
    }
    models = report.models
    assert models is not None
    (one,) = models.versions
    assert (one.version, one.state, one.outcomes, one.trades) == (
        version,
        "champion",
        96,
        96,
    )  # of 24 hours, one is void
    assert one.hit_rate == 1.0
    assert one.gain == pytest.approx(0.25 - 0.09)
    assert one.net == pytest.approx(0.0001)
    assert [(card.symbol, card.outcomes) for card in models.cards] == [("EURUSD", 199)]
    assert [skill.version for skill in models.skills] == [version]
    assert [(step.action, step.reason) for step in models.steps] == [("promote", "evidence 123")]
    assert (models.audited, models.different) == (2, 1)
    backups = report.backups
    assert backups is not None
    assert {event: one.backup for event, one in backups.newest.items()} == {
        "made": "2026-11-27",
        "failed": "2026-11-27",
    }
    assert report.room is not None
    assert report.room.disks[0].total > 0
    assert report.room.database is not None
    assert [(job.name, job.summary) for job in report.jobs] == [("tests", "passed")]
    assert [concern.text for concern in words.concerns(report)] == [
        "1 signal could not be made again bit by bit: `mt5 verify` shows where they differ."
    ]


async def test_a_day_of_the_past_is_that_day_only(tmp_path: Path, pg_url: str) -> None:
    await fill(pg_url)
    store = await Store.connect(pg_url, size=2)
    report = await gather(Sources(Settings(), tmp_path, None, store), NOW + 48 * HOUR, (NOW - 24 * HOUR).date())
    await store.close()
    assert (report.since, report.until) == (NOW - 36 * HOUR, NOW - 12 * HOUR)
    assert report.market is not None
    assert (report.market.bars, report.market.signals) == (1, 0)
    assert len(report.market.hours) == 24


async def test_what_is_away_is_said_and_the_rest_is_told(tmp_path: Path, server_folder: Path) -> None:
    journal(tmp_path)
    # Nobody listens there any more.
    dead = "postgresql://postgres:x@127.0.0.1:9/mt5"
    store = await Store.connect(dead, size=2)
    report = await gather(Sources(Settings(), tmp_path, None, store), NOW)
    await store.close()
    assert set(report.problems) == {"archive", "backups"}
    assert "cannot be used now" in report.problems["archive"]
    assert "x@" not in report.problems["archive"]
    assert report.watch is not None
    assert report.market is None
    assert words.headline(report).tone == "bad"


async def test_backups_in_the_home_are_known_without_a_bus(tmp_path: Path) -> None:
    for name, hours in (("2026-11-25", 48), ("2026-11-26", 24), ("2026-11-27-180000", -6)):
        folder = tmp_path / "backups" / name
        folder.mkdir(parents=True)
        manifest = BackupManifest(
            version=1,
            name=name,
            created_at=NOW - hours * HOUR,
            seconds=3.0,
            home=str(tmp_path),
            program="0.1.0",
            postgres="18",
            pg_dump="18",
            nats_server="2.15",
            migration="0010",
            timescaledb=None,
            newest=NOW - (hours + 1) * HOUR,
            files=(FileEntry(path="a", size=5, sha256=""), FileEntry(path="b", size=6, sha256="")),
            tables=(),
            streams=(),
        )
        (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    (tmp_path / "backups" / ".2026-11-28.part").mkdir()
    report = await gather(Sources(Settings(), tmp_path), NOW)
    assert report.backups is not None
    made = report.backups.newest["made"]
    assert (made.backup, made.bytes, made.rpo, report.backups.kept) == ("2026-11-26", 11, 3_600.0, 3)


# --- as the actor ------------------------------------------------------------------------------------------------


async def test_the_actors_own_credentials_are_enough(tmp_path: Path, pg_url: str, server_folder: Path) -> None:
    accounts = tuple(NatsUser(user.name, f"{user.name}-own", user.publish, user.subscribe) for user in users())
    try:
        with nats_server(tmp_path / "nats", accounts) as server:
            operator = await Bus.connect(server.url("operator"), name="operator")
            await topology.apply(operator, Streams())
            message = BackupEvent(event="verified", backup="2026-11-27", at=NOW - HOUR, seconds=9.0)
            await operator.publish(BACKUPS, message, "verified", msg_id="1")
            await operator.close()
            bus = await Bus.connect(server.url("health"), name="health")
            process = Process.of(["health"])
            ctx = Context(
                Settings(home=str(tmp_path / "home")), bus, pg_url, lambda: None, None, process=process,
                standing=Standing("health", process),
            )  # fmt: skip
            (tmp_path / "home").mkdir()
            with closing(Journal.open(tmp_path / "home")) as diary:
                notice = await build_notice(ctx, diary, NOW)
            await bus.close()
    except DeployError as error:
        missing(str(error))
    assert (notice.id, notice.kind) == ("report:2026-11-27", "report")
    assert any("restored into a scratch database" in line for line in notice.lines)
    assert "restored into a scratch database" in notice.html.lower()
    assert set(re.findall(r'src="cid:(\w+)"', notice.html)) == set(notice.pictures)


async def test_a_process_that_dies_while_it_draws_costs_the_pictures_only(tmp_path: Path) -> None:
    blocked = tmp_path / "home"
    blocked.write_text("a file where a folder should be")
    report = await gather(Sources(Settings(), tmp_path), NOW)
    with pytest.raises(DrawingFailed, match="exit code 1"):
        await draw(drawing_of(report), blocked)


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MT5_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path


async def test_the_command_prints_writes_and_answers_machines(
    here: Path,
    pg_url: str,
    nats_url: str,
    bus: Bus,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    await fill(pg_url)
    monkeypatch.setenv("MT5_DATABASE_URL", pg_url)
    monkeypatch.setenv("MT5_NATS_URL", nats_url)
    assert await mt5("health", "report", "--day", "2026-11-27", "--html", "report.html") == DONE
    assert "The report is in report.html: " in capsys.readouterr().out
    html = (here / "report.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert len(pictures) == 2  # nobody looked at services or disks
    assert all(base64.b64decode(data).startswith(b"\x89PNG") for data in pictures)
    assert "cid:" not in html
    assert (here / "home" / "cache").stat().st_mode & 0o077 == 0

    assert await mt5("health", "report", "--day", "2026-11-27", "--json") == DONE
    said = json.loads(capsys.readouterr().out)
    assert said["market"]["series"][0]["symbol"] == "EURUSD"
    assert said["totals"] == {"bars": 11, "live": 7, "signals": 4, "traded": 2}
    assert said["concerns"][0]["tone"] == said["tone"] == "bad"
    assert await mt5("health", "report", "--day", "2026-11-27") == DONE
    assert "EURUSD M1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("said", "code", "text"),
    [
        (["--day", "yesterday"], WRONG, '"yesterday" is no date: --day takes one such as 20'),
        (["--day", "2999-01-01"], WRONG, "2999-01-01 is still to come"),
        (
            ["--html", "no/such/folder/x.html"],
            WRONG,
            "no/such/folder/x.html cannot be written (No such file or directory)",
        ),
        (["--mail"], NO, "Nobody is told: name a mail server and recipients in [notify.smtp] of mt5.toml."),
    ],
)
async def test_mistakes_get_a_sentence(
    here: Path, said: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await mt5("health", "report", *said) == code
    err = capsys.readouterr().err
    assert text in err
    assert "Traceback" not in err


@pytest.fixture
def mailbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mailbox]:
    """A mail server that the settings name."""
    with mail_server() as box:
        monkeypatch.setenv("MT5_NOTIFY_SMTP_HOST", "127.0.0.1")
        monkeypatch.setenv("MT5_NOTIFY_SMTP_PORT", str(box.port))
        monkeypatch.setenv("MT5_NOTIFY_SMTP_SECURITY", "none")
        monkeypatch.setenv("MT5_NOTIFY_SMTP_RECIPIENTS", "owner@example.org")
        yield box


async def test_without_a_monitor_the_command_sends_the_mail_once_a_day(
    here: Path, pg_url: str, mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    await fill(pg_url)
    monkeypatch.setenv("MT5_DATABASE_URL", pg_url)
    assert await mt5("health", "report", "--mail", "--day", "2026-11-27") == DONE
    assert "is on its way by smtp" in capsys.readouterr().out
    assert await mt5("health", "report", "--mail", "--day", "2026-11-27", "--json") == DONE
    answer = json.loads(capsys.readouterr().out)
    assert (answer["notice"], answer["new"], answer["senders"]) == ("report:day:2026-11-27", False, ["smtp"])
    (kept,) = mailbox.received
    mail = kept.mail
    assert str(mail["Subject"]).endswith("Daily report, 27 November 2026: 3 things need you")
    assert kept.recipients == ("owner@example.org",)
    text, page = mail.get_body(("plain",)), mail.get_body(("html",))
    assert text is not None
    assert page is not None
    assert "EURUSD M1" in text.get_content()
    wanted = set(re.findall(r'src="cid:([^"]+)"', page.get_content()))
    found = {
        str(part["Content-ID"]).strip("<>"): part.get_content()
        for part in mail.walk()
        if part.get_content_type() == "image/png"
    }
    assert wanted == set(found) == {"market", "skill"}
    assert all(bytes(data).startswith(b"\x89PNG") for data in found.values())
