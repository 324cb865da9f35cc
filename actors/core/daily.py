"""What a daily report says of its facts: what of them needs a person, and in which words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Final, Literal, NamedTuple

from actors.core.alerts import Incident
from actors.core.daily_facts import Backups, Copy, Daily, Line, Market, Models, Room, Service, Watch
from schema.health import Severity, Status
from schema.scorecard import Card

Tone = Literal["good", "open", "bad"]

SLOTS: Final = 96  # of a period: a quarter of an hour each, of a day
DASH: Final = "–"
JOB_STALE: Final = timedelta(hours=50)  # a nightly job that has not run for two nights
JOB_FORGOTTEN: Final = timedelta(days=14)  # after which it was a person who ran it once
SILENT: Final = 0.02  # share of the period without a look from which the monitor's silence is told
MINOR: Final = frozenset({"commits", "pictures", "jobs"})  # sections without which a day is known all the same
SECTIONS: Final = {
    "watch": "Services",
    "archive": "Candles, signals and models",
    "backups": "Backups",
    "room": "Disk and database",
    "jobs": "Nightly jobs",
    "commits": "Newest commits",
    "pictures": "Pictures",
}
CONCERNS: Final = 12  # that are told one by one


class Concern(NamedTuple):
    tone: Tone
    text: str


# --- judging -----------------------------------------------------------------------------------------------------


def concerns(daily: Daily) -> list[Concern]:
    """What needs a person, the worst first."""
    found = [
        *_of_watch(daily),
        *_of_backups(daily),
        *_of_room(daily),
        *_of_models(daily),
        *_of_jobs(daily),
    ]
    found += [
        Concern("open" if name in MINOR else "bad", f"{SECTIONS.get(name, name)}: {text}")
        for name, text in daily.problems.items()
    ]
    order: dict[Tone, int] = {"bad": 0, "open": 1, "good": 2}
    return sorted(found, key=lambda concern: order[concern.tone])


def headline(daily: Daily) -> Concern:
    """The report in a few words, with its tone."""
    found = concerns(daily)
    if not found:
        return Concern("good", "All is well")
    return Concern(found[0].tone, "One thing needs you" if len(found) == 1 else f"{len(found)} things need you")


def report_id(until: datetime, day: date | None) -> str:
    """The notice's id: one a date, and one more for a whole day that was asked for by name."""
    return f"report:{until:%Y-%m-%d}" if day is None else f"report:day:{day:%Y-%m-%d}"


def severity(tone: Tone) -> Severity:
    """The notice's severity for the headline's tone."""
    return "info" if tone == "good" else "warning" if tone == "open" else "critical"


def _of_watch(daily: Daily) -> Iterable[Concern]:
    watch = daily.watch
    if watch is None:
        return
    told: set[str] = set()
    for incident in watch.incidents:
        if incident.closed_at is None or incident.closed_at > daily.until:
            told.update(incident.checks)
            yield Concern(
                "bad" if incident.severity == "critical" else "open",
                f"{sentence(incident.title)} Since {moment(incident.opened_at, daily.until)}.",
            )
    for service in watch.services:
        if service.status in ("warning", "critical") and not told.intersection(service.failing):
            yield Concern(
                "bad" if service.status == "critical" else "open", f"{service.name}: {sentence(service.message)}"
            )
    silent = (1 - watch.covered) * (daily.until - daily.since).total_seconds()
    if watch.covered < 1 - SILENT:
        when = "at anything" if watch.covered == 0 else f"for {duration(silent)}"
        yield Concern("open", f"The health monitor did not look {when}: what went wrong then is not in here.")
    if watch.waiting:
        yield Concern("open", f"{count(watch.waiting, 'notice')} could not be sent yet: see `mt5 health check outbox`.")


