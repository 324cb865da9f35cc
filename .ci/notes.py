"""Prints the changelog's lines of a release: `notes.py v0.2.0`. A tag that is not the project's version is refused."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(words: list[str]) -> int:
    if len(words) != 1:
        sys.exit("usage: notes.py TAG")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    if words[0] != f"v{version}":
        sys.exit(f"The tag is {words[0]}, and pyproject.toml says {version}: release one of the two as the other.")
    sections = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text("utf-8"), flags=re.MULTILINE)
    for section in sections[1:]:
        title, _, text = section.partition("\n")
        if title.split()[0] == version and text.strip():
            print(text.strip())
            return 0
    sys.exit(f'CHANGELOG.md has nothing under "## {version}": write it before the release.')


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
