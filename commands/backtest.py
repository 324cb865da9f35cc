"""``backtest``: the signals that a replay of files would give, from the very cores and without any server."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Final

import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from actors.core.backtest import Backtest, Serving, Step, Taken
from actors.core.backtested import Model, Results
from actors.core.clocks import Clocks
from actors.core.files import FileError
from actors.core.serving import Manifest, ServedModel
from actors.terminal import Said, at_once, encode, parts
from bus.ledger import zone_steps
from bus.topology import model_name
from commands.model_files import in_folder, only_one, stored
from commands.output import DONE, NO, WRONG, CommandError, say, stderr_console, write_json, write_table
from commands.places import bus_of, find, store_of
from commands.replay import chunks, count
from commands.settings import Loaded, read
from schema.messages import Candle, ModelState
from schema.settings import Gateway, Settings
from schema.timeframes import canonical

SPEAKING: Final = ("champion", "provisional")


@dataclass(frozen=True, slots=True)
class Source:
    """A file as a series."""

    file: Path
    symbol: str
    timeframe: str
    bars: int


def backtest(args: argparse.Namespace) -> int:
    """``backtest FILE… [--model V | --model-dir DIR] [--symbol S] [--timeframe TF] [--state …] [--out FILE] [--json]``.

    Returns 0, or 1 where a gateway would have taken none of the bars.

    Raises:
        CommandError: a file, model or option that cannot be used; nothing was computed.
    """
    loaded = read()
    sources = [_source(Path(name), args.symbol, args.timeframe) for name in args.files]
    serving = _serving(args, loaded, {source.timeframe for source in sources})
    started = time.perf_counter()
    results, taken = _run(sources, serving, loaded.settings, first_seq=args.first_seq, out=args.out)
    seconds = time.perf_counter() - started
    bars = sum(one.received for one in taken)
    facts: dict[str, Any] = {
        "models": [
            {"timeframe": tf, "model_name": one.model.manifest.name, "version": one.model.manifest.version}
            | {"state": one.state, "threshold": one.model.manifest.threshold}
            for tf, one in sorted(serving.items())
        ],
        "series": [
            {"file": str(source.file), "symbol": source.symbol, "timeframe": source.timeframe} | one._asdict()
            for source, one in zip(sources, taken, strict=True)
        ],
        **results.counts(),
        "figures": results.outcomes(),
        "out": args.out,
        "bars": bars,
        "seconds": round(seconds, 3),
        "bars_per_second": round(bars / seconds) if seconds > 0 else None,
    }
    if args.json:
        write_json(facts)
    else:
        _sum_up(facts, sources, loaded.settings)
    return DONE if any(one.accepted for one in taken) else NO


# --- what is asked for -------------------------------------------------------------------------------------------


def _source(file: Path, symbol: str | None, timeframe: str | None) -> Source:
    """Reads the file once: a bad line 40,000 must not show after minutes."""
    named = _named(file)
    if timeframe is not None and canonical(timeframe) is None:
        raise CommandError(f'"{timeframe}" is no timeframe: MT5\'s names are M1 to MN1.', WRONG)
    if symbol is not None and not symbol.strip():
        raise CommandError("--symbol is empty: name the series, as in --symbol EURUSD.", WRONG)
    if named is None and (symbol is None or timeframe is None):
        raise CommandError(
            f"{file.name} does not begin with its series, as EURUSD_M1.csv does: name it with --symbol and --timeframe.",
            WRONG,
        )
    of_name = named or ("", "")
    return Source(file, symbol or of_name[0], canonical(timeframe or of_name[1]) or "", count(file))


def _named(file: Path) -> tuple[str, str] | None:
    """Symbol and timeframe of a file's name as the terminal's export gives it: ``EURUSD_M1_202502130133.csv``."""
    words = file.name.rpartition(".")[0].split("_") if "." in file.name else file.name.split("_")
    for at in range(len(words) - 1, 0, -1):
        timeframe = canonical(words[at])
        if timeframe is not None and all(words[:at]):
            return "_".join(words[:at]), timeframe
    return None


def _serving(args: argparse.Namespace, loaded: Loaded, timeframes: set[str]) -> dict[str, Serving]:
    """Who serves, by timeframe of the files. Raises CommandError where nobody would."""
    found: list[tuple[ServedModel, ModelState | None]]
    if args.model_dir is not None:
        found = [(in_folder(Path(args.model_dir), loaded), None)]
    else:
        found = asyncio.run(_from_system(args.model, loaded, timeframes))
    state: ModelState | None = args.state
    serving = {
        model.manifest.timeframe: Serving(model, state or known or "champion")
        for model, known in found
        if model.manifest.timeframe in timeframes
    }
    if not serving:
        (model, _), *_ = found
        raise CommandError(
            f"{model.manifest.version} is a model of {model.manifest.timeframe}, and no file is: it would say nothing.",
            WRONG,
        )
    return serving


async def _from_system(
    version: str | None, loaded: Loaded, timeframes: set[str]
) -> list[tuple[ServedModel, ModelState | None]]:
    """The version asked for, or those that serve the files' timeframes, with the state in which they speak."""
    places = find(loaded)
    async with store_of(places) as store:
        records = list(await store.models(None))
    if version is not None:
        chosen = [only_one([record for record in records if record.version == version], version)]
    else:
        chosen = [record for record in records if record.state in SPEAKING and record.timeframe in timeframes]
        if not chosen:
            raise CommandError(
                f"No model serves {' or '.join(sorted(timeframes))}: name a version with --model "
                "(`mt5 models list` shows them), or a folder with --model-dir.",
                NO,
            )
    async with bus_of(places, loaded) as bus:
        return [
            (
                await stored(bus, loaded, record.model_name, record.version),
                record.state if record.state in SPEAKING else None,
            )
            for record in chosen
        ]


