"""What libraries read for the sake of features that nobody here uses is left unread.

nats-py reads aiohttp for websockets, and structlog reads rich for tracebacks that print locals. Both do without where they
are not installed, so to these modules they are not. That spares a third of the time that a process of one actor takes to
import what it needs, and 13 MB; whoever imports aiohttp or rich for himself gets them as ever.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, Final

WITHOUT: Final = {"nats.aio.transport": "aiohttp", "structlog.dev": "rich", "structlog.tracebacks": "rich"}


class _Lean:
    """A loader that hides one library from one module while that is read."""

    def __init__(self, loader: Any, hidden: str) -> None:
        self._loader = loader
        self._hidden = hidden

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        hide = self._hidden not in sys.modules  # what is there already costs nothing more
        if hide:
            sys.modules[self._hidden] = None  # type: ignore[assignment]  # "not installed" to the import statement
        try:
            self._loader.exec_module(module)
        finally:
            if hide:
                del sys.modules[self._hidden]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # the source for tracebacks and inspect


class _Finder:
    """Finds these modules as Python does, and has them read without the other."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in WITHOUT:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Lean(spec.loader, WITHOUT[name])  # type: ignore[assignment]
        return spec


def install() -> None:
    """From now on in this process; what was imported before stays as it is."""
    sys.meta_path.insert(0, _Finder)
