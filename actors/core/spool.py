"""The layout in which a training set travels from the archive to the training process: fixed-size binary rows.

Light on purpose: who writes it need not import numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from struct import Struct
from typing import Any, Final

# After ts (int64, epoch seconds): float64 each, NaN for null.
FIELDS: Final = (
    *("close", "spread", "rsi", "macd", "macd_signal", "macd_hist", "atr", "ma60", "ret_1", "fwd_ret_5"),
    *("entry_open", "entry_spread", "entry_close", "exit_spread", "exit_close"),
)
BAR_FIELDS: Final = ("high", "low", "close")
_ROW: Final = Struct(f"<q{len(FIELDS)}d")
_BAR: Final = Struct(f"<q{len(BAR_FIELDS)}d")
_NAN: Final = float("nan")


def pack(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows of the training set, ``ts`` an aware datetime, as bytes."""
    return _pack(_ROW, FIELDS, rows)


def pack_bars(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Bars of a series, from which its features can be computed again."""
    return _pack(_BAR, BAR_FIELDS, rows)


def _pack(layout: Struct, fields: tuple[str, ...], rows: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(
        layout.pack(int(row["ts"].timestamp()), *(_NAN if row[name] is None else row[name] for name in fields))
        for row in rows
    )