# --- the run -----------------------------------------------------------------------------------------------------


def _run(
    sources: Sequence[Source], serving: Mapping[str, Serving], settings: Settings, *, first_seq: int, out: str | None
) -> tuple[Results, list[Taken]]:
    """Posts every file to a system in memory, one after the other; signals go into ``out``, a line each."""
    now = datetime.now(UTC)
    system = Backtest(
        Clocks(settings.clock, (), zone_steps, now.timestamp()),
        settings.symbols,
        serving,
        model_name,
        first_seq=first_seq,
    )
    results = Results(settings.symbols, {tf: _known_of(one.model.manifest) for tf, one in serving.items()})
    taken = [Taken() for _ in sources]
    console = stderr_console()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ExitStack() as stack:
        lines = stack.enter_context(_lines(out)) if out is not None else None
        progress = stack.enter_context(
            Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        )
        encoder = msgspec.json.Encoder()

        def follow(steps: Iterable[Step]) -> None:
            for step in steps:
                results.take(step)
                if lines is not None:
                    lines.writelines(encoder.encode(signal) + b"\n" for signal in step.signals)

        for number, source in enumerate(sources):
            task = progress.add_task(f"{source.symbol} {source.timeframe}", total=source.bars)
            for body in _bodies(source, settings.gateway):
                answer, steps = system.post(body, now)
                follow(steps)
                taken[number] = taken[number].plus(answer)
                progress.update(task, completed=taken[number].received)
        follow(system.settle(now))
    return results, taken


def _lines(out: str) -> IO[bytes]:
    try:
        return Path(out).open("wb")
    except OSError as error:
        raise CommandError(f"{out} cannot be written: {error.strerror}.", WRONG) from error


def _known_of(manifest: Manifest) -> Model:
    """What the manifest says of its training; older ones have not kept the share of rises."""
    return Model(manifest.base_rate if "train_rate" in manifest.report else None, manifest.last_ts)


def _bodies(source: Source, gateway: Gateway) -> Iterator[bytes]:
    """The payloads that ``replay --speed 0`` posts, in halves where the gateway finds them too many."""
    said = at_once()
    try:
        with source.file.open("rb") as stream:
            for part in parts(chunks(stream)):
                yield from _halves(source, part, said, gateway)
    except (OSError, FileError) as error:
        raise CommandError(f"{source.file} changed while it was read: {error}", NO) from error


