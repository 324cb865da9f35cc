"""The command line ``mt5``: parses, chooses the command and runs it. Whatever is heavy is imported by the command."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NoReturn

from commands.output import DONE, NO, WRONG, CommandError, complain

INTERRUPTED = 130
INNER = {"_run": "commands.up:run_child", "_demo": "commands.feed:run_demo"}  # what `up` and `demo` start

DESCRIPTION = "Candles from MetaTrader 5 in, explained and replayable signals out, within milliseconds."
EPILOG = """\
Settings come from ./mt5.toml (or the file that MT5_CONFIG names) and from MT5_… variables, which win; `mt5 settings`
shows what is in force. MT5_HOME (default ./var) holds all state.
Exit codes: 0 done, 1 the answer is no, 2 wrong usage or configuration.
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence; the usage is one --help away."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG, f"{self.prog}: {message[:1].lower()}{message[1:]}; `{self.prog} --help` shows the usage.\n")


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f'"{text}" must be a number of at least 0')
    return value


def count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'"{text}" must be a whole number of at least 1')
    return int(text)


def parser() -> Parser:
    """Every command with its help; ``handler`` names the function that runs it."""
    top = Parser(
        prog="mt5", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(metavar="COMMAND", required=True, dest="command", parser_class=Parser)
    _running(commands)
    _asking(commands)
    _mending(commands)
    _operating(commands)
    return top


def _command(group: Any, name: str, handler: str, text: str, *, json: bool = False, **options: Any) -> Parser:
    """A command whose help begins with ``text``; ``handler`` is ``module:function``."""
    sentence = f"{text[:1].upper()}{text[1:]}."
    made: Parser = group.add_parser(name, help=text, description=sentence, **options)
    made.set_defaults(handler=handler)
    if json:
        made.add_argument("--json", action="store_true", help="print JSON for machines")
    return made


def _running(commands: Any) -> None:
    up = _command(commands, "up", "commands.up:up", "run the servers and actors, and bring back what dies")
    up.add_argument(
        "actors",
        nargs="*",
        metavar="ACTOR",
        help="run these only: collector, features, emitter, recorder, trainer, scorer, health, backup",
    )
    up.add_argument("--isolate", action="store_true", help="give every actor its own process")

    demo = _command(
        commands, "demo", "commands.up:demo", "`up` with a simulated terminal: history, a first model, live signals"
    )
    demo.add_argument("--seconds", type=positive, help="end this long after everything is ready (default: on Ctrl-C)")
    demo.add_argument("--seed", type=int, default=7, help="the market's seed (default %(default)s)")
    demo.add_argument("--isolate", action="store_true", help="give every actor its own process")

    replay = _command(
        commands, "replay", "commands.feed:replay_file", "post a CSV of candles to a gateway as an EA would", json=True
    )
    replay.add_argument(
        "file",
        metavar="FILE",
        help="an export of MetaTrader 5, copy_rates columns, or timestamp,open,high,low,close,volume",
    )
    replay.add_argument("--symbol", required=True, metavar="S", help="the series' symbol, such as EURUSD")
    replay.add_argument("--timeframe", required=True, metavar="TF", help="the series' timeframe, such as M1")
    replay.add_argument(
        "--speed",
        type=positive,
        default=0.0,
        metavar="X",
        help="times the speed of the market; 0 (default): as fast as it is taken",
    )
    replay.add_argument("--history", action="store_true", help="archive the candles and make no signals of them")
    replay.add_argument("--url", help="the gateway (default: that of the running `mt5 up`)")

    past = _command(
        commands, "backtest", "commands.backtest:backtest", "the signals that a replay of files would give", json=True
    )
    past.add_argument("files", nargs="+", metavar="FILE", help="as `replay` reads them; each is one series")
    past.add_argument("--symbol", metavar="S", help="of every file (default: by its name, as in EURUSD_M1.csv)")
    past.add_argument("--timeframe", metavar="TF", help="of every file (default: by its name)")
    which = past.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="VERSION", help="this version (default: the one that serves)")
    which.add_argument("--model-dir", metavar="DIR", help="the version in this folder; no server is needed")
    past.add_argument(
        "--state",
        choices=("champion", "provisional"),
        help="in which it speaks (default: as it is registered, else champion)",
    )
    past.add_argument("--first-seq", type=count, default=1, metavar="N", help="CANDLES sequence to count from (1)")
    past.add_argument("--out", metavar="FILE", help="write the signals there, one JSON object a line")


