"""``settings``, and how every command reads them: the file that MT5_CONFIG names or ./mt5.toml, and the environment."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from commands.output import DONE, WRONG, CommandError, write_json, write_table
from schema.load import describe, load, origins
from schema.settings import Settings

DEFAULT_FILE: Final = "mt5.toml"


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings in force; ``file`` is None where there is no settings file."""

    settings: Settings
    file: Path | None
    text: str | None

    @property
    def home(self) -> Path:
        return Path(self.settings.home).expanduser().absolute()


def read_file(environ: Mapping[str, str] | None = None) -> tuple[Path | None, str | None]:
    """The settings file's path and text; (None, None) where there is none and none is asked for."""
    environ = os.environ if environ is None else environ
    named = environ.get("MT5_CONFIG", "").strip()
    path = Path(named or DEFAULT_FILE).expanduser()
    try:
        return path, path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if named:
            raise CommandError(
                f"MT5_CONFIG names {path}, which does not exist: create it or unset MT5_CONFIG.", WRONG
            ) from None
        return None, None
    except UnicodeDecodeError:
        raise CommandError(f"{path} is not UTF-8 text: save it as UTF-8.", WRONG) from None
    except OSError as error:
        raise CommandError(f"{path} cannot be read ({error.strerror}): mend its permissions.", WRONG) from None


def read(environ: Mapping[str, str] | None = None) -> Loaded:
    """Reads and checks the settings.

    Raises:
        CommandError: the file cannot be read.
        SettingsError: a setting is wrong.
    """
    environ = os.environ if environ is None else environ
    path, text = read_file(environ)
    return Loaded(load(text, environ, source=str(path or DEFAULT_FILE)), path, text)


def show(args: argparse.Namespace) -> int:
    """``settings [--json]``."""
    loaded = read()
    described = describe(loaded.settings)
    if args.json:
        write_json(described)
        return DONE
    sources = origins(loaded.text, os.environ, source=str(loaded.file or DEFAULT_FILE))
    rows = []
    for path, value in _flat(described):
        source = next((sources[known] for known in sources if path == known or path.startswith(f"{known}.")), "")
        rows.append((path, _plain(value), source))
    write_table(("setting", "value", "from"), rows)
    return DONE


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or None
    return str(value).lower() if isinstance(value, bool) else value
