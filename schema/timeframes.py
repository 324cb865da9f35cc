"""MetaTrader 5's timeframes: their names, lengths and the spellings that senders use for them."""

from __future__ import annotations

from typing import Final

# ENUM_TIMEFRAMES of MQL5. A month's length varies: its entry is the longest one, used only where a span is bounded.
SECONDS: Final[dict[str, int]] = {
    "M1": 60,
    "M2": 120,
    "M3": 180,
    "M4": 240,
    "M5": 300,
    "M6": 360,
    "M10": 600,
    "M12": 720,
    "M15": 900,
    "M20": 1_200,
    "M30": 1_800,
    "H1": 3_600,
    "H2": 7_200,
    "H3": 10_800,
    "H4": 14_400,
    "H6": 21_600,
    "H8": 28_800,
    "H12": 43_200,
    "D1": 86_400,
    "W1": 604_800,
    "MN1": 31 * 86_400,
}

TIMEFRAMES: Final[tuple[str, ...]] = tuple(SECONDS)


def _spellings() -> dict[str, str]:
    names = {name: name for name in SECONDS}
    names |= {name.lower(): name for name in SECONDS}
    names |= {f"PERIOD_{name}": name for name in SECONDS}
    for name in SECONDS:
        if name != "MN1":
            names[f"{name[1:]}{name[0].lower()}"] = name  # 1m, 15m, 1h, 4h, 1d, 1w
    names |= {"1M": "MN1", "1mo": "MN1", "MN": "MN1", "mn": "MN1"}
    return names


_SPELLINGS: Final = _spellings()


def canonical(name: str) -> str | None:
    """MT5's name for a timeframe (``15m`` gives ``M15``), or None where it is unknown."""
    return _SPELLINGS.get(name)
