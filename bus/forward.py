"""CANDLES counts forward only: it is the one stream that cannot be made again, and everything refers to its sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgspec
from nats.js.errors import KeyNotFoundError, NotFoundError

from bus.client import Bus
from bus.consume import last_message
from bus.store import Store
from bus.subjects import CANDLES, FEATURE_STATE, FEATURES, SIGNALS

CURSOR_KEY: Final = "cursor.0"


class WentBackwards(Exception):
    """CANDLES ends earlier than what was read from it: it has lost acknowledged candles."""


class NotArchived(Exception):
    """CANDLES holds candles that the archive has not: what is left of it may not be dropped."""


def check_forward(last: int, known: int) -> None:
    """Raises WentBackwards where CANDLES ends at ``last`` although ``known`` was read from it.

    To go on would give the lost sequences to other candles: the archive, which never goes back in sequence, would
    refuse these without a word.
    """
    if last < known:
        raise WentBackwards(
            f"CANDLES ends at {last}, but candles up to {known} were read from it: its store is an older copy, or its "
            f"disk lost writes. Put the newer store back, or run `mt5 topology forward`, which lets CANDLES count on "
            f"behind {known} and says what that costs."
        )


@dataclass(frozen=True, slots=True)
class Reach:
    """How far CANDLES reaches and how far it was read: ``known`` is the highest sequence that anything refers to."""

    first: int
    last: int
    known: int
    archived: int

    @property
    def backwards(self) -> bool:
        return self.last < self.known


async def reach(bus: Bus, store: Store | None) -> Reach:
    """Asks everything that remembers a CANDLES sequence: snapshots, derived streams, the archive.

    CANDLES itself is asked last: while it grows, what was read from it is never ahead of what it is found to hold.
    """
    known = 0
    try:
        entry = await (await bus.js.key_value(FEATURE_STATE)).get(CURSOR_KEY)
        known = int(msgspec.json.decode(entry.value or b"{}", type=dict[str, Any]).get("seq", 0))
    except (KeyNotFoundError, NotFoundError):
        pass
    features, signals = await last_message(bus, FEATURES), await last_message(bus, SIGNALS)
    known = max(known, features[1].candles_seq if features else 0, signals[1].candles_seq if signals else 0)
    archived = int(await store.fetchval("highest_candles_seq")) if store is not None else 0
    state = (await bus.js.stream_info(str(CANDLES.stream))).state
    return Reach(state.first_seq, state.last_seq, max(known, archived), archived)


async def go_forward(bus: Bus, found: Reach) -> int:
    """Lets CANDLES count on behind everything known; returns its next sequence.

    What it still holds is dropped: every reader has it, which ``known`` says, and the archive must have it too.

    Raises NotArchived.
    """
    if found.last >= found.first and found.archived < found.last:
        raise NotArchived(
            f"The archive has CANDLES up to {found.archived} and the stream ends at {found.last}: start the recorder "
            "(`mt5 up recorder`) until it has caught up, then run this again."
        )
    await bus.js.purge_stream(str(CANDLES.stream), seq=found.known + 1)
    return found.known + 1
