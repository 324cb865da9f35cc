"""A small strict reader of Prometheus' text format, as its documentation has it, for what a scrape must be."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(?:,|$)')
SAMPLE = re.compile(rf'({NAME})(?:\{{((?:[^"}}]|"(?:[^"\\]|\\.)*")*)\}})? ([^ ]+)')
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}

Labels = tuple[tuple[str, str], ...]


@dataclass
class Family:
    kind: str
    doc: str
    samples: dict[tuple[str, Labels], float] = field(default_factory=dict)

    def of(self, **labels: str) -> list[float]:
        """The values of the samples that have these labels."""
        return [value for (_, found), value in self.samples.items() if labels.items() <= dict(found).items()]


def parse(text: str) -> dict[str, Family]:
    """Raises AssertionError on anything that Prometheus would refuse or warn of."""
    families: dict[str, Family] = {}
    current, docs = "", {}
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            _, _, name, doc = line.split(" ", 3)
            assert name not in docs, f"a second HELP of {name}"
            docs[name] = doc
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ", 3)
            assert name not in families, f"a second TYPE of {name}"
            assert name in docs, f"no HELP of {name}"
            current, families[name] = name, Family(kind, docs[name])
        else:
            found = SAMPLE.fullmatch(line)
            assert found, f"no sample: {line!r}"
            family, labels = families[current], found[2] or ""
            assert found[1] in {current + suffix for suffix in SUFFIXES[family.kind]}, f"{line!r} is none of {current}"
            pairs = LABEL.findall(labels)
            assert "".join(f'{k}="{v}",' for k, v in pairs).rstrip(",") == labels.rstrip(","), labels
            assert len(dict(pairs)) == len(pairs), f"a label twice: {labels}"
            key = (found[1], tuple(sorted(pairs)))
            assert key not in family.samples, f"a sample twice: {key}"
            family.samples[key] = float(found[3])
    return families