def _asking(commands: Any) -> None:
    train = _command(
        commands, "train", "commands.train:train", "ask the trainer for a run and wait for its verdict", json=True
    )
    train.add_argument("--timeframe", required=True, metavar="TF", help="the timeframe to train, such as M1")
    train.add_argument(
        "--trees", type=int, metavar="N", help="this run's number of trees: another recipe than the settings'"
    )
    train.add_argument("--max-depth", type=int, metavar="N", help="this run's depth of the trees")
    train.add_argument("--min-samples-leaf", type=int, metavar="N", help="this run's least number of rows in a leaf")

    models = _groups(
        commands, "models", "the registry of models: list, show, report, promote, roll back, retire, restore"
    )
    listing = _command(models, "list", "commands.models:listing", "list the versions and their states", json=True)
    listing.add_argument("--model", metavar="NAME", help="this model only, such as rf_m1")
    show = _command(
        models,
        "show",
        "commands.models:show",
        "show one version: its state, decisions, manifest and metrics",
        json=True,
    )
    show.add_argument("version", metavar="VERSION")
    show.add_argument("--model", metavar="NAME", help="of this model, such as rf_m1")
    picture = _command(
        models, "report", "commands.report:report", "write one version's report, a page to look at", json=True
    )
    picture.add_argument("version", metavar="VERSION")
    picture.add_argument("--model", metavar="NAME", help="of this model, such as rf_m1")
    picture.add_argument("--html", metavar="FILE", help="into this file (default: under reports/ of MT5_HOME)")
    promote = _command(
        models, "promote", "commands.models:promote", "make a version serve, by a person's decision", json=True
    )
    promote.add_argument("version", metavar="VERSION")
    rollback = _command(
        models, "rollback", "commands.models:rollback", "go back to the version that served before", json=True
    )
    rollback.add_argument("version", metavar="VERSION", nargs="?", help="to this one (default: the one before)")
    retire = _command(
        models, "retire", "commands.models:retire", "follow a version no more, and never go back to it", json=True
    )
    retire.add_argument("version", metavar="VERSION")
    for decision in (promote, rollback, retire):
        decision.add_argument("--model", metavar="NAME", help="of this model, where several have served")
        decision.add_argument(
            "--reason",
            required=decision is not rollback,  # a way back must not wait for words
            default="by hand",
            metavar="TEXT",
            help="why; it is recorded and shown with the model",
        )
    restore = _command(
        models, "restore", "commands.models:restore", "fetch a version's verified files into MT5_HOME", json=True
    )
    restore.add_argument("version", metavar="VERSION", nargs="?", help="this one (default: those that serve)")
    restore.add_argument("--model", metavar="NAME", help="of this model, such as rf_m1")

    signals = _groups(commands, "signals", "signals as they come: tail")
    tail = _command(signals, "tail", "commands.signals:tail", "print signals as they come", json=True)
    tail.add_argument("--symbol", metavar="S", help="of this symbol only")
    tail.add_argument("--timeframe", metavar="TF", help="of this timeframe only")
    tail.add_argument("--limit", type=count, metavar="N", help="end after N signals")

    verify = _command(
        commands, "verify", "commands.verify:verify", "make signals again and say whether they are identical", json=True
    )
    verify.add_argument("signal", metavar="SIGNAL_ID", nargs="?", help="this one")
    verify.add_argument(
        "--sample", type=count, metavar="N", help="N signals by chance, half of them of the newest bars"
    )
    verify.add_argument("--seed", type=int, metavar="S", help="of the chance, so that a sample can be drawn again")
    verify.add_argument("--all", action="store_true", help="every archived signal")
    verify.add_argument("--symbol", metavar="S", help="of this symbol only")

    gaps = _command(
        commands, "gaps", "commands.gaps:gaps", "what is missing of the archived candles and why", json=True
    )
    gaps.add_argument("--symbol", metavar="S", help="of this symbol only")
    gaps.add_argument("--timeframe", metavar="TF", help="of this timeframe only")


