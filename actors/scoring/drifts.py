"""Drift, looked for once a trading day and symbol of every version that serves, and told once an episode."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actors.core.docket import RATE_OFF, RateDrift
from actors.core.drift import LIMIT, MOST_ROWS, REFERENCE_ROWS, Reference, episodes, make_reference, stability, window
from actors.core.inputs import FEATURE_SETS, FeatureColumns, FeatureSet
from actors.core.outcomes import Changes
from actors.core.registry import Version
from actors.core.timeframe import forward_span, from_epoch
from actors.scoring.archive import OutcomeArchive
from actors.scoring.judge import Judge
from actors.scoring.versions import Versions
from bus.client import Bus, BusUnavailable
from bus.patience import Patience
from bus.store import Store
from bus.subjects import ALERTS
from bus.telemetry import drift_gauge
from schema.messages import Alert

DAY: Final = 86_400
REFERENCES: Final = 500  # symbols whose training is remembered, some 15 KB each
ALERT_AGAIN: Final = 1.0  # seconds between tries to publish an alert

Series = tuple[str, str, str, str]  # model, version, symbol, timeframe


class Drifts:
    def __init__(
        self,
        bus: Bus,
        store: Store,
        archive: OutcomeArchive,
        versions: Versions,
        judge: Judge,
        patience: Patience,
        log: Any,
    ) -> None:
        self._bus = bus
        self._store = store
        self._archive = archive
        self._versions = versions
        self._judge = judge
        self._patience = patience
        self._log = log
        self._days: dict[Series, int] = {}  # the newest day that an outcome was of
        self._due: OrderedDict[Series, int] = OrderedDict()  # epoch seconds of the end of the window to look at
        self._references: OrderedDict[Series, Reference | None] = OrderedDict()
        self._values: dict[tuple[str, str], dict[str, float]] = {}  # by model and input, then symbol
        self._wake = asyncio.Event()

    def take(self, changes: Changes) -> None:
        """A day is looked at once the next one has begun."""
        serving = {(v.model_name, v.version) for v in self._versions.serving()}
        for known in changes.new:
            outcome = known.outcome
            if (outcome.model_name, outcome.model_version) in serving:
                series = (outcome.model_name, outcome.model_version, outcome.symbol, outcome.timeframe)
                day = int(outcome.ts.timestamp()) // DAY
                if day > self._days.setdefault(series, day):
                    self._days[series] = day
                    self._due[series] = day * DAY
        if len(self._days) > 10 * REFERENCES:  # of versions that no longer serve
            self._days = {series: day for series, day in self._days.items() if series[:2] in serving}
        self._wake.set()

    async def watch(self) -> None:
        """Looks at what is due, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            for version, found in self._judge.rates():
                await self._tell_rate(version, found)
            while self._due:
                series, end = self._due.popitem(last=False)
                await self._look(series, end)

    # --- inputs ----------------------------------------------------------------------------------------------------

    async def _look(self, series: Series, end: int) -> None:
        name, version, symbol, timeframe = series
        model = self._versions.registry.versions.get((name, version))
        if model is None or self._versions.registry.serving(name) is not model:
            return
        facts = await self._patience.insist(lambda: self._archive.facts(name, version))
        feature_set = FEATURE_SETS.get(facts.feature_set or "")
        if feature_set is None or facts.first_ts is None or facts.last_ts is None:
            return
        if series not in self._references:
            span = (timeframe, symbol, facts.first_ts, facts.last_ts, REFERENCE_ROWS)
            rows = await self._patience.insist(lambda: self._store.fetch("drift_rows", *span))
            self._references[series] = await asyncio.to_thread(_reference, feature_set, rows)
            while len(self._references) > REFERENCES:
                self._references.popitem(last=False)
        reference = self._references[series]
        if reference is None:
            return
        unseen = from_epoch(int(facts.last_ts.timestamp()) + forward_span(timeframe))
        span = (timeframe, symbol, unseen, from_epoch(end - 1), MOST_ROWS)
        rows = await self._patience.insist(lambda: self._store.fetch("drift_rows", *span))
        values = await asyncio.to_thread(_stability, feature_set, reference, rows)
        if values:
            await self._judge_inputs(model, symbol, values)

    async def _judge_inputs(self, model: Version, symbol: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            known = self._values.setdefault((model.model_name, name), {})
            known[symbol] = value
            drift_gauge.set(max(known.values()) / LIMIT, model=model.model_name, of=name)
        begun, running = episodes(values, self._judge.drifting(model.model_name, symbol))
        if begun:
            worst = {name: round(values[name], 3) for name in sorted(begun)}
            await self._alert(
                f"{', '.join(worst)} of {symbol} differ from what {model.version} was trained on (population stability "
                f"{', '.join(f'{v:g}' for v in worst.values())}, {LIMIT:g} is told): look at the feed, or train again.",
                {"model": model.model_name, "version": model.version, "symbol": symbol, "stability": worst},
                f"{model.version}:{symbol}:{'+'.join(worst)}",
            )
        self._judge.set_drifting(model.model_name, symbol, running)

    # --- outcomes --------------------------------------------------------------------------------------------------

    async def _tell_rate(self, model: Version, found: RateDrift) -> None:
        drift_gauge.set(found.share, model=model.model_name, of="base_rate")
        if found.share < 1 or found.told:
            return
        await self._alert(
            f"Rises are {'more' if found.higher else 'less'} frequent than when {model.version} was trained, by more than "
            f"{RATE_OFF / 2:.0%} of all bars: {found.rate:.1%} of {found.outcomes:,}. Train again.",
            {
                "model": model.model_name,
                "version": model.version,
                "rate": found.rate,
                "outcomes": found.outcomes,
                "e_value": found.e_value,
            },
            f"{model.version}:rate:{found.higher}:{found.since}",
        )
        self._judge.told_rate(model.model_name)

    async def _alert(self, message: str, details: dict[str, Any], what: str) -> None:
        self._log.warning("drift", action="scorer.drift", message=message)
        alert = Alert(severity="warning", check="drift", message=message, at=datetime.now(UTC), details=details)
        while True:
            try:
                await self._bus.publish(ALERTS, alert, alert.severity, alert.check, msg_id=f"drift:{what}")
            except BusUnavailable as error:
                self._log.warning("an alert is tried again", action="scorer.alert", error=str(error))
                await asyncio.sleep(ALERT_AGAIN)
            else:
                return


def _inputs(feature_set: FeatureSet, rows: Sequence[Any]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Usable rows' inputs and times, oldest first."""
    table = np.array([tuple(row) for row in rows], dtype=np.float64).reshape(len(rows), len(FeatureColumns._fields))[
        ::-1
    ]
    ts = table[:, 0].astype(np.int64)
    values, usable = feature_set.of_columns(FeatureColumns(ts, *table[:, 1:].T))
    return values[usable], ts[usable]


def _reference(feature_set: FeatureSet, rows: Sequence[Any]) -> Reference | None:
    values, ts = _inputs(feature_set, rows)
    return make_reference(feature_set.inputs, values, ts) if len(ts) else None


def _stability(feature_set: FeatureSet, reference: Reference, rows: Sequence[Any]) -> dict[str, float]:
    values, ts = _inputs(feature_set, rows)
    newest = window(ts)
    if newest is None:
        return {}
    return stability(reference, feature_set.inputs, values[newest], ts[newest])
