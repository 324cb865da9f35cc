"""What the gateway's routes are made of: the collector fills this in once and hands it to every part."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from actors.core.sessions import ClockOf, Span, no_clock
from actors.gateway.answers import Check
from actors.gateway.auth import Guard
from actors.gateway.broadcast import Broadcaster
from bus import telemetry
from bus.client import BusUnavailable
from bus.store import Store
from schema.messages import Signal
from schema.settings import Settings


async def own_metrics() -> bytes:
    """This process' alone."""
    return telemetry.render()


async def no_scorer(_: bytes) -> bytes:
    raise BusUnavailable("There is no scorer.")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayDeps:
    """``store`` is None where no archive is configured.

    ``ready``: the bus is connected and the series' state is known. ``checks``: what the collector knows of the bus and
    of the actors behind it (the archive's check is added by /health). ``signals_after``: at most that many of the
    SIGNALS stream's messages after a sequence, in order, empty at the stream's end; raises BusUnavailable.
    ``scrape``: the metrics of every process as Prometheus text. ``clock_of``: a source's clock. ``given_up``: spans of a series (symbol, timeframe) that were asked for in vain.
    ``scorecard``: the scorer's answer to a request of its; raises BusUnavailable where it gives none in time.
    """

    settings: Settings
    guard: Guard
    broadcaster: Broadcaster
    store: Store | None
    ready: Callable[[], bool]
    checks: Callable[[], Awaitable[Mapping[str, Check]]]
    signals_after: Callable[[int, int], Awaitable[Sequence[tuple[int, Signal]]]]
    scrape: Callable[[], Awaitable[bytes]] = own_metrics
    clock_of: ClockOf = no_clock
    scorecard: Callable[[bytes], Awaitable[bytes]] = no_scorer
    given_up: Callable[[str, str], Sequence[Span]] = lambda symbol, timeframe: ()
