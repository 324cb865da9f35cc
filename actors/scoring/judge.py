"""The trials of every model: fed with outcomes, kept in the archive with them, and their decisions put to the trainer."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from actors.core.docket import Docket, Party, RateDrift, Window
from actors.core.evidence_trials import Decision, Trial
from actors.core.outcomes import Changes
from actors.core.registry import Version
from actors.core.timeframe import forward_span
from actors.core.verdicts import DecisionRequest, Verdict
from actors.scoring.archive import OutcomeArchive, outcome_of
from actors.scoring.versions import Versions
from bus.client import Bus, BusUnavailable
from bus.store import Connection, Store
from bus.subjects import DECIDE
from bus.telemetry import decisions_total, evidence_gauge, outliers_gauge
from schema.messages import Outcome
from schema.settings import Models

OUTLIERS_OF: Final = 1_000  # newest outcomes of a champion whose out-of-distribution rate is looked at …
OUTLIERS_LEAST: Final = 0.2  # … which must be above this …
OUTLIERS_TIMES: Final = 10.0  # … and above so many times the rate on validation, for its inputs to count as broken
READ_BACK: Final = (
    20_000  # newest outcomes of a version that are read at the start: those whose bars are not judged yet
)
ASK_SECONDS: Final = 60.0  # that the trainer has to answer; it waits thirty for the emitter itself
ASK_AGAIN: Final = 5.0  # between tries while nobody answers
REFUSED_AGAIN: Final = 300.0  # before the same is asked again where the answer was no


class Judge:
    """``wake`` is set whenever there may be something to decide."""

    def __init__(self, bus: Bus, archive: OutcomeArchive, versions: Versions, settings: Models, log: Any) -> None:
        self._bus = bus
        self._archive = archive
        self._versions = versions
        self._settings = settings
        self._log = log
        self._dockets: dict[str, Docket] = {}
        self._windows: dict[str, Window] = {}
        self._parties: dict[str, dict[str, Party]] = {}
        self._abstained: dict[tuple[str, str], deque[bool]] = {}  # by model and version: out of distribution or not
        self._outliers: dict[tuple[str, str], float | None] = {}  # their rate on validation
        self._faults: dict[str, Decision] = {}  # by model: what its champion's integrity asks for
        self._no: dict[tuple[str, str, str], float] = {}  # decisions that were asked for, and when to ask again
        self.wake = asyncio.Event()

    # --- start and changes of the registry -------------------------------------------------------------------------

    async def load(self, store: Store) -> None:
        """Takes up the trials where the archive has them. Raises StoreUnavailable."""
        for row in await store.fetch("load_trials"):
            try:
                self._dockets[row["model_name"]] = msgspec.json.decode(row["docket"], type=Docket)
            except msgspec.DecodeError as error:
                self._log.error(
                    "trials begin anew, those in the archive cannot be read",
                    action="scorer.trials",
                    model=row["model_name"],
                    error=str(error),
                )
        await self.sync()
        for name, parties in self._parties.items():
            timeframe = next(v.timeframe for v in self._versions.registry.versions.values() if v.model_name == name)
            self._windows[name] = Window(timeframe, self._dockets[name].done)
            for version in parties:
                rows = await store.fetch("outcomes_of_version", name, version, READ_BACK)
                self._take(outcome_of(row) for row in reversed(rows))

    async def sync(self) -> None:
        """Brings trials in line with who serves and who is followed. Raises StoreUnavailable."""
        serving = {v.model_name: v for v in self._versions.serving()}
        followed: dict[str, list[Version]] = {}
        for name, version in self._versions.shadows:
            followed.setdefault(name, []).append(self._versions.registry.versions[name, version])
        for name in serving.keys() | followed.keys():
            one = None if name not in serving else await self._party(serving[name])
            shadows = [await self._party(v) for v in sorted(followed.get(name, []), key=lambda v: v.version)]
            self._dockets[name] = self._dockets.get(name, Docket()).sync(one, shadows)
            self._parties[name] = {p.version: p for p in (one, *shadows) if p is not None}
        self._faults = {n: d for n, d in self._faults.items() if n in serving and serving[n].version == d.version}
        self.wake.set()

    async def _party(self, version: Version) -> Party:
        facts = await self._archive.facts(version.model_name, version.version)
        last = facts.last_ts
        self._outliers[version.model_name, version.version] = facts.outlier_rate
        until = None if last is None else int(last.timestamp()) + forward_span(version.timeframe)
        # A version without a recipe is of none but its own.
        return Party(version.version, version.recipe or version.version, version.state, until)

    # --- outcomes --------------------------------------------------------------------------------------------------

    def take(self, changes: Changes) -> dict[str, Docket]:
        """Feeds what became known; returns the dockets that it changed, by model."""
        for known in changes.changed:  # where its bar is not judged yet
            if known.outcome.model_name in self._windows:
                self._windows[known.outcome.model_name].put(known.outcome)
        return self._take(known.outcome for known in changes.new)

    def _take(self, outcomes: Iterable[Outcome]) -> dict[str, Docket]:
        touched: set[str] = set()
        for outcome in outcomes:
            name = outcome.model_name
            if outcome.model_version not in self._parties.get(name, ()):
                continue
            if name not in self._windows:
                self._windows[name] = Window(outcome.timeframe, self._dockets[name].done)
            self._windows[name].put(outcome)
            rate = self._abstained.setdefault((name, outcome.model_version), deque(maxlen=OUTLIERS_OF))
            rate.append(outcome.abstain == "out_of_distribution")
            touched.add(name)
        changed = {}
        for name in sorted(touched):
            bars = self._windows[name].complete()
            for bar in bars:
                self._dockets[name] = self._dockets[name].add(bar, self._parties[name].values())
            if bars:
                changed[name] = self._dockets[name]
                _show(name, self._dockets[name])
        if touched:
            self.wake.set()
        return changed

    async def save(self, store: Store, connection: Connection, dockets: Mapping[str, Docket]) -> None:
        """In the transaction of the outcomes that they have seen."""
        for name, docket in dockets.items():
            await connection.execute(store.sql("save_trials"), name, msgspec.json.encode(docket).decode())

    # --- drift -----------------------------------------------------------------------------------------------------

    def rates(self) -> list[tuple[Version, RateDrift]]:
        """How far each serving version's base rate has drifted."""
        return [
            (version, self._dockets[version.model_name].rate_drift())
            for version in self._versions.serving()
            if version.model_name in self._dockets
        ]

    def told_rate(self, name: str) -> None:
        self._dockets[name] = self._dockets[name].told_rate()

    def drifting(self, name: str, symbol: str) -> frozenset[str]:
        """The inputs of a symbol that are in an episode; kept with the trials, so that a restart tells nothing twice."""
        docket = self._dockets.get(name)
        return frozenset(() if docket is None else docket.drifting.get(symbol, ()))

    def set_drifting(self, name: str, symbol: str, inputs: frozenset[str]) -> None:
        docket = self._dockets.get(name)
        if docket is not None and inputs != self.drifting(name, symbol):
            drifting = {s: names for s, names in docket.drifting.items() if s != symbol}
            drifting |= {symbol: tuple(sorted(inputs))} if inputs else {}
            self._dockets[name] = msgspec.structs.replace(docket, drifting=drifting)

    # --- integrity -------------------------------------------------------------------------------------------------

    def fault(self, champion: Version, reason: str, evidence: dict[str, Any]) -> None:
        """A champion must not go on speaking: it is rolled back at once."""
        if champion.model_name not in self._faults:
            self._log.error("champion fails", action="scorer.fault", version=champion.version, reason=reason)
        decision = Decision(
            action="rollback",
            version=champion.version,
            against=champion.version,
            reason=reason,
            evidence={"kind": "integrity", **evidence},
        )
        if decision != self._faults.get(champion.model_name):  # decide() itself looks for faults, and must come to rest
            self._faults[champion.model_name] = decision
            self.wake.set()

    def _watch_outliers(self) -> None:
        for champion in self._versions.serving():
            key = (champion.model_name, champion.version)
            seen = self._abstained.get(key, ())
            if champion.state != "champion" or not seen:
                continue
            rate = sum(seen) / len(seen)
            outliers_gauge.set(rate, model=champion.model_name)
            expected = self._outliers.get(key)
            limit = max(OUTLIERS_LEAST, OUTLIERS_TIMES * (expected or 0.0))
            if len(seen) == OUTLIERS_OF and rate > limit:
                self.fault(
                    champion,
                    f"{rate:.0%} of its newest {OUTLIERS_OF:,} signals are out of distribution, where at most {limit:.0%} may "
                    "be: its inputs are no longer what it was trained on.",
                    {"rate": rate, "limit": limit, "validation_rate": expected, "outcomes": len(seen)},
                )

    # --- decisions -------------------------------------------------------------------------------------------------

    def decisions(self) -> list[tuple[str, Decision]]:
        """What is to be asked for now, each with its model; a fault goes before evidence."""
        self._watch_outliers()
        out: list[tuple[str, Decision]] = []
        for name, docket in sorted(self._dockets.items()):
            if name in self._faults:
                out.append((name, self._faults[name]))
            elif name in self._parties:
                out += [(name, d) for d in docket.decisions(self._settings) if d.version in self._parties[name]]
        return out

    async def decide(self) -> None:
        """Asks the trainer for what the evidence decides, again until it has answered; for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await self.wake.wait()
            self.wake.clear()
            for name, decision in self.decisions():
                key = (name, decision.version, decision.action)
                if loop.time() < self._no.get(key, -math.inf):
                    continue
                verdict = await self._ask(name, decision)
                if verdict is None:
                    self._no[key] = loop.time() + ASK_AGAIN  # outcomes that come meanwhile are no reason to hurry
                    loop.call_later(ASK_AGAIN + 0.05, self.wake.set)
                    continue
                log = self._log.info if verdict.ok else self._log.warning
                log(
                    "decided",
                    action="scorer.decided",
                    version=decision.version,
                    what=decision.action,
                    answer=verdict.message,
                )
                # Where it was done, the events that follow end the trial; this keeps a repeat from overtaking them.
                self._no[key] = loop.time() + (ASK_SECONDS if verdict.ok else REFUSED_AGAIN)
                if verdict.ok:
                    decisions_total.inc(action=decision.action)
                loop.call_later(self._no[key] - loop.time() + 0.1, self.wake.set)

    async def _ask(self, name: str, decision: Decision) -> Verdict | None:
        """The trainer's answer; None where none came."""
        request = DecisionRequest(
            model_name=name,
            version=decision.version,
            action=decision.action,
            reason=decision.reason,
            against=decision.against,
            evidence=decision.evidence,
        )
        try:
            answer = await self._bus.request(DECIDE, msgspec.json.encode(request), timeout=ASK_SECONDS)
            return msgspec.json.decode(answer, type=Verdict)
        except BusUnavailable as error:
            self._log.warning("a decision is asked for again", action="scorer.ask", error=str(error))
        except msgspec.DecodeError as error:
            self._log.error("the trainer's answer is of another version", action="scorer.ask", error=str(error))
        return None


def _show(name: str, docket: Docket) -> None:
    for trial in (docket.standing, *docket.shadows):
        if isinstance(trial, Trial):
            seen = trial.seen
            for way, value in (("better", seen.e_better), ("worse", seen.e_worse)):
                evidence_gauge.set(math.log10(max(value, 1e-300)), model=name, trial=trial.kind, way=way)
