"""``doctor``: finds what is wrong with this installation and says how to mend it."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import socket
import stat
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

from commands.output import DONE, NO, CommandError, complain, write_json
from commands.places import Places, bus_of, find, running, starting
from commands.settings import Loaded, read, read_file
from commands.up import ACTORS
from schema.load import SettingsError, holds_secrets, mask_url

State = Literal["ok", "note", "wrong"]

OLDEST_PYTHON: Final = (3, 11)
FREE_BYTES: Final = 2 * 1024**3  # a full disk stops the streams, and nats-server needs a restart after it
RELEASED: Final = datetime(2025, 1, 1, tzinfo=UTC)  # a clock before this has never been set
CLOCK_SECONDS: Final = 2.0
CHECK_SECONDS: Final = 15.0
ACTORS_SECONDS: Final = 2.0
LOG_TAIL: Final = 4_096
MODULES: Final = ("nats", "asyncpg", "aiohttp", "numpy", "scipy", "sklearn", "skl2onnx", "onnx", "onnxruntime", "rich")
MARKS: Final[dict[State, str]] = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check saw; ``mend`` says what to do about it."""

    check: str
    state: State
    seen: str
    mend: str = ""


async def doctor(args: argparse.Namespace) -> int:
    """``doctor [--json]``: exit code 1 where something is wrong."""
    findings = [*_python(), *_settings_file()]
    try:
        loaded = read()
    except SettingsError as error:
        findings += [
            Finding("settings", "wrong", problem, "Mend it; nothing starts before.") for problem in error.problems
        ]
    except CommandError as error:
        findings.append(Finding("settings", "wrong", str(error)))
    else:
        findings.append(Finding("settings", "ok", "every setting is understood"))
        findings += await _installation(loaded)
    if args.json:
        write_json({"ok": not _wrong(findings), "findings": findings})
    else:
        for finding in findings:
            print(f"{MARKS[finding.state]}  {finding.check}: {finding.seen}")
            if finding.mend:
                print(f"       → {finding.mend}")
        if count := _wrong(findings):
            complain(f"{count} {'thing is' if count == 1 else 'things are'} wrong.")
    return NO if _wrong(findings) else DONE


def _wrong(findings: list[Finding]) -> int:
    return sum(finding.state == "wrong" for finding in findings)


async def _installation(loaded: Loaded) -> list[Finding]:
    findings = [*_home(loaded.home), *_clock()]
    try:
        places = find(loaded)
        up = running(loaded.home)
    except CommandError as error:
        return [*findings, Finding("home", "wrong", str(error))]
    settings = loaded.settings
    if settings.nats.url is None:
        findings += _nats_server()
    if settings.database.url is None:
        findings += _postgres()
    if up is not None:
        findings.append(Finding("up", "ok", f"runs as process {up['pid']}; the page is {up['gateway']}/"))
    else:
        if (pid := starting(loaded.home)) is not None:
            logs = loaded.home / "logs"
            findings.append(
                Finding("up", "wrong", f"process {pid} is not ready yet", f"Wait for it; {logs} says more.")
            )
        elif settings.nats.url is None or settings.database.url is None:
            findings.append(
                Finding("up", "note", f"nothing is running under {loaded.home}", "`mt5 up` starts everything.")
            )
        findings += _port(loaded)
    checks: list[tuple[str, Callable[[Places, Loaded], Awaitable[list[Finding]]]]] = []
    if up is not None and up["gateway"]:
        checks.append(("gateway", _gateway))
    elif up is None and places.gateway is not None:
        checks.append(("gateway", _given_gateway))
    if places.nats is not None:
        checks += [("nats", _nats), ("actors", _actors)]
    if places.database is not None:
        checks.append(("database", _database))
    for name, check in checks:
        findings += await _bounded(name, check(places, loaded))
    return findings


async def _bounded(name: str, check: Awaitable[list[Finding]]) -> list[Finding]:
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            return await check
    except CommandError as error:
        return [Finding(name, "wrong", str(error))]
    except TimeoutError:
        return [Finding(name, "wrong", f"no answer within {CHECK_SECONDS:.0f} s", "Restart the server: it is frozen.")]


# --- this machine ------------------------------------------------------------------------------------------------


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info >= OLDEST_PYTHON:
        yield Finding("python", "ok", version)
    else:
        yield Finding("python", "wrong", f"{version} is too old", "Install Python 3.11 or newer.")
    missing = [name for name in MODULES if find_spec(name) is None]
    if missing:
        yield Finding(
            "packages", "wrong", f"{', '.join(missing)} missing", "Run `make install`, or reinstall the wheel."
        )
    else:
        yield Finding("packages", "ok", "all there")


