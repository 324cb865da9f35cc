"""How commands speak: tables and JSON on stdout, progress and one-sentence errors on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

DONE = 0
NO = 1
WRONG = 2


class CommandError(Exception):
    """One sentence for the user with the way out; ``code`` is the process's exit code."""

    def __init__(self, sentence: str, code: int = NO) -> None:
        super().__init__(sentence)
        self.code = code


def say(text: str) -> None:
    print(text, flush=True)


def complain(text: str) -> None:
    print(f"mt5: {text}", file=sys.stderr, flush=True)


def write_json(value: Any) -> None:
    """``value`` (builtins or structs) as one line of JSON on stdout."""
    import msgspec

    say(msgspec.json.encode(value).decode())


def write_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], out: TextIO | None = None) -> None:
    """Aligned columns, never cut: what is piped into grep is what is on the screen. None shows as a dash."""
    texts = [list(columns), *([("-" if cell is None else str(cell)) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in texts) for i in range(len(columns))]
    for line in texts:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip(), file=out or sys.stdout)
    (out or sys.stdout).flush()


def stderr_console() -> Console:
    """Rich on stderr, so that progress never mixes with a command's answer."""
    from rich.console import Console

    return Console(stderr=True)


def keep_traceback(error: Exception) -> str:
    """Appends the traceback to the log under home (or the system's temporary folder) and returns the file's name."""
    import os
    import tempfile
    import traceback
    from datetime import UTC, datetime
    from pathlib import Path

    home = Path(os.environ.get("MT5_HOME", "").strip() or "var").expanduser()
    folder = home / "logs" if home.is_dir() else Path(tempfile.gettempdir())
    file = folder / "mt5.log"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        with file.open("a", encoding="utf-8") as log:
            log.write(f"{datetime.now(UTC).isoformat()} {' '.join(sys.argv)}\n")
            log.writelines(traceback.format_exception(error))
    except OSError as reason:
        return f"no file, {file} cannot be written: {reason.strerror}"
    return str(file)
