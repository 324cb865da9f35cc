"""``models report``: the page says what the manifest says, escapes it, and stands by itself; pictures come and go with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import Any

import pytest

from bus.store import ModelRecord
from commands import report_pictures as pictures
from commands.report import WINDOW, lived
from commands.report_page import Decision, page
from commands.report_words import headline, tiles

T0 = datetime(2026, 1, 5, tzinfo=UTC)
VOID = {"meta", "line", "circle", "path", "use", "rect", "br"}
PICTURES = ("calibration", "walk", "importance", "probabilities", "equity", "equity-wide")
HOSTILE = '<script>alert("x")</script>&$\\frac{1}$'


class Parsed(HTMLParser):
    """A page taken apart: its tags are closed in order, its text, its attributes."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data.replace("\u00a0", " "))

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def manifest(**changes: Any) -> dict[str, Any]:
    ts = [int(T0.timestamp()) + 3_600 * i for i in range(50)]
    report: dict[str, Any] = {
        "auc": 0.5312,
        "auc_ci": [0.5123, 0.5498],
        "brier": 0.24871,
        "brier_ci": [0.24802, 0.24939],
        "test_rows": 33_123,
        "threshold": 0.5531,
        "baselines": {
            "base_rate": {"brier": 0.24997},
            "logistic": {"auc": 0.5271},
            "champion": None,
        },
        "calibration_curve": [
            {"low": 0.4 + i / 50, "high": 0.42 + i / 50, "count": 331, "mean_prob": 0.41 + i / 50}
            | {"rate": 0.42 + i / 55, "rate_ci": [0.40 + i / 55, 0.44 + i / 55]}
            for i in range(10)
        ],
        "folds": [
            {"test_first_ts": ts[10 * k], "test_last_ts": ts[10 * k + 9], "test_rows": 6_000, "auc": 0.52 + k / 100}
            for k in range(5)
        ],
        "importance": [{"input": f"input_{i}", "mean": 0.01 - i / 1_000, "std": 0.002} for i in range(11)],
        "equity": {
            "ts": ts,
            "model": [i / 10_000 for i in range(50)],
            "buy_hold": [-i / 10_000 for i in range(50)],
            "random": [[-0.001] * 50, [0.001] * 50],
            "threshold": 0.5531,
            "edge": True,
            "net": True,
        },
        "candidates": [
            {"threshold": t, "trades": n, "hit_rate": 0.5234, "hit_rate_ci": [0.5, 0.55], "gross_mean": 4.1e-5}
            | {"net_mean": net, "net_ci": [net - 1e-5, net + 1e-5], "net_low": net - 8e-6}
            for t, n, net in ((0.5, 9_001, -2.22e-5), (0.5531, 1_234, 3.21e-5))
        ],
        "guard": {
            "prefix": {"rows": 32_001, "columns_ok": True},
            "shuffled": {"auc": 0.5051, "n": 8_002, "limit": 0.0257},
            "random_walk": {"auc": 0.4949, "n": 8_003, "limit": 0.0256, "threshold": None},
        },
        "options": {"trees": 200, "points": {}},
        "outliers": {"limit": 9.1, "train_rate": 0.001, "validation_rate": 0.0123},
    }
    return {
        "name": "rf_m1",
        "version": "v1",
        "timeframe": "M1",
        "files": {"model.onnx": {"sha256": "ab" * 32, "size": 1}},
        "libraries": {"numpy": "2.1.0"},
        "feature_set": "scale_free_v1",
        "inputs": ["input_0", "input_1"],
        "symbols": ["EURUSD"],
        "first_ts": "2025-01-02T00:00:00Z",
        "last_ts": "2025-11-30T00:00:00Z",
        "rows": 45_678,
        "expires_at": "2026-02-28T00:00:00Z",
        "threshold": 0.5531,
        "base_rate": 0.5012,
        "recipe": "0123456789ab",
        "report": report,
    } | changes


def record(contents: dict[str, Any], **changes: Any) -> ModelRecord:
    fields: dict[str, Any] = {
        "model_name": "rf_m1",
        "version": "v1",
        "timeframe": "M1",
        "state": "champion",
        "created_at": T0,
        "from_seq": 4_211,
        "activated_at": T0 + timedelta(hours=1),
        "reason": "e-value 132.4 after 3,120 outcomes",
        "by": "scorer",
        "manifest": contents,
    }
    return ModelRecord(**(fields | changes))


