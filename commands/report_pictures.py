"""The pictures of a model's report, each as one SVG whose colours are the page's own, so that dark and print follow.

Shapes are those of ``manifest.report``; a picture whose figures are missing is None, and the page says so instead.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

NARROW: Final = (5.4, 3.5)  # inches of 72 units: what half a desk's width and a phone's whole one can show
WIDE: Final = (11.0, 3.9)
OVERLAP: Final = 2.3  # an AUC of n overlapping labels lies within 2.3 / √n of chance, 19 times out of 20
MOST_TICKS: Final = 5  # days, or other times, on a picture's time axis: more would run into each other on a phone

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_STEPS: Final = (
    1 / 96,
    1 / 24,
    1 / 8,
    1 / 4,
    1 / 2,
    1,
    2,
    4,
    7,
    14,
    30.4375,
    61,
    91.3125,
    182.625,
    365.25,
    730.5,
    3_652.5,
)

# Stand-ins that the page's colours take the place of; the page's own are told apart by the colour-blind (Okabe, Ito).
INK, MUTED, LINE = "#101011", "#202022", "#303033"
MODEL, OTHER, THIRD = "#404044", "#505055", "#606066"
_NAMES: Final = {INK: "ink", MUTED: "muted", LINE: "line", MODEL: "model", OTHER: "other", THIRD: "third"}

_STYLE: Final[dict[Any, Any]] = {  # matplotlib types its keys one by one
    "svg.fonttype": "none",  # text stays text: the page's font, and it can be searched
    "text.parse_math": False,  # a name with two dollars is a name
    "font.size": 12.0,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.unicode_minus": True,
}


def _draw(name: str, size: tuple[float, float], paint: Callable[[Axes], None]) -> str:
    """Paints one pair of axes; ``name`` keeps the ids of several pictures on one page apart."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=3)
        paint(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _embed(out.getvalue(), name)


def _embed(document: str, name: str) -> str:
    """An SVG document as an element of a page: ids of its own, the page's font and colours, no fixed size."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(xlink:)?href="#([^"]+)"', rf'href="#{name}-\2"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", svg)
    for colour, variable in _NAMES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg


def number(value: Any) -> float | None:
    """A finite number, or None for whatever else a report of another release may hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def interval(value: Any) -> tuple[float, float] | None:
    """A ``[low, high]`` of two numbers."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else (low, high)


def rows_of(value: Any, *needed: str) -> list[Mapping[str, Any]]:
    """Those entries of a list that have a number under each of these keys."""
    if not isinstance(value, (list, tuple)):
        return []
    return [
        row for row in value if isinstance(row, Mapping) and all(number(row.get(key)) is not None for key in needed)
    ]


def _percent(axis: Any) -> None:
    """Shares as percent, with as many digits as the distance of the ticks asks for."""
    axis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))


def _dates(axes: Axes) -> None:
    """At most six ticks at round times: of matplotlib's own locators one warns, and one leaves the month out."""
    first, last = axes.get_xlim()
    step = next((step for step in _STEPS if (last - first) / step <= MOST_TICKS), _STEPS[-1])
    ticks = [step * at for at in range(math.ceil(first / step), math.floor(last / step) + 1)]
    form = "%d %b %H:%M" if step < 1 else "%d %b" if last - first < 300 else "%b %Y"
    axes.set_xticks(ticks, [f"{_EPOCH + timedelta(days=tick):{form}}" for tick in ticks])


def _when(ts: float) -> float:
    """Epoch seconds as days, the pictures' unit of time."""
    return ts / 86_400


# --- the pictures ------------------------------------------------------------------------------------------------


def calibration(report: Mapping[str, Any]) -> str | None:
    """What came true beside what was said, a point for each tenth of the rows."""
    bins = rows_of(report.get("calibration_curve"), "mean_prob", "rate")
    if len(bins) < 2:
        return None
    said = [float(b["mean_prob"]) for b in bins]
    true = [float(b["rate"]) for b in bins]
    spans = [interval(b.get("rate_ci")) or (b["rate"], b["rate"]) for b in bins]

    def paint(axes: Axes) -> None:
        low, high = min(said), max(said)
        pad = max((high - low) * 0.08, 0.002)
        ends = (low - pad, high + pad)
        axes.plot(ends, ends, color=OTHER, linewidth=1.6, linestyle=(0, (5, 3)), zorder=1)
        axes.vlines(
            said, [s[0] for s in spans], [s[1] for s in spans], color=MODEL, linewidth=1.8, alpha=0.55, zorder=2
        )
        axes.plot(said, true, "o", color=MODEL, markersize=6, zorder=3)
        axes.axhline(0.5, color=LINE, linewidth=0.8, zorder=0)
        axes.set_xlim(*ends)
        axes.set_xlabel("said: probability of a rise")
        axes.set_ylabel("came true: share of rises")
        _percent(axes.xaxis)
        _percent(axes.yaxis)
        axes.xaxis.set_major_locator(MaxNLocator(5))

    return _draw("calibration", NARROW, paint)


def walk_forward(report: Mapping[str, Any]) -> str | None:
    """AUC of each fold over the time that it was tested on, beside chance."""
    folds = rows_of(report.get("folds"), "auc", "test_first_ts", "test_last_ts")
    if not folds:
        return None

    def paint(axes: Axes) -> None:
        whole = interval(report.get("auc_ci"))
        if whole is not None:
            axes.axhspan(*whole, color=MODEL, alpha=0.13, linewidth=0)
        for fold in folds:
            start, end = _when(fold["test_first_ts"]), _when(fold["test_last_ts"])
            value = float(fold["auc"])
            span = fold_interval(fold)
            if span is not None:
                axes.vlines((start + end) / 2, *span, color=MODEL, linewidth=1.8, alpha=0.55)
            axes.hlines(value, start, end, color=MODEL, linewidth=3)
            axes.plot((start + end) / 2, value, "o", color=MODEL, markersize=6)
        axes.axhline(0.5, color=OTHER, linewidth=1.6, linestyle=(0, (5, 3)))
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.47), max(high, 0.53))
        axes.set_ylabel("AUC (0.5 is chance)")
        _dates(axes)

    return _draw("walk", NARROW, paint)


