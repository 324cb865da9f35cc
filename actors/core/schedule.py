"""When a scheduled job runs next: ``"HH:MM"`` every day or ``"Sat HH:MM"`` once a week, in UTC."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

_DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_FORM: Final = re.compile(r"(?:(?P<day>[A-Za-z]{3})\s+)?(?P<hour>\d{2}):(?P<minute>\d{2})")


@dataclass(frozen=True, slots=True)
class Schedule:
    """A time of day in UTC; ``weekday`` 0 is Monday, None every day."""

    hour: int
    minute: int
    weekday: int | None = None

    def next_run(self, after: datetime) -> datetime:
        """The first run strictly after ``after``, which must be aware."""
        if after.tzinfo is None:
            raise ValueError("next_run needs an aware time")
        after = after.astimezone(UTC)
        run = after.replace(hour=self.hour, minute=self.minute, second=0, microsecond=0)
        days = 0 if self.weekday is None else (self.weekday - run.weekday()) % 7
        run += timedelta(days=days)
        if run <= after:
            run += timedelta(days=1 if self.weekday is None else 7)
        return run


def parse_schedule(text: str) -> Schedule:
    """Raises ValueError, one sentence, on anything but ``HH:MM`` or ``Day HH:MM``."""
    found = _FORM.fullmatch(text.strip())
    if found is not None:
        day = found["day"]
        hour, minute = int(found["hour"]), int(found["minute"])
        if hour < 24 and minute < 60 and (day is None or day.lower() in _DAYS):
            return Schedule(hour, minute, None if day is None else _DAYS.index(day.lower()))
    raise ValueError(f'A schedule is "HH:MM" or "Sat HH:MM" in UTC, not {text!r}.')
