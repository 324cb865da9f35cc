"""Candle files: every spelling, and one sentence with the line's number for what cannot be read."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.core.files import FileError, decode_lines, read_bars
from schema.messages import Candle

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

MT5 = "<DATE>\t<TIME>\t<OPEN>\t<HIGH>\t<LOW>\t<CLOSE>\t<TICKVOL>\t<VOL>\t<SPREAD>\r\n"
MT5_ROWS = (
    "2025.02.13\t01:33:00\t1.03941\t1.03945\t1.03938\t1.03939\t69\t0\t4\r\n"
    "2025.02.13\t01:34:00\t1.03938\t1.03948\t1.03932\t1.03947\t55\t7\t5\r\n"
)
FIRST = Candle(
    ts=datetime(2025, 2, 13, 1, 33, tzinfo=UTC),
    open=1.03941,
    high=1.03945,
    low=1.03938,
    close=1.03939,
    volume=69.0,
    spread=4.0,
)
PLAIN = "timestamp,open,high,low,close,volume\n"


def bars_of(data: bytes | str, rows: int = 1_000) -> list[Candle]:
    raw = data.encode() if isinstance(data, str) else data
    return [bar for chunk in read_bars(decode_lines([raw]), rows) for bar in chunk]


def error_of(data: bytes | str) -> FileError:
    with pytest.raises(FileError) as caught:
        bars_of(data)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode(),
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: text.encode("utf-16-le"),
        lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
        lambda text: text.replace("\r\n", "\n").encode(),
        lambda text: text.rstrip().encode(),
        lambda text: text.replace("\r\n", "\r\n\r\n").encode(),
    ],
    ids=["utf-8", "utf-8-bom", "utf-16", "utf-16-unmarked", "utf-16-be", "lf", "no-last-newline", "blank-lines"],
)
def test_a_terminal_export_is_read_in_any_encoding(encode: Callable[[str], bytes]) -> None:
    bars = bars_of(encode(MT5 + MT5_ROWS))
    assert bars[0] == FIRST
    assert (bars[1].ts.minute, bars[1].volume, bars[1].real_volume, bars[1].spread) == (34, 55.0, 7.0, 5.0)
    assert len(bars) == 2


@given(cuts=st.lists(st.integers(0, 500), max_size=6), utf16=st.booleans(), rows=st.integers(1, 3))
def test_neither_the_cut_of_the_bytes_nor_the_chunk_size_changes_the_bars(
    cuts: list[int], utf16: bool, rows: int
) -> None:
    data = (MT5 + MT5_ROWS).encode("utf-16" if utf16 else "utf-8")
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    blocks = [data[a:b] for a, b in pairwise(edges)]
    chunks = list(read_bars(decode_lines(blocks), rows))
    assert [bar for chunk in chunks for bar in chunk] == bars_of(data)
    assert all(len(chunk) == rows for chunk in chunks[:-1])


def test_a_daily_export_has_no_time_column() -> None:
    text = (
        "<DATE>\t<OPEN>\t<HIGH>\t<LOW>\t<CLOSE>\t<TICKVOL>\t<VOL>\t<SPREAD>\r\n2025.02.13\t1\t2\t0.5\t1.5\t9\t0\t3\r\n"
    )
    (bar,) = bars_of(text.encode("utf-16"))
    assert bar == Candle(
        ts=datetime(2025, 2, 13, tzinfo=UTC), open=1, high=2, low=0.5, close=1.5, volume=9, spread=3, real_volume=0
    )


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_copy_rates_columns(separator: str) -> None:
    text = "time,open,high,low,close,tick_volume,spread,real_volume\n1328054400,1.5,1.6,1.4,1.55,12,9,3\n"
    (bar,) = bars_of(text.replace(",", separator))
    assert bar == Candle(
        ts=datetime(2012, 2, 1, tzinfo=UTC), open=1.5, high=1.6, low=1.4, close=1.55, volume=12, spread=9, real_volume=3
    )


def test_what_pandas_writes_of_copy_rates() -> None:
    text = ',time,open,high,low,close,tick_volume\n0,"2012-02-01 00:00:00",1.5,1.6,1.4,1.55,12\n'
    (bar,) = bars_of(text)
    assert (bar.ts, bar.volume, bar.spread) == (datetime(2012, 2, 1, tzinfo=UTC), 12.0, 0.0)


@pytest.mark.parametrize(
    "moment",
    [
        "2025-02-13T01:33:00Z",
        "2025-02-13T01:33:00",
        "2025-02-13 01:33",
        "2025.02.13 01:33:00",
        "2025-02-13T03:33:00+02:00",
        "1739410380",
        "1739410380.0",
        "1739410380000",
    ],
)
def test_times_in_every_spelling(moment: str) -> None:
    (bar,) = bars_of(f"{PLAIN}{moment},1,2,0.5,1.5,10\n")
    assert bar.ts == datetime(2025, 2, 13, 1, 33, tzinfo=UTC)
    assert bar.ts.tzinfo is UTC


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("", 1, "empty"),
        ("\n\n", 1, "empty"),
        ("hello\n1,2\n", 1, "no header of candles"),
        ("1328054400,1.5,1.6,1.4,1.55,12,9,3\n", 1, "no header of candles"),
        ("time,open,high,low\n1,2,3,4\n", 1, "no header of candles"),
        (PLAIN + "2025-02-13T01:33:00Z,1,2,0.5,abc,10\n", 2, "not a bar"),
        (PLAIN + "2025-02-13T01:33:00Z,1,2,0.5,1.5,10\n\n2025-02-30T01:33:00Z,1,2,0.5,1.5,10\n", 4, "not a bar"),
        (PLAIN + "2025-02-13T01:33:00Z,1,2,0.5\n", 2, "fewer columns"),
        (PLAIN + "2025-02-13T01:33:00Z,1,nan,0.5,1.5,10\n", 2, "not a finite number"),
        (PLAIN + "2025-02-13T01:33:00Z,1,inf,-inf,1.5,10\n", 2, "not a finite number"),
        (PLAIN + "99999999999999999999,1,2,0.5,1.5,10\n", 2, "not a bar"),
        (PLAIN + "3,1,2,0.5,1.5,10\n2,1,2,0.5,1.5,10\n1,1,2,0.5,1.5,10\n", 4, "oldest bar first"),
        (MT5 + "2025.02.13\t25:33:00\t1\t2\t0.5\t1\t1\t0\t0\r\n", 2, "not a bar"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), 1, "no header of candles"),
        (b"\x00" * 100_000, 1, "no header of candles"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(text: str | bytes, line: int, says: str) -> None:
    error = error_of(text)
    assert error.line == line
    assert str(error).startswith(f"line {line}: ")
    assert says in str(error)


def test_prices_that_make_no_sense_are_left_to_the_gateway() -> None:
    (bar,) = bars_of(f"{PLAIN}2025-02-13T01:33:00Z,1,0.5,-2,1.5,-10\n")
    assert (bar.high, bar.low, bar.volume) == (0.5, -2.0, -10.0)


def test_the_hour_that_a_brokers_autumn_repeats_is_passed_on() -> None:
    rows = "2025.10.26 02:59,1,2,0.5,1.5,1\n2025.10.26 02:00,1,2,0.5,1.5,1\n2025.10.26 02:01,1,2,0.5,1.5,1\n"
    assert [bar.ts.minute for bar in bars_of(PLAIN + rows)] == [59, 0, 1]


@pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real candles is not beside this checkout")
@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("EURUSD_M1_202502.csv", 9_999, "2025-02-13T01:33", "2025-02-24T00:48"),
        ("EURUSD_M1_202502_raw.csv", 9_999, "2025-02-13T01:33", "2025-02-24T00:48"),
        ("EURUSD_M1_202201.csv", 49_993, "2022-01-04T18:00", "2022-02-22T15:25"),
        ("GBPUSD_M1_201202.csv", 30_117, "2012-02-01T00:00", "2012-03-01T00:00"),
        ("US30m_H1_202401.csv", 9_890, "2024-01-01T23:00", "2025-09-08T22:00"),
    ],
)
def test_real_files_are_read_whole_and_fast(name: str, count: int, first: str, last: str) -> None:
    data = (DATA / name).read_bytes()
    started = time.process_time()
    bars = bars_of(data)
    took = time.process_time() - started
    assert len(bars) == count
    assert f"{bars[0].ts:%Y-%m-%dT%H:%M} {bars[-1].ts:%Y-%m-%dT%H:%M}" == f"{first} {last}"
    assert all(a.ts < b.ts for a, b in pairwise(bars))
    assert took < 5.0  # 0.4 s for 50,000 bars; the bound only catches a change of order
    # Independently of the reader's column logic: the last line's numbers, as they stand there.
    cells = data.decode().splitlines()[-1].replace("\t", ",").split(",")
    prices = cells[2:6] if "." in cells[0] else cells[1:5]
    assert [bars[-1].open, bars[-1].high, bars[-1].low, bars[-1].close] == [float(cell) for cell in prices]
