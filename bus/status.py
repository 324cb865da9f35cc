"""What actors say of themselves: each answers for its state and for its process' metrics, and whoever asks hears all.

Plain subjects, one a question and actor, without a queue group: a micro service's endpoints are answered by one of its
instances, and here each counts, standbys too. An actor answers while it waits to be started again as well, so that one
that crashes again and again shows what it dies of.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar

import msgspec
import structlog
from msgspec import Struct
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from bus import telemetry
from bus.client import Bus
from bus.subjects import metrics_of, status_of

log = structlog.get_logger(__name__)

State = Literal["starting", "working", "standby", "restarting"]
Health = Literal["ok", "degraded"]

ANSWER_WAIT: Final = 0.5  # seconds for all answers together: who has not answered by then is missing
GRACE: Final = 0.05  # seconds for further instances once everybody is heard of
MOST_ANSWERS: Final = 64  # to one question: more instances than anybody runs
METRICS_BYTES: Final = 700_000  # of one process' text: a message holds 1 MB, and JSON escapes each quote and line end
SENTENCE: Final = 300  # characters of an error that are told

RECENT: Final = 300.0  # seconds that a failure is remembered
LOOPING: Final = 3  # failures within RECENT that are a loop ...
STEADY: Final = 30.0  # ... unless the actor has worked for so many seconds since

NO_RESPONDERS: Final = "503"


class Status(Struct, frozen=True, kw_only=True):
    """One actor of one process. ``seconds`` is how long ``state`` has lasted, ``restarts`` those of the last five minutes.

    ``behind``: messages that its cursor had still to read; None where it has none. ``concern``: what keeps it from doing
    its work well although it runs.
    """

    actor: str
    process: str
    instance: str
    host: str
    pid: int
    state: State
    seconds: float
    restarts: int = 0
    error: str = ""
    behind: int | None = None
    concern: str = ""


class Scrape(Struct, frozen=True, kw_only=True):
    """A process' metrics as text, with who it is."""

    process: str
    instance: str
    state: State
    text: str


A = TypeVar("A", Status, Scrape)


@dataclass(slots=True)
class Standing:
    """An actor's state over its restarts, as its process knows it."""

    actor: str
    process: Process
    state: State = "starting"
    since: float = field(default_factory=time.monotonic)
    concerns: dict[str, str] = field(
        default_factory=dict
    )  # by what they are about, in sentences; a restart clears them
    _failures: deque[float] = field(default_factory=lambda: deque(maxlen=100))
    _error: str = ""

    def enter(self, state: State) -> None:
        if state == "starting":
            self.concerns.clear()
        if state != self.state:
            self.state, self.since = state, time.monotonic()

    def fail(self, error: str) -> None:
        """It has ended and will be started again."""
        self._failures.append(time.monotonic())
        self._error = " ".join(error.split())[:SENTENCE]
        self.enter("restarting")

    def status(self) -> Status:
        now = time.monotonic()
        restarts = sum(now - at < RECENT for at in self._failures)
        behind = telemetry.cursor_lag.largest(actor=self.actor)
        return Status(
            actor=self.actor,
            process=self.process.name,
            instance=self.process.instance,
            host=socket.gethostname(),
            pid=os.getpid(),
            state=self.state,
            seconds=round(now - self.since, 1),
            restarts=restarts,
            error=self._error if restarts else "",
            behind=None if behind is None else int(behind),
            concern=" ".join(self.concerns.values()),
        )

    def scrape(self) -> Scrape:
        text = telemetry.render()
        if len(text) > METRICS_BYTES:
            log.warning("metrics are cut", action="status.cut", actor=self.actor, size=len(text))
            text = text[: text.rfind(b"\n# HELP ", 0, METRICS_BYTES) + 1]
        process = self.process
        return Scrape(process=process.name, instance=process.instance, state=self.state, text=text.decode())


@dataclass(slots=True)
class Process:
    """The actors that share a process, and its registry; ``name`` is ``hot`` where there are several."""

    name: str
    instance: str = field(default_factory=lambda: secrets.token_hex(6))
    standings: dict[str, Standing] = field(default_factory=dict)

    @classmethod
    def of(cls, actors: Sequence[str]) -> Process:
        made = cls(actors[0] if len(actors) == 1 else "hot")
        made.standings = {actor: Standing(actor, made) for actor in actors}
        return made


async def answer(bus: Bus, standing: Standing) -> None:
    """Answers both questions on this connection until it is closed."""

    def respond(what: Callable[[], Struct]) -> Callable[[Msg], Any]:
        async def on_request(msg: Msg) -> None:
            if msg.reply and msg.data.decode(errors="replace") != standing.process.instance:  # which knows itself
                with contextlib.suppress(NatsError):  # whoever asked is told nothing then, and no longer waits
                    await bus.nc.publish(msg.reply, msgspec.json.encode(what()))

        return on_request

    await bus.nc.subscribe(status_of(standing.actor), cb=respond(standing.status))
    await bus.nc.subscribe(metrics_of(standing.actor), cb=respond(standing.scrape))