def _mending(commands: Any) -> None:
    rejects = _groups(commands, "rejects", "what was rejected, whole and with its reason: list, replay")
    kept = _command(rejects, "list", "commands.rejects:listing", "list what was rejected, oldest first", json=True)
    kept.add_argument("--limit", type=count, metavar="N", help="the newest N only")
    again = _command(
        rejects, "replay", "commands.rejects:replay", "post rejected candles again, once the cause is mended", json=True
    )
    again.add_argument(
        "--seq", type=count, action="append", metavar="N", help="this message; may be given several times"
    )
    again.add_argument("--url", help="the gateway (default: that of the running `mt5 up`)")
    for chosen in (kept, again):
        chosen.add_argument("--reason", metavar="TEXT", help="candles whose reason holds this text")
        chosen.add_argument("--symbol", metavar="S", help="candles of this symbol")
        chosen.add_argument(
            "--since", metavar="WHEN", help="from this moment on, or of this age: 2025-02-13T01:33:00Z, 6h, 7d"
        )

    text = "compare the wanted streams, consumers and buckets with what the server has"
    topology = _command(commands, "topology", "commands.topology:show", text, json=True)
    actions = topology.add_subparsers(metavar="ACTION", parser_class=Parser)
    _command(actions, "apply", "commands.topology:apply", "make the server hold what is wanted", json=True)
    _command(actions, "forward", "commands.topology:forward", "let CANDLES count on after it went backwards", json=True)

    clock = _groups(commands, "clock", "brokers' clocks: show, set, restate")
    shown = _command(clock, "show", "commands.clock:show", "what is known of each source's clock, and how", json=True)
    shown.add_argument("source", metavar="SOURCE", nargs="?", help="this source's ledger in full")
    said = _command(clock, "set", "commands.clock:set_rule", "say how a source's clock goes", json=True)
    said.add_argument("source", metavar="SOURCE", help="the broker's server as payloads name it; '' for none")
    said.add_argument("rule", metavar="RULE", help="Europe/Athens, new_york+7, +02:00, or auto to take it back")
    said.add_argument("--from", dest="start", metavar="TIME", help="from this UTC time on (default: always)")
    said.add_argument("--reason", metavar="TEXT", help="why; it is kept and shown")
    moved = _command(
        clock,
        "restate",
        "commands.clock_restate:restate",
        "move archived bars to where the clock says they belong",
        json=True,
    )
    moved.add_argument("source", metavar="SOURCE", help="the broker's server as payloads name it; '' for none")
    moved.add_argument("--from", dest="start", metavar="TIME", help="bars stored at this UTC time or later")
    moved.add_argument("--to", metavar="TIME", help="bars stored at this UTC time or earlier")
    moved.add_argument("--symbol", metavar="S", help="of this symbol only")
    moved.add_argument("--timeframe", metavar="TF", help="of this timeframe only")
    moved.add_argument("--dry-run", action="store_true", help="show what would change, and change nothing")

    series = _groups(commands, "series", "the series of candles: rename")
    rename = _command(
        series, "rename", "commands.series:rename", "go on with a series under the name the broker gave it", json=True
    )
    rename.add_argument("old", metavar="OLD", help="the symbol as it was, such as EURUSD")
    rename.add_argument("new", metavar="NEW", help="the symbol as the broker spells it now, such as EURUSD.m")
    rename.add_argument("--timeframe", metavar="TF", help="this timeframe only (default: all)")

    _command(
        commands, "migrate", "commands.topology:migrate", "apply the SQL migrations that the database lacks", json=True
    )
    _command(commands, "settings", "commands.settings:show", "print the settings in force, secrets masked", json=True)
    _command(
        commands,
        "doctor",
        "commands.doctor:doctor",
        "find what is wrong with this installation and say how to mend it",
        json=True,
    )
    bench = _command(commands, "bench", "commands.bench:bench", "run the benchmarks beside their peers", json=True)
    bench.add_argument("--quick", action="store_true", help="fewer rounds, rougher figures")
    bench.add_argument("names", nargs="*", metavar="NAME", help="run these benchmarks only")
    bench.add_argument(
        "--peers", metavar="DIR", help="the peers' folder (default: ../shared/peers beside the checkout)"
    )


