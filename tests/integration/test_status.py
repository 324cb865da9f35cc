"""What actors say of themselves, on a real nats-server: states, crash loops, standbys, and one scrape of all processes."""

from __future__ import annotations

import asyncio
import time
from typing import Any, ClassVar

import msgspec
import pytest
from nats.aio.msg import Msg

from bus import status
from bus.client import Bus
from bus.status import Process, Scrape, State, Status, judge, statuses
from bus.subjects import metrics_of, status_of
from bus.supervise import Context
from deploy.embedded import NatsServer
from tests.builders import running
from tests.exposition import parse


class Works:
    name: ClassVar[str] = "features"
    description: ClassVar[str] = "works"
    owned: ClassVar[bool] = True

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    async def run(self) -> None:
        self.ctx.ready()
        await asyncio.Event().wait()


class Loops(Works):
    """Is ready each time, and then fails."""

    owned: ClassVar[bool] = False

    async def run(self) -> None:
        self.ctx.ready()
        raise ValueError("the table is\nfull")


class Worries(Works):
    async def run(self) -> None:
        self.ctx.standing.concerns["M1"] = "The model is gone."
        await super().run()


async def told(bus: Bus, until: Any, actor: str = "features") -> list[Status]:
    """The actor's answers as soon as they are as wanted."""
    async with asyncio.timeout(20):
        while not until(found := (await statuses(bus, [actor]))[actor]):
            await asyncio.sleep(0.05)
    return found


async def test_nobody_answers_at_once_where_nobody_is(bus: Bus) -> None:
    started = time.monotonic()
    assert await statuses(bus, ["features", "trainer"], wait=30) == {"features": [], "trainer": []}
    assert time.monotonic() - started < 5, "the server says that there is nobody"
    health, detail = judge("trainer", [])
    assert health == "degraded"
    assert "`mt5 up trainer`" in detail


async def test_one_that_works_says_so_and_where_its_standby_waits(bus: Bus, nats_url: str) -> None:
    async with running(Works, nats_url=nats_url), running(Works, nats_url=nats_url):
        first, second = await told(bus, lambda found: [s.state for s in found] == ["working", "standby"])
    assert first.instance != second.instance
    health, detail = judge("features", [first, second])
    assert health == "ok"
    assert detail.startswith("Works")  # and how far it is behind, where a cursor of this process has said so
    assert detail.endswith(f"; a standby waits (process {second.pid} on {second.host}).")
    health, detail = judge("features", [second])
    assert health == "degraded"
    assert detail.startswith("Only a standby answers")


async def test_one_that_crashes_again_and_again_is_degraded_and_says_of_what(bus: Bus, nats_url: str) -> None:
    """It answers a ping whenever it is asked at the right moment."""
    async with running(Loops, nats_url=nats_url):
        (found,) = await told(bus, lambda found: found and found[0].restarts >= status.LOOPING)
        assert found.error == "ValueError: the table is full"
        health, detail = judge("features", [found])
    assert health == "degraded"
    assert detail == f"Was started again {found.restarts} times within five minutes, last: {found.error}"


async def test_a_concern_of_one_that_works_is_told(bus: Bus, nats_url: str) -> None:
    async with running(Worries, nats_url=nats_url):
        found = await told(bus, lambda found: found and found[0].state == "working")
    assert judge("features", found) == ("degraded", "The model is gone.")


def test_a_failure_is_forgiven_after_a_steady_time() -> None:
    base = {"actor": "features", "process": "hot", "instance": "i", "host": "h", "pid": 1, "behind": 1_234}
    after = Status(**base, state="working", seconds=status.STEADY, restarts=9, error="x")  # type: ignore[arg-type]
    assert judge("features", [after]) == ("ok", "Works, 1,234 messages behind.")
    for state, words in (("restarting", "Has failed"), ("starting", "Is starting")):
        health, detail = judge("features", [Status(**base, state=state, seconds=1, restarts=1, error="x")])  # type: ignore[arg-type]
        assert health == "degraded"
        assert detail.startswith(words)
        assert detail.endswith("last: x")


async def test_the_askers_own_process_needs_no_message(bus: Bus) -> None:
    own = Process.of(["collector", "features"])
    own.standings["features"].enter("working")
    (found,) = (await statuses(bus, ["features"], own=own))["features"]
    assert (found.state, found.process) == ("working", "hot")


async def test_what_answers_nonsense_or_never_costs_no_more_than_the_wait(bus: Bus, nats: NatsServer) -> None:
    async def nonsense(msg: Msg) -> None:
        await msg.respond(b"{}")

    await bus.nc.subscribe(status_of("features"), cb=nonsense)
    await bus.nc.subscribe(status_of("trainer"))
    started = time.monotonic()
    assert await statuses(bus, ["features", "trainer"], wait=0.3) == {"features": [], "trainer": []}
    assert time.monotonic() - started < 1
    nats.stop()
    async with asyncio.timeout(10):
        while bus.connected:
            await asyncio.sleep(0.02)
    started = time.monotonic()
    assert await statuses(bus, ["features"]) == {"features": []}
    assert time.monotonic() - started < 0.1


async def test_a_scrape_names_every_process_once(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"recorder": "# HELP a A.\n# TYPE a gauge\na 1\n", "trainer": "# HELP a A.\n# TYPE a gauge\na 2\n"}
    for actor, state in (("recorder", "standby"), ("recorder", "working"), ("trainer", "working")):
        await answering(bus, actor, state, texts[actor])
    own = Process.of(["collector", "features"])
    monkeypatch.setattr(status, "GRACE", 0.3)  # for both recorders to be heard on a slow machine
    merged = parse((await status.scrape(bus, ["features", "emitter", "recorder", "trainer"], own)).decode())
    up = {dict(labels)["process"]: value for (_, labels), value in merged["mt5_up"].samples.items()}
    assert up == {"hot": 1, "emitter": 0, "recorder": 1, "recorder-standby": 1, "trainer": 1}
    assert {dict(labels)["process"]: value for (_, labels), value in merged["a"].samples.items()} == {
        "recorder": 1,
        "recorder-standby": 1,
        "trainer": 2,
    }


async def answering(bus: Bus, actor: str, state: State, text: str) -> None:
    """Answers as a process of its own would."""
    reply = msgspec.json.encode(Scrape(process=actor, instance=f"{actor}-{state}", state=state, text=text))

    async def on_request(msg: Msg) -> None:
        await msg.respond(reply)

    await bus.nc.subscribe(metrics_of(actor), cb=on_request)


async def test_metrics_of_any_size_fit_a_message(bus: Bus, nats_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    families = "".join(f'# HELP f{i} F.\n# TYPE f{i} gauge\nf{i}{{label="{"x" * 90}"}} 1\n' for i in range(10_000))
    monkeypatch.setattr(status.telemetry, "render", lambda: families.encode())
    process = Process.of(["recorder"])
    text = process.standings["recorder"].scrape().text
    assert 0.9 * status.METRICS_BYTES < len(text) <= status.METRICS_BYTES
    parse(text)
    await status.answer(bus, process.standings["recorder"])
    found = await status.scrape(bus, ["recorder"], Process.of(["collector"]))
    assert b'mt5_up{process="recorder"} 1' in found
