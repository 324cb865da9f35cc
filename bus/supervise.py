"""Running actors: each with its own connection, restarted with backoff when it fails, drained when asked to stop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Protocol

import structlog
from nats.errors import Error as NatsError
from nats.js.errors import APIError
from nats.micro import add_service
from nats.micro.request import Request
from nats.micro.service import EndpointConfig, Service, ServiceConfig

from bus.client import Bus, BusTooOld, BusUnavailable
from bus.consume import DRAIN_BUDGET, Failing, StreamReplaced
from bus.forward import WentBackwards
from bus.ownership import Ownership, OwnershipLost
from bus.status import Process, Standing, answer
from bus.telemetry import actor_restarts_total
from bus.writer import Superseded
from schema.settings import Settings

BACKOFF_FIRST: Final = 0.2
BACKOFF_MAX: Final = 10.0
HEALTHY_AFTER: Final = 30.0  # seconds of running after which the backoff starts anew
WITHDRAW_SECONDS: Final = 2.0  # for a failed actor's service to go
CANCEL_AGAIN: Final = DRAIN_BUDGET + 1.0  # a batch in hand has had its time by then
STOP_BUDGET: Final = 6.0  # all actors together; the whole `up` has 10 s
VERSION: Final = "0.1.0"

Endpoint = Callable[[bytes], Awaitable[bytes]]


class ConfigurationError(Exception):
    """An actor cannot run with these settings: mend them and start again (restarting would not help)."""


@dataclass(frozen=True, slots=True)
class Context:
    """What an actor gets: its settings, its connection, and how to say that it is ready."""

    settings: Settings
    bus: Bus
    database_url: str | None
    ready: Callable[[], None]
    log: Any
    failing: Failing = field(default_factory=Failing)  # outlives the actor's restarts
    process: Process = field(default_factory=lambda: Process.of([""]))
    standing: Standing = field(default_factory=lambda: Standing("", Process.of([""])))


class Actor(Protocol):
    """An actor with ``owned = True`` runs only while its process owns its work; others of its kind wait as standbys."""

    name: ClassVar[str]
    description: ClassVar[str]

    def __init__(self, ctx: Context) -> None: ...

    async def run(self) -> None:
        """Runs until cancelled; any return or exception is a failure that restarts the actor."""


async def serve(bus: Bus, actor: str, description: str, endpoints: Mapping[str, Endpoint] | None = None) -> Service:
    """Makes an actor a NATS micro service, so that ``nats micro ls`` shows it; endpoints are keyed by subject.

    Each request runs as a task of its own: a long one keeps nobody waiting, and an endpoint decides itself what it
    does with a second request.
    """
    answering: set[asyncio.Task[None]] = set()

    async def respond(request: Request, endpoint: Endpoint) -> None:
        log = structlog.get_logger(__name__)
        try:
            await request.respond(await endpoint(request.data))
        except NatsError as error:
            log.warning("answer not sent", action="serve.answer", subject=request.subject, error=type(error).__name__)
        except Exception:
            log.exception("request failed", action="serve.failed", subject=request.subject)
            with contextlib.suppress(NatsError):
                await request.respond_error("500", "The actor failed to answer this: its log has the details.")

    def handler(endpoint: Endpoint) -> Callable[[Request], Coroutine[Any, Any, None]]:
        async def handle(request: Request) -> None:
            task = asyncio.create_task(respond(request, endpoint), name=f"request-{request.subject}")
            answering.add(task)
            task.add_done_callback(answering.discard)

        return handle

    service = await add_service(bus.nc, ServiceConfig(name=actor, version=VERSION, description=description))
    for subject, endpoint in (endpoints or {}).items():
        await service.add_endpoint(
            EndpointConfig(name=subject.replace(".", "-"), subject=subject, handler=handler(endpoint))
        )
    await bus.nc.flush()  # from here on a request of anybody's is heard
    return service


async def run_tasks(tasks: Mapping[str, Coroutine[Any, Any, None]]) -> None:
    """Owns an actor's named tasks: one that ends or fails stops the others and is raised.

    nats-py swallows a cancellation that meets one of its flushes, as right after a reconnect: who is not done after
    :data:`CANCEL_AGAIN` is cancelled once more, or an actor would wait for ever for a task that does not know of its end.
    """
    running = {asyncio.create_task(task, name=name) for name, task in tasks.items()}
    try:
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        raise RuntimeError(
            f"task {', '.join(sorted(t.get_name() for t in done))} ended although it should run for ever"
        )
    finally:
        for task in running:
            task.cancel()
        again = asyncio.create_task(_cancel_again(running), name="cancel-again")
        try:
            # Whoever cancels us meanwhile cancels them once more, and still finds nothing of theirs left behind.
            await asyncio.gather(*running, return_exceptions=True)
        finally:
            again.cancel()


async def _cancel_again(tasks: Collection[asyncio.Task[None]]) -> None:
    """Until somebody ends it."""
    while True:
        await asyncio.sleep(CANCEL_AGAIN)
        late = [task for task in tasks if not task.done()]
        names = ", ".join(sorted(task.get_name() for task in late))
        structlog.get_logger(__name__).warning("cancelled once more", action="supervise.cancel", tasks=names)
        for task in late:
            task.cancel()


async def _run_actor(
    actor: type[Actor],
    settings: Settings,
    nats_url: str,
    database_url: str | None,
    on_ready: Callable[[str], None],
    process: Process,
) -> None:
    log = structlog.get_logger(actor.name).bind(actor=actor.name)
    backoff = BACKOFF_FIRST
    failing = Failing()
    standing = process.standings[actor.name]

    def ready() -> None:
        standing.enter("working")
        log.info("ready", action="actor.ready")
        on_ready(actor.name)

    while True:
        started = time.monotonic()
        bus: Bus | None = None
        service: Service | None = None
        standing.enter("starting")
        try:
            try:
                bus = await Bus.connect(nats_url, name=actor.name, settings=settings.nats)
                await answer(bus, standing)
                service = await serve_if_needed(bus, actor)
                ctx = Context(settings, bus, database_url, ready, log, failing, process, standing)
                # A connection that nats-py has given up never comes back: the actor needs a new one.
                await run_tasks({f"{actor.name}-work": _work(actor, ctx), f"{actor.name}-bus": bus.lost()})
                standing.fail("It ended although it should run for ever.")
                log.error("ended although it should run for ever", action="actor.ended")
            except (ConfigurationError, BusTooOld, WentBackwards):
                raise
            except (BusUnavailable, StreamReplaced, Superseded, OwnershipLost, NatsError, APIError) as error:
                # The bus is away, what it holds has changed, or another process works: starting again recovers from each.
                standing.fail(str(error) or type(error).__name__)
                log.warning("starts again", action="actor.again", error=f"{type(error).__name__}: {error}")
            except Exception as error:
                standing.fail(f"{type(error).__name__}: {error}")
                log.exception("failed and is started again", action="actor.failed")
            actor_restarts_total.inc(actor=actor.name)
            if time.monotonic() - started > HEALTHY_AFTER:
                backoff = BACKOFF_FIRST
            if bus is not None:
                if bus.connected:
                    await _withdraw(bus, service)
                else:
                    await bus.close()
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, BACKOFF_MAX)
        finally:
            if bus is not None and not bus.nc.is_closed:
                await bus.close()


async def _withdraw(bus: Bus, service: Service | None) -> None:
    """A failed actor is no service; its connection stays until the next try, to answer how it is."""
    if service is not None:
        await withdraw(service)


async def withdraw(service: Service) -> None:
    """Makes a service be none any more, within :data:`WITHDRAW_SECONDS`: NATS may be away, or come back in this moment."""
    with contextlib.suppress(NatsError, TimeoutError):
        async with asyncio.timeout(WITHDRAW_SECONDS):
            await service.stop()


async def _work(actor: type[Actor], ctx: Context) -> None:
    if not getattr(actor, "owned", False):
        await actor(ctx).run()
        return
    ownership = Ownership(ctx.bus, actor.name)

    def standby() -> None:
        ctx.ready()
        ctx.standing.enter("standby")

    try:
        await ownership.acquire(standby=standby)
        ctx.standing.enter("starting")
        await run_tasks({actor.name: actor(ctx).run(), f"{actor.name}-owner": ownership.hold()})
    finally:
        await ownership.release()


async def serve_if_needed(bus: Bus, actor: type[Actor]) -> Service | None:
    """Registers an actor that has no endpoints of its own; one with endpoints calls :func:`serve` itself."""
    if getattr(actor, "own_service", False):
        return None
    return await serve(bus, actor.name, actor.description)


async def run_actors(
    actors: Sequence[type[Actor]],
    settings: Settings,
    *,
    nats_urls: Mapping[str, str],
    database_url: str | None,
    on_ready: Callable[[str], None],
    stop: asyncio.Event,
) -> None:
    """Runs the named actors in this event loop until ``stop`` is set, then drains them within :data:`STOP_BUDGET`.

    Raises:
        ConfigurationError: an actor cannot run with these settings.
        WentBackwards: CANDLES has lost what was read from it.
    """
    process = Process.of([actor.name for actor in actors])
    tasks = {
        asyncio.create_task(
            _run_actor(actor, settings, nats_urls[actor.name], database_url, on_ready, process),
            name=f"actor-{actor.name}",
        )
        for actor in actors
    }
    waiter = asyncio.create_task(stop.wait(), name="stop")
    try:
        done, _ = await asyncio.wait({waiter, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {waiter}:
            task.result()
    finally:
        waiter.cancel()
        for task in tasks:
            task.cancel()
        _, late = await asyncio.wait(tasks, timeout=STOP_BUDGET / 2)
        for task in late:
            task.cancel()  # nats-py swallows a cancellation that meets one of its flushes
        if late:
            _, late = await asyncio.wait(late, timeout=STOP_BUDGET / 2)
        if late:
            names = ", ".join(sorted(t.get_name() for t in late))
            structlog.get_logger(__name__).error("did not stop in time", action="supervise.late", tasks=names)
        with contextlib.suppress(asyncio.CancelledError):
            await waiter
