"""Trains on request and on schedule, keeps the versions, and has a person's word on which one serves.

The training itself runs in a child process of lower priority that ends with it, so that scikit-learn's memory and time
never meet an actor; the child dies with its parent. Every version is signed: nobody loads one that is not. What serves is
decided by events: the trainer releases a version, the emitter activates it, and the registry at the desk, the tables and
the link to the pickle follow from these events.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Final

import msgspec
from nats.errors import Error as NatsError

from actors.core import signing, verdicts
from actors.core.manifest import (
    ARTIFACTS,
    MANIFEST_FILE,
    ONNX_FILE,
    SIGNATURE_FILE,
    Manifest,
    build_manifest,
    version_name,
)
from actors.core.registry import Version
from actors.core.schedule import Schedule, parse_schedule
from actors.core.spool import pack, pack_bars
from actors.core.verdicts import Progress, TrainRequest, Verdict
from actors.workshop import files, shelf
from actors.workshop.child import Bars, Job, RunFailed, Serving, run_child
from actors.workshop.desk import Desk
from actors.workshop.keys import KeysUnusable, signing_key
from bus.client import BusUnavailable
from bus.consume import Reader, consume, last_message
from bus.store import Row, Store, StoreRejected, StoreUnavailable
from bus.subjects import MODELS, TRAIN
from bus.supervise import ConfigurationError, Context, run_tasks, serve, withdraw
from bus.topology import model_name
from schema.timeframes import SECONDS, canonical

CHUNK_ROWS: Final = 20_000
GUARD_BARS: Final = (
    1_000_000  # of all symbols together, read for the leak guard: 10 s of reading, 0.6 µs each to compute
)
PART_BARS: Final = 100_000
STORE_BUDGET: Final = 60.0  # seconds that a run's result waits for PostgreSQL or NATS
RETRY_EVERY: Final = 1.0
END_OF_TIME: Final = datetime(9999, 1, 1, tzinfo=UTC)


@dataclass(slots=True)
class _Run:
    request: TrainRequest
    answer: asyncio.Future[Verdict] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Trainer:
    """The actor; see the module."""

    name: ClassVar[str] = "trainer"
    description: ClassVar[str] = "Trains models, keeps their versions and releases them to the emitter"
    own_service: ClassVar[bool] = True

    def __init__(self, ctx: Context) -> None:
        self.bus = ctx.bus
        self.log = ctx.log
        self.settings = ctx.settings
        self._ctx = ctx
        self._models = Path(ctx.settings.home) / "models"
        self._schedule = _schedule(ctx.settings.trainer.schedule)
        self._queue: asyncio.Queue[_Run] = asyncio.Queue()
        self._runs = 0  # those that run or wait
        self._store: Store
        self._desk: Desk
        self._key = b""

    async def run(self) -> None:
        if self._ctx.database_url is None:
            raise ConfigurationError("The trainer needs PostgreSQL: set MT5_DATABASE_URL.")
        self._store = await Store.connect(self._ctx.database_url, size=2, name=self.name)
        try:
            self._key = await asyncio.to_thread(self._signing_key)
            await asyncio.to_thread(files.sweep, self._models)
            desk = self._desk = Desk(self.bus, self._store, self.settings, self.log)
            async with Reader(self.bus, MODELS, name=f"{self.name}-models", start=1) as reader:
                # Decisions need to know who serves: every event that is in the stream now comes first.
                last = await last_message(self.bus, MODELS)
                while last is not None and reader.position < last[0]:
                    await desk.hear(await reader.next(), fresh=False)
                endpoints = {TRAIN: self._on_train, **desk.endpoints}
                service = await serve(self.bus, self.name, self.description, endpoints)
                self._ctx.ready()
                try:
                    await run_tasks(
                        {
                            "trainer-events": consume(reader, desk.hear),
                            "trainer-archive": desk.archive(),
                            "trainer-work": self._work(),
                            "trainer-schedule": self._follow_schedule(),
                        }
                    )
                finally:
                    if self.bus.connected:
                        await withdraw(service)
        finally:
            await self._store.close()

    def _signing_key(self) -> bytes:
        named = self.settings.models.public_key
        try:
            return signing_key(Path(self.settings.home) / "keys", Path(named).expanduser() if named else None)
        except KeysUnusable as error:
            raise ConfigurationError(str(error)) from error

    # --- requests ------------------------------------------------------------------------------------------------

    async def _on_train(self, data: bytes) -> bytes:
        try:
            request = msgspec.json.decode(data or b"{}", type=TrainRequest)
            if canonical(request.timeframe) is None:
                raise ValueError(f"{request.timeframe!r} is no timeframe: use one of {', '.join(SECONDS)}.")
            if request.progress is not None and not request.progress.startswith("_INBOX"):
                raise ValueError("progress must be an inbox of the asker.")
        except ValueError as error:  # msgspec.DecodeError is one
            return _encode(verdicts.invalid(f"This is not a training request: {error}"))
        return _encode(await self._submit(request))

    async def _submit(self, request: TrainRequest) -> Verdict:
        if self._runs:
            message = "A training is running already: ask again when it is done."
            return Verdict(ok=False, verdict="busy", message=message)
        return await self._enqueue(request)

    async def _enqueue(self, request: TrainRequest) -> Verdict:
        self._runs += 1
        run = _Run(request)
        self._queue.put_nowait(run)
        return await run.answer

    # --- runs ----------------------------------------------------------------------------------------------------

    async def _follow_schedule(self) -> None:
        while self._schedule is None:
            await asyncio.Event().wait()
        while True:
            run_at = self._schedule.next_run(datetime.now(UTC))
            while (left := (run_at - datetime.now(UTC)).total_seconds()) > 0:  # noqa: ASYNC110  # waits for a clock
                await asyncio.sleep(min(left, 60.0))  # short naps: the clock may be set meanwhile
            for timeframe in self.settings.trainer.timeframes:
                # After whatever runs now: a slot that was skipped would be a day or a week without a model.
                verdict = await self._enqueue(TrainRequest(timeframe=timeframe))
                self.log.info("scheduled run", action="trainer.scheduled", timeframe=timeframe, message=verdict.message)

    async def _work(self) -> None:
        while True:
            run = await self._queue.get()
            try:
                verdict = await self._train(run.request)
            except (RunFailed, BusUnavailable, StoreUnavailable, StoreRejected) as error:
                verdict = verdicts.failed(f"The training failed: {error}")
            except BaseException as error:
                stopped = isinstance(error, asyncio.CancelledError)
                message = (
                    "the trainer is stopping; ask again." if stopped else "an internal error; see the trainer's log."
                )
                if not run.answer.done():
                    run.answer.set_result(verdicts.failed(f"The training failed: {message}"))
                raise
            finally:
                self._runs -= 1
            log = self.log.info if verdict.ok else self.log.warning
            log("run ended", action="trainer.verdict", verdict=verdict.verdict, message=verdict.message)
            if not run.answer.done():
                run.answer.set_result(verdict)

    async def _train(self, request: TrainRequest) -> Verdict:
        timeframe = canonical(request.timeframe) or request.timeframe
        name = model_name(timeframe)

        async def tell(progress: Progress) -> None:
            if request.progress is not None:
                await self.bus.nc.publish(request.progress, msgspec.json.encode(progress))

        async with files.workspace(self._models / name) as folder:
            await tell(Progress(stage="read", done=0.0))
            job = await self._read(timeframe, folder, request)
            result = await run_child(job, tell)
            report = result.report
            if result.reason:
                await self._keep_metrics(name, "refused", None, result.reason, report)
                return verdicts.refused(name, result.reason, report)
            await tell(Progress(stage="store", done=0.98))
            created = datetime.now(UTC)
            version, path = await asyncio.to_thread(self._store_files, folder, name, timeframe, created, report)
        for file in shelf.ORDER:
            data = await asyncio.to_thread((path / file).read_bytes)
            await self._patiently(partial(self.bus.put_object, f"{name}/{version}/{file}", data))
        manifest = msgspec.json.decode(data, type=Manifest)
        registry = self._desk.registry
        first = registry.serving(name) is None and registry.awaited(name) is None
        row = (name, version, timeframe, "candidate", created, data.decode())
        await self._patiently(partial(self._store.execute, "upsert_model", *row))
        place = "provisional" if first else registry.place(name, self.settings.models.shadows)
        await self._keep_metrics(name, place, version, "", report)
        await tell(Progress(stage="release", done=0.99))
        entry = Version(name, version, timeframe, recipe=manifest.recipe)
        if first:
            answer = await self._desk.release(entry, "provisional", "the first version that passed", self.name, {})
            verdict = verdicts.released(name, version, "provisional", answer, report, str(path))
        else:
            verdict = verdicts.registered(name, version, await self._desk.register(entry), report, str(path))
        await self._desk.prune(name)
        return verdict

    async def _read(self, timeframe: str, folder: Path, request: TrainRequest) -> Job:
        """Spools the training set into one file a symbol: neither this process nor a message holds it whole."""
        settings, options = self.settings.trainer, self.settings.symbols
        counted = await self._store.fetch("trainset_symbols", timeframe)
        rows = {r["symbol"]: int(r["rows"]) for r in counted}
        # The settings' word goes over the terminals'.
        points = {r["symbol"]: r["point"] for r in await self._store.fetch("symbol_points")}
        points |= {s: known.point for s, known in options.items() if known.point is not None}
        symbols = [symbol for symbol, n in rows.items() if n >= settings.min_rows]
        if not symbols and rows:  # so that the refusal can say how many rows there are
            symbols = [max(rows, key=lambda symbol: rows[symbol])]
        for i, symbol in enumerate(symbols):
            with (folder / f"{i}.rows").open("wb") as file:
                before, left = END_OF_TIME, settings.max_rows
                while left > 0:
                    chunk = await self._store.fetch("trainset_rows", timeframe, symbol, before, min(left, CHUNK_ROWS))
                    if not chunk:
                        break
                    await asyncio.to_thread(_spool, file, pack, chunk)
                    before, left = chunk[-1]["ts"], left - len(chunk)
        bars = await self._read_bars(timeframe, folder, symbols)
        return Job(
            folder=str(folder),
            symbols=symbols,
            bars=bars,
            champion=await asyncio.to_thread(self._champion, model_name(timeframe)),
            options={
                "bar_seconds": SECONDS[timeframe],
                "seed": settings.seed if request.seed is None else request.seed,
                "trees": request.trees or settings.trees,
                "max_depth": request.max_depth or settings.max_depth,
                "min_samples_leaf": request.min_samples_leaf or settings.min_samples_leaf,
                "folds": settings.folds,
                "min_rows": settings.min_rows,
                "points": {s: points[s] for s in symbols if s in points},
                "spreads": {s: options[s].spread for s in symbols if s in options and options[s].spread is not None},
            },
        )

    async def _read_bars(self, timeframe: str, folder: Path, symbols: Sequence[str]) -> list[Bars]:
        """Spools the bars from which the leak guard computes features again: whole series while they fit the budget.

        The shortest come first, so that as many symbols as possible are checked; where no series is whole, one goes in part.
        """
        whole: list[tuple[int, str]] = []
        for symbol in symbols:
            ends = await self._store.fetchrow("series_ends", timeframe, symbol)
            if ends is not None and ends["first_bar"] == 1:
                whole.append((int(ends["last_bar"]), symbol))
        chosen: list[Bars] = []
        left = GUARD_BARS
        for count, symbol in sorted(whole):
            if count > left:
                break
            read = await self._read_series(timeframe, symbol, folder / f"{len(chosen)}.bars", GUARD_BARS)
            left -= read
            # Fewer bars than its features count: some are no longer there, and what follows them cannot be made again.
            if read:
                chosen.append(Bars(symbol=symbol, complete=read >= count))
        if not chosen and symbols:
            read = await self._read_series(timeframe, symbols[0], folder / "0.bars", PART_BARS)
            chosen = [Bars(symbol=symbols[0], complete=False)] if read else []
        return chosen

    async def _read_series(self, timeframe: str, symbol: str, path: Path, limit: int) -> int:
        """Spools a series' oldest bars; how many there were."""
        read, after = 0, None
        with path.open("wb") as file:
            while read < limit:
                chunk = await self._store.fetch("series_rows", symbol, timeframe, after, min(CHUNK_ROWS, limit - read))
                if not chunk:
                    break
                await asyncio.to_thread(_spool, file, pack_bars, chunk)
                read, after = read + len(chunk), chunk[-1]["ts"]
        return read

    def _champion(self, name: str) -> Serving | None:
        """What serves, to be compared with on the same rows; None where nothing does or its manifest is not here."""
        serving = self._desk.registry.serving(name)
        if serving is None:
            return None
        folder = self._models / name / serving.version
        try:
            manifest = msgspec.json.decode((folder / MANIFEST_FILE).read_bytes(), type=Manifest)
        except (OSError, msgspec.DecodeError) as error:
            self.log.warning("the champion is not compared", action="trainer.champion", error=str(error))
            return None
        return Serving(
            version=serving.version,
            graph=str(folder / ONNX_FILE),
            sha256=manifest.files[ONNX_FILE].sha256 if ONNX_FILE in manifest.files else "",
            feature_set=manifest.feature_set,
            symbols=manifest.symbols,
            last_ts=int(manifest.last_ts.timestamp()),
        )

    def _store_files(
        self, folder: Path, name: str, timeframe: str, created: datetime, report: dict[str, Any]
    ) -> tuple[str, Path]:
        """Completes the version's folder with its signed manifest and gives it its name, whole or not at all."""
        artifacts = {file: (folder / "version" / file).read_bytes() for file in ARTIFACTS}
        version = version_name(created, artifacts[ONNX_FILE])
        manifest = build_manifest(
            report,
            artifacts,
            name=name,
            version=version,
            timeframe=timeframe,
            created_at=created,
            expire_days=self.settings.trainer.expire_days,
        )
        text = msgspec.json.format(msgspec.json.encode(manifest))
        files.write(folder / "version" / SIGNATURE_FILE, signing.sign(self._key, text))
        files.write(folder / "version" / MANIFEST_FILE, text)
        path = self._models / name / version
        (folder / "version").rename(path)
        files.sync_folder(path.parent)
        return version, path

    async def _keep_metrics(
        self, name: str, verdict: str, version: str | None, reason: str, report: dict[str, Any]
    ) -> None:
        metrics = {"verdict": verdict, "version": version, "reason": reason} | report
        text = msgspec.json.encode(metrics).decode()
        created = datetime.now(UTC)
        await self._patiently(partial(self._store.fetchval, "insert_model_metrics", created, name, text))

    async def _patiently(self, act: Callable[[], Awaitable[Any]]) -> None:
        """Does it within the budget; raises the last error. Only for what may be done twice."""
        deadline = time.monotonic() + STORE_BUDGET
        while True:
            try:
                await act()
            except (StoreUnavailable, BusUnavailable, NatsError, TimeoutError) as error:
                if time.monotonic() > deadline:
                    raise RunFailed(f"{error} The model is not released: train again.") from error
                self.log.warning("result waits", action="trainer.wait", error=str(error))
                await asyncio.sleep(RETRY_EVERY)
            else:
                return


def _encode(verdict: Verdict) -> bytes:
    return msgspec.json.encode(verdict)


def _schedule(text: str | None) -> Schedule | None:
    try:
        return None if text is None else parse_schedule(text)
    except ValueError as error:
        raise ConfigurationError(f"[trainer] schedule: {error}") from error


def _spool(file: BinaryIO, pack_rows: Callable[[Iterable[Any]], bytes], rows: list[Row]) -> None:
    file.write(pack_rows(rows))
