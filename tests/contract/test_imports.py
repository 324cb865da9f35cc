"""Who may import whom: import-linter's contracts, and the libraries that each room may know."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("schema", "bus", "actors", "deploy", "commands")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Everything else that a room imports is the standard library or a room that import-linter allows it.
LIBRARIES = {
    "schema": {"msgspec"},
    "bus": {"msgspec", "nats", "asyncpg", "structlog", "aioprometheus"},
    "actors.core": {
        "msgspec",
        "numpy",
        "scipy",
        "sklearn",
        "joblib",
        "skl2onnx",
        "onnx",
        "onnxruntime",
        "cryptography",
    },
    "deploy": set(),
}
PURE = {
    "__future__", "abc", "array", "base64", "bisect", "codecs", "collections", "copy", "csv", "dataclasses", "datetime", "decimal", "email", "enum",
    "fractions", "functools", "hashlib", "heapq", "io", "itertools", "json", "math", "operator", "platform", "re", "statistics", "string",
    "struct", "typing", "zlib", "zoneinfo",
}  # fmt: skip


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(*ROOMS, include_external_packages=True, cache_dir=None)


def externals(graph: grimp.ImportGraph, room: str) -> dict[str, set[str]]:
    """Each package outside the rooms that a room imports, with the modules that do."""
    found: dict[str, set[str]] = {}
    for module in graph.modules:
        if module == room or module.startswith(f"{room}."):
            for imported in graph.find_modules_directly_imported_by(module):
                if imported.split(".")[0] not in ROOMS:
                    found.setdefault(imported.split(".")[0], set()).add(module)
    return found


def test_import_contracts_hold() -> None:
    run = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("room", LIBRARIES)
def test_rooms_know_only_their_libraries(graph: grimp.ImportGraph, room: str) -> None:
    strangers = {
        package: modules
        for package, modules in externals(graph, room).items()
        if package not in sys.stdlib_module_names and package not in LIBRARIES[room]
    }
    assert strangers == {}


def test_the_core_imports_only_pure_parts_of_the_standard_library(graph: grimp.ImportGraph) -> None:
    """An allow-list: what is not known to be free of clocks, chance and I/O is named here first."""
    impure = {
        package: modules
        for package, modules in externals(graph, "actors.core").items()
        if package in sys.stdlib_module_names and package not in PURE
    }
    assert impure == {}


def test_the_core_asks_no_clock() -> None:
    """datetime is pure but for the functions that read the clock."""
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / "actors" / "core").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in {"now", "utcnow", "today"} and _is_datetime(node.value)
    ]
    assert calls == []


def _is_datetime(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in {"datetime", "date", "dt"}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported(graph: grimp.ImportGraph) -> None:
    declared = {_name(line) for line in PYPROJECT["project"]["dependencies"]}
    owners = {module: {_name(d) for d in found} for module, found in packages_distributions().items()}
    imported: set[str] = set()
    for room in ROOMS:
        imported |= set(externals(graph, room))
    imported |= {
        name.split(".")[0]
        for node in ast.walk(ast.parse((ROOT / "runner.py").read_text()))
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else _from(node))
    }
    imported -= {*sys.stdlib_module_names, *ROOMS}
    distributions = {module: owners.get(module, {module}) for module in imported}
    undeclared = {module: names for module, names in distributions.items() if not names & declared}
    assert undeclared == {}
    unread = {"tzdata"}  # zoneinfo reads it as data
    assert declared - {name for names in distributions.values() for name in names} == unread


def _from(node: ast.AST) -> list[str]:
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def _name(requirement: str) -> str:
    """``Nats_Py>=2.16; …`` → ``nats-py``."""
    name = requirement
    for stop in "<>=!~;[ ":
        name = name.split(stop)[0]
    return name.lower().replace("_", "-").replace(".", "-")
