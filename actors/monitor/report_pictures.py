"""The daily report's pictures, as PNG: mail readers show no SVG. Drawn in a process of its own.

matplotlib takes a second to import and 100 MB; both go with that process. A picture for which there is too little to draw is
left out. Colours are those of a model's report (commands/report.css) on white, since a mail cannot know the paper; looks
differ in lightness as well as in colour.
"""

from __future__ import annotations

import asyncio
import io
import math
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from actors.child import ChildDied, child
from actors.core.daily_facts import Daily, Hour, Line, Look, Skill, UtcTime

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DRAW_SECONDS: Final = 60.0  # for all of them; a machine that is busy takes three
CACHE: Final = "cache/matplotlib"  # under the home: it lists the machine's fonts once, which takes seconds

SERVICES, MARKET, SKILL, ROOM = "services", "market", "skill", "room"  # the pictures' names, and their content ids

WIDTH: Final = 6.0  # inches: 600 px of a mail, which a phone shows at 0.6 of that
PIXELS: Final = 200  # an inch, for screens with two pixels a point
INK, MUTED, LINE, HAIR = "#1c1d21", "#5d6069", "#c9c8c2", "#e4e2db"
MODEL, OTHER, THIRD = "#0067a8", "#b3500a", "#00785a"
GREY: Final = "#b9b8b2"
LOOKS: Final[dict[Look, str]] = {-1: "#eeece6", 0: "#8fcab2", 1: "#e8a33d", 2: "#a02c00"}
LINES: Final = (MODEL, OTHER, THIRD, MUTED)
MOST_LINES: Final = len(LINES)

_STYLE: Final[dict[Any, Any]] = {  # matplotlib types its keys one by one
    "text.parse_math": False,  # a name with two dollars is a name
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 11.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.titlesize": 11.5,
    "axes.titlecolor": MUTED,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "legend.labelcolor": MUTED,
    "legend.handlelength": 1.0,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.2,
    "legend.borderaxespad": 0.1,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.unicode_minus": True,
}
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_HOURS: Final = (0.25, 0.5, 1, 3, 6, 12, 24, 48, 96, 168, 336, 730, 1_461, 4_383, 8_766, 87_660)
MOST_TICKS: Final = 6


class Drawing(msgspec.Struct, frozen=True, kw_only=True):
    """What is drawn; ``cache`` is the folder for matplotlib's own files."""

    since: UtcTime
    until: UtcTime
    strips: list[tuple[str, tuple[Look, ...]]]
    hours: tuple[Hour, ...]
    skills: tuple[Skill, ...]
    lines: tuple[Line, ...]
    warn: float
    cache: str = ""


class DrawingFailed(Exception):
    """There are no pictures; the message is a sentence."""


def drawing_of(report: Daily) -> Drawing:
    watch, market, models, room = report.watch, report.market, report.models, report.room
    return Drawing(
        since=report.since,
        until=report.until,
        strips=[(service.name, service.strip) for service in watch.services] if watch is not None else [],
        hours=market.hours if market is not None and (market.bars or market.signals) else (),
        skills=models.skills[:MOST_LINES] if models is not None else (),
        lines=room.lines if room is not None else (),
        warn=room.warn if room is not None else 0.0,
    )


async def draw(drawing: Drawing, home: Path) -> dict[str, bytes]:
    """The pictures by name, in the order in which they are shown.

    Raises:
        DrawingFailed: the process died, or took too long.
    """
    job = msgspec.json.encode(msgspec.structs.replace(drawing, cache=str(home / CACHE)))
    try:
        async with asyncio.timeout(DRAW_SECONDS), child(_child, job, name="mt5-pictures") as painter:
            return msgspec.msgpack.decode(await painter.hear(), type=dict[str, bytes])
    except ChildDied as error:
        raise DrawingFailed(f"The process that draws died (exit code {error.exitcode}).") from error
    except TimeoutError as error:
        raise DrawingFailed(f"Drawing took longer than {DRAW_SECONDS:.0f} s.") from error


