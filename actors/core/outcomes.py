"""What came of a signal: a pure function of what was said, of the bars that followed, and of the cost of trading them.

What is *predicted* is the sign of ``fwd_ret_5``, close to close. What is *traded* can begin only afterwards: at the next
bar's open, until the fifth following bar's close. Bars are bid prices: a long pays the spread when it is entered, a
short when it is left, each 1.5 times the bar's spread, which is the bar's minimum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Final, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from actors.core.timeframe import FORWARD_SPAN
from schema.messages import Abstain, Label, ModelState, Outcome
from schema.timeframes import SECONDS

COST_SPREADS: Final = 1.5  # MT5's bar spread is the bar's minimum
SPAN_BARS: Final = FORWARD_SPAN  # touched bars that lie closer together are read as one span


class Said(Struct, frozen=True):
    """What a version said of a bar, aloud or in its shadow; ``candles_seq`` is the CANDLES sequence that it came from."""

    id: str
    ts: datetime
    symbol: str
    timeframe: str
    model_name: str
    model_version: str
    state: ModelState
    prob_up: float
    base_rate: float
    label: Label
    abstain: Abstain | None
    candles_seq: int


class Followed(Struct, frozen=True):
    """The bars behind one bar: its label, and prices, spreads (points, 0 = unknown) of the first and the fifth.

    ``fwd_seq`` and ``candles_seq`` are CANDLES sequences: of the label, and of the newest of the two bars' versions.
    """

    ret: float
    fwd_seq: int
    entry_open: float
    entry_close: float
    entry_spread: float
    exit_close: float
    exit_spread: float
    candles_seq: int


class Cost(Struct, frozen=True):
    """What turns a spread into a fraction of the price: a point's size, and the spread where the bar's is unknown."""

    point: float | None = None
    spread: float | None = None

    def of(self, spread: float, close: float) -> float | None:
        """1.5 × spread × point / close; None where spread, point or price does not say."""
        points = spread if spread > 0 else self.spread
        if points is None or self.point is None or close <= 0:
            return None
        return COST_SPREADS * points * self.point / close


class Known(NamedTuple):
    """An outcome with the sequence of its label, and whether it still stands."""

    outcome: Outcome
    fwd_seq: int
    void: bool = False


def score(said: Said, bars: Followed, cost: Cost) -> Known:
    """The outcome of what was said; a price of 0 or below at the entry leaves a trade without figures."""
    won: bool | None = None
    gross: float | None = None
    net: float | None = None
    if said.label:
        won = said.label * bars.ret > 0
        if bars.entry_open > 0:
            gross = said.label * (bars.exit_close / bars.entry_open - 1.0)
            if said.label > 0:
                paid = cost.of(bars.entry_spread, bars.entry_close)
            else:
                paid = cost.of(bars.exit_spread, bars.exit_close)
            net = None if paid is None else gross - paid
    outcome = Outcome(
        signal_id=said.id,
        ts=said.ts,
        symbol=said.symbol,
        timeframe=said.timeframe,
        model_name=said.model_name,
        model_version=said.model_version,
        state=said.state,
        prob_up=said.prob_up,
        base_rate=said.base_rate,
        label=said.label,
        abstain=said.abstain,
        ret=bars.ret,
        up=None if bars.ret == 0 else bars.ret > 0,
        won=won,
        gross=gross,
        net=net,
        candles_seq=max(bars.fwd_seq, bars.candles_seq, said.candles_seq),
    )
    return Known(outcome, bars.fwd_seq)


def message_id(outcome: Outcome) -> str:
    """One id a signal and making of its outcome: what is published again after a crash is the same message."""
    return f"{outcome.signal_id}:{outcome.candles_seq}"


# --- what changes ------------------------------------------------------------------------------------------------


class Changes(NamedTuple):
    """``new`` outcomes, those that ``changed`` (or stand again), and the ids and times of those that no longer stand."""

    new: tuple[Known, ...]
    changed: tuple[Known, ...]
    void: tuple[tuple[str, datetime], ...]


def compare(wanted: Mapping[str, Known], stored: Mapping[str, Known]) -> Changes:
    """What makes the stored outcomes of some bars the wanted ones, in the order of the bars.

    Both by signal id. A stored one that nothing wants any more belongs to a signal that was superseded, or to a label that
    was taken back.
    """
    new = [known for name, known in wanted.items() if name not in stored]
    changed = [
        known
        for name, known in wanted.items()
        if name in stored and (stored[name].void or _differs(stored[name].outcome, known.outcome))
    ]
    void = [(name, k.outcome.ts) for name, k in stored.items() if not k.void and name not in wanted]
    return Changes(tuple(sorted(new, key=_order)), tuple(sorted(changed, key=_order)), tuple(sorted(void)))


def _differs(stored: Outcome, wanted: Outcome) -> bool:
    """A newer version of a bar may leave all that an outcome is made of as it was."""
    return stored != replace(wanted, candles_seq=stored.candles_seq)


def _order(known: Known) -> tuple[int, datetime, str, str]:
    outcome = known.outcome
    return outcome.candles_seq, outcome.ts, outcome.symbol, outcome.signal_id


class Span(NamedTuple):
    """Bars of a series from ``first`` to ``last``, both included."""

    symbol: str
    timeframe: str
    first: datetime
    last: datetime


def spans(touched: Iterable[tuple[str, str, datetime]]) -> list[Span]:
    """The touched bars (symbol, timeframe, open time) as few spans, none of them bridging more than ten bars of time."""
    series: dict[tuple[str, str], list[datetime]] = {}
    for symbol, timeframe, ts in touched:
        series.setdefault((symbol, timeframe), []).append(ts)
    out: list[Span] = []
    for (symbol, timeframe), times in series.items():
        times.sort()
        most = SPAN_BARS * SECONDS[timeframe]
        first = last = times[0]
        for ts in times[1:]:
            if (ts - last).total_seconds() > most:
                out.append(Span(symbol, timeframe, first, last))
                first = ts
            last = ts
        out.append(Span(symbol, timeframe, first, last))
    return out


def unseen(ts: datetime, last_trained: datetime, timeframe: str) -> bool:
    """Whether a version trained on rows up to ``last_trained`` cannot have seen anything of the bar's label.

    That row's own label reaches up to ten bars of time ahead.
    """
    return (ts - last_trained).total_seconds() > FORWARD_SPAN * SECONDS[timeframe]