def _operating(commands: Any) -> None:
    health = _groups(commands, "health", "how everything is: check, stats, incidents, report, test-alert")
    check = _command(health, "check", "commands.health:check", "run the checks once", json=True)
    check.add_argument("names", nargs="*", metavar="CHECK", help="these checks only, by name or its beginning")
    stats = _command(health, "stats", "commands.health:stats", "each check's figures over a period", json=True)
    stats.add_argument("--since", default="24h", metavar="WHEN", help="from then on, or of this age (%(default)s)")
    stats.add_argument("names", nargs="*", metavar="CHECK", help="these checks only, by name or its beginning")
    incidents = _command(health, "incidents", "commands.health:incidents", "what went wrong, and how long", json=True)
    incidents.add_argument("--since", default="7d", metavar="WHEN", help="from then on, or of this age (%(default)s)")
    report = _command(health, "report", "commands.daily:report", "print the daily report", json=True)
    report.add_argument("--html", metavar="FILE", help="write it as a page, too")
    report.add_argument("--day", metavar="DATE", help="of this UTC day (default: the last 24 hours)")
    report.add_argument("--mail", action="store_true", help="send it as the schedule would")
    _command(health, "test-alert", "commands.health:test_alert", "send a test through every sender", json=True)

    backup = _groups(commands, "backup", "backups: run, list, verify, restore, drill")
    made = _command(backup, "run", "commands.backup:run", "make a backup, ship it and prune old ones", json=True)
    made.add_argument("--unless-newer", metavar="AGE", help="do nothing where one is younger than this, such as 20h")
    made.add_argument("--local", action="store_true", help="keep it under MT5_HOME, and ship nothing")
    listed = _command(backup, "list", "commands.backup:listing", "list the backups, newest first", json=True)
    listed.add_argument("--local", action="store_true", help="those under MT5_HOME only, and ask no target")
    verified = _command(
        backup,
        "verify",
        "commands.backup:verify",
        "check every hash, and restore it into a scratch database",
        json=True,
    )
    verified.add_argument("backup", metavar="ID", help="the backup's name, `latest`, or its folder")
    verified.add_argument("--quick", action="store_true", help="the hashes only")
    restored = _command(
        backup, "restore", "commands.backup:restore", "bring everything back onto an empty installation", json=True
    )
    restored.add_argument("backup", metavar="ID", help="the backup's name, `latest`, or its folder")
    restored.add_argument("--into", metavar="URL", help="the database only, into this empty one")
    drilled = _command(
        backup,
        "drill",
        "commands.backup:drill",
        "restore the newest backup for practice, and say how long it takes",
        json=True,
    )
    drilled.add_argument("--home", metavar="DIR", help="where to put what is restored (default: a scratch folder)")

    units = _command(
        commands, "install-systemd", "commands.systemd:install", "install the units and timers of systemd", json=True
    )
    units.add_argument("--dir", default="/etc/systemd/system", metavar="DIR", help="where units go (%(default)s)")
    units.add_argument(
        "--user", default="mt5", metavar="NAME", help="the account that everything runs as (%(default)s)"
    )
    units.add_argument("--home", metavar="DIR", help="MT5_HOME of the units (default: /var/lib/mt5)")
    units.add_argument("--per-actor", action="store_true", help="a unit per actor instead of one for the whole")
    units.add_argument("--remove", action="store_true", help="take them away again")

    job = _groups(
        commands, "job", "what the timers run: update, tests, vuln-check, remote-backup, daily-report, runner-check"
    )
    for name, text in (
        ("update", "update the checkout, its dependencies and images; put back what is not healthy then"),
        ("tests", "run the test suite, and mail what came of it"),
        ("vuln-check", "look for known holes in the dependencies, and mail what was found"),
        ("remote-backup", "make, ship and verify a backup, and mail what came of it"),
        ("daily-report", "mail the daily report"),
        ("runner-check", "see whether the CI runner works, and mail what was seen"),
    ):
        one = _command(job, name, f"commands.jobs:{name.replace('-', '_')}", text, json=True)
        one.add_argument(
            "--mail",
            choices=("always", "failure", "never"),
            default="always",
            help="tell of every outcome (default), of failures and the first success after one, or nobody",
        )
        if name == "update":
            one.add_argument("--to", metavar="REVISION", help="this revision (default: the branch's newest)")
            one.add_argument(
                "--restart", metavar="COMMAND", help="what restarts the system (default: found in docker or systemd)"
            )
            one.add_argument(
                "--deadline",
                type=positive,
                default=180.0,
                metavar="SECONDS",
                help="until it must be healthy, or it is put back (default %(default)g)",
            )
            one.add_argument("--checkout", metavar="DIR", help="update this one (default: that which this runs from)")