def _of_backups(daily: Daily) -> Iterable[Concern]:
    backups = daily.backups
    if backups is None:
        return
    made, failed = backups.newest.get("made"), backups.newest.get("failed")
    if failed is not None and (made is None or failed.at > made.at):
        yield Concern("bad", f"The newest backup failed: {sentence(failed.error or 'its log says why')}")
    elif made is None and not backups.kept and not any(name.startswith("backup.") for name in _failing(daily)):
        yield Concern("bad" if backups.wanted else "open", "There is no backup: make one with `mt5 backup run`.")


def _of_room(daily: Daily) -> Iterable[Concern]:
    room = daily.room
    if room is None or any(name.startswith("disk.") for name in _failing(daily)):
        return
    for disk in room.disks:
        if disk.share < room.warn:
            tone: Tone = "bad" if disk.share < room.critical else "open"
            yield Concern(tone, f"{disk.name} has {size(disk.free)} of {size(disk.total)} left ({share(disk.share)}).")


def _failing(daily: Daily) -> set[str]:
    """Checks that are told already."""
    services = daily.watch.services if daily.watch is not None else ()
    return {name for service in services for name in service.failing}


def _of_models(daily: Daily) -> Iterable[Concern]:
    if daily.models is not None and daily.models.different:
        which = count(daily.models.different, "signal")
        yield Concern("bad", f"{which} could not be made again bit by bit: `mt5 verify` shows where they differ.")


def _of_jobs(daily: Daily) -> Iterable[Concern]:
    for job in daily.jobs:
        if not job.ok:
            yield Concern("bad", f"{job.name} failed: {sentence(job.summary)}")
        elif JOB_STALE < daily.until - job.at < JOB_FORGOTTEN:
            yield Concern("open", f"{job.name} has not run since {moment(job.at, daily.until)}.")


# --- words -------------------------------------------------------------------------------------------------------

SIGNALS: Final = {
    "warming": "warming up",
    "no_model": "no model",
    "unproven": "on trial",
    "no_edge": "no edge",
    "stale_feed": "candle came late",
    "spread": "spread too wide",
    "out_of_distribution": "unlike anything learnt",
    "model_expired": "model expired",
}
STATES: Final = {
    "champion": "speaks",
    "provisional": "on trial",
    "shadow": "followed in silence",
}
NOT_WATCHED: Final = "Nobody looked at anything in this time: start the health monitor with `mt5 up health`."
LOOKS: Final[dict[Status, str]] = {"ok": "well", "warning": "warning", "critical": "critical", "skipped": "not here"}
ACTIONS: Final = {
    "release": "released",
    "promote": "promoted",
    "rollback": "rolled back",
    "retire": "retired",
    "restore": "restored",
}
EVENTS: Final = {
    "made": "made",
    "shipped": "shipped",
    "verified": "restored into a scratch database and compared",
    "drilled": "restored for practice",
    "failed": "failed",
}


def title(daily: Daily) -> str:
    """The mail's subject."""
    return f"Daily report, {_date(daily.until if not daily.day else daily.since)}: {headline(daily).text.lower()}"


def period(daily: Daily) -> str:
    if daily.day and daily.until == daily.since + timedelta(days=1):
        return f"{_date(daily.since)}, the whole day (UTC)"
    if daily.day:
        return f"{_date(daily.since)}, up to {daily.until:%H:%M} UTC"
    hours = (daily.until - daily.since).total_seconds()
    return f"The {duration(hours)} to {_date(daily.until)}, {daily.until:%H:%M} UTC"


def _date(at: datetime) -> str:
    return f"{at.day} {at:%B %Y}"


def sentence(text: str) -> str:
    """One line that begins with a capital and ends with a stop."""
    line = " ".join(text.split())
    if not line:
        return "Nothing more is known."
    return line[0].upper() + line[1:] + ("" if line[-1] in ".!?…" else ".")


def moment(at: datetime, now: datetime) -> str:
    """A time as far as it is not clear from ``now``."""
    at = at.astimezone(UTC)
    if at.date() == (now - timedelta(microseconds=1)).date():  # midnight ends a day's report, and is not of it
        return f"{at:%H:%M}"
    return f"{at.day} {at:%b}, {at:%H:%M}" if abs((now - at).days) < 300 else f"{at.day} {at:%b %Y}"


