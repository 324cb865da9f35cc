"""The daily report as a page that mail readers show: tables and inline styles, pictures by reference, every value escaped.

Outlook draws with Word's engine and Gmail drops what it does not know, so that layout is tables, colours and sizes stand on
each element, and the one style sheet adds only what a phone is better with. Where pictures are blocked their texts say
the same. What is listed is bounded: a mail over 100 KB is cut by some readers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

from actors.core import daily as words
from actors.core.alerts import Incident
from actors.core.daily import DASH, Tone
from actors.core.daily_facts import Daily, Market, Models, Version
from actors.monitor.report_pictures import LOOKS, MARKET, ROOM, SERVICES, SKILL

PAPER, CARD, INK, MUTED, HAIR, RULE = "#f6f5f1", "#ffffff", "#1c1d21", "#5d6069", "#e4e2db", "#c9c8c2"
TONES: Final[dict[Tone, tuple[str, str]]] = {  # ink and wash
    "good": ("#00694d", "#e2f2ec"),
    "open": ("#8a5a00", "#fbf0d9"),
    "bad": ("#9c2f00", "#f9e4d9"),
}
GREY: Final = ("#555863", "#ecebe6")
FONT: Final = "-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,'DejaVu Sans',sans-serif"
MONO: Final = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
WIDTH: Final = 664  # of the column, so that a card's pictures are drawn at the size they are made for
INCIDENTS: Final = 10  # that are shown; the text has more
SERVICES_TOLD: Final = 12
TEXT: Final = 240  # characters of a sentence that others wrote
NAME: Final = 48  # and of a name

_PHONE: Final = """
body { margin: 0; }
img { max-width: 100%; }
@media (max-width: 620px) {
  .sheet { padding: 18px 8px 28px !important; }
  .card { padding: 16px 14px !important; }
  .title { font-size: 25px !important; }
  .tile { display: inline-block !important; width: 50% !important; padding: 0 4px 8px !important; box-sizing: border-box; }
  .tile td { padding: 9px 14px 10px !important; }
  .wide { display: none !important; }
  .cell { padding-right: 8px !important; }
}
@media print { .sheet { padding: 0 !important; } .card { page-break-inside: avoid; } }
"""


def page(report: Daily, sources: Mapping[str, str], *, mail: bool = True) -> str:
    """The whole document; ``sources`` is where each picture is, by its name: ``cid:market`` or a ``data:`` URI.

    A file for a browser (``mail`` false) forbids whatever is not in it.
    """
    cards = (
        _attention(report),
        _services(report, sources),
        _incidents(report),
        _market(report, sources),
        _models(report, sources),
        _backups(report),
        _room(report, sources),
        _jobs(report),
        _commits(report),
    )
    rule = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    policy = "" if mail else f'<meta http-equiv="Content-Security-Policy" content="{rule}">\n'
    body = _header(report) + _tiles(report) + "".join(cards) + _footer(report)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Pictures are on white: a reader that turned the rest dark would leave them as holes.
        '<meta name="color-scheme" content="light only">\n<meta name="supported-color-schemes" content="light">\n'
        f"{policy}<title>{escape(words.title(report))}</title>\n<style>{_PHONE}</style>\n</head>\n"
        f'<body style="margin:0;padding:0;background:{PAPER};color:{INK};font-family:{FONT}">\n'
        f"{_preview(report)}"
        f'<table role="presentation" width="100%" cellpadding="0" cellspacing="0" border="0" bgcolor="{PAPER}" '
        f'style="background:{PAPER}"><tr><td class="sheet" align="center" style="padding:32px 16px 44px">\n'
        f'<table role="presentation" width="100%" cellpadding="0" cellspacing="0" border="0" '
        f'style="max-width:{WIDTH}px;text-align:left">\n{_unbroken(body)}</table>\n</td></tr></table>\n</body>\n</html>\n'
    )


def _preview(report: Daily) -> str:
    """What a list of mails shows beside the subject."""
    found = words.concerns(report)
    text = found[0].text if found else _totals(report)
    return (
        f'<div style="display:none;max-height:0;overflow:hidden;font-size:1px;line-height:1px;color:{PAPER}">'
        f"{_text(text)}</div>\n"
    )


def _totals(report: Daily) -> str:
    if report.market is None:
        return words.period(report)
    return f"{words.count(report.market.bars, 'candle')}, {words.count(report.market.signals, 'signal')}."


def _unbroken(text: str) -> str:
    """Keeps a figure and its unit on one line."""
    return re.sub(r"(?<=\d) (?=%|bp\b|ms\b|s\b|h\b|min\b|(?:[KMGT]i)?B\b|days?\b)", "\u00a0", text)


def _text(text: str, most: int = TEXT) -> str:
    """Escaped, on one line, and no longer than a sentence is."""
    line = " ".join(text.split())
    return escape(line if len(line) <= most else line[: most - 1] + "…")


def _name(text: str) -> str:
    return _text(text, NAME)


# --- blocks ------------------------------------------------------------------------------------------------------


def _row(inner: str) -> str:
    return f"<tr><td>{inner}</td></tr>\n"


def _card(title: str, inner: str, intro: str = "") -> str:
    """A white block with a heading; ``inner`` and ``intro`` are HTML."""
    lead = f'<p style="margin:4px 0 0;font-size:14px;line-height:1.5;color:{MUTED}">{intro}</p>' if intro else ""
    return _row(
        f'<table role="presentation" width="100%" cellpadding="0" cellspacing="0" border="0" style="margin:0 0 14px">'
        f'<tr><td class="card" bgcolor="{CARD}" style="background:{CARD};border:1px solid {HAIR};border-radius:12px;'
        f'padding:20px 22px"><h2 style="margin:0;font-size:19px;line-height:1.3;font-weight:600;color:{INK}">{escape(title)}'
        f"</h2>{lead}{inner}</td></tr></table>"
    )


def _badge(text: str, colours: tuple[str, str]) -> str:
    ink, wash = colours
    return (
        f'<span style="display:inline-block;padding:2px 9px;border-radius:99px;background:{wash};color:{ink};'
        f'font-size:12.5px;line-height:1.45;font-weight:600;white-space:nowrap">{escape(text)}</span>'
    )


def _image(name: str, sources: Mapping[str, str], alt: str) -> str:
    """A picture as wide as its card; nothing where there is none."""
    if name not in sources:
        return ""
    return (
        f'<img src="{escape(sources[name])}" alt="{_text(alt)}" width="600" border="0" '
        'style="display:block;width:100%;max-width:600px;height:auto;margin:14px 0 0;font-size:13px;'
        f'line-height:1.4;color:{MUTED}">'
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML. A heading ``n:…`` is a column of figures, ``w:…`` one that a phone leaves out, ``nw:…`` both."""
    kinds = [head.partition(":")[0] if re.match(r"n?w?:", head) else "" for head in heads]
    names = [
        head.partition(":")[2] if kind or head.startswith(":") else head
        for head, kind in zip(heads, kinds, strict=True)
    ]

    def cell(tag: str, at: int, html: str, line: str) -> str:
        right, last = "n" in kinds[at], at == len(heads) - 1
        classes = "wide" if "w" in kinds[at] else "last" if last else "cell"
        style = f"padding:7px {0 if last else 14}px 7px 0;border-bottom:{line}" + (
            ";white-space:nowrap" if right else ""
        )
        style += f";font-size:12.5px;font-weight:500;color:{MUTED}" if tag == "th" else ""
        side = ' align="right"' if right else ' align="left"' if tag == "th" else ""
        return f'<{tag} class="{classes}"{side} style="{style}">{html}</{tag}>'

    head = ""
    if any(names):
        cells = "".join(cell("th", at, escape(name), f"1px solid {RULE}") for at, name in enumerate(names))
        head = f"<tr>{cells}</tr>\n"
    body = ""
    for number, row in enumerate(rows):
        line = "0" if number == len(rows) - 1 else f"1px solid {HAIR}"
        body += f'<tr valign="top">{"".join(cell("td", at, html, line) for at, html in enumerate(row))}</tr>\n'
    return (
        '<table width="100%" cellpadding="0" cellspacing="0" border="0" style="border-collapse:collapse;margin:10px 0 0;'
        f'font-size:14px;line-height:1.45;font-variant-numeric:tabular-nums">\n{head}{body}</table>\n'
    )


