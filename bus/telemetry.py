"""Metrics in Prometheus' text format and the W3C trace context that travels in message headers."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
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
actor_restarts_total: Final = CounterMetric("mt5_actor_restarts_total", "Actors restarted.", unlabelled=False)
owns_gauge: Final = GaugeMetric("mt5_owner", "1 while this process does the actor's work, 0 while it is a standby.")
parked_total: Final = CounterMetric("mt5_parked_total", "Messages that an actor parked.", unlabelled=False)
series_gauge: Final = GaugeMetric("mt5_series", "Series known to an actor.")


def render(accept: str = "text/plain") -> tuple[bytes, str]:
    """The whole registry as (body, content type)."""
    body, headers = _render(REGISTRY, [accept] if accept else ["text/plain"])
    return body, headers["Content-Type"]


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


def trace_headers(headers: Mapping[str, str] | None = None) -> dict[str, str]:
    """Message headers that carry on the trace of ``headers``, or begin one."""
    return {TRACEPARENT: child_traceparent((headers or {}).get(TRACEPARENT))}
