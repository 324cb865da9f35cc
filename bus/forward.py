"""CANDLES counts forward only: it is the one stream that cannot be made again, and everything refers to its sequences."""

from __future__ import annotations


class WentBackwards(Exception):
    """CANDLES ends earlier than what was read from it: it has lost acknowledged candles."""


def check_forward(last: int, known: int) -> None:
    """Raises WentBackwards where CANDLES ends at ``last`` although ``known`` was read from it.

    To go on would give the lost sequences to other candles: the archive, which never goes back in sequence, would
    refuse these without a word.
    """
    if last < known:
        raise WentBackwards(
            f"CANDLES ends at {last}, but candles up to {known} were read from it: its store is an older copy, or its "
            f"disk lost writes. Put the newer store back, or run `mt5 topology forward`, which lets CANDLES count on "
            f"from {known + 1} and tells what is lost."
        )
