"""Checks on a beat: each probe in a task of its own, so that one that is slow or hangs delays no other.

A probe looks at one thing and says one or several results. One that does not come back in time is critical, and so is one
that still has not come back at its next beat: it is asked again only after that.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, TypeVar

import structlog
from msgspec.structs import replace
from nats.errors import Error as NatsError
from nats.js.errors import APIError

from actors.monitor.journal import matches
from bus.client import BusUnavailable
from bus.store import StoreRejected, StoreUnavailable
from schema.health import CheckResult, Status

log = structlog.get_logger(__name__)
T = TypeVar("T")

# While everything starts together with the monitor, what has not been well yet is not judged.
STARTING: Final = 30.0
COMES_UP: Final = ("actor", "endpoint", "nats.lag", "outbox")

# What a probe's server may answer, or not answer, while it is away; anything else is a defect of ours.
OUTAGES: Final = (StoreUnavailable, StoreRejected, BusUnavailable, NatsError, APIError, TimeoutError, OSError)

Look = Callable[[], Awaitable[Sequence[CheckResult]]]


@dataclass(frozen=True, slots=True)
class Probe:
    """``name`` is its check, or what its checks begin with where they are ``many``: a look that fails or hangs is then told
    as ``NAME.look``, which depends on what they depend on.

    ``every`` beats it is asked while all is well, each beat while something is not. ``detail``: where its server is away
    it says nothing, since another check says so.
    """

    name: str
    look: Look
    every: int = 1
    detail: bool = False
    many: bool = False
    also: tuple[str, ...] = ()  # beginnings of the names of its results, where they are not its own name

    @property
    def itself(self) -> str:
        """The check that says how the look itself went."""
        return f"{self.name}.look" if self.many else self.name

    def reach(self, check: str) -> int:
        """How much of a check's name is this probe's; 0: it is another's. The probe with the longest reach says it."""
        return max((len(own) for own in (self.name, *self.also) if matches(check, [own])), default=0)

    def is_about(self, names: Sequence[str]) -> bool:
        """Whether one of its results may be among ``names`` (see :func:`matches`)."""
        own = (self.name, *self.also)
        return not names or any(matches(name, own) or matches(mine, [name]) for name in names for mine in own)


def result(check: str, status: Status, message: str, *, value: float | None = None, unit: str = "", latency: float = 0.0) -> CheckResult:  # fmt: skip
    """A result of now."""
    return CheckResult(
        check=check,
        status=status,
        at=datetime.now(UTC),
        message=message,
        value=value,
        unit=unit,
        latency=latency,
    )


