"""``replay``: a candle file posted to a gateway as an EA would send it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

import aiohttp
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from actors.core.files import FileError, decode_lines, read_bars
from actors.terminal import GatewayAway, KeyRefused, Tally, Terminal, TerminalError, play
from commands.output import DONE, NO, WRONG, CommandError, say, stderr_console, write_json
from schema.messages import Candle
from schema.timeframes import canonical

BLOCK: Final = 1 << 16  # bytes read at a time


async def replay(
    file: Path,
    *,
    symbol: str,
    timeframe: str,
    url: str,
    api_key: str | None = None,
    speed: float = 0.0,
    history: bool = False,
    as_json: bool = False,
) -> int:
    """Posts every bar of ``file`` and sums up the answers on stdout; progress is on stderr, where that is a terminal.

    ``speed`` is market seconds a second, 0 as fast as the gateway takes them. ``history`` makes no signals.
    Returns 0, or 1 where the gateway took none of the bars.

    Raises:
        CommandError: 2 for a file, timeframe or key that is wrong (nothing was posted), 1 for a gateway that is away.
    """
    name = canonical(timeframe)
    if name is None:
        raise CommandError(f'"{timeframe}" is no timeframe: MT5\'s names are M1 to MN1.', WRONG)
    if not symbol.strip():
        raise CommandError("--symbol is empty: name the series, as in --symbol EURUSD.", WRONG)
    if not (math.isfinite(speed) and speed >= 0):
        raise CommandError("--speed is market seconds a second: 0 (as fast as it is taken) or more.", WRONG)
    # Read once before anything is sent: a bad line 40,000 must not leave half of a file behind.
    bars = await asyncio.to_thread(count, file)
    total = Tally()
    started = asyncio.get_running_loop().time()
    console = stderr_console()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(f"{symbol} {name}", total=bars)

        def on_wait(why: str, seconds: float) -> None:
            progress.update(task, description=f"{symbol} {name}: {why}, again in {seconds:.1f} s")

        try:
            async with aiohttp.ClientSession() as session:
                terminal = Terminal(session, url, api_key=api_key, on_wait=on_wait)
                with file.open("rb") as stream:
                    async for tally in play(
                        terminal, chunks(stream), symbol=symbol, timeframe=name, speed=speed, history=history
                    ):
                        total += tally
                        progress.update(task, completed=total.received, description=f"{symbol} {name}")
        except TerminalError as error:
            if isinstance(error, GatewayAway) and total.received:
                raise CommandError(
                    f"{error} {total.received} of {bars} bars were taken; run the same again, they are not stored twice."
                ) from error
            raise CommandError(str(error), WRONG if isinstance(error, KeyRefused) else NO) from error
        except (OSError, FileError) as error:
            raise CommandError(f"{file} changed while it was read: {error}", NO) from error
    _sum_up(file, symbol, name, total, asyncio.get_running_loop().time() - started, as_json=as_json)
    return DONE if total.accepted or total.duplicates or total.forming else NO


def chunks(stream: BinaryIO) -> Iterator[list[Candle]]:
    """A file's bars as they are read, in its order. Raises FileError."""
    return read_bars(decode_lines(iter(partial(stream.read, BLOCK), b"")))


def count(file: Path) -> int:
    """The file's bars, all of them read and understood; raises CommandError."""
    try:
        with file.open("rb") as stream:
            bars = sum(map(len, chunks(stream)))
    except FileError as error:
        raise CommandError(f"{file}, {error}.", WRONG) from error
    except OSError as error:
        raise CommandError(f"{file} cannot be read: {error.strerror}.", WRONG) from error
    if not bars:
        raise CommandError(f"{file} has a header and no bars: export it again.", WRONG)
    return bars


def _sum_up(file: Path, symbol: str, timeframe: str, total: Tally, seconds: float, *, as_json: bool) -> None:
    if as_json:
        counts = {name: getattr(total, name) for name in ("received", "accepted", "duplicates", "forming", "rejected")}
        series = {"file": str(file), "symbol": symbol, "timeframe": timeframe}
        write_json({**series, **counts, "reason": total.reason, "seconds": round(seconds, 3)})
        return
    why = f" (the first: {total.reason})" if total.reason else ""
    forming = f", {total.forming:,} still forming" if total.forming else ""
    say(
        f"{symbol} {timeframe}: {total.received:,} bars in {seconds:.1f} s: {total.accepted:,} accepted, "
        f"{total.duplicates:,} known before{forming}, {total.rejected:,} rejected{why}"
    )
