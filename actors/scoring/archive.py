"""What the archive says of some bars: the outcomes that they should have, beside those that are stored.

Everything is computed from the archive as it stands now, so it does not matter which of a signal, its label and a
correction came first, nor how often a bar is looked at: once nothing changes any more, nothing is left to write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

from actors.core.hashing import features_hash, signal_id
from actors.core.outcomes import Changes, Cost, Followed, Known, Said, Span, compare, score, unseen
from actors.core.serving import NO_ANSWER, ServedModel, decide, expires_at, makes_signal
from actors.core.timeframe import end_time
from bus.store import Row, Store
from schema.messages import FeatureRow, ModelState, Outcome
from schema.settings import Symbol

COIN: Final = 0.5  # the base rate of a version that is not in the registry's table
POINTS_SECONDS: Final = 60.0  # how long the terminals' point sizes are believed before they are read again

Bar = tuple[str, str, datetime]  # symbol, timeframe, open time
Shadows = Mapping[tuple[str, str], ServedModel]  # by model name and version


class Facts(NamedTuple):
    """The share of rises that a version was trained on, its first and last training row's bar, its feature set, and the share of its
    validation rows that were out of distribution; None where its manifest does not say."""

    base_rate: float
    first_ts: datetime | None = None
    last_ts: datetime | None = None
    feature_set: str | None = None
    outlier_rate: float | None = None


class OutcomeArchive:
    """Reads spans of bars; point sizes and base rates are remembered."""

    def __init__(self, store: Store, symbols: Mapping[str, Symbol]) -> None:
        self._store = store
        self._symbols = symbols
        self._points: dict[str, float] = {}
        self._points_until = 0.0
        self._facts: dict[tuple[str, str], Facts] = {}

    async def changes(self, touched: Sequence[Span], heard: int, shadows: Shadows, now: float) -> Changes:
        """What is to be written so that the outcomes of these bars, and of the five before each, are right.

        Signals of a CANDLES sequence behind ``heard`` wait until they are heard. ``now`` is a monotonic time.
        Raises StoreUnavailable.
        """
        if not touched:
            return Changes((), (), ())
        widened = await self._store.fetch("spans_widened", *_columns(touched))
        spans = [Span(**row) for row in widened]
        columns = _columns(spans)
        said = await self._said(columns)
        stored = await self._stored(columns)
        # Long histories are loaded without a signal: their bars need not be read.
        speaking = {(s.symbol, s.timeframe) for s in said} | {
            (k.outcome.symbol, k.outcome.timeframe) for k in stored.values()
        }
        followed = {model.manifest.timeframe for model in shadows.values()}
        wanted_spans = [s for s in spans if s.timeframe in followed or (s.symbol, s.timeframe) in speaking]
        if not wanted_spans:
            return Changes((), (), ())
        await self._refresh_points(now)
        bars: dict[Bar, tuple[FeatureRow, Followed]] = {}
        for row in await self._store.fetch("bars_in_spans", *_columns(wanted_spans)):
            bars[row["symbol"], row["timeframe"], row["ts"]] = _bar(row)
        wanted: dict[str, Known] = {}
        for one in said:
            found = bars.get((one.symbol, one.timeframe, one.ts))
            if found is not None and (one.candles_seq <= heard or one.id in stored):
                wanted[one.id] = score(one, found[1], self._cost(one.symbol))
        silent: dict[Bar, list[Known]] = {}  # what shadows said of a bar before
        for known in stored.values():
            if known.outcome.state == "shadow":
                silent.setdefault((known.outcome.symbol, known.outcome.timeframe, known.outcome.ts), []).append(known)
        for bar, (row, after) in bars.items():
            for shadow in await self._shadowed(bar, row, shadows, silent.get(bar, ())):
                if shadow.id not in wanted:  # else it has been activated meanwhile, and said the same aloud
                    wanted[shadow.id] = score(shadow, after, self._cost(shadow.symbol))
        return compare(wanted, stored)

    # --- signals ---------------------------------------------------------------------------------------------------

    async def _said(self, columns: tuple[list[Any], ...]) -> list[Said]:
        out = []
        for row in await self._store.fetch("said_in_spans", *columns):
            # A provisional version's signals all say so, and no other's do.
            state: ModelState = "provisional" if row["abstain"] == "unproven" else "champion"
            out.append(
                Said(
                    state=state, base_rate=(await self.facts(row["model_name"], row["model_version"])).base_rate, **row
                )
            )
        return out

    async def _stored(self, columns: tuple[list[Any], ...]) -> dict[str, Known]:
        rows = await self._store.fetch("outcomes_in_spans", *columns)
        return {row["id"]: Known(outcome_of(row), row["fwd_seq"], row["void"]) for row in rows}

    async def facts(self, name: str, version: str) -> Facts:
        """What the registry's table says of a version; asked again where it does not say."""
        known = self._facts.get((name, version))
        if known is None:
            row = await self._store.fetchrow("model_facts", name, version)
            if row is None:
                return Facts(COIN)
            known = Facts(COIN if row["base_rate"] is None else row["base_rate"], *row[1:])
            if row["base_rate"] is not None:
                self._facts[name, version] = known
        return known

    # --- shadows ---------------------------------------------------------------------------------------------------

    async def _shadowed(self, bar: Bar, row: FeatureRow, shadows: Shadows, before: Sequence[Known]) -> list[Said]:
        """What the shadows say of a bar, and what those have said that are no longer followed, where it still stands."""
        symbol, timeframe, ts = bar
        if not (row.ready and makes_signal(row)):
            return []
        digest = features_hash(symbol, timeframe, row) if before or shadows else ""
        out: dict[str, Said] = {}
        for known in before:
            outcome = known.outcome
            if outcome.signal_id == signal_id(symbol, timeframe, ts, outcome.model_version, digest):
                out[outcome.signal_id] = _said_before(outcome)
        for (name, version), model in shadows.items():
            if model.manifest.timeframe != timeframe or not unseen(ts, model.manifest.last_ts, timeframe):
                continue
            key = signal_id(symbol, timeframe, ts, version, digest)
            answer = NO_ANSWER if key in out else model.answer(symbol, row)
            if answer.prob_up is None:
                continue
            end = end_time(ts, timeframe)
            # As if it served, and heard of each bar in time: a shadow hears of it only when all is over.
            decision = decide(
                row, symbol, answer, model.manifest, "shadow", judged_at=end, expires_at=expires_at(ts, end)
            )
            out[key] = Said(
                id=key,
                ts=ts,
                symbol=symbol,
                timeframe=timeframe,
                model_name=name,
                model_version=version,
                state="shadow",
                prob_up=answer.prob_up,
                base_rate=(await self.facts(name, version)).base_rate,
                label=decision.label,
                abstain=decision.abstain,
                candles_seq=0,  # that of its label says enough
            )
        return list(out.values())

    # --- costs -----------------------------------------------------------------------------------------------------

    def _cost(self, symbol: str) -> Cost:
        """The settings' word goes over the terminals'."""
        said = self._symbols.get(symbol)
        point = said.point if said is not None and said.point is not None else self._points.get(symbol)
        return Cost(point=point, spread=None if said is None else said.spread)

    async def _refresh_points(self, now: float) -> None:
        if now >= self._points_until:
            self._points = {row["symbol"]: row["point"] for row in await self._store.fetch("symbol_points")}
            self._points_until = now + POINTS_SECONDS