def _halves(source: Source, candles: Sequence[Candle], said: Said, gateway: Gateway) -> Iterator[bytes]:
    body = encode(source.symbol, source.timeframe, candles, said)
    if len(candles) == 1 or (len(candles) <= gateway.max_candles and len(body) <= gateway.max_body):
        yield body
        return
    half = len(candles) // 2
    yield from _halves(source, candles[:half], said, gateway)
    yield from _halves(source, candles[half:], said, gateway)


# --- what is said ------------------------------------------------------------------------------------------------


def _sum_up(facts: Mapping[str, Any], sources: Sequence[Source], settings: Settings) -> None:
    for one in facts["models"]:
        threshold = "no edge" if one["threshold"] is None else f"threshold {one['threshold']:.4f}"
        say(f"{one['model_name']} {one['version']} as {one['state']} ({threshold})")
    for one in facts["series"]:
        why = f" (the first: {one['reason']})" if one["reason"] else ""
        say(
            f"{one['symbol']} {one['timeframe']}: {one['received']:,} bars: {one['accepted']:,} accepted, "
            f"{one['duplicates']:,} known before, {one['rejected']:,} rejected{why}"
        )
    labels, reasons = facts["labels"], facts["abstain"]
    why = f" ({', '.join(f'{reason} {number:,}' for reason, number in reasons.items())})" if reasons else ""
    say(
        f"{facts['signals']:,} signals: {labels['up']:,} up, {labels['down']:,} down, {labels['none']:,} no trade{why}, "
        f"{facts['superseded']:,} superseded"
    )
    figures = facts["figures"]
    write_table(
        ("what came true", "all bars", "after its training"),
        [
            (name, form(figures["all"], key), form(figures["unseen"], key))
            for name, key, form in (
                ("outcomes", "outcomes", _whole),
                ("AUC, 95 % interval", "auc", _auc),
                ("Brier score", "brier", _score),
                ("Brier score of the base rate", "brier_base_rate", _score),
                ("likelier side right", "hit_rate", _percent),
                ("trades", "trades", _whole),
                ("trades won", "won", _percent),
                ("mean return, gross", "gross_mean", _points),
                ("mean return, net of cost", "net_mean", _points),
            )
        ],
    )
    if figures["all"]["outcomes"] > figures["unseen"]["outcomes"]:
        say("Bars up to the end of its training are no evidence: the model has learnt from such bars, or from these.")
    if figures["all"]["net_trades"] < figures["all"]["trades"]:
        costless = sorted({s.symbol for s in sources if getattr(settings.symbols.get(s.symbol), "point", None) is None})
        where = f'set [symbols."{costless[0]}"] point' if costless else "set [symbols] spread where the file has none"
        say(f"The cost of some trades is unknown: {where} in mt5.toml.")
    speed = facts["bars_per_second"]
    say(f"{facts['bars']:,} bars in {facts['seconds']:.1f} s" + (f": {speed:,} bars a second" if speed else ""))


def _whole(figures: Mapping[str, Any], key: str) -> str:
    return f"{figures[key]:,}"


def _score(figures: Mapping[str, Any], key: str) -> str | None:
    return None if figures[key] is None else f"{figures[key]:.5f}"


def _percent(figures: Mapping[str, Any], key: str) -> str | None:
    return None if figures[key] is None else f"{100 * figures[key]:.1f} %"


def _points(figures: Mapping[str, Any], key: str) -> str | None:
    """Fractions in basis points, hundredths of a percent."""
    return None if figures[key] is None else f"{1e4 * figures[key]:+.3f} bp"


def _auc(figures: Mapping[str, Any], key: str) -> str | None:
    if figures[key] is None:
        return None
    low, high = figures["auc_ci"]
    return f"{figures[key]:.4f} ({low:.4f} to {high:.4f})"
