"""What the command line understands of times, and which checks a name chooses."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest

from actors.monitor.journal import matches
from actors.monitor.watch import Probe
from commands.health import moment
from commands.output import WRONG, CommandError
from schema.health import CheckResult

NOW = datetime(2026, 3, 10, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("24h", NOW - timedelta(days=1)),
        (" 7d", NOW - timedelta(days=7)),
        ("90m", NOW - timedelta(minutes=90)),
        ("1.5 h", NOW - timedelta(minutes=90)),
        ("2026-03-01", datetime(2026, 3, 1, tzinfo=UTC)),
        ("2026-03-01T10:00+02:00", datetime(2026, 3, 1, 8, tzinfo=UTC)),
    ],
)
def test_since_is_an_age_or_a_time(text: str, wanted: datetime) -> None:
    assert moment(text, NOW) == wanted


@pytest.mark.parametrize("text", ["", "yesterday", "24", "-3h", "999999999w", "2026-13-01"])
def test_since_is_nothing_else(text: str) -> None:
    with pytest.raises(CommandError, match=r"such as 24h or 7d") as caught:
        moment(text, NOW)
    assert caught.value.code == WRONG


@pytest.mark.parametrize(
    ("check", "names", "chosen"),
    [
        ("feed.M1.EURUSD", ["feed"], True),
        ("feed.M1.EURUSD", ["feed.M1"], True),
        ("feed.M1.EURUSD", ["feed.M1.EUR"], False),
        ("feed.M15.EURUSD", ["feed.M1"], False),
        ("database", ["database.size"], False),
        ("database", [], True),
    ],
)
def test_a_name_chooses_itself_and_what_is_below_it(check: str, names: list[str], chosen: bool) -> None:
    assert matches(check, names) is chosen


def test_a_probe_is_asked_where_one_of_its_checks_may_be_meant() -> None:
    async def look() -> Sequence[CheckResult]:
        return []

    actors = Probe("actor", look, many=True, also=("nats.lag",))
    assert actors.itself == "actor.look"
    for names in ([], ["actor"], ["actor.trainer"], ["nats.lag.recorder"], ["nats"]):
        assert actors.is_about(names), names
    assert not actors.is_about(["nats.stream", "database"])
    assert actors.reach("nats.lag.recorder") > Probe("nats", look).reach("nats.lag.recorder") > 0
    assert actors.reach("actors") == 0
