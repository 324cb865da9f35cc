"""``health check/stats/incidents/test-alert``: what the monitor sees, has seen, and whether its alerts arrive.

The running monitor is asked where there is one. Without it the checks are made here, once, and what does not run is said.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from commands.output import DONE, NO, WRONG, CommandError, complain, say, write_json, write_table
from commands.places import CLIENT, Places, bus_of, find, gateway_url, running
from commands.settings import Loaded, read

if TYPE_CHECKING:
    from actors.core.health_stats import Figures
    from actors.health import CheckAnswer
    from actors.monitor.journal import Journal
    from schema.health import CheckResult

MARKS: Final = {"ok": "ok      ", "warning": "warning ", "critical": "CRITICAL", "skipped": "skipped "}
ORDER: Final = ("critical", "warning", "ok", "skipped")
ANSWER_MARGIN: Final = 5.0  # seconds beyond a check's time until the monitor counts as silent
TEST_SECONDS: Final = 30.0
UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_AGE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")


async def check(args: argparse.Namespace) -> int:
    """``health check [CHECK …] [--json]``: exit code 1 where something is critical."""
    loaded = read()
    answer, asked = await _checked(loaded, args.names)
    if args.names and not answer.results:
        raise CommandError(f"There is no check {', '.join(args.names)}: `mt5 health check` shows their names.", WRONG)
    results = sorted(answer.results, key=lambda one: (ORDER.index(one.status), one.check))
    critical = [one for one in results if one.status == "critical"]
    if args.json:
        write_json(
            {
                "ok": not critical,
                "by": "monitor" if asked else "command",
                "results": results,
                "incidents": answer.incidents,
            }
        )
        return NO if critical else DONE
    width = max((len(one.check) for one in results), default=0)
    for one in results:
        say(f"{MARKS[one.status]}  {one.check.ljust(width)}  {one.message}")
    for incident in answer.incidents:
        say(f"Open since {_moment(incident.opened_at)}: {incident.title}")
    if critical:
        complain(f"{len(critical)} of {len(results)} checks {'is' if len(critical) == 1 else 'are'} critical.")
    return NO if critical else DONE


async def _checked(loaded: Loaded, names: Sequence[str]) -> tuple[CheckAnswer, bool]:
    """The running monitor's answer, else our own looks; whether it was the monitor's."""
    import msgspec

    from actors.health import CheckAnswer, CheckRequest
    from bus.client import Bus, BusUnavailable
    from bus.subjects import HEALTH_CHECK

    places = find(loaded)
    async with contextlib.AsyncExitStack() as stack:
        bus: Bus | None = None
        absent = "" if places.nats else f"nothing is running under {loaded.home}; start everything with `mt5 up`"
        if places.nats is not None:
            try:
                bus = await stack.enter_async_context(bus_of(places, loaded))
            except CommandError as error:
                absent = str(error).rstrip(".")
        if bus is not None:
            wait = loaded.settings.health.timeout_seconds + ANSWER_MARGIN
            request = msgspec.json.encode(CheckRequest(tuple(names)))
            try:
                answer = await bus.request(HEALTH_CHECK, request, timeout=wait)
                return msgspec.json.decode(answer, type=CheckAnswer), True
            except (BusUnavailable, msgspec.DecodeError):
                pass  # it does not run, hangs, or is of another version: the actors' own check says which
        results = await _look(loaded, places, bus, absent, names, stack)
        return CheckAnswer(tuple(results)), False


async def _look(
    loaded: Loaded, places: Places, bus: Any, absent: str, names: Sequence[str], stack: contextlib.AsyncExitStack
) -> list[CheckResult]:
    """Every check once, in this process; ``absent`` says why there is no bus."""
    from actors.monitor.journal import matches
    from actors.monitor.probes import all_probes
    from actors.monitor.watch import Watch, result
    from bus.store import Store

    settings = loaded.settings
    store = pooled = None
    try:
        if places.database is not None:
            store = await Store.connect(places.database, size=4, name=CLIENT)
            stack.push_async_callback(store.close)
        url = settings.database.url
        if url is not None and settings.database.direct_url not in (None, url):
            pooled = await Store.connect(url, size=1, name=CLIENT)
            stack.push_async_callback(pooled.close)
    except ValueError as error:
        raise CommandError(str(error), WRONG) from error
    gateway = settings.health.gateway or places.gateway or gateway_url(loaded)
    probes = all_probes(settings, loaded.home, bus=bus, store=store, pooled=pooled, gateway=gateway)
    results = await Watch(probes, settings.health.interval_seconds, settings.health.timeout_seconds).once(names)
    if bus is None and matches("nats", names):
        results.append(result("nats", "critical", f"NATS is not reached: {absent}."))
    return results


async def test_alert(args: argparse.Namespace) -> int:
    """``health test-alert [--json]``: exit code 1 where a sender did not take it, or there is none."""
    import msgspec

    from actors.health import TrialAnswer
    from bus.client import BusUnavailable
    from bus.subjects import TEST_ALERT

    loaded = read()
    places = find(loaded)
    answer: TrialAnswer | None = None
    if places.nats is not None:
        with contextlib.suppress(CommandError):
            async with bus_of(places, loaded) as bus:
                with contextlib.suppress(BusUnavailable, msgspec.DecodeError):
                    answer = msgspec.json.decode(await bus.request(TEST_ALERT, timeout=TEST_SECONDS), type=TrialAnswer)
    asked = answer is not None
    if answer is None:
        answer = await _test_here(loaded)
    ways = [one for one in answer.deliveries if one.sender != "nats"]
    failed = [one for one in answer.deliveries if one.sent_at is None]
    if args.json:
        deliveries = [
            {"sender": one.sender, "sent": one.sent_at is not None, "error": one.error} for one in answer.deliveries
        ]
        write_json({"ok": bool(ways) and not failed, "by": "monitor" if asked else "command", "deliveries": deliveries})
    else:
        if not asked:
            say("The monitor does not answer: sent from here.")
        for one in answer.deliveries:
            outcome = (
                "sent" if one.sent_at is not None else one.error or "still on its way; it is tried until it arrives"
            )
            say(f"{one.sender}: {outcome}")
    if not ways:
        complain(
            "Nobody is told of anything: set [notify.smtp] host and recipients, [notify.webhook] or [notify.telegram]."
        )
        return NO
    return NO if failed else DONE


async def _test_here(loaded: Loaded) -> Any:
    """Sends the test without a monitor and its outbox: once, and what fails is only said."""
    import asyncio

    from actors.health import TrialAnswer, test_notice
    from actors.monitor.journal import Delivery
    from actors.monitor.outbox import SEND_SECONDS, SendFailed
    from actors.monitor.senders import senders
    from bus.logs import configure
    from bus.supervise import ConfigurationError
    from schema.settings import Log

    configure(Log(level="error"))
    import structlog

    now = datetime.now(UTC)
    notice = test_notice(now)
    try:
        ways = senders(loaded.settings.notify, structlog.get_logger("health"))
    except ConfigurationError as error:
        raise CommandError(str(error), WRONG) from error
    found = []
    for name, sender in ways.items():
        try:
            async with asyncio.timeout(SEND_SECONDS):
                remark = await sender.send(notice)
        except (SendFailed, TimeoutError) as error:
            found.append(Delivery(name, None, 1, str(error) or f"There was no answer within {SEND_SECONDS:g} seconds."))
        else:
            found.append(Delivery(name, datetime.now(UTC).timestamp(), 1, remark or ""))
    return TrialAnswer(notice.id, tuple(found))


# --- what was ------------------------------------------------------------------------------------------------------


def stats(args: argparse.Namespace) -> int:
    """``health stats [CHECK …] [--since WHEN] [--json]``."""
    now = datetime.now(UTC)
    since = moment(args.since, now)
    with _journal() as journal:
        found = journal.stats(since, now, args.names)
    if args.json:
        write_json({"since": since, "until": now, "checks": found})
        return DONE
    if not found:
        say(f"There is no result of {', '.join(args.names) or 'any check'} since {_moment(since)}.")
        return DONE
    rows = [
        (
            one.check,
            one.count,
            None if one.uptime is None else f"{one.uptime:.2%}",
            one.warning,
            one.critical,
            *_figures(one.latency, 1_000),
            *_figures(one.value, 1),
            one.unit or None,
        )
        for one in found
    ]
    latency = ("latency avg ms", "min", "max", "p95")
    write_table(
        ("check", "looks", "uptime", "warning", "critical", *latency, "value avg", "min", "max", "p95", "unit"), rows
    )
    return DONE


def _figures(of: Figures | None, factor: float) -> tuple[str | None, ...]:
    if of is None:
        return (None, None, None, None)
    return tuple(f"{factor * figure:,.5g}" for figure in (of.average, of.minimum, of.maximum, of.p95))


def incidents(args: argparse.Namespace) -> int:
    """``health incidents [--since WHEN] [--json]``."""
    now = datetime.now(UTC)
    since = moment(args.since, now)
    with _journal() as journal:
        found = journal.incidents(since)
    if args.json:
        write_json({"since": since, "incidents": found})
        return DONE
    if not found:
        say(f"Nothing was wrong since {_moment(since)}.")
        return DONE
    rows = []
    for one in found:
        lasted = _length((one.closed_at or now) - one.opened_at)
        over = _moment(one.closed_at) if one.closed_at is not None else "it lasts"
        rows.append((_moment(one.opened_at), over, lasted, one.severity, one.title))
    write_table(("from", "to", "lasted", "severity", "what"), rows)
    return DONE


@contextlib.contextmanager
def _journal() -> Any:
    import sqlite3

    from actors.monitor.journal import FILE, Journal, JournalBroken

    home = read().home
    running(home)  # says whose home it is, where it is not ours
    try:
        journal: Journal | None = Journal.reading(home)
    except JournalBroken as error:
        raise CommandError(str(error)) from error
    if journal is None:
        raise CommandError(f"There is no {FILE} under {home}: the monitor has never run there (`mt5 up` runs it).")
    try:
        yield journal
    except sqlite3.Error as error:
        raise CommandError(f"{home / FILE} cannot be read ({error}): see the monitor's log.") from error
    finally:
        journal.close()


def moment(text: str, now: datetime) -> datetime:
    """``24h``, ``7d``, ``90m`` before now, or a date or time in UTC.

    Raises:
        CommandError: it is neither.
    """
    found = _AGE.fullmatch(text.strip())
    try:
        if found is not None:
            return now - timedelta(seconds=float(found[1]) * UNITS[found[2]])
        at = datetime.fromisoformat(text.strip())
    except (ValueError, OverflowError):
        raise CommandError(
            f'--since is an age such as 24h or 7d, or a time such as 2026-01-31, not "{text}".', WRONG
        ) from None
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def _moment(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"


def _length(span: timedelta) -> str:
    minutes, seconds = divmod(int(span.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