def rows(count: int) -> list[dict[str, Any]]:
    """Outcomes whose probability is right by 0.1 for the first half, and as good as the base rate afterwards."""
    return [
        {
            "ts": T0 + timedelta(minutes=i),
            "up": i % 2 == 0,
            "prob_up": 0.5 if i >= count // 2 else 0.6 if i % 2 == 0 else 0.4,
            "base_rate": 0.5,
            "label": 1 if i % 4 == 0 else 0,
            "net": 1e-4 if i % 8 == 0 else None,
        }
        for i in range(count)
    ]


def drawn(document: str) -> set[str]:
    """The pictures of a page, by the prefix of their ids."""
    return {name for name in (*PICTURES, "live") if f'id="{name}-figure_1"' in document}


def test_the_page_says_what_the_manifest_says() -> None:
    decisions = [Decision(T0, "promoted", "scorer", "e-value 132.4")]
    document = page(record(manifest()), lived(rows(5_000)), decisions, T0)
    text = Parsed(document).text
    assert drawn(document) == {*PICTURES, "live"}
    for said in (
        "It ranks better than chance, and its surest signals have earned more than they cost.",
        "It speaks: its signals say up, down or nothing. Put there by the scorer on 5 January 2026, 01:00 UTC: e-value 132.4",
        "0.531 Better than chance.",
        "95 % interval 0.512 to 0.550. Chance is 0.5; a logistic regression reaches 0.527.",
        "0.24871 Yes.",
        "Always saying the base rate gives 0.24997: 0.00126 better.",
        "+0.32 bp It has an edge.",
        "threshold 0.5531, over 1,234 trades out of sample; 95 % interval +0.22 bp to +0.42 bp.",
        "0.5000 9,001 52.3 % (50.0 % to 55.0 %) +0.41 bp \u22120.22 bp (\u22120.32 bp to \u22120.12 bp) \u22120.30 bp",
        "32,001 rows compared equal to the bit",
        "AUC 0.5051 of 8,002 bars 0.5 ± 0.0257",
        "AUC 0.4949 of 8,003 bars 0.5 ± 0.0256",
        "rows learnt from 45,678 rows tested on 33,123 share of rises 50.12 %",
        "bars from, to 2 January 2025, 00:00 UTC to 30 November 2025, 00:00 UTC",
        "CANDLES sequence 4,211",
        "recipe 0123456789ab options trees 200, points none libraries numpy 2.1.0",
        "1.23 % of the later validation block",
        "model.onnx " + "ab" * 32,
        "5 January 2026, 00:00 UTC promoted scorer e-value 132.4",
        "Brier score 0.20500 0.25000",
    ):
        assert said in text
    assert re.search(r'<tr class="chosen"><td class="n">0\.5531</td>', document)


def test_the_page_stands_by_itself() -> None:
    document = page(record(manifest()), lived(rows(5_000)), [], T0)
    parsed = Parsed(document)
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for name, value in parsed.attributes:
        assert not name.startswith("on")
        if name in ("href", "xlink:href", "src"):
            assert value.startswith("#")
            assert value[1:] in ids
    assert set(re.findall(r"url\(#([^)]+)\)", document)) <= set(ids)
    assert not re.findall(r"@import|url\((?!#)", document)
    assert "var(--model)" in document
    assert not re.findall(r"#(?:101011|202022|303033|404044|505055|606066)", document)  # a colour that no theme changes


def test_every_value_is_escaped() -> None:
    contents = manifest(symbols=[HOSTILE], feature_set=HOSTILE, libraries={HOSTILE: HOSTILE}, recipe=HOSTILE)
    contents["files"] = {HOSTILE: {"sha256": HOSTILE}}
    contents["inputs"] = [HOSTILE]
    contents["report"]["importance"][0]["input"] = HOSTILE
    contents["report"]["options"] = {HOSTILE: {HOSTILE: HOSTILE}}
    one = record(contents, reason=HOSTILE, by=HOSTILE, version=HOSTILE, timeframe=HOSTILE, model_name=HOSTILE)
    document = page(one, None, [Decision(T0, HOSTILE, HOSTILE, HOSTILE)], T0)
    parsed = Parsed(document)
    assert "script" not in parsed.tags
    assert parsed.text.count(HOSTILE) >= 15
    assert any(HOSTILE in text for text in parsed.texts if text.strip() == HOSTILE)  # in a picture too, as it is
    assert drawn(document) == set(PICTURES)


LEFT: list[Any] = [None, [], {}, "text", [None], [{}], {"ts": [1, 2], "model": [2]}, {"ts": [1, 2], "model": [2, None]}]


