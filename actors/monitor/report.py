"""The daily report: gathered from the journal, the archive, the bus, the home and the checkout, then drawn and written.

Whatever cannot be asked is left out and said, each in its own time: the report leaves on every day, on the worst ones first
of all.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import shutil
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
import structlog
from nats.errors import Error as NatsError
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import APIError

from actors.core import daily as words
from actors.core.alerts import Incident
from actors.core.daily_facts import (
    Backups,
    Commit,
    Copy,
    Daily,
    Disk,
    Hour,
    Job,
    Line,
    Look,
    Market,
    Models,
    Room,
    Series,
    Service,
    Skill,
    Step,
    Version,
    Watch,
)
from actors.core.scorecard import Key, Outcomes, make_card
from actors.monitor import report_journal
from actors.monitor.journal import FILE, Journal
from actors.monitor.report_journal import ACTORS, JournalMissing
from actors.monitor.report_page import page
from actors.monitor.report_pictures import DrawingFailed, draw, drawing_of
from bus.client import Bus
from bus.status import judge, statuses
from bus.store import Row, Store, StoreRejected, StoreUnavailable
from bus.subjects import BACKUPS
from bus.supervise import Context
from schema.backup import MANIFEST, BackupManifest
from schema.health import Notice, Status
from schema.messages import BackupEvent
from schema.scorecard import Card
from schema.settings import Settings

log = structlog.get_logger(__name__)
T = TypeVar("T")

BACKUPS_FOLDER: Final = "backups"
JOBS_FOLDER: Final = "jobs"
CHECKOUT: Final = Path(__file__).resolve().parents[2]
PROGRAM: Final = "mt5-trading-system"  # the installed package

PERIOD: Final = timedelta(hours=24)
SECTION_SECONDS: Final = 60.0  # for a section; what takes longer is left out and said
QUERY_SECONDS: Final = 20.0
GIT_SECONDS: Final = 10.0
SERIES: Final = 15  # that are told one by one; a mail over 100 KB is cut by some readers
VERSIONS: Final = 8
CARDS: Final = 12
STEPS: Final = 8
COMMITS: Final = 8
JOBS: Final = 10
OUTCOMES: Final = 20_000  # newest ones that the skill's curve and the day's figures are of
WINDOW: Final = 1_000  # outcomes of a point of the curve
POINTS: Final = 160
EVENTS_BATCH: Final = 256
EVENTS_WAIT: Final = 2.0
JOB_BYTES: Final = 1_000_000
NEVER: Final[Look] = -1


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a report is gathered from; ``no_bus`` and ``no_store`` say why there is none."""

    settings: Settings
    home: Path
    bus: Bus | None = None
    store: Store | None = None
    no_bus: str = "NATS is not known here: nobody could be asked what became of backups."
    no_store: str = "PostgreSQL is not known here: nothing can be said of candles, signals and models."
    checkout: Path = CHECKOUT


@dataclass(slots=True)
class _Found:
    """Sections as they come, and why others do not."""

    sections: dict[str, Any] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    async def section(self, name: str, section: str, ask: Callable[[], Awaitable[Any]]) -> None:
        """Asks for ``section``; what goes wrong is a problem of ``name``."""
        try:
            async with asyncio.timeout(SECTION_SECONDS):
                self.sections[section] = await ask()
        except JournalMissing as error:
            self.problems[name] = str(error)
        except (StoreUnavailable, StoreRejected) as error:
            self.problems[name] = str(error)
        except TimeoutError:
            self.problems[name] = f"This took longer than {SECTION_SECONDS:.0f} s and was left out."
        except (NatsError, APIError) as error:
            self.problems[name] = f"NATS did not answer ({type(error).__name__}): nothing can be said of {section}."
        except OSError as error:
            self.problems[name] = f"{error.filename or 'A file'} cannot be read ({error.strerror})."


async def build_notice(ctx: Context, journal: Journal, now: datetime, day: date | None = None) -> Notice:
    """The report as the health actor sends it: of the hours up to ``now``, or of a whole day.

    Its id is the date's, so that it is sent once however often it is asked for. Takes seconds, most of them in other threads
    and in a process of its own.
    """
    home = journal.folder
    store = await Store.connect(ctx.database_url, size=2, name="mt5-report") if ctx.database_url is not None else None
    try:
        report = await gather(Sources(ctx.settings, home, ctx.bus, store), now, day)
    finally:
        if store is not None:
            await store.close()
    return await notice_of(report, home)


