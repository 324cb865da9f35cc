"""Which version of a bar counts: the rules one by one, and that neither order nor repetition changes the end."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.core.history import History, revise, take_in
from actors.core.series import (
    CHECKPOINT_EVERY,
    Change,
    Checkpoint,
    Mark,
    Origin,
    SeriesState,
    append,
    effect,
    epoch,
    origin,
    own,
    split,
)
from schema.messages import Candle, CandleBlock, FeatureRow
from tests.builders import LIVE, block, walk


class Calculator:
    """The feature actor's decisions without a bus: a log, the state, and a history window as the actor keeps it."""

    def __init__(self, priority: Sequence[str] = (), window: bool = False) -> None:
        self.log: list[CandleBlock] = []
        self.state = SeriesState("EURUSD", "M1")
        self.priority = priority
        self.window = window
        self.points: list[Checkpoint] = []
        self.rows: dict[datetime, FeatureRow] = {}
        self.changes: list[Change] = []

    def take(self, message: CandleBlock) -> Change:
        self.log.append(message)
        seq = len(self.log)
        new = origin(message, seq)
        self.state.hear(new, self.priority)
        fresh, older = split(self.state, message.rows, new)
        if message.withdrawn or older:
            change = revise(self._history(message, seq), self.state, message, seq, self.priority)
        else:
            change = append(self.state, fresh, new)
        for _, data in change.checkpoints:
            point = msgspec.json.decode(data, type=Checkpoint)
            self.points = [p for p in self.points if p.features.bars < point.features.bars] + [point]
        self._archive(change)
        return change

    def _history(self, message: CandleBlock, seq: int) -> History:
        earliest = min([epoch(r) for r in message.rows] + [int(t.timestamp()) for t in message.withdrawn])
        base = max(
            (p for p in self.points if p.last_ts < earliest and p.seq < seq), key=lambda p: p.last_ts, default=None
        )
        base = base if self.window else None
        history = History(base, self.state.owner_before(base.start if base is not None else 1))
        for number, old in enumerate(self.log[:-1], 1):
            if history.base is None or number >= history.base.start:
                history.apply(old, number, self.priority)
        return history

    def _archive(self, change: Change) -> None:
        self.changes.append(change)
        for gone in change.withdrawn:
            self.rows.pop(gone.ts, None)
        for row in change.rows:
            self.rows[row.ts] = row
        for fill in change.fills:
            if fill.ts in self.rows:
                self.rows[fill.ts] = msgspec.structs.replace(self.rows[fill.ts], fwd_ret_5=fill.fwd_ret_5)

    @property
    def archive(self) -> list[FeatureRow]:
        return [plain(row) for _, row in sorted(self.rows.items())]


def plain(row: FeatureRow) -> FeatureRow:
    return msgspec.structs.replace(
        row,
        revision=0,
        replaces=None,
        replaces_seq=None,
        source=None,
        ts_source="utc",
        live=True,
        brought_seq=None,
        server_time=None,
        heard_at=None,
    )


def clean(rows: Sequence[Candle]) -> list[FeatureRow]:
    return [plain(row) for row in append(SeriesState("EURUSD", "M1"), rows, LIVE).rows]


def live(rows: Sequence[Candle], clock: int | None = None, source: str | None = None, **more: Any) -> CandleBlock:
    return block(rows, **({"replay": False, "server_time": clock, "source": source} | more))


def other(row: Candle, by: float = 1e-4) -> Candle:
    return msgspec.structs.replace(row, high=row.high + by)


# --- one rule at a time --------------------------------------------------------------------------------------------

A, B = 1, 2


