"""Which backups are kept: the newest ones, by days, weeks and months, and never too few of those that were proved."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from datetime import date


@dataclass(frozen=True, slots=True)
class Known:
    """A backup of a place: its name, which begins with its UTC day and sorts by age, and whether it was verified."""

    name: str
    verified: bool = False

    @property
    def day(self) -> date:
        return date.fromisoformat(self.name[:10])


def kept(backups: Iterable[Known], *, daily: int, weekly: int, monthly: int, verified: int) -> frozenset[str]:
    """The names to keep.

    Of each of the ``daily`` newest days that have backups the newest one, of each of the ``weekly`` newest ISO weeks and
    of the ``monthly`` newest months likewise, and beside these the ``verified`` newest ones that were verified. Days without
    a backup count for nothing: after a year's pause the old ones are all still there.

    Pruning often or seldom keeps the same: what is kept of what was kept is what would be kept of all.
    """
    newest_first = sorted(backups, key=lambda one: one.name, reverse=True)
    keep = {one.name for one in [one for one in newest_first if one.verified][:verified]}
    periods: tuple[tuple[int, Callable[[date], Hashable]], ...] = (
        (daily, lambda day: day),
        (weekly, lambda day: day.isocalendar()[:2]),
        (monthly, lambda day: (day.year, day.month)),
    )
    for count, period_of in periods:
        seen: dict[Hashable, None] = {}
        for one in newest_first:
            period = period_of(one.day)
            if period in seen or len(seen) == count:
                continue
            seen[period] = None
            keep.add(one.name)
    return frozenset(keep)


def to_delete(backups: Iterable[Known], *, daily: int, weekly: int, monthly: int, verified: int) -> tuple[str, ...]:
    """The names that :func:`kept` leaves out, oldest first."""
    known = list(backups)
    keep = kept(known, daily=daily, weekly=weekly, monthly=monthly, verified=verified)
    return tuple(sorted(one.name for one in known if one.name not in keep))