def _note(html: str) -> str:
    return f'<p style="margin:12px 0 0;font-size:14px;line-height:1.5;color:{MUTED}">{html}</p>'


def _muted(text: str) -> str:
    """A second line in a cell."""
    return f'<br><span style="color:{MUTED};font-size:13px">{_text(text)}</span>' if text else ""


def _code(text: str, *, breaks: bool = False) -> str:
    """``breaks``: anywhere, where it is long and the screen narrow."""
    wrap = "word-break:break-all" if breaks else "white-space:nowrap"
    return f'<span style="font-family:{MONO};font-size:12.5px;{wrap}">{_name(text)}</span>'


# --- head --------------------------------------------------------------------------------------------------------


def _header(report: Daily) -> str:
    verdict = words.headline(report)
    return _row(
        f'<div style="padding:0 2px 16px"><p style="margin:0;font-size:14px;line-height:1.5;color:{MUTED}">'
        f"{_badge({'good': 'well', 'open': 'look', 'bad': 'act'}[verdict.tone], TONES[verdict.tone])} &nbsp;"
        f"{escape(words.period(report))}</p>"
        f'<h1 class="title" style="margin:10px 0 0;font-size:32px;line-height:1.18;letter-spacing:-0.015em;'
        f'font-weight:640;color:{INK}">{escape(verdict.text)}</h1></div>'
    )


