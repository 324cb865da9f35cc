"""Candle files: bytes in, bars out. Nothing is opened here; the caller feeds blocks of bytes and takes chunks of bars.

Three spellings are understood, told apart by their header line and separated by tabs, semicolons or commas:

* the MT5 terminal's export: ``<DATE> <TIME> <OPEN> <HIGH> <LOW> <CLOSE> <TICKVOL> <VOL> <SPREAD>``, often UTF-16,
  without ``<TIME>`` for D1 and longer bars;
* the columns of MetaTrader5's ``copy_rates``: ``time,open,high,low,close,tick_volume,spread,real_volume``;
* ``timestamp,open,high,low,close,volume``.

Times are ISO 8601, MT5's ``2025.02.13 01:33``, epoch seconds or epoch milliseconds; without an offset they are UTC.
Columns of other names are passed over. Whether prices make sense is the gateway's judgement, not this module's.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from math import isfinite
from typing import Final

from schema.messages import Candle

CHUNK_ROWS: Final = 1_000

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECONDS_FROM: Final = 100_000_000_000  # as seconds this would be the year 5138
_LONGEST_LINE: Final = 1_024  # no bar is longer: a file without line ends must not fill the memory
_TIME_COLUMNS: Final = ("time", "timestamp", "datetime", "ts")
_VOLUME_COLUMNS: Final = ("tick_volume", "tickvol", "volume")
_REAL_VOLUME_COLUMNS: Final = ("real_volume", "vol")
_WAY_OUT: Final = (
    "expected a header such as <DATE> <TIME> <OPEN> <HIGH> <LOW> <CLOSE> <TICKVOL> <VOL> <SPREAD>, "
    "time,open,high,low,close,tick_volume,spread,real_volume or timestamp,open,high,low,close,volume"
)


class FileError(ValueError):
    """A file cannot be read as candles; the message is one sentence that names the line."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(f"line {line}: {problem}")
        self.line = line


def decode_lines(blocks: Iterable[bytes]) -> Iterator[str]:
    """The text lines of a file given as blocks of bytes of any size; UTF-8, or UTF-16 with or without a mark.

    Bytes that are no text become U+FFFD, so that the line they stand in is refused by name.
    """
    decoder: codecs.IncrementalDecoder | None = None
    rest = ""
    head = b""
    for block in blocks:
        if decoder is None:
            head += block
            if len(head) < 4:  # too short to tell UTF-16 from UTF-8
                continue
            decoder, block = codecs.getincrementaldecoder(_encoding(head))(errors="replace"), head
        *lines, rest = (rest + decoder.decode(block)).split("\n")
        yield from lines
        if len(rest) > _LONGEST_LINE:  # handed on unfinished: the reader refuses it by its number
            yield rest
            rest = ""
    if decoder is None:
        rest = head.decode(_encoding(head), errors="replace")
    else:
        rest += decoder.decode(b"", final=True)
    if rest:
        yield from rest.split("\n")


def read_bars(lines: Iterable[str], rows: int = CHUNK_ROWS) -> Iterator[list[Candle]]:
    """Chunks of up to ``rows`` bars, in the file's order; blank lines are passed over.

    Raises FileError on a header or line that cannot be read, and where times run backwards (newest first). A single
    step back is passed on: a broker's clock makes one each autumn.
    """
    numbered = enumerate(lines, start=1)
    for number, line in numbered:
        if line.strip():
            bar_of = _reader(number, line)
            break
    else:
        raise FileError(1, f"the file is empty; {_WAY_OUT}")
    chunk: list[Candle] = []
    last = _EPOCH
    was_back = False
    for number, line in numbered:
        if not line or line.isspace():
            continue
        try:
            bar = bar_of(line)
        except (ValueError, OverflowError) as error:
            raise FileError(number, f"{_shorten(line)} is not a bar ({error})") from error
        except IndexError:
            raise FileError(number, f"{_shorten(line)} has fewer columns than the header") from None
        back = bar.ts < last
        if back and was_back:
            raise FileError(number, "times run backwards: sort the file by time, oldest bar first")
        was_back, last = back, bar.ts
        chunk.append(bar)
        if len(chunk) == rows:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _encoding(head: bytes) -> str:
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if head[1::2].count(0) > len(head) // 4:
        return "utf-16-le"
    return "utf-8-sig"


def _shorten(line: str) -> str:
    text = " ".join(line.split())
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _reader(number: int, header: str) -> Callable[[str], Candle]:
    """The function that turns one line into a bar, for a file with this header."""
    separator = next((s for s in ("\t", ";", ",") if s in header), None)
    names = [name.strip().strip('<>"').lower() for name in header.split(separator)] if separator else []
    columns = {name: i for i, name in enumerate(names)}

    def find(*candidates: str) -> int | None:
        return next((columns[name] for name in candidates if name in columns), None)

    # A <DATE> beside a <TIME> holds half of the moment each; either alone holds all of it.
    date, time = find("date"), find(*_TIME_COLUMNS)
    first, second = (date, time) if date is not None else (time, None)
    prices = [columns.get(name) for name in ("open", "high", "low", "close")]
    if first is None or separator is None or None in prices:
        raise FileError(number, f"{_shorten(header)} is no header of candles; {_WAY_OUT}")
    o, h, l, c = (i for i in prices if i is not None)  # noqa: E741 (the names of the field)
    volume, real, spread = find(*_VOLUME_COLUMNS), find(*_REAL_VOLUME_COLUMNS), find("spread")

    def bar_of(line: str) -> Candle:
        cells = line.replace('"', "").split(separator)
        moment = _moment(cells[first]) if second is None else _day(cells[first]) + _time_of_day(cells[second])
        bar = Candle(
            ts=moment,
            open=float(cells[o]),
            high=float(cells[h]),
            low=float(cells[l]),
            close=float(cells[c]),
            volume=0.0 if volume is None else float(cells[volume]),
            spread=0.0 if spread is None else float(cells[spread]),
            real_volume=0.0 if real is None else float(cells[real]),
        )
        # One sum finds any NaN or infinity among the seven: JSON could not carry them to the gateway.
        if not isfinite(bar.open + bar.high + bar.low + bar.close + bar.volume + bar.spread + bar.real_volume):
            raise ValueError("a value is not a finite number")
        return bar

    return bar_of


def _moment(text: str) -> datetime:
    """A cell that holds a whole moment."""
    text = text.strip()
    if text.removeprefix("-").replace(".", "", 1).isdigit() and text.count(".") < 2:
        epoch = float(text)
        return _EPOCH + timedelta(seconds=epoch / 1_000 if abs(epoch) >= _MILLISECONDS_FROM else epoch)
    date, _, time = text.replace("T", " ").partition(" ")
    if not time:
        return _day(date)
    moment = datetime.fromisoformat(f"{date.replace('.', '-')} {time}")
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


@lru_cache(maxsize=8)
def _day(text: str) -> datetime:
    return datetime.fromisoformat(text.strip().replace(".", "-")).replace(tzinfo=UTC)


@lru_cache(maxsize=1_440)
def _time_of_day(text: str) -> timedelta:
    at = datetime.fromisoformat(f"1970-01-01 {text.strip()}")
    return timedelta(hours=at.hour, minutes=at.minute, seconds=at.second)
