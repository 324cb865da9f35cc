"""What a payload's candles are: read, judged by clocks and neighbours, and told apart from repeats. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.core.clock import AS_UTC, BEGIN, Conversion, Timeline
from actors.core.ingest import AHEAD, RECENT, SOURCES, Close, Judged, Series, check_payload, judge, read, whole
from schema.settings import Symbol

KEY = ("EURUSD", "M1")
BASE = 1_735_776_000
NOW = float(BASE + 100_000 * 60)
OPEN = {"open": 1.1, "high": 1.2, "low": 1.0, "close": 1.15, "volume": 7}
FAR = {"open": 11.0, "high": 12.0, "low": 10.0, "close": 11.5}
EAST = Conversion(Timeline([(BEGIN, 7_200, "server")]))  # a broker two hours ahead of UTC


def candle(minute: int = 0, **more: Any) -> dict[str, Any]:
    return {"ts": BASE + 60 * minute, "symbol": "EURUSD", "timeframe": "M1"} | OPEN | more


class Feed:
    """One series as a gateway knows it: what is judged as closed is taken as stored."""

    def __init__(self, symbols: Mapping[str, Symbol] | None = None) -> None:
        self.series = {KEY: Series()}
        self.symbols = symbols or {}

    def judge(
        self,
        *rows: dict[str, Any],
        now: float = NOW,
        conversion: Conversion = AS_UTC,
        bases: Mapping[Any, Close] | None = None,
        **beside: Any,
    ) -> Judged:
        payload = read(json.dumps({"items": rows} | beside).encode())
        checked = check_payload(payload, self.symbols)
        return judge(payload, checked, now, self.series, self.symbols, conversion, bases or {})

    def send(self, *rows: dict[str, Any], **options: Any) -> Judged:
        out = self.judge(*rows, **options)
        beside = {name: options[name] for name in ("source", "server_time", "replay") if name in options}
        payload = read(json.dumps({"items": rows} | beside).encode())
        for told in (*out.confirmed.items(), *((key, rows) for key, layers in out.layers.items() for rows in layers)):
            self.series[told[0]].remember(told[1], payload.origin, payload.server_time)
        return out


def taken(out: Judged) -> list[int]:
    """The minutes of the bars that are to be stored."""
    return [(int(row.ts.timestamp()) - BASE) // 60 for layer in out.layers.get(KEY, []) for row in layer]


def refused(out: Judged) -> list[tuple[int, str]]:
    return [(rejection.place, rejection.code) for rejection in out.rejected]


# --- reading -----------------------------------------------------------------------------------------------------


def test_null_items_leave_the_word_to_candles() -> None:
    good, bad = candle(0), candle(1, close="x")
    for beside in ({"items": None, "candles": [good, bad]}, {"candles": [good, bad]}, {"items": [good, bad]}):
        body = json.dumps(beside).encode()
        payload = read(body)
        assert [isinstance(found, str) for found in payload.candles] == [False, True]
        assert whole(body) == ({}, [good, bad])
    body = json.dumps({"items": None, "candles": None} | good).encode()
    assert len(read(body).candles) == 1
    assert whole(body)[1] == [{"items": None, "candles": None} | good]


_ROWS = st.lists(st.sampled_from([candle(0), candle(1, high=0.1), {"close": 3}, 7, None, "x"]), max_size=3)
_SIDES = st.none() | _ROWS | st.just({}) | st.integers(0, 3)


@given(
    st.fixed_dictionaries({}, optional={"items": _SIDES, "candles": _SIDES, "source": st.just("A")}),
    st.booleans(),
    st.sampled_from(["", " \r\n"]),
)
def test_what_is_kept_of_a_payload_has_its_candles_in_their_places(
    beside: dict[str, Any], one: bool, space: str
) -> None:
    value = (candle(2) | beside) if one else beside
    body = (space + json.dumps(value, indent=1)).encode()
    try:
        payload = read(body)
    except Exception:  # what is no payload has nothing to keep
        return
    kept = whole(body)[1]
    assert len(kept) == len(payload.candles)
    for found, sent in zip(payload.candles, kept, strict=True):
        assert isinstance(found, str) or found.close == sent["close"]


def test_what_read_passes_over_is_kept_as_its_text() -> None:
    body = b'{"items": [{"close": 1, "note": 1e999}], "more": 1e999, "deep": %s}' % (b"[" * 400 + b"]" * 400)
    assert whole(body) == (
        {"more": "1e999", "deep": "[" * 400 + "]" * 400},
        ['{"close": 1, "note": 1e999}'],
    )


# --- the future --------------------------------------------------------------------------------------------------


def test_one_bar_ahead_is_taken_and_more_is_refused() -> None:
    for ahead, code in ((60.0, None), (60.5, "future"), (120.0, "future")):
        out = Feed().judge(candle(0), now=BASE - ahead)
        assert refused(out) == ([(0, code)] if code else [])
        assert len(out.forming) == (0 if code else 1)


def test_the_future_is_judged_by_our_clock_and_not_by_the_senders() -> None:
    fast = {"server_time": int(NOW) + 7_200, "gmt_time": int(NOW) + 7_200}
    at = int(NOW - BASE) // 60
    out = Feed().judge(candle(at - 1), candle(at, closed=True), candle(at + 100, closed=True), **fast)
    assert (taken(out), refused(out)) == ([at - 1], [(2, "future")])
    assert [bar.index for bar in out.forming] == [1], "its end is more than five seconds ahead of our clock"
    # In broker time as well: what counts is what the times mean.
    out = Feed().judge(candle(at + 120, closed=True), candle(at + 220), conversion=EAST, **fast)
    assert (taken(out), refused(out), len(out.forming)) == ([], [(1, "future")], 1)


def test_a_replays_now_stands_in_for_ours() -> None:
    out = Feed().judge(candle(0), candle(1), candle(3), replay=True, gmt_time=BASE + 60)
    assert (taken(out), [bar.index for bar in out.forming], refused(out)) == ([0], [1], [(2, "future")])
    assert taken(Feed().judge(candle(0), candle(200_000), replay=True)) == [0, 200_000]


def test_a_refused_bar_closes_no_other() -> None:
    at = int(NOW - BASE) // 60
    out = Feed().judge(candle(at), candle(at + 2), now=NOW + 30)
    assert (taken(out), refused(out), len(out.forming)) == ([], [(1, "future")], 1)


@pytest.mark.parametrize(
    ("ahead", "closes"), [(-7_200, False), (0, False), (60, True), (AHEAD, True), (AHEAD + 1, False)]
)
def test_a_payloads_clock_closes_bars_unless_it_is_from_the_future(ahead: float, closes: bool) -> None:
    at = int(NOW - BASE) // 60
    out = Feed().judge(candle(at), server_time=int(NOW + ahead))
    assert bool(taken(out)) == closes
    assert bool(out.forming) != closes


def test_who_sends_forming_bars_is_known_by_source() -> None:
    feed = Feed()
    feed.send(candle(0, closed=False), source="live")
    assert taken(feed.send(candle(1), source="live")) == []
    assert taken(feed.send(candle(2), source="backup")) == [2]
    assert taken(feed.send(candle(3))) == [3]
    assert taken(feed.send(candle(4), candle(5), source="live")) == [4]
    for n in range(2 * SOURCES):
        feed.send(candle(6, closed=False), source=f"S{n}")
    assert len(feed.series[KEY].forming_by) == SOURCES


# --- jumps -------------------------------------------------------------------------------------------------------


def test_the_same_bar_again_makes_no_split() -> None:
    feed = Feed()
    feed.send(candle(0))
    for _ in range(4):
        assert refused(feed.send(candle(1, **FAR))) == [(0, "jump")]
    assert refused(feed.send(candle(1, **FAR), candle(1, **FAR), candle(1, **FAR, volume=8))) == [
        (i, "jump") for i in range(3)
    ]
    assert refused(feed.send(candle(2, **FAR), candle(1, **FAR))) == [(0, "jump"), (1, "jump")]
    assert taken(feed.send(candle(3, **FAR))) == [3]


def test_three_bars_in_a_row_are_a_split_however_they_are_sent() -> None:
    feed = Feed()
    feed.send(candle(0))
    assert refused(feed.send(candle(1, **FAR))) == [(0, "jump")]
    assert taken(feed.send(candle(2, **FAR), candle(3, **FAR))) == [2, 3]
    feed = Feed()
    feed.send(candle(0))
    assert taken(feed.send(*(candle(n, **FAR) for n in range(1, 4)))) == [1, 2, 3]


def test_bars_with_another_between_them_are_not_in_a_row() -> None:
    feed = Feed()
    feed.send(candle(0), candle(2), candle(4))
    for minute in (1, 3, 5, 1, 3):
        assert refused(feed.send(candle(minute, **FAR))) == [(0, "jump")]
    feed = Feed()
    feed.send(candle(0))
    assert len(refused(feed.send(candle(1, **FAR), candle(2, **FAR)))) == 2
    assert taken(feed.send(candle(3))) == [3]
    assert refused(feed.send(candle(4, **FAR))) == [(0, "jump")]
    out = feed.send(candle(3), candle(4, **FAR), candle(5, **FAR), candle(6))
    assert (taken(out), out.duplicates, len(refused(out))) == ([6], 1, 2)


def test_a_forming_bar_does_not_agree_with_anything() -> None:
    feed = Feed()
    feed.send(candle(0))
    out = feed.send(candle(1, **FAR), candle(2, **FAR), candle(3, **FAR, closed=False))
    assert (refused(out), len(out.forming)) == ([(0, "jump"), (1, "jump")], 1)


def test_a_split_whose_publish_failed_is_still_one_when_it_is_sent_again() -> None:
    feed = Feed()
    feed.send(candle(0))
    for minute in (1, 2):
        feed.send(candle(minute, **FAR))
    for _ in range(2):
        assert taken(feed.judge(candle(3, **FAR))) == [3]


def test_a_bar_older_than_memory_is_measured_by_the_nearest_close() -> None:
    feed = Feed()
    feed.send(*(candle(n) for n in range(100_000 - 2 * RECENT, 100_000 - 1)))
    thousandfold = {name: 1_000 * OPEN[name] for name in ("open", "high", "low", "close")}
    old = candle(100_000 - 200)
    out = feed.judge(old | thousandfold)
    assert (refused(out), out.unsure) == ([(0, "jump")], [(KEY, old["ts"])])
    assert taken(feed.judge(old)) == [99_800]
    # What the archive knows of the time before it counts for more.
    told = {(KEY, old["ts"]): Close(old["ts"] - 600, 1_150.0)}
    out = feed.judge(old | thousandfold, bases=told)
    assert (taken(out), out.unsure) == ([99_800], [])
    out = feed.judge(old, bases=told)
    assert (refused(out), out.unsure) == ([(0, "jump")], [])
    # History that comes in blocks agrees with itself, and years ago a close of today says nothing.
    assert taken(feed.judge(*(candle(n) | thousandfold for n in range(3)))) == [0, 1, 2]
    assert taken(feed.judge(candle(0) | thousandfold)) == [0]


def test_a_late_bar_beside_known_ones_is_measured_by_the_one_before_it() -> None:
    feed = Feed()
    feed.send(candle(0), candle(1), candle(3, **FAR), candle(4, **FAR), candle(5, **FAR), candle(7, **FAR))
    assert taken(feed.judge(candle(6, **FAR))) == [6]
    assert refused(feed.judge(candle(2, **FAR | {"open": 30.0, "high": 30.0, "low": 30.0, "close": 30.0}))) == [
        (0, "jump")
    ]
    # A repeat of long ago in the same payload is not what the newest bar is measured by.
    assert taken(feed.judge(candle(0), candle(8, **FAR))) == [8]


def test_a_symbol_below_zero_may_not_jump_where_prices_are_positive() -> None:
    feed = Feed({"EURUSD": Symbol(allow_non_positive=True)})
    assert taken(feed.send(candle(0))) == [0]
    assert refused(feed.send(candle(1, **FAR))) == [(0, "jump")]
    below = {"open": 1.0, "high": 1.1, "low": -38.0, "close": -37.6}
    assert taken(feed.send(candle(2, **below))) == [2]
    assert taken(feed.send(candle(3, **FAR))) == [3], "a price below zero has no half and no double"


# --- versions ----------------------------------------------------------------------------------------------------


def test_a_repeat_with_a_newer_clock_is_logged_where_a_bar_has_had_other_values() -> None:
    feed = Feed()
    other = {"close": 1.16}
    assert taken(feed.send(candle(0), server_time=BASE + 100)) == [0]
    out = feed.send(candle(0), server_time=BASE + 110)
    assert (out.duplicates, out.confirmed) == (1, {}), "terminals repeat their newest bars all the time"
    assert feed.send(candle(0, **other), server_time=BASE + 105).duplicates == 1, "older than what was confirmed"
    out = feed.send(candle(0), candle(0), server_time=BASE + 120)
    assert (out.duplicates, [len(rows) for rows in out.confirmed.values()], out.layers) == (2, [1], {})
    out = feed.send(candle(0), server_time=BASE + 120)
    assert (out.duplicates, out.confirmed) == (1, {})
    assert taken(feed.send(candle(0, **other), server_time=BASE + 130)) == [0]
    assert len(feed.send(candle(0, **other), server_time=BASE + 140).confirmed) == 1
    assert feed.send(candle(0), server_time=BASE + 135).duplicates == 1


def test_judging_the_same_twice_gives_the_same() -> None:
    feed = Feed()
    feed.send(candle(0), server_time=BASE + 70)
    feed.send(candle(0, close=1.16), server_time=BASE + 80)
    rows = (candle(0, close=1.16), candle(1, **FAR), candle(2), candle(3, closed=False))
    first = feed.judge(*rows, server_time=BASE + 180)
    second = feed.judge(*rows, server_time=BASE + 180)
    assert (first.layers, first.confirmed, first.rejected, first.duplicates) == (
        second.layers,
        second.confirmed,
        second.rejected,
        second.duplicates,
    )
    assert first.confirmed and first.layers and first.rejected


def test_sources_without_end_take_no_memory_without_end() -> None:
    feed = Feed()
    for n in range(2 * SOURCES):
        feed.send(candle(0), source=f"S{n}")
    (known,) = feed.series[KEY].recent.values()
    assert len(known.versions) == SOURCES
