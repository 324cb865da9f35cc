"""``up`` and ``demo``: chooses servers, actors and their processes, starts them, and keeps them running.

The one place that chooses instances. The parent supervises and imports nothing heavy; the hot path's actors share one
process, everything else has its own. A process gets its URLs and credentials through its environment, never on its
command line, where every user of the machine could read them.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import os
import secrets
import signal
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn
from urllib.parse import urlsplit

from commands.output import DONE, NO, WRONG, CommandError, say
from commands.places import CLIENT, gateway_url
from commands.settings import Loaded, read
from commands.vault import backup_environment
from deploy.home import Home, HomeBusy, end_leftovers
from deploy.notify import Notifier
from deploy.process import DeployError
from deploy.server import free_port
from deploy.supervisor import StartFailed, Supervisor

if TYPE_CHECKING:
    from bus.supervise import Actor
    from deploy.embedded import NatsServer, PostgresServer

# Every actor: name → where its class is. The order is that of the data.
ACTORS: Final = {
    "collector": "actors.collector:Collector",
    "features": "actors.features:Features",
    "emitter": "actors.emitter:Emitter",
    "recorder": "actors.recorder:Recorder",
    "trainer": "actors.trainer:Trainer",
    "scorer": "actors.scorer:Scorer",
    "health": "actors.health:Health",
    "backup": "actors.backup:Backup",
}
HOT: Final = ("collector", "features", "emitter")  # one process on one event loop: no hop between them costs a switch

READY_SECONDS: Final = 30.0  # after each of these without readiness a line says who is missing
DEMO_READY_SECONDS: Final = 120.0
SERVER_PATIENCE: Final = 30.0  # for given servers that start together with us, as after a reboot
STOP_LOOK_SECONDS: Final = 0.1  # how often a signal is looked for meanwhile
CANCEL_SECONDS: Final = 2.0  # for what a signal cuts off
ROOT: Final = Path(__file__).resolve().parents[1]


def up(args: argparse.Namespace) -> int:
    """``up [ACTOR …] [--isolate]``; runs until SIGTERM or SIGINT."""
    return _up(args.actors, isolate=args.isolate, demo=None)


def demo(args: argparse.Namespace) -> int:
    """``demo [--seconds N] [--seed N]``: `up` with a simulated terminal in front of it."""
    seconds = [] if args.seconds is None else ["--seconds", str(args.seconds)]
    return _up([], isolate=args.isolate, demo=["_demo", "--seed", str(args.seed), *seconds])


def processes(names: Sequence[str], *, isolate: bool) -> dict[str, tuple[str, ...]]:
    """Which actors share a process: its name → its actors.

    Raises CommandError for an unknown actor.
    """
    unknown = [name for name in names if name not in ACTORS]
    if unknown:
        raise CommandError(f"There is no actor {unknown[0]}: the actors are {', '.join(ACTORS)}.", WRONG)
    chosen = [name for name in ACTORS if not names or name in names]
    hot = tuple(name for name in chosen if name in HOT)
    if isolate or len(hot) < 2:
        return {name: (name,) for name in chosen}
    return {"hot": hot} | {name: (name,) for name in chosen if name not in HOT}


# --- the parent --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Servers:
    """The servers of one run: those of our own that we start, and the URLs of all."""

    nats: NatsServer | None = None
    postgres: PostgresServer | None = None
    given_nats: str | None = None
    given_database: str | None = None
    given_direct: str | None = None
    passwords: dict[str, str] = field(default_factory=dict)

    @property
    def nats_url(self) -> str:
        """The operator's."""
        return self.nats.url(CLIENT) if self.nats else str(self.given_nats)

    @property
    def database_url(self) -> str:
        """A direct connection."""
        return self.postgres.url if self.postgres else str(self.given_direct or self.given_database)

    def environment(self, actors: Sequence[str]) -> dict[str, str]:
        """What a process of these actors needs to find the servers: each actor with its own credentials only."""
        found = {}
        if self.nats is not None:
            found["MT5_NATS_URLS"] = ",".join(f"{name}={self.nats.url(name)}" for name in actors)
        if self.postgres is not None:
            found["MT5_DATABASE_URL"] = self.postgres.url
        return found


