"""Posts a MetaTrader 5 terminal's candles to a gateway, through the ``MetaTrader5`` package, for those who run Python on Windows.

Copy this one file to the terminal's machine: it needs Python 3.9 or newer and ``pip install MetaTrader5``, nothing else.

    set COLLECTOR_API_KEY=...
    python terminal_collector.py --url http://192.0.2.7:8001 --symbols EURUSD,GBPUSD --timeframes M1,H1

It does what CandleCollector.mq5 does, with the same payloads: newly closed bars go into a queue on disk (SQLite) before they are
sent, and leave it when the gateway has answered that they are stored. Whatever leaves that unknown is answered by sending the same
bytes again. Nothing is ever dropped: while the queue is full, bars wait in the terminal's own history.

The clock. Bars carry the broker's server time. The package has neither TimeTradeServer() nor TimeGMT(), so the offset from UTC is
taken from ticks that were seen to arrive: their server time minus this machine's UTC. A tick that lay there already may be hours old
(a weekend) and says nothing. Until two have arrived nothing is sent, since the gateway would have to guess; with ``--no-clock`` both
clock fields are left out instead, for gateways that know this source by a rule in ``[clock]``.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib
import json
import logging
import os
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast
from urllib.parse import urlsplit

TIMEFRAMES = {
    "M1": 60, "M2": 120, "M3": 180, "M4": 240, "M5": 300, "M6": 360, "M10": 600, "M12": 720, "M15": 900, "M20": 1_200, "M30": 1_800,
    "H1": 3_600, "H2": 7_200, "H3": 10_800, "H4": 14_400, "H6": 21_600, "H8": 28_800, "H12": 43_200, "D1": 86_400, "W1": 604_800, "MN1": 0,
}  # fmt: skip
KEEP = 16  # newest finished bars of a series that are compared with what was sent
TAIL = 18  # bars read at each look: those, the forming one and one more
GRACE = 5  # a last bar without successor is over so many seconds after its end: ticks may be on their way
LIVE_CATCH_UP = 300  # more missed bars than this are sent as history: no signals of hours long gone
SETTLE = 15.0  # history that comes short counts as whole when it has not grown for so long
FRESH = 30.0  # two looks at ticks, at most this far apart, show that a newer one has just arrived
OFFSET_KEPT = 6 * 3_600.0  # an offset without a newer tick is believed so long
WORK = 3.0  # one step stops sending after this
LONGEST_PAUSE = 60.0  # between two attempts
MAX_500 = 10  # answers 500 to one payload after which it is put aside
REFUSED_KEPT = 200
SPAN_MARGIN = 3_600  # a past offset may differ from today's by daylight saving
SPAN_TRIES = 5
SPAN_MEMORY = 600.0  # a span is not answered twice within this
WATCH = 30.0  # between two looks at Market Watch
REPEAT = 600.0  # between two lines about one and the same trouble
NO_IPC = -10_000  # last_error() at or below: the terminal does not answer any more

log = logging.getLogger("collector")


@dataclass(frozen=True)
class Settings:
    url: str
    api_key: str = ""
    symbols: tuple[str, ...] = ()  # empty: Market Watch
    timeframes: tuple[str, ...] = ("M1",)
    every: float = 1.0
    forming: bool = True
    history: int = 5_000
    chunk: int = 1_000
    source: str = ""  # empty: the account's server
    timeout: float = 5.0
    queue: str = "terminal_collector.db"
    queue_most: int = 5_000
    no_clock: bool = False
    terminal: str = ""  # path of terminal64.exe; empty: the one that runs


@dataclass
class Series:
    symbol: str
    timeframe: str
    digits: int
    point: float
    last: int = 0  # open time (server) of the newest finished bar that is in a payload; 0: none
    history: bool = False  # what is missing now is sent as history
    depth: int = 0  # bars read while something is missing
    short: int = -1  # how many bars came when history came short ...
    since: float = 0.0  # ... since when so many
    sent: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    shown: tuple[Any, ...] = ()


@dataclass
class Span:
    """What the gateway lacks, in UTC; ``following``: server time from which on bars are still to be sent."""

    series: Series
    start: int
    end: int
    due: float
    following: int = 0
    tries: int = 0
    done: bool = False


@dataclass(frozen=True)
class Answer:
    """``status`` 0: none came."""

    status: int
    text: str
    retry_after: float = 0.0

    @property
    def body(self) -> Mapping[str, Any]:
        try:
            value = json.loads(self.text)
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}


class Gateway:
    """Posts bytes; raises nothing: what went wrong is in the answer."""

    def __init__(self, url: str, api_key: str, timeout: float) -> None:
        self.url = url.rstrip("/") + "/ingest"
        self._parts = urlsplit(self.url)
        self._timeout = timeout
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if api_key:
            self._headers["X-API-Key"] = api_key

    def post(self, body: bytes) -> Answer:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.netloc, timeout=self._timeout)
        try:
            connection.request("POST", self._parts.path, body, self._headers)
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            return Answer(0, str(error) or type(error).__name__)
        finally:
            connection.close()
        answer = Answer(response.status, text, _seconds(response.getheader("Retry-After")))
        if answer.status == 200 and "accepted" not in answer.body:
            return Answer(404, text)  # a proxy's page says 200 too
        return answer


class Queue:
    """Payloads in order, the places reached, and what was refused, in one SQLite file that one program owns.

    Raises:
        sqlite3.Error: the file cannot be written, or another program holds it.
    """

    def __init__(self, path: str) -> None:
        self._db = sqlite3.connect(path, timeout=0.5, isolation_level=None, check_same_thread=False)
        try:
            self._db.executescript(
                """
                PRAGMA locking_mode = EXCLUSIVE;
                PRAGMA synchronous = FULL;
                CREATE TABLE IF NOT EXISTS queue (id INTEGER, part TEXT, body BLOB NOT NULL, PRIMARY KEY (id, part));
                CREATE TABLE IF NOT EXISTS refused (at TEXT, status INTEGER, answer TEXT, body BLOB);
                CREATE TABLE IF NOT EXISTS places (source TEXT, symbol TEXT, timeframe TEXT, last INTEGER, history INTEGER,
                                                   PRIMARY KEY (source, symbol, timeframe));
                BEGIN EXCLUSIVE; COMMIT;
                """
            )
        except sqlite3.Error:
            self._db.close()
            raise
        self._next = 1 + (self._db.execute("SELECT max(id) FROM queue").fetchone()[0] or 0)

    def __len__(self) -> int:
        return cast(int, self._db.execute("SELECT count(*) FROM queue").fetchone()[0])

    def put(self, body: bytes, source: str, reached: Iterable[Series]) -> None:
        """A payload and the places that are reached with it: both or neither."""
        with self._whole():
            self._db.execute("INSERT INTO queue VALUES (?, '', ?)", (self._next, body))
            self._db.executemany(
                "INSERT OR REPLACE INTO places VALUES (?, ?, ?, ?, ?)",
                [(source, s.symbol, s.timeframe, s.last, s.history) for s in reached],
            )
        self._next += 1

    def front(self) -> tuple[int, str, bytes] | None:
        row = self._db.execute("SELECT id, part, body FROM queue ORDER BY id, part LIMIT 1").fetchone()
        return None if row is None else (row[0], row[1], bytes(row[2]))

    def drop(self, number: int, part: str) -> None:
        self._db.execute("DELETE FROM queue WHERE id = ? AND part = ?", (number, part))

    def halve(self, number: int, part: str, halves: tuple[bytes, bytes]) -> None:
        with self._whole():
            self.drop(number, part)
            for letter, body in (("a", halves[0]), ("b", halves[1])):
                self._db.execute("INSERT INTO queue VALUES (?, ?, ?)", (number, part + letter, body))

    def refuse(self, number: int, part: str, body: bytes, answer: Answer) -> int:
        """Puts a payload aside; returns how many older ones were deleted for it."""
        with self._whole():
            self.drop(number, part)
            self._db.execute(
                "INSERT INTO refused VALUES (datetime('now'), ?, ?, ?)", (answer.status, answer.text, body)
            )
            oldest = "SELECT rowid FROM refused ORDER BY rowid DESC LIMIT -1 OFFSET ?"
            return self._db.execute(f"DELETE FROM refused WHERE rowid IN ({oldest})", (REFUSED_KEPT,)).rowcount  # noqa: S608

    def refused(self) -> list[tuple[int, str, bytes]]:
        rows = self._db.execute("SELECT status, answer, body FROM refused ORDER BY rowid")
        return [(row[0], row[1], bytes(row[2])) for row in rows]

    def places(self, source: str) -> dict[tuple[str, str], tuple[int, bool]]:
        rows = self._db.execute("SELECT symbol, timeframe, last, history FROM places WHERE source = ?", (source,))
        return {(row[0], row[1]): (row[2], bool(row[3])) for row in rows}

    def close(self) -> None:
        self._db.close()

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


class Lost(Exception):
    """The terminal does not answer any more."""


class Collector:
    """One terminal, one gateway. ``mt5`` is the MetaTrader5 module; ``clock`` gives UTC epoch seconds, ``ticks`` seconds that never jump."""

    def __init__(
        self,
        mt5: Any,
        settings: Settings,
        queue: Queue,
        *,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self.mt5 = mt5
        self.settings = settings
        self.queue = queue
        self.gateway = Gateway(settings.url, settings.api_key, settings.timeout)
        self.series: dict[tuple[str, str], Series] = {}
        self._clock, self._ticks = clock, ticks
        self._source = ""
        self._connected = False
        self._retry_at = 0.0
        self._retry_pause = 0.0
        self._watched: float | None = None
        self._active: list[Series] = []
        self._turn = 0
        self._offset: int | None = None
        self._offset_at = 0.0
        self._seen: dict[str, int] = {}
        self._hints: dict[str, int] = {}
        self._seen_at = -FRESH
        self._spans: list[Span] = []
        self._not_before = 0.0
        self._pause = 0.0
        self._failures = 0
        self._trouble = ""
        self._trouble_at = 0.0

    # --- one look ------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Sends what waits, looks at every series once and sends what that gave; raises sqlite3.Error when the disk is full."""
        self._pump()
        try:
            if self._attach():
                self._watch()
                if self._learn_offset() or self.settings.no_clock:
                    self._look()
                    self._answer_spans()
                    self._pump()
        except Lost as error:
            self._connected = False
            self._say(f"The terminal does not answer ({error}): connecting again.")

    def close(self) -> None:
        if self._connected:
            self.mt5.shutdown()
        self.queue.close()

    # --- the terminal --------------------------------------------------------------------------------------------

    def _attach(self) -> bool:
        """Whether the terminal runs, is logged in and is connected to its broker."""
        if not self._connected:
            if self._ticks() < self._retry_at:
                return False
            self.mt5.shutdown()
            args = (self.settings.terminal,) if self.settings.terminal else ()
            if not self.mt5.initialize(*args):
                self._retry_pause = min(max(2 * self._retry_pause, 1.0), LONGEST_PAUSE)
                self._retry_at = self._ticks() + self._retry_pause
                self._say(f"No terminal answers ({self._why()}): start MetaTrader 5 on this machine and log in.")
                return False
            self._connected, self._retry_pause = True, 0.0
            self._watched, self._offset = None, None
            self._hints.clear()
            self._seen_at = -FRESH
        terminal, account = self._asked(self.mt5.terminal_info()), self._asked(self.mt5.account_info())
        if not terminal.connected or not account.server:
            self._say("The terminal has no connection to its broker: log in. Candles wait.")
            return False
        source = self.settings.source or account.server
        if source != self._source:
            self._source = source
            self.series.clear()
            self._spans.clear()
            self._watched = None
            log.info("Sends %s to %s; %d payloads wait.", source, self.gateway.url, len(self.queue))
        return True

    def _why(self) -> str:
        code, text = self.mt5.last_error()
        return f"{code} {text}"

    def _asked(self, value: Any) -> Any:
        """An answer of the terminal that is never empty while it runs."""
        if value is None:
            raise Lost(self._why())
        return value

    def _check(self) -> None:
        """Raises Lost where the last error means that the terminal has gone."""
        if self.mt5.last_error()[0] <= NO_IPC:
            raise Lost(self._why())

    def _rates(self, rates: Any) -> Sequence[tuple[Any, ...]]:
        """Bars oldest first as plain tuples; None means an error, which may only be history that is not there yet."""
        if rates is None:
            self._check()
            return ()
        names = ("time", "open", "high", "low", "close", "tick_volume", "spread", "real_volume")
        columns = [rates[name].tolist() for name in names]
        return [tuple(column[i] for column in columns) for i in range(len(rates))]

    def _watch(self) -> None:
        """Keeps the list of series in step with the settings or Market Watch."""
        if self._watched is not None and self._ticks() - self._watched < WATCH:
            return
        first, self._watched = self._watched is None, self._ticks()
        if self.settings.symbols:
            if not first:
                return
            names = [name for name in self.settings.symbols if self.mt5.symbol_select(name, True)]
            for name in self.settings.symbols:
                if name not in names:
                    log.warning(
                        'The broker has no symbol "%s": take the name from Market Watch, with its suffix.', name
                    )
        else:
            names = [info.name for info in self._asked(self.mt5.symbols_get()) if info.visible]
        places = self.queue.places(self._source)
        self._active = []
        for name in names:
            info = self.mt5.symbol_info(name)
            if info is None:
                self._check()
                continue
            for timeframe in self.settings.timeframes:
                key = (name, timeframe)
                if key not in self.series:
                    last, history = places.get(key, (0, False))
                    self.series[key] = Series(name, timeframe, info.digits, info.point, last, history)
                self._active.append(self.series[key])

    def _learn_offset(self) -> bool:
        """Whether the server's offset from UTC is known: from ticks that arrived between this look and the one before.

        A symbol's first newer tick may be an old one that the terminal has just been told of: two must agree. Where an
        offset seems to change, none is known until they do.
        """
        now = self._ticks()
        follows = now - self._seen_at <= FRESH
        self._seen_at = now
        for name in dict.fromkeys(series.symbol for series in self._active):
            tick = self.mt5.symbol_info_tick(name)
            if tick is None or not tick.time_msc:
                continue
            before = self._seen.get(name)
            self._seen[name] = tick.time_msc
            if not follows or before is None or tick.time_msc <= before:
                continue
            offset = round((tick.time_msc / 1_000 - self._clock()) / 900) * 900
            if self._hints.get(name) == offset:
                self._offset, self._offset_at = offset, now
            elif self._offset != offset:
                self._offset = None
            self._hints[name] = offset
        if self._offset is not None and now - self._offset_at > OFFSET_KEPT:
            self._offset = None
        if self._offset is None and not self.settings.no_clock and self._active:
            self._say(
                "Waiting for ticks: they tell the broker's offset from UTC. Over a weekend that may take until the market opens."
            )
        return self._offset is not None

    # --- collecting ----------------------------------------------------------------------------------------------

    def _look(self) -> None:
        if len(self.queue) >= self.settings.queue_most:
            self._say(
                "The queue is full: bars wait in the terminal's own history until the gateway is back. Nothing is lost."
            )
            return
        lines: list[str] = []
        reached: list[Series] = []
        behind: Series | None = None
        closed = 0
        order = self._active[self._turn :] + self._active[: self._turn]
        lost: Lost | None = None
        for series in order:
            if len(lines) >= self.settings.chunk:
                self._turn = self._active.index(series)
                break
            try:
                found = self._newest(series, lines)
            except Lost as error:  # what the others gave is kept first
                lost = error
                break
            if found is None:
                behind = behind or series
            elif found:
                closed += found
                reached.append(series)
        if closed:
            self._enqueue(lines, False, reached)
        if lost is not None:
            raise lost
        if lines and not closed and not len(self.queue) and self._ticks() >= self._not_before:
            self._heard(self.gateway.post(self._payload(lines, False)))  # forming bars: worth nothing a second later
        # One chunk at a time and only into an empty queue: live bars of other series never stand behind long history.
        if behind is not None and not len(self.queue):
            self._turn = (self._active.index(behind) + 1) % len(self._active)
            self._catch_up(behind)

    def _newest(self, s: Series, lines: list[str]) -> int | None:
        """Adds what is new at the end of a series; the number of finished bars among it, None where bars before are missing."""
        if not s.last or s.history:
            return None
        rates = self._rates(self.mt5.copy_rates_from_pos(s.symbol, self._tf(s), 0, TAIL))
        if not rates:
            return 0
        if rates[0][0] > s.last:
            return None
        closed = 0
        for i, bar in enumerate(rates):
            finished = i < len(rates) - 1 or self._is_over(bar, s.timeframe)
            if finished and bar[0] > s.last:
                lines.append(_line(s, bar, True))
                self._remember(s, bar)
                closed += 1
            elif finished and s.sent.get(bar[0], bar) != bar:  # a terminal that reconnects mends its bars
                lines.append(_line(s, bar, True))
                s.sent[bar[0]] = bar
                closed += 1
            elif finished:
                continue
            elif self.settings.forming and bar != s.shown:
                lines.append(_line(s, bar, False))
                s.shown = bar
        return closed

    def _catch_up(self, s: Series) -> None:
        """Sends the oldest bars that are missing, one chunk; what comes short while the terminal downloads is asked for again."""
        most = max(int(self._asked(self.mt5.terminal_info()).maxbars), TAIL)
        s.depth = s.depth or (4 * TAIL if s.last else max(self.settings.history, 1) + 1)
        wanted = min(s.depth, most)
        rates = self._rates(self.mt5.copy_rates_from_pos(s.symbol, self._tf(s), 0, wanted))
        bridged = bool(rates) and bool(s.last) and rates[0][0] <= s.last
        if not bridged and s.last and len(rates) >= wanted and wanted < most:
            s.depth = min(2 * wanted, most)  # away for longer: look further back
            return
        if not bridged and len(rates) < wanted and not self._settled(s, len(rates)):
            return
        finished = [bar for bar in rates[:-1] if bar[0] > s.last]
        if rates and rates[-1][0] > s.last and self._is_over(rates[-1], s.timeframe):
            finished.append(rates[-1])
        if not s.last and not self.settings.history:
            finished = finished[-1:]  # no history is wanted: the newest finished bar is where live begins
        s.history = s.history or not s.last or len(finished) > LIVE_CATCH_UP
        chunk, as_history = finished[: self.settings.chunk], s.history
        for bar in chunk:
            self._remember(s, bar)
        if len(chunk) == len(finished) and s.last:
            if s.history:
                log.info("%s %s: history is on its way, live from here.", s.symbol, s.timeframe)
            s.history, s.depth, s.short = False, 0, -1
        if chunk:
            self._enqueue([_line(s, bar, True) for bar in chunk], as_history, [s])

    def _settled(self, s: Series, got: int) -> bool:
        """Whether history that comes short is all there is: some came, and no more for a while."""
        now = self._ticks()
        if got != s.short:
            if s.short < 0:
                log.info(
                    "%s %s: the terminal has %d bars so far; waiting for its download.", s.symbol, s.timeframe, got
                )
            s.short, s.since = got, now
        return got > 0 and now - s.since >= SETTLE

    def _is_over(self, bar: tuple[Any, ...], timeframe: str) -> bool:
        """A bar without successor is over by the server's clock; without that nobody can say."""
        return self._offset is not None and self._clock() + self._offset >= bar_end(bar[0], timeframe) + GRACE

    def _remember(self, s: Series, bar: tuple[Any, ...]) -> None:
        s.sent[bar[0]] = bar
        s.last = bar[0]
        while len(s.sent) > KEEP:
            del s.sent[min(s.sent)]

    def _tf(self, s: Series) -> Any:
        return getattr(self.mt5, f"TIMEFRAME_{s.timeframe}")

    # --- payloads ------------------------------------------------------------------------------------------------

    def _payload(self, lines: Sequence[str], history: bool) -> bytes:
        """One candle a line, so that a payload can be halved without changing a digit; ASCII throughout."""
        head: dict[str, Any] = {"source": self._source}
        if self._offset is not None:
            now = int(self._clock())
            head.update(server_time=now + self._offset, gmt_time=now)
        if history:
            head["history"] = True
        start = json.dumps(head, separators=(",", ":"))[:-1] + ',"items":[\n'
        return (start + ",\n".join(lines) + "\n]}").encode("ascii")

    def _enqueue(self, lines: Sequence[str], history: bool, reached: Sequence[Series]) -> None:
        self.queue.put(self._payload(lines, history), self._source, reached)

    # --- sending -------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Sends the queue in order, for a bounded time."""
        started = self._ticks()
        while self._ticks() >= self._not_before and self._ticks() - started < WORK:
            front = self.queue.front()
            if front is None:
                return
            number, part, body = front
            answer = self.gateway.post(body)
            self._failures = self._failures + 1 if answer.status == 500 else 0
            judged = "error" in answer.body or "rejected" in answer.body  # by the gateway, not by a proxy
            if answer.status == 200:
                self.queue.drop(number, part)
            elif answer.status == 413 and (halves := split(body)) is not None:
                log.warning("The gateway finds a payload too large: it goes in two. A smaller --chunk avoids this.")
                self.queue.halve(number, part, halves)
                continue
            elif judged and (answer.status in (400, 413, 415, 422) or self._failures >= MAX_500):
                deleted = self.queue.refuse(number, part, body, answer)
                log.error(
                    "The gateway refuses a payload, which is put aside (%d): %s", answer.status, answer.text[:1_000]
                )
                if deleted:
                    log.error("More than %d refused payloads: the oldest was deleted.", REFUSED_KEPT)
                self._failures = 0
                continue
            self._heard(answer)

    def _heard(self, answer: Answer) -> None:
        """Takes what an answer says beside its status: backfill, or how long to wait."""
        if answer.status == 200:
            if self._trouble:
                log.info("The gateway takes candles again.")
            self._trouble, self._pause, self._not_before = "", 0.0, 0.0
            if answer.body.get("rejected"):
                log.error("The gateway took a payload but for some candles: %s", answer.text[:1_000])
            for asked in answer.body.get("backfill") or ():
                self._ask_for(asked)
            return
        if answer.status == 422:
            return  # forming bars that it cannot take; they come again
        url = self.gateway.url
        if answer.status == 0:
            self._say(f"No gateway answers at {url} ({answer.text}): is it running? Candles wait on disk.")
        elif answer.status in (401, 403):
            self._say(
                f"The gateway refuses this collector ({answer.status}): set COLLECTOR_API_KEY to one of its MT5_API_KEYS. {answer.text[:300]}"
            )
        elif answer.status in (404, 405) or 300 <= answer.status < 400:
            self._say(f"What answers at {url} is no gateway ({answer.status}): correct --url.")
        else:
            self._say(f"The gateway answers {answer.status}: the same payload is sent again. {answer.text[:300]}")
        self._pause = min(max(2 * self._pause, 1.0), LONGEST_PAUSE)
        self._not_before = self._ticks() + max(self._pause, answer.retry_after)

    def _say(self, text: str) -> None:
        """A line about what is wrong: once, and again after a while."""
        now = self._ticks()
        if text != self._trouble or now - self._trouble_at >= REPEAT:
            self._trouble, self._trouble_at = text, now
            log.warning("%s", text)

    # --- backfill ------------------------------------------------------------------------------------------------

    def _ask_for(self, asked: Mapping[str, Any]) -> None:
        now = self._ticks()
        self._spans = [span for span in self._spans if not (span.done and now >= span.due)]
        series = self.series.get((str(asked.get("symbol")), str(asked.get("timeframe"))))
        if series is None:
            return
        try:
            start, end = (
                int(datetime.fromisoformat(str(asked[k]).replace("Z", "+00:00")).timestamp()) for k in ("from", "to")
            )
        except (KeyError, ValueError):
            return
        if any(span.series is series and span.start <= start and span.end >= end for span in self._spans):
            return  # answered a moment ago, or waiting
        log.info("The gateway lacks %s %s from %s to %s.", series.symbol, series.timeframe, asked["from"], asked["to"])
        self._spans.append(Span(series, start, end, now))

    def _answer_spans(self) -> None:
        """One chunk a step, into an empty queue. Where the terminal has nothing, nothing is sent: the gateway stops asking."""
        now = self._ticks()
        span = next((span for span in self._spans if not span.done and now >= span.due), None)
        if span is None or len(self.queue):
            return
        s = span.series
        # The span's own offset may be another than today's: an hour more on both sides; repeats have no effect.
        start = span.following or span.start + (self._offset or 0) - SPAN_MARGIN
        end = min(span.end + (self._offset or 0) + SPAN_MARGIN, s.last)
        rates = self._rates(self.mt5.copy_rates_range(s.symbol, self._tf(s), start, end)) if end >= start else ()
        if not rates and not span.following:
            span.tries += 1
            if span.tries < SPAN_TRIES:
                span.due = now + 5.0 * span.tries  # the terminal may be downloading
                return
            log.info("The terminal has no such bars of %s %s either.", s.symbol, s.timeframe)
        chunk = rates[: self.settings.chunk]
        if chunk:
            self._enqueue([_line(s, bar, True) for bar in chunk], False, [])
        if len(rates) > len(chunk):
            span.following = chunk[-1][0] + 1
            return
        span.done, span.due = True, now + SPAN_MEMORY