@pytest.mark.parametrize(
    ("current", "mark", "new", "owner", "former", "expected"),
    [
        (Mark(A, None, ""), A, ("", None), "", (), "same"),
        (Mark(A, None, ""), B, ("", None), "", (), "revised"),
        (Mark(A, None, ""), B, ("", None), "", (B,), "stale"),
        (Mark(A, 5, ""), B, ("", 4), "", (), "stale"),
        (Mark(A, 5, ""), B, ("", 5), "", (), "revised"),
        (Mark(A, 5, ""), B, ("", 5), "", (B,), "stale"),
        (Mark(A, 5, ""), B, ("", 6), "", (B,), "revised"),
        (Mark(A, 5, ""), A, ("", 6), "", (), "confirmed"),
        (Mark(A, 5, ""), B, ("", None), "", (), "revised"),
        (Mark(A, 5, "x"), B, ("y", 9), "x", (), "foreign"),
        (Mark(A, 5, "y"), B, ("y", 9), "x", (), "foreign"),
        (Mark(A, 5, "y"), A, ("y", 9), "x", (), "confirmed"),
        (Mark(A, 9, "y"), B, ("x", 5), "x", (), "revised"),
        (Mark(A, 9, "y"), A, ("x", 5), "x", (), "confirmed"),
        (Mark(A, None, "y"), B, ("x", None), None, (), "revised"),
        (Mark(A, None, "y"), B, ("x", None), None, (B,), "stale"),
    ],
)
def test_what_a_version_does(
    current: Mark, mark: int, new: tuple[str, int | None], owner: str | None, former: tuple[int, ...], expected: str
) -> None:
    assert effect(current, mark, Origin(new[0], new[1], True, True, "utc", 1), owner, former) == expected


@pytest.mark.parametrize(("server", "utc", "expected"), [(-60, 3_540, "revised"), (60, -3_540, "stale")])
def test_in_the_repeated_hour_utc_orders_what_server_time_cannot(server: int, utc: int, expected: str) -> None:
    """A correction a minute before the hour's second pass is over bears a server time of before what it corrects."""
    current = Mark(A, 7_200, "x", "server", 0)
    new = Origin("x", 7_200 + server, True, True, "server", 1, utc)
    assert effect(current, B, new, "x", (B,)) == expected
    # One of the two is of before UTC was sent: server time is all that both have.
    assert effect(current._replace(server_utc=None), B, new, "x", (B,)) != expected


def test_a_correction_in_autumns_repeated_hour_counts() -> None:
    rows = walk(10)
    calculator = Calculator()
    calculator.take(live([*rows[:9], other(rows[9])], clock=10_000, source="a", server_utc=0))
    calculator.take(live([rows[9]], clock=9_000, source="a", server_utc=2_600))
    calculator.take(live([rows[8], other(rows[9])], clock=10_000, source="a", server_utc=0))
    assert calculator.archive == clean(rows)


def test_the_first_live_source_owns_and_priority_overrules() -> None:
    def heard(name: str, owns: bool = True) -> Origin:
        return Origin(name, None, owns, True, "utc", 1)

    assert own(None, heard("a"), ()) == "a"
    assert own("a", heard("b"), ()) == "a"
    assert own("b", heard("a"), ("a", "b")) == "a"
    assert own("a", heard("b"), ("a", "b")) == "a"
    assert own("c", heard("b"), ("a", "b")) == "b"
    assert own(None, heard("file", owns=False), ()) is None


def test_others_fill_holes_and_never_revise() -> None:
    rows = walk(30)
    calculator = Calculator()
    calculator.take(live([*rows[:10], *rows[11:]], source="a"))
    calculator.take(live([other(row) for row in rows[12:20]], source="b"))
    calculator.take(live([rows[10]], source="b"))
    assert calculator.archive == clean(rows)
    calculator.take(live([other(rows[10])], source="b"))
    calculator.take(live([other(rows[10])], source="b", clock=99))
    assert calculator.archive == clean(rows)
    calculator.take(live([other(rows[10])], source="a"))
    assert calculator.rows[rows[10].ts].high == other(rows[10]).high


def test_a_revision_supersedes_from_its_bar_on_and_names_what_it_replaces() -> None:
    rows = walk(400)
    calculator = Calculator()
    wrong = [*rows[:350], other(rows[350]), *rows[351:]]
    calculator.take(live(wrong))
    before = dict(calculator.rows)
    change = calculator.take(live([rows[350]]))
    assert [row.ts for row in change.rows] == [row.ts for row in rows[350:]]
    assert change.rows[0].revision == 1
    assert all(row.replaces and row.replaces_seq == 1 for row in change.rows)
    assert calculator.archive == clean(rows)
    assert [before[row.ts].rsi for row in rows[:350]] == [calculator.rows[row.ts].rsi for row in rows[:350]]


