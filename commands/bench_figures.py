"""What a benchmark says: figures beside their peers', each ratio beside its promise, and how rounds become figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any, Final, Literal

from msgspec import Struct

COLUMNS: Final = ("benchmark", "what", "ours", "peer", "theirs", "ratio", "quartiles", "promise", "")


class Promise(Struct, frozen=True):
    """``of`` is what the limit binds: the ratio to the peer, or our own figure."""

    text: str
    limit: float
    sense: Literal["at most", "at least"]
    of: Literal["ratio", "ours"] = "ratio"

    def holds(self, value: float) -> bool:
        return value <= self.limit if self.sense == "at most" else value >= self.limit

    def short_by(self, value: float) -> float:
        """How far off a value is that does not hold, as a part of the limit."""
        return abs(value - self.limit) / self.limit


class Figure(Struct, frozen=True, kw_only=True):
    """One line of the table. ``ours`` and ``theirs`` are medians over rounds, ``ratio`` is the median of the rounds' own
    ratios, ``quartiles`` those of what the promise binds. ``why_not`` says why something could not be measured.
    """

    name: str
    what: str
    unit: str
    ours: float | None = None
    peer: str | None = None
    theirs: float | None = None
    ratio: float | None = None
    quartiles: tuple[float, float] | None = None
    rounds: int = 0
    promise: Promise | None = None
    why_not: str = ""

    @property
    def judged(self) -> float | None:
        if self.promise is None:
            return None
        return self.ratio if self.promise.of == "ratio" else self.ours

    @property
    def holds(self) -> bool | None:
        """None where nothing is promised, or where it could not be measured."""
        value = self.judged
        return None if value is None or self.promise is None else self.promise.holds(value)


def compare(
    name: str,
    what: str,
    unit: str,
    ours: Sequence[float],
    peer: str,
    theirs: Sequence[float],
    promise: Promise | None,
    *,
    faster: bool = False,
) -> Figure:
    """A figure from rounds measured in pairs. The ratio is ours / theirs; ``faster`` turns it over."""
    ratios = [b / a if faster else a / b for a, b in zip(ours, theirs, strict=True)]
    return Figure(
        name=name,
        what=what,
        unit=unit,
        ours=median(ours),
        peer=peer,
        theirs=median(theirs),
        ratio=median(ratios),
        quartiles=quartiles(ratios if promise is None or promise.of == "ratio" else ours),
        rounds=len(ratios),
        promise=promise,
    )


def alone(name: str, what: str, unit: str, ours: Sequence[float], promise: Promise | None = None) -> Figure:
    """A figure without a peer."""
    return Figure(
        name=name,
        what=what,
        unit=unit,
        ours=median(ours),
        quartiles=quartiles(ours) if len(ours) > 1 else None,
        rounds=len(ours),
        promise=promise,
    )


def quantile(values: Sequence[float], share: float) -> float:
    """The value at ``share`` of the sorted values, as the peers take theirs."""
    ranked = sorted(values)
    return ranked[min(int(len(ranked) * share), len(ranked) - 1)]


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Both quartiles, interpolated."""
    ranked = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ranked) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ranked) - 1)
        return ranked[low] + (place - low) * (ranked[high] - ranked[low])

    return at(0.25), at(0.75)


# --- how it is told ----------------------------------------------------------------------------------------------


def table(figures: Sequence[Figure]) -> Iterator[tuple[Any, ...]]:
    """Rows for :data:`COLUMNS`."""
    for figure in figures:
        yield (
            figure.name,
            figure.what,
            amount(figure.ours, figure.unit),
            figure.peer,
            amount(figure.theirs, figure.unit),
            None if figure.ratio is None else f"{number(figure.ratio)} ×",
            None if figure.quartiles is None else " – ".join(map(number, figure.quartiles)),
            figure.promise.text if figure.promise else None,
            verdict(figure),
        )


def verdict(figure: Figure) -> str:
    if figure.promise is None:
        return figure.why_not
    return {True: "holds", False: "MISSED", None: "not measured"}[figure.holds]


def misses(figures: Sequence[Figure]) -> list[str]:
    """A sentence for each promise that does not hold or could not be judged."""
    said = []
    for figure in figures:
        if figure.promise is None or figure.holds:
            continue
        value = figure.judged
        if value is None:
            said.append(f"{figure.name}, {figure.what}: not measured, {figure.why_not or 'for want of its peer'}")
        else:
            shown = f"{number(value)} ×" if figure.promise.of == "ratio" else amount(value, figure.unit)
            said.append(
                f"{figure.name}, {figure.what}: {shown} where {figure.promise.text} is promised, "
                f"{figure.promise.short_by(value):.0%} off."
            )
    return said


def amount(value: float | None, unit: str) -> str | None:
    return None if value is None else f"{number(value)} {unit}"


def number(value: float) -> str:
    """Three digits that say something."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def as_json(figure: Figure) -> dict[str, Any]:
    """A figure for machines: every field, and whether the promise holds."""
    from msgspec import to_builtins

    built: dict[str, Any] = to_builtins(figure)
    return built | {"holds": figure.holds}
