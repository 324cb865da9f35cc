"""Evidence that one forecaster is better than another: what a bettor has made of one unit, whoever looks and whenever.

Two forecasters give a rise the probabilities p and q. Their Brier scores differ by ``d = (q - y)² - (p - y)²`` once the
outcome y is known, and whoever doubts that p is better claims that ``E[d] ≤ 0`` at every bar, given all that was known
then. A bettor who starts with one unit, stakes on d and never owes anything has, under that claim, at most one unit to be
expected at any moment that he chooses to stop: his money is an e-value, and the claim survives a fortune of 100 with a
chance of at most 1 in 100 (Ville), however often it is looked at, in any market, drifting or not. So validity holds by the
way the books are kept; the sizes of the bets below decide only how soon a difference shows.

* **Bars, not outcomes.** Symbols of one bar move together: their differences are added to one bet, over √(symbols).
* **Outcomes overlap**: an outcome takes five bars, and four others are open when it is known. Five interleaved streams
  whose fortunes are averaged are the known remedy, but no supermartingale, since an open outcome is half known
  (Henzi & Ziegel, correction of 2022). Here the most that a bet can lose, the *predictable bound*
  ``c = |p - q| · max(p + q, 2 - p - q) ≥ |d|``, is put aside when it is made and paid back with the result. Stakes depend
  on nothing that is not known when the forecast is made, and the e-value is what is *not* put aside: open bets count as lost.
  Streams are one way to stake by these books; one purse for all bars is as fast where signals last for many bars, and two
  to three times faster where they are fresh at each.
* **Bet sizes** are fractions of the free money for each unit of d. A calibrated p grows fastest at 1/v, where v is how
  much overlap and correlation inflate the variance (2.7 to 3.9 were measured), an inverted one's rival at 3/v. The purse is
  divided among four sizes (a mixture: Waudby-Smith & Ramdas 2024), of which the best soon is all that counts.
* **A quarter is kept back** and spent slowly, over all the time to come. Without it a purse that lost for months, against a
  healthy champion say, has nothing left to notice with when the champion fails (mixture over beginnings: Shin, Ramdas &
  Rinaldo 2024).

Times are epoch seconds of a bar's beginning. All money is written as natural logarithms, so nothing overflows. Time and
memory of a bar are constant.

Sources: Henzi & Ziegel, "Valid sequential inference on probability forecast performance", Biometrika 109 (2022) 647, and its
correction, 1181; Choe & Ramdas, "Comparing sequential forecasters", Operations Research 72 (2024); Waudby-Smith & Ramdas,
"Estimating means of bounded random variables by betting", JRSS B 86 (2024); Shin, Ramdas & Rinaldo, "E-detectors", NEJSDS (2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log, log1p, sqrt
from typing import Final, NamedTuple

from msgspec import Struct

SIZES: Final = (0.1, 0.3, 1.0, 3.0)  # free money staked for each unit of score difference
CAP: Final = 0.5  # of a size's free money at most in one bar's bet
LEAST: Final = 1e-9  # bound of a bar that is bet on: a smaller one is mostly rounding
OPEN: Final = 16  # bars whose outcomes are awaited at a time: five, and more where a symbol pauses and others go on
KEPT: Final = 0.25  # of the unit, at the beginning
KEPT_BARS: Final = (
    7_200  # of what is kept, half is spent after three times so many bars; of the rest half after twelve more …
)
SLICE: Final = 60  # bars between two spendings

_MOST: Final = 690.0  # e^690 is still a number that JSON can carry
_NOTHING: Final = 1e-100  # a lost bet's return, in place of zero, which has no logarithm


class Paired(NamedTuple):
    """One symbol's bar: the probabilities of a rise by the one in question and by its rival, and what came (None: a tie)."""

    p: float
    q: float
    up: bool | None


class Purse(Struct, frozen=True, array_like=True):
    """The fortune of one bettor: free money of each bet size and the most that there ever was, kept part included; logs."""

    free: tuple[float, ...] = tuple(log((1 - KEPT) / len(SIZES)) for _ in SIZES)
    peak: float = 0.0


class Bet(Struct, frozen=True, array_like=True):
    """An open bet of both bettors, and the log of what each size gets back once ``until`` has come.

    The outcome is known to who keeps the books (a bar is entered when it is complete) and not yet used.
    """

    until: int
    better: tuple[float, ...]
    worse: tuple[float, ...]