def words(error: BaseException) -> str:
    """An error as the end of a sentence."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


_working: set[str] = set()  # what threads look at: one that hangs is not joined by another each beat


async def in_thread(name: str, work: Callable[[], T]) -> T:
    """Runs blocking work in a thread of its own, which nobody waits for at the end: a dead file system never answers.

    Raises:
        TimeoutError: the last work of that name still hangs.
    """
    if name in _working:
        raise TimeoutError("the last look at it still hangs")
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(outcome: T | None, error: BaseException | None) -> None:
        if future.done():  # nobody waits any longer
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(outcome)  # type: ignore[arg-type]

    def run() -> None:
        outcome: T | None = None
        failure: BaseException | None = None
        try:
            outcome = work()
        except Exception as error:
            failure = error
        _working.discard(name)
        try:
            loop.call_soon_threadsafe(settle, outcome, failure)
        except RuntimeError:  # the loop is closed: the process is ending
            pass

    _working.add(name)
    threading.Thread(target=run, name=f"probe-{name}", daemon=True).start()
    return await future


class Looked(NamedTuple):
    """``whole``: the look came back, so that what it does not name is not there."""

    results: list[CheckResult]
    whole: bool


@dataclass(slots=True)
class _Flight:
    """A look under way."""

    task: asyncio.Task[Looked]
    began: float


@dataclass(slots=True)
class Watch:
    """The probes, and what became of each. ``take`` gets every beat's results as they come.

    ``failing`` are the checks that failed when last heard of. One of them that its probe no longer names (a container was
    removed, a look that hung comes back) is said to be over, or its incident would never be.
    """

    probes: Sequence[Probe]
    interval: float
    timeout: float
    take: Callable[[Sequence[CheckResult]], None] = lambda results: None
    failing: set[str] = field(default_factory=set)
    clear: int = 1  # results in a row that close an alert
    _flights: dict[str, _Flight] = field(default_factory=dict)
    _beaten: dict[str, float] = field(default_factory=dict)  # when each probe's last look was over
    _well: set[str] = field(default_factory=set)  # checks of what comes up with us that have been well
    _started: float = field(default_factory=time.monotonic)

    async def run(self) -> None:
        """Looks for ever; ends only by being cancelled or by a defect."""
        nobodys = [check for check in self.failing if self._owner(check) is None]
        self.take([one for check in nobodys for one in self._over(check)])
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(self._beat(probe), name=f"probe-{probe.name}") for probe in self.probes
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (*tasks, *(flight.task for flight in self._flights.values())):
                task.cancel()
            await asyncio.wait(tasks, timeout=1.0)

    async def once(self, names: Sequence[str] = ()) -> list[CheckResult]:
        """Every probe that ``names`` may be of, side by side; their results by name, and those of ``names`` only."""
        found = await asyncio.gather(*(self.look(probe) for probe in self.probes if probe.is_about(names)))
        results = {one.check: one for looked in found for one in looked.results if matches(one.check, names)}
        return sorted(results.values(), key=lambda one: one.check)

    def late(self) -> bool:
        """Whether a probe has not been heard of for three beats and its time: the monitor itself does not work then."""
        limit = 3 * self.interval + self.timeout
        now = time.monotonic()
        return any(
            now - self._beaten.get(probe.name, self._started) > max(probe.every, 1) * limit for probe in self.probes
        )

    async def _beat(self, probe: Probe) -> None:
        due, well = time.monotonic(), 0
        while True:
            looked = await self.look(probe)
            self._beaten[probe.name] = time.monotonic()
            results = [self._settled(one) for one in looked.results]
            if looked.whole:
                named = {one.check for one in results}
                gone = [check for check in self.failing if check not in named and self._owner(check) is probe]
                results += [one for check in gone for one in self._over(check)]
            for one in results:
                if one.status in ("warning", "critical"):
                    self.failing.add(one.check)
                elif one.status == "ok":
                    self.failing.discard(one.check)
            self.take(results)
            well = well + 1 if all(one.status in ("ok", "skipped") for one in results) else 0
            due += self.interval * (probe.every if well >= self.clear else 1)
            now = time.monotonic()
            if due < now:  # it took longer than its beat, or the machine slept
                due = now + min(self.interval, 1.0)
            await asyncio.sleep(due - now)

    def _owner(self, check: str) -> Probe | None:
        reach, owner = max(((probe.reach(check), n) for n, probe in enumerate(self.probes)), default=(0, 0))
        return self.probes[owner] if reach else None

    def _over(self, check: str) -> list[CheckResult]:
        """As many results as close its alert: there will be no others."""
        self.failing.discard(check)
        return [result(check, "ok", "It is no longer there, or no longer looked at.")] * self.clear

    async def look(self, probe: Probe) -> Looked:
        """One look, within the time that a check has; shared by those who ask meanwhile."""
        flight = self._flights.get(probe.name)
        if flight is None:
            flight = _Flight(asyncio.create_task(self._ask(probe), name=f"look-{probe.name}"), time.monotonic())
            self._flights[probe.name] = flight
            flight.task.add_done_callback(lambda _: self._landed(probe.name, flight))
        began = flight.began
        done, _ = await asyncio.wait({flight.task}, timeout=max(0.0, began + self.timeout - time.monotonic()))
        if done and not flight.task.cancelled():
            return flight.task.result()
        flight.task.cancel()  # one that does not heed it stays in flight, and is critical at once next time
        lasts = time.monotonic() - began
        said = f"The check has not come back within {lasts:.0f} s: what it looks at hangs."
        return Looked([result(probe.itself, "critical", said, latency=lasts)], whole=False)

    def _landed(self, name: str, flight: _Flight) -> None:
        if self._flights.get(name) is flight:
            del self._flights[name]

    async def _ask(self, probe: Probe) -> Looked:
        began = time.monotonic()
        whole = False
        try:
            results = list(await probe.look())
            whole = True
        except OUTAGES as error:
            status: Status = "skipped" if probe.detail else "critical"
            results = [result(probe.itself, status, f"Cannot be looked at now: {words(error)}.")]
        except Exception as error:
            log.exception("a check is broken", action="health.defect", check=probe.name)
            results = [
                result(probe.itself, "critical", f"The check itself is broken ({type(error).__name__}): see the log.")
            ]
        took = time.monotonic() - began
        return Looked([one if one.latency else replace(one, latency=took) for one in results], whole)

    def _settled(self, one: CheckResult) -> CheckResult:
        """What starts together with us is judged once it has been well, or has had its time."""
        if not matches(one.check, COMES_UP) or one.check in self._well:
            return one
        if one.status == "ok":
            self._well.add(one.check)
        elif one.status != "skipped" and time.monotonic() - self._started < STARTING:
            return replace(one, status="skipped", message=f"Not up yet: {one.message}")
        return one


def worst(results: Iterable[CheckResult]) -> Status:
    """The worst status of some results; ``skipped`` where nothing else is there."""
    order: tuple[Status, ...] = ("critical", "warning", "ok")
    found: set[Any] = {one.status for one in results}
    return next((status for status in order if status in found), "skipped")
