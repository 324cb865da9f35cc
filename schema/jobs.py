"""What came of a job (`mt5 job …`), kept as ``$MT5_HOME/jobs/<name>.json`` until the next run, for the daily report."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final

from msgspec import Meta, Struct

UtcTime = Annotated[datetime, Meta(tz=True)]

FOLDER: Final = "jobs"  # under MT5_HOME


class JobResult(Struct, frozen=True, kw_only=True):
    """The newest run of one job. ``at`` is when it began, ``summary`` one sentence, ``details`` lines of plain text."""

    name: str
    at: UtcTime
    ok: bool
    seconds: float
    summary: str
    details: tuple[str, ...] = ()
