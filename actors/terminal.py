"""An MT5 terminal played over HTTP: it posts candles to a gateway as an EA would, from a file or from the simulated market.

A payload is encoded once. Whatever leaves it unknown whether the gateway stored it (503, 429, a broken connection) is
answered by sending the same bytes again, after the gateway's ``Retry-After`` or a growing pause, for a bounded time.
Payloads of one series wait for each other, so that its bars arrive in order.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import aiohttp
import msgspec

from actors.core.market import MINUTE, Instrument, Market, forming
from actors.core.timeframe import bar_end
from schema.messages import Candle, IngestAnswer, Problem

MAX_CANDLES: Final = 1_000  # a payload: about 130 kB, far under the gateway's 1 MiB and 5,000 candles
PATIENCE: Final = 60.0  # seconds that a gateway may be away before its terminal gives up: a restart takes ten
FIRST_PATIENCE: Final = 3.0  # the same before its first answer: most likely nothing listens there
REQUEST_TIMEOUT: Final = 15.0
FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 5.0
LONGEST_SILENCE: Final = 3_600  # market seconds that a paced replay waits out; nights and weekends are passed over
SHORTEST_SHOWN: Final = 0.2  # seconds of a minute whose unfinished bars are shown
FORMING_AT: Final = (1 / 3, 2 / 3)  # of a minute: when the simulated terminal shows its unfinished bar

_UNKNOWN: Final = frozenset({408, 429, 502, 503, 504})  # stored or not, nobody knows: sending again is safe


class Said(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a payload says beside its candles; ``gmt_time`` is epoch seconds, ``point`` the size of the spread's unit."""

    history: bool = False
    replay: bool = False
    gmt_time: int | None = None
    source: str | None = None
    point: float | None = None


class TerminalError(Exception):
    """A gateway does not take what it is sent; the message is one sentence with the way out."""


class GatewayAway(TerminalError):
    """Nobody answers at the URL, or nobody has said anything but "later" for as long as patience lasts."""


class KeyRefused(TerminalError):
    """The gateway wants an API key that was not sent, or another one."""


class PayloadRefused(TerminalError):
    """The gateway answers that such a payload makes no sense, or what answers is no gateway."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What the gateway said of the candles it was sent; ``reason`` is the first rejection's."""

    received: int = 0
    accepted: int = 0
    duplicates: int = 0
    forming: int = 0
    rejected: int = 0
    reason: str | None = None

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            received=self.received + other.received,
            accepted=self.accepted + other.accepted,
            duplicates=self.duplicates + other.duplicates,
            forming=self.forming + other.forming,
            rejected=self.rejected + other.rejected,
            reason=self.reason or other.reason,
        )


class Terminal:
    """Posts to one gateway. ``on_wait(why, seconds)`` is told of every pause before bytes are sent again."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        *,
        api_key: str | None = None,
        patience: float = PATIENCE,
        first_patience: float = FIRST_PATIENCE,
        on_wait: Callable[[str, float], None] = lambda why, seconds: None,
    ) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self._headers = {"Content-Type": "application/json"} | ({"X-API-Key": api_key} if api_key else {})
        self._patience = patience
        self._first_patience = first_patience
        self._met = False
        self._on_wait = on_wait
        self._in_order: defaultdict[tuple[str, str], asyncio.Lock] = defaultdict(asyncio.Lock)

    async def post(
        self, symbol: str, timeframe: str, candles: Sequence[Candle], said: Said, *, closed: bool | None = None
    ) -> Tally:
        """Posts one series' candles, in halves where the gateway finds them too many; ``closed`` marks each of them.

        Raises:
            GatewayAway, KeyRefused, PayloadRefused.
        """
        async with self._in_order[symbol, timeframe]:
            return await self._post(symbol, timeframe, candles, said, closed)

    async def _post(
        self, symbol: str, timeframe: str, candles: Sequence[Candle], said: Said, closed: bool | None
    ) -> Tally:
        status, answer = await self._send(encode(symbol, timeframe, candles, said, closed=closed))
        if status in (200, 422):
            return self._tally(answer, len(candles))
        if status == 413 and len(candles) > 1:
            half = len(candles) // 2
            first = await self._post(symbol, timeframe, candles[:half], said, closed)
            return first + await self._post(symbol, timeframe, candles[half:], said, closed)
        if status in (401, 403):
            raise KeyRefused(f"{self.url} refused us: {_sentence(answer, 'set MT5_API_KEYS to a key that it knows.')}")
        raise PayloadRefused(f"{self.url} answered {status}: {_sentence(answer, 'is this the gateway of `mt5 up`?')}")

    async def _send(self, body: bytes) -> tuple[int, bytes]:
        """The first answer that says what became of these bytes."""
        loop = asyncio.get_running_loop()
        started, pause = loop.time(), FIRST_PAUSE
        while True:
            wait = pause
            try:
                async with self._session.post(
                    f"{self.url}/ingest",
                    data=body,
                    headers=self._headers,
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT),
                ) as response:
                    self._met = True
                    answer = await response.read()
                    if response.status not in _UNKNOWN:
                        return response.status, answer
                    why = f"it answers {response.status}"
                    wait = max(pause, _retry_after(response.headers.get("Retry-After")))
            except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
                raise PayloadRefused(f'"{self.url}" is no HTTP address: use one like http://127.0.0.1:8001.') from None
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                why = str(error) or type(error).__name__
            patience = self._patience if self._met else self._first_patience
            if loop.time() + wait - started > patience:
                raise GatewayAway(
                    f"No gateway takes candles at {self.url} ({why}): start it with `mt5 up`, or name another with --url."
                )
            self._on_wait(why, wait)
            await asyncio.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _tally(self, answer: bytes, sent: int) -> Tally:
        try:
            counts = msgspec.json.decode(answer, type=IngestAnswer)
        except msgspec.DecodeError:
            what = _sentence(answer, "this is no gateway; name the right address with --url.")
            raise PayloadRefused(f"What answers at {self.url} does not take candles: {what}") from None
        return Tally(
            received=sent,
            accepted=counts.accepted,
            duplicates=counts.duplicates,
            forming=counts.forming,
            rejected=len(counts.rejected),
            reason=counts.rejected[0].error if counts.rejected else None,
        )


def encode(symbol: str, timeframe: str, candles: Sequence[Candle], said: Said, *, closed: bool | None = None) -> bytes:
    """A payload as an EA spells it: candle times are epoch seconds, absent fields are left out."""
    mark = {} if closed is None else {"closed": closed}
    rows = [
        {
            "time": int(c.ts.timestamp()),
            "open": c.open,
            "high": c.high,
            "low": c.low,
            "close": c.close,
            "tick_volume": c.volume,
            "spread": c.spread,
            "real_volume": c.real_volume,
            **mark,
        }
        for c in candles
    ]
    beside = msgspec.to_builtins(said)
    return msgspec.json.encode({"symbol": symbol, "timeframe": timeframe, **beside, "candles": rows})


def at_once(*, history: bool = False) -> Said:
    """What a payload of a file says that is posted as fast as it is taken."""
    return Said(history=history, replay=not history)


def parts(chunks: Iterable[Sequence[Candle]]) -> Iterator[Sequence[Candle]]:
    """A file's bars as payloads of at most :data:`MAX_CANDLES`."""
    for chunk in chunks:
        for start in range(0, len(chunk), MAX_CANDLES):
            yield chunk[start : start + MAX_CANDLES]


