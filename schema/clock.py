"""The broker's clock: how a rule is written, and what the ledger of a source's UTC offsets looks like at rest.

Offsets are seconds that the sender's clock is ahead of UTC. The ledger lives in the key-value bucket ``clock``, one key
a source. Its newest book says how times are converted now; the older ones say how archived bars were converted, which
is what a restatement undoes.
"""

from __future__ import annotations

import re
from typing import Final, Literal

from msgspec import Struct, field

from schema.messages import Message, UtcTime

STEP: Final = 900  # brokers' clocks differ from UTC by multiples of 15 minutes
LOWEST: Final = -12 * 3_600
HIGHEST: Final = 14 * 3_600

# Names that are easier to remember than the tz database's.
ALIASES: Final[dict[str, str]] = {"new_york": "America/New_York", "london": "Europe/London"}

# How a bar's time became UTC (`ts_source`): taken as it was, by a rule or a person, by the payloads' clock fields, by
# the newest bar and the week openings, or by a guess that nothing has confirmed yet.
TsSource = Literal["utc", "rule", "server", "inferred", "assumed"]

_FIXED: Final = re.compile(r"(?:utc|gmt)?([+-]?)(\d{1,2})(?::?(\d\d))?", re.IGNORECASE)
_ZONE: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_/-]*?)(?:([+-])(\d{1,2})(?::(\d\d))?)?")
_WAY_OUT: Final = 'write a time zone such as "Europe/Athens", "new_york+7", or an offset such as "+02:00"'


class ClockRule(Struct, frozen=True):
    """A clock that shows the local time of ``zone`` (None: UTC) plus ``shift`` seconds."""

    zone: str | None
    shift: int = 0


def parse_rule(text: str) -> ClockRule:
    """``Europe/Athens``, ``new_york+7`` (New York's local time and seven hours), ``+02:00``, ``utc+2`` or ``2``.

    Whether a zone exists is for whoever loads it to say.

    Raises:
        ValueError: no rule; the message says what one looks like.
    """
    rule = re.sub(r"\s*([+-])\s*", r"\1", text.strip())
    if rule.lower() in {"utc", "gmt", "z"}:
        return ClockRule(None)
    if fixed := _FIXED.fullmatch(rule):
        offset = _seconds(fixed, 1)
        if not LOWEST <= offset <= HIGHEST or offset % STEP:
            raise ValueError(
                f'"{text}" is no offset of a broker\'s clock: from -12:00 to +14:00, in quarters of an hour'
            )
        return ClockRule(None, offset)
    zone = _ZONE.fullmatch(rule)
    if zone is None:
        raise ValueError(f'"{text}" is no rule for a clock: {_WAY_OUT}')
    if rule.startswith("Etc/"):  # their names end in an offset of their own, of the opposite sign
        return ClockRule(rule)
    shift = _seconds(zone, 2)
    if abs(shift) > HIGHEST or shift % STEP:
        raise ValueError(f'"{text}" shifts a zone by more than 14 hours, or not by quarters of an hour')
    return ClockRule(ALIASES.get(zone[1].lower(), zone[1]), shift)


def _seconds(match: re.Match[str], sign: int) -> int:
    size = int(match[sign + 1] or 0) * 3_600 + int(match[sign + 2] or 0) * 60
    return -size if match[sign] == "-" else size


def offset_text(offset: int) -> str:
    """``7200`` → ``+02:00``."""
    hours, rest = divmod(abs(offset), 3_600)
    return f"{'-' if offset < 0 else '+'}{hours:02d}:{rest // 60:02d}"


def rule_text(zone: str | None, shift: int) -> str:
    """The shortest spelling of a rule: ``new_york+7``, ``Europe/Athens``, ``+02:00``."""
    if zone is None:
        return offset_text(shift)
    name = next((alias for alias, full in ALIASES.items() if full == zone), zone)
    hours, rest = divmod(abs(shift), 3_600)
    minutes = f":{rest // 60:02d}" if rest else ""
    return f"{name}{'-' if shift < 0 else '+'}{hours}{minutes}" if shift else name


# --- the ledger at rest --------------------------------------------------------------------------------------------


class ClockRun(Message, frozen=True):
    """A span (UTC epoch seconds, both ends observed) in which every observation showed this offset."""

    since: int
    until: int
    offset: int
    origin: Literal["fields", "inferred"]


class PersonRule(Message, frozen=True):
    """What a person said: from ``since`` on (UTC epoch seconds; None: always) the clock follows ``rule``."""

    rule: str
    since: int | None = None
    reason: str = ""
    by: str = ""
    said_at: UtcTime | None = None


class ClockBook(Message, frozen=True):
    """What is known of a source's clock, in force for payloads received from ``at`` on.

    ``rule`` is that of the settings. ``family`` is the daylight-saving rule learned from week openings. A book that a
    command wrote is not ``adopted`` until a collector has taken it over and set ``at`` to that moment.
    """

    at: UtcTime
    rule: str | None = None
    persons: tuple[PersonRule, ...] = ()
    runs: tuple[ClockRun, ...] = ()
    family: str | None = None
    adopted: bool = True


class ClockLedger(Message, frozen=True):
    """Every book of one source, oldest first.

    ``openings`` are the first bars of weeks in the sender's clock (epoch seconds) by series; ``utc_until`` is when the
    source last sent a newest bar that fits UTC.
    """

    source: str
    books: tuple[ClockBook, ...]
    openings: dict[str, tuple[int, ...]] = field(default_factory=dict)
    utc_until: int | None = None

    @property
    def book(self) -> ClockBook:
        return self.books[-1]