def _tiles(report: Daily) -> str:
    market, watch = report.market, report.watch
    incidents = watch.incidents if watch is not None else ()
    still = sum(incident.closed_at is None for incident in incidents)
    tiles = (
        ("candles", f"{market.bars:,}" if market is not None else DASH),
        ("signals", f"{market.signals:,}" if market is not None else DASH),
        ("to trade", f"{market.traded:,}" if market is not None else DASH),
        ("incidents", (f"{len(incidents)}" + (f", {still} open" if still else "")) if watch is not None else DASH),
    )
    cells = ""
    for at, (name, figure) in enumerate(tiles):
        gap = "0 0 14px 0" if at == len(tiles) - 1 else "0 10px 14px 0"
        cells += (
            f'<td class="tile" width="25%" valign="top" style="width:25%;padding:{gap}">'
            '<table role="presentation" width="100%" cellpadding="0" cellspacing="0" border="0"><tr>'
            f'<td bgcolor="{CARD}" style="background:{CARD};border:1px solid {HAIR};border-radius:12px;padding:12px 16px 13px">'
            f'<span style="font-size:13px;color:{MUTED}">{escape(name)}</span><br>'
            f'<span style="font-size:22px;line-height:1.3;font-weight:640;white-space:nowrap;color:{INK}">{escape(figure)}</span>'
            "</td></tr></table></td>"
        )
    return _row(
        '<table role="presentation" width="100%" cellpadding="0" cellspacing="0" border="0" '
        f'style="table-layout:fixed"><tr>{cells}</tr></table>'
    )


def _attention(report: Daily) -> str:
    found = words.concerns(report)
    if not found:
        return ""
    rows = [(_dot(concern.tone), _said(concern.text)) for concern in found[: words.CONCERNS]]
    if len(found) > words.CONCERNS:
        rows.append(("", f"and {len(found) - words.CONCERNS} more"))
    cells = "".join(
        f'<tr><td width="18" valign="top" style="padding:7px 0;line-height:1.5">{dot}</td>'
        f'<td style="padding:7px 0;font-size:15px;line-height:1.5;color:{INK}">{text}</td></tr>\n'
        for dot, text in rows
    )
    return _card(
        "What needs you",
        f'<table role="presentation" width="100%" cellpadding="0" cellspacing="0" border="0" style="margin:8px 0 0">{cells}</table>',
    )


def _dot(tone: Tone) -> str:
    """A mark that is told apart by its shape as well."""
    return f'<span style="color:{TONES[tone][0]};font-size:14px">{"▲" if tone == "bad" else "●"}</span>'


def _said(text: str) -> str:
    """A sentence; what stands in backticks is a command."""
    html = _text(text)
    return re.sub(r"`([^`]+)`", rf'<span style="font-family:{MONO};font-size:13.5px">\1</span>', html)


# --- sections ----------------------------------------------------------------------------------------------------

_LOOK: Final[dict[str, tuple[str, str]]] = {
    "ok": TONES["good"],
    "warning": TONES["open"],
    "critical": TONES["bad"],
    "skipped": GREY,
}


def _services(report: Daily, sources: Mapping[str, str]) -> str:
    watch = report.watch
    if watch is None or not watch.services:
        return _card("Services", _note(_said(report.problems.get("watch", words.NOT_WATCHED))))
    told, well = words.sorted_out(watch)
    rows = [
        (
            f"{_name(service.name)}{_muted('' if service.status == 'ok' else service.message)}",
            _badge(words.LOOKS[service.status], _LOOK[service.status]),
            escape(words.quick(service.slow)),
            escape(words.share(service.fine, 2)),
        )
        for service in told[:SERVICES_TOLD]
    ]
    ill = [service.name for service in watch.services if service.status in ("warning", "critical")]
    alt = f"How each service was, by the quarter of an hour. Not well at the end: {', '.join(ill) or 'none'}."
    image = _image(SERVICES, sources, alt)
    key = (("well", LOOKS[0]), ("warning", LOOKS[1]), ("critical", LOOKS[2]), ("not looked at", LOOKS[-1]))
    inner = image + (_key(key) if image else "")
    inner += _table(("service", "now", "nw:a look takes", "n:up"), rows) if rows else ""
    inner += "".join(_note(_text(line)) for line in words.well_words(watch, well))
    intro = "Up is what was not critical, of all looks at the worst of a service's checks." if rows else ""
    return _card("Services", inner, intro)


