"""``rejects list`` and ``rejects replay``: what could not be processed, and another try once the cause is mended."""

from __future__ import annotations

import argparse
import asyncio
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import msgspec
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeout
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import APIError, NotFoundError

from bus.client import BusUnavailable
from bus.subjects import REJECTS
from commands.output import DONE, NO, WRONG, CommandError, complain, say, write_json, write_table
from commands.places import bus_of, find
from commands.rejects_parked import NotAgain, try_again
from commands.settings import read
from schema.messages import IngestAnswer, Problem, Reject

if TYPE_CHECKING:
    from bus.client import Bus

CANDLES: Final = "candles"  # where the gateway keeps what it rejected: the only rejects that can be posted again
FETCH: Final = 256  # messages read at a time
FETCH_WAIT: Final = 2.0
PATIENCE: Final = 30.0  # seconds that a gateway may say "later"
REQUEST_TIMEOUT: Final = 15.0
FIRST_PAUSE: Final = 0.1
REASON_WIDTH: Final = 70

_UNKNOWN: Final = frozenset({408, 429, 502, 503, 504})  # stored or not, nobody knows: sending again is safe
_AGE: Final = re.compile(r"(\d{1,6})([smhd])")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}

Candle = Mapping[str, Any]  # {"index", "error", "candle"} as the gateway keeps it


@dataclass(frozen=True, slots=True)
class Kept:
    """A message of REJECTS and those of its candles that were asked for; ``others`` is what else it holds.

    What is no candle payload (a message parked by an actor) has neither.
    """

    seq: int
    reject: Reject
    chosen: tuple[Candle, ...]
    others: tuple[Candle, ...]

    @property
    def symbols(self) -> list[str]:
        return sorted({str(_symbol(self.reject, candle)) for candle in self.chosen})


@dataclass(frozen=True, slots=True)
class Choice:
    """What was asked for; None and empty mean everything."""

    seqs: frozenset[int] = frozenset()
    reason: str | None = None
    symbol: str | None = None
    since: datetime | None = None

    def of(self, seq: int, reject: Reject) -> Kept | None:
        """The message as far as it was asked for, None where it was not."""
        if (self.seqs and seq not in self.seqs) or (self.since is not None and reject.at < self.since):
            return None
        candles = _candles(reject)
        if candles is None:
            wanted = self.symbol is None and self._says(reject.reason)
            return Kept(seq, reject, (), ()) if wanted else None
        chosen = tuple(c for c in candles if self._wants(reject, c))
        others = tuple(c for c in candles if not self._wants(reject, c))
        return Kept(seq, reject, chosen, others) if chosen else None

    def _wants(self, reject: Reject, candle: Candle) -> bool:
        named = self.symbol is None or _symbol(reject, candle) == self.symbol
        return named and self._says(str(candle.get("error", "")))

    def _says(self, reason: str) -> bool:
        return self.reason is None or self.reason.casefold() in reason.casefold()


async def listing(args: argparse.Namespace) -> int:
    """``rejects list [--reason TEXT] [--symbol S] [--since WHEN] [--limit N] [--json]``, oldest first."""
    choice = Choice(reason=args.reason, symbol=args.symbol, since=since(args.since, datetime.now(UTC)))
    loaded = read()
    found: list[Kept] = []
    async with bus_of(find(loaded), loaded) as bus, aclosing(_read(bus, choice)) as messages:
        async for kept in messages:
            found.append(kept)
            if args.limit is not None and len(found) > args.limit:
                del found[0]  # the newest are what is asked for
    if args.json:
        write_json({"rejects": [_facts(kept) for kept in found]})
    elif not found:
        say("Nothing is rejected." if choice == Choice() else "Nothing that was rejected is like that.")
    else:
        columns = ("seq", "at", "where", "source", "symbol", "candles", "reason")
        write_table(columns, [_row(kept) for kept in found])
    return DONE


