"""Runs the EA's own source on this machine: MQL5 is close to C++, so a few rewritten lines and a small stand-in for the terminal compile it.

MetaEditor stays the judge of the language. What this shows is what the EA's lines do: which bytes they post, and when.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCE = ROOT / "deploy" / "mt5" / "CandleCollector.mq5"
PERIODS = {"M1": 1, "M5": 5, "H1": 0x4001, "H4": 0x4004, "D1": 0x4018, "W1": 0x8001, "MN1": 0xC001}

_INPUT = re.compile(r"^input (\w+)\s+(\w+)\s*=\s*(.*?);", re.M)
_FUNCTION = re.compile(r"^(?:int|long|bool|void|string|datetime) \w+\([^;{}]*\)$", re.M)
_REFERENCE = re.compile(r"\b(const )?(\w+) &(\w+)\[\]")
_DYNAMIC = re.compile(r"^(\s*)(\w+)(\s+)(\w+)\[\];", re.M)


def to_cpp(source: str) -> str:
    """The EA as C++: dynamic arrays and inputs spelt otherwise, prototypes in front, everything else as it stands."""
    text = "\n".join("" if line.startswith("#property") else line for line in source.splitlines())
    text = _INPUT.sub(r'\1 \2 = input_of("\2", (\1)(\3));', text).replace("(string)(", "(const char *)(")
    text = _REFERENCE.sub(r"\1Array<\2> &\3", text)
    text = _DYNAMIC.sub(r"\1Array<\2>\3\4;", text)
    functions = [match.group(0) + ";" for match in _FUNCTION.finditer(text)]
    structs = text.index("Array<SeriesState>")  # prototypes need the structs, which stand before the first global
    return "\n".join(['#include "host.hpp"', text[:structs], *functions, text[structs:], '#include "main.cpp"'])


def compiler() -> str | None:
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def build(folder: Path) -> Path:
    """Compiles the EA with warnings of what MQL5 would refuse too."""
    source = folder / "ea.cpp"
    source.write_text(to_cpp(SOURCE.read_text("ascii")))
    program = folder / "ea"
    found = compiler()
    assert found is not None
    flags = [
        "-std=c++17",
        "-O0",
        "-Wall",
        "-Wextra",
        "-Wno-unused-function",
        "-Wno-unused-parameter",
        "-Wno-sign-compare",
    ]
    run = subprocess.run(
        [found, *flags, "-I", str(HERE), "-o", str(program), str(source)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stderr, run.stderr
    return program


class Ea:
    """One running EA, driven step by step; ``said`` is everything that it printed."""

    def __init__(self, program: Path, folder: Path, url: str, inputs: Mapping[str, str]) -> None:
        self.files, self.posts = folder / "Files", folder / "sent"
        self.files.mkdir(parents=True, exist_ok=True)
        self.posts.mkdir(exist_ok=True)
        for old in self.posts.iterdir():
            old.unlink()
        self.said: list[str] = []
        self._process = subprocess.Popen(
            [program, self.files, self.posts],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "InpUrl": url, **inputs},
        )

    def do(self, *words: object) -> int:
        """Sends one command; returns its result."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\t".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("DONE "):
                return int(line.split()[1])
            self.said.append(line.rstrip("\n"))
        raise AssertionError("the EA ended: " + " | ".join(self.said[-3:]))

    def sent(self) -> list[bytes]:
        """Bodies in the order of posting, repeats included."""
        return [path.read_bytes() for path in sorted(self.posts.iterdir())]

    def queue(self) -> list[Path]:
        return sorted((self.files / "CandleCollector" / "queue").glob("*.json"))

    def refused(self) -> list[Path]:
        return sorted((self.files / "CandleCollector" / "refused").iterdir())

    def close(self) -> None:
        """Ends it as a terminal that is killed does: OnDeinit is the test's to call."""
        self._process.kill()
        self._process.communicate()