def test_history_that_is_repeated_live_makes_no_signals_and_a_live_revision_does() -> None:
    rows = walk(60)
    calculator = Calculator()
    calculator.take(live(rows, history=True))
    calculator.take(live(rows[-10:]))
    assert not any(row.live for row in calculator.rows.values())
    change = calculator.take(live([other(rows[50])]))
    assert [row.live for row in change.rows] == [True] + [False] * 9
    assert all(row.replaces is None for row in change.rows)


def test_a_withdrawn_bar_goes_and_may_come_back() -> None:
    rows = walk(100)
    calculator = Calculator()
    calculator.take(live(rows))
    change = calculator.take(msgspec.structs.replace(live([]), withdrawn=(rows[40].ts, rows[99].ts)))
    assert [(gone.ts, gone.revision) for gone in change.withdrawn] == [(rows[40].ts, 1), (rows[99].ts, 1)]
    assert calculator.archive == clean([*rows[:40], *rows[41:99]])
    calculator.take(live([rows[40]]))
    calculator.take(live([rows[99]]))
    assert calculator.archive == clean(rows)
    assert calculator.rows[rows[40].ts].revision == 2


def test_a_window_from_a_checkpoint_gives_the_bits_of_the_whole_series() -> None:
    rows = walk(3 * CHECKPOINT_EVERY + 300)
    whole, window = Calculator(), Calculator(window=True)
    for at in range(0, len(rows), 700):
        message = live([row for row in rows[at : at + 700] if row is not rows[2_500]])
        for calculator in (whole, window):
            calculator.take(message)
    assert len(window.points) == 3
    history = window._history(live([rows[2_500]]), 99)
    assert history.base is not None and len(history) < 1_400
    for late in ([rows[2_500]], [other(rows[2_047])], [other(rows[3_300])], [rows[2_047]]):
        message = live(late)
        a, b = whole.take(message), window.take(message)
        assert (a.rows, a.fills, a.checkpoints) == (b.rows, b.fills, b.checkpoints)
    assert whole.archive == window.archive
    assert whole.state == window.state


def test_a_window_judges_its_messages_by_the_owner_of_their_time() -> None:
    rows = walk(2 * CHECKPOINT_EVERY)
    calculator = Calculator(priority=("a", "b"), window=True)
    calculator.take(live(rows, source="b"))
    corrected = other(rows[1_500])
    calculator.take(live([corrected], source="b"))
    calculator.take(live([other(rows[-1])], source="a"))  # owns from here on
    calculator.take(live([other(rows[1_600])], source="a"))
    for at in (1_500, 1_600, -1):
        rows[at] = other(rows[at])
    assert calculator.archive == clean(rows)


def test_a_restored_bar_remembers_what_it_was() -> None:
    rows = walk(10)
    history = History(owner="a")
    for at, row in enumerate(rows):
        history.restore(row, int(at == 5), Origin("a", 100, False, True, "utc", 7))
    history.recall(other(rows[5]))
    # The first of them came back since.
    history.recall_withdrawals([(epoch(rows[2]), 4, 6), (epoch(walk(11)[10]), 4, 6)])
    assert history.apply(live([other(rows[5])], source="a"), 8, ()) is None
    assert history.apply(live([other(rows[6])], source="a", clock=99), 9, ()) is None
    assert history.apply(live([other(rows[6])], source="a", clock=100), 10, ()) == 6
    assert history.apply(live([walk(11)[10]], source="a"), 11, ()) == 10
    state = SeriesState("EURUSD", "M1")
    made = history.rows(0, state).rows
    assert [row.revision for row in made] == [0] * 5 + [1, 1] + [0] * 3 + [5]
    assert [row.brought_seq for row in made] == [7] * 6 + [10] + [7] * 3 + [11]


def test_a_restored_row_was_last_published_with_whatever_changed_a_bar_before_it() -> None:
    rows = walk(6)
    history = History()
    for row, seq, applied in zip(rows, (1, 2, 9, 3, 12, 13), (1, 2, 9, 3, 15, 13), strict=True):
        history.restore(row, 0, Origin("", None, False, True, "utc", seq), applied)
    assert list(history.published) == [1, 2, 9, 9, 15, 15]
    # A bar between the first two was withdrawn with 10, when the last two had not come yet.
    history.recall_withdrawals([(epoch(rows[0]) + 30, 1, 10)])
    assert list(history.published) == [1, 10, 10, 10, 15, 15]


