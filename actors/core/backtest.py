"""A whole system in memory: payloads go in as a gateway takes them, signals come out as an emitter makes them.

It asks the very cores that the actors ask, in their order, so that a file gives the same signals here as through a
running system: the same blocks with the same CANDLES sequences, the same features, the same decisions. What only time
decides there is decided here as on a system that keeps up: the archive has every bar before the next payload comes,
bars before a series' first are taken in when everything was posted, and the stream knows a message id again.

Memory: the log of candles is kept, about 120 bytes a bar, since a bar may be revised at any time.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Final, NamedTuple

import msgspec
from msgspec import Struct, field

from actors.core.blocks import candle_blocks, feature_blocks
from actors.core.clocks import Clocks
from actors.core.history import History, revise, take_in
from actors.core.ingest import Close, Series, block_id, check_payload, judge, read
from actors.core.series import Change, SeriesState, append, origin, ways
from actors.core.serving import ServedModel, makes_signal, signal_of
from schema.messages import CandleBlock, FeatureBlock, ModelState, Signal
from schema.settings import Symbol

LOOKED_UP: Final = 8  # bars of one payload for whose predecessor the archive is asked

Key = tuple[str, str]


class Serving(NamedTuple):
    """The version that serves a timeframe, from the first CANDLES sequence on."""

    model: ServedModel
    state: ModelState


class Taken(NamedTuple):
    """What a gateway says of candles; ``reason`` is the first rejection's."""

    received: int = 0
    accepted: int = 0
    duplicates: int = 0
    forming: int = 0
    rejected: int = 0
    reason: str | None = None

    def plus(self, other: Taken) -> Taken:
        return Taken(
            self.received + other.received,
            self.accepted + other.accepted,
            self.duplicates + other.duplicates,
            self.forming + other.forming,
            self.rejected + other.rejected,
            self.reason or other.reason,
        )


class Step(NamedTuple):
    """A message of FEATURES, and the signals made of it."""

    block: FeatureBlock
    signals: list[Signal]


class Held(Struct):
    """A series as gateway, feature calculator and archive hold it. ``log`` is its part of CANDLES, encoded."""

    known: Series
    state: SeriesState
    log: list[tuple[int, bytes]] = []
    history: History | None = None
    times: array[int] = field(default_factory=lambda: array("q"))  # of its bars, ascending
    closes: array[float] = field(default_factory=lambda: array("d"))

    def archive(self, change: Change) -> None:
        """Takes the bars of a change as the archive does; a replay withdraws none."""
        for row in change.rows:
            ts = int(row.ts.timestamp())
            at = len(self.times) if not self.times or ts > self.times[-1] else bisect_left(self.times, ts)
            if at < len(self.times) and self.times[at] == ts:
                self.closes[at] = row.close
            else:
                self.times.insert(at, ts)
                self.closes.insert(at, row.close)

    def close_before(self, ts: int) -> Close | None:
        at = bisect_left(self.times, ts) - 1
        return Close(self.times[at], self.closes[at]) if at >= 0 else None


_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(CandleBlock)


