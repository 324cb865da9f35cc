"""The bars of one series: which version of a bar counts, and what a message of the log changes.

The log may hold a bar several times, in any order and from several sources. Nothing else decides what that means:

* a bar's first values are its revision 0; other values make the next revision;
* values that a bar has, or had without a newer clock since, change nothing, however often they come;
* of one source, versions are ordered by the payload's ``server_time`` where both have it, else by the log. Server time
  repeats an hour in autumn: where both have it in UTC as well, that decides;
* the owner is the first live source, or the one that ``[symbols] priority`` names first; others fill holes and never
  revise, not even what they filled; files and replays never own;
* a bar's age is judged once, by its first live version: what changes later changes no verdict on how late it came;
* a withdrawn bar is gone, and its revisions count on if it comes back.

Bars later than all before take the short way (:func:`append`); any other goes through :class:`actors.core.history.History`, a
window of the series from a checkpoint on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Final, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Struct, field

from actors.core.features import READY_AFTER, Columns, FeatureState, forward_returns
from actors.core.ingest import ANONYMOUS, REPLAYED, digest
from actors.core.timeframe import FORWARD_BARS, forward_span, from_epoch
from schema.messages import Candle, CandleBlock, FeatureRow, Fill, Withdrawn

RECENT: Final = 64  # newest bars whose versions are remembered, so that a terminal's repeats need no history
CHECKPOINT_EVERY: Final = 1_024  # bars between two checkpoints


class Origin(NamedTuple):
    """Where a message of the log came from, as far as its bars' versions depend on it."""

    source: str
    server_time: int | None
    owns: bool  # a live source: neither history nor replay
    live: bool  # its bars make signals
    ts_source: str
    seq: int
    server_utc: int | None = None
    heard_at: datetime | None = None  # when its bars' age is judged; None: at each bar's own end


def origin(block: CandleBlock, seq: int) -> Origin:
    return Origin(
        block.source or (REPLAYED if block.replay else ANONYMOUS),
        block.server_time,
        not block.history and not block.replay,
        not block.history,
        block.ts_source,
        seq,
        block.server_utc,
        block.now if block.replay else block.received_at,
    )


class Mark(NamedTuple):
    """A bar's current version: the digest of its values, and the clock and source it came with."""

    digest: int
    server_time: int | None
    source: str
    ts_source: str = "utc"
    server_utc: int | None = None


def own(owner: str | None, new: Origin, priority: Sequence[str]) -> str | None:
    """Who owns the series once ``new`` has been heard."""
    if not new.owns or owner == new.source:
        return owner
    if owner is None:
        return new.source

    def rank(name: str) -> int:
        return priority.index(name) if name in priority else len(priority)

    return new.source if rank(new.source) < rank(owner) else owner


def _order(new: Origin, current: Mark) -> int | None:
    """Above 0 where the new version's clock is the later one, below where it is the earlier; None where a clock is missing."""
    if new.server_utc is not None and current.server_utc is not None:
        return new.server_utc - current.server_utc
    if new.server_time is not None and current.server_time is not None:
        return new.server_time - current.server_time
    return None


def effect(current: Mark, mark: int, new: Origin, owner: str | None, former: Iterable[int]) -> str:
    """What a version does to a bar that exists: ``same``, ``confirmed``, ``stale``, ``foreign`` or ``revised``.

    ``confirmed`` leaves the values but takes over clock, source and the way in which its time became UTC.
    """
    if owner is not None and new.source != owner and (new.source, mark) != (current.source, current.digest):
        return "foreign"
    if new.source != current.source:
        if mark == current.digest:
            return "confirmed" if new.source == owner else "same"
        return "revised" if new.source == owner or mark not in former else "stale"
    order = _order(new, current)
    if order is not None and order < 0:
        return "stale"
    newer = new.server_time is not None and (order is None or order > 0)
    if mark == current.digest:
        return "confirmed" if newer else "same"
    return "revised" if newer or mark not in former else "stale"


class Checkpoint(Struct, frozen=True):
    """A series as it stands after ``features.bars`` bars, the log being applied up to ``seq``.

    Every bar after it is found in the log from ``start`` on, which lies before ``seq`` where the bars before it were
    computed again later.
    """

    features: FeatureState
    seq: int
    start: int

    @property
    def last_ts(self) -> int:
        return self.features.times[-1]