# --- asking ------------------------------------------------------------------------------------------------------


async def statuses(
    bus: Bus, actors: Collection[str], *, own: Process | None = None, wait: float = ANSWER_WAIT
) -> dict[str, list[Status]]:
    """What each actor's processes say, who works first; ``own``: the asker's process, which needs no message for it."""
    found = await _ask(bus, {actor: status_of(actor) for actor in actors}, Status, own, wait)
    for actor in actors:
        if own is not None and actor in own.standings:
            found[actor].append(own.standings[actor].status())
        found[actor].sort(key=lambda status: (status.state != "working", status.host, status.pid))
    return found


async def scrape(bus: Bus, actors: Collection[str], own: Process, *, wait: float = ANSWER_WAIT) -> bytes:
    """The metrics of this process and of every other one that runs ``actors``, as one text.

    A process that does not answer in time is missing, and ``mt5_up`` is 0 for it.
    """
    found = await _ask(bus, {actor: metrics_of(actor) for actor in actors}, Scrape, own, wait)
    texts = {own.name: telemetry.render().decode()}
    up = {own.name: 1}
    seen = {own.instance}
    for actor, scrapes in found.items():
        if not scrapes and actor not in own.standings:
            up[actor] = 0
        for one in sorted(scrapes, key=lambda s: (s.state == "standby", s.instance)):
            if one.instance in seen:
                continue  # its process has answered for another of its actors
            seen.add(one.instance)
            name = _free(f"{one.process}-standby" if one.state == "standby" else one.process, texts)
            texts[name], up[name] = one.text, 1
    # Some thousand lines, beside the loop: on it they would be milliseconds for every candle.
    return (await asyncio.to_thread(telemetry.merge, texts, up)).encode()


def _free(name: str, taken: Mapping[str, str]) -> str:
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free


async def _ask(
    bus: Bus, subjects: Mapping[str, str], kind: type[A], own: Process | None, wait: float
) -> dict[str, list[A]]:
    """Every other process' answer by actor.

    Ends once each actor is heard of that the asker has not itself: that it works somewhere, or that there is nobody.
    """
    found: dict[str, list[A]] = {actor: [] for actor in subjects}
    if not bus.connected or not subjects:
        return found
    actors = list(subjects)
    missing = set(actors) - own.standings.keys() if own is not None else set(actors)
    question = own.instance.encode() if own is not None else b""
    done = asyncio.Event()
    if not missing:
        done.set()

    async def on_answer(msg: Msg) -> None:
        actor = actors[int(msg.subject.rpartition(".")[2])]
        if not msg.data:
            if (msg.headers or {}).get("Status") == NO_RESPONDERS:
                missing.discard(actor)
        elif len(found[actor]) < MOST_ANSWERS:
            try:
                one = msgspec.json.decode(msg.data, type=kind)
            except msgspec.DecodeError as error:  # another version's: it is there, but cannot be read
                log.warning("answer not understood", action="status.answer", actor=actor, error=str(error))
            else:
                found[actor].append(one)
                if one.state != "standby":
                    missing.discard(actor)
        if not missing:
            done.set()

    inbox = bus.nc.new_inbox()
    try:
        async with asyncio.timeout(wait):
            sub = await bus.nc.subscribe(f"{inbox}.*", cb=on_answer)
            try:
                for number, actor in enumerate(actors):
                    await bus.nc.publish(subjects[actor], question, reply=f"{inbox}.{number}")
                await done.wait()
                await asyncio.sleep(GRACE)
            finally:
                with contextlib.suppress(NatsError):
                    await sub.unsubscribe()
    except (NatsError, TimeoutError):
        pass  # who has not answered is missing
    return found


# --- judging -----------------------------------------------------------------------------------------------------


def judge(actor: str, found: Sequence[Status]) -> tuple[Health, str]:
    """An actor's health from what its processes say, and one sentence for a person."""
    if not found:
        return "degraded", f"Does not answer: start it with `mt5 up {actor}`, or see its log."
    standbys = [status for status in found if status.state == "standby"]
    others = [status for status in found if status.state != "standby"]
    if not others:
        where = ", ".join(map(_place, standbys))
        return "degraded", f"Only a standby answers ({where}): it takes over once the process that worked is gone."
    status = min(others, key=lambda s: s.state != "working")
    last = f", last: {status.error}" if status.error else ""
    if status.restarts >= LOOPING and (status.state != "working" or status.seconds < STEADY):
        return "degraded", f"Was started again {status.restarts} times within five minutes{last}"
    if status.state == "restarting":
        return "degraded", f"Has failed and is started again{last}"
    if status.state == "starting":
        return "degraded", f"Is starting{last or ': it catches up, or waits for its servers.'}"
    if status.concern:
        return "degraded", status.concern
    sentence = "Works" if status.behind is None else f"Works, {status.behind:,} messages behind"
    if standbys:
        sentence += f"; a standby waits ({', '.join(map(_place, standbys))})"
    return "ok", f"{sentence}."


def _place(status: Status) -> str:
    return f"process {status.pid} on {status.host}"