def outcome_of(row: Row) -> Outcome:
    """A row of ``signal_outcomes`` as its message."""
    fields = Outcome.__struct_fields__[1:]
    return Outcome(signal_id=row["id"], **{name: row[name] for name in fields})


def _said_before(outcome: Outcome) -> Said:
    return Said(
        id=outcome.signal_id,
        candles_seq=0,
        **{name: getattr(outcome, name) for name in Said.__struct_fields__ if name not in ("id", "candles_seq")},
    )


def _bar(row: Row) -> tuple[FeatureRow, Followed]:
    after = Followed(
        ret=row["fwd_ret_5"],
        fwd_seq=row["fwd_seq"],
        candles_seq=row["trade_seq"],
        **{name: row[name] for name in ("entry_open", "entry_close", "entry_spread", "exit_close", "exit_spread")},
    )
    return FeatureRow(**{name: row[name] for name in _FEATURES}), after


_FEATURES: Final = (
    "ts", "open", "high", "low", "close", "volume", "spread", "real_volume", "rsi", "macd", "macd_signal", "macd_hist",
    "atr", "ma60", "ret_1", "fwd_ret_5", "bar", "ready", "revision", "live", "ts_source",
)  # fmt: skip


def _columns(spans: Sequence[Span]) -> tuple[list[Any], ...]:
    return tuple(list(column) for column in zip(*spans, strict=True))