async def notice_of(report: Daily, home: Path) -> Notice:
    """Draws a report and writes its mail."""
    report, pictures = await drawn(report, home)
    return Notice(
        id=words.report_id(report.until, report.since.date() if report.day else None),
        kind="report",
        severity=words.severity(words.headline(report).tone),
        title=words.title(report),
        lines=words.lines(report),
        at=report.made_at,
        checks=tuple(dict.fromkeys(check for incident in _open(report) for check in incident.checks)),
        html=page(report, {name: f"cid:{name}" for name in pictures}),
        pictures=pictures,
    )


async def drawn(report: Daily, home: Path) -> tuple[Daily, dict[str, bytes]]:
    """The report with its pictures; where these fail it goes without, and says why."""
    try:
        return report, await draw(drawing_of(report), home)
    except (DrawingFailed, OSError) as error:
        log.warning("no pictures", action="report.pictures", error=str(error))
        problems = {**report.problems, "pictures": words.sentence(f"The pictures could not be drawn: {error}")}
        return msgspec.structs.replace(report, problems=problems), {}


def _open(report: Daily) -> Sequence[Incident]:
    incidents = report.watch.incidents if report.watch is not None else ()
    return [incident for incident in incidents if incident.closed_at is None]


async def gather(sources: Sources, now: datetime, day: date | None = None) -> Daily:
    """Everything that a report says, of the 24 hours up to ``now`` or of a UTC day. Raises nothing of what it asks."""
    if day is None:
        since, until = now - PERIOD, now
    else:
        since = datetime.combine(day, time(), UTC)
        until = min(since + PERIOD, now)
    found = _Found()
    await asyncio.gather(
        found.section("watch", "watch", lambda: _watch(sources, since, until, live=day is None)),
        found.section("archive", "market", lambda: _market(sources, since, until)),
        found.section("archive", "models", lambda: _models(sources, since, until, now)),
        found.section("backups", "backups", lambda: _backups(sources, until)),
        found.section("room", "room", lambda: _room(sources, until, live=day is None)),
        found.section("jobs", "jobs", lambda: asyncio.to_thread(_jobs, sources.home / JOBS_FOLDER, until)),
        found.section("commits", "commits", lambda: _commits(sources.checkout, until)),
    )
    sections = found.sections
    commits, head = sections.pop("commits", ((), ""))
    return Daily(
        since=since,
        until=until,
        made_at=now,
        day=day is not None,
        host=socket.gethostname(),
        release=_release(head),
        commits=commits,
        problems={name: words.sentence(text) for name, text in found.problems.items()},
        **sections,
    )


def _release(head: str) -> str:
    try:
        version = importlib.metadata.version(PROGRAM)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return f"{version}, revision {head}" if head else version


# --- what was watched --------------------------------------------------------------------------------------------


async def _watch(sources: Sources, since: datetime, until: datetime, *, live: bool) -> Watch:
    """What the monitor wrote; of now, without its looks at actors, what these say themselves."""
    file, interval = sources.home / FILE, sources.settings.health.interval_seconds
    watch, missing = None, None
    try:
        watch = await asyncio.to_thread(report_journal.watched, file, since, until, interval)
    except JournalMissing as error:
        missing = error
    known = watch is not None and any(service.name in ACTORS for service in watch.services)
    if live and not known and sources.bus is not None:
        asked = await _ask_actors(sources.bus)
        if asked:
            watch = watch or Watch(services=(), absent=(), covered=0.0, incidents=())
            return msgspec.structs.replace(watch, services=(*asked, *watch.services))
    if watch is None:
        raise missing or JournalMissing("The health monitor has written nothing here.")
    return watch


async def _ask_actors(bus: Bus) -> list[Service]:
    """How the actors are now, by their own word; nobody where none answers."""
    answers = await statuses(bus, ACTORS)
    out = []
    for actor, said in answers.items():
        if said:
            health, message = judge(actor, said)
            status: Status = "ok" if health == "ok" else "warning"
            out.append(
                Service(
                    name=actor,
                    status=status,
                    message=message,
                    checks=1,
                    failing=() if status == "ok" else (f"actor.{actor}",),
                    fine=None,
                    slow=None,
                    strip=(*([NEVER] * (words.SLOTS - 1)), 0 if status == "ok" else 1),
                )
            )
    return out