async def replay(args: argparse.Namespace) -> int:
    """``rejects replay [--seq N …] [--reason TEXT] [--symbol S] [--since WHEN] [--url URL] [--json]``.

    Posts the kept candles again as they came; what an actor parked goes back to that actor's work. What is taken leaves
    REJECTS, so that a second replay does not repeat it; what is rejected again stays. Returns 0, or 1 where something was
    rejected again or nothing was found.
    """
    choice = Choice(frozenset(args.seq or ()), args.reason, args.symbol, since(args.since, datetime.now(UTC)))
    if choice == Choice():
        raise CommandError("Say what to replay: --seq N, --reason TEXT, --symbol S or --since WHEN.", WRONG)
    loaded = read()
    places = find(loaded)
    total = {"messages": 0, "candles": 0, "accepted": 0, "duplicates": 0, "forming": 0, "rejected": 0, "parked": 0}
    async with (
        bus_of(places, loaded) as bus,
        aiohttp.ClientSession() as http,
        aclosing(_read(bus, choice)) as messages,
    ):
        async for kept in messages:
            if not kept.chosen:
                try:
                    await try_again(bus, places, kept.seq, kept.reject)
                    total["parked"] += 1
                except NotAgain as error:
                    total["rejected"] += 1
                    complain(f"{kept.seq}, parked by {kept.reject.where}, stays: {error}.")
                continue
            gateway = _Gateway(args.url or places.need_gateway(), next(iter(loaded.settings.gateway.api_keys), None))
            answer = await _again(bus, http, gateway, kept)
            total["messages"] += 1
            total["candles"] += len(kept.chosen)
            for name in ("accepted", "duplicates", "forming"):
                total[name] += getattr(answer, name)
            total["rejected"] += len(answer.rejected)
            for again in answer.rejected[:1]:
                complain(f"{kept.seq} is rejected again, {len(answer.rejected)} of its candles: {again.error}.")
    if args.json:
        write_json(total)
    elif not total["messages"] and not total["parked"] and not total["rejected"]:
        complain("nothing that was rejected is like that: `mt5 rejects list` shows what there is.")
    else:
        if total["parked"]:
            say(f"{total['parked']:,} parked messages were taken.")
        if total["messages"]:
            _say_posted(total)
    return DONE if (total["messages"] or total["parked"]) and not total["rejected"] else NO


def _say_posted(total: Mapping[str, int]) -> None:
    say(
        f"{total['candles']:,} candles of {total['messages']:,} messages posted again: {total['accepted']:,} accepted, "
        f"{total['duplicates']:,} known before, {total['forming']:,} forming, {total['rejected']:,} rejected again"
    )


def since(text: str | None, now: datetime) -> datetime | None:
    """A moment as RFC 3339, or as an age: ``90s``, ``15m``, ``6h``, ``7d``. Raises CommandError."""
    if text is None:
        return None
    if age := _AGE.fullmatch(text.strip()):
        return now - timedelta(**{_UNITS[age[2]]: int(age[1])})
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise CommandError(
            f'"{text}" is no moment: --since takes 2025-02-13T01:33:00Z, or an age such as 6h or 7d.', WRONG
        ) from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


# --- REJECTS -----------------------------------------------------------------------------------------------------


async def _read(bus: Bus, choice: Choice) -> AsyncGenerator[Kept, None]:
    """What REJECTS holds when this begins, as far as it was asked for; the stream may grow meanwhile."""
    stream = str(REJECTS.stream)
    subscription = None
    try:
        last = (await bus.js.stream_info(stream)).state.last_seq
        config = ConsumerConfig(
            deliver_policy=DeliverPolicy.ALL, ack_policy=AckPolicy.NONE, mem_storage=True, inactive_threshold=60.0
        )
        subscription = await bus.js.pull_subscribe(REJECTS.wildcard, stream=stream, config=config)
        seq = 0
        while seq < last:
            try:
                messages = await subscription.fetch(FETCH, timeout=FETCH_WAIT)
            except (NatsTimeout, TimeoutError):
                return  # the newest were deleted, or dropped to make room
            for message in messages:
                seq = message.metadata.sequence.stream
                if seq > last:
                    return
                try:
                    kept = choice.of(seq, REJECTS.decode(message.data))
                except msgspec.DecodeError as error:
                    complain(f"{seq} on {message.subject} is no rejected message ({error}): who publishes there?")
                    continue
                if kept is not None:
                    yield kept
    except NotFoundError as error:
        raise CommandError(f"There is no stream {stream}: make it with `mt5 topology apply`.") from error
    except (NatsError, APIError, TimeoutError) as error:
        raise CommandError(f"NATS did not say what {stream} holds ({type(error).__name__}): try again.") from error
    finally:
        if subscription is not None:
            await subscription.unsubscribe()


