from __future__ import annotations

from bus import telemetry
from tests.exposition import parse

HOSTILE = 'A"} 1\n# TYPE x\\'


def test_processes_are_merged_into_one_valid_text_with_each_family_once() -> None:
    telemetry.candles_total.inc(3, outcome=HOSTILE)
    telemetry.post_seconds.observe(0.02)
    telemetry.archive_up.set(1)
    text = telemetry.render().decode()
    parse(text)
    merged = parse(telemetry.merge({"hot": text, HOSTILE: text}, {"hot": 1, HOSTILE: 1, "trainer": 0}))
    assert merged["mt5_up"].of(process="trainer") == [0]
    assert merged["mt5_up"].of(process="hot") == [1]
    assert merged["mt5_archive_up"].of(process="hot") == [1]
    assert len(merged["mt5_archive_up"].samples) == 2
    assert len(merged["mt5_candles_total"].of(process="hot")) >= 1
    for family in merged.values():
        assert all("process" in dict(labels) for _, labels in family.samples)
    alone = parse(text)
    for name, family in alone.items():
        assert len(merged[name].samples) == 2 * len(family.samples)
        assert (merged[name].kind, merged[name].doc) == (family.kind, family.doc)


def test_what_is_no_prometheus_text_is_left_out() -> None:
    good = "# HELP a A.\n# TYPE a counter\na 1\n"
    for bad in (
        "",
        "nonsense\n",
        "a 2\n",
        "# TYPE a gauge\na 2\n",  # another type than the first process says
        '# HELP mt5_up Forged.\n# TYPE mt5_up gauge\nmt5_up{process="trainer"} 1\n',
        "# HELP a A.\n# TYPE a counter\nother 2\na{\nb 1\n",
    ):
        merged = parse(telemetry.merge({"hot": good, "b": bad}, {"hot": 1}))
        assert merged["a"].of(process="hot") == [1]
        assert merged["mt5_up"].of() == [1]


def test_the_largest_gauge_of_an_actor() -> None:
    gauge = telemetry.cursor_lag
    assert gauge.largest(actor="nobody") is None
    gauge.set(2, actor="both", stream="A")
    gauge.set(5, actor="both", stream="B")
    gauge.set(9, actor="other")
    assert gauge.largest(actor="both") == 5