def bar_end(opened: int, timeframe: str) -> int:
    """When a bar's time is over, in the clock of its open time (epoch seconds)."""
    if timeframe != "MN1":
        return opened + TIMEFRAMES[timeframe]
    parts = time.gmtime(opened)
    days = (datetime(parts.tm_year + parts.tm_mon // 12, parts.tm_mon % 12 + 1, 1) - datetime(1970, 1, 1)).days  # noqa: DTZ001
    return days * 86_400


def _line(s: Series, bar: tuple[Any, ...], closed: bool) -> str:
    opened, *prices, volume, spread, real = bar
    o, h, lo, c = (f"{price:.{s.digits}f}" for price in prices)
    return (
        f'{{"symbol":{json.dumps(s.symbol)},"timeframe":"{s.timeframe}","time":{opened},"open":{o},"high":{h},"low":{lo},"close":{c}'
        f',"tick_volume":{volume},"spread":{spread},"real_volume":{real},"point":{s.point:.{s.digits}f}'
        f',"closed":{"true" if closed else "false"}}}'
    )


def split(body: bytes) -> tuple[bytes, bytes] | None:
    """A payload as two, or None where it holds one candle."""
    head, *candles, tail = body.split(b"\n")
    if len(candles) < 2:
        return None
    half = len(candles) // 2
    first, second = (
        b"\n".join([head, *part[:-1], part[-1].rstrip(b","), tail]) for part in (candles[:half], candles[half:])
    )
    return first, second


def _seconds(value: str | None) -> float:
    """A Retry-After in seconds; a date, or nothing readable, leaves the pause to us."""
    return min(float(value), 3_600.0) if value is not None and value.strip().isdigit() else 0.0


def arguments(argv: Sequence[str] | None, env: Mapping[str, str]) -> Settings:
    parser = argparse.ArgumentParser(
        prog="terminal_collector.py",
        description="Posts a MetaTrader 5 terminal's candles to a gateway.",
        epilog="Each option may also be set as COLLECTOR_<NAME>, as in COLLECTOR_URL; the key only so.",
    )

    def option(name: str, default: Any, text: str, kind: Callable[[str], Any] = str) -> None:
        variable = "COLLECTOR_" + name.upper().replace("-", "_")
        parser.add_argument(
            f"--{name}", type=kind, default=env.get(variable, default), metavar="X", help=f"{text} (default: {default})"
        )

    option("url", "http://127.0.0.1:8001", "the gateway's address")
    option("symbols", "", "comma-separated; empty: all of Market Watch")
    option("timeframes", "M1", "comma-separated, such as M1,H1,D1")
    option("every", 1.0, "seconds between two looks", float)
    option("history", 5_000, "bars of history on the first run; 0: none", int)
    option("chunk", 1_000, "candles in a payload, about", int)
    option("source", "", "this terminal's name; empty: the account's server")
    option("timeout", 5.0, "seconds to wait for an answer", float)
    option("queue", "terminal_collector.db", "file in which payloads wait; one for each collector")
    option("queue-most", 5_000, "payloads that may wait there", int)
    option("terminal", "", "path of terminal64.exe, where several are installed")
    parser.add_argument("--no-forming", action="store_true", help="do not show the forming bar")
    parser.add_argument(
        "--no-clock", action="store_true", help="send without clock fields until ticks have told the offset"
    )
    args = parser.parse_args(argv)
    symbols = tuple(name.strip() for name in args.symbols.split(",") if name.strip())
    timeframes = tuple(name.strip().upper() for name in args.timeframes.split(",") if name.strip())
    unknown = [name for name in timeframes if name not in TIMEFRAMES]
    if unknown or not timeframes:
        parser.error(f"--timeframes: {', '.join(unknown) or 'none'} is unknown; use {' '.join(TIMEFRAMES)}")
    if urlsplit(args.url).scheme not in ("http", "https"):
        parser.error(f'--url: "{args.url}" is no address; write it like http://127.0.0.1:8001')
    if not (
        args.every > 0 and args.history >= 0 and 1 <= args.chunk <= 4_000 and args.timeout > 0 and args.queue_most >= 1
    ):
        parser.error(
            "--every and --timeout are above 0, --history is not below it, --chunk is 1 to 4000, --queue-most at least 1"
        )
    return Settings(
        url=args.url,
        api_key=env.get("COLLECTOR_API_KEY", ""),
        symbols=symbols,
        timeframes=timeframes,
        every=args.every,
        forming=not args.no_forming,
        history=args.history,
        chunk=args.chunk,
        source=args.source,
        timeout=args.timeout,
        queue=args.queue,
        queue_most=args.queue_most,
        no_clock=args.no_clock,
        terminal=args.terminal,
    )


def run(mt5: Any, settings: Settings, stop: threading.Event) -> int:
    """Until ``stop`` is set. Whatever step it is in is finished: at most a few seconds, and nothing is lost even if it is not."""
    try:
        queue = Queue(settings.queue)
    except sqlite3.Error as error:
        log.error(
            "%s cannot be used (%s): end the other collector that holds it, or name another with --queue.",
            settings.queue,
            error,
        )
        return 2
    collector = Collector(mt5, settings, queue)
    try:
        while not stop.is_set():
            try:
                collector.step()
            except sqlite3.OperationalError as error:
                log.error("%s cannot be written (%s): free disk space. Places are read anew.", settings.queue, error)
                collector = Collector(mt5, settings, queue)
                stop.wait(LONGEST_PAUSE / 6)
            stop.wait(settings.every)
    finally:
        waiting = len(queue)
        collector.close()
        log.info("Stopped; %d payloads wait for the next start.", waiting)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    settings = arguments(argv, os.environ)
    try:
        mt5 = importlib.import_module("MetaTrader5")
    except ImportError:
        log.error(
            "The package MetaTrader5 is missing: run `pip install MetaTrader5` on the Windows machine of the terminal."
        )
        return 2
    stop = threading.Event()
    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        number = getattr(signal, name, None)  # SIGBREAK is Windows' own
        if number is not None:
            signal.signal(number, lambda *_: stop.set())
    return run(mt5, settings, stop)


if __name__ == "__main__":
    sys.exit(main())
