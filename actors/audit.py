"""Signals made again and compared: one by its id, a sample, or all of the archive; and the audit that goes on for ever.

A signal is rebuilt from the archive's versions of its bars, and from the streams where the archive does not have it yet. All
of a series is gone through once, however many of its signals are looked at.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Final, NamedTuple

import msgspec

from actors.core.manifest import OtherRuntime
from actors.core.rebuild import PRICES, Rebuilder, Version
from actors.core.receipts import FEATURES, Difference, Receipt, Service, Value, compare
from actors.core.serving import ModelRefused, ServedModel
from bus.audit import Kept, Snapshot, Streams, snapshot
from bus.client import BusUnavailable
from bus.store import Row, Store, StoreRejected, StoreUnavailable
from bus.subjects import ALERTS
from bus.supervise import Context
from bus.telemetry import audited_total
from bus.topology import model_name
from schema.messages import Alert, CandleBlock, FeatureBlock, Signal

Load = Callable[[str, str], Awaitable[ServedModel]]
"""A version by model name and version. Raises ModelRefused and BusUnavailable."""
Picks = Mapping[tuple[str, str], Sequence[str] | None]
"""Signal ids by (symbol, timeframe); None: all of the series."""

SIGNALS_AT_ONCE: Final = 50_000  # signals of a series that one pass over its bars answers: some 100 MB
LABELLED_WITHIN: Final = timedelta(days=7)  # bars so much later are read too: a row's label comes five bars later
DRAWS: Final = 8  # times that random ids are drawn until there are enough different signals
SHOWN: Final = 5  # signals that an alert names


class Checked(NamedTuple):
    """A signal and what of it is not as it must be; nothing where it is identical.

    Of a ``foreign`` one nobody can tell here: its one difference says which release to install.
    """

    signal: Signal
    differences: tuple[Difference, ...]
    foreign: bool = False  # its version was made with another ONNX Runtime than this host's, and cannot be asked here


class Audit:
    """One look at the archive: what served when and the models' files are read once."""

    def __init__(self, store: Store, streams: Streams, load: Load) -> None:
        self._store = store
        self._streams = streams
        self._load = load
        self._models: dict[tuple[str, str], ServedModel | str] = {}
        self._foreign: set[str] = set()  # why those versions are not loaded here
        self._service: Service | None = None

    async def one(self, signal_id: str) -> Checked | None:
        """A signal by its id, archived or still in the stream only; None where there is none.

        Raises:
            BusUnavailable, StoreUnavailable: ask again.
        """
        async with snapshot(self._store) as archive:
            features, signals = await archive.cursors()
            kept = await archive.signal(signal_id)
            archived = kept is not None
            if kept is None:
                kept = await self._streams.unarchived_signal(signal_id, signals.stream_seq)
            if kept is None:
                return None
            signal = kept.signal
            blocks: list[FeatureBlock] | None = None
            if signal.candles_seq > features.candles_seq:
                blocks = await self._streams.unarchived_features(
                    signal.symbol, signal.timeframe, features.stream_seq, signal.candles_seq
                )
            found = await self._check(archive, signal.symbol, signal.timeframe, [kept], blocks, streamed=archived)
        return found[0]

    async def pick(self, count: int, chance: Random, symbol: str | None = None) -> Picks:
        """``count`` different signals by chance, half of them of the newest bars; fewer where there are not so many."""
        async with snapshot(self._store) as archive:
            until = (await archive.cursors())[0].candles_seq
            found = dict.fromkeys(await archive.newest((count + 1) // 2, symbol, until))
            for _ in range(DRAWS):
                missing = count - len(found)
                if missing <= 0:
                    break
                ids = [f"{chance.getrandbits(128):032x}" for _ in range(missing)]
                found.update(dict.fromkeys(await archive.random(ids, symbol, until)))
        picks: dict[tuple[str, str], list[str]] = {}
        for signal_id, name, timeframe in found:
            picks.setdefault((name, timeframe), []).append(signal_id)
        return picks

    async def everything(self, symbol: str | None = None) -> Picks:
        """All series that have signals."""
        async with snapshot(self._store) as archive:
            return dict.fromkeys(await archive.series(symbol))

    async def run(self, picks: Picks) -> AsyncIterator[list[Checked]]:
        """Checks series by series; archived signals only, of bars that are archived as well.

        Raises:
            BusUnavailable, StoreUnavailable: ask again.
        """
        for (symbol, timeframe), ids in picks.items():
            async with snapshot(self._store) as archive:
                until = (await archive.cursors())[0].candles_seq
                after: datetime | None = None
                while True:
                    kept = await archive.signals(symbol, timeframe, ids, until, after, SIGNALS_AT_ONCE)
                    if not kept:
                        break
                    more = len(kept) == SIGNALS_AT_ONCE
                    if more:  # all signals of a bar come together
                        last = kept[-1].signal.ts
                        kept = [one for one in kept if one.signal.ts < last] or kept
                    after = kept[-1].signal.ts
                    yield await self._check(archive, symbol, timeframe, kept)
                    if not more:
                        break

    async def _check(
        self,
        archive: Snapshot,
        symbol: str,
        timeframe: str,
        kept: Sequence[Kept],
        blocks: Sequence[FeatureBlock] | None = None,
        *,
        streamed: bool = True,
    ) -> list[Checked]:
        """``blocks``: what the archive's bars and features lack for these signals; ``streamed``: they have a message too."""
        times = {one.signal.ts for one in kept}
        rows = await archive.features(symbol, timeframe, times) if blocks is None else {}
        told: dict[tuple[str, int], Kept] = {}
        if streamed:
            wanted = {(one.signal.id, one.signal.candles_seq) for one in kept}
            told = await self._streams.signals(symbol, timeframe, wanted)
        receipts = [
            _receipt(one, rows.get(one.signal.ts), told.get((one.signal.id, one.signal.candles_seq))) for one in kept
        ]
        past = Rebuilder(symbol, timeframe, [want for receipt in receipts for want in receipt.wanted])
        async for page in archive.versions(symbol, timeframe, max(times) + LABELLED_WITHIN):
            await asyncio.to_thread(past.feed, map(_version, page))
        for block in blocks or ():
            past.feed(_versions(block))
        await asyncio.to_thread(past.finish)
        log = await self._streams.candles(
            symbol, timeframe, {form.brought for forms in past.found.values() for form in forms}
        )
        service = await self._served(archive)
        models = [await self._model(service, receipt.signal) for receipt in receipts]

        def compared() -> list[Checked]:
            out = []
            for receipt, model in zip(receipts, models, strict=True):
                found = compare(_with_log(receipt, past, log), past, service, model, model_name(timeframe))
                foreign = model in self._foreign and any(one.rebuilt == model for one in found)
                out.append(Checked(receipt.signal, found, foreign))
            return out

        return await asyncio.to_thread(compared)

    async def _served(self, archive: Snapshot) -> Service:
        if self._service is None:
            events, whole = await self._streams.model_events()
            self._service = Service(events, () if whole else await archive.activations())
        return self._service

    async def _model(self, service: Service, signal: Signal) -> ServedModel | str | None:
        version = service.version_at(signal.timeframe, signal.candles_seq)
        if version is None:
            return None
        key = (model_name(signal.timeframe), version)
        if key not in self._models:
            try:
                self._models[key] = await self._load(*key)
            except ModelRefused as error:
                self._models[key] = str(error)
                if isinstance(error, OtherRuntime):
                    self._foreign.add(str(error))
        return self._models[key]


def _receipt(kept: Kept, row: Row | None, told: Kept | None) -> Receipt:
    features = None if row is None else {name: row[name] for name in (*FEATURES, "candles_seq")}
    stages: dict[str, tuple[Value, Value]] = {}
    # The same signal may have been published again after the stream had lost it: then it has another trace.
    if told is not None and kept.signal.created_at == told.signal.created_at:
        stages = {
            "trace_id": (kept.trace_id, told.trace_id),
            "received_at": (_text(kept.received_at), _text(told.received_at)),
            "features_at": (_text(kept.features_at), _text(told.features_at)),
            "candle_digest": (kept.candle_digest, told.candle_digest),
        }
    streamed = told.signal if told is not None else None
    return Receipt(kept.signal, features, streamed, None, kept.candle_digest, stages)


def _text(at: datetime | None) -> str | None:
    return None if at is None else at.astimezone(UTC).isoformat()


def _with_log(receipt: Receipt, past: Rebuilder, log: Mapping[int, CandleBlock]) -> Receipt:
    """The receipt with its bar as the log still has it, in the message that brought the version it was made of."""
    forms = past.found.get((receipt.bar, receipt.signal.candles_seq))
    block = log.get(forms[0].brought) if forms else None
    for row in block.rows if block is not None else ():
        if row.ts == receipt.signal.ts:
            return msgspec.structs.replace(receipt, logged=tuple(getattr(row, name) for name in PRICES))
    return receipt


def _version(row: Row) -> Version:
    values = None if row["open"] is None else tuple(row[name] for name in PRICES)
    return Version(
        row["seq"], row["ts"], values, row["revision"], bool(row["live"]), row["heard_at"], row["brought_seq"]
    )


def _versions(block: FeatureBlock) -> list[Version]:
    """What the recorder will keep of a block's bars."""
    out = [Version(block.candles_seq, int(gone.ts.timestamp()), None, gone.revision) for gone in block.withdrawn]
    heard = block.now if block.replay else block.received_at
    for row in block.rows:
        own = row.brought_seq is None
        out.append(
            Version(
                block.candles_seq,
                int(row.ts.timestamp()),
                tuple(getattr(row, name) for name in PRICES),
                row.revision,
                row.live,
                heard if own else row.heard_at,
                block.candles_seq if own else row.brought_seq or 0,
            )
        )
    return out


# --- for ever ------------------------------------------------------------------------------------------------------


class Auditor:
    """The standing audit: a sample every ``[scorer] audit_seconds``, a row for each signal, an alert where one differs.

    ``loader`` makes a fresh loader for each audit, so that files are read again: a changed one must be noticed.
    """

    def __init__(self, ctx: Context, store: Store, loader: Callable[[], Load], chance: Random) -> None:
        self._ctx = ctx
        self._store = store
        self._loader = loader
        self._chance = chance
        self._streams = Streams(ctx.bus, "scorer-audit")

    async def run(self) -> None:
        """Audits for ever; what cannot be read now is tried again the next time."""
        while True:
            await asyncio.sleep(self._ctx.settings.scorer.audit_seconds)
            try:
                await self.once()
            except (BusUnavailable, StoreUnavailable, StoreRejected) as error:
                self._ctx.log.warning("audit put off", action="audit.retry", error=str(error))

    async def once(self) -> list[Checked]:
        """One audit; returns what it has checked."""
        audit = Audit(self._store, self._streams, self._loader())
        picks = await audit.pick(self._ctx.settings.scorer.audit_sample, self._chance)
        checked = [one async for part in audit.run(picks) for one in part]
        if not checked:
            return []
        at = datetime.now(UTC)
        foreign = sum(one.foreign for one in checked)
        audited_total.inc(foreign, result="unverifiable")
        if foreign:
            self._ctx.log.warning(
                "signals of versions that this host cannot load are not audited",
                action="audit.foreign",
                signals=foreign,
                why=next(one.differences[0].rebuilt for one in checked if one.foreign),
            )
        checked = [one for one in checked if not one.foreign]
        if not checked:
            return []
        await self._store.execute(
            "insert_audits",
            at,
            [one.signal.id for one in checked],
            [not one.differences for one in checked],
            [msgspec.json.encode(one.differences).decode() if one.differences else None for one in checked],
        )
        wrong = [one for one in checked if one.differences]
        audited_total.inc(len(checked) - len(wrong), result="identical")
        audited_total.inc(len(wrong), result="different")
        if wrong:
            await self._alert(wrong, len(checked), at)
        self._ctx.log.info("audited", action="audit.done", signals=len(checked), different=len(wrong))
        return checked

    async def _alert(self, wrong: Sequence[Checked], of: int, at: datetime) -> None:
        named = ", ".join(f"{one.signal.id} ({one.differences[0].field})" for one in wrong[:SHOWN])
        details: dict[str, Any] = {one.signal.id: msgspec.to_builtins(one.differences) for one in wrong[:SHOWN]}
        alert = Alert(
            severity="critical",
            check="receipts",
            message=f"{len(wrong)} of {of} audited signals cannot be made again as they were: {named}. "
            f"`mt5 verify {wrong[0].signal.id}` shows the difference.",
            at=at,
            details=details,
        )
        await self._ctx.bus.publish(ALERTS, alert, alert.severity, alert.check, msg_id=f"receipts:{at.isoformat()}")
