"""The reading routes: signals, candles, features, models, health and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import Any, Final, TypedDict, TypeVar

import msgspec
import structlog
from aiohttp import web

from actors.core.recent import newest_first
from actors.gateway.answers import (
    CandleList,
    Check,
    FeatureList,
    HealthReport,
    ModelDetail,
    ModelList,
    Probe,
    Status,
    summary,
)
from actors.gateway.deps import GatewayDeps
from actors.gateway.problems import NO_STORE, HttpProblem, answer, unavailable
from actors.gateway.query import MAX_LIMIT, Query, checked_name, required
from bus import telemetry
from bus.client import BusUnavailable
from bus.store import Store, StoreRejected, StoreUnavailable
from schema.messages import Signal, SignalList
from schema.scorecard import Scorecard, ScorecardRequest

log = structlog.get_logger(__name__)
R = TypeVar("R")

DEFAULT_SIGNALS: Final = 100
DEFAULT_VERSIONS: Final = 20  # of a model, each with its manifest
SIGNALS_WAIT: Final = 1.0  # seconds for the archive's part of GET /signals: memory answers without it
ARCHIVE_WAIT: Final = 5.0  # seconds for what only the archive can answer
HEALTH_WAIT: Final = 1.0
SERVING: Final = ("champion", "provisional")
ARCHIVE_HEADER: Final = "X-Archive"


class Reads:
    """The handlers over one set of parts."""

    def __init__(self, deps: GatewayDeps) -> None:
        self._deps = deps
        self._late: set[asyncio.Task[Any]] = set()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/signals", self.signals),
            web.get("/candles", self.candles),
            web.get("/features", self.features),
            web.get("/models", self.models),
            web.get("/models/{name}", self.model),
            web.get("/scorecard", self.scorecard),
            web.get("/health", self.health),
            web.get("/live", self.live),
            web.get("/ready", self.ready),
            web.get("/metrics", self.metrics),
            web.get("/prometheus", self.metrics),
        ]

    async def signals(self, request: web.Request) -> web.StreamResponse:
        """Newest first: memory has those that the archive has not yet, the archive those that memory no longer has."""
        query = Query(request, "timeframe", "symbol", "limit", "since")
        timeframe = required("timeframe", query.timeframe())
        symbol, since, limit = query.symbol(), query.time("since"), query.limit(DEFAULT_SIGNALS)
        archived: tuple[Signal, ...] = ()
        archive = "ok"
        try:
            archived = await self._archived(
                lambda store: store.signals(timeframe, symbol=symbol, since=since, limit=limit), SIGNALS_WAIT
            )
        except StoreUnavailable as error:
            archive = "unavailable"
            log.warning("signals from memory alone", action="read.memory", error=str(error))
        recent = self._deps.broadcaster.recent.newest(limit, timeframe=timeframe, symbol=symbol, since=since)
        signals = newest_first((*archived, *recent), limit)
        return answer(SignalList(signals=tuple(signals)), headers={ARCHIVE_HEADER: archive})

    async def candles(self, request: web.Request) -> web.StreamResponse:
        """Oldest first: from ``from`` on, or the newest without it."""
        symbol, timeframe, span = _series(request)
        rows = await self._only_archived(lambda store: store.candles(symbol, timeframe, **span))
        return answer(CandleList(symbol=symbol, timeframe=timeframe, candles=rows))

    async def features(self, request: web.Request) -> web.StreamResponse:
        """As :meth:`candles`."""
        symbol, timeframe, span = _series(request)
        rows = await self._only_archived(lambda store: store.features(symbol, timeframe, **span))
        return answer(FeatureList(symbol=symbol, timeframe=timeframe, features=rows))

    async def models(self, request: web.Request) -> web.StreamResponse:
        Query(request)
        records = await self._only_archived(lambda store: store.models())
        return answer(ModelList(models=tuple(summary(record) for record in records)))

    async def model(self, request: web.Request) -> web.StreamResponse:
        limit = Query(request, "limit").limit(DEFAULT_VERSIONS)
        name = checked_name("The model's name", request.match_info["name"])
        records = await self._only_archived(lambda store: store.models(name))
        if not records:
            raise HttpProblem(404, f'There is no model "{name}": GET /models lists them.')
        serving = next((record.version for record in records if record.state in SERVING), None)
        return answer(ModelDetail(model_name=name, serving=serving, versions=records[:limit]))

    async def scorecard(self, request: web.Request) -> web.StreamResponse:
        """The scorer's own words: what came true of the signals, version by version."""
        query = Query(request, "model", "symbol", "timeframe")
        wanted = ScorecardRequest(model=query.name("model"), symbol=query.symbol(), timeframe=query.timeframe())
        try:
            body = await self._deps.scorecard(msgspec.json.encode(wanted))
            card = msgspec.json.decode(body, type=Scorecard)
        except (BusUnavailable, msgspec.DecodeError) as error:
            log.warning("no scorecard", action="read.scorecard", error=str(error))
            raise unavailable("The scorer does not answer: see `mt5 doctor`, and ask again in a moment.", 2) from None
        return answer(card)

    async def health(self, request: web.Request) -> web.StreamResponse:
        """200 while candles are taken; the archive alone never makes it 503, since nothing here waits for it."""
        Query(request)
        checks = {**await self._deps.checks(), "archive": await self._check_archive()}
        statuses: set[Status] = {check.status for check in checks.values()}
        status: Status = "down" if "down" in statuses else "degraded" if "degraded" in statuses else "ok"
        return answer(HealthReport(status=status, checks=checks), status=503 if status == "down" else 200)

    async def live(self, _: web.Request) -> web.StreamResponse:
        return answer(Probe(status="ok"))

    async def ready(self, _: web.Request) -> web.StreamResponse:
        if self._deps.ready():
            return answer(Probe(status="ok"))
        return answer(Probe(status="starting"), status=503, headers={"Retry-After": "1"})

    async def metrics(self, _: web.Request) -> web.StreamResponse:
        body = await self._deps.scrape()
        return web.Response(body=body, headers={"Content-Type": telemetry.CONTENT_TYPE, "Cache-Control": NO_STORE})

    async def _check_archive(self) -> Check:
        try:
            await self._archived(lambda store: store.fetchval("ping"), HEALTH_WAIT)
        except StoreUnavailable as error:
            return Check(status="degraded", detail=str(error))
        return Check(status="ok", detail="PostgreSQL answers.")

    async def _only_archived(self, read: Callable[[Store], Coroutine[Any, Any, R]]) -> R:
        """For what only the archive knows; raises HttpProblem 503 while it is away."""
        try:
            return await self._archived(read, ARCHIVE_WAIT)
        except StoreUnavailable as error:
            log.warning("archive is not reachable", action="read.unavailable", error=str(error))
            raise unavailable("The archive is not reachable: ask again in a moment.", 2) from None

    async def _archived(self, read: Callable[[Store], Coroutine[Any, Any, R]], seconds: float) -> R:
        """What the archive answers within that many seconds.

        Raises:
            StoreUnavailable: it did not answer, or none is configured.
            HttpProblem: 400, it refuses the values.
        """
        store = self._deps.store
        if store is None:
            raise StoreUnavailable("No archive is configured: set MT5_DATABASE_URL.")
        task = asyncio.create_task(read(store), name="archive-read")
        try:
            done, _ = await asyncio.wait({task}, timeout=seconds)
        finally:
            # Giving a connection back to a frozen server takes seconds: nobody waits for that here.
            if not task.done():
                task.cancel()
                self._late.add(task)
                task.add_done_callback(self._forget)
        if not done:
            raise StoreUnavailable(f"The archive did not answer within {seconds:g} s.")
        try:
            return task.result()
        except StoreRejected as error:
            raise HttpProblem(400, f"The archive refuses these values: {error}.") from None

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._late.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.info("late read failed", action="read.late", error=str(error))


class Span(TypedDict):
    """Which rows of a series, as the archive's reads take them."""

    start: datetime | None
    end: datetime | None
    limit: int


def _series(request: web.Request) -> tuple[str, str, Span]:
    query = Query(request, "symbol", "timeframe", "from", "to", "limit")
    symbol = required("symbol", query.symbol())
    timeframe = required("timeframe", query.timeframe())
    span = Span(start=query.time("from"), end=query.time("to"), limit=query.limit(MAX_LIMIT))
    if span["start"] is not None and span["end"] is not None and span["start"] > span["end"]:
        raise HttpProblem(400, "from is after to: swap them.")
    return symbol, timeframe, span