def _up(names: Sequence[str], *, isolate: bool, demo: list[str] | None) -> int:
    signal.signal(signal.SIGTERM, _leave)  # until the supervisor listens there is nothing to drain
    notifier = Notifier.take(os.environ)  # first of all: nobody that we start may speak for us
    plan = processes(names, isolate=isolate)
    loaded = read()
    settings = loaded.settings
    import structlog

    from bus import logs

    logs.configure(settings.log)
    log = structlog.get_logger("up")
    actors = [name for group in plan.values() for name in group]
    if "collector" in actors:
        _check_gateway(loaded)
    home = Home(loaded.home)
    embedded = settings.nats.url is None or settings.database.url is None
    try:
        with ExitStack() as stack:
            if embedded:
                stack.enter_context(home)
                for pid in end_leftovers(home):
                    log.info("ended what a dead run left behind", action="up.leftover", pid=pid)
            else:
                home.create()
            servers = _servers(loaded, home)
            supervisor = stack.enter_context(Supervisor(home, log, notifier))
            for server in (servers.nats, servers.postgres):
                if server is not None:
                    supervisor.add_server(server)
            port = (settings.gateway.port or free_port()) if "collector" in actors else None
            with _importing_clients():
                supervisor.start_servers()
            if not asyncio.run(_prepare(loaded, servers, log, supervisor.interrupted)):
                return DONE
            shared = _environment(loaded, port)
            if "backup" in actors:
                shared |= backup_environment(loaded)
            for name, group in plan.items():
                environment = shared | servers.environment(group)
                supervisor.add_process(name, _program("_run", *group), environment, group)
            supervisor.start()
            if not _await_ready(supervisor, log, patience=DEMO_READY_SECONDS if demo else None):
                return DONE
            gateway = gateway_url(loaded, port) if port else ""
            if embedded:
                home.announce(gateway=gateway or "", nats=servers.nats_url, database=servers.database_url)
            page = f"{gateway}/" if gateway else ", ".join(actors)
            supervisor.say_ready(f"Ready: {page}")
            say(f"Ready: {page} (state in {home.path}; Ctrl-C ends it)")
            if demo is not None:
                given = {"MT5_NATS_URL": servers.nats_url, "MT5_DATABASE_URL": servers.database_url}
                supervisor.set_foreground("demo", _program(*demo), shared | given)
            return supervisor.run_until_signal()
    except HomeBusy as error:
        raise CommandError(_sentence(error), NO) from error
    except DeployError as error:
        raise CommandError(_sentence(error), WRONG) from error


def _leave(number: int, frame: Any) -> NoReturn:
    raise SystemExit(DONE)


def _sentence(error: Exception) -> str:
    text = str(error)
    return text[:1].upper() + text[1:]


@contextmanager
def _importing_clients() -> Iterator[None]:
    """While the servers start on one core, the other reads what comes next.

    Nothing else may be imported meanwhile: nats-py's modules import each other in a circle, and two threads inside
    such a circle may each see the other's half-made module.
    """
    reading = threading.Thread(target=_import_clients, name="import", daemon=True)
    reading.start()
    try:
        yield
    finally:
        reading.join()


def _import_clients() -> None:
    import bus.client
    import bus.migrate
    import bus.topology  # noqa: F401 - loaded for those who import them next


