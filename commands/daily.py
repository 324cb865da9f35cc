"""``health report``: the daily report on the terminal, as a page, as JSON, or on its way by mail."""

from __future__ import annotations

import argparse
import asyncio
import base64
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from commands.output import DONE, NO, WRONG, CommandError, complain, say, stderr_console, write_json
from commands.places import bus_of, find, store_of
from commands.settings import Loaded, read

if TYPE_CHECKING:
    from actors.core.daily_facts import Daily
    from actors.health import ReportAnswer
    from actors.monitor.report import Sources

ANSWER_SECONDS: Final = 180.0  # for the monitor to gather, draw and queue a report on a busy machine


async def report(args: argparse.Namespace) -> int:
    """``health report [--html FILE] [--day DATE] [--mail] [--json]``.

    Raises:
        CommandError: the date is none, the file cannot be written, or the mail cannot leave.
    """
    loaded = read()
    now = datetime.now(UTC)
    day = day_of(args.day, now)
    if args.mail:
        sent = await mail(loaded, now, day)
        if args.json:
            write_json(sent)
        else:
            say(said(sent))
    if args.html is None and args.mail:
        return DONE
    from actors.core import daily as words

    made = await _gathered(loaded, now, day)
    if args.html is not None:
        file = await _written(made, args.html, loaded.home)
    if args.json:
        if not args.mail:
            write_json(_facts(made))
    elif args.html is not None:
        say(f"The report is in {file}: {words.headline(made).text.lower()}.")
    else:
        for line in words.lines(made):
            say(line)
    return DONE


def _facts(made: Daily) -> dict[str, Any]:
    """The report with what follows from it."""
    import msgspec

    from actors.core import daily as words

    verdict = words.headline(made)
    facts: dict[str, Any] = {
        "headline": verdict.text,
        "tone": verdict.tone,
        "concerns": [concern._asdict() for concern in words.concerns(made)],
    }
    if made.market is not None:
        totals = ("bars", "live", "signals", "traded")
        facts["totals"] = {name: getattr(made.market, name) for name in totals}
    facts |= msgspec.to_builtins(made)
    return facts


def day_of(text: str | None, now: datetime) -> date | None:
    """The day that was asked for; None for the hours up to now. Raises CommandError."""
    if text is None:
        return None
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise CommandError(f'"{text}" is no date: --day takes one such as {now:%Y-%m-%d}.', WRONG) from None
    if day > now.date():
        raise CommandError(f"{day} is still to come: --day takes today or a day before it.", WRONG)
    return day


async def _gathered(loaded: Loaded, now: datetime, day: date | None) -> Daily:
    from actors.monitor.report import gather

    with stderr_console().status("gathering the report"):
        async with _sources(loaded) as sources:
            return await gather(sources, now, day)


@asynccontextmanager
async def _sources(loaded: Loaded) -> AsyncIterator[Sources]:
    """What can be reached from here; why the rest cannot is for the report to say."""
    from actors.monitor.report import Sources
    from bus.client import Bus
    from bus.store import Store

    places = find(loaded)
    bus: Bus | None = None
    store: Store | None = None
    async with AsyncExitStack() as stack:
        no_bus = no_store = ""
        try:
            bus = await stack.enter_async_context(bus_of(places, loaded))
        except CommandError as error:
            no_bus = str(error)
        try:
            store = await stack.enter_async_context(store_of(places))
        except CommandError as error:
            no_store = str(error)
        yield Sources(loaded.settings, loaded.home, bus, store, no_bus, no_store)


async def _written(made: Daily, name: str, home: Path) -> str:
    """The report as a page that stands alone. Raises CommandError."""
    from actors.monitor.report import drawn
    from actors.monitor.report_page import page

    made, pictures = await drawn(made, home)
    text = page(made, inline(pictures), mail=False)
    try:
        await asyncio.to_thread(_write, name, text)
    except OSError as error:
        raise CommandError(f"{name} cannot be written ({error.strerror}): name another with --html.", WRONG) from error
    return name


def _write(name: str, text: str) -> None:
    Path(name).expanduser().write_text(text, encoding="utf-8")


def inline(pictures: Mapping[str, bytes]) -> dict[str, str]:
    """Pictures as parts of the page itself."""
    return {name: f"data:image/png;base64,{base64.b64encode(data).decode()}" for name, data in pictures.items()}


# --- by mail -----------------------------------------------------------------------------------------------------


async def mail(loaded: Loaded, now: datetime, day: date | None) -> ReportAnswer:
    """Sends the report as the schedule would: the monitor does where one answers, else we, through the same outbox.

    Raises:
        CommandError: nobody is to be told, or the report cannot be queued.
    """
    sent = await _by_monitor(loaded, day) or await _by_ourselves(loaded, now, day)
    if sent.error:
        raise CommandError(sent.error, NO)
    if not sent.senders:
        raise CommandError("Nobody is told: name a mail server and recipients in [notify.smtp] of mt5.toml.", NO)
    return sent


async def _by_monitor(loaded: Loaded, day: date | None) -> ReportAnswer | None:
    """None where no monitor answers."""
    import msgspec

    from actors.health import ReportAnswer, ReportRequest
    from bus.client import BusUnavailable
    from bus.subjects import SEND_REPORT

    places = find(loaded)
    if places.nats is None:
        return None
    try:
        async with bus_of(places, loaded) as bus:
            with stderr_console().status("the health monitor makes the report"):
                answer = await bus.request(SEND_REPORT, msgspec.json.encode(ReportRequest(day=day)), ANSWER_SECONDS)
    except (CommandError, BusUnavailable):
        return None
    try:
        return msgspec.json.decode(answer, type=ReportAnswer)
    except msgspec.DecodeError as error:
        raise CommandError(
            f"The health monitor failed to make the report ({error}): its log has the details."
        ) from error


async def _by_ourselves(loaded: Loaded, now: datetime, day: date | None) -> ReportAnswer:
    """Queues it in the monitor's outbox, and sends it where no monitor does. Raises CommandError."""
    import sqlite3

    import structlog

    from actors.core.daily import report_id
    from actors.health import ReportAnswer
    from actors.monitor.report import gather, notice_of
    from actors.monitor.report_journal import queued
    from actors.monitor.senders import senders
    from bus.supervise import ConfigurationError
    from commands.jobs_tell import DATABASE, tell

    try:
        ways = tuple(senders(loaded.settings.notify, structlog.get_logger("report")))
        if not ways:
            return ReportAnswer()
        name = report_id(now, day)
        before = await asyncio.to_thread(queued, loaded.home / DATABASE, name)
        if not before:
            with stderr_console().status("making the report"):
                async with _sources(loaded) as sources:
                    report = await gather(sources, now, day)
                notice = await notice_of(report, loaded.home)
            complain(await asyncio.to_thread(tell, loaded, notice))
    except ConfigurationError as error:
        raise CommandError(str(error), WRONG) from error
    except (sqlite3.Error, OSError) as error:
        raise CommandError(f"The report cannot be queued in {loaded.home / DATABASE}: {error}", NO) from error
    return ReportAnswer(notice=name, new=not before, senders=tuple(before) or ways)


def said(sent: ReportAnswer) -> str:
    """What became of it, for a person."""
    told = ", ".join(sent.senders)
    if sent.new:
        return f"The report is on its way by {told}."
    return f"This day's report has been sent by {told} before: one goes out a day, and --html writes another."
