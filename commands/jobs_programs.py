"""Other programs as jobs run them: with a budget, without a terminal, ended with all they started when the job ends."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

END_SECONDS: Final = 10.0  # for a program to end in order, before it is killed
TAIL_LINES: Final = 15
LINE_CHARACTERS: Final = 300


class JobFailed(Exception):
    """A job's answer is no: one sentence for the mail, and the lines that show why."""

    def __init__(self, sentence: str, details: Sequence[str] = ()) -> None:
        super().__init__(sentence)
        self.details = tuple(details)


@dataclass(frozen=True, slots=True)
class Ran:
    """A program that has ended. ``out`` is empty where it wrote into a file."""

    words: tuple[str, ...]
    code: int
    out: str
    err: str

    def need(self, what: str) -> Ran:
        """Itself where the program says 0; raises JobFailed otherwise."""
        if self.code != 0:
            raise JobFailed(f"{what} failed: `{shlex.join(self.words)}` ended with {self.code}.", self.tail())
        return self

    def tail(self) -> tuple[str, ...]:
        return last_lines(self.err or self.out)


def run(
    words: Sequence[str | Path],
    *,
    cwd: Path,
    seconds: float,
    env: Mapping[str, str] | None = None,
    output: Path | None = None,
) -> Ran:
    """Runs a program to its end; ``output`` takes what it writes, both streams, instead of memory.

    Raises:
        JobFailed: it is not there, or has not ended within ``seconds``.
    """
    argv = tuple(map(str, words))
    with contextlib.ExitStack() as stack:
        out: int = subprocess.PIPE
        if output is not None:
            out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            stack.callback(os.close, out)
        try:
            process = subprocess.Popen(
                argv,
                cwd=cwd,
                env=None if env is None else dict(env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT if output is not None else subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # with a group of its own, so that nothing of it is left
            )
        except OSError as error:
            raise JobFailed(f"`{argv[0]}` cannot be run here: {error.strerror or error}.") from error
        try:
            texts = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            lines = last_lines(output.read_text(errors="replace")) if output is not None else ()
            raise JobFailed(
                f"`{shlex.join(argv)}` had not ended after {seconds:g} s, and was stopped.", lines
            ) from None
        except BaseException:
            _end(process)
            raise
    return Ran(argv, process.returncode, texts[0] or "", texts[1] or "")


def _end(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=END_SECONDS)
            return


def last_lines(text: str, count: int = TAIL_LINES) -> tuple[str, ...]:
    """The end of a program's output, fit for a mail."""
    lines = [line.rstrip()[:LINE_CHARACTERS] for line in text.splitlines()]
    return tuple([line for line in lines if line][-count:])