def fold_interval(fold: Mapping[str, Any]) -> tuple[float, float] | None:
    """A fold's 95 % interval: its own, or the rough one that its number of rows gives."""
    own = interval(fold.get("auc_ci"))
    rows = number(fold.get("test_rows"))
    if own is not None or rows is None or rows < 1:
        return own
    return fold["auc"] - OVERLAP / math.sqrt(rows), fold["auc"] + OVERLAP / math.sqrt(rows)


def importance(report: Mapping[str, Any]) -> str | None:
    """How much AUC is lost when one input's values change places, the largest loss first."""
    found = sorted(rows_of(report.get("importance"), "mean"), key=lambda row: float(row["mean"]))
    if not found:
        return None

    def paint(axes: Axes) -> None:
        places = range(len(found))
        means = [float(row["mean"]) for row in found]
        errors = [number(row.get("std")) or 0.0 for row in found]
        axes.barh(places, means, height=0.62, color=MODEL, alpha=0.85)
        ends = [(m - e, m + e) for m, e in zip(means, errors, strict=True)]
        axes.hlines(places, [low for low, _ in ends], [high for _, high in ends], color=INK, linewidth=1.2)
        axes.set_yticks(list(places), [str(row.get("input", "?")) for row in found])
        axes.tick_params(axis="y", length=0)
        axes.axvline(0, color=LINE, linewidth=0.8)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("AUC lost without it")
        axes.xaxis.set_major_locator(MaxNLocator(4))

    return _draw("importance", (NARROW[0], max(2.0, 0.9 + 0.29 * len(found))), paint)


