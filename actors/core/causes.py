"""What may be behind a failing check, and which checks are told together."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Final, TypeAlias

from schema.timeframes import TIMEFRAMES

Needs: TypeAlias = tuple[tuple[str, tuple[str, ...]], ...]

# What a check depends on. While one of these is open and no less severe, the check joins its incident and is not told by
# itself. A name with a dot at its end means every check below it, `*` what follows that dot, and `container:nats` any
# container with that word in its name. There must be no circle, NEAR included: something has to be told.
#
# Not in it: feeds do not need the database, certificates, containers, runners and disks need nothing here, and an alert
# of another actor says what has happened already.
CAUSES: Final[Needs] = (
    ("database.", ("database",)),
    ("database", ("container:postgres", "container:timescaledb")),
    ("pgbouncer", ("database", "container:pgbouncer")),
    ("nats.lag.", ("nats", "actor.*")),
    ("nats.lag.recorder", ("database",)),
    ("nats.lag.scorer", ("database", "actor.recorder", "nats.lag.recorder")),
    ("nats.stream.", ("nats",)),
    ("nats.publish", ("nats", "nats.store")),
    ("nats.store", ("nats",)),
    ("nats", ("container:nats",)),
    ("actor.", ("nats", "container:*")),
    ("actor.backup", ("database", "pgbouncer")),
    ("actor.recorder", ("database", "pgbouncer")),
    ("actor.scorer", ("database", "pgbouncer")),
    ("actor.trainer", ("database", "pgbouncer")),
    ("endpoint.", ("actor.collector", "nats", "nats.publish", "database", "pgbouncer")),
    ("feed.", ("actor.collector", "nats", "nats.publish", "nats.stream.CANDLES")),
    ("model.", ("database", "nats")),
    ("backup.", ("actor.backup", "database")),
)
# What may be behind it and need not: the check joins the incident and is told all the same. A disk can be nearly full for
# weeks before a database dies of something else, and the collector is to work without one.
NEAR: Final[Needs] = (
    ("database", ("disk.home",)),
    ("nats", ("disk.home",)),
    ("nats.publish", ("disk.home",)),
    ("nats.store", ("disk.home",)),
    ("actor.collector", ("database", "pgbouncer", "nats.publish")),
    ("backup.", ("disk.home",)),
)

# Kinds whose members are about things of their own: two tokens make the group.
_WIDE: Final = ("event.", "nats.lag.", "nats.stream.")
_WORDS: Final = re.compile(r"[-_.]")


def explaining(check: str, failing: Collection[str]) -> Iterator[str]:
    """Those of ``failing`` that ``check`` cannot work without (:data:`CAUSES`), the likeliest first."""
    yield from _among(_needs(check, CAUSES), failing)
    kind, _, series = check.partition(".")
    timeframe, _, symbol = series.partition(".")
    if kind == "feed" and timeframe in TIMEFRAMES:  # the shorter bars of a symbol come first
        shorter = TIMEFRAMES[: TIMEFRAMES.index(timeframe)]
        yield from _among((f"feed.{one}.{symbol}" for one in shorter), failing)


def near(check: str, failing: Collection[str]) -> Iterator[str]:
    """Those of ``failing`` that may have to do with it (:data:`NEAR`)."""
    yield from _among(_needs(check, NEAR), failing)


def group_of(check: str) -> str:
    """Checks of one group are told together: ``disk.home`` and ``disk.data`` are ``disk``."""
    depth = 2 if check.startswith(_WIDE) else 1
    return ".".join(check.split(".")[:depth])


def _needs(check: str, table: Needs) -> Iterator[str]:
    for dependent, names in table:
        below = dependent.endswith(".")
        if check == dependent or (below and check.startswith(dependent)):
            for name in names:
                yield name.replace("*", check[len(dependent) :])


def _among(names: Iterator[str], failing: Collection[str]) -> Iterator[str]:
    for name in names:
        kind, colon, word = name.partition(":")
        if not colon:
            if name in failing:
                yield name
            continue
        for check in failing:
            if check.startswith(f"{kind}.") and word in _WORDS.split(check)[1:]:
                yield check