def _key(items: Sequence[tuple[str, str]]) -> str:
    """What colours mean."""
    marks = " &nbsp; ".join(
        f'<span style="white-space:nowrap"><span style="color:{colour};font-size:15px">■</span> {escape(text)}</span>'
        for text, colour in items
    )
    return f'<p style="margin:6px 0 0;font-size:13px;line-height:1.5;color:{MUTED}">{marks}</p>'


def _incidents(report: Daily) -> str:
    watch = report.watch
    if watch is None:
        return ""
    if not watch.incidents:
        return _card("Incidents", _note("None in this time."))

    def row(incident: Incident) -> Sequence[str]:
        colours = (
            TONES["bad"]
            if incident.severity == "critical"
            else TONES["open"]
            if incident.severity == "warning"
            else GREY
        )
        checks = ", ".join(incident.checks[:4]) + (
            f" and {len(incident.checks) - 4} more" if len(incident.checks) > 4 else ""
        )
        return (
            f"{_text(incident.title)}{_muted(checks[:TEXT])}",
            _badge(incident.severity, colours),
            escape(words.moment(incident.opened_at, report.until)),
            escape(words.lasted(incident, report.until)),
        )

    shown = watch.incidents[:INCIDENTS]
    more = _note(f"and {len(watch.incidents) - len(shown)} more") if len(watch.incidents) > len(shown) else ""
    return _card("Incidents", _table(("what", "w:severity", "n:since", "n:lasted"), [row(i) for i in shown]) + more)


def _market(report: Daily, sources: Mapping[str, str]) -> str:
    market = report.market
    if market is None:
        return _card("Candles and signals", _note(_said(report.problems.get("archive", DASH))))
    rows = [
        (
            f"{_name(one.symbol)} {_name(one.timeframe)}",
            f"{one.bars:,}",
            escape(words.moment(one.newest, report.until) if one.newest is not None else DASH),
            f"{one.up:,}",
            f"{one.down:,}",
            f"{one.none:,}",
        )
        for one in market.series
    ]
    table = _table(("series", "n:candles", "nw:newest bar", "n:up", "n:down", "n:no trade"), rows) if rows else ""
    more = _note(f"and {market.more:,} series more") if market.more else ""
    return _card(
        "Candles and signals",
        _image(MARKET, sources, _market_alt(market)) + table + more + _note(escape(words.signal_words(market))),
        escape(words.market_words(market)),
    )


def _market_alt(market: Market) -> str:
    if not market.hours:
        return ""
    most = max(market.hours, key=lambda hour: hour.live + hour.history)
    return (
        f"Candles and signals by the hour: {market.bars:,} and {market.signals:,} in all; "
        f"most candles from {most.at:%H:%M} on, {most.live + most.history:,}."
    )


def _models(report: Daily, sources: Mapping[str, str]) -> str:
    models = report.models
    if models is None:
        return ""  # the section before has said why
    if not models.versions:
        train = "No version serves: train one with `mt5 train --timeframe M1`."
        return _card("Models", _note(_said(train)))
    rows = [
        (
            f"{_name(v.model_name)} {_code(v.version, breaks=True)}{_muted(_about(v, report))}",
            f"{v.outcomes:,}",
            escape(words.share(v.hit_rate)),
            escape(words.basis(v.net)),
            escape(words.gain(v.gain)),
        )
        for v in models.versions
    ]
    inner = _table(("version", "n:outcomes", "nw:side right", "nw:net a trade", "n:Brier gain"), rows)
    inner += _cards(models)
    image = _image(SKILL, sources, "How much better than the base rate the newest outcomes' probabilities were.")
    if image and models.skills:
        windows = sorted({skill.window for skill in models.skills})
        over = f"{windows[0]:,}" + (f" to {windows[-1]:,}" if len(windows) > 1 else "")
        inner += image + _note(
            f"Each point is of the {over} outcomes before it. Above the dashed line, probabilities were worth more than the base rate."
        )
    if models.steps:
        inner += _table(
            ("what was decided", "n:when"),
            [
                (
                    f"{_code(step.version, breaks=True)} {_name(words.ACTIONS.get(step.action, step.action))} by {_name(step.by)}{_muted(step.reason)}",
                    escape(words.moment(step.at, report.until)),
                )
                for step in models.steps
            ],
        )
    inner += _note(escape(words.audit_words(models)))
    return _card(
        "Models", inner, "What came true within this time. Brier gain: how much better than the base rate's, in 1/1000."
    )


