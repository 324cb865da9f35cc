"""How a notice reads where there is only text: one line that says it all, and the whole of it in a few."""

from __future__ import annotations

import re
from datetime import UTC
from typing import Final

from schema.health import Kind, Notice

MARK: Final = "[MT5]"  # begins every subject, for people's filters
HEADLINE: Final = 200  # characters; a longer one is cut

# Everything that ends or hides a line somewhere: C0 and C1 controls, U+2028 and U+2029, what changes the direction of
# writing, and lone surrogates, which no encoding takes.
_BREAKS: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]+")
_WORDS: Final[dict[Kind, str]] = {
    "opened": "{severity}: ",
    "escalated": "now {severity}: ",
    "reminder": "still {severity}: ",
    "closed": "over: ",
    "test": "test: ",
    "report": "",
}


def one_line(text: str) -> str:
    """``text`` without anything that ends a line or does not print, its white space single."""
    return " ".join(_BREAKS.sub(" ", text).split())


def cut(text: str, length: int) -> str:
    """At most ``length`` characters; an ellipsis says that there was more."""
    return text if len(text) <= length else text[: length - 1] + "…"


def headline(notice: Notice) -> str:
    """What happened, in one line of at most :data:`HEADLINE` characters."""
    words = _WORDS[notice.kind].format(severity=notice.severity)
    return cut(f"{MARK} {words}{one_line(notice.title)}".rstrip(), HEADLINE)


def body(notice: Notice) -> str:
    """The notice's lines, then when it was and which checks and incident it is about."""
    about = [f"At {notice.at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"]
    if notice.checks:
        about.append("Checks: " + ", ".join(one_line(check) for check in notice.checks))
    if notice.incident:
        about.append("Incident: " + one_line(notice.incident))
    lines = [part for line in notice.lines for part in _kept(line)]
    return "\n".join([*lines, *([""] if lines else []), *about]) + "\n"


def _kept(line: str) -> list[str]:
    """A line may hold several, and a table's spaces stay."""
    return [_BREAKS.sub(" ", part).rstrip() for part in line.expandtabs(4).split("\n")]