@pytest.mark.parametrize(
    ("key", "draw"),
    [
        ("calibration_curve", pictures.calibration),
        ("calibration_curve", pictures.probabilities),
        ("folds", pictures.walk_forward),
        ("importance", pictures.importance),
        ("equity", lambda report: pictures.equity(report, wide=False)),
    ],
)
def test_a_picture_goes_with_its_figures(key: str, draw: Callable[[dict[str, Any]], str | None]) -> None:
    alone = {key: manifest()["report"][key]}
    assert draw(alone) is not None  # it needs no other
    assert draw({}) is None
    for left in LEFT:
        assert draw({key: left}) is None


@pytest.mark.parametrize("left", LEFT)
def test_what_a_manifest_does_not_hold_is_said(left: Any) -> None:
    contents = manifest()
    contents["report"] = dict.fromkeys(contents["report"], left)
    document = page(record(contents), None, [], T0)
    text = Parsed(document).text
    assert drawn(document) == set()
    assert text.count("does not hold") == 5
    assert "has no AUC" in text
    assert "has no Brier scores to compare" in text
    assert ("trained by a release without the leak guard" in text) == (not isinstance(left, dict) or not left)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("auc_ci", "interval unknown"),
        ("auc", "has no AUC"),
        ("brier", "has no Brier scores to compare"),
        ("baselines", "has no Brier scores to compare"),
        ("candidates", "Mean return of a trade net of cost at the threshold 0.5531."),
    ],
)
def test_a_tile_says_what_it_has_not(key: str, says: str) -> None:
    report = manifest()["report"]
    del report[key]
    assert any(says in tile.detail for tile in tiles(report, 0.5531))


def test_a_manifest_of_an_older_release_makes_a_page() -> None:
    document = page(record({"report": {}}, from_seq=None, activated_at=None, reason=""), None, [], T0)
    text = Parsed(document).text
    assert drawn(document) == set()
    assert "Nothing is known of how well it predicts." in text
    assert "Put there by the scorer." in text
    assert text.count("does not hold") == 5
    assert "No outcome of a live signal of this version is known yet" in text
    assert Parsed(page(record({}), None, [], T0)).text


@pytest.mark.parametrize(
    ("span", "threshold", "says"),
    [
        ([0.51, 0.55], None, "It ranks better than chance, but no threshold has earned more than it costs."),
        ([0.51, 0.55], 0.5531, "It ranks better than chance, and its surest signals have earned more than they cost."),
        ([0.49, 0.55], None, "Its ranking cannot be told from chance, and it has no edge to trade."),
        ([0.49, 0.55], 0.5531, "Its ranking cannot be told from chance, though its surest signals have earned more"),
        ([0.44, 0.49], None, "It ranks worse than chance"),
    ],
)
def test_the_headline_says_no_more_than_the_interval_allows(
    span: list[float], threshold: float | None, says: str
) -> None:
    assert headline(manifest()["report"] | {"auc_ci": span}, threshold).startswith(says)


def test_unknown_costs_are_not_told_as_losses() -> None:
    contents = manifest(threshold=None)
    for candidate in contents["report"]["candidates"]:
        candidate |= {"net_mean": None, "net_ci": None, "net_low": None}
    contents["report"]["equity"] |= {"net": False, "edge": False}
    text = Parsed(page(record(contents), None, [], T0)).text
    assert "what trading it would cost is not known" in text
    assert "no edge Nobody knows: its costs are unknown." in text
    assert "before costs, which are unknown here" in text
    assert "Not after costs" not in text


def test_live_figures_are_those_of_the_outcomes() -> None:
    live = lived(rows(8_000))
    assert live is not None
    assert (live.outcomes, live.trades, live.window) == (8_000, 2_000, WINDOW)
    assert live.base_brier == pytest.approx(0.25)
    assert live.brier == pytest.approx((0.16 + 0.25) / 2)
    assert live.net_mean == pytest.approx(1e-4)
    assert len(live.ts) == len(live.skill) <= 500
    assert live.ts[-1] == rows(8_000)[-1]["ts"].timestamp()
    assert live.skill[0] == pytest.approx(0.09)
    assert live.skill[-1] == pytest.approx(0.0)
    assert live.hit_rate == pytest.approx(0.75)  # a half counts as a rise: right in half of the second half


def test_without_a_known_sign_there_are_no_live_figures() -> None:
    assert lived([]) is None
    assert lived([row | {"up": None} for row in rows(5)]) is None
    few = lived(rows(3))
    assert few is not None
    assert (few.outcomes, few.window) == (3, 1)
    assert "enough outcomes" not in Parsed(page(record(manifest()), few, [], T0)).text
