"""The scorer: what came of each signal, and of what the shadows would have said; it follows the recorder.

A message of FEATURES or SIGNALS is handled once the recorder has archived it, so that the archive answers completely
whichever of a signal and its label comes later. Outcomes are stored in one transaction with the places that were read
up to, and published just before: what a crash leaves published and not stored is found in the stream and not said twice.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import ClassVar, Final

from nats.js.api import Header
from nats.js.errors import NotFoundError

from actors.artifacts import Artifacts
from actors.audit import Auditor
from actors.core.docket import Docket
from actors.core.outcomes import Changes, Known, message_id, spans
from actors.core.serving import ModelRefused
from actors.scoring.archive import OutcomeArchive
from actors.scoring.cards import Cards
from actors.scoring.drifts import Drifts
from actors.scoring.follow import ACTOR, Follower, Mark, Place, Read, stream_state
from actors.scoring.judge import Judge
from actors.scoring.versions import Versions
from bus.client import NO_MESSAGE, BusUnavailable, Outgoing, outgoing
from bus.consume import Delivery, Reader, consume, last_message
from bus.consume import Outcome as ConsumeOutcome
from bus.patience import Patience
from bus.store import Store
from bus.subjects import MODELS, OUTCOMES, SCORECARD
from bus.supervise import ConfigurationError, Context, run_tasks, serve, withdraw
from bus.telemetry import cursor_lag, cursor_lag_seconds, outcomes_total, outcomes_void_total, trace_headers
from bus.writer import Writer
from schema.messages import ModelEvent

EVENTS: Final = str(OUTCOMES.stream)


class Scorer:
    """The actor; see the module."""

    name: ClassVar[str] = ACTOR
    owned: ClassVar[bool] = True
    own_service: ClassVar[bool] = True
    description: ClassVar[str] = "Scores signals by what came true, and judges models by it"

    def __init__(self, ctx: Context) -> None:
        if ctx.database_url is None:
            raise ConfigurationError("The scorer needs PostgreSQL: set MT5_DATABASE_URL, or leave it to `up`.")
        self._ctx = ctx
        self._url = ctx.database_url
        self._bus = ctx.bus
        self._log = ctx.log
        self._patience = Patience(ctx.log, self.name)
        self._published = Mark(f"{self.name}.{OUTCOMES.prefix}")
        self._versions = Versions(Artifacts(ctx.bus, ctx.settings), ctx.log)
        self._said: set[str] = set()  # message ids that stand in the stream and may not be stored yet

    async def run(self) -> None:
        self._store = await Store.connect(self._url, size=4, name=f"mt5-{self.name}")
        try:
            self._archive = OutcomeArchive(self._store, self._ctx.settings.symbols)
            await self._read_back()
            async with (
                Reader(self._bus, MODELS, name=self.name, start=1) as models,
                Follower(self._bus, self._store, self._patience, self._log) as follower,
            ):
                # Whose shadows are followed must be known before a bar is scored.
                newest = await last_message(self._bus, MODELS)
                while newest is not None and models.position < newest[0]:
                    await self._versions.on_event(await models.next())
                self._judge = Judge(self._bus, self._archive, self._versions, self._ctx.settings.models, self._log)
                self._cards = Cards(self._store, self._versions, self._patience, self._ctx.settings.scorer.window)
                self._drifts = Drifts(
                    self._bus, self._store, self._archive, self._versions, self._judge, self._patience, self._log
                )
                await self._patience.insist(lambda: self._judge.load(self._store))
                await self._patience.insist(self._cards.load)
                service = await serve(self._bus, self.name, self.description, {SCORECARD: self._cards.answer})
                try:
                    self._ctx.ready()
                    await run_tasks(
                        {
                            "scorer-outcomes": self._score(follower),
                            "scorer-models": consume(models, self._on_event),
                            "scorer-decisions": self._judge.decide(),
                            "scorer-cards": self._cards.refresh(),
                            "scorer-drift": self._drifts.watch(),
                            "scorer-integrity": self._watch_files(),
                            "scorer-audit": self._auditor().run(),
                        }
                    )
                finally:
                    if self._bus.connected:
                        await withdraw(service)
        finally:
            await self._store.close()

    async def _on_event(self, delivery: Delivery[ModelEvent]) -> ConsumeOutcome:
        done = await self._versions.on_event(delivery)
        await self._patience.insist(self._judge.sync)
        return done

    def _auditor(self) -> Auditor:
        return Auditor(
            self._ctx, self._store, lambda: Artifacts(self._bus, self._ctx.settings).load, random.SystemRandom()
        )

    async def _watch_files(self) -> None:
        """Reads the champions' files anew as often as signals are audited: one that no longer verifies must not speak."""
        while True:
            for champion in self._versions.serving():
                if champion.state != "champion":
                    continue
                try:
                    await Artifacts(self._bus, self._ctx.settings).load(champion.model_name, champion.version)
                except ModelRefused as error:
                    if isinstance(error.__cause__, OSError):  # what this host lacks says nothing of the model
                        self._log.warning("champion not verified", action="scorer.files", reason=str(error))
                    else:
                        self._judge.fault(champion, f"Its files no longer verify. {error}", {"refused": str(error)})
                except BusUnavailable as error:
                    self._log.warning("champion not verified", action="scorer.files", reason=str(error))
            await asyncio.sleep(self._ctx.settings.scorer.audit_seconds)

    # --- outcomes --------------------------------------------------------------------------------------------------

    async def _read_back(self) -> None:
        """Remembers which outcomes stand in the stream behind the last ones that are known to be stored."""
        place = await self._patience.insist(lambda: self._published.load(self._store))
        created, last = await stream_state(self._bus, EVENTS)
        self._created = created
        self._out = Writer(self._bus, EVENTS, last)
        start = place.seq + 1 if place is not None and place.created == created else 1
        try:
            newest = int((await self._bus.js.get_last_msg(EVENTS, OUTCOMES.wildcard)).seq or 0)
        except NotFoundError as error:
            if error.err_code != NO_MESSAGE:
                raise
            return
        if newest < start:
            return
        async with Reader(self._bus, OUTCOMES, name=self.name, start=start, batch=512) as reader:
            async for delivery in reader:
                self._said.add(delivery.headers.get(Header.MSG_ID.value, ""))
                if delivery.stream_seq >= newest:
                    break

    async def _score(self, follower: Follower) -> None:
        while True:
            read = await follower.read()
            if read.newest:
                await self._handle(follower, read)
            else:
                await asyncio.sleep(self._ctx.settings.scorer.poll_seconds)

    async def _handle(self, follower: Follower, read: Read) -> None:
        """Brings the outcomes of the bars that were touched to what the archive says of them now."""
        touched = spans(read.touched)
        changes = await self._patience.insist(
            lambda: self._archive.changes(touched, read.heard, self._versions.shadows, time.monotonic())
        )
        place = await self._publish((*changes.new, *changes.changed), read)
        dockets = self._judge.take(changes)
        await self._patience.insist(lambda: self._commit(follower, read, changes, place, dockets))
        self._cards.take(changes)
        self._drifts.take(changes)
        follower.moved(read)
        if place is not None:
            self._published.place = place
        for known in changes.new:
            outcomes_total.inc(state=known.outcome.state)
        outcomes_void_total.inc(len(changes.void))
        for prefix, newest in read.newest.items():
            stream = prefix.upper()
            cursor_lag.set(newest.pending, actor=self.name, stream=stream)
            cursor_lag_seconds.set(max(0.0, time.time() - newest.stored_at), actor=self.name, stream=stream)

    async def _publish(self, scored: Sequence[Known], read: Read) -> Place | None:
        """Publishes what does not stand in the stream yet; a place behind all of it, None where nothing was to say."""
        if not scored:
            return None
        headers = trace_headers(next(iter(read.newest.values())).headers)
        messages: list[Outgoing] = []
        for known in scored:
            outcome = known.outcome
            msg_id = message_id(outcome)
            if msg_id not in self._said:
                messages.append(
                    outgoing(OUTCOMES, outcome, outcome.timeframe, outcome.symbol, msg_id=msg_id, headers=headers)
                )
        await self._out.publish(messages)
        created, last = await stream_state(self._bus, EVENTS)
        return Place(last, created, datetime.now(UTC))

    async def _commit(
        self, follower: Follower, read: Read, changes: Changes, place: Place | None, dockets: Mapping[str, Docket]
    ) -> None:
        async with self._store.transaction() as connection:
            await follower.move(connection, read)
            if place is not None:
                await self._published.move(self._store, connection, place, 0)
            if changes.void:
                await connection.execute(self._store.sql("void_outcomes"), *zip(*changes.void, strict=True))
            written = (*changes.new, *changes.changed)
            if written:
                await connection.execute(self._store.sql("upsert_outcomes"), *_columns(written))
            await self._judge.save(self._store, connection, dockets)


def _columns(scored: Sequence[Known]) -> tuple[Sequence[object], ...]:
    rows = [
        (
            o.signal_id,
            o.ts,
            o.symbol,
            o.timeframe,
            o.model_name,
            o.model_version,
            o.state,
            o.prob_up,
            o.base_rate,
            o.label,
            o.abstain,
            o.ret,
            o.up,
            o.won,
            o.gross,
            o.net,
            o.candles_seq,
            fwd_seq,
        )
        for o, fwd_seq, _ in scored
    ]
    return tuple(zip(*rows, strict=True))