# --- the archive -------------------------------------------------------------------------------------------------


def _store(sources: Sources) -> Store:
    if sources.store is None:
        raise StoreUnavailable(sources.no_store)
    return sources.store


async def _market(sources: Sources, since: datetime, until: datetime) -> Market:
    store = _store(sources)
    candles = await store.fetch("daily_candles", since, until, within=QUERY_SECONDS)
    signals = await store.fetch("daily_signals", since, until, within=QUERY_SECONDS)
    latency = await store.fetchval("daily_latency", since, until, within=QUERY_SECONDS)
    return market_of(since, until, candles, signals, latency)


_SIDES: Final = {1: "up", -1: "down", 0: "none"}


def market_of(
    since: datetime,
    until: datetime,
    candles: Sequence[Row],
    signals: Sequence[Row],
    latency: Sequence[float | None] | None,
) -> Market:
    """The market from the rows of daily_candles and daily_signals."""
    first = [since + timedelta(hours=i) for i in range(-(-int((until - since).total_seconds()) // 3_600))]
    hours: dict[datetime, dict[str, int]] = {at: {} for at in first}
    series: dict[tuple[str, str], dict[str, Any]] = {}
    reasons: dict[str, int] = {}
    revised = superseded = 0
    for row in candles:
        if row["hour"] is not None:
            hours.setdefault(row["hour"], {})["live" if row["live"] else "history"] = row["bars"]
            revised += row["revised"]
        else:
            key = row["symbol"], row["timeframe"]
            series[key] = {"bars": row["bars"], "revised": row["revised"], "newest": row["newest"]}
    for row in signals:
        if row["hour"] is not None:
            hours.setdefault(row["hour"], {})[_SIDES[row["label"]]] = row["signals"]
            superseded += row["superseded"]
        elif row["symbol"] is not None:
            one = series.setdefault((row["symbol"], row["timeframe"]), {"bars": 0, "revised": 0, "newest": None})
            one[_SIDES[row["label"]]] = row["signals"]
        elif row["abstain"] is not None and row["signals"]:
            reasons[row["abstain"]] = row["signals"]
    shown = list(series.items())
    p50, p95 = (latency[0], latency[1]) if latency is not None else (None, None)
    return Market(
        hours=tuple(Hour(at=at, **counts) for at, counts in sorted(hours.items())),
        series=tuple(Series(symbol=key[0], timeframe=key[1], **values) for key, values in shown[:SERIES]),
        more=max(0, len(shown) - SERIES),
        revised=revised,
        superseded=superseded,
        reasons=reasons,
        p50=p50,
        p95=p95,
    )


async def _models(sources: Sources, since: datetime, until: datetime, now: datetime) -> Models:
    store = _store(sources)
    found = []
    cards: list[Card] = []
    skills = []
    for row in await store.fetch("daily_versions", VERSIONS, within=QUERY_SECONDS):
        key = row["model_name"], row["version"]
        lived = await store.fetchrow("daily_outcomes", *key, since, until, OUTCOMES, within=QUERY_SECONDS)
        found.append(Version(**dict(row), **dict(lived or {})))
        if row["state"] != "shadow":
            cards += await _cards(sources, found[-1], CARDS - len(cards), now)
            outcomes = await store.fetch("report_outcomes", *key, OUTCOMES, within=QUERY_SECONDS)
            skill = await asyncio.to_thread(skill_of, row["version"], outcomes)
            skills += [skill] if skill is not None else []
    steps = await store.fetch("daily_decisions", since, until, STEPS, within=QUERY_SECONDS)
    audits = await store.fetchrow("daily_audits", since, until, within=QUERY_SECONDS)
    return Models(
        versions=tuple(found),
        steps=tuple(Step(**dict(row)) for row in steps),
        cards=tuple(cards),
        skills=tuple(skills),
        audited=audits["audited"] if audits is not None else 0,
        different=audits["different"] if audits is not None else 0,
    )


async def _cards(sources: Sources, version: Version, most: int, now: datetime) -> list[Card]:
    """A version's scorecard as the scorer makes it, a card a series."""
    store = _store(sources)
    series = await store.fetch("card_series", version.model_name, version.version, within=QUERY_SECONDS)
    cards = []
    for row in sorted(series, key=lambda row: (row["timeframe"], row["symbol"]))[:most]:
        key = Key(version.model_name, version.version, row["symbol"], row["timeframe"])
        rows = await store.fetch("outcomes_of_card", *key, sources.settings.scorer.window, within=QUERY_SECONDS)
        if rows:
            outcomes = Outcomes.of([tuple(outcome) for outcome in rows])
            cards.append(await asyncio.to_thread(make_card, key, _state(version), outcomes, now))
    return cards


def _state(version: Version) -> Any:
    return version.state  # the archive's text; the card's own type checks nothing


def skill_of(version: str, rows: Sequence[Row]) -> Skill | None:
    """The curve of a version's newest outcomes, in the order in which they became known; None where there are too few."""
    known = [
        (row["ts"].timestamp(), row["prob_up"], row["base_rate"], row["up"]) for row in rows if row["up"] is not None
    ]
    if len(known) < 60:
        return None
    ts, prob, base, up = np.array(known, dtype=np.float64).T
    gains = (base - up) ** 2 - (prob - up) ** 2
    window = min(WINDOW, len(known) // 4)
    total = np.concatenate(([0.0], np.cumsum(gains)))
    ends = np.unique(np.linspace(window, len(known), min(POINTS, len(known) - window + 1)).astype(np.int64))
    values = (total[ends] - total[ends - window]) / window
    return Skill(version=version, window=window, ts=tuple(ts[ends - 1].tolist()), values=tuple(values.tolist()))


# --- backups -----------------------------------------------------------------------------------------------------


async def _backups(sources: Sources, until: datetime) -> Backups:
    """By the events, and by what lies in the home where these know of none."""
    settings = sources.settings.backup
    kept, newest = await asyncio.to_thread(_kept, sources.home / BACKUPS_FOLDER, until)
    found = {} if newest is None else {"made": newest}
    problem: NatsError | None = None
    if sources.bus is not None:
        try:
            events = await _events(sources.bus)
        except NatsError as error:
            problem, events = error, []
        for event in events:
            if event.event in words.EVENTS and event.at < until:
                old = found.get(event.event)
                if old is None or event.at >= old.at or old.backup == event.backup:
                    found[event.event] = _copy(event)
    if not found and not kept and (problem is not None or sources.bus is None):
        raise problem or JournalMissing(sources.no_bus)
    return Backups(newest=found, kept=kept, wanted=bool(settings.schedule or settings.target))


async def _events(bus: Bus) -> list[BackupEvent]:
    """The newest event of each kind on EVENTS. Raises NatsError and APIError."""
    config = ConsumerConfig(
        deliver_policy=DeliverPolicy.ALL, ack_policy=AckPolicy.NONE, mem_storage=True, inactive_threshold=30.0
    )
    subscription = await bus.js.pull_subscribe(BACKUPS.wildcard, stream=str(BACKUPS.stream), config=config)
    events: list[BackupEvent] = []
    try:
        left = (await subscription.consumer_info()).num_pending or 0
        while left > 0:
            messages = await subscription.fetch(min(left, EVENTS_BATCH), timeout=EVENTS_WAIT)
            left -= len(messages)
            for message in messages:
                with contextlib.suppress(msgspec.DecodeError):  # another release's: the others are told
                    events.append(BACKUPS.decode(message.data))
    finally:
        with contextlib.suppress(NatsError):
            await subscription.unsubscribe()
    return events


def _copy(event: BackupEvent) -> Copy:
    return Copy(
        event=event.event,
        backup=event.backup,
        at=event.at,
        bytes=event.bytes,
        seconds=event.seconds,
        rpo=event.rpo_seconds,
        target=event.target,
        error=event.error,
    )


def _kept(folder: Path, until: datetime) -> tuple[int, Copy | None]:
    """How many whole backups lie in a folder, and the newest of them."""
    manifests = sorted(folder.glob(f"[0-9]*/{MANIFEST}"), reverse=True) if folder.is_dir() else []
    for file in manifests:
        try:
            manifest = msgspec.json.decode(file.read_bytes(), type=BackupManifest)
        except (OSError, msgspec.DecodeError) as error:
            log.warning("manifest not read", action="report.manifest", file=str(file), error=str(error))
            continue
        if manifest.created_at < until:
            age = None if manifest.newest is None else (manifest.created_at - manifest.newest).total_seconds()
            return len(manifests), Copy(
                event="made",
                backup=manifest.name,
                at=manifest.created_at,
                bytes=sum(entry.size for entry in manifest.files),
                seconds=manifest.seconds,
                rpo=age,
                target="",
                error="",
            )
    return len(manifests), None


# --- room, jobs, commits -----------------------------------------------------------------------------------------


async def _room(sources: Sources, until: datetime, *, live: bool) -> Room:
    health = sources.settings.health
    try:
        disks, sizes = await asyncio.to_thread(report_journal.history, sources.home / FILE, until)
    except JournalMissing:  # which the section of services says
        disks, sizes = [], []
    database: int | None = None
    if live and sources.store is not None:
        with contextlib.suppress(StoreUnavailable):  # which the archive's sections say
            database = await sources.store.fetchval("database_size", within=QUERY_SECONDS)
    line = sizes[0] if sizes else None
    if database is None and line is not None:
        database = round(line.values[-1])
    return Room(
        disks=tuple(await asyncio.to_thread(_disks, [sources.home, *map(Path, health.disks)])),
        warn=health.disk_free,
        critical=health.disk_critical,
        database=database,
        growth=None if line is None else words.growth(line),
        lines=(*(Line(name=disk.name, ts=disk.ts, values=disk.values, full=1.0) for disk in disks), *sizes),
    )


def _disks(folders: Sequence[Path]) -> list[Disk]:
    """Each file system once."""
    seen: set[int] = set()
    out = []
    for folder in folders:
        try:
            device = os.stat(folder).st_dev
            usage = shutil.disk_usage(folder)
        except OSError as error:
            log.warning("disk not measured", action="report.disk", folder=str(folder), error=str(error))
            continue
        if device not in seen:
            seen.add(device)
            out.append(Disk(name=str(folder), free=usage.free, total=usage.total))
    return out


def _jobs(folder: Path, until: datetime) -> tuple[Job, ...]:
    """The newest run of each job, by name; a file that is none is logged."""
    out = []
    for file in sorted(folder.glob("*.json"))[:JOBS] if folder.is_dir() else ():
        try:
            if file.stat().st_size > JOB_BYTES:
                raise ValueError(f"larger than {JOB_BYTES:,} bytes")
            out.append(msgspec.convert(json.loads(file.read_bytes()), Job))
        except (OSError, ValueError, msgspec.ValidationError) as error:
            log.warning("job's result not read", action="report.job", file=str(file), error=str(error))
    return tuple(job for job in out if job.at < until)


async def _commits(checkout: Path, until: datetime) -> tuple[tuple[Commit, ...], str]:
    """The newest commits and the revision that runs; nothing where this is no checkout."""
    if shutil.which("git") is None or not (checkout / ".git").exists():
        return (), ""
    text = await _git(
        checkout,
        "log",
        f"--max-count={COMMITS}",
        f"--until={until.isoformat()}",
        "--no-show-signature",
        "--no-ext-diff",
        "--format=%h%x1f%ct%x1f%an%x1f%s",
    )
    commits = []
    for line in text.splitlines():
        parts = line.split("\x1f", 3)
        if len(parts) == 4 and parts[1].isdigit():
            commits.append(
                Commit(id=parts[0], at=datetime.fromtimestamp(int(parts[1]), UTC), author=parts[2], subject=parts[3])
            )
    head = (await _git(checkout, "rev-parse", "--short", "HEAD")).strip()
    return tuple(commits), head


async def _git(checkout: Path, *words_: str) -> str:
    """What git prints; OSError where it fails. The checkout is ours whoever owns it: this program runs from it."""
    environment: Mapping[str, str] = {
        **os.environ,
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_TERMINAL_PROMPT": "0",
        "LC_ALL": "C",
    }
    process = await asyncio.create_subprocess_exec(
        "git",
        "-C",
        str(checkout),
        "-c",
        f"safe.directory={checkout}",
        *words_,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )
    try:
        async with asyncio.timeout(GIT_SECONDS):
            out, err = await process.communicate()
    except TimeoutError:
        raise OSError(0, f"git took longer than {GIT_SECONDS:.0f} s", str(checkout)) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        reason = err.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise OSError(process.returncode or 1, f"git: {reason[0]}", str(checkout))
    return out.decode(errors="replace")