def test_deferred_history_has_the_place_that_the_log_gives_it() -> None:
    rows = walk(120)
    messages = [
        live(rows[100:110]),
        live([*rows[90:95], other(rows[95]), *rows[96:100]], history=True),  # waits
        live(rows[90:111]),
    ]
    before, after = History(), History()
    calculator = Calculator()
    for seq, message in enumerate(messages[:2], 1):
        after.apply(message, seq, ())
        if seq == 1:
            before.apply(message, seq, ())
            calculator.take(message)
    calculator._archive(take_in(before, after, calculator.state, messages[2:], 3, ()))
    assert calculator.archive == clean(rows[90:111])
    assert calculator.rows[rows[95].ts].revision == 1
    assert [row.ts for row in calculator.changes[-1].rows if row.replaces] == [row.ts for row in rows[100:110]]


def test_a_bars_age_is_judged_by_its_first_live_version() -> None:
    rows = walk(30)
    calculator = Calculator()
    first = live(rows[:20])
    calculator.take(first)
    calculator.take(live(rows[20:], history=True))
    second = live([other(rows[10]), other(rows[25])], received_at=datetime(2030, 1, 1, tzinfo=UTC))
    rows_made = calculator.take(second).rows
    heard = {row.ts: row.heard_at for row in rows_made if row.live}
    assert [heard[row.ts] for row in rows[10:20]] == [first.received_at] * 10
    assert heard[rows[25].ts] == second.received_at  # history until now
    replayed = Calculator()
    replayed.take(block(rows))
    assert [row.heard_at for row in replayed.take(live([other(rows[28])])).rows] == [rows[28].ts, rows[29].ts]


def test_deferred_history_is_one_recomputation() -> None:
    rows = walk(500)
    calculator = Calculator()
    calculator.take(live(rows[400:]))
    older = [live(rows[at : at + 100], history=True) for at in (300, 200, 100, 0)]
    before, after = History(), History()
    for seq, message in enumerate([calculator.log[0], *older], 1):
        after.apply(message, seq, ())
        if seq == 1:
            before.apply(message, seq, ())
    change = take_in(before, after, calculator.state, [], 5, ())
    calculator._archive(change)
    assert calculator.archive == clean(rows)
    assert sum(row.replaces is not None for row in change.rows) == 100
    fresh, older_rows = split(calculator.state, walk(501)[499:], LIVE)
    assert (len(fresh), older_rows) == (1, [])


# --- every order ---------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(data=st.data(), window=st.booleans())
def test_any_order_repetition_and_cut_of_clocked_versions_ends_the_same(data: st.DataObject, window: bool) -> None:
    """Corrections and corrections taken back, from the owner; another terminal's values in between."""
    rows = walk(40)
    messages: list[CandleBlock] = []
    for at, row in enumerate(rows):
        versions = data.draw(st.lists(st.integers(0, 3), max_size=3))
        for number, version in enumerate([*versions, 0]):
            candle = row if version == 0 else other(row, version * 1e-4)
            messages.append(live([candle], clock=1_000 + 10 * at + number, source="a"))
        if data.draw(st.booleans()):
            messages.append(live([other(row, 7e-4)], clock=5_000, source="b"))
    again = data.draw(st.lists(st.sampled_from(messages), max_size=10))
    calculator = Calculator(priority=("a", "b"), window=window)
    for message in data.draw(st.permutations(messages + again)):
        calculator.take(message)
    assert calculator.archive == clean(rows)


@settings(max_examples=30)
@given(order=st.permutations(range(30)), cut=st.integers(1, 7), again=st.lists(st.integers(0, 29), max_size=10))
def test_any_order_of_unclocked_bars_ends_the_same(order: list[int], cut: int, again: list[int]) -> None:
    rows = walk(30)
    sequence = [*order, *again]
    calculator = Calculator()
    for at in range(0, len(sequence), cut):
        part = sorted({i: rows[i] for i in sequence[at : at + cut]}.items())
        calculator.take(live([row for _, row in part]))
    assert calculator.archive == clean(rows)
    assert all(row.revision == 0 for row in calculator.rows.values())


def test_times_are_utc() -> None:
    assert clean(walk(1))[0].ts.tzinfo is UTC
