"""The registry at work: hears the models' events, answers who decides on them, and keeps tables, link and shelf in step.

Decisions come by evidence (the scorer) and by hand (a person), one at a time. Each is an event first: whatever else is
written follows from the events, which every start reads from the beginning, so that a decision that was cut off is
finished by the start, or by being asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec
from nats.errors import Error as NatsError
from nats.js.errors import APIError

from actors.artifacts import Artifacts
from actors.core import verdicts
from actors.core.decisions import Judgement, Settled, Step, Waits, by_hand, judge, retire
from actors.core.manifest import ModelRefused
from actors.core.registry import ACTION, PRUNE, Registry, Version
from actors.core.verdicts import DecisionRequest, ReleaseRequest, Verdict
from actors.workshop import files, shelf
from bus import subjects
from bus.client import Bus, BusUnavailable
from bus.consume import Delivery, Done, Outcome
from bus.store import Store, StoreRejected, StoreUnavailable
from bus.subjects import MODELS
from bus.supervise import Endpoint
from bus.telemetry import model_changes_total, trace_headers
from schema.messages import ModelEvent, ModelState
from schema.settings import Settings

PUBLISH_BUDGET: Final = 60.0  # seconds that an event waits for NATS
RETRY_EVERY: Final = 1.0
ACTIVATION_BUDGET: Final = 30.0  # seconds that an answer waits for the emitter
SETTLE_BUDGET: Final = 5.0  # seconds that an answer waits for the registry's tables
SCORER: Final = "scorer"
HAND: Final = "hand"

R = TypeVar("R")


class Desk:
    """``hear`` takes every event, ``archive`` runs as a task, ``endpoints`` are the requests that it answers."""

    def __init__(self, bus: Bus, store: Store, settings: Settings, log: Any) -> None:
        self.registry = Registry()
        self.endpoints: dict[str, Endpoint] = {
            subjects.PROMOTE: self._on_promote,
            subjects.ROLLBACK: self._on_rollback,
            subjects.RETIRE: self._on_retire,
            subjects.DECIDE: self._on_decide,
        }
        self._bus = bus
        self._store = store
        self._settings = settings
        self._log = log
        self._models = Path(settings.home) / "models"
        self._artifacts = Artifacts(bus, settings, kept=1)
        self._changed: dict[tuple[str, str], Version] = {}
        self._rows: dict[tuple[str, str, datetime], ModelEvent] = {}  # decisions that the table may not have yet
        self._answers: dict[str, ModelEvent] = {}  # the emitter's last word on each version
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._heard = 0  # EVENTS sequence up to which the registry has everything
        self._news = asyncio.Condition()
        self._deciding = asyncio.Lock()
        self._looked_for: set[str] = set()  # versions whose files were asked back from the object store
        self._bare: set[str] = set()  # versions whose pickle is known to be gone

    # --- events --------------------------------------------------------------------------------------------------

    async def hear(self, delivery: Delivery[ModelEvent], *, fresh: bool = True) -> Outcome:
        """``fresh``: it comes while we run, so that it counts in our metrics."""
        event = delivery.message
        for version in self.registry.apply(event):
            self._changed[version.model_name, version.version] = version
        action = _action(event)
        if action is not None:
            self._rows[event.version, action, event.at] = event
            if fresh:
                model_changes_total.inc(model=event.model_name, action=action, by=event.by)
        if event.event in ("activated", "refused"):
            self._answers[event.version] = event
        self._settled.clear()
        self._wake.set()
        async with self._news:
            self._heard = delivery.stream_seq
            self._news.notify_all()
        return Done()

    async def archive(self) -> None:
        """Brings the tables and the links to what the events say, as soon as each can be written."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._rows or self._changed:
                try:
                    while self._rows:
                        key = next(iter(self._rows))
                        await self._keep_decision(key[1], self._rows[key])
                        del self._rows[key]
                    while self._changed:
                        await self._keep_state(next(iter(self._changed)))
                except StoreUnavailable as error:
                    self._log.warning("registry waits for PostgreSQL", action="trainer.archive", error=str(error))
                    await asyncio.sleep(RETRY_EVERY)
            self._settled.set()

    async def _keep_decision(self, action: str, event: ModelEvent) -> None:
        evidence = {key: value for key, value in event.evidence.items() if key != ACTION}
        row = (event.at, event.model_name, event.version, action, event.by, event.reason)
        text = msgspec.json.encode(evidence).decode()
        try:
            await self._store.execute("insert_model_decision", *row, text)
        except StoreRejected as error:  # a sentence that PostgreSQL cannot hold must not stop the others
            self._log.error("decision not recorded", action="trainer.decision", version=event.version, error=str(error))

    async def _keep_state(self, key: tuple[str, str]) -> None:
        version = self._changed.pop(key)
        state = (version.state, version.from_seq, version.activated_at, version.reason, version.by)
        try:
            await self._store.execute("set_model_state", *key, *state)
        except StoreUnavailable:
            self._changed.setdefault(key, version)
            raise
        serving = self.registry.serving(version.model_name)
        if serving is not None:
            await self._restore(serving)
            await asyncio.to_thread(files.link, self._models, serving.model_name, serving.version)

    async def _restore(self, version: Version) -> None:
        """Fetches what serves where its folder is missing, as on another machine; once a run."""
        name = version.version
        if name in self._looked_for or (self._models / version.model_name / name).is_dir():
            return
        self._looked_for.add(name)
        try:
            written = await shelf.restore(self._artifacts, self._models, version.model_name, name)
            self._log.info("files restored", action="trainer.restored", version=name, files=", ".join(written))
        except (ModelRefused, BusUnavailable, OSError) as error:
            self._log.warning("files not restored", action="trainer.restore", version=name, error=str(error))

    # --- requests by evidence --------------------------------------------------------------------------------------

    async def _on_decide(self, data: bytes) -> bytes:
        try:
            request = msgspec.json.decode(data or b"{}", type=DecisionRequest)
            if not request.reason.strip():
                raise ValueError("a reason is needed; it is kept and shown with the model.")
        except ValueError as error:
            return _encode(verdicts.invalid(f"This is no decision: {error}"))
        why = request.reason.strip()
        return _encode(await self._decide(request.version, lambda: judge(self.registry, request), why, SCORER))

    async def _on_retire(self, data: bytes) -> bytes:
        def judgement(request: ReleaseRequest) -> Judgement:
            return retire(self.registry, self._named(request, "retire"))

        return await self._by_hand(data, judgement, "")

    async def _on_promote(self, data: bytes) -> bytes:
        def judgement(request: ReleaseRequest) -> Judgement:
            return by_hand(self.registry, self._to_serve(request, "promote"), "promote")

        return await self._by_hand(data, judgement, "")

    async def _on_rollback(self, data: bytes) -> bytes:
        def judgement(request: ReleaseRequest) -> Judgement:
            return by_hand(self.registry, self._rollback_target(request), "rollback")

        return await self._by_hand(data, judgement, "rollback: ")

    async def _by_hand(self, data: bytes, judgement: Callable[[ReleaseRequest], Judgement], prefix: str) -> bytes:
        try:
            request = msgspec.json.decode(data or b"{}", type=ReleaseRequest)
            if not request.reason.strip():
                raise ValueError("a reason is needed; it is kept and shown with the model.")
        except ValueError as error:
            return _encode(verdicts.invalid(f"This cannot be done: {error}"))
        reason = f"{prefix}{request.reason.strip()}"
        return _encode(await self._decide(request.version, lambda: judgement(request), reason, HAND))

    async def _decide(self, asked: str | None, judgement: Callable[[], Judgement], reason: str, by: str) -> Verdict:
        """One decision at a time, each judged by what the one before has changed."""
        async with self._deciding:
            try:
                return await self._act(asked, judgement, reason, by)
            except ValueError as error:
                return verdicts.invalid(f"This cannot be done: {error}")
            except BusUnavailable as error:
                return verdicts.failed(f"{error} Ask again.")

    async def _act(self, asked: str | None, judgement: Callable[[], Judgement], reason: str, by: str) -> Verdict:
        while True:
            step = judgement()
            version = step.version
            name = version.model_name
            match step:
                case Settled():
                    return verdicts.settled(
                        name, version.version, version.state, version is self.registry.serving(name)
                    )
                case Waits():
                    if await self._answered(version) is None:
                        return verdicts.waits(name, version.version, version.asked or version.state, asked)
                case Step(event="retired"):
                    await self.publish(_event(version, "retired", "retired", reason, by, step.evidence))
                    await self.fill(name)
                    await self._tables()
                    return verdicts.settled(name, version.version, "retired", False)
                case Step():
                    answer = await self.release(version, step.state, reason, by, step.evidence)
                    await self.fill(name)
                    return verdicts.released(name, version.version, step.state, answer)

    def _named(self, request: ReleaseRequest, verb: str) -> Version:
        if request.version is None:
            raise ValueError(f"name the version to {verb}; `models list` shows them.")
        found = [v for v in self.registry.find(request.version) if request.model_name in (None, v.model_name)]
        if not found:
            raise ValueError(f"there is no version {request.version}; `models list` shows them.")
        return found[0]

    def _to_serve(self, request: ReleaseRequest, verb: str) -> Version:
        version = self._named(request, verb)
        if version is self.registry.serving(version.model_name) and version.state == "champion":
            raise ValueError(f"{request.version} is the champion already.")
        if version.pruned:
            raise ValueError(f"the files of {request.version} are no longer kept ([models] keep): train again.")
        return version

    def _rollback_target(self, request: ReleaseRequest) -> Version:
        if request.version is not None:
            return self._to_serve(request, "roll back to")
        names = [request.model_name] if request.model_name else list(self.registry.activations)
        if len(names) != 1:
            raise ValueError(f"name the model ({', '.join(names)})." if names else "no model has served yet.")
        previous, serving = self.registry.previous(names[0]), self.registry.serving(names[0])
        if previous is None and serving is not None and serving.state == "champion":
            return serving  # as provisional: it stops speaking, and shows what it is worth
        if previous is None:
            raise ValueError(f"no earlier version of {names[0]} has served.")
        return previous

    # --- steps -----------------------------------------------------------------------------------------------------

    async def publish(self, event: ModelEvent) -> None:
        """Stores an event and waits until the registry has it; BusUnavailable where neither comes within the budget."""
        msg_id = f"{event.model_name}:{event.version}:{event.event}:{event.at.isoformat()}"
        headers = trace_headers()
        deadline = time.monotonic() + PUBLISH_BUDGET
        while True:
            try:
                seq = await self._bus.publish(MODELS, event, event.model_name, msg_id=msg_id, headers=headers)
                break
            except BusUnavailable:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(RETRY_EVERY)
        if await self._until(lambda: self._heard >= seq or None, PUBLISH_BUDGET) is None:
            raise BusUnavailable(f"The event of {event.version} is stored and has not come back.")

    async def release(
        self, version: Version, state: ModelState, reason: str, by: str, evidence: dict[str, Any]
    ) -> ModelEvent | None:
        """Asks the emitter to serve a version; its answer, or None where none came within the budget."""
        await self.publish(_event(version, "released", state, reason, by, evidence))
        return await self._answered(self.registry.versions[version.model_name, version.version])

    async def register(self, version: Version) -> Literal["shadow", "candidate"]:
        """Makes a version that does not serve known: followed, or waiting."""
        place = self.registry.place(version.model_name, self._settings.models.shadows)
        await self.publish(_event(version, "registered", place, version.reason, "trainer", {}))
        return place

    async def fill(self, model_name: str) -> None:
        """Follows the newest candidate where a shadow has left."""
        version = self.registry.next_shadow(model_name, self._settings.models.shadows)
        if version is not None:
            await self.publish(_event(version, "registered", "shadow", version.reason, "trainer", {}))

    async def _answered(self, version: Version) -> ModelEvent | None:
        """What the emitter said of a release; None where nothing came within the budget."""
        answered = await self._until(lambda: True if version.asked is None else None, ACTIVATION_BUDGET)
        if answered is None:
            return None
        await self._tables()
        return self._answers.get(version.version)

    async def _tables(self) -> None:
        with contextlib.suppress(TimeoutError):  # the answer's reader finds the tables and the link as it says
            async with asyncio.timeout(SETTLE_BUDGET):
                await self._settled.wait()

    async def _until(self, question: Callable[[], R | None], budget: float) -> R | None:
        """The answer to a question that is asked after each event; None after ``budget`` seconds."""
        try:
            async with asyncio.timeout(budget), self._news:
                while True:
                    answer = question()
                    if answer is not None:
                        return answer
                    await self._news.wait()
        except TimeoutError:
            return None

    # --- the shelf -------------------------------------------------------------------------------------------------

    async def prune(self, model_name: str) -> None:
        """Removes the files of versions beyond ``[models] keep``: all of those that never served, the others' pickles.

        What served keeps its graph and signed manifest for good: its signals stay verifiable.
        """
        try:
            records = {record.version: record for record in await self._store.models(model_name)}
            for version in self.registry.beyond(model_name, self._settings.models.keep):
                record = records.get(version.version)
                served = version.activated_at is not None or record is None or record.from_seq is not None
                if served and version.version in self._bare:
                    continue
                if not served:
                    reason = f"more than {self._settings.models.keep} newer versions"
                    await self.publish(_event(version, "retired", "retired", reason, "trainer", {ACTION: PRUNE}))
                await shelf.prune(self._bus, self._models, model_name, version.version, everything=not served)
                self._bare.add(version.version)
        except (StoreUnavailable, BusUnavailable, NatsError, APIError, OSError) as error:  # the next run's turn
            self._log.warning(
                "old versions stay for now", action="trainer.prune", error=f"{type(error).__name__}: {error}"
            )


def _event(
    version: Version,
    event: str,
    state: ModelState,
    reason: str,
    by: str,
    evidence: dict[str, Any],
) -> ModelEvent:
    return ModelEvent(
        event=event,  # type: ignore[arg-type]  # callers name one of its literals
        model_name=version.model_name,
        version=version.version,
        timeframe=version.timeframe,
        at=datetime.now(UTC),
        state=state,
        reason=reason,
        by=by,
        recipe=version.recipe,
        evidence=evidence,
    )


def _action(event: ModelEvent) -> str | None:
    """What an event decides; None where it only tells or answers."""
    match event.event:
        case "released":
            return str(event.evidence.get(ACTION, "release"))
        case "retired":
            return str(event.evidence.get(ACTION, "retire"))
        case "refused":
            return "refuse"
        case _:
            return None


def _encode(verdict: Verdict) -> bytes:
    return msgspec.json.encode(verdict)