def duration(seconds: float) -> str:
    """Two units at most: ``3 h 15 min``."""
    seconds = max(0.0, seconds)
    left = round(seconds)
    if left < 60:
        return f"{left} s" if seconds >= 9.5 or seconds == left else f"{seconds:.1f} s"
    parts = []
    for name, length in (("day", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        number, left = divmod(left, length)
        if number:
            parts.append(f"{number} {name}{'s' if name == 'day' and number > 1 else ''}")
        elif parts:
            break
        if len(parts) == 2:
            break
    if parts == ["1 day"]:
        return "24 h"
    return " ".join(parts)


def quick(seconds: float | None) -> str:
    """A short time with three digits: ``8.4 ms``."""
    if seconds is None:
        return DASH
    if seconds < 1:
        return f"{1_000 * seconds:.{0 if seconds >= 0.1 else 1}f} ms"
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def size(amount: float) -> str:
    """Bytes, as the checks say them: ``1.4 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1_023.5:
            return f"{amount:.0f} {unit}" if unit == "B" or abs(amount) >= 99.95 else f"{amount:.1f} {unit}"
        amount /= 1_024
    return f"{amount:.1f} TiB"


def share(value: float | None, digits: int = 1) -> str:
    """A share as percent; what is not the whole is never rounded up to it."""
    if value is None:
        return DASH
    percent = 100 * value
    if value < 1:
        percent = min(percent, math.floor(100 * 10**digits - 1) / 10**digits)
    return f"{percent:.{digits}f} %" if value != 1 else "100 %"


def basis(value: float | None) -> str:
    """A fraction in basis points, which are hundredths of a percent."""
    return DASH if value is None else f"{1e4 * value:+.2f} bp".replace("-", "\u2212")


def gain(value: float | None) -> str:
    """A difference of Brier scores, in thousandths."""
    return DASH if value is None else f"{1e3 * value:+.2f}".replace("-", "\u2212")


def count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def judged(card: Card) -> tuple[Tone, str]:
    """Whether a card's probabilities are worth more than the base rate."""
    if card.brier_gain is None or card.brier_gain_ci is None:
        return "open", "too early to tell"
    low, high = card.brier_gain_ci
    if low > 0:
        return "good", "better than the base rate"
    return ("bad", "worse than the base rate") if high < 0 else ("open", "no different from the base rate")


def reasons(market: Market) -> str:
    """Why signals abstained, the most frequent reason first."""
    return ", ".join(
        f"{SIGNALS.get(reason, reason)} {number:,}"
        for reason, number in sorted(market.reasons.items(), key=lambda item: -item[1])
    )


# --- as text -----------------------------------------------------------------------------------------------------


def lines(daily: Daily) -> tuple[str, ...]:
    """The report as plain text: the mail's other half, and what a terminal shows."""
    found = concerns(daily)
    out = [period(daily), f"{daily.host}, release {daily.release}", "", f"{headline(daily).text}."]
    out += [f"  {'!' if concern.tone == 'bad' else '-'} {concern.text}" for concern in found[:CONCERNS]]
    if len(found) > CONCERNS:
        out.append(f"  - and {len(found) - CONCERNS} more")
    for heading, body in (
        ("Services", _services(daily)),
        ("Incidents", _incidents(daily)),
        ("Candles and signals", _market(daily)),
        ("Models", _models(daily)),
        ("Backups", _backups(daily)),
        ("Disk and database", _room(daily)),
        ("Nightly jobs", _jobs(daily)),
        ("Newest commits", _commits(daily)),
    ):
        out += ["", heading, *(f"  {line}" for line in body)]
    return tuple(out)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns, the last one as it is."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _services(daily: Daily) -> list[str]:
    watch = daily.watch
    if watch is None or not watch.services:
        return [daily.problems.get("watch", NOT_WATCHED)]
    told, well = sorted_out(watch)
    out = []
    if told:
        rows = [("", "now", "up", "a look takes")]
        rows += [(s.name, LOOKS[s.status], share(s.fine, 2), quick(s.slow)) for s in told]
        out += columns(rows)
    return [*out, *well_words(watch, well)]


def sorted_out(watch: Watch) -> tuple[list[Service], list[Service]]:
    """Services that something is to be said of, and those that were well whenever they were looked at."""
    told = [s for s in watch.services if s.status not in ("ok", "skipped") or max(s.strip) > 0]
    return told, [s for s in watch.services if s not in told]


def well_words(watch: Watch, well: Sequence[Service]) -> list[str]:
    names = ", ".join(service.name for service in well)
    out = [f"Well whenever they were looked at: {names}."] if well else []
    return [*out, *([f"Nothing to look at: {', '.join(watch.absent)}."] if watch.absent else [])]


def _incidents(daily: Daily) -> list[str]:
    incidents = daily.watch.incidents if daily.watch is not None else ()
    if not incidents:
        return ["None." if daily.watch is not None else daily.problems.get("watch", DASH)]
    return columns(
        [(moment(i.opened_at, daily.until), lasted(i, daily.until), i.severity, sentence(i.title)) for i in incidents]
    )


def lasted(incident: Incident, until: datetime) -> str:
    """How long it lasted, or that it does."""
    if incident.closed_at is None or incident.closed_at > until:
        return "open"
    return duration((incident.closed_at - incident.opened_at).total_seconds())


def _market(daily: Daily) -> list[str]:
    market = daily.market
    if market is None:
        return [daily.problems.get("archive", DASH)]
    out = [market_words(market), signal_words(market)]
    if market.series:
        rows = [("series", "bars", "newest bar", "up", "down", "no trade")]
        rows += [
            (
                f"{s.symbol} {s.timeframe}",
                f"{s.bars:,}",
                moment(s.newest, daily.until) if s.newest is not None else DASH,
                f"{s.up:,}",
                f"{s.down:,}",
                f"{s.none:,}",
            )
            for s in market.series
        ]
        out += columns(rows)
    if market.more:
        out.append(f"and {market.more:,} series more")
    return out


def market_words(market: Market) -> str:
    if not market.bars:
        return "No candle came."
    history = market.bars - market.live
    text = f"{count(market.bars, 'candle')} came"
    parts = [f"{history:,} as history"] if history else []
    parts += [f"{market.revised:,} of them revised"] if market.revised else []
    return text + (f" ({', '.join(parts)})." if parts else ".")


def signal_words(market: Market) -> str:
    if not market.signals:
        return "No signal was made."
    text = f"{count(market.signals, 'signal')}, {market.traded:,} of them to trade"
    if market.p50 is not None and market.p95 is not None:
        text += f"; half within {quick(market.p50)} of their candle's coming, 95 % within {quick(market.p95)}"
    why = reasons(market)
    return f"{text}." + (f" No trade: {why}." if why else "")


def _models(daily: Daily) -> list[str]:
    models = daily.models
    if models is None:
        return [daily.problems.get("archive", DASH)]
    if not models.versions:
        return ["No version serves: train one with `mt5 train --timeframe M1`."]
    rows = [("version", "", "outcomes", "side right", "Brier better by /1000", "trades", "net a trade")]
    rows += [
        (
            f"{v.model_name} {v.version}",
            STATES.get(v.state, v.state),
            f"{v.outcomes:,}",
            share(v.hit_rate),
            gain(v.gain),
            f"{v.trades:,}",
            basis(v.net),
        )
        for v in models.versions
    ]
    out = columns(rows)
    out += [
        f"{card.symbol} {card.timeframe}, {card.model_version}: {judged(card)[1]} over {count(card.outcomes, 'outcome')}"
        for card in models.cards
    ]
    out += [
        f"{moment(s.at, daily.until)}  {s.version} {ACTIONS.get(s.action, s.action)} by {s.by}: {sentence(s.reason)}"
        for s in models.steps
    ]
    out.append(audit_words(models))
    return out


def audit_words(models: Models) -> str:
    if not models.audited:
        return "No signal was made again for comparison."
    same = models.audited - models.different
    return f"{count(models.audited, 'signal')} made again for comparison: {same:,} identical, {models.different:,} different."


def _backups(daily: Daily) -> list[str]:
    backups = daily.backups
    if backups is None:
        return [daily.problems.get("backups", DASH)]
    if not backups.newest:
        return [kept_words(backups)]
    return [
        *columns(
            [(EVENTS.get(c.event, c.event), c.backup, ago(c.at, daily.until), copy_words(c)) for c in copies(backups)]
        ),
        kept_words(backups),
    ]


def copies(backups: Backups) -> list[Copy]:
    """In the order of a backup's life."""
    return [backups.newest[event] for event in EVENTS if event in backups.newest]


def copy_words(copy: Copy) -> str:
    if copy.event == "failed":
        return sentence(copy.error or "its log says why")
    parts = [size(copy.bytes)] if copy.bytes else []
    parts += [f"took {duration(copy.seconds)}"] if copy.seconds else []
    parts += [f"newest data {duration(copy.rpo)} old"] if copy.rpo is not None else []
    parts += [f"to {copy.target}"] if copy.target else []
    return ", ".join(parts)


def kept_words(backups: Backups) -> str:
    return f"{count(backups.kept, 'backup')} kept in this home." if backups.kept else "No backup is kept in this home."


def ago(at: datetime, now: datetime) -> str:
    """``3 h 15 min ago``; a clock that was set back makes nothing negative."""
    seconds = (now - at).total_seconds()
    return "just now" if seconds < 60 else f"{duration(seconds)} ago"


def _room(daily: Daily) -> list[str]:
    room = daily.room
    if room is None:
        return [daily.problems.get("room", DASH)]
    out = columns([(d.name, f"{size(d.free)} free", f"of {size(d.total)}", share(d.share)) for d in room.disks])
    if room.database is not None:
        out.append(database_words(room))
    return out or [DASH]


def database_words(room: Room) -> str:
    grown = f", {size(room.growth)} more a day" if room.growth is not None and room.growth > 0 else ""
    return f"The database has {size(room.database or 0)}{grown}."


def _jobs(daily: Daily) -> list[str]:
    if not daily.jobs:
        return ["None has run here: `mt5 install-systemd` installs their timers."]
    return columns(
        [
            (job.name, "ok" if job.ok else "FAILED", ago(job.at, daily.until), sentence(job.summary))
            for job in daily.jobs
        ]
    )


def _commits(daily: Daily) -> list[str]:
    if not daily.commits:
        return [daily.problems.get("commits", "This is no git checkout.")]
    return columns([(c.id, moment(c.at, daily.until), c.author, c.subject) for c in daily.commits])


# --- figures -----------------------------------------------------------------------------------------------------


def growth(line: Line) -> float | None:
    """Its slope a day by least squares; None where it spans less than six hours."""
    if len(line.ts) < 3 or line.ts[-1] - line.ts[0] < 6 * 3_600:
        return None
    days = [(at - line.ts[0]) / 86_400 for at in line.ts]
    middle, mean = math.fsum(days) / len(days), math.fsum(line.values) / len(line.values)
    spread = math.fsum((day - middle) ** 2 for day in days)
    return math.fsum((day - middle) * (value - mean) for day, value in zip(days, line.values, strict=True)) / spread


def worst(statuses: Iterable[Status]) -> Status:
    """``skipped`` only where nothing else is."""
    return max(statuses, key=lambda status: RANKS[status], default="skipped")


RANKS: Final[Mapping[Status, int]] = {"skipped": -1, "ok": 0, "warning": 1, "critical": 2}