def _groups(commands: Any, name: str, text: str) -> Any:
    group: Parser = commands.add_parser(name, help=text, description=f"{text[:1].upper()}{text[1:]}.")
    return group.add_subparsers(metavar="ACTION", required=True, parser_class=Parser)


def _inner(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command that is not for people and in no help."""
    inner = Parser(prog=f"mt5 {words[0]}")
    inner.set_defaults(handler=INNER[words[0]])
    inner.add_argument("actors", nargs="*")
    inner.add_argument("--seconds", type=positive)
    inner.add_argument("--seed", type=int)
    return inner.parse_args(words[1:])


def run(args: argparse.Namespace) -> int:
    """Imports and runs the chosen command; a coroutine runs on uvloop."""
    import bus  # noqa: F401 - first of all: what is imported after it comes lean (bus/lean.py)

    module, _, name = args.handler.partition(":")
    handler: Callable[[argparse.Namespace], int | Coroutine[Any, Any, int]] = getattr(
        importlib.import_module(module), name
    )
    answer = handler(args)
    if isinstance(answer, int):
        return answer
    import asyncio

    factory = None
    if sys.platform != "win32":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as loop:
        return loop.run(answer)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _inner(words) if words and words[0] in INNER else parser().parse_args(words)
    try:
        return run(args)
    except CommandError as error:
        complain(str(error))
        return error.code
    except KeyboardInterrupt:
        return DONE if args.handler.endswith((":up", ":demo", ":tail")) else INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`| head`): that is its right, and Python must not complain at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> int:
    """An error that no command foresaw: a sentence for the user, the traceback in the log."""
    from schema.load import SettingsError

    if isinstance(error, SettingsError):
        for problem in error.problems:
            complain(problem)
        return WRONG
    from commands.output import keep_traceback

    where = keep_traceback(error)
    complain(
        f"unexpected {type(error).__name__}: {' '.join(str(error).split()) or 'no message'} (details are in {where})."
    )
    return NO


if __name__ == "__main__":
    sys.exit(main())
