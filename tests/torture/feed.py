"""Eight senders that never give up: what they were told is stored must be in the archive, whatever was killed meanwhile."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from schema.messages import Candle

BAR = 60
BEGIN = int(datetime(2025, 1, 6, tzinfo=UTC).timestamp())
TIMEFRAME = "M1"
REQUEST_SECONDS = 12.0
Values = tuple[float, float, float, float, int, int]  # open, high, low, close, volume, spread


@dataclass
class Series:
    """What a sender has been acknowledged for one series: the newest version of each bar, and every version there was."""

    symbol: str
    bars: dict[int, Values] = field(default_factory=dict)
    versions: set[tuple[int, Values]] = field(default_factory=set)
    close: float = 1.1
    next_ts: int = BEGIN
    held_back: list[tuple[int, Values]] = field(default_factory=list)  # bars that come late

    def candles(self) -> list[Candle]:
        """Its bars as they stand, ascending."""
        return [
            Candle(
                ts=datetime.fromtimestamp(ts, UTC),
                open=v[0],
                high=v[1],
                low=v[2],
                close=v[3],
                volume=float(v[4]),
                spread=float(v[5]),
            )
            for ts, v in sorted(self.bars.items())
        ]


class Sender(threading.Thread):
    """Posts bars of its own series, one payload after the other: the same bytes until they are acknowledged."""

    def __init__(
        self,
        number: int,
        seed: int,
        port: Callable[[], int],
        series: int = 2,
        pause: tuple[float, float] = (0.005, 0.04),
    ) -> None:
        super().__init__(name=f"sender-{number}", daemon=True)
        self._rng = random.Random(seed * 1_000 + number)
        self._port = port
        self._pause = pause
        self.series = [Series(f"T{number}{chr(ord('A') + i)}") for i in range(series)]
        self.stopping = threading.Event()
        self.abandoned = threading.Event()  # nobody waits any more for what was begun
        self.acknowledged = 0  # candles
        self.retries = 0
        self.slowest_refusal = 0.0  # seconds until a 503 came
        self.refusals: list[tuple[float, float]] = []  # (when, seconds) of each 503
        self.trouble: str | None = None
        self._connection: http.client.HTTPConnection | None = None

    # --- payloads --------------------------------------------------------------------------------------------------

    def _bar(self, series: Series) -> tuple[int, Values]:
        rng = self._rng
        ts, series.next_ts = series.next_ts, series.next_ts + BAR
        opened = series.close
        close = round(opened * (1 + rng.gauss(0, 1e-4)), 5)
        high = round(max(opened, close) + abs(rng.gauss(0, 5e-5)), 5)
        low = round(min(opened, close) - abs(rng.gauss(0, 5e-5)), 5)
        series.close = close
        return ts, (opened, high, low, close, rng.randrange(1, 500), rng.randrange(1, 20))

    def _choose(self) -> list[tuple[Series, list[tuple[int, Values]]]]:
        rng = self._rng
        series = rng.choice(self.series)
        dice = rng.random()
        if series.held_back and dice < 0.25:
            return [(series, [series.held_back.pop(0)])]
        if dice < 0.62 or len(series.bars) < 40:
            return [(series, [self._bar(series)])]
        if dice < 0.72:
            return [(one, [self._bar(one)]) for one in self.series]
        if dice < 0.82:
            return [(series, [self._bar(series) for _ in range(rng.randrange(2, 40))])]
        if dice < 0.90:  # a repeat
            ts = rng.choice(sorted(series.bars)[-30:])
            return [(series, [(ts, series.bars[ts])])]
        if dice < 0.96:  # a correction
            ts = rng.choice(sorted(series.bars)[-30:])
            opened, high, low, close, volume, spread = series.bars[ts]
            return [
                (series, [(ts, (opened, round(high + 1e-5 * rng.randrange(1, 9), 5), low, close, volume + 1, spread))])
            ]
        series.held_back.append(self._bar(series))
        return [(series, [self._bar(series)])]

    @staticmethod
    def _payload(chosen: list[tuple[Series, list[tuple[int, Values]]]]) -> bytes:
        items = [
            {
                "time": ts,
                "symbol": series.symbol,
                "timeframe": TIMEFRAME,
                "open": v[0],
                "high": v[1],
                "low": v[2],
                "close": v[3],
                "tick_volume": v[4],
                "spread": v[5],
            }
            for series, bars in chosen
            for ts, v in bars
        ]
        now = max(item["time"] for item in items) + BAR  # type: ignore[type-var, operator]
        now = max(now, *(s.next_ts for s, _ in chosen), 0)
        return json.dumps({"replay": True, "gmt_time": now, "items": items}).encode()

    # --- posting ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            while not self.stopping.is_set():
                self._send(self._choose())
                time.sleep(self._rng.uniform(*self._pause))
            for series in self.series:  # what was held back comes at last
                while series.held_back:
                    self._send([(series, [series.held_back.pop(0)])])
        except Exception as error:
            self.trouble = f"{type(error).__name__}: {error}"
        finally:
            if self._connection is not None:
                self._connection.close()

    def _send(self, chosen: list[tuple[Series, list[tuple[int, Values]]]]) -> None:
        body = self._payload(chosen)
        count = sum(len(bars) for _, bars in chosen)
        pause = 0.05
        while True:
            answer = self._post(body)
            if answer is not None:
                break
            if self.abandoned.is_set():
                raise InterruptedError("the test is over")
            self.retries += 1
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        if answer["rejected"] or answer["accepted"] + answer["duplicates"] != count:
            raise AssertionError(f"{count} candles were answered with {answer}")
        self.acknowledged += count
        for series, bars in chosen:
            for ts, values in bars:
                series.bars[ts] = values
                series.versions.add((ts, values))

    def _post(self, body: bytes) -> dict[str, Any] | None:
        """The answer, None where nobody knows whether the candles are stored."""
        began = time.monotonic()
        try:
            if self._connection is None:
                self._connection = http.client.HTTPConnection("127.0.0.1", self._port(), timeout=REQUEST_SECONDS)
            self._connection.request("POST", "/ingest", body, {"Content-Type": "application/json"})
            response = self._connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException):
            if self._connection is not None:
                self._connection.close()
            self._connection = None
            return None
        if response.status == 503:
            self.refusals.append((time.monotonic(), time.monotonic() - began))
            return None
        if response.status == 408:  # a gateway that was frozen while the body came; terminals send again
            self._connection.close()
            self._connection = None
            return None
        if response.status != 200:
            raise AssertionError(f"the gateway answered {response.status}: {data[:300]!r}")
        found: dict[str, Any] = json.loads(data)
        return found


class Feed:
    """Several senders at once; a context manager that ends them with everything acknowledged."""

    def __init__(self, seed: int, port: Callable[[], int], senders: int = 8, series: int = 2, **options: Any) -> None:
        self.senders = [Sender(n, seed, port, series, **options) for n in range(senders)]

    def __enter__(self) -> Feed:
        for sender in self.senders:
            sender.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for sender in self.senders:
            sender.stopping.set()
            sender.abandoned.set()
        for sender in self.senders:
            sender.join(REQUEST_SECONDS)

    def finish(self, seconds: float = 120.0) -> None:
        """Ends the feed: everything that was begun is acknowledged."""
        for sender in self.senders:
            sender.stopping.set()
        deadline = time.monotonic() + seconds
        for sender in self.senders:
            sender.join(max(0.0, deadline - time.monotonic()))
        self.check()
        late = [sender.name for sender in self.senders if sender.is_alive()]
        assert not late, f"{late} were not acknowledged within {seconds:g} s"

    def check(self) -> None:
        trouble = [f"{s.name}: {s.trouble}" for s in self.senders if s.trouble]
        assert not trouble, trouble

    @property
    def acknowledged(self) -> int:
        return sum(sender.acknowledged for sender in self.senders)

    @property
    def series(self) -> list[Series]:
        return [one for sender in self.senders for one in sender.series]

    def await_progress(self, candles: int, seconds: float) -> float:
        """Waits until that many more are acknowledged; returns the seconds it took."""
        began, target = time.monotonic(), self.acknowledged + candles
        while self.acknowledged < target:
            self.check()
            assert time.monotonic() - began < seconds, f"no {candles} candles were acknowledged within {seconds:g} s"
            time.sleep(0.01)
        return time.monotonic() - began