async def _again(bus: Bus, http: aiohttp.ClientSession, gateway: _Gateway, kept: Kept) -> IngestAnswer:
    """Posts a message's candles and settles what became of them. Raises CommandError."""
    try:
        before = int((await bus.js.stream_info(str(REJECTS.stream))).state.last_seq)
        answer = await gateway.post(http, kept)
        await _settle(bus, kept, answer, before)
    except (BusUnavailable, NatsError, APIError, TimeoutError) as error:
        raise CommandError(
            f"NATS did not let go of {kept.seq} ({error}): run the same again, nothing is stored twice."
        ) from error
    return answer


async def _settle(bus: Bus, kept: Kept, answer: IngestAnswer, before: int) -> None:
    """Takes a message out of REJECTS as far as its candles were taken or are kept by a newer message.

    The gateway keeps what it rejects again; ``before`` is where REJECTS ended before it was asked. Nothing is deleted
    before the stream has what is left: whatever happens in between leaves a candle twice, and never not at all.
    """
    again = tuple({**kept.chosen[r.index], "error": r.error} for r in answer.rejected)
    if again and not await _kept_anew(bus, before, again):  # as when the gateway knows it for a repeat
        if len(again) == len(kept.chosen):
            return
        left = (*again, *kept.others)
    else:
        left = kept.others
    if left:
        rest = _with(kept.reject, left)
        mark = blake2b(REJECTS.encode(rest), digest_size=16).hexdigest()
        await bus.publish(REJECTS, rest, CANDLES, msg_id=f"rest:{kept.seq}:{mark}")
    await bus.js.delete_msg(str(REJECTS.stream), kept.seq)


async def _kept_anew(bus: Bus, before: int, again: Sequence[Candle]) -> bool:
    """Whether a message after ``before`` holds these rejected candles."""
    seq = before
    while True:
        try:
            raw = await bus.js.get_msg(
                str(REJECTS.stream), seq=seq + 1, subject=REJECTS.subject(CANDLES), next=True, direct=True
            )
        except NotFoundError:
            return False
        seq = int(raw.seq or 0)
        found = _candles(REJECTS.decode(raw.data or b"")) or ()
        if len(found) == len(again) and all(map(_same, found, again)):
            return True


def _same(new: Candle, old: Candle) -> bool:
    """Whether the gateway's copy is of this candle: it leaves out what it does not know."""
    a, b = new.get("candle"), old.get("candle")
    if isinstance(a, dict) and isinstance(b, dict):
        return all(b.get(name) == value for name, value in a.items())
    return bool(a == b)


def _with(reject: Reject, candles: Sequence[Candle]) -> Reject:
    """The message with only these candles."""
    first = str(candles[0]["error"])
    return msgspec.structs.replace(
        reject,
        reason=first if len(candles) == 1 else f"{len(candles)} candles: {first}, ...",
        payload={**reject.payload, "candles": sorted(candles, key=lambda candle: int(candle["index"]))},
    )


def _candles(reject: Reject) -> tuple[Candle, ...] | None:
    """The candles that a gateway kept; None where this is something else."""
    kept = reject.payload.get("candles") if reject.where == CANDLES and isinstance(reject.payload, dict) else None
    if not isinstance(kept, list) or not all(isinstance(c, dict) and {"index", "candle"} <= c.keys() for c in kept):
        return None
    return tuple(kept)