class Backtest:
    """Empty at first. ``first_seq`` is the CANDLES sequence of its first message, ``model_name`` names a timeframe's model."""

    def __init__(
        self,
        clocks: Clocks,
        symbols: Mapping[str, Symbol],
        serving: Mapping[str, Serving],
        model_name: Callable[[str], str],
        *,
        first_seq: int = 1,
    ) -> None:
        self._clocks = clocks
        self._symbols = symbols
        self._serving = serving
        self._model_name = model_name
        self._first_seq = first_seq
        self._versions = {tf: [(first_seq, one.model.manifest.version)] for tf, one in serving.items()}
        self.seq = first_seq - 1  # of the newest message of CANDLES
        self._ids: set[str] = set()  # message ids of CANDLES: a known one is stored no second time
        self._held: dict[Key, Held] = {}

    # --- the gateway -----------------------------------------------------------------------------------------------

    def post(self, body: bytes, now: datetime) -> tuple[Taken, Iterator[Step]]:
        """Takes a payload's bytes at ``now``: what the gateway says at once, and what becomes of it step by step.

        The steps are to be gone through before anything else is asked.

        Raises:
            PayloadError, msgspec.DecodeError: these bytes are no payload.
        """
        payload = read(body)
        checked = check_payload(payload, self._symbols)
        held = {key: self._series(key) for key in sorted(checked.sent)}
        known = {key: one.known for key, one in held.items()}
        conversion = self._clocks.resolve(
            payload.source,
            server_time=payload.server_time,
            gmt_time=payload.gmt_time,
            series=checked.sent,
            now=now.timestamp(),
            replay=payload.replay,
        )
        judged = judge(payload, checked, now.timestamp(), known, self._symbols, conversion)
        bases = {
            (key, ts): close
            for key, ts in judged.unsure[:LOOKED_UP]
            if (close := held[key].close_before(ts)) is not None
        }
        if bases:
            judged = judge(payload, checked, now.timestamp(), known, self._symbols, conversion, bases)
        told = [(key, rows) for key, rows in judged.confirmed.items()]
        told += [(key, layer) for key, layers in judged.layers.items() for layer in layers]
        stored: list[tuple[int, CandleBlock]] = []
        for key, rows in told:
            for block in candle_blocks(key, rows, payload, now, conversion, checked.points.get(key[0])):
                msg_id = block_id(*key, block.rows, payload.server_time)
                if msg_id not in self._ids:
                    self._ids.add(msg_id)
                    self.seq += 1
                    stored.append((self.seq, block))
        for key, rows in told:
            known[key].remember(rows, payload.origin, conversion.sent_at(payload.server_time))
        taken = Taken(
            received=len(payload.candles),
            accepted=sum(len(layer) for layers in judged.layers.values() for layer in layers),
            duplicates=judged.duplicates,
            forming=len(judged.forming),
            rejected=len(judged.rejected),
            reason=judged.rejected[0].error if judged.rejected else None,
        )
        return taken, self._steps(stored, now)

    def _series(self, key: Key) -> Held:
        held = self._held.get(key)
        if held is None:
            held = self._held[key] = Held(Series(), SeriesState(*key))
        return held

    # --- features --------------------------------------------------------------------------------------------------

    def _steps(self, stored: Sequence[tuple[int, CandleBlock]], now: datetime) -> Iterator[Step]:
        for seq, block in stored:
            held = self._series((block.symbol, block.timeframe))
            held.log.append((seq, _ENCODER.encode(block)))
            change = self._change(held, block, seq)
            held.state.seq = seq
            if change:
                yield from self._speak(held, block, seq, change, now)

    def _change(self, held: Held, block: CandleBlock, seq: int) -> Change:
        state = held.state
        new = origin(block, seq)
        fresh, way = ways(state, block, new)
        if way == "append":
            if held.history is not None:
                held.history.apply(block, seq, ())
            return append(state, fresh, new)
        if way == "defer":
            state.deferred.append(seq)
            held.history = None
            return Change()
        if state.deferred:
            return self._take_in(held, [block], seq)
        if held.history is None:
            held.history = _window(held.log[:-1])
        return revise(held.history, state, block, seq, ())

    def _take_in(self, held: Held, blocks: Sequence[CandleBlock], seq: int) -> Change:
        """The series anew with what was deferred, and then with ``blocks``, which are the newest of its log."""
        waiting = set(held.state.deferred)
        log = held.log[: len(held.log) - len(blocks)]
        before = _window([(at, data) for at, data in log if at not in waiting])
        held.history = _window(log)
        change = take_in(before, held.history, held.state, blocks, seq, ())
        held.state.deferred = []
        return change

    def settle(self, now: datetime) -> Iterator[Step]:
        """Quiet has come: what was deferred is taken in."""
        for held in self._held.values():
            if held.state.deferred:
                newest = held.state.deferred[-1]
                (head,) = [_DECODER.decode(data) for at, data in held.log if at == newest]
                yield from self._speak(held, head, self.seq, self._take_in(held, [], self.seq), now)

    # --- signals ---------------------------------------------------------------------------------------------------

    def _speak(self, held: Held, block: CandleBlock, seq: int, change: Change, now: datetime) -> Iterator[Step]:
        held.archive(change)
        serving = self._serving.get(block.timeframe)
        for made in feature_blocks(block, seq, change):
            signals = []
            for row in made.rows:
                if not makes_signal(row):
                    continue
                signal = signal_of(
                    made,
                    row,
                    model=serving.model if serving is not None else None,
                    version=serving.model.manifest.version if serving is not None else None,
                    state=serving.state if serving is not None else None,
                    model_name=self._model_name(block.timeframe),
                    versions=self._versions.get(block.timeframe, ()),
                    created_at=now,
                )
                if signal.supersedes != signal.id:  # else the bar changed, and nothing that its signal depends on
                    signals.append(signal)
            yield Step(made, signals)


def _window(log: Sequence[tuple[int, bytes]]) -> History:
    """A series' bars from its first on; nobody owns it, since files never do."""
    history = History()
    for seq, data in log:
        history.apply(_DECODER.decode(data), seq, ())
    return history