def _check_gateway(loaded: Loaded) -> None:
    """What would keep the collector from starting, told before anything is started."""
    gateway = loaded.settings.gateway
    if not gateway.api_keys and not _is_loopback(gateway.host):
        raise CommandError(
            f"The gateway may listen on {gateway.host} only with keys: set MT5_API_KEYS, or MT5_GATEWAY_HOST=127.0.0.1.",
            WRONG,
        )
    if not gateway.port:
        return
    family = socket.AF_INET6 if ":" in gateway.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((gateway.host, gateway.port))
        except OSError as error:
            raise CommandError(
                f"The gateway cannot listen on {gateway.host}:{gateway.port} ({error.strerror}): stop what does, or set "
                "MT5_GATEWAY_PORT (0 takes a free one).",
                WRONG,
            ) from error


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _servers(loaded: Loaded, home: Home) -> _Servers:
    """Embedded servers where no URL is given, with passwords made for this run."""
    settings = loaded.settings
    servers = _Servers(
        given_nats=settings.nats.url, given_database=settings.database.url, given_direct=settings.database.direct_url
    )
    if settings.nats.url is None or settings.database.url is None:
        from deploy.embedded import NatsServer, NatsUser, PostgresServer
    if settings.nats.url is None:
        from bus.permissions import users

        accounts = tuple(
            NatsUser(user.name, secrets.token_urlsafe(24), user.publish, user.subscribe) for user in users()
        )
        servers.nats = NatsServer(home.path / "nats", accounts)
    if settings.database.url is None:
        servers.postgres = PostgresServer(home.path / "postgres")
    return servers


async def _prepare(loaded: Loaded, servers: _Servers, log: Any, stopping: Callable[[], bool]) -> bool:
    """Migrations and topology, side by side, before any actor starts; False when a signal asks for the stop first."""
    work: set[asyncio.Task[CommandError | None]] = {
        asyncio.create_task(_migrate(servers, log), name="migrate"),
        asyncio.create_task(_apply(loaded, servers, log), name="topology"),
    }
    left = work
    try:
        while left:
            # The supervisor's handlers hear the signals, and nothing wakes this loop for them.
            _, left = await asyncio.wait(left, timeout=STOP_LOOK_SECONDS)
            if stopping():
                return False
    finally:
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=CANCEL_SECONDS)  # the rest is ended with the event loop
    for task in sorted(work, key=lambda task: task.get_name()):
        if (problem := task.result()) is not None:
            raise problem
    await _keep_forward(loaded, servers, log)
    return True


async def _keep_forward(loaded: Loaded, servers: _Servers, log: Any) -> None:
    """A CANDLES stream that lost what was read from it is refused before anything adds to it."""
    if urlsplit(servers.nats_url).username in ACTORS:
        return  # may not look at what others read; each actor checks what it knows itself
    from nats.errors import Error as NatsError

    from bus.client import Bus, BusUnavailable
    from bus.forward import WentBackwards
    from bus.store import Store, StoreUnavailable
    from commands.servers import keep_forward

    store = await Store.connect(servers.database_url, size=1, name="mt5-up")
    try:
        bus = await Bus.connect(servers.nats_url, name=CLIENT, settings=loaded.settings.nats, patience=SERVER_PATIENCE)
        try:
            await keep_forward(bus, store, log)
        finally:
            await bus.close()
    except StoreUnavailable as error:
        # The hot path never waits for the database; the recorder checks as soon as it is there.
        log.warning("the archive's place in CANDLES is not checked", action="up.forward", error=str(error))
    except (WentBackwards, BusUnavailable) as error:
        raise CommandError(str(error), NO) from error
    except (NatsError, TimeoutError) as error:
        raise CommandError(
            f"CANDLES could not be asked how far it reaches ({type(error).__name__}): nats-server is busy or stopping; "
            "start again.",
            NO,
        ) from error
    finally:
        await store.close()


async def _migrate(servers: _Servers, log: Any) -> CommandError | None:
    from bus.migrate import MigrationError, migrate, status

    try:
        state = await status(servers.database_url)
    except MigrationError as error:
        if servers.postgres is not None:
            return CommandError(str(error), NO)
        # The hot path never waits for the database: an actor starts without it, and says what it lacks.
        log.warning("database not checked", action="up.migrate", error=str(error))
        return None
    if not state.pending:  # most often; and a role without the right to migrate may run actors
        if state.unknown:  # a newer version was here and was put back: it has only added to what this one knows
            log.warning("the database is newer than this version", action="up.migrate", version=state.unknown[-1])
        return None
    try:
        for version in await migrate(servers.database_url):
            log.info("migration applied", action="up.migrate", version=version)
    except MigrationError as error:
        return CommandError(str(error), NO)
    return None