def _settings_file() -> Iterator[Finding]:
    try:
        path, text = read_file()
    except CommandError:
        return  # told with the settings
    if path is None or text is None:
        yield Finding(
            "settings file", "ok", "none (./mt5.toml or what MT5_CONFIG names); defaults and variables are in force"
        )
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if holds_secrets(text) and mode & 0o077:
        seen = f"{path} holds secrets and its mode {mode:04o} lets others read it"
        yield Finding("settings file", "wrong", seen, f"chmod 600 {path}")
    else:
        yield Finding("settings file", "ok", str(path))


def _home(home: Path) -> Iterator[Finding]:
    there = home
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        yield Finding("home", "wrong", f"{there} is no folder", "Set MT5_HOME to a folder.")
        return
    if not os.access(there, os.W_OK | os.X_OK):
        yield Finding(
            "home", "wrong", f"{there} cannot be written to", f"Give it to this user, or set MT5_HOME (now {home})."
        )
    else:
        yield Finding("home", "ok", f"{home}{'' if home.exists() else ' (made at the first start)'}")
    ready = home / "ready.json"
    if ready.exists() and os.access(ready, os.R_OK) and stat.S_IMODE(ready.stat().st_mode) & 0o077:
        yield Finding("ready.json", "wrong", f"{ready} holds passwords and others may read it", f"chmod 600 {ready}")
    free = shutil.disk_usage(there).free
    text = f"{free / 1024**3:.1f} GiB free under {there}"
    if free < FREE_BYTES:
        yield Finding(
            "disk", "wrong", text, f"Free at least {FREE_BYTES // 1024**3} GiB: a full disk stops the streams."
        )
    else:
        yield Finding("disk", "ok", text)


def _clock() -> Iterator[Finding]:
    now = datetime.now(UTC)
    if now < RELEASED:
        yield Finding("clock", "wrong", f"it shows {now:%Y-%m-%d %H:%M} UTC", "Set the clock, best by NTP.")
    else:
        yield Finding("clock", "ok", f"{now:%Y-%m-%d %H:%M:%S} UTC")


def _nats_server() -> Iterator[Finding]:
    from deploy.embedded import check_nats_version, find_nats_server
    from deploy.process import DeployError

    try:
        binary = find_nats_server()
        check_nats_version(binary)
    except DeployError as error:
        yield Finding("nats-server", "wrong", str(error))
    else:
        yield Finding("nats-server", "ok", str(binary))


def _postgres() -> Iterator[Finding]:
    from deploy.pginstall import find_install
    from deploy.process import DeployError

    try:
        install = find_install()
    except DeployError as error:
        yield Finding("postgresql", "wrong", str(error))
    else:
        yield Finding("postgresql", "ok", f"{install.major} in {install.bin}")


