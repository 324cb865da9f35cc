"""A model's report as one HTML page: no script, no file beside it, every value escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, Final

from bus.store import ModelRecord
from commands import report_pictures as pictures
from commands.report_pictures import interval, number, rows_of
from commands.report_words import (
    DASH,
    STATES,
    Scale,
    Tile,
    basis,
    day,
    headline,
    plain,
    share,
    tiles,
    why,
)

STYLE: Final = Path(__file__).with_name("report.css")
_TONES: Final = {"champion": "good", "refused": "bad", "retired": "open"}


@dataclass(frozen=True, slots=True)
class Live:
    """What came true of a version's live signals. ``skill`` is how much better than the base rate's its Brier score was
    over the ``window`` outcomes up to each time of ``ts`` (epoch seconds); the other figures are of all ``outcomes``."""

    outcomes: int
    first: datetime
    last: datetime
    brier: float
    base_brier: float
    hit_rate: float
    trades: int
    net_mean: float | None
    window: int
    ts: Sequence[float]
    skill: Sequence[float]


@dataclass(frozen=True, slots=True)
class Decision:
    """A row of model_decisions."""

    at: datetime
    action: str
    by: str
    reason: str


def page(record: ModelRecord, live: Live | None, decisions: Sequence[Decision], made_at: datetime) -> str:
    """The whole document."""
    manifest = record.manifest
    report = manifest.get("report")
    report = report if isinstance(report, Mapping) else {}
    threshold = number(manifest.get("threshold"))
    title = f"{record.model_name} {record.version}"
    body = (
        _header(record, report, threshold)
        + f'<div class="tiles">{"".join(map(_tile, tiles(report, threshold)))}</div>'
        + _evaluation(report, threshold)
        + _lived(live)
        + _thresholds(report, threshold)
        + _guard(report)
        + _decisions(decisions)
        + _facts(record, report)
        + f"<footer>Made by <code>mt5 models report</code> on {escape(day(made_at))}, from the signed manifest and the archive. "
        "Figures out of sample say how a model did on bars that it had not seen; they promise nothing.</footer>"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n"
        f"<body>\n<main>\n{_unbroken(body)}\n</main>\n</body>\n</html>\n"
    )


def _unbroken(text: str) -> str:
    """Keeps a figure and its unit on one line."""
    return re.sub(r"(?<=\d) (?=%|bp\b)", "\u00a0", text)


# --- head --------------------------------------------------------------------------------------------------------


def _header(record: ModelRecord, report: Mapping[str, Any], threshold: float | None) -> str:
    symbols = record.manifest.get("symbols") or report.get("symbols") or ()
    tone = _TONES.get(record.state, "open")
    return (
        f'<header><div class="over"><span class="badge {tone}">{escape(record.state)}</span>'
        f"<span>{escape(record.model_name)}</span><span>{escape(record.timeframe)}</span>"
        f"<span>{escape(', '.join(map(str, symbols)))}</span><code>{escape(record.version)}</code></div>"
        f"<h1>{escape(headline(report, threshold))}</h1>"
        f'<p class="lead"><strong>{escape(STATES.get(record.state, ""))}</strong> {escape(why(record))}</p></header>\n'
    )


def _tile(tile: Tile) -> str:
    scale = "" if tile.scale is None else _scale(tile.scale)
    return (
        f'<div class="tile"><h2>{escape(tile.question)}</h2><p class="figure">{escape(tile.figure)}</p>'
        f'<p class="answer {tile.tone}">{escape(tile.answer)}</p>{scale}<p class="detail">{escape(tile.detail)}</p></div>\n'
    )


def _scale(scale: Scale) -> str:
    """A figure with its interval on a line of its own, beside what it is compared with."""
    low, high = scale.span or (scale.value, scale.value)
    name, against = scale.against
    marks = [low, high, scale.value, against, *(() if scale.rival is None else scale.rival[1:])]
    left, reach = min(marks), (max(marks) - min(marks)) or 1.0

    def x(value: float) -> str:
        return f"{12 + 376 * (value - left) / reach:.1f}"

    key = [("dot", "this version"), ("wash", "95 % interval"), ("dashed", name)]
    rival = ""
    if scale.rival is not None:
        key.append(("ring", scale.rival[0]))
        rival = (
            f'<circle cx="{x(scale.rival[1])}" cy="13" r="5" '
            'style="fill:var(--card);stroke:var(--muted);stroke-width:1.8"/>'
        )
    return (
        '<svg class="scale" viewBox="0 0 400 26" aria-hidden="true">'
        '<line x1="0" x2="400" y1="13" y2="13" style="stroke:var(--hair);stroke-width:2"/>'
        f'<line x1="{x(low)}" x2="{x(high)}" y1="13" y2="13" '
        'style="stroke:var(--model);stroke-width:7;opacity:.38;stroke-linecap:round"/>'
        f'<line x1="{x(against)}" x2="{x(against)}" y1="1" y2="25" '
        'style="stroke:var(--other);stroke-width:2.4;stroke-dasharray:4 3"/>'
        f'{rival}<circle cx="{x(scale.value)}" cy="13" r="6" style="fill:var(--model)"/></svg>{_key(key)}'
    )


def _key(items: Sequence[tuple[str, str]]) -> str:
    """What the marks of a picture mean; each with the class that draws it."""
    marks = "".join(f'<li><i class="{kind}"></i>{escape(text)}</li>' for kind, text in items)
    return f'<ul class="key">{marks}</ul>' if marks else ""


# --- pictures ----------------------------------------------------------------------------------------------------


def _evaluation(report: Mapping[str, Any], threshold: float | None) -> str:
    cards = [
        _walk_card(report),
        _card(
            "Do its probabilities mean what they say?",
            pictures.calibration(report),
            "the calibration curve",
            (("dot", "a tenth of the bars, with its 95 % interval"), ("dashed", "said and came true alike")),
            "<b>Good:</b> the points climb along the dashed line, and their bars touch it. "
            "<b>Bad:</b> a flat row of points (whatever is said, the same comes true) or one that falls. Mind the scale: honest "
            "probabilities of the next minutes stay near 50 %.",
        ),
        _card(
            "How sure is it, and how often?",
            pictures.probabilities(report),
            "the distribution of its probabilities",
            (("dashed", "50 %"), *((("third", "where it would trade"),) if threshold is not None else ())),
            "<b>Good:</b> a hill around 50 % with two even slopes. <b>Bad:</b> one spike (it always says the same), or much "
            "weight far out: nobody knows the next five minutes that well.",
        ),
        _card(
            "What does it look at?",
            pictures.importance(report),
            "the importance of its inputs",
            (),
            "AUC that is lost on the newest fold when one input's values change places; lines are one standard deviation. "
            "<b>Good:</b> several inputs matter a little. <b>Bad:</b> one towers over all others, which smells of a leak, or all "
            "lie around zero: there was nothing to learn. Inputs that say the same share their importance.",
        ),
        _equity_card(report),
    ]
    return (
        "<section><h2>On bars that it had not seen</h2>"
        '<p class="intro">Each figure comes from walking forward in time: trained on the past, asked about what followed, five '
        f'times or so over. Intervals are redrawn from whole hours.</p><div class="pictures">{"".join(cards)}</div></section>\n'
    )


def _walk_card(report: Mapping[str, Any]) -> str:
    folds = rows_of(report.get("folds"), "auc", "test_first_ts", "test_last_ts")
    rough = any(interval(fold.get("auc_ci")) is None for fold in folds)
    how = " A fold's interval is a rough one, from its number of bars." if rough else ""
    return _card(
        "Does it rank better than chance, and every time?",
        pictures.walk_forward(report),
        "the AUC of each fold",
        (("", "a fold: the time it was tested on"), ("wash", "all folds together, 95 %"), ("dashed", "chance")),
        "<b>Good:</b> every fold above the dashed line, at about one height. <b>Bad:</b> folds on both sides of it, or a "
        f"staircase down: what was learnt wears off. Above 0.65 it would be a leak.{how}",
    )


def _equity_card(report: Mapping[str, Any]) -> str:
    kept = report.get("equity")
    kept = kept if isinstance(kept, Mapping) else {}
    found = pictures.curves(report) or {}
    drawn = number(kept.get("threshold"))
    edge = kept.get("edge") if isinstance(kept.get("edge"), bool) else number(report.get("threshold")) is not None
    cost = "net of cost" if kept.get("net") else "before costs, which are unknown here"
    at = f" at the threshold {drawn:.4f}" if drawn is not None else ""
    which = (
        f"Drawn{at}, {cost}."
        if edge
        else f"No threshold has an edge: this is the best of those tried{at}, {cost}, and it would not be traded."
    )
    key = [("", f"the model, {'net of cost' if kept.get('net') else 'before costs'}")]
    key += [("other", "buying and holding")] if "buy_hold" in found else []
    key += [("band", "nine of ten random signals of the same number")] if "low" in found else []
    return _card(
        "What would trading on it have earned?",
        pictures.equity(report, wide=True),
        "the equity",
        key,
        f"{which} Returns are added, on an even stake. <b>Good:</b> the blue line leaves the grey band upwards and keeps "
        "climbing. <b>Bad:</b> it stays in the band, as luck would, or leaves it downwards, as costs do.",
        narrow=pictures.equity(report, wide=False),
        whole=True,
    )


def _card(
    title: str,
    picture: str | None,
    what: str,
    key: Sequence[tuple[str, str]],
    caption: str,
    *,
    narrow: str | None = None,
    whole: bool = False,
) -> str:
    """A picture with its key and caption; ``caption`` is HTML of our own, all else is escaped."""
    classes = "card whole" if whole else "card"
    if picture is None:
        text = f"This version's manifest does not hold {what}: it was trained by an older release, or there was too little to draw."
        return f'<figure class="{classes}"><h3>{escape(title)}</h3><p class="missing">{escape(text)}</p></figure>\n'
    shown = picture if narrow is None else f'<div class="wide">{picture}</div><div class="narrow">{narrow}</div>'
    return (
        f'<figure class="{classes}"><h3>{escape(title)}</h3><div role="img" aria-label="{escape(what)}">{shown}</div>'
        f"{_key(key)}<figcaption>{caption}</figcaption></figure>\n"
    )


def _lived(live: Live | None) -> str:
    head = "<section><h2>Since then, live</h2>"
    if live is None:
        return (
            f'{head}<p class="intro">No outcome of a live signal of this version is known yet: each one is, five bars after '
            "its candle.</p></section>\n"
        )
    table = _table(
        ("what came true", "n:its signals", "n:base rate"),
        [
            ("outcomes", f"{live.outcomes:,}", ""),
            ("Brier score", plain(live.brier, 5), plain(live.base_brier, 5)),
            ("likelier side right", share(live.hit_rate), ""),
            ("trades", f"{live.trades:,}", ""),
            ("mean return of a trade, net of cost", basis(live.net_mean), ""),
        ],
    )
    chart = _card(
        "Are its probabilities still worth more than the base rate?",
        pictures.live(live.ts, live.skill),
        "enough outcomes for a curve",
        (("", f"over the newest {live.window:,} outcomes"), ("dashed", "as good as the base rate")),
        "<b>Good:</b> above the dashed line, if only by a little. <b>Bad:</b> below it for long: then it is rolled back.",
    )
    return (
        f'{head}<p class="intro">Signals from {escape(day(live.first))} to {escape(day(live.last))}, and what came of them.</p>'
        f'<div class="pictures">{chart}<div class="card">{table}</div></div></section>\n'
    )


# --- tables ------------------------------------------------------------------------------------------------------


def _thresholds(report: Mapping[str, Any], threshold: float | None) -> str:
    rows = rows_of(report.get("candidates"), "threshold", "trades")
    if not rows:
        return ""

    def cells(row: Mapping[str, Any]) -> Sequence[str]:
        hit, net = interval(row.get("hit_rate_ci")), interval(row.get("net_ci"))
        return (
            f"{row['threshold']:.4f}",
            f"{row['trades']:,.0f}",
            share(number(row.get("hit_rate"))) + ("" if hit is None else f" ({share(hit[0])} to {share(hit[1])})"),
            basis(number(row.get("gross_mean"))),
            basis(number(row.get("net_mean"))) + ("" if net is None else f" ({basis(net[0])} to {basis(net[1])})"),
            basis(number(row.get("net_low"))),
        )

    table = _table(
        ("n:threshold", "n:trades", "n:won", "n:mean, gross", "n:mean, net of cost", "n:95 % sure of at least"),
        [cells(row) for row in rows],
        chosen=next((i for i, row in enumerate(rows) if row["threshold"] == threshold), None),
    )
    said = (
        "None of them is chosen: no lower bound is above 0 over at least 200 trades."
        if threshold is None
        else "The one in colour is chosen: its lower bound is the highest above 0 over at least 200 trades."
    )
    return (
        '<section><h2>From which certainty on?</h2><p class="intro">A long from a probability at the threshold on, a short '
        f"at its mirror image; entered at the next open, left five bars later. 1 bp is a hundredth of a percent. {said}</p>"
        f'<div class="card scroll">{table}</div></section>\n'
    )


def _guard(report: Mapping[str, Any]) -> str:
    guard = report.get("guard")
    if not isinstance(guard, Mapping) or not guard:
        return ""
    names = {
        "prefix": "Inputs computed again from truncated history",
        "shuffled": "Labels shuffled in blocks",
        "random_walk": "A simulated random walk",
    }
    rows = []
    for key, title in names.items():
        found = guard.get(key)
        if isinstance(found, Mapping):
            rows.append((title, _found(found), _allowed(found)))
    return (
        '<section><h2>The leak guard</h2><p class="intro">What cannot be learnt must not be learnt: an input that knows the '
        "future shows here, whatever the other figures say.</p>"
        f'<div class="card scroll">{_table(("test", "found", "allowed"), rows)}</div></section>\n'
    )


def _found(test: Mapping[str, Any]) -> str:
    auc, n, rows = number(test.get("auc")), number(test.get("n")), number(test.get("rows"))
    if auc is not None:
        return f"AUC {auc:.4f}" + (f" of {n:,.0f} bars" if n is not None else "")
    return f"{rows:,.0f} rows compared" if rows is not None else DASH


def _allowed(test: Mapping[str, Any]) -> str:
    limit = number(test.get("limit"))
    return f"0.5 ± {limit:.4f}" if limit is not None else "equal to the bit"


def _decisions(decisions: Sequence[Decision]) -> str:
    if not decisions:
        return ""
    rows = [(day(one.at), one.action, one.by, one.reason) for one in decisions]
    return (
        "<section><h2>Its life</h2>"
        f'<div class="card scroll">{_table(("when", "what", "by", "why"), rows)}</div></section>\n'
    )


def _facts(record: ModelRecord, report: Mapping[str, Any]) -> str:
    manifest = record.manifest
    options = report.get("options") or {}
    facts: list[tuple[str, str]] = [
        ("trained", day(record.created_at)),
        ("bars from, to", f"{_time(manifest.get('first_ts'))} to {_time(manifest.get('last_ts'))}"),
        ("rows learnt from", f"{rows:,.0f}" if (rows := number(manifest.get("rows"))) is not None else DASH),
        ("rows tested on", f"{rows:,.0f}" if (rows := number(report.get("test_rows"))) is not None else DASH),
        ("share of rises", share(number(manifest.get("base_rate")) or number(report.get("train_rate")), 2)),
        ("expires, in market time", _time(manifest.get("expires_at"))),
        ("serves from", "" if record.from_seq is None else f"CANDLES sequence {record.from_seq:,}"),
        ("feature set", str(manifest.get("feature_set", DASH))),
        ("inputs", ", ".join(map(str, manifest.get("inputs") or ()))),
        ("recipe", str(manifest.get("recipe") or "")),
        ("options", _pairs(options)),
        ("libraries", _pairs(manifest.get("libraries") or {})),
    ]
    unlike = report.get("outliers")
    rate = number(unlike.get("validation_rate")) if isinstance(unlike, Mapping) else None
    if rate is not None:
        facts.append(("bars unlike its training", f"{share(rate, 2)} of the later validation block"))
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts if value)
    kept = manifest.get("files") or {}
    hashes = "".join(
        f"<dt>{escape(str(name))}</dt><dd><code>{escape(str(file.get('sha256', DASH)))}</code></dd>"
        for name, file in kept.items()
        if isinstance(file, Mapping)
    )
    return (
        f'<section><h2>What it was made of</h2><div class="card"><dl class="facts">{listed}</dl></div></section>\n'
        f'<section><h2>Its files, by SHA-256</h2><div class="card"><dl class="facts">{hashes}</dl></div></section>\n'
    )


def _pairs(values: Any) -> str:
    if not isinstance(values, Mapping):
        return DASH
    return ", ".join(f"{name} {_value(value)}" for name, value in values.items())


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "none" if not value else "; ".join(f"{name}: {item}" for name, item in value.items())
    return str(value)


def _time(value: Any) -> str:
    """A time of the manifest, which JSON gave back as text."""
    try:
        return day(datetime.fromisoformat(str(value)).astimezone(UTC))
    except ValueError:
        return DASH


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, chosen: int | None = None) -> str:
    """``n:`` before a column's name sets its cells to the right, as figures are."""
    kinds = [' class="n"' if name.startswith("n:") else "" for name in columns]
    head = "".join(
        f"<th{kind}>{escape(name.removeprefix('n:'))}</th>" for kind, name in zip(kinds, columns, strict=True)
    )
    body = "".join(
        ('<tr class="chosen">' if i == chosen else "<tr>")
        + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
        + "</tr>"
        for i, row in enumerate(rows)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
