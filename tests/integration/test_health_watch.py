"""The beat of the checks: side by side, each within its time, and none of them in another's way."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest

from actors.monitor import watch as module
from actors.monitor.watch import Probe, Watch, in_thread, result
from bus.store import StoreUnavailable
from schema.health import CheckResult


def steady(name: str, status: str = "ok") -> Probe:
    async def look() -> Sequence[CheckResult]:
        return [result(name, status, "said")]  # type: ignore[arg-type]

    return Probe(name, look)


class Taken(list[CheckResult]):
    def take(self, results: Sequence[CheckResult]) -> None:
        self.extend(results)

    def of(self, check: str) -> list[CheckResult]:
        return [one for one in self if one.check == check]


async def until(condition: object, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.01)


async def test_one_that_hangs_delays_no_other_and_is_critical_each_beat() -> None:
    asked = 0

    async def hang() -> Sequence[CheckResult]:
        nonlocal asked
        asked += 1
        await asyncio.Event().wait()
        raise AssertionError

    taken = Taken()
    watch = Watch([steady("quick"), Probe("slow", hang)], interval=0.05, timeout=0.4, take=taken.take)
    running = asyncio.create_task(watch.run())
    try:
        await until(lambda: len(taken.of("slow")) >= 2)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert {one.status for one in taken.of("slow")} == {"critical"}
    assert "has not come back" in taken.of("slow")[0].message
    first = next(n for n, one in enumerate(taken) if one.check == "slow")
    assert sum(one.check == "quick" for one in taken[:first]) >= 3, "the quick one waited for the slow one"
    assert asked >= 2


async def test_one_that_does_not_even_heed_its_end_is_not_asked_twice() -> None:
    asked, let_go = 0, asyncio.Event()

    async def deaf() -> Sequence[CheckResult]:
        nonlocal asked
        asked += 1
        while not let_go.is_set():
            try:
                await let_go.wait()
            except asyncio.CancelledError:
                continue
        return [result("deaf", "ok", "back")]

    taken = Taken()
    watch = Watch([Probe("deaf", deaf)], interval=0.05, timeout=0.1, take=taken.take)
    running = asyncio.create_task(watch.run())
    try:
        await until(lambda: len(taken) >= 3)
        assert asked == 1
        assert {one.status for one in taken} == {"critical"}
        let_go.set()
        await until(lambda: taken[-1].status == "ok")
    finally:
        let_go.set()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_thread_that_hangs_is_not_joined_by_others() -> None:
    stuck, began = threading.Event(), threading.active_count()
    watch = Watch([Probe("disk.nfs", lambda: in_thread("disk.nfs", stuck.wait))], interval=9, timeout=0.1)  # type: ignore[arg-type, return-value]
    try:
        for _ in range(5):
            (found,) = await watch.once()
            assert found.status == "critical"
        assert threading.active_count() == began + 1
        assert "still hangs" in found.message
    finally:
        stuck.set()


async def test_blocking_work_says_what_went_wrong() -> None:
    def fail() -> list[CheckResult]:
        raise FileNotFoundError(2, "No such file", "/nowhere")

    (found,) = await Watch([Probe("disk.x", lambda: in_thread("x", fail))], interval=9, timeout=5).once()
    assert found.status == "critical"
    assert "/nowhere" in found.message


async def test_what_is_away_skips_its_details_and_a_defect_is_said() -> None:
    async def away() -> Sequence[CheckResult]:
        raise StoreUnavailable("PostgreSQL is away")

    async def broken() -> Sequence[CheckResult]:
        raise ZeroDivisionError

    watch = Watch(
        [Probe("database", away), Probe("database.size", away, detail=True), Probe("nats", broken)],
        interval=9,
        timeout=5,
    )
    found = {one.check: (one.status, one.message) for one in await watch.once()}
    assert found["database"] == ("critical", "Cannot be looked at now: PostgreSQL is away.")
    assert found["database.size"][0] == "skipped"
    assert found["nats"] == ("critical", "The check itself is broken (ZeroDivisionError): see the log.")


async def test_names_choose_and_each_result_has_its_latency() -> None:
    watch = Watch([steady("disk.home"), steady("disk.data"), steady("database")], interval=9, timeout=5)
    assert [one.check for one in await watch.once(["disk"])] == ["disk.data", "disk.home"]
    assert [one.check for one in await watch.once(["disk.home", "database"])] == ["database", "disk.home"]
    assert await watch.once(["dis"]) == []
    assert all(one.latency > 0 for one in await watch.once())


async def test_what_is_gone_is_over() -> None:
    """A container that failed and is removed, a check that no setting names any more, a look that hung and is back."""
    names, slow = ["container.a", "container.b"], False

    async def containers() -> Sequence[CheckResult]:
        if slow:
            await asyncio.Event().wait()
        return [result(name, "critical", "dead") for name in names]

    taken = Taken()
    watch = Watch(
        [Probe("container", containers), steady("database")],
        interval=0.05,
        timeout=0.2,
        take=taken.take,
        failing={"certificate.old", "container.removed", "database.size"},
    )
    running = asyncio.create_task(watch.run())
    try:
        await until(lambda: taken.of("container.b"))
        assert [one.status for one in taken.of("certificate.old")] == ["ok"]
        assert [one.status for one in taken.of("container.removed")] == ["ok"]
        names.remove("container.b")
        await until(lambda: taken.of("container.b")[-1].status == "ok")
        slow = True
        await until(lambda: taken.of("container"))
        assert taken.of("container.a")[-1].status == "critical", "a look that hangs says nothing of what it is about"
        slow = False
        await until(lambda: taken.of("container")[-1].status == "ok")
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_what_starts_with_the_monitor_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STARTING", 0.5)
    taken = Taken()
    probes = [steady("actor.trainer", "critical"), steady("database", "critical")]
    running = asyncio.create_task(Watch(probes, interval=0.05, timeout=5, take=taken.take).run())
    try:
        await until(lambda: taken.of("actor.trainer"))
        assert taken.of("actor.trainer")[0].status == "skipped"
        assert taken.of("database")[0].status == "critical"
        await until(lambda: taken.of("actor.trainer")[-1].status == "critical")
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_probe_that_is_asked_seldom_is_asked_at_once_while_it_fails() -> None:
    status = "ok"
    asked: list[float] = []

    async def look() -> Sequence[CheckResult]:
        asked.append(time.monotonic())
        return [result("model", status, "said")]  # type: ignore[arg-type]

    watch = Watch([Probe("model", look, every=1_000)], interval=0.02, timeout=5)
    running = asyncio.create_task(watch.run())
    try:
        await until(lambda: asked)
        await asyncio.sleep(0.2)  # ten beats in which it must not be asked
        assert len(asked) == 1
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    status = "warning"
    asked.clear()
    running = asyncio.create_task(Watch([Probe("model", look, every=1_000)], interval=0.02, timeout=5).run())
    try:
        await until(lambda: len(asked) >= 5)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_monitor_whose_beat_stands_still_is_late() -> None:
    watch = Watch([steady("nats")], interval=0.05, timeout=0.05)
    assert not watch.late()
    await asyncio.sleep(0.25)
    assert watch.late(), "nobody runs it"
