"""Metrics in Prometheus' text format and the W3C trace context that travels in message headers."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from datetime import datetime
from typing import Final

from aioprometheus.collectors import Counter, Gauge, Histogram, Registry
from aioprometheus.renderer import render as _render

TRACEPARENT: Final = "traceparent"

# POST to acknowledgement and candle to signal live between one and a few hundred milliseconds.
LATENCY_BUCKETS: Final = [
    0.0005,
    0.001,
    0.002,
    0.003,
    0.005,
    0.008,
    0.013,
    0.02,
    0.035,
    0.06,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    10,
]

REGISTRY: Final = Registry()
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def _escape(value: str) -> str:
    # aioprometheus escapes nothing: a quote in a symbol would break or forge the whole scrape.
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _safe(labels: Mapping[str, str]) -> dict[str, str]:
    return {name: _escape(value) for name, value in labels.items()}


class CounterMetric:
    """A counter that starts at 0, so that its first increase is visible to rate()."""

    def __init__(self, name: str, doc: str, *, unlabelled: bool = True) -> None:
        self._metric = Counter(name, doc, registry=REGISTRY)
        if unlabelled:
            self._metric.add({}, 0)

    def inc(self, amount: float = 1, **labels: str) -> None:
        self._metric.add(_safe(labels), amount)

    def value(self, **labels: str) -> float:
        try:
            return float(str(self._metric.get(_safe(labels))))
        except KeyError:
            return 0.0


class GaugeMetric:
    def __init__(self, name: str, doc: str) -> None:
        self._metric = Gauge(name, doc, registry=REGISTRY)

    def set(self, value: float, **labels: str) -> None:
        self._metric.set(_safe(labels), value)

    def largest(self, **labels: str) -> float | None:
        """The largest value among those that have these labels; None where there is none."""
        wanted = _safe(labels).items()
        found = [float(str(value)) for known, value in self._metric.get_all() if wanted <= known.items()]
        return max(found, default=None)


class HistogramMetric:
    """No symbol label here: rendering cost and cardinality would grow with the series."""

    def __init__(self, name: str, doc: str, buckets: list[float] | None = None) -> None:
        self._metric = Histogram(name, doc, registry=REGISTRY, buckets=buckets or LATENCY_BUCKETS)

    def observe(self, value: float, **labels: str) -> None:
        self._metric.observe(_safe(labels), value)


candles_total: Final = CounterMetric("mt5_candles_total", "Candles by what became of them.", unlabelled=False)
rejected_total: Final = CounterMetric("mt5_rejected_candles_total", "Rejected candles by reason.", unlabelled=False)
posts_total: Final = CounterMetric("mt5_ingest_posts_total", "POST /ingest by status.", unlabelled=False)
post_seconds: Final = HistogramMetric("mt5_ingest_seconds", "POST /ingest from first byte to answer.")
feature_rows_total: Final = CounterMetric("mt5_feature_rows_total", "Feature rows published.")
candle_revisions_total: Final = CounterMetric(
    "mt5_candle_revisions_total", "Bars revised or withdrawn.", unlabelled=False
)
feature_rebuilds_total: Final = CounterMetric("mt5_feature_rebuilds_total", "Series recomputed from the log.")
signals_total: Final = CounterMetric("mt5_signals_total", "Signals published, by abstention.", unlabelled=False)
signal_seconds: Final = HistogramMetric("mt5_candle_to_signal_seconds", "Receipt of a live candle to its signal.")
recorder_rows_total: Final = CounterMetric("mt5_recorder_rows_total", "Rows archived, by table.", unlabelled=False)
archive_up: Final = GaugeMetric("mt5_archive_up", "1 while PostgreSQL takes what the recorder writes.")
cursor_lag: Final = GaugeMetric("mt5_cursor_lag_messages", "Messages in the stream behind an actor's cursor.")
cursor_lag_seconds: Final = GaugeMetric("mt5_cursor_lag_seconds", "Age of the newest message an actor has handled.")
model_changes_total: Final = CounterMetric(
    "mt5_model_changes_total", "Decisions on which version of a model speaks.", unlabelled=False
)
actor_restarts_total: Final = CounterMetric("mt5_actor_restarts_total", "Actors restarted.", unlabelled=False)
owns_gauge: Final = GaugeMetric("mt5_owner", "1 while this process does the actor's work, 0 while it is a standby.")
parked_total: Final = CounterMetric("mt5_parked_total", "Messages that an actor parked.", unlabelled=False)
outcomes_total: Final = CounterMetric("mt5_outcomes_total", "Outcomes stored, by the model's state.", unlabelled=False)
outcomes_void_total: Final = CounterMetric(
    "mt5_outcomes_void_total", "Outcomes whose signal was superseded afterwards."
)
score_gauge: Final = GaugeMetric(
    "mt5_model_score", "The scorecard's figures of the versions that serve, by model, symbol and timeframe."
)
evidence_gauge: Final = GaugeMetric("mt5_model_evidence", "E-values by model, trial and what they speak for, as log10.")
decisions_total: Final = CounterMetric("mt5_model_decisions_total", "Decisions asked for, by action.", unlabelled=False)
outliers_gauge: Final = GaugeMetric(
    "mt5_model_outliers", "Share of a model's newest signals that are out of distribution."
)
drift_gauge: Final = GaugeMetric("mt5_drift", "How far inputs and outcomes are from the training's; 1 raises an alert.")
audited_total: Final = CounterMetric(
    "mt5_audited_signals_total", "Signals that were rebuilt and compared, by result.", unlabelled=False
)
backup_made_gauge: Final = GaugeMetric(
    "mt5_backup_last_success_timestamp_seconds", "When the newest backup was begun; with a target, that is there."
)
backup_newest_gauge: Final = GaugeMetric(
    "mt5_backup_newest_data_timestamp_seconds", "When the newest candle in the newest backup was received."
)
backup_bytes_gauge: Final = GaugeMetric("mt5_backup_bytes", "Size of the newest backup.")
backup_seconds_gauge: Final = GaugeMetric("mt5_backup_seconds", "How long the newest backup took to make.")
backup_runs_total: Final = CounterMetric("mt5_backup_runs_total", "Runs of a backup, by outcome.", unlabelled=False)
drill_at_gauge: Final = GaugeMetric("mt5_drill_last_success_timestamp_seconds", "When a restore was last practised.")
drill_rto_gauge: Final = GaugeMetric("mt5_drill_rto_seconds", "How long the last practised restore took.")
drill_rpo_gauge: Final = GaugeMetric("mt5_drill_rpo_seconds", "Age of the newest candle in it by then.")
notices_total: Final = CounterMetric(
    "mt5_notices_total", "Tries to send a notice, by sender and result.", unlabelled=False
)
outbox_gauge: Final = GaugeMetric("mt5_outbox_waiting", "Notices that wait to be sent, by sender.")
check_gauge: Final = GaugeMetric("mt5_check_status", "The monitor's checks: 0 ok, 1 warning, 2 critical, -1 skipped.")
check_value_gauge: Final = GaugeMetric("mt5_check_value", "What a check measured, in its own unit.")
check_results_total: Final = CounterMetric(
    "mt5_check_results_total", "Results of the monitor's checks, by status.", unlabelled=False
)
incidents_gauge: Final = GaugeMetric("mt5_incidents_open", "Incidents that were told and are not over.")
series_gauge: Final = GaugeMetric("mt5_series", "Series known to an actor.")


def render() -> bytes:
    """The whole registry as text of :data:`CONTENT_TYPE`."""
    body: bytes = _render(REGISTRY, ["text/plain"])[0]
    return body


_SAMPLE: Final = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[^"{}]|"(?:[^"\\]|\\.)*")*)\})? (\S+)')
_SUFFIXES: Final = ("", "_bucket", "_sum", "_count")
_UP: Final = "mt5_up"


def merge(texts: Mapping[str, str], up: Mapping[str, int]) -> str:
    """Several processes' texts as one: each family once, each sample labelled with the ``process`` that it is of.

    ``up`` becomes the family ``mt5_up``. What is no Prometheus text, or gives a family another type than before, is left out.
    """
    heads: dict[str, tuple[str, str]] = {}
    samples: dict[str, list[str]] = {}
    for process, text in texts.items():
        label = f'process="{_escape(process)}"'
        docs: dict[str, str] = {}
        family, names = "", frozenset[str]()
        for line in text.split("\n"):
            words = line.split(" ", 3)
            if line.startswith("# HELP ") and len(words) == 4:
                docs[words[2]] = line
            elif line.startswith("# TYPE ") and len(words) == 4:
                family, names = words[2], frozenset(words[2] + suffix for suffix in _SUFFIXES)
                if family == _UP or heads.setdefault(family, (docs.get(family, ""), line))[1] != line:
                    names = frozenset()
            elif (found := _SAMPLE.fullmatch(line)) and found[1] in names:
                labels = f"{label},{found[2]}" if found[2] else label
                samples.setdefault(family, []).append(f"{found[1]}{{{labels}}} {found[3]}")
    out = [f"# HELP {_UP} 1 where the process answered this scrape.", f"# TYPE {_UP} gauge"]
    out += [f'{_UP}{{process="{_escape(process)}"}} {value}' for process, value in up.items()]
    for family, head in heads.items():
        out += [*filter(None, head), *samples.get(family, ())]
    return "\n".join(out) + "\n"


def new_traceparent() -> str:
    """A sampled W3C trace context with fresh ids."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


def child_traceparent(parent: str | None) -> str:
    """The same trace with a fresh span id; a new trace where the parent is absent or malformed."""
    if parent is not None:
        parts = parent.split("-")
        if len(parts) == 4 and len(parts[1]) == 32 and len(parts[2]) == 16:
            return f"{parts[0]}-{parts[1]}-{secrets.token_hex(8)}-{parts[3]}"
    return new_traceparent()


def trace_id(headers: Mapping[str, str]) -> str | None:
    """The trace that a message belongs to; None without a well-formed ``traceparent``."""
    parts = headers.get(TRACEPARENT, "").split("-")
    return parts[1] if len(parts) == 4 and len(parts[1]) == 32 else None


def time_of(headers: Mapping[str, str], name: str) -> datetime | None:
    """A header's time; None where it is absent or is no time: a message is not refused for what tells of its making."""
    try:
        at = datetime.fromisoformat(headers[name])
    except (KeyError, ValueError):
        return None
    return at if at.tzinfo is not None else None


def trace_headers(headers: Mapping[str, str] | None = None) -> dict[str, str]:
    """Message headers that carry on the trace of ``headers``, or begin one."""
    return {TRACEPARENT: child_traceparent((headers or {}).get(TRACEPARENT))}