def _symbol(reject: Reject, candle: Candle) -> Any:
    own = candle["candle"].get("symbol") if isinstance(candle["candle"], dict) else None
    return own if own is not None else reject.payload.get("symbol")


# --- the gateway -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Gateway:
    url: str
    key: str | None

    async def post(self, http: aiohttp.ClientSession, kept: Kept) -> IngestAnswer:
        """Posts the chosen candles as they came: with all that their payload said beside them. Raises CommandError."""
        beside = {k: v for k, v in kept.reject.payload.items() if k != CANDLES and v is not None and v is not False}
        if kept.reject.source:
            beside["source"] = kept.reject.source
        body = msgspec.json.encode(beside | {CANDLES: [c["candle"] for c in kept.chosen]})
        status, answer = await self._send(http, body)
        if status in (200, 422):
            try:
                return msgspec.json.decode(answer, type=IngestAnswer)
            except msgspec.DecodeError:
                pass
        code = WRONG if status in (401, 403) else NO
        raise CommandError(f"{self.url} answered {status} to {kept.seq}: {_sentence(answer)}", code)

    async def _send(self, http: aiohttp.ClientSession, body: bytes) -> tuple[int, bytes]:
        """The first answer that says what became of these bytes."""
        headers = {"Content-Type": "application/json"} | ({"X-API-Key": self.key} if self.key else {})
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + PATIENCE, FIRST_PAUSE
        while True:
            try:
                async with http.post(
                    f"{self.url.rstrip('/')}/ingest",
                    data=body,
                    headers=headers,
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT),
                ) as response:
                    answer = await response.read()
                    if response.status not in _UNKNOWN:
                        return response.status, answer
                    why, wait = f"it answers {response.status}", response.headers.get("Retry-After", "")
            except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
                raise CommandError(
                    f'"{self.url}" is no HTTP address: use one like http://127.0.0.1:8001.', WRONG
                ) from None
            except aiohttp.ClientConnectorError as error:
                raise CommandError(
                    f"No gateway answers at {self.url} ({error.strerror}): start it with `mt5 up`, or name another with --url."
                ) from error
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                why, wait = str(error) or type(error).__name__, ""
            pause = max(2 * pause, float(wait) if wait.isdecimal() else 0.0)
            if loop.time() + pause > deadline:
                raise CommandError(f"{self.url} took nothing in {PATIENCE:g} s ({why}): run the same again later.")
            await asyncio.sleep(pause)


def _sentence(answer: bytes) -> str:
    try:
        return msgspec.json.decode(answer, type=Problem).error
    except msgspec.DecodeError:
        return "is this the gateway of `mt5 up`?"


# --- for people and machines -------------------------------------------------------------------------------------


def _facts(kept: Kept) -> dict[str, Any]:
    reject = kept.reject
    facts: dict[str, Any] = {"seq": kept.seq, "at": reject.at, "where": reject.where, "reason": reject.reason}
    facts |= {"source": reject.source, "subject": reject.subject}
    if not kept.chosen:
        return facts | {"payload": reject.payload}
    beside = {name: value for name, value in reject.payload.items() if name != CANDLES}
    return facts | {"payload": beside, "symbols": kept.symbols, "candles": kept.chosen}


def _row(kept: Kept) -> tuple[Any, ...]:
    reject = kept.reject
    reason = str(kept.chosen[0]["error"]) if kept.chosen else reject.reason
    more = f" (and {len(kept.chosen) - 1} more)" if len(kept.chosen) > 1 else ""
    return (
        kept.seq,
        f"{reject.at:%Y-%m-%d %H:%M:%S}",
        reject.where,
        reject.source or None,
        ", ".join(map(_printable, kept.symbols)) or None,
        len(kept.chosen) or None,
        _printable(reason) + more,
    )


def _printable(text: str) -> str:
    """A sender's text on one line of a terminal: what could move the cursor is escaped."""
    short = text if len(text) <= REASON_WIDTH else f"{text[: REASON_WIDTH - 1]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)