class SeriesState(Struct):
    """A series as the feature calculator holds it, and as its snapshot stores it.

    ``seq`` is the CANDLES sequence of the newest message that was applied. ``deferred`` names messages whose bars lie
    before the series' first and wait for one recomputation together. ``owners`` says who owned the series from which
    CANDLES sequence on: a window that begins in the past must not judge by today's owner.
    """

    symbol: str
    timeframe: str
    features: FeatureState = field(default_factory=FeatureState)
    seq: int = 0
    owner: str | None = None
    first_ts: int | None = None
    recent: dict[int, Mark] = {}
    deferred: list[int] = []
    owners: list[tuple[int, str]] = []

    def hear(self, new: Origin, priority: Sequence[str]) -> None:
        """Takes note of who owns the series now that a message has come."""
        owner = own(self.owner, new, priority)
        if owner is None or owner == self.owner:
            return
        if self.owner is not None and not self.owners:
            self.owners.append((0, self.owner))  # of a snapshot that did not keep them
        self.owners.append((new.seq, owner))
        self.owner = owner

    def owner_before(self, seq: int) -> str | None:
        """Who owned the series when the message ``seq`` came."""
        if not self.owners:
            return self.owner
        return next((owner for since, owner in reversed(self.owners) if since < seq), None)

    def remember(self, ts: int, mark: Mark) -> None:
        self.recent[ts] = mark
        if len(self.recent) > RECENT:
            del self.recent[min(self.recent)]


class Change(Struct):
    """What a message changed: rows to publish, ascending, labels of earlier rows, and bars that are gone."""

    rows: list[FeatureRow] = []
    fills: list[Fill] = []
    withdrawn: list[Withdrawn] = []
    checkpoints: list[tuple[int, bytes]] = []  # (number, encoded Checkpoint): states at full multiples of bars

    def __bool__(self) -> bool:
        return bool(self.rows or self.fills or self.withdrawn)


def epoch(row: Candle) -> int:
    return int(row.ts.timestamp())


def split(state: SeriesState, rows: Sequence[Candle], new: Origin) -> tuple[list[Candle], list[Candle]]:
    """The rows that are later than all before, and those that might change the past.

    A row that cannot have an effect on one of the newest bars is dropped; one that confirms it is remembered.
    """
    last = state.features.last_ts
    fresh: list[Candle] = []
    older: list[Candle] = []
    for row in rows:
        ts = epoch(row)
        if last is None or ts > last:
            fresh.append(row)
            last = ts
            continue
        current = state.recent.get(ts)
        mark = digest(row)
        if current is not None:
            what = effect(current, mark, new, state.owner, ())
            if what == "confirmed" and new.ts_source == current.ts_source:
                state.recent[ts] = Mark(mark, new.server_time, new.source, new.ts_source, new.server_utc)
                continue
            if what in ("same", "stale", "foreign"):
                continue
        older.append(row)
    return fresh, older


def ways(
    state: SeriesState, block: CandleBlock, new: Origin
) -> tuple[list[Candle], Literal["append", "defer", "recompute"]]:
    """How a message reaches the series, and its rows that are later than all before.

    ``append``: by these rows alone. ``defer``: all of it lies before the series' first bar, which waits for what else
    comes from there. ``recompute``: it reaches into the past.
    """
    if block.withdrawn:
        return [], "recompute"
    fresh, older = split(state, block.rows, new)
    if not older:
        return fresh, "append"
    if state.first_ts is not None and epoch(older[-1]) < state.first_ts and not fresh:
        return fresh, "defer"
    return fresh, "recompute"


def append(state: SeriesState, rows: Sequence[Candle], new: Origin) -> Change:
    """Takes rows that are later than all before, ascending; one row goes the short way, many the block way."""
    change = Change()
    if not rows:
        return change
    if state.first_ts is None:
        state.first_ts = epoch(rows[0])
    for row in rows[-RECENT:]:
        state.remember(epoch(row), Mark(digest(row), new.server_time, new.source, new.ts_source, new.server_utc))
    at = 0
    while at < len(rows):
        room = CHECKPOINT_EVERY - state.features.bars % CHECKPOINT_EVERY
        part = rows[at : at + room]
        if len(part) == 1:
            _append_one(state, part[0], new, change)
        else:
            _append_many(state, part, new, change)
        at += len(part)
        _checkpoint(state, new.seq, change)
    return change


