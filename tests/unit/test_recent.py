"""The ring of newest signals against a plain list of everything that was ever added."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.core.recent import RecentSignals, newest_first
from tests.gateway import MINUTE, T0, signal


@given(
    gaps=st.lists(st.integers(1, 3), max_size=60),
    capacity=st.integers(1, 20),
    base=st.integers(0, 5),
    after=st.integers(0, 200),
    limit=st.integers(1, 30),
)
def test_after_is_what_a_complete_log_would_give_or_none(
    gaps: list[int], capacity: int, base: int, after: int, limit: int
) -> None:
    ring = RecentSignals(capacity)
    ring.reset(base)
    log = []
    seq = base
    for bar, gap in enumerate(gaps):
        seq += gap
        log.append((seq, signal(bar)))
        assert ring.add(*log[-1])
    assert len(ring) == min(capacity, len(log))
    assert ring.last_seq == seq
    oldest_known = log[-capacity - 1][0] if len(log) > capacity else base
    assert ring.base == oldest_known
    expected = [item for item in log if item[0] > after][:limit]
    assert ring.after(after, limit) == (expected if after >= oldest_known else None)


def test_a_redelivered_signal_has_no_effect() -> None:
    ring = RecentSignals(4)
    assert ring.add(7, signal(0))
    assert not ring.add(7, signal(1))
    assert not ring.add(3, signal(2))
    assert ring.after(0, 10) == [(7, signal(0))]


def test_a_stream_made_anew_is_followed_after_a_reset() -> None:
    ring = RecentSignals(4)
    ring.add(900, signal(0))
    ring.reset()
    assert ring.last_seq == 0
    assert ring.add(1, signal(1))
    assert ring.newest(10) == [signal(1)]


def test_newest_filters_and_orders_by_bar_whatever_the_order_of_arrival() -> None:
    ring = RecentSignals(100)
    arrivals = [signal(5), signal(2), signal(9, symbol="GBPUSD"), signal(7, timeframe="M5"), signal(8)]
    for seq, item in enumerate(arrivals, start=1):
        ring.add(seq, item)
    assert ring.newest(10, timeframe="M1", symbol="EURUSD") == [signal(8), signal(5), signal(2)]
    assert ring.newest(2, timeframe="M1") == [signal(9, symbol="GBPUSD"), signal(8)]
    assert ring.newest(10, symbol="EURUSD", since=T0 + 7 * MINUTE) == [signal(8), signal(7, timeframe="M5")]


def test_one_id_appears_once_as_made_of_the_later_candles() -> None:
    early, late = signal(1, seq=10), signal(1, seq=20)
    assert newest_first([late, early], 5) == [late]
    assert newest_first([early, late], 5) == [late]


def test_of_one_bar_the_later_decision_comes_first_then_the_id() -> None:
    revised = signal(1, seq=9, id="z")
    a, b = signal(1, seq=2, id="a"), signal(1, seq=2, id="b")
    assert newest_first([b, a, revised], 5) == [revised, a, b]


def test_a_ring_needs_room() -> None:
    with pytest.raises(ValueError, match="capacity"):
        RecentSignals(0)
