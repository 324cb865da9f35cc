"""The trials of one model: who is judged against whom, by which bars; a pure function of events and outcomes.

A bar is judged once, when it is complete: all its symbols' outcomes are there as soon as one is known of a bar ten bars
later, since five following bars may span ten bars of time and no more. What comes after that (a hole that was filled, a
correction) is scored and no evidence; a trial is an order of bets, and bets are not taken back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import log
from typing import Final, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from actors.core.evidence import Evidence, Paired
from actors.core.evidence_trials import Decision, Trial, health, proof, shadow
from actors.core.timeframe import FORWARD_BARS, FORWARD_SPAN
from schema.messages import ModelState, Outcome
from schema.settings import Models
from schema.timeframes import SECONDS

# The base rate of rises is bet against by this much: what is proved is that it is off by more than half of it.
RATE_OFF: Final = 0.06
RATE_ENOUGH: Final = 100.0  # e-value at which it is told: once in a hundred lives of a model without a reason


class Party(NamedTuple):
    """A version that is judged. ``seen_until``: epoch seconds up to which its training has seen labels; None: unknown."""

    version: str
    recipe: str
    state: ModelState
    seen_until: int | None = None


class Spoken(NamedTuple):
    """What a version gave a rise, what its base rate gives, and what came (None: a tie)."""

    prob: float
    base: float
    up: bool | None


class Bar(NamedTuple):
    """A complete bar: by version, then symbol. ``until`` is the open time of the last of the fifth following bars."""

    ts: int
    until: int
    spoken: dict[str, dict[str, Spoken]]


class RateDrift(NamedTuple):
    """How far it is proved that rises are more (``higher``) or less frequent than in training.

    ``share`` is the evidence as a share of what is enough, in logarithms: at 1 it is told, once in a version's life (``told``).
    """

    higher: bool
    share: float
    e_value: float
    rate: float
    outcomes: int
    since: int | None
    told: bool


class Docket(Struct, frozen=True, kw_only=True):
    """``standing`` judges the version that serves, ``shadows`` each shadow against it. ``done``: the newest bar judged.

    ``higher`` and ``lower`` bet that the base rate of the serving version's training is off by more than half of
    :data:`RATE_OFF`; ``rises`` and ``falls`` are what they have seen, ``rate_told`` whether a person knows. ``drifting``: symbol → inputs that are in an episode of drift.
    """

    standing: Trial | None = None
    shadows: tuple[Trial, ...] = ()
    done: int | None = None
    higher: Evidence = Evidence()
    lower: Evidence = Evidence()
    rises: int = 0
    falls: int = 0
    rate_told: bool = False
    drifting: dict[str, tuple[str, ...]] = {}

    def sync(self, serving: Party | None, followed: Sequence[Party]) -> Docket:
        """The trials once these versions serve and are followed. Without a serving version shadows have no rival and wait."""
        if serving is None:
            return self
        standing = self.standing
        if serving.state == "champion":
            if standing is None or standing.kind != "health" or standing.subject != serving.version:
                standing = health(serving.version, serving.recipe)
        elif standing is None or standing.kind != "proof" or standing.recipe != serving.recipe:
            standing = proof(serving.version, serving.recipe)
        else:
            standing = standing.continued(serving.version)
        known = {trial.subject: trial for trial in self.shadows}
        free = [trial for trial in self.shadows if trial.subject not in {party.version for party in followed}]
        shadows = []
        for party in followed:
            trial = known.get(party.version)
            if trial is None:
                heirs = [old for old in free if old.kind == "recipe" and old.recipe == party.recipe]
                trial = heirs[-1].continued(party.version) if heirs else None
                free = [old for old in free if old not in heirs]
            if trial is None:
                trial = shadow(party.version, party.recipe, serving.version, serving.recipe)
            shadows.append(trial.against(serving.version, serving.recipe))
        out = replace(self, standing=standing, shadows=tuple(shadows))
        if self.standing is not None and self.standing.subject != serving.version:  # another base rate, other inputs
            out = Docket(standing=out.standing, shadows=out.shadows, done=out.done)
        return out

    def add(self, bar: Bar, parties: Iterable[Party]) -> Docket:
        """The docket after one more complete bar; rows that a version may have been trained on are no evidence for it."""
        unseen = {p.version for p in parties if p.seen_until is None or bar.ts > p.seen_until}
        said = {version: rows for version, rows in bar.spoken.items() if version in unseen}
        standing = self.standing
        own = [] if standing is None else [s for _, s in sorted(said.get(standing.subject, {}).items())]
        if standing is not None:
            standing = standing.add(bar.ts, bar.until, [Paired(s.prob, s.base, s.up) for s in own])
        shadows = []
        for trial in self.shadows:
            rival = said.get(trial.rival or "", {})
            both = [
                Paired(s.prob, rival[symbol].prob, s.up)
                for symbol, s in sorted(said.get(trial.subject, {}).items())
                if symbol in rival
            ]
            shadows.append(trial.add(bar.ts, bar.until, both))
        return replace(
            self,
            standing=standing,
            shadows=tuple(shadows),
            done=bar.ts,
            higher=self.higher.add(bar.ts, bar.until, [Paired(min(s.base + RATE_OFF, 1.0), s.base, s.up) for s in own]),
            lower=self.lower.add(bar.ts, bar.until, [Paired(max(s.base - RATE_OFF, 0.0), s.base, s.up) for s in own]),
            rises=self.rises + sum(s.up is True for s in own),
            falls=self.falls + sum(s.up is False for s in own),
        )

    def rate_drift(self) -> RateDrift:
        """The side for which more speaks."""
        higher = self.higher.peak_better >= self.lower.peak_better
        seen = self.higher if higher else self.lower
        outcomes = self.rises + self.falls
        rate = self.rises / outcomes if outcomes else 0.0
        return RateDrift(
            higher,
            log(seen.peak_better) / log(RATE_ENOUGH),
            seen.peak_better,
            rate,
            outcomes,
            seen.since,
            self.rate_told,
        )

    def told_rate(self) -> Docket:
        """After it was told: it is not told again before another version serves."""
        return replace(self, rate_told=True)

    def decisions(self, settings: Models) -> list[Decision]:
        """What the evidence decides now. Where several shadows have won, the one of the strongest evidence replaces."""
        trials = self.shadows if self.standing is None else (self.standing, *self.shadows)
        found = [d for d in (trial.verdict(settings) for trial in trials) if d is not None]
        won = [d for d in found if d.action == "promote"]
        best = max(won, key=lambda d: float(d.evidence["e_value"]), default=None)
        return [d for d in found if d.action != "promote" or d is best]


class Window:
    """Outcomes of one model that wait until their bar is complete; bounded by ten bars of time."""

    def __init__(self, timeframe: str, done: int | None = None) -> None:
        self._bar = SECONDS[timeframe]
        self._waiting: dict[int, dict[str, dict[str, Spoken]]] = {}
        self._newest = self._done = done if done is not None else -1

    def put(self, outcome: Outcome) -> None:
        """Takes an outcome, or what a correction made of one; one of a bar that is judged already counts no more."""
        ts = int(outcome.ts.timestamp())
        if ts > self._done:
            by_version = self._waiting.setdefault(ts, {})
            spoken = Spoken(outcome.prob_up, outcome.base_rate, outcome.up)
            by_version.setdefault(outcome.model_version, {})[outcome.symbol] = spoken
            self._newest = max(self._newest, ts)

    def complete(self) -> list[Bar]:
        """The bars that are complete now, oldest first; they are no longer waited for."""
        span = FORWARD_SPAN * self._bar
        times = sorted(self._waiting)
        out = []
        for at, ts in enumerate(times):
            if ts > self._newest - span:
                break
            spoken = self._waiting.pop(ts)
            # The fifth following bar of each symbol: its labels are as dense as its bars, or sparser.
            until = ts + FORWARD_BARS * self._bar
            for symbol in {symbol for rows in spoken.values() for symbol in rows}:
                later = [t for t in times[at + 1 :] if t <= ts + span and self._has(t, symbol)]
                until = max(until, later[FORWARD_BARS - 1] if len(later) >= FORWARD_BARS else ts + span)
            self._done = ts
            out.append(Bar(ts, until, spoken))
        return out

    def _has(self, ts: int, symbol: str) -> bool:
        return any(symbol in rows for rows in self._waiting.get(ts, {}).values())
