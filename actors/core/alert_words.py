"""How incidents are told: titles and lines, short enough to be read at night."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Final

from actors.core.incidents import Case, Watch

MOST_SHOWN: Final = 20  # lines of a notice about single checks
MOST_TITLE: Final = 160

_SIZES: Final = {"d": 86_400, "h": 3_600, "min": 60, "s": 1}


def title(loud: Sequence[Watch]) -> str:
    """What the first of them says, and how many more there are."""
    more = f" (and {len(loud) - 1} more)" if len(loud) > 1 else ""
    text = f"{loud[0].check}: {loud[0].message}"
    return (text if len(text) <= MOST_TITLE else f"{text[: MOST_TITLE - 1]}…") + more


def back(case: Case) -> list[str]:
    """Which of an incident's checks do not fail any more."""
    names = list(case.ended)
    more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return [f"Works again: {', '.join(names[:MOST_SHOWN])}{more}."] if names else []


def shown(lines: Iterable[str]) -> list[str]:
    """The first of many lines, and how many more there are."""
    every = list(lines)
    more = [f"… and {len(every) - MOST_SHOWN} more."] if len(every) > MOST_SHOWN else []
    return every[:MOST_SHOWN] + more


def moment(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def duration(seconds: float) -> str:
    """In the two units that matter: ``2 h 5 min``."""
    whole = max(0, round(seconds))
    parts = []
    for unit, size in _SIZES.items():
        count, whole = divmod(whole, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"