async def _apply(loaded: Loaded, servers: _Servers, log: Any) -> CommandError | None:
    from nats.errors import Error as NatsError
    from nats.js.errors import APIError

    from bus import topology
    from bus.client import Bus, BusTooOld, BusUnavailable

    user = urlsplit(servers.nats_url).username
    if user in ACTORS:
        return None  # an actor's own credentials may not look at streams of others: `mt5 topology apply` has done it
    try:
        bus = await Bus.connect(servers.nats_url, name=CLIENT, settings=loaded.settings.nats, patience=SERVER_PATIENCE)
    except (BusUnavailable, BusTooOld) as error:
        return CommandError(str(error), NO)
    try:
        changed = {difference.stream: None for difference in await topology.apply(bus, loaded.settings.streams)}
        if changed:
            log.info("topology applied", action="up.topology", streams=", ".join(changed))
    except APIError as error:
        return CommandError(f"nats-server refuses the wanted topology: {error.description}.", NO)
    except (NatsError, TimeoutError) as error:
        return CommandError(
            f"The topology could not be checked ({type(error).__name__}): is JetStream on, and may {user or 'this user'} "
            "use it?",
            NO,
        )
    finally:
        await bus.close()
    return None


def _environment(loaded: Loaded, port: int | None) -> dict[str, str]:
    """Our own environment for a child, with what was chosen for this run; it may stand in any folder."""
    environment = dict(os.environ)
    environment["MT5_HOME"] = str(loaded.home)
    if loaded.file is not None:
        environment["MT5_CONFIG"] = str(loaded.file.absolute())
    if port is not None:
        environment["MT5_GATEWAY_PORT"] = str(port)
    if ROOT not in map(Path, sysconfig.get_paths().values()):  # a checkout, not an installation
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def _program(*words: str) -> list[str]:
    # -P: a folder with a `schema` or `bus` of its own must not stand in for ours.
    return [sys.executable, "-P", "-m", "runner", *words]


def _await_ready(supervisor: Supervisor, log: Any, patience: float | None) -> bool:
    """True once every actor is ready; False when a signal came before. ``patience`` None: for as long as it takes.

    Rebuilding features from a long log takes its time, and given servers may come later than we.
    """
    started = time.monotonic()
    while True:
        round_started = time.monotonic()
        try:
            return supervisor.wait_ready(READY_SECONDS)
        except StartFailed as error:
            refused = time.monotonic() - round_started < READY_SECONDS
            if refused or (patience is not None and time.monotonic() - started >= patience):
                raise
            log.warning("still starting", action="up.wait", missing=", ".join(error.missing), detail=str(error))


# --- a child -----------------------------------------------------------------------------------------------------


async def run_child(args: argparse.Namespace) -> int:
    """``_run ACTOR …``: these actors in this process's event loop, until SIGTERM."""
    loaded = read()
    settings = loaded.settings
    from bus import logs
    from bus.client import BusTooOld
    from bus.forward import WentBackwards
    from bus.supervise import ConfigurationError, run_actors

    logs.configure(settings.log)
    processes(args.actors, isolate=False)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    urls = {name: settings.nats.urls.get(name) or settings.nats.url for name in args.actors}
    nowhere = [name for name, url in urls.items() if url is None]
    if nowhere:
        raise CommandError(f"{', '.join(nowhere)} has no NATS server: set MT5_NATS_URL.", WRONG)
    try:
        await run_actors(
            [actor_class(name) for name in args.actors],
            settings,
            nats_urls={name: str(url) for name, url in urls.items()},
            database_url=settings.database.url,
            on_ready=_tell_ready,
            stop=stop,
        )
    except (ConfigurationError, BusTooOld, WentBackwards) as error:
        raise CommandError(str(error), WRONG) from error
    return DONE


def actor_class(name: str) -> type[Actor]:
    """Imports an actor's class."""
    from importlib import import_module

    module, _, attribute = ACTORS[name].partition(":")
    found: type[Actor] = getattr(import_module(module), attribute)
    return found


def _tell_ready(actor: str) -> None:
    descriptor = os.environ.get("MT5_READY_FD")
    if descriptor:
        os.write(int(descriptor), f"ready {actor}\n".encode())