def _about(version: Version, report: Daily) -> str:
    training = f", AUC {version.auc:.3f} in training" if version.auc is not None else ""
    made = words.moment(version.created_at, report.until)
    return f"{words.STATES.get(version.state, version.state)[:NAME]}; made {made}{training}"


def _cards(models: Models) -> str:
    if not models.cards:
        return ""
    rows = []
    for card in models.cards:
        tone, _ = words.judged(card)
        rows.append(
            (
                f"{_name(card.symbol)} {_name(card.timeframe)}",
                _badge(
                    {"good": "better", "open": "no verdict", "bad": "worse"}[tone],
                    TONES[tone] if tone != "open" else GREY,
                ),
                f"{card.outcomes:,}",
                escape(words.share(card.hit_rate)),
                escape(words.basis(card.net_mean)),
                escape(words.gain(card.brier_gain)),
            )
        )
    return _table(
        ("scorecard", "than the base rate", "n:outcomes", "nw:trades won", "nw:net a trade", "n:Brier gain"), rows
    )


def _backups(report: Daily) -> str:
    backups = report.backups
    if backups is None:
        return _card("Backups", _note(_said(report.problems.get("backups", DASH))))
    rows = [
        (
            f"{escape(words.EVENTS.get(copy.event, copy.event).capitalize())}{_muted(words.copy_words(copy))}",
            _code(copy.backup),
            escape(words.ago(copy.at, report.until)),
        )
        for copy in words.copies(backups)
    ]
    table = _table(("newest that was …", "w:backup", "n:when"), rows) if rows else ""
    return _card("Backups", table + _note(escape(words.kept_words(backups))))


def _room(report: Daily, sources: Mapping[str, str]) -> str:
    room = report.room
    if room is None:
        return _card("Disk and database", _note(_said(report.problems.get("room", DASH))))
    rows = []
    for disk in room.disks:
        tone: Tone = "bad" if disk.share < room.critical else "open" if disk.share < room.warn else "good"
        rows.append(
            (
                _code(disk.name, breaks=True),
                _badge(words.share(disk.share) + " free", TONES[tone]),
                escape(words.size(disk.total)),
                escape(words.size(disk.free)),
            )
        )
    table = _table(("disk", "", "nw:of", "n:left"), rows) if rows else ""
    database = _note(escape(words.database_words(room))) if room.database is not None else ""
    image = _image(ROOM, sources, "Free disk space and the database's size over the newest 30 days.")
    return _card("Disk and database", table + image + database)


def _jobs(report: Daily) -> str:
    if not report.jobs:
        return _card(
            "Nightly jobs",
            _note(_said("None has run here: `mt5 install-systemd` installs their timers.")),
        )
    rows = [
        (
            f"{_name(job.name)}{_muted(words.sentence(job.summary))}",
            _badge("ok" if job.ok else "failed", TONES["good" if job.ok else "bad"]),
            escape(words.duration(job.seconds)),
            escape(words.ago(job.at, report.until)),
        )
        for job in report.jobs
    ]
    return _card("Nightly jobs", _table(("job", "", "nw:took", "n:when"), rows))


def _commits(report: Daily) -> str:
    if not report.commits:
        text = report.problems.get("commits", "This is no git checkout: it runs from an installed package.")
        return _card("Newest commits", _note(_text(text)))
    rows = [
        (
            f"{_text(commit.subject, 2 * NAME)}{_muted(commit.author[:NAME])}",
            _code(commit.id),
            escape(words.moment(commit.at, report.until)),
        )
        for commit in report.commits
    ]
    return _card("Newest commits", _table(("what", "w:revision", "n:when"), rows))


def _footer(report: Daily) -> str:
    return _row(
        f'<p style="margin:8px 2px 0;font-size:13px;line-height:1.5;color:{MUTED}">Made on {_name(report.host)} at '
        f'{report.made_at:%H:%M} UTC by <span style="font-family:{MONO};font-size:12.5px">mt5 health report</span>, release '
        f"{_name(report.release)}. All times are UTC.</p>"
    )
