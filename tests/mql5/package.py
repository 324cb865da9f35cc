"""A stand-in for the ``MetaTrader5`` package, with its own return types: arrays of its record type, named tuples, None on error."""

from __future__ import annotations

import time
from collections import namedtuple
from collections.abc import Iterable
from typing import Any

import numpy as np

from schema.messages import Candle

RATES = np.dtype(
    [
        ("time", "<i8"),
        ("open", "<f8"),
        ("high", "<f8"),
        ("low", "<f8"),
        ("close", "<f8"),
        ("tick_volume", "<u8"),
        ("spread", "<i4"),
        ("real_volume", "<u8"),
    ]
)
TerminalInfo = namedtuple("TerminalInfo", "connected maxbars")
AccountInfo = namedtuple("AccountInfo", "login server")
SymbolInfo = namedtuple("SymbolInfo", "name visible digits point")
Tick = namedtuple("Tick", "time bid ask last volume time_msc flags volume_real")
OK = (1, "Success")
NOT_FOUND = (-4, "Terminal: Not found")
NO_IPC = (-10_004, "No IPC connection")

TIMEFRAMES = {"M1": 1, "M5": 5, "H1": 0x4001, "H4": 0x4004, "D1": 0x4018, "W1": 0x8001, "MN1": 0xC001}


class Mt5:
    """One terminal. ``offset`` is its server's; ``broken`` calls from now on find no terminal, until ``initialize``."""

    def __init__(self, offset: int = 7_200, server: str = "Broker-Demo") -> None:
        self.offset, self.server = offset, server
        self.symbols: dict[str, SymbolInfo] = {}
        self.ticks: dict[str, Tick] = {}
        self.bars: dict[tuple[str, int], dict[int, tuple[Any, ...]]] = {}
        self.error = OK
        self.alive = False
        self.running = True
        self.initialized = 0
        self.limit = 1 << 30
        self.breaks_at: str | None = None
        for name, value in TIMEFRAMES.items():
            setattr(self, f"TIMEFRAME_{name}", value)

    # --- what tests do -----------------------------------------------------------------------------------------------

    def add(self, symbol: str, rows: Iterable[Candle] = (), timeframe: str = "M1", digits: int = 5) -> None:
        """Bars of the terminal's history; times of ``rows`` are UTC."""
        self.symbols[symbol] = SymbolInfo(symbol, True, digits, 10.0**-digits)
        bars = self.bars.setdefault((symbol, TIMEFRAMES[timeframe]), {})
        for r in rows:
            at = int(r.ts.timestamp()) + self.offset
            bars[at] = (at, r.open, r.high, r.low, r.close, int(r.volume), int(r.spread), int(r.real_volume))

    def quote(self, symbol: str, gmt: float) -> None:
        """A tick of that moment arrives."""
        at = gmt + self.offset
        self.ticks[symbol] = Tick(int(at), 1.1, 1.1, 0.0, 0, int(at * 1_000), 6, 0.0)

    # --- what the package does ---------------------------------------------------------------------------------------

    def initialize(self, *_: str) -> bool:
        self.initialized += 1
        self.alive = self.running
        self.error = OK if self.alive else (-10_005, "IPC timeout")
        return self.alive

    def shutdown(self) -> None:
        self.alive = False

    def last_error(self) -> tuple[int, str]:
        return self.error

    def _here(self) -> bool:
        self.error = OK if self.alive else NO_IPC
        return self.alive

    def terminal_info(self) -> TerminalInfo | None:
        return TerminalInfo(True, 100_000) if self._here() else None

    def account_info(self) -> AccountInfo | None:
        return AccountInfo(1, self.server) if self._here() else None

    def symbols_get(self) -> tuple[SymbolInfo, ...] | None:
        return tuple(self.symbols.values()) if self._here() else None

    def symbol_select(self, name: str, _: bool) -> bool:
        return self._here() and name in self.symbols

    def symbol_info(self, name: str) -> SymbolInfo | None:
        return self.symbols.get(name) if self._here() else None

    def symbol_info_tick(self, name: str) -> Tick | None:
        return self.ticks.get(name) if self._here() else None

    def _array(self, found: list[tuple[Any, ...]]) -> Any:
        if not found:
            self.error = NOT_FOUND
            return None
        return np.array(found, RATES)

    def copy_rates_from_pos(self, symbol: str, timeframe: int, start: int, count: int) -> Any:
        if symbol == self.breaks_at:
            self.alive, self.breaks_at = False, None
        if not self._here():
            return None
        bars = [bar for _, bar in sorted(self.bars.get((symbol, timeframe), {}).items())][-self.limit :]
        return self._array(bars[max(len(bars) - start - count, 0) : len(bars) - start])

    def copy_rates_range(self, symbol: str, timeframe: int, start: int, end: int) -> Any:
        if not self._here():
            return None
        bars = sorted(self.bars.get((symbol, timeframe), {}).items())
        return self._array([bar for at, bar in bars if start <= at <= end])


def lively(symbol: str, rows: Iterable[Candle]) -> Mt5:
    """A terminal whose every look shows a new tick of this moment."""

    class Lively(Mt5):
        def symbol_info_tick(self, name: str) -> Tick | None:
            self.quote(name, time.time())
            return super().symbol_info_tick(name)

    out = Lively()
    out.add(symbol, rows)
    return out