def probabilities(report: Mapping[str, Any]) -> str | None:
    """Where the probabilities lie: the calibration's bins as a histogram of equal areas."""
    bins = [b for b in rows_of(report.get("calibration_curve"), "low", "high", "count") if b["high"] > b["low"]]
    total = sum(float(b["count"]) for b in bins)
    if len(bins) < 2 or total <= 0:
        return None

    def paint(axes: Axes) -> None:
        widths = [b["high"] - b["low"] for b in bins]
        heights = [b["count"] / total / width for b, width in zip(bins, widths, strict=True)]
        axes.bar([b["low"] for b in bins], heights, widths, align="edge", color=MODEL, alpha=0.75, linewidth=0)
        axes.axvline(0.5, color=OTHER, linewidth=1.6, linestyle=(0, (5, 3)))
        threshold = number(report.get("threshold"))
        for edge in () if threshold is None else (threshold, 1 - threshold):
            axes.axvline(edge, color=THIRD, linewidth=1.6)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("probability of a rise")
        axes.set_ylabel("how often")
        _percent(axes.xaxis)
        axes.xaxis.set_major_locator(MaxNLocator(5))

    return _draw("probabilities", NARROW, paint)


def equity(report: Mapping[str, Any], *, wide: bool) -> str | None:
    """Cumulative return out of sample beside buying and holding, in the band that random signals reach."""
    found = curves(report)
    if found is None:
        return None
    times = [_when(ts) for ts in found["ts"]]

    def paint(axes: Axes) -> None:
        if "low" in found:
            axes.fill_between(times, found["low"], found["high"], color=MUTED, alpha=0.18, linewidth=0)
        axes.axhline(0, color=LINE, linewidth=0.8)
        if "buy_hold" in found:
            axes.plot(times, found["buy_hold"], color=OTHER, linewidth=1.5)
        axes.plot(times, found["model"], color=MODEL, linewidth=2.2)
        _percent(axes.yaxis)
        axes.set_ylabel("return on the stake")
        axes.margins(x=0.01)
        _dates(axes)

    return _draw("equity-wide" if wide else "equity", WIDE if wide else NARROW, paint)


def curves(report: Mapping[str, Any]) -> dict[str, list[float]] | None:
    """The equity's columns of one length: ts, model, and where there are any buy_hold, low and high."""
    kept = report.get("equity")
    if not isinstance(kept, Mapping):
        return None
    band = kept.get("random")
    low, high = band if isinstance(band, (list, tuple)) and len(band) == 2 else (None, None)
    columns = {"ts": kept.get("ts"), "model": kept.get("model"), "buy_hold": kept.get("buy_hold")}
    columns |= {"low": low, "high": high}
    numbers = {name: column for name, column in columns.items() if isinstance(column, (list, tuple))}
    size = len(numbers.get("ts", ()))
    whole = {
        name: [float(value) for value in column]
        for name, column in numbers.items()
        if len(column) == size and all(number(value) is not None for value in column)
    }
    if not {"low", "high"} <= whole.keys():
        whole = {name: column for name, column in whole.items() if name not in ("low", "high")}
    return whole if size >= 2 and {"ts", "model"} <= whole.keys() else None


def live(ts: Sequence[float], skill: Sequence[float]) -> str | None:
    """By how much the live probabilities were better (above 0) or worse than the base rate, over the newest outcomes."""
    if len(ts) < 2:
        return None
    times = [_when(at) for at in ts]

    def paint(axes: Axes) -> None:
        axes.axhline(0, color=OTHER, linewidth=1.6, linestyle=(0, (5, 3)))
        axes.plot(times, [1_000 * value for value in skill], color=MODEL, linewidth=2.0)
        axes.set_ylabel("Brier better by, in 1/1000")
        axes.margins(x=0.01)
        _dates(axes)

    return _draw("live", NARROW, paint)
