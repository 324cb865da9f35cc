"""Drift of inputs: quiet on real files, loud when something changed, once an episode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from actors.core.drift import DAYS, LIMIT, OVER, ROWS, episodes, make_reference, stability, window
from actors.core.inputs import FEATURE_SETS
from tests.oracles_ml import dataset, file_bars

INPUTS = FEATURE_SETS["scale_free_v1"]
DAY = 86_400
TRAINED = 5_000  # rows: the least that a model is trained on

Rows = tuple[NDArray[np.float32], NDArray[np.int64]]


def rows_of(name: str, symbol: str) -> Rows:
    data = dataset({symbol: file_bars(name)})
    values, usable = INPUTS.of_columns(data.columns)
    return values[usable], data.columns.ts[usable]


@pytest.fixture(scope="module")
def euro(data: Path) -> Rows:
    return rows_of("EURUSD_M1_202201.csv", "EURUSD")


def daily(values: NDArray[np.float32], ts: NDArray[np.int64]) -> list[frozenset[str]]:
    """The episodes that begin, day by day, for a model of the first rows."""
    reference = make_reference(INPUTS.inputs, values[:TRAINED], ts[:TRAINED])
    running: frozenset[str] = frozenset()
    out = []
    for day in np.unique(ts[TRAINED:] // DAY)[1:]:
        end = int(np.searchsorted(ts, day * DAY))
        newest = window(ts[TRAINED:end])
        if newest is None:
            continue
        rows = TRAINED + newest
        begun, running = episodes(stability(reference, INPUTS.inputs, values[rows], ts[rows]), running)
        out.append(begun)
    return out


@pytest.mark.parametrize(
    ("name", "symbol", "days"), [("EURUSD_M1_202201.csv", "EURUSD", 25), ("GBPUSD_M1_201202.csv", "GBPUSD", 14)]
)
def test_unchanged_minutes_are_never_told(data: Path, name: str, symbol: str, days: int) -> None:
    """Two months in all, where one false alarm a month is allowed."""
    begun = daily(*rows_of(name, symbol))
    assert len(begun) >= days
    assert not any(begun)


def test_months_of_hours_are_told_of_less_than_once_a_month(data: Path) -> None:
    begun = daily(*rows_of("US30m_H1_202401.csv", "US30.m"))
    assert len(begun) > 100
    assert sum(map(len, begun)) <= 9  # in nine months; its range did double


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("atr_close", lambda x: x * 2),
        ("return_atr", lambda x: np.zeros_like(x)),
        ("macd_atr", lambda x: x + 1.5),
    ],
)
def test_a_changed_input_is_told_once_and_by_name(euro: Rows, what: str, change: object) -> None:
    values, ts = euro[0].copy(), euro[1]
    column = INPUTS.inputs.index(what)
    values[TRAINED:, column] = change(values[TRAINED:, column])  # type: ignore[operator]
    begun = [names for names in daily(values, ts) if names]
    assert begun == [frozenset({what})]


def test_the_index_is_that_of_the_textbook() -> None:
    rng = np.random.default_rng(3)
    ts = np.arange(20_000, dtype=np.int64) * 60
    trained = rng.normal(size=(20_000, 11)).astype(np.float32)
    now = rng.normal(0.3, 1.2, size=(20_000, 11)).astype(np.float32)
    found = stability(make_reference(INPUTS.inputs, trained, ts), INPUTS.inputs, now, ts)
    edges = np.quantile(trained[:, 0].astype(np.float64), np.arange(1, 10) / 10)
    p = np.histogram(now[:, 0], [-np.inf, *edges, np.inf])[0] / len(ts)
    q = np.histogram(trained[:, 0], [-np.inf, *edges, np.inf])[0] / len(ts)
    # The hours are the same in both, and weighting them moves next to nothing.
    assert found["rsi_centred"] == pytest.approx(float(np.sum((p - q) * np.log(p / q))), rel=0.05)
    assert not {"day_sin", "week_cos"} & found.keys()


def test_hours_that_are_rarer_than_in_training_are_no_drift() -> None:
    """An input that is another one at night: nights alone look like the nights of training."""
    ts = np.arange(14 * 1_440, dtype=np.int64) * 60
    night = ts // 3_600 % 24 < 8
    values = np.zeros((len(ts), 11), dtype=np.float32)
    values[:, 6] = np.where(night, 1.0, 3.0) + np.random.default_rng(1).random(len(ts)) / 10
    reference = make_reference(INPUTS.inputs, values, ts)
    assert stability(reference, INPUTS.inputs, values[night], ts[night])["atr_close"] < 0.01


def test_a_window_is_whole_days_and_enough_rows() -> None:
    minutes = np.arange(9 * 1_440, dtype=np.int64) * 60
    assert window(minutes[: (DAYS - 1) * 1_440]) is None
    newest = window(minutes)
    assert newest is not None
    assert len(newest) == DAYS * 1_440
    hours = np.arange(ROWS + 500, dtype=np.int64) * 3_600
    newest = window(hours)
    assert newest is not None
    assert len(newest) == ROWS
    assert window(hours[: ROWS - 1]) is None


def test_an_episode_ends_well_below_where_it_begins() -> None:
    between = (LIMIT + OVER) / 2
    none: frozenset[str] = frozenset()
    assert episodes({"a": between}, none) == (none, none)
    begun, running = episodes({"a": LIMIT + 0.1}, none)
    assert (begun, running) == ({"a"}, {"a"})
    assert episodes({"a": between}, running) == (none, {"a"})
    assert episodes({"a": OVER - 0.01}, running) == (none, none)