async def play(
    terminal: Terminal,
    chunks: Iterable[Sequence[Candle]],
    *,
    symbol: str,
    timeframe: str,
    speed: float = 0.0,
    history: bool = False,
) -> AsyncIterator[Tally]:
    """Posts a file's bars and yields what the gateway said of each payload.

    With ``speed`` 0 as fast as they are taken, a chunk a payload; else bar by bar, ``speed`` market seconds a second,
    with silences of more than an hour (and more than two bars) passed over.
    """
    if speed <= 0:
        said = at_once(history=history)
        for part in parts(chunks):
            yield await terminal.post(symbol, timeframe, part, said)
        return
    loop = asyncio.get_running_loop()
    due, market = loop.time(), None
    for chunk in chunks:
        for bar in chunk:
            ts = int(bar.ts.timestamp())
            end = bar_end(ts, timeframe)
            silence = 0 if market is None else max(0, end - market)
            if silence <= max(LONGEST_SILENCE, 2 * (end - ts)):
                due += silence / speed
            await asyncio.sleep(max(0.0, due - loop.time()))
            market = end
            said = Said(history=True) if history else Said(replay=True, gmt_time=end)
            yield await terminal.post(symbol, timeframe, [bar], said)


async def simulate(
    terminal: Terminal,
    markets: Sequence[Market],
    *,
    speed: float | Callable[[], float],
    source: str,
    on_post: Callable[[str, datetime], None] = lambda symbol, ts: None,
) -> None:
    """Lives on from where the markets stand, ``speed`` market seconds a second, until it is cancelled.

    Each minute shows its unfinished bars, unless it is over sooner than anybody could look at them, and then the closed
    ones. While every session is closed the clock jumps to the next opening; where posting takes longer than a minute the
    market waits. ``speed`` may change from minute to minute. ``on_post`` is told of each closed bar just before it is sent.
    """
    loop = asyncio.get_running_loop()
    opened = loop.time()

    async def close(instrument: Instrument, bar: Candle, said: Said) -> None:
        on_post(instrument.symbol, bar.ts)
        said = msgspec.structs.replace(said, point=instrument.point)
        await terminal.post(instrument.symbol, "M1", [bar], said, closed=True)

    while True:
        minute = MINUTE.total_seconds() / (speed() if callable(speed) else speed)
        opens = int(markets[0].now.timestamp())
        bars = [(market.instrument, bar) for market in markets if (bar := market.step()) is not None]
        if not bars:
            continue
        for fraction in FORMING_AT if minute >= SHORTEST_SHOWN else ():
            await asyncio.sleep(max(0.0, opened + fraction * minute - loop.time()))
            said = Said(replay=True, gmt_time=opens + int(60 * fraction), source=source)
            for instrument, bar in bars:
                part = forming(bar, fraction, instrument)
                await terminal.post(instrument.symbol, "M1", [part], said, closed=False)
        await asyncio.sleep(max(0.0, opened + minute - loop.time()))
        said = Said(replay=True, gmt_time=opens + 60, source=source)
        await asyncio.gather(*(close(instrument, bar, said) for instrument, bar in bars))
        opened = max(opened + minute, loop.time() - minute)


def _retry_after(value: str | None) -> float:
    """Seconds; a date, or nothing readable, leaves the pause to the sender."""
    try:
        seconds = float(value or 0)
    except ValueError:
        return 0.0
    return seconds if 0 <= seconds < float("inf") else 0.0


def _sentence(answer: bytes, otherwise: str) -> str:
    try:
        return msgspec.json.decode(answer, type=Problem).error
    except msgspec.DecodeError:
        return otherwise
