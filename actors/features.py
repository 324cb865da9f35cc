"""The feature calculator: reads CANDLES in order, owns every series' state, publishes FEATURES.

It is the one place that decides which version of a bar counts. Start-up is recovery: snapshots, then the log from the
cursor on; where the derived stream ends earlier than the cursor, or a snapshot is missing or too new, everything is
computed again from the log (and, where the log no longer reaches back, from the archive).
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, ClassVar, Final

import msgspec
from nats.errors import Error as NatsError
from nats.js.errors import APIError, KeyNotFoundError, NotFoundError
from nats.js.kv import KeyValue

from actors.core.blocks import feature_blocks
from actors.core.history import History, revise, take_in
from actors.core.ingest import ANONYMOUS
from actors.core.series import CHECKPOINT_EVERY, Change, Checkpoint, Origin, SeriesState, append, epoch, origin, ways
from actors.core.timeframe import from_epoch
from bus.client import BusUnavailable, Outgoing, outgoing
from bus.consume import Delivery, Done, Outcome, Reader, Rejected, StreamReplaced, consume, last_message
from bus.forward import CURSOR_KEY, check_forward
from bus.store import Store
from bus.subjects import CANDLES, FEATURE_STATE, FEATURES, bucket_stream, bucket_subject, key_token
from bus.supervise import Context, run_tasks
from bus.telemetry import (
    candle_revisions_total,
    cursor_lag,
    cursor_lag_seconds,
    feature_rebuilds_total,
    feature_rows_total,
    series_gauge,
    trace_headers,
)
from bus.writer import Superseded, Writer
from schema.messages import Candle, CandleBlock

HISTORY_BARS: Final = 1_000_000  # bars of recomputed series kept in memory, all series together (64 MB)
SNAPSHOT_CHUNK: Final = 32  # snapshots encoded between two batches, so that none of them delays a candle
SNAPSHOT_BUDGET: Final = 10.0  # seconds: the next snapshot stores what this one did not
ARCHIVE_PATIENCE: Final = 60.0
LOG_SILENCE: Final = 2.0  # seconds without a message of the log until it is asked whether there is one
BUCKET: Final = bucket_stream(FEATURE_STATE)


class Cursor(msgspec.Struct, frozen=True):
    """Where the snapshots stand: every message up to ``seq`` is applied; ``made`` is the newest that made features."""

    seq: int = 0
    made: int = 0


class TooManySeries(Exception):
    """More series than ``[features] max_series``: raise the limit or send fewer symbols."""


class Features:
    name: ClassVar[str] = "features"
    owned: ClassVar[bool] = True
    description: ClassVar[str] = "Turns closed candles into features, incrementally."

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.bus = ctx.bus
        self.log = ctx.log
        self.states: dict[str, SeriesState] = {}  # by subject
        self.histories: OrderedDict[str, History] = OrderedDict()  # least recently used first
        self.handled = 0  # CANDLES sequence up to which every message is applied and its features are published
        self.made = 0  # the newest CANDLES sequence that made features: FEATURES must reach as far
        self.whole = 0  # FEATURES held everything up to here when this run began: not published again
        self.first_seq = 1  # the log's first sequence when this run began: it ages on, see _log_begins
        self.restored = True  # states come from snapshots, so that an unknown subject is a new series
        self._making = 0
        self._in_hand = False  # states have changed and what follows from it is not published yet, or never was
        self._run = ""  # tells the message ids of a rebuild from those of the run whose messages were lost
        self._out = Writer(self.bus, str(FEATURES.stream), 0)
        self._snapshot_writer = Writer(self.bus, BUCKET, 0)
        self._stored = Cursor()
        self._dirty: set[str] = set()
        self._checkpoints: dict[tuple[str, int], bytes] = {}  # not stored yet
        self._quiet_since: dict[str, float] = {}  # when a series last had bars before its first
        self._gate = asyncio.Lock()  # held while a batch is in hand: states are whole and published only between two
        self._store: Store | None = None

    async def run(self) -> None:
        start = await self._recover()
        async with Reader(self.bus, CANDLES, name=self.name, start=start) as reader:
            reconnected = asyncio.Event()
            forget = self.bus.on_reconnect(reconnected.set)
            self.ctx.ready()
            try:
                await run_tasks(
                    {
                        "features-consume": consume(
                            reader,
                            self._handle,
                            publish=self._out.publish,
                            committed=self._committed,
                            gate=self._gate,
                            failing=self.ctx.failing,
                        ),
                        "features-snapshot": self._snapshots(),
                        "features-deferred": self._recompute_deferred(),
                        "features-check": self._check(reconnected),
                    }
                )
            finally:
                forget()
                if self.bus.connected:
                    with contextlib.suppress(TimeoutError, NatsError, APIError, BusUnavailable, Superseded):
                        async with asyncio.timeout(2.0):
                            await self._snapshot()
                if self._store is not None:
                    await self._store.close()

    # --- start-up --------------------------------------------------------------------------------------------------

    async def _recover(self) -> int:
        """Loads what is known and returns the stream sequence to read on from."""
        kv = await self.bus.js.key_value(FEATURE_STATE)
        # Where the streams end before anything of them is read: what comes to stand behind that is somebody else's.
        self._snapshot_writer = Writer(self.bus, BUCKET, (await self.bus.js.stream_info(BUCKET)).state.last_seq)
        info = await self.bus.js.stream_info(str(CANDLES.stream))
        last, self.first_seq = info.state.last_seq, max(info.state.first_seq, 1)
        end = (await self.bus.js.stream_info(str(FEATURES.stream))).state.last_seq
        self._out = Writer(self.bus, str(FEATURES.stream), end)
        tail = await last_message(self.bus, FEATURES)
        if tail is not None:
            block = tail[1]
            # A recomputation whose last part is missing is published again from its first.
            self.whole = block.candles_seq if block.part == block.parts else block.candles_seq - 1
        cursor = await self._load_cursor(kv)
        states = await self._load_states(kv)
        reason = None
        check_forward(last, max(cursor.seq, self.whole))
        if any(state.seq > last for state in states.values()):
            reason = f"a snapshot is newer than the log, which ends at {last}"
        elif self.whole < cursor.made and self.first_seq <= cursor.made:
            reason = f"FEATURES ends at {self.whole} instead of {cursor.made}"
        elif cursor.seq and (missing := await self._without_snapshot(states, cursor.seq)):
            reason = f"{missing} has no snapshot"
        if reason is not None:
            self.log.warning("series are computed again from the log", action="features.rebuild", reason=reason)
            states, cursor, self.restored = {}, Cursor(), False
            # What was lost goes out under new ids: the stream may still know the old ones and drop them as repeats.
            self._run = f":{tail[0] if tail is not None else 0}"
        self.states, self.handled = states, cursor.seq
        self.made = self._making = self.whole
        series_gauge.set(len(self.states), actor=self.name)
        return max(cursor.seq + 1, self.first_seq)

    async def _load_cursor(self, kv: KeyValue) -> Cursor:
        try:
            entry = await kv.get(CURSOR_KEY)
        except (KeyNotFoundError, NotFoundError):
            self.restored = False
            return Cursor()
        return msgspec.json.decode(entry.value or b"{}", type=Cursor)

    async def _load_states(self, kv: KeyValue) -> dict[str, SeriesState]:
        states: dict[str, SeriesState] = {}
        decoder = msgspec.json.Decoder(SeriesState)
        for key in await self.bus.keys(FEATURE_STATE, "*.*"):  # no checkpoints, which are read when they are needed
            if key.startswith("cursor."):
                continue
            try:
                entry = await kv.get(key)
            except (KeyNotFoundError, NotFoundError):
                continue  # deleted: it is rebuilt as if it had never been there
            state = decoder.decode(entry.value or b"")
            states[CANDLES.subject(state.timeframe, state.symbol)] = state
        return states

    async def _without_snapshot(self, states: dict[str, SeriesState], cursor: int) -> str | None:
        """A subject whose first message lies at or before the cursor although no snapshot knows it.

        Not one that was a series too many and parked: no features were ever made of it, and it begins with what is
        sent once there is room.
        """
        info = await self.bus.js.stream_info(str(CANDLES.stream), subjects_filter=CANDLES.wildcard)
        for subject in info.state.subjects or {}:
            if subject not in states:
                first = await self._next_of(subject, 1)
                if first <= cursor and not await self._left_out(subject, first):
                    return subject
        return None

    async def _left_out(self, subject: str, first: int) -> bool:
        """Whether FEATURES reaches back to the subject's first message ``first`` and has nothing of the subject."""
        stream = str(FEATURES.stream)
        try:
            raw = await self.bus.js.get_msg(stream, seq=1, subject=FEATURES.wildcard, next=True, direct=True)
            if FEATURES.decode(raw.data or b"").candles_seq > first:
                return False
            made = FEATURES.subject(*CANDLES.parse(subject))
            await self.bus.js.get_msg(stream, seq=1, subject=made, next=True, direct=True)
        except NotFoundError:
            return True
        return False

    # --- the stream ------------------------------------------------------------------------------------------------

    async def _handle(self, delivery: Delivery[CandleBlock]) -> Outcome:
        block, seq = delivery.message, delivery.stream_seq
        self._in_hand = True
        try:
            state = await self._state(delivery.subject, block, seq)
        except TooManySeries as error:
            return Rejected(str(error))  # one series too many must not hold up the others
        if seq <= state.seq:
            return Done()
        change = await self._change(delivery.subject, state, block, seq)
        state.seq = seq
        self._keep(delivery.subject, change)
        if seq <= self.whole or not change:
            return Done()
        self._making = seq
        feature_rows_total.inc(len(change.rows))
        return Done(_messages(block, seq, change, delivery.headers, self._run))

    def _keep(self, subject: str, change: Change) -> None:
        """Marks what the next snapshot has to store."""
        self._dirty.add(subject)
        for number, data in change.checkpoints:
            self._checkpoints[subject, number] = data

    def _committed(self, delivery: Delivery[CandleBlock]) -> None:
        self.handled, self.made = delivery.stream_seq, max(self.made, self._making)
        self._in_hand = False
        cursor_lag.set(delivery.pending, actor=self.name)
        cursor_lag_seconds.set(max(0.0, time.time() - delivery.stored_at), actor=self.name)

    async def _state(self, subject: str, block: CandleBlock, seq: int) -> SeriesState:
        state = self.states.get(subject)
        if state is None:
            if len(self.states) >= self.ctx.settings.features.max_series:
                raise TooManySeries(f"{subject} is one series more than [features] max_series allows.")
            state = SeriesState(block.symbol, block.timeframe)
            if not self.restored and await self._log_begins() > 1:
                # The log no longer reaches back to this series' first bar: the archive does.
                history = History()
                await self._restore([history], state, seq)
                if len(history):
                    history.rows(len(history), state)
                    history.settle(state)
            self.states[subject] = state
            series_gauge.set(len(self.states), actor=self.name)
        return state

    def _priority(self, symbol: str) -> tuple[str, ...]:
        known = self.ctx.settings.symbols.get(symbol)
        return known.priority if known is not None else ()

    async def _change(self, subject: str, state: SeriesState, block: CandleBlock, seq: int) -> Change:
        new = origin(block, seq)
        state.hear(new, self._priority(block.symbol))
        history = self.histories.get(subject)
        fresh, way = ways(state, block, new)
        if way == "append":
            if history is not None and history.seq < seq:
                history.apply(block, seq, self._priority(block.symbol))
            return append(state, fresh, new)
        if way == "defer":
            # Older than everything: a terminal loads history backwards. One recomputation serves all of it.
            state.deferred.append(seq)
            self._quiet_since[subject] = time.monotonic()
            self.histories.pop(subject, None)
            return Change()
        if state.deferred:
            # What waits came before this message, and must not have the last word on a bar of both.
            change = await self._take_in(subject, state, [block], seq)
            state.deferred = []
            self._quiet_since.pop(subject, None)
        else:
            change = await self._revise(subject, state, block, seq)
        if change:
            feature_rebuilds_total.inc()
            sent = {row.ts for row in block.rows}
            revised = sum(row.revision > 0 for row in change.rows if row.ts in sent)
            candle_revisions_total.inc(revised, what="revised")
            candle_revisions_total.inc(len(change.withdrawn), what="withdrawn")
            self.log.info(
                "the past changed",
                action="features.revised",
                subject=subject,
                revised=revised,
                withdrawn=len(change.withdrawn),
                rows=len(change.rows),
            )
        return change

    async def _revise(self, subject: str, state: SeriesState, block: CandleBlock, seq: int) -> Change:
        earliest = min((int(ts.timestamp()) for ts in block.withdrawn), default=2**62)
        if block.rows:
            earliest = min(earliest, *map(epoch, block.rows))
        history = self.histories.get(subject)
        if history is None or (history.begins is not None and earliest <= history.begins):
            base = await self._checkpoint_before(state, earliest, seq)
            history, _ = await self._windows(subject, state, base, seq)
        self._remember(subject, history)
        return await asyncio.get_running_loop().run_in_executor(
            None, revise, history, state, block, seq, self._priority(block.symbol)
        )

    def _remember(self, subject: str, history: History) -> None:
        """Keeps a window for the next message that reaches into the past, and drops those that were used least."""
        self.histories[subject] = history
        self.histories.move_to_end(subject)
        while len(self.histories) > 1 and sum(map(len, self.histories.values())) > HISTORY_BARS:
            self.histories.popitem(last=False)

    async def _windows(
        self, subject: str, state: SeriesState, base: Checkpoint | None, before: int
    ) -> tuple[History, History]:
        """The series' bars from a checkpoint on, as of the message before ``before``; None: from its first bar on.

        The first window leaves out what was deferred, the second has it where it stands in the log; without anything
        deferred they are one. They come from the log, and from the archive where the log begins later by now than
        when the checkpoint was made. What has aged is in the archive: nothing is purged that is not.
        """
        until = min(before - 1, state.seq)  # the newest of its messages that the state knows
        while True:
            start, begins = base.start if base is not None else 1, await self._log_begins()
            first = max(start, begins)
            owner = state.owner_before(first)
            windows = [History(base, owner) for _ in range(2 if state.deferred else 1)]
            if start < begins:
                await self._restore(windows, state, first)
            if first <= until:
                await self._apply(windows, subject, state, first, until)
            if await self._log_begins() <= first:
                return windows[0], windows[-1]
            # The head of the log was purged while it was read.

    async def _apply(self, windows: list[History], subject: str, state: SeriesState, start: int, until: int) -> None:
        """The log's messages of a series into windows of it; the first of two goes without what was deferred."""
        priority = self._priority(state.symbol)
        deferred = set(state.deferred)
        async with Reader(self.bus, CANDLES, name=f"{self.name}-window", start=start, subject=subject) as reader:
            while reader.position < until:
                try:
                    delivery = await reader.next(timeout=LOG_SILENCE)
                except TimeoutError:
                    if await self._next_of(subject, reader.position + 1) > until:
                        return  # purged meanwhile: nothing more will come
                    continue
                seq = delivery.stream_seq
                if seq <= until:
                    for window in windows[-1:] if seq in deferred else windows:
                        window.apply(delivery.message, seq, priority)

    async def _log_begins(self) -> int:
        """The first CANDLES sequence that the log still holds: it ages while this actor runs."""
        return max((await self.bus.js.stream_info(str(CANDLES.stream))).state.first_seq, 1)

    async def _next_of(self, subject: str, seq: int) -> int:
        """The sequence of a subject's first message from ``seq`` on; far away where there is none."""
        try:
            message = await self.bus.js.get_msg(str(CANDLES.stream), seq=seq, subject=subject, next=True, direct=True)
        except NotFoundError:
            return 2**62
        return int(message.seq or 0)

    async def _checkpoint_before(self, state: SeriesState, ts: int, seq: int) -> Checkpoint | None:
        """The newest checkpoint that lies before ``ts`` and is not of the log's future; None: from the first bar on."""
        kv = await self.bus.js.key_value(FEATURE_STATE)
        decoder = msgspec.json.Decoder(Checkpoint)
        waiting = {number: data for (subject, number), data in self._checkpoints.items() if subject == _subject(state)}
        for number in range(state.features.bars // CHECKPOINT_EVERY, 0, -1):
            data = waiting.get(number)
            if data is None:
                try:
                    data = (await kv.get(_key(state, number))).value or b""
                except (KeyNotFoundError, NotFoundError):
                    continue
            point = decoder.decode(data)
            if point.last_ts < ts and point.seq < seq:
                return point
        return None

    async def _restore(self, windows: list[History], state: SeriesState, before: int) -> None:
        """The archive's bars after the windows' base, as the log's messages before ``before`` had made them.

        What bars were before that counts too: sent again, it is no news.
        """
        url = self.ctx.database_url
        if url is None:
            self.log.warning(
                "no archive: the series begins with the log", action="features.no_archive", symbol=state.symbol
            )
            return
        if self._store is None:
            self._store = await Store.connect(url, size=1, name=self.name)
        await self._store.wait_until_up(ARCHIVE_PATIENCE)
        begins = windows[0].begins
        of = (state.symbol, state.timeframe, from_epoch(begins) if begins is not None else None, before)
        bars = await self._store.fetch("bars_before", *of)
        former = await self._store.fetch("former_versions", *of)
        withdrawn = await self._store.fetch("withdrawn_before", *of)
        for window in windows:
            for row in bars:
                new = Origin(
                    row["source"] or ANONYMOUS,
                    row["server_time"],
                    False,
                    row["live"],
                    row["ts_source"],
                    row["candles_seq"],
                    heard_at=row["heard_at"],
                )
                window.restore(_candle(row), row["revision"], new, row["applied_seq"] or 0)
            for row in former:
                window.recall(_candle(row))
            window.recall_withdrawals((int(row["ts"].timestamp()), row["revision"], row["seq"]) for row in withdrawn)

    async def _recompute_deferred(self) -> None:
        """Once nothing older has come for a while, the bars before a series' first are taken in, all together."""
        while True:
            await asyncio.sleep(min(1.0, self.ctx.settings.features.quiet_seconds / 2))
            now = time.monotonic()
            for subject, state in list(self.states.items()):
                if not state.deferred:
                    continue
                since = self._quiet_since.setdefault(subject, now)
                if now - since < self.ctx.settings.features.quiet_seconds:
                    continue
                async with self._gate:
                    if state.deferred:  # nobody else has taken it in meanwhile
                        await self._publish_deferred(subject, state)

    async def _take_in(self, subject: str, state: SeriesState, blocks: list[CandleBlock], seq: int) -> Change:
        """Computes the series anew with what was deferred, and then with ``blocks``, the message ``seq``."""
        before, after = await self._windows(subject, state, None, seq if blocks else seq + 1)
        change = await asyncio.get_running_loop().run_in_executor(
            None, take_in, before, after, state, blocks, seq, self._priority(state.symbol)
        )
        self._remember(subject, after)
        return change

    async def _publish_deferred(self, subject: str, state: SeriesState) -> None:
        seq, first = self.handled, state.deferred[0]
        self._in_hand = True
        change = await self._take_in(subject, state, [], seq)
        feature_rebuilds_total.inc()
        self._keep(subject, change)
        head = await self._newest_deferred(state)
        await self._out.publish(_messages(head, seq, change, {"Nats-Msg-Id": f"deferred:{first}"}, self._run))
        state.deferred = []
        self._quiet_since.pop(subject, None)
        self.made = self._making = max(self.made, seq)
        self._dirty.add(subject)
        self._in_hand = False

    async def _newest_deferred(self, state: SeriesState) -> CandleBlock:
        """The newest message that was deferred, for what a block of features tells of its origin."""
        try:
            raw = await self.bus.js.get_msg(str(CANDLES.stream), seq=state.deferred[-1])
        except NotFoundError:  # the log has aged since
            return CandleBlock(
                symbol=state.symbol, timeframe=state.timeframe, rows=(), received_at=datetime.now(UTC), history=True
            )
        return CANDLES.decode(raw.data or b"")

    # --- snapshots and checks ---------------------------------------------------------------------------------------

    async def _snapshots(self) -> None:
        while True:
            await asyncio.sleep(self.ctx.settings.features.snapshot_seconds)
            try:
                await self._snapshot()
            except (NatsError, APIError, BusUnavailable) as error:
                self.log.warning(
                    "snapshot put off", action="features.snapshot", error=f"{type(error).__name__}: {error}"
                )

    async def _snapshot(self) -> None:
        """Stores the state of every series that changed, then the cursor: a crash in between repeats some work.

        Nothing is stored where a batch failed: its states know of rows that were not published, and a snapshot of them
        would keep these from ever being made.
        """
        async with self._gate:
            if self._half_done():
                return
            cursor = Cursor(seq=self.handled, made=self.made)
            todo, self._dirty = sorted(self._dirty), set()
            points, self._checkpoints = self._checkpoints, {}
        chunk: list[str] = []
        try:
            # Checkpoints first: one that the snapshot does not know of yet is passed over, a missing one costs time.
            for lo in range(0, len(points), SNAPSHOT_CHUNK):
                part = list(points)[lo : lo + SNAPSHOT_CHUNK]
                await self._put(
                    (_key(self.states[subject], number), points[subject, number]) for subject, number in part
                )
            points = {}
            while todo:
                async with self._gate:
                    if self._half_done():
                        return
                    chunk, todo = todo[:SNAPSHOT_CHUNK], todo[SNAPSHOT_CHUNK:]
                    encoded = [
                        (_key(state), msgspec.json.encode(state))
                        for state in (self.states[subject] for subject in chunk)
                    ]
                await self._put(encoded)
        except BaseException:
            self._dirty.update(todo, chunk)
            self._checkpoints = points | self._checkpoints
            raise
        if cursor != self._stored:
            await self._put([(CURSOR_KEY, msgspec.json.encode(cursor))])
            self._stored = cursor

    def _half_done(self) -> bool:
        """Whether a batch has failed; asked with the gate held, when none can be under way."""
        return self._in_hand

    async def _put(self, values: Iterable[tuple[str, bytes]]) -> None:
        """Values of the bucket, each on the condition that its key is as this process left it."""
        await self._snapshot_writer.publish(
            [
                # No two puts have one id: the same value again is a put like any other.
                Outgoing(bucket_subject(FEATURE_STATE, key), value, secrets.token_hex(12), BUCKET)
                for key, value in values
            ],
            budget=SNAPSHOT_BUDGET,
        )

    async def _check(self, reconnected: asyncio.Event) -> None:
        """After every reconnect: does FEATURES still hold what was published? If not, recover."""
        while True:
            await reconnected.wait()
            reconnected.clear()
            tail = await last_message(self.bus, FEATURES)
            found = tail[1].candles_seq if tail is not None else 0
            if found < self.made:
                raise StreamReplaced(f"FEATURES ends at {found} instead of {self.made}: it is made whole again.")


def _subject(state: SeriesState) -> str:
    return CANDLES.subject(state.timeframe, state.symbol)


def _key(state: SeriesState, checkpoint: int | None = None) -> str:
    """The snapshot's key, or that of a checkpoint, in the bucket."""
    key = f"{state.timeframe}.{key_token(state.symbol)}"
    return key if checkpoint is None else f"{key}.{checkpoint}"


def _candle(row: Any) -> Candle:
    """A candle from an archive's row."""
    return Candle(**{name: row[name] for name in Candle.__struct_fields__})


def _messages(
    block: CandleBlock, seq: int, change: Change, headers: Mapping[str, str], run: str
) -> tuple[Outgoing, ...]:
    traced = trace_headers(headers)
    return tuple(
        outgoing(
            FEATURES,
            made,
            block.timeframe,
            block.symbol,
            msg_id=f"{headers.get('Nats-Msg-Id', '')}:{seq}:{made.part}{run}",
            headers=traced,
        )
        for made in feature_blocks(block, seq, change)
    )
