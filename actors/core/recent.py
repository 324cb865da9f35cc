"""The newest signals in memory: a bounded ring in stream order, which answers reads and lets streams resume."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from datetime import datetime
from itertools import islice
from operator import attrgetter, itemgetter

from schema.messages import Signal


def newest_first(signals: Iterable[Signal], limit: int) -> list[Signal]:
    """At most ``limit`` signals, the newest bar first, each id once (as made of the later CANDLES message)."""
    unique: dict[str, Signal] = {}
    for signal in signals:
        known = unique.get(signal.id)
        if known is None or known.candles_seq < signal.candles_seq:
            unique[signal.id] = signal
    # The archive's order: ts and candles_seq descending, then id (sorting is stable, so the last key comes first).
    ordered = sorted(unique.values(), key=attrgetter("id"))
    ordered.sort(key=attrgetter("ts", "candles_seq"), reverse=True)
    return ordered[:limit]


class RecentSignals:
    """The last ``capacity`` signals as the SIGNALS stream numbers them.

    ``base`` is the sequence up to which it knows nothing: what follows it is all here.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self._ring: deque[tuple[int, Signal]] = deque()
        self._capacity = capacity
        self.base = 0

    def __len__(self) -> int:
        return len(self._ring)

    @property
    def last_seq(self) -> int:
        """The newest stream sequence taken; ``base`` before the first."""
        return self._ring[-1][0] if self._ring else self.base

    def add(self, stream_seq: int, signal: Signal) -> bool:
        """Takes the next signal of the stream; False for one that was taken before (a redelivery)."""
        if stream_seq <= self.last_seq:
            return False
        if len(self._ring) == self._capacity:
            self.base, _ = self._ring.popleft()
        self._ring.append((stream_seq, signal))
        return True

    def reset(self, base: int = 0) -> None:
        """Forgets everything and expects what follows ``base``: to begin late in a stream, or with one made anew."""
        self._ring.clear()
        self.base = base

    def newest(
        self, limit: int, *, timeframe: str | None = None, symbol: str | None = None, since: datetime | None = None
    ) -> list[Signal]:
        """At most ``limit`` signals that match, ordered by :func:`newest_first`; ``since`` bounds ``ts``, inclusive."""
        return newest_first(
            (
                signal
                for _, signal in self._ring
                if (timeframe is None or signal.timeframe == timeframe)
                and (symbol is None or signal.symbol == symbol)
                and (since is None or signal.ts >= since)
            ),
            limit,
        )

    def after(self, stream_seq: int, limit: int) -> list[tuple[int, Signal]] | None:
        """The first ``limit`` signals after ``stream_seq``, in stream order; None where some of them are gone."""
        if stream_seq < self.base:
            return None
        start = bisect_right(self._ring, stream_seq, key=itemgetter(0))
        return list(islice(self._ring, start, start + limit))