def _child(sender: Any, data: bytes) -> None:
    """The child's whole life: a drawing in, pictures out."""
    drawing = msgspec.json.decode(data, type=Drawing)
    if drawing.cache and "MPLCONFIGDIR" not in os.environ:
        folder = Path(drawing.cache)
        for made in (folder.parent.parent, folder.parent, folder):  # `parents` would leave these open to all
            made.mkdir(mode=0o700, exist_ok=True)
        os.environ["MPLCONFIGDIR"] = drawing.cache
    sender.send_bytes(msgspec.msgpack.encode(paint_all(drawing)))


# --- in the child ------------------------------------------------------------------------------------------------


def paint_all(drawing: Drawing) -> dict[str, bytes]:
    """Every picture that there is something for."""
    out = {}
    if any(look >= 0 for _, strip in drawing.strips for look in strip):
        out[SERVICES] = _services(drawing)
    if drawing.hours:
        out[MARKET] = _market(drawing)
    if any(len(skill.ts) > 1 for skill in drawing.skills):
        out[SKILL] = _skill(drawing.skills)
    lines = [line for line in drawing.lines if len(line.ts) > 1]
    if lines:
        out[ROOM] = _room(lines, drawing.warn)
    return out


def _picture(heights: Sequence[float], paint: Callable[[Sequence[Axes]], None]) -> bytes:
    """Axes below each other, of these heights in inches."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, sum(heights)), dpi=PIXELS, facecolor="white")
        figure.set_layout_engine("constrained", h_pad=0.07)  # so that a title keeps off the times above it
        FigureCanvasAgg(figure)
        found = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": list(heights)})[:, 0]
        axes = list(found)
        for one in axes:
            one.spines[["top", "right"]].set_visible(False)
            one.tick_params(length=3)
        paint(axes)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _hour(ts: float) -> float:
    """Epoch seconds as hours, the pictures' unit of time."""
    return ts / 3_600


def _times(axes: Axes, first: float, last: float) -> None:
    """Ticks at round times between two, in hours since the epoch."""
    step = next((step for step in _HOURS if (last - first) / step <= MOST_TICKS), _HOURS[-1])
    ticks = [step * at for at in range(math.ceil(first / step), math.floor(last / step) + 1)]
    form = "%H:%M" if step < 24 else "%d %b" if last - first < 300 * 24 else "%b %Y"
    labels = [f"{_EPOCH + timedelta(hours=tick):{form}}".lstrip("0" if step >= 24 else "") for tick in ticks]
    axes.set_xticks(ticks, labels)
    axes.set_xlim(first, last)


def _services(drawing: Drawing) -> bytes:
    """A row a service, a cell a slot, in the colour of its worst look."""
    strips = drawing.strips
    first, last = _hour(drawing.since.timestamp()), _hour(drawing.until.timestamp())

    def paint(axes: Sequence[Axes]) -> None:
        (one,) = axes
        for row, (_, strip) in enumerate(strips):
            width = (last - first) / len(strip)
            for look, colour in LOOKS.items():
                spans = [(first + slot * width, width) for slot, found in enumerate(strip) if found == look]
                one.broken_barh(spans, (row - 0.36, 0.72), color=colour, linewidth=0)
        one.set_ylim(len(strips) - 0.45, -0.55)
        one.set_yticks(range(len(strips)), [name for name, _ in strips])
        one.tick_params(axis="y", length=0, labelcolor=INK)
        one.spines["left"].set_visible(False)
        _times(one, first, last)

    return _picture([0.55 + 0.265 * len(strips)], paint)


