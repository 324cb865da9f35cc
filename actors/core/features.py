"""Indicators of one series, bar by bar: the same bits whether bars come one at a time or in blocks.

Each recurrence is written in the very order of operations of TA-Lib's C source (``ta_RSI.c``, ``ta_MACD.c``,
``ta_ATR.c``, ``ta_SMA.c``, ``ta_ROCP.c``), so that values agree to the last bits even where two averages nearly cancel.
Only recurrences run in the loop; everything that is elementwise is done by numpy, whose float64 operations round as
Python's do. Prices are in the symbol's units; ``rsi`` runs from 0 to 100; ``ret_1`` and ``fwd_ret_5`` are fractions.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from msgspec import Struct, field
from numpy.typing import NDArray

from actors.core.timeframe import FORWARD_BARS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RSI_PERIOD: Final = 14
ATR_PERIOD: Final = 14
FAST: Final = 12
SLOW: Final = 26
SIGNAL: Final = 9
MA: Final = 60
READY_AFTER: Final = 300  # bars; RSI(14) is then within 3e-8 of its value over the whole history

_K_FAST: Final = 2.0 / (FAST + 1)
_K_SLOW: Final = 2.0 / (SLOW + 1)
_K_SIGNAL: Final = 2.0 / (SIGNAL + 1)
_EPSILON: Final = 1e-14  # TA-Lib's TA_IS_ZERO
_MACD_FROM: Final = SLOW  # bars until the first MACD line, which TA-Lib does not output yet
_SIGNAL_FROM: Final = SLOW + SIGNAL - 1  # bars until TA-Lib outputs macd, macd_signal and macd_hist

Values = tuple[float | None, float | None, float | None, float | None, float | None, float | None, float | None]
"""rsi, macd, macd_signal, macd_hist, atr, ma60, ret_1."""


def _array(values: list[float]) -> Floats:
    # Packing is three times faster than numpy's own conversion of a list of floats.
    return np.frombuffer(struct.pack(f"{len(values)}d", *values), np.float64)


def _each(values: Floats) -> Any:
    # Its floats one by one: a buffer makes each when it is needed, faster than a list of them that is used once.
    return values.data


class Columns(Struct):
    """Indicators of consecutive bars: lists of equal length, None where an indicator has no value yet."""

    rsi: list[float | None]
    macd: list[float | None]
    macd_signal: list[float | None]
    macd_hist: list[float | None]
    atr: list[float | None]
    ma60: list[float | None]
    ret_1: list[float | None]


class FeatureState(Struct):
    """Everything that the next bar's indicators need: about 1 KB a series, round-trips through JSON bit by bit.

    ``closes`` is a ring: after ``bars`` bars, slot ``bars % 60`` holds the oldest close. ``times`` holds the open
    times (epoch seconds) of the newest five bars, oldest first. Until their first value, ``gain``, ``loss``, ``atr``
    and ``signal`` hold plain sums.
    """

    bars: int = 0
    close: float = 0.0
    gain: float = 0.0
    loss: float = 0.0
    fast: float = 0.0
    slow: float = 0.0
    signal: float = 0.0
    atr: float = 0.0
    total: float = 0.0
    closes: list[float] = field(default_factory=lambda: [0.0] * MA)
    times: list[int] = field(default_factory=list)

    @property
    def last_ts(self) -> int | None:
        """Open time of the newest bar (epoch seconds), None before the first."""
        return self.times[-1] if self.times else None

    def forward(self, ts: int, close: float, span: int) -> tuple[int, float | None] | None:
        """The label that a bar at ``ts`` completes: (open time of the fifth bar before it, ``fwd_ret_5``).

        None while there are fewer than five bars; the return is None where the five bars span more than ``span``
        seconds or the base is not positive. Call it before :meth:`update`.
        """
        if len(self.times) < FORWARD_BARS:
            return None
        then = self.times[0]
        base = self.closes[(self.bars - FORWARD_BARS) % MA]
        if ts - then > span or base <= 0.0:
            return then, None
        return then, (close - base) / base

    def update(self, ts: int, high: float, low: float, close: float) -> Values:
        """Takes one bar, later than all before, and gives its indicators."""
        n = self.bars = self.bars + 1
        closes = self.closes
        slot = (n - 1) % MA
        previous = self.close
        ret: float | None = None

        # SMA(60): a running sum, the oldest close leaves after the average was taken.
        total = self.total + close
        ma: float | None = None
        closes[slot] = close
        if n >= MA:
            ma = total / MA
            total -= closes[n % MA]
        self.total = total

        rsi: float | None = None
        atr: float | None = None
        if n > 1:
            if previous > 0.0:
                ret = (close - previous) / previous
            # RSI: Wilder's averages of gains and losses, seeded by plain means.
            gain, loss = self.gain, self.loss
            if n > RSI_PERIOD + 1:
                gain *= RSI_PERIOD - 1
                loss *= RSI_PERIOD - 1
            change = close - previous
            if change < 0.0:
                loss -= change
            else:
                gain += change
            if n > RSI_PERIOD:
                gain /= RSI_PERIOD
                loss /= RSI_PERIOD
                both = gain + loss
                rsi = 0.0 if -_EPSILON < both < _EPSILON else 100.0 * (gain / both)
            self.gain, self.loss = gain, loss
            # ATR: Wilder's average of the true range, seeded by a plain mean.
            reach = high - low
            up = abs(previous - high)
            down = abs(previous - low)
            if up > reach:
                reach = up
            if down > reach:
                reach = down
            if n > ATR_PERIOD + 1:
                self.atr = (self.atr * (ATR_PERIOD - 1) + reach) / ATR_PERIOD
                atr = self.atr
            elif n == ATR_PERIOD + 1:
                self.atr = (self.atr + reach) / ATR_PERIOD
                atr = self.atr
            else:
                self.atr += reach
        # MACD: both averages are seeded by plain means that end at the 26th bar, as TA-Lib does it.
        macd: float | None = None
        signal: float | None = None
        hist: float | None = None
        if n >= _MACD_FROM:
            if n == _MACD_FROM:
                fast = 0.0
                for value in closes[SLOW - FAST : SLOW]:
                    fast += value
                slow = 0.0
                for value in closes[:SLOW]:
                    slow += value
                self.fast = fast / FAST
                self.slow = slow / SLOW
            else:
                self.fast = (close - self.fast) * _K_FAST + self.fast
                self.slow = (close - self.slow) * _K_SLOW + self.slow
            line = self.fast - self.slow
            if n > _SIGNAL_FROM:
                self.signal = (line - self.signal) * _K_SIGNAL + self.signal
            else:
                self.signal += line
                if n == _SIGNAL_FROM:
                    self.signal /= SIGNAL
            if n >= _SIGNAL_FROM:
                macd, signal = line, self.signal
                hist = macd - signal
        self.close = close
        self.times.append(ts)
        if len(self.times) > FORWARD_BARS:
            del self.times[0]
        return rsi, macd, signal, hist, atr, ma, ret

    def update_block(self, ts: Ints, high: Floats, low: Floats, close: Floats) -> Columns:
        """Takes many bars at once; bit by bit what :meth:`update` gives for them one by one."""
        warm = min(max(MA - self.bars, 0), len(ts))
        if not len(ts):
            return Columns([], [], [], [], [], [], [])
        if not warm:
            return self._steady(ts, high, low, close)
        head = [
            self.update(t, h, lo, c)
            for t, h, lo, c in zip(
                ts[:warm].tolist(), high[:warm].tolist(), low[:warm].tolist(), close[:warm].tolist(), strict=True
            )
        ]
        out = Columns(*(list(column) for column in zip(*head, strict=True)))
        if warm < len(ts):
            tail = self._steady(ts[warm:], high[warm:], low[warm:], close[warm:])
            for name in Columns.__struct_fields__:
                getattr(out, name).extend(getattr(tail, name))
        return out

    def _steady(self, ts: Ints, high: Floats, low: Floats, close: Floats) -> Columns:
        # From the 60th bar on every recurrence is in its steady form.
        n = self.bars
        size = len(ts)
        previous = np.concatenate(([self.close], close[:-1]))
        change = close - previous
        gains = np.maximum(change, 0.0)
        losses = np.maximum(-change, 0.0)
        # Rounding is monotonic, so this is the largest of the three rounded differences that `update` compares.
        reach = np.maximum(high, previous) - np.minimum(low, previous)
        ring = self.closes
        at = n % MA
        window = np.concatenate((ring[at:] + ring[:at], close))  # 60 closes before the block, oldest first
        leaving = window[1 : size + 1]  # the oldest close of each bar's own window

        # A comprehension for each value that is kept: half the time of one loop over all recurrences.
        gain, loss, atr = self.gain, self.loss, self.atr
        gain_ = [gain := (gain * 13.0 + up) / 14.0 for up in _each(gains)]
        loss_ = [loss := (loss * 13.0 + down) / 14.0 for down in _each(losses)]
        atr_ = [atr := (atr * 13.0 + tr) / 14.0 for tr in _each(reach)]
        self.gain, self.loss, self.atr = gain, loss, atr

        fast, slow, signal = self.fast, self.slow, self.signal
        k, q = _K_FAST, _K_SLOW
        line_ = [(fast := (x - fast) * k + fast) - (slow := (x - slow) * q + slow) for x in _each(close)]
        k = _K_SIGNAL
        signal_ = [signal := (x - signal) * k + signal for x in line_]
        self.fast, self.slow, self.signal = fast, slow, signal

        # The running sum as one sequential accumulation: each close enters, then the oldest leaves.
        flow = np.empty(2 * size + 1)
        flow[0], flow[1::2], flow[2::2] = self.total, close, -leaving
        totals = np.add.accumulate(flow)
        self.total = float(totals[-1])

        average = _array(gain_)
        both = average + _array(loss_)
        if both.min() >= _EPSILON:
            rsi = 100.0 * (average / both)
        else:
            flat = both < _EPSILON
            rsi = np.where(flat, 0.0, 100.0 * (average / np.where(flat, 1.0, both)))
        ret: list[float | None]
        if previous.min() > 0.0:
            ret = (change / previous).tolist()
        else:
            ret = [d / p if p > 0.0 else None for d, p in zip(change.tolist(), previous.tolist(), strict=True)]

        self.bars = n + size
        newest = window[-MA:].tolist()
        at = self.bars % MA
        self.closes = newest[-at:] + newest[:-at] if at else newest
        self.close = newest[-1]
        self.times = (self.times + ts[-FORWARD_BARS:].tolist())[-FORWARD_BARS:]
        return Columns(
            rsi.tolist(),
            line_,
            signal_,
            (_array(line_) - _array(signal_)).tolist(),
            atr_,
            (totals[1::2] / MA).tolist(),
            ret,
        )


def forward_returns(
    ts: Ints, close: Floats, before_ts: Sequence[int], before_close: Sequence[float], span: int
) -> tuple[list[tuple[int, float | None]], list[float | None]]:
    """Labels that a block completes: those of earlier bars, and those of the block's own rows (None where unknown).

    ``before_*`` are the newest bars before the block (at most five, oldest first), ``span`` the seconds that five
    bars may take. Bit by bit what :meth:`FeatureState.forward` gives one by one.
    """
    have = len(before_ts)
    all_ts = np.concatenate((np.asarray(before_ts, np.int64), ts))
    all_close = np.concatenate((np.asarray(before_close, np.float64), close))
    known = max(len(all_ts) - FORWARD_BARS, 0)
    labels: list[float | None] = []
    if known:
        base, later = all_close[:known], all_close[FORWARD_BARS:]
        ok = (all_ts[FORWARD_BARS:] - all_ts[:known] <= span) & (base > 0.0)
        value = (later - base) / np.where(ok, base, 1.0)
        labels = [v if good else None for v, good in zip(value.tolist(), ok.tolist(), strict=True)]
    first = min(have, known)
    earlier = list(zip(all_ts[:first].tolist(), labels[:first], strict=True))
    own: list[float | None] = labels[have:known] if known > have else []
    return earlier, own + [None] * (len(ts) - len(own))