def _checkpoint(state: SeriesState, seq: int, change: Change) -> None:
    number, rest = divmod(state.features.bars, CHECKPOINT_EVERY)
    if rest == 0 and number:
        change.checkpoints.append((number, msgspec.json.encode(Checkpoint(state.features, seq, seq))))


def _append_one(state: SeriesState, row: Candle, new: Origin, change: Change) -> None:
    features = state.features
    ts = epoch(row)
    label = features.forward(ts, row.close, forward_span(state.timeframe))
    rsi, macd, signal, hist, atr, ma60, ret = features.update(ts, row.high, row.low, row.close)
    change.rows.append(
        FeatureRow(
            ts=row.ts,
            open=row.open,
            high=row.high,
            low=row.low,
            close=row.close,
            volume=row.volume,
            spread=row.spread,
            real_volume=row.real_volume,
            rsi=rsi,
            macd=macd,
            macd_signal=signal,
            macd_hist=hist,
            atr=atr,
            ma60=ma60,
            ret_1=ret,
            bar=features.bars,
            ready=features.bars >= READY_AFTER,
            live=new.live,
            source=new.source or None,
            ts_source=new.ts_source,
        )
    )
    if label is not None:
        _label(change, label)


def _append_many(state: SeriesState, rows: Sequence[Candle], new: Origin, change: Change) -> None:
    ts = np.array([epoch(row) for row in rows], np.int64)
    high = np.array([r.high for r in rows])
    low = np.array([r.low for r in rows])
    close = np.array([r.close for r in rows])
    features = state.features
    bars = features.bars
    before = features.times
    earlier, labels = forward_returns(
        ts, close, before, newest_closes(features, len(before)), forward_span(state.timeframe)
    )
    columns = features.update_block(ts, high, low, close)
    for label in earlier:
        _label(change, label)
    shown = [Shown(0, new.live, new.source, new.ts_source)] * len(rows)
    change.rows += make_rows(rows, columns, labels, bars, shown)


def _label(change: Change, label: tuple[int, float | None]) -> None:
    """A label that is known now: into the change's own row where that is its bar, else as a fill."""
    when = from_epoch(label[0])
    for at in range(len(change.rows) - 1, max(-1, len(change.rows) - 1 - 2 * FORWARD_BARS), -1):
        if change.rows[at].ts == when:
            change.rows[at] = msgspec.structs.replace(change.rows[at], fwd_ret_5=label[1])
            return
    change.fills.append(Fill(ts=when, fwd_ret_5=label[1]))


def newest_closes(features: FeatureState, count: int) -> list[float]:
    """The newest ``count`` closes (at most 60), oldest first."""
    return [features.closes[(features.bars - back) % len(features.closes)] for back in range(count, 0, -1)]


class Shown(NamedTuple):
    """What a row tells of its bar beside values; the last three where they are not the message's own."""

    revision: int
    live: bool
    source: str
    ts_source: str
    brought_seq: int | None = None
    server_time: int | None = None
    heard_at: datetime | None = None


def make_rows(
    rows: Sequence[Candle],
    columns: Columns,
    labels: Sequence[float | None],
    bars_before: int,
    shown: Sequence[Shown],
) -> list[FeatureRow]:
    """Candles and their indicators as rows; ``bars_before`` is the number of bars before the first."""
    return [
        FeatureRow(
            ts=row.ts,
            open=row.open,
            high=row.high,
            low=row.low,
            close=row.close,
            volume=row.volume,
            spread=row.spread,
            real_volume=row.real_volume,
            rsi=rsi,
            macd=macd,
            macd_signal=signal,
            macd_hist=hist,
            atr=atr,
            ma60=ma60,
            ret_1=ret,
            fwd_ret_5=label,
            bar=bar,
            ready=bar >= READY_AFTER,
            revision=revision,
            live=live,
            source=source or None,
            ts_source=ts_source,
            brought_seq=brought_seq,
            server_time=server_time,
            heard_at=heard_at,
        )
        for bar, (
            row,
            rsi,
            macd,
            signal,
            hist,
            atr,
            ma60,
            ret,
            label,
            (revision, live, source, ts_source, brought_seq, server_time, heard_at),
        ) in enumerate(
            zip(
                rows,
                columns.rsi,
                columns.macd,
                columns.macd_signal,
                columns.macd_hist,
                columns.atr,
                columns.ma60,
                columns.ret_1,
                labels,
                shown,
                strict=True,
            ),
            bars_before + 1,
        )
    ]
