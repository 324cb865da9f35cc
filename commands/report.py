"""``models report``: one version's report as a page to look at, written to a file."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np

from bus.store import ModelRecord
from commands.model_files import only_one
from commands.output import DONE, WRONG, CommandError, say, write_json
from commands.places import find, store_of
from commands.report_page import Decision, Live, page
from commands.settings import read

OUTCOMES: Final = 100_000  # newest outcomes that the live figures are of
WINDOW: Final = 1_000
POINTS: Final = 400


async def report(args: argparse.Namespace) -> int:
    """``models report VERSION [--model NAME] [--html FILE] [--json]``.

    Raises:
        CommandError: there is no such version, or the file cannot be written.
    """
    loaded = read()
    async with store_of(find(loaded)) as store:
        records = [record for record in await store.models(args.model) if record.version == args.version]
        record = only_one(records, args.version)
        live = lived(await store.fetch("report_outcomes", record.model_name, record.version, OUTCOMES))
        decisions = [
            Decision(row["at"], row["action"], row["by"], row["reason"])
            for row in await store.fetch("report_decisions", record.model_name, record.version)
        ]
    file = _written(page(record, live, decisions, datetime.now(UTC)), args.html, loaded.home / "reports", record)
    if args.json:
        write_json({"model_name": record.model_name, "version": record.version, "file": str(file)})
    else:
        say(f"The report of {record.model_name} {record.version} is in {file}.")
    return DONE


def _written(text: str, named: str | None, folder: Path, record: ModelRecord) -> Path:
    """Writes the page into the file that was named, or into ``folder`` under the version's name."""
    file = folder / (re.sub(r"[^A-Za-z0-9._-]", "_", f"{record.model_name}-{record.version}") + ".html")
    try:
        if named is None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        else:
            file = Path(named).expanduser()
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{file} cannot be written ({error.strerror}): name another with --html.", WRONG) from error
    return file


def lived(rows: Sequence[Any]) -> Live | None:
    """Live figures from rows of signal_outcomes, in the order in which they became known; None without a known sign."""
    known = [row for row in rows if row["up"] is not None]
    if not known:
        return None
    up = np.array([row["up"] for row in known], dtype=np.float64)
    prob = np.array([row["prob_up"] for row in known])
    base = np.array([row["base_rate"] for row in known])
    ts = np.array([row["ts"].timestamp() for row in known])
    own, other = (prob - up) ** 2, (base - up) ** 2
    window = min(WINDOW, max(1, len(known) // 4))
    total = np.concatenate(([0.0], np.cumsum(other - own)))
    ends = np.unique(np.linspace(window, len(known), min(POINTS, len(known) - window + 1)).astype(np.int64))
    traded = [row for row in rows if row["label"] != 0]
    nets = [row["net"] for row in traded if row["net"] is not None]
    return Live(
        outcomes=len(known),
        first=min(row["ts"] for row in known),
        last=max(row["ts"] for row in known),
        brier=float(own.mean()),
        base_brier=float(other.mean()),
        hit_rate=float(np.mean((prob >= 0.5) == (up > 0.5))),
        trades=len(traded),
        net_mean=float(np.mean(nets)) if nets else None,
        window=window,
        ts=ts[ends - 1].tolist(),
        skill=((total[ends] - total[ends - window]) / window).tolist(),
    )