def _port(loaded: Loaded) -> Iterator[Finding]:
    gateway = loaded.settings.gateway
    if not gateway.port:
        yield Finding("port", "ok", "a free one is taken at the start")
        return
    place = f"{gateway.host}:{gateway.port}"
    with socket.socket(socket.AF_INET6 if ":" in gateway.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((gateway.host, gateway.port))
        except OSError as error:
            if loaded.settings.nats.url and loaded.settings.database.url:
                yield Finding("port", "note", f"{place} is taken, by a gateway of this system or by another program")
                return
            mend = "Stop what listens there, or set MT5_GATEWAY_PORT (0 takes a free one)."
            yield Finding("port", "wrong", f"{place} is not to be had: {error.strerror}", mend)
            return
    yield Finding("port", "ok", f"{place} is free")


# --- the servers -------------------------------------------------------------------------------------------------


async def _gateway(places: Places, loaded: Loaded) -> list[Finding]:
    """The gateway's own checks."""
    import aiohttp

    url = f"{places.need_gateway()}/health"
    keys = loaded.settings.gateway.api_keys
    try:
        async with (
            aiohttp.ClientSession(headers={"X-API-Key": keys[0]} if keys else {}) as session,
            session.get(url) as response,
        ):
            report = await response.json()
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return [Finding("gateway", "wrong", f"{url} does not answer ({error})", f"See {loaded.home / 'logs'}.")]
    if response.status not in {200, 503} or "checks" not in report:
        return [Finding("gateway", "wrong", f"{url} answers {response.status}: {report.get('error', report)}")]
    failing = {
        name: check
        for name, check in report["checks"].items()
        if check["status"] != "ok" and name not in ACTORS  # these are asked themselves
    }
    if not failing:
        return [Finding("gateway", "ok", f"{url} answers")]
    return [
        Finding(f"gateway, {name}", "wrong", f"{check['status']}: {check['detail']}") for name, check in failing.items()
    ]


async def _given_gateway(places: Places, loaded: Loaded) -> list[Finding]:
    """The gateway where the settings would have it; with given servers it may as well run on another host."""
    import aiohttp

    url = f"{places.need_gateway()}/live"
    try:
        async with aiohttp.ClientSession() as session, session.get(url):
            pass
    except (aiohttp.ClientError, OSError):
        seen = f"nothing answers at {places.gateway}"
        return [Finding("gateway", "note", seen, "Where it should run on this host: `mt5 up collector`.")]
    return await _gateway(places, loaded)


async def _actors(places: Places, loaded: Loaded) -> list[Finding]:
    """Every actor's own word, wherever it runs."""
    from bus.status import judge, statuses

    user = urlsplit(places.need_nats()).username
    if user in ACTORS:
        mend = "Give the operator's URL in MT5_NATS_URL to see them."
        return [Finding("actors", "note", f"the NATS user {user} may not ask the others", mend)]
    async with bus_of(places, loaded) as bus:
        found = await statuses(bus, list(ACTORS), wait=ACTORS_SECONDS)
    if not any(found.values()):
        return [Finding("actors", "wrong", "none answers", "Start them with `mt5 up`; a log says why one has ended.")]
    findings = []
    for actor, answers in found.items():
        health, detail = judge(actor, answers)
        if not answers:
            mend = f"Start it with `mt5 up {actor}`; its log says why it has ended."
            findings.append(Finding(actor, "wrong", f"does not answer{_last_words(loaded.home, actor)}", mend))
        elif health == "ok":
            findings.append(Finding(actor, "ok", detail))
        else:
            hosts = ", ".join(sorted({answer.host for answer in answers}))
            findings.append(Finding(actor, "wrong", detail, f"See its log on {hosts}."))
    return findings


def _last_words(home: Path, actor: str) -> str:
    """The end of an actor's log, where this home has one: what a process that ends at every start says each time."""
    log = home / "logs" / f"{actor}.log"
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    words = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"; {log} ends with: {words}" if words else ""


async def _nats(places: Places, loaded: Loaded) -> list[Finding]:
    from nats.errors import Error as NatsError
    from nats.js.errors import APIError

    from bus import topology

    async with bus_of(places, loaded) as bus:
        version = bus.nc.connected_server_version
        findings = [
            Finding("nats", "ok", f"{version.major}.{version.minor}.{version.patch} at {mask_url(places.need_nats())}")
        ]
        try:
            differences = await topology.diff(bus, loaded.settings.streams)
        except (APIError, NatsError, TimeoutError) as error:
            seen = f"JetStream does not answer this user ({type(error).__name__})"
            mend = "Turn JetStream on in nats.conf, and connect as the operator."
            return [*findings, Finding("topology", "wrong", seen, mend)]
    if differences:
        names = ", ".join(dict.fromkeys(item.stream for item in differences))
        return [*findings, Finding("topology", "wrong", f"differs in {names}", "Run `mt5 topology apply`.")]
    return [*findings, Finding("topology", "ok", "every stream and bucket is as wanted")]


async def _database(places: Places, loaded: Loaded) -> list[Finding]:
    import asyncpg

    from bus.migrate import MigrationError, status

    url = places.need_database()
    try:
        state = await status(url)
    except MigrationError as error:
        return [Finding("database", "wrong", str(error))]
    connection = await asyncpg.connect(url, statement_cache_size=0, timeout=CHECK_SECONDS)
    try:
        before = datetime.now(UTC)
        version, theirs = await connection.fetchrow("SELECT current_setting('server_version'), clock_timestamp()")
        after = datetime.now(UTC)
    finally:
        await connection.close()
    findings = [Finding("database", "ok", f"PostgreSQL {version} at {mask_url(url)}")]
    apart = max((theirs - after).total_seconds(), (before - theirs).total_seconds(), 0.0)
    if apart > CLOCK_SECONDS:
        seen = f"PostgreSQL's and ours are {apart:.1f} s apart"
        findings.append(Finding("clocks", "wrong", seen, "Keep both machines' clocks by NTP."))
    if state.unknown:
        seen = f"the database has {', '.join(state.unknown)}, unknown to this version"
        findings.append(Finding("migrations", "wrong", seen, "Install the newer version that made it."))
    elif state.pending:
        seen = f"the database lacks {', '.join(state.pending)}"
        findings.append(Finding("migrations", "wrong", seen, "Run `mt5 migrate`."))
    else:
        findings.append(Finding("migrations", "ok", f"all {len(state.applied)} applied"))
    return findings