def _market(drawing: Drawing) -> bytes:
    """Candles that came and signals that were made, by the hour."""
    hours = drawing.hours
    at = [_hour(hour.at.timestamp()) for hour in hours]
    first, last = _hour(drawing.since.timestamp()), _hour(drawing.until.timestamp())

    def stack(axes: Axes, parts: Sequence[tuple[str, str, Sequence[int]]]) -> None:
        floor = [0] * len(at)
        for name, colour, values in parts:
            if any(values):
                axes.bar(at, values, 0.84, floor, align="edge", color=colour, linewidth=0, label=name)
                floor = [low + value for low, value in zip(floor, values, strict=True)]
        axes.yaxis.set_major_locator(_whole_numbers())
        axes.yaxis.set_major_formatter(_thousands())
        if any(floor):
            axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3)
        else:
            axes.set_ylim(0, 1)
            axes.set_yticks([0])
        _times(axes, first, last)

    def paint(axes: Sequence[Axes]) -> None:
        candles, signals = axes
        candles.set_title("candles an hour")
        stack(
            candles,
            (("live", MODEL, [hour.live for hour in hours]), ("history", GREY, [hour.history for hour in hours])),
        )
        signals.set_title("signals an hour")
        stack(
            signals,
            (
                ("up", THIRD, [hour.up for hour in hours]),
                ("down", OTHER, [hour.down for hour in hours]),
                ("no trade", GREY, [hour.none for hour in hours]),
            ),
        )

    return _picture([2.0, 2.0], paint)


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4, integer=True)


def _thousands() -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:,.0f}")


def _skill(skills: Sequence[Skill]) -> bytes:
    """By how much probabilities were better (above 0) or worse than the base rate, over the newest outcomes."""
    drawn = [skill for skill in skills if len(skill.ts) > 1]

    def paint(axes: Sequence[Axes]) -> None:
        (one,) = axes
        one.axhline(0, color=MUTED, linewidth=1.4, linestyle=(0, (5, 3)), zorder=1)
        for skill, colour in zip(drawn, LINES, strict=False):
            ts = [_hour(at) for at in skill.ts]
            one.plot(ts, [1_000 * value for value in skill.values], color=colour, linewidth=2.0, label=skill.version)
        one.set_title("Brier score better than the base rate's by, in 1/1000")
        one.margins(x=0.01)
        if len(drawn) > 1:
            one.legend(loc="best")
        _times(one, *one.get_xlim())

    return _picture([2.6], paint)


def _room(lines: Sequence[Line], warn: float) -> bytes:
    """Free shares of the disks and the database's size, over the month."""
    disks = [line for line in lines if line.full is not None][:MOST_LINES]
    sizes = [line for line in lines if line.full is None][:1]

    def ends(axes: Axes) -> None:
        axes.margins(x=0.01)
        _times(axes, *axes.get_xlim())

    def free(axes: Axes) -> None:
        from matplotlib.ticker import PercentFormatter

        for line, colour in zip(disks, LINES, strict=False):
            axes.plot([_hour(at) for at in line.ts], line.values, color=colour, linewidth=2.0, label=line.name)
        axes.axhline(warn, color=MUTED, linewidth=1.4, linestyle=(0, (5, 3)))
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        axes.set_yticks([0, 0.5, 1])
        axes.set_title("free on disk; dashed: a warning")
        if len(disks) > 1:
            axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=MOST_LINES)
        ends(axes)

    def database(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        (line,) = sizes
        unit, name = next(
            ((u, n) for u, n in ((2**40, "TiB"), (2**30, "GiB")) if max(line.values) >= u), (2**20, "MiB")
        )
        axes.plot([_hour(at) for at in line.ts], [v / unit for v in line.values], color=MODEL, linewidth=2.0)
        axes.set_ylim(0, 1.1 * max(line.values) / unit or 1.0)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_title(f"the database, {name}")
        ends(axes)

    parts: list[Callable[[Axes], None]] = [*([free] if disks else []), *([database] if sizes else [])]

    def paint(axes: Sequence[Axes]) -> None:
        for one, part in zip(axes, parts, strict=True):
            part(one)

    return _picture([1.75] * len(parts), paint)
