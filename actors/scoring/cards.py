"""The scorecard's cards: made again in the background where outcomes came, answered from memory."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final

import msgspec

from actors.core.outcomes import Changes, Known
from actors.core.scorecard import Key, Outcomes, make_card
from actors.scoring.versions import Versions
from bus.patience import Patience
from bus.store import Store
from bus.telemetry import score_gauge
from schema.messages import ModelState
from schema.scorecard import Card, Scorecard, ScorecardRequest

LOOK_SECONDS: Final = 1.0  # how often it is looked for cards to make again …
AT_ONCE: Final = 4  # … of which so many are made, each a query and some milliseconds of a thread
SETTLE_SECONDS: Final = 5.0  # a card is made again so long after it was made, at the earliest
MOST: Final = 2_000  # cards that are kept, the ones that heard of an outcome last
ANSWERED: Final = 200  # cards of one answer: about 3 KB each, where NATS takes 1 MB
SHOWN: Final = 100  # cards that have metrics, of versions that serve
FIGURES: Final = (
    "outcomes",
    "rate",
    "base_rate",
    "brier",
    "base_brier",
    "brier_gain",
    "log_loss",
    "hit_rate",
    "net_mean",
)
BOUNDS: Final = ("brier_gain", "hit_rate", "net_mean")


class Cards:
    def __init__(self, store: Store, versions: Versions, patience: Patience, window: int) -> None:
        self._store = store
        self._versions = versions
        self._patience = patience
        self._window = window
        self._cards: OrderedDict[Key, Card | None] = OrderedDict()  # last heard of comes last
        self._stale: OrderedDict[Key, None] = OrderedDict()  # longest waiting first
        self._made: dict[Key, float] = {}
        self._shown: set[Key] = set()

    async def load(self) -> None:
        """The cards of the versions that serve or are followed. Raises StoreUnavailable."""
        for version in self._versions.followed():
            for row in await self._store.fetch("card_series", version.model_name, version.version):
                self._touch(Key(version.model_name, version.version, row["symbol"], row["timeframe"]))

    def take(self, changes: Changes) -> None:
        for known in (*changes.new, *changes.changed):
            self._touch(_key(known))
        if changes.void:  # their series are not told: rare, and a card a version and series is cheap to make again
            self._stale.update(dict.fromkeys(self._cards))

    def _touch(self, key: Key) -> None:
        self._cards.setdefault(key, None)
        self._cards.move_to_end(key)
        self._stale.setdefault(key)
        while len(self._cards) > MOST:
            old, _ = self._cards.popitem(last=False)
            self._stale.pop(old, None)
            self._made.pop(old, None)

    async def refresh(self) -> None:
        """Makes stale cards again, for ever."""
        while True:
            now = time.monotonic()
            due = [key for key in self._stale if now - self._made.get(key, -SETTLE_SECONDS) >= SETTLE_SECONDS]
            for key in due[:AT_ONCE]:
                del self._stale[key]
                await self._make(key)
            await asyncio.sleep(LOOK_SECONDS if len(due) <= AT_ONCE else 0.0)

    async def _make(self, key: Key) -> None:
        rows = await self._patience.insist(lambda: self._store.fetch("outcomes_of_card", *key, self._window))
        if key not in self._cards:
            return
        self._made[key] = time.monotonic()
        if not rows:  # all of them void
            self._cards[key] = None
            return
        version = self._versions.registry.versions.get((key.model_name, key.model_version))
        state: ModelState = "retired" if version is None else version.state
        card = await asyncio.to_thread(_card, key, state, rows, datetime.now(UTC))
        if key in self._cards:
            self._cards[key] = card
            self._show(key, card)

    def _show(self, key: Key, card: Card) -> None:
        """As metrics, where the version serves; the labels stay few, since a gauge is never taken back."""
        series = Key(key.model_name, "", key.symbol, key.timeframe)
        if card.state not in ("champion", "provisional") or (series not in self._shown and len(self._shown) >= SHOWN):
            return
        self._shown.add(series)
        labels = {"model": key.model_name, "symbol": key.symbol, "timeframe": key.timeframe}
        for name in FIGURES:
            value = getattr(card, name)
            if value is not None:
                score_gauge.set(float(value), figure=name, **labels)
        for name in BOUNDS:
            interval = getattr(card, f"{name.removesuffix('_mean')}_ci")
            if interval is not None:
                score_gauge.set(interval[0], figure=f"{name}_low", **labels)
                score_gauge.set(interval[1], figure=f"{name}_high", **labels)

    async def answer(self, data: bytes) -> bytes:
        """``scorer.scorecard``: a ScorecardRequest, answered with a Scorecard or ``{"error": sentence}``."""
        try:
            request = msgspec.json.decode(data or b"{}", type=ScorecardRequest)
        except msgspec.DecodeError as error:
            return msgspec.json.encode({"error": f"This is no request for a scorecard: {error}."})
        found = sorted(self._wanted(request), key=_place)
        return msgspec.json.encode(Scorecard(cards=tuple(found[:ANSWERED]), left_out=max(0, len(found) - ANSWERED)))

    def _wanted(self, request: ScorecardRequest) -> Iterable[Card]:
        for key, card in self._cards.items():
            if (
                card is not None
                and request.model in (None, key.model_name, key.model_version)
                and request.symbol in (None, key.symbol)
                and request.timeframe in (None, key.timeframe)
            ):
                version = self._versions.registry.versions.get((key.model_name, key.model_version))
                state = card.state if version is None else version.state
                yield card if state == card.state else msgspec.structs.replace(card, state=state)


def _key(known: Known) -> Key:
    outcome = known.outcome
    return Key(outcome.model_name, outcome.model_version, outcome.symbol, outcome.timeframe)


def _card(key: Key, state: ModelState, rows: list[tuple[float | None, ...]], at: datetime) -> Card:
    return make_card(key, state, Outcomes.of([tuple(row) for row in rows]), at)


_ORDER: Final = ("champion", "provisional", "shadow", "candidate", "retired", "refused")


def _place(card: Card) -> tuple[str, int, str, str, str]:
    return card.model_name, _ORDER.index(card.state), card.model_version, card.timeframe, card.symbol
