"""A model's report in plain words: what its figures allow one to say, and no more than that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal

from bus.store import ModelRecord
from commands.report_pictures import interval, number, rows_of

Tone = Literal["good", "open", "bad"]

STATES: Final = {
    "champion": "It speaks: its signals say up, down or nothing.",
    "provisional": "It serves on trial: it gives probabilities, and no trades until it has proved itself.",
    "shadow": "It is followed in silence beside the version that serves.",
    "candidate": "It waits: it has not served.",
    "retired": "It no longer serves.",
    "refused": "It was refused and does not serve.",
}
DASH: Final = "–"


@dataclass(frozen=True, slots=True)
class Scale:
    """A figure on a line: its value and interval, the mark to compare it with, and perhaps a rival's value, each by name."""

    value: float
    span: tuple[float, float] | None
    against: tuple[str, float]
    rival: tuple[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Tile:
    """One question with its answer: a big figure, what it means, and where it lies."""

    question: str
    figure: str
    answer: str
    tone: Tone
    detail: str
    scale: Scale | None = None


def headline(report: Mapping[str, Any], threshold: float | None) -> str:
    """The report in one sentence."""
    skill = skill_of(report)
    edge = threshold is not None
    if skill is None:
        return "Nothing is known of how well it predicts."
    if skill == "good":
        return "It ranks better than chance, " + (
            "and its surest signals have earned more than they cost."
            if edge
            else "but no threshold has earned more than it costs."
            if costs_known(report)
            else "and what trading it would cost is not known."
        )
    if skill == "bad":
        return "It ranks worse than chance: what it calls a rise falls more often than not."
    return "Its ranking cannot be told from chance" + (
        ", though its surest signals have earned more than they cost." if edge else ", and it has no edge to trade."
    )


def skill_of(report: Mapping[str, Any]) -> Tone | None:
    """Whether the AUC's interval lies above 0.5, around it or below; None where it is not known."""
    span = interval(report.get("auc_ci"))
    if span is None:
        return None
    return "good" if span[0] > 0.5 else "bad" if span[1] < 0.5 else "open"


def costs_known(report: Mapping[str, Any]) -> bool:
    """Whether any threshold's net return is known."""
    return bool(rows_of(report.get("candidates"), "net_mean"))


def why(record: ModelRecord) -> str:
    """Who put it into its state, when, and for what reason."""
    by = {"trainer": "the trainer", "scorer": "the scorer", "emitter": "the emitter"}.get(record.by, record.by)
    when = f" on {day(record.activated_at)}" if record.activated_at is not None else ""
    reason = f": {record.reason}" if record.reason else ""
    return f"Put there by {by}{when}{reason}."


def day(at: datetime) -> str:
    return f"{at:%d %B %Y, %H:%M} UTC".lstrip("0")


def share(value: float | None, digits: int = 1) -> str:
    return DASH if value is None else f"{100 * value:.{digits}f} %"


def plain(value: float | None, digits: int) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def basis(value: float | None) -> str:
    """A fraction in basis points, which are hundredths of a percent."""
    return DASH if value is None else f"{1e4 * value:+.2f} bp".replace("-", "\u2212")


def span_words(span: tuple[float, float] | None, digits: int) -> str:
    return "interval unknown" if span is None else f"95 % interval {span[0]:.{digits}f} to {span[1]:.{digits}f}"


def tiles(report: Mapping[str, Any], threshold: float | None) -> list[Tile]:
    """The four questions that decide whether a version is worth listening to."""
    return [_ranking(report), _probabilities(report), _trading(report, threshold), _guard(report)]


def _ranking(report: Mapping[str, Any]) -> Tile:
    auc, span = number(report.get("auc")), interval(report.get("auc_ci"))
    question = "Does it rank rises above falls?"
    if auc is None:
        return Tile(question, DASH, "Not known.", "open", "This version's manifest has no AUC.")
    rival = _other(report, "logistic", "auc")
    tone = skill_of(report) or "open"
    answer = {"good": "Better than chance.", "open": "Not to be told from chance.", "bad": "Worse than chance."}[tone]
    near = span is not None and any(abs(end - 0.5) < 0.0005 for end in span)  # rounded, it would say nothing
    detail = f"AUC out of sample, {span_words(span, 4 if near else 3)}. Chance is 0.5"
    detail += f"; a logistic regression reaches {rival:.3f}." if rival is not None else "."
    scale = Scale(auc, span, ("chance", 0.5), None if rival is None else ("logistic regression", rival))
    return Tile(question, f"{auc:.3f}", answer, tone, detail, scale)


def _probabilities(report: Mapping[str, Any]) -> Tile:
    brier, span, base = (
        number(report.get("brier")),
        interval(report.get("brier_ci")),
        _other(report, "base_rate", "brier"),
    )
    question = "Are its probabilities worth more than the base rate?"
    if brier is None or base is None:
        return Tile(question, DASH, "Not known.", "open", "This version's manifest has no Brier scores to compare.")
    better = base - brier
    inside = span is not None and span[0] <= base <= span[1]
    tone: Tone = "open" if inside or span is None else "good" if better > 0 else "bad"
    answer = {"good": "Yes.", "bad": "No, they are worse.", "open": "Too close to tell."}[tone]
    side = "better" if better >= 0 else "worse"
    detail = (
        f"Brier score (0 is perfect), {span_words(span, 5)}. Always saying the base rate gives {base:.5f}: "
        f"{abs(better):.5f} {side}."
    )
    return Tile(question, f"{brier:.5f}", answer, tone, detail, Scale(brier, span, ("base rate", base)))


def _trading(report: Mapping[str, Any], threshold: float | None) -> Tile:
    question = "Does trading on it pay?"
    if threshold is None and not costs_known(report):
        return Tile(
            question,
            "no edge",
            "Nobody knows: its costs are unknown.",
            "open",
            'Without a spread no return is net. Set [symbols."…"] point and spread in mt5.toml and train again. It abstains.',
        )
    if threshold is None:
        return Tile(
            question,
            "no edge",
            "Not after costs.",
            "bad",
            "No threshold has a mean net return whose 95 % lower bound is above 0 over at least 200 trades. It abstains.",
        )
    rows = rows_of(report.get("candidates"), "threshold")
    chosen: Mapping[str, Any] = next((row for row in rows if row["threshold"] == threshold), {})
    net, trades = number(chosen.get("net_mean")), number(chosen.get("trades"))
    span = interval(chosen.get("net_ci"))
    detail = f"Mean return of a trade net of cost at the threshold {threshold:.4f}"
    detail += f", over {trades:,.0f} trades out of sample" if trades is not None else ""
    detail += f"; 95 % interval {basis(span[0])} to {basis(span[1])}." if span is not None else "."
    scale = None if net is None else Scale(net, span, ("nothing earned", 0.0))
    return Tile(question, basis(net), "It has an edge.", "good", detail, scale)


def _guard(report: Mapping[str, Any]) -> Tile:
    question = "Could it have seen the future?"
    guard = report.get("guard")
    if not isinstance(guard, Mapping) or not guard:
        return Tile(
            question, DASH, "Not checked.", "open", "This version was trained by a release without the leak guard."
        )
    return Tile(
        question,
        "passed",
        "No leak was found.",
        "good",
        "Inputs from truncated history were equal to the bit; shuffled labels and a random walk taught it nothing.",
    )


def _other(report: Mapping[str, Any], rival: str, figure: str) -> float | None:
    """A baseline's figure, where the report has it."""
    beside = report.get("baselines")
    found = beside.get(rival) if isinstance(beside, Mapping) else None
    found = found if isinstance(found, Mapping) else report.get(rival)
    return number(found.get(figure)) if isinstance(found, Mapping) else None