class Evidence(Struct, frozen=True):
    """Two bettors' books on one pair of forecasters: ``better`` bets that p is the better one, ``worse`` that q is.

    A frozen value: :meth:`add` gives the next one, bit for bit the same from the same bars however often it was stored
    and read in between. ``loss`` and ``rival_loss`` are sums of squared errors over ``outcomes``; ties are no outcomes.
    """

    bars: int = 0
    outcomes: int = 0
    loss: float = 0.0
    rival_loss: float = 0.0
    since: int | None = None
    to: int | None = None
    better: Purse = Purse()
    worse: Purse = Purse()
    open: tuple[Bet, ...] = ()

    def add(self, ts: int, until: int, rows: Sequence[Paired]) -> Evidence:
        """The bar that began at ``ts``, all symbols at once; ``until`` is the last of their fifth following bars.

        Bars come in order of ``ts``. One that is not later than the last counts nothing, so repeats are harmless; so does
        a bar without rows. ValueError: a probability outside 0..1, or an outcome known before its forecast.
        """
        if not rows or (self.to is not None and ts <= self.to):
            return self
        if until <= ts:
            raise ValueError(
                f"The outcome of the bar at {ts} cannot be known at {until}: `until` is the fifth bar after it."
            )
        bars = self.bars + 1
        better, worse = list(self.better.free), list(self.worse.free)
        waiting = []
        for bet in self.open:
            if bet.until <= ts:  # known when the bar at ts ends, which is when its forecast is made
                _receive(better, bet.better)
                _receive(worse, bet.worse)
            else:
                waiting.append(bet)
        if bars % SLICE == 0:
            released = (log((kept(bars - SLICE) - kept(bars)) / len(SIZES)),) * len(SIZES)
            _receive(better, released)
            _receive(worse, released)
        outcomes, loss, rival_loss, edge, bound = _scores(rows)
        if bound >= LEAST and len(waiting) < OPEN:
            waiting.append(_stake(until, edge / bound, bound, better, worse))
        return Evidence(
            bars=bars,
            outcomes=self.outcomes + outcomes,
            loss=self.loss + loss,
            rival_loss=self.rival_loss + rival_loss,
            since=ts if self.since is None else self.since,
            to=ts,
            better=_purse(better, self.better.peak, bars),
            worse=_purse(worse, self.worse.peak, bars),
            open=tuple(waiting),
        )

    @property
    def brier(self) -> float | None:
        return self.loss / self.outcomes if self.outcomes else None

    @property
    def rival_brier(self) -> float | None:
        return self.rival_loss / self.outcomes if self.outcomes else None

    @property
    def e_better(self) -> float:
        """The e-value now that p is better; open bets count as lost."""
        return exp(min(_total(self.better.free, self.bars), _MOST))

    @property
    def e_worse(self) -> float:
        """The e-value now that q is better."""
        return exp(min(_total(self.worse.free, self.bars), _MOST))

    @property
    def peak_better(self) -> float:
        """The highest ``e_better`` so far. It may be judged by as well as any other moment's (Ville's inequality), and it
        does not depend on when somebody looked."""
        return exp(min(self.better.peak, _MOST))

    @property
    def peak_worse(self) -> float:
        """The highest ``e_worse`` so far."""
        return exp(min(self.worse.peak, _MOST))


def kept(bars: int) -> float:
    """The part of the unit that is not yet given to any bet size after so many bars: it never quite ends."""
    return KEPT / sqrt(1 + (bars // SLICE) * SLICE / KEPT_BARS)


def _scores(rows: Sequence[Paired]) -> tuple[int, float, float, float, float]:
    """(outcomes, sum of p's squared errors, of q's, the bar's difference, its bound)."""
    outcomes = 0
    loss = rival_loss = edge = bound = 0.0
    for p, q, up in rows:
        if not (0 <= p <= 1 and 0 <= q <= 1):
            raise ValueError(f"{p} and {q} are not two probabilities.")
        bound += abs(p - q) * max(p + q, 2 - p - q)
        if up is None:  # a tie returns the stake: that it is one was not known when the bet was made
            continue
        mine, rival = (p - up) ** 2, (q - up) ** 2
        outcomes += 1
        loss += mine
        rival_loss += rival
        edge += rival - mine
    root = sqrt(len(rows))
    return outcomes, loss, rival_loss, edge / root, bound / root


def _stake(until: int, result: float, bound: float, better: list[float], worse: list[float]) -> Bet:
    """Both bettors put a bar's worst loss aside. ``result``: the difference in units of the bound, -1..1."""
    win, loss = log(max(1 + result, _NOTHING)), log(max(1 - result, _NOTHING))
    bet_better: list[float] = []
    bet_worse: list[float] = []
    for size, scale in enumerate(SIZES):
        part = min(scale * bound, CAP)
        stake, rest = log(part), log1p(-part)
        bet_better.append(better[size] + stake + win)
        bet_worse.append(worse[size] + stake + loss)
        better[size] += rest
        worse[size] += rest
    return Bet(until, tuple(bet_better), tuple(bet_worse))


def _receive(free: list[float], money: Sequence[float]) -> None:
    for size, more in enumerate(money):
        had = free[size]
        free[size] = had + log1p(exp(more - had)) if more < had else more + log1p(exp(had - more))


def _purse(free: list[float], peak: float, bars: int) -> Purse:
    return Purse(tuple(free), max(peak, _total(free, bars)))


def _total(free: Sequence[float], bars: int) -> float:
    """The logarithm of all free money, what is kept back included."""
    return _log_sum((*free, log(kept(bars))))


def _log_sum(logs: Sequence[float]) -> float:
    most = max(logs)
    return most + log(sum([exp(each - most) for each in logs]))
